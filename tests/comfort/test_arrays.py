"""Arrays lie over a buffer's memory, and hold it for as long as anything made of them lives."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from children import run_child
from forked import in_child
from kernel_oracle import PAGE
from leaks import read_mappings
from vmm_linux import VMM, Mdl, Seal
from vmm_linux.errors import Busy, InvalidArgument, NoCapability, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 16 * PAGE


def mapped_bytes() -> int:
    """How many bytes of buffers this process maps."""
    return sum(end - start for (start, end), _, where in read_mappings() if "/memfd:" in where)


def test_an_array_is_the_buffer_s_memory(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    array = mdl.array((8, 16), "i4")
    assert (array.dtype.name, *array.shape) == ("int32", 8, 16)
    assert (array.flags.c_contiguous, array.flags.aligned, array.flags.owndata) == (
        True,
        True,
        False,
    )
    array[:] = np.arange(128).reshape(8, 16)
    assert mdl.map().read(4, 4 * 17) == (17).to_bytes(4, "little")
    other = mdl.array((8, 16), "i4")
    other[0, 0] = -1
    assert array[0, 0] == -1
    assert np.shares_memory(array, array[2:3].T)


def test_the_defaults_are_float64_from_the_start(vmm: VMM) -> None:
    array = vmm.mdl(SIZE).array(3)
    assert (array.dtype.name, *array.shape) == ("float64", 3)
    assert vmm.mdl(SIZE).array([2, 3]).shape == (2, 3)
    assert vmm.mdl(SIZE).array((), "f4").shape == ()
    assert vmm.mdl(SIZE).array(np.int64(5)).shape == (5,)


@pytest.mark.parametrize(
    "dtype",
    [
        "u1",
        ">i2",
        "f2",
        "c16",
        "?",
        "M8[ns]",
        "S7",
        "U3",
        "V5",
        "g",
        [("a", "u1"), ("b", "f8")],
        ("i4", (2, 2)),
        np.uint8,
        float,
    ],
    ids=str,
)
def test_every_dtype_without_objects_will_do(dtype: Any, vmm: VMM) -> None:  # noqa: ANN401
    mdl = vmm.mdl(SIZE)
    array = mdl.array((2, 3), dtype, PAGE)
    assert array.tobytes() == bytes(array.nbytes)
    assert array.flags.aligned
    array.view()  # as any array
    whole = mdl.array(SIZE, "u1")
    whole[PAGE : PAGE + array.nbytes] = 1
    assert array.tobytes() == b"\1" * array.nbytes


def test_only_the_pages_that_are_needed_are_mapped(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    before = mapped_bytes()
    array = mdl.array(PAGE, "u1", PAGE + 8)
    assert mapped_bytes() == before + 2 * PAGE
    array[0] = 9
    assert mdl.map().read(1, PAGE + 8) == b"\x09"
    last = mdl.array(1, "f8", SIZE - 8)
    assert mapped_bytes() == before + 3 * PAGE + 0 * last.nbytes


DERIVED: dict[str, Callable[[Any], object]] = {
    "itself": lambda array: array,
    "slice": lambda array: array[1:2],
    "transposed": lambda array: array.T[3:, 1:],
    "strided": lambda array: array.reshape(-1)[::7],
    "other dtype": lambda array: array.view("u2"),
    "buffer": lambda array: np.frombuffer(array, "u1"),
    "memoryview": lambda array: memoryview(array)[1:],
    "iterator": iter,
    "flat": lambda array: array.flat,
    "windows": lambda array: np.lib.stride_tricks.sliding_window_view(array, (2, 2)),
    "masked": np.ma.masked_array,
    "row": lambda array: array[0, 0:1],
}


@pytest.mark.parametrize("name", DERIVED)
def test_the_memory_stays_as_long_as_anything_made_of_it(name: str) -> None:
    before = mapped_bytes()
    with VMM() as vmm:
        mdl = vmm.mdl(SIZE)
        array = mdl.array((8, 8), "u4")
        array[:] = 5
        derived = DERIVED[name](array)
        del array
        mdl.close()
        gc.collect()
        assert mapped_bytes() == before + PAGE
    gc.collect()
    assert mapped_bytes() == before + PAGE
    assert "5" in str(next(derived) if hasattr(derived, "__next__") else np.asarray(derived))
    del derived
    gc.collect()
    assert mapped_bytes() == before


def test_the_last_array_unmaps_with_its_vmm_open_too(vmm: VMM) -> None:
    before = mapped_bytes()
    mdl = vmm.mdl(SIZE)
    arrays = [mdl.array(2), mdl.array(3), mdl.array(2, "u1", PAGE)]
    assert mapped_bytes() == before + 2 * PAGE
    arrays.pop()
    assert mapped_bytes() == before + PAGE
    arrays.pop()
    assert mapped_bytes() == before + PAGE
    arrays.pop()
    assert mapped_bytes() == before
    mdl.freeze()


def test_scalars_are_copies_and_hold_nothing(vmm: VMM) -> None:
    before = mapped_bytes()
    number = vmm.mdl(SIZE).array(4)[2]
    assert (number, mapped_bytes()) == (0.0, before)


def test_an_array_in_a_cycle_of_garbage_goes_with_it(vmm: VMM) -> None:
    class Node:
        array: np.ndarray[Any, Any]
        itself: Node

    before = mapped_bytes()
    node = Node()
    node.array, node.itself = vmm.mdl(SIZE).array(4), node
    gone = weakref.ref(node)
    del node
    gc.collect()
    assert (gone(), mapped_bytes()) == (None, before)


def test_writable_where_rights_and_seals_allow_it(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    assert mdl.array(1).flags.writeable
    assert not mdl.array(1, writable=False).flags.writeable
    assert mdl.array(1, writable=True).flags.writeable
    reader = mdl.read_only()
    assert not reader.array(1).flags.writeable
    with pytest.raises(NoCapability, match="MAP_WRITE"):
        reader.array(1, writable=True)
    with pytest.raises(ValueError, match="WRITEABLE"):
        reader.array(1).setflags(write=True)
    mdl.freeze()
    assert (mdl.seals, mdl.array(1).flags.writeable) == (Seal.FREEZE, False)
    with pytest.raises(NoCapability, match="sealed"):
        mdl.array(1, writable=True)


def test_a_writable_array_keeps_the_buffer_from_being_frozen(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    array = mdl.array(1)[:]
    with pytest.raises(Busy):
        mdl.freeze()
    array[0] = 2.5
    del array
    mdl.freeze()
    assert mdl.array(1)[0] == 2.5


def test_a_clone_s_array_is_the_window(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.array(SIZE, "u1")[PAGE] = 3
    assert mdl.clone(PAGE, PAGE).array(PAGE, "u1")[0] == 3


def test_a_forked_child_writes_into_the_same_array(vmm: VMM) -> None:
    array = vmm.mdl(SIZE).array(4)

    def child_writes() -> None:
        array[1] = 8.0

    in_child(child_writes)
    assert array.tolist() == [0.0, 8.0, 0.0, 0.0]


# ---- bad input -------------------------------------------------------------------------------

WRONG_DTYPES = [
    "O",
    object,
    [("a", "u1"), ("b", "O")],
    "S",
    "U0",
    "V0",
    [],
    "no such",
    5,
    {},
]
WRONG_SHAPES = [
    0,
    (3, 0),
    -1,
    (2, -2),
    2.0,
    "3",
    None,
    True,
    (2, False),
    (2, (3,)),
    SIZE,
    (1 << 40, 1 << 40),
    2**64,
    (1,) * 100,
    {2},
]
WRONG_OFFSETS = [-8, 1, 4, SIZE, SIZE + 8, SIZE - 8, 2**64, True, 0.0, "0", None]


class Moody:
    """What NumPy asks for a dtype, in vain."""

    @property
    def dtype(self) -> object:
        """None that there is."""
        raise RuntimeError("not today")


def test_whatever_goes_wrong_in_a_dtype_is_told(vmm: VMM) -> None:
    refused(
        vmm, lambda mdl: mdl.array(2, Moody()), "dtype is a Moody, of which NumPy makes no dtype"
    )
    offsets = {"names": ["a"], "formats": ["u1"], "offsets": [2**70]}
    refused(vmm, lambda mdl: mdl.array(2, offsets), "dtype is a dict, of which")
    refused(vmm, lambda mdl: mdl.array(2, 10**5000), r"dtype is a number of \d+ bits of type int")


def test_shapes_too_large_for_a_message_are_refused(vmm: VMM) -> None:
    refused(vmm, lambda mdl: mdl.array((2**63,) * 300), "is not inside the buffer")
    refused(vmm, lambda mdl: mdl.array(10**5000), r"number of \d+ bits")
    refused(vmm, lambda mdl: mdl.array(1, "u1", 10**5000), r"number of \d+ bits")


@pytest.mark.parametrize("dtype", WRONG_DTYPES, ids=repr)
def test_dtypes_that_are_no_bytes_are_refused(dtype: Any, vmm: VMM) -> None:  # noqa: ANN401
    refused(vmm, lambda mdl: mdl.array(2, dtype), "dtype")


@pytest.mark.parametrize("shape", WRONG_SHAPES, ids=repr)
def test_shapes_that_are_none_or_too_large_are_refused(shape: Any, vmm: VMM) -> None:  # noqa: ANN401
    refused(vmm, lambda mdl: mdl.array(shape), "shape|not inside the buffer")


@pytest.mark.parametrize("offset", WRONG_OFFSETS, ids=repr)
def test_offsets_outside_or_unaligned_are_refused(offset: Any, vmm: VMM) -> None:  # noqa: ANN401
    refused(vmm, lambda mdl: mdl.array(2, "f8", offset), "offset")


@pytest.mark.parametrize("writable", [0, 1, "yes"], ids=repr)
def test_writable_is_a_bool(writable: Any, vmm: VMM) -> None:  # noqa: ANN401
    refused(vmm, lambda mdl: mdl.array(2, writable=writable), "not True, False or None")


def refused(vmm: VMM, call: Callable[[Mdl], object], why: str) -> None:
    """Check that a call is an invalid argument, and maps nothing."""
    mdl = vmm.mdl(SIZE)
    before = mapped_bytes()
    with pytest.raises(InvalidArgument, match=f"^array: .*({why})"):
        call(mdl)
    assert mapped_bytes() == before
    vmm._check()


def test_arrays_of_a_closed_mdl_are_refused(vmm: VMM) -> None:
    mdl = vmm.mdl(SIZE)
    mdl.close()
    with pytest.raises(ResourceNotFound, match="closed"):
        mdl.array(1)


def ask_without_numpy() -> None:
    """Ask for an array where NumPy is not installed."""
    import sys

    sys.modules["numpy"] = None  # type: ignore[assignment]
    from vmm_linux import VMM
    from vmm_linux.errors import Unimplemented

    with VMM() as vmm, vmm.mdl(1 << 16) as mdl:
        assert memoryview(mdl.map()).nbytes == 1 << 16
        try:
            mdl.array(1)
        except Unimplemented as problem:
            print(problem)


def test_without_numpy_the_extra_is_named_and_all_else_works() -> None:
    child = run_child(ask_without_numpy)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "array: NumPy is not installed: pip install 'vmm-linux[numpy]'\n"


def import_numpy_late() -> None:
    """Tell when NumPy is imported."""
    import sys

    from vmm_linux import VMM

    with VMM() as vmm:
        mdl = vmm.mdl(1 << 16)
        mdl.map()
        print("numpy" in sys.modules)
        print(mdl.array(3).sum(), "numpy" in sys.modules)


def test_numpy_is_imported_when_an_array_is_asked_for() -> None:
    child = run_child(import_numpy_late)
    assert (child.returncode, child.stderr, child.stdout) == (0, "", "False\n0.0 True\n")

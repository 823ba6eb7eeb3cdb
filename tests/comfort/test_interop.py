"""Shared memory in other libraries: NumPy's protocols, Arrow and pandas.

Nothing is copied, what is read-only stays read-only, and the memory stays as long as anything looks
at it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import interop_workers
import vmm_linux
from children import in_own_process
from kernel_oracle import PAGE, mapping_at
from vmm_linux import VMM, Mdl

if TYPE_CHECKING:
    from collections.abc import Callable

Array = Any  # a SharedArray: type checkers do not know that NumPy's arrays are buffers

GUARDED: dict[str, Callable[[Array], Array]] = {
    "read-only": lambda array: array.read_only(),
    "frozen": lambda array: array.freeze(),
}
guarded = pytest.mark.parametrize("guard", GUARDED.values(), ids=GUARDED.keys())


def numbers(vmm: VMM) -> Array:
    """An array of three rows of four numbers."""
    return vmm_linux.share(np.arange(12.0).reshape(3, 4), vmm=vmm)


def permissions(address: int) -> str:
    """The kernel's permissions of the memory at an address."""
    mapping = mapping_at(address)
    assert mapping is not None
    return mapping.permissions


# ---- protocols ---------------------------------------------------------------------------------


def test_a_memoryview_of_an_array_has_its_shape_its_format_and_its_memory(vmm: VMM) -> None:
    array = numbers(vmm)
    view: Any = memoryview(array)
    assert (view.format, view.shape, view.strides, view.readonly) == ("d", (3, 4), (32, 8), False)
    view[1, 2] = -1.0
    assert array[1, 2] == -1
    column = memoryview(array[:, 1])
    assert (column.tolist(), column.strides) == ([1, 5, 9], (32,))
    assert memoryview(array.T).f_contiguous


@guarded
def test_a_memoryview_of_guarded_memory_cannot_be_written(
    guard: Callable[[Array], Array], vmm: VMM
) -> None:
    array = guard(numbers(vmm))
    view: Any = memoryview(array)
    assert view.readonly
    with pytest.raises(TypeError, match="read-only"):
        view[0, 0] = 1.0
    assert permissions(array.ctypes.data) == "r--s"


def test_the_array_interface_names_the_memory_and_whether_it_can_be_written(vmm: VMM) -> None:
    array = numbers(vmm)
    for one, is_read_only in ((array, False), (array.read_only(), True), (array.freeze(), True)):
        interface = one.__array_interface__
        assert interface["data"] == (one.ctypes.data, is_read_only)
        assert (interface["typestr"], interface["shape"]) == ("<f8", (3, 4))
        other = np.asarray(interop_workers.Interface(one))
        assert other.ctypes.data == one.ctypes.data
        assert other.flags.writeable is not is_read_only
        assert permissions(one.ctypes.data) == ("r--s" if is_read_only else "rw-s")


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "as it is": lambda array: array,
    "transposed": lambda array: array.T,
    "strided": lambda array: array[::2, 1::2],
    "backwards": lambda array: array[::-1, ::-1],
    "one number": lambda array: array[2, 3, ...],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_dlpack_gives_the_same_memory_with_the_same_layout(
    layout: Callable[[Array], Array], vmm: VMM
) -> None:
    array = layout(numbers(vmm))
    other = np.from_dlpack(array)
    assert type(other) is np.ndarray
    assert (other.ctypes.data, other.shape) == (array.ctypes.data, array.shape)
    assert other.flags.writeable
    other[...] = 7.5
    assert (array == 7.5).all()


@guarded
def test_dlpack_never_gives_a_writable_array_of_guarded_memory(
    guard: Callable[[Array], Array], vmm: VMM
) -> None:
    array = guard(numbers(vmm))
    for copy in (None, False):
        other = np.from_dlpack(array, copy=copy)
        assert other.ctypes.data == array.ctypes.data
        assert not other.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            other.flags.writeable = True
        with pytest.raises(ValueError, match="read-only"):
            other[0, 0] = 1.0
    copied = np.from_dlpack(array, copy=True)
    copied[0, 0] = 1.0
    assert array[0, 0] == 0


@guarded
def test_a_consumer_that_knows_no_read_only_memory_gets_an_error_instead(
    guard: Callable[[Array], Array], vmm: VMM
) -> None:
    # Version 1 of DLPack says whether memory may be written; before that, a consumer just writes.
    array = numbers(vmm)
    array.__dlpack__(max_version=None)
    with pytest.raises(BufferError, match="readonly"):
        guard(array).__dlpack__(max_version=None)
    guard(array).__dlpack__(max_version=(1, 0))


def test_a_buffer_is_an_array_of_its_bytes(vmm: VMM) -> None:
    mdl: Any = Mdl(1000, vmm=vmm)
    array = np.asarray(mdl)
    assert (array.dtype.name, array.shape, array.flags.writeable) == ("uint8", (1000,), True)
    array[999] = 5
    assert mdl[998:] == b"\0\5"
    whole = np.frombuffer(mdl, "f8")
    assert (whole.size, whole.ctypes.data) == (125, array.ctypes.data)
    with pytest.raises(ValueError, match="multiple"):
        np.frombuffer(mdl, "c16")
    assert permissions(array.ctypes.data) == "rw-s"


def test_an_array_of_a_guarded_buffer_cannot_be_written(vmm: VMM) -> None:
    mdl: Any
    for mdl in (Mdl(PAGE, vmm=vmm).read_only(), Mdl.from_bytes(b"frozen", vmm=vmm)):
        for array in (np.asarray(mdl), np.frombuffer(mdl, "u1"), np.array(mdl, copy=False)):
            assert not array.flags.writeable
            with pytest.raises(ValueError, match="WRITEABLE"):
                array.flags.writeable = True
            assert permissions(array.ctypes.data) == "r--s"


# ---- libraries ---------------------------------------------------------------------------------


def test_memory_stays_as_long_as_another_library_looks_at_it() -> None:
    in_own_process(interop_workers.touch_after_everything_is_closed)


def test_arrow_gets_the_memory_and_knows_whether_it_can_be_written() -> None:
    in_own_process(interop_workers.arrow_buffers)


def test_a_table_in_shared_memory_is_read_by_another_process_without_a_copy() -> None:
    in_own_process(interop_workers.table_in_shared_memory)


def test_what_one_process_writes_into_a_frame_another_one_sees() -> None:
    in_own_process(interop_workers.frame_in_two_processes)


def test_a_frame_has_columns_of_different_types_in_one_buffer() -> None:
    in_own_process(interop_workers.columns_of_different_types)


def test_a_frame_over_guarded_memory_refuses_to_be_written() -> None:
    in_own_process(interop_workers.read_only_frame)

"""What NumPy makes an array of is shared as it is; NumPy's own functions say how that looks.

What cannot be shared is refused in words, and nothing is left of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kernel_oracle as kernel
from constants import RESIZING
from kernel_oracle import PAGE
from shared_arrays import flaws, inode_of, memory_of, refuses_writing, seals_of
from vmm_linux import Mdl, Rights, VmmError, empty, full, share, zeros
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import InvalidArgument, QuotaExceeded
from vmm_linux.limits import Limits
from vmm_linux.shared_array import SharedArray, empty_like, zeros_like

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = np.arange(24).reshape(2, 3, 4)
overlapping = np.lib.stride_tricks.as_strided(np.arange(10), (4, 4), (8, 8))

#: What is shared, of every sort.
SHARED: dict[str, Any] = {
    "list": [[1, 2], [3, 4]],
    "tuples": ((1.5, 2), (3, 4)),
    "number": 5,
    "text": "abc",
    "bool": True,
    "range": range(5),
    "bytes in memory": bytearray(b"abc"),
    "memoryview": memoryview(b"abcdef").cast("H"),
    "0-d": np.array(5.0),
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3)),
    "empty list": [],
    "not contiguous": BLOCK[:, ::2],
    "backwards": BLOCK[::-1, :, ::-1],
    "one element for all": np.broadcast_to([1, 2, 3], (4, 3)),
    "overlapping": overlapping,
    "Fortran's": np.asfortranarray(BLOCK),
    "permuted": BLOCK.transpose(1, 2, 0),
    "permuted and backwards": BLOCK.transpose(2, 0, 1)[:, ::-1],
    "lengths of one": BLOCK[:1].transpose(1, 0, 2),
    "big-endian": BLOCK.astype(">i4"),
    "records": np.array([(1, 2.5), (3, 4.5)], [("a", "u1"), ("b", ">f8")]),
    "aligned records": np.zeros(3, np.dtype([("a", "u1"), ("b", "f8")], align=True)),
    "a field of records": np.zeros(3, [("a", "u1"), ("b", "f8", (2, 2))])["b"],
    "recarray": np.zeros(2, "i4,f8").view(np.recarray),
    "unicode": ["a", "bcd"],
    "bytes": [b"a", b"bcd"],
    "void": np.zeros(2, "V5"),
    "dates": np.arange(3).astype("M8[ns]"),
    "not a time": np.array(["NaT", "2020-01-01"], "M8[D]"),
    "durations": np.arange(3).astype("m8[s]"),
    "bools": [True, False],
    "half": np.ones(3, "f2"),
    "long": np.ones(3, "g"),
    "complex256": np.ones((2, 2), "G"),
    "with metadata": np.ones(2, np.dtype("f8", metadata={"unit": "m"})),
    "read-only": np.frombuffer(b"12345678", "u1"),
    "64 dimensions": np.zeros((1,) * 63 + (2,)),
    "dot of pages": np.arange(PAGE + 1, dtype="u1"),
}


def alike(array: SharedArray[Any], expected: np.ndarray[Any, Any]) -> None:
    """Hold that an array is as NumPy's own one, down to the order of its bytes in memory."""
    assert type(array) is SharedArray
    assert flaws(array, array) == []
    assert (array.shape, array.dtype, array.dtype.byteorder) == (
        expected.shape,
        expected.dtype,
        expected.dtype.byteorder,
    )
    if expected.size:
        assert array.strides == expected.strides
        assert inode_of(array.__array_interface__["data"][0]) == memory_of(array)
    assert array.flags.aligned
    assert np.array_equal(array, expected) or array.tobytes() == expected.tobytes()
    assert array.mdl.nbytes == max(expected.nbytes, 1)
    assert os.fstat(array.mdl.fileno()).st_size == max(expected.nbytes, 1)


@pytest.mark.parametrize("name", SHARED)
def test_what_numpy_makes_an_array_of_is_shared_as_it_is(name: str) -> None:
    source = SHARED[name]
    array = share(source)
    plain = np.asarray(source)
    alike(array, plain.copy(order="K"))
    assert array.flags.writeable
    if array.size:
        array.view(np.ndarray).reshape(-1).view("u1")[0:1] = 255
    assert plain.tobytes() == np.asarray(SHARED[name]).tobytes(), "the source is not written"
    assert Rights.MAP_WRITE in array.mdl.rights
    assert seals_of(array) & (RESIZING | 0x18) == RESIZING


@pytest.mark.parametrize("name", SHARED)
def test_frozen_it_is_as_it_was(name: str) -> None:
    array = share(SHARED[name])
    frozen = array.freeze()
    alike(frozen, np.asarray(array).copy(order="K"))
    assert not frozen.flags.writeable
    assert seals_of(frozen) & fcntl.F_SEAL_WRITE
    assert memory_of(frozen) != memory_of(array)
    again = frozen.freeze()
    assert memory_of(again) == memory_of(frozen)
    assert refuses_writing(frozen)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Hold that the block leaves no descriptor, and nothing of the default VMM's."""
    gc.collect()
    before = kernel.descriptors().keys(), default_vmm().usage()
    yield
    gc.collect()
    assert (kernel.descriptors().keys(), default_vmm().usage()) == before


class Moody:
    """What NumPy asks for its array, in vain."""

    def __array__(self, *_arguments: object, **_keywords: object) -> object:
        raise RuntimeError("not\ntoday")


class OutOfIt:
    """What finds no memory when NumPy asks for its array."""

    def __array__(self, *_arguments: object, **_keywords: object) -> object:
        raise MemoryError


OBJECTS = "Python objects"
#: What is not shared, and why not.
NOT_SHARED: dict[str, tuple[Any, str]] = {
    "object": (object(), OBJECTS),
    "None": (None, OBJECTS),
    "list of objects": ([1, None], OBJECTS),
    "dictionary": ({"a": 1}, OBJECTS),
    "set": ({1, 2}, OBJECTS),
    "generator": ((x for x in [1]), OBJECTS),
    "large number": (2**80, OBJECTS),
    "number without end": (10**5000, OBJECTS),
    "records with objects": (np.zeros(2, [("a", "O")]), OBJECTS),
    "variable text": (np.array(["a"], np.dtypes.StringDType()), OBJECTS),
    "ragged": ([[1], [1, 2]], "a list, of which NumPy makes no array: .*inhomogeneous"),
    "moody": (Moody(), r"a Moody, of which NumPy makes no array: not\\ntoday"),
    "masked": (np.ma.masked_array([1, 2], [False, True]), "masked array: share its data and"),
    "masked number": (np.ma.masked, "masked array"),
    "no bytes each": (np.zeros(3, "V0"), "elements of no bytes; give their size"),
    "S0": (np.ndarray(3, "S0", bytearray(1), strides=(0,)), "elements of no bytes"),
    "U0": (np.ndarray(3, "U0", bytearray(1), strides=(0,)), "elements of no bytes"),
}


@pytest.mark.parametrize("name", NOT_SHARED)
def test_what_is_no_bytes_in_memory_is_refused_in_words(name: str) -> None:
    source, why = NOT_SHARED[name]
    makers: list[tuple[str, Callable[[Any], object]]] = [
        ("share", share),
        ("zeros_like", zeros_like),
        ("empty_like", empty_like),
        ("share", Mdl.from_array),
        ("full", lambda value: full(3, value)),
    ]
    for method, make in makers:
        with nothing_left(), pytest.raises(InvalidArgument, match=f"^{method}: .*{why}"):
            make(source)


def test_a_shortage_of_memory_in_the_source_is_one() -> None:
    with nothing_left(), pytest.raises(MemoryError):
        share(OutOfIt())  # type: ignore[arg-type]


# ---- beside NumPy's own functions ----------------------------------------------------------------

DTYPES = st.one_of(
    hnp.scalar_dtypes(),
    hnp.array_dtypes(allow_subarrays=True, max_size=3),
    hnp.byte_string_dtypes(min_len=1, max_len=5),
    hnp.unicode_string_dtypes(min_len=1, max_len=5),
)
SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
ORDERS = st.sampled_from(["C", "F"])
LIKE_ORDERS = st.sampled_from(["C", "F", "A", "K"])


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray[Any, Any]:
    """Arrays of any dtype, permuted, backwards, cut, repeated."""
    shape = draw(SHAPES)
    dtype = draw(DTYPES)
    count = int(np.prod(shape)) * dtype.itemsize
    data = bytes(draw(st.lists(st.integers(0, 1), min_size=1, max_size=8)))
    array = np.zeros(shape, dtype)
    if count:
        flat = np.frombuffer((data * (count // len(data) + 1))[:count], "u1")
        array = flat.view(dtype.base).reshape(shape + dtype.shape)
    array = array.transpose(draw(st.permutations(range(array.ndim))))
    steps = draw(st.lists(st.sampled_from([1, 1, -1, 2]), max_size=array.ndim))
    index: Any = (..., *(slice(None, None, step) for step in steps))
    array = array[index]
    if draw(st.booleans()):
        array = np.broadcast_to(array, (2, *array.shape))
    return array


HERE = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


def same_order(array: SharedArray[Any], expected: np.ndarray[Any, Any]) -> None:
    """Hold that an array has NumPy's shape, dtype, order and bytes."""
    assert (array.shape, array.dtype) == (expected.shape, expected.dtype)
    assert flaws(array, array) == []
    if expected.size:
        assert array.strides == expected.strides
    assert array.tobytes() == expected.tobytes()


@HERE
@given(source=arrays())
def test_share_is_numpy_s_copy(source: np.ndarray[Any, Any]) -> None:
    shared = share(source)
    same_order(shared, source.copy(order="K"))
    same_order(shared.freeze(), np.asarray(shared).copy(order="K"))
    read_only = shared.read_only()
    same_order(read_only, source.copy(order="K"))
    assert not read_only.flags.writeable


@HERE
@given(shape=SHAPES, dtype=DTYPES, order=ORDERS)
def test_zeros_and_empty_are_numpy_s_zeros(
    shape: tuple[int, ...], dtype: np.dtype[Any], order: str
) -> None:
    expected = np.zeros(shape, dtype, order=order)  # type: ignore[call-overload]
    same_order(zeros(shape, dtype, order), expected)
    same_order(empty(list(shape), dtype, order), expected)
    same_order(SharedArray(shape, dtype, order), expected)


@HERE
@given(source=arrays(), order=LIKE_ORDERS, shape=st.none() | SHAPES, dtype=st.none() | DTYPES)
def test_zeros_like_is_numpy_s(
    source: np.ndarray[Any, Any],
    order: Any,  # noqa: ANN401
    shape: tuple[int, ...] | None,
    dtype: np.dtype[Any] | None,
) -> None:
    if dtype is not None and dtype.shape:
        dtype = dtype.base
    expected = np.zeros_like(source, dtype, order, shape=shape)
    same_order(zeros_like(source, dtype, order, shape), expected)
    same_order(empty_like(source, dtype, order, shape), expected)


@HERE
@given(
    shape=SHAPES,
    value=st.one_of(st.integers(-5, 300), st.floats(-9, 9), st.booleans()),
    order=ORDERS,
)
def test_full_is_numpy_s(shape: tuple[int, ...], value: Any, order: Any) -> None:  # noqa: ANN401
    same_order(full(shape, value, order=order), np.full(shape, value, order=order))
    same_order(full(shape, value, ">f4", order), np.full(shape, value, ">f4", order))
    row = np.arange(shape[-1] if shape else 1)
    if shape:
        same_order(full(shape, row), np.full(shape, row))


# ---- bad input -----------------------------------------------------------------------------------

WRONG_SHAPES: dict[str, tuple[Any, str]] = {
    "negative": (-1, r"shape \(-1,\): no length is negative"),
    "one negative": ((2, -2), "no length is negative"),
    "float": (2.0, "not an integer"),
    "text": ("3", "not an integer"),
    "None": (None, "not an integer"),
    "bool": (True, "not an integer"),
    "nested": ((2, (3,)), "not an integer"),
    "array": (np.array([2, 3]), "shape is a ndarray, not an integer"),
    "65 dimensions": ((1,) * 65, "shape .*"),
    "beyond 64 bits": (2**70, "71 bits"),
    "product beyond 64 bits": ((2**40, 2**40), "bits"),
    "bytes beyond 64 bits": (2**62, "66 bits"),
    "of no elements, but beyond": ((2**40, 2**40, 0), "too big"),
    "longer than a message": ((2**63,) * 300, "bits"),
}


@pytest.mark.parametrize("name", WRONG_SHAPES)
def test_shapes_that_are_none_are_refused_and_leave_nothing(name: str) -> None:
    shape, why = WRONG_SHAPES[name]
    other: Any = 2.0 if shape is None else shape  # None is the source's
    makers: list[Callable[[], object]] = [
        lambda: zeros(shape),
        lambda: empty(shape),
        lambda: full(shape, 1.5),
        lambda: SharedArray(shape),
        lambda: zeros_like([1.0], shape=other),
    ]
    for make in makers:
        with nothing_left(), pytest.raises(InvalidArgument, match=why):
            make()


WRONG: dict[str, tuple[Callable[[], object], type[VmmError], str]] = {
    "object dtype": (lambda: zeros(3, "O"), InvalidArgument, "zeros: dtype object has Python"),
    "no such dtype": (lambda: zeros(3, "no such"), InvalidArgument, "NumPy makes no dtype"),
    "dtype of no size": (lambda: zeros(3, "S"), InvalidArgument, "no bytes; give their size"),
    "dtype str": (lambda: zeros(3, str), InvalidArgument, "no bytes; give their size"),
    "order K": (lambda: zeros(3, order="K"), InvalidArgument, 'not "C" or "F"'),
    "order None": (lambda: empty(3, order=None), InvalidArgument, 'not "C" or "F"'),  # type: ignore[arg-type]
    "order of likes": (lambda: zeros_like(3, order="X"), InvalidArgument, 'not "C", "F", "A" or'),
    "vmm": (lambda: share(1, vmm=3), InvalidArgument, "vmm is 3 of type int, not a VMM"),  # type: ignore[arg-type]
    "vmm of zeros": (lambda: zeros(1, vmm=True), InvalidArgument, "not a VMM"),  # type: ignore[arg-type]
    "full, broadcast": (lambda: full((2, 3), [1, 2]), InvalidArgument, "full: fill_value does not"),
    "full, text": (lambda: full(2, "abc", "i4"), InvalidArgument, "fill_value does not fit"),
    "full, object": (
        lambda: full(2, np.array([{}]), "f8"),
        InvalidArgument,
        "fill_value does not fit",
    ),
    "beyond the limit": (lambda: zeros(2**40), QuotaExceeded, r"limits\.replace\(mdl_bytes"),
    "like beyond": (lambda: zeros_like(1, shape=2**40), QuotaExceeded, "mdl_bytes"),
    "copy beyond": (
        lambda: share(np.broadcast_to(np.uint8(1), (2**40,))),
        QuotaExceeded,
        "mdl_bytes",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input_is_refused_in_words_and_leaves_nothing(name: str) -> None:
    call, kind, why = WRONG[name]
    with nothing_left(), pytest.raises(kind, match=why):
        call()


def test_memory_that_no_machine_has_is_refused_at_once() -> None:
    vmm = default_vmm()
    before = vmm.limits
    vmm.limits = Limits.unlimited()
    try:
        with nothing_left(), pytest.raises(MemoryError):
            zeros(2**46)
        with nothing_left(), pytest.raises(MemoryError):
            share(np.broadcast_to(np.uint8(1), (2**48,)))
    finally:
        vmm.limits = before


def test_zeros_take_no_memory_before_they_are_touched() -> None:
    array = zeros(2**20, "u1")
    assert os.fstat(array.mdl.fileno()).st_blocks == 0
    array[PAGE] = 1
    assert os.fstat(array.mdl.fileno()).st_blocks * 512 == PAGE

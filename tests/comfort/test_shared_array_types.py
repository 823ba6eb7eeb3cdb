"""What shares a ``SharedArray``'s memory is one; what NumPy computes from it is an ordinary array.

NumPy itself is asked for its methods and functions, and its bounds of addresses say what shares.
"""

from __future__ import annotations

import copy
import io
import operator
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kernel_oracle import PAGE
from shared_arrays import flaws, inode_of, memory_of
from vmm_linux import share
from vmm_linux.errors import InvalidOperation, NotCopyable
from vmm_linux.shared_array import SharedArray

if TYPE_CHECKING:
    from collections.abc import Callable

#: Arrays of all sorts.
SOURCES: dict[str, Callable[[], SharedArray[Any]]] = {
    "plain": lambda: share(np.arange(12.0).reshape(3, 4)),
    "square": lambda: share(np.array([[2.0, 1], [1, 3]])),
    "int": lambda: share(np.arange(6)),
    "0-d": lambda: share(5.0),
    "complex": lambda: share(np.arange(4) + 1j),
    "bool": lambda: share(np.array([True, False, True])),
    "text": lambda: share(np.array(["a", "bc"])),
    "records": lambda: share(np.zeros(3, [("a", "i4"), ("b", "f8", (2,))])),
    "dates": lambda: share(np.arange(3).astype("M8[D]")),
    "Fortran": lambda: share(np.asfortranarray(np.arange(12.0).reshape(3, 4))),
    "empty": lambda: share(np.zeros((0, 3))),
}

#: Attributes and methods of ndarray, by name: what they are tried with besides nothing at all.
METHODS = [name for name in dir(np.ndarray) if not name.startswith("_")]
#: They write files, or are tried alone.
LEFT_OUT = {"dump", "dumps", "tofile"}
ARGUMENTS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    *(((), keywords) for keywords in ({}, {"axis": 0}, {"axis": 1, "keepdims": True})),
    *((("f8",), keywords) for keywords in ({}, {"copy": False}, {"copy": False, "subok": False})),
    *(((order,), {}) for order in "CFAK"),
    *((([rows, 0],), {}) for rows in (0, 1)),
    *(((number,), {}) for number in (0, 1, -1)),
    *(((number, 1), {}) for number in (0, 1)),
    (([True, False, True],), {"axis": 0}),
    (((-1,),), {}),
    (((4, 3),), {"order": "F"}),
    ((np.arange(4.0),), {}),
    (([1.5],), {}),
    (([[0, 1, 0]],), {}),
    (([np.ones((2, 3)), np.zeros((2, 3))],), {"mode": "wrap"}),
    (("cpu",), {}),
    ((2, "f4"), {}),
    ((1.0, 2.0), {}),
]
#: What none of the arguments can be right for, or what gives nothing.
WITHOUT_RESULT = {"choose", "resize", "setfield", "sort", "partition", "fill", "put", "setflags"}


@pytest.mark.parametrize("name", [name for name in METHODS if name not in LEFT_OUT])
@pytest.mark.filterwarnings("ignore")
def test_every_method_gives_views_of_the_memory_or_ordinary_arrays(name: str) -> None:
    worked = 0
    for kind, make in SOURCES.items():
        source = make()
        try:
            value = getattr(source, name)
        except ValueError:  # no buffer of dates, no matrix of one dimension
            continue
        if not callable(value):
            worked += 1
            assert flaws(value, source) == [], kind
            continue
        for arguments, keywords in ARGUMENTS:
            source = make()
            try:
                result = getattr(source, name)(*arguments, **keywords)
            except (TypeError, ValueError, IndexError, AttributeError, BufferError):
                continue
            worked += 1
            assert flaws(result, source) == [], (kind, arguments, keywords)
    assert worked or name in WITHOUT_RESULT


#: Modules whose functions are tried, and what of them is not: it is no function of arrays, writes
#: files, changes NumPy's settings, or asks for the very class.
MODULES = {
    "np": np,
    "linalg": np.linalg,
    "fft": np.fft,
    "strings": np.strings,
    "emath": np.emath,
    "stride_tricks": np.lib.stride_tricks,
    "rec": np.rec,
}
NO_FUNCTIONS = {
    *("fromfile", "save", "savez", "savez_compressed", "savetxt", "info", "load", "loadtxt"),
    *("show_config", "show_runtime", "test", "get_include", "frompyfunc", "ndarray", "memmap"),
    *("genfromtxt", "fromregex", "set_printoptions", "seterr", "seterrcall", "setbufsize"),
    *("printoptions", "errstate", "nditer", "broadcast", "flatiter", "ndenumerate", "vectorize"),
}
CALLS: list[Callable[[SharedArray[Any], SharedArray[Any]], tuple[tuple[Any, ...], Any]]] = [
    lambda a, _: ((a,), {}),
    lambda a, b: ((a, b), {}),
    lambda a, _: ((a, 1), {}),
    lambda a, b: (([a, b],), {}),
    lambda a, _: ((1, a), {}),
    lambda a, _: ((a, (a.size,)), {}),
    lambda a, _: ((a,), {"axis": 0}),
    lambda a, b: ((a,), {"out": b}),
    lambda a, b: ((a != b, a, b), {}),
    lambda a, b: (("ij,ij->ij", a, b), {}),
    lambda a, _: ((a, 0, 0), {}),
]
FUNCTIONS = [
    (module, name)
    for module, contents in MODULES.items()
    for name in sorted(dir(contents))
    if not (name.startswith("_") or name in NO_FUNCTIONS)
    and callable(getattr(contents, name))
    and not isinstance(getattr(contents, name), type)
]


def test_there_are_hundreds_of_functions_to_try() -> None:
    assert len(FUNCTIONS) > 400


@pytest.mark.parametrize("kind", [kind for kind in SOURCES if kind != "empty"])
@pytest.mark.filterwarnings("ignore")
def test_every_function_gives_views_of_the_memory_or_ordinary_arrays(kind: str) -> None:
    wrong, worked = [], 0
    sources = [(SOURCES[kind](), SOURCES[kind]()) for _ in range(2)]
    for module, name in FUNCTIONS:
        function = getattr(MODULES[module], name)
        for number, arguments_of in enumerate(CALLS):
            a, b = sources[number % 2]
            arguments, keywords = arguments_of(a, b)
            # NumPy's own cumsum into a number ends the process, and into text keeps that for ever.
            if "cum" in name and "out" in keywords:
                continue
            try:
                result = function(*arguments, **keywords)
            except Exception:  # noqa: BLE001, S112  not meant for such arguments
                continue
            worked += 1
            wrong += [(module, name, number, flaw) for flaw in flaws(result, a, b)]
    assert (wrong, worked > 300) == ([], True)


IN_PLACE = [
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv),
    *(operator.imod, operator.ipow),
]


@pytest.mark.parametrize("operation", IN_PLACE)
def test_operators_in_place_write_the_memory_and_keep_the_array(
    operation: Callable[[Any, Any], Any],
) -> None:
    array = share(np.array([[1.0, 5], [7, 9]]))
    other = array.mdl.array((2, 2))
    expected: Any = operation(np.array([[1.0, 5], [7, 9]]), 2)
    assert operation(array, 2) is array
    assert flaws(array, array) == []
    assert np.array_equal(other, expected)


def test_bits_and_matrices_in_place_too() -> None:
    bits: Any = share([1, 2, 3])
    same = bits
    bits <<= 2
    bits |= 1
    bits &= 13
    bits ^= 3
    bits >>= 1
    assert (bits is same, bits.mdl.array(3, "i8").tolist()) == (True, [3, 5, 7])
    matrix = share(np.eye(2))
    again = matrix
    matrix @= np.ones((2, 2))
    assert (matrix is again, matrix.mdl.array((2, 2)).tolist()) == (True, [[1, 1], [1, 1]])


def test_out_is_the_array_itself_and_what_else_comes_is_ordinary() -> None:
    source, target = share([1.5, -2.5]), share([0.0, 0])
    assert np.add(source, 1, out=target) is target
    assert np.add(np.ones(2), 1, out=target) is target
    out: Any = (target, None)
    whole, part = np.divmod(source, 2, out=out)
    assert (whole is target, type(part)) == (True, np.ndarray)
    assert target.mdl.array(2).tolist() == [0, -2]
    assert np.add.reduce(share(np.ones((2, 2))), axis=0, out=target) is target
    number = share(1.0)
    assert np.add(number, 1, out=number) is number
    number += 1
    assert (type(number), float(number)) == (SharedArray, 3.0)
    assert type(np.add(source, 1, out=np.zeros(2))) is np.ndarray


def test_methods_of_ufuncs_give_ordinary_arrays_and_scalars() -> None:
    array = share(np.arange(6.0).reshape(2, 3))
    for result in (
        np.add.reduce(array),
        np.add.accumulate(array),
        np.add.outer(array, array),
        np.add.reduceat(array, [0, 1]),
        np.multiply(array, array),
        array + array,
        -array,
        abs(array),
        +array,
        array @ array.T,
        array == 2,
        divmod(array, 2)[1],
        np.frompyfunc(abs, 1, 1)(array),
        np.vectorize(abs)(array),
    ):
        assert type(result) is np.ndarray
    assert type(np.add.reduce(array, axis=None)) is np.float64
    assert type(array[0] @ array[1]) is np.float64
    np.add.at(array, ([0], [0]), 5)
    assert array.mdl.array(1)[0] == 5


def test_a_calculation_with_other_classes_is_theirs() -> None:
    array = share([1.0, 2])
    assert type(np.ones(2) + array) is np.ndarray
    assert type(array + np.ma.masked_array([1, 2])) is np.ma.MaskedArray
    plain = np.ones(2)
    plain += array
    assert type(plain) is np.ndarray


INDICES: dict[str, tuple[Any, bool]] = {
    "slice": (np.s_[1:], True),
    "no elements": (np.s_[3:], True),
    "row": (1, True),
    "column": (np.s_[..., 0], True),
    "ellipsis": (..., True),
    "new axis": (None, True),
    "backwards": (np.s_[::-1, ::2], True),
    "list": ([0], False),
    "empty list": ([], False),
    "two lists": (([0, 1], [0, 1]), False),
    "list and slice": (np.s_[[0], 1:], False),
    "True": (True, False),
}


@pytest.mark.parametrize("name", INDICES)
def test_slices_are_shared_and_fancy_indices_copy(name: str) -> None:
    index, is_shared = INDICES[name]
    array = share(np.arange(12.0).reshape(3, 4))
    part = array[index]
    assert type(part) is (SharedArray if is_shared else np.ndarray)
    assert flaws(part, array) == []
    assert np.array_equal(part, np.asarray(array)[index])
    if is_shared and part.size:
        part[...] = -1
        assert inode_of(part.__array_interface__["data"][0]) == memory_of(array)
        assert (np.asarray(array)[index] == -1).all()


def test_a_mask_copies_and_an_element_is_a_scalar() -> None:
    array = share(np.arange(12.0).reshape(3, 4))
    assert type(array[array > 3]) is np.ndarray
    assert type(array[1, 2]) is np.float64
    assert type(share(5.0)[()]) is np.float64
    assert type(share(5.0)[...]) is SharedArray
    assert [type(row) for row in array] == [SharedArray] * 3


def test_records_are_scalars_that_write_the_memory() -> None:
    records = share(np.zeros(3, [("a", "i4"), ("b", "f8", (2,))]))
    one = records[1]
    assert type(one) is np.void
    one["a"] = 7
    one["b"][1] = 2.5
    assert records.mdl.array(3, records.dtype)[1]["b"].tolist() == [0.0, 2.5]
    assert records["a"].tolist() == [0, 7, 0]
    for field in (records["b"], records[["a"]], records["b"][1:]):
        assert type(field) is SharedArray
        assert flaws(field, records) == []


def test_imaginary_parts_of_real_numbers_are_an_ordinary_array() -> None:
    real, parts = share([1.0, 2]), share([1 + 2j, 3 + 4j])
    assert (type(real.imag), real.imag.tolist()) == (np.ndarray, [0, 0])
    assert real.real is real or flaws(real.real, real) == []
    assert flaws(parts.imag, parts) == []
    parts.imag = 9
    parts.imag[0] = 8
    assert parts.mdl.array(2, "c16").tolist() == [1 + 8j, 3 + 9j]
    with pytest.raises(TypeError, match="imaginary"):
        real.imag = 1
    assert real.imag.tolist() == [0, 0]


def test_what_a_flat_iterator_copies_is_an_ordinary_array() -> None:
    array = share(np.arange(6.0).reshape(2, 3))
    assert type(array.flat[1:3]) is np.ndarray
    assert type(array.flat.copy()) is np.ndarray
    array.flat[1:3] = 9
    assert array.mdl.array(6).tolist() == [0, 9, 9, 3, 4, 5]
    array.flat = 1
    assert array.mdl.array(6).tolist() == [1] * 6
    assert list(array.flat) == [1] * 6


def test_a_masked_array_has_ordinary_arrays_of_the_memory() -> None:
    array = share([1.0, 2, 3])
    masked = np.ma.masked_array(array, [False, True, False])
    assert type(masked.data) is np.ndarray
    assert np.shares_memory(masked.data, array)
    masked[0] = 5
    assert array.tolist() == [5, 2, 3]
    for computed in (masked + 1, masked.compressed(), masked.filled(), np.ma.compressed(array)):
        assert flaws(np.ma.getdata(computed), array) == []
        assert type(np.ma.getdata(computed)) is np.ndarray


ATTEMPTS: list[Callable[[SharedArray[Any]], object]] = [
    lambda array: array.mdl,
    lambda array: array.read_only(),
    lambda array: array.freeze(),
]


def test_a_view_of_an_ordinary_array_has_no_buffer_and_says_so() -> None:
    view: Any = np.arange(3).view(SharedArray)
    copied = np.array(share([1, 2]), subok=True)
    for array in (view, copied):
        for attempt in ATTEMPTS:
            with pytest.raises(InvalidOperation, match=r"not in shared memory; vmm_linux\.share"):
                attempt(array)
        assert type(array[1:]) is np.ndarray
        assert type(array + 1) is np.ndarray
        assert type(pickle.loads(pickle.dumps(array))) is np.ndarray  # noqa: S301
        shared = copy.deepcopy(array)
        assert flaws(shared, shared) == []


def records_of(array: SharedArray[Any]) -> object:
    """A view of another subclass."""
    return array.view([("a", "f8")], np.recarray)


def test_views_of_other_classes_and_dtypes_are_of_the_same_memory() -> None:
    array = share(np.arange(4.0))
    assert type(array.view(np.ndarray)) is np.ndarray
    assert type(records_of(array)) is np.recarray
    assert flaws(array.view("u1"), array) == []
    assert flaws(array.astype("f8", copy=False), array) == []
    assert array.astype("f8", copy=False) is array
    assert type(array.astype("f4", copy=False)) is np.ndarray
    assert type(array.astype("f8")) is np.ndarray
    assert np.asanyarray(array) is array
    assert type(np.asarray(array)) is type(np.array(array)) is np.ndarray
    assert type(np.from_dlpack(array)) is np.ndarray


def test_wherever_a_view_begins_its_memory_is_known() -> None:
    array = share(np.arange(4 * PAGE, dtype="u1")).mdl.array(3 * PAGE - 5, "u1", PAGE + 5)
    address = array._mapping[0]
    for part in (array[PAGE:], array[-1:], array[: PAGE + 1][::-1]):
        assert flaws(part, array) == []
        assert part._mapping[0] == address
        assert part[0] == np.asarray(part)[0]


def test_joining_and_choosing_give_ordinary_arrays() -> None:
    a, b = share([1.0, 2]), share([3.0, 4])
    for result in (
        np.concatenate([a, b]),
        np.stack([a, b]),
        np.where(a > 1, a, b),
        np.copy(a),
        np.copy(a, subok=True),
        np.zeros_like(a),
        np.full_like(a, 1),
        np.sort(a),
        np.unique(a),
        np.tile(a, 2),
        np.pad(a, 1),
        np.einsum("i,j->ij", a, b),
        np.histogram(a)[0],
        np.linalg.qr(np.outer(a, b))[0],
    ):
        assert type(result) is np.ndarray


#: Every protocol, NumPy's own way, and the means behind them.
PICKLERS: list[Callable[[SharedArray[Any]], object]] = [
    *(lambda a, p=protocol: pickle.dumps(a, p) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
    lambda a: pickle.dumps(a, 5, buffer_callback=lambda _: None),
    lambda a: a.dumps(),
    lambda a: a.dump(io.BytesIO()),
    lambda a: a.__reduce__(),
    lambda a: a[1:].__reduce_ex__(4),
    lambda a: pickle.dumps({"in": [a.T]}),
]


@pytest.mark.parametrize("number", range(len(PICKLERS)))
def test_picklers_that_carry_no_descriptors_say_what_does(number: int) -> None:
    array = share([1.0, 2])
    with pytest.raises(NotCopyable, match=r"multiprocessing.*array\.mdl\.send\(sock\)") as caught:
        PICKLERS[number](array)
    assert isinstance(caught.value, TypeError)


def test_numpy_saves_the_values(tmp_path: Any) -> None:  # noqa: ANN401
    array = share([1.0, 2])
    np.save(tmp_path / "array.npy", array)
    array.tofile(tmp_path / "raw")
    assert np.load(tmp_path / "array.npy").tolist() == np.fromfile(tmp_path / "raw").tolist()


def test_an_array_cannot_be_resized_or_moved() -> None:
    array = share(np.arange(4.0))
    with pytest.raises(ValueError, match="does not own"):
        array.resize(8, refcheck=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        array.shape = (2, 2)
        array.dtype = "i8"  # type: ignore[misc]
    with pytest.raises(AttributeError):
        array.mdl = None  # type: ignore[misc, assignment]
    with pytest.raises((AttributeError, TypeError)):
        array.data = memoryview(bytearray(32))  # type: ignore[misc]
    assert flaws(array, array) == []


def test_elements_that_stride_tricks_put_beyond_the_memory_are_not_sent() -> None:
    from multiprocessing.reduction import ForkingPickler

    array = share(np.arange(4.0))
    beyond = np.lib.stride_tricks.as_strided(array, (PAGE,), (8,), subok=True)
    before = np.lib.stride_tricks.as_strided(array[1:], (3,), (-8,), subok=True)
    for wrong in (beyond, before):
        with pytest.raises(InvalidOperation, match="no longer is in the memory"):
            ForkingPickler.dumps(wrong)

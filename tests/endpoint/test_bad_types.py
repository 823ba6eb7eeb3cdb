"""Arguments of another type, and names of parameters, through both faces.

The reference face never raises, whatever it is given.
"""

from __future__ import annotations

import decimal
import fractions
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import pytest

from children import TESTS_IMPORTABLE, run_child
from faces import REFERENCE_METHODS, Face, call, reference_name
from kernel_oracle import PAGE
from refusals import (
    NUMBERS,
    PARAMETERS,
    Ground,
    call_with,
    faces,
    good_arguments,
    names_value,
    numbers,
)
from vmm_linux import PageState, Retcode

if TYPE_CHECKING:
    from collections.abc import Callable


WRONG_TYPES = [
    None,
    "4096",
    b"4096",
    4096.0,
    float("nan"),
    float("inf"),
    True,
    False,
    4096j,
    decimal.Decimal(4096),
    fractions.Fraction(4096),
    [4096],
    (),
    object(),
    int,
]


def name_of(value: object) -> str:
    """What a test of this value is called: the same in every process, so no address."""
    return repr(value).partition(" at 0x")[0].lstrip("<")


@faces
@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=name_of)
def test_what_is_no_integer_is_an_invalid_argument(
    ground: Ground, face: Face, wrong: object
) -> None:
    before = ground.state()
    for method, parameter in NUMBERS:
        got = call_with(ground, face, method, **{parameter: wrong})
        assert got.rc is Retcode.INVALID_ARGUMENT, (method, parameter)
        if got.error is not None:
            assert got.error.errno is None
            assert names_value(got.error, wrong), str(got.error)
            assert parameter in str(got.error), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize(
    "number",
    [-1, -PAGE, -(1 << 63), -(1 << 64), 1 << 64, (1 << 64) + PAGE, 1 << 200],
    ids=hex,
)
def test_a_number_that_does_not_fit_64_bits_is_an_invalid_argument(
    ground: Ground, face: Face, number: int
) -> None:
    before = ground.state()
    for method, parameter in NUMBERS:
        got = call_with(ground, face, method, **{parameter: number})
        assert got.rc is Retcode.INVALID_ARGUMENT, (method, parameter)
        assert got.error is None or names_value(got.error, number), str(got.error)
    assert ground.state() == before


class Index:
    """An integer in all but name."""

    def __init__(self, value: int) -> None:
        self.value = int(value)  # Python warns of an ``__index__`` that gives a Handle

    def __index__(self) -> int:
        """The number."""
        return self.value


class RaisingIndex:
    """It says that it is an integer, and fails when asked which."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __index__(self) -> int:
        """Never a number."""
        raise self.error


class WrongIndex:
    """Its ``__index__`` gives no integer."""

    def __index__(self) -> int:
        """A string."""
        return "4096"  # type: ignore[return-value]  # noqa: PLE0305


class SmallNumber(IntEnum):
    """An integer of another enumeration."""

    ONE = 1


@faces
@numbers
@pytest.mark.parametrize("kind", ["Index", "int64", "uint64", "array of no dimension"])
def test_whatever_has_index_is_an_integer(
    ground: Ground, face: Face, method: str, parameter: str, kind: str
) -> None:
    numpy = pytest.importorskip("numpy", reason="NumPy's integers need NumPy")
    made: dict[str, Callable[[int], object]] = {
        "Index": Index,
        "int64": numpy.int64,
        "uint64": numpy.uint64,
        "array of no dimension": numpy.array,
    }
    value = good_arguments(ground, method)[parameter]
    got = call_with(ground, face, method, **{parameter: made[kind](value)})
    assert got.rc is Retcode.OK


def test_a_member_of_an_enumeration_of_integers_is_an_integer(ground: Ground) -> None:
    ground.vmm.protect(ground.committed, PAGE, SmallNumber.ONE)
    assert ground.vmm.query(ground.committed).protection == 1


@faces
@pytest.mark.parametrize(
    "bad",
    [
        RaisingIndex(ZeroDivisionError("no")),
        RaisingIndex(TypeError("no")),
        RaisingIndex(MemoryError("no")),
        RaisingIndex(OverflowError("no")),
        WrongIndex(),
    ],
    ids=["ZeroDivisionError", "TypeError", "MemoryError", "OverflowError", "gives a string"],
)
def test_an_index_that_fails_is_an_invalid_argument(
    ground: Ground, face: Face, bad: object
) -> None:
    before = ground.state()
    for method, parameter in NUMBERS:
        got = call_with(ground, face, method, **{parameter: bad})
        assert got.rc is Retcode.INVALID_ARGUMENT, (method, parameter)
    assert ground.state() == before


def test_numpy_floats_and_booleans_are_wrong_types(ground: Ground) -> None:
    numpy = pytest.importorskip("numpy", reason="NumPy's types need NumPy")
    for wrong in (numpy.float64(PAGE), numpy.bool_(True), numpy.array([PAGE, PAGE])):
        for face in Face:
            got = call_with(ground, face, "commit", size=wrong)
            assert got.rc is Retcode.INVALID_ARGUMENT, repr(wrong)


@faces
@pytest.mark.parametrize(
    "anything", [None, "x", 1.5, -1, 1 << 90, True, RaisingIndex(KeyError("no"))], ids=name_of
)
def test_the_fictitious_parameter_of_commit_takes_anything(
    ground: Ground, face: Face, anything: object
) -> None:
    got = call(ground.vmm, face, "commit", ground.reserved, PAGE, anything)
    assert got.rc is Retcode.OK
    assert ground.vmm.query(ground.reserved).state is PageState.COMMITTED


@pytest.mark.parametrize("method", [*PARAMETERS])
def test_parameters_have_the_names_of_the_reference(ground: Ground, method: str) -> None:
    getattr(ground.vmm, method)(**good_arguments(ground, method))


@pytest.mark.parametrize("method", REFERENCE_METHODS)
def test_parameters_of_the_reference_face_have_its_names(ground: Ground, method: str) -> None:
    arguments = good_arguments(ground, method)
    if method == "commit":
        arguments["flags"] = 0
    answer = getattr(ground.vmm.endpoint, reference_name(method))(**arguments)
    assert (answer[1] if isinstance(answer, tuple) else answer) is Retcode.OK


def hammer_with_garbage(seed: int, calls: int) -> None:
    """Call everything with anything; nothing but a VmmError may come out."""
    import random
    from collections import deque

    from faces import Face, call
    from kernel_oracle import ARENA, PAGE
    from vmm_linux import VMM, Limits, Retcode

    choose = random.Random(seed)  # noqa: S311
    with VMM(limits=Limits.unlimited()) as vmm:
        bases = [vmm.allocate(0, 8 * PAGE, 0x33), vmm.allocate(0, 1 << 40, 0x13)]
        bases.append(vmm.allocate(ARENA, 64 * PAGE, 0x40033))
        numbers = [0, 1, -1, 3, 7, PAGE, 2 * PAGE, 1 << 12, 1 << 30, 1 << 40, 1 << 47, 1 << 63]
        numbers += [(1 << 64) - PAGE, (1 << 64) - 1, 1 << 64, 0x33, 0x13, 0x10033, 0x40033]
        garbage: list[Any] = [None, "x", b"abc", 1.5, True, [], {}, object(), bytearray(9), print]
        kept: list[object] = []
        seen: dict[Retcode, int] = {}
        arity = {"allocate": 3, "commit": 2, "decommit": 2, "protect": 3, "query": 1, "read": 2}
        arity |= {"view": 2, "write": 2, "free": 2, "mdl_create": 2, "mdl_create_from_vm": 3}
        arity |= {"mdl_create_from_buf": 2, "mdl_get_size": 1, "mdl_map": 5, "mdl_clone": 3}
        arity |= {"mdl_seal": 2, "handle_copy": 2, "handle_close": 1, "handle_revoke": 1}
        arity |= {"handle_info": 1}
        handles = deque((vmm.mdl_create(8 * PAGE, 7), vmm.mdl_create(1 << 40, 3)), maxlen=40)
        for _ in range(calls):
            method = choose.choice(list(arity))
            arguments: list[object] = []
            for _ in range(arity[method]):
                near = choose.choice(bases) + PAGE * choose.choice([0, 0, 0, 1, -1, 7, 9])
                value = choose.choice([near, near, choose.choice(numbers), choose.choice(garbage)])
                arguments.append(value)
            if choose.random() < 0.7 and method in {
                *("mdl_get_size", "mdl_map", "mdl_clone", "mdl_seal"),
                *("handle_copy", "handle_close", "handle_revoke", "handle_info"),
            }:
                small = [0, PAGE, 2 * PAGE, 1, 3, 7]
                arguments = [choose.choice(handles), *(choose.choice(small) for _ in arguments[1:])]
            if method == "read" and arguments[1] in (1 << 30, 1 << 40):
                continue  # it may succeed, and takes its time
            got = call(vmm, choose.choice(list(Face)), method, *arguments)
            seen[got.rc] = seen.get(got.rc, 0) + 1
            if method == "view" and got.value is not None and len(kept) < 4:
                kept.append(got.value)
            if choose.random() < 0.02:
                kept.clear()
            if type(got.value).__name__ == "Handle":
                if len(handles) == handles.maxlen:
                    call(vmm, Face.METHODS, "handle_close", handles[0])
                handles.append(got.value)
            del got
    print(len(seen) > 3, Retcode.FAIL in seen, Retcode.INTERNAL_ERROR in seen)


@pytest.mark.parametrize("seed", range(4))
def test_no_call_with_any_argument_ends_the_interpreter(seed: int) -> None:
    child = run_child(hammer_with_garbage, seed, 20_000, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout) == (0, "True False False\n"), child.stderr

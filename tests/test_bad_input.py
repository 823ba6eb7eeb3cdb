"""Every row of the return-code table, through both faces.

Each call here is refused, and after each of them everything is as it was. The reference face
never raises, whatever it is given.
"""

from __future__ import annotations

import array
import contextlib
import copy
import ctypes
import decimal
import fractions
import gc
import os
import pickle
import resource
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import kernel_oracle as kernel
from children import run_child
from faces import NOTHING, REFERENCE_METHODS, Face, Outcome, call, reference_name
from kernel_oracle import ARENA, PAGE, TESTS_IMPORTABLE, USER_SPACE_END
from model import KNOWN_FLAGS, LOWEST
from vmm_linux import (
    INVALID_HANDLE,
    VMM,
    Handle,
    Limits,
    PageKind,
    PageState,
    Retcode,
    Rights,
    Seal,
    VmmError,
    VmmFlags,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RESERVE = VmmFlags.RESERVE
COMMIT = VmmFlags.RESERVE | VmmFlags.COMMIT
RW = VmmFlags.READ | VmmFlags.WRITE
FIXED = VmmFlags.FIXED
GUARDS = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
ARENA_PAGES = 96


class Ground(NamedTuple):
    """A VMM with one region and one handle of every kind, and strangers between them."""

    vmm: VMM
    committed: int
    neighbour: int
    hole: int
    guarded: int
    reserved: int
    read_only: int
    no_access: int
    mapped: int
    foreign: int
    #: A buffer of eight pages, mapped writable at ``mapped``; copies of its handle.
    handle: Handle
    reader: Handle
    closed: Handle
    revoked: Handle

    def state(self) -> list[object]:
        """All that a refused call must leave as it was."""
        answers = []
        for address in range(ARENA, ARENA + ARENA_PAGES * PAGE, PAGE):
            info = self.vmm.query(address, smaps=False)
            answers.append((info.state, info.kind, info.base, info.size, info.protection))
        filled = ((self.committed, 8), (self.read_only, 4), (self.mapped, 8))
        written = [self.vmm.read(va, pages * PAGE) for va, pages in filled]
        seals = [self.vmm.handle_info(handle).seals for handle in (self.handle, self.reader)]
        files = [mapping for mapping in kernel.maps() if "/memfd:" in mapping.pathname]
        inside = kernel.maps_between(ARENA, ARENA + ARENA_PAGES * PAGE)
        return [inside, files, answers, written, seals, kernel.descriptors()]


@pytest.fixture
def ground() -> Iterator[Ground]:
    """Regions at known places, of eight pages and four, filled where they can be."""
    places = {
        "committed": (16, 8, COMMIT | RW),
        "neighbour": (24, 4, COMMIT | RW),
        "guarded": (33, 4, COMMIT | RW | GUARDS),
        "reserved": (40, 4, RESERVE | RW),
        "read_only": (48, 4, COMMIT | VmmFlags.READ),
        "no_access": (56, 4, COMMIT),
    }
    hole, foreign = ARENA + 28 * PAGE, ARENA + 64 * PAGE
    kernel.map_at(foreign, PAGE, kernel.PROT_READ | kernel.PROT_WRITE)
    at: dict[str, Any] = {name: ARENA + slot * PAGE for name, (slot, _, _) in places.items()}
    try:
        with VMM(limits=Limits.unlimited()) as vmm:
            for name, (_, pages, flags) in places.items():
                assert vmm.allocate(at[name], pages * PAGE, flags | FIXED) == at[name]
            vmm.write(at["committed"], b"committed" * 900)
            yield Ground(vmm, **at, hole=hole, foreign=foreign, **handles(vmm))
    finally:
        kernel.unmap(foreign, PAGE)


def handles(vmm: VMM) -> dict[str, Any]:
    """A mapped buffer and handles of it, good ones and bad ones."""
    handle = vmm.mdl_create(8 * PAGE, RW)
    mapped = vmm.mdl_map(handle, 0, 8 * PAGE, ARENA + 72 * PAGE, RW | FIXED)
    vmm.write(mapped, b"mapped" * 900)
    closed = vmm.handle_copy(handle, handle.rights)
    revoker = vmm.handle_copy(handle, handle.rights)
    revoked = vmm.handle_copy(revoker, handle.rights)
    vmm.handle_close(closed)
    vmm.handle_revoke(revoker)
    reader = vmm.handle_copy(handle, Rights.MAP_READ)
    return {
        "handle": handle,
        "mapped": mapped,
        "closed": closed,
        "revoked": revoked,
        "reader": reader,
    }


faces = pytest.mark.parametrize("face", list(Face), ids=lambda face: face.value)

#: Parameters of each method, with values that a call on ``Ground.committed`` succeeds with.
PARAMETERS: dict[str, tuple[str, ...]] = {
    "allocate": ("addr", "size", "flags"),
    "commit": ("va", "size"),
    "decommit": ("va", "size"),
    "protect": ("va", "size", "flags"),
    "free": ("va", "size"),
    "query": ("va",),
    "read": ("va", "size"),
    "view": ("va", "size"),
    "write": ("va", "data"),
    "mdl_create": ("size", "prot"),
    "mdl_create_from_vm": ("va", "size", "flags"),
    "mdl_create_from_buf": ("data", "prot"),
    "mdl_get_size": ("handle",),
    "mdl_map": ("handle", "offset", "length", "hint", "prot"),
    "mdl_clone": ("originHandle", "offset", "length"),
    "mdl_seal": ("handle", "seals"),
    "handle_copy": ("handle", "rights"),
    "handle_close": ("handle",),
    "handle_revoke": ("handle",),
    "handle_info": ("handle",),
}
RANGE_METHODS = (
    "commit",
    "decommit",
    "protect",
    "free",
    "read",
    "view",
    "write",
    "mdl_create_from_vm",
)
PAGE_METHODS = ("commit", "decommit", "protect", "free", "mdl_create_from_vm")
WINDOW_METHODS = ("mdl_map", "mdl_clone")
HANDLE_METHODS = tuple(
    method for method, names in PARAMETERS.items() if {"handle", "originHandle"} & set(names)
)
NUMBERS = [
    (method, parameter)
    for method, parameters in PARAMETERS.items()
    for parameter in parameters
    if parameter != "data"
]
numbers = pytest.mark.parametrize(("method", "parameter"), NUMBERS)


def good_arguments(ground: Ground, method: str) -> dict[str, Any]:
    """Arguments that the method accepts, by name."""
    values = {
        "addr": 0,
        "va": ground.committed,
        "size": PAGE,
        "flags": int(COMMIT | RW) if method == "allocate" else 1,
        "data": b"x",
        "handle": ground.handle,
        "originHandle": ground.handle,
        "offset": PAGE,
        "length": PAGE,
        "hint": 0,
        "prot": 1,
        "rights": int(Rights.MAP_READ),
        "seals": int(Seal.PUBLISH),
    }
    return {name: values[name] for name in PARAMETERS[method]}


def call_with(ground: Ground, face: Face, method: str, **changed: object) -> Outcome:
    """Call ``method`` with good arguments but for those given."""
    arguments = good_arguments(ground, method) | changed
    return call(ground.vmm, face, method, *arguments.values())


def range_arguments(method: str, va: int, size: int) -> tuple[Any, ...]:
    """Arguments with which ``method`` means ``[va, va + size)``."""
    if method == "write":
        return va, bytes(size)
    return (va, size, 1) if method in {"protect", "mdl_create_from_vm"} else (va, size)


def handle_parameter(method: str) -> str:
    """What the method calls the handle that it takes."""
    return "originHandle" if method == "mdl_clone" else "handle"


def names_value(error: VmmError, value: object) -> bool:
    """Whether the message has the value in it, in any usual notation."""
    ways = [repr(value), str(value), type(value).__name__]
    if type(value) is int:
        ways = [str(value), hex(value), f"{value:,}", f"{value:_}"]
    return any(way in str(error) for way in ways)


# ------------------------------------------------------------------------------ types

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


@faces
@pytest.mark.parametrize("wrong", WRONG_TYPES, ids=repr)
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
    "anything", [None, "x", 1.5, -1, 1 << 90, True, RaisingIndex(KeyError("no"))], ids=repr
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


# -------------------------------------------------------------------- numbers that are wrong


@faces
@pytest.mark.parametrize("skew", [1, 8, 512, PAGE // 2, PAGE - 1])
@pytest.mark.parametrize("where", ["va", "size", "both"])
def test_unaligned_addresses_and_sizes_are_invalid_arguments(
    ground: Ground, face: Face, skew: int, where: str
) -> None:
    before = ground.state()
    va = ground.committed + (skew if where != "size" else 0)
    size = 2 * PAGE - (skew if where != "va" else 0)
    for method in PAGE_METHODS:
        got = call(ground.vmm, face, method, *range_arguments(method, va, size))
        assert got.rc is Retcode.INVALID_ARGUMENT, method
        wrong = size if where == "size" else va
        assert got.error is None or names_value(got.error, wrong), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("flags", [COMMIT | RW, COMMIT | RW | FIXED], ids=["plain", "FIXED"])
@pytest.mark.parametrize("skew", [1, PAGE // 2, PAGE - 1])
@pytest.mark.parametrize("where", ["addr", "size", "both"])
def test_allocate_wants_whole_pages(
    ground: Ground, face: Face, flags: VmmFlags, skew: int, where: str
) -> None:
    before = ground.state()
    addr = ground.hole + (skew if where != "size" else 0)
    size = PAGE + (skew if where != "addr" else 0)
    got = call(ground.vmm, face, "allocate", addr, size, flags)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
@pytest.mark.parametrize(
    "method", ["allocate", *RANGE_METHODS, "mdl_create", "mdl_create_from_buf", *WINDOW_METHODS]
)
def test_nothing_is_too_little(ground: Ground, face: Face, method: str) -> None:
    before = ground.state()
    empty: dict[str, object] = {"data": b"", "size": 0, "length": 0}
    empty = {name: nothing for name, nothing in empty.items() if name in PARAMETERS[method]}
    assert empty
    assert call_with(ground, face, method, **empty).rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", [method for method in RANGE_METHODS if method != "write"])
@pytest.mark.parametrize(
    ("va", "size"),
    [
        (1 << 63, 1 << 63 | PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        (ARENA + 16 * PAGE, (1 << 64) - PAGE),
        ((1 << 64) - PAGE, (1 << 64) - PAGE),
    ],
    ids=["half and more", "last page and one more", "from a region", "twice the end"],
)
def test_a_range_that_overflows_is_an_invalid_argument(
    ground: Ground, face: Face, method: str, va: int, size: int
) -> None:
    before = ground.state()
    got = call(ground.vmm, face, method, *range_arguments(method, va, size))
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
@pytest.mark.parametrize("fixed", [0, FIXED], ids=["plain", "FIXED"])
def test_an_allocation_that_overflows_is_an_invalid_argument(
    ground: Ground, face: Face, fixed: int
) -> None:
    for addr, size in ((2 * PAGE, (1 << 64) - PAGE), ((1 << 64) - PAGE, 2 * PAGE)):
        got = call(ground.vmm, face, "allocate", addr, size, COMMIT | RW | fixed)
        assert got.rc is Retcode.INVALID_ARGUMENT


@faces
@pytest.mark.parametrize("method", [method for method in RANGE_METHODS if method != "write"])
@pytest.mark.parametrize("size", [1 << 40, 1 << 47, 1 << 62], ids=hex)
def test_a_huge_range_is_not_found(ground: Ground, face: Face, method: str, size: int) -> None:
    before = ground.state()
    arguments = range_arguments(method, ground.committed, size)
    assert call(ground.vmm, face, method, *arguments).rc is Retcode.RESOURCE_NOT_FOUND
    assert ground.state() == before


@faces
@pytest.mark.parametrize("extra", [0, GUARDS, VmmFlags.SHAREABLE], ids=["plain", "guards", "memfd"])
@pytest.mark.parametrize(
    "size", [USER_SPACE_END, 1 << 48, 1 << 62, 1 << 63, (1 << 64) - PAGE], ids=hex
)
def test_more_than_user_space_is_out_of_memory(
    ground: Ground, face: Face, size: int, extra: int
) -> None:
    before, descriptors = ground.state(), kernel.descriptors()
    got = call(ground.vmm, face, "allocate", 0, size, RESERVE | RW | extra)
    assert got.rc is Retcode.OUT_OF_MEMORY
    assert ground.state() == before
    assert kernel.descriptors() == descriptors


# -------------------------------------------------------------------------------- ranges

RANGES: dict[str, Callable[[Ground], tuple[int, int]]] = {
    "two regions that touch": lambda on: (on.committed + 7 * PAGE, 2 * PAGE),
    "two whole regions": lambda on: (on.committed, 12 * PAGE),
    "a region and the hole after it": lambda on: (on.neighbour, 5 * PAGE),
    "the hole before a region and it": lambda on: (on.committed - PAGE, 2 * PAGE),
    "a hole": lambda on: (on.hole, PAGE),
    "a low guard": lambda on: (on.guarded - PAGE, PAGE),
    "a high guard": lambda on: (on.guarded + 4 * PAGE, PAGE),
    "a low guard and its region": lambda on: (on.guarded - PAGE, 2 * PAGE),
    "a region and its high guard": lambda on: (on.guarded + 3 * PAGE, 2 * PAGE),
    "a region and both guards": lambda on: (on.guarded - PAGE, 6 * PAGE),
    "memory of somebody else": lambda on: (on.foreign, PAGE),
    "the null page": lambda _: (0, PAGE),
    "the last page of user space": lambda _: (USER_SPACE_END - PAGE, PAGE),
    "addresses of the kernel": lambda _: ((1 << 64) - 2 * PAGE, PAGE),
    "everything from the first region on": lambda on: (on.committed, 1 << 20),
}


@faces
@pytest.mark.parametrize("where", RANGES)
def test_a_range_that_is_not_inside_one_region_is_not_found(
    ground: Ground, face: Face, where: str
) -> None:
    before = ground.state()
    va, size = RANGES[where](ground)
    for method in RANGE_METHODS:
        got = call(ground.vmm, face, method, *range_arguments(method, va, size))
        assert got.rc is Retcode.RESOURCE_NOT_FOUND, method
        assert got.error is None or names_value(got.error, va), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_another_vmm_does_not_find_the_region(ground: Ground, face: Face, method: str) -> None:
    before = ground.state()
    with VMM() as other:
        got = call(other, face, method, *range_arguments(method, ground.committed, PAGE))
        assert got.rc is Retcode.RESOURCE_NOT_FOUND
        assert other.query(ground.committed).kind is PageKind.FOREIGN
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_a_freed_region_is_not_found(ground: Ground, face: Face, method: str) -> None:
    ground.vmm.free(ground.neighbour, 4 * PAGE)
    got = call(ground.vmm, face, method, *range_arguments(method, ground.neighbour, PAGE))
    assert got.rc is Retcode.RESOURCE_NOT_FOUND


# --------------------------------------------------------------------------------- flags


#: What each method about buffers calls the protection that it takes.
BUFFER_PROTECTIONS = {
    "mdl_create": "prot",
    "mdl_create_from_vm": "flags",
    "mdl_create_from_buf": "prot",
    "mdl_map": "prot",
}


@faces
@pytest.mark.parametrize("protection", [2, 4, 6], ids=["W", "X", "WX"])
def test_illegal_protections_are_invalid_arguments(
    ground: Ground, face: Face, protection: int
) -> None:
    before = ground.state()
    for method, flags in (("protect", protection), ("allocate", int(RESERVE) | protection)):
        got = call_with(ground, face, method, flags=flags)
        assert got.rc is Retcode.INVALID_ARGUMENT
    for method, name in BUFFER_PROTECTIONS.items():
        got = call_with(ground, face, method, **{name: protection})
        assert got.rc is Retcode.INVALID_ARGUMENT, method
        assert got.error is None or names_value(got.error, protection), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("protection", [0, 1, 3, 5, 7], ids=["none", "R", "RW", "RX", "RWX"])
def test_legal_protections_are_accepted(ground: Ground, face: Face, protection: int) -> None:
    for method, flags in (("protect", protection), ("allocate", int(COMMIT) | protection)):
        assert call_with(ground, face, method, flags=flags).rc is Retcode.OK
    for method, name in BUFFER_PROTECTIONS.items():
        changed: dict[str, object] = {name: protection}
        if method == "mdl_create_from_vm":
            changed["va"] = ground.neighbour
        if method == "mdl_map":
            changed["handle"] = ground.vmm.mdl_create(2 * PAGE, VmmFlags.RWX_MASK)
        got = call_with(ground, face, method, **changed)
        some_access = protection != 0 or method == "mdl_map"
        assert got.rc is (Retcode.OK if some_access else Retcode.INVALID_ARGUMENT), method


@faces
@pytest.mark.parametrize(
    ("method", "name", "known"),
    [
        ("mdl_create", "prot", VmmFlags.RWX_MASK | VmmFlags.LOCKED),
        ("mdl_create_from_vm", "flags", VmmFlags.RWX_MASK),
        ("mdl_create_from_buf", "prot", VmmFlags.RWX_MASK),
        ("mdl_map", "prot", VmmFlags.RWX_MASK | VmmFlags.LOCKED | GUARDS | FIXED),
        ("mdl_seal", "seals", Seal.PUBLISH | Seal.FREEZE),
        ("handle_copy", "rights", Rights(0x3F)),
    ],
    ids=lambda value: value if isinstance(value, str) else hex(value),
)
def test_a_buffers_methods_take_no_flags_but_their_own(
    ground: Ground, face: Face, method: str, name: str, known: int
) -> None:
    """Cache modes neither: those are for Allocate."""
    before = ground.state()
    for bit in range(64):
        if known >> bit & 1:
            continue
        got = call_with(ground, face, method, **{name: 1 | 1 << bit})
        assert got.rc is Retcode.INVALID_ARGUMENT, bit
        if got.error is not None:
            assert names_value(got.error, 1 << bit) or names_value(got.error, 1 | 1 << bit)
    assert ground.state() == before


@faces
def test_sealing_with_nothing_is_an_invalid_argument(ground: Ground, face: Face) -> None:
    before = ground.state()
    assert call_with(ground, face, "mdl_seal", seals=0).rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
def test_an_unknown_flag_is_an_invalid_argument(ground: Ground, face: Face) -> None:
    before = ground.state()
    for bit in range(64):
        if KNOWN_FLAGS >> bit & 1:
            continue
        flags = int(COMMIT | RW) | 1 << bit
        got = call_with(ground, face, "allocate", flags=flags)
        assert got.rc is Retcode.INVALID_ARGUMENT, bit
        if got.error is not None:
            assert names_value(got.error, 1 << bit) or names_value(got.error, flags), got.error
    assert ground.state() == before


@faces
def test_protect_takes_nothing_but_protections(ground: Ground, face: Face) -> None:
    before = ground.state()
    for bit in range(3, 64):
        got = call_with(ground, face, "protect", flags=1 | 1 << bit)
        assert got.rc is Retcode.INVALID_ARGUMENT, bit
    assert ground.state() == before


@faces
@pytest.mark.parametrize(
    "flags",
    [0, 3, VmmFlags.COMMIT | RW, VmmFlags.LOCKED | RW, FIXED | RW, GUARDS, VmmFlags.SHAREABLE],
    ids=hex,
)
def test_allocate_without_reserve_is_an_invalid_argument(
    ground: Ground, face: Face, flags: int
) -> None:
    before = ground.state()
    got = call_with(ground, face, "allocate", flags=int(flags))
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert got.error is None or "RESERVE" in str(got.error)
    assert ground.state() == before


CACHE_MODES = ["WRITE_THROUGH", "WRITE_COMBINE", "CACHE_DISABLE"]


@faces
@pytest.mark.parametrize("mode", CACHE_MODES)
def test_cache_modes_that_linux_has_not_are_unimplemented(
    ground: Ground, face: Face, mode: str
) -> None:
    before = ground.state()
    flags = int(COMMIT | RW | VmmFlags[mode])
    got = call_with(ground, face, "allocate", flags=flags)
    assert got.rc is Retcode.UNIMPLEMENTED
    assert got.error is None or names_value(got.error, flags), str(got.error)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("mode", CACHE_MODES)
def test_bad_arguments_come_before_cache_modes_and_these_before_the_range(
    ground: Ground, face: Face, mode: str
) -> None:
    flags = COMMIT | RW | VmmFlags[mode]
    bad = ground.hole, PAGE + 1, flags
    assert call(ground.vmm, face, "allocate", *bad).rc is Retcode.INVALID_ARGUMENT
    unknown = ground.hole, PAGE, int(flags) | 1 << 40
    assert call(ground.vmm, face, "allocate", *unknown).rc is Retcode.INVALID_ARGUMENT
    taken = ground.committed, PAGE, flags | FIXED
    assert call(ground.vmm, face, "allocate", *taken).rc is Retcode.UNIMPLEMENTED


@faces
def test_write_back_is_what_every_mapping_has(ground: Ground, face: Face) -> None:
    got = call_with(ground, face, "allocate", flags=COMMIT | RW | VmmFlags.WRITE_BACK)
    assert got.rc is Retcode.OK
    assert ground.vmm.query(got.value).flags == COMMIT | RW | VmmFlags.WRITE_BACK


# ------------------------------------------------------------------------------ addresses

TAKEN: dict[str, Callable[[Ground], tuple[int, int, int]]] = {
    "a region": lambda on: (on.committed, PAGE, 0),
    "the end of a region": lambda on: (on.neighbour + 3 * PAGE, 2 * PAGE, 0),
    "a low guard": lambda on: (on.guarded - PAGE, PAGE, 0),
    "a high guard": lambda on: (on.guarded + 4 * PAGE, PAGE, 0),
    "reserved pages": lambda on: (on.reserved, PAGE, 0),
    "a stranger": lambda on: (on.foreign, PAGE, 0),
    "a stranger in the middle": lambda on: (on.foreign - PAGE, 3 * PAGE, 0),
    "a stranger where the low guard goes": lambda on: (
        on.foreign + PAGE,
        PAGE,
        VmmFlags.LOW_GUARD,
    ),
    "a region where the high guard goes": lambda on: (
        on.committed - PAGE,
        PAGE,
        VmmFlags.HIGH_GUARD,
    ),
}


@faces
@pytest.mark.parametrize("extra", [0, VmmFlags.SHAREABLE], ids=["private", "SHAREABLE"])
@pytest.mark.parametrize("where", TAKEN)
def test_fixed_on_something_already_exists(
    ground: Ground, face: Face, where: str, extra: int
) -> None:
    before, descriptors = ground.state(), kernel.descriptors()
    addr, size, guards = TAKEN[where](ground)
    got = call(ground.vmm, face, "allocate", addr, size, COMMIT | RW | FIXED | guards | extra)
    assert got.rc is Retcode.ALREADY_EXISTS
    assert got.error is None or names_value(got.error, addr), str(got.error)
    assert ground.state() == before
    assert kernel.descriptors() == descriptors


UNREACHABLE = {
    "null": (0, PAGE, 0),
    "below the lowest address": (LOWEST - PAGE, PAGE, 0),
    "with a guard below the lowest address": (LOWEST, PAGE, VmmFlags.LOW_GUARD),
    "across the end": (USER_SPACE_END - PAGE, 2 * PAGE, 0),
    "with a guard across the end": (USER_SPACE_END - PAGE, PAGE, VmmFlags.HIGH_GUARD),
    "at the end": (USER_SPACE_END, PAGE, 0),
    "in the kernel": (1 << 63, PAGE, 0),
    "the last page of all": ((1 << 64) - PAGE, PAGE, 0),
}


@faces
@pytest.mark.parametrize("where", UNREACHABLE)
def test_fixed_outside_what_a_process_may_have_is_an_invalid_argument(
    ground: Ground, face: Face, where: str
) -> None:
    addr, size, guards = UNREACHABLE[where]
    got = call(ground.vmm, face, "allocate", addr, size, COMMIT | RW | FIXED | guards)
    assert got.rc is Retcode.INVALID_ARGUMENT


@faces
@pytest.mark.parametrize(
    "where", ["taken", "too low", "at the end", "too high", "far too high", "half taken"]
)
def test_a_preferred_address_that_cannot_be_is_only_a_wish(
    ground: Ground, face: Face, where: str
) -> None:
    before = ground.state()
    addr = {
        "taken": ground.committed,
        "half taken": ground.committed - PAGE,
        "too low": min(PAGE, LOWEST),
        "at the end": USER_SPACE_END - PAGE,
        "too high": USER_SPACE_END,
        "far too high": (1 << 64) - 4 * PAGE,
    }[where]
    got = call(ground.vmm, face, "allocate", addr, 2 * PAGE, COMMIT | RW)
    assert got.rc is Retcode.OK
    assert LOWEST <= got.value <= USER_SPACE_END - 2 * PAGE
    if where != "too low":
        assert got.value != addr
    assert kernel.page_permissions(got.value, got.value + 2 * PAGE) == ["rw-p", "rw-p"]
    ground.vmm.free(got.value, 2 * PAGE)
    assert ground.state() == before


# --------------------------------------------------------------------------------- states


def test_reads_writes_and_views_want_committed_pages_that_allow_them(ground: Ground) -> None:
    vmm, before = ground.vmm, ground.state()
    ground_and = {
        "reserved": (ground.reserved, {"read", "write", "view"}),
        "read-only": (ground.read_only, {"write"}),
        "no access": (ground.no_access, {"read", "write", "view"}),
    }
    for name, (va, refused) in ground_and.items():
        for method in ("read", "write", "view"):
            got = call(vmm, Face.METHODS, method, *range_arguments(method, va, 2 * PAGE))
            expected = Retcode.INVALID_OPERATION if method in refused else Retcode.OK
            assert got.rc is expected, (name, method)
    got = call(vmm, Face.METHODS, "view", ground.read_only, PAGE, True)
    assert got.rc is Retcode.INVALID_OPERATION
    assert ground.state() == before


def test_one_page_in_the_wrong_state_is_enough(ground: Ground) -> None:
    vmm = ground.vmm
    vmm.decommit(ground.committed + 3 * PAGE, PAGE)
    for method in ("read", "write", "view"):
        arguments = range_arguments(method, ground.committed, 8 * PAGE)
        assert call(vmm, Face.METHODS, method, *arguments).rc is Retcode.INVALID_OPERATION
    assert vmm.read(ground.committed, 9) == b"committed"


@faces
@pytest.mark.parametrize("method", ["free", "decommit", "protect"])
def test_pinned_pages_are_busy(ground: Ground, face: Face, method: str) -> None:
    view = ground.vmm.view(ground.committed + PAGE + 7, PAGE)
    before = ground.state()
    for first, count, rc in ((0, 8, "BUSY"), (1, 1, "BUSY"), (2, 1, "BUSY"), (3, 5, "OK")):
        arguments = range_arguments(method, ground.committed + first * PAGE, count * PAGE)
        got = call(ground.vmm, face, method, *arguments)
        assert got.rc is Retcode[rc]
        if rc == "BUSY":
            assert ground.state() == before
    view.release()


@faces
@pytest.mark.parametrize("method", [*PARAMETERS])
def test_a_closed_vmm_refuses_everything_before_it_looks_at_arguments(
    face: Face, method: str
) -> None:
    vmm = VMM()
    vmm.close()
    names = PARAMETERS[method]
    good: dict[str, object] = dict.fromkeys(names, PAGE)
    good |= {"addr": 0, "va": ARENA, "flags": int(RESERVE), "data": b"x", "prot": 1}
    for value in (good, dict.fromkeys(good, "wrong"), dict.fromkeys(good, -1)):
        got = call(vmm, face, method, *[value[name] for name in names])
        assert got.rc is Retcode.INVALID_OPERATION
    vmm.close()
    assert vmm.closed


# ------------------------------------------------------------------------ buffers and handles


@faces
@pytest.mark.parametrize("method", WINDOW_METHODS)
@pytest.mark.parametrize("skew", [1, 512, PAGE // 2, PAGE - 1])
def test_windows_want_whole_pages(ground: Ground, face: Face, method: str, skew: int) -> None:
    before = ground.state()
    for changed in (
        {"offset": skew},
        {"length": PAGE - skew},
        {"length": PAGE + skew},
        {"offset": PAGE - skew, "length": skew},
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.INVALID_ARGUMENT, changed
    assert ground.state() == before


@faces
@pytest.mark.parametrize("skew", [1, PAGE // 2, PAGE - 1])
def test_buffers_and_hints_want_whole_pages(ground: Ground, face: Face, skew: int) -> None:
    before = ground.state()
    for method, changed in (
        ("mdl_create", {"size": skew}),
        ("mdl_create", {"size": PAGE + skew}),
        ("mdl_map", {"hint": ground.hole + skew}),
        ("mdl_map", {"hint": ground.hole + skew, "prot": int(FIXED) | 1}),
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.INVALID_ARGUMENT, (method, changed)
        assert got.error is None or any(names_value(got.error, each) for each in changed.values())
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", WINDOW_METHODS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 9 * PAGE),
        (8 * PAGE, PAGE),
        (7 * PAGE, 2 * PAGE),
        (1 << 40, PAGE),
        (0, 1 << 62),
        (1 << 63, 1 << 63),
        ((1 << 64) - PAGE, PAGE),
        ((1 << 64) - PAGE, 2 * PAGE),
        (PAGE, (1 << 64) - PAGE),
    ],
    ids=lambda number: f"{number:#x}",
)
def test_a_window_beyond_the_buffer_is_an_invalid_argument(
    ground: Ground, face: Face, method: str, offset: int, length: int
) -> None:
    before = ground.state()
    got = call_with(ground, face, method, offset=offset, length=length)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert got.error is None or names_value(got.error, offset) or names_value(got.error, length)
    assert ground.state() == before


@faces
def test_a_hint_beyond_64_bits_with_its_length_is_an_invalid_argument(
    ground: Ground, face: Face
) -> None:
    before = ground.state()
    for extra in (0, FIXED):
        got = call_with(
            ground, face, "mdl_map", hint=(1 << 64) - PAGE, length=2 * PAGE, prot=1 | int(extra)
        )
        assert got.rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
@pytest.mark.parametrize("method", HANDLE_METHODS)
@pytest.mark.parametrize(
    ("which", "rc"),
    [
        ("closed", Retcode.RESOURCE_NOT_FOUND),
        ("revoked", Retcode.HANDLE_REVOKED),
        ("another VMM's", Retcode.INVALID_ARGUMENT),
        ("INVALID_HANDLE", Retcode.INVALID_ARGUMENT),
        ("nothing", Retcode.INVALID_ARGUMENT),
        ("forged", Retcode.INVALID_ARGUMENT),
        ("an address", Retcode.INVALID_ARGUMENT),
    ],
)
def test_bad_handles_are_refused_by_every_method(
    ground: Ground, face: Face, method: str, which: str, rc: Retcode
) -> None:
    with VMM() as other:
        handle = {
            "closed": ground.closed,
            "revoked": ground.revoked,
            "another VMM's": other.mdl_create(8 * PAGE, RW),
            "INVALID_HANDLE": INVALID_HANDLE,
            "nothing": 0,
            "forged": ground.reader | int(Rights.MAP_WRITE) << 32,
            "an address": ground.mapped,
        }[which]
        before = ground.state()
        if which == "revoked" and method == "handle_close":
            rc = Retcode.OK
        got = call_with(ground, face, method, **{handle_parameter(method): handle})
        assert got.rc is rc
        assert got.error is None or names_value(got.error, int(handle)), str(got.error)
        assert ground.state() == before


@faces
def test_what_a_handle_does_not_allow_is_no_capability(ground: Ground, face: Face) -> None:
    before = ground.state()
    mute = ground.vmm.handle_copy(ground.handle, 0)
    for method, changed, right in (
        ("mdl_map", {"handle": ground.reader, "prot": 3}, "MAP_WRITE"),
        ("mdl_map", {"handle": ground.reader, "prot": 5}, "MAP_EXECUTE"),
        ("mdl_map", {"handle": ground.handle, "prot": 7}, "MAP_EXECUTE"),
        ("mdl_map", {"handle": mute, "prot": 1}, "MAP_READ"),
        ("mdl_clone", {"originHandle": ground.reader}, "COPY"),
        ("mdl_seal", {"handle": ground.reader}, "MAP_WRITE"),
        ("handle_copy", {"handle": ground.reader}, "COPY"),
        ("handle_copy", {"rights": int(Rights.MAP_EXECUTE)}, "MAP_EXECUTE"),
        ("handle_copy", {"rights": 0x3F}, "MAP_EXECUTE"),
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.NO_CAPABILITY, (method, changed)
        assert got.error is None or right in str(got.error)
    assert ground.state() == before


@faces
def test_protect_above_what_was_mapped_is_no_capability(ground: Ground, face: Face) -> None:
    va = ground.vmm.mdl_map(ground.reader, 0, 4 * PAGE, 0, VmmFlags.READ)
    before = ground.state()
    for protection in (3, 5, 7):
        got = call(ground.vmm, face, "protect", va, PAGE, protection)
        assert got.rc is Retcode.NO_CAPABILITY
        assert got.error is None or names_value(got.error, va)
    got = call(ground.vmm, face, "protect", ground.mapped, PAGE, 7)
    assert got.rc is Retcode.NO_CAPABILITY
    assert ground.state() == before


@faces
@pytest.mark.parametrize("seal", [Seal.PUBLISH, Seal.FREEZE])
def test_writing_to_a_sealed_buffer_is_no_capability(
    ground: Ground, face: Face, seal: Seal
) -> None:
    handle = ground.vmm.mdl_create(8 * PAGE, RW)
    ground.vmm.mdl_seal(handle, seal)
    before = ground.state()
    got = call_with(ground, face, "mdl_map", handle=handle, prot=3)
    assert got.rc is Retcode.NO_CAPABILITY
    assert got.error is None or "sealed" in str(got.error)
    assert ground.state() == before


@faces
def test_freezing_what_somebody_can_write_is_busy(ground: Ground, face: Face) -> None:
    before = ground.state()
    got = call_with(ground, face, "mdl_seal", seals=int(Seal.FREEZE))
    assert got.rc is Retcode.BUSY
    assert ground.state() == before


@faces
def test_the_right_pages_in_the_wrong_state_are_an_invalid_operation(
    ground: Ground, face: Face
) -> None:
    ground.vmm.decommit(ground.neighbour + PAGE, PAGE)
    before = ground.state()
    for method, va, pages in (
        ("mdl_create_from_vm", ground.reserved, 1),
        ("mdl_create_from_vm", ground.neighbour, 4),
        ("mdl_create_from_vm", ground.mapped, 8),
        ("mdl_create_from_vm", ground.mapped + PAGE, 1),
        ("decommit", ground.mapped, 8),
        ("decommit", ground.mapped + 7 * PAGE, 1),
    ):
        got = call(ground.vmm, face, method, *range_arguments(method, va, pages * PAGE))
        assert got.rc is Retcode.INVALID_OPERATION, (method, va)
    assert ground.state() == before


@faces
@pytest.mark.parametrize("where", [*TAKEN, "a mapping of the buffer itself"])
def test_mapping_fixed_on_something_already_exists(ground: Ground, face: Face, where: str) -> None:
    before = ground.state()
    if where in TAKEN:
        hint, size, guards = TAKEN[where](ground)
    else:
        hint, size, guards = ground.mapped, PAGE, 0
    prot = RW | FIXED | guards
    got = call(ground.vmm, face, "mdl_map", ground.handle, 0, size, hint, prot)
    assert got.rc is Retcode.ALREADY_EXISTS
    assert ground.state() == before


@faces
@pytest.mark.parametrize("where", UNREACHABLE)
def test_mapping_fixed_outside_what_a_process_may_have_is_an_invalid_argument(
    ground: Ground, face: Face, where: str
) -> None:
    before = ground.state()
    hint, size, guards = UNREACHABLE[where]
    got = call(ground.vmm, face, "mdl_map", ground.handle, 0, size, hint, RW | FIXED | guards)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert ground.state() == before


@faces
def test_buffers_that_no_memory_can_hold_are_out_of_memory(ground: Ground, face: Face) -> None:
    half = USER_SPACE_END // 2 // PAGE * PAGE
    big = ground.vmm.mdl_create(half, RW)
    call(ground.vmm, face, "mdl_map", big, 0, half, 0, RW)  # where it fits, no second one does
    before = ground.state()
    for method, changed in (
        ("mdl_create", {"size": half, "prot": int(RW | VmmFlags.LOCKED)}),
        ("mdl_create", {"size": USER_SPACE_END + PAGE}),
        ("mdl_create", {"size": 1 << 63}),
        ("mdl_create", {"size": (1 << 64) - PAGE}),
        ("mdl_map", {"handle": big, "offset": 0, "length": half, "prot": 3}),
        ("mdl_map", {"handle": big, "length": 1 << 42, "prot": 3 | int(VmmFlags.LOCKED)}),
    ):
        got = call_with(ground, face, method, **changed)
        assert got.rc is Retcode.OUT_OF_MEMORY, (method, changed)
    assert ground.state() == before


@contextlib.contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Let this process open nothing more."""
    spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.close(spare)
    old = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, old)


@faces
def test_without_a_descriptor_the_quota_is_exceeded(ground: Ground, face: Face) -> None:
    before = ground.state()
    with no_descriptor_left():
        for method in ("mdl_create", "mdl_create_from_vm", "mdl_create_from_buf", *WINDOW_METHODS):
            got = call_with(ground, face, method)
            assert got.rc is Retcode.QUOTA_EXCEEDED, method
            assert got.error is None or "RLIMIT_NOFILE" in str(got.error), str(got.error)
        for method in ("handle_copy", "handle_info"):
            assert call_with(ground, face, method).rc is Retcode.OK, "a handle takes none"
        writer = call_with(ground, face, "mdl_map", prot=3)
        assert writer.rc is Retcode.OK, "a writable mapping takes none"
        ground.vmm.free(writer.value, PAGE)
    assert ground.state() == before


def test_every_out_value_of_a_failed_call_is_nothing(ground: Ground) -> None:
    endpoint = ground.vmm.endpoint
    invalid = Retcode.INVALID_ARGUMENT
    assert endpoint.MdlCreate(0, 1) == (INVALID_HANDLE, invalid)
    assert endpoint.MdlCreateFromVm(0, 0, 1) == (INVALID_HANDLE, invalid)
    assert endpoint.MdlGetSize(0) == (0, invalid)
    assert endpoint.MdlMap(0, 0, PAGE, 0, 1) == (0, invalid)
    assert endpoint.MdlClone(0, 0, PAGE) == (INVALID_HANDLE, invalid)
    assert endpoint.Allocate(0, 0, 0) == (0, invalid)
    assert endpoint.Query(-1) == (None, invalid)
    names = {reference_name(method) for method in REFERENCE_METHODS}
    assert names == {name for name in dir(endpoint) if name[0].isupper()}
    assert set(NOTHING) < set(REFERENCE_METHODS)


# ---------------------------------------------------------------------------------- Query


@faces
def test_query_answers_about_every_user_address(ground: Ground, face: Face) -> None:
    for va in (0, 1, PAGE - 1, ground.foreign + 5, ground.hole + PAGE - 1, USER_SPACE_END - 1):
        got = call(ground.vmm, face, "query", va)
        assert got.rc is Retcode.OK
        assert got.value.va == va - va % PAGE


@faces
@pytest.mark.parametrize("va", [1 << 63, (1 << 64) - 1, (1 << 64) - PAGE], ids=hex)
def test_query_above_user_space_is_an_invalid_argument(ground: Ground, face: Face, va: int) -> None:
    assert call(ground.vmm, face, "query", va).rc is Retcode.INVALID_ARGUMENT
    end = call(ground.vmm, face, "query", -(-USER_SPACE_END // (1 << 30)) * (1 << 30))
    assert end.rc is Retcode.INVALID_ARGUMENT


# ------------------------------------------------------------------------ read, write, view


def test_write_takes_every_contiguous_buffer(ground: Ground) -> None:
    numpy = pytest.importorskip("numpy", reason="arrays of NumPy need NumPy")
    data = bytes(range(64))
    buffers: list[Any] = [
        data,
        bytearray(data),
        memoryview(data),
        memoryview(data).cast("I"),
        memoryview(data).cast("B", (8, 8)),
        array.array("Q", data),
        (ctypes.c_uint16 * 32).from_buffer_copy(data),
        numpy.frombuffer(data, dtype=numpy.uint32),
        numpy.frombuffer(data, dtype=numpy.uint8).reshape(4, 16),
    ]
    for buffer in buffers:
        ground.vmm.write(ground.committed, bytes(64))
        assert ground.vmm.write(ground.committed, buffer) == 64
        assert ground.vmm.read(ground.committed, 64) == data, type(buffer)


def test_write_refuses_what_is_no_contiguous_buffer(ground: Ground) -> None:
    numpy = pytest.importorskip("numpy", reason="arrays of NumPy need NumPy")
    square = numpy.zeros((4, 16), dtype=numpy.uint8)
    released = memoryview(b"gone")
    released.release()
    before = ground.state()
    for wrong in (
        None,
        "text",
        5,
        1.5,
        [1, 2],
        object(),
        memoryview(bytes(64))[::2],
        memoryview(bytes(64))[::-1],
        square.T,
        square[:, ::2],
        released,
        memoryview(b""),
    ):
        got = call(ground.vmm, Face.METHODS, "write", ground.committed, wrong)
        assert got.rc is Retcode.INVALID_ARGUMENT, repr(wrong)
    assert ground.state() == before


def test_write_from_memory_that_faults_is_an_error_and_no_signal(ground: Ground) -> None:
    before = ground.state()
    for bad in (ground.reserved, ground.no_access, ground.hole, ground.guarded - PAGE):
        buffer = (ctypes.c_char * PAGE).from_address(bad)
        got = call(ground.vmm, Face.METHODS, "write", ground.committed, buffer)
        assert got.rc is not Retcode.OK
        assert got.error is not None
        assert got.error.completed == 0
    assert ground.state() == before


def test_write_that_stops_half_way_says_how_far_it_came(ground: Ground) -> None:
    edge = ground.neighbour + 4 * PAGE - 100
    ground.vmm.write(edge, b"y" * 100)
    buffer = (ctypes.c_char * PAGE).from_address(edge)
    got = call(ground.vmm, Face.METHODS, "write", ground.committed, buffer)
    assert got.error is not None
    done = got.error.completed
    assert 0 <= done <= 100
    assert ground.vmm.read(ground.committed, done) == b"y" * done
    assert ground.vmm.read(ground.committed + 100, 9) == (b"committed" * 20)[100:109]


def test_write_may_come_from_the_same_pages(ground: Ground) -> None:
    view = ground.vmm.view(ground.committed, 4 * PAGE)
    assert ground.vmm.write(ground.committed + PAGE, view[:PAGE]) == PAGE
    assert bytes(view[PAGE : PAGE + 9]) == b"committed"
    view.release()


def test_a_read_that_no_memory_can_hold_is_out_of_memory(ground: Ground) -> None:
    size = 1 << 45
    va = ground.vmm.allocate(0, size, COMMIT | VmmFlags.READ)
    got = call(ground.vmm, Face.METHODS, "read", va, size)
    assert got.rc is Retcode.OUT_OF_MEMORY
    assert ground.vmm.read(va + size - 5, 5) == bytes(5)
    ground.vmm.free(va, size)


def test_a_read_only_view_refuses_stores(ground: Ground) -> None:
    for view in (
        ground.vmm.view(ground.read_only, PAGE),
        ground.vmm.view(ground.committed, PAGE, False),
        ground.vmm.view(ground.committed, PAGE, writable=False),
    ):
        assert view.readonly
        with pytest.raises(TypeError):
            view[0] = 1
        view.release()


# --------------------------------------------------------------------------------- errors

PYTHON_EXCEPTIONS: dict[Retcode, type[Exception]] = {
    Retcode.INVALID_ARGUMENT: ValueError,
    Retcode.RESOURCE_NOT_FOUND: LookupError,
    Retcode.INVALID_OPERATION: RuntimeError,
    Retcode.ALREADY_EXISTS: FileExistsError,
    Retcode.OUT_OF_MEMORY: MemoryError,
    Retcode.BUSY: BufferError,
    Retcode.UNIMPLEMENTED: NotImplementedError,
    Retcode.NO_CAPABILITY: PermissionError,
    Retcode.HANDLE_REVOKED: LookupError,
}


def provoked(ground: Ground, rc: Retcode) -> VmmError:
    """The error that a call on real memory ends with."""
    calls: dict[Retcode, tuple[Any, ...]] = {
        Retcode.INVALID_ARGUMENT: ("commit", ground.committed + 1, PAGE),
        Retcode.RESOURCE_NOT_FOUND: ("commit", ground.hole, PAGE),
        Retcode.INVALID_OPERATION: ("read", ground.reserved, 1),
        Retcode.ALREADY_EXISTS: ("allocate", ground.foreign, PAGE, RESERVE | FIXED),
        Retcode.OUT_OF_MEMORY: ("allocate", 0, 1 << 62, RESERVE),
        Retcode.BUSY: ("free", ground.committed, PAGE),
        Retcode.UNIMPLEMENTED: ("allocate", 0, PAGE, RESERVE | VmmFlags.CACHE_DISABLE),
        Retcode.NO_CAPABILITY: ("mdl_map", ground.reader, 0, PAGE, 0, RW),
        Retcode.HANDLE_REVOKED: ("mdl_get_size", ground.revoked),
    }
    view = ground.vmm.view(ground.committed, 1)
    error = call(ground.vmm, Face.METHODS, *calls[rc]).error
    view.release()
    assert error is not None
    return error


@pytest.mark.parametrize("rc", PYTHON_EXCEPTIONS, ids=lambda rc: rc.name)
def test_errors_are_the_exceptions_that_a_python_user_would_catch(
    ground: Ground, rc: Retcode
) -> None:
    error = provoked(ground, rc)
    assert error.rc is rc
    assert isinstance(error, PYTHON_EXCEPTIONS[rc])
    assert error.completed == 0
    assert len(str(error)) > len(error.method) + 10, "the message must say what was wrong"


@pytest.mark.parametrize("rc", PYTHON_EXCEPTIONS, ids=lambda rc: rc.name)
def test_errors_pickle_and_copy_whole(ground: Ground, rc: Retcode) -> None:
    error = provoked(ground, rc)
    error.completed = 77
    protocols = range(pickle.HIGHEST_PROTOCOL + 1)
    twins = [pickle.loads(pickle.dumps(error, protocol)) for protocol in protocols]  # noqa: S301
    for twin in [*twins, copy.copy(error), copy.deepcopy(error)]:
        assert type(twin) is type(error)
        assert (twin.rc, twin.method, twin.errno) == (error.rc, error.method, error.errno)
        assert (twin.completed, str(twin)) == (77, str(error))


def test_an_error_of_the_kernel_has_its_errno_and_one_of_ours_has_none(ground: Ground) -> None:
    assert provoked(ground, Retcode.INVALID_ARGUMENT).errno is None
    assert provoked(ground, Retcode.BUSY).errno is None
    commit = ground.vmm.allocate(0, 1 << 45, RESERVE | RW)
    error = call(ground.vmm, Face.METHODS, "commit", commit, 1 << 45).error
    assert error is not None
    assert error.errno == 12


# ------------------------------------------------------------------------ calls inside calls


class Meddler:
    """An integer that does something to the VMM while it is being read."""

    def __init__(self, value: int, act: Callable[[], object]) -> None:
        self.value = int(value)
        self.act = act

    def __index__(self) -> int:
        """Act, then be a number."""
        self.act()
        return self.value


@faces
@pytest.mark.parametrize(
    "method",
    [
        "commit",
        "decommit",
        "protect",
        "free",
        "query",
        "allocate",
        "mdl_create",
        "mdl_create_from_vm",
        "mdl_get_size",
        "mdl_map",
        "mdl_clone",
    ],
)
@pytest.mark.parametrize("act", ["close", "free", "query", "commit", "handle_close", "revoke"])
def test_an_argument_may_call_the_vmm_back(
    ground: Ground, face: Face, method: str, act: str
) -> None:
    vmm, va = ground.vmm, ground.committed
    acts: dict[str, Callable[[], object]] = {
        "close": vmm.close,
        "free": lambda: call(vmm, Face.ENDPOINT, "free", va, 8 * PAGE),
        "query": lambda: vmm.query(va),
        "commit": lambda: vmm.commit(ground.reserved, PAGE),
        "handle_close": lambda: vmm.handle_close(ground.handle),
        "revoke": lambda: vmm.handle_revoke(ground.handle),
    }
    name = PARAMETERS[method][0]
    meddler = Meddler(good_arguments(ground, method)[name], acts[act])
    got = call_with(ground, face, method, **{name: meddler})
    if act == "close":
        assert got.rc is Retcode.INVALID_OPERATION
        assert vmm.closed
    elif (act == "free" and "va" in PARAMETERS[method] and method != "query") or (
        act == "handle_close" and method in HANDLE_METHODS
    ):
        assert got.rc is Retcode.RESOURCE_NOT_FOUND
    else:
        assert got.rc is Retcode.OK


class Litter:
    """Rubbish in a cycle, which calls the VMM when it is collected."""

    def __init__(self, vmm: VMM, va: int, view: memoryview | None) -> None:
        self.itself = self
        self.vmm, self.va, self.view = vmm, va, view

    def __del__(self) -> None:
        """Call the VMM from wherever the collector happens to run."""
        if not self.vmm.closed:
            self.vmm.query(self.va, smaps=False)
            call(self.vmm, Face.ENDPOINT, "commit", self.va, PAGE)


def test_the_collector_may_run_finalizers_inside_a_call(ground: Ground) -> None:
    vmm, va = ground.vmm, ground.committed
    old = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for turn in range(300):
            Litter(vmm, va, vmm.view(va, PAGE) if turn % 2 else None)
            for face in Face:
                call(vmm, face, "query", va)
                call(vmm, face, "free", ground.hole, PAGE)
                call(vmm, face, "decommit", ground.reserved, PAGE)
                call(vmm, face, "commit", "wrong", PAGE)
                got = call(vmm, face, "allocate", 0, PAGE, COMMIT | RW)
                assert call(vmm, face, "free", got.value, PAGE).rc is Retcode.OK
            vmm.read(va, 10)
    finally:
        gc.set_threshold(*old)
    gc.collect()
    assert vmm.read(va, 9) == b"committed"
    vmm.decommit(va, PAGE)


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

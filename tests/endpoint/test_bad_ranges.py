"""Addresses, sizes and ranges that cannot be, or in the wrong state, through both faces."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import COMMITTED, FIXED, GUARDS, RESERVE, RW
from faces import Face, call
from kernel_oracle import ARENA, PAGE, USER_SPACE_END
from model import LOWEST
from refusals import (
    PAGE_METHODS,
    PARAMETERS,
    RANGE_METHODS,
    TAKEN,
    UNREACHABLE,
    WINDOW_METHODS,
    Ground,
    call_with,
    faces,
    names_value,
    range_arguments,
)
from vmm_linux import VMM, PageKind, Retcode, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable


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
@pytest.mark.parametrize("flags", [COMMITTED, COMMITTED | FIXED], ids=["plain", "FIXED"])
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
        got = call(ground.vmm, face, "allocate", addr, size, COMMITTED | fixed)
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


# ---- ranges --------------------------------------------------------------------------------------

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


# ---- addresses -----------------------------------------------------------------------------------


@faces
@pytest.mark.parametrize("extra", [0, VmmFlags.SHAREABLE], ids=["private", "SHAREABLE"])
@pytest.mark.parametrize("where", TAKEN)
def test_fixed_on_something_already_exists(
    ground: Ground, face: Face, where: str, extra: int
) -> None:
    before, descriptors = ground.state(), kernel.descriptors()
    addr, size, guards = TAKEN[where](ground)
    got = call(ground.vmm, face, "allocate", addr, size, COMMITTED | FIXED | guards | extra)
    assert got.rc is Retcode.ALREADY_EXISTS
    assert got.error is None or names_value(got.error, addr), str(got.error)
    assert ground.state() == before
    assert kernel.descriptors() == descriptors


@faces
@pytest.mark.parametrize("where", UNREACHABLE)
def test_fixed_outside_what_a_process_may_have_is_an_invalid_argument(
    ground: Ground, face: Face, where: str
) -> None:
    addr, size, guards = UNREACHABLE[where]
    got = call(ground.vmm, face, "allocate", addr, size, COMMITTED | FIXED | guards)
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
    got = call(ground.vmm, face, "allocate", addr, 2 * PAGE, COMMITTED)
    assert got.rc is Retcode.OK
    assert LOWEST <= got.value <= USER_SPACE_END - 2 * PAGE
    if where != "too low":
        assert got.value != addr
    assert kernel.page_permissions(got.value, got.value + 2 * PAGE) == ["rw-p", "rw-p"]
    ground.vmm.free(got.value, 2 * PAGE)
    assert ground.state() == before


# ---- states --------------------------------------------------------------------------------------


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


# ---- Query ---------------------------------------------------------------------------------------


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

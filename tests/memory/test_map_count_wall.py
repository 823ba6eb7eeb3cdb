"""What happens where a process may have no more mappings (``vm.max_map_count``).

The functions that are not tests are what children do.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest

import kernel_oracle as kernel
from constants import COMMITTED, FIXED, GUARDS, LOCKED, READ, RESERVE, RESERVE_COMMIT, RW, SHAREABLE
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmFlags
from walls import (
    FILL,
    ORDINARY_HEAP,
    PAGES,
    SINGLES,
    Singles,
    State,
    count_mappings,
    fill_map_count,
    in_own_process,
    refusal,
    steady_heap,
)


def fill_and_fail() -> None:
    """Every method at the wall."""
    steady_heap()
    with VMM() as vmm:
        vmm.allocate(ARENA, 16 * PAGE, RESERVE_COMMIT | FIXED | RW)
        vmm.write(ARENA, bytes(range(256)) * (16 * PAGE // 256))
        reserved = vmm.allocate(ARENA + 20 * PAGE, 16 * PAGE, RESERVE | FIXED | RW)
        before_filling = kernel.mapping_count()
        assert fill_map_count(vmm) > (kernel.sysctl("vm.max_map_count") - before_filling) // 2 - 3
        Singles().leave(0)
        mappings = count_mappings()
        calls: list[tuple[str, tuple[int, ...]]] = [
            ("commit", (reserved + 5 * PAGE, PAGE)),
            ("protect", (ARENA + 5 * PAGE, PAGE, READ)),
            ("decommit", (ARENA + 5 * PAGE, PAGE)),
            ("free", (ARENA + 5 * PAGE, PAGE)),
            ("free", (reserved + 5 * PAGE, PAGE)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, RESERVE | FIXED)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, COMMITTED | FIXED | GUARDS)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, COMMITTED | FIXED | SHAREABLE)),
            ("allocate", (ARENA + 40 * PAGE, PAGE, COMMITTED | FIXED | LOCKED)),
        ]
        for method, arguments in calls:
            rc, message = refusal(vmm, method, *arguments)
            assert rc is Retcode.OUT_OF_MEMORY, message
            assert "vm.max_map_count" in message
        assert count_mappings() == mappings
        vmm.free(FILL, 40 * PAGE)
        for method, arguments in calls[:4]:
            getattr(vmm, method)(*arguments)
        State.of(vmm)


def test_a_call_that_fails_at_the_map_count_wall_changes_nothing_and_names_it() -> None:
    in_own_process(fill_and_fail)


def close_at_the_wall() -> None:
    """Regions whose neighbours belong to another VMM, closed with no room left."""
    steady_heap()
    with VMM() as other:
        vmm = VMM()
        for slot in range(0, 16, 2):
            vmm.allocate(ARENA + slot * PAGE, PAGE, RESERVE | FIXED)
            other.allocate(ARENA + (slot + 1) * PAGE, PAGE, RESERVE | FIXED)
        fill_map_count(vmm)
        Singles().leave(0)
        vmm.close()
        assert kernel.page_permissions(ARENA, ARENA + 16 * PAGE) == [None, "---p"] * 8
        assert kernel.maps_between(FILL, SINGLES) == []


def test_a_vmm_can_be_closed_at_the_map_count_wall() -> None:
    in_own_process(close_at_the_wall)


def many_runs_meet_the_wall() -> None:
    """A commit of forty runs of which some fit: told after all of them were undone."""
    steady_heap()
    with VMM() as vmm:
        vmm.allocate(ARENA, 40 * PAGE, RESERVE | FIXED | RW)
        for slot in range(0, 40, 2):
            vmm.protect(ARENA + slot * PAGE, PAGE, READ)
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        Singles().leave(12)
        rc, message = refusal(vmm, "commit", ARENA, 40 * PAGE)
        assert rc is Retcode.OUT_OF_MEMORY
        assert "vm.max_map_count" in message, message


def test_the_wall_is_named_for_a_call_that_came_half_way_too() -> None:
    in_own_process(many_runs_meet_the_wall)


def huge_pages_at_the_wall() -> None:
    """MADV_HUGEPAGE gives EAGAIN where other calls give ENOMEM."""
    steady_heap()
    with VMM() as vmm:
        vmm.allocate(ARENA, 16 * PAGE, RESERVE | FIXED | VmmFlags.HUGE)
        vmm.protect(ARENA + PAGE, PAGE, READ)
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        singles = Singles()
        for room in range(6):
            singles.leave(room)
            for pages in (1, 2):
                got = call(vmm, Face.METHODS, "commit", ARENA + 5 * PAGE, pages * PAGE)
                assert got.rc in {Retcode.OK, Retcode.OUT_OF_MEMORY}, got.error
                if got.rc is Retcode.OK:
                    vmm.decommit(ARENA + 5 * PAGE, pages * PAGE)


def test_huge_pages_at_the_wall_are_no_question_of_a_quota() -> None:
    in_own_process(huge_pages_at_the_wall)


def first_huge_region_at_the_wall() -> None:
    """Whether the kernel has huge pages is asked when somebody first wants to know."""
    steady_heap()
    with VMM() as vmm:
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        singles = Singles()
        for room in range(6):
            singles.leave(room)
            got = call(vmm, Face.METHODS, "allocate", 0, PAGE, COMMITTED | VmmFlags.HUGE)
            assert got.rc in {Retcode.OK, Retcode.OUT_OF_MEMORY}, got.error


def test_a_shortage_is_not_taken_for_a_kernel_without_huge_pages() -> None:
    in_own_process(first_huge_region_at_the_wall)


def no_memory_to_explain_with() -> None:
    """At the wall the heap cannot grow either, and the list of mappings is megabytes long."""
    with VMM() as vmm:
        vmm.allocate(ARENA, 16 * PAGE, RESERVE | FIXED | RW)
        fill_map_count(vmm)
        Singles().leave(0)
        for face in Face:
            assert call(vmm, face, "commit", ARENA + PAGE, PAGE).rc is Retcode.OUT_OF_MEMORY
            assert call(vmm, face, "free", ARENA + PAGE, PAGE).rc is Retcode.OUT_OF_MEMORY


def test_a_failure_is_told_even_when_the_heap_cannot_grow() -> None:
    in_own_process(no_memory_to_explain_with, heap=ORDINARY_HEAP)


def draw(choose: random.Random, state: State) -> tuple[str, tuple[object, ...]]:
    """A call on some pages of some region, or a new region."""
    regions = sorted({row[4:6] for row in state.ledger if row[1] is PageKind.PRIVATE}, key=str)
    methods = ["allocate", "commit", "decommit", "protect", "free", "write"]
    method = choose.choice(methods) if regions else "allocate"
    protection = choose.choice([0, 1, 3, 5, 7])
    if method == "allocate":
        first = choose.randrange(PAGES - 1)
        pages = choose.randrange(1, min(12, PAGES - first) + 1)
        flags = RESERVE | FIXED | VmmFlags(protection)
        for extra in (VmmFlags.COMMIT, LOCKED, *GUARDS, SHAREABLE):
            flags |= extra if choose.random() < 0.25 else 0
        return method, (ARENA + first * PAGE, pages * PAGE, int(flags))
    base, size = choose.choice(regions)
    assert isinstance(base, int)
    assert isinstance(size, int)
    first = choose.randrange(size // PAGE)
    pages = choose.randrange(1, size // PAGE - first + 1)
    va = base + first * PAGE
    if method == "write":
        return method, (va, bytes([choose.randrange(256)]) * pages * PAGE)
    return method, (va, pages * PAGE, protection)[: 3 if method == "protect" else 2]


def random_calls_at_the_wall(seed: int, calls: int) -> None:
    """Calls that have room for none to a few mappings more."""
    steady_heap()
    choose = random.Random(seed)  # noqa: S311
    singles = Singles()
    seen: Counter[tuple[str, Retcode]] = Counter()
    with VMM() as vmm:
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        state = State.of(vmm)
        for _ in range(calls):
            singles.leave(choose.choice([0, 0, 0, 1, 1, 2, 3, 40]))
            method, arguments = draw(choose, state)
            got = call(vmm, Face.METHODS, method, *arguments)
            seen[method, got.rc] += 1
            before, state = state, State.of(vmm)
            assert got.rc is Retcode.OK or state == before, (method, arguments, got.error)
            for mode, row in zip(state.permissions, state.ledger, strict=True):
                if row[0] is PageState.COMMITTED:
                    assert mode is not None
                    bits = sum(bit for bit, sign in ((1, "r"), (2, "w"), (4, "x")) if sign in mode)
                    assert bits == row[2]
                else:
                    assert mode in {None, "---p", "---s"}
    refused = {method for method, rc in seen if rc is Retcode.OUT_OF_MEMORY}
    assert len(refused) >= 4, "the wall was not met often enough to prove anything"
    assert not {Retcode.QUOTA_EXCEEDED, Retcode.FAIL} & {rc for _, rc in seen}, seen


@pytest.mark.parametrize("seed", [1, 4])
def test_random_calls_at_the_wall_succeed_or_change_nothing(seed: int) -> None:
    in_own_process(random_calls_at_the_wall, seed, 300)

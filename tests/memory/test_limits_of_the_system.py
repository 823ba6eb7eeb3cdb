"""What happens where resource limits and memory end.

The functions that are not tests are what children do.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from constants import COMMITTED, FIXED, GUARDS, LOCKED, READ, RESERVE, RESERVE_COMMIT, RW, SHAREABLE
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, Limits, PageKind, Retcode, VmmFlags
from walls import (
    FILL,
    MEBI,
    ORDINARY_HEAP,
    State,
    fill_map_count,
    in_own_process,
    limit,
    meminfo,
    refusal,
    steady_heap,
)

if TYPE_CHECKING:
    from collections.abc import Callable


# ---- resource limits -----------------------------------------------------------------------------


def small_arena(vmm: VMM) -> None:
    """A region with committed, written pages, so that State has something to compare."""
    vmm.allocate(ARENA, 16 * PAGE, RESERVE_COMMIT | FIXED | RW)
    vmm.write(ARENA, b"contents" * (16 * PAGE // 8))


def short_of_address_space() -> None:
    """RLIMIT_AS refuses reservations."""
    with VMM() as vmm:
        small_arena(vmm)
        limit(resource.RLIMIT_AS, kernel.status("VmSize") + 64 * MEBI)
        for flags in (
            RESERVE,
            COMMITTED,
            COMMITTED | SHAREABLE,
            RESERVE | GUARDS,
        ):
            rc, message = refusal(vmm, "allocate", 0, 128 * MEBI, flags)
            assert (rc, "RLIMIT_AS" in message) == (Retcode.QUOTA_EXCEEDED, True), message
        va = vmm.allocate(0, 16 * MEBI, COMMITTED)
        vmm.free(va, 16 * MEBI)


def guards_are_too_much() -> None:
    """A region that would fit, were it not for its guards."""
    steady_heap()
    with VMM() as vmm:
        small_arena(vmm)
        limit(resource.RLIMIT_AS, kernel.status("VmSize") + 64 * MEBI)
        vmm.query(ARENA)
        room = resource.getrlimit(resource.RLIMIT_AS)[0] - kernel.status("VmSize")
        got = call(vmm, Face.METHODS, "allocate", 0, room // PAGE * PAGE, RESERVE | GUARDS)
        assert got.rc is Retcode.QUOTA_EXCEEDED, got.error
        assert "RLIMIT_AS" in str(got.error)


def short_of_data() -> None:
    """RLIMIT_DATA refuses whatever makes private pages writable, and nothing else."""
    with VMM() as vmm:
        small_arena(vmm)
        big = ARENA + 32 * PAGE
        vmm.allocate(big, 128 * MEBI, RESERVE | FIXED | RW)
        readable = vmm.allocate(0, 128 * MEBI, RESERVE_COMMIT | READ)
        limit(resource.RLIMIT_DATA, kernel.status("VmData") + 64 * MEBI)
        calls: list[tuple[str, tuple[int, ...]]] = [
            ("commit", (big, 128 * MEBI)),
            ("protect", (readable, 128 * MEBI, RW)),
            ("allocate", (0, 128 * MEBI, COMMITTED)),
        ]
        for method, arguments in calls:
            rc, message = refusal(vmm, method, *arguments)
            assert (rc, "RLIMIT_DATA" in message) == (Retcode.QUOTA_EXCEEDED, True), message
        vmm.commit(big, 16 * MEBI)
        for flags in (RESERVE | RW, RESERVE_COMMIT | READ, COMMITTED | SHAREABLE):
            vmm.allocate(0, 128 * MEBI, flags)


def not_the_limits_fault() -> None:
    """Refusals that no limit had a say in, with limits set that the same size would pass."""
    huge = 1 << 40
    with VMM(limits=Limits.unlimited()) as vmm:
        va = vmm.allocate(0, huge, RESERVE | RW)
        limit(resource.RLIMIT_AS, kernel.status("VmSize") + huge // 2)
        rc, message = refusal(vmm, "commit", va, huge)
        assert (rc, "RLIMIT" in message) == (Retcode.OUT_OF_MEMORY, False), message
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        limit(resource.RLIMIT_DATA, kernel.status("VmData") + 64 * MEBI)
        flags = COMMITTED | SHAREABLE | LOCKED
        rc, message = refusal(vmm, "allocate", 0, huge, flags)
        assert (rc, "RLIMIT" in message) == (Retcode.OUT_OF_MEMORY, False), message


def limits_with_many_mappings() -> None:
    """The list of mappings is megabytes long, and the limit allows not one of them."""
    with VMM() as vmm:
        fill_map_count(vmm)
        vmm.free(FILL, 100 * PAGE)
        limit(resource.RLIMIT_AS, PAGE)
        for face in Face:
            got = call(vmm, face, "allocate", 0, 128 * MEBI, RESERVE)
            assert got.rc is Retcode.QUOTA_EXCEEDED, got.error
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize(
    "work",
    [short_of_address_space, guards_are_too_much, short_of_data, not_the_limits_fault],
    ids=lambda work: work.__name__,
)
def test_a_limit_that_refuses_is_named_and_nothing_has_changed(
    work: Callable[[], None], nobody: bool
) -> None:
    in_own_process(work, nobody=nobody)


def test_a_limit_is_named_even_when_the_heap_cannot_grow() -> None:
    in_own_process(limits_with_many_mappings, heap=ORDINARY_HEAP)


def short_of_descriptors() -> None:
    """SHAREABLE takes one descriptor a region."""
    with VMM() as vmm:
        small_arena(vmm)
        vmm.query(ARENA)  # the descriptors that Query keeps are open from here on
        place = ARENA + 20 * PAGE
        before = kernel.descriptors()
        flags = COMMITTED | FIXED | SHAREABLE
        limit(resource.RLIMIT_NOFILE, 0)
        outcomes = [
            call(vmm, face, "allocate", place, PAGE, flags | extra)
            for face in Face
            for extra in (0, GUARDS, LOCKED)
        ]
        limit(resource.RLIMIT_NOFILE, 1000)
        assert {outcome.rc for outcome in outcomes} == {Retcode.QUOTA_EXCEEDED}
        assert "RLIMIT_NOFILE" in str(outcomes[0].error)
        assert kernel.hole_at(place)[0] == ARENA + 16 * PAGE
        assert kernel.descriptors() == before
        assert State.of(vmm).ledger[20][1] is PageKind.FREE
        vmm.allocate(place, PAGE, flags)


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_no_descriptor_left_for_a_shareable_region_is_a_quota(nobody: bool) -> None:
    in_own_process(short_of_descriptors, nobody=nobody)


def lock_within(pages_allowed: int, backing: int) -> None:
    """LOCKED regions under one limit."""
    # Root locks what it likes.
    pages = 64 if os.geteuid() == 0 else min(64, pages_allowed)
    limit(resource.RLIMIT_MEMLOCK, pages_allowed * PAGE)
    for protection in (RW, READ, READ | VmmFlags.EXECUTE):
        with VMM() as vmm:
            va = vmm.allocate(
                0, 64 * PAGE, RESERVE_COMMIT | LOCKED | protection | VmmFlags(backing)
            )
            for smaps in (False, True):
                infos = [vmm.query(va + page * PAGE, smaps) for page in range(64)]
                assert [info.locked for info in infos] == [True] * pages + [False] * (64 - pages)
                assert all(info.resident for info in infos)
            told = [kernel.is_locked(va + page * PAGE) for page in range(64)]
            assert told == [True] * pages + [False] * (64 - pages)
            assert kernel.present_pages(va, 64) == [True] * 64
            assert kernel.status("VmLck") == pages * PAGE
            vmm.decommit(va, 64 * PAGE)
            assert kernel.status("VmLck") == 0
            vmm.commit(va, 64 * PAGE)
            assert kernel.status("VmLck") == pages * PAGE
        assert kernel.status("VmLck") == 0


def lock_under_several_limits(backing: int) -> None:
    """Regions of 64 pages under limits of none to more than that."""
    for pages_allowed in (100, 64, 21, 1, 0):
        lock_within(pages_allowed, backing)


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize("backing", [0, int(SHAREABLE)], ids=["private", "SHAREABLE"])
def test_locked_regions_are_resident_and_locked_as_far_as_the_limit_allows(
    backing: int, nobody: bool
) -> None:
    in_own_process(lock_under_several_limits, backing, nobody=nobody)


# ---- memory and charge ---------------------------------------------------------------------------


def more_than_the_machine_has() -> None:
    """What can never be had is refused in the call that asks for it."""
    steady_heap()
    too_much = (meminfo("MemTotal") + meminfo("SwapTotal")) * 2 // PAGE * PAGE
    with VMM(limits=Limits.unlimited()) as vmm:
        small_arena(vmm)
        big = vmm.allocate(ARENA + 20 * PAGE, too_much, RESERVE | FIXED | RW)
        locked = vmm.allocate(0, too_much, RESERVE | RW | LOCKED)
        readable = vmm.allocate(0, too_much, RESERVE_COMMIT | READ)
        charge = kernel.charged_bytes()
        calls: list[tuple[str, tuple[int, ...]]] = [
            ("commit", (big, too_much)),
            ("commit", (locked, too_much)),
            ("protect", (readable, too_much, RW)),
            ("allocate", (0, too_much, COMMITTED)),
            ("allocate", (0, too_much, COMMITTED | LOCKED)),
            ("allocate", (0, too_much, RESERVE_COMMIT | READ | LOCKED)),
            ("allocate", (0, too_much, COMMITTED | LOCKED | SHAREABLE)),
        ]
        size = kernel.status("VmSize")
        for method, arguments in calls:
            rc, message = refusal(vmm, method, *arguments)
            assert (rc, "RLIMIT" in message) == (Retcode.OUT_OF_MEMORY, False), message
            assert "overcommit" in message
        assert kernel.charged_bytes() == charge
        assert kernel.status("VmSize") == size
        # A page of each still works.
        for va in (big, locked):
            vmm.commit(va, PAGE)
            vmm.write(va, b"x")


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
def test_more_than_the_machine_has_is_refused_at_once(nobody: bool) -> None:
    in_own_process(more_than_the_machine_has, nobody=nobody)


def more_shared_memory_than_is_available() -> None:
    """Nothing charges for a memory file: the call must ask whether there is room."""
    available = meminfo("MemAvailable") + meminfo("SwapFree")
    with VMM(limits=Limits.unlimited()) as vmm:
        small_arena(vmm)
        size = (available + available // 8) // PAGE * PAGE
        rss = kernel.status("RssShmem")
        rc, message = refusal(vmm, "allocate", 0, size, COMMITTED | LOCKED | SHAREABLE)
        assert rc is Retcode.OUT_OF_MEMORY, message
        assert kernel.status("RssShmem") == rss


def test_locked_shared_memory_beyond_what_is_available_is_refused_at_once() -> None:
    in_own_process(more_shared_memory_than_is_available)


def take_memory_past_the_limit_for_files() -> None:
    """Take shared memory in every way, in a program that SIGXFSZ ends; runs in a child."""
    import os
    import resource
    import signal

    from vmm_linux import VMM, VmmFlags

    page = os.sysconf("SC_PAGE_SIZE")
    read_write = VmmFlags.READ | VmmFlags.WRITE
    committed = read_write | VmmFlags.RESERVE | VmmFlags.COMMIT
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    with VMM() as vmm:
        private = vmm.allocate(0, 8 * page, committed)
        vmm.write(private, b"kept" * page)
        resource.setrlimit(resource.RLIMIT_FSIZE, (page, page))
        for rc in (
            vmm.endpoint.MdlCreate(8 * page, read_write)[1],
            vmm.endpoint.MdlCreateFromVm(private, 8 * page, read_write)[1],
            vmm.endpoint.Allocate(0, 8 * page, committed | VmmFlags.SHAREABLE)[1],
        ):
            print(rc.name)
        assert vmm.read(private, 4) == b"kept"
        vmm.mdl_create(page, read_write)
        vmm._check()
    assert signal.sigpending() == set()


def test_memory_past_the_limit_for_files_is_refused_whatever_sigxfsz_does() -> None:
    child = run_child(take_memory_past_the_limit_for_files)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.split() == ["FAIL"] * 3

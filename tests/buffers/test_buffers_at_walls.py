"""Calls on buffers where the system ends: what ended is named, nothing has changed.

The functions that are not tests are what children do.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

from buffer_scenarios import READ_ONLY, buffer, connected, facts, first, refused, send, window
from constants import COMMIT, COMMITTED, FIXED, GUARDS, LOCKED, RESERVE, RW, SHAREABLE
from faces import Face, call
from faults import MIXED, NONE, PAGES, SIZE, Ground, R, pattern
from kernel_oracle import ARENA, PAGE, maps, present_pages, status
from vmm_linux import Limits, Retcode, VmmFlags
from vmm_linux._core import kernel
from vmm_linux._core.kernel import Feature
from walls import (
    FILL,
    Singles,
    State,
    count_mappings,
    fill_map_count,
    in_own_process,
    limit,
    meminfo,
    steady_heap,
)

if TYPE_CHECKING:
    from collections.abc import Callable


#: Where, inside the arena of the limits' tests, buffers are mapped.
PLACE = ARENA + 20 * PAGE


def fail_at_the_wall() -> None:
    """Every method that needs a mapping, with no mapping left."""
    steady_heap()
    with Ground() as ground:
        buffer()(ground)
        (handle,) = ground.handles
        ground.mdl_map(handle, 0, 8 * PAGE, ARENA, RW | FIXED)
        ground.allocate(ARENA + 10 * PAGE, 8 * PAGE, COMMITTED | FIXED)
        ground.write(ARENA + 10 * PAGE, pattern(8 * PAGE))
        fill_map_count(ground)
        Singles().leave(0)
        mappings = count_mappings()
        calls: list[tuple[object, ...]] = [
            ("mdl_map", handle, 0, PAGE, PLACE, RW | FIXED),
            ("mdl_map", handle, 0, PAGE, PLACE, R | FIXED),
            ("mdl_map", handle, 0, PAGE, PLACE, R | FIXED | GUARDS | LOCKED),
            ("mdl_create_from_vm", ARENA + 10 * PAGE, 8 * PAGE, RW),
            ("mdl_create_from_vm", ARENA + 12 * PAGE, PAGE, R),
            ("free", ARENA + 3 * PAGE, PAGE),
            ("protect", ARENA + 3 * PAGE, PAGE, R),
        ]
        for method, *arguments in calls:
            rc, message = refused(ground, str(method), *arguments)
            assert rc is Retcode.OUT_OF_MEMORY, message
            assert "vm.max_map_count" in message, message
        assert count_mappings() == mappings
        ground.free(FILL, 40 * PAGE)
        for method, *arguments in (calls[2], calls[4], calls[5]):
            getattr(ground, str(method))(*arguments)
        assert ground.read(PLACE, PAGE) == pattern(PAGE)
        assert ground.read(ARENA + 10 * PAGE, 8 * PAGE) == pattern(8 * PAGE)


def test_a_call_that_fails_at_the_map_count_wall_names_it_and_leaves_buffers_alone() -> None:
    in_own_process(fail_at_the_wall)


def convert_near_the_wall(flags: int, first_page: int, pages: int) -> None:
    """A region of many protections is made a buffer as soon as there is room for the way there.

    A whole SHAREABLE region needs none.
    """
    steady_heap()
    with Ground() as ground:
        ground.allocate(ARENA, SIZE, COMMITTED | FIXED | VmmFlags(flags))
        ground.write(ARENA, pattern(SIZE))
        for index, protection in enumerate(MIXED):
            ground.protect(ARENA + (2 * index + 1) * PAGE, 2 * PAGE, protection)
        fill_map_count(ground)
        ground.free(FILL, 100 * PAGE)
        singles = Singles()
        permissions = State.of(ground).permissions
        for room in range(20):
            singles.leave(room)
            arguments = (ARENA + first_page * PAGE, pages * PAGE, int(R))
            before = State.of(ground), facts(ground)
            got = call(ground, Face.METHODS, "mdl_create_from_vm", *arguments)
            if got.rc is Retcode.OK:
                break
            assert "vm.max_map_count" in str(got.error)
            assert State.of(ground) == before[0]
            assert facts(ground) == before[1]
        whole = flags & SHAREABLE and pages == PAGES
        assert room == 0 if whole else 0 < room < 12
        now = State.of(ground).permissions
        assert [p and p[:3] for p in now] == [p and p[:3] for p in permissions]
        ground.free(FILL + 100 * PAGE, 100 * PAGE)
        ground.protect(ARENA, SIZE, R)
        assert ground.read(ARENA, SIZE) == pattern(SIZE)


@pytest.mark.parametrize("flags", [NONE, LOCKED, SHAREABLE, GUARDS], ids=repr)
@pytest.mark.parametrize(("first_page", "pages"), [(0, PAGES), (2, 8), (3, 2)])
def test_pages_become_a_buffer_near_the_map_count_wall_or_stay_as_they_were(
    flags: VmmFlags, first_page: int, pages: int
) -> None:
    in_own_process(convert_near_the_wall, int(flags), first_page, pages)


def short_of_descriptors() -> None:
    """With no descriptor left, what needs one is a quota."""
    with Ground() as ground:
        first(buffer(), window, connected, send())(ground)
        original, clone = ground.handles
        _, inbox = ground.sockets
        State.of(ground)  # the descriptors that Query keeps are open from here on
        before = State.of(ground), facts(ground)
        calls: list[tuple[object, ...]] = [
            ("mdl_create", SIZE, RW),
            ("mdl_create_from_buf", b"x", R),
            ("mdl_clone", original, 0, PAGE),
            ("mdl_map", original, 0, PAGE, 0, R),
            ("mdl_map", clone, 0, PAGE, 0, R | GUARDS | LOCKED),
            ("send_handle", ground.sockets[0], original),
            ("send_handle", ground.sockets[0], clone, READ_ONLY),
        ]
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        limit(resource.RLIMIT_NOFILE, 1)
        outcomes = [
            call(ground, face, str(method), *arguments)
            for face in Face
            for method, *arguments in calls
        ]
        limit(resource.RLIMIT_NOFILE, most)
        assert (State.of(ground), facts(ground)) == before
        # Whoever receives a message with no room for its descriptors has lost them.
        limit(resource.RLIMIT_NOFILE, 1)
        outcomes.append(call(ground, Face.METHODS, "recv_handle", inbox))
        limit(resource.RLIMIT_NOFILE, most)
        assert [outcome.rc for outcome in outcomes] == [Retcode.QUOTA_EXCEEDED] * len(outcomes)
        assert all("RLIMIT_NOFILE" in str(outcome.error) for outcome in outcomes if outcome.error)
        assert State.of(ground) == before[0]
        for method, *arguments in calls:
            getattr(ground, str(method))(*arguments)
        ground.recv_handle(inbox)


def short_of_address_space() -> None:
    """RLIMIT_AS refuses mappings, and the mapping aside that pages become a buffer through."""
    size = 128 << 20
    with Ground() as ground:
        ground.handles.append(ground.mdl_create(size, RW))
        ground.allocate(PLACE, size, COMMITTED | FIXED)
        ground.write(PLACE, pattern(SIZE))
        limit(resource.RLIMIT_AS, status("VmSize") + (64 << 20))
        calls: list[tuple[object, ...]] = [
            ("mdl_map", ground.handles[0], 0, size, 0, RW),
            ("mdl_map", ground.handles[0], 0, size, 0, R | GUARDS),
            ("mdl_map", ground.handles[0], 0, size, 0, R | LOCKED),
            ("mdl_create_from_vm", PLACE, size, RW),
        ]
        for method, *arguments in calls:
            rc, message = refused(ground, str(method), *arguments)
            assert (rc, "RLIMIT_AS" in message) == (Retcode.QUOTA_EXCEEDED, True), message
        limit(resource.RLIMIT_AS, resource.RLIM_INFINITY)
        ground.mdl_create_from_vm(PLACE, size, RW)
        assert ground.read(PLACE, SIZE) == pattern(SIZE)


def bytes_but_the_heap() -> int:
    """Bytes of all mappings but the heap, which grows by itself."""
    return sum(each.end - each.start for each in maps() if each.pathname != "[heap]")


def more_than_the_machine_has() -> None:
    """Memory that can never be had is refused in the call that asks for it."""
    too_much = (meminfo("MemTotal") + meminfo("SwapTotal")) * 2 // PAGE * PAGE
    with Ground() as ground:
        ground.limits = Limits.unlimited()
        ground.handles.append(ground.mdl_create(too_much, RW))
        ground.allocate(PLACE, too_much, RESERVE | COMMIT | R | FIXED)
        shared = ground.allocate(0, too_much, COMMITTED | SHAREABLE)
        before = bytes_but_the_heap(), status("RssShmem")
        calls: list[tuple[object, ...]] = [
            ("mdl_create", too_much, RW | LOCKED),
            ("mdl_map", ground.handles[0], 0, too_much, 0, RW | LOCKED),
            ("mdl_map", ground.handles[0], 0, too_much, 0, R | LOCKED | GUARDS),
        ]
        for method, *arguments in calls:
            rc, message = refused(ground, str(method), *arguments)
            assert (rc, "overcommit" in message) == (Retcode.OUT_OF_MEMORY, True), message
        # Where the kernel does not tell which pages were touched, all are copied.
        with kernel.without(Feature.PAGEMAP):
            rc, message = refused(ground, "mdl_create_from_vm", PLACE, too_much, R)
        assert (rc, "overcommit" in message) == (Retcode.OUT_OF_MEMORY, True), message
        assert (bytes_but_the_heap(), status("RssShmem")) == before
        # Pages that were never touched take no room.
        ground.mdl_create_from_vm(PLACE, too_much, R)
        ground.mdl_create_from_vm(shared, too_much - PAGE, R)
        assert status("RssShmem") == before[1]


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize(
    "work",
    [short_of_descriptors, short_of_address_space, more_than_the_machine_has],
    ids=lambda work: work.__name__,
)
def test_a_limit_that_refuses_is_named_and_leaves_buffers_alone(
    work: Callable[[], None], nobody: bool
) -> None:
    in_own_process(work, nobody=nobody)


def locked_beyond_the_limit(backing: int) -> None:
    """Pages of a LOCKED region that become a buffer stay resident, locked or not."""
    limit(resource.RLIMIT_MEMLOCK, 0)
    for protection in (RW, R, NONE):
        with Ground() as ground:
            va = ground.allocate(
                0, SIZE, RESERVE | COMMIT | LOCKED | protection | VmmFlags(backing)
            )
            ground.mdl_create_from_vm(va, 4 * PAGE, RW)
            ground.mdl_create_from_vm(va + 4 * PAGE, 4 * PAGE, RW)
            assert present_pages(va, PAGES) == [True] * PAGES


@pytest.mark.parametrize("nobody", [False, True], ids=["root", "nobody"])
@pytest.mark.parametrize("backing", [NONE, SHAREABLE], ids=["private", "SHAREABLE"])
def test_locked_pages_stay_resident_when_they_become_a_buffer(
    backing: VmmFlags, nobody: bool
) -> None:
    in_own_process(locked_beyond_the_limit, int(backing), nobody=nobody)

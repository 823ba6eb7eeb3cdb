"""Every bound of ``Limits`` is reached exactly and never passed."""

from __future__ import annotations

import os
import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

import pytest

import leaks
from bounds import refusal, used
from constants import COMMITTED, GUARDS, LOCKED, RESERVED, RW, SHAREABLE
from kernel_oracle import PAGE, descriptors, maps
from vmm_linux import VMM, Handle, Limits, Rights, VmmError, VmmFlags
from vmm_linux.errors import QuotaExceeded
from vmm_linux.limits import FIGURES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited


#: Of the regions and buffers here.
SIZE = 8 * PAGE


# ---- every bound, exactly ------------------------------------------------------------------------


class Ground:
    """A VMM with what the calls need: a region, a buffer, a mapping."""

    def __init__(self) -> None:
        self.vmm = VMM(limits=Limits.unlimited())
        self.region = self.vmm.allocate(0, 64 * PAGE, RESERVED)
        self.locked = self.vmm.allocate(0, 64 * PAGE, RESERVED | LOCKED)
        self.handle = self.vmm.mdl_create(SIZE, VmmFlags.RWX_MASK)
        self.next = 0

    def following(self) -> int:
        """A page of the two regions that was not taken before."""
        self.next += 1
        return self.next * PAGE


class Taking(NamedTuple):
    """How one unit of a figure is taken, and given back."""

    figure: str
    method: str
    unit: int
    take: Callable[[Ground], object]
    give: Callable[[Ground, object], object]
    note: str = ""

    def __str__(self) -> str:
        return "-".join(filter(None, [self.figure, self.method, self.note or str(self.unit)]))


def free(size: int = SIZE) -> Callable[[Ground, object], object]:
    """Free a region."""
    return lambda ground, va: ground.vmm.free(va, size)  # type: ignore[arg-type]


def close(ground: Ground, handle: object) -> None:
    """Close a handle."""
    ground.vmm.handle_close(handle)  # type: ignore[arg-type]


def commit(ground: Ground) -> int:
    """Commit a page that has no committed neighbour."""
    va = ground.region + ground.following()
    ground.vmm.commit(va, PAGE)
    return va


def commit_apart(ground: Ground) -> int:
    """Commit a page between reserved ones: two runs more."""
    ground.next += 1
    return commit(ground)


def commit_locked(ground: Ground) -> int:
    """Commit a page of a LOCKED region."""
    va = ground.locked + ground.following()
    ground.vmm.commit(va, PAGE)
    return va


def commit_some(ground: Ground) -> int:
    """Commit a page by a call for many ranges."""
    va = ground.region + ground.following()
    ground.vmm.commit_ranges([(va, PAGE)])
    return va


def decommit(ground: Ground, va: object) -> None:
    """Decommit it."""
    ground.vmm.decommit(va, PAGE)  # type: ignore[arg-type]


def convert(ground: Ground) -> Handle:
    """A buffer of pages that were private; they keep their place, and it."""
    va = ground.vmm.allocate(0, SIZE, COMMITTED)
    try:
        return ground.vmm.mdl_create_from_vm(va, SIZE, RW)
    except VmmError:
        ground.vmm.free(va, SIZE)
        raise


def give_converted(ground: Ground, handle: object) -> None:
    """Close it, and free the pages."""
    close(ground, handle)
    for mapping in maps():
        info = ground.vmm.query(mapping.start, smaps=False)
        if "/memfd:" in mapping.pathname and info.base not in (ground.region, ground.locked):
            with suppress(VmmError):
                ground.vmm.free(mapping.start, SIZE)
            return


def receive(ground: Ground) -> Handle:
    """A handle that comes back as another one."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ground.vmm.send_handle(ours, ground.handle)
        return ground.vmm.recv_handle(theirs)


def adopt(ground: Ground) -> Handle:
    """A handle of a descriptor."""
    fd = ground.vmm.handle_fileno(ground.handle)
    try:
        return ground.vmm.handle_from_fd(fd)
    finally:
        os.close(fd)


def clone(ground: Ground) -> Handle:
    """A window."""
    return ground.vmm.mdl_clone(ground.handle, PAGE, PAGE)


def map_it(flags: VmmFlags = RW) -> Callable[[Ground], int]:
    """A mapping of the whole buffer."""
    return lambda ground: ground.vmm.mdl_map(ground.handle, 0, SIZE, 0, flags)


def allocate(flags: VmmFlags = RESERVED) -> Callable[[Ground], int]:
    """A region."""
    return lambda ground: ground.vmm.allocate(0, SIZE, flags)


def create(flags: VmmFlags = RW) -> Callable[[Ground], Handle]:
    """A buffer."""
    return lambda ground: ground.vmm.mdl_create(SIZE, flags)


def create_of_bytes(ground: Ground) -> Handle:
    """A buffer of bytes, a part of a page less than it has."""
    return ground.vmm.mdl_create_from_buf(bytes(SIZE - 9), RW)


def copy_of(ground: Ground) -> Handle:
    """Another handle."""
    return ground.vmm.handle_copy(ground.handle, Rights.MAP_READ)


TAKINGS = [
    Taking("regions", "allocate", 1, allocate(), free()),
    Taking("regions", "mdl_map", 1, map_it(), free()),
    Taking("reserved", "allocate", SIZE, allocate(), free()),
    Taking("reserved", "allocate", SIZE + 2 * PAGE, allocate(RESERVED | GUARDS), free()),
    Taking("reserved", "mdl_map", SIZE + PAGE, map_it(RW | VmmFlags.LOW_GUARD), free()),
    Taking("committed", "allocate", SIZE, allocate(COMMITTED), free()),
    Taking("committed", "allocate", SIZE, allocate(COMMITTED | SHAREABLE), free(), "shared"),
    Taking("committed", "commit", PAGE, commit, decommit),
    Taking("committed", "commit_ranges", PAGE, commit_some, decommit),
    Taking("locked", "allocate", SIZE, allocate(COMMITTED | LOCKED), free()),
    Taking("locked", "commit", PAGE, commit_locked, decommit),
    Taking("locked", "mdl_create", SIZE, create(RW | LOCKED), close),
    Taking("locked", "mdl_map", SIZE, map_it(RW | LOCKED), free()),
    Taking("mappings", "allocate", 1, allocate(), free()),
    Taking("mappings", "allocate", 3, allocate(RESERVED | GUARDS), free()),
    Taking("mappings", "mdl_map", 1, map_it(), free()),
    Taking("mappings", "commit", 2, commit_apart, decommit),
    Taking("mdls", "mdl_create", 1, create(), close),
    Taking("mdls", "mdl_create_from_buf", 1, create_of_bytes, close),
    Taking("mdls", "mdl_create_from_vm", 1, convert, give_converted),
    Taking("mdls", "mdl_clone", 1, clone, close),
    Taking("mdls", "recv_handle", 1, receive, close),
    Taking("mdls", "handle_from_fd", 1, adopt, close),
    Taking("mdl_bytes", "mdl_create", SIZE, create(), close),
    Taking("mdl_bytes", "mdl_create_from_buf", SIZE, create_of_bytes, close),
    Taking("mdl_bytes", "mdl_create_from_vm", SIZE, convert, give_converted),
    Taking("mdl_bytes", "recv_handle", SIZE, receive, close),
    Taking("mdl_bytes", "handle_from_fd", SIZE, adopt, close),
    Taking("mdl_mappings", "mdl_map", 1, map_it(), free()),
    Taking("handles", "mdl_create", 1, create(), close),
    Taking("handles", "mdl_create_from_buf", 1, create_of_bytes, close),
    Taking("handles", "mdl_create_from_vm", 1, convert, give_converted),
    Taking("handles", "mdl_clone", 1, clone, close),
    Taking("handles", "handle_copy", 1, copy_of, close),
    Taking("handles", "recv_handle", 1, receive, close),
    Taking("handles", "handle_from_fd", 1, adopt, close),
]


@pytest.fixture
def ground() -> Iterator[Ground]:
    """A VMM with a region and a buffer."""
    it = Ground()
    with it.vmm:
        yield it


@pytest.mark.parametrize("taking", TAKINGS, ids=str)
def test_a_bound_is_reached_exactly_and_never_passed(ground: Ground, taking: Taking) -> None:
    vmm, count = ground.vmm, 3
    start = used(vmm)[taking.figure]
    bound = start + count * taking.unit
    vmm.limits = Limits(**{taking.figure: bound})
    taken = [taking.take(ground) for _ in range(count)]
    assert used(vmm)[taking.figure] == bound
    before = used(vmm), leaks.read_mappings(), descriptors()
    met = refusal(lambda: taking.take(ground))
    assert met.method == taking.method
    # Of a cut in the middle, which takes two runs, the first is refused.
    wish = 1 if taking.take is commit_apart else taking.unit
    assert met.message == (
        f"{wish} more {taking.figure} than the {bound} in use would pass this VMM's limit, "
        f"{bound}; give some back, or raise it: vmm.limits = vmm.limits.replace({taking.figure}"
        "=...)"
    )
    after = used(vmm), leaks.read_mappings(), descriptors()
    assert (after[0], after[2]) == (before[0], before[2])
    assert leaks.new_mappings(before[1], after[1]) == []
    assert leaks.new_mappings(after[1], before[1]) == []
    vmm._check()
    vmm.limits = Limits(**{taking.figure: bound + taking.unit - 1})
    refusal(lambda: taking.take(ground))
    vmm.limits = Limits(**{taking.figure: bound})
    taking.give(ground, taken.pop())
    assert used(vmm)[taking.figure] == bound - taking.unit
    taken.append(taking.take(ground))
    refusal(lambda: taking.take(ground))
    for item in taken:
        taking.give(ground, item)
    assert used(vmm)[taking.figure] == start
    vmm._check()


@pytest.mark.parametrize("taking", TAKINGS, ids=str)
def test_a_bound_of_zero_allows_none(ground: Ground, taking: Taking) -> None:
    ground.vmm.limits = Limits(**{taking.figure: 0})
    refusal(lambda: taking.take(ground))


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", FIGURES)
def test_threads_that_race_for_the_last_unit_never_pass_a_bound(
    ground: Ground, figure: str
) -> None:
    takings = [it for it in TAKINGS if it.figure == figure and it.take is not convert]
    taking = next((it for it in takings if it.unit == 1), takings[0])
    room, threads = 10, 4
    bound = used(ground.vmm)[figure] + room * taking.unit
    ground.vmm.limits = Limits(**{figure: bound})
    begin = threading.Barrier(threads)
    taken: list[object] = []
    highest: list[int] = []

    def race() -> None:
        begin.wait()
        for _ in range(room):
            with suppress(QuotaExceeded):
                taken.append(taking.take(ground))
            highest.append(used(ground.vmm)[figure])

    racers = [threading.Thread(target=race) for _ in range(threads)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
    assert len(taken) == room
    assert max(highest) == used(ground.vmm)[figure] == bound
    ground.vmm._check()


def test_bounds_may_change_while_threads_take(ground: Ground) -> None:
    vmm = ground.vmm
    over = threading.Event()
    bounds = [20, 40, 10]
    seen: list[int] = []

    def take() -> None:
        while not over.is_set():
            with suppress(QuotaExceeded):
                vmm.handle_close(vmm.handle_copy(ground.handle, 0))
            seen.append(used(vmm)["handles"])

    takers = [threading.Thread(target=take) for _ in range(3)]
    for taker in takers:
        taker.start()
    for turn in range(300):
        vmm.limits = Limits(handles=bounds[turn % 3])
    over.set()
    for taker in takers:
        taker.join()
    assert max(seen) <= max(bounds)
    assert used(vmm)["handles"] == 1
    vmm._check()

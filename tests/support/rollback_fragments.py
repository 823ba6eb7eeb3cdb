"""Calls that are made to fail: those on fragments, and those over many ranges."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from constants import CHUNK, COMMIT, FIXED, LOCKED, RESERVE, RW, RX, SHAREABLE
from faults import (
    HARMLESS,
    NONE,
    PAGES,
    SIZE,
    Ground,
    R,
    Scenario,
    all_but_locks,
    everything,
    pattern,
    usable,
)
from kernel_oracle import ARENA, PAGE, smaps
from vmm_linux._core.kernel import Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from faults import Picture
    from vmm_linux import VMM, VmmFlags

HALF = 8
#: The regions lie across the border of two chunks, with this many pages in the lower one.
AT = ARENA + CHUNK - HALF * PAGE


# ---- the states


def laid(*steps: tuple[object, ...], flags: VmmFlags = RW) -> Callable[[VMM], None]:
    """A reserved region after some steps: a method, its first page, its pages, the rest."""

    def prepare(vmm: VMM) -> None:
        vmm.allocate(AT, SIZE, RESERVE | FIXED | flags)
        take(vmm, *steps)

    return prepare


def take(vmm: VMM, *steps: tuple[object, ...]) -> None:
    """Take the steps, and fill the pages that are committed by them."""
    for method, first, pages, *rest in steps:
        assert isinstance(first, int)
        assert isinstance(pages, int)
        getattr(vmm, str(method))(AT + first * PAGE, pages * PAGE, *rest)
        if method == "commit":
            vmm.write(AT + first * PAGE, pattern(pages * PAGE, 1 + 8 * first))


def over(method: str, first: int, pages: int, *rest: object) -> Callable[[VMM], object]:
    """Call a method over some of the region's pages."""
    return lambda vmm: getattr(vmm, method)(AT + first * PAGE, pages * PAGE, *rest)


reserved = laid()
#: One chunk open, one closed.
opened = laid(("commit", 2, 2), ("commit", 5, 1))
#: An open chunk with a hole that was committed before.
with_hole = laid(("commit", 0, 7), ("decommit", 2, 2))
both_opened = laid(("commit", 1, 2), ("commit", 5, 2), ("commit", 9, 2), ("commit", 13, 2))
last_page = laid(("commit", 2, 2), ("decommit", 2, 1))
#: Runs with other protections in one open chunk, reserved ones among them.
mixed = laid(
    ("commit", 0, 7),
    ("protect", 1, 1, R),
    ("protect", 3, 1, RX),
    ("decommit", 3, 2),
    ("protect", 4, 2, R),
)
#: A page committed without access, which needs a mapping of its own.
without_access = laid(("commit", 0, 3), ("protect", 1, 1, NONE))
#: Reserved pages that are to have other accesses than the chunk was opened with.
to_be_mixed = laid(("commit", 1, 1), ("protect", 3, 2, R), ("protect", 5, 1, NONE))


# ---- what failures cost

#: The way by guards gives up, and the other one needs as much once more; or a chunk stays open.
OTHER_WAY: Mapping[str, Callable[[Picture], object]] = {
    **HARMLESS,
    **dict.fromkeys(("malloc", "mmap", "mprotect", "madvise"), usable),
}
#: One call for many ranges has calls for single ones in its place.
VECTORED = dict.fromkeys(("pidfd_open", "process_madvise"), everything)
#: mlock is done as far as the limit allows.
MANY: Mapping[str, Callable[[Picture], object]] = {
    **OTHER_WAY,
    **VECTORED,
    "mlock": all_but_locks,
    # Once other ranges have lost their contents it is tried again.
    "fallocate": usable,
}


# ---- the scenarios


def fragment(
    name: str, prepare: Callable[[Ground], object], call: Callable[[VMM], object], calls: str
) -> Scenario:
    """A scenario in the region across two chunks."""
    return Scenario(name, prepare, call, calls, survives=OTHER_WAY, base=AT)


COMMITS = [
    fragment(name, prepare, over("commit", first, pages), calls)
    for name, prepare, first, pages, calls in (
        ("opens a chunk", reserved, 2, 2, "malloc madvise mprotect"),
        ("opens a chunk from its border", reserved, HALF, 2, "malloc madvise mprotect"),
        ("opens all of a chunk", reserved, 0, HALF, "malloc mprotect"),
        ("opens two chunks", reserved, 6, 4, "malloc madvise mprotect"),
        ("behind a guard", opened, 0, 1, "malloc madvise"),
        ("behind guards", with_hole, 2, 2, "madvise"),
        ("committed and behind guards", with_hole, 1, 4, "madvise"),
        ("of all in an open chunk", opened, 0, HALF, "malloc madvise"),
        ("an open chunk and a closed one", opened, 4, 9, "malloc madvise mprotect"),
        ("of all in two open chunks", both_opened, 0, 16, "malloc madvise"),
        ("another protection", to_be_mixed, 3, 2, "madvise mprotect"),
        ("no access", to_be_mixed, 5, 1, "madvise mprotect"),
        ("several protections", to_be_mixed, 0, 8, "malloc madvise mprotect"),
        ("several protections, not all open", to_be_mixed, 2, 9, "malloc madvise mprotect"),
        ("in runs of protections", mixed, 0, 8, "malloc madvise"),
    )
]

ALLOCATES = [
    Scenario(
        "all at once",
        lambda _vmm: None,
        lambda vmm: vmm.allocate(AT, SIZE, RESERVE | COMMIT | FIXED | RW),
        "malloc mprotect mmap",
        survives=OTHER_WAY,
        base=AT,
    )
]

DECOMMITS = [
    fragment(name, prepare, over("decommit", first, pages), calls)
    for name, prepare, first, pages, calls in (
        ("middle", with_hole, 4, 2, "malloc madvise"),
        ("around a hole", with_hole, 1, 4, "malloc madvise"),
        ("the last page of a chunk", last_page, 3, 1, "mmap"),
        ("all of a chunk", with_hole, 0, 8, "mmap"),
        ("the last pages of two chunks", both_opened, 1, 14, "mmap"),
        ("a chunk's last pages and others", both_opened, 1, 9, "malloc"),
        ("runs", mixed, 1, 4, "madvise"),
        ("without access", without_access, 0, 2, "mmap"),
    )
]

FREES = [
    fragment(name, prepare, over("free", first, pages), calls)
    for name, prepare, first, pages, calls in (
        ("middle", with_hole, 1, 4, "malloc munmap"),
        ("low edge", with_hole, 0, 4, "malloc munmap"),
        ("high edge", both_opened, 9, 7, "malloc munmap"),
        ("the only committed pages", last_page, 3, 1, "malloc munmap mmap"),
        ("the only committed pages of two chunks", laid(("commit", 6, 4)), 6, 4, "munmap mmap"),
        ("all", both_opened, 0, 16, "munmap"),
        ("runs", mixed, 1, 4, "malloc munmap"),
    )
]

PROTECTS = [
    fragment(name, prepare, over("protect", first, pages, flags), calls)
    for name, prepare, first, pages, flags, calls in (
        ("committed", with_hole, 4, 2, R, "malloc mprotect"),
        ("reserved", with_hole, 2, 2, R, ""),
        ("all", both_opened, 0, 16, R, "mprotect"),
        ("committed and reserved", with_hole, 1, 4, RX, "malloc mprotect"),
        ("to none", mixed, 0, 8, NONE, "malloc mprotect"),
        ("runs", mixed, 1, 9, RW, "malloc mprotect"),
    )
]

#: Whether a file can be told apart from the next matters to nobody here.
FROM_VM = [
    replace(
        fragment(
            name,
            prepare,
            lambda vmm, first=first, pages=pages: vmm.mdl_create_from_vm(  # type: ignore[misc]
                AT + first * PAGE, pages * PAGE, RW
            ),
            "malloc memfd_create mmap mremap pwrite",
        ),
        survives={**OTHER_WAY, "lseek": everything},
    )
    for name, prepare, first, pages in (
        ("a fragment", opened, 2, 2),
        ("the only fragment", last_page, 3, 1),
        ("a part of one", with_hole, 4, 2),
        ("of two chunks", laid(("commit", 6, 4)), 6, 4),
        ("without access", without_access, 0, 3),
    )
]

# ---- many ranges

#: Where a LOCKED and a SHAREABLE region lie, in pages from AT on, and where that one ends.
PINNED, SHARED_AT, END = 17, 22, 28


def regions(*steps: tuple[object, ...]) -> Callable[[VMM], None]:
    """The private region, a LOCKED one and a SHAREABLE one, after some steps."""

    def prepare(vmm: VMM) -> None:
        vmm.allocate(AT, SIZE, RESERVE | FIXED | RW)
        vmm.allocate(AT + PINNED * PAGE, 4 * PAGE, RESERVE | FIXED | LOCKED | RW)
        vmm.allocate(AT + SHARED_AT * PAGE, 6 * PAGE, RESERVE | FIXED | SHAREABLE | RW)
        take(vmm, *steps)

    return prepare


def many(method: str, *ranges: tuple[int, int]) -> Callable[[VMM], object]:
    """Call a method over ranges, given as first page and pages."""
    return lambda vmm: getattr(vmm, method)([(AT + first * PAGE, n * PAGE) for first, n in ranges])


def by_mprotect(vmm: VMM) -> None:
    """Committed pages in a chunk that is not open."""
    laid(("protect", 0, 1, R))(vmm)
    # Several accesses at a time are not for guards.
    vmm.commit(AT, 6 * PAGE)
    vmm.protect(AT, PAGE, RW)
    vmm.write(AT, pattern(6 * PAGE))


full = regions(("commit", 0, 7), ("commit", 9, 5), ("commit", PINNED, 4), ("commit", SHARED_AT, 5))
#: Islands of three kinds.
some = regions(
    ("commit", 1, 1), ("commit", 5, 1), ("commit", PINNED, 1), ("commit", SHARED_AT + 1, 2)
)


def over_ranges(
    name: str,
    prepare: Callable[[Ground], object],
    method: str,
    ranges: tuple[tuple[int, int], ...],
) -> Scenario:
    """A scenario with many ranges, in one region or in all three."""
    last = max(first + pages for first, pages in ranges)
    size = END * PAGE if last > PAGES else SIZE
    return Scenario(name, prepare, many(method, *ranges), "malloc", MANY, size=size, base=AT)


SINGLES = ((1, 1), (3, 1), (5, 1), (9, 1), (11, 1))

COMMIT_RANGES = [
    over_ranges(name, prepare, "commit_ranges", ranges)
    for name, prepare, ranges in (
        ("one", reserved, ((2, 2),)),
        ("several in closed chunks", reserved, SINGLES),
        ("several in open chunks", both_opened, ((0, 1), (3, 1), (7, 1), (8, 1), (11, 2))),
        ("committed already, in part", both_opened, ((0, 2), (4, 4), (9, 2), (12, 4))),
        ("beside a closed chunk's pages", by_mprotect, ((6, 1), (9, 1), (12, 1))),
        ("other protections", to_be_mixed, ((0, 1), (2, 2), (4, 3), (8, 4))),
        ("a large one among small ones", both_opened, ((0, 1), (3, 9), (12, 1))),
        (
            "kinds of regions",
            some,
            ((0, 1), (3, 2), (PINNED, 2), (PINNED + 3, 1), (SHARED_AT, 3), (SHARED_AT + 4, 2)),
        ),
        (
            "kinds of regions, the private one last",
            some,
            ((SHARED_AT, 3), (PINNED, 4), (11, 1), (9, 1), (7, 1)),
        ),
    )
]

DECOMMIT_RANGES = [
    over_ranges(name, prepare, "decommit_ranges", ranges)
    for name, prepare, ranges in (
        ("one", with_hole, ((4, 2),)),
        ("several", both_opened, ((1, 1), (5, 2), (10, 1))),
        ("with holes", with_hole, ((0, 1), (3, 2), (6, 2))),
        ("all of a chunk", both_opened, ((1, 1), (2, 1), (5, 2), (9, 1))),
        ("all of two chunks", both_opened, ((0, 3), (5, 3), (8, 3), (13, 2))),
        ("over the border", both_opened, ((1, 1), (6, 4), (13, 1))),
        ("runs", mixed, ((0, 2), (2, 2), (5, 2))),
        ("without access", without_access, ((0, 1), (1, 1))),
        (
            "kinds of regions",
            full,
            ((1, 1), (3, 1), (9, 1), (11, 2), (PINNED + 1, 2), (SHARED_AT + 1, 1), (26, 2)),
        ),
        ("all of all kinds of regions", full, ((0, 16), (PINNED, 4), (SHARED_AT, 6))),
    )
]


#: Those that are tried where guards are taken in another way, or not at all, too.
AGAIN = {
    *("several in open chunks", "kinds of regions", "beside a closed chunk's pages"),
    *("with holes", "several"),
}


def again(scenarios: list[Scenario], *without: Feature) -> list[Scenario]:
    """Some of these without features of the kernel."""
    return [replace(one, without=without) for one in scenarios if one.name in AGAIN]


SCENARIOS = {
    "commit": COMMITS,
    "allocate": ALLOCATES,
    "decommit": DECOMMITS,
    "free": FREES,
    "protect": PROTECTS,
    "mdl_create_from_vm": FROM_VM,
    "commit_ranges": COMMIT_RANGES,
    "decommit_ranges": DECOMMIT_RANGES,
}
SINGLY = (Feature.VECTORED_GUARDS,)
UNGUARDED = (Feature.GUARD_REGIONS,)
RANGES = {
    "commit, a call for each guard": ("always", again(COMMIT_RANGES, *SINGLY)),
    "decommit, a call for each guard": ("always", again(DECOMMIT_RANGES, *SINGLY)),
    "commit, guards where it is crowded": ("crowded", again(COMMIT_RANGES)),
    "decommit, guards where it is crowded": ("crowded", again(DECOMMIT_RANGES)),
    "commit, no guards": ("always", again(COMMIT_RANGES, *UNGUARDED)),
    "decommit, no guards": ("always", again(DECOMMIT_RANGES, *UNGUARDED)),
}


def charged() -> int:
    """Bytes of the region that the kernel charges for."""
    return sum(
        record.figures["Size"]
        for record in smaps()
        if "ac" in record.vm_flags and AT <= record.mapping.start < AT + SIZE
    )

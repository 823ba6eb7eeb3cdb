"""Calls that are made to fail: those on regions, in every state that matters to them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from constants import COMMIT, FIXED, GUARDS, HUGE, LOCKED, RESERVE, RW, RX, SHAREABLE
from faults import (
    BASE,
    CLOSING,
    ELSEWHERE,
    HARMLESS,
    HUGE_SIZE,
    LOCKS,
    MIXED,
    NONE,
    SHARED,
    SIZE,
    UNTOLD,
    FirstCall,
    R,
    Scenario,
    all_but_files,
    ask,
    everything,
    filled,
    nothing,
    nothing_to_take_back,
    over,
    pattern,
    region,
    whole,
    with_committed,
    with_hole,
    with_protections,
)
from kernel_oracle import PAGE
from vmm_linux import VMM, VmmError, VmmFlags
from vmm_linux._core.kernel import Feature

if TYPE_CHECKING:
    from collections.abc import Callable

#: More than a scratch file takes at a time, twice.
LONG = 2 * (1 << 20) + 5 * PAGE + 3


# ---- the states


def guarded(flags: VmmFlags) -> Callable[[VMM], None]:
    """A filled region between guards."""
    return filled(GUARDS | flags)


def in_runs(flags: VmmFlags) -> Callable[[VMM], None]:
    """A filled region of pages with all protections, one of them reserved again."""
    return with_hole(with_protections(filled(flags), MIXED), 6, 1)


neighbour = with_committed(region(RW), 0, 2)


# ---- the calls


def allocate(flags: VmmFlags, address: int = 0, size: int = SIZE) -> Callable[[VMM], int]:
    """Allocate beside what is there."""
    return lambda vmm: vmm.allocate(address, size, RESERVE | flags)


def look(first: int, size: int) -> Callable[[VMM], object]:
    """Make a view and look at it."""

    def call(vmm: VMM) -> object:
        view = vmm.view(BASE + first * PAGE + 7, size)
        return bytes(view), view.readonly

    return call


def check_pins(vmm: VMM, _error: VmmError) -> None:
    """A failed view holds no page: all of them can be changed, and back."""
    vmm.protect(BASE, SIZE, R)
    vmm.protect(BASE, SIZE, RW)


OLD = pattern(LONG)
NEW = pattern(LONG, 77)


def take_back_write(vmm: VMM, error: VmmError) -> None:
    """A failed write tells how many bytes it wrote, and has written no more."""
    done = error.completed
    assert vmm.read(BASE, LONG) == NEW[:done] + OLD[done:], f"not just {done} bytes were written"
    if done:
        vmm.write(BASE, OLD[:done])


# ---- the scenarios

ALLOCATE = [
    Scenario("plain", neighbour, allocate(RW), "malloc mmap"),
    Scenario("with guards", neighbour, allocate(RW | GUARDS), "malloc mmap"),
    Scenario("FIXED", neighbour, allocate(RW | FIXED | GUARDS, ELSEWHERE), "malloc mmap"),
    Scenario("at a preferred address", neighbour, allocate(RW, ELSEWHERE), "malloc mmap"),
    Scenario("where another is preferred", neighbour, allocate(RW, BASE), "malloc mmap"),
    Scenario("COMMIT", neighbour, allocate(RW | COMMIT | GUARDS), "malloc mmap mprotect"),
    Scenario("COMMIT without access", neighbour, allocate(COMMIT), "malloc mmap"),
    *(
        Scenario(
            f"{name} LOCKED COMMIT",
            neighbour,
            allocate(flags | COMMIT | LOCKED),
            f"malloc mmap mprotect madvise mlock {more}",
            survives=LOCKS,
        )
        for name, flags, more in (
            ("writable", RW, ""),
            ("read-only", R | GUARDS, ""),
            ("without access", GUARDS, ""),
            ("SHAREABLE", RW | SHAREABLE, "memfd_create ftruncate fcntl fallocate sysinfo"),
            ("SHAREABLE with guards", RW | SHARED, "memfd_create ftruncate fcntl fallocate"),
            ("SHAREABLE and read-only", R | SHARED, "memfd_create ftruncate fcntl fallocate"),
        )
    ),
    Scenario("SHAREABLE", neighbour, allocate(RW | SHAREABLE), "malloc memfd_create mmap"),
    Scenario("SHAREABLE with guards", neighbour, allocate(RX | SHARED), "memfd_create mmap"),
    Scenario("SHAREABLE COMMIT", neighbour, allocate(RW | SHARED | COMMIT), "mmap mprotect"),
    *(
        Scenario(
            f"HUGE {name}",
            neighbour,
            allocate(flags | RW | HUGE, address, HUGE_SIZE),
            f"malloc mmap {more}",
            size=HUGE_SIZE,
        )
        for name, flags, address, more in (
            ("plain", FIXED, ELSEWHERE, ""),
            ("COMMIT", FIXED | GUARDS | COMMIT, ELSEWHERE, "mprotect madvise"),
            ("SHAREABLE", FIXED | SHARED, ELSEWHERE, "memfd_create madvise"),
            ("SHAREABLE COMMIT", FIXED | SHARED | COMMIT, ELSEWHERE, "madvise mprotect"),
        )
    ),
    Scenario(
        "HUGE where the system chooses",
        neighbour,
        allocate(RW | HUGE, size=HUGE_SIZE),
        "malloc mmap",
        survives={**HARMLESS, "mmap": everything},
        size=HUGE_SIZE,
        # A mapping that was just made takes no more mappings to unmap than it took to make.
        spare="munmap",
    ),
]

COMMITS = [
    Scenario("middle", region(RW), over("commit", 4, 8), "malloc mprotect"),
    Scenario("edge", region(RW | GUARDS), over("commit", 0, 3), "malloc mprotect"),
    Scenario(
        "runs of other protections, some committed",
        with_committed(with_protections(region(RW), MIXED), 6, 2),
        whole("commit"),
        "malloc mprotect",
    ),
    *(
        Scenario(
            f"LOCKED, {name}",
            prepare,
            whole("commit"),
            "malloc mprotect madvise mlock",
            survives=LOCKS,
        )
        for name, prepare in (
            ("writable", region(RW | LOCKED)),
            ("read-only", region(R | LOCKED | GUARDS)),
            ("mixed", with_committed(with_protections(region(RW | LOCKED), MIXED), 6, 2)),
            ("SHAREABLE", region(RW | LOCKED | SHAREABLE)),
            ("SHAREABLE and read-only", region(R | LOCKED | SHARED)),
            (
                "SHAREABLE and mixed",
                with_committed(with_protections(region(RW | LOCKED | SHARED), MIXED), 6, 2),
            ),
            ("SHAREABLE and decommitted", with_hole(filled(LOCKED | SHAREABLE), 3, 9)),
        )
    ),
    Scenario(
        "SHAREABLE",
        with_committed(with_protections(region(RW | SHARED), MIXED), 6, 2),
        whole("commit"),
        "malloc mprotect",
    ),
    Scenario(
        "HUGE",
        region(RW | HUGE, HUGE_SIZE),
        whole("commit", size=HUGE_SIZE),
        "mprotect madvise",
        size=HUGE_SIZE,
    ),
]

INTERRUPTED = [
    Scenario(
        name,
        region(RW | LOCKED | flags),
        whole("commit"),
        "malloc mprotect madvise fallocate",
        # An interrupted fallocate is tried again.
        survives={**LOCKS, "fallocate": everything},
    )
    for name, flags in (("SHAREABLE", SHAREABLE), ("with guards", SHARED))
]

DECOMMITS = [
    Scenario("middle", filled(NONE), over("decommit", 4, 8), "malloc mmap"),
    Scenario(
        "runs",
        with_protections(filled(NONE), MIXED),
        over("decommit", 2, 12),
        "malloc mmap",
        # The way by guards gives up, and the other one needs as much once more.
        survives={**HARMLESS, "malloc": everything},
    ),
    Scenario("all", with_hole(filled(GUARDS), 5, 2), whole("decommit"), "mmap"),
    Scenario("locked", filled(LOCKED), over("decommit", 4, 8), "malloc mmap"),
    Scenario(
        "SHAREABLE runs",
        in_runs(SHARED),
        over("decommit", 2, 12),
        "malloc mprotect fallocate",
    ),
    Scenario(
        "SHAREABLE locked runs",
        in_runs(SHARED | LOCKED),
        over("decommit", 2, 12),
        "malloc mprotect munlock fallocate",
    ),
    Scenario(
        "HUGE",
        filled(HUGE, HUGE_SIZE),
        over("decommit", 3, HUGE_SIZE // PAGE - 5),
        "malloc mmap",
        size=HUGE_SIZE,
    ),
]

PROTECTS = [
    Scenario(f"{name}: {what}", prepare, call, "malloc mprotect")
    for what, flags in (
        ("private", NONE),
        ("locked", LOCKED),
        ("SHAREABLE", SHARED),
        ("SHAREABLE locked", SHARED | LOCKED),
    )
    for name, prepare, call in (
        ("middle", filled(flags), over("protect", 4, 8, R)),
        ("runs", with_protections(filled(flags), MIXED), over("protect", 2, 12, RX)),
        ("to none", with_protections(filled(flags), MIXED), whole("protect", NONE)),
        (
            "none to writable",
            with_protections(filled(flags), [NONE, NONE]),
            over("protect", 1, 3, RW),
        ),
        (
            "with reserved pages",
            with_hole(with_protections(filled(flags), MIXED), 4, 2),
            whole("protect", RW),
        ),
    )
]

FREES = [
    Scenario(f"{name}: {what}", prepare(flags), call, "munmap", survives=survives)
    for what, flags, survives in (
        ("private", NONE, HARMLESS),
        ("locked", LOCKED, HARMLESS),
        (
            "SHAREABLE",
            SHAREABLE,
            {**HARMLESS, "fallocate": all_but_files, "fstat": all_but_files},
        ),
    )
    for name, prepare, call in (
        ("whole", guarded, whole("free")),
        ("middle", guarded, over("free", 4, 8)),
        ("low edge", guarded, over("free", 0, 3)),
        ("high edge", guarded, over("free", 9, 7)),
        (
            "runs",
            in_runs,
            over("free", 2, 12),
        ),
    )
]

COPIES = [
    Scenario(
        f"{name}{', SHAREABLE' * bool(flags)}{', by a scratch file' * bool(without)}",
        filled(flags, LONG // PAGE * PAGE + PAGE),
        call,
        names,
        without=without,
        take_back=take_back,
        size=4 * PAGE,
    )
    for flags in (NONE, SHAREABLE)
    for without, reading, writing in (
        ((), "process_vm_readv", "process_vm_writev"),
        ((Feature.PROCESS_VM,), "memfd_create pwrite pread", "memfd_create pwrite pread"),
    )
    for name, call, names, take_back in (
        ("read", lambda vmm: vmm.read(BASE, LONG), reading, nothing_to_take_back),
        ("write", lambda vmm: vmm.write(BASE, NEW), writing, take_back_write),
    )
]

VIEWS = [
    Scenario("middle", filled(NONE), look(4, 3 * PAGE), "malloc", take_back=check_pins),
    Scenario("SHAREABLE", filled(SHARED), look(0, 1), "malloc", take_back=check_pins),
]

QUERIES = [
    Scenario(
        f"{name}{' with smaps' * smaps}{' without ' * bool(without)}"
        + " or ".join(feature.name for feature in without),
        filled(GUARDS),
        ask(address, smaps=smaps),
        "open " + calls,
        ask=False,
        without=without,
        survives=UNTOLD,
    )
    for name, address in (("a page", BASE + 3 * PAGE + 5), ("a hole", ELSEWHERE + 7))
    for smaps in (False, True)
    for without, calls in (
        ((), "ioctl"),
        ((Feature.PROCMAP_QUERY,), "pread realloc"),
        ((Feature.PAGEMAP_SCAN,), ""),
        ((Feature.PAGEMAP_SCAN, Feature.PAGEMAP), ""),
        ((Feature.PROCMAP_QUERY, Feature.PAGEMAP_SCAN, Feature.PAGEMAP), "pread realloc"),
    )
]

CLOSES = [
    Scenario("one region", filled(SHARED), VMM.close, "munmap", survives=CLOSING),
    Scenario(
        "regions",
        lambda vmm: [filled(GUARDS)(vmm), *(allocate(RW | COMMIT)(vmm) for _ in range(3))],
        VMM.close,
        "munmap",
        survives={**CLOSING, "munmap": everything},
    ),
]

SCENARIOS = {
    "allocate": [replace(scenario, placed=True) for scenario in ALLOCATE],
    "commit": COMMITS,
    "interrupted commit": INTERRUPTED,
    "decommit": DECOMMITS,
    "protect": PROTECTS,
    "free": FREES,
    "copy": COPIES,
    "view": VIEWS,
    "query": QUERIES,
    "close": CLOSES,
}


FIRST_CALLS = [
    FirstCall(nothing, call)
    for call in (
        allocate(RW | HUGE | COMMIT | FIXED | GUARDS, BASE, HUGE_SIZE),
        allocate(RW | SHAREABLE | COMMIT | LOCKED | FIXED, BASE),
        allocate(RW | HUGE),
        ask(BASE, smaps=True),
    )
]

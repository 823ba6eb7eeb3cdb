"""Benchmarks of private memory: reserve, protect, commit, give back."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from benchmarks.harness import US, Contestant, at_most, benchmark, faster, loop
from vmm_linux import VMM, VmmFlags
from vmm_linux._core import memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Stage

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
SIZE: Final = 16 * PAGE
READ: Final = VmmFlags.READ
READ_WRITE: Final = VmmFlags.READ | VmmFlags.WRITE
RESERVED: Final = VmmFlags.RESERVE | READ_WRITE
TOUCH: Final = b"\1" * 16
"""What is written to touch 16 pages: a byte each."""
ISLANDS: Final = 30_000
"""The most isolated commits that mprotect can do: below half of the usual vm.max_map_count."""
MILLION: Final = 1_000_000
CHUNK: Final = PAGE // 8 * PAGE
"""What one page of page-table entries covers."""
NEVER: Final = (1 << 40, 1 << 40)
AT_ONCE: Final = (0, 0)
"""Rules for guards: the least islands of a chunk, and the least runs of a VMM, with guards."""
OWN_RULE: Final = ()

PROT_NONE: Final = 0
ACCESS: Final = mmap.PROT_READ | mmap.PROT_WRITE
PRIVATE: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MAP_FIXED: Final = 0x10

LIBC: Final = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def first_bytes(va: int) -> memoryview:
    """The first byte of each of 16 pages, committed or not: a raw pointer, which holds nothing."""
    return memoryview((ctypes.c_char * SIZE).from_address(va)).cast("B")[::PAGE]


def reserve(stage: Stage) -> int:
    """16 pages in the middle of reserved ones, by libc through ctypes."""
    reserved = LIBC.mmap(None, 3 * SIZE, PROT_NONE, PRIVATE, -1, 0)
    stage.callback(LIBC.munmap, reserved, 3 * SIZE)
    return int(reserved) + SIZE


@benchmark("allocate + free, 64 KiB", at_most(1.25), faster(1, "mmap.mmap"))
def allocate_free(stage: Stage) -> dict[str, Contestant]:
    """A region reserved and freed again; mmap.mmap cannot reserve, and commits memory."""
    vmm = stage.vmm()
    allocate, free = vmm.allocate, vmm.free
    map_it, unmap = LIBC.mmap, LIBC.munmap
    make = mmap.mmap

    def ours(count: int) -> None:
        for _ in range(count):
            free(allocate(0, SIZE, RESERVED), SIZE)

    def by_ctypes(count: int) -> None:
        for _ in range(count):
            unmap(map_it(None, SIZE, PROT_NONE, PRIVATE, -1, 0), SIZE)

    def by_mmap(count: int) -> None:
        for _ in range(count):
            make(-1, SIZE, PRIVATE).close()

    return {
        "C": stage.in_c("allocate_free", SIZE),
        US: loop(ours),
        "ctypes": loop(by_ctypes),
        "mmap.mmap": loop(by_mmap),
    }


@benchmark("protect 64 KiB read-only and back", at_most(1.2))
def protect_pair(stage: Stage) -> dict[str, Contestant]:
    """Touched pages lose WRITE and get it back."""
    vmm = stage.vmm()
    va = vmm.allocate(0, 3 * SIZE, RESERVED) + SIZE
    vmm.commit(va, SIZE)
    vmm.write(va, bytes(SIZE))
    protect = vmm.protect
    raw = reserve(stage)
    mprotect = LIBC.mprotect
    mprotect(raw, SIZE, ACCESS)
    first_bytes(raw)[:] = TOUCH

    def ours(count: int) -> None:
        for _ in range(count):
            protect(va, SIZE, READ)
            protect(va, SIZE, READ_WRITE)

    def by_ctypes(count: int) -> None:
        for _ in range(count):
            mprotect(raw, SIZE, mmap.PROT_READ)
            mprotect(raw, SIZE, ACCESS)

    return {
        "C": stage.in_c("protect_pair", SIZE),
        US: loop(ours),
        "ctypes": loop(by_ctypes),
    }


@benchmark("commit + touch 16 pages + decommit", at_most(1.1), faster(1, "ctypes"))
def commit_touch_decommit(stage: Stage) -> dict[str, Contestant]:
    """Reserved pages are committed, written, and decommitted."""
    vmm = stage.vmm()
    va = vmm.allocate(0, 3 * SIZE, RESERVED) + SIZE
    commit, decommit = vmm.commit, vmm.decommit
    pages = first_bytes(va)
    raw = reserve(stage)
    raw_pages = first_bytes(raw)
    mprotect, map_it = LIBC.mprotect, LIBC.mmap

    def ours(count: int) -> None:
        for _ in range(count):
            commit(va, SIZE)
            pages[:] = TOUCH
            decommit(va, SIZE)

    def by_ctypes(count: int) -> None:
        for _ in range(count):
            mprotect(raw, SIZE, ACCESS)
            raw_pages[:] = TOUCH
            map_it(raw, SIZE, PROT_NONE, PRIVATE | MAP_FIXED, -1, 0)

    return {
        "C": stage.in_c("commit_touch_decommit", SIZE),
        US: loop(ours),
        "ctypes": loop(by_ctypes),
    }


# ---- many islands -------------------------------------------------------------------------------


def every_other_page(base: int, count: int) -> range:
    """The addresses of so many pages, each with one between it and the next."""
    return range(base, base + 2 * count * PAGE, 2 * PAGE)


def in_fresh_region(commit: Callable[[VMM, range], float]) -> Callable[[int], float]:
    """Measure how every other page of a region of its own is committed."""

    def measure(count: int) -> float:
        with VMM() as vmm:
            base = vmm.allocate(0, 2 * count * PAGE, RESERVED)
            return commit(vmm, every_other_page(base, count))

    return measure


def commit_one_by_one(vmm: VMM, islands: range) -> float:
    """A call for each island: the nanoseconds."""
    commit = vmm.commit
    start = perf_counter_ns()
    for va in islands:
        commit(va, PAGE)
    return perf_counter_ns() - start


def commit_at_once(vmm: VMM, islands: range) -> float:
    """One call with a prepared list: the nanoseconds."""
    ranges = [(va, PAGE) for va in islands]
    start = perf_counter_ns()
    vmm.commit_ranges(ranges)
    return perf_counter_ns() - start


@benchmark(
    "commit every other page, a call each",
    at_most(0.5),
    at_most(0.5, ours=f"{US}, 1,000,000"),
    rarely=40,
)
def alternate_commits(stage: Stage) -> dict[str, Contestant]:
    """C commits by mprotect, as often as the kernel allows."""
    one_by_one = in_fresh_region(commit_one_by_one)
    return {
        "C": stage.in_c("isolated_commits", count=ISLANDS),
        US: Contestant(one_by_one, ISLANDS),
        f"{US}, 1,000,000": Contestant(one_by_one, MILLION),
    }


def islands_in_chunks(islands: int, rule: tuple[int, ...]) -> Callable[[int], float]:
    """Measure how so many islands are committed in each of some chunks, by this rule."""

    def measure(chunks: int) -> float:
        memory.set_rule(*rule)
        with VMM() as vmm:
            base = vmm.allocate(0, (chunks + 1) * CHUNK, RESERVED)
            base += -base % CHUNK
            commit = vmm.commit
            start = perf_counter_ns()
            for chunk in range(base, base + chunks * CHUNK, CHUNK):
                for va in every_other_page(chunk, islands):
                    commit(va, PAGE)
            taken = perf_counter_ns() - start
        memory.set_rule()
        return taken

    return measure


@benchmark("commit islands in a chunk: when guards are worth it", rarely=20)
def rule_for_guards(stage: Stage) -> dict[str, Contestant]:
    """A chunk by mprotect, opened at once, and by the package's own rule."""
    del stage
    rules = {"by mprotect": NEVER, "by guards": AT_ONCE, US: OWN_RULE}
    return {
        f"{islands} island{'s' * (islands > 1)}, {name}": Contestant(
            islands_in_chunks(islands, rule), 100
        )
        for islands in (1, 4, 8, 12, 64)
        for name, rule in rules.items()
    }


@benchmark("mappings more after 1,000,000 of them", at_most(100, None), unit="", rarely=200)
def alternate_mappings(stage: Stage) -> dict[str, Contestant]:
    """The lines of /proc/self/maps, before and after."""

    def count_mappings(_: int) -> float:
        vmm = stage.vmm()
        base = vmm.allocate(0, 2 * MILLION * PAGE, RESERVED)
        before = number_of_mappings()
        commit_one_by_one(vmm, every_other_page(base, MILLION))
        more = number_of_mappings() - before
        vmm.close()
        return more

    return {US: Contestant(count_mappings, 1)}


@benchmark("the same by commit_ranges, a range", at_most(0.2), rarely=10)
def alternate_commit_ranges(stage: Stage) -> dict[str, Contestant]:
    """All in one call."""
    return {
        "C": stage.in_c("isolated_commits", count=ISLANDS),
        US: Contestant(in_fresh_region(commit_at_once), ISLANDS),
        "C, by guards": stage.in_c("vectored_commits", count=ISLANDS),
    }


def number_of_mappings() -> int:
    """Of this process."""
    return Path("/proc/self/maps").read_bytes().count(b"\n")


# ---- the ledger ---------------------------------------------------------------------------------


@benchmark(
    "allocate + free with 100,000 live regions",
    at_most(1.2, "with 10", ours="with 100,000"),
)
def live_regions(stage: Stage) -> dict[str, Contestant]:
    """The same VMM with many regions and another one with few."""

    def with_live(count: int) -> Contestant:
        vmm = stage.vmm()
        allocate, free = vmm.allocate, vmm.free
        for _ in range(count):
            allocate(0, SIZE, RESERVED)

        def ours(count: int) -> None:
            for _ in range(count):
                free(allocate(0, SIZE, RESERVED), SIZE)

        return loop(ours)

    return {"with 10": with_live(10), "with 100,000": with_live(100_000)}


@benchmark("memory of the ledger, a run", at_most(100, None), unit="bytes", rarely=200)
def ledger_memory(stage: Stage) -> dict[str, Contestant]:
    """By the allocator's own account: every other reserved page gets another protection."""

    def grow(count: int) -> float:
        with VMM() as vmm:
            base = vmm.allocate(0, count * PAGE, RESERVED)
            before = stage.baseline.call("heap_in_use")
            for va in every_other_page(base, count // 2):
                vmm.protect(va, PAGE, READ)
            return stage.baseline.call("heap_in_use") - before

    return {US: Contestant(grow, 100_000)}

"""The cost of a read, by the amount of memory that is read in turn: caches, and the TLB."""

import contextlib
import ctypes
import mmap
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from vmm_linux import Region, VmmFlags
from vmm_linux import experiments as lab

ORDER = 130
TITLE = "Cold and hot"
QUESTION = "What does a read cost, when more and more memory is read in turn?"
PREDICTION = """
    As long as all of it fits into a cache, a read takes as long as that cache needs, and a step
    upwards comes where it no longer fits: at the sizes of which the kernel tells. The main memory
    takes at least ten times as long as the first cache. In small pages the TLB gives up too, so
    that large amounts take longer than the same in huge pages. None of it is a page fault.
"""
EXPLANATION = """
    Each read says where the next one is, in random order: so nothing can be fetched in advance,
    and the time of a read is what it takes to get one line of 64 bytes. The loop is three
    instructions of the machine's own. A core looks into its first cache, then into larger
    and slower ones, then into memory. It needs the physical address for it: the TLB keeps that
    of some thousand pages, else the page table must be read, which lies in the caches or in
    memory itself; in a virtual machine there are two to be read. A huge page needs one entry
    for what otherwise needs hundreds. The steps are round, for a cache that is a little too small
    still has part of it; and a cache that other cores or other guests use has less to offer than
    the kernel tells.
"""

KIB, MIB = 1 << 10, 1 << 20
LINE = 64
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT
HOPS = {
    "x86_64": "488b3437"  # again: mov rsi, [rdi + rsi]
    "48ffca 75f7"  # dec rdx; jnz again
    "4889f0 c3",  # mov rax, rsi; ret
    "aarch64": "016861f8"  # again: ldr x1, [x0, x1]
    "420400f1 c1ffff54"  # subs x2, x2, 1; b.ne again
    "e00301aa c0035fd6",  # mov x0, x1; ret
}
"""``hops(base, offset, count)``: follow a chain of offsets, so often."""
Hops = Callable[[int, int, int], int]
SMALL, HUGE = "small pages", "huge pages"
CACHE_FILES = ("type", "level", "size")
"""The kernel's data about a cache."""


def measure(run: lab.Run) -> None:
    """Read more and more memory, in small pages and in huge ones."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # caches belong to a core
    most = run.fitting(run.choose(quick=64 * MIB, full=512 * MIB), times=2.5)
    sizes = [size for n in range(40) if 16 * KIB <= (size := 1 << n) <= most]
    code = lab.machine_code(run.vmm, HOPS)
    hops: Hops = ctypes.CFUNCTYPE(*[ctypes.c_size_t] * 4)(code.base)
    with contextlib.ExitStack() as regions:
        memory = {}
        for kind in (SMALL, HUGE):
            with run.part(f"Reading in {kind}"):
                memory[kind] = regions.enter_context(memory_in(run, kind, most))
        times = times_in(run, memory, hops, sizes)
    show(run, sizes, times)
    claim(run, sizes, times)


def memory_in(run: lab.Run, kind: str, size: int) -> Region:
    """Memory in pages of this kind, touched."""
    if kind == HUGE:
        run.need_huge_pages()
        region = run.vmm.region(size, READ_WRITE | VmmFlags.HUGE)
        lab.touch(region)
        record = region.query().smaps
        huge = record.figures.get("anon_huge_pages", 0) if record else 0
        lab.need(huge >= size * 9 // 10, "the kernel gave too few of them (see vmm-linux doctor)")
    else:
        region = run.vmm.region(size, READ_WRITE)
        # For a setting that gives huge pages to all; a kernel without them may refuse.
        with contextlib.suppress(OSError):
            lab.libc("madvise", region.base, size, mmap.MADV_NOHUGEPAGE)
        lab.touch(region)
    return region


def times_in(
    run: lab.Run, memory: dict[str, Region], hops: Hops, sizes: list[int]
) -> dict[str, list[float]]:
    """The nanoseconds of a read in pages of each kind, for each amount of memory."""
    times: dict[str, list[float]] = {kind: [] for kind in memory}
    count = run.choose(quick=1 << 16, full=1 << 18)
    tries = 5
    faults = 0
    for size in run.steps(sizes, "sizes"):
        for kind, region in memory.items():
            link(run, region, size)
            place, took = 0, []
            before = lab.minor_faults()
            for _ in range(tries):
                begin = time.perf_counter_ns()
                place = hops(region.base, place, count)  # continues where the last ones ended
                took.append((time.perf_counter_ns() - begin) / count)
            faults += lab.minor_faults() - before
            times[kind].append(min(took))
    with run.part("What is read is in memory"):
        whole = [
            lab.resident(region.base, len(region)) == len(region) for region in memory.values()
        ]
        run.physical("All that is read is resident", all(whole), lab.equal(value=True))
    reads = len(memory) * len(sizes) * tries * count
    with run.part("Faults while reading"):
        balanced = lab.sysctl("kernel.numa_balancing", otherwise=0)
        lab.need(not balanced, "kernel.numa_balancing makes pages fault to see who uses them")
        run.physical("Reading faults no page", faults / reads, lab.at_most(0.001), "faults a read")
    return times


def link(run: lab.Run, region: Region, size: int) -> None:
    """Link the cache lines of the first so many bytes into one ring.

    The order is that of a linear congruential generator, which visits all numbers below a power of
    two before it repeats one, without a pattern that a processor would recognize.
    """
    factor, start = run.random.randrange(size) // 8 * 8 + 5, run.random.randrange(size) | 1
    lines = size // LINE
    following = range(LINE * start, LINE * (start + factor * lines), LINE * factor)
    with region.view(0, size) as view, view.cast("Q") as words:
        words[:: LINE // 8] = memoryview(array("Q", (place % size for place in following)))


def show(run: lab.Run, sizes: list[int], times: dict[str, list[float]]) -> None:
    """The table and the plot."""
    table = run.table(
        "A read, each at a place that the last one told",
        "memory read in turn [B]",
        *(f"{kind} [ns]" for kind in times),
    )
    for row in zip(sizes, *times.values(), strict=True):
        table.add(*row)
    plot = run.plot("What a read costs", "memory read in turn [B]", "time of a read [ns]", log="xy")
    for kind, series in times.items():
        plot.add(kind, sizes, series)


def claim(run: lab.Run, sizes: list[int], times: dict[str, list[float]]) -> None:
    """Compare with the kernel's data about the caches."""
    small = times[SMALL]
    best = dict(zip(sizes, times.get(HUGE, small), strict=True))  # without the TLB's part
    columns = "level | size [B] | within [ns] | beyond [ns]"
    table = run.table("Caches as the kernel tells, and a read within and beyond", columns)
    caches = cache_sizes()
    for level in (1, 2, 3):
        with run.part(f"The cache of level {level}"):
            lab.need(level in caches, "the kernel tells of none")
            size = caches[level]
            within = [best[each] for each in sizes if each <= size * 3 // 4]
            beyond = [best[each] for each in sizes if each >= size * 2]
            lab.need(within and beyond, f"as {size >> 10} KiB it is outside of what is read")
            table.add(level, size, within[-1], beyond[0])
            statement = f"Beyond the cache of level {level} a read takes longer"
            run.timing(statement, beyond[0] / within[-1], lab.at_least(1.5), "times")
    statement = "Memory takes far longer than the first cache"
    run.timing(statement, small[-1] / small[0], lab.at_least(10), "times")
    with run.part("The TLB"):
        lab.need(HUGE in times, "there are no huge pages to compare with")
        statement = "In small pages the largest amount takes longer than in huge pages"
        run.timing(statement, small[-1] / times[HUGE][-1], lab.at_least(1.2), "times")


def cache_sizes() -> dict[int, int]:
    """The caches for data of the core that this runs on: level and bytes."""
    (core,) = os.sched_getaffinity(0)
    found = {}
    for folder in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*"):
        with contextlib.suppress(OSError):  # some machines report less
            kind, level, size = ((folder / name).read_text().strip() for name in CACHE_FILES)
            if kind in {"Data", "Unified"}:
                found[int(level)] = int(size.removesuffix("K")) << 10  # in the form "48K"
    return found

"""Populating many pages at once, in one thread and in several."""

import itertools
import threading
from collections.abc import Callable
from statistics import median

from vmm_linux import VmmFlags
from vmm_linux import experiments as lab

ORDER = 35
TITLE = "Populating memory"
QUESTION = "Can a program pay for its page faults ahead, and does it pay less for many at once?"
PREDICTION = """
    Populated memory is resident before it is touched, and never faults. The kernel counts a fault
    for each page all the same, for it goes the same way, but without a trap for each: populating
    takes less time than touching. LOCKED memory is populated when it is committed. Two threads,
    each with a half of the memory, take less time than one.
"""
EXPLANATION = """
    Where all of some memory will be needed, its faults can be had in one system call, at a moment
    of one's own choosing: Commit of a LOCKED region, or madvise(2) with MADV_POPULATE_WRITE. What
    remains is the work for each page, to find and to clear it; the traps are saved. LOCKED pins the
    pages besides, which has a price of its own. Threads populate in parallel, for page tables of
    different ranges are different pages, as far as cores are free and memory is fast enough to be
    cleared by several at once. On a virtual machine the host may have to find the memory first,
    and then it is the host that is measured.
"""

MIB = 1 << 20
MADV_POPULATE_WRITE = 23
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
MOST_THREADS = 8


def measure(run: lab.Run) -> None:
    """Populate memory each way, then with more and more threads."""
    size = min(run.memory, run.choose(quick=16 * MIB, full=128 * MIB))
    with lab.small_pages():
        ahead(run, size, run.choose(quick=3, full=15))
    with lab.small_pages(), run.part("Populating in parallel"):
        run.need_cores(2)
        in_parallel(run, size, run.choose(quick=5, full=15))


def populate(start: int, size: int) -> None:
    """Make the kernel give memory to these pages, as the first write to each would."""
    lab.libc("madvise", start, size, MADV_POPULATE_WRITE)


def nothing(start: int, size: int) -> None:
    """Do nothing: the first touch or Commit gives memory."""


Way = tuple[VmmFlags, Callable[[int, int], object]]
WAYS: dict[str, Way] = {
    "touched": (READ_WRITE, nothing),
    "populated": (READ_WRITE, populate),
    "LOCKED": (READ_WRITE | VmmFlags.LOCKED, nothing),
}


def ahead(run: lab.Run, size: int, tries: int) -> None:
    """Commit memory and touch all of it, with and without populating it between."""
    table = run.table(
        f"{size // MIB} MiB of private memory, all of it needed",
        "way | faults ahead | resident ahead [B] | time ahead [µs] | faults when touched",
        "time of touching [µs] | time in all [µs]",
    )
    for name, way in run.steps(list(WAYS.items()), "populating"):
        found = [prepared(run, size, way) for _ in range(tries)]
        table.add(name, *(median(values) for values in zip(*found, strict=True)))
    lazy, populated, locked = table.column("resident ahead")
    pages = size // run.page
    run.physical("Memory is not there before it is touched", lazy, lab.equal(0), "B")
    run.physical("Populated memory is there", populated / size, lab.equal(1), "of it")
    run.physical("LOCKED memory is there", locked / size, lab.equal(1), "of it")
    faults = max(table.column("faults when touched")[1:])
    run.physical("It does not fault any more", faults / pages, lab.at_most(0.01), "faults a page")
    faults = table.column("faults ahead")[1]
    run.physical("Populating counts faults too", faults / pages, lab.at_least(1), "faults a page")
    lazy, populated, _ = table.column("time in all")
    run.timing("It takes less time than touching", populated / lazy, lab.at_most(1), "times")


def prepared(run: lab.Run, size: int, way: Way) -> tuple[float, ...]:
    """Commit, prepare and touch memory: a row of the table without its name."""
    flags, prepare = way
    with run.vmm.region(size, flags) as region:
        begin = lab.minor_faults()
        before = (lab.timed(region.commit) + lab.timed(prepare, region.base, size)) * 1e6
        ahead = lab.minor_faults() - begin
        there = lab.resident(region.base, size)
        begin = lab.minor_faults()
        touching = lab.timed(lab.touch, region) * 1e6
        return ahead, there, before, lab.minor_faults() - begin, touching, before + touching


def in_parallel(run: lab.Run, size: int, tries: int) -> None:
    """The same memory, populated by more and more threads."""
    most = min(run.cores, MOST_THREADS)
    counts = [*itertools.takewhile(lambda count: count < most, (1, 2, 4)), most]
    title = f"{size // MIB} MiB populated by threads"
    table = run.table(title, "threads | time [µs] | resident [B]")
    for count in run.steps(counts, "threads"):
        found = [by_threads(run, size, count) for _ in range(tries)]
        table.add(count, *(median(values) for values in zip(*found, strict=True)))
    times = table.column("time")
    run.plot(title, "threads", "time [µs]").add("time", [*map(str, counts)], times)
    there = min(table.column("resident")) / size
    run.physical("However many threads, all of it is there", there, lab.equal(1), "of it")
    run.timing("Two threads are faster than one", times[0] / times[1], lab.at_least(1.2), "times")


def by_threads(run: lab.Run, size: int, threads: int) -> tuple[float, int]:
    """Populate new memory, each thread its part: microseconds, and resident bytes."""
    cuts = [size // run.page * number // threads * run.page for number in range(threads + 1)]
    with run.vmm.region(size) as region:
        region.commit()
        workers = [
            threading.Thread(target=populate, args=(region.base + low, high - low))
            for low, high in itertools.pairwise(cuts)
        ]

        def work() -> None:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()

        return lab.timed(work) * 1e6, lab.resident(region.base, size)

"""Huge pages made later, of small ones: at once, or by the kernel's thread."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vmm_linux import Region, VmmFlags
from vmm_linux import experiments as lab

ORDER = 45
TITLE = "Collapsing into huge pages"
QUESTION = "What becomes of memory that should have huge pages and was touched without them?"
PREDICTION = """
    It can be collapsed: where a program demands it, at once, and the contents stay. That takes
    longer than huge pages at first touch would have. Without being asked, the kernel does it as
    well, but seconds later.
"""
EXPLANATION = """
    To collapse is to find a free huge page, to stop all access to the small ones, to copy them and
    to free them; at first touch there is nothing to copy, and one page to enter instead of
    hundreds. MADV_COLLAPSE does it while the caller waits. Else the kernel's thread khugepaged
    looks at some memory of some process, and sleeps; how long, and at how much, is in
    /sys/kernel/mm/transparent_hugepage/khugepaged. A program that lives for less than a few seconds
    has huge pages from the first touch on, or never.
"""

MIB = 1 << 20
MADV_COLLAPSE = 25
FLAGS = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.HUGE
PATIENCE = 40
"""Seconds to wait for khugepaged."""


def measure(run: lab.Run) -> None:
    """Collapse memory at once; then wait until the kernel's thread collapses some."""
    run.need_huge_pages()
    run.need_memory(4 * run.huge_page)
    count = min(run.memory // run.huge_page, run.choose(quick=8, full=64))
    with run.part("Collapsing at once"):
        at_once(run, count)
    with run.part("Collapsing by khugepaged"):
        lab.need(
            not run.quick, "khugepaged sleeps for seconds, and quick mode does not wait for it"
        )
        by_khugepaged(run)


@contextmanager
def in_small_pages(run: lab.Run, size: int) -> Iterator[Region]:
    """Memory that may have huge pages, touched while it could not; every page differs."""
    with run.vmm.region(size, FLAGS) as region:
        region.commit()
        with lab.small_pages(), region.view() as view:
            for number, offset in enumerate(range(0, size, run.page)):
                view[offset] = number % 251
            lab.need(
                not lab.in_huge_pages(region.base), "small pages cannot be had in this process"
            )
        yield region


def at_once(run: lab.Run, count: int) -> None:
    """Make the kernel collapse small pages while this process waits."""
    size = count * run.huge_page
    table = run.table(f"{size // MIB} MiB in huge pages", "way | in huge pages [B] | time [µs]")
    with run.vmm.region(size, FLAGS) as region:
        region.commit()
        touching = lab.timed(lab.touch, region)
        touched = lab.in_huge_pages(region.base)
    table.add("first touch", touched, touching * 1e6)
    with in_small_pages(run, size) as region:
        contents = region.read()
        try:
            seconds = lab.timed(lab.libc, "madvise", region.base, size, MADV_COLLAPSE)
        except OSError as refusal:
            raise lab.NotObservable(f"MADV_COLLAPSE is refused: {refusal.strerror}") from None
        there, same = lab.in_huge_pages(region.base), region.read() == contents
    table.add("MADV_COLLAPSE", there, seconds * 1e6)
    run.physical("Collapsed, all of it is huge", there, lab.equal(size), "B")
    run.physical("The contents stay", same, lab.equal(True))
    with run.part("Collapsing against first touch"):
        lab.need(touched == size, "the kernel gave too few huge pages at first touch")
        ratio = seconds / touching
        run.timing("It takes longer than at first touch", ratio, lab.at_least(1), "times")


def by_khugepaged(run: lab.Run) -> None:
    """Wait until the kernel's thread has made a huge page of small ones."""
    with in_small_pages(run, run.huge_page) as region:
        begin = time.monotonic()
        while not lab.in_huge_pages(region.base) and time.monotonic() < begin + PATIENCE:
            time.sleep(0.05)
        seconds = time.monotonic() - begin
        there = lab.in_huge_pages(region.base)
    lab.need(there, f"khugepaged had not come by after {PATIENCE} seconds")
    table = run.table("Collapsed by khugepaged", "in huge pages [B] | after [s]")
    table.add(there, seconds)
    run.timing("khugepaged comes by after seconds", seconds, lab.at_least(0.5), "s")

"""Transparent huge pages at first touch: savings, cost, alignment."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from statistics import median

from vmm_linux import VmmFlags
from vmm_linux import experiments as lab

ORDER = 40
TITLE = "Huge pages"
QUESTION = "What do huge pages save, what do they cost, and which memory gets them?"
PREDICTION = """
    With huge pages, memory faults once for each of them, and is there in less time than with small
    pages; a single fault takes longer. Reading a byte of each page is faster, for an entry of the
    TLB reaches further. The price is memory: one byte makes a whole huge page resident. Only
    aligned blocks can be huge: memory that begins a page off loses one.
"""
EXPLANATION = """
    A huge page is one entry where else a whole page of page table would stand. One fault finds,
    clears and enters all of it: the same bytes to clear, but hundreds of traps fewer. One entry of
    the TLB then translates all of it, too, which shows the more the more memory is read. A program
    that touches a byte here and there takes a huge page for each. As the entry stands for an
    aligned block, what lies before the first border and behind the last one stays small. Without
    HUGE it is the machine's setting that decides.
"""

MIB = 1 << 20
FLAGS = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.HUGE
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PAGES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "small": lab.small_pages,
    "huge": contextlib.nullcontext,
}
ONCE = lab.between(1, 1.5)
"""The interpreter itself may touch new pages meanwhile."""


def measure(run: lab.Run) -> None:
    """Touch memory with small and with huge pages, then at odd addresses."""
    run.need_huge_pages()
    run.need_memory(4 * run.huge_page)
    count = min(run.memory // run.huge_page, run.choose(quick=16, full=128))
    with run.vmm.region(run.huge_page, FLAGS) as region:
        region.commit()
        lab.touch(region)
        lab.need(lab.in_huge_pages(region.base), f"the kernel gave none ({SETTING} is {setting()})")
    at_first_touch(run, count)
    with run.part("Alignment"):
        alignment(run)


def setting() -> str:
    """The machine's setting for huge pages, in the kernel's words."""
    with contextlib.suppress(OSError):
        return SETTING.read_text(encoding="utf-8").strip()
    return "not readable"


def at_first_touch(run: lab.Run, count: int) -> None:
    """Touch and read all of some memory; touch one byte per huge page of other memory."""
    size = count * run.huge_page
    few = f"resident for {count} bytes"
    table = run.table(
        f"{size // MIB} MiB touched, with small and with huge pages",
        "pages | faults | in huge pages [B] | touching [µs] | a fault [µs] | reading [µs]",
        f"{few} [B]",
    )
    for name in run.steps(list(PAGES), "touching"):
        with PAGES[name]():
            tries = [touched(run, size) for _ in range(run.choose(quick=3, full=9))]
            faults, there, touching, reading = map(median, zip(*tries, strict=True))
            table.add(name, faults, there, touching, touching / faults, reading, sparse(run, size))
    for work, column in (("First touch", "touching"), ("Reading a byte a page", "reading")):
        plot = run.plot(f"{work} of {size // MIB} MiB", "pages", "time [µs]")
        plot.add(work, table.column("pages"), table.column(column))
    small, huge = table.column("in huge pages")
    run.physical("Without huge pages there are none", small, lab.equal(0), "B")
    with run.part("All of it in huge pages"):
        lab.need(huge == size, "the kernel found too few huge pages")
        small, huge = table.column("faults")
        run.physical("Small pages fault once each", small * run.page / size, ONCE, "faults a page")
        run.physical("Huge pages fault once each", huge / count, ONCE, "faults a page")
        small, huge = table.column(few)
        run.physical("One byte takes a small page", small / count, lab.equal(run.page), "B")
        run.physical("One byte takes a huge page", huge / count, lab.equal(run.huge_page), "B")
    small, huge = table.column("touching")
    run.timing("Huge pages are there in less time", huge / small, lab.at_most(0.7), "times")
    small, huge = table.column("a fault")
    run.timing("One fault takes longer", huge / small, lab.at_least(10), "times")
    small, huge = table.column("reading")
    run.timing("Reading a byte a page is faster in them", huge / small, lab.at_most(1), "times")


def touched(run: lab.Run, size: int) -> tuple[float, ...]:
    """Touch new memory and read it: faults, bytes in huge pages, µs of touching and of reading."""
    with run.vmm.region(size, FLAGS) as region:
        region.commit()
        faults = lab.minor_faults()
        touching = lab.timed(lab.touch, region)
        faults = lab.minor_faults() - faults
        # Different offsets in pages: equal ones would use the same few sets of the cache.
        with region.view() as view:
            reading = min(lab.timed(bytes, view[:: run.page + 64]) for _ in range(15))
        return faults, lab.in_huge_pages(region.base), touching * 1e6, reading * 1e6


def sparse(run: lab.Run, size: int) -> int:
    """The bytes resident when one byte of each huge page is touched."""
    with run.vmm.region(size, FLAGS) as region:
        region.commit()
        lab.touch(region, run.huge_page)
        return lab.resident(region.base, size)


def alignment(run: lab.Run) -> None:
    """Memory of two huge pages' size, aligned to huge pages and not."""
    size = 2 * run.huge_page
    columns = "distance [B] | resident [B] | in huge pages [B]"
    table = run.table(f"{size // MIB} MiB, at some distance from a border of huge pages", columns)
    for distance in (0, run.page, run.huge_page // 2):
        with run.vmm.region(size + run.huge_page, FLAGS) as region:
            region.commit(distance, size)
            with region.view(distance, size) as view:
                lab.touch(view)
            start = region.base + distance
            table.add(distance, lab.resident(start, size), lab.in_huge_pages(start))
    aligned, *others = table.column("in huge pages")
    lab.need(aligned == size, "the kernel found too few huge pages")
    run.physical("From a border on, all of it is huge", aligned, lab.equal(size), "B")
    run.physical(
        "Off the border, a huge page is lost", max(others), lab.at_most(run.huge_page), "B"
    )

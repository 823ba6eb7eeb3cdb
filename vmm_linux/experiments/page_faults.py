"""The cost of the first touch of a page, by the order of touching and the kind of memory."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from vmm_linux import Region
from vmm_linux import experiments as lab

ORDER = 30
TITLE = "Page faults"
QUESTION = "What does the first touch of a page cost, and does it matter which page was before?"
PREDICTION = """
    Each page of private memory faults once, in whatever order pages are touched. The order hardly
    matters for the time of a fault, unless pages are so far apart that each needs a page table of
    its own. Reading shared memory that is filled already faults far less than once a page, for the
    kernel maps the neighbours too. Writing to it faults once a page.
"""
EXPLANATION = """
    A committed page has no memory. The first access traps into the kernel, which finds a page,
    clears it and enters it into the page table: a minor fault, for nothing is read from a disk.
    Most of the time goes into the trap and the clearing, and neither asks which page was touched
    before. Far apart, the kernel must make and clear a page of page table for every fault besides.
    Pages of a memory file that is filled need only be entered, so the kernel enters a window of
    them at each read (fault-around, usually 64 KiB). A write concerns one page alone.
"""

MIB = 1 << 20
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
"""Here and in a folder for each size, ``shmem_enabled`` sets huge pages of shared memory."""
FAULT_AROUND = 64 << 10
"""The default of bytes that a kernel maps around a page that is read."""
COUNT = 512
"""Pages to touch in every order: a gigabyte of addresses where they are far apart."""


class Touched(NamedTuple):
    """Pages that were touched twice: the number of faults, and the seconds of both times."""

    faults: int
    first: float
    again: float


def measure(run: lab.Run) -> None:
    """Touch private memory in every order, then shared memory."""
    with lab.small_pages():
        private(run)
        with run.part("Fault-around"):
            lab.need(
                run.page < FAULT_AROUND, "a page is as large as what the kernel maps around it"
            )
            shared(run, min(run.memory, run.choose(quick=16 * MIB, full=128 * MIB)))


def write(view: memoryview, offsets: Sequence[int]) -> None:
    """Write a byte at each of these."""
    for offset in offsets:
        view[offset] = 1


def read(view: memoryview, offsets: Sequence[int]) -> None:
    """Read a byte at each of these."""
    for offset in offsets:
        view[offset]


def touched(region: Region, offsets: Sequence[int], *, access: str = "write") -> Touched:
    """Touch pages twice; only the first time can fault."""
    go = {"write": write, "read": read}[access]
    with region.view() as view:
        before = lab.minor_faults()
        first = lab.timed(go, view, offsets)
        faults = lab.minor_faults() - before
        return Touched(faults, first, lab.timed(go, view, offsets))


def private(run: lab.Run) -> None:
    """As many pages of private memory, touched in four orders."""
    pages = list(range(0, COUNT * run.page, run.page))
    orders = {
        "upwards": pages,
        "downwards": pages[::-1],
        "at random": run.random.sample(pages, COUNT),
    }
    with run.part("Touched far apart"):
        reach = run.page * (run.page // 8)  # of one page of page-table entries, 8 bytes each
        lab.need(reach <= 2 * MIB, "where pages are large, it takes too many addresses")
        far = list(range(0, COUNT * reach, reach))
        in_fresh_memory(run, far)
        orders["far apart"] = far
    columns = "order | faults | a first touch [µs] | a later one [µs] | a fault [µs]"
    table = run.table(f"{COUNT} private pages", columns)
    tries: dict[str, list[Touched]] = {order: [] for order in orders}
    for _ in run.steps(range(run.choose(quick=15, full=199)), "orders"):
        for order, offsets in orders.items():
            tries[order].append(in_fresh_memory(run, offsets))
    fault = {}
    for order, found in tries.items():
        faults, *times = map(median, zip(*found, strict=True))
        first, again = (seconds / COUNT * 1e6 for seconds in times)
        fault[order] = first - again
        table.add(order, faults, first, again, fault[order])
        run.physical(f"Touched {order}, each page faults once", faults / COUNT, ONCE, PER_PAGE)
    plot = run.plot("Time of a minor page fault", "order", "time [µs]")
    plot.add("fault", list(fault), list(fault.values()))
    ratio = fault["at random"] / fault["upwards"]
    run.timing(
        "At random a fault takes about as long as in order", ratio, lab.at_most(1.25), "times"
    )
    if "far apart" in fault:
        ratio = fault["far apart"] / fault["upwards"]
        run.timing("Far apart it takes longer", ratio, lab.at_least(1.25), "times")


ONCE = lab.between(1, 1.05)
"""The interpreter itself may touch new pages meanwhile."""
PER_PAGE = "faults a page"


def in_fresh_memory(run: lab.Run, offsets: Sequence[int]) -> Touched:
    """Touch these pages of new private memory."""
    with run.vmm.region(max(offsets) + run.page) as region:
        region.commit()
        return touched(region, offsets)


def shared(run: lab.Run, size: int) -> None:
    """Touch an MDL buffer that has all its memory, mapped anew for each access."""
    offsets = run.random.sample(range(0, size, run.page), size // run.page)
    found: dict[str, list[Touched]] = {"read": [], "write": []}
    with run.vmm.mdl(size) as mdl:
        with mdl.map() as filled:
            lab.touch(filled)
        with mdl.map() as fresh:
            touched(fresh, [size // 2], access="read")
            window = lab.resident(fresh.base, size) // run.page
        for access in run.steps(list(found) * run.choose(quick=3, full=9), "shared memory"):
            with mdl.map() as fresh:
                found[access].append(touched(fresh, offsets, access=access))
    columns = "access | faults | a first touch [µs] | a later one [µs]"
    table = run.table(f"{len(offsets)} shared pages that are filled, touched at random", columns)
    per_page = {}
    for access, tries in found.items():
        faults, *times = (median(values) for values in zip(*tries, strict=True))
        per_page[access] = faults / len(offsets)
        table.add(access, faults, *(seconds / len(offsets) * 1e6 for seconds in times))
    run.physical("One read maps several pages", window, lab.at_least(2), "pages")
    run.physical(
        "Reading faults less than once a page", per_page["read"], lab.at_most(0.75), PER_PAGE
    )
    with run.part("Writing to shared memory"):
        lab.need(shared_pages_are_small(), "this kernel gives shared memory huge pages")
        run.physical("Writing faults once a page", per_page["write"], ONCE, PER_PAGE)


def shared_pages_are_small() -> bool:
    """Whether a memory file gets one page at each fault."""
    small = ("[never]", "[deny]", "[advise]")
    modes = [file.read_text(encoding="utf-8") for file in HUGE_PAGES.rglob("shmem_enabled")]
    return all(any(word in mode for word in (*small, "[inherit]")) for mode in modes)

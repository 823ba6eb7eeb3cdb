"""The cost of page tables when few pages of many addresses are used."""

from typing import NamedTuple

from vmm_linux.experiments import Run, at_most, between, equal, need, resident, status

ORDER = 120
TITLE = "A sparse address space"
QUESTION = "What do page tables cost when the pages that are used lie far apart?"
PREDICTION = """
    Addresses alone take no page tables. Pages side by side share theirs, which are a small part of
    what they describe. Of pages so far apart that no two share a table, each takes one, and of
    pages still farther apart each takes two: then the tables take twice the memory of what they
    describe. Decommit and Free give the tables back.
"""
EXPLANATION = """
    The page table is a tree, and the kernel grows it where something is touched. A table of the
    lowest level fills a page and has an entry for each of the next 512 pages (where a page has
    4 KiB): it reaches over 2 MiB; one of the next level over 1 GiB. Pages that are touched close to
    each other share tables; a page that lies alone needs a table of its own at each level that
    nobody near it has grown. That memory is in no mapping and not in RSS: VmPTE in
    /proc/PID/status tells it. So reserve as many addresses as you like, and touch pages close to
    each other.
"""

SLACK = 8
"""Pages of tables that this process may need meanwhile for other reasons."""
STEPS = ("reserved", "touched", "decommitted", "freed")


class Found(NamedTuple):
    """Resident bytes of the pages, and bytes of the page tables after each step."""

    resident: int
    tables: list[int]


def measure(run: Run) -> None:
    """Touch the same number of pages, farther and farther apart, and measure page tables."""
    count = run.choose(quick=256, full=2048)
    reach = run.page * (run.page // 8)  # of a table of the lowest level: an entry has 8 bytes
    next_reach = reach * (run.page // 8)
    distances = [run.page, 16 * run.page, reach // 8, reach, 8 * reach, next_reach]
    found = {run.page: found_at(run, count, run.page)}
    for distance in run.steps(distances[1:], "distances"):
        with run.part(f"Pages {distance >> 10} KiB apart"):
            found[distance] = found_at(run, count, distance)
    show(run, count, found)

    near, pages = found[run.page], count * run.page
    reserved = max(it.tables[0] for it in found.values())
    slack = SLACK * run.page
    run.physical("Every page touched is resident", near.resident, equal(pages), "B")
    run.physical("Addresses alone take no tables", reserved, at_most(slack), "B")
    few = pages // (run.page // 8) + slack
    run.physical("Pages side by side share tables", near.tables[1], at_most(few), "B")
    for distance, times, word in ((reach, 1, "one"), (next_reach, 2, "two")):
        with run.part(f"Pages that take {word} each"):
            need(distance in found, "there are not so many addresses")
            expected = between(times * pages, times * pages + pages // 8 + slack)
            tables = found[distance].tables[1]
            run.physical(f"Pages far apart take {word} each", tables, expected, "B")
    left = [max(it.tables[step] for it in found.values()) for step in (2, 3)]
    run.physical("Decommit gives the tables back", left[0], at_most(slack), "B")
    run.physical("Free gives the tables back", left[1], at_most(slack), "B")


def found_at(run: Run, count: int, distance: int) -> Found:
    """Commit and touch so many pages at this distance, give them back, and measure each time."""
    before = status("VmPTE")
    tables = []

    def record() -> None:
        tables.append(status("VmPTE") - before)

    with run.vmm.region(count * distance) as region:
        record()
        for offset in range(0, len(region), distance):
            region.commit(offset, run.page)
            region.write(b"x", offset)
        record()
        held = sum(
            resident(region.base + offset, run.page) for offset in range(0, len(region), distance)
        )
        region.decommit()
        record()
    record()
    return Found(held, tables)


def show(run: Run, count: int, found: dict[int, Found]) -> None:
    """The table and the plot."""
    title = f"{count} pages touched, and the page tables for them"
    columns = "distance [B] | addresses [B] | resident [B]"
    table = run.table(title, columns, *(f"tables, {step} [B]" for step in STEPS))
    for distance, it in found.items():
        table.add(distance, count * distance, it.resident, *it.tables)
    plot = run.plot(title, "distance from one to the next [B]", "memory [B]", log="x")
    plot.add("pages", list(found), [it.resident for it in found.values()])
    plot.add("page tables", list(found), [it.tables[1] for it in found.values()])

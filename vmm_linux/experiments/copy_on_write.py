"""The copies that fork() makes, and the later ones."""

from collections.abc import Sequence
from multiprocessing.connection import Connection
from statistics import median

from vmm_linux import Region, VmmFlags
from vmm_linux import experiments as lab

ORDER = 70
TITLE = "Copy on write"
QUESTION = "What does fork() copy, and when does the rest of the memory double?"
PREDICTION = """
    fork() copies the page table and not one page: parent and child share all, and each counts half
    of it (PSS). A page is copied when one of the two first writes to it: a page fault each, and
    from then on both have one of their own. So both together take as much more as was written, and
    the parent never sees a change. Whoever is left alone with a page writes to it without a copy.
"""
EXPLANATION = """
    fork() enters the same pages into a second page table and takes the right to write away in both.
    The first write to a page faults, and the kernel looks how many have it: if several, the writer
    gets a copy; if it is the last one, it gets the right to write back, which costs a fault and no
    memory. RSS counts a shared page in full in both processes, so it shows none of this; PSS
    divides a page among those who have it, and private dirty is what is a process's own. The order
    of the writes does not matter: it is pages that are copied, however little is written to them.
    The cost of fork() grows with the page table, and the memory it may cost comes later, page by
    page, when it may be too late to refuse.
"""

MIB = 1 << 20
FLAGS = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
"""Guards keep the kernel from merging the region with its neighbours."""
ENTRY = 8
"""Bytes of a page-table entry."""
FIGURES = {"PSS": "pss", "private dirty": "private_dirty", "shared dirty": "shared_dirty"}


def measure(run: lab.Run) -> None:
    """Fork with touched memory, and let the child write to more and more of it."""
    size = run.fitting(run.choose(quick=16 * MIB, full=256 * MIB), times=2)
    with lab.small_pages(), run.vmm.region(size, FLAGS) as region:
        region.commit()
        fork_with_more(run, region)
        write_after_fork(run, region)


def fork_with_more(run: lab.Run, region: Region) -> None:
    """Touch the region part by part, and fork after each."""
    parts = 4
    part = region.size // parts
    table = run.table(
        "fork() by touched memory", "touched [B] | time [µs] | page tables of the child [B]"
    )
    for number in run.steps(range(parts + 1), "forking"):
        if number:
            lab.touch(region.view((number - 1) * part, part))
        table.add(number * part, forking_time(run) * 1e6, page_tables_after_fork(run))
    plot = run.plot("What fork() costs, before anybody writes", "touched [B]", "time [µs]")
    plot.add("fork()", table.column("touched"), table.column("time"))
    with run.part("fork() copies the page table"):
        tables = region.size // (run.page // ENTRY * run.page)
        lab.need(tables >= 4, "pages are so large that a table or two hold all entries")
        first, *_, last = table.column("page tables of the child")
        # The two at the ends may hold entries of neighbours, and so existed before.
        expected = lab.at_least((tables - 2) * run.page)
        run.physical("fork() copies the page table", last - first, expected, "B")


def forking_time(run: lab.Run) -> float:
    """Seconds, the median of several."""
    times = []
    for _ in range(run.choose(quick=5, full=9)):
        children: list[lab.Child] = []
        times.append(lab.timed(lambda made=children: made.append(run.child(Connection.recv))))
        with children[0]:
            pass
    return median(times)


def page_tables_after_fork(run: lab.Run) -> int:
    """The bytes of a fresh child's page tables."""
    with run.child(Connection.recv) as child:
        return lab.status("VmPTE", child.pid)


def write_after_fork(run: lab.Run, region: Region) -> None:
    """Write in the child and in the parent, and record both after each step."""
    offsets = list(range(0, region.size, run.page))
    run.random.shuffle(offsets)
    pages = len(offsets) // run.choose(quick=4, full=8)
    parts = [offsets[start : start + pages] for start in range(0, len(offsets), pages)]
    columns = [f"{who}: {name}" for who in ("child", "parent") for name in FIGURES]
    table = run.table(
        "What the two have after each step",
        "step",
        *(f"{name} [B]" for name in columns),
        "faults | time of a page [µs]",
    )

    def record(step: str, child: lab.Child | None = None, cost: Sequence[float] = ()) -> None:
        its: Sequence[int | None] = [None] * len(FIGURES)
        if child:
            its = lab.figures(region.base, FIGURES.values(), child.pid)
        ours = lab.figures(region.base, FIGURES.values())
        faults, seconds = cost or (None, None)
        table.add(step, *its, *ours, faults, seconds and seconds / pages * 1e6)

    record("before fork()")
    with run.child(write_on_request, region) as child:
        record("after fork()", child)
        for number, part in enumerate(run.steps(parts, "writing"), 1):
            child.send(part)
            record(f"child wrote {100 * number / len(parts):g} %", child, child.receive())
        changed = sum(byte != 1 for byte in region.view()[:: run.page])
        record("parent wrote to a part", child, written(region, parts[-1]))
        child.send(parts[-1])
        record("child wrote there again", child, child.receive())
    record("child ended")
    claim(run, table, region.size, len(parts), changed)


def write_on_request(connection: Connection, region: Region) -> None:
    """In the child: write on request, and answer with the cost."""
    while True:
        connection.send(written(region, connection.recv()))


def written(region: Region, offsets: Sequence[int]) -> tuple[int, float]:
    """Write a byte at each offset: the page faults, and the seconds."""
    view = region.view()

    def write() -> None:
        for offset in offsets:
            view[offset] = 2

    before = lab.minor_faults()
    seconds = lab.timed(write)
    return lab.minor_faults() - before, seconds


def claim(run: lab.Run, table: lab.Table, size: int, parts: int, changed: int) -> None:
    """Compare with the prediction, a row of the table for each step."""
    fork, last, parents, again, end = 1, 1 + parts, 2 + parts, 3 + parts, 4 + parts
    while_written = slice(fork, last + 1)
    own, shared = table.column("child: private dirty"), table.column("child: shared dirty")
    its, ours = table.column("child: PSS"), table.column("parent: PSS")
    both = [None, *(its[row] + ours[row] for row in range(fork, end))]
    to_write = [size * part // parts for part in range(parts + 1)]
    series = {"both: PSS": both, "child: PSS": its, "private dirty": own, "shared dirty": shared}
    plot = run.plot("While the child writes", "written [B]", "memory [B]")
    for label, values in series.items():
        plot.add(label, to_write, values[while_written])

    run.physical("After fork() all pages are shared", shared[fork], lab.equal(size), "B")
    run.physical("Each of the two counts half of them", its[fork], lab.equal(size // 2), "B")
    off = sum(abs(is_ - was) for is_, was in zip(own[while_written], to_write, strict=True))
    run.physical("At every step the child owns just what it wrote to", off, lab.equal(0), "B off")
    more = (both[last] - both[fork]) / size
    run.physical("Both together grow by what is written", more, lab.between(0.99, 1.01), "of it")
    pages = size // run.page / parts
    faults, times = table.column("faults"), table.column("time of a page")
    firsts = sum(faults[fork + 1 : last + 1]) / (pages * parts)
    run.physical("A page's first write is a fault", firsts, lab.between(1, 1.1), "a page")
    run.physical("The parent sees no change", changed, lab.equal(0), "pages")
    run.physical(
        "The last owner's write faults", faults[parents] / pages, lab.at_least(1), "a page"
    )
    run.physical("It copies nothing", both[parents] - both[last], lab.equal(0), "B more")
    run.physical("Another write does not fault", faults[again] / pages, lab.at_most(0.1), "a page")
    run.physical("When the child is gone the parent has all of it", ours[end], lab.equal(size), "B")
    copying = median(times[fork + 1 : last + 1])
    run.timing(
        "A copy costs far more than a write", copying / times[again], lab.at_least(3), "times"
    )
    fault = copying / times[parents]
    run.timing("A copy costs more than a fault without one", fault, lab.at_least(1.2), "times")

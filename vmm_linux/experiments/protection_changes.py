"""The cost of a change of protection, alone and while other cores use the same memory."""

import contextlib
import ctypes
import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import NamedTuple

from vmm_linux import Region, VmmFlags
from vmm_linux.experiments import NotObservable, Run, at_least, at_most, equal, need, touch

ORDER = 100
TITLE = "Protection changes"
QUESTION = "What does a change of protection cost while other threads run on other cores?"
PREDICTION = """
    A change is in force in all threads when it returns: one that writes without pause is stopped.
    So to take a right away, the kernel must interrupt each core that runs a thread of this process,
    which takes several times as long (a TLB shootdown). Nobody is interrupted for busy processes
    on those cores, nor for pages that were never touched.
"""
EXPLANATION = """
    Each core keeps translations of addresses, with their rights, in a buffer of its own, the TLB.
    A right that is taken away in the page table still holds there; so the core that takes it
    interrupts the others that run the same address space, and waits until each has dropped the
    translation. Other processes have other address spaces and need not be asked, however busy they
    are; a page that was never touched is in no TLB. A right that is given back could go without: a
    core that knows of too few rights would fault and look again; yet where the kernel changes the
    page's entry at once, it tells the others too. ARM's processors and the newest of AMD's tell
    each other without an interrupt, which is cheaper, and not free. A program with many threads
    should therefore change protection seldom, and of many pages at once. The times are those of the
    moments when the threads were on their cores.
"""

READ, WRITE = VmmFlags.READ, VmmFlags.WRITE
PAGES = 64
FEW = 0.2
"""Interrupts a page: fewer are caused by other processes."""
ALONE, PROCESSES = "nobody", "processes"

Company = dict[str, contextlib.AbstractContextManager[object]]


class Cost(NamedTuple):
    """The cost of one change of one page."""

    microseconds: float
    interrupts: float | None


def measure(run: Run) -> None:
    """Remove a right and restore it, page by page, while other cores run."""
    with run.child(write_and_forbid, run) as child:
        ended = child.ended()
    run.physical("A thread that writes is stopped by the change", ended, equal("by SIGSEGV"))
    first, *others = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {first})
    company: Company = {ALONE: contextlib.nullcontext()}
    if others:
        company |= company_on(run, others)
    costs = {}
    for name, present in run.steps(list(company.items()), "in company"):
        with present:
            taken, given = costs_of(run, touched=True)
            if name not in {ALONE, PROCESSES}:
                taken, given = when_interrupted(taken), when_interrupted(given)
            untouched, _ = costs_of(run, touched=False)
            costs[name] = [middle(taken), middle(given), middle(untouched)]
    show(run, costs)
    with run.part("Threads on other cores"):
        run.need_cores(2)
        claim(run, costs)


def costs_of(run: Run, *, touched: bool) -> tuple[list[Cost], list[Cost]]:
    """The costs of removing the right to write, and of restoring it, again and again."""
    taken, given = [], []
    with run.vmm.region(PAGES * run.page) as region:
        region.commit()
        end = time.monotonic() + run.choose(quick=0.15, full=2)
        while time.monotonic() < end:
            if touched:
                touch(region)
            taken.append(change(region, READ, run.page))
            given.append(change(region, READ | WRITE, run.page))
    return taken, given


def change(region: Region, rights: VmmFlags, page: int) -> Cost:
    """Change the protection of each page by itself."""
    before = shootdowns()
    begin = time.perf_counter_ns()
    for offset in range(0, len(region), page):
        region.protect(rights, offset, page)
    nanoseconds = time.perf_counter_ns() - begin
    after = shootdowns()
    interrupts = None if before is None or after is None else (after - before) / PAGES
    return Cost(nanoseconds / 1e3 / PAGES, interrupts)


def when_interrupted(costs: list[Cost]) -> list[Cost]:
    """The costs of rounds that interrupted other cores, or all if there were none.

    On a busy machine a thread is on its core only now and then.
    """
    most = max(cost.interrupts or 0 for cost in costs)
    enough = most / 2 if most >= FEW else 0
    return [cost for cost in costs if (cost.interrupts or 0) >= enough]


def middle(costs: list[Cost]) -> Cost:
    """The medians."""
    counted = [cost.interrupts for cost in costs if cost.interrupts is not None]
    return Cost(median(cost.microseconds for cost in costs), median(counted) if counted else None)


def shootdowns() -> int | None:
    """TLB shootdowns of all cores so far, of all processes; None where none are counted."""
    for line in Path("/proc/interrupts").read_text().splitlines():
        label, *cells = line.split()
        if label == "TLB:":
            return sum(int(cell) for cell in cells if cell.isdigit())
    return None


def company_on(run: Run, cores: list[int]) -> Company:
    """The company on other cores: other processes, and 1, 2, 4, ... threads of this one."""
    powers = {1 << n for n in range(len(cores).bit_length())}
    counts = run.choose(quick={1}, full=powers) | {len(cores)}
    return {
        PROCESSES: processes_on(run, cores),
        **{f"threads: {count}": threads_on(cores[:count]) for count in sorted(counts)},
    }


@contextlib.contextmanager
def processes_on(run: Run, cores: list[int]) -> Iterator[None]:
    """A busy process on each core."""
    with contextlib.ExitStack() as children:
        for core in cores:
            children.enter_context(run.child(busy_process, core)).receive()
        yield


def busy_process(connection: Connection, core: int) -> None:
    """Keep a core busy until killed."""
    os.sched_setaffinity(0, {core})
    connection.send("here")
    while True:
        work()


@contextlib.contextmanager
def threads_on(cores: list[int]) -> Iterator[None]:
    """A busy thread on each core."""
    stop = threading.Event()
    here = threading.Semaphore(0)

    def busy(core: int) -> None:
        os.sched_setaffinity(0, {core})  # of this thread alone
        here.release()
        while not stop.is_set():
            work()

    threads = [threading.Thread(target=busy, args=[core]) for core in cores]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # a thread that waits for the interpreter runs on no core
    try:
        for thread in threads:
            thread.start()
            here.acquire()
        yield
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()


def work() -> None:
    """Compute for some milliseconds, without the interpreter."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 20_000)


def write_and_forbid(connection: Connection, run: Run) -> None:
    """In a process of its own: one thread writes, by the raw address, and another forbids it."""
    del connection
    region = run.vmm.region(run.page, READ | WRITE | VmmFlags.COMMIT)
    here = threading.Semaphore(0)

    def write() -> None:
        for _ in range(1_000_000):
            ctypes.memset(region.base, 1, run.page)
            here.release()

    writer = threading.Thread(target=write)
    writer.start()
    here.acquire()
    region.protect(READ)
    writer.join()


def show(run: Run, costs: dict[str, list[Cost]]) -> None:
    """The table and the plot."""
    what = ("taken away", "given back", "never touched")
    table = run.table(
        "The right to write, taken from a page, given back, and taken from one never touched",
        "on the other cores",
        *(f"{name} [µs]" for name in what),
        *(f"interrupts, {name}" for name in what),
    )
    for name, row in costs.items():
        counts = (cost.interrupts for cost in row)
        table.add(name, *(cost.microseconds for cost in row), *counts)
    plot = run.plot(
        "What a change of protection costs", "on the other cores", "time for a page [µs]"
    )
    plot.add_columns(table, "on the other cores", *what)


def claim(run: Run, costs: dict[str, list[Cost]]) -> None:
    """Compare with the prediction."""
    alone, processes, threads = costs[ALONE], costs[PROCESSES], list(costs.values())[-1]
    ratio = threads[0].microseconds / alone[0].microseconds
    run.timing("Threads on other cores make it dearer to take a right", ratio, at_least(2), "times")
    ratio = processes[0].microseconds / alone[0].microseconds
    run.timing("Processes there do not", ratio, at_most(1.5), "times")
    ratio = threads[2].microseconds / alone[2].microseconds
    run.timing("Threads do not where nothing was touched", ratio, at_most(1.5), "times")
    with run.part("Interrupts of other cores"):
        counts = threads[0].interrupts
        if counts is None:
            raise NotObservable("this kernel counts no TLB shootdowns in /proc/interrupts")
        need(
            counts >= FEW or must_interrupt(),
            "the kernel counts none: hypervisors and newer processors tell other cores in their own"
            " way, and on a busy machine the threads were hardly there",
        )
        run.physical("Taking a right interrupts them", counts, at_least(FEW), "for a page")
        # The kernel counts other processes' interrupts too.
        few = at_most(counts / 2)
        run.physical(
            "Processes there are not interrupted", processes[0].interrupts, few, "for a page"
        )
        run.physical("For pages never touched nobody is", threads[2].interrupts, few, "for a page")


def must_interrupt() -> bool:
    """Whether this machine must interrupt its other cores, and has them free."""
    free = os.getloadavg()[0] < (os.cpu_count() or 1)
    flags = Path("/proc/cpuinfo").read_text().partition("flags\t")[2].partition("\n")[0].split()
    return free and bool(flags) and not {"hypervisor", "invlpgb"} & {*flags}

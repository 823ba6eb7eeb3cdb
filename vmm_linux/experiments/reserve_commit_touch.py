"""The cost of reserving, committing and touching memory, in time and in memory."""

import time
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from vmm_linux.experiments import Run, at_least, at_most, charged, equal, resident, timed, touch

ORDER = 10
TITLE = "Reserve, commit, touch"
QUESTION = "What do addresses, a promise of memory, and memory cost, over sizes up to 64 GiB?"
PREDICTION = """
    Reserving takes addresses alone: nothing becomes resident, nothing is charged, and 64 GiB cost
    what a page costs. Committing is a promise: it is charged, still nothing is resident, and the
    size hardly matters. Touching takes the memory: every page becomes resident, each costs a page
    fault, and the time grows with the size.
"""
EXPLANATION = """
    A reserved region is one entry in the kernel's list of mappings, whatever its size. A commit
    changes that entry, and the kernel adds the size to what it has promised to all processes; no
    page of memory moves. The first write to a page faults: the kernel finds a page, clears it and
    enters it into the page table. That is work for each page, so only touching is linear in the
    size. Programs may therefore reserve generously, commit what they will need, and pay for what
    they use.
"""

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
STEPS = ("reserve", "commit", "touch")


class Cost(NamedTuple):
    """The cost of one size, after each step: seconds, and bytes as the kernel counts them."""

    seconds: list[float]
    resident: list[int]
    charged: list[int]


def measure(run: Run) -> None:
    """Make the three steps with regions of many sizes, and measure after each."""
    limit = min(run.memory // 2, run.choose(quick=32 * MIB, full=GIB))
    sizes = [run.page, 64 * KIB, MIB, 16 * MIB, 256 * MIB, GIB, 8 * GIB, 64 * GIB]
    costs = {}
    for size in run.steps(sizes, "sizes"):
        costs[size] = cost_of(run, size, STEPS if size <= limit else STEPS[:1])

    time = run.table("Time of each step", "size [B]", *(f"{s} [µs]" for s in STEPS))
    counted = [f"{what} after {s} [B]" for what in ("resident", "charged") for s in STEPS]
    memory = run.table("Memory after each step", "size [B]", *counted)
    for size, cost in costs.items():
        blank = [None] * (len(STEPS) - len(cost.seconds))
        time.add(size, *(seconds * 1e6 for seconds in cost.seconds), *blank)
        memory.add(size, *cost.resident, *blank, *cost.charged, *blank)

    plot = run.plot("What each step costs", "size [B]", "time [µs]", log="xy")
    for number, step in enumerate(STEPS):
        done = {size: cost for size, cost in costs.items() if number < len(cost.seconds)}
        plot.add(step, list(done), [cost.seconds[number] * 1e6 for cost in done.values()])
    claim(run, costs)


def cost_of(run: Run, size: int, steps: Sequence[str]) -> Cost:
    """The cost of these steps, the time as the median of several tries."""
    tries = [tried(run, size, steps) for _ in range(run.choose(quick=3, full=9))]
    times = zip(*(cost.seconds for cost in tries), strict=True)
    return tries[-1]._replace(seconds=[median(each) for each in times])


def tried(run: Run, size: int, steps: Sequence[str]) -> Cost:
    """The cost of these steps, once."""
    cost = Cost([], [], [])
    begin = time.perf_counter()
    with run.vmm.region(size) as region:
        reserving = time.perf_counter() - begin
        seconds_of = {
            "reserve": lambda: reserving,
            "commit": lambda: timed(region.commit),
            "touch": lambda: timed(touch, region),
        }
        for step in steps:
            cost.seconds.append(seconds_of[step]())
            cost.resident.append(resident(region.base, size))
            cost.charged.append(charged(region))
    return cost


def claim(run: Run, costs: dict[int, Cost]) -> None:
    """Compare with the prediction."""
    huge = costs[64 * GIB]
    run.physical("64 GiB reserved have nothing resident", huge.resident[0], equal(0), "B")
    run.physical("64 GiB reserved are not charged", huge.charged[0], equal(0), "B")
    size, cost = max((size, cost) for size, cost in costs.items() if len(cost.seconds) == 3)
    run.physical("The largest commit has nothing resident", cost.resident[1], equal(0), "B")
    run.physical("It is charged as a whole", cost.charged[1], equal(size), "B")
    run.physical("Touched, all of it is resident", cost.resident[2], equal(size), "B")
    times = huge.seconds[0] / costs[run.page].seconds[0]
    run.timing("64 GiB are reserved in about the time of a page", times, at_most(10), "times")
    times = cost.seconds[2] / cost.seconds[1]
    run.timing("Touching costs far more than committing", times, at_least(10), "times")

"""Benchmarks of queries of a process's own memory, with few mappings and with many."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.harness import US, Contestant, at_most, benchmark, loop
from benchmarks.memory import LIBC, PAGE, RESERVED, SIZE, number_of_mappings
from vmm_linux import VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from benchmarks.harness import Baseline, Stage

MANY: Final = 60_000
"""Below the usual vm.max_map_count of 65,530."""
SOME: Final = 1_000
AMONG_MANY: Final = f", {MANY:,} mappings"


@contextlib.contextmanager
def mappings_up_to(total: int, baseline: Baseline) -> Generator[None]:
    """Give this process so many mappings, below all that it has."""
    count = (total - number_of_mappings()) // 2
    base = baseline.call("make_islands", count) & (1 << 64) - 1
    if base == (1 << 64) - 1:
        raise MemoryError(f"vm.max_map_count allows no {total:,} mappings")
    try:
        yield
    finally:
        LIBC.munmap(base, 2 * count * PAGE)


def committed_page(stage: Stage) -> tuple[int, Callable[..., object]]:
    """The address of a page in the middle of a region, and the ``query`` of its VMM."""
    vmm = stage.vmm()
    va = vmm.allocate(0, SIZE, RESERVED | VmmFlags.COMMIT)
    return va + SIZE // 2, vmm.query


def range_of(line: str) -> tuple[int, int]:
    """Where the mapping of a line of maps or smaps starts and ends."""
    start, _, end = line.partition(" ")[0].partition("-")
    return int(start, 16), int(end, 16)


def line_of_maps(va: int) -> list[str]:
    """The fields of a mapping's line in maps, by plain Python."""
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            start, end = range_of(line)
            if start <= va < end:
                return line.split()
    return []


def record_of_smaps(va: int) -> dict[str, str]:
    """A mapping's record in smaps, by plain Python."""
    record: dict[str, str] = {}
    with Path("/proc/self/smaps").open() as smaps:
        for line in smaps:
            if "A" <= line[0] <= "Z":
                if record:
                    name, _, value = line.partition(":")
                    record[name] = value.strip()
                continue
            if record:
                break
            start, end = range_of(line)
            if start <= va < end:
                record["mapping"] = line
    return record


def among_few_and_many(stage: Stage, va: int, ours: Contestant) -> dict[str, Contestant]:
    """A question about an address, by C's ioctl and ours, beside few mappings and 60,000."""

    def by_python(count: int) -> None:
        for _ in range(count):
            line_of_maps(va)

    def among_many(contestant: Contestant) -> Contestant:
        def measure(count: int) -> float:
            with mappings_up_to(MANY, stage.baseline):
                return contestant.measure(count)

        return Contestant(measure)

    in_c = stage.in_c("query_mapping", va)
    return {
        "C": in_c,
        US: ours,
        f"C{AMONG_MANY}": among_many(in_c),
        f"{US}{AMONG_MANY}": among_many(ours),
        "Python reading maps": loop(by_python),
    }


@benchmark(
    "query(va, smaps=False)",
    at_most(6),
    at_most(6, f"C{AMONG_MANY}", ours=f"{US}{AMONG_MANY}"),
    at_most(1.3, US, ours=f"{US}{AMONG_MANY}"),
    rarely=20,
)
def query_page(stage: Stage) -> dict[str, Contestant]:
    """C calls only PROCMAP_QUERY."""
    va, query = committed_page(stage)

    def ours(count: int) -> None:
        for _ in range(count):
            query(va, False)

    return among_few_and_many(stage, va, loop(ours))


@benchmark(f"query(va), above {SOME:,} mappings", at_most(1.15))
def query_record(stage: Stage) -> dict[str, Contestant]:
    """C reads smaps up to the end of the mapping's record; psutil reads all of it."""
    va, query = committed_page(stage)
    stage.enter_context(mappings_up_to(SOME, stage.baseline))

    def ours(count: int) -> None:
        for _ in range(count):
            query(va)

    def by_python(count: int) -> None:
        for _ in range(count):
            record_of_smaps(va)

    contestants = {
        "C": stage.in_c("read_smaps_up_to", va),
        US: loop(ours),
        "Python reading smaps": loop(by_python),
    }
    if psutil := stage.peer("psutil"):
        process = psutil.Process(os.getpid())

        def by_psutil(count: int) -> None:
            for _ in range(count):
                process.memory_maps(grouped=False)

        contestants["psutil"] = loop(by_psutil)
    return contestants

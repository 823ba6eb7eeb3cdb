"""Benchmarks of inspection: all mappings, one of them, pages."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.harness import US, Contestant, at_most, benchmark, faster, loop
from benchmarks.memory import SIZE
from benchmarks.queries import AMONG_MANY, MANY, SOME, among_few_and_many, mappings_up_to
from vmm_linux import inspect
from vmm_linux._core.procfs import parse_smaps

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Stage

MORE: Final = 10_000
GIBIBYTE: Final = 1 << 30
STRETCH: Final = 1 << 20
"""Written to and left alone in turns."""


def again(work: Callable[[], object]) -> Contestant:
    """A contestant that repeats one call."""

    def repeat(count: int) -> None:
        for _ in range(count):
            work()

    return loop(repeat)


def snapshots_of(stage: Stage, mappings: int) -> dict[str, Contestant]:
    """C reads smaps to its end without parsing it."""
    stage.enter_context(mappings_up_to(mappings, stage.baseline))

    def look_at_all() -> int:
        return sum(mapping.rss or 0 for mapping in inspect.snapshot())

    contestants = {
        "C": stage.in_c("read_smaps"),
        US: again(inspect.snapshot),
        f"{US}, every mapping looked at": again(look_at_all),
    }
    if psutil := stage.peer("psutil"):
        process = psutil.Process(os.getpid())
        contestants["psutil"] = again(lambda: process.memory_maps(grouped=False))
    return contestants


@benchmark(f"snapshot(), {SOME:,} mappings", at_most(1.35), faster(6, "psutil"), rarely=3)
def snapshot_of_some(stage: Stage) -> dict[str, Contestant]:
    """With the data of psutil's ``memory_maps(grouped=False)``, and more."""
    return snapshots_of(stage, SOME)


@benchmark(f"snapshot(), {MORE:,} mappings", at_most(1.35), faster(7, "psutil"), rarely=20)
def snapshot_of_more(stage: Stage) -> dict[str, Contestant]:
    """As before."""
    return snapshots_of(stage, MORE)


@benchmark(f"maps(), {SOME:,} mappings", at_most(1.5))
def maps_of_some(stage: Stage) -> dict[str, Contestant]:
    """C reads maps to its end without parsing it."""
    stage.enter_context(mappings_up_to(SOME, stage.baseline))
    return {
        "C": stage.in_c("read_maps"),
        US: again(inspect.maps),
        f"{US}, every mapping looked at": again(lambda: [m.start for m in inspect.maps()]),
    }


@benchmark(
    "at(va)",
    at_most(4),
    at_most(4, f"C{AMONG_MANY}", ours=f"{US}{AMONG_MANY}"),
    at_most(1.3, US, ours=f"{US}{AMONG_MANY}"),
    rarely=20,
)
def mapping_at_address(stage: Stage) -> dict[str, Contestant]:
    """C asks PROCMAP_QUERY, without the mapping's name, and nothing else."""
    memory = stage.enter_context(mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE))
    va = address_of(memory)
    stage.callback(inspect.close_files)

    def ours(count: int) -> None:
        at = inspect.at
        for _ in range(count):
            at(va)

    return among_few_and_many(stage, va, loop(ours))


@benchmark("pages() over 1 GiB", at_most(1.2), rarely=3)
def pages_of_gibibyte(stage: Stage) -> dict[str, Contestant]:
    """A mebibyte with memory and one without in turns; C does PAGEMAP_SCAN."""
    memory = stage.enter_context(mmap.mmap(-1, GIBIBYTE, mmap.MAP_PRIVATE))
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    va = address_of(memory)
    for offset in range(0, GIBIBYTE, 2 * STRETCH):
        memory[offset : offset + STRETCH] = b"\1" * STRETCH
    return {
        "C": stage.in_c("scan_pages", va, GIBIBYTE),
        US: again(lambda: inspect.pages(va, GIBIBYTE)),
        f"{US}, exclusive": again(lambda: inspect.pages(va, GIBIBYTE, exclusive=True)),
    }


@benchmark(
    f"memory for reading {MANY:,} mappings, beside them",
    at_most(1024, None),
    unit="KiB",
    rarely=200,
)
def memory_of_snapshot(stage: Stage) -> dict[str, Contestant]:
    """The peak of resident memory during the reading, less the resident memory afterwards."""

    def measure(read: Callable[[], object]) -> float:
        with mappings_up_to(MANY, stage.baseline):
            # Memory that was free before must not hide any.
            stage.baseline.call("give_back_heap")
            Path("/proc/self/clear_refs").write_text("5")
            made = read()
            status = memory_in_status()
            del made
            # None at all is told as the least that there is.
            return max(status["VmHWM"] - status["VmRSS"], 1)

    return {
        US: Contestant(lambda _: measure(inspect.snapshot), 1),
        f"{US}, of all the text": Contestant(
            lambda _: measure(lambda: parse_smaps(Path("/proc/self/smaps").read_bytes())), 1
        ),
    }


def memory_in_status() -> dict[str, int]:
    """The figures of ``/proc/self/status`` in KiB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {
        words[0].rstrip(":"): int(words[1])
        for words in lines
        if len(words) == 3 and words[2] == "kB"
    }


def address_of(memory: mmap.mmap) -> int:
    """Where a private mapping begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))

"""Benchmarks of the import of the package, each in an interpreter of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

import vmm_linux
from benchmarks.harness import US, Contestant, at_most, benchmark

if TYPE_CHECKING:
    from benchmarks.harness import Stage

#: So that an interpreter finds this very package, after whatever else it looks at.
FIND_IT: Final = f"import sys; sys.path.append({str(Path(vmm_linux.__file__).parents[1])!r})\n"
#: Write how many mappings more there are after the import.
COUNT: Final = """
count = lambda: open("/proc/self/maps", "rb").read().count(b"\\n")
before = count()
import vmm_linux
print(count() - before)
"""


def interpret(code: str) -> bytes:
    """What code prints in an isolated interpreter; its modules' compiled files are used."""
    return subprocess.check_output([sys.executable, "-I", "-c", FIND_IT + code])


def whole_interpreter(code: str) -> Contestant:
    """An interpreter from its start to its end."""

    def measure(count: int) -> float:
        start = perf_counter_ns()
        for _ in range(count):
            interpret(code)
        return perf_counter_ns() - start

    return Contestant(measure, 1)


@benchmark("import, the whole interpreter", at_most(1.0, "multiprocessing.shared_memory"), rarely=4)
def import_time(_stage: Stage) -> dict[str, Contestant]:
    """The package beside what Python has for shared memory; Python alone to compare."""
    return {
        "Python alone": whole_interpreter(""),
        US: whole_interpreter("import vmm_linux"),
        "multiprocessing.shared_memory": whole_interpreter("import multiprocessing.shared_memory"),
    }


@benchmark("mappings more after the import", at_most(60, None), unit="", rarely=40)
def import_mappings(_stage: Stage) -> dict[str, Contestant]:
    """The lines of /proc/self/maps, before and after."""
    return {US: Contestant(lambda count: sum(int(interpret(COUNT)) for _ in range(count)), 1)}

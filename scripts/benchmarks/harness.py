"""The benchmarks of scripts/bench: their form, their measurement, and their results.

A benchmark is a function that prepares and returns its contestants; ``benchmark`` enters it in the
list, with its targets. In every round each contestant has one turn, so that a machine whose speed
drifts is as fast or as slow for all of them; ratios are taken inside a round.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from socket import socketpair
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final, NoReturn

from vmm_linux import VMM

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence
    from multiprocessing.context import ForkProcess
    from socket import socket
    from types import ModuleType

SOURCE: Final = Path(__file__).resolve().with_name("baseline.c")
US: Final = "vmm_linux"
FORK: Final = get_context("fork")
PATIENCE: Final = 10
"""Seconds that a child may take to end after its socket is closed."""
TURN: Final = 2_000_000
"""Nanoseconds of a turn: less than a time slice of a busy system."""
FEWEST_ROUNDS: Final = 3
"""Even what is measured rarely gets so many rounds, if that many were asked for."""


class CannotMeasureError(Exception):
    """Nothing can be measured here; the text has the reason."""


# ---- the C baseline -----------------------------------------------------------------------------


class Baseline:
    """The functions of ``baseline.c``, compiled for this run."""

    def __init__(self) -> None:
        compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
        if compiler is None:
            raise CannotMeasureError("no C compiler (Debian: apt-get install gcc)")
        with tempfile.TemporaryDirectory(prefix="vmm-linux-bench-") as folder:
            library = Path(folder, "baseline.so")
            command = [*compiler.split(), "-O2", "-shared", "-fPIC", "-o", str(library)]
            built = subprocess.run(
                [*command, str(SOURCE)], check=False, capture_output=True, text=True
            )
            if built.returncode != 0:
                raise CannotMeasureError(f"the C baseline does not compile\n{built.stderr}")
            self._library = ctypes.CDLL(str(library))

    def call(self, name: str, *arguments: int) -> int:
        """Call a function; ``OSError`` where it returns -errno."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        result = int(function(*map(ctypes.c_int64, arguments)))
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result), name)
        return result


# ---- targets ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A target of this package, for a ratio or a number."""

    limit: float
    ours: str
    other: str | None
    speedup: bool = False
    """Whether the ratio is how many times faster ours is than the other: at least the limit."""

    def value(self, figures: Mapping[str, float]) -> float:
        """What to compare with the limit, of one round."""
        if self.other is None:
            return figures[self.ours]
        if self.speedup:
            return figures[self.other] / figures[self.ours]
        return figures[self.ours] / figures[self.other]

    def is_met_by(self, value: float) -> bool:
        """Whether a value is on the right side of the limit."""
        return value >= self.limit if self.speedup else value <= self.limit

    def __str__(self) -> str:
        who = "" if self.ours == US else f"{self.ours.removeprefix(US).lstrip(', ')}: "
        if self.other is None:
            return f"{who}≤ {self.limit:g}"
        if self.speedup:
            return f"{who}≥ {self.limit:g} × faster than {self.other}"
        return f"{who}≤ {self.limit:g} × {self.other}"


def at_most(limit: float, other: str | None = "C", *, ours: str = US) -> Target:
    """Ours takes at most so many times as long as the other; without another: at most so much."""
    return Target(limit, ours, other)


def faster(limit: float, other: str, *, ours: str = US) -> Target:
    """Ours is at least so many times faster than the other."""
    return Target(limit, ours, other, speedup=True)


# ---- benchmarks ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """One way to do a benchmark's work."""

    measure: Callable[[int], float]
    """Does the work so many times: the nanoseconds that took, or another sum."""
    count: int | None = None
    """How often the work is done in a turn; None: as often as fits into one."""


@dataclass(frozen=True)
class Benchmark:
    """Work that is done in several ways, with its targets."""

    name: str
    title: str
    targets: Sequence[Target]
    prepare: Callable[[Stage], dict[str, Contestant]]
    unit: str
    """Of what ``Contestant.measure`` returns for one piece of work."""
    rarely: int
    """How many times fewer rounds this gets than others, because a turn takes so long."""
    apart: bool
    """Whether children have another CPU than their parent."""


BENCHMARKS: Final[dict[str, Benchmark]] = {}


def benchmark(
    title: str, *targets: Target, unit: str = "ns", rarely: int = 1, apart: bool = False
) -> Callable[[Callable[[Stage], dict[str, Contestant]]], None]:
    """Enter the decorated function in the list of benchmarks, by its name."""

    def enter(prepare: Callable[[Stage], dict[str, Contestant]]) -> None:
        name = prepare.__name__.replace("_", "-")
        BENCHMARKS[name] = Benchmark(name, title, targets, prepare, unit, rarely, apart)

    return enter


def loop(work: Callable[[int], object]) -> Contestant:
    """A contestant with all its work in a loop."""

    def measure(count: int) -> float:
        start = perf_counter_ns()
        work(count)
        return perf_counter_ns() - start

    return Contestant(measure)


class Stage(contextlib.ExitStack):
    """The resources of a benchmark, all released at the end."""

    def __init__(self, baseline: Baseline, cpu_of_children: int) -> None:
        super().__init__()
        self.baseline = baseline
        self.cpu_of_children = cpu_of_children
        self.left_out: dict[str, str] = {}
        """Contestants that cannot take part, with the reasons."""

    def vmm(self) -> VMM:
        """An open VMM."""
        return self.enter_context(VMM())

    def in_c(self, function: str, *arguments: int, count: int | None = None) -> Contestant:
        """A function of the baseline as a contestant."""
        return Contestant(lambda times: self.baseline.call(function, times, *arguments), count)

    def peer(self, module: str) -> ModuleType | None:
        """An optional module; without it the peer is reported as left out."""
        try:
            return importlib.import_module(module)
        except ImportError:
            self.left_out[module] = "not installed"
            return None

    def child(self, serve: Callable[..., object], *arguments: object) -> socket:
        """A forked child that serves its end of a socket until ours is closed: our end."""
        ours, theirs = socketpair()
        process = FORK.Process(
            target=live_as_child,
            args=(self, os.getpid(), ours, serve, theirs, *arguments),
            daemon=True,
        )
        process.start()
        theirs.close()
        self.callback(end_child, ours, process)
        return ours


def live_as_child(
    stage: Stage,
    parent: int,
    ours: socket,
    serve: Callable[..., object],
    *arguments: object,
) -> None:
    """The work of a child, which ends with its parent at the latest."""
    stage.baseline.call("die_with_parent", parent)
    os.sched_setaffinity(0, {stage.cpu_of_children})
    ours.close()
    serve(*arguments)


def end_child(ours: socket, process: ForkProcess) -> None:
    """Close the socket of a child, and wait for its end."""
    ours.close()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    process.close()


# ---- one benchmark ------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The measurements of one benchmark."""

    benchmark: Benchmark
    left_out: dict[str, str]
    rounds: list[dict[str, float]] = field(default_factory=list)
    """Of each round: the cost of one piece of work for each contestant."""

    def figures(self, contestant: str) -> Spread:
        """The costs of one piece of work for a contestant."""
        return Spread.of([figures[contestant] for figures in self.rounds])

    def ratio(self, target: Target) -> Spread | None:
        """The ratio of a target; None where one of its contestants was left out."""
        if not {target.ours, target.other} - {None} <= self.rounds[0].keys():
            return None
        return Spread.of([target.value(figures) for figures in self.rounds])


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def run(entry: Benchmark, baseline: Baseline, rounds: int) -> Outcome:
    """Measure one benchmark."""
    allowed = os.sched_getaffinity(0)
    cpu = min(allowed) if entry.apart else max(allowed)
    with Stage(baseline, cpu) as stage, undisturbed():
        contestants = entry.prepare(stage)
        counts = {}
        for name, contestant in contestants.items():
            try:
                counts[name] = warm_up(contestant)
            except (OSError, MemoryError, NotImplementedError) as problem:
                stage.left_out[name] = str(problem)
        outcome = Outcome(entry, stage.left_out)
        for number in range(max(min(FEWEST_ROUNDS, rounds), rounds // entry.rarely)):
            # Forwards and backwards: no contestant always follows the same one.
            order = list(counts) if number % 2 == 0 else list(reversed(counts))
            taken = {name: contestants[name].measure(counts[name]) for name in order}
            outcome.rounds.append({name: taken[name] / counts[name] for name in counts})
        return outcome


def warm_up(contestant: Contestant) -> int:
    """Run a contestant untimed, and return the repetitions of its work in a turn."""
    contestant.measure(contestant.count or 1)
    if contestant.count is not None:
        return contestant.count
    count = 1
    # The best of some: a slow moment now would make every turn too short.
    while (taken := min(contestant.measure(count) for _ in range(5))) < TURN / 4:
        count *= 4
    return max(1, round(count * TURN / taken))


@contextlib.contextmanager
def undisturbed() -> Generator[None]:
    """No garbage collection, and always the same CPU."""
    allowed = os.sched_getaffinity(0)
    gc.collect()
    gc.disable()
    try:
        os.sched_setaffinity(0, {max(allowed)})
        yield
    finally:
        os.sched_setaffinity(0, allowed)
        gc.enable()


def peer_is_gone() -> NoReturn:
    """The error of a child that does not answer."""
    raise CannotMeasureError("a child process ended too early")


def facts_about(machine: os.uname_result) -> dict[str, Any]:
    """The facts that results depend on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "kernel": machine.release,
        "architecture": machine.machine,
        "cpu": models[0] if models else "",
        "cpus": os.cpu_count(),
        "page_size": os.sysconf("SC_PAGE_SIZE"),
        "max_map_count": int(Path("/proc/sys/vm/max_map_count").read_text()),
    }

"""The tools of an experiment, in the process of its run."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
import time
import traceback
from multiprocessing import Pipe
from typing import TYPE_CHECKING, Any, Self, TypeVar

from vmm_linux import VMM, inspect
from vmm_linux._core.kernel import Feature, huge_page_size, page_size, state
from vmm_linux._tools.children import die_with_parent
from vmm_linux.errors import OutOfMemory, QuotaExceeded
from vmm_linux.experiments._framework.results import (
    Axis,
    Claim,
    Column,
    Expected,
    Findings,
    Kind,
    NotObservable,
    Outcome,
    Plot,
    Table,
    Value,
    need,
    sound,
)
from vmm_linux.experiments._framework.system import libc
from vmm_linux.inspect import PageFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from multiprocessing.connection import Connection

    from vmm_linux import Region

REFUSALS = (NotObservable, QuotaExceeded, OutOfMemory)
"""The errors that make an experiment or a part of it not observable."""
PR_SET_THP_DISABLE, PR_GET_THP_DISABLE = 41, 42

Item = TypeVar("Item")
Label = TypeVar("Label", Column, Axis)


def ignore_progress(done: int, total: int, what: str) -> None:
    """Show no progress."""
    del done, total, what


def labelled(kind: type[Label], label: str | Label, **options: bool) -> Label:
    """A column or an axis; its label has its name and unit, as "time [µs]"."""
    if not isinstance(label, str):
        return label
    name, _, unit = label.removesuffix("]").partition(" [")
    return kind(name, unit, **options)


class Run:
    """One run of one experiment.

    Attributes:
        quick: whether a few seconds must suffice.
        seed: the seed of ``random``.
        random: a reproducible source of random numbers.
        memory: bytes that may be touched in all.
        vmm: a VMM, which is closed when the run ends.
        page: bytes of a page.
        huge_page: bytes of a transparent huge page, 0 where there are none.
        cores: processors that this process may run on.
        findings: the findings so far.
    """

    def __init__(
        self,
        vmm: VMM,
        *,
        quick: bool,
        seed: int,
        memory: int,
        progress: Callable[[int, int, str], None] = ignore_progress,
    ) -> None:
        self.vmm = vmm
        self.quick = quick
        self.seed = seed
        self.memory = memory
        self.random = random.Random(seed)  # noqa: S311 (to measure with, not to hide with)
        self.page = page_size()
        self.huge_page = huge_page_size()
        self.cores = len(os.sched_getaffinity(0))
        self.findings = Findings()
        self._progress = progress

    def choose(self, *, quick: Item, full: Item) -> Item:
        """One of two, by whether the run is quick."""
        return quick if self.quick else full

    def steps(self, items: Sequence[Item], what: str = "") -> Iterator[Item]:
        """Iterate over a sequence, and show the progress of the action, in a few words."""
        for done, item in enumerate(items):
            self._progress(done, len(items), what)
            yield item
        self._progress(len(items), len(items), what)

    # ---- what is found ------------------------------------------------------------------------

    def table(self, title: str, *columns: str | Column) -> Table:
        """Add an empty table to the results.

        Args:
            title: its subject.
            columns: texts as "size [B] | time [µs]", or ``Column(name, unit)`` each.
        """
        made = Table(title, [])
        for column in columns:
            headings = column.split(" | ") if isinstance(column, str) else [column]
            made.columns += [labelled(Column, heading) for heading in headings]
        self.findings.tables.append(made)
        return made

    def plot(self, title: str, x: str | Axis, y: str | Axis, log: str = "") -> Plot:
        """A new plot among the results, to which series are added.

        Args:
            title: its subject.
            x: the first axis, as "size [B]" or an ``Axis``; a series with names there is drawn as
                bars.
            y: the second axis, likewise.
            log: the logarithmic axes, as "xy".
        """
        made = Plot(title, labelled(Axis, x, log="x" in log), labelled(Axis, y, log="y" in log))
        self.findings.plots.append(made)
        return made

    def physical(self, statement: str, measured: Value, expected: Expected, unit: str = "") -> None:
        """State a claim about the kernel's figures, which must hold.

        Args:
            statement: a sentence of the prediction. The same in every run: no numbers that change.
            measured: the measured value.
            expected: ``equal``, ``at_least``, ``at_most`` or ``between``.
            unit: of both, as "B" or "pages".
        """
        self._claim(Kind.PHYSICAL, statement, measured, expected, unit)

    def timing(self, statement: str, measured: Value, expected: Expected, unit: str = "") -> None:
        """State a claim about time, which may fail. Args as for ``physical``."""
        self._claim(Kind.TIMING, statement, measured, expected, unit)

    def _claim(
        self, kind: Kind, statement: str, measured: Value, expected: Expected, unit: str
    ) -> None:
        outcome = Outcome.HELD if expected.admits(measured) else Outcome.FAILED
        self.findings.claims.append(
            Claim(statement, kind, outcome, sound(measured), expected, unit)
        )

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Surround a part, named in a few words, that may not be observable; the rest goes on."""
        try:
            yield
        except REFUSALS as answer:
            self.findings.claims.append(
                Claim(name, Kind.PHYSICAL, Outcome.NOT_OBSERVABLE, reason=str(answer))
            )

    # ---- what this machine can show -----------------------------------------------------------

    def need_cores(self, count: int) -> None:
        """Continue only with so many processors."""
        need(self.cores >= count, f"it takes {count} cores, and there are {self.cores} to run on")

    def need_feature(self, name: str) -> None:
        """Continue only where the kernel has a feature, by its name in ``vmm-linux doctor``."""
        found = state(Feature[name])
        need(found == "present", f"{name} is {found} (see vmm-linux doctor)")

    def need_huge_pages(self) -> None:
        """Continue only where there are transparent huge pages of a known size."""
        self.need_feature("TRANSPARENT_HUGE_PAGES")
        need(self.huge_page, "the kernel does not tell how large a huge page is")

    def fitting(self, size: int, times: float = 1) -> int:
        """A size in bytes, halved until it, so many times, fits into the memory to touch."""
        while times * size > self.memory:
            size //= 2
        return size

    def need_memory(self, size: int) -> None:
        """Continue only if so many bytes may be touched."""
        need(size <= self.memory, f"it takes {size} bytes, and {self.memory} may be touched")

    # ---- other processes ----------------------------------------------------------------------

    def child(self, function: Callable[..., object], *arguments: object) -> Child:
        """Fork a process that runs ``function(connection, *arguments)`` and ends with this one.

        The ``multiprocessing.connection.Connection`` is to this process. Use the result in a
        ``with``, which kills it at its end.
        """
        return Child(function, *arguments)


class Child:
    """A forked process, and a connection to it. Leaving its ``with`` kills it."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.connection, its = Pipe()
        parent = os.getpid()
        self._code: int | None = None
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self.connection.close()
            live(parent, function, its, *arguments)
        its.close()

    def send(self, value: object) -> None:
        """Send it an object that pickles."""
        self.connection.send(value)

    def receive(self) -> Any:  # noqa: ANN401 (any type)
        """Receive its next object; EOFError if it ended without one.

        What it found not to be observable is not observable for this process.
        """
        try:
            answer = self.connection.recv()
        except EOFError:
            raise EOFError(f"a child ended {self.ended()}, without an answer") from None
        if isinstance(answer, NotObservable):
            raise answer
        return answer

    def kill(self) -> int:
        """Kill it: the exit code, -9 unless it ended before."""
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end: the exit code, below 0 the signal that ended it."""
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self._code

    def ended(self) -> str:
        """Wait for its end: "by itself", "with exit code 3" or "by SIGSEGV"."""
        code = self.wait()
        if code < 0:
            return f"by {signal.Signals(-code).name}"
        return f"with exit code {code}" if code else "by itself"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self.connection.close()


def live(
    parent: int, function: Callable[..., object], connection: Connection, *arguments: object
) -> None:
    """Run the function in a forked child, and end."""
    code = 1
    try:
        die_with_parent(parent)
        try:
            function(connection, *arguments)
        except REFUSALS as answer:
            connection.send(NotObservable(str(answer)))
        code = 0
    except BaseException:  # noqa: BLE001 (nothing of the parent's may run in the child)
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# ---- figures ------------------------------------------------------------------------------------


def timed(function: Callable[..., object], *arguments: object) -> float:
    """Call a function: the seconds that it took."""
    begin = time.perf_counter_ns()
    function(*arguments)
    return (time.perf_counter_ns() - begin) / 1e9


def touch(region: Region | memoryview, step: int = 0) -> None:
    """Write a byte to every page of committed memory, or one every so many bytes."""
    step = step or page_size()
    with memoryview(region) as view:
        view[::step] = b"\x01" * -(-len(view) // step)


def minor_faults() -> int:
    """The minor page faults of this process so far, by getrusage(2)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def resident(va: int, size: int, pid: int | None = None) -> int:
    """The bytes of a range that are in a process's page table, the page of zeros left out.

    The range is of whole pages; ``pid`` None is this process.

    Errors:
        NotObservable: the kernel does not report them.
    """
    need(
        state(Feature.PAGEMAP) == "present" or state(Feature.PAGEMAP_SCAN) == "present",
        "/proc/self/pagemap may not be read",
    )
    return sum(
        run.end - run.start
        for run in inspect.pages(va, size, pid)
        if run.flags & PageFlags.PRESENT and not run.flags & PageFlags.ZERO
    )


def charged(region: Region) -> int:
    """The bytes of a region that count as committed in the kernel (``ac`` in smaps)."""
    start, end = region.base, region.base + region.size
    return sum(
        min(mapping.end, end) - max(mapping.start, start)
        for mapping in inspect.snapshot()
        if mapping.end > start and mapping.start < end and "ac" in (mapping.vm_flags or ())
    )


def figures(va: int, names: Iterable[str], pid: int | None = None) -> list[int]:
    """Figures of smaps, as "rss", in bytes, of the mapping that holds an address.

    ``pid`` None is this process.

    Errors:
        NotObservable: nothing is mapped there.
    """
    mapping = inspect.snapshot(pid).at(va)
    need(mapping, f"nothing is found in /proc/{pid or 'self'}/smaps at {va:#x}")
    return [mapping.whole.figures[name] for name in names] if mapping else []


def in_huge_pages(va: int) -> int:
    """The bytes in huge pages of the private mapping that holds an address of this process."""
    mapping = inspect.snapshot().at(va)
    return mapping.figures.get("anon_huge_pages", 0) if mapping else 0


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Inside, this process gets no huge pages, with any setting of the machine."""
    before = 0
    with contextlib.suppress(OSError):  # there are none to forbid
        before = libc("prctl", PR_GET_THP_DISABLE, 0, 0, 0, 0)
        libc("prctl", PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            libc("prctl", PR_SET_THP_DISABLE, before, 0, 0, 0)

"""Runs experiments, each in a process of its own, and merges their findings."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import vmm_linux
from vmm_linux import experiments
from vmm_linux.experiments._framework.catalogue import Experiment
from vmm_linux.experiments._framework.results import (
    Claim,
    Findings,
    Kind,
    Outcome,
    findings_from,
    merged,
)

QUICK_DEADLINE = 60.0
"""Seconds that a quick run may take."""
DEADLINE = 600.0
"""Seconds that any other run may take."""
LAST_LINES = 30
"""The number of last lines of a run's standard error that are shown."""


@dataclass(frozen=True)
class Order:
    """The order to run experiments."""

    quick: bool
    seed: int
    """Of the first run; each further run has the next one."""
    repeat: int
    memory: int
    """Bytes that a run may touch."""
    deadline: float = 0
    """Seconds that a run may take, 0 for the usual."""


@dataclass
class Result:
    """One experiment and its outcome; of one that failed to run, ``problem`` is the reason."""

    experiment: Experiment
    order: Order
    findings: Findings
    problem: str
    seconds: float

    @property
    def broken(self) -> list[Claim]:
        """The physical claims that did not hold."""
        failed = (Kind.PHYSICAL, Outcome.FAILED)
        return [each for each in self.findings.claims if (each.kind, each.outcome) == failed]

    @property
    def ok(self) -> bool:
        """Whether it ran and all physical claims held or were not observable."""
        return not self.problem and not self.broken

    @property
    def status(self) -> str:
        """In a word or two."""
        if self.problem:
            return "failed"
        if self.broken:
            return "did not hold"
        return "not observable" if self.findings.reason else "done"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **self.experiment.texts(),
            **asdict(self.order),
            "seconds": self.seconds,
            "status": self.status,
            "problem": self.problem,
            **self.findings.as_dict(),
        }


class RunFailedError(Exception):
    """A run without findings; the text has the reason."""


def carry_out(experiment: Experiment, order: Order, progress: Callable[..., None]) -> Result:
    """Run an experiment as often as ordered. No process of it is left in any case.

    ``progress`` is called with done, total and the present action.
    """
    begin = time.monotonic()
    found, problem = Findings(), ""
    runs = []
    try:
        for number in range(order.repeat):
            prefix = f"{number + 1} of {order.repeat} " if order.repeat > 1 else ""

            def show(done: int, total: int, what: str, prefix: str = prefix) -> None:
                progress(done, total, prefix + what)

            runs.append(one_run(experiment.name, order, order.seed + number, show))
        found = merged(runs)
    except RunFailedError as reason:
        problem = str(reason)
    return Result(experiment, order, found, problem, time.monotonic() - begin)


def one_run(name: str, order: Order, seed: int, progress: Callable[..., None]) -> Findings:
    """The findings of one run."""
    deadline = order.deadline or (QUICK_DEADLINE if order.quick else DEADLINE)
    with contextlib.ExitStack() as at_end:
        log = at_end.enter_context(os.fdopen(os.memfd_create("experiment"), "w+b"))
        answers, theirs = os.pipe()
        stream = at_end.enter_context(os.fdopen(answers, "rb"))
        try:
            process = at_end.enter_context(worker(theirs, log))
        finally:
            os.close(theirs)
        request = {
            **asdict(order),
            "parent": os.getpid(),
            "answers": theirs,
            "folders": list(experiments.__path__),
            "name": name,
            "seed": seed,
        }
        assert process.stdin is not None  # noqa: S101 (the pipe was requested)
        with contextlib.suppress(BrokenPipeError), process.stdin as orders:
            orders.write(json.dumps(request).encode())
        for answer in lines_until(stream, deadline):
            if "progress" in answer:
                progress(*answer["progress"])
            elif "findings" in answer:
                return findings_from(answer["findings"])
            else:
                raise RunFailedError(f"{answer['problem']}\n{tail_of(log)}")
        raise RunFailedError(f"it ended without a result, {end_of(process)}\n{tail_of(log)}")


@contextlib.contextmanager
def worker(answers: int, log: IO[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A process for one run, in its own process group, which is killed at the end."""
    paths = [str(Path(vmm_linux.__file__).parents[1]), *filter(None, [os.getenv("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "vmm_linux.experiments._framework.worker"],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        pass_fds=[answers],
        process_group=0,  # this process handles an interrupt from the terminal
    )
    try:
        yield process
    finally:
        # Before the wait: afterwards the number may be another group's.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()


def lines_until(stream: IO[bytes], seconds: float) -> Iterator[dict[str, Any]]:
    """The objects that a process sends, a line each, until its end.

    Errors:
        RunFailedError: it took longer.
    """
    end = time.monotonic() + seconds
    text = b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if not selector.select(end - time.monotonic()):
                raise RunFailedError(f"stopped: it took more than {seconds:g} seconds")
            piece = os.read(stream.fileno(), 1 << 16)
            if not piece:
                return
            *lines, text = (text + piece).split(b"\n")
            yield from map(json.loads, lines)


def end_of(process: subprocess.Popen[bytes]) -> str:
    """The end of a process, without reaping it. A process that closed its pipe is ending."""
    end = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if end is None or end.si_code == os.CLD_EXITED:
        return f"with exit code {end.si_status if end else '?'}"
    return f"by {signal.Signals(end.si_status).name}"


def tail_of(log: IO[bytes]) -> str:
    """The last lines of a run's output."""
    log.seek(0)
    return "\n".join(log.read().decode(errors="backslashreplace").splitlines()[-LAST_LINES:])

"""What every test gets: a check that it leaves nothing behind."""

from __future__ import annotations

import gc
import os
import sys
import time
from typing import TYPE_CHECKING

import pytest

import leaks

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from pathlib import Path

    from xdist.remote import Producer
    from xdist.scheduler import Scheduling
    from xdist.workermanage import WorkerController

    from refusals import Ground
    from vmm_linux import VMM, Event

# Before anything can start a thread: tests that fork must be the only thread there is.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
leaks.quieten_libc()
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.pop("MALLOC_ARENA_MAX", None)  # not for the children of tests; see below

BEGINNING = pytest.StashKey[leaks.Snapshot | None]()
#: How long garbage and joined threads may take to vanish, in seconds.
PATIENCE = 2.0


#: Tests of programs that they do not install: they run when everything is asked for.
REAL_INPUT = ("browser", "postgresql", "pytorch")


LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say why tests were left out."""
    if count := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(f"left out: {count} tests of other programs, which --all runs")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Take ``--all``."""
    text = f"run the tests marked {', '.join(REAL_INPUT)} too, which need Debian's packages"
    parser.addoption("--all", action="store_true", help=text)


def pytest_collection_finish() -> None:
    """Have no search for garbage go through all that collecting has made, which stays."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Start processes in which pytest-xdist's thread has the same memory of malloc's as others."""
    os.environ["MALLOC_ARENA_MAX"] = "1"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Scheduling | None:
    """Give what needs the machine for itself to one of the processes."""
    from scheduling import OneAfterTheOther

    return OneAfterTheOther(config, log) if config.getoption("dist") == "load" else None


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Take over what a process of pytest-xdist knows, each of which collected the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left out", 0)


def pytest_configure(config: pytest.Config) -> None:
    """Let tests fork beside the thread of pytest-xdist, which only waits for more to do."""
    if hasattr(config, "workerinput"):
        config.addinivalue_line(
            "filterwarnings", r"ignore:.*multi-threaded, use of \w+\(\) may:DeprecationWarning"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of other programs, unless everything is asked for."""
    if config.getoption("--all"):
        return
    left_out = [item for item in items if any(map(item.get_closest_marker, REAL_INPUT))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)
        getattr(config, "workeroutput", {})["left out"] = len(left_out)
        items[:] = [item for item in items if item not in left_out]


# ---- fixtures ------------------------------------------------------------------------------------
# They import what they use themselves: the first modules that a test process has are not theirs.


@pytest.fixture
def vmm(request: pytest.FixtureRequest) -> Iterator[VMM]:
    """An endpoint with the default limits, in tests marked ``unlimited`` with none."""
    from vmm_linux import VMM, Limits

    unlimited = request.node.get_closest_marker("unlimited")
    with VMM(limits=Limits.unlimited() if unlimited else None) as endpoint:
        yield endpoint
        if not endpoint.closed:
            endpoint._check()


@pytest.fixture
def event() -> Iterator[Event]:
    """A new event."""
    from vmm_linux import Event

    with Event() as made:
        yield made


@pytest.fixture
def ground() -> Iterator[Ground]:
    """Regions, a buffer and handles for calls that are refused."""
    import refusals

    yield from refusals.make_ground()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes calls to the system fail."""
    import faults

    return faults.build(tmp_path_factory.getbasetemp())


# ---- nothing is left behind ----------------------------------------------------------------------
# The check lies in hooks, not in a fixture: these run at the same depth of calls (see leaks.py),
# and outside of every fixture of the test. What there is at a test's end is what the next one
# begins with: looked at once, nothing that comes in between goes unseen. A test that failed is not
# looked at: its exception keeps alive what its frames hold. Fixtures of a wider scope must not hold
# memory, descriptors or children: the first test that uses them would be taken to leak them.


def forgetting(item: pytest.Item) -> Generator[None]:
    """Wrap a phase of a test: if it fails, forget what the process had before."""
    try:
        return (yield)
    except BaseException:
        item.config.stash[BEGINNING] = None
        raise


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    """Remember what the process has before the test."""
    before = item.config.stash.get(BEGINNING, None)
    item.config.stash[BEGINNING] = before or leaks.Snapshot.take()
    return (yield from forgetting(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Run the test."""
    return (yield from forgetting(item))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Fail the test if the process has anything that it had not before."""
    yield from forgetting(item)
    if inspect := sys.modules.get("vmm_linux.inspect"):
        inspect.close_files()  # which it keeps for the next question
    if before := item.config.stash[BEGINNING]:
        item.config.stash[BEGINNING] = None
        deadline = time.monotonic() + PATIENCE
        while left := leaks.left_behind(before, now := leaks.Snapshot.take()):
            if time.monotonic() > deadline:
                pytest.fail("left behind by this test:\n" + "\n".join(left), pytrace=False)
            gc.collect()
        item.config.stash[BEGINNING] = now

"""Events across fork, exec, multiprocessing and pickle."""

from __future__ import annotations

import copy
import os
import pickle
import sys
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import TESTS_IMPORTABLE, run_child
from constants import PATIENCE
from forked import in_child
from vmm_linux import Event, VmmError, _sharer
from vmm_linux import event as module
from vmm_linux.errors import InvalidArgument, InvalidOperation, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue


def test_a_forked_child_shares_it_and_closes_its_own(event: Event) -> None:
    def use() -> bool:
        waited = event.wait(PATIENCE)
        event.set()
        event.close()
        return waited and event.closed

    event.set()
    assert in_child(use)
    assert event.clear() == 2
    event.set()
    assert event.is_set()


def test_an_inherited_descriptor_is_adopted_after_exec(event: Event) -> None:
    import subprocess

    code = "import sys; from vmm_linux import Event; Event.from_fd(int(sys.argv[1])).set()"
    subprocess.run(
        [sys.executable, "-c", code, str(event.fileno())], pass_fds=[event.fileno()], check=True
    )
    assert event.clear() == 1


def test_bytes_cannot_carry_it(event: Event) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(InvalidOperation, match=r"Event\.send"):
            pickle.dumps(event, protocol)
    for copier in (copy.copy, copy.deepcopy):
        with pytest.raises(InvalidOperation):
            copier(event)


class OtherEvent(Event):
    """A class of a user's."""


def set_it(event: Event) -> None:
    """In another process."""
    event.set()


def answer(event: Event, back: Event) -> None:
    """In another process: wait for one, set the other."""
    if event.wait(PATIENCE):
        back.set()


def set_those_that_come(channel: Queue[Event | None] | Connection) -> None:
    """In another process: events out of a queue, or a pipe."""
    receive = channel.recv if isinstance(channel, Connection) else channel.get
    while (event := receive()) is not None:
        event.set()
        event.close()


def use_multiprocessing(method: str) -> None:
    """Every way through multiprocessing."""
    import multiprocessing

    context = multiprocessing.get_context(method)
    event, back = Event(), OtherEvent()
    worker = context.Process(target=answer, args=(event, back), daemon=True)  # type: ignore[attr-defined]
    worker.start()
    event.set()
    worker.join()
    assert (worker.exitcode, back.clear(), event.clear()) == (0, 1, 1)

    queue = context.Queue()
    ours, theirs = context.Pipe()
    for channel, put in ((queue, queue.put), (theirs, ours.send)):
        worker = context.Process(target=set_those_that_come, args=(channel,), daemon=True)  # type: ignore[attr-defined]
        worker.start()
        for thing in (event, back, event, None):
            put(thing)
        worker.join()
        assert (worker.exitcode, event.clear(), back.clear()) == (0, 2, 1)
    queue.close()
    queue.join_thread()
    ours.close()
    theirs.close()

    with context.Pool(2) as pool:
        pool.map(set_it, [event] * 10)
        pool.close()
        pool.join()
    assert event.clear() == 10

    event.close()
    with pytest.raises(InvalidOperation, match="closed"):
        multiprocessing.reduction.ForkingPickler.dumps(event)
    back.close()
    _sharer.stop()
    left = {target for target in kernel.descriptors().values() if "eventfd" in target}
    assert left == set()
    print("done")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_it_goes_through_multiprocessing(method: str) -> None:
    child = run_child(
        f"if __name__ == '__main__':\n"
        f"    import {__name__}\n    {__name__}.use_multiprocessing({method!r})",
        environment=TESTS_IMPORTABLE,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "done\n", "")


def load_what_is_gone() -> None:
    """A pickle of multiprocessing's whose descriptor is not there any more."""
    import multiprocessing.reduction

    with Event() as event:
        data = bytes(multiprocessing.reduction.ForkingPickler.dumps(event))
    pickle.loads(data).close()  # noqa: S301  one of ours
    _sharer.stop()
    before = kernel.descriptors()
    try:
        pickle.loads(data)  # noqa: S301  one of ours
    except VmmError as problem:
        print(type(problem).__name__)
    assert kernel.descriptors() == before


def test_a_pickle_whose_descriptor_is_gone_says_so() -> None:
    child = run_child(
        f"from {__name__} import *\nload_what_is_gone()", environment=TESTS_IMPORTABLE
    )
    assert (child.returncode, child.stdout) == (0, "ResourceNotFound\n"), child.stderr


def events_before_multiprocessing() -> None:
    """An event is made and multiprocessing loaded only then."""
    import sys

    from vmm_linux import Event

    assert "multiprocessing" not in sys.modules
    event = Event()
    from multiprocessing.reduction import ForkingPickler

    from vmm_linux import _sharer

    assert ForkingPickler.dumps(event)
    assert _sharer.stop() == 1


def test_it_does_not_matter_when_multiprocessing_is_loaded() -> None:
    child = run_child(events_before_multiprocessing)
    assert (child.returncode, child.stderr) == (0, "")


class Arrived:
    """A descriptor that is in this process already, as one that was inherited."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def detach(self) -> int:
        """What multiprocessing brought."""
        return self.fd


def test_an_inherited_descriptor_that_is_another_by_now_is_left_alone() -> None:
    file = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    with pytest.raises(ResourceNotFound, match="gone"):
        module.restore(Event, Arrived(file))
    os.close(file)
    with pytest.raises(ResourceNotFound, match="gone"):
        module.restore(Event, Arrived(file))


@pytest.mark.parametrize("problem", [OSError(2, "x"), KeyError(1), RuntimeError("x")], ids=repr)
def test_whatever_keeps_an_event_from_coming_is_told(problem: Exception) -> None:
    class Lost:
        def detach(self) -> int:
            raise problem

    with pytest.raises(ResourceNotFound, match="gone") as caught:
        module.restore(Event, Lost())
    assert caught.value.__cause__ is problem


class MakesAnEvent:
    """What makes its event while it is pickled, and keeps none."""

    def __reduce__(self) -> tuple[Callable[[Event], Event], tuple[Event]]:
        return same, (Event(),)


def same(event: Event) -> Event:
    """The event itself."""
    return event


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_an_event_that_nobody_keeps_goes_to_a_process_that_is_started(
    method: str,
) -> None:
    child = run_child(start_with_one_that_nobody_keeps, method, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "0\n", "")


def start_with_one_that_nobody_keeps(method: str) -> None:
    """Start a process whose argument makes its event while it is pickled."""
    import multiprocessing

    import test_event_processes
    from vmm_linux import Event

    Event().close()
    argument = test_event_processes.MakesAnEvent()
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=test_event_processes.set_it, args=(argument,)
    )
    process.start()
    process.join()
    print(process.exitcode)


class Moody:
    """No number after all."""

    def __index__(self) -> int:
        raise RuntimeError("not today")

    def __float__(self) -> float:
        raise RuntimeError("not today")


def test_what_raises_when_it_is_asked_for_a_number_is_refused(event: Event) -> None:
    for call in (lambda: Event.from_fd(Moody()), lambda: event.wait(Moody())):
        with pytest.raises(InvalidArgument) as caught:
            call()
        assert isinstance(caught.value.__cause__, RuntimeError)
    for fd in (10**5000, -(10**5000)):
        with pytest.raises(InvalidArgument, match=r"number of \d+ bits"):
            Event.from_fd(fd)

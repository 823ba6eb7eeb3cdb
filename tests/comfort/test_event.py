"""Events: what threading.Event promises, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import selectors
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from constants import PATIENCE
from event_loops import LOOPS, EventLoop
from events import connected, flags
from vmm_linux import Event
from vmm_linux import event as module
from vmm_linux.errors import InvalidArgument, InvalidOperation

if TYPE_CHECKING:
    from collections.abc import Callable


def counter(fd: int) -> int:
    """The kernel's count."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(info.partition("eventfd-count:")[2].split()[0], 16)


# ---- one process ---------------------------------------------------------------------------------


def test_a_new_event_is_unset_close_on_exec_and_does_not_block(event: Event) -> None:
    assert not event.is_set()
    assert kernel.descriptors()[event.fileno()] == "anon_inode:[eventfd]"
    assert fcntl.fcntl(event.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    assert flags(event.fileno()) & os.O_NONBLOCK


def test_it_is_set_until_it_is_cleared(event: Event) -> None:
    event.set()
    assert event.is_set()
    assert event.wait()
    assert event.wait(0)
    assert event.is_set()
    assert event.clear() == 1
    assert not event.is_set()
    assert not event.wait(0)


def test_clearing_tells_how_often_it_was_set(event: Event) -> None:
    assert event.clear() == 0
    for _ in range(5):
        event.set()
    assert counter(event.fileno()) == 5
    assert event.clear() == 5
    assert event.clear() == 0


def test_clearing_works_where_the_kernel_cannot_read_without_waiting(event: Event) -> None:
    assert module.clear_by_read(event.fileno()) == 0
    event.set()
    event.set()
    assert module.clear_by_read(event.fileno()) == 2


def test_no_time_that_it_was_set_is_lost(event: Event) -> None:
    """Several threads set it, one clears it whenever it is woken."""
    times, setters = 2000, 3

    def set_it() -> None:
        for _ in range(times):
            event.set()

    total = 0
    with ThreadPoolExecutor(setters) as pool:
        for _ in range(setters):
            pool.submit(set_it)
        while total < times * setters:
            assert event.wait(PATIENCE)
            total += event.clear()
    assert (total, event.clear()) == (times * setters, 0)


def test_every_thread_that_waits_is_woken(event: Event) -> None:
    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(event.wait, PATIENCE) for _ in range(8)]
        event.set()
        assert all(waiter.result() for waiter in waiting)


def test_a_wait_ends_when_its_time_is_over(event: Event) -> None:
    start = time.monotonic()
    assert not event.wait(0.05)
    assert 0.05 <= time.monotonic() - start < PATIENCE


def test_signals_do_not_end_a_wait(event: Event) -> None:
    """Each signal interrupts poll(2); the handler of the last one sets the event."""
    caught = []

    def handle(*_: object) -> None:
        caught.append(1)
        if len(caught) == 5:
            event.set()

    before = signal.signal(signal.SIGALRM, handle)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        assert event.wait(PATIENCE)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(caught) >= 5


@pytest.mark.parametrize(
    "timeout", [0, 0.0, 1, 1e-9, 1e300, float("inf"), 2**64, Decimal("0.5"), None]
)
def test_every_number_of_seconds_is_a_timeout(event: Event, timeout: float | None) -> None:
    event.set()
    assert event.wait(timeout)


@pytest.mark.parametrize(
    "timeout",
    [-1, -1e-9, float("nan"), float("-inf"), 10**400, -(10**400), True, "1", b"1", [], 1j,
     Decimal("NaN"), Decimal("sNaN")],
    ids=repr,
)  # fmt: skip
def test_what_is_no_number_of_seconds_is_no_timeout(event: Event, timeout: float) -> None:
    event.set()
    with pytest.raises(InvalidArgument, match="timeout"):
        event.wait(timeout)
    assert event.clear() == 1


def test_selectors_find_it_readable_while_it_is_set(event: Event) -> None:
    with selectors.DefaultSelector() as selector:
        selector.register(event, selectors.EVENT_READ)
        assert selector.select(0) == []
        event.set()
        assert [key.fileobj for key, _ in selector.select(0)] == [event]
        event.clear()
        assert selector.select(0) == []
    assert select.select([event], [], [], 0)[0] == []


def test_a_closed_event_says_so_and_has_no_descriptor() -> None:
    before = kernel.descriptors()
    event = Event()
    states = [event.closed]
    for _ in range(2):
        event.close()
        states.append(event.closed)
    assert states == [False, True, True]
    assert kernel.descriptors() == before
    with connected() as (ours, _):
        calls: list[Callable[[], object]] = [
            event.set, event.is_set, event.clear, event.wait, event.fileno, event.__enter__,
            lambda: event.send(ours), lambda: asyncio.run(event.wait_async()),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(InvalidOperation, match="the event is closed"):
                call()
    assert repr(event) == "<Event closed>"


def test_leaving_the_block_closes_it() -> None:
    with Event() as event:
        assert not event.closed
    assert event.closed


def test_a_dropped_event_closes_quietly() -> None:
    before = kernel.descriptors()
    event = Event()
    assert kernel.descriptors() != before
    del event
    assert kernel.descriptors() == before


def test_a_wait_goes_on_with_the_same_event_when_it_is_closed_meanwhile(event: Event) -> None:
    """Its number must not be given to another file before."""
    with Event.from_fd(event.fileno()) as closing, ThreadPoolExecutor(1) as pool:
        number = closing.fileno()
        waiting = pool.submit(closing.wait, PATIENCE)
        while not polled_by_another_thread():
            time.sleep(0)
        closing.close()
        assert number in kernel.descriptors()
        event.set()
        assert waiting.result()
    assert number not in kernel.descriptors()


def polled_by_another_thread() -> bool:
    """Whether a thread of this process is in poll(2)."""
    own = threading.get_native_id()
    calls = [
        (task / "syscall").read_text().split()[0]
        for task in Path("/proc/self/task").iterdir()
        if int(task.name) != own
    ]
    return bool({"7", "73", "271"} & {*calls})


def test_closing_and_using_from_many_threads_touches_no_other_file() -> None:
    """A number that was closed is soon a pipe's; an event that writes there is found out."""
    stop = threading.Event()
    holder = [Event()]

    def use() -> None:
        while not stop.is_set():
            with contextlib.suppress(InvalidOperation):
                holder[0].set()
                holder[0].is_set()
                holder[0].clear()

    with ThreadPoolExecutor(3) as pool:
        users = [pool.submit(use) for _ in range(3)]
        for _ in range(300):
            old, holder[0] = holder[0], Event()
            old.close()
            with contextlib.ExitStack() as stack:
                ends = os.pipe2(os.O_NONBLOCK)
                for end in ends:
                    stack.callback(os.close, end)
                with pytest.raises(BlockingIOError):
                    os.read(ends[0], 1)
        stop.set()
        for user in users:
            user.result()
    holder[0].close()


def test_a_descriptor_that_somebody_else_closed_is_told() -> None:
    event = Event()
    number = event.fileno()
    os.close(number)
    for call in (event.set, event.is_set, event.wait, event.clear, event.fileno):
        with pytest.raises(InvalidOperation, match="the program closed the event's descriptor"):
            call()
    assert repr(event) == "<Event lost>"
    own = os.eventfd(0)
    if own != number:
        os.dup2(own, number, inheritable=False)
    event.close()
    os.eventfd_write(number, 1)  # it is the program's, and still open
    assert os.eventfd_read(own) == 1
    for fd in {own, number}:
        os.close(fd)


def test_its_repr_tells_its_state(event: Event) -> None:
    assert repr(event) == f"<Event fd={event.fileno()} unset>"
    event.set()
    assert repr(event) == f"<Event fd={event.fileno()} set>"


def test_no_descriptor_left_is_a_quota() -> None:
    child = run_child(make_too_many)
    assert (child.returncode, child.stdout) == (0, "QuotaExceeded True\n" * 2), child.stderr


def make_too_many() -> None:
    """As many as the limit allows, and one more."""
    import resource

    from vmm_linux import Event

    with Event() as first:
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        events = []
        try:
            while True:
                events.append(Event())
        except MemoryError as problem:
            print(type(problem).__name__, "RLIMIT_NOFILE" in str(problem))
        try:
            Event.from_fd(first.fileno())
        except MemoryError as problem:
            print(type(problem).__name__, "RLIMIT_NOFILE" in str(problem))
        events.pop().close()
        Event().close()


# ---- event loops ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_tasks_wait_for_it(loop: EventLoop, event: Event) -> None:
    async def work() -> None:
        waiting = [loop.start(event.wait_async()) for _ in range(10)]
        await loop.settle()
        assert not any(waiter.done for waiter in waiting)
        event.set()
        assert all([await waiter.result() for waiter in waiting])
        assert await event.wait_async()
        event.clear()
        with pytest.raises(TimeoutError):
            async with loop.deadline(0.01):
                await event.wait_async()
        waiter = loop.start(event.wait_async())
        await loop.settle()
        waiter.cancel()
        await waiter.ended()
        assert waiter.cancelled

    loop.run(work())

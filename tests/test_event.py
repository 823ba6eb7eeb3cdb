"""Events: what threading.Event promises, between processes that need not trust each other."""

from __future__ import annotations

import array
import asyncio
import contextlib
import copy
import fcntl
import os
import pickle
import select
import selectors
import signal
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import run_child
from forked import in_child
from kernel_oracle import TESTS_IMPORTABLE
from vmm_linux import VMM, Event, VmmError, VmmFlags
from vmm_linux import event as module
from vmm_linux.errors import (
    InvalidArgument,
    InvalidOperation,
    QuotaExceeded,
    ResourceNotFound,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.queues import Queue

#: The largest count of an eventfd.
FULL = 2**64 - 2
#: Seconds after which what hangs has failed.
PATIENCE = 30
MESSAGE = struct.Struct("<4sHH")
GOOD = MESSAGE.pack(b"VMME", 1, 1)


@pytest.fixture
def event() -> Iterator[Event]:
    """A new event."""
    with Event() as made:
        yield made


@pytest.fixture(params=["stream", "seqpacket", "datagram"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets of each kind."""
    kinds = {
        "stream": socket.SOCK_STREAM,
        "seqpacket": socket.SOCK_SEQPACKET,
        "datagram": socket.SOCK_DGRAM,
    }
    with connected(kinds[request.param]) as sockets:
        yield sockets


@contextlib.contextmanager
def connected(kind: int = socket.SOCK_STREAM) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets, for the time of the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        ours.settimeout(PATIENCE)
        theirs.settimeout(PATIENCE)
        yield ours, theirs


def counter(fd: int) -> int:
    """The kernel's count."""
    info = Path(f"/proc/self/fdinfo/{fd}").read_text()
    return int(info.partition("eventfd-count:")[2].split()[0], 16)


def flags(fd: int) -> int:
    """The status flags of a descriptor's description."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """End the process if the block hangs: a call that blocks would not come back otherwise."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


# ---- one process


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
    with Event() as spare:
        os.close(event.fileno())
        for call in (event.set, event.is_set, event.wait, event.clear):
            with pytest.raises(InvalidOperation, match="closed by somebody else"):
                call()
        assert repr(event).endswith("lost>")
        os.dup2(spare.fileno(), event.fileno(), inheritable=False)  # something for it to close
    event.close()


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


# ---- asyncio


def test_tasks_wait_for_it(event: Event) -> None:
    async def work() -> None:
        before = kernel.descriptors()
        waiting = [asyncio.create_task(event.wait_async()) for _ in range(10)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not any(waiter.done() for waiter in waiting)
        event.set()
        assert all(await asyncio.gather(*waiting))
        assert await event.wait_async()
        event.clear()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await event.wait_async()
        assert kernel.descriptors() == before

    asyncio.run(work())


# ---- adopted descriptors


def test_an_event_of_a_descriptor_is_the_same_event_and_a_duplicate(event: Event) -> None:
    with Event.from_fd(event.fileno()) as other:
        assert other.fileno() != event.fileno()
        other.set()
        assert event.clear() == 1
    event.set()
    assert event.is_set()


def test_a_descriptor_that_blocks_or_is_inherited_does_not_stay_so() -> None:
    fd = os.eventfd(7)
    try:
        with Event.from_fd(fd) as event:
            assert fcntl.fcntl(event.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
            assert flags(event.fileno()) & os.O_NONBLOCK
            assert event.clear() == 7
    finally:
        os.close(fd)


@contextlib.contextmanager
def wrong_descriptors() -> Iterator[dict[str, int]]:
    """Open files that are no events."""
    with contextlib.ExitStack() as stack:
        ours, theirs = stack.enter_context(connected())
        ends = os.pipe()
        found = {
            "socket": ours.fileno(),
            "the other": theirs.fileno(),
            "pipe": ends[0],
            "its other end": ends[1],
            "file": os.open(__file__, os.O_RDONLY),
            "/dev/null": os.open("/dev/null", os.O_RDWR),
            "memfd": os.memfd_create("anon_inode:[eventfd]"),
            "folder": os.open("/", os.O_RDONLY | os.O_DIRECTORY),
            "semaphore": os.eventfd(1, os.EFD_SEMAPHORE),
        }
        for name in [*found][2:]:
            stack.callback(os.close, found[name])
        yield found


def test_what_is_no_event_is_refused_and_stays_as_it_is() -> None:
    with wrong_descriptors() as wrong:
        before = kernel.descriptors()
        for fd in wrong.values():
            with pytest.raises(InvalidArgument, match=r"no eventfd|EFD_SEMAPHORE"):
                Event.from_fd(fd)
        for bad in (-1, 10**6, 2**31, 2**64, -(2**64)):
            with pytest.raises(InvalidArgument, match="not open"):
                Event.from_fd(bad)
        for wrong_type in (True, None, 1.0, "1"):
            with pytest.raises(InvalidArgument, match="not an integer"):
                Event.from_fd(wrong_type)  # type: ignore[arg-type]
        assert kernel.descriptors() == before


# ---- hostile peers: they share the description


def test_a_full_counter_is_set_and_keeps_nobody_waiting(event: Event) -> None:
    os.eventfd_write(event.fileno(), FULL)
    with in_time():
        event.set()
        assert event.is_set()
        assert event.wait()
        assert event.clear() == FULL


def test_no_call_blocks_when_a_peer_makes_the_description_block(event: Event) -> None:
    """Each call in turn, of an empty and of a full counter."""

    def make_it_block() -> None:
        fcntl.fcntl(event.fileno(), fcntl.F_SETFL, flags(event.fileno()) & ~os.O_NONBLOCK)

    with in_time():
        make_it_block()
        assert event.clear() == 0
        assert not event.is_set()
        assert not event.wait(0)
        event.set()
        make_it_block()
        os.eventfd_write(event.fileno(), FULL - 1)
        event.set()
        assert event.is_set()
        make_it_block()
        assert event.clear() == FULL
        make_it_block()
        assert module.clear_by_read(event.fileno()) == 0


def test_two_processes_that_clear_at_once_do_not_make_each_other_wait(event: Event) -> None:
    """Of a blocking description, too: another reader may be there first at any time."""

    def clear_all() -> list[int]:
        return [event.clear() for _ in range(2000)]

    def race() -> None:
        for _ in range(2000):
            event.set()
            fcntl.fcntl(event.fileno(), fcntl.F_SETFL, os.O_RDWR)

    with in_time(), ThreadPoolExecutor(1) as pool:
        racing = pool.submit(race)
        mine = sum(clear_all())
        racing.result()
        assert mine + event.clear() == 2000


# ---- sockets


def test_an_event_goes_through_a_socket(
    event: Event, pair: tuple[socket.socket, socket.socket]
) -> None:
    event.send(pair[0])
    with Event.recv(pair[1]) as other:
        assert fcntl.fcntl(other.fileno(), fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        other.set()
        assert event.clear() == 1
        event.set()
        assert other.wait(PATIENCE)


def test_other_data_of_a_stream_stays_in_its_place(event: Event) -> None:
    with connected() as (ours, theirs):
        ours.sendall(b"before")
        event.send(ours)
        event.send(ours)
        ours.sendall(b"after")
        assert theirs.recv(6) == b"before"
        Event.recv(theirs).close()
        Event.recv(theirs).close()
        assert theirs.recv(10) == b"after"


def test_a_socket_that_does_not_block_says_so(event: Event) -> None:
    with connected() as (ours, theirs):
        ours.setblocking(False)
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            Event.recv(theirs)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                event.send(ours)
                sent += 1
        assert sent > 1
        for _ in range(sent):
            Event.recv(theirs).close()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_the_end_of_the_other_end_is_the_end_of_file(event: Event, kind: int) -> None:
    with connected(kind) as (ours, theirs):
        ours.close()
        with pytest.raises(EOFError, match="closed"):
            Event.recv(theirs)
        with pytest.raises(BrokenPipeError):
            event.send(theirs)


def test_only_unix_sockets_carry_events(event: Event) -> None:
    with socket.socket() as other:
        for call in (event.send, Event.recv):
            with pytest.raises(InvalidArgument, match="AF_UNIX"):
                call(other)
            with pytest.raises(InvalidArgument, match="not a socket"):
                call(1)  # type: ignore[arg-type]


def send_raw(sock: socket.socket, message: bytes, descriptors: list[int]) -> None:
    """A message of anybody's."""
    rights = array.array("i", descriptors)
    sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else [])


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (b"x", 1), (GOOD[:7], 1), (GOOD + b"x", 1), (b"VMML" + GOOD[4:], 1),
        (MESSAGE.pack(b"VMME", 2, 1), 1), (MESSAGE.pack(b"VMME", 1, 0), 1),
        (MESSAGE.pack(b"VMME", 1, 2), 1), (GOOD, 0), (MESSAGE.pack(b"VMME", 1, 0), 0),
        (GOOD, 2), (MESSAGE.pack(b"VMME", 1, 2), 2), (GOOD, 253), (bytes(8), 1),
    ],
)  # fmt: skip
def test_a_bad_message_is_refused_and_leaves_nothing(
    event: Event, message: bytes, count: int
) -> None:
    with connected(socket.SOCK_SEQPACKET) as (ours, theirs):
        before = kernel.descriptors()
        send_raw(ours, message, [event.fileno()] * count)
        with pytest.raises(InvalidArgument, match="bad message"):
            Event.recv(theirs)
        assert kernel.descriptors() == before
        event.send(ours)
        Event.recv(theirs).close()


def test_descriptors_that_are_no_events_are_refused_and_closed() -> None:
    with wrong_descriptors() as wrong, connected() as (ours, theirs):
        before = kernel.descriptors()
        for fd in wrong.values():
            send_raw(ours, GOOD, [fd])
            with pytest.raises(InvalidArgument, match=r"no eventfd|EFD_SEMAPHORE"):
                Event.recv(theirs)
        assert kernel.descriptors() == before


def test_what_socket_options_add_leaves_nothing(event: Event) -> None:
    so_passpidfd = 76
    with connected() as (ours, theirs):
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with contextlib.suppress(OSError):
            theirs.setsockopt(socket.SOL_SOCKET, so_passpidfd, 1)
        before = kernel.descriptors()
        for count in (1, 2, 5):
            send_raw(ours, GOOD, [event.fileno()] * count)
            if count == 1:
                Event.recv(theirs).close()
            else:
                with pytest.raises(InvalidArgument):
                    Event.recv(theirs)
        assert kernel.descriptors() == before


def test_a_handle_is_no_event_and_an_event_no_handle(event: Event) -> None:
    with VMM() as vmm, connected(socket.SOCK_SEQPACKET) as (ours, theirs):
        handle = vmm.mdl_create(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ | VmmFlags.WRITE)
        before = kernel.descriptors()
        vmm.send_handle(ours, handle)
        with pytest.raises(InvalidArgument, match="bad message"):
            Event.recv(theirs)
        event.send(ours)
        with pytest.raises(InvalidArgument, match="bad message"):
            vmm.recv_handle(theirs)
        assert kernel.descriptors() == before


def test_no_room_for_the_descriptor_is_a_quota(event: Event) -> None:
    with connected() as (ours, theirs):
        event.send(ours)

        def receive() -> str:
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
            try:
                Event.recv(theirs)
            except QuotaExceeded as problem:
                return str(problem)
            return "received"

        assert "RLIMIT_NOFILE" in in_child(receive)


# ---- fork, exec, multiprocessing, pickle


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
    import multiprocessing.resource_sharer

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
    multiprocessing.resource_sharer.stop(timeout=PATIENCE)
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
    import multiprocessing.resource_sharer

    with Event() as event:
        data = bytes(multiprocessing.reduction.ForkingPickler.dumps(event))
    pickle.loads(data).close()  # noqa: S301  one of ours
    multiprocessing.resource_sharer.stop(timeout=PATIENCE)
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

    assert ForkingPickler.dumps(event)


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

    import test_event
    from vmm_linux import Event

    Event().close()
    argument = test_event.MakesAnEvent()
    process = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=test_event.set_it, args=(argument,)
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
        with pytest.raises(InvalidArgument, match="128 bits"):
            Event.from_fd(fd)

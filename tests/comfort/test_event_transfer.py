"""Events between processes that need not trust each other."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import PATIENCE
from events import connected, flags
from forked import in_child
from vmm_linux import VMM, Event, VmmFlags
from vmm_linux import event as module
from vmm_linux.errors import InvalidArgument, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator


#: The largest count of an eventfd.
FULL = 2**64 - 2
MESSAGE = struct.Struct("<4sHH")
GOOD = MESSAGE.pack(b"VMME", 1, 1)


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
def in_time() -> Iterator[None]:
    """End the process if the block hangs: a call that blocks would not come back otherwise."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)


# ---- adopted descriptors -------------------------------------------------------------------------


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
            with pytest.raises(InvalidArgument, match=r"not open|of 65 bits"):
                Event.from_fd(bad)
        for wrong_type in (True, None, 1.0, "1"):
            with pytest.raises(InvalidArgument, match="not an integer"):
                Event.from_fd(wrong_type)  # type: ignore[arg-type]
        assert kernel.descriptors() == before


# ---- hostile peers: they share the description ---------------------------------------------------


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


# ---- sockets -------------------------------------------------------------------------------------


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

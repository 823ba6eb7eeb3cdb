"""What is a socket: any object with the descriptor of one, by the kernel's word."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import select
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from constants import RW
from kernel_oracle import PAGE
from transfers import nothing_opened, refused
from vmm_linux import VMM, Event, Rights
from vmm_linux.errors import InvalidArgument
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ_WRITE = Rights.MAP_READ | Rights.MAP_WRITE
SOON = 0.01
"""Seconds that a call waits in vain."""


class Bare:
    """An object that has a socket's descriptor and no more, as trio's sockets for this package."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def fileno(self) -> int:
        """The descriptor."""
        return self.sock.fileno()


class Timed(Bare):
    """One that says how long it waits, over a socket that never blocks, as eventlet's."""

    timeout: float | None = None

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        sock.setblocking(False)

    def gettimeout(self) -> float | None:
        """Seconds, or None for ever."""
        return self.timeout

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.sock, name)


class Waiting(Timed):
    """One that sends and receives by methods of its own, which wait in its own way, as gevent's."""

    waited = 0

    def sendmsg(self, *arguments: Any) -> Any:  # noqa: ANN401
        """As ``socket.sendmsg``."""
        return self.repeat(self.sock.sendmsg, select.POLLOUT, arguments)

    def recvmsg(self, *arguments: Any) -> Any:  # noqa: ANN401
        """As ``socket.recvmsg``."""
        return self.repeat(self.sock.recvmsg, select.POLLIN, arguments)

    def repeat(self, call: Callable[..., Any], event: int, arguments: Any) -> Any:  # noqa: ANN401
        """Call until it does not block."""
        while True:
            try:
                return call(*arguments)
            except BlockingIOError:
                if self.timeout == 0:
                    raise
            self.waited += 1
            poll = select.poll()
            poll.register(self.fileno(), event)
            if not poll.poll(None if self.timeout is None else self.timeout * 1e3):
                raise TimeoutError("timed out")


class Coroutines(Timed):
    """One whose methods are for an event loop, as curio's."""

    async def sendmsg(self, *_: object) -> int:
        """Not to be called."""
        raise AssertionError

    async def recvmsg(self, *_: object) -> int:
        """Not to be called."""
        raise AssertionError


KINDS: dict[str, Callable[[socket.socket], Any]] = {
    "bare": Bare,
    "timed": Timed,
    "waiting": Waiting,
    "coroutines": Coroutines,
    "the base of Python's own": lambda sock: socket.SocketType(fileno=os.dup(sock.fileno())),
}


@pytest.fixture(params=["without a policy", "with a policy"])
def each_vmm(request: pytest.FixtureRequest) -> Iterator[VMM]:
    """A VMM, which under a policy uses a duplicate of the socket."""
    policy = Policy(default="allow") if request.param == "with a policy" else None
    with VMM(policy=policy) as made:
        yield made


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """Two connected sockets of a kind."""
    with contextlib.ExitStack() as stack:
        ends = [stack.enter_context(sock) for sock in socket.socketpair()]
        made = [KINDS[request.param](sock) for sock in ends]
        for each in made:
            if isinstance(each, socket.SocketType):
                stack.callback(each.close)
        yield made[0], made[1]


def test_handles_and_events_go_through(each_vmm: VMM, pair: tuple[Any, Any]) -> None:
    handle = each_vmm.mdl_create(2 * PAGE, RW)
    with nothing_opened():
        each_vmm.send_handle(pair[0], handle, READ_WRITE)
        received = each_vmm.recv_handle(pair[1], 0, 2 * PAGE, os.geteuid())
        assert (received.rights, each_vmm.mdl_get_size(received)) == (READ_WRITE, 2 * PAGE)
        each_vmm.handle_close(received)
        with Event() as event:
            event.send(pair[0])
            event.set()
            with Event.recv(pair[1]) as same:
                assert same.is_set()


def test_a_buffer_of_segments_goes_through(each_vmm: VMM, pair: tuple[Any, Any]) -> None:
    handle = each_vmm.mdl_create(5 * PAGE, RW, PAGE)
    with nothing_opened():
        each_vmm.send_handle(pair[0], handle)
        received = each_vmm.recv_handle(pair[1])
        infos = [each_vmm.handle_info(each) for each in (received, handle)]
        assert len({(info.sid, info.size, info.rights) for info in infos}) == 1
        each_vmm.handle_close(received)


def test_a_receiver_waits_for_a_message(each_vmm: VMM, pair: tuple[Any, Any]) -> None:
    handle = each_vmm.mdl_create(PAGE, RW)
    sender = threading.Timer(SOON, each_vmm.send_handle, (pair[0], handle))
    with nothing_opened():
        sender.start()
        each_vmm.handle_close(each_vmm.recv_handle(pair[1]))
        sender.join()


def test_a_sender_waits_for_room(each_vmm: VMM, pair: tuple[Any, Any]) -> None:
    handle = each_vmm.mdl_create(PAGE, RW)
    received = []

    def receive() -> None:
        for _ in range(500):
            received.append(each_vmm.recv_handle(pair[1]))
            each_vmm.handle_close(received[-1])

    receiver = threading.Timer(SOON, receive)
    with nothing_opened():
        receiver.start()
        for _ in range(500):
            each_vmm.send_handle(pair[0], handle)
        receiver.join()
    assert len(received) == 500


@pytest.mark.parametrize("kind", [Timed, Waiting, Coroutines])
def test_timeouts_are_those_of_the_object(kind: type[Timed], each_vmm: VMM) -> None:
    handle = each_vmm.mdl_create(PAGE, RW)
    with contextlib.ExitStack() as stack:
        ours, theirs = [kind(stack.enter_context(sock)) for sock in socket.socketpair()]
        for timeout, error in ((SOON, TimeoutError), (0, BlockingIOError)):
            ours.timeout = theirs.timeout = timeout
            with nothing_opened(), pytest.raises(error):
                each_vmm.recv_handle(theirs)
            with nothing_opened(), pytest.raises(error):
                Event.recv(theirs)
            sent = 0
            with pytest.raises(error):  # noqa: PT012
                while True:
                    each_vmm.send_handle(ours, handle)
                    sent += 1
            for _ in range(sent):
                each_vmm.handle_close(each_vmm.recv_handle(theirs))


def test_a_bare_descriptor_waits_as_the_kernel_says(each_vmm: VMM) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        with nothing_opened(), pytest.raises(BlockingIOError):
            each_vmm.recv_handle(Bare(theirs))
        theirs.setblocking(True)
        theirs.setsockopt(
            socket.SOL_SOCKET, socket.SO_RCVTIMEO, b"\0" * 8 + b"\x10\x27" + b"\0" * 6
        )
        with nothing_opened(), pytest.raises(BlockingIOError):
            each_vmm.recv_handle(Bare(theirs))


def test_methods_of_the_class_wait_in_their_own_way(vmm: VMM) -> None:
    ours, theirs = [Waiting(sock) for sock in socket.socketpair()]
    with ours.sock, theirs.sock:
        sender = threading.Timer(SOON, vmm.send_handle, (ours, vmm.mdl_create(PAGE, RW)))
        sender.start()
        vmm.handle_close(vmm.recv_handle(theirs))
        sender.join()
        assert theirs.waited == 1


def test_waiting_needs_no_poll(vmm: VMM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library may remove it, and replace ``select`` by its own."""
    handle = vmm.mdl_create(PAGE, RW)
    monkeypatch.delattr(select, "poll")
    ours, theirs = [Timed(sock) for sock in socket.socketpair()]
    with ours.sock, theirs.sock:
        sender = threading.Timer(SOON, vmm.send_handle, (ours, handle))
        sender.start()
        vmm.handle_close(vmm.recv_handle(theirs))
        sender.join()
        ours.timeout = SOON
        with pytest.raises(TimeoutError):  # noqa: PT012
            while True:
                vmm.send_handle(ours, handle)


def test_connections_of_multiprocessing_are_sockets(vmm: VMM) -> None:
    ours, theirs = multiprocessing.Pipe()
    with ours, theirs:
        vmm.send_handle(ours, vmm.mdl_create(PAGE, RW))
        vmm.handle_close(vmm.recv_handle(theirs))


def test_sockets_of_a_class_that_was_put_in_place_of_pythons_are_sockets(
    vmm: VMM, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        monkeypatch.setattr(socket, "socket", Waiting)
        handle = vmm.mdl_create(PAGE, RW)
        for sender, receiver in ((ours, theirs), (Waiting(ours), Waiting(theirs))):
            vmm.send_handle(sender, handle)
            vmm.handle_close(vmm.recv_handle(receiver))


def test_the_end_of_a_stream_and_an_empty_datagram_are_told_apart(vmm: VMM) -> None:
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours, theirs:
            ours.shutdown(socket.SHUT_WR)
            with nothing_opened(), pytest.raises(EOFError):
                vmm.recv_handle(Bare(theirs))
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        ours.send(b"")
        with refused("0 bytes"):
            vmm.recv_handle(Bare(theirs))


def test_what_came_and_is_refused_is_closed(vmm: VMM) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        before = kernel.descriptors()
        for count in (0, 1, 253):
            socket.send_fds(ours, [b"x"], [0] * count)
            with refused("1 bytes, not the 48"):
                vmm.recv_handle(Bare(theirs))
            socket.send_fds(ours, [b"x" * 8], [0] * count)
            with nothing_opened(), pytest.raises(InvalidArgument, match="bad message"):
                Event.recv(Bare(theirs))
        assert kernel.descriptors() == before


def test_only_af_unix_sockets_are_taken(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    with socket.socket() as inet, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as netlink:
        for other, family in ((inet, "AF_INET"), (netlink, "AF_NETLINK")):
            with refused(f"sock is of family {family}; only AF_UNIX"):
                vmm.send_handle(Bare(other), handle)
            with (
                nothing_opened(),
                pytest.raises(InvalidArgument, match=f"sock is of family {family}; only AF_UNIX"),
            ):
                Event.recv(Bare(other))


def numbers() -> Iterator[Any]:
    """What ``fileno`` returns or raises and is no descriptor of a socket."""
    read, write = os.pipe()
    yield read
    os.close(read)
    os.close(write)
    yield from ("3", None, 3.5, 1 << 40, ValueError("closed"), OSError("none"), MemoryError())


def test_an_object_without_a_sockets_descriptor_is_none(vmm: VMM) -> None:
    class Says:
        def fileno(self) -> Any:  # noqa: ANN401
            if isinstance(answer, Exception):
                raise answer
            return answer

    for answer in numbers():  # noqa: B007
        with refused("sock is a Says, not a socket"):
            vmm.recv_handle(Says())
        with nothing_opened(), pytest.raises(InvalidArgument, match="sock is a Says, not a socket"):
            Event.recv(Says())
    with refused("not a socket"):
        vmm.recv_handle(asyncio.Protocol())  # type: ignore[arg-type]


def test_a_closed_one_is_the_system_s_error(each_vmm: VMM) -> None:
    ours, theirs = socket.socketpair()
    handle = each_vmm.mdl_create(PAGE, RW)
    ours.close()
    theirs.close()
    with nothing_opened(), pytest.raises(OSError, match="Bad file descriptor"):
        each_vmm.send_handle(Bare(ours), handle)
    with nothing_opened(), pytest.raises(OSError, match="Bad file descriptor"):
        each_vmm.recv_handle(Bare(theirs))

"""Handles travel over sockets of every kind, whatever else these carry."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import run_child
from constants import ALL_BUT_EXECUTE, READ_ONLY, RW
from forged_messages import forged, send_raw
from kernel_oracle import PAGE
from transfers import (
    KINDS,
    Pair,
    connected,
    contents,
    facts,
    filled,
    nothing_opened,
    packets,
    pair,
    receiver,
    refused,
    stream,
    text_of,
)
from vmm_linux.errors import InvalidOperation

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_linux import VMM, Handle


__all__ = ["packets", "pair", "receiver", "stream"]  # the fixtures

#: Socket options and messages that this Python has no names for.
SO_TIMESTAMP, SO_TIMESTAMPNS, SO_PASSPIDFD = 29, 35, 76


def test_a_stream_carries_other_bytes_before_between_and_after(
    vmm: VMM, receiver: VMM, stream: Pair
) -> None:
    handles = [vmm.mdl_create((n + 1) * PAGE, RW) for n in range(4)]
    for n, handle in enumerate(handles):
        stream.sender.sendall(b"header %d" % n)
        vmm.send_handle(stream.sender, handle)
        vmm.send_handle(stream.sender, handle, READ_ONLY)
    stream.sender.sendall(b"the end")
    stream.sender.close()
    for n, handle in enumerate(handles):
        assert stream.receiver.recv(8, socket.MSG_WAITALL) == b"header %d" % n
        for rights in (ALL_BUT_EXECUTE, READ_ONLY):
            received = receiver.recv_handle(stream.receiver)
            assert facts(receiver, received) == [int(rights), *facts(vmm, handle)[1:]]
    assert stream.receiver.recv(100) == b"the end"
    with pytest.raises(EOFError):
        receiver.recv_handle(stream.receiver)


def test_bytes_that_should_have_been_read_first_spoil_one_message_and_leak_nothing(
    vmm: VMM, receiver: VMM, stream: Pair
) -> None:
    stream.sender.sendall(b"unread")
    vmm.send_handle(stream.sender, vmm.mdl_create(PAGE, RW))
    with refused("not a handle's message"):
        receiver.recv_handle(stream.receiver)


def test_non_blocking_sockets_do_not_block(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    pair.sender.setblocking(False)
    pair.receiver.setblocking(False)
    with nothing_opened(), pytest.raises(BlockingIOError):
        receiver.recv_handle(pair.receiver)
    sent = fill(vmm, handle, pair, BlockingIOError)
    for _ in range(sent):
        receiver.handle_close(receiver.recv_handle(pair.receiver))
    with nothing_opened(), pytest.raises(BlockingIOError):
        receiver.recv_handle(pair.receiver)


def fill(vmm: VMM, handle: Handle, pair: Pair, ending: type[OSError]) -> int:
    """Send until that fails so, and tell how many handles were sent."""
    pair.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    sent = 0
    with nothing_opened():
        while sends(vmm, handle, pair.sender, ending):
            sent += 1
    assert sent
    return sent


def sends(vmm: VMM, handle: Handle, sock: socket.socket, ending: type[OSError]) -> bool:
    """Whether a handle is sent; False: it failed so."""
    try:
        vmm.send_handle(sock, handle)
    except ending:
        return False
    return True


def test_timeouts_end_the_waiting(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    pair.sender.settimeout(0.01)
    pair.receiver.settimeout(0.01)
    with nothing_opened(), pytest.raises(TimeoutError):
        receiver.recv_handle(pair.receiver)
    sent = fill(vmm, vmm.mdl_create(PAGE, RW), pair, TimeoutError)
    for _ in range(sent):
        receiver.handle_close(receiver.recv_handle(pair.receiver))


def test_closed_sockets_are_the_system_s_error(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    pair.sender.close()
    pair.receiver.close()
    with nothing_opened(), pytest.raises(OSError, match="Bad file descriptor"):
        vmm.send_handle(pair.sender, handle)
    with nothing_opened(), pytest.raises(OSError, match="Bad file descriptor"):
        receiver.recv_handle(pair.receiver)


def send_to_nobody(way: str) -> None:
    """Send where nobody receives any more, in a program that SIGPIPE ends; runs in a child."""
    import asyncio
    import os
    import signal
    import socket

    from vmm_linux import VMM, Event, VmmFlags

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, VMM() as vmm, Event() as event:
        handle = vmm.mdl_create(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ)
        try:
            if way == "send_handle":
                vmm.send_handle(ours, handle)
            elif way == "send_handle_async":
                ours.setblocking(False)
                asyncio.run(vmm.send_handle_async(ours, handle))
            else:
                event.send(ours)
        except BrokenPipeError:
            print("refused")


@pytest.mark.parametrize("way", ["send_handle", "send_handle_async", "Event.send"])
def test_sending_to_nobody_ends_no_program_whatever_sigpipe_does_there(way: str) -> None:
    child = run_child(send_to_nobody, way)
    assert (child.returncode, child.stdout, child.stderr) == (0, "refused\n", "")


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_a_closed_other_end_is_the_end(kind: str, vmm: VMM, receiver: VMM) -> None:
    with connected(KINDS[kind]) as pair:
        pair.sender.close()
        with nothing_opened(), pytest.raises(EOFError, match="other end is closed"):
            receiver.recv_handle(pair.receiver)
    with connected(KINDS[kind]) as pair:
        handle = vmm.mdl_create(PAGE, RW)
        pair.receiver.close()
        with nothing_opened(), pytest.raises(BrokenPipeError):
            vmm.send_handle(pair.sender, handle)


def test_datagrams_have_no_end(vmm: VMM, receiver: VMM) -> None:
    with connected(socket.SOCK_DGRAM) as pair:
        pair.sender.send(b"")
        with refused("0 bytes"):
            receiver.recv_handle(pair.receiver)
        handle = vmm.mdl_create(PAGE, RW)
        pair.receiver.close()
        with nothing_opened(), pytest.raises(ConnectionRefusedError):
            vmm.send_handle(pair.sender, handle)
    nowhere = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with nowhere, nothing_opened(), pytest.raises(OSError, match="not connected"):
        vmm.send_handle(nowhere, handle)


def test_only_unix_sockets_carry_handles(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for family in (socket.AF_INET, socket.AF_NETLINK):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            with refused("only AF_UNIX"):
                vmm.send_handle(sock, handle)
            with refused("only AF_UNIX"):
                vmm.recv_handle(sock)


def test_what_is_no_socket_is_refused(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    with Path("/dev/null").open("rb") as file:
        for sock in (None, 0, file.fileno(), "socket", file, object(), socket.socket):
            with refused("not a socket"):
                vmm.send_handle(sock, handle)  # type: ignore[arg-type]
            with refused("not a socket"):
                vmm.recv_handle(sock)  # type: ignore[arg-type]


OPTIONS = {
    "SO_PASSCRED": [socket.SO_PASSCRED],
    "SO_PASSPIDFD": [SO_PASSPIDFD],
    "SO_TIMESTAMP": [SO_TIMESTAMP],
    "SO_TIMESTAMPNS": [SO_TIMESTAMPNS],
    "all": [socket.SO_PASSCRED, SO_PASSPIDFD, SO_TIMESTAMP],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_what_socket_options_add_to_a_message_is_no_part_of_it(
    options: list[int], vmm: VMM, receiver: VMM, pair: Pair
) -> None:
    for option in options:
        with contextlib.suppress(OSError):
            pair.receiver.setsockopt(socket.SOL_SOCKET, option, 1)
    inner = vmm.mdl_clone(vmm.mdl_clone(filled(vmm, 3), 0, 2 * PAGE), PAGE, PAGE)
    before = kernel.descriptors()
    vmm.send_handle(pair.sender, inner)
    handle = receiver.recv_handle(pair.receiver)
    assert contents(receiver, handle) == [text_of(1)]
    receiver.handle_close(handle)
    for fds in ([], [0] * 8, [0] * 200):
        send_raw(pair.sender, forged(), fds)
        with refused("announced"):
            receiver.recv_handle(pair.receiver)
    assert kernel.descriptors() == before


class ClosesFirst(socket.socket):
    """A socket whose owner closes a VMM while a message is on its way into it."""

    vmm: VMM

    def recvmsg(self, *arguments: Any) -> Any:  # noqa: ANN401  (as the base class has it)
        """Receive, and close the VMM before the answer is there."""
        answer = super().recvmsg(*arguments)
        self.vmm.close()
        return answer


def test_a_vmm_that_is_closed_while_it_waits_keeps_nothing(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    with ClosesFirst(fileno=os.dup(packets.receiver.fileno())) as sock:
        sock.vmm = receiver
        vmm.send_handle(packets.sender, vmm.mdl_create(PAGE, RW))
        with refused("closed", InvalidOperation):
            receiver.recv_handle(sock)
        with refused("closed", InvalidOperation):
            receiver.recv_handle(sock)
        with refused("closed", InvalidOperation):
            receiver.send_handle(sock, 0)


class Spoils(socket.socket):
    """A socket of a class of the caller's own, whose answers are not what they should be."""

    spoil: Callable[[bytes, list[Any], int], tuple[Any, Any, Any]]

    def recvmsg(self, *arguments: Any) -> Any:  # noqa: ANN401  (as the base class has it)
        """Receive, and answer something else."""
        message, ancillary, flags, address = super().recvmsg(*arguments)
        return (*self.spoil(message, ancillary, flags), address)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda m, a, f: (list(m), a, f), id="the message"),
        pytest.param(
            lambda m, a, f: (m, [*a, (socket.SOL_SOCKET, socket.SCM_RIGHTS, None)], f),
            id="the control data",
        ),
        pytest.param(lambda m, a, _: (m, a, "none"), id="the flags"),
    ],
)
def test_a_socket_that_answers_nonsense_leaves_nothing_open(
    spoil: Callable[..., Any], vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    with Spoils(fileno=os.dup(packets.receiver.fileno())) as sock:
        sock.spoil = spoil
        vmm.send_handle(packets.sender, vmm.mdl_create(PAGE, RW))
        with nothing_opened(), pytest.raises(TypeError):
            receiver.recv_handle(sock)

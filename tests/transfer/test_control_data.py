"""Control data that a socket's options add to a message: it takes no descriptor's room."""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from forged_messages import forged, send_raw
from forked import in_child
from kernel_oracle import PAGE
from transfers import Pair, connected, room_for
from vmm_linux import VMM, Event, VmmError, VmmFlags, event
from vmm_linux.errors import InvalidArgument, InvalidOperation, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

SO_PASSCRED, SO_PASSSEC, SO_PASSPIDFD, SO_INQ = 16, 34, 76, 84
SO_TIMESTAMP, SO_TIMESTAMPNS, SO_TIMESTAMPING = 29, 35, 37
SO_TIMESTAMP_NEW, SO_TIMESTAMPNS_NEW, SO_TIMESTAMPING_NEW = 63, 64, 65
#: SOF_TIMESTAMPING_RX_SOFTWARE and _SOFTWARE.
SOFTWARE = 1 << 3 | 1 << 4
OPTIONS: dict[str, dict[int, int]] = {
    "none": {},
    "credentials": {SO_PASSCRED: 1},
    "security label": {SO_PASSSEC: 1},
    "pidfd": {SO_PASSPIDFD: 1},
    "microseconds": {SO_TIMESTAMP: 1},
    "nanoseconds": {SO_TIMESTAMPNS: 1},
    "new microseconds": {SO_TIMESTAMP_NEW: 1},
    "new nanoseconds": {SO_TIMESTAMPNS_NEW: 1},
    "timestamps of the network": {SO_TIMESTAMPING: SOFTWARE},
    "both timestamps": {SO_TIMESTAMP: 1, SO_TIMESTAMPING: SOFTWARE},
    "both new timestamps": {SO_TIMESTAMPNS_NEW: 1, SO_TIMESTAMPING_NEW: SOFTWARE},
    "all": {
        SO_PASSCRED: 1,
        SO_PASSSEC: 1,
        SO_PASSPIDFD: 1,
        SO_TIMESTAMPNS: 1,
        SO_TIMESTAMPING: SOFTWARE,
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
MESSAGE = event.MESSAGE.pack(event.MAGIC, event.VERSION, 1)


@pytest.fixture(params=[socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with connected(request.param) as made:
        yield made


def switch_on(sock: socket.socket, options: dict[int, int]) -> None:
    """Switch options on, those that this kernel has."""
    for option, value in options.items():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, option, value)


@every_option
def test_a_buffer_of_251_segments_arrives_beside_all_that_options_add(
    pair: Pair, options: dict[int, int]
) -> None:
    switch_on(pair.receiver, options)
    with VMM() as vmm, VMM() as receiver:
        whole = vmm.mdl_create(253 * PAGE, VmmFlags.READ, PAGE)
        clone = vmm.mdl_clone(whole, PAGE, 251 * PAGE)
        vmm.send_handle(pair.sender, clone)
        before = kernel.descriptors()
        handle = receiver.recv_handle(pair.receiver)
        assert receiver.mdl_get_size(handle) == 251 * PAGE
        assert len(kernel.descriptors()) == len(before) + 253
        receiver.handle_close(handle)
        assert kernel.descriptors() == before


@every_option
def test_an_event_arrives_beside_all_that_options_add(pair: Pair, options: dict[int, int]) -> None:
    switch_on(pair.receiver, options)
    with Event() as sent:
        before = kernel.descriptors()
        sent.send(pair.sender)
        with Event.recv(pair.receiver) as got:
            sent.set()
            assert got.is_set()
        for surplus in (2, 5, 100):
            send_raw(pair.sender, MESSAGE, [sent.fileno()] * surplus)
            with pytest.raises(InvalidArgument, match="or more came"):
                Event.recv(pair.receiver)
        assert kernel.descriptors() == before


class Watched(socket.socket):
    """A socket that tells what came with a message."""

    came: int = 0

    def recvmsg(self, *arguments: Any) -> Any:  # noqa: ANN401  (as the base class has it)
        """Receive, and count the descriptors."""
        answer = super().recvmsg(*arguments)
        self.came = sum(
            len(data) // struct.calcsize("i")
            for level, kind, data in answer[1]
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        )
        return answer


@every_option
def test_no_option_makes_room_for_descriptors_that_are_not_expected(
    options: dict[int, int],
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, Watched(fileno=theirs.detach()) as sock, Event() as sent:
        switch_on(sock, options)
        send_raw(ours, MESSAGE, [sent.fileno()] * 50)
        with pytest.raises(InvalidArgument, match="or more came"):
            Event.recv(sock)
        # What is put behind descriptors, a pidfd alone, leaves its room to them.
        behind = socket.CMSG_SPACE(struct.calcsize("i")) // struct.calcsize("i")
        assert sock.came <= 1 + (behind if SO_PASSPIDFD in options else 0) + 1


class SwitchesOn(socket.socket):
    """A socket that switches an option on when its user has looked already."""

    options: dict[int, int]

    def recvmsg(self, *arguments: Any) -> Any:  # noqa: ANN401  (as the base class has it)
        """Switch it on, and receive."""
        switch_on(self, self.options)
        return super().recvmsg(*arguments)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({SO_PASSCRED: 1}, "SO_PASSCRED"),
        ({SO_TIMESTAMP: 1}, "SO_TIMESTAMP"),
        ({SO_TIMESTAMPNS_NEW: 1, SO_TIMESTAMPING_NEW: SOFTWARE}, "SO_TIMESTAMP, SO_TIMESTAMPING"),
    ],
)
def test_what_took_the_room_is_named_and_no_limit_is_blamed(
    options: dict[int, int], name: str
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, SwitchesOn(fileno=theirs.detach()) as sock, Event() as sent:
        sock.options = options
        before = kernel.descriptors()
        sent.send(ours)
        with pytest.raises(InvalidOperation, match=f"switch off {name} of the socket"):
            Event.recv(sock)
        assert kernel.descriptors() == before
        sent.send(ours)  # now there is room
        Event.recv(sock).close()


def test_an_option_of_which_the_kernel_does_not_tell_is_named() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, Event() as sent, VMM() as vmm:
        try:
            theirs.setsockopt(socket.SOL_SOCKET, SO_INQ, 1)
        except OSError:
            pytest.skip("this kernel has no SO_INQ")
        before = kernel.descriptors()
        sent.send(ours)
        with pytest.raises(InvalidArgument, match="switch off SO_INQ"):
            Event.recv(theirs)
        assert kernel.descriptors() == before
        vmm.send_handle(ours, vmm.mdl_create(PAGE, VmmFlags.READ))
        vmm.handle_close(vmm.recv_handle(theirs))


@pytest.mark.parametrize("options", [{}, {SO_PASSCRED: 1, SO_TIMESTAMP: 1}], ids=["none", "some"])
def test_a_limit_that_is_reached_is_blamed_whatever_options_are_on(options: dict[int, int]) -> None:
    def receive() -> list[str]:
        told = []
        with connected(socket.SOCK_SEQPACKET) as pair, VMM() as vmm, Event() as sent:
            switch_on(pair.receiver, options)
            vmm.send_handle(
                pair.sender, vmm.mdl_clone(vmm.mdl_create(3 * PAGE, 1, PAGE), 0, 2 * PAGE)
            )
            sent.send(pair.sender)
            for call in (vmm.recv_handle, Event.recv):
                with pytest.raises(QuotaExceeded) as caught, room_for(0):
                    call(pair.receiver)
                told.append(str(caught.value))
        return told

    for message in in_child(receive):
        assert "RLIMIT_NOFILE" in message
        assert "switch off" not in message


def test_descriptors_that_the_sender_only_announces_are_no_shortage() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, VMM() as vmm:
        send_raw(ours, forged(segments=3, identities=1, memory_size=3 * PAGE, size=3 * PAGE), [])
        with pytest.raises(VmmError) as caught:
            vmm.recv_handle(theirs)
        assert "RLIMIT_NOFILE" not in str(caught.value)

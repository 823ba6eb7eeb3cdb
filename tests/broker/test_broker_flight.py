"""Bounds of descriptors on their way to clients, and what they cost the broker."""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING

from vmm_linux.broker import flight
from vmm_linux.broker.connection import Connection
from vmm_linux.broker.table import Member

if TYPE_CHECKING:
    import pytest


def connected(stack: list[socket.socket], uid: int) -> Connection:
    """A connection of a user; the other end is never read, and open as long as the list."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stack += [ours, theirs]
    return Connection(ours, (1, uid, uid), Member(len(stack), uid, 1), 0.0)


def test_many_that_wait_for_room_do_not_ask_the_kernel_about_all_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    really = flight.all_is_read

    def counted(fd: int) -> bool:
        asked.append(fd)
        return really(fd)

    monkeypatch.setattr(flight, "all_is_read", counted)
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    sockets: list[socket.socket] = []
    bounds = flight.Flight(1000, 20)
    for _ in range(20):
        flying = connected(sockets, 5)
        flying.sock.send(b"unread")
        assert bounds.has_room(flying, 1)
        bounds.begin(flying, 1)
    waiting = [connected(sockets, 5) for _ in range(50)]
    assert not any(bounds.has_room(each, 1) for each in waiting)
    assert len(asked) == 20
    assert bounds.has_room(connected(sockets, 6), 1), "another user is not concerned"
    sockets[1].recv(10)
    clock[0] += 2 * flight.PAUSE
    assert bounds.has_room(waiting[0], 1)
    assert len(asked) == 40
    for each in sockets:
        each.close()

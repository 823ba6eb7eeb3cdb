"""Ancestors of a client: which processes, whose end the broker is to notice.

A program and its ``multiprocessing`` children share buffers whose makers may end first. A client
says which of its ancestors belong to the program; the broker believes what the kernel confirms.
"""

from __future__ import annotations

import functools
import os
import select
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket

    from vmm_linux.broker.connection import Connection
    from vmm_linux.broker.server import Server
    from vmm_linux.broker.table import FamilyKey

SO_PEERPIDFD: Final = 77
"""Linux 6.5: a pidfd of the process at the other end, whatever became of its number."""
DEEPEST: Final = 64
"""Generations that are looked at."""


class Ancestors:
    """The ancestors whose end a server notices: with the last of them, a family's names end.

    Args:
        server: that waits for them.
        most: of them in all; one user has half of that.
    """

    def __init__(self, server: Server, most: int) -> None:
        self.server = server
        self.most = most
        self.pidfds: dict[tuple[FamilyKey, int], int] = {}

    def hold(self, connection: Connection) -> None:
        """Notice the end of a client's ancestors. Those beyond the bound are not noticed."""
        key = connection.member.family
        claimed, connection.claimed = connection.claimed, set()
        if key is None or not self.has_room(key[0]):
            return
        for pid, pidfd in ancestors(connection.sock, connection.peer[0], claimed).items():
            place = (key, pid)
            if place in self.pidfds:
                os.close(pidfd)
            else:
                self.pidfds[place] = pidfd
                self.server.table.add_ancestor(key, pid)
                self.server.watch(pidfd, functools.partial(self.ended, place))

    def has_room(self, uid: int | None) -> bool:
        """Whether one more of a user's fits: one user must not take what the others need."""
        mine = sum(family[0] == uid for family, _ in self.pidfds)
        return mine < self.most // 2 and len(self.pidfds) < self.most

    def ended(self, place: tuple[FamilyKey, int]) -> None:
        """An ancestor of a client ended, unless what was ready is one before with its number."""
        if not has_ended(self.pidfds[place]):
            return
        self.forget(place)
        self.server.end(self.server.table.ancestor_ended(*place))

    def forget(self, place: tuple[FamilyKey, int]) -> None:
        """Wait for an ancestor's end no more."""
        pidfd = self.pidfds.pop(place)
        self.server.unwatch(pidfd)
        os.close(pidfd)

    def forget_family(self, key: FamilyKey) -> None:
        """Wait for no ancestor of a family any more."""
        for place in [each for each in self.pidfds if each[0] == key]:
            self.forget(place)

    def close(self) -> None:
        """Close all."""
        for pidfd in self.pidfds.values():
            os.close(pidfd)


def ancestors(sock: socket.socket, pid: int, claimed: set[int]) -> dict[int, int]:
    """Pidfds of the claimed processes that are ancestors of a client, of the same user.

    Args:
        sock: the connection.
        pid: of its other end, by SO_PEERCRED.
        claimed: numbers that the client gave.

    Returns:
        By process id; the caller closes them.
    """
    if pid <= 0 or not claimed:
        return {}
    uid = real_uid(pid)
    found: dict[int, int] = {}
    client = -1
    try:
        client = peer_pidfd(sock, pid)
        for each in claimed.intersection(line_of(pid, claimed)):
            if uid is not None and real_uid(each) == uid:
                found[each] = os.pidfd_open(each)
        # Numbers are used again: those that are still ancestors of a client that still lives are
        # the processes that were opened.
        confirmed = set(line_of(pid, claimed)) if not has_ended(client) else set()
    except OSError:
        confirmed = set()
    finally:
        if client >= 0:
            os.close(client)
    for each in set(found) - confirmed:
        os.close(found.pop(each))
    return found


def peer_pidfd(sock: socket.socket, pid: int) -> int:
    """A pidfd of the process at the other end: the kernel's, or by its number on older ones."""
    try:
        return sock.getsockopt(1, SO_PEERPIDFD)
    except OSError:
        return os.pidfd_open(pid)


def has_ended(pidfd: int) -> bool:
    """Whether a process has ended."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def line_of(pid: int, claimed: set[int]) -> list[int]:
    """The ancestors of a process, the nearest first, until all that are claimed are among them."""
    found: list[int] = []
    while len(found) < DEEPEST and not claimed.issubset(found):
        parent = number_in_status(pid, "PPid:")
        if not parent:
            break
        found.append(parent)
        pid = parent
    return found


def real_uid(pid: int) -> int | None:
    """The real user of a process, None if it is gone."""
    return number_in_status(pid, "Uid:")


def number_in_status(pid: int, label: str) -> int | None:
    """A number in ``/proc/PID/status``; None if it is not there."""
    try:
        text = Path(f"/proc/{pid}/status").read_bytes().decode(errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(label):
            return int(line.split()[1])
    return None

"""Descriptors on their way to clients, and how many there may be.

The kernel counts descriptors that were sent and not received yet for each user, and refuses to send
more than RLIMIT_NOFILE of them: a client that never reads could stop everybody else's. So a
connection has at most one buffer on its way, and there is a bound for each user and for all.

Nothing is acknowledged: SIOCOUTQ tells how much of what was sent is unread, and cannot lie.
A connection that ends with a buffer unread is kept until it is read or its other end is closed.
"""

from __future__ import annotations

import fcntl
import termios
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from vmm_linux.broker.connection import Connection

SIOCOUTQ: Final = termios.TIOCOUTQ
NOTHING: Final = bytes(4)
"""The number 0, as ioctl(2) writes it."""
PAUSE: Final = 0.02
"""Seconds between looks at all that is on its way: each costs a system call for each buffer."""


def all_is_read(fd: int) -> bool:
    """Whether the other end of a socket has read all that was sent, or is gone."""
    return fcntl.ioctl(fd, SIOCOUTQ, NOTHING) == NOTHING


class Flight:
    """The buffers on their way.

    Args:
        most: descriptors in all.
        each: descriptors of a user.
    """

    def __init__(self, most: int, each: int) -> None:
        self.most = most
        self.each = each
        self.in_all = 0
        self.looked = -PAUSE
        """When all that is on its way was last looked at."""
        self.counts: dict[int | None, int] = {}
        self.users: dict[int | None, dict[int, Connection]] = {}

    def lands(self, connection: Connection) -> bool:
        """Whether a connection has nothing on its way, now that the kernel was asked."""
        if connection.in_flight and all_is_read(connection.fd):
            self.forget(connection)
        return not connection.in_flight

    def forget(self, connection: Connection) -> None:
        """A connection's buffer was read, or is gone."""
        if connection.in_flight:
            self.in_all -= connection.in_flight
            self.counts[connection.uid] -= connection.in_flight
            connection.in_flight = 0
            mine = self.users[connection.uid]
            del mine[connection.fd]
            if not mine:
                del self.users[connection.uid], self.counts[connection.uid]

    def has_room(self, connection: Connection, count: int) -> bool:
        """Whether a buffer of so many descriptors may leave. One of a user always may.

        What landed since the last look may still count, for a moment.
        """
        if self._fits(connection, count):
            return True
        now = time.monotonic()
        if now - self.looked < PAUSE:
            return False
        self.looked = now
        for mine in list(self.users.values()):
            for other in list(mine.values()):
                self.lands(other)
        return self._fits(connection, count)

    def _fits(self, connection: Connection, count: int) -> bool:
        used = self.counts.get(connection.uid, 0)
        return used == 0 or (used + count <= self.each and self.in_all + count <= self.most)

    def begin(self, connection: Connection, count: int) -> None:
        """A buffer of so many descriptors has left."""
        connection.in_flight = count
        self.in_all += count
        self.counts[connection.uid] = self.counts.get(connection.uid, 0) + count
        self.users.setdefault(connection.uid, {})[connection.fd] = connection

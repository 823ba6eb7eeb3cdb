"""What tests of events share: sockets, and what a descriptor of an event is."""

from __future__ import annotations

import contextlib
import fcntl
import socket
from typing import TYPE_CHECKING

from constants import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def connected(kind: int = socket.SOCK_STREAM) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets, for the time of the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        ours.settimeout(PATIENCE)
        theirs.settimeout(PATIENCE)
        yield ours, theirs


def flags(fd: int) -> int:
    """The status flags of a descriptor's description."""
    return fcntl.fcntl(fd, fcntl.F_GETFL)

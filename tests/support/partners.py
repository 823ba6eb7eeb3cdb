"""Another process to share memory with: forked first, so that it has only what it is given."""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from typing import TYPE_CHECKING, NamedTuple

from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Partner(NamedTuple):
    """The other process, and a socket to it."""

    pid: int
    sock: socket.socket

    def wait_until_ready(self) -> None:
        """Return when it has done its work, and keeps what it made."""
        assert self.sock.recv(5) == b"ready", "the other process failed"


@contextlib.contextmanager
def partner(work: Callable[[socket.socket], object]) -> Iterator[Partner]:
    """Fork a process that does this with its end of a socket, and keeps the result until the end.

    The end is that of the ``with`` block, or of this process.
    """
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            die_with_parent()
            ours.close()
            kept = work(theirs)
            theirs.sendall(b"ready")
            theirs.recv(1)
            del kept
            status = 0
        except BaseException:  # noqa: BLE001  a child must not go on with its parent's work
            traceback.print_exc()
        finally:
            os._exit(status)
    theirs.close()
    try:
        with ours:
            yield Partner(pid, ours)
    finally:
        os.waitpid(pid, 0)

"""Messages and descriptors made by hand, by the kernel's own calls."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
from typing import TYPE_CHECKING

from descriptors import reopened
from kernel_oracle import PAGE
from transfers import READ_ONLY

if TYPE_CHECKING:
    from collections.abc import Iterator


#: The documented message.
MESSAGE = struct.Struct("<4sHHHHIQQQQ")
#: F_SEAL_SEAL, SHRINK and GROW, WRITE.
SEALED, SIZED, UNWRITABLE = 1, 2 | 4, 8


def forged(
    *,
    magic: bytes = b"VMML",
    version: int = 2,
    segments: int = 1,
    identities: int = 0,
    zero: int = 0,
    rights: int = int(READ_ONLY),
    offset: int = 0,
    size: int = PAGE,
    segment_size: int = 0,
    memory_size: int = PAGE,
) -> bytes:
    """A message made by hand; as it stands, of a read-only buffer of one page.

    A ``segment_size`` of 0 is the one that all segments have where these are as large.
    """
    head = (magic, version, segments, identities, zero, rights)
    return MESSAGE.pack(*head, offset, size, segment_size or memory_size // segments, memory_size)


def send_raw(sock: socket.socket, message: bytes, fds: list[int]) -> None:
    """Send bytes with descriptors in one message."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    assert sock.sendmsg([message], [rights] if fds else []) == len(message)


def memory(size: int = PAGE, seals: int = SIZED, flags: int = 0) -> int:
    """A memfd, by the kernel's own calls."""
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def identity() -> int:
    """The identity of a clone, by the kernel's own calls."""
    return memory(0, SEALED | SIZED | UNWRITABLE)


def read_only(size: int = PAGE, seals: int = SIZED) -> int:
    """A memory as a reader's handle has it."""
    return reopened(memory(size, seals), os.O_RDONLY)


@contextlib.contextmanager
def open_files(*fds: int) -> Iterator[list[int]]:
    """Close these in the end."""
    try:
        yield list(fds)
    finally:
        for fd in fds:
            os.close(fd)

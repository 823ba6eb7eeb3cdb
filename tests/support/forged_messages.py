"""Messages and descriptors made by hand, by the kernel's own calls."""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import sys
from typing import TYPE_CHECKING

from constants import READ_ONLY
from descriptors import reopened
from kernel_oracle import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator


#: The documented message.
MESSAGE = struct.Struct("<4sHHHHIQQQQ")
#: F_SEAL_SEAL, SHRINK and GROW, WRITE.
SEALED, SIZED, UNWRITABLE = 1, 2 | 4, 8
AT_EMPTY_PATH = 0x1000


def forged(
    *,
    magic: bytes = b"VMML",
    version: int = 3,
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


def identity(
    *files: int,
    offset: int = 0,
    size: int = PAGE,
    segment_size: int = PAGE,
    magic: bytes = b"VMMLINK1",
    count: int | None = None,
    seals: int = SEALED | SIZED | UNWRITABLE,
) -> int:
    """An identity of a part of these files, by the kernel's own calls."""
    names = [struct.pack("=2Q", os.fstat(fd).st_ino, kernel_name(fd)) for fd in files]
    head = struct.pack(
        "=8s4Q", magic, offset, size, segment_size, len(files) if count is None else count
    )
    fd = memory(0, 0)
    os.pwrite(fd, head + b"".join(names), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def kernel_name(fd: int) -> int:
    """The first eight bytes of what name_to_handle_at(2) calls a file."""
    handle = ctypes.create_string_buffer(struct.pack("=Ii", 16, 0), 8 + 16)
    mount = ctypes.c_int()
    c_library = ctypes.CDLL(None, use_errno=True)
    if c_library.name_to_handle_at(fd, b"", handle, ctypes.byref(mount), AT_EMPTY_PATH) != 0:
        raise OSError(ctypes.get_errno(), "name_to_handle_at")
    return int.from_bytes(handle.raw[8:16], sys.byteorder)


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

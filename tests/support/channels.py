"""Channels of shared memory to look for, and their ends."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from kernel_oracle import PAGE
from vmm_linux.inspect import Channel, Holder, Mapper, Sharing, sharing

if TYPE_CHECKING:
    from collections.abc import Iterator

    from partners import Partner


LIBC = ctypes.CDLL(None, use_errno=True)
#: exit(2) of one thread alone.
SYS_EXIT = {"x86_64": 60, "aarch64": 93}.get(platform.machine())


def channel_of(fd: int, found: Sharing | None = None) -> Channel:
    """The one channel that is this file."""
    status = os.fstat(fd)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    channels = (found or sharing()).channels
    (channel,) = [e for e in channels if (e.device, e.inode) == (device, status.st_ino)]
    return channel


def holder(channel: Channel, pid: int) -> Holder:
    (found,) = [each for each in channel.holders if each.pid == pid]
    return found


def mapper(channel: Channel, pid: int) -> Mapper:
    (found,) = [each for each in channel.mappers if each.pid == pid]
    return found


@contextlib.contextmanager
def memory_file(name: str = "a test's", size: int = 4 * PAGE) -> Iterator[int]:
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def shm_file() -> Iterator[tuple[Path, int]]:
    path = Path("/dev/shm", f"vmm_linux_test_{uuid.uuid4().hex}")  # noqa: S108
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.truncate(fd, 2 * PAGE)
        yield path, fd
    finally:
        os.close(fd)
        path.unlink(missing_ok=True)


def give(other: Partner, *fds: int) -> None:
    """Hand descriptors over with nothing but the kernel's own means."""
    socket.send_fds(other.sock, [b"x"], list(fds))
    other.wait_until_ready()


def take(sock: socket.socket) -> int:
    (fd,) = socket.recv_fds(sock, 1, 1)[1]
    return fd


def take_and_map(sock: socket.socket) -> int:
    """Map what comes, and close the descriptor."""
    return map_without_descriptor(take(sock))


def map_without_descriptor(
    fd: int, protection: int = mmap.PROT_READ | mmap.PROT_WRITE, flags: int = mmap.MAP_SHARED
) -> int:
    """Map the whole file and close the descriptor, of which ``mmap.mmap`` would keep a copy."""
    size = ctypes.c_size_t(os.fstat(fd).st_size)
    LIBC.mmap.restype = ctypes.c_void_p
    address = LIBC.mmap(None, size, protection, flags, fd, ctypes.c_long(0))
    assert address != ctypes.c_void_p(-1).value
    os.close(fd)
    return int(address)

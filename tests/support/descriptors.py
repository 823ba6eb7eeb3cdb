"""Descriptors of memory, by the kernel's own calls."""

from __future__ import annotations

import fcntl
import os

from constants import RESIZING
from kernel_oracle import PAGE
from leaks import read_descriptors

SIZE = 4 * PAGE


def memory_files() -> int:
    """How many descriptors of memory files this process has."""
    return sum("/memfd:" in target for target in read_descriptors().values())


def a_memfd(size: int = SIZE, seals: int = RESIZING, flags: int = os.MFD_ALLOW_SEALING) -> int:
    """A memfd that somebody else made."""
    fd = os.memfd_create("somebody's", flags | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def reopened(fd: int, flags: int) -> int:
    """The same file opened otherwise; the first descriptor is closed."""
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)

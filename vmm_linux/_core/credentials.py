"""Users and groups as the kernel reports them, and whether they are known at all.

A user namespace may map only some users. The kernel reports all others by a placeholder, the
overflow id, which a user of the namespace can have as a number too. Both look the same, so neither
is known.

Source: user_namespaces(7), "Unmapped user and group IDs"; proc_sys_kernel(5) overflowuid.
"""

from __future__ import annotations

import os

NO_ID = 2**32 - 1
"""The number that stands for no id, and so the number of ids."""
USUAL_OVERFLOW = 65534
MOST_OVERFLOW = 65535
"""The highest placeholder: it has to fit into 16 bits for old programs."""
LONGEST_MAP = 1 << 16
"""Bytes; a map has 340 lines at most, of three numbers each."""


def known_uid(uid: int) -> int | None:
    """A user as the kernel reported it to this process; None if it is unknown.

    Nothing is cached: a process can enter another namespace, and the map of a new one is written
    later. Files are read only for a number that may be the placeholder.
    """
    return _known(uid, "uid")


def known_gid(gid: int) -> int | None:
    """A group as the kernel reported it to this process; None if it is unknown."""
    return _known(gid, "gid")


def _known(number: int, kind: str) -> int | None:
    if number > MOST_OVERFLOW:
        return None if number == NO_ID else number
    return None if number == _overflow(kind) and not _all_mapped(kind) else number


def _overflow(kind: str) -> int:
    """The placeholder."""
    try:
        return int(_contents(f"/proc/sys/kernel/overflow{kind}"))
    except (OSError, ValueError):
        return USUAL_OVERFLOW


def _all_mapped(kind: str) -> bool:
    """Whether this namespace maps every id; False where that cannot be read."""
    try:
        lines = _contents(f"/proc/thread-self/{kind}_map").splitlines()
        return sum(int(line.split()[2]) for line in lines) >= NO_ID
    except (OSError, ValueError, IndexError):
        return False


def _contents(path: str) -> bytes:
    """A file's contents, in bytes: decoding text can need a module that is not loaded yet."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, LONGEST_MAP)
    finally:
        os.close(fd)

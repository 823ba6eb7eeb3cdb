"""A /dev/shm of a process's own, and what is left there."""

from __future__ import annotations

import ctypes
from pathlib import Path

CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 1 << 14, 1 << 18

libc = ctypes.CDLL(None)


def have_own_shared_memory() -> bool:
    """Give this process a /dev/shm that no stranger uses, and tell whether that could be done."""
    mounts: list[tuple[object, ...]] = [
        (b"none", b"/", None, MS_REC | MS_PRIVATE, None),
        (b"tmpfs", b"/dev/shm", b"tmpfs", 0, None),
    ]
    return libc.unshare(CLONE_NEWNS) == 0 and not any(libc.mount(*mount) for mount in mounts)


def left_in_shared_memory(*, own: bool) -> list[str]:
    """What is in /dev/shm and could be ours."""
    names = [path.name for path in Path("/dev/shm").iterdir()]  # noqa: S108  looked at, not used
    return [name for name in names if own or "vmm" in name]

"""Finds which of its many causes an ENOMEM had, and what to do about it.

This reads, after the kernel refused, the numbers that it decides by. A cause that is gone by then
is reported as the kernel's commit accounting, which has no number to compare.
"""

from __future__ import annotations

import errno
import os

from vmm_linux._core import kernel
from vmm_linux._core.kernel import value_of
from vmm_linux.errors import Retcode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

NAMES = {
    errno.EMFILE: "no descriptor is left for this process; raise RLIMIT_NOFILE (ulimit -n) or "
    "close some",
    errno.ENFILE: "no descriptor is left on this machine; raise fs.file-max",
    errno.EAGAIN: "more memory than may be locked; raise RLIMIT_MEMLOCK (ulimit -l)",
    errno.EBADF: "the program closed this package's descriptor of the shared memory, or put "
    "another file under its number (os.closerange, os.dup2); what is mapped stays, and nothing "
    "else can be done with the buffer but to close its handle",
    errno.EBUSY: "another process holds a lease on the memory (fcntl(2) F_SETLEASE), which the "
    "kernel ends after fs.lease-break-time seconds",
    errno.EFAULT: "the memory is not there any more: something outside this package unmapped or "
    "protected it",
}
"""The reason of each errno that has only one."""

SPARE = 5
"""mremap(2) refuses this far below vm.max_map_count, the most that a call needs."""

COUNTED = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
"""The count in /proc/self/status that each limit is for."""


def explain(va: int | None, size: int, limits: Sequence[str], mappings: int) -> tuple[Retcode, str]:
    """The cause of an ENOMEM: return code and message.

    Args:
        va: the pages that the call was about, or None when it was to make new ones.
        size: bytes requested.
        limits: names of the limits of this process that apply.
        mappings: how many this process had at the refusal, or 0 if it still has them.
    """
    try:
        mapped, now = _look_through(va or 0, va + size if va is not None else 0)
        status = _contents("/proc/thread-self/status")
        most = int(_contents("/proc/sys/vm/max_map_count"))
    except OSError as unreadable:
        return Retcode.OUT_OF_MEMORY, f"no memory; the cause could not be looked up: {unreadable}"
    if not mapped:
        return Retcode.RESOURCE_NOT_FOUND, (
            f"part of [0x{va:x}, 0x{va:x} + {size}) is not mapped any more: something outside this "
            "package unmapped it; free it"
        )
    for name in limits:
        bound = kernel.resource_limit(kernel.RESOURCES[name])
        use = value_of(status, COUNTED[name]) or 0
        if use + size > bound:
            return Retcode.QUOTA_EXCEEDED, (
                f"{size} bytes more than the {use} in use would pass {name}, {bound} bytes; "
                f"raise it (ulimit {'-v' if name == 'RLIMIT_AS' else '-d'}) or free something"
            )
    mappings = mappings or now
    if mappings >= most - SPARE:
        return Retcode.OUT_OF_MEMORY, (
            f"{mappings} mappings are as many as vm.max_map_count ({most}) allows; raise it with "
            "sysctl, or commit in larger pieces"
        )
    available = kernel.available_bytes()
    if "RLIMIT_AS" not in limits and available < size:  # mapping alone takes no memory
        return Retcode.OUT_OF_MEMORY, (
            f"{size} bytes, and the machine has {available} bytes of memory and swap to give "
            "(vm.overcommit_memory says how strictly the kernel counts)"
        )
    return Retcode.OUT_OF_MEMORY, (
        f"the kernel has no memory, address space or commit charge for {size} bytes; commit less, "
        "or see vm.overcommit_memory and CommitLimit in /proc/meminfo"
    )


def explain_group(size: int) -> str:
    """Why this process's memory cgroup has no room for so many bytes: a message."""
    tightest = kernel.tightest()
    if tightest is None:
        return f"the memory cgroup had no room for {size} bytes; its limit is gone by now"
    room, limit, path = tightest
    return (
        f"no room for {size} bytes: the memory cgroup's limit is {limit} ({os.fsdecode(path)}), "
        f"and {room} are left now before the kernel kills a process of it; raise it, or free "
        "something"
    )


def _contents(path: str) -> str:
    """The contents of a kernel file."""
    with open(path, encoding="utf-8") as file:
        return file.read()


def _look_through(start: int, end: int) -> tuple[bool, int]:
    """Whether every page of the range is mapped, and how many mappings there are.

    Line by line: memory may be just what is short.
    """
    count = 0
    with open("/proc/thread-self/maps", "rb", 4096) as lines:
        for line in lines:
            count += 1
            low, _, high = line.partition(b" ")[0].partition(b"-")
            if int(low, 16) <= start < int(high, 16):
                start = int(high, 16)
    return start >= end, count

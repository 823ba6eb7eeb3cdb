"""Which of its many causes an ENOMEM had, and what to do about it.

Looked up after the kernel refused, from the figures it decides by; so a cause that went away in
between is told as the kernel's commit accounting, which has no figure of its own to compare.
"""

import errno
import resource
from collections.abc import Iterator
from pathlib import Path

from vmm_linux.errors import Retcode

__all__ = ["NAMES", "explain"]

NAMES = {
    errno.EMFILE: "no descriptor is left for this process; raise RLIMIT_NOFILE (ulimit -n) or "
    "close some",
    errno.ENFILE: "no descriptor is left on this machine; raise fs.file-max",
    errno.EAGAIN: "more memory than may be locked; raise RLIMIT_MEMLOCK (ulimit -l)",
    errno.EFAULT: "the memory is not there any more: something outside this package unmapped or "
    "protected it",
}
"""What an errno that has one meaning here means."""


def explain(va: int | None, size: int) -> tuple[Retcode, str]:
    """The cause of an ENOMEM: return code and message.

    Args:
        va: the pages that the call was about, or None when it was to make new ones.
        size: bytes wished.
    """
    try:
        maps = Path("/proc/self/maps").read_bytes()
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        limit = int(Path("/proc/sys/vm/max_map_count").read_text(encoding="utf-8"))
    except OSError as unreadable:
        return Retcode.OUT_OF_MEMORY, f"no memory; the cause could not be looked up: {unreadable}"
    if va is not None and not _is_mapped(maps, va, va + size):
        return Retcode.RESOURCE_NOT_FOUND, (
            f"part of [0x{va:x}, 0x{va:x} + {size}) is not mapped any more: something outside this "
            "package unmapped it; free it"
        )
    for name, used in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        bound = resource.getrlimit(getattr(resource, name))[0]
        use = _figure(status, used)
        if bound != resource.RLIM_INFINITY and use + size > bound:
            return Retcode.QUOTA_EXCEEDED, (
                f"{size} bytes more than the {use} in use would pass {name}, {bound} bytes; "
                f"raise it (ulimit {'-v' if name == 'RLIMIT_AS' else '-d'}) or free something"
            )
    mappings = maps.count(b"\n")
    if mappings >= limit - 1:
        return Retcode.OUT_OF_MEMORY, (
            f"{mappings} mappings are as many as vm.max_map_count ({limit}) allows; raise it with "
            "sysctl, or commit in larger pieces"
        )
    return Retcode.OUT_OF_MEMORY, (
        f"the kernel has no memory, address space or commit charge for {size} bytes; commit less, "
        "or see vm.overcommit_memory and CommitLimit in /proc/meminfo"
    )


def _figure(status: str, label: str) -> int:
    """A figure of /proc/self/status in bytes."""
    return next(
        (
            int(line.split()[1]) * 1024
            for line in status.splitlines()
            if line.startswith(label + ":")
        ),
        0,
    )


def _is_mapped(maps: bytes, start: int, end: int) -> bool:
    """Whether every page of the range is mapped."""
    for low, high in _ranges(maps):
        if low <= start < high:
            start = high
    return start >= end


def _ranges(maps: bytes) -> Iterator[tuple[int, int]]:
    """The address range of every mapping, ascending."""
    for line in maps.splitlines():
        low, _, high = line.split(b" ", 1)[0].partition(b"-")
        yield int(low, 16), int(high, 16)

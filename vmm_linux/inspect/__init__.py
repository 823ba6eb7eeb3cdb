"""Inspection of the memory of any process: its mappings, their figures, its pages.

The data come from ``/proc``, typed, with figures in bytes. For this process, the regions of each
VMM are known too. Inspection never touches the memory that it describes.

``pid`` is a process's id, None for this process. Each failure has its own exception, all of
them ``VmmError``: ``NoSuchProcess``, ``ProcessExited``, ``ZombieProcess``, ``KernelThread``,
``AccessDenied``, ``UnreadableText``; wrong arguments are ``INVALID_ARGUMENT``.
"""

from collections.abc import Iterable, Iterator
from typing import SupportsIndex

from vmm_linux._core.inspect import (
    Mapping,
    close_files,
    foreign_mapping,
    has_memory,
    known_page_flags,
    own_mapping,
    read_mappings,
    read_pages,
)
from vmm_linux._core.kernel import Feature, available, page_size, user_space_end
from vmm_linux._core.page_runs import PageFlags, PageRun, RegionRun
from vmm_linux._core.values import index
from vmm_linux.errors import InvalidArgument
from vmm_linux.inspect import channels
from vmm_linux.inspect.channel import Channel, Holder, Kind, Mapper, Sharing, Unread
from vmm_linux.inspect.errors import (
    AccessDenied,
    KernelThread,
    NoSuchProcess,
    ProcessExited,
    UnreadableText,
    ZombieProcess,
)
from vmm_linux.inspect.reading import asked_of, mappings_of, process_asked, refused, without_memory
from vmm_linux.inspect.snapshots import Change, Difference, Snapshot, diff

__all__ = [
    "AccessDenied",
    "Change",
    "Channel",
    "Difference",
    "Holder",
    "KernelThread",
    "Kind",
    "Mapper",
    "Mapping",
    "NoSuchProcess",
    "PageFlags",
    "PageRun",
    "ProcessExited",
    "RegionRun",
    "Sharing",
    "Snapshot",
    "Unread",
    "UnreadableText",
    "ZombieProcess",
    "at",
    "close_files",
    "diff",
    "maps",
    "page_flags_told",
    "pages",
    "rollup",
    "sharing",
    "snapshot",
]

for _public in map(globals().get, __all__):
    if isinstance(_public, type) and _public is not Mapping:  # whose module the core names
        _public.__module__ = __name__  # the name in tracebacks and pickles

SLICE = 1 << 30
"""Bytes whose pages are read one by one between two checks for signals."""


# ---- questions ----------------------------------------------------------------------------------


def snapshot(pid: SupportsIndex | None = None) -> Snapshot:
    """All mappings of a process with every figure of smaps.

    Args:
        pid: the process, None for this one.

    Returns:
        A sequence of ``Mapping``. This process's are cut at the borders of regions.

    Errors:
        INVALID_ARGUMENT: ``pid`` is no process id.
        NoSuchProcess, ProcessExited, ZombieProcess, KernelThread, AccessDenied: see there.
        UnreadableText: the kernel wrote a line that this package cannot read.

    Source: proc_pid_smaps(5).
    """
    return mappings_of("snapshot", pid, "smaps")


def maps(pid: SupportsIndex | None = None) -> Snapshot:
    """All mappings of a process without figures and flags, which cost most of the time.

    Args and errors: as for ``snapshot``.

    Returns:
        A sequence of ``Mapping`` whose figures and ``vm_flags`` are None.

    Source: proc_pid_maps(5).
    """
    return mappings_of("maps", pid, "maps")


def at(va: SupportsIndex, pid: SupportsIndex | None = None) -> Mapping | None:
    """The mapping that holds an address, without figures.

    Args:
        va: the address, a multiple of nothing.
        pid: the process, None for this one.

    Returns:
        As in ``maps``; None where nothing is mapped.

    Errors:
        INVALID_ARGUMENT: ``va`` is not in user space, or ``pid`` is no process id.
        Others: as for ``snapshot``.

    Source: ioctl PROCMAP_QUERY (Linux 6.11) where the kernel has it, else proc_pid_maps(5).
    """
    address = index("at", "va", va)
    if not 0 <= address < user_space_end():
        raise InvalidArgument(
            "at", f"va is {address:#x}; expected an address below {user_space_end():#x}"
        )
    if pid is None or (process := process_asked("at", pid)) is None:
        try:
            found = own_mapping(address)
        except OSError as reason:
            raise refused("at", None, reason) from None
    else:
        found = asked_of("at", process, "maps", lambda fd: foreign_mapping(fd, address))
    return maps(pid).at(address) if found is NotImplemented else found


def rollup(pid: SupportsIndex | None = None) -> Mapping:
    """The figures of all mappings of a process, summed by the kernel.

    Args and errors: as for ``snapshot``; UNIMPLEMENTED where the kernel has no smaps_rollup.

    Returns:
        One ``Mapping`` named ``[rollup]``, from the first mapping's start to the last one's end;
        ``pss_anon``, ``pss_file`` and ``pss_shmem`` are among its figures.

    Source: proc_pid_smaps(5), smaps_rollup.
    """
    process = process_asked("rollup", pid)

    def read(fd: int) -> Mapping:
        found = read_mappings(fd, True, False)
        if not found:
            raise without_memory("rollup", process, opened=True)
        return found[0]

    return asked_of("rollup", process, "smaps_rollup", read)


def pages(
    va: SupportsIndex,
    size: SupportsIndex,
    pid: SupportsIndex | None = None,
    *,
    exclusive: bool = False,
) -> list[PageRun]:
    """The known properties of each page of a range.

    Args:
        va: the range's first address, a multiple of the page size.
        size: bytes, a multiple of the page size, not 0.
        pid: the process, None for this one.
        exclusive: report ``PageFlags.EXCLUSIVE`` too, which takes a second look at every present
            page.

    Returns:
        ``PageRun``s that cover all of the range; alike neighbours are one run. A flag that this
        kernel cannot report is never set: see ``page_flags_told``.

    Errors:
        INVALID_ARGUMENT: a number is not as above, or the range is not in user space.
        Others: as for ``snapshot``.

    Source: ioctl PAGEMAP_SCAN (Linux 6.7) where the kernel has it, else proc_pid_pagemap(5).
    """
    start, end = _range("pages", va, size)
    process = process_asked("pages", pid)

    def read(fd: int) -> list[PageRun]:
        if available(Feature.PAGEMAP_SCAN):
            found = read_pages(fd, start, end, exclusive)
        else:
            found = _joined(start, end, _pages_of_mappings(fd, start, end, pid, exclusive))
        if process is not None and not has_memory(fd):
            raise without_memory("pages", process, opened=True)
        return found

    return asked_of("pages", process, "pagemap", read)


def page_flags_told(*, exclusive: bool = False) -> PageFlags:
    """The flags that ``pages`` can report on this kernel.

    Args:
        exclusive: the argument of ``pages``.
    """
    return PageFlags(known_page_flags(exclusive))


# ---- pages by the entries of pagemap ------------------------------------------------------------


def _pages_of_mappings(
    fd: int, start: int, end: int, pid: SupportsIndex | None, exclusive: bool
) -> Iterator[PageRun]:
    """The pages of the mappings in a range: a hole may have too many to read."""
    for mapping in maps(pid):
        low, high = max(start, mapping.start), min(end, mapping.end)
        while low < high:
            upto = min(high, low + SLICE)
            yield from read_pages(fd, low, upto, exclusive)
            low = upto


def _joined(start: int, end: int, runs: Iterable[PageRun]) -> list[PageRun]:
    """The runs with the gaps between them; alike neighbours are one run."""
    nothing = PageFlags(0)
    found: list[PageRun] = []

    def add(run: PageRun) -> None:
        if found and found[-1].flags == run.flags:
            found[-1] = found[-1]._replace(end=run.end)
        elif run.start < run.end:
            found.append(run)

    for run in runs:
        add(PageRun(start, run.start, nothing))
        add(run)
        start = run.end
    add(PageRun(start, end, nothing))
    return found


# ---- arguments -----------------------------------------------------------------------------------


def _range(method: str, va: SupportsIndex, size: SupportsIndex) -> tuple[int, int]:
    start, length, page = index(method, "va", va), index(method, "size", size), page_size()
    if start % page or length % page:
        raise InvalidArgument(
            method, f"va {start:#x} or size {length:#x} is no multiple of the page size {page}"
        )
    if length <= 0:
        raise InvalidArgument(method, f"size is {length:#x}; expected a page or more")
    if start < 0 or start + length > user_space_end():
        raise InvalidArgument(
            method,
            f"[{start:#x}, {start + length:#x}) is not in user space, [0, {user_space_end():#x})",
        )
    return start, start + length


# ---- what is shared ------------------------------------------------------------------------------


def sharing(*, all: bool = False) -> Sharing:  # noqa: A002 (what people call it)
    """Every shared-memory channel between processes on this machine.

    Memfds, files of /dev/shm, System V segments, shared anonymous memory; also deleted files,
    files of any tmpfs, and files of a file system without a device that the process has no mount
    of (any more), if a process maps them shared. Any end is enough to find a channel: a
    descriptor without a mapping, a mapping whose descriptor is closed. Nothing changes: no page
    is touched, and no file opened but memfds, for their seals.

    Processes may come and go meanwhile: one that ends before its turn is missing. Not
    seen are descriptors of unmapped files without a mount, descriptors in flight in a
    socket, memory of devices, dma-bufs and io_uring, pages copied on write after fork, ordinary
    files (they have a name and rights), and other processes that ``/proc`` does not show here
    (``hidepid``, another PID namespace).

    Args:
        all: also what only one process has, or none: a memfd with one end, a file in /dev/shm that
            no process has open.

    Returns:
        The channels that two processes or more hold or map, the biggest first, and the unreadable
        processes, which may have others.

    Errors:
        UnreadableText: the kernel wrote a line that this package cannot read.

    Source:
        proc(5), memfd_create(2), shmget(2).
    """
    return channels.find(maps, snapshot, all=all)

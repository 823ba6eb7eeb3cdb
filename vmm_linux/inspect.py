"""See the memory of any process: its mappings, their figures, its pages.

Everything is what the kernel tells in ``/proc``, as typed data, figures in bytes. Of this process's
own memory it is told besides which mapping is whose region. Nothing here touches the memory
it looks at.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import TYPE_CHECKING, NamedTuple, overload

from vmm_linux import _sharing
from vmm_linux._features import page_size, user_space_end
from vmm_linux._sharing import Channel, Holder, Kind, Mapper, Sharing, Unread
from vmm_linux._smaps import NAMES, SmapsRecord, parse_maps, parse_smaps
from vmm_linux.errors import Fail, InvalidArgument, InvalidOperation, NoCapability, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Mapping as MappingOf

    from vmm_linux.flags import VmmFlags
    from vmm_linux.states import PageKind, PageState

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
    "diff",
    "maps",
    "pages",
    "rollup",
    "sharing",
    "snapshot",
]


class NoSuchProcess(ResourceNotFound, ProcessLookupError):
    """No process has this id (``RESOURCE_NOT_FOUND``)."""


class ProcessExited(NoSuchProcess):
    """The process ended, or started another program, while it was read."""


class ZombieProcess(InvalidOperation):
    """The process has ended and waits for its parent: it has no memory (``INVALID_OPERATION``)."""


class KernelThread(InvalidOperation):
    """It is a thread of the kernel, which has no memory of its own (``INVALID_OPERATION``)."""


class AccessDenied(NoCapability):
    """The kernel lets this process not look at that one (``NO_CAPABILITY``)."""


class UnreadableText(Fail, ValueError):
    """The kernel's text has a line that cannot be read; the message holds it (``FAIL``)."""


class RegionRun(NamedTuple):
    """Pages of a region of this process that are alike: what a VMM made there, and meant.

    Attributes:
        base: start of the region.
        size: bytes of the region, guard pages not counted.
        state: ``PageState`` of the pages.
        kind: ``PageKind`` of the pages: PRIVATE, MDL or GUARD.
        flags: ``VmmFlags`` of the region, as allocated.
        protection: ``VmmFlags`` of the access they give, or will give once committed.
        sid: security id of the MDL buffer, None for other pages.
    """

    base: int
    size: int
    state: PageState
    kind: PageKind
    flags: VmmFlags
    protection: VmmFlags
    sid: int | None


class Mapping:
    region: RegionRun | None
    whole: Mapping

    def __init__(self, record: SmapsRecord) -> None:
        self._record = record
        self.region = None
        self.whole = self

    def __getattr__(self, name: str) -> int | None:
        return getattr(self._record, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._record == other._record

    def __hash__(self) -> int:
        return hash(self._record)

    if TYPE_CHECKING:

        @property
        def start(self) -> int: ...
        @property
        def end(self) -> int: ...
        @property
        def permissions(self) -> str: ...
        @property
        def offset(self) -> int: ...
        @property
        def device(self) -> str: ...
        @property
        def inode(self) -> int: ...
        @property
        def pathname(self) -> str | None: ...
        @property
        def deleted(self) -> bool: ...
        @property
        def vm_flags(self) -> frozenset[str] | None: ...
        @property
        def figures(self) -> MappingOf[str, int]: ...


class Snapshot(Sequence[Mapping]):
    """The mappings of a process at one moment, lowest first.

    Attributes:
        pid: the process.
    """

    def __init__(self, pid: int, mappings: Sequence[Mapping]) -> None:
        self.pid = pid
        self._mappings = mappings

    @overload
    def __getitem__(self, index: int) -> Mapping: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping]: ...
    def __getitem__(self, index: int | slice) -> Mapping | Sequence[Mapping]:
        return self._mappings[index]

    def __len__(self) -> int:
        return len(self._mappings)

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._mappings)

    def total(self, figure: str) -> int:
        """The sum of a figure (``"rss"``) over the kernel's mappings, each counted once."""
        wholes = {id(mapping.whole): mapping.whole for mapping in self}
        return sum(whole.figures.get(figure, 0) for whole in wholes.values())


class PageFlags(IntFlag):
    """What is known of pages."""

    PRESENT = 0x1
    SWAPPED = 0x2
    SHARED = 0x4
    EXCLUSIVE = 0x8
    HUGE = 0x10
    GUARD = 0x20
    WRITE_PROTECTED = 0x40
    ZERO = 0x80
    SOFT_DIRTY = 0x100


class PageRun(NamedTuple):
    """Neighbouring pages that are alike, ``[start, end)``; ``flags`` 0 where nothing is."""

    start: int
    end: int
    flags: PageFlags


class Change(NamedTuple):
    """One mapping that is in both snapshots and differs.

    Attributes:
        before: how it was.
        after: how it is.
        grown: bytes by which it is longer, below 0 where it shrank.
        figures: by how many bytes each figure changed, those that did not left out.
    """

    before: Mapping
    after: Mapping
    grown: int
    figures: dict[str, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """What happened between two snapshots.

    Attributes:
        appeared: mappings that are only in the later one.
        went: mappings that are only in the earlier one.
        changed: mappings in both that differ.
    """

    appeared: tuple[Mapping, ...]
    went: tuple[Mapping, ...]
    changed: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.appeared or self.went or self.changed)


def _read(method: str, pid: int | None, name: str) -> bytes:
    whose = "self" if pid is None else str(pid)
    try:
        with open(f"/proc/{whose}/{name}", "rb") as file:
            return file.read()
    except FileNotFoundError as reason:
        raise NoSuchProcess(method, f"there is no process {pid}", errno.ENOENT) from reason


def snapshot(pid: int | None = None) -> Snapshot:
    """All mappings of a process with every figure of smaps."""
    return Snapshot(
        pid or os.getpid(), [Mapping(r) for r in parse_smaps(_read("snapshot", pid, "smaps"))]
    )


def maps(pid: int | None = None) -> Snapshot:
    """All mappings of a process without the figures, which cost most of the time."""
    return Snapshot(
        pid or os.getpid(), [Mapping(r) for r in parse_maps(_read("maps", pid, "maps"))]
    )


def at(va: int, pid: int | None = None) -> Mapping | None:
    """The mapping that holds an address, without figures; None where nothing is mapped."""
    for mapping in maps(pid):
        if mapping.start <= va < mapping.end:
            return mapping
    return None


def rollup(pid: int | None = None) -> Mapping:
    """The figures of all mappings summed by the kernel (``smaps_rollup``)."""
    return Mapping(parse_smaps(_read("rollup", pid, "smaps_rollup"))[0])


def pages(va: int, size: int, pid: int | None = None) -> list[PageRun]:
    """What is known of each page of a range, neighbours that are alike together."""
    whose = "self" if pid is None else str(pid)
    page = page_size()
    runs: list[PageRun] = []
    with open(f"/proc/{whose}/pagemap", "rb", buffering=0) as file:
        for at_page in range(va, va + size, page):
            (entry,) = struct.unpack("Q", os.pread(file.fileno(), 8, at_page // page * 8))
            flags = PageFlags(0)
            for bit, flag in (
                (63, PageFlags.PRESENT),
                (62, PageFlags.SWAPPED),
                (61, PageFlags.SHARED),
                (58, PageFlags.GUARD),
                (56, PageFlags.EXCLUSIVE),
            ):
                if entry >> bit & 1:
                    flags |= flag
            if runs and runs[-1].flags == flags:
                runs[-1] = runs[-1]._replace(end=at_page + page)
            else:
                runs.append(PageRun(at_page, at_page + page, flags))
    return runs


def diff(before: Snapshot, after: Snapshot) -> Difference:
    """What appeared, went and changed from one snapshot to another."""

    def key(m: Mapping) -> tuple[object, ...]:
        return (m.start, m.pathname, m.offset, m.inode)

    old = {key(m): m for m in before}
    new = {key(m): m for m in after}
    changed = []
    for k, m in old.items():
        if k in new and new[k] != m:
            n = new[k]
            figures = {
                f: n.figures[f] - v
                for f, v in m.figures.items()
                if f in n.figures and n.figures[f] != v
            }
            changed.append(Change(m, n, (n.end - n.start) - (m.end - m.start), figures))
    return Difference(
        tuple(m for k, m in new.items() if k not in old),
        tuple(m for k, m in old.items() if k not in new),
        tuple(changed),
    )


def sharing(*, all: bool = False) -> Sharing:  # noqa: A002 (what people call it)
    """Every shared-memory channel between processes on this machine.

    Memfds, files of /dev/shm, System V segments, shared anonymous memory; also deleted files and
    files of any tmpfs that somebody maps shared. A channel is found by any of its ends: a
    descriptor that nobody maps, a mapping whose descriptor was closed. Nothing is changed: no page
    is touched, and no file opened but memfds, for their seals.

    Processes may come and go meanwhile: what ended before it was looked through is missing. Not
    seen are descriptors on their way in a socket, memory of devices, dma-bufs and io_uring, pages
    copied on write after fork, ordinary files (they have a name and rights), and other processes
    that ``/proc`` does not show here (``hidepid``, another PID namespace).

    Args:
        all: also what only one process has, or none: a memfd with one end, a file in /dev/shm that
            nobody has open.

    Returns:
        The channels that two processes or more hold or map, the biggest first, and the processes
        that may not be read, which may have others.

    Errors:
        FAIL: a process's maps has a line that cannot be read.

    Source:
        proc(5), memfd_create(2), shmget(2).
    """
    return _sharing.find(maps, snapshot, all=all)

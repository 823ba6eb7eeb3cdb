"""See the memory of any process: its mappings, their figures, its pages.

Everything is what the kernel tells in ``/proc``, as typed data, figures in bytes. Of this process's
own memory it is told besides which mapping is whose region. Nothing here touches the memory
it looks at.

``pid`` is a process's id, None for this process. What goes wrong has one exception each, all of
them ``VmmError``: ``NoSuchProcess``, ``ProcessExited``, ``ZombieProcess``, ``KernelThread``,
``AccessDenied``, ``UnreadableText``; wrong arguments are ``INVALID_ARGUMENT``.
"""

from __future__ import annotations

import contextlib
import errno
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, overload

from vmm_linux import _sharing
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
from vmm_linux._core.procfs import NAMES
from vmm_linux._inspect_types import PageFlags, PageRun, RegionRun
from vmm_linux._sharing import Channel, Holder, Kind, Mapper, Sharing, Unread
from vmm_linux._values import describe, exact_text, index, is_a, quoted
from vmm_linux.errors import (
    RETCODES,
    Fail,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    ResourceNotFound,
    Retcode,
    Unimplemented,
    VmmError,
    error,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import SupportsIndex, TypeVar

    Answer = TypeVar("Answer")

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

LAST_PID = (1 << 31) - 1
PF_KTHREAD = 0x00200000
"""Of the flags in /proc/PID/stat: a thread of the kernel."""
SLICE = 1 << 30
"""Bytes whose pages are looked at one by one before signals are looked for."""


class NoSuchProcess(ResourceNotFound, ProcessLookupError):
    """No process has this id (``RESOURCE_NOT_FOUND``)."""


class ProcessExited(NoSuchProcess):
    """It ended, or started another program, while it was read (``RESOURCE_NOT_FOUND``)."""


class ZombieProcess(InvalidOperation):
    """All its threads have ended, and it waits for its parent, without memory.

    (``INVALID_OPERATION``)
    """


class KernelThread(InvalidOperation):
    """It is a thread of the kernel, without memory of its own (``INVALID_OPERATION``)."""


class AccessDenied(NoCapability):
    """The kernel does not let this process look at that one (``NO_CAPABILITY``)."""


class UnreadableText(Fail, ValueError):
    """The kernel's text has a line that cannot be read; the message quotes it (``FAIL``)."""


# ---- what is told -------------------------------------------------------------------------------


class Snapshot(Sequence[Mapping]):
    """The mappings of a process, lowest first.

    They are in order and do not overlap. The kernel tells them piece by piece: what the process
    maps, unmaps or changes meanwhile may be among them or not. Where the kernel tells of an address
    twice, as of a mapping that grew meanwhile, its later word holds, and the mapping of which it
    told earlier is left out, all of it. Of a stopped process all is exact.

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

    def __repr__(self) -> str:
        return f"<Snapshot of process {self.pid}, {len(self)} mappings>"

    def at(self, va: SupportsIndex) -> Mapping | None:
        """The mapping that holds an address, None where nothing is mapped.

        Args:
            va: the address.

        Errors:
            INVALID_ARGUMENT: ``va`` is no integer of 64 bits.
        """
        va = index("Snapshot.at", "va", va)
        place = bisect_right(self, va, key=lambda mapping: mapping.start)
        mapping = self[place - 1] if place else None
        return mapping if mapping is not None and va < mapping.end else None

    def wholes(self) -> Iterator[Mapping]:
        """The kernel's own mappings, each once, not cut at the borders of regions."""
        end = 0
        for mapping in self:
            if mapping.start >= end:
                whole = mapping.whole
                end = whole.end
                yield whole

    def total(self, figure: str) -> int:
        """The sum of a figure over all mappings, each counted once.

        Args:
            figure: its name, as ``"rss"``. Mappings of which it is not told count as 0.

        Returns:
            Bytes.

        Errors:
            INVALID_ARGUMENT: no mapping has such a figure, and no kernel that this package knows.
        """
        name = exact_text(figure)
        if name is None:
            raise InvalidArgument(
                "Snapshot.total", f"figure is {describe(figure)}; expected a name as 'rss'"
            )
        figure = name
        told = [whole.figures[figure] for whole in self.wholes() if figure in whole.figures]
        if not told and figure not in NAMES:
            raise InvalidArgument("Snapshot.total", self._no_figure(figure))
        return sum(told)

    def _no_figure(self, figure: str) -> str:
        """What is wrong with the name of a figure, and which may have been meant."""
        names = sorted({*NAMES}.union(*(whole.figures for whole in self.wholes())))
        near = get_close_matches(figure[:100], names, 1)
        meant = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
        return f"figure is {quoted(figure)}, of which no mapping tells; {meant}"


class Change(NamedTuple):
    """A mapping that is in both snapshots and differs."""

    before: Mapping
    """How it was."""
    after: Mapping
    """How it is."""
    grown: int
    """Bytes by which it is longer; below 0 where it shrank."""
    figures: dict[str, int]
    """By how much each figure changed, in bytes; those that did not are left out."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What happened between two snapshots. False where nothing did.

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
    return _mappings("snapshot", pid, "smaps")


def maps(pid: SupportsIndex | None = None) -> Snapshot:
    """All mappings of a process without figures and flags, which cost most of the time.

    Args and errors: as for ``snapshot``.

    Returns:
        A sequence of ``Mapping`` whose figures and ``vm_flags`` are None.

    Source: proc_pid_maps(5).
    """
    return _mappings("maps", pid, "maps")


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
    if pid is None or (process := _process("at", pid)) is None:
        try:
            found = own_mapping(address)
        except OSError as reason:
            raise _refused("at", None, reason) from None
    else:
        found = _asked("at", process, "maps", lambda fd: foreign_mapping(fd, address))
    return maps(pid).at(address) if found is NotImplemented else found


def rollup(pid: SupportsIndex | None = None) -> Mapping:
    """The figures of all mappings of a process, summed by the kernel.

    Args and errors: as for ``snapshot``; UNIMPLEMENTED where the kernel has no smaps_rollup.

    Returns:
        One ``Mapping`` named ``[rollup]``, from the first mapping's start to the last one's end;
        ``pss_anon``, ``pss_file`` and ``pss_shmem`` are among its figures.

    Source: proc_pid_smaps(5), smaps_rollup.
    """
    process = _process("rollup", pid)

    def read(fd: int) -> Mapping:
        found = read_mappings(fd, True, False)
        if not found:
            raise _without_memory("rollup", process, opened=True)
        return found[0]

    return _asked("rollup", process, "smaps_rollup", read)


def pages(
    va: SupportsIndex,
    size: SupportsIndex,
    pid: SupportsIndex | None = None,
    *,
    exclusive: bool = False,
) -> list[PageRun]:
    """What is known of each page of a range.

    Args:
        va: where it begins, a multiple of the page size.
        size: bytes, a multiple of the page size, not 0.
        pid: the process, None for this one.
        exclusive: tell ``PageFlags.EXCLUSIVE`` too, for which every page that is present is
            looked at once more.

    Returns:
        ``PageRun``s that cover all of the range, neighbours that are alike together. A flag that
        this kernel cannot tell is never set: see ``page_flags_told``.

    Errors:
        INVALID_ARGUMENT: a number is not as above, or the range is not in user space.
        Others: as for ``snapshot``.

    Source: ioctl PAGEMAP_SCAN (Linux 6.7) where the kernel has it, else proc_pid_pagemap(5).
    """
    start, end = _range("pages", va, size)
    process = _process("pages", pid)

    def read(fd: int) -> list[PageRun]:
        if available(Feature.PAGEMAP_SCAN):
            found = read_pages(fd, start, end, exclusive)
        else:
            found = _joined(start, end, _pages_of_mappings(fd, start, end, pid, exclusive))
        if process is not None and not has_memory(fd):
            raise _without_memory("pages", process, opened=True)
        return found

    return _asked("pages", process, "pagemap", read)


def page_flags_told(*, exclusive: bool = False) -> PageFlags:
    """The flags that ``pages`` can tell on this kernel.

    Args:
        exclusive: what ``pages`` is given.
    """
    return PageFlags(known_page_flags(exclusive))


def diff(before: Iterable[Mapping], after: Iterable[Mapping]) -> Difference:
    """What appeared, went and changed from one snapshot of a process to another.

    A mapping is the same if it is of the same file (or of none, under the same name) and begins or
    ends at the same address.

    Args:
        before: the earlier ``Snapshot``, or any mappings.
        after: the later one.

    Returns:
        The ``Difference``; each of its parts by address.

    Errors:
        INVALID_ARGUMENT: one of them is something else.
    """
    old, new = _by_address("before", before), _by_address("after", after)
    changed = []
    for key in (_begin, _finish):
        earlier = {key(mapping): mapping for mapping in old.values()}
        for mapping in list(new.values()):
            if (was := earlier.get(key(mapping))) is not None:
                del old[was.start], new[mapping.start]
                if was != mapping:
                    changed.append(_change(was, mapping))
    changed.sort(key=lambda change: change.after.start)
    return Difference(tuple(new.values()), tuple(old.values()), tuple(changed))


def _by_address(name: str, mappings: Iterable[Mapping]) -> dict[int, Mapping]:
    try:
        found = list(mappings)
    except (VmmError, MemoryError):
        raise
    except Exception as problem:
        raise InvalidArgument(
            "diff", f"{name} is {describe(mappings)}; expected a Snapshot or mappings"
        ) from problem
    for each in found:
        if not is_a(each, Mapping):
            raise InvalidArgument("diff", f"{name} has {describe(each)}; expected mappings")
    return {mapping.start: mapping for mapping in found}


def _begin(mapping: Mapping) -> tuple[object, ...]:
    return (mapping.start, mapping.pathname, mapping.device, mapping.inode, mapping.offset)


def _finish(mapping: Mapping) -> tuple[object, ...]:
    return (mapping.end, mapping.pathname, mapping.device, mapping.inode)


def _change(before: Mapping, after: Mapping) -> Change:
    old, new = before.figures, after.figures
    return Change(
        before,
        after,
        (after.end - after.start) - (before.end - before.start),
        {name: new[name] - old[name] for name in new if name in old and new[name] != old[name]},
    )


# ---- pages by the entries of pagemap ------------------------------------------------------------


def _pages_of_mappings(
    fd: int, start: int, end: int, pid: SupportsIndex | None, exclusive: bool
) -> Iterator[PageRun]:
    """The pages of what is mapped in a range: a hole may have more than can ever be read."""
    for mapping in maps(pid):
        low, high = max(start, mapping.start), min(end, mapping.end)
        while low < high:
            upto = min(high, low + SLICE)
            yield from read_pages(fd, low, upto, exclusive)
            low = upto


def _joined(start: int, end: int, runs: Iterable[PageRun]) -> list[PageRun]:
    """The same with what is between them, neighbours that are alike made one."""
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


# ---- arguments ----------------------------------------------------------------------------------


def _process(method: str, pid: SupportsIndex | None) -> int | None:
    """The process that ``/proc`` is to be asked about, None for this one."""
    if pid is None:
        return None
    number = index(method, "pid", pid)
    if not 0 < number <= LAST_PID:
        raise InvalidArgument(method, "pid is not positive and of 32 bits; expected a process id")
    return None if number == os.getpid() else number


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


# ---- reading, and what can go wrong -------------------------------------------------------------


def _mappings(method: str, pid: SupportsIndex | None, name: str) -> Snapshot:
    process = _process(method, pid)

    def read(fd: int) -> Sequence[Mapping]:
        found = read_mappings(fd, name == "smaps", process is None)
        if found.backslashes:
            with contextlib.suppress(VmmError):
                _asked(method, process, "maps", found.settle_names)
        # A process that ends or starts another program is told up to there, as if that were all.
        # The file still stands for what it was opened for, and has nothing to tell any more.
        if process is not None and not found:
            raise _without_memory(method, process, opened=True)
        if process is not None and not os.pread(fd, 1, 0):
            raise _ended(method, process)
        return found

    return Snapshot(
        os.getpid() if process is None else process, _asked(method, process, name, read)
    )


def _asked(method: str, pid: int | None, name: str, read: Callable[[int], Answer]) -> Answer:
    """What ``read`` finds in a file of ``/proc/PID``.

    The first thread of a process can end while others live on. Then its files have nothing to tell
    any more, and another thread's have it all.
    """
    try:
        with _opened(method, pid, name) as fd:
            return read(fd)
    except ZombieProcess:
        for thread in _other_threads(pid):
            with (
                contextlib.suppress(ZombieProcess, NoSuchProcess),
                _opened(method, pid, f"task/{thread}/{name}") as fd,
            ):
                return read(fd)
        raise


def _other_threads(pid: int | None) -> list[str]:
    """The threads of a process but for its first one."""
    try:
        threads = [each.name for each in Path(f"/proc/{pid}/task").iterdir()]
        return [thread for thread in threads if thread != str(pid)]
    except OSError:
        return []


@contextlib.contextmanager
def _opened(method: str, pid: int | None, name: str) -> Generator[int]:
    """A file of ``/proc/PID``, open for reading; what the kernel refuses as one of our errors."""
    fd = None
    # Plain strings: for want of memory for a path object, Python raises something else than
    # MemoryError.
    path = f"/proc/{pid or 'thread-self'}/{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        yield fd
    except VmmError:
        raise
    except OSError as reason:
        raise _refused(method, pid, reason, opened=fd is not None) from None
    except ValueError as reason:
        raise UnreadableText(
            method, f"what the kernel tells of {_named(pid)} cannot be read: {reason}"
        ) from None
    finally:
        if fd is not None:
            os.close(fd)


def _named(pid: int | None) -> str:
    return "this process" if pid is None else f"process {pid}"


def _refused(method: str, pid: int | None, reason: OSError, *, opened: bool = False) -> VmmError:
    """What an errno of ``/proc`` means; ``opened``: of a file that was opened before."""
    number = reason.errno or errno.EIO
    if number in (errno.EACCES, errno.EPERM):
        return AccessDenied(
            method,
            f"the kernel does not let this process look at {_named(pid)}; be its user or root "
            "(ptrace(2), CAP_SYS_PTRACE)",
            number,
        )
    # By its folder: that of a thread goes with the thread.
    if number == errno.ENOENT and reason.filename and Path(reason.filename).parent.exists():
        return Unimplemented(method, f"this kernel has no {reason.filename}", number)
    if pid is not None and number in (errno.ENOENT, errno.ESRCH):
        return _without_memory(method, pid, opened=opened)
    return error(
        RETCODES.get(number, Retcode.FAIL),
        method,
        f"the kernel did not tell about {_named(pid)}: {reason.strerror}",
        number,
    )


def _without_memory(method: str, pid: int | None, *, opened: bool) -> VmmError:
    """Why a process has nothing to tell; ``opened``: it was there a moment ago."""
    try:
        stat = Path(f"/proc/{pid or 'thread-self'}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        stat = b""
    # The program's name is in parentheses, and may have some.
    state, *fields = stat.rpartition(b")")[2].split() or [b""]
    if stat and int(fields[5]) & PF_KTHREAD:
        return KernelThread(method, f"{pid} is a thread of the kernel; it has no memory of its own")
    if state in (b"Z", b"X"):
        return ZombieProcess(
            method, f"process {pid} has ended and waits for its parent; it has no memory any more"
        )
    if stat or opened:
        return _ended(method, pid)
    return NoSuchProcess(method, f"there is no process {pid}", errno.ESRCH)


def _ended(method: str, pid: int | None) -> ProcessExited:
    return ProcessExited(
        method, f"process {pid} ended, or started another program, while it was read", errno.ESRCH
    )


# ---- what is shared -----------------------------------------------------------------------------


def sharing(*, all: bool = False) -> Sharing:  # noqa: A002 (what people call it)
    """Every shared-memory channel between processes on this machine.

    Memfds, files of /dev/shm, System V segments, shared anonymous memory; also deleted files,
    files of any tmpfs, and files of a file system without a device that the process has no mount
    of (any more), if somebody maps them shared. A channel is found by any of its ends: a
    descriptor that nobody maps, a mapping whose descriptor was closed. Nothing is changed: no page
    is touched, and no file opened but memfds, for their seals.

    Processes may come and go meanwhile: what ended before it was looked through is missing. Not
    seen are descriptors of what has no mount and is not mapped, descriptors on their way in a
    socket, memory of devices, dma-bufs and io_uring, pages copied on write after fork, ordinary
    files (they have a name and rights), and other processes that ``/proc`` does not show here
    (``hidepid``, another PID namespace).

    Args:
        all: also what only one process has, or none: a memfd with one end, a file in /dev/shm that
            nobody has open.

    Returns:
        The channels that two processes or more hold or map, the biggest first, and the processes
        that may not be read, which may have others.

    Errors:
        UnreadableText: the kernel wrote a line that this package cannot read.

    Source:
        proc(5), memfd_create(2), shmget(2).
    """
    return _sharing.find(maps, snapshot, all=all)

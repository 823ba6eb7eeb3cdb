"""Finds the memory that processes of this machine share: ``vmm_linux.inspect.sharing``.

Any end is enough to find a channel: a descriptor without a mapping, or a mapping whose descriptor
is closed. The processes neither cooperate nor notice: mappings and descriptors are read from
``/proc``, and no page is touched.
"""

import contextlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from vmm_linux._core.inspect import Mapping
from vmm_linux.errors import InvalidOperation, ResourceNotFound
from vmm_linux.inspect.channel import Channel, Holder, Kind, Mapper, Sharing, Unread
from vmm_linux.inspect.processes import (
    DELETED,
    IN_MEMORY,
    TOO_LONG,
    Descriptor,
    Facts,
    Mount,
    Process,
    descriptors_of,
    device_text,
    internal_mounts,
    look_at,
    mounts_of,
    process_of,
    processes,
    threads_of,
)

GONE = (ResourceNotFound, ProcessLookupError, FileNotFoundError)
"""The errors for a process that no longer exists."""
SEALS = ("SEAL", "SHRINK", "GROW", "WRITE", "FUTURE_WRITE", "EXEC")
"""The seals by their bits, as in ``F_SEAL_SEAL``."""
SHM = "/dev/shm"  # noqa: S108 (read, not written)


class Key(NamedTuple):
    """The identity of a channel. Ids of System V segments belong to an IPC namespace."""

    device: str
    inode: int
    namespace: str = ""


@dataclass
class Found:
    """A channel under construction: the kernel's data from each of its ends."""

    kinds: set[Kind] = field(default_factory=set)
    name: str = ""
    deleted: bool = False
    held: list[tuple[Process, Descriptor]] = field(default_factory=list)
    mapped: list[tuple[Process, Mapping]] = field(default_factory=list)
    mounts: dict[int, dict[int, Mount]] = field(default_factory=dict)
    facts: Facts | None = None
    attached: int | None = None

    @property
    def kind(self) -> Kind:
        """The most specific of the kinds seen at its ends."""
        return min(self.kinds, key=list(Kind).index)

    def is_memory(self) -> bool:
        """Whether it is a channel by itself, or at least mapped as one."""
        by_itself = self.kind not in {Kind.DELETED, Kind.TMPFS, Kind.DETACHED}
        return by_itself or any("s" in record.permissions for _, record in self.mapped)

    def is_shared(self) -> bool:
        """Whether two processes have it, unreadable ones included."""
        pids = {process.pid for process, _ in (*self.held, *self.mapped)}
        wholes = {(process.pid, record.whole.start) for process, record in self.mapped}
        return len(pids) + max((self.attached or 0) - len(wholes), 0) >= 2


def find(
    maps: Callable[[int], Iterable[Mapping]],
    snapshot: Callable[[int], Iterable[Mapping]],
    *,
    all: bool,  # noqa: A002 (what people call it)
) -> Sharing:
    """See ``vmm_linux.inspect.sharing``: ``snapshot`` reads the mappings with their figures."""
    internal = internal_mounts()
    found: defaultdict[Key, Found] = defaultdict(Found)
    unread: list[Unread] = []
    read = 0
    for process in processes():
        try:
            read += collect(process, maps, internal, found)
        except PermissionError:
            if process_of(process.pid) is not None:
                unread.append(Unread(process.pid, process.name, process.uid))
    add_system_v(internal, found)
    if all:
        add_dev_shm(found)
    wanted = {
        key: each for key, each in found.items() if each.is_memory() and (all or each.is_shared())
    }
    figures = figures_of(wanted.values(), snapshot)
    channels = [channel_of(key, each, figures) for key, each in wanted.items()]
    channels.sort(key=lambda each: (-each.size, each.device, each.inode))
    return Sharing(tuple(channels), tuple(sorted(unread, key=lambda each: each.pid)), read)


# ---- one process --------------------------------------------------------------------------------


def collect(
    process: Process,
    maps: Callable[[int], Iterable[Mapping]],
    internal: dict[int, Mount],
    found: dict[Key, Found],
) -> bool:
    """Add a process's ends: whether it existed to the end.

    Errors:
        PermissionError: it is unreadable.
    """
    tids = threads_of(process)
    mounts = {**mounts_seen_by(process, tids), **internal}
    records = mappings_of(maps, process)
    descriptors = descriptors_of(process, tids, mounts)
    namespace = ipc_namespace(f"{process.pid}/task/{tid}" for tid in tids)
    again = process_of(process.pid)
    if again is None or again.started != process.started:
        return False  # it ended, and its number may have a new owner
    kinds = Kinds(mounts, internal, namespace)
    for record in records:
        name = record.pathname or ""
        kind = kinds.of(record.device, name, record.deleted)
        if kind is not None:
            channel = found[kinds.key(kind, record.device, record.inode)]
            note(channel, kind, name, record.deleted)
            channel.mapped.append((process, record))
            channel.mounts[process.pid] = mounts
    for descriptor in descriptors:
        file = descriptor.file
        kind = kinds.of(file.device, file.name, file.deleted)
        if kind is not None:
            channel = found[kinds.key(kind, file.device, file.inode)]
            note(channel, kind, file.name, file.deleted)
            channel.held.append((process, descriptor))
            channel.mounts[process.pid] = mounts
    return True


def note(channel: Found, kind: Kind, name: str, deleted: bool) -> None:
    """Record the data of an end in its channel."""
    channel.kinds.add(kind)
    if name == TOO_LONG and channel.name:
        return  # a mapping reported it, at any length
    channel.name = plain_name(kind, name.removesuffix(DELETED) if deleted else name)
    channel.deleted = deleted and kind in {Kind.DELETED, Kind.DEV_SHM, Kind.TMPFS}


def plain_name(kind: Kind, name: str) -> str:
    """The name without the kernel's additions."""
    if kind is Kind.MEMFD:
        return name.removeprefix("/memfd:")
    if kind is Kind.SYSTEM_V:
        return name.removeprefix("/")
    if kind is Kind.ANONYMOUS:
        return name.removeprefix("[anon_shmem:").removesuffix("]") if name[:1] == "[" else ""
    return name


def mounts_seen_by(process: Process, tids: list[int]) -> dict[int, Mount]:
    """Its mounts; none where they are unreadable: memory without a path is recognized anyway.

    Where its first thread has ended, another thread's file has them.
    """
    for tid in tids:
        with contextlib.suppress(OSError):
            return mounts_of(f"{process.pid}/task/{tid}")
    return {}


def mappings_of(maps: Callable[[int], Iterable[Mapping]], process: Process) -> list[Mapping]:
    """The mappings of a process; none where it has ended."""
    with contextlib.suppress(InvalidOperation, *GONE):
        return list(maps(process.pid))
    return []


def ipc_namespace(threads: Iterable[str]) -> str:
    """The namespace whose System V segments a process sees; empty if unknown.

    ``threads`` are the folders of its threads under ``/proc``; an ended one's has no namespace.
    """
    for thread in threads:
        with contextlib.suppress(OSError):
            return os.readlink(f"/proc/{thread}/ns/ipc")  # noqa: PTH115 (not a path)
    return ""


class Kinds:
    """The kind of a process's file, by its mount in that process."""

    def __init__(
        self, mounts: dict[int, Mount], internal: dict[int, Mount], namespace: str
    ) -> None:
        self.internal = {mount.device for mount in internal.values()}
        self.in_memory = {m.device for m in mounts.values() if m.filesystem in IN_MEMORY}
        self.shm = {m.device for m in mounts.values() if m.point.endswith(SHM)} & self.in_memory
        self.mounted = {m.device for number, m in mounts.items() if number not in internal}
        self.namespace = namespace

    def of(self, device: str, name: str, deleted: bool) -> Kind | None:
        """The kind, or None if it is no memory that can be shared unseen."""
        if device in self.internal:
            if name.startswith("/SYSV"):
                return Kind.SYSTEM_V
            return Kind.MEMFD if name.startswith("/memfd:") else Kind.ANONYMOUS
        if device in self.shm:
            return Kind.DEV_SHM
        if deleted:
            return Kind.DELETED
        if device in self.in_memory:
            return Kind.TMPFS
        return Kind.DETACHED if self.is_detached(device, name) else None

    def is_detached(self, device: str, name: str) -> bool:
        """Whether a file lies in no file system that the process sees, nor on a block device.

        An unmounted tmpfs lives on in its files, which keep a path that leads nowhere.
        """
        unseen = bool(self.mounted) and device not in self.mounted
        return unseen and device.startswith("00:") and name.startswith("/")

    def key(self, kind: Kind, device: str, inode: int) -> Key:
        """The identity of the channel."""
        return Key(device, inode, f"ipc {self.namespace}" if kind is Kind.SYSTEM_V else "")


# ---- channels without a process -----------------------------------------------------------------


def add_system_v(internal: dict[int, Mount], found: dict[Key, Found]) -> None:
    """Add the kernel's list: the segments of this IPC namespace."""
    device = next((each.device for each in internal.values() if each.filesystem == "tmpfs"), "")
    namespace = ipc_namespace(["thread-self"])
    for segment in system_v_segments():
        channel = found[Key(device, segment["shmid"], f"ipc {namespace}")]
        note(channel, Kind.SYSTEM_V, f"SYSV{segment['key'] & 0xFFFFFFFF:08x}", deleted=False)
        resident = segment["rss"] + segment["swap"] if "rss" in segment else None
        channel.facts = Facts(segment["size"], resident, None)
        channel.attached = segment["nattch"]


def system_v_segments() -> Iterator[dict[str, int]]:
    """The lines of /proc/sysvipc/shm by its column names; permissions are octal."""
    try:
        lines = Path("/proc/sysvipc/shm").read_text("utf-8").splitlines()
    except OSError:  # a kernel without System V
        return
    columns = lines[0].split()
    for line in lines[1:]:
        yield dict(zip(columns, map(int, line.split()), strict=True))


def add_dev_shm(found: dict[Key, Found]) -> None:
    """Add the files of /dev/shm, open or not."""
    # A file system mounted there can have a server that blocks.
    mounted = {mount.point for mount in mounts_of("thread-self").values()}
    for folder, folders, names in os.walk(SHM):
        folders[:] = [name for name in folders if f"{folder}/{name}" not in mounted]
        for path in {f"{folder}/{name}" for name in names} - mounted:
            with contextlib.suppress(OSError):
                status = Path(path).lstat()
                if stat.S_ISREG(status.st_mode):
                    channel = found[Key(device_text(status.st_dev), status.st_ino)]
                    note(channel, Kind.DEV_SHM, path, deleted=False)
                    channel.facts = Facts(status.st_size, status.st_blocks * 512, None)


# ---- from ends to channels ----------------------------------------------------------------------


def figures_of(
    channels: Iterable[Found], snapshot: Callable[[int], Iterable[Mapping]]
) -> dict[tuple[int, int], Mapping]:
    """The mappings of these channels with figures, by process and start, if they still exist."""
    records = {}
    for pid in {process.pid for each in channels for process, _ in each.mapped}:
        with contextlib.suppress(InvalidOperation, PermissionError, *GONE):
            for record in snapshot(pid):
                records[pid, record.start] = record
    return records


def channel_of(key: Key, found: Found, figures: dict[tuple[int, int], Mapping]) -> Channel:
    """The finished record of a channel."""
    facts = found.facts or facts_of(key, found)
    size = facts.size
    if size is None:
        size = max((r.offset + r.end - r.start for _, r in found.mapped), default=0)
    has_seals = found.kind is Kind.MEMFD and facts.seals is not None
    return Channel(
        kind=found.kind,
        device=key.device,
        inode=key.inode,
        name=found.name,
        deleted=found.deleted,
        size=size,
        resident=facts.resident,
        seals=seal_names(facts.seals or 0) if has_seals else None,
        holders=tuple(holders_of(found)),
        mappers=tuple(mappers_of(found, figures)),
        attached=found.attached,
    )


def facts_of(key: Key, found: Found) -> Facts:
    """The kernel's data about the file, through a descriptor or, where permitted, a mapping."""
    paths = [(process, descriptor.path) for process, descriptor in found.held]
    for process, record in found.mapped:
        whole = record.whole
        paths.append((process, f"{process.pid}/map_files/{whole.start:x}-{whole.end:x}"))
    looks = (look_at(path, key.inode, found.mounts[process.pid]) for process, path in paths)
    return next(filter(None, looks), Facts(None, None, None))


def seal_names(seals: int) -> tuple[str, ...]:
    """The kernel's names of seals; a bit without a known name is a number."""
    bits = (at for at in range(seals.bit_length()) if seals >> at & 1)
    return tuple(f"F_SEAL_{SEALS[at]}" if at < len(SEALS) else hex(1 << at) for at in bits)


def holders_of(found: Found) -> Iterator[Holder]:
    """Descriptors by process and access."""
    groups: defaultdict[tuple[Process, str], list[int]] = defaultdict(list)
    for process, descriptor in found.held:
        groups[process, descriptor.access].append(descriptor.number)
    for (process, access), numbers in sorted(groups.items()):
        yield Holder(process.pid, process.name, process.uid, access, tuple(sorted(numbers)))


def mappers_of(found: Found, figures: dict[tuple[int, int], Mapping]) -> Iterator[Mapper]:
    """Mappings by process and permissions."""
    groups: defaultdict[tuple[int, str], list[Mapping]] = defaultdict(list)
    names = {process.pid: process for process, _ in found.mapped}
    for process, record in found.mapped:
        groups[process.pid, record.permissions].append(record)
    for (pid, permissions), records in sorted(groups.items()):
        size = sum(record.end - record.start for record in records)
        wholes = {
            full.whole.start: full.whole
            for record in records
            if (full := figures.get((pid, record.start))) is not None
            and (full.device, full.inode) == (record.device, record.inode)
        }
        resident = sum(whole.figures.get("rss", 0) for whole in wholes.values()) if wholes else None
        flags = [whole.vm_flags for whole in wholes.values() if whole.vm_flags is not None]
        may_write = any("mw" in each for each in flags) and "s" in permissions if flags else None
        yield Mapper(pid, names[pid].name, names[pid].uid, permissions, may_write, size, resident)

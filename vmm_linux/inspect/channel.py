"""Memory that processes share: the records of ``vmm_linux.inspect.sharing``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of channels, the more specific first."""

    MEMFD = "memfd"
    SYSTEM_V = "system v"
    ANONYMOUS = "anonymous"
    DEV_SHM = "/dev/shm"  # noqa: S108 (as above)
    DELETED = "deleted file"
    TMPFS = "tmpfs file"
    DETACHED = "detached file"


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has descriptors of a channel, all with the same access.

    Attributes:
        pid: the process.
        name: its command, as it calls itself.
        uid: its user; None if unknown, as outside this user namespace.
        access: ``"r"``, ``"w"``, ``"rw"``, or ``"path"`` for a name of the file alone.
        descriptors: their numbers.
    """

    pid: int
    name: str
    uid: int | None
    access: str
    descriptors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mapper:
    """A process that maps a channel, all with the same permissions.

    Attributes:
        pid: the process.
        name: its command, as it calls itself.
        uid: its user; None if unknown, as outside this user namespace.
        permissions: as the kernel writes them: ``"rw-s"``, ``"r--s"``; ``p`` for a copy on write,
            which sees others' writes until it writes itself.
        may_write: whether it could give itself write access to the shared pages; None: unknown.
        size: bytes mapped.
        resident: bytes of them in its page table; None: unknown.
    """

    pid: int
    name: str
    uid: int | None
    permissions: str
    may_write: bool | None
    size: int
    resident: int | None


@dataclass(frozen=True, slots=True)
class Channel:
    """Memory that processes share, or could.

    Attributes:
        kind: the kind of memory.
        device: of its file system, ``major:minor`` in hexadecimal.
        inode: its number there; of a System V segment its id.
        name: the memfd's name, the file's path, the segment's key; empty where it has none. Its
            maker chose it: it identifies nothing.
        deleted: a file whose last name was removed.
        size: its bytes; if they are unknown, up to the last one mapped.
        resident: bytes of memory and swap that it takes; None: unknown.
        seals: by the kernel's names; None where none can be read.
        holders: the processes with descriptors.
        mappers: the processes with mappings.
        attached: how often a System V segment is attached, by unreadable processes too.
    """

    kind: Kind
    device: str
    inode: int
    name: str
    deleted: bool
    size: int
    resident: int | None
    seals: tuple[str, ...] | None
    holders: tuple[Holder, ...]
    mappers: tuple[Mapper, ...]
    attached: int | None

    @property
    def processes(self) -> int:
        """The number of processes that hold or map it."""
        return len({each.pid for each in self.holders} | {each.pid for each in self.mappers})


@dataclass(frozen=True, slots=True)
class Unread:
    """A process whose mappings and descriptors are unreadable; ``uid`` as of a ``Holder``."""

    pid: int
    name: str
    uid: int | None


@dataclass(frozen=True, slots=True)
class Sharing:
    """The shared memory of a machine.

    Attributes:
        channels: the biggest first.
        unread: unreadable processes, which may have others, or these too.
        read: the number of processes that were read.
    """

    channels: tuple[Channel, ...]
    unread: tuple[Unread, ...]
    read: int

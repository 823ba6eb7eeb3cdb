"""Memory that processes share: the records of ``vmm_linux.inspect.sharing``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Channel", "Holder", "Kind", "Mapper", "Sharing", "Unread"]


class Kind(StrEnum):
    """What a channel is made of, the more telling first."""

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
        uid: its user; None for a stranger to this user namespace, who may be anybody.
        access: ``"r"``, ``"w"``, ``"rw"``, or ``"path"`` for a name of the file and no more.
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
        uid: its user; None for a stranger to this user namespace, who may be anybody.
        permissions: as the kernel writes them: ``"rw-s"``, ``"r--s"``; ``p`` for a copy on write,
            which sees what others write until it writes itself.
        may_write: whether it could give itself write access to the shared pages; None: not told.
        size: bytes mapped.
        resident: bytes of them in its page table; None: not told.
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
        kind: what it is made of.
        device: of the file system it lies in, ``major:minor`` in hexadecimal.
        inode: its number there; of a System V segment its id.
        name: the memfd's name, the file's path, the segment's key; empty where it has none. Its
            maker chose it: it identifies nothing.
        deleted: a file whose last name was taken away.
        size: its bytes, or where the kernel does not tell us, up to the last one mapped.
        resident: bytes of memory and swap that it takes; None: not told.
        seals: by the kernel's names; None where there are none to be read.
        holders: who has descriptors.
        mappers: who maps it.
        attached: how often a System V segment is attached, by processes that could not be read too.
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
        """How many processes were found at it."""
        return len({each.pid for each in self.holders} | {each.pid for each in self.mappers})


@dataclass(frozen=True, slots=True)
class Unread:
    """A process whose mappings and descriptors may not be read; ``uid`` as of a ``Holder``."""

    pid: int
    name: str
    uid: int | None


@dataclass(frozen=True, slots=True)
class Sharing:
    """What was found.

    Attributes:
        channels: the biggest first.
        unread: processes that may have others, or be at these.
        read: how many processes were looked through.
    """

    channels: tuple[Channel, ...]
    unread: tuple[Unread, ...]
    read: int

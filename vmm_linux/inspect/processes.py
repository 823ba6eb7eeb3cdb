"""The processes of this machine, and their descriptors of memory files.

All data come from ``/proc``. Only ``look_at`` opens a file of another process, and first checks its
kind without opening it: opening a pipe or a device changes something, and a file of a user's own
file system could block for ever.
"""

import contextlib
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vmm_linux._core.credentials import known_uid

PROC = Path("/proc")
PF_KTHREAD = 0x00200000
"""In /proc/PID/stat: a thread of the kernel."""
F_GET_SEALS = 1034
MFD_HUGETLB, MFD_HUGE_SHIFT = 0x4, 26
IN_MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs"})
"""File systems whose files are memory and nothing else."""
OWN_FILESYSTEMS = frozenset({*IN_MEMORY, "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs"})
"""File systems that answer by themselves, without a server that could block."""
DELETED = " (deleted)"
TOO_LONG = "/..."
"""Stands for a path of more than a page of characters, which the kernel does not report."""
OCTAL = re.compile(rb"\\([0-7]{3})")
"""In /proc/PID/mountinfo: a byte that would end a field."""
NO_ACCESS = os.O_PATH
"""Of open(2): a descriptor that is only a name of the file."""


class Process(NamedTuple):
    """The public data of a process."""

    pid: int
    name: str
    """Its command, as it calls itself; empty if unknown."""
    uid: int | None
    """Its user; None if unknown, as outside this user namespace."""
    started: int
    """In ticks, which differ for a later process with the same number; 0 if unknown."""


class Mount(NamedTuple):
    """A mounted file system of a process."""

    device: str
    point: str
    filesystem: str


class File(NamedTuple):
    """The file of a descriptor, as the kernel reports it without opening it."""

    device: str
    inode: int
    name: str
    deleted: bool
    mount: Mount


class Descriptor(NamedTuple):
    """A descriptor of another process; ``path`` is its link under ``/proc``."""

    path: str
    number: int
    access: str
    """``"r"``, ``"w"``, ``"rw"``, or ``"path"``: only a name of the file."""
    file: File


class Facts(NamedTuple):
    """The kernel's data about a memory file; None where unknown."""

    size: int | None
    resident: int | None
    seals: int | None


# ---- processes ----------------------------------------------------------------------------------


def processes() -> Iterator[Process]:
    """Every process except kernel threads; one that ends meanwhile may be missing."""
    for folder in PROC.iterdir():
        if folder.name.isdecimal() and (process := process_of(int(folder.name))) is not None:
            yield process


def process_of(pid: int) -> Process | None:
    """A process by its number; None if there is none, and for a kernel thread."""
    folder = PROC / str(pid)
    try:
        uid = known_uid(folder.stat().st_uid)
        try:
            name, fields = stat_of(pid)
        except PermissionError:  # hidepid=1: only its existence is known
            return Process(pid, "", uid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if is_of_kernel(fields):
        return None
    return Process(pid, os.fsdecode(name), uid, int(fields[19]))


def stat_of(pid: int | str) -> tuple[bytes, list[bytes]]:
    """The name in /proc/PID/stat, and the fields after it, the process's state first; or OSError.

    The name is in parentheses and may hold any byte, parentheses and blanks too.
    """
    text = (PROC / str(pid) / "stat").read_bytes()
    name, _, fields = text.partition(b"(")[2].rpartition(b")")
    return name, fields.split()


def is_of_kernel(fields: list[bytes]) -> bool:
    """Whether these fields of ``stat_of`` are of a thread of the kernel."""
    return bool(int(fields[6]) & PF_KTHREAD)


def threads_of(process: Process) -> list[int]:
    """The numbers of its threads, the first one's first; empty when it is gone."""
    try:
        found = [int(each.name) for each in (PROC / str(process.pid) / "task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return sorted(found, key=lambda tid: (tid != process.pid, tid))


# ---- descriptors --------------------------------------------------------------------------------


def internal_mounts() -> dict[int, Mount]:
    """The kernel's own mounts, of memory without a path, by number, found with files of our own.

    The kernel has one mount for every memfd, System V segment and shared anonymous mapping, and one
    for each size of huge pages. The mount identifies such memory: its name could be imitated.
    """
    found = {}
    kinds = [(0, "tmpfs"), *((flags, "hugetlbfs") for flags in huge_page_flags())]
    for flags, filesystem in kinds:
        # Without huge pages there are no such files. Without the others nothing could be found.
        with contextlib.suppress(OSError) if flags else contextlib.nullcontext():
            fd = os.memfd_create("vmm_linux sharing", flags | os.MFD_CLOEXEC)
            try:
                device = os.fstat(fd).st_dev
                number = int(fdinfo(f"thread-self/fdinfo/{fd}")["mnt_id"])
                found[number] = Mount(device_text(device), "", filesystem)
            finally:
                os.close(fd)
    return found


def huge_page_flags() -> Iterator[int]:
    """What memfd_create(2) takes for each size of huge pages that this kernel has."""
    with contextlib.suppress(OSError):
        for folder in Path("/sys/kernel/mm/hugepages").iterdir():
            size = int(folder.name.removeprefix("hugepages-").removesuffix("kB")) << 10
            yield MFD_HUGETLB | size.bit_length() - 1 << MFD_HUGE_SHIFT


def mounts_of(thread: str) -> dict[int, Mount]:
    """The mounts that a thread, by its folder under ``/proc``, sees, by number; or OSError."""
    found = {}
    # A path may hold other characters that split lines or words, such as a carriage return.
    for line in (PROC / thread / "mountinfo").read_bytes().split(b"\n")[:-1]:
        ours, _, theirs = line.partition(b" - ")
        number, _, device, _, point = ours.split(b" ")[:5]
        major, minor = map(int, device.split(b":"))
        point = OCTAL.sub(lambda escaped: bytes([int(escaped[1], 8)]), point)
        device_name = device_text(os.makedev(major, minor))
        filesystem = os.fsdecode(theirs.split(b" ")[0])
        found[int(number)] = Mount(device_name, os.fsdecode(point), filesystem)
    return found


def device_text(device: int) -> str:
    """A device as ``/proc/PID/maps`` writes it."""
    return f"{os.major(device):02x}:{os.minor(device):02x}"


def descriptors_of(process: Process, tids: list[int], mounts: dict[int, Mount]) -> list[Descriptor]:
    """The descriptors of files that have a path or are memory without one.

    A thread can have its own table of descriptors, so all threads' tables are read. An entry with
    the same number and path as before is the same, except for memory without a path: two memfds
    can have one name.

    Errors:
        PermissionError: the kernel forbids it.
    """
    found: dict[tuple[int, str, str, int], Descriptor] = {}
    seen: set[tuple[int, str]] = set()
    for tid in tids:
        folder = f"{process.pid}/task/{tid}"
        for number, link in links_in(PROC / folder / "fd"):
            if (number, link) in seen and not link.endswith((DELETED, TOO_LONG)):
                continue
            seen.add((number, link))
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # closed meanwhile
                descriptor = described(folder, number, link, mounts)
                if descriptor is not None:
                    file = descriptor.file
                    key = number, descriptor.access, file.device, file.inode
                    found.setdefault(key, descriptor)
    return list(found.values())


def links_in(folder: Path) -> Iterator[tuple[int, str]]:
    """The listed descriptors with their links, only those with a path."""
    try:
        listed = list(folder.iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return
    for each in listed:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            link = link_of(each)
            if link.startswith("/"):
                yield int(each.name), link


def link_of(descriptor: Path) -> str:
    """The link of a descriptor."""
    try:
        return os.readlink(descriptor)  # noqa: PTH115 (no path: the file may be gone)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return TOO_LONG


def described(folder: str, number: int, link: str, mounts: dict[int, Mount]) -> Descriptor | None:
    """A descriptor with the data of its file; None if its mount is unknown."""
    info = fdinfo(f"{folder}/fdinfo/{number}")
    mount = mounts.get(int(info["mnt_id"]))
    if mount is None:
        return None
    if "ino" in info:
        inode = int(info["ino"])
    elif mount.filesystem in OWN_FILESYSTEMS:  # Linux before 5.14
        inode = (PROC / folder / "fd" / str(number)).stat().st_ino
    else:
        return None
    name = link.removesuffix(DELETED)
    file = File(mount.device, inode, name, name != link, mount)
    return Descriptor(f"{folder}/fd/{number}", number, access_of(int(info["flags"], 8)), file)


def access_of(flags: int) -> str:
    """The access of a descriptor, from its flags."""
    if flags & NO_ACCESS:
        return "path"
    return {os.O_RDONLY: "r", os.O_WRONLY: "w"}.get(flags & os.O_ACCMODE, "rw")


def fdinfo(path: str) -> dict[str, str]:
    """The kernel's data about a descriptor."""
    text = os.fsdecode((PROC / path).read_bytes())  # a dma-buf has a name there, of any bytes
    pairs = (line.partition(":") for line in text.split("\n"))
    return {label: value.strip() for label, _, value in pairs}


# ---- one file -----------------------------------------------------------------------------------


def look_at(path: str, inode: int, mounts: dict[int, Mount]) -> Facts | None:
    """Size, memory and seals of the file behind a link under ``/proc``; None if unknown.

    The link's target is held without opening it (O_PATH), and checked: it may not be the file with
    this inode any more, or not on one of these mounts. Only a memory file is then opened, that very
    one, for reading, which changes nothing in it. Its process cannot make this open anything else.
    """
    try:
        held = os.open(PROC / path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        mount = mounts.get(int(fdinfo(f"thread-self/fdinfo/{held}")["mnt_id"]))
        if mount is None or mount.filesystem not in OWN_FILESYSTEMS:
            return None
        found = os.fstat(held)
        if found.st_ino != inode or not stat.S_ISREG(found.st_mode):
            return None
        in_memory = mount.filesystem in IN_MEMORY
        resident = found.st_blocks * 512 if in_memory else None
        return Facts(found.st_size, resident, seals_of(held) if not mount.point else None)
    finally:
        os.close(held)


def seals_of(held: int) -> int | None:
    """The seals of a memory file that is held by its name; None if unreadable."""
    try:
        fd = os.open(PROC / f"thread-self/fd/{held}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return fcntl.fcntl(fd, F_GET_SEALS)
    except OSError:
        return None
    finally:
        os.close(fd)

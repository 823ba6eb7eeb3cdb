"""What the kernel says about this process, read in plain Python.

Nothing here comes from ``vmm_linux``: the tests compare the package's answers with
these. Every function looks afresh; nothing that the kernel said is remembered between calls.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

PAGE = os.sysconf("SC_PAGE_SIZE")

PROT_NONE, PROT_READ, PROT_WRITE, PROT_EXEC = 0, 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS = 1, 2, 0x10, 0x20
MAP_FIXED_NOREPLACE = 0x100000
MS_ASYNC, MS_INVALIDATE = 1, 2
#: Of an entry of pagemap (Linux 6.15).
GUARD_BIT = 58

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Mapping(NamedTuple):
    """One line of ``/proc/self/maps``."""

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    pathname: str


@lru_cache(maxsize=4096)  # what the same line says is the same
def _mapping(line: str) -> Mapping:
    fields = line.split(None, 5)
    start, _, end = fields[0].partition("-")
    name = fields[5].rstrip("\n") if len(fields) == 6 else ""
    return Mapping(
        int(start, 16),
        int(end, 16),
        fields[1],
        int(fields[2], 16),
        fields[3],
        int(fields[4]),
        name,
    )


def maps() -> list[Mapping]:
    """Every mapping of this process, by address."""
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as lines:
        return [_mapping(line) for line in lines]


def maps_between(low: int, high: int) -> list[Mapping]:
    """The mappings that touch ``[low, high)``. Reads no further than it must."""
    found = []
    with Path("/proc/self/maps").open("rb", buffering=4096) as lines:
        for raw in lines:
            start, _, rest = raw.partition(b"-")
            if int(start, 16) >= high:
                break
            if int(rest[: rest.index(b" ")], 16) > low:
                found.append(_mapping(raw.decode("utf-8", "surrogateescape")))
    return found


def page_permissions(low: int, high: int) -> list[str | None]:
    """The kernel's permissions (``"rw-p"``) of every page in ``[low, high)``; None is a hole.

    A page behind a guard gives no access, whatever its mapping says.
    """
    pages: list[str | None] = [None] * ((high - low) // PAGE)
    for mapping in maps_between(low, high):
        first = (max(mapping.start, low) - low) // PAGE
        last = (min(mapping.end, high) - low) // PAGE
        pages[first:last] = [mapping.permissions] * (last - first)
    for page in guarded_pages(low, len(pages)):
        if permissions := pages[page]:
            pages[page] = "---" + permissions[3]
    return pages


def guarded_pages(low: int, pages: int) -> list[int]:
    """Which of the pages from ``low`` on are behind guards (pagemap bit 58)."""
    return [page for page, entry in enumerate(pagemap(low, pages)) if entry >> GUARD_BIT & 1]


def access_between(low: int, high: int) -> list[Mapping]:
    """``maps_between``, with pages behind guards as mappings of their own, without access."""
    found = []
    for mapping in maps_between(low, high):
        start = mapping.start
        if mapping.inode == 0 and mapping.permissions[:3] != "---":
            first = max(mapping.start, low)
            for page in guarded_pages(first, (min(mapping.end, high) - first) // PAGE):
                guard = first + page * PAGE
                if start < guard:
                    found.append(mapping._replace(start=start, end=guard))
                start = guard + PAGE
                found.append(mapping._replace(start=guard, end=start, permissions="---p"))
        if start < mapping.end:
            found.append(mapping._replace(start=start))
    return found


def mapping_at(address: int) -> Mapping | None:
    """The mapping that holds ``address``, if any."""
    found = maps_between(address, address + 1)
    return found[0] if found else None


def mapping_count() -> int:
    """How many mappings this process has (the kernel's ``map_count``, vsyscall left out)."""
    return sum(1 for mapping in maps() if mapping.pathname != "[vsyscall]")


def hole_at(address: int) -> tuple[int, int]:
    """Bounds of the unmapped range around ``address``."""
    low, high = 0, USER_SPACE_END
    for mapping in maps():
        if mapping.end <= address:
            low = mapping.end
        elif mapping.start > address:
            high = min(high, mapping.start)
            break
    return low, high


class SmapsRecord(NamedTuple):
    """One record of ``/proc/self/smaps``: the mapping, its figures in bytes, its VmFlags."""

    mapping: Mapping
    figures: dict[str, int]
    vm_flags: frozenset[str]


def smaps() -> list[SmapsRecord]:
    """Every record of ``/proc/self/smaps``."""
    records: list[SmapsRecord] = []
    mapping: Mapping | None = None
    figures: dict[str, int] = {}
    with Path("/proc/self/smaps").open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            word, _, rest = line.partition(" ")
            if not word.endswith(":"):
                mapping, figures = _mapping(line), {}
            elif word == "VmFlags:":
                assert mapping is not None
                records.append(SmapsRecord(mapping, figures, frozenset(rest.split())))
            else:
                value = rest.split()
                figures[word[:-1]] = int(value[0]) * (1024 if value[-1] == "kB" else 1)
    return records


def charged_bytes() -> int:
    """The commit charge of this process: sizes of the smaps records with ``ac`` in VmFlags."""
    return sum(record.figures["Size"] for record in smaps() if "ac" in record.vm_flags)


def pagemap(low: int, pages: int) -> list[int]:
    """The raw ``/proc/self/pagemap`` entries of ``pages`` pages from ``low`` on."""
    with Path("/proc/self/pagemap").open("rb", buffering=0) as entries:
        raw = os.pread(entries.fileno(), 8 * pages, low // PAGE * 8)
    return list(struct.unpack(f"={len(raw) // 8}Q", raw))


def present_pages(low: int, pages: int) -> list[bool]:
    """Whether each page is in this process's page table (pagemap bit 63)."""
    return [bool(entry >> 63) for entry in pagemap(low, pages)]


def in_core(low: int, pages: int) -> list[bool]:
    """What ``mincore(2)`` says of each page. The range must be mapped."""
    vector = (ctypes.c_ubyte * pages)()
    if libc.mincore(low, pages * PAGE, vector) != 0:
        raise OSError(ctypes.get_errno(), "mincore")
    return [bool(byte & 1) for byte in vector]


def is_locked(address: int) -> bool:
    """Whether the page is in a locked mapping (``msync`` refuses to invalidate one)."""
    if libc.msync(address, PAGE, MS_ASYNC | MS_INVALIDATE) == 0:
        return False
    return ctypes.get_errno() == errno.EBUSY


def descriptors() -> dict[int, str]:
    """Open descriptors and what they name."""
    found = {}
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # the descriptor of the listing itself
    return found


def status(label: str) -> int:
    """A figure of ``/proc/self/status`` (``"VmLck"``, ``"VmSize"``) in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(label + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(label)


def sysctl(name: str) -> int:
    """A number under ``/proc/sys``, by its dotted name."""
    return int(Path("/proc/sys", *name.split(".")).read_text())


def map_at(address: int, size: int, protection: int) -> None:
    """Make a private anonymous mapping at just this address, where nothing may be."""
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    got = libc.mmap(address, size, protection, flags, -1, 0)
    if got != address:
        raise OSError(ctypes.get_errno(), f"mmap at {address:#x}")


def unmap(address: int, size: int) -> None:
    """``munmap(2)`` behind the package's back, or of what :func:`map_at` made."""
    if libc.munmap(address, size) != 0:
        raise OSError(ctypes.get_errno(), f"munmap at {address:#x}")


def protect(address: int, size: int, protection: int) -> None:
    """``mprotect(2)``."""
    if libc.mprotect(address, size, protection) != 0:
        raise OSError(ctypes.get_errno(), f"mprotect at {address:#x}")


def _can_hold(address: int) -> bool:
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    got = libc.mmap(address, PAGE, PROT_NONE, flags, -1, 0)
    if got == address:
        libc.munmap(address, PAGE)
        return True
    return ctypes.get_errno() == errno.EEXIST


def _find_user_space_end() -> int:
    bits = 30
    while bits < 63 and _can_hold(1 << bits):
        bits += 1
    end = 1 << bits
    return end if _can_hold(end - PAGE) else end - PAGE


#: First address above user space, found by trying.
USER_SPACE_END = _find_user_space_end()

#: A stretch of addresses that the kernel never chooses by itself, for regions at known places.
ARENA = 0x2000_0000_0000 if USER_SPACE_END > 1 << 46 else 0x20_0000_0000

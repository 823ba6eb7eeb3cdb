"""The mappings of a process in groups: heap, stacks, libraries and so on.

Each has its size (reserved), how much of it may be accessed (committed), and how much memory it has
now (resident), in bytes.
"""

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from vmm_linux import inspect
from vmm_linux._tools.text import escaped
from vmm_linux.inspect import Mapping, PageFlags
from vmm_linux.inspect.processes import process_of, threads_of
from vmm_linux.states import PageKind, PageState


class Look(NamedTuple):
    """How a group is shown: its title and its colours."""

    title: str
    on_a_terminal: str
    in_a_plot: str


GROUPS = {
    "ours": Look("Regions of vmm_linux", "bright_magenta", "#c2255c"),
    "heap": Look("Heap", "bright_red", "#d9480f"),
    "stacks": Look("Stacks", "yellow", "#8a6d00"),
    "libraries": Look("Programs, libraries", "bright_blue", "#2457c5"),
    "files": Look("Files", "cyan", "#0b7285"),
    "anonymous": Look("Anonymous", "green", "#2b8a3e"),
    "shared": Look("Shared", "magenta", "#7048e8"),
    "kernel": Look("The kernel's own", "bright_black", "#5f6b7c"),
}
"""The groups."""
SUMS = ("reserved", "committed", "resident", "pss")
"""The figures of entries and groups that are shown."""

OF_THE_KERNEL = re.compile(r"\[(vdso|vvar.*|vsyscall|uprobes|vectors|sigpage)\]")
"""The kernel's own mappings in every process."""
OF_A_REGION = "[anon:vmm_linux region]"
"""The name of regions' memory, where the kernel has names."""
NAMED_STACK = re.compile(r"\[stack(:\d+)?\]|\[anon:.*stack.*\]", re.IGNORECASE)
"""Stacks with a name: the first thread's, and others that a program names."""
NAMED_HEAP = re.compile(r"\[heap\]|\[anon:.*malloc.*\]", re.IGNORECASE)
"""Names of heaps: the program's own, and those of allocators that name their memory."""
LARGEST_GUARD = 1 << 20
"""The largest guard below a thread's stack in C libraries, in bytes."""


@dataclass
class MapEntry:
    """One mapping, or a region's part of one, in a group of ``GROUPS``; its figures in bytes.

    ``pss`` is its share of the resident memory, where processes share it; of a part of a mapping in
    proportion to what of it is resident.
    """

    mapping: Mapping
    group: str
    reserved: int
    committed: int
    resident: int
    pss: int
    swapped: int

    @property
    def weight(self) -> tuple[int, int, int]:
        """The key that orders entries by size."""
        return self.resident, self.committed, self.reserved


@dataclass
class Group:
    """Entries that belong together, with their sums in bytes."""

    key: str
    entries: list[MapEntry] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Its title."""
        return GROUPS[self.key].title

    @property
    def sums(self) -> dict[str, int]:
        """The sums of its entries' ``SUMS``."""
        return {name: sum(getattr(entry, name) for entry in self.entries) for name in SUMS}

    @property
    def weight(self) -> tuple[int, int, int]:
        """The key that orders groups by size."""
        sums = self.sums
        return sums["resident"], sums["committed"], sums["reserved"]

    def as_object(self) -> dict[str, int]:
        """The number of mappings and the sums, for JSON."""
        return {"mappings": len(self.entries), **self.sums}

    def by_name(self) -> list[tuple[str, "Group"]]:
        """The entries in groups of one name, the biggest first."""
        names: dict[str, Group] = {}
        for entry in self.entries:
            names.setdefault(name_of(entry.mapping), Group(self.key)).entries.append(entry)
        return sorted(names.items(), key=lambda item: item[1].weight, reverse=True)


@dataclass
class Picture:
    """The memory of a process at one moment: its mappings, and sums over all in bytes by name.

    ``program``, its name, and ``command``, its command line, are empty where they are unreadable.
    """

    pid: int
    program: str
    command: str
    taken: datetime
    page_size: int
    entries: list[MapEntry]
    totals: dict[str, int]

    @property
    def groups(self) -> list[Group]:
        """The groups, the biggest first."""
        found: dict[str, Group] = {}
        for entry in self.entries:
            found.setdefault(entry.group, Group(entry.group)).entries.append(entry)
        return sorted(found.values(), key=lambda group: group.weight, reverse=True)

    @property
    def title(self) -> str:
        """The process in a few words."""
        return f"{escaped(self.program) or 'process'} (PID {self.pid})"


def take(pid: int | None) -> Picture:
    """Take the picture of a process: None for this one.

    Errors: those of ``inspect.snapshot``.
    """
    snapshot = inspect.snapshot(pid)
    program, command = words_of(snapshot.pid)
    entries = entries_of(list(snapshot), pid)
    totals = {
        "reserved": sum(entry.reserved for entry in entries),
        "committed": sum(entry.committed for entry in entries),
        # The kernel's own sums: a mapping that is cut at the borders of regions counts once.
        "resident": snapshot.total("rss"),
        "pss": snapshot.total("pss"),
        "swap": snapshot.total("swap"),
    }
    page_size = os.sysconf("SC_PAGE_SIZE")
    return Picture(snapshot.pid, program, command, datetime.now(UTC), page_size, entries, totals)


def words_of(pid: int) -> tuple[str, str]:
    """Name and command line of a process, empty where they are unreadable."""
    process = process_of(pid)
    words = b""
    # An ended thread, the first one too, has no data.
    with contextlib.suppress(OSError):
        for tid in threads_of(process) if process is not None else ():
            words = words or Path(f"/proc/{pid}/task/{tid}/cmdline").read_bytes()
    command = b" ".join(filter(None, words.split(b"\0")))
    return process.name if process is not None else "", os.fsdecode(command)


# ---- groups -------------------------------------------------------------------------------------


def entries_of(mappings: Sequence[Mapping], pid: int | None) -> list[MapEntry]:
    """Every mapping with its group and its sums."""
    programs = {each.pathname for each in mappings if each.permissions[2] == "x" and is_file(each)}
    stacks = thread_stacks(mappings)
    return [entry_of(mapping, group_of(mapping, programs, stacks), pid) for mapping in mappings]


def group_of(mapping: Mapping, programs: set[str | None], stacks: set[int]) -> str:
    """The key of a mapping's group.

    ``programs`` are the files of which this process may execute something, ``stacks`` the places
    where the stacks without a name begin, their guards included.
    """
    name = mapping.pathname or ""
    is_shared = mapping.permissions[3] == "s" and not is_read_only_file(mapping)
    answers = {
        "ours": mapping.region is not None or name == OF_A_REGION,
        "kernel": OF_THE_KERNEL.fullmatch(name),
        "shared": is_shared,
        "heap": NAMED_HEAP.fullmatch(name),
        "stacks": NAMED_STACK.fullmatch(name) or mapping.start in stacks,
        "libraries": is_file(mapping) and name in programs,
        "files": is_file(mapping),
    }
    return next((key for key, answer in answers.items() if answer), "anonymous")


def is_file(mapping: Mapping) -> bool:
    """Whether it maps a file. Shared anonymous memory has an inode too, and can have a name."""
    return mapping.inode != 0 and not (mapping.pathname or "").startswith("[anon_shmem:")


def is_read_only_file(mapping: Mapping) -> bool:
    """Whether it maps an undeleted file that cannot be written through this mapping.

    A shared and a private mapping are the same then: pages of the file, which all readers share.
    """
    may_write = "mw" in (mapping.vm_flags or ()) or mapping.permissions[1] == "w"
    name = mapping.pathname or ""
    return is_file(mapping) and not (may_write or mapping.deleted or name.startswith("/dev/"))


def thread_stacks(mappings: Iterable[Mapping]) -> set[int]:
    """The starts of threads' stacks, and of the guards below them.

    The kernel does not name them. They are recognized by the form that C libraries give them: a
    small private mapping without access, and right above it a readable and writable one without
    huge pages (which MAP_STACK requests since Linux 6.7).
    """
    found = set()
    for below, above in pairwise(mappings):
        if (
            is_nameless(below)
            and is_nameless(above)
            and below.end == above.start
            and (below.permissions, above.permissions) == ("---p", "rw-p")
            and below.end - below.start <= LARGEST_GUARD
            and "nh" in (above.vm_flags or ())
        ):
            found |= {below.start, above.start}
    return found


def is_nameless(mapping: Mapping) -> bool:
    """Whether it is memory of no file, no name and no region."""
    return mapping.pathname is None and mapping.inode == 0 and mapping.region is None


def entry_of(mapping: Mapping, group: str, pid: int | None) -> MapEntry:
    """A mapping with its sums."""
    size = mapping.end - mapping.start
    committed = size if is_committed(mapping) else 0
    figures = mapping.whole.figures
    resident, pss = figures.get("rss", 0), figures.get("pss", 0)
    swapped = figures.get("swap", 0)
    if mapping.whole is not mapping and resident + swapped:
        part, swapped = counted(mapping, pid) if committed else (0, 0)
        pss = pss * part // resident if resident else 0
        resident = part
    return MapEntry(mapping, group, size, committed, resident, pss, swapped)


def counted(mapping: Mapping, pid: int | None) -> tuple[int, int]:
    """Bytes present and swapped, counted page by page: smaps has only whole mappings."""
    present = swapped = 0
    for run in inspect.pages(mapping.start, mapping.end - mapping.start, pid):
        if run.flags & PageFlags.SWAPPED:
            swapped += run.end - run.start
        elif run.flags & PageFlags.PRESENT and not run.flags & PageFlags.ZERO:
            present += run.end - run.start
    return present, swapped


def is_committed(mapping: Mapping) -> bool:
    """Whether pages may be accessed: by the ledger for ours, else by the permissions."""
    region = mapping.region
    if region is not None:
        return region.state is PageState.COMMITTED and region.kind is not PageKind.GUARD
    return mapping.permissions[:3] != "---"


# ---- words --------------------------------------------------------------------------------------


def size_of(mapping: Mapping) -> int:
    """Bytes of addresses."""
    return mapping.end - mapping.start


def name_of(mapping: Mapping) -> str:
    """The name of a mapping, in printable characters."""
    region = mapping.region
    if region is not None:
        kind = region.kind.name.title() if region.kind is not PageKind.MDL else "MDL"
        return f"{kind} region at {region.base:#x}"
    if mapping.pathname is None:
        return "no name"
    return escaped(mapping.pathname)

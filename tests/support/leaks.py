"""What a test leaves behind: descriptors, children and mappings.

Descriptors and children are compared one by one. Mappings are not that simple: beside ours the
C library, Python and the dynamic linker make some, keep them, and the kernel merges neighbours.
So mappings are compared as ranges of addresses with the same permissions and the same backing,
and what a test may leave behind is narrowed down to little:

* Mappings with a name (heap, stack, files that are not memfds) belong to others, unless the name
  is the one that this package gives.
* ``quieten_libc`` keeps the C library's memory in its one heap, so that it makes no mapping of
  its own but thread stacks, which it keeps for later threads.
* Thread stacks have a size that nobody else uses, below which lies a guard page.
* Python's object allocator takes readable and writable arenas of one mebibyte and may keep them:
  a new range of whole arenas is taken for those. A leak of just that size and those permissions
  goes unseen; of any other size, or with any other permissions, it does not.
* A library that was loaded meanwhile may have zeroed data right behind it.

Python's frames come from 16 KiB mappings too, one more whenever the stack of calls grows past
the last. Snapshots that are to be compared must therefore be taken at the same depth of calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from kernel_oracle import PAGE

#: Python's object allocator takes memory in pieces of this size.
ARENA = 1 << 20
#: A thread's stack: the usual eight mebibytes, and three pages to know it by.
STACK = (8 << 20) + 3 * PAGE

M_MMAP_MAX = -4
M_ARENA_MAX = -8


def quieten_libc() -> None:
    """Have malloc take its memory from the heap alone, and give thread stacks their own size."""
    mallopt = ctypes.CDLL(None).mallopt
    if not mallopt(M_MMAP_MAX, 0) or not mallopt(M_ARENA_MAX, 1):
        raise RuntimeError("mallopt: this is not the C library that the tests know")
    threading.stack_size(STACK)


class Span(NamedTuple):
    """A range of addresses ``[start, end)``."""

    start: int
    end: int

    def without(self, other: Span) -> list[Span]:
        """What is left of this one where the other one does not lie."""
        parts = [
            Span(self.start, min(self.end, other.start)),
            Span(max(self.start, other.end), self.end),
        ]
        return [part for part in parts if part.start < part.end]


class Mapping(NamedTuple):
    """One line of ``/proc/self/maps``. Anonymous memory has no backing."""

    span: Span
    permissions: str
    backing: str

    @property
    def is_foreign(self) -> bool:
        """Whether it cannot be ours: the heap, a library, the kernel's own."""
        shared = self.permissions.endswith("s")
        ours = "/memfd:" in self.backing or self.backing.endswith("[anon:vmm_linux region]")
        return not shared and self.backing != "" and not ours


def read_mappings() -> list[Mapping]:
    """The mappings of this process, in order of address."""
    return [parse_mapping(line) for line in Path("/proc/self/maps").read_text().splitlines()]


@lru_cache(maxsize=4096)  # from one test to the next hardly a line changes
def parse_mapping(line: str) -> Mapping:
    """What a line of ``/proc/self/maps`` says."""
    addresses, permissions, _offset, device, inode, *path = line.split(maxsplit=5)
    start, end = (int(number, 16) for number in addresses.split("-"))
    backing = " ".join([device, inode, *path]) if inode != "0" or path else ""
    return Mapping(Span(start, end), permissions, backing)


def read_descriptors() -> dict[int, str]:
    """The open descriptors of this process and what they refer to."""
    descriptors = {}
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            descriptors[int(link.name)] = str(link.readlink())
    return descriptors


def read_children() -> frozenset[int]:
    """The children of this process, those that nobody has waited for included."""
    children: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # that thread is gone
            children.update(map(int, path.read_text().split()))
    return frozenset(children)


@dataclass(frozen=True)
class Snapshot:
    """What this process has at one moment."""

    descriptors: dict[int, str]
    children: frozenset[int]
    mappings: list[Mapping]

    @classmethod
    def take(cls) -> Snapshot:
        """Look at this process now."""
        return cls(read_descriptors(), read_children(), read_mappings())


def stacks(mappings: list[Mapping]) -> list[Span]:
    """The thread stacks with their guard pages, as ``quieten_libc`` made them recognizable."""
    found = []
    for below, above in pairwise(mappings):
        start = above.span.start
        if (
            (below.permissions, below.backing) == ("---p", "")
            and (above.permissions, above.backing) == ("rw-p", "")
            and below.span.end == start
            and above.span.end - start >= STACK
        ):
            found.append(Span(start - PAGE, start + STACK))
    return found


def zeroed_data(before: list[Mapping], after: list[Mapping]) -> list[Span]:
    """The anonymous memory right behind the libraries that were loaded in between."""
    known = {mapping.backing for mapping in before}
    return [
        above.span
        for below, above in pairwise(after)
        if below.is_foreign
        and below.backing not in known
        and (above.permissions, above.backing) == ("rw-p", "")
        and below.span.end == above.span.start
    ]


def new_mappings(before: list[Mapping], after: list[Mapping]) -> list[Mapping]:
    """The parts of ours that are in ``after`` and were not, or not so, in ``before``."""
    same = set(before)
    changed = [mapping for mapping in after if mapping not in same and not mapping.is_foreign]
    if not changed:
        return []
    old: dict[tuple[str, str], list[Span]] = {}
    for span, permissions, backing in before:
        old.setdefault((permissions, backing), []).append(span)
    others = stacks(after) + zeroed_data(before, after)
    found = []
    for mapping in changed:
        parts = [mapping.span]
        for other in [*old.get((mapping.permissions, mapping.backing), []), *others]:
            parts = [rest for part in parts for rest in part.without(other)]
        found += [mapping._replace(span=part) for part in parts if not is_arena(mapping, part)]
    return found


def is_arena(mapping: Mapping, part: Span) -> bool:
    """Whether this part of a mapping looks like Python's own memory for objects."""
    arenas = (part.end - part.start) % ARENA == 0
    return arenas and (mapping.permissions, mapping.backing) == ("rw-p", "")


def left_behind(before: Snapshot, after: Snapshot) -> list[str]:
    """What ``after`` has and ``before`` has not, a line each."""
    descriptors = sorted(after.descriptors.items() - before.descriptors.items())
    children = sorted(after.children - before.children)
    mappings = new_mappings(before.mappings, after.mappings)
    return [
        *(f"descriptor {number}: {target}" for number, target in descriptors),
        *(f"child {number}" for number in children),
        *(
            f"mapping {start:#x}-{end:#x} ({end - start} bytes) {permissions} {backing}".rstrip()
            for (start, end), permissions, backing in mappings
        ),
    ]

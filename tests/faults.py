"""Calls of the package to the system that fail at a chosen point.

The parent's side builds ``fault_injection.c`` and runs children with it; the child's side arms
it (:class:`Faults`) and takes a :class:`Picture` of all that a failed call must leave alone.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from contextlib import contextmanager
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from children import run_child
from kernel_oracle import PAGE, TESTS_IMPORTABLE, descriptors, present_pages
from vmm_linux import VMM, PageKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SOURCE = Path(__file__).with_name("fault_injection.c")


# ---- the parent's side


def build(folder: Path) -> Path:
    """Compile the library into this folder with the C compiler (``CC``, else ``cc``)."""
    library = folder / "fault_injection.so"
    compiler = os.environ.get("CC", "cc").split()
    # A compiler that knows malloc may leave a call of it out, or make one of another call.
    options = ["-shared", "-fPIC", "-O1", "-fno-builtin", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*compiler, *options, SOURCE, "-o", library], check=True)
    return library


def run(library: Path, function: Callable[..., None], *arguments: object) -> None:
    """Run a function in a child with the library loaded; what it writes is what went wrong.

    The child takes all of its own memory from the C library's one heap, so that every other
    mapping that comes or goes is the package's.
    """
    memory = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_MAX_": "0", "MALLOC_ARENA_MAX": "1"}
    environment = {"LD_PRELOAD": str(library), **memory, **TESTS_IMPORTABLE}
    child = run_child(function, *arguments, environment=environment, timeout=120)
    assert child.returncode == 0, child.stderr
    assert not child.stdout, child.stdout


# ---- the child's side


class Mode(Enum):
    """In which way the n-th call fails."""

    ALONE = "fails"
    HALF = "does half of its work and fails"
    MEMORY = "and all later ones find no memory"


class Faults:
    """The library that this process was started with."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.fault_name.restype = ctypes.c_char_p

    @contextmanager
    def armed(self, mode: Mode, n: int, *, error: int = 0, spare: str = "") -> Iterator[None]:
        """Make the n-th call fail that the package makes in the ``with`` block; 0: none.

        ``error`` is its errno; 0 for the one that a full system gives. The memory that the
        package asks for itself counts as a call. Calls named ``spare`` neither count nor fail.
        """
        self._library.fault_spare(spare.encode())
        if mode is Mode.MEMORY:
            self._library.fault_arm_memory(ctypes.c_long(n))
        elif mode is Mode.HALF:
            self._library.fault_arm_half(ctypes.c_long(n), error)
        else:
            self._library.fault_arm(ctypes.c_long(n), error)
        try:
            yield
        finally:
            self._library.fault_disarm()

    @property
    def name(self) -> str:
        """The last call that was made to fail, ``""`` if there were fewer calls than that."""
        name: bytes = self._library.fault_name()
        return name.decode()


class Window(NamedTuple):
    """Addresses whose pages are looked at."""

    low: int
    high: int


class Page(NamedTuple):
    """All that can be told of one page without touching it."""

    permissions: str
    vm_flags: frozenset[str]
    present: bool
    contents: bytes
    answer: tuple[object, ...]


class File(NamedTuple):
    """A memory file: what it holds, and how much memory it takes."""

    blocks: int
    contents: bytes


class Record(NamedTuple):
    """What a mapping's record in ``/proc/self/smaps`` says, the figures left out."""

    line: bytes
    low: int
    high: int
    permissions: str
    vm_flags: frozenset[str]


HOLE = Record(b"", 0, 0, "", frozenset())
#: These grow and shrink by themselves.
NOT_OURS = (b"[heap]", b"[stack]")
#: The kernel's own book-keeping.
SOFT_DIRTY = frozenset({"sd"})


def read_records() -> list[Record]:
    """Every record of smaps but the heap's and the stack's.

    ``kernel_oracle.smaps`` reads all figures too, for which the number of pictures is too large.
    """
    # VmFlags is each record's last line.
    first, *others = Path("/proc/self/smaps").read_bytes().split(b"\nVmFlags: ")
    records = []
    line = first.partition(b"\n")[0]
    for other in others:
        words, next_line, *_ = other.split(b"\n", 2)
        if not line.endswith(NOT_OURS):
            records.append(_record(line, words))
        line = next_line
    return records


@lru_cache(maxsize=4096)
def _record(line: bytes, words: bytes) -> Record:
    low, high, permissions = re.split(rb"[- ]", line, maxsplit=2)
    vm_flags = frozenset(words.decode().split()) - SOFT_DIRTY
    return Record(line, int(low, 16), int(high, 16), permissions[:4].decode(), vm_flags)


def surroundings() -> tuple[dict[int, str], list[bytes]]:
    """The descriptors and the mappings of this process: what a closed VMM leaves as it was."""
    lines = Path("/proc/self/maps").read_bytes().splitlines()
    return descriptors(), [line for line in lines if not line.endswith(NOT_OURS)]


class Picture:
    """What there is at one moment. Taking it touches no page."""

    def __init__(self, vmm: VMM, window: Window, *, ask: bool = True) -> None:
        """``ask`` the VMM about each page too, which opens its files of ``/proc``."""
        self.window = window
        self.closed = vmm.closed
        vmm._check()
        self._vmm = vmm if ask and not vmm.closed else None
        self._answers = [self._answer(va) for va in range(*window, PAGE)]
        records = read_records()
        self.mappings = [record.line for record in records]
        self.charged = sum(r.high - r.low for r in records if "ac" in r.vm_flags)
        self.descriptors = {
            number: target
            for number, target in descriptors().items()
            if ask or not target.startswith("/proc/")
        }
        self.files = [
            _file(number)
            for number, target in sorted(self.descriptors.items())
            if target.startswith("/memfd:")
        ]
        self.pages = self._look_at_pages(records)

    def _answer(self, va: int) -> tuple[object, ...]:
        """What Query says of a page, addresses counted from the window's start."""
        if self._vmm is None:
            return ()
        info = self._vmm.query(va, smaps=False)
        facts: tuple[object, ...] = (info.state, info.kind, info.protection, info.flags)
        if info.kind in {PageKind.PRIVATE, PageKind.GUARD}:
            low = self.window.low
            facts += (info.base - low, info.size, info.run_start - low, info.run_end - low)
        return facts

    def _look_at_pages(self, records: list[Record]) -> list[Page]:
        found = []
        mapped: dict[int, Record] = {}
        for record in records:
            low, high = max(record.low, self.window.low), min(record.high, self.window.high)
            mapped.update(dict.fromkeys(range(low, high, PAGE), record))
        addresses = range(*self.window, PAGE)
        present = present_pages(self.window.low, len(addresses))
        with Path("/proc/self/mem").open("rb", buffering=0) as memory:
            for va, there, answer in zip(addresses, present, self._answers, strict=True):
                record = mapped.get(va, HOLE)
                contents = os.pread(memory.fileno(), PAGE, va) if there else b""
                found.append(Page(record.permissions, record.vm_flags, there, contents, answer))
        return found

    def difference(self, other: Picture) -> str:
        """In what ``other`` differs from this picture of the same process, ``""``: in nothing."""
        parts = {
            "closed": (self.closed, other.closed),
            "descriptors": (self.descriptors, other.descriptors),
            "mappings": (self.mappings, other.mappings),
            "charge": (self.charged, other.charged),
            "files": (self.files, other.files),
            "pages": (self.pages, other.pages),
        }
        return "; ".join(
            f"{name}: {_first_difference(mine, theirs)}"
            for name, (mine, theirs) in parts.items()
            if mine != theirs
        )

    @property
    def essence(self) -> dict[str, object]:
        """What must be the same wherever the memory lies and whatever else there is."""
        return {
            "closed": self.closed,
            "pages": self.pages,
            "files": self.files,
            "names": sorted(
                name for name in self.descriptors.values() if not name.startswith("/proc/")
            ),
        }


def _file(number: int) -> File:
    status = os.fstat(number)
    return File(status.st_blocks, os.pread(number, status.st_size, 0))


def _first_difference(mine: object, theirs: object) -> str:
    """A short text: long lists are told by the first place in which they differ."""
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        index = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if len({*pair}) > 1)
        return f"[{index}] {shortened(mine[index])} became {shortened(theirs[index])}"
    if isinstance(mine, list) and isinstance(theirs, list):
        gone = [item for item in mine if item not in theirs]
        new = [item for item in theirs if item not in mine]
        return f"{shortened(gone)} became {shortened(new)}"
    return f"{shortened(mine)} became {shortened(theirs)}"


def shortened(value: object) -> str:
    """Its text, or the beginning and the end of it."""
    text = repr(value)
    return text if len(text) < 700 else f"{text[:350]} ... {text[-350:]}"

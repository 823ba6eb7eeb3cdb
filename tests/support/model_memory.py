"""A plain model of shared memory: what memory files hold, and how processes name them.

One object of these stands for one thing of the kernel's, whichever process looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import and_
from typing import TYPE_CHECKING

from kernel_oracle import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

ZEROS = bytes(PAGE)
PUBLISH, FREEZE = 1, 2


class Memory:
    """A memory file, or several side by side, its segments: what their pages hold, and their seals.

    All but the last segment have ``segment`` pages.
    """

    def __init__(self, pages: int, segment: int = 0, nbytes: int = 0) -> None:
        self.pages = [ZEROS] * pages
        #: What its files have to the byte: they end in the last page.
        self.nbytes = nbytes or pages * PAGE
        #: None: the model cannot tell.
        self.held: list[bool | None] = [False] * pages
        self.segment = segment or pages
        count = -(-pages // self.segment)
        self.seals = [0] * count
        #: The kernel's numbers, learned when first seen. They must never change.
        self.inodes: list[int | None] = [None] * count

    def segments(self, first: int, pages: int) -> range:
        """Which segments these pages touch."""
        return range(first // self.segment, (first + pages - 1) // self.segment + 1)

    def common_seals(self, segments: range) -> int:
        """The seals that all of these have."""
        return reduce(and_, (self.seals[number] for number in segments))

    def discard(self, index: int) -> None:
        """The page becomes a hole."""
        self.pages[index], self.held[index] = ZEROS, False

    def size_of(self, number: int) -> int:
        """How many bytes the file of a segment has."""
        return min(self.segment * PAGE, self.nbytes - number * self.segment * PAGE)

    def bounds_of_held(self, number: int) -> tuple[int, int]:
        """At least and at most how many pages of a segment have memory."""
        held = self.held[number * self.segment : (number + 1) * self.segment]
        return held.count(True), len(held) - held.count(False)


@dataclass(eq=False)
class Buffer:
    """An MDL buffer, the same in every process: a window on a memory, in pages."""

    memory: Memory
    first: int
    pages: int
    origin: Buffer | None = None
    #: The kernel's number, learned when first seen. It must never change.
    sid: int | None = None

    @property
    def size(self) -> int:
        """Bytes, of whole pages."""
        return self.pages * PAGE

    @property
    def nbytes(self) -> int:
        """Bytes that its files have."""
        return min(self.size, self.memory.nbytes - self.first * PAGE)

    @property
    def segments(self) -> range:
        """The segments that it touches."""
        return self.memory.segments(self.first, self.pages)

    @property
    def seals(self) -> int:
        """The seals of all of them."""
        return self.memory.common_seals(self.segments)


@dataclass(eq=False)
class Backing:
    """A buffer as one process has it, with descriptors of its own.

    A process that receives the same buffer twice has two of these.
    """

    buffer: Buffer
    origin: Backing | None = None
    #: Whether it was made with all its memory. Said of the root.
    locked: bool = False
    #: Whether the process's descriptors of the memory can write. Said of the root.
    writable: bool = True
    #: The segments that the process has descriptors of, if these are not all. Said of the root.
    part: range | None = None
    #: Those that it has a second, read-only descriptor of. Said of the root.
    reopened: set[int] = field(default_factory=set)

    @property
    def memory(self) -> Memory:
        """The memory behind the buffer."""
        return self.buffer.memory

    def chain(self) -> Iterator[Backing]:
        """This one, what it was cloned from, and so on to the root."""
        at: Backing | None = self
        while at is not None:
            yield at
            at = at.origin

    @property
    def root(self) -> Backing:
        """The one that has the memory's descriptors."""
        *_, last = self.chain()
        return last

    @property
    def segments(self) -> range:
        """The segments that the process has descriptors of. Asked of the root."""
        return self.buffer.segments if self.part is None else self.part

    @property
    def bytes(self) -> int:
        """Bytes of the memory that the process has descriptors of. Asked of the root."""
        segment = self.memory.segment
        pages = len(self.memory.pages)
        return PAGE * sum(min(segment, pages - number * segment) for number in self.segments)

    @property
    def has_identity(self) -> bool:
        """Whether it is known by another memory file than its memory."""
        return self.origin is not None or len(self.segments) > 1

    @property
    def descriptors(self) -> int:
        """How many descriptors of memory the process has for this root."""
        return len(self.segments) + len(self.reopened)

    def need_read_only(self, segments: range) -> None:
        """Something needs these read-only descriptions: they are opened once."""
        root = self.root
        if root.writable:
            root.reopened.update(segments)

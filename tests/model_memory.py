"""A plain model of shared memory: what memory files hold, and how processes name them.

One object of these stands for one thing of the kernel's, whichever process looks at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernel_oracle import PAGE

if TYPE_CHECKING:
    from collections.abc import Iterator

ZEROS = bytes(PAGE)
PUBLISH, FREEZE = 1, 2


class Memory:
    """A memory file: the contents of its pages, which of them have memory, and its seals."""

    def __init__(self, pages: int) -> None:
        self.pages = [ZEROS] * pages
        #: None: the model cannot tell.
        self.held: list[bool | None] = [False] * pages
        self.seals = 0
        #: The kernel's number, learned when first seen. It must never change.
        self.inode: int | None = None

    def discard(self, index: int) -> None:
        """The page becomes a hole."""
        self.pages[index], self.held[index] = ZEROS, False

    @property
    def bounds_of_held(self) -> tuple[int, int]:
        """At least and at most how many pages have memory."""
        return self.held.count(True), len(self.held) - self.held.count(False)


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
        """Bytes."""
        return self.pages * PAGE


@dataclass(eq=False)
class Backing:
    """A buffer as one process has it, with descriptors of its own.

    A process that receives the same buffer twice has two of these.
    """

    buffer: Buffer
    origin: Backing | None = None
    #: Whether the process's descriptor of the memory can write. Said of the root.
    writable: bool = True
    #: Whether there is a second, read-only one. Said of the root.
    reopened: bool = False

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
    def descriptors(self) -> int:
        """How many descriptors the process has for this one alone."""
        return 1 + self.reopened

    def need_read_only(self) -> None:
        """Something needs the read-only description: it is opened once."""
        root = self.root
        root.reopened = root.reopened or root.writable

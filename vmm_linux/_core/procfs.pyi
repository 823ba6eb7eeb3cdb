from collections.abc import Mapping
from typing import final

from typing_extensions import disjoint_base

LABELS: dict[bytes, str]
NAMES: tuple[str, ...]

@disjoint_base
class SmapsRecord:
    """One mapping of a process, from a record of ``smaps`` or a line of ``maps``.

    Figures are in bytes, except ``thp_eligible`` and ``protection_key``; None where the text has
    none (an older kernel, a line of ``maps``). A figure that a newer kernel adds is an attribute
    too, under its label in snake case. Records do not change, are equal where all their values are,
    and can be pickled.
    """
    def __init__(self) -> None:
        """Raise TypeError: ``parse_smaps`` and ``parse_maps`` make them."""
    @property
    def start(self) -> int:
        """The first address."""
    @property
    def end(self) -> int:
        """The first address after it."""
    @property
    def permissions(self) -> str:
        """As in ``maps``: ``rw-p``; the last letter is ``s`` for shared, ``p`` for private."""
    @property
    def offset(self) -> int:
        """Where in the file it begins, in bytes."""
    @property
    def device(self) -> str:
        """The file's device, as in ``maps``: ``08:01``."""
    @property
    def inode(self) -> int:
        """The file's inode, 0 where there is no file."""
    @property
    def pathname(self) -> str | None: ...
    @property
    def deleted(self) -> bool:
        """Whether the file has no name any more, as is the case for every memfd.

        The kernel then adds `` (deleted)`` to the name. Whether a file's own name ends like that
        shows in whether that file exists.
        """
    @property
    def vm_flags(self) -> frozenset[str] | None: ...
    @property
    def figures(self) -> Mapping[str, int]:
        """All figures that the text has, by name, as a read-only mapping."""
    @property
    def size(self) -> int | None:
        """The mapping's length."""
    @property
    def kernel_page_size(self) -> int | None:
        """Page size the kernel uses for it."""
    @property
    def mmu_page_size(self) -> int | None:
        """Page size the processor uses for it."""
    @property
    def rss(self) -> int | None:
        """Resident in memory."""
    @property
    def pss(self) -> int | None:
        """Resident, each page divided by the number of its users."""
    @property
    def pss_dirty(self) -> int | None:
        """The dirty part of ``pss`` (6.0)."""
    @property
    def shared_clean(self) -> int | None:
        """Resident, used by others too, not written to."""
    @property
    def shared_dirty(self) -> int | None:
        """Resident, used by others too, written to."""
    @property
    def private_clean(self) -> int | None:
        """Resident, used by this process alone, not written to."""
    @property
    def private_dirty(self) -> int | None:
        """Resident, used by this process alone, written to."""
    @property
    def referenced(self) -> int | None:
        """Resident and accessed lately."""
    @property
    def anonymous(self) -> int | None:
        """Resident and of no file."""
    @property
    def ksm(self) -> int | None:
        """Merged by KSM (6.8)."""
    @property
    def lazy_free(self) -> int | None:
        """Given up by MADV_FREE, not yet taken."""
    @property
    def anon_huge_pages(self) -> int | None:
        """Anonymous, in huge pages."""
    @property
    def shmem_pmd_mapped(self) -> int | None:
        """Shared memory, in huge pages."""
    @property
    def file_pmd_mapped(self) -> int | None:
        """Of files, in huge pages (5.4)."""
    @property
    def shared_hugetlb(self) -> int | None:
        """In hugetlbfs pages that others use too."""
    @property
    def private_hugetlb(self) -> int | None:
        """In hugetlbfs pages of this process alone."""
    @property
    def swap(self) -> int | None:
        """Swapped out."""
    @property
    def swap_pss(self) -> int | None:
        """Swapped out, each page divided by the number of its users."""
    @property
    def locked(self) -> int | None:
        """Locked in memory, counted as in ``pss``."""
    @property
    def thp_eligible(self) -> int | None:
        """1 if transparent huge pages may be used here, else 0; not bytes (5.0)."""
    @property
    def protection_key(self) -> int | None:
        """The memory protection key; not bytes."""
    # Figures that a newer kernel adds.
    def __getattr__(self, name: str) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

def parse_smaps(text: bytes) -> list[SmapsRecord]:
    """The records of a ``/proc/PID/smaps`` (or ``smaps_rollup``), as a list.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """

def parse_maps(text: bytes) -> list[SmapsRecord]:
    """The records of a ``/proc/PID/maps``, as a list; their figures are None.

    ValueError, with the line, where one cannot be read and where the text stops early.
    """

@final
class OwnProcess:
    """The open files of ``/proc/self``, and questions to them.

    A file is opened when first needed and kept. After a fork the parent's are closed and the
    child's own opened. ``close()`` closes them; a later question opens them again.

    They are those of the calling thread's folder, ``/proc/thread-self``, which say the same: the
    process's own are empty once its first thread has ended. When the thread that opened a text
    ends, reading it fails (ESRCH), and it is opened anew; the ioctls go on.
    """
    def close(self) -> None:
        """Close the files. May be called again."""
    def span(self, va: int) -> tuple[int, int, bool, int, int, int, str]:
        """``span_at`` as ``(start, end, mapped, permissions, offset, inode, device)``."""
    def page(self, va: int) -> dict[str, bool | None]:
        """``page_at`` as a dict; None for what is unknown."""
    def record(self, va: int) -> SmapsRecord | None:
        """The ``SmapsRecord`` of the mapping that ``va`` lies in, or None for a hole."""

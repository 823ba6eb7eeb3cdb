from collections.abc import Iterator, Sequence
from types import NotImplementedType
from typing import Any, final, overload

from vmm_linux._core.page_runs import PageRun, RegionRun
from vmm_linux._core.procfs import SmapsRecord

@final
class Mapping(SmapsRecord):
    """One mapping of a process, or a part of one that belongs to one of our regions.

    Attributes:
        start, end: its addresses, ``[start, end)``.
        permissions: as in ``maps``: ``rw-p``; the last letter is ``s`` for shared.
        offset: where in the file it begins, in bytes.
        device, inode: of the file, ``"00:00"`` and 0 where there is none.
        pathname: of the file, or what the kernel calls it (``[heap]``); None where it has no name.
        deleted: whether the file has no name any more.
        vm_flags: the kernel's flags as two letters each, None where they are unknown.
        figures: every figure of smaps by name, in bytes; each is an attribute too (``rss``),
            None where it is unknown.
        region: ``RegionRun`` of this process's VMM that made it, None for any other mapping.
        whole: the kernel's mapping, with its figures; itself, unless it is a part.

    The kernel merges neighbours, so one of its mappings can belong to several regions, in several
    states. It is cut at their borders then. The kernel has figures of the whole alone: the parts
    have those that hold for any part of it (page sizes, protection key), their own ``size``, and
    None for the others.
    """
    def __init__(self) -> None:
        """Raise TypeError: ``snapshot``, ``maps`` and ``at`` make them."""
    @property
    def region(self) -> RegionRun | None: ...
    @property
    def whole(self) -> Mapping: ...
    def as_dict(self) -> dict[str, Any]:
        """All its values, as JSON can carry them.

        Returns:
            A dict of the attributes: ``vm_flags`` sorted, ``region`` a dict or None, ``whole``
            a dict for a part, else None.
        """
    @staticmethod
    def from_dict(values: dict[str, Any]) -> Mapping:
        """The mapping with the values of ``as_dict``.

        Args:
            values: the dict.

        Errors:
            INVALID_ARGUMENT: it is not one of ``as_dict``; the message names the part.
        """

@final
class Mappings(Sequence[Mapping]):
    """The mappings of one process, each made into an object whenever it is asked for."""
    def __init__(self) -> None:
        """Raise TypeError: ``read_mappings`` makes them."""
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, index: int, /) -> Mapping: ...
    @overload
    def __getitem__(self, index: slice, /) -> tuple[Mapping, ...]: ...
    def __iter__(self) -> Iterator[Mapping]: ...
    @property
    def backslashes(self) -> bool:
        """Whether a name has one, so that some may need ``settle_names``."""
    def settle_names(self, fd: int) -> None:
        """Ask the process's open maps for the names of which the text can mean two."""

def read_mappings(fd: int, figures: bool, ours: bool) -> Mappings:
    """All mappings in an open smaps (with figures) or maps, in order and without overlaps.

    ``ours``: they are this process's, and cut at the borders of its regions. OSError where reading
    fails; ValueError, with the line, where one cannot be read.
    """

def close_files() -> None:
    """Close what ``own_mapping`` keeps open; its next call opens it again."""

def own_mapping(va: int) -> Mapping | NotImplementedType | None:
    """This process's mapping at ``va``, by PROCMAP_QUERY, cut at its region's borders; or None.

    NotImplemented where the text must be searched: there is no PROCMAP_QUERY, or the name is too
    long for it.
    """

def foreign_mapping(fd: int, va: int) -> Mapping | NotImplementedType | None:
    """The mapping at ``va`` of the process whose maps is open, or None; or NotImplemented."""

def read_pages(fd: int, start: int, end: int, exclusive: bool) -> list[PageRun]:
    """What is known of the pages of a range, from an open pagemap: a list of PageRun."""

def has_memory(fd: int) -> bool:
    """Whether the process that this pagemap was opened for still has the memory it had then."""

def known_page_flags(exclusive: bool) -> int:
    """The bits of PageFlags that can be found out here."""

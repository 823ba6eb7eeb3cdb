"""Snapshots of the mappings of a process, and their differences."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import NamedTuple, SupportsIndex, overload

from vmm_linux._core.inspect import Mapping
from vmm_linux._core.procfs import NAMES
from vmm_linux._core.values import counted, describe, exact_text, index, is_a, quoted
from vmm_linux.errors import InvalidArgument, VmmError


class Snapshot(Sequence[Mapping]):
    """The mappings of a process, lowest first.

    They are in order and do not overlap. The kernel reports them piece by piece: changes that the
    process makes meanwhile may be included or not. Where the kernel reports an address twice, as of
    a mapping that grew meanwhile, the later report holds, and the whole earlier mapping is left
    out. A snapshot of a stopped process is exact.

    Attributes:
        pid: the process.
    """

    def __init__(self, pid: int, mappings: Sequence[Mapping]) -> None:
        self.pid = pid
        self._mappings = mappings

    @overload
    def __getitem__(self, index: int) -> Mapping: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping]: ...
    def __getitem__(self, index: int | slice) -> Mapping | Sequence[Mapping]:
        return self._mappings[index]

    def __len__(self) -> int:
        return len(self._mappings)

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self._mappings)

    def __repr__(self) -> str:
        return f"<Snapshot of process {self.pid}, {counted(len(self), 'mapping')}>"

    def at(self, va: SupportsIndex) -> Mapping | None:
        """The mapping that holds an address, None where nothing is mapped.

        Args:
            va: the address.

        Errors:
            INVALID_ARGUMENT: ``va`` is no integer of 64 bits.
        """
        va = index("Snapshot.at", "va", va)
        place = bisect_right(self, va, key=lambda mapping: mapping.start)
        mapping = self[place - 1] if place else None
        return mapping if mapping is not None and va < mapping.end else None

    def wholes(self) -> Iterator[Mapping]:
        """The kernel's own mappings, each once, not cut at the borders of regions."""
        end = 0
        for mapping in self:
            if mapping.start >= end:
                whole = mapping.whole
                end = whole.end
                yield whole

    def total(self, figure: str) -> int:
        """The sum of a figure over all mappings, each counted once.

        Args:
            figure: its name, as ``"rss"``. Mappings without it count as 0.

        Returns:
            Bytes.

        Errors:
            INVALID_ARGUMENT: neither a mapping nor a known kernel has such a figure.
        """
        name = exact_text(figure)
        if name is None:
            raise InvalidArgument(
                "Snapshot.total", f"figure is {describe(figure)}; expected a name as 'rss'"
            )
        figure = name
        sizes = [whole.figures[figure] for whole in self.wholes() if figure in whole.figures]
        if not sizes and figure not in NAMES:
            names = sorted({*NAMES}.union(*(whole.figures for whole in self.wholes())))
            near = get_close_matches(figure[:100], names, 1)
            meant = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
            message = f"figure is {quoted(figure)}, of which no mapping tells; {meant}"
            raise InvalidArgument("Snapshot.total", message)
        return sum(sizes)


class Change(NamedTuple):
    """A mapping that is in both snapshots and differs."""

    before: Mapping
    """The earlier record."""
    after: Mapping
    """The later record."""
    grown: int
    """The growth in bytes; negative if it shrank."""
    figures: dict[str, int]
    """The change of each figure in bytes; unchanged ones are left out."""


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between two snapshots. False if there is none.

    Attributes:
        appeared: mappings that are only in the later one.
        went: mappings that are only in the earlier one.
        changed: mappings in both that differ.
    """

    appeared: tuple[Mapping, ...]
    went: tuple[Mapping, ...]
    changed: tuple[Change, ...]

    def __bool__(self) -> bool:
        return bool(self.appeared or self.went or self.changed)


def diff(before: Iterable[Mapping], after: Iterable[Mapping]) -> Difference:
    """Find the mappings that appeared, went and changed between two snapshots of a process.

    A mapping is the same if it is of the same file (or of none, under the same name) and begins or
    ends at the same address.

    Args:
        before: the earlier ``Snapshot``, or any mappings.
        after: the later one.

    Returns:
        The ``Difference``; each of its parts by address.

    Errors:
        INVALID_ARGUMENT: one of them is something else.
    """
    old, new = _by_address("before", before), _by_address("after", after)
    changed = []
    for key in (_begin, _finish):
        earlier = {key(mapping): mapping for mapping in old.values()}
        for mapping in list(new.values()):
            if (was := earlier.get(key(mapping))) is not None:
                del old[was.start], new[mapping.start]
                if was != mapping:
                    changed.append(_change(was, mapping))
    changed.sort(key=lambda change: change.after.start)
    return Difference(tuple(new.values()), tuple(old.values()), tuple(changed))


def _by_address(name: str, mappings: Iterable[Mapping]) -> dict[int, Mapping]:
    try:
        found = list(mappings)
    except (VmmError, MemoryError):
        raise
    except Exception as problem:
        raise InvalidArgument(
            "diff", f"{name} is {describe(mappings)}; expected a Snapshot or mappings"
        ) from problem
    for each in found:
        if not is_a(each, Mapping):
            raise InvalidArgument("diff", f"{name} has {describe(each)}; expected mappings")
    return {mapping.start: mapping for mapping in found}


def _begin(mapping: Mapping) -> tuple[object, ...]:
    return (mapping.start, mapping.pathname, mapping.device, mapping.inode, mapping.offset)


def _finish(mapping: Mapping) -> tuple[object, ...]:
    return (mapping.end, mapping.pathname, mapping.device, mapping.inode)


def _change(before: Mapping, after: Mapping) -> Change:
    old, new = before.figures, after.figures
    grown = (after.end - after.start) - (before.end - before.start)
    figures = {name: new[name] - old[name] for name in new if old.get(name, new[name]) != new[name]}
    return Change(before, after, grown, figures)

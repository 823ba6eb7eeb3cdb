"""The limits of one VMM, and its usage."""

from __future__ import annotations

from vmm_linux._core.typed import NamedTuple
from vmm_linux._core.values import index, is_a, quoted, shown
from vmm_linux.errors import InvalidArgument, InvalidOperation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self, SupportsIndex

__all__ = ["FIGURES", "Limits", "Usage", "Use"]


class Use(NamedTuple):
    """One usage count of a VMM."""

    used: int
    """The present count."""
    bound: int | None
    """The highest count allowed; None is no bound. It can be below the present count."""


class Usage(NamedTuple):
    """The usage counts of a VMM at one moment; ``Limits`` defines each."""

    regions: Use
    reserved: Use
    committed: Use
    locked: Use
    mappings: Use
    mdls: Use
    mdl_bytes: Use
    mdl_mappings: Use
    handles: Use


FIGURES = Usage._fields
"""The limited counts, in the order of the core's enum (``memory.pxd``)."""

NO_BOUND = 2**64 - 1
"""The number that stands for None in the core."""

INSIDE = (
    ("committed", "reserved", "committed pages are reserved too"),
    ("regions", "mappings", "each region counts at least one mapping"),
    ("mdl_mappings", "regions", "each mapping of a buffer is a region"),
)
"""A count that can never exceed another one, and the reason."""


class Limits:
    """The most that a VMM may have of each kind; None, the default, is no bound.

    Immutable and comparable; ``replace`` makes another one. Sizes are bytes.

    Attributes:
        regions: made by Allocate and MdlMap; a Free in the middle of one makes two of it.
        reserved: all addresses in use, those of guards and mapped buffers included.
        committed: committed pages outside buffers, those of SHAREABLE regions included.
        locked: committed pages in LOCKED regions and mappings, and the whole memory of buffers
            made with LOCKED. Pages that are both count twice.
        mappings: runs of pages that are alike in region, state, protection and memory, one for
            each end of a view inside such a run, one for each guard, and one for each further
            segment that is mapped. A run is at most one mapping of the kernel, which merges runs
            of different regions, and keeps those behind guard regions in one. (It keeps pages
            apart that were written before they became alike, or are pinned in part:
            ``vm.max_map_count`` holds there.) Cutting a run counts before neighbours are joined,
            as in the kernel.
        mdls: MDL buffers, clones too, as long as a handle, a mapping or a clone keeps them. A
            receiver of a clone receives its origin with it.
        mdl_bytes: sizes of these except clones, of untouched memory too. A buffer received twice
            counts twice.
        mdl_mappings: regions made by MdlMap.
        handles: handles that are not closed, revoked ones included.
    """

    __slots__ = FIGURES

    regions: int | None
    reserved: int | None
    committed: int | None
    locked: int | None
    mappings: int | None
    mdls: int | None
    mdl_bytes: int | None
    mdl_mappings: int | None
    handles: int | None

    def __init__(
        self,
        *,
        regions: SupportsIndex | None = None,
        reserved: SupportsIndex | None = None,
        committed: SupportsIndex | None = None,
        locked: SupportsIndex | None = None,
        mappings: SupportsIndex | None = None,
        mdls: SupportsIndex | None = None,
        mdl_bytes: SupportsIndex | None = None,
        mdl_mappings: SupportsIndex | None = None,
        handles: SupportsIndex | None = None,
    ) -> None:
        """Set the bounds that are named.

        Errors:
            INVALID_ARGUMENT: a bound that is no integer, negative, or above 2**64 - 2; one
                that can never be reached because another one, which includes it, is lower.
        """
        if hasattr(self, FIGURES[-1]):  # set last
            raise InvalidOperation("Limits", "Limits cannot be changed; make others with replace()")
        given = (
            regions,
            reserved,
            committed,
            locked,
            mappings,
            mdls,
            mdl_bytes,
            mdl_mappings,
            handles,
        )
        for name, value in zip(FIGURES, given, strict=True):
            object.__setattr__(self, name, _bound(name, value))
        for inner, outer, reason in INSIDE:
            _check_pair(self, inner, outer, reason)

    @classmethod
    def unlimited(cls) -> Self:
        """Limits without any bound: only the kernel's remain."""
        return cls()

    def replace(self, **changes: SupportsIndex | None) -> Self:
        """The same limits with other bounds for these names.

        Errors:
            INVALID_ARGUMENT: as of ``Limits``; an unknown name.
        """
        for name in changes:
            if name not in FIGURES:
                raise InvalidArgument(
                    "Limits", f"there is no figure {quoted(name)}; there are {', '.join(FIGURES)}"
                )
        return type(self)(**(self._values() | changes))

    __replace__ = replace

    def _values(self) -> dict[str, SupportsIndex | None]:
        return {name: getattr(self, name) for name in FIGURES}

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"Limits cannot be changed: set vmm.limits.replace({name}={shown(value)})"
        )

    def __delattr__(self, name: str) -> None:
        raise AttributeError("Limits cannot be changed")

    def __eq__(self, other: object) -> bool:
        return self._values() == other._values() if is_a(other, Limits) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self._values().values()))

    def __reduce__(self) -> tuple[object, tuple[type[Self], dict[str, SupportsIndex | None]]]:
        return _remake, (type(self), self._values())

    def __repr__(self) -> str:
        bounds = (f"{name}={value}" for name, value in self._values().items() if value is not None)
        return f"Limits({', '.join(bounds)})"


def _remake(kind: type[Limits], values: dict[str, SupportsIndex | None]) -> Limits:
    """Make the limits of a pickle."""
    return kind(**values)


def _bound(name: str, value: SupportsIndex | None) -> int | None:
    """A bound as an int, or None."""
    if value is None:
        return None
    number = index("Limits", name, value, "an integer or None")
    if number < 0:
        raise InvalidArgument("Limits", f"{name} is negative; 0 allows nothing, None everything")
    if number >= NO_BOUND:
        raise InvalidArgument("Limits", f"{name} is above 2**64 - 2; None is no bound")
    return number


def _check_pair(limits: Limits, inner: str, outer: str, reason: str) -> None:
    """Refuse two bounds if the first can never be reached."""
    low, high = getattr(limits, inner), getattr(limits, outer)
    if low is not None and high is not None and low > high:
        why = f"{inner} {low} can never be reached, as {outer} is {high} and {reason}"
        raise InvalidArgument("Limits", f"{why}; lower {inner} to {high}, or leave it None")

"""States and kinds of pages."""

from enum import IntEnum

__all__ = ["PageKind", "PageState"]


class PageState(IntEnum):
    """The state of the page at an address."""

    FREE = 0
    """Nothing is mapped."""
    RESERVED = 1
    """The address is taken, without memory: any access faults."""
    COMMITTED = 2
    """The page may hold memory."""


class PageKind(IntEnum):
    """The origin of a page."""

    FREE = 0
    """Not mapped."""
    PRIVATE = 1
    """Of a region that ``allocate`` made."""
    MDL = 2
    """Of an MDL buffer mapped here."""
    GUARD = 3
    """A guard page of a region."""
    FOREIGN = 4
    """A mapping that this VMM did not make."""

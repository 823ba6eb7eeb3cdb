"""States and kinds of pages."""

from enum import IntEnum

__all__ = ["PageKind", "PageState"]


class PageState(IntEnum):
    """What an address is good for."""

    FREE = 0
    """Nothing is there."""
    RESERVED = 1
    """The address is taken, without memory: any access faults."""
    COMMITTED = 2
    """The page may hold memory."""


class PageKind(IntEnum):
    """Whose page it is."""

    FREE = 0
    """Nobody's."""
    PRIVATE = 1
    """Of a region that ``allocate`` made."""
    MDL = 2
    """Of an MDL buffer mapped here."""
    GUARD = 3
    """A guard page of a region."""
    FOREIGN = 4
    """A mapping that this VMM did not make."""

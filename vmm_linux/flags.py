"""The flags of the endpoint, the rights of a handle, the seals of an MDL buffer.

The flags are those of KasperskyOS's ``vmm/flags.h`` without ``VMM_FLAG_``, and a few of the
package's own. The package chose the numbers, which never change.
"""

from enum import IntFlag

__all__ = ["Rights", "Seal", "VmmFlags"]


class VmmFlags(IntFlag):
    """The kind of a region, and the access to its pages.

    The legal protections are none, ``READ``, ``READ|WRITE``, ``READ|EXECUTE`` and
    ``READ|WRITE|EXECUTE``; write or execute without read is not among them.
    """

    READ = 0x1
    """The pages can be read."""
    WRITE = 0x2
    """The pages can be written."""
    EXECUTE = 0x4
    """The pages can be executed."""
    RWX_MASK = 0x7
    """Every protection bit."""

    RESERVE = 0x10
    """Take the addresses. Required by ``allocate``."""
    COMMIT = 0x20
    """Make the pages usable at once."""
    LOCKED = 0x40
    """Committed pages are resident, each with memory of its own."""

    LOW_GUARD = 0x100
    """One page below the region always faults."""
    HIGH_GUARD = 0x200
    """One page above the region always faults."""
    GROW_DOWN = 0x400
    """Recorded and reported; changes nothing on Linux."""

    WRITE_BACK = 0x1000
    """Ordinary caching: what every Linux mapping has."""
    WRITE_THROUGH = 0x2000
    """A Linux process cannot choose it: ``UNIMPLEMENTED``."""
    WRITE_COMBINE = 0x4000
    """A Linux process cannot choose it: ``UNIMPLEMENTED``."""
    CACHE_DISABLE = 0x8000
    """A Linux process cannot choose it: ``UNIMPLEMENTED``."""
    CACHE_MASK = 0xF000
    """Every caching bit."""

    FIXED = 0x10000
    """This address or ``ALREADY_EXISTS``."""
    HUGE = 0x20000
    """Ask for transparent huge pages."""
    SHAREABLE = 0x40000
    """Backed by a memory file from the start: shared with forked children."""


class Rights(IntFlag):
    """The rights of an MDL buffer's handle: the permissions mask in bits 32-47 of its value."""

    TRANSFER = 0x1
    """Send it to another process."""
    COPY = 0x2
    """Copy it and clone the buffer."""
    GET_SID = 0x4
    """Ask for the buffer's security id."""
    MAP_READ = 0x8
    """Map the buffer readable."""
    MAP_WRITE = 0x10
    """Map the buffer writable, and seal it."""
    MAP_EXECUTE = 0x20
    """Map the buffer executable."""


class Seal(IntFlag):
    """The changes to an MDL buffer that are impossible from now on. A seal is never lifted."""

    PUBLISH = 0x1
    """No new writer: writable mappings that exist go on, and no more are made (fcntl(2)
    ``F_SEAL_FUTURE_WRITE``)."""
    FREEZE = 0x2
    """No writer at all, its maker included (``F_SEAL_WRITE``)."""

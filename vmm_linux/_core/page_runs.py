"""Records of ``vmm_linux.inspect`` for runs of pages."""

from enum import IntFlag
from typing import NamedTuple

from vmm_linux.flags import VmmFlags
from vmm_linux.states import PageKind, PageState


class RegionRun(NamedTuple):
    """Pages of a region of this process that are alike: what a VMM made there."""

    base: int
    """Start of the region."""
    size: int
    """Bytes of the region, guard pages not counted."""
    state: PageState
    """Of the pages."""
    kind: PageKind
    """Of the pages: PRIVATE, MDL, or GUARD."""
    flags: VmmFlags
    """Of the region, as allocated."""
    protection: VmmFlags
    """The access that the pages give, or will give once committed."""
    sid: int | None
    """Security id of the MDL buffer; None for other pages, and where the kernel hides it."""


class PageFlags(IntFlag):
    """The known properties of pages. 0: not mapped, or mapped without memory so far."""

    PRESENT = 0x1
    """Has memory, in the process's page table."""
    SWAPPED = 0x2
    """Its contents are in swap. Markers of a page without memory look like this too:
    userfaultfd(2)'s protection, and on Linux 6.13 and 6.14 a guard."""
    SHARED = 0x4
    """Its memory is a file's, or shared anonymous memory."""
    EXCLUSIVE = 0x8
    """No other process maps its memory. Reported on request."""
    HUGE = 0x10
    """Part of a huge page."""
    GUARD = 0x20
    """Of a guard region (``MADV_GUARD_INSTALL``): any access faults."""
    WRITE_PROTECTED = 0x40
    """Write-protected by userfaultfd(2)."""
    ZERO = 0x80
    """The kernel's page of zeros."""


class PageRun(NamedTuple):
    """Neighbouring pages that are alike."""

    start: int
    """The first address."""
    end: int
    """The first address after them."""
    flags: PageFlags
    """The known properties of each page."""

"""A buffer in segments to try things on, and what the kernel says of it."""

from __future__ import annotations

import fcntl
import os
from itertools import pairwise
from typing import TYPE_CHECKING

import kernel_oracle as kernel
from constants import RW
from forged_messages import UNWRITABLE
from kernel_oracle import PAGE
from transfers import text_of

if TYPE_CHECKING:
    from vmm_linux import VMM, Handle


#: Ten pages in segments of four, four and two.
PAGES, SEGMENT = 10, 4
PIECES = [4, 4, 2]
BYTES = PAGES * PAGE


def in_segments(vmm: VMM, pages: int = PAGES, segment: int = SEGMENT) -> Handle:
    """A buffer in segments with another text in each page."""
    handle = vmm.mdl_create(pages * PAGE, RW, segment * PAGE)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    for page in range(pages):
        vmm.write(va + page * PAGE, text_of(page))
    vmm.free(va, pages * PAGE)
    return handle


def memory_files() -> dict[int, os.stat_result]:
    """The memory files that this process has a descriptor of, by inode number."""
    found = {}
    for number, target in kernel.descriptors().items():
        if target == "/memfd:vmm_linux (deleted)":
            status = os.fstat(number)
            found[status.st_ino] = status
    return found


def memory_descriptors() -> list[str]:
    """What the descriptors of memory files and identities name."""
    return sorted(
        target for target in kernel.descriptors().values() if target.startswith("/memfd:")
    )


def mapped_files() -> list[kernel.Mapping]:
    """The mappings of memory files."""
    return [mapping for mapping in kernel.maps() if "/memfd:" in mapping.pathname]


def pieces_at(va: int, size: int) -> list[kernel.Mapping]:
    """The kernel's mappings of a range, which must lie side by side and fill it."""
    found = kernel.maps_between(va, va + size)
    assert (found[0].start, found[-1].end) == (va, va + size)
    assert all(low.end == high.start for low, high in pairwise(found))
    return found


def pages_of(found: list[kernel.Mapping]) -> list[int]:
    """Pages in each of these mappings."""
    return [(piece.end - piece.start) // PAGE for piece in found]


#: F_SEAL_FUTURE_WRITE.
PUBLISHED = 0x10


def seals_of_files() -> list[int]:
    """The kernel's seals of the three segments, in order of their making."""
    found = {}
    for number, target in kernel.descriptors().items():
        if target == "/memfd:vmm_linux (deleted)":
            found[os.fstat(number).st_ino] = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    return [found[inode] & (UNWRITABLE | PUBLISHED) for inode in sorted(found)]

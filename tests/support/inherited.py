"""Memory that a forked child inherits, to try things on."""

from __future__ import annotations

import ctypes

import kernel_oracle as kernel
from constants import COMMITTED, RW
from faces import Face, call
from kernel_oracle import PAGE
from vmm_linux import VMM, Handle, Retcode, VmmFlags


def region(vmm: VMM, backing: int, pages: int = 8) -> int:
    """A committed region that begins with ``parent``."""
    va = vmm.allocate(0, pages * PAGE, COMMITTED | VmmFlags(backing))
    vmm.write(va, b"parent")
    return va


def outcome(vmm: VMM, method: str, *arguments: object) -> Retcode:
    """A call's return code; it is the same through both faces."""
    rc = call(vmm, Face.METHODS, method, *arguments).rc
    if rc is not Retcode.OK:
        assert call(vmm, Face.ENDPOINT, method, *arguments).rc is rc
    return rc


def buffer(vmm: VMM) -> tuple[Handle, int]:
    """A buffer of eight pages that begins with ``parent``, and where it is mapped."""
    handle = vmm.mdl_create(8 * PAGE, RW)
    va = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
    vmm.write(va, b"parent")
    return handle, va


def frames(va: int, pages: int) -> list[int]:
    """The page frame numbers behind pages: zeros for those who may not know them."""
    for page in range(pages):
        ctypes.string_at(va + page * PAGE, 1)
    return [entry & (1 << 55) - 1 for entry in kernel.pagemap(va, pages)]

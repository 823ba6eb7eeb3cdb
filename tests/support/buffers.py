"""Buffers to try things on, and questions about them.

The kernel says whether it is so: memory files and their seals in ``/proc/self/fd``, permissions
in ``/proc/self/maps``, physical pages in ``/proc/self/pagemap``, memory held in ``st_blocks``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from constants import COMMITTED, RW, RWX
from kernel_oracle import PAGE
from vmm_linux import VMM, Handle, Retcode, VmmError, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable


F_SEAL_EXEC = 0x20
PROTECTIONS = {"none": 0, "R": 1, "RW": 3, "RX": 5, "RWX": 7}
protections = pytest.mark.parametrize("prot", PROTECTIONS.values(), ids=PROTECTIONS.keys())


# ---- questions to the kernel ---------------------------------------------------------------------


def memory_files() -> list[int]:
    """The descriptors of buffers' memory, read-only ones included, clones' identities not."""
    names = kernel.descriptors().items()
    return sorted(number for number, name in names if name == "/memfd:vmm_linux (deleted)")


def identities() -> list[int]:
    """The descriptors that are clones' identities."""
    names = kernel.descriptors().items()
    return sorted(number for number, name in names if name == "/memfd:vmm_linux identity (deleted)")


def only_file() -> int:
    """The writable descriptor of the only buffer that there is."""
    (number,) = [fd for fd in memory_files() if not is_read_only(fd)]
    return number


def is_read_only(fd: int) -> bool:
    """Whether this descriptor was opened for reading alone."""
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def mapped_files() -> list[kernel.Mapping]:
    """The mappings of memory files."""
    return [mapping for mapping in kernel.maps() if "/memfd:" in mapping.pathname]


def inode_at(va: int) -> int:
    """The file that is mapped there, 0 for private memory."""
    mapping = kernel.mapping_at(va)
    assert mapping is not None
    return mapping.inode


def file_at(va: int) -> int:
    """A descriptor of the memory file that is mapped there."""
    return next(fd for fd in memory_files() if os.fstat(fd).st_ino == inode_at(va))


def held(fd: int) -> int:
    """Bytes of memory that a memory file has."""
    return os.fstat(fd).st_blocks * 512


def seals(fd: int) -> int:
    """The kernel's seals of a memory file, but for the one against making it executable."""
    return fcntl.fcntl(fd, fcntl.F_GET_SEALS) & ~F_SEAL_EXEC


def permissions(va: int, pages: int = 1) -> list[str | None]:
    """The kernel's permissions of pages."""
    return kernel.page_permissions(va, va + pages * PAGE)


def frames(va: int, pages: int) -> list[Any]:
    """What tells the physical memory behind readable pages: page frame numbers.

    Only root sees these. Anybody else is told the file and the offset behind each page, which
    for shared memory come to the same unless the kernel is wrong.
    """
    for page in range(pages):
        ctypes.string_at(va + page * PAGE, 1)
    entries = kernel.pagemap(va, pages)
    assert all(entry >> 63 for entry in entries)
    if os.geteuid() == 0:
        numbers = [entry & (1 << 55) - 1 for entry in entries]
        assert all(numbers), "root is told the page frame numbers"
        return numbers
    places = []
    for at in range(va, va + pages * PAGE, PAGE):
        mapping = kernel.mapping_at(at)
        assert mapping is not None
        places.append((mapping.device, mapping.inode, mapping.offset + at - mapping.start))
    return places


def record_at(va: int) -> kernel.SmapsRecord:
    """The smaps record of the mapping that begins at ``va``."""
    (found,) = [record for record in kernel.smaps() if record.mapping.start == va]
    return found


def errno_of(operation: Callable[[], object]) -> int:
    """The error number with which the kernel refuses something, 0 if it does not."""
    try:
        operation()
    except OSError as refused:
        return refused.errno or -1
    return 0


def writable_map(fd: int) -> int:
    """Error number of mapping a memory file writable behind the package's back, 0 if it can be."""
    size = os.fstat(fd).st_size
    return errno_of(lambda: mmap.mmap(fd, size, mmap.MAP_SHARED, kernel.PROT_WRITE).close())


def assert_frozen(fd: int) -> None:
    """Whether the kernel lets nobody change the memory, not even through its own descriptor."""
    assert errno_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EPERM
    assert writable_map(fd) == errno.EPERM
    assert errno_of(lambda: os.ftruncate(fd, 0)) == errno.EPERM
    punched = ctypes.CDLL(None, use_errno=True).fallocate(
        fd, 3, ctypes.c_long(0), ctypes.c_long(PAGE)
    )
    assert (punched, ctypes.get_errno()) == (-1, errno.EPERM)


# ---- calls on a VMM ------------------------------------------------------------------------------


def refusal(operation: Callable[..., object], *arguments: object) -> Retcode:
    """The return code with which a call fails."""
    with pytest.raises(VmmError) as caught:
        operation(*arguments)
    return caught.value.rc


def filled(vmm: VMM, va: int, pages: int) -> bytes:
    """Write something different into each page, and say what."""
    contents = b"".join(bytes([65 + page % 50]) * PAGE for page in range(pages))
    vmm.write(va, contents)
    return contents


def buffer(vmm: VMM, pages: int = 8, prot: int = RWX) -> tuple[Handle, int, bytes]:
    """A buffer, the address where it is mapped writable, and its contents."""
    handle = vmm.mdl_create(pages * PAGE, prot)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    return handle, va, filled(vmm, va, pages)


def region(vmm: VMM, pages: int = 8, extra: int = 0) -> tuple[int, bytes]:
    """A committed region of private pages, and its contents."""
    va = vmm.allocate(0, pages * PAGE, COMMITTED | VmmFlags(extra))
    return va, filled(vmm, va, pages)

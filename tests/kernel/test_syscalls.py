"""Every system call does what the kernel's manual says, and answers ``-errno`` when refused."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from kernel_oracle import ARENA, MAP_ANONYMOUS, MAP_FIXED_NOREPLACE, MAP_PRIVATE, PAGE
from vmm_linux._core import kernel as core

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ, WRITE = kernel.PROT_READ, kernel.PROT_WRITE
PRIVATE = MAP_PRIVATE | MAP_ANONYMOUS
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
MADV_DONTNEED = 4
#: An address in the arena at which nothing ever is.
NOWHERE = ARENA + 1024 * PAGE
CLOSED = 987_654


@pytest.fixture
def pages() -> Iterator[int]:
    """Four pages of private memory, readable and writable."""
    address = core.mmap(ARENA, 4 * PAGE, READ | WRITE, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0)
    assert address == ARENA
    yield address
    assert core.munmap(address, 4 * PAGE) == 0


@pytest.fixture
def memory_file() -> Iterator[int]:
    """A sealable memory file of four pages."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def test_mmap_answers_the_address(pages: int) -> None:
    assert kernel.page_permissions(pages - PAGE, pages + 5 * PAGE) == [
        None,
        *["rw-p"] * 4,
        None,
    ]


def test_mmap_maps_the_file_from_the_offset_on(memory_file: int) -> None:
    os.pwrite(memory_file, b"third", 2 * PAGE)
    address = core.mmap(0, PAGE, READ, kernel.MAP_SHARED, memory_file, 2 * PAGE)
    assert ctypes.string_at(address, 5) == b"third"
    assert core.munmap(address, PAGE) == 0


def test_munmap_takes_away_just_the_range(pages: int) -> None:
    assert core.munmap(pages + PAGE, PAGE) == 0
    assert kernel.page_permissions(pages, pages + 4 * PAGE) == ["rw-p", None, "rw-p", "rw-p"]


def test_mprotect_changes_just_the_range(pages: int) -> None:
    assert core.mprotect(pages + 2 * PAGE, PAGE, READ) == 0
    assert kernel.page_permissions(pages, pages + 4 * PAGE) == ["rw-p", "rw-p", "r--p", "rw-p"]


def test_mremap_moves_the_pages_with_their_contents(pages: int) -> None:
    ctypes.memmove(pages, b"moved", 5)
    target = pages + 16 * PAGE
    flags = MREMAP_MAYMOVE | MREMAP_FIXED
    assert core.mremap(pages, PAGE, PAGE, flags, target) == target
    assert ctypes.string_at(target, 5) == b"moved"
    assert kernel.mapping_at(pages) is None
    assert core.munmap(target, PAGE) == 0


def test_madvise_dontneed_gives_the_page_back(pages: int) -> None:
    ctypes.memset(pages, 1, 2 * PAGE)
    assert core.madvise(pages, PAGE, MADV_DONTNEED) == 0
    assert kernel.present_pages(pages, 2) == [False, True]


def test_mlock_and_munlock_show_in_msync(pages: int) -> None:
    def invalidate() -> int:
        return core.msync(pages, PAGE, kernel.MS_ASYNC | kernel.MS_INVALIDATE)

    assert core.mlock(pages, PAGE) == 0
    assert invalidate() == -errno.EBUSY
    assert kernel.present_pages(pages, 2) == [True, False]
    assert core.munlock(pages, PAGE) == 0
    assert invalidate() == 0


def test_ftruncate_sets_the_size(memory_file: int) -> None:
    assert core.ftruncate(memory_file, 9 * PAGE) == 0
    assert os.fstat(memory_file).st_size == 9 * PAGE


def test_fallocate_takes_memory_and_punches_holes(memory_file: int) -> None:
    def taken() -> int:
        return os.fstat(memory_file).st_blocks * 512

    assert core.fallocate(memory_file, 0, 0, 4 * PAGE) == 0
    assert taken() == 4 * PAGE
    punch = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    assert core.fallocate(memory_file, punch, PAGE, 2 * PAGE) == 0
    assert taken() == 2 * PAGE
    assert os.fstat(memory_file).st_size == 4 * PAGE


def test_fcntl_adds_and_tells_seals(memory_file: int) -> None:
    seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    assert core.fcntl(memory_file, fcntl.F_ADD_SEALS, seals) == 0
    assert core.fcntl(memory_file, fcntl.F_GET_SEALS, 0) == seals
    assert core.ftruncate(memory_file, PAGE) == -errno.EPERM


def test_close_closes() -> None:
    fd = os.memfd_create("test")
    assert core.close(fd) == 0
    assert fd not in kernel.descriptors()


def test_the_page_size_is_the_kernels() -> None:
    assert core.page_size() == os.sysconf("SC_PAGE_SIZE")


REFUSED: dict[str, tuple[Callable[[], int], int]] = {
    "mmap of nothing": (lambda: core.mmap(0, 0, READ, PRIVATE, -1, 0), errno.EINVAL),
    "mmap of no file": (
        lambda: core.mmap(0, PAGE, READ, MAP_PRIVATE, CLOSED, 0),
        errno.EBADF,
    ),
    "mmap of too much": (lambda: core.mmap(0, 1 << 62, READ, PRIVATE, -1, 0), errno.ENOMEM),
    "munmap unaligned": (lambda: core.munmap(1, PAGE), errno.EINVAL),
    "mprotect of a hole": (lambda: core.mprotect(NOWHERE, PAGE, READ), errno.ENOMEM),
    "mprotect unaligned": (lambda: core.mprotect(NOWHERE + 1, PAGE, READ), errno.EINVAL),
    "mremap of a hole": (lambda: core.mremap(NOWHERE, PAGE, PAGE, 0, 0), errno.EFAULT),
    "madvise of a hole": (lambda: core.madvise(NOWHERE, PAGE, MADV_DONTNEED), errno.ENOMEM),
    "madvise unknown": (lambda: core.madvise(NOWHERE, PAGE, 9999), errno.EINVAL),
    "mlock of a hole": (lambda: core.mlock(NOWHERE, PAGE), errno.ENOMEM),
    "munlock of a hole": (lambda: core.munlock(NOWHERE, PAGE), errno.ENOMEM),
    "msync of a hole": (lambda: core.msync(NOWHERE, PAGE, kernel.MS_ASYNC), errno.ENOMEM),
    "ftruncate of no file": (lambda: core.ftruncate(CLOSED, PAGE), errno.EBADF),
    "fallocate of no file": (lambda: core.fallocate(CLOSED, 0, 0, PAGE), errno.EBADF),
    "fcntl of no file": (lambda: core.fcntl(CLOSED, fcntl.F_GETFD, 0), errno.EBADF),
    "close of no file": (lambda: core.close(CLOSED), errno.EBADF),
}


@pytest.mark.parametrize(("call", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_call_answers_the_negative_errno(call: Callable[[], int], reason: int) -> None:
    assert call() == -reason


def test_a_call_that_succeeds_after_one_that_failed_answers_success() -> None:
    assert core.munmap(1, PAGE) == -errno.EINVAL
    assert core.munmap(NOWHERE, PAGE) == 0

"""Looking at pages of this process and of others; the kernel's own files are the oracle."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import RW
from kernel_oracle import PAGE, USER_SPACE_END
from onlookers import stopped_child
from vmm_linux import VMM, inspect
from vmm_linux._core.kernel import Feature, available, huge_page_size, without
from vmm_linux.inspect import PageFlags, PageRun

if TYPE_CHECKING:
    from collections.abc import Iterator


MADV_HUGEPAGE, MADV_GUARD_INSTALL = 14, 102


PAGE_WAYS = {
    "scan": [],
    "scan without guards": [Feature.PAGEMAP_GUARD],
    "pagemap": [Feature.PAGEMAP_SCAN],
    "pagemap without guards": [Feature.PAGEMAP_SCAN, Feature.PAGEMAP_GUARD],
}


@pytest.fixture(params=PAGE_WAYS)
def ways_to_pages(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to find out about pages."""
    with without(*PAGE_WAYS[request.param]):
        yield request.param


def page_by_page(runs: list[PageRun]) -> list[PageFlags]:
    return [run.flags for run in runs for _ in range(run.start, run.end, PAGE)]


def entries(va: int, count: int, pid: int | None = None) -> list[int]:
    with Path(f"/proc/{pid or 'self'}/pagemap").open("rb", buffering=0) as file:
        text = os.pread(file.fileno(), 8 * count, va // PAGE * 8)
    return list(struct.unpack(f"{count}Q", text))


def expected_of(entry: int) -> PageFlags:
    if entry >> 58 & 1 and available(Feature.PAGEMAP_GUARD):
        return PageFlags.GUARD
    flags = PageFlags(0)
    for bit, flag in (
        (63, PageFlags.PRESENT),
        (62, PageFlags.SWAPPED),
        (61, PageFlags.SHARED),
        (57, PageFlags.WRITE_PROTECTED),
        (56, PageFlags.EXCLUSIVE),
    ):
        if entry >> bit & 1:
            flags |= flag
    return flags


@contextmanager
def varied_pages() -> Iterator[tuple[int, int]]:
    """Pages of every kind there is here: address and number."""
    libc = kernel.libc
    base = libc.mmap(None, 64 * PAGE, 3, 0x22, -1, 0)
    fd = os.memfd_create("pages")
    try:
        libc.munmap(base + 40 * PAGE, 4 * PAGE)
        os.ftruncate(fd, 8 * PAGE)
        os.pwrite(fd, b"x" * 2 * PAGE, PAGE)
        assert libc.mmap(base + 48 * PAGE, 8 * PAGE, 3, 0x11, fd, 0) == base + 48 * PAGE
        for page in (0, 1, 3, 5, 6, 7, 49, 63):
            ctypes.memset(base + page * PAGE, 1, 1)
        for page in (10, 11, 50):
            ctypes.string_at(base + page * PAGE, 1)
        if available(Feature.GUARD_REGIONS):
            assert libc.madvise(base + 20 * PAGE, 3 * PAGE, MADV_GUARD_INSTALL) == 0
        yield base, 64
    finally:
        os.close(fd)
        libc.munmap(base, 64 * PAGE)


@pytest.mark.usefixtures("ways_to_pages")
def test_pages_are_what_pagemap_tells() -> None:
    told = inspect.page_flags_told(exclusive=True)
    compared = told & ~(PageFlags.HUGE | PageFlags.ZERO)
    with varied_pages() as (base, count), stopped_child() as child:
        for pid in (None, child):
            runs = inspect.pages(base, count * PAGE, pid, exclusive=True)
            assert (runs[0].start, runs[-1].end) == (base, base + count * PAGE)
            assert all(a.end == b.start and a.flags != b.flags for a, b in pairwise(runs))
            found = [flags & compared for flags in page_by_page(runs)]
            assert found == [expected_of(e) & compared for e in entries(base, count, pid)]
            assert all(run.flags & ~told == 0 for run in runs)
            without_it = page_by_page(inspect.pages(base, count * PAGE, pid))
            assert without_it == [f & ~PageFlags.EXCLUSIVE for f in page_by_page(runs)]


def test_pages_of_zeros_are_told_and_present_is_what_mincore_says() -> None:
    with varied_pages() as (base, count):
        found = page_by_page(inspect.pages(base, count * PAGE, exclusive=True))
        if PageFlags.ZERO in inspect.page_flags_told():
            assert PageFlags.ZERO in found[10]
            assert PageFlags.ZERO not in found[0]
        assert PageFlags.EXCLUSIVE in found[0]
        vector = ctypes.create_string_buffer(40)
        assert kernel.libc.mincore(base, 40 * PAGE, vector) == 0
        told = [bool(flags & (PageFlags.PRESENT)) for flags in found[:40]]
        # A guard is no hole for mincore.
        assert [t for i, t in enumerate(told) if not 20 <= i < 23] == [
            bool(byte[0] & 1) for i, byte in enumerate(vector) if not 20 <= i < 23
        ]
        with stopped_child():
            shared = page_by_page(inspect.pages(base, PAGE, exclusive=True))
            assert PageFlags.EXCLUSIVE not in shared[0]


def test_huge_pages_are_as_many_as_smaps_tells() -> None:
    size = 4 * huge_page_size()
    if not available(Feature.TRANSPARENT_HUGE_PAGES) or not size:
        pytest.skip("no transparent huge pages here")
    base = kernel.libc.mmap(None, size, 3, 0x22, -1, 0)
    try:
        kernel.libc.madvise(base, size, MADV_HUGEPAGE)
        ctypes.memset(base, 1, size)
        runs = inspect.pages(base, size)
        mapping = inspect.snapshot().at(base)
        assert mapping is not None
        huge = sum(run.end - run.start for run in runs if PageFlags.HUGE in run.flags)
        if PageFlags.HUGE in inspect.page_flags_told():
            assert huge == mapping.anon_huge_pages
    finally:
        kernel.libc.munmap(base, size)


USERFAULTFD = {"x86_64": 323, "aarch64": 282}
UFFD_USER_MODE_ONLY, UFFDIO_REGISTER_MODE_WP, UFFDIO_WRITEPROTECT_MODE_WP = 1, 2, 1
UFFDIO_API, UFFDIO_REGISTER, UFFDIO_WRITEPROTECT = 0xC018AA3F, 0xC020AA00, 0xC018AA06


def userfaultfd() -> int:
    """A descriptor with which pages can be write-protected."""
    number = USERFAULTFD.get(os.uname().machine, -1)
    fd: int = kernel.libc.syscall(number, os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
    if fd < 0:
        pytest.skip("no userfaultfd here")
    fcntl.ioctl(fd, UFFDIO_API, bytearray(struct.pack("3Q", 0xAA, 0, 0)))
    return fd


@pytest.mark.usefixtures("ways_to_pages")
def test_pages_that_are_write_protected_are_told() -> None:
    fd = userfaultfd()
    base = kernel.libc.mmap(None, 8 * PAGE, 3, 0x22, -1, 0)
    try:
        ctypes.memset(base, 1, 6 * PAGE)
        wanted = struct.pack("4Q", base, 8 * PAGE, UFFDIO_REGISTER_MODE_WP, 0)
        fcntl.ioctl(fd, UFFDIO_REGISTER, bytearray(wanted))
        protect = struct.pack("3Q", base + PAGE, 2 * PAGE, UFFDIO_WRITEPROTECT_MODE_WP)
        fcntl.ioctl(fd, UFFDIO_WRITEPROTECT, bytearray(protect))
        found = page_by_page(inspect.pages(base, 8 * PAGE))
        assert [PageFlags.WRITE_PROTECTED in flags for flags in found] == [
            page in (1, 2) for page in range(8)
        ]
        assert all(PageFlags.PRESENT in flags for flags in found[:6])
    finally:
        os.close(fd)
        kernel.libc.munmap(base, 8 * PAGE)


@pytest.mark.usefixtures("ways_to_pages")
def test_looking_at_pages_takes_no_memory(vmm: VMM) -> None:
    handle = vmm.mdl_create(64 * PAGE, RW)
    address = vmm.mdl_map(handle, 0, 64 * PAGE, 0, RW)
    assert inspect.pages(address, 64 * PAGE) == [
        PageRun(address, address + 64 * PAGE, PageFlags(0))
    ]
    mapping = inspect.snapshot().at(address)
    assert mapping is not None
    assert mapping.rss == 0


def test_all_of_user_space_can_be_asked_about() -> None:
    runs = inspect.pages(0, USER_SPACE_END)
    assert (runs[0].start, runs[-1].end) == (0, USER_SPACE_END)
    resident = sum(run.end - run.start for run in runs if PageFlags.PRESENT in run.flags)
    rss = inspect.rollup().rss
    assert rss is not None
    assert abs(resident - rss) < 64 << 20


def test_all_of_user_space_can_be_asked_about_without_scan() -> None:
    with stopped_child() as child:
        scanned = inspect.pages(0, USER_SPACE_END, child)
        with without(Feature.PAGEMAP_SCAN):
            read = inspect.pages(0, USER_SPACE_END, child)
    lost = PageFlags.HUGE | PageFlags.ZERO
    assert sum(r.end - r.start for r in read if r.flags) == sum(
        r.end - r.start for r in scanned if r.flags & ~lost
    )

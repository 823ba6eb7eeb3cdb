"""Memory of this process to ask about, who is asked, and the ways to look at a page."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from kernel_oracle import ARENA, MAP_FIXED_NOREPLACE, MAP_SHARED, PAGE
from vmm_linux._core.kernel import Feature, without
from vmm_linux._core.procfs import OwnProcess

if TYPE_CHECKING:
    from collections.abc import Iterator


READ, WRITE, EXECUTE, SHARED = 1, 2, 4, 8


@pytest.fixture
def own() -> Iterator[OwnProcess]:
    process = OwnProcess()
    yield process
    process.close()


PAGE_WAYS = {
    "scan": [],
    "scan and pagemap": [Feature.PAGEMAP_GUARD],
    "pagemap": [Feature.PAGEMAP_SCAN],
    "mincore": [Feature.PAGEMAP_SCAN, Feature.PAGEMAP],
}


@pytest.fixture(params=PAGE_WAYS)
def page_way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each way to look at a page."""
    with without(*PAGE_WAYS[request.param]):
        yield request.param


@contextmanager
def mapped(
    address: int, size: int, protection: int = READ | WRITE, fd: int = -1, offset: int = 0
) -> Iterator[int]:
    """A mapping at this address: private and anonymous, or of a file and shared."""
    flags = MAP_FIXED_NOREPLACE | (
        kernel.MAP_PRIVATE | kernel.MAP_ANONYMOUS if fd < 0 else MAP_SHARED
    )
    got = kernel.libc.mmap(address, size, protection, flags, fd, offset)
    assert got == address
    try:
        yield address
    finally:
        kernel.unmap(address, size)


@contextmanager
def memory_file(size: int) -> Iterator[int]:
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def islands(count: int) -> Iterator[int]:
    """``count`` mapped pages with a hole of one page after each."""
    size = 2 * count * PAGE
    kernel.map_at(ARENA, size, READ)
    try:
        for island in range(count):
            kernel.unmap(ARENA + (2 * island + 1) * PAGE, PAGE)
        yield ARENA
    finally:
        kernel.unmap(ARENA, size)

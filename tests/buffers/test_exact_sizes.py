"""A buffer's length is exact to the byte: ``st_size`` of its file; memory is in whole pages."""

from __future__ import annotations

import errno
import fcntl
import os
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from buffers import (
    errno_of,
    filled,
    held,
    identities,
    is_read_only,
    memory_files,
    only_file,
    refusal,
    seals,
)
from constants import COMMITTED, LOCKED, READ, RESIZING, RW, SHAREABLE
from faces import Face, call
from kernel_oracle import PAGE
from vmm_linux import VMM, Limits, Mdl, Retcode
from vmm_linux.errors import InvalidArgument, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_linux import Handle

#: Pages of a buffer and how many bytes before their end it ends.
SIZES = [(1, 0), (1, 1), (1, PAGE - 1), (2, 0), (2, 7), (2, PAGE - 1), (5, 1), (5, PAGE // 2)]
sizes = pytest.mark.parametrize(("pages", "short"), SIZES)


def sizes_of_files() -> list[int]:
    """The kernel's sizes of the writable memory files, in the order of their descriptors."""
    return [os.fstat(fd).st_size for fd in memory_files() if not is_read_only(fd)]


def lengths(vmm: VMM, handle: Handle) -> tuple[int, int, int]:
    """What a handle tells: the length to the byte, that of its pages, and the same once more."""
    info = vmm.handle_info(handle)
    return info.nbytes, info.size, vmm.mdl_get_size(handle)


# ---- mdl_create ----------------------------------------------------------------------------------


@sizes
def test_the_file_has_just_so_many_bytes_and_all_else_counts_pages(
    pages: int, short: int, vmm: VMM
) -> None:
    nbytes = pages * PAGE - short
    handle = vmm.mdl_create(pages * PAGE, RW, 0, nbytes)
    assert lengths(vmm, handle) == (nbytes, pages * PAGE, pages * PAGE)
    assert (sizes_of_files(), seals(only_file())) == ([nbytes], RESIZING)
    for other in (nbytes - 1, nbytes + 1):
        assert errno_of(lambda size=other: os.ftruncate(only_file(), size)) == errno.EPERM  # type: ignore[misc]
    usage = vmm.usage()
    assert (usage.mdl_bytes.used, usage.mdls.used) == (pages * PAGE, 1)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    mapping = kernel.mapping_at(va)
    assert mapping is not None
    assert (mapping.start, mapping.end) == (va, va + pages * PAGE)
    contents = filled(vmm, va, pages)
    assert vmm.read(va, pages * PAGE) == contents
    assert os.pread(only_file(), pages * PAGE, 0) == contents[:nbytes]


def test_0_is_all_of_its_pages_and_by_name_too(vmm: VMM) -> None:
    handles = [
        vmm.mdl_create(2 * PAGE, RW),
        vmm.mdl_create(2 * PAGE, RW, 0, 0),
        vmm.mdl_create(2 * PAGE, RW, nbytes=2 * PAGE),
        vmm.endpoint.MdlCreate(2 * PAGE, RW)[0],
    ]
    assert [vmm.handle_info(handle).nbytes for handle in handles] == [2 * PAGE] * 4
    assert vmm.handle_info(vmm.mdl_create(size=PAGE, prot=RW, nbytes=1)).nbytes == 1


WRONG: list[tuple[Any, str]] = [
    (PAGE, f"nbytes {PAGE} does not end in the last page of size {2 * PAGE}"),
    (1, "nbytes 1 does not end"),
    (2 * PAGE + 1, "does not end"),
    (3 * PAGE, "does not end"),
    (2**63, "does not end"),
    (2**64 - 1, "does not end"),
    (2**64, "65 bits"),
    (-1, r"nbytes -0x1 is not in 0 \.\.\. 2\*\*64 - 1"),
    (True, "nbytes is True"),
    (1.0, "nbytes is 1.0"),
    ("1", "nbytes is '1'"),
    (None, "nbytes is None"),
]


@pytest.mark.parametrize(("nbytes", "why"), WRONG)
def test_lengths_that_do_not_end_in_the_last_page_are_refused(
    nbytes: Any,  # noqa: ANN401
    why: str,
    vmm: VMM,
) -> None:
    before = vmm.usage(), kernel.descriptors()
    with pytest.raises(InvalidArgument, match=why):
        vmm.mdl_create(2 * PAGE, RW, 0, nbytes)
    assert (vmm.usage(), kernel.descriptors()) == before


def test_sizes_are_page_multiples_still(vmm: VMM) -> None:
    for size in (1, PAGE - 1, PAGE + 1):
        for nbytes in (0, 1, size):
            assert refusal(vmm.mdl_create, size, RW, 0, nbytes) is Retcode.INVALID_ARGUMENT
    assert refusal(vmm.mdl_create, 0, RW, 0, 0) is Retcode.INVALID_ARGUMENT


@pytest.mark.parametrize("segment", [1, 2, 3, 8])
@sizes
def test_of_segments_the_last_one_ends_early(
    pages: int, short: int, segment: int, vmm: VMM
) -> None:
    nbytes = pages * PAGE - short
    handle = vmm.mdl_create(pages * PAGE, RW, segment * PAGE, nbytes)
    whole = [min(segment * PAGE, nbytes - at) for at in range(0, nbytes, segment * PAGE)]
    assert (sizes_of_files(), lengths(vmm, handle)[0]) == (whole, nbytes)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    contents = filled(vmm, va, pages)
    assert vmm.read(va, pages * PAGE) == contents
    assert vmm.usage().mdl_bytes.used == pages * PAGE


@pytest.mark.parametrize("segment", [0, 1, 2])
@sizes
def test_locked_has_memory_for_its_last_page_too(
    pages: int, short: int, segment: int, vmm: VMM
) -> None:
    nbytes = pages * PAGE - short
    handle = vmm.mdl_create(pages * PAGE, RW | LOCKED, segment * PAGE, nbytes)
    assert sum(held(fd) for fd in memory_files()) == pages * PAGE
    assert vmm.usage().locked.used == pages * PAGE
    assert sum(sizes_of_files()) == nbytes
    vmm.handle_close(handle)
    assert vmm.usage().locked.used == 0


@sizes
def test_a_mapping_that_is_locked_has_all_its_pages(pages: int, short: int, vmm: VMM) -> None:
    handle = vmm.mdl_create(pages * PAGE, RW, 0, pages * PAGE - short)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW | LOCKED)
    assert held(only_file()) == pages * PAGE
    assert all(kernel.in_core(va, pages))
    again = vmm.mdl_map(handle, (pages - 1) * PAGE, PAGE, 0, READ | LOCKED)
    assert kernel.in_core(again, 1) == [True]


# ---- mdl_create_from_buf, mdl_create_from_vm -----------------------------------------------------


@pytest.mark.parametrize("prot", [READ, RW], ids=["R", "RW"])
@pytest.mark.parametrize("size", [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE - 1, 3 * PAGE])
def test_bytes_make_a_file_of_just_their_length(size: int, prot: int, vmm: VMM) -> None:
    data = bytes(number % 255 + 1 for number in range(size))
    handle = vmm.mdl_create_from_buf(data, prot)
    pages = -(-size // PAGE)
    assert lengths(vmm, handle) == (size, pages * PAGE, pages * PAGE)
    assert (sizes_of_files(), os.pread(only_file(), 2 * size, 0)) == ([size], data)
    assert seals(only_file()) == (RESIZING if prot & RW == RW else RESIZING | fcntl.F_SEAL_WRITE)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, READ)
    assert vmm.read(va, pages * PAGE) == data.ljust(pages * PAGE, b"\0")
    assert vmm.usage().mdl_bytes.used == pages * PAGE


@pytest.mark.parametrize("extra", [0, SHAREABLE], ids=["private", "SHAREABLE"])
def test_pages_of_a_region_make_a_file_of_whole_pages(extra: int, vmm: VMM) -> None:
    va = vmm.allocate(0, 3 * PAGE, COMMITTED | extra)
    handle = vmm.mdl_create_from_vm(va, 3 * PAGE, RW)
    assert lengths(vmm, handle) == (3 * PAGE, 3 * PAGE, 3 * PAGE)
    assert sizes_of_files() == [3 * PAGE]


# ---- clones --------------------------------------------------------------------------------------


@pytest.mark.parametrize("segment", [0, 1, 2, 3])
@pytest.mark.parametrize("short", [0, 1, PAGE - 1])
def test_clones_have_whole_pages_but_for_the_end(short: int, segment: int, vmm: VMM) -> None:
    pages, nbytes = 5, 5 * PAGE - short
    handle = vmm.mdl_create(pages * PAGE, RW, segment * PAGE, nbytes)
    for first in range(pages):
        for count in range(1, pages - first + 1):
            clone = vmm.mdl_clone(handle, first * PAGE, count * PAGE)
            expected = min((first + count) * PAGE, nbytes) - first * PAGE
            assert lengths(vmm, clone) == (expected, count * PAGE, count * PAGE)
            again = vmm.mdl_clone(clone, (count - 1) * PAGE, PAGE)
            last = min((first + count) * PAGE, nbytes) - (first + count - 1) * PAGE
            assert lengths(vmm, again) == (last, PAGE, PAGE)
            vmm.handle_close(again)
            vmm.handle_close(clone)
    assert (vmm.usage().mdls.used, len(identities())) == (1, int(segment > 0))


def test_a_clone_s_window_is_in_whole_pages_and_not_beyond_them(vmm: VMM) -> None:
    handle = vmm.mdl_create(2 * PAGE, RW, 0, PAGE + 10)
    for offset, length in ((0, 10), (0, PAGE + 10), (10, PAGE), (PAGE, 10), (PAGE, 2 * PAGE)):
        for face in Face:
            got = call(vmm, face, "mdl_clone", handle, offset, length)
            assert got.rc is Retcode.INVALID_ARGUMENT
            got = call(vmm, face, "mdl_map", handle, offset, length, 0, READ)
            assert got.rc is Retcode.INVALID_ARGUMENT


def test_a_copy_of_a_handle_has_the_same_length(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW, 0, 10)
    assert lengths(vmm, vmm.handle_copy(handle, 1)) == (10, PAGE, PAGE)
    assert repr(vmm.handle_info(handle)).startswith("HandleInfo(rights=<Rights")
    assert "nbytes=10" in repr(vmm.handle_info(handle))


# ---- limits --------------------------------------------------------------------------------------


def test_limits_count_whole_pages_wherever_a_buffer_comes_from(vmm: VMM) -> None:
    with VMM() as maker:
        fd = maker.handle_fileno(maker.mdl_create(2 * PAGE, RW, 0, PAGE + 1))
        makers: list[Callable[[], Handle]] = [
            lambda: vmm.mdl_create(2 * PAGE, RW, 0, PAGE + 1),
            lambda: vmm.mdl_create_from_buf(bytes(PAGE + 1), RW),
            lambda: vmm.handle_from_fd(fd),
        ]
        try:
            for bound, is_enough in ((2 * PAGE - 1, False), (PAGE + 1, False), (2 * PAGE, True)):
                vmm.limits = Limits(mdl_bytes=bound)
                for make in makers:
                    if is_enough:
                        vmm.handle_close(make())
                    else:
                        with pytest.raises(QuotaExceeded, match=f"{2 * PAGE} more mdl_bytes"):
                            make()
                    assert vmm.usage().mdl_bytes.used == 0
        finally:
            os.close(fd)


def test_max_size_is_in_exact_bytes(vmm: VMM) -> None:
    mdl = Mdl(PAGE + 10, vmm=vmm)
    for most, fits in ((PAGE + 10, True), (PAGE + 9, False), (2 * PAGE, True), (0, False)):
        if fits:
            assert Mdl.from_fd(mdl.fileno(), max_size=most, vmm=vmm).nbytes == PAGE + 10
        else:
            with pytest.raises(PermissionError, match=f"a buffer of {PAGE + 10} bytes; max_size"):
                Mdl.from_fd(mdl.fileno(), max_size=most, vmm=vmm)


# ---- roll-back -----------------------------------------------------------------------------------


def test_no_descriptor_left_leaves_nothing_of_a_buffer_in_segments(vmm: VMM) -> None:
    from transfers import room_for

    before = vmm.usage(), kernel.descriptors()
    for room in range(4):
        with pytest.raises(QuotaExceeded), room_for(room):
            vmm.mdl_create(4 * PAGE, RW | LOCKED, PAGE, 4 * PAGE - 9)
        assert (vmm.usage(), kernel.descriptors()) == before

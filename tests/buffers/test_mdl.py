"""MDL buffers in one process: what they are made of, and how they are mapped."""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
from typing import Any

import numpy as np
import pytest

import kernel_oracle as kernel
from buffers import (
    PROTECTIONS,
    assert_frozen,
    buffer,
    errno_of,
    frames,
    held,
    is_read_only,
    mapped_files,
    memory_files,
    only_file,
    permissions,
    protections,
    record_at,
    refusal,
    region,
    seals,
    writable_map,
)
from constants import (
    COMMITTED,
    FIXED,
    GUARDS,
    LOCKED,
    PERMISSIONS,
    READ,
    RESIZING,
    RW,
    RWX,
    RX,
)
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from refusals import faces
from vmm_linux import VMM, PageKind, PageState, Retcode, Seal, VmmFlags
from vmm_linux._core import kernel as core

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited

F_SEAL_EXEC = 0x20


# ---- MdlCreate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", [READ, RW, RX, RWX], ids=["R", "RW", "RX", "RWX"])
def test_a_buffer_is_a_memory_file_that_nobody_can_resize(vmm: VMM, prot: VmmFlags) -> None:
    vmm.mdl_create(3 * PAGE, prot)
    fd = only_file()
    assert memory_files() == [fd]
    assert os.fstat(fd).st_size == 3 * PAGE
    assert held(fd) == 0
    assert seals(fd) == RESIZING
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    for size in (0, PAGE, 4 * PAGE):
        assert errno_of(lambda size=size: os.ftruncate(fd, size)) == errno.EPERM  # type: ignore[misc]


@pytest.mark.parametrize("prot", [READ, RW, RX, RWX], ids=["R", "RW", "RX", "RWX"])
def test_only_what_may_be_executed_can_be_made_executable_as_a_file(
    vmm: VMM, prot: VmmFlags
) -> None:
    vmm.mdl_create(PAGE, prot)
    fd = only_file()
    protected = core.available(core.Feature.MEMFD_NOEXEC_SEAL) and not prot & 4
    assert bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & F_SEAL_EXEC) == protected
    assert bool(os.fstat(fd).st_mode & 0o111) != protected
    assert errno_of(lambda: os.fchmod(fd, 0o700)) == (errno.EPERM if protected else 0)


def test_a_kernel_without_the_noexec_seal_makes_buffers_all_the_same(vmm: VMM) -> None:
    with core.without(core.Feature.MEMFD_NOEXEC_SEAL):
        _handle, va, contents = buffer(vmm, 2, RW)
        assert fcntl.fcntl(only_file(), fcntl.F_GET_SEALS) == RESIZING
        assert vmm.read(va, 2 * PAGE) == contents


def test_a_new_buffer_has_no_memory_and_reads_zeros(vmm: VMM) -> None:
    handle = vmm.mdl_create(64 * PAGE, RW)
    va = vmm.mdl_map(handle, 0, 64 * PAGE, 0, RW)
    assert held(only_file()) == 0
    assert vmm.query(va).resident is False
    assert held(only_file()) == 0, "Query touches nothing"
    vmm.write(va + 5 * PAGE, b"x")
    assert held(only_file()) == PAGE
    assert vmm.read(va, 64 * PAGE) == bytes(5 * PAGE) + b"x" + bytes(59 * PAGE - 1)


@pytest.mark.parametrize("prot", [READ, RW, RX, RWX], ids=["R", "RW", "RX", "RWX"])
def test_a_locked_buffer_has_all_its_memory_at_once(vmm: VMM, prot: VmmFlags) -> None:
    handle = vmm.mdl_create(64 * PAGE, prot | LOCKED)
    assert held(only_file()) == 64 * PAGE
    assert handle.rights == vmm.mdl_create(PAGE, prot).rights


@faces
def test_more_locked_memory_than_there_is_is_out_of_memory_at_once(vmm: VMM, face: Face) -> None:
    got = call(vmm, face, "mdl_create", 1 << 45, RW | LOCKED)
    assert got.rc is Retcode.OUT_OF_MEMORY
    assert memory_files() == []


def test_a_buffer_may_be_far_larger_than_memory(vmm: VMM) -> None:
    size = 1 << 45
    handle = vmm.mdl_create(size, RW)
    assert vmm.mdl_get_size(handle) == size
    va = vmm.mdl_map(handle, size - 2 * PAGE, 2 * PAGE, 0, RW)
    vmm.write(va + PAGE, b"the end")
    clone = vmm.mdl_clone(handle, size - PAGE, PAGE)
    assert vmm.read(vmm.mdl_map(clone, 0, PAGE, 0, READ), 7) == b"the end"
    assert held(only_file()) == PAGE


def test_a_size_is_told_as_created(vmm: VMM) -> None:
    va, _ = region(vmm, 8)
    made = [
        (vmm.mdl_create(5 * PAGE, READ), 5),
        (vmm.mdl_create_from_vm(va + PAGE, 3 * PAGE, READ), 3),
        (vmm.mdl_create_from_buf(bytes(PAGE + 1), READ), 2),
    ]
    made.append((vmm.mdl_clone(made[0][0], PAGE, 2 * PAGE), 2))
    made.append((vmm.handle_copy(made[0][0], 0), 5))
    for handle, pages in made:
        assert vmm.mdl_get_size(handle) == pages * PAGE
        assert vmm.endpoint.MdlGetSize(handle) == (pages * PAGE, Retcode.OK)
        assert vmm.handle_info(handle).size == pages * PAGE


# ---- MdlMap --------------------------------------------------------------------------------------


@protections
def test_a_mapping_has_the_protection_asked_for(vmm: VMM, prot: int) -> None:
    handle = vmm.mdl_create(4 * PAGE, RWX)
    va = vmm.mdl_map(handle, 0, 4 * PAGE, 0, prot)
    assert permissions(va, 4) == [PERMISSIONS[prot] + "s"] * 4
    mapping = kernel.mapping_at(va)
    assert mapping is not None
    assert mapping.pathname == "/memfd:vmm_linux (deleted)"
    assert vmm.query(va).protection == prot


@protections
@pytest.mark.parametrize("seen", [0, 1, 3, 5, 7], ids=PROTECTIONS.keys())
def test_a_mapping_never_exceeds_what_it_was_mapped_with(vmm: VMM, prot: int, seen: int) -> None:
    va = vmm.mdl_map(vmm.mdl_create(4 * PAGE, RWX), 0, 4 * PAGE, 0, prot)
    for face in Face:
        got = call(vmm, face, "protect", va + PAGE, 2 * PAGE, seen)
        allowed = seen & ~prot == 0
        assert got.rc is (Retcode.OK if allowed else Retcode.NO_CAPABILITY)
        inner = PERMISSIONS[seen if allowed else prot] + "s"
        outer = PERMISSIONS[prot] + "s"
        assert permissions(va, 4) == [outer, inner, inner, outer]
    vmm.protect(va, 4 * PAGE, prot)
    assert permissions(va, 4) == [PERMISSIONS[prot] + "s"] * 4


@protections
def test_the_kernel_itself_keeps_a_mapping_without_write_from_writing(vmm: VMM, prot: int) -> None:
    handle = vmm.mdl_create(PAGE, RWX)
    va = vmm.mdl_map(handle, 0, PAGE, 0, prot)
    writable = bool(prot & 2)
    assert ("mw" in record_at(va).vm_flags) == writable
    for wanted in (kernel.PROT_WRITE, kernel.PROT_READ | kernel.PROT_WRITE):
        got = errno_of(lambda wanted=wanted: kernel.protect(va, PAGE, wanted))  # type: ignore[misc]
        assert got == (0 if writable else errno.EACCES)
    assert [is_read_only(fd) for fd in memory_files()] == ([False] if writable else [False, True])


def test_the_read_only_description_is_opened_when_first_needed_and_once(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    vmm.mdl_map(handle, 0, PAGE, 0, RW)
    assert len(memory_files()) == 1
    clone = vmm.mdl_clone(handle, 0, PAGE)
    for which in (handle, clone, handle):
        vmm.mdl_map(which, 0, PAGE, 0, READ)
        assert len(memory_files()) == 2
    (read_only,) = [fd for fd in memory_files() if is_read_only(fd)]
    assert fcntl.fcntl(read_only, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    assert errno_of(lambda: os.pwrite(read_only, b"x", 0)) == errno.EBADF
    assert writable_map(read_only) == errno.EACCES


def test_every_mapping_shows_the_same_memory(vmm: VMM) -> None:
    handle, first, contents = buffer(vmm)
    second = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
    reader = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    assert vmm.read(second, 8 * PAGE) == vmm.read(reader, 8 * PAGE) == contents
    assert frames(first, 8) == frames(second, 8) == frames(reader, 8)
    assert len(set(frames(first, 8))) == 8
    vmm.write(second + 3 * PAGE, b"second")
    ctypes.memmove(first + 4 * PAGE, b"first", 5)
    for va in (first, second, reader):
        assert ctypes.string_at(va + 3 * PAGE, 6) == b"second"
        assert vmm.read(va + 4 * PAGE, 5) == b"first"


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 8), (3, 2), (7, 1)])
def test_a_mapping_shows_just_its_part(vmm: VMM, offset: int, length: int) -> None:
    handle, whole, contents = buffer(vmm)
    va = vmm.mdl_map(handle, offset * PAGE, length * PAGE, 0, READ)
    assert vmm.read(va, length * PAGE) == contents[offset * PAGE : (offset + length) * PAGE]
    assert frames(va, length) == frames(whole, 8)[offset : offset + length]
    mapping = kernel.mapping_at(va)
    assert mapping is not None
    assert mapping.offset == offset * PAGE
    assert vmm.query(va).size == length * PAGE
    assert refusal(vmm.read, va, length * PAGE + 1) is Retcode.RESOURCE_NOT_FOUND


@faces
def test_a_mapping_goes_where_it_is_wished(vmm: VMM, face: Face) -> None:
    handle = vmm.mdl_create(4 * PAGE, RW)
    for extra in (0, FIXED):
        assert call(vmm, face, "mdl_map", handle, 0, PAGE, ARENA, RW | extra).value == ARENA
        assert permissions(ARENA) == ["rw-s"]
        vmm.free(ARENA, PAGE)
    kernel.map_at(ARENA, PAGE, kernel.PROT_READ)
    elsewhere = call(vmm, face, "mdl_map", handle, 0, PAGE, ARENA, RW).value
    assert elsewhere != ARENA
    assert permissions(ARENA) == ["r--p"]
    kernel.unmap(ARENA, PAGE)


@pytest.mark.parametrize("extra", [GUARDS, VmmFlags.LOW_GUARD, VmmFlags.HIGH_GUARD], ids=hex)
@protections
def test_guards_lie_around_a_mapping_and_go_with_its_pages(
    vmm: VMM, extra: VmmFlags, prot: int
) -> None:
    handle = vmm.mdl_create(4 * PAGE, RWX)
    va = vmm.mdl_map(handle, 0, 4 * PAGE, ARENA + 8 * PAGE, VmmFlags(prot) | extra | FIXED)
    low = "---p" if extra & VmmFlags.LOW_GUARD else None
    high = "---p" if extra & VmmFlags.HIGH_GUARD else None
    assert permissions(va - PAGE, 6) == [low, *[PERMISSIONS[prot] + "s"] * 4, high]
    if low:
        info = vmm.query(va - PAGE)
        assert (info.state, info.kind) == (PageState.RESERVED, PageKind.GUARD)
        assert (info.base, info.size, info.mdl_offset, info.sid) == (va, 4 * PAGE, None, None)
    vmm.free(va, PAGE)
    assert permissions(va - PAGE, 2) == [None, None]
    vmm.free(va + PAGE, 3 * PAGE)
    assert permissions(va - PAGE, 6) == [None] * 6


@protections
def test_a_locked_mapping_is_resident_and_pinned(vmm: VMM, prot: int) -> None:
    handle = vmm.mdl_create(8 * PAGE, RWX)
    before = kernel.status("VmLck")
    va = vmm.mdl_map(handle, 2 * PAGE, 4 * PAGE, 0, VmmFlags(prot) | LOCKED)
    if prot == 0:
        assert held(only_file()) == 0, "pages without access cannot be populated"
        return
    assert held(only_file()) == 4 * PAGE
    assert kernel.present_pages(va, 4) == [True] * 4
    assert kernel.is_locked(va)
    assert kernel.status("VmLck") - before == 4 * PAGE
    assert record_at(va).figures["Rss"] == 4 * PAGE
    info = vmm.query(va)
    assert (info.resident, info.locked, info.flags) == (True, True, VmmFlags(prot) | LOCKED)


def test_a_locked_mapping_with_no_room_is_out_of_memory_and_leaves_nothing(vmm: VMM) -> None:
    handle = vmm.mdl_create(1 << 45, RW)
    vmm.mdl_map(handle, 0, PAGE, 0, READ)
    before = mapped_files(), kernel.descriptors()
    for prot in (READ, RW):
        assert refusal(vmm.mdl_map, handle, 0, 1 << 45, 0, prot | LOCKED) is Retcode.OUT_OF_MEMORY
        assert (mapped_files(), kernel.descriptors()) == before
        assert held(only_file()) == 0


def test_query_tells_of_a_mapping_what_the_kernel_and_the_handle_say(vmm: VMM) -> None:
    handle, _, _ = buffer(vmm)
    va = vmm.mdl_map(handle, 2 * PAGE, 5 * PAGE, 0, RW | GUARDS)
    vmm.protect(va + 3 * PAGE, PAGE, READ)
    sid = vmm.handle_info(handle).sid
    for page in range(5):
        info = vmm.query(va + page * PAGE + 99, smaps=False)
        assert (info.state, info.kind) == (PageState.COMMITTED, PageKind.MDL)
        assert (info.base, info.size) == (va, 5 * PAGE)
        assert (info.mdl_offset, info.sid) == ((2 + page) * PAGE, sid)
        assert info.flags == RW | GUARDS
        assert info.protection == (READ if page == 3 else RW)
        bounds = {3: (3, 4), 4: (4, 5)}.get(page, (0, 3))
        assert (info.run_start, info.run_end) == (va + bounds[0] * PAGE, va + bounds[1] * PAGE)


def test_pages_mapped_twice_count_half_in_each_proportional_share(vmm: VMM) -> None:
    handle, first, _ = buffer(vmm, 8)

    def share(va: int) -> tuple[int, int]:
        frames(va, 8)
        told = vmm.query(va).smaps
        assert told is not None
        figures = record_at(va).figures
        assert (told.rss, told.pss) == (figures["Rss"], figures["Pss"])
        return figures["Rss"] // PAGE, figures["Pss"] // PAGE

    assert share(first) == (8, 8)
    second = vmm.mdl_map(handle, 0, 8 * PAGE, ARENA, READ)
    assert share(second) == (8, 4)
    assert share(first) == (8, 4)
    vmm.free(second, 8 * PAGE)
    assert share(first) == (8, 8)


@faces
def test_pages_of_a_mapping_stay_committed(vmm: VMM, face: Face) -> None:
    _, va, contents = buffer(vmm)
    for first, count in ((0, 8), (0, 1), (5, 2)):
        got = call(vmm, face, "decommit", va + first * PAGE, count * PAGE)
        assert got.rc is Retcode.INVALID_OPERATION
        assert call(vmm, face, "commit", va + first * PAGE, count * PAGE).rc is Retcode.OK
    assert vmm.read(va, 8 * PAGE) == contents


def test_parts_of_a_mapping_can_be_freed(vmm: VMM) -> None:
    handle, va, contents = buffer(vmm)
    vmm.free(va + 2 * PAGE, 3 * PAGE)
    assert permissions(va, 8) == ["rw-s"] * 2 + [None] * 3 + ["rw-s"] * 3
    left, right = vmm.query(va), vmm.query(va + 6 * PAGE)
    assert (left.base, left.size, left.mdl_offset) == (va, 2 * PAGE, 0)
    assert (right.base, right.size, right.mdl_offset) == (va + 5 * PAGE, 3 * PAGE, 6 * PAGE)
    assert left.sid == right.sid == vmm.handle_info(handle).sid
    assert vmm.query(va + 3 * PAGE).kind is PageKind.FREE
    again = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    assert vmm.read(again, 8 * PAGE) == contents, "freeing addresses takes no contents"
    vmm.free(va, 2 * PAGE)
    vmm.free(va + 5 * PAGE, 3 * PAGE)
    assert permissions(va, 8) == [None] * 8


# ---- bounds of a buffer --------------------------------------------------------------------------

BEYOND = [
    (0, 9 * PAGE),
    (8 * PAGE, PAGE),
    (7 * PAGE, 2 * PAGE),
    (9 * PAGE, PAGE),
    (1 << 40, PAGE),
    (0, 1 << 40),
    (1 << 63, PAGE),
    (0, 1 << 63),
    (1 << 63, 1 << 63),
    ((1 << 64) - PAGE, PAGE),
    ((1 << 64) - PAGE, 2 * PAGE),
    (2 * PAGE, (1 << 64) - PAGE),
    (PAGE, (1 << 64) - PAGE),
    ((1 << 64) - 4 * PAGE, 8 * PAGE),
]


@faces
@pytest.mark.parametrize(("offset", "length"), BEYOND, ids=lambda number: f"{number:#x}")
@pytest.mark.parametrize("kind", ["buffer", "clone", "clone of a clone", "region"])
def test_nothing_reaches_beyond_a_buffer(
    vmm: VMM, face: Face, kind: str, offset: int, length: int
) -> None:
    handle = vmm.mdl_create(32 * PAGE, RW)
    if kind == "buffer":
        handle = vmm.mdl_create(8 * PAGE, RW)
    elif kind == "region":
        handle = vmm.mdl_create_from_vm(region(vmm, 16)[0] + PAGE, 8 * PAGE, RW)
    else:
        if kind == "clone of a clone":
            handle = vmm.mdl_clone(handle, PAGE, 24 * PAGE)
        handle = vmm.mdl_clone(handle, 4 * PAGE, 8 * PAGE)
    before = mapped_files(), kernel.descriptors()
    got = call(vmm, face, "mdl_map", handle, offset, length, 0, READ)
    assert got.rc is Retcode.INVALID_ARGUMENT
    got = call(vmm, face, "mdl_clone", handle, offset, length)
    assert got.rc is Retcode.INVALID_ARGUMENT
    assert (mapped_files(), kernel.descriptors()) == before


# ---- mdl_create_from_buf -------------------------------------------------------------------------


def test_a_buffer_of_bytes_has_them_and_zeros_up_to_the_page(vmm: VMM) -> None:
    for length in (1, PAGE - 1, PAGE, PAGE + 1, 5 * PAGE):
        data = os.urandom(length)
        size = -(-length // PAGE) * PAGE
        for prot in (READ, RW, RX, RWX):
            handle = vmm.mdl_create_from_buf(data, prot)
            assert vmm.mdl_get_size(handle) == size
            va = vmm.mdl_map(handle, 0, size, 0, prot)
            assert vmm.read(va, size) == data + bytes(size - length)
            vmm.handle_close(handle)
            vmm.free(va, size)


def test_a_buffer_is_made_of_whatever_has_contiguous_bytes(vmm: VMM) -> None:
    data = bytes(range(64))
    source = vmm.allocate(0, PAGE, COMMITTED)
    vmm.write(source, data)
    with mmap.mmap(-1, PAGE) as anonymous:
        anonymous[:64] = data
        made: list[Any] = [
            data,
            bytearray(data),
            memoryview(data).cast("I"),
            array.array("Q", data),
            (ctypes.c_uint16 * 32).from_buffer_copy(data),
            np.frombuffer(data, dtype=np.uint16).reshape(4, 8),
            vmm.view(source, 64),
            anonymous,
        ]
        for thing in made:
            handle = vmm.mdl_create_from_buf(thing, READ)
            assert vmm.read(vmm.mdl_map(handle, 0, PAGE, 0, READ), 64) == data, type(thing)
        del made, thing


def test_what_a_buffer_was_made_of_may_change_afterwards(vmm: VMM) -> None:
    source = bytearray(b"before")
    handle = vmm.mdl_create_from_buf(source, READ)
    source[:] = b"after!"
    source.clear()  # and nothing holds it any more
    assert vmm.read(vmm.mdl_map(handle, 0, PAGE, 0, READ), 6) == b"before"


def test_what_is_no_contiguous_buffer_makes_none(vmm: VMM) -> None:
    before = kernel.descriptors()
    square = np.zeros((4, 16), dtype=np.uint8)
    released = memoryview(b"gone")
    released.release()
    wrong: list[Any] = [None, "text", 5, [1], b"", memoryview(bytes(64))[::2], square.T, released]
    for data in wrong:
        got = call(vmm, Face.METHODS, "mdl_create_from_buf", data, READ)
        assert got.rc is Retcode.INVALID_ARGUMENT, repr(data)
    assert kernel.descriptors() == before


def test_bytes_that_cannot_be_read_are_an_error_and_no_signal(vmm: VMM) -> None:
    before = kernel.descriptors()
    va = vmm.allocate(0, 4 * PAGE, COMMITTED)
    vmm.protect(va + 2 * PAGE, PAGE, 0)
    data = (ctypes.c_char * (4 * PAGE)).from_address(va)
    got = call(vmm, Face.METHODS, "mdl_create_from_buf", data, READ)
    assert got.rc is Retcode.FAIL
    assert got.error is not None
    assert got.error.errno == errno.EFAULT
    assert kernel.descriptors() == before


@pytest.mark.parametrize("prot", [READ, RW, RX, RWX], ids=["R", "RW", "RX", "RWX"])
def test_bytes_that_nobody_may_write_are_frozen(vmm: VMM, prot: VmmFlags) -> None:
    handle = vmm.mdl_create_from_buf(b"contents", prot)
    fd = only_file()
    if prot & VmmFlags.WRITE:
        assert seals(fd) == RESIZING
        assert vmm.handle_info(handle).seals == Seal(0)
        return
    assert seals(fd) == RESIZING | fcntl.F_SEAL_WRITE
    assert vmm.handle_info(handle).seals == Seal.FREEZE
    assert_frozen(fd)

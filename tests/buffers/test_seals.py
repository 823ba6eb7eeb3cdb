"""Seals of MDL buffers, and who can write all the same."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

import kernel_oracle as kernel
from buffers import (
    assert_frozen,
    buffer,
    errno_of,
    only_file,
    permissions,
    refusal,
    region,
    seals,
    writable_map,
)
from constants import FIXED, GUARDS, LOCKED, READ, RESIZING, RW, RWX, RX, SHAREABLE
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, Retcode, Rights, Seal, VmmFlags

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited

F_SEAL_FUTURE_WRITE = 0x10
MREMAP_MAYMOVE = 1


@pytest.mark.parametrize("through", ["the handle", "a copy", "a clone"])
def test_publishing_leaves_the_writers_there_are_and_lets_no_other_in(
    vmm: VMM, through: str
) -> None:
    handle, writer, contents = buffer(vmm)
    clone = vmm.mdl_clone(handle, PAGE, PAGE)
    copy = vmm.handle_copy(handle, handle.rights)
    vmm.mdl_seal({"the handle": handle, "a copy": copy, "a clone": clone}[through], Seal.PUBLISH)
    assert seals(only_file()) == RESIZING | F_SEAL_FUTURE_WRITE
    for which in (handle, clone, copy):
        assert vmm.handle_info(which).seals == Seal.PUBLISH
        for prot in (RW, RWX, RW | GUARDS, RW | LOCKED):
            assert refusal(vmm.mdl_map, which, 0, PAGE, 0, prot) is Retcode.NO_CAPABILITY
    assert refusal(vmm.mdl_map, handle, 0, PAGE, ARENA, RW | FIXED) is Retcode.NO_CAPABILITY
    assert permissions(ARENA) == [None]
    reader = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ | LOCKED)
    assert vmm.read(reader, 8 * PAGE) == contents
    vmm.write(writer, b"goes on")
    vmm.protect(writer, PAGE, READ)
    vmm.protect(writer, PAGE, RW)
    vmm.write(writer + 7, b" and on")
    assert vmm.read(reader, 14) == b"goes on and on"
    fd = only_file()
    assert writable_map(fd) == errno.EPERM
    assert errno_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EPERM


def test_a_writer_with_raw_pointers_can_double_its_own_mapping_after_publishing(vmm: VMM) -> None:
    """The kernel's own hole: mremap(2) with an old size of 0. No new right: it could write."""
    handle, writer, _ = buffer(vmm, 1)
    reader = vmm.mdl_map(handle, 0, PAGE, 0, READ)
    vmm.mdl_seal(handle, Seal.PUBLISH)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    doubled = libc.mremap(writer, 0, PAGE, MREMAP_MAYMOVE)
    if doubled != ctypes.c_void_p(-1).value:
        ctypes.memmove(doubled, b"mremap", 6)
        assert vmm.read(reader, 6) == b"mremap"
        kernel.unmap(doubled, PAGE)
    doubled = libc.mremap(reader, 0, PAGE, MREMAP_MAYMOVE)
    if doubled != ctypes.c_void_p(-1).value:
        write = kernel.PROT_READ | kernel.PROT_WRITE
        assert errno_of(lambda: kernel.protect(doubled, PAGE, write)) == errno.EACCES
        kernel.unmap(doubled, PAGE)


@pytest.mark.parametrize("through", ["the handle", "a clone"])
@pytest.mark.parametrize("first", [Seal(0), Seal.PUBLISH], ids=["at once", "after publishing"])
def test_freezing_makes_a_buffer_immutable_for_all(vmm: VMM, first: Seal, through: str) -> None:
    handle, writer, contents = buffer(vmm)
    clone = vmm.mdl_clone(handle, PAGE, PAGE)
    reader = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    if first:
        vmm.mdl_seal(handle, first)
    sealer = handle if through == "the handle" else clone
    assert refusal(vmm.mdl_seal, sealer, Seal.FREEZE) is Retcode.BUSY
    assert vmm.handle_info(handle).seals == first
    vmm.free(writer, 8 * PAGE)
    vmm.mdl_seal(sealer, Seal.FREEZE)
    assert_frozen(only_file())
    for which in (handle, clone):
        assert vmm.handle_info(which).seals == first | Seal.FREEZE
        assert refusal(vmm.mdl_map, which, 0, PAGE, 0, RW) is Retcode.NO_CAPABILITY
    late = vmm.mdl_clone(handle, 0, 8 * PAGE)
    assert vmm.handle_info(late).seals == first | Seal.FREEZE
    for va in (reader, vmm.mdl_map(late, 0, 8 * PAGE, 0, RX)):
        assert vmm.read(va, 8 * PAGE) == contents
        assert refusal(vmm.protect, va, PAGE, RW) is Retcode.NO_CAPABILITY


@pytest.mark.parametrize("prot", [0, 1, 5], ids=["none", "R", "RX"])
def test_mappings_without_write_do_not_keep_a_buffer_from_freezing(vmm: VMM, prot: int) -> None:
    handle = vmm.mdl_create(4 * PAGE, RWX)
    vmm.mdl_map(handle, 0, 4 * PAGE, 0, prot)
    vmm.mdl_map(vmm.mdl_clone(handle, PAGE, PAGE), 0, PAGE, 0, VmmFlags(prot) | GUARDS)
    vmm.mdl_seal(handle, Seal.FREEZE)
    assert_frozen(only_file())


@pytest.mark.parametrize("made", ["mapped", "converted", "SHAREABLE", "a freed part"])
def test_whatever_can_still_write_keeps_a_buffer_from_freezing(vmm: VMM, made: str) -> None:
    """Also if it is read-only just now: it may become writable again."""
    if made == "mapped":
        handle, va, _ = buffer(vmm)
    else:
        va, _ = region(vmm, 8, SHAREABLE if made == "SHAREABLE" else 0)
        handle = vmm.mdl_create_from_vm(va, 8 * PAGE, RW)
    before = seals(only_file())
    if made == "a freed part":
        vmm.free(va, 7 * PAGE)
        va += 7 * PAGE
    for prot in (RW, READ, VmmFlags(0)):
        vmm.protect(va, PAGE, prot)
        assert refusal(vmm.mdl_seal, handle, Seal.FREEZE) is Retcode.BUSY
        assert refusal(vmm.mdl_seal, handle, Seal.FREEZE | Seal.PUBLISH) is Retcode.BUSY
        assert seals(only_file()) == before
    vmm.protect(va, PAGE, RW)
    vmm.write(va, b"x")
    vmm.free(va, PAGE if made == "a freed part" else 8 * PAGE)
    vmm.mdl_seal(handle, Seal.FREEZE | Seal.PUBLISH)
    assert vmm.handle_info(handle).seals == Seal.FREEZE | Seal.PUBLISH


def test_sealing_again_changes_nothing(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for seal in (Seal.PUBLISH, Seal.PUBLISH, Seal.FREEZE, Seal.FREEZE, Seal.PUBLISH):
        vmm.mdl_seal(handle, seal)
    assert vmm.handle_info(handle).seals == Seal.PUBLISH | Seal.FREEZE


@pytest.mark.parametrize("seal", [Seal.PUBLISH, Seal.FREEZE])
def test_sealing_needs_the_right_to_write(vmm: VMM, seal: Seal) -> None:
    handle = vmm.mdl_create(PAGE, RWX)
    weak = vmm.handle_copy(handle, handle.rights & ~Rights.MAP_WRITE)
    for refused in (weak, vmm.mdl_clone(weak, 0, PAGE), vmm.mdl_create(PAGE, RX)):
        assert refusal(vmm.mdl_seal, refused, seal) is Retcode.NO_CAPABILITY
    assert vmm.handle_info(handle).seals == Seal(0)
    vmm.mdl_seal(vmm.handle_copy(handle, Rights.MAP_WRITE), seal)
    assert vmm.handle_info(weak).seals == seal


@pytest.mark.parametrize("extra", [0, GUARDS, LOCKED], ids=["plain", "guards", "LOCKED"])
def test_seals_hold_for_the_shareable_region_around_a_buffer(vmm: VMM, extra: VmmFlags) -> None:
    va, contents = region(vmm, 8, SHAREABLE | extra)
    handle = vmm.mdl_create_from_vm(va, 8 * PAGE, RW)
    vmm.mdl_seal(handle, Seal.PUBLISH)
    vmm.write(va, b"goes on")
    assert refusal(vmm.decommit, va, 8 * PAGE) is Retcode.INVALID_OPERATION
    assert refusal(vmm.decommit, va, PAGE) is Retcode.INVALID_OPERATION
    vmm.commit(va, 8 * PAGE)
    assert vmm.read(va, 8 * PAGE) == b"goes on" + contents[7:]
    assert refusal(vmm.mdl_map, handle, 0, PAGE, 0, RW) is Retcode.NO_CAPABILITY
    vmm.protect(va, 8 * PAGE, READ)
    vmm.protect(va, 8 * PAGE, RW)
    vmm.free(va, 8 * PAGE)
    vmm.mdl_seal(handle, Seal.FREEZE)
    reader = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    assert vmm.read(reader, 8 * PAGE) == b"goes on" + contents[7:]


@pytest.mark.parametrize("seal", [Seal.PUBLISH, Seal.FREEZE])
def test_holes_of_a_sealed_buffer_read_as_zeros(vmm: VMM, seal: Seal) -> None:
    handle = vmm.mdl_create(16 * PAGE, RW)
    vmm.mdl_seal(handle, seal)
    for extra in (VmmFlags(0), LOCKED):
        va = vmm.mdl_map(handle, 0, 16 * PAGE, 0, READ | extra)
        assert vmm.read(va, 16 * PAGE) == bytes(16 * PAGE)


def test_a_view_of_a_frozen_buffer_stays_as_it_is(vmm: VMM) -> None:
    handle = vmm.mdl_create_from_buf(b"for ever", READ)
    view = vmm.view(vmm.mdl_map(handle, 0, PAGE, 0, READ), 8)
    assert hash(view) == hash(b"for ever")
    with pytest.raises(TypeError):
        view[0] = 1

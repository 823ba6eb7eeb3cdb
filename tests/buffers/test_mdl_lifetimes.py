"""What lives how long: buffers, clones of them, mappings, and views of these."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

import numpy as np
import pytest

import kernel_oracle as kernel
from buffers import (
    buffer,
    errno_of,
    file_at,
    frames,
    held,
    identities,
    mapped_files,
    memory_files,
    only_file,
    permissions,
    refusal,
    seals,
)
from constants import FIXED, GUARDS, PERMISSIONS, READ, RESIZING, RW, RWX
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from refusals import faces
from vmm_linux import VMM, Retcode, Rights, Seal, VmmFlags

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited


# ---- MdlClone ------------------------------------------------------------------------------------


def test_a_clone_is_the_same_physical_memory(vmm: VMM) -> None:
    handle, va, contents = buffer(vmm)
    clone = vmm.mdl_clone(handle, 2 * PAGE, 3 * PAGE)
    assert vmm.mdl_get_size(clone) == 3 * PAGE
    window = vmm.mdl_map(clone, 0, 3 * PAGE, 0, RW)
    assert vmm.read(window, 3 * PAGE) == contents[2 * PAGE : 5 * PAGE]
    assert frames(window, 3) == frames(va, 8)[2:5]
    vmm.write(window + PAGE, b"clone")
    assert vmm.read(va + 3 * PAGE, 5) == b"clone"
    ctypes.memmove(va + 4 * PAGE, b"origin", 6)
    assert vmm.read(window + 2 * PAGE, 6) == b"origin"


def test_windows_of_clones_of_clones_add_up(vmm: VMM) -> None:
    handle, va, contents = buffer(vmm, 32)
    chain, offset, size = [handle], 0, 32
    for _ in range(7):
        size -= 4
        offset += 3
        chain.append(vmm.mdl_clone(chain[-1], 3 * PAGE, size * PAGE))
        window = vmm.mdl_map(chain[-1], PAGE, (size - 1) * PAGE, 0, READ)
        shown = slice((offset + 1) * PAGE, (offset + size) * PAGE)
        assert vmm.read(window, (size - 1) * PAGE) == contents[shown]
        assert frames(window, size - 1) == frames(va, 32)[offset + 1 : offset + size]
        mapping = kernel.mapping_at(window)
        assert mapping is not None
        assert mapping.offset == (offset + 1) * PAGE
        info = vmm.query(window)
        assert (info.mdl_offset, info.sid) == (PAGE, vmm.handle_info(chain[-1]).sid)


def test_a_clone_has_a_security_id_of_its_own_and_its_origins_beside_it(vmm: VMM) -> None:
    handle = vmm.mdl_create(4 * PAGE, RW)
    origin = vmm.handle_info(handle)
    assert origin.origin_sid is None
    first, second = (vmm.mdl_clone(handle, 0, 4 * PAGE) for _ in range(2))
    nested = vmm.mdl_clone(first, PAGE, PAGE)
    infos = [vmm.handle_info(clone) for clone in (first, second, nested)]
    assert len({origin.sid, *(info.sid for info in infos)}) == 4
    assert [info.origin_sid for info in infos] == [origin.sid, origin.sid, infos[0].sid]
    copied = vmm.handle_info(vmm.handle_copy(first, Rights.GET_SID))
    assert (copied.sid, copied.origin_sid) == (infos[0].sid, origin.sid)


@pytest.mark.parametrize("how", ["closed", "closed and freed"])
def test_a_clone_outlives_its_origin(vmm: VMM, how: str) -> None:
    handle, va, contents = buffer(vmm)
    first = vmm.mdl_clone(handle, PAGE, 6 * PAGE)
    second = vmm.mdl_clone(first, PAGE, 4 * PAGE)
    sid = vmm.handle_info(first).sid
    vmm.handle_close(handle)
    vmm.handle_close(first)
    if how == "closed and freed":
        vmm.free(va, 8 * PAGE)
    window = vmm.mdl_map(second, 0, 4 * PAGE, 0, RW)
    assert vmm.read(window, 4 * PAGE) == contents[2 * PAGE : 6 * PAGE]
    info = vmm.handle_info(second)
    assert (info.origin_sid, info.size) == (sid, 4 * PAGE)
    third = vmm.mdl_clone(second, 3 * PAGE, PAGE)
    vmm.handle_close(second)
    assert vmm.read(vmm.mdl_map(third, 0, PAGE, 0, READ), PAGE) == contents[5 * PAGE : 6 * PAGE]


def test_the_last_of_origin_clones_and_mappings_gives_the_memory_back(vmm: VMM) -> None:
    before = kernel.descriptors()
    handle, va, _ = buffer(vmm)
    first = vmm.mdl_clone(handle, PAGE, 6 * PAGE)
    second = vmm.mdl_clone(first, PAGE, 4 * PAGE)
    window = vmm.mdl_map(second, 0, 4 * PAGE, 0, READ)
    assert (len(memory_files()), len(identities())) == (2, 2)
    vmm.handle_close(first)
    vmm.free(va, 8 * PAGE)
    vmm.handle_close(handle)
    vmm.handle_close(second)
    assert held(file_at(window)) == 8 * PAGE
    assert len(identities()) == 2, "the mapping keeps the clone, which keeps what it came from"
    vmm.free(window, 2 * PAGE)
    assert len(memory_files()) == 2
    vmm.free(window + 2 * PAGE, 2 * PAGE)
    assert kernel.descriptors() == before


def test_the_identity_of_a_clone_never_changes(vmm: VMM) -> None:
    vmm.mdl_clone(vmm.mdl_create(PAGE, RW), 0, PAGE)
    (fd,) = identities()
    wanted = RESIZING | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
    assert seals(fd) == wanted
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    assert errno_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EPERM


def test_a_clone_allows_what_its_origins_handle_allows(vmm: VMM) -> None:
    handle = vmm.mdl_create(2 * PAGE, RWX)
    for rights in (
        Rights.COPY | Rights.MAP_READ,
        Rights.COPY,
        Rights.COPY | Rights.TRANSFER | Rights.MAP_READ | Rights.MAP_EXECUTE,
    ):
        clone = vmm.mdl_clone(vmm.handle_copy(handle, rights), 0, PAGE)
        assert clone.rights == vmm.handle_info(clone).rights == rights
        assert refusal(vmm.mdl_map, clone, 0, PAGE, 0, RW) is Retcode.NO_CAPABILITY
        assert refusal(vmm.handle_copy, clone, rights | Rights.MAP_WRITE) is Retcode.NO_CAPABILITY
        assert refusal(vmm.mdl_seal, clone, Seal.FREEZE) is Retcode.NO_CAPABILITY


# ---- life cycle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", [READ, RW], ids=["R", "RW"])
def test_a_mapping_outlives_its_handle(vmm: VMM, prot: VmmFlags) -> None:
    handle, writer, contents = buffer(vmm)
    sid = vmm.handle_info(handle).sid
    va = vmm.mdl_map(handle, 0, 8 * PAGE, 0, prot)
    vmm.handle_close(handle)
    assert refusal(vmm.mdl_map, handle, 0, PAGE, 0, READ) is Retcode.RESOURCE_NOT_FOUND
    vmm.free(writer, 8 * PAGE)
    assert vmm.read(va, 8 * PAGE) == contents
    assert vmm.query(va).sid == sid
    vmm.protect(va, PAGE, 0)
    vmm.protect(va, PAGE, prot)
    assert vmm.read(va, 8 * PAGE) == contents
    vmm.free(va, 8 * PAGE)
    assert memory_files() == []


def test_a_buffer_outlives_its_mappings(vmm: VMM) -> None:
    handle, va, contents = buffer(vmm)
    physical = frames(va, 8)
    vmm.free(va, 8 * PAGE)
    assert held(only_file()) == 8 * PAGE
    again = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    assert vmm.read(again, 8 * PAGE) == contents
    assert frames(again, 8) == physical


def test_a_buffer_is_mapped_as_often_as_one_wishes(vmm: VMM) -> None:
    handle, va, contents = buffer(vmm, 4)
    mappings = mapped_files()
    many = [vmm.mdl_map(handle, 0, 4 * PAGE, 0, (READ, RW)[turn % 2]) for turn in range(500)]
    assert len(set(many)) == 500
    assert len(memory_files()) == 2, "mappings take no descriptors"
    for turn in (0, 1, 250, 499):
        assert vmm.read(many[turn], 4 * PAGE) == contents
        assert frames(many[turn], 4) == frames(va, 4)
    vmm.handle_close(handle)
    for mapped in many:
        vmm.free(mapped, 4 * PAGE)
    assert vmm.read(va, 4 * PAGE) == contents
    assert mapped_files() == mappings


def test_the_same_pages_can_be_mapped_side_by_side(vmm: VMM) -> None:
    """Neighbours with offsets that go on are one mapping to the kernel, and two regions here."""
    handle, _, contents = buffer(vmm, 4)
    for page in range(4):
        vmm.mdl_map(handle, page * PAGE, PAGE, ARENA + page * PAGE, READ | FIXED)
    assert len(kernel.maps_between(ARENA, ARENA + 4 * PAGE)) == 1
    assert refusal(vmm.read, ARENA, 2 * PAGE) is Retcode.RESOURCE_NOT_FOUND
    for page in range(4):
        info = vmm.query(ARENA + page * PAGE)
        assert (info.base, info.size) == (ARENA + page * PAGE, PAGE)
        assert info.mdl_offset == page * PAGE
    vmm.free(ARENA + PAGE, PAGE)
    assert vmm.read(ARENA + 2 * PAGE, PAGE) == contents[2 * PAGE : 3 * PAGE]


def test_closing_a_vmm_gives_everything_back() -> None:
    before = kernel.descriptors()
    with VMM() as vmm:
        handle, va, _ = buffer(vmm)
        clone = vmm.mdl_clone(handle, 0, PAGE)
        windows = [vmm.mdl_map(clone, 0, PAGE, 0, READ | GUARDS) for _ in range(3)]
        vmm.handle_copy(clone, Rights.COPY)
        vmm.mdl_create(PAGE, READ)
    for gone in (va, *windows):
        assert permissions(gone) == [None]
    assert kernel.descriptors() == before


# ---- memory from Python --------------------------------------------------------------------------


def test_a_view_of_a_mapping_is_the_shared_memory(vmm: VMM) -> None:
    handle, va, contents = buffer(vmm)
    reader = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    view, seen = vmm.view(va + 10, PAGE), vmm.view(reader + 10, PAGE)
    assert (view.readonly, seen.readonly) == (False, True)
    view[:4] = b"view"
    assert bytes(seen[:4]) == b"view"
    assert vmm.read(reader, 20) == contents[:10] + b"view" + contents[14:20]
    assert refusal(vmm.view, reader, PAGE, True) is Retcode.INVALID_OPERATION
    assert refusal(vmm.write, reader, b"x") is Retcode.INVALID_OPERATION
    nothing = vmm.mdl_map(handle, 0, PAGE, 0, 0)
    for method, argument in ((vmm.read, 1), (vmm.view, 1), (vmm.write, b"x")):
        assert refusal(method, nothing, argument) is Retcode.INVALID_OPERATION


@faces
@pytest.mark.parametrize("prot", [READ, RW], ids=["R", "RW"])
def test_pages_of_a_mapping_that_a_view_holds_are_busy(
    vmm: VMM, face: Face, prot: VmmFlags
) -> None:
    handle, other, _ = buffer(vmm)
    va = vmm.mdl_map(handle, 0, 8 * PAGE, 0, prot)
    view = vmm.view(va + 3 * PAGE + 5, PAGE)
    for first, count in ((0, 8), (3, 1), (4, 2)):
        start, size = va + first * PAGE, count * PAGE
        assert call(vmm, face, "free", start, size).rc is Retcode.BUSY
        assert call(vmm, face, "protect", start, size, 0).rc is Retcode.BUSY
        assert call(vmm, face, "decommit", start, size).rc is Retcode.INVALID_OPERATION
    assert permissions(va, 8) == [PERMISSIONS[int(prot)] + "s"] * 8
    vmm.free(va, 3 * PAGE)
    vmm.free(other, 8 * PAGE)
    vmm.handle_close(handle)
    assert bytes(view[:1]) == b"D", "a handle may go while a view holds the pages"
    del view
    vmm.free(va + 3 * PAGE, 5 * PAGE)


def test_a_view_keeps_a_mapping_when_the_vmm_closes() -> None:
    before = kernel.descriptors()
    vmm = VMM()
    handle, va, contents = buffer(vmm)
    window = vmm.mdl_map(vmm.mdl_clone(handle, 2 * PAGE, 2 * PAGE), 0, 2 * PAGE, 0, READ | GUARDS)
    view = vmm.view(window, 2 * PAGE)
    array_of = np.frombuffer(view, dtype=np.uint8)
    vmm.close()
    assert permissions(va, 8) == [None] * 8
    assert permissions(window, 2) == ["r--s"] * 2
    del view
    assert array_of.tobytes() == contents[2 * PAGE : 4 * PAGE]
    assert memory_files() != []
    del array_of
    assert permissions(window - PAGE, 4) == [None] * 4
    assert kernel.descriptors() == before

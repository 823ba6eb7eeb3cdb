"""Committed pages become an MDL buffer where they are."""

from __future__ import annotations

import ctypes
import os
import resource
import threading
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from buffers import (
    file_at,
    filled,
    frames,
    held,
    inode_at,
    memory_files,
    only_file,
    permissions,
    record_at,
    refusal,
    region,
    seals,
)
from children import TESTS_IMPORTABLE, run_child
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
    SHAREABLE,
)
from faces import Face, call
from kernel_oracle import ARENA, PAGE
from refusals import faces
from vmm_linux import VMM, PageKind, PageState, Retcode, Rights, VmmFlags
from vmm_linux._core import kernel as core

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited


def assert_is_buffer(vmm: VMM, va: int, pages: int, handle: int) -> None:
    """Whether these pages are the whole of this buffer now, in order."""
    info = vmm.handle_info(handle)
    assert info.size == pages * PAGE
    for page in range(pages):
        told = vmm.query(va + page * PAGE, smaps=False)
        assert (told.state, told.kind) == (PageState.COMMITTED, PageKind.MDL)
        assert (told.mdl_offset, told.sid) == (page * PAGE, info.sid)
        mapping = kernel.mapping_at(va + page * PAGE)
        assert mapping is not None
        assert mapping.pathname == "/memfd:vmm_linux (deleted)"
        assert mapping.offset + va + page * PAGE - mapping.start == page * PAGE


@faces
@pytest.mark.parametrize("extra", [0, GUARDS, SHAREABLE, LOCKED, SHAREABLE | LOCKED], ids=hex)
def test_a_region_becomes_a_buffer_where_it_is(vmm: VMM, face: Face, extra: VmmFlags) -> None:
    va, contents = region(vmm, 8, extra)
    handle = call(vmm, face, "mdl_create_from_vm", va, 8 * PAGE, RW).value
    assert_is_buffer(vmm, va, 8, handle)
    assert vmm.read(va, 8 * PAGE) == contents
    assert permissions(va, 8) == ["rw-s"] * 8
    assert len(kernel.maps_between(va, va + 8 * PAGE)) == 1
    assert seals(only_file()) == RESIZING
    window = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
    assert frames(window, 8) == frames(va, 8)
    vmm.write(window, b"window")
    ctypes.memmove(va + PAGE, b"region", 6)
    assert vmm.read(va, 6) == b"window"
    assert vmm.read(window + PAGE, 6) == b"region"
    info = vmm.query(va)
    assert (info.base, info.size) == (va, 8 * PAGE)
    assert info.flags == COMMITTED | extra


@pytest.mark.parametrize(("first", "count"), [(0, 3), (2, 4), (5, 3), (3, 1)])
@pytest.mark.parametrize("extra", [0, SHAREABLE, GUARDS], ids=["private", "SHAREABLE", "guards"])
def test_a_part_of_a_region_leaves_the_rest_as_it_was(
    vmm: VMM, extra: VmmFlags, first: int, count: int
) -> None:
    va, contents = region(vmm, 8, extra)
    physical, file = frames(va, 8), inode_at(va)
    start, end = va + first * PAGE, va + (first + count) * PAGE
    handle = vmm.mdl_create_from_vm(start, count * PAGE, RW)
    assert_is_buffer(vmm, start, count, handle)
    assert inode_at(start) != file, "nothing beyond the range leaves with it"
    assert vmm.read(va, 8 * PAGE) == contents
    now = frames(va, 8)
    rest = [page for page in range(8) if not first <= page < first + count]
    for page in rest:
        info = vmm.query(va + page * PAGE, smaps=False)
        assert (info.kind, info.mdl_offset, info.sid) == (PageKind.PRIVATE, None, None)
        assert (info.base, info.size) == (va, 8 * PAGE)
        assert inode_at(va + page * PAGE) == file
        assert now[page] == physical[page]
    assert [held(fd) for fd in memory_files() if os.fstat(fd).st_ino == file] == (
        [(8 - count) * PAGE] if file else []
    ), "the old memory is given back"
    for page in rest:
        vmm.decommit(va + page * PAGE, PAGE)
    assert refusal(vmm.decommit, start, PAGE) is Retcode.INVALID_OPERATION
    assert refusal(vmm.decommit, va, 8 * PAGE) is Retcode.INVALID_OPERATION
    assert vmm.read(start, end - start) == contents[first * PAGE : (first + count) * PAGE]


@pytest.mark.parametrize("extra", [0, SHAREABLE, GUARDS | LOCKED, SHAREABLE | GUARDS], ids=hex)
def test_the_protection_of_each_page_stays(vmm: VMM, extra: VmmFlags) -> None:
    wanted = [3, 1, 0, 0, 5, 7, 1, 3, 3, 0]
    va, contents = region(vmm, 10, extra)
    for page, prot in enumerate(wanted):
        vmm.protect(va + page * PAGE, PAGE, prot)
    kind = "s" if extra & SHAREABLE else "p"
    assert permissions(va, 10) == [PERMISSIONS[prot] + kind for prot in wanted]
    before = len(kernel.maps_between(va, va + 10 * PAGE))
    handle = vmm.mdl_create_from_vm(va, 10 * PAGE, READ)
    assert permissions(va, 10) == [PERMISSIONS[prot] + "s" for prot in wanted]
    assert [vmm.query(va + page * PAGE).protection for page in range(10)] == wanted
    assert len(kernel.maps_between(va, va + 10 * PAGE)) == before
    assert_is_buffer(vmm, va, 10, handle)
    vmm.protect(va, 10 * PAGE, RWX)
    assert vmm.read(va, 10 * PAGE) == contents
    assert permissions(va, 10) == ["rwxs"] * 10


@pytest.mark.parametrize("prot", [0, 1, 5], ids=["none", "R", "RX"])
@pytest.mark.parametrize("extra", [0, SHAREABLE, LOCKED], ids=["private", "SHAREABLE", "LOCKED"])
def test_a_region_that_nobody_can_write_becomes_a_buffer_too(
    vmm: VMM, prot: int, extra: VmmFlags
) -> None:
    va, contents = region(vmm, 8, extra)
    vmm.protect(va, 8 * PAGE, prot)
    for first, count in ((0, 4), (4, 4)):
        handle = vmm.mdl_create_from_vm(va + first * PAGE, count * PAGE, RW)
        window = vmm.mdl_map(handle, 0, count * PAGE, 0, RW)
        assert vmm.read(window, count * PAGE) == contents[first * PAGE : (first + count) * PAGE]
        vmm.write(window, b"!")
    assert permissions(va, 8) == [PERMISSIONS[prot] + "s"] * 8
    vmm.protect(va, 8 * PAGE, RW)
    assert vmm.read(va, 1) == vmm.read(va + 4 * PAGE, 1) == b"!"


@pytest.mark.parametrize("extra", [0, SHAREABLE], ids=["private", "SHAREABLE"])
def test_pages_never_touched_become_holes(vmm: VMM, extra: VmmFlags) -> None:
    pages = 2000
    va = vmm.allocate(0, (pages + 1) * PAGE, COMMITTED | extra)
    touched = [0, 1, 7, 511, 512, 513, 1024, 1500, pages - 1]
    for page in touched:
        vmm.write(va + page * PAGE, b"touched")
    vmm.protect(va + 600 * PAGE, 500 * PAGE, 0)
    handle = vmm.mdl_create_from_vm(va, pages * PAGE, RW)
    fd = file_at(va)
    assert held(fd) == len(touched) * PAGE
    found: list[int] = []
    at = 0
    while at < pages * PAGE:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        found += range(at // PAGE, end // PAGE)
        at = end
    assert found == touched
    window = vmm.mdl_map(handle, 0, pages * PAGE, 0, READ)
    contents = vmm.read(window, pages * PAGE)
    for page in range(pages):
        wanted = b"touched" + bytes(PAGE - 7) if page in touched else bytes(PAGE)
        assert contents[page * PAGE : (page + 1) * PAGE] == wanted, page


def test_an_enormous_region_that_nobody_touched_costs_nothing(vmm: VMM) -> None:
    va = vmm.allocate(0, 1 << 30, COMMITTED)
    vmm.write(va + (1 << 29), b"middle")
    vmm.mdl_create_from_vm(va, 1 << 30, RW)
    assert held(only_file()) == PAGE
    assert vmm.read(va + (1 << 29), 6) == b"middle"


@pytest.mark.parametrize("pages", [1, 8, 700])
@pytest.mark.parametrize("extra", [0, GUARDS, LOCKED], ids=["plain", "guards", "LOCKED"])
def test_a_whole_shareable_region_moves_no_byte(vmm: VMM, extra: VmmFlags, pages: int) -> None:
    va, contents = region(vmm, pages, SHAREABLE | extra)
    file, physical = inode_at(va), frames(va, pages)
    before = kernel.maps_between(va - PAGE, va + (pages + 1) * PAGE), kernel.descriptors()
    handle = vmm.mdl_create_from_vm(va, pages * PAGE, RW)
    after = kernel.maps_between(va - PAGE, va + (pages + 1) * PAGE), kernel.descriptors()
    assert after == before
    assert inode_at(va) == file
    assert frames(va, pages) == physical
    assert_is_buffer(vmm, va, pages, handle)
    window = vmm.mdl_map(handle, 0, pages * PAGE, 0, READ)
    assert frames(window, pages) == physical
    assert vmm.read(window, pages * PAGE) == contents


def test_what_is_left_of_a_shareable_region_is_copied(vmm: VMM) -> None:
    """Its memory file is larger than the region: what was freed must not leave with it."""
    va, contents = region(vmm, 8, SHAREABLE)
    file = inode_at(va)
    vmm.free(va, 2 * PAGE)
    handle = vmm.mdl_create_from_vm(va + 2 * PAGE, 6 * PAGE, READ)
    assert inode_at(va + 2 * PAGE) != file
    assert_is_buffer(vmm, va + 2 * PAGE, 6, handle)
    assert os.fstat(only_file()).st_size == 6 * PAGE, "nobody refers to the old file any more"
    assert vmm.read(va + 2 * PAGE, 6 * PAGE) == contents[2 * PAGE :]


@pytest.mark.parametrize("extra", [0, SHAREABLE], ids=["private", "SHAREABLE"])
def test_locked_pages_stay_resident_and_locked(vmm: VMM, extra: VmmFlags) -> None:
    before = kernel.status("VmLck")
    va = vmm.allocate(0, 8 * PAGE, COMMITTED | LOCKED | extra)
    vmm.write(va, b"locked")
    vmm.protect(va + 2 * PAGE, 2 * PAGE, READ)
    for first, count in ((0, 3), (3, 5)):
        vmm.mdl_create_from_vm(va + first * PAGE, count * PAGE, RW)
        assert held(file_at(va + first * PAGE)) == count * PAGE
        assert kernel.present_pages(va, 8) == [True] * 8
        assert [kernel.is_locked(va + page * PAGE) for page in range(8)] == [True] * 8
        assert kernel.status("VmLck") - before == 8 * PAGE
    assert vmm.query(va + 7 * PAGE).locked is True
    assert vmm.read(va, 6) == b"locked"


def convert_locked_memory_as_nobody(pages: int, page: int) -> None:
    """Locked pages that fit the limit fit it afterwards."""
    import kernel_oracle as kernel
    from vmm_linux import VMM, VmmFlags

    resource.setrlimit(resource.RLIMIT_MEMLOCK, (pages * page, pages * page))
    flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.LOCKED | VmmFlags(3)
    with VMM() as vmm:
        va = vmm.allocate(0, pages * page, flags)
        before = [kernel.is_locked(va + at * page) for at in range(pages)]
        vmm.mdl_create_from_vm(va, pages * page, 3)
        after = [kernel.is_locked(va + at * page) for at in range(pages)]
        print(before == [True] * pages, after == before, all(kernel.present_pages(va, pages)))


def test_locked_pages_of_an_ordinary_user_stay_locked_as_far_as_the_limit_allows() -> None:
    """It is the same number of pages before and after: the limit has room for them."""
    code = (
        "import resource\nimport kernel_oracle\nimport vmm_linux\n"
        f"from {__name__} import convert_locked_memory_as_nobody\n"
        f"convert_locked_memory_as_nobody(6, {PAGE})\n"
    )
    child = run_child(code, nobody=True, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout) == (0, "True True True\n"), child.stderr


@pytest.mark.parametrize("first", [0, 1])
def test_a_huge_region_becomes_a_buffer(vmm: VMM, first: int) -> None:
    size = 2 * max(core.huge_page_size(), PAGE)
    va = vmm.allocate(0, size, COMMITTED | VmmFlags.HUGE)
    contents = filled(vmm, va, size // PAGE)
    vmm.decommit(va + size // 2, PAGE)
    vmm.commit(va + size // 2, PAGE)
    length = size - 2 * first * PAGE
    handle = vmm.mdl_create_from_vm(va + first * PAGE, length, RW)
    window = vmm.mdl_map(handle, 0, length, 0, READ)
    hole = size // 2
    wanted = contents[:hole] + bytes(PAGE) + contents[hole + PAGE :]
    assert vmm.read(va, size) == wanted
    assert vmm.read(window, length) == wanted[first * PAGE : first * PAGE + length]
    assert vmm.query(va).flags & VmmFlags.HUGE


def test_the_commit_charge_of_private_pages_goes_back(vmm: VMM) -> None:
    """In the arena, where the kernel merges these pages with nobody else's."""
    va = vmm.allocate(ARENA, 1 << 20, COMMITTED | FIXED)
    vmm.write(va, b"x")
    assert "ac" in record_at(va).vm_flags
    vmm.mdl_create_from_vm(va, 1 << 20, RW)
    assert "ac" not in record_at(va).vm_flags


WRONG_STATES: dict[str, tuple[int, int, Retcode]] = {
    "one reserved page": (0, 8, Retcode.INVALID_OPERATION),
    "nothing but reserved pages": (4, 1, Retcode.INVALID_OPERATION),
    "pages of a buffer": (16, 4, Retcode.INVALID_OPERATION),
    "a page of a buffer among others": (24, 4, Retcode.INVALID_OPERATION),
    "pages that a view holds": (8, 4, Retcode.BUSY),
    "a page that a view holds among others": (10, 1, Retcode.BUSY),
    "two regions": (10, 4, Retcode.RESOURCE_NOT_FOUND),
    "a hole": (29, 1, Retcode.RESOURCE_NOT_FOUND),
    "a region and the hole after it": (24, 5, Retcode.RESOURCE_NOT_FOUND),
    "a guard": (32, 1, Retcode.RESOURCE_NOT_FOUND),
    "a region and its guard": (33, 5, Retcode.RESOURCE_NOT_FOUND),
    "memory of somebody else": (40, 1, Retcode.RESOURCE_NOT_FOUND),
}


@pytest.fixture
def wrong_ground() -> Iterator[VMM]:
    """Regions of every kind that MdlCreateFromVm refuses, one page of each arena slot."""
    kernel.map_at(ARENA + 40 * PAGE, PAGE, kernel.PROT_READ)
    try:
        with VMM() as vmm:
            for slot, pages, extra in ((0, 8, 0), (8, 4, 0), (12, 4, 0), (24, 4, 0)):
                flags = COMMITTED | FIXED | VmmFlags(extra)
                filled(vmm, vmm.allocate(ARENA + slot * PAGE, pages * PAGE, flags), pages)
            vmm.allocate(ARENA + 33 * PAGE, 4 * PAGE, COMMITTED | FIXED | GUARDS)
            vmm.decommit(ARENA + 4 * PAGE, PAGE)
            vmm.mdl_map(vmm.mdl_create(4 * PAGE, RW), 0, 4 * PAGE, ARENA + 16 * PAGE, RW | FIXED)
            vmm.mdl_create_from_vm(ARENA + 25 * PAGE, PAGE, READ)
            yield vmm
    finally:
        kernel.unmap(ARENA + 40 * PAGE, PAGE)


@faces
@pytest.mark.parametrize("where", WRONG_STATES)
def test_only_committed_private_pages_become_buffers(
    wrong_ground: VMM, face: Face, where: str
) -> None:
    vmm = wrong_ground
    slot, pages, wanted = WRONG_STATES[where]
    view = vmm.view(ARENA + 10 * PAGE + 7, 1)

    def state() -> list[object]:
        infos = [vmm.query(ARENA + page * PAGE, smaps=False) for page in range(48)]
        return [kernel.maps_between(ARENA, ARENA + 48 * PAGE), infos, kernel.descriptors()]

    before = state()
    got = call(vmm, face, "mdl_create_from_vm", ARENA + slot * PAGE, pages * PAGE, RW)
    assert got.rc is wanted
    assert state() == before
    vmm._check()
    view.release()
    del view


def test_the_handle_is_bound_by_the_flags_and_the_region_is_not(vmm: VMM) -> None:
    va, _ = region(vmm)
    handle = vmm.mdl_create_from_vm(va, 8 * PAGE, READ)
    assert handle.rights & (Rights.MAP_READ | Rights.MAP_WRITE | Rights.MAP_EXECUTE) == (
        Rights.MAP_READ
    )
    for prot in (RW, RX, RWX):
        assert refusal(vmm.mdl_map, handle, 0, PAGE, 0, prot) is Retcode.NO_CAPABILITY
    reader = vmm.mdl_map(handle, 0, 8 * PAGE, 0, READ)
    vmm.write(va, b"still mine")
    assert vmm.read(reader, 10) == b"still mine"
    for bits, name in PERMISSIONS.items():
        vmm.protect(va, 8 * PAGE, bits)
        assert permissions(va, 8) == [name + "s"] * 8
    assert refusal(vmm.protect, reader, PAGE, RW) is Retcode.NO_CAPABILITY


def test_a_converted_region_outlives_its_handle_and_the_other_way_round(vmm: VMM) -> None:
    va, contents = region(vmm)
    vmm.handle_close(vmm.mdl_create_from_vm(va, 4 * PAGE, RW))
    handle = vmm.mdl_create_from_vm(va + 4 * PAGE, 4 * PAGE, RW)
    assert vmm.read(va, 8 * PAGE) == contents
    vmm.free(va + PAGE, PAGE)
    vmm.free(va + 5 * PAGE, 3 * PAGE)
    assert permissions(va, 8) == ["rw-s", None, "rw-s", "rw-s", "rw-s", None, None, None]
    assert [vmm.query(va + page * PAGE).mdl_offset for page in (2, 3, 4)] == [2 * PAGE, 3 * PAGE, 0]
    vmm.free(va + 2 * PAGE, 3 * PAGE)
    vmm.free(va, PAGE)
    window = vmm.mdl_map(handle, 0, 4 * PAGE, 0, READ)
    assert vmm.read(window, 4 * PAGE) == contents[4 * PAGE :]
    vmm.free(window, 4 * PAGE)
    vmm.handle_close(handle)
    assert memory_files() == []


def test_every_page_of_a_region_can_become_a_buffer_of_its_own(vmm: VMM) -> None:
    va, contents = region(vmm, 8)
    order = [3, 0, 7, 4, 1, 6, 2, 5]
    handles = {page: vmm.mdl_create_from_vm(va + page * PAGE, PAGE, RW) for page in order}
    assert len({vmm.handle_info(handle).sid for handle in handles.values()}) == 8
    for page, handle in handles.items():
        assert_is_buffer(vmm, va + page * PAGE, 1, handle)
        assert vmm.query(va + page * PAGE).base == va
    assert vmm.read(va, 8 * PAGE) == contents


def test_a_pinned_neighbour_does_not_matter_and_is_untouched(vmm: VMM) -> None:
    va, contents = region(vmm)
    view = vmm.view(va, 2 * PAGE)
    vmm.mdl_create_from_vm(va + 2 * PAGE, 6 * PAGE, RW)
    view[0] = 7
    assert vmm.read(va, 1) == b"\x07"
    assert bytes(view[PAGE:]) == contents[PAGE : 2 * PAGE]
    assert refusal(vmm.mdl_create_from_vm, va, PAGE, RW) is Retcode.BUSY
    view.release()
    del view
    vmm.mdl_create_from_vm(va, 2 * PAGE, RW)


def test_reads_on_other_threads_never_see_anything_but_the_contents(vmm: VMM) -> None:
    va, contents = region(vmm, 64)
    vmm.protect(va + 8 * PAGE, 8 * PAGE, READ)
    done = threading.Event()
    wrong: list[bytes] = []

    def watch() -> None:
        while not done.is_set():
            seen = vmm.read(va, 64 * PAGE)
            if seen != contents:
                wrong.append(seen)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for page in range(0, 64, 2):
            vmm.mdl_create_from_vm(va + page * PAGE, 2 * PAGE, RW)
    finally:
        done.set()
        watcher.join()
    assert wrong == []


def limit_address_space(page: int) -> None:
    """MdlMap and MdlCreateFromVm where RLIMIT_AS leaves no room: nothing changes."""
    import kernel_oracle as kernel
    from faces import Face, call
    from vmm_linux import VMM, Retcode, VmmFlags

    size = 1 << 28
    with VMM() as vmm:
        handle = vmm.mdl_create(size, 3)
        va = vmm.allocate(0, size, VmmFlags.RESERVE | VmmFlags.COMMIT | 3)
        vmm.write(va, b"before")
        vmm.query(va)
        old = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (kernel.status("VmSize") + size // 2, old[1]))
        held = kernel.descriptors()
        for face in Face:
            map_it = call(vmm, face, "mdl_map", handle, 0, size, 0, 3)
            convert = call(vmm, face, "mdl_create_from_vm", va, size, 3)
            assert map_it.rc is convert.rc is Retcode.QUOTA_EXCEEDED, (map_it, convert)
            assert convert.error is None or "RLIMIT_AS" in str(convert.error)
        assert kernel.descriptors() == held
        assert kernel.page_permissions(va, va + page) == ["rw-p"]
        assert vmm.read(va, 6) == b"before"
        vmm.decommit(va, page)
        resource.setrlimit(resource.RLIMIT_AS, old)
        print("done")


def test_a_limit_of_the_address_space_is_named_and_nothing_changed() -> None:
    code = f"from {__name__} import limit_address_space\nlimit_address_space({PAGE})\n"
    child = run_child(code, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr


def test_a_conversion_beside_threads_that_make_handles_has_a_handle_of_its_own() -> None:
    # So large that it gives way to other threads, which take the handle that would have been next.
    size = 1 << 20
    with VMM() as vmm:
        made: list[int] = []
        done = threading.Event()

        def make_handles() -> None:
            while not done.is_set():
                handle = vmm.mdl_create(PAGE, VmmFlags.READ)
                made.append(handle)
                vmm.handle_close(handle)

        thread = threading.Thread(target=make_handles)
        thread.start()
        try:
            flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ | VmmFlags.WRITE
            for _ in range(50):
                va = vmm.allocate(0, size, flags)
                handle = vmm.mdl_create_from_vm(va, size, VmmFlags.READ)
                made.append(handle)
                assert vmm.mdl_get_size(handle) == size
                vmm.handle_close(handle)
                vmm.free(va, size)
        finally:
            done.set()
            thread.join()
        assert len({*made}) == len(made)
        assert vmm.usage().handles.used == 0

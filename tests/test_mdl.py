"""MDL buffers in one process: what they are made of, how they are mapped, cloned and sealed.

The kernel says whether it is so: memory files and their seals in ``/proc/self/fd``, permissions
in ``/proc/self/maps``, physical pages in ``/proc/self/pagemap``, memory held in ``st_blocks``.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kernel_oracle as kernel
from children import run_child
from faces import Face, call
from kernel_oracle import ARENA, PAGE, TESTS_IMPORTABLE
from vmm_linux import (
    VMM,
    Handle,
    Limits,
    PageKind,
    PageState,
    Retcode,
    Rights,
    Seal,
    VmmError,
    VmmFlags,
    _features,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

READ = VmmFlags.READ
RW = VmmFlags.READ | VmmFlags.WRITE
RX = VmmFlags.READ | VmmFlags.EXECUTE
RWX = VmmFlags.RWX_MASK
RESERVE = VmmFlags.RESERVE
COMMIT = VmmFlags.RESERVE | VmmFlags.COMMIT
LOCKED = VmmFlags.LOCKED
SHAREABLE = VmmFlags.SHAREABLE
GUARDS = VmmFlags.LOW_GUARD | VmmFlags.HIGH_GUARD
FIXED = VmmFlags.FIXED

F_SEAL_FUTURE_WRITE, F_SEAL_EXEC = 0x10, 0x20
RESIZING = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
MREMAP_MAYMOVE = 1

PROTECTIONS = {"none": 0, "R": 1, "RW": 3, "RX": 5, "RWX": 7}
PERMISSIONS = {0: "---", 1: "r--", 3: "rw-", 5: "r-x", 7: "rwx"}
protections = pytest.mark.parametrize("prot", PROTECTIONS.values(), ids=PROTECTIONS.keys())
faces = pytest.mark.parametrize("face", list(Face), ids=lambda face: face.value)


@pytest.fixture
def vmm() -> Iterator[VMM]:
    with VMM(limits=Limits.unlimited()) as it:
        yield it
        if not it.closed:
            it._check()


# ------------------------------------------------------------------------- questions to the kernel


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
    return errno_of(lambda: mmap.mmap(fd, PAGE, mmap.MAP_SHARED, kernel.PROT_WRITE).close())


# ------------------------------------------------------------------------------- calls on a VMM


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
    va = vmm.allocate(0, pages * PAGE, COMMIT | RW | VmmFlags(extra))
    return va, filled(vmm, va, pages)


# -------------------------------------------------------------------------------------- MdlCreate


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
    protected = _features.available(_features.Feature.MEMFD_NOEXEC_SEAL) and not prot & 4
    assert bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & F_SEAL_EXEC) == protected
    assert bool(os.fstat(fd).st_mode & 0o111) != protected
    assert errno_of(lambda: os.fchmod(fd, 0o700)) == (errno.EPERM if protected else 0)


def test_a_kernel_without_the_noexec_seal_makes_buffers_all_the_same(vmm: VMM) -> None:
    with _features.without(_features.Feature.MEMFD_NOEXEC_SEAL):
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


# ----------------------------------------------------------------------------------------- MdlMap


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


# ------------------------------------------------------------------------------ bounds of a buffer

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


# --------------------------------------------------------------------------------------- MdlClone


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


def test_the_identity_of_a_clone_can_hold_nothing(vmm: VMM) -> None:
    vmm.mdl_clone(vmm.mdl_create(PAGE, RW), 0, PAGE)
    (fd,) = identities()
    assert os.fstat(fd).st_size == 0
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


# ------------------------------------------------------------------------------------ life cycle


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


# ------------------------------------------------------------------------------- memory from Python


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


# -------------------------------------------------------------------------------- MdlCreateFromVm


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
    assert info.flags == COMMIT | RW | extra


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
    va = vmm.allocate(0, (pages + 1) * PAGE, COMMIT | RW | extra)
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
    va = vmm.allocate(0, 1 << 30, COMMIT | RW)
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
    va = vmm.allocate(0, 8 * PAGE, COMMIT | RW | LOCKED | extra)
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
        f"import resource\nimport kernel_oracle\nimport vmm_linux\nfrom {__name__} import *\n"
        f"convert_locked_memory_as_nobody(6, {PAGE})\n"
    )
    child = run_child(code, nobody=True, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout) == (0, "True True True\n"), child.stderr


@pytest.mark.parametrize("first", [0, 1])
def test_a_huge_region_becomes_a_buffer(vmm: VMM, first: int) -> None:
    size = 2 * max(_features.huge_page_size(), PAGE)
    va = vmm.allocate(0, size, COMMIT | RW | VmmFlags.HUGE)
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
    va = vmm.allocate(ARENA, 1 << 20, COMMIT | RW | FIXED)
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
                flags = COMMIT | RW | FIXED | VmmFlags(extra)
                filled(vmm, vmm.allocate(ARENA + slot * PAGE, pages * PAGE, flags), pages)
            vmm.allocate(ARENA + 33 * PAGE, 4 * PAGE, COMMIT | RW | FIXED | GUARDS)
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
    code = f"from {__name__} import *\nlimit_address_space({PAGE})\n"
    child = run_child(code, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr


# ---------------------------------------------------------------------------- mdl_create_from_buf


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
    source = vmm.allocate(0, PAGE, COMMIT | RW)
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
    va = vmm.allocate(0, 4 * PAGE, COMMIT | RW)
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


def assert_frozen(fd: int) -> None:
    """Whether the kernel lets nobody change the memory, not even through its own descriptor."""
    assert errno_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EPERM
    assert writable_map(fd) == errno.EPERM
    assert errno_of(lambda: os.ftruncate(fd, 0)) == errno.EPERM
    punched = ctypes.CDLL(None, use_errno=True).fallocate(
        fd, 3, ctypes.c_long(0), ctypes.c_long(PAGE)
    )
    assert (punched, ctypes.get_errno()) == (-1, errno.EPERM)


# ------------------------------------------------------------------------------------------ seals


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

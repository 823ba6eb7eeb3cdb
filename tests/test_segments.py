"""A buffer in segments is a buffer like any other, and its clones leave the rest behind.

The functions that are not tests run in other processes. They import for themselves what they use.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import socket
import struct
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

import faults
import kernel_oracle as kernel
from children import run_child
from faults import (
    BASE,
    FIXED,
    GUARDS,
    LOCKED,
    LOCKS,
    RESERVE,
    RW,
    SIZE,
    Faults,
    Ground,
    Mode,
    R,
    Scenario,
    nothing_to_take_back,
    over,
    pattern,
)
from forked import in_child
from kernel_oracle import ARENA, PAGE, TESTS_IMPORTABLE
from test_limits_of_the_system import (
    FILL,
    ONE_HEAP,
    Singles,
    count_mappings,
    fill_map_count,
    steady_heap,
)
from test_rollback_of_buffers import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    ask_buffer,
    closed,
    connected,
    facts,
    first,
    info,
    mapped,
    mapping,
    newest,
    receive,
    refused,
    send,
    send_again,
    window,
)
from test_transfer import (
    ALL_BUT_EXECUTE,
    READ_ONLY,
    SIZED,
    UNWRITABLE,
    Pair,
    contents,
    forged,
    identity,
    in_process,
    memory,
    nothing_opened,
    open_files,
    packets,
    read_only,
    receive_and_tell,
    receiver,
    reopened,
    send_raw,
    text_of,
    vmm,
)
from test_transfer import facts as told_of
from test_transfer import refused as refused_by
from vmm_linux import VMM, Limits, PageKind, Retcode, Rights, Seal, VmmError, VmmFlags
from vmm_linux.errors import (
    Busy,
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    QuotaExceeded,
    SecurityDisallow,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from vmm_linux import Handle

__all__ = ["packets", "receiver", "vmm"]  # the fixtures

#: Ten pages in segments of four, four and two.
PAGES, SEGMENT = 10, 4
PIECES = [4, 4, 2]
BYTES = PAGES * PAGE

# ---- what the tests share


def in_segments(vmm: VMM, pages: int = PAGES, segment: int = SEGMENT) -> Handle:
    """A buffer in segments with another text in each page."""
    handle = vmm.mdl_create(pages * PAGE, RW, segment * PAGE)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    for page in range(pages):
        vmm.write(va + page * PAGE, text_of(page))
    vmm.free(va, pages * PAGE)
    return handle


def memory_files() -> dict[int, os.stat_result]:
    """The memory files that this process has a descriptor of, by inode number."""
    found = {}
    for number, target in kernel.descriptors().items():
        if target == "/memfd:vmm_linux (deleted)":
            status = os.fstat(number)
            found[status.st_ino] = status
    return found


def memory_descriptors() -> list[str]:
    """What the descriptors of memory files and identities name."""
    return sorted(
        target for target in kernel.descriptors().values() if target.startswith("/memfd:")
    )


def mapped_files() -> list[kernel.Mapping]:
    """The mappings of memory files."""
    return [mapping for mapping in kernel.maps() if "/memfd:" in mapping.pathname]


def pieces_at(va: int, size: int) -> list[kernel.Mapping]:
    """The kernel's mappings of a range, which must lie side by side and fill it."""
    found = kernel.maps_between(va, va + size)
    assert (found[0].start, found[-1].end) == (va, va + size)
    assert all(low.end == high.start for low, high in pairwise(found))
    return found


def pages_of(found: list[kernel.Mapping]) -> list[int]:
    """Pages in each of these mappings."""
    return [(piece.end - piece.start) // PAGE for piece in found]


# ---- what is made


def test_each_segment_is_a_memory_file_and_the_last_one_may_be_shorter(vmm: VMM) -> None:
    for size, segment, pieces in (
        (10, 4, [4, 4, 2]),
        (8, 4, [4, 4]),
        (3, 1, [1, 1, 1]),
        (5, 4, [4, 1]),
        (200, 1, [1] * 200),
    ):
        handle = vmm.mdl_create(size * PAGE, RW, segment_size=segment * PAGE)
        files = memory_files().values()
        assert sorted(file.st_size // PAGE for file in files) == sorted(pieces)
        assert memory_descriptors().count("/memfd:vmm_linux identity (deleted)") == 1
        assert vmm.mdl_get_size(handle) == size * PAGE
        vmm.handle_close(handle)
        assert not memory_descriptors()


@pytest.mark.parametrize("segment", [0, 4, 5, 1 << 40, (2**64 - 1) // PAGE])
def test_a_segment_that_is_all_of_it_makes_an_ordinary_buffer(vmm: VMM, segment: int) -> None:
    vmm.mdl_create(4 * PAGE, RW, segment * PAGE)
    assert memory_descriptors() == ["/memfd:vmm_linux (deleted)"]


@pytest.mark.parametrize("segment", [1, PAGE - 1, PAGE + 1, -PAGE, 2**64, 1.0, "4096", None, True])
def test_a_segment_size_that_is_none_is_refused(vmm: VMM, segment: Any) -> None:  # noqa: ANN401
    with nothing_opened(), pytest.raises(InvalidArgument, match="segment_size"):
        vmm.mdl_create(4 * PAGE, RW, segment)


def test_the_reference_s_face_makes_buffers_as_the_reference_has_it(vmm: VMM) -> None:
    with pytest.raises(TypeError):
        vmm.endpoint.MdlCreate(4 * PAGE, RW, PAGE)  # type: ignore[call-arg]


@pytest.mark.parametrize("prot", [RW, R, RW | VmmFlags.EXECUTE])
def test_locked_segments_have_all_their_memory_at_once(vmm: VMM, prot: VmmFlags) -> None:
    vmm.mdl_create(BYTES, prot | LOCKED, SEGMENT * PAGE)
    assert sorted(file.st_blocks * 512 // PAGE for file in memory_files().values()) == [2, 4, 4]


def test_segments_without_locked_have_no_memory(vmm: VMM) -> None:
    handle = vmm.mdl_create(BYTES, RW, SEGMENT * PAGE)
    va = vmm.mdl_map(handle, 0, BYTES, 0, RW)
    vmm.query(va + 5 * PAGE)
    assert [file.st_blocks for file in memory_files().values()] == [0, 0, 0]


def make_at_the_limit() -> None:
    """Make buffers with room for some of their descriptors, and for all."""
    with VMM(limits=Limits.unlimited()) as vmm:
        vmm.handle_close(vmm.mdl_create(PAGE, RW))
        most = 30
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        before = kernel.descriptors()
        free = most - len(before)
        for segments in (free, free + 1, most, most + 1, 1 << 30):
            for prot in (RW, RW | LOCKED):
                with pytest.raises(QuotaExceeded, match="RLIMIT_NOFILE"):
                    vmm.mdl_create(segments * PAGE, prot, PAGE)
                assert kernel.descriptors() == before
        vmm.mdl_create((free - 1) * PAGE, RW, PAGE)


def try_at_the_limit() -> None:
    """The same; runs in a child."""
    import test_segments

    test_segments.make_at_the_limit()


def test_more_segments_than_descriptors_are_a_quota_and_nothing_is_left() -> None:
    child = run_child(try_at_the_limit, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


# ---- mapped side by side


@pytest.mark.parametrize(
    "flags", [RW, R, VmmFlags(0), RW | GUARDS, R | GUARDS, RW | LOCKED], ids=repr
)
def test_segments_lie_side_by_side(vmm: VMM, flags: VmmFlags) -> None:
    handle = in_segments(vmm)
    va = vmm.mdl_map(handle, 0, BYTES, 0, flags)
    found = pieces_at(va, BYTES)
    assert pages_of(found) == PIECES
    assert {piece.inode for piece in found} == set(memory_files())
    assert all(piece.offset == 0 for piece in found)
    assert len({piece.permissions for piece in found}) == 1
    if flags & GUARDS:
        assert {piece.permissions for piece in kernel.maps_between(va - PAGE, va)} == {"---p"}
        assert {
            piece.permissions for piece in kernel.maps_between(va + BYTES, va + BYTES + PAGE)
        } == {"---p"}
    if flags & R:
        read = b"".join(vmm.read(va + page * PAGE, 8) for page in range(PAGES))
        assert read == b"".join(map(text_of, range(PAGES)))


@pytest.mark.parametrize("flags", [RW, R | GUARDS], ids=repr)
def test_any_part_can_be_mapped(vmm: VMM, flags: VmmFlags) -> None:
    handle = in_segments(vmm)
    for start in range(PAGES):
        for end in range(start + 1, PAGES + 1):
            size = (end - start) * PAGE
            va = vmm.mdl_map(handle, start * PAGE, size, 0, flags)
            borders = [start, *(at for at in (4, 8) if start < at < end), end]
            found = pieces_at(va, size)
            assert pages_of(found) == [high - low for low, high in pairwise(borders)]
            assert [piece.offset // PAGE for piece in found] == [at % 4 for at in borders[:-1]]
            for page in range(start, end):
                assert vmm.read(va + (page - start) * PAGE, 8) == text_of(page)
            vmm.free(va, size)


def test_a_hint_and_fixed_mean_what_they_mean_for_any_buffer(vmm: VMM) -> None:
    handle = in_segments(vmm)
    place = vmm.allocate(0, 3 * BYTES, RESERVE)
    vmm.free(place + BYTES, BYTES)
    assert vmm.mdl_map(handle, 0, BYTES, place + BYTES, RW | FIXED) == place + BYTES
    with pytest.raises(VmmError) as caught:
        vmm.mdl_map(handle, 0, BYTES, place + BYTES, RW | FIXED)
    assert caught.value.rc is Retcode.ALREADY_EXISTS
    assert vmm.read(place + BYTES + 9 * PAGE, 8) == text_of(9)


def test_reads_writes_and_views_cross_segments(vmm: VMM) -> None:
    handle = vmm.mdl_create(BYTES, RW, SEGMENT * PAGE)
    va = vmm.mdl_map(handle, 0, BYTES, 0, RW)
    data = pattern(BYTES)
    assert vmm.write(va, data) == BYTES
    assert vmm.read(va, BYTES) == data
    view = vmm.view(va, BYTES)
    assert view == data
    view[4 * PAGE - 3 : 4 * PAGE + 3] = b"border"
    assert vmm.read(va + 4 * PAGE - 3, 6) == b"border"
    with pytest.raises(Busy):
        vmm.free(va + 9 * PAGE, PAGE)
    view.release()
    del view
    vmm.free(va + 9 * PAGE, PAGE)
    again = vmm.mdl_map(handle, 0, BYTES, 0, R)
    assert vmm.read(again + 4 * PAGE - 3, 6) == b"border"
    assert vmm.read(again + 9 * PAGE, PAGE) == data[9 * PAGE :]


def test_a_part_can_be_freed_and_what_is_left_stays(vmm: VMM) -> None:
    handle = in_segments(vmm)
    va = vmm.mdl_map(handle, 0, BYTES, 0, RW)
    vmm.handle_close(handle)
    vmm.free(va + 3 * PAGE, 3 * PAGE)
    assert pages_of(pieces_at(va, 3 * PAGE)) == [3]
    assert pages_of(pieces_at(va + 6 * PAGE, 4 * PAGE)) == [2, 2]
    info = vmm.query(va + 8 * PAGE, smaps=False)
    assert (info.base, info.size, info.mdl_offset) == (va + 6 * PAGE, 4 * PAGE, 8 * PAGE)
    assert vmm.read(va + 8 * PAGE, 8) == text_of(8)
    vmm.free(va, 3 * PAGE)
    vmm.free(va + 6 * PAGE, 2 * PAGE)
    assert len(memory_files()) == 3
    vmm.free(va + 8 * PAGE, 2 * PAGE)
    assert not memory_descriptors()


def test_protection_changes_across_segments_up_to_the_ceiling(vmm: VMM) -> None:
    handle = in_segments(vmm)
    va = vmm.mdl_map(handle, 0, BYTES, 0, RW)
    vmm.protect(va + 3 * PAGE, 6 * PAGE, R)
    assert kernel.page_permissions(va, va + BYTES) == ["rw-s"] * 3 + ["r--s"] * 6 + ["rw-s"]
    vmm.protect(va, BYTES, RW)
    assert pages_of(pieces_at(va, BYTES)) == PIECES
    lower = vmm.mdl_map(handle, PAGE, 6 * PAGE, 0, R)
    with pytest.raises(NoCapability):
        vmm.protect(lower, 6 * PAGE, RW)
    for piece in pieces_at(lower, 6 * PAGE):
        protection = kernel.PROT_READ | kernel.PROT_WRITE
        assert kernel.libc.mprotect(piece.start, PAGE, protection) == -1


def test_query_tells_of_the_region_where_the_kernel_tells_of_a_segment(vmm: VMM) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, 2 * PAGE, 7 * PAGE)
    sids = {handle: vmm.handle_info(handle).sid, clone: vmm.handle_info(clone).sid}
    for named, skipped, size in ((handle, 0, BYTES), (clone, 0, 7 * PAGE), (clone, 1, 6 * PAGE)):
        va = vmm.mdl_map(named, skipped * PAGE, size, 0, R)
        for page in range(size // PAGE):
            told = vmm.query(va + page * PAGE)
            assert (told.kind, told.base, told.size) == (PageKind.MDL, va, size)
            assert (told.run_start, told.run_end) == (va, va + size)
            assert told.mdl_offset == (skipped + page) * PAGE
            assert told.sid == sids[named]
            mapping_there = kernel.mapping_at(va + page * PAGE)
            assert told.smaps is not None
            assert mapping_there is not None
            assert (told.smaps.start, told.smaps.end) == (mapping_there.start, mapping_there.end)


def test_what_is_committed_stays_so_and_is_no_region_of_private_pages(vmm: VMM) -> None:
    va = vmm.mdl_map(in_segments(vmm), 0, BYTES, 0, RW)
    vmm.commit(va, BYTES)
    with pytest.raises(InvalidOperation):
        vmm.decommit(va, BYTES)
    with pytest.raises(InvalidOperation):
        vmm.mdl_create_from_vm(va, BYTES, RW)
    assert vmm.read(va + 8 * PAGE, 8) == text_of(8)


def test_read_only_descriptions_are_opened_of_what_is_mapped_and_once(vmm: VMM) -> None:
    handle = in_segments(vmm)
    before = len(memory_descriptors())
    for offset, size, opened in ((4, 3, 1), (4, 4, 1), (0, 5, 2), (7, 3, 3), (0, 10, 3)):
        vmm.mdl_map(handle, offset * PAGE, size * PAGE, 0, R)
        assert len(memory_descriptors()) - before == opened


def test_a_child_has_the_same_segments_and_disturbs_none(vmm: VMM) -> None:
    handle = in_segments(vmm)
    va = vmm.mdl_map(handle, 0, BYTES, 0, RW)

    def work() -> list[str]:
        vmm.write(va + 9 * PAGE, b"by the child")
        found = contents(vmm, vmm.mdl_clone(handle, 3 * PAGE, 2 * PAGE))
        vmm.free(va, BYTES)
        vmm.close()
        return [text.decode() for text in found]

    assert in_child(work) == [text_of(3).decode(), text_of(4).decode()]
    assert vmm.read(va + 9 * PAGE, 12) == b"by the child"
    assert vmm.read(va, 8) == text_of(0)


def map_at_the_wall() -> None:
    """Map segments with fewer mappings left than they need."""
    steady_heap()
    with Ground() as ground:
        handle = in_segments(ground)
        ground.handles.append(handle)
        # Reserved memory on both sides, with which other reserved memory would merge.
        ground.allocate(ARENA, 30 * PAGE, RESERVE | FIXED)
        ground.free(ARENA + 10 * PAGE, 10 * PAGE)
        fill_map_count(ground)
        ground.free(FILL, 100 * PAGE)
        singles = Singles()
        for flags, hint, needed in (
            (RW, ARENA + 10 * PAGE, 3),
            (R, ARENA + 10 * PAGE, 3),
            (R | GUARDS, ARENA + 40 * PAGE, 5),
        ):
            for room in range(needed):
                singles.leave(room)
                mappings = count_mappings()
                arguments = (handle, 0, BYTES, hint, flags | FIXED)
                rc, message = refused(ground, "mdl_map", *arguments)
                assert rc is Retcode.OUT_OF_MEMORY, message
                assert "vm.max_map_count" in message, message
                assert count_mappings() == mappings
        many = ground.mdl_create(100 * PAGE, RW, PAGE)
        ground.handles.append(many)
        singles.leave(60)
        rc, message = refused(ground, "mdl_map", many, 0, 100 * PAGE, 0, RW)
        assert (rc, "vm.max_map_count" in message) == (Retcode.OUT_OF_MEMORY, True), message
        singles.leave(3)
        va = ground.mdl_map(handle, 0, BYTES, ARENA + 10 * PAGE, RW | FIXED)
        assert pages_of(pieces_at(va, BYTES)) == PIECES


def try_at_the_wall() -> None:
    """The same; runs in a child."""
    import test_segments

    test_segments.map_at_the_wall()


def test_at_the_map_count_wall_all_segments_are_mapped_or_none() -> None:
    child = run_child(try_at_the_wall, environment={**TESTS_IMPORTABLE, **ONE_HEAP})
    assert (child.returncode, child.stderr) == (0, "")


# ---- clones and handles


def test_clones_have_identities_of_their_own_and_the_same_memory(vmm: VMM) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, 3 * PAGE, 6 * PAGE)
    inner = vmm.mdl_clone(clone, PAGE, 4 * PAGE)
    told = [vmm.handle_info(named) for named in (handle, clone, inner)]
    assert len({one.sid for one in told} | set(memory_files())) == 3 + 3
    assert [one.origin_sid for one in told] == [None, told[0].sid, told[1].sid]
    vmm.handle_close(handle)
    vmm.handle_close(clone)
    assert contents(vmm, inner) == [text_of(page) for page in range(4, 8)]
    for offset, length in ((0, 5), (4, 1), (1, 4)):
        with pytest.raises(InvalidArgument):
            vmm.mdl_clone(inner, offset * PAGE, length * PAGE)
        with pytest.raises(InvalidArgument):
            vmm.mdl_map(inner, offset * PAGE, length * PAGE, 0, R)


def test_handles_are_copied_revoked_and_closed_as_any_others(vmm: VMM) -> None:
    handle = in_segments(vmm)
    copy = vmm.handle_copy(handle, READ_ONLY)
    clone = vmm.mdl_clone(copy, 4 * PAGE, 4 * PAGE)
    with pytest.raises(NoCapability):
        vmm.mdl_map(clone, 0, PAGE, 0, RW)
    va = vmm.mdl_map(clone, 0, 4 * PAGE, 0, R)
    vmm.handle_revoke(handle)
    for ended in (copy, clone):
        with pytest.raises(VmmError) as caught:
            vmm.mdl_get_size(ended)
        assert caught.value.rc is Retcode.HANDLE_REVOKED
    vmm.handle_close(handle)
    assert vmm.read(va, 8) == text_of(4)
    vmm.free(va, 4 * PAGE)
    assert not memory_descriptors()


# ---- seals

#: F_SEAL_FUTURE_WRITE.
PUBLISHED = 0x10


def seals_of_files() -> list[int]:
    """The kernel's seals of the three segments, in order of their making."""
    found = {}
    for number, target in kernel.descriptors().items():
        if target == "/memfd:vmm_linux (deleted)":
            found[os.fstat(number).st_ino] = fcntl.fcntl(number, fcntl.F_GET_SEALS)
    return [found[inode] & (UNWRITABLE | PUBLISHED) for inode in sorted(found)]


@pytest.mark.parametrize("seal", [Seal.PUBLISH, Seal.FREEZE, Seal.PUBLISH | Seal.FREEZE])
def test_every_segment_is_sealed(vmm: VMM, seal: Seal) -> None:
    handle = in_segments(vmm)
    vmm.mdl_seal(handle, seal)
    assert len(set(seals_of_files())) == 1
    assert vmm.handle_info(handle).seals == seal
    with pytest.raises(NoCapability):
        vmm.mdl_map(handle, 0, BYTES, 0, RW)
    assert contents(vmm, handle) == [text_of(page) for page in range(PAGES)]


def test_a_clone_seals_the_segments_that_it_touches(vmm: VMM) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, 5 * PAGE, PAGE)
    vmm.mdl_seal(clone, Seal.FREEZE)
    assert sorted(seals_of_files()) == [0, 0, UNWRITABLE]
    assert vmm.handle_info(clone).seals == Seal.FREEZE
    assert vmm.handle_info(handle).seals == Seal(0)
    vmm.mdl_map(handle, 0, 4 * PAGE, 0, RW)
    for offset, length in ((0, 10), (3, 2), (7, 3), (4, 1)):
        mappings = mapped_files()
        with nothing_opened(), pytest.raises(NoCapability, match="sealed"):
            vmm.mdl_map(handle, offset * PAGE, length * PAGE, 0, RW)
        assert mapped_files() == mappings
    vmm.mdl_seal(vmm.mdl_clone(handle, 8 * PAGE, PAGE), Seal.PUBLISH)
    across = vmm.mdl_clone(handle, 4 * PAGE, 6 * PAGE)
    assert vmm.handle_info(across).seals == Seal(0)


def test_a_seal_that_is_refused_half_way_says_how_far_it_came(vmm: VMM) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, 2 * PAGE, 8 * PAGE)
    for busy, completed in ((1, 0), (5, 2), (9, 6)):
        va = vmm.mdl_map(handle, busy * PAGE, PAGE, 0, RW)
        before = seals_of_files()
        with pytest.raises(Busy) as caught:
            vmm.mdl_seal(clone, Seal.FREEZE)
        assert caught.value.completed == completed * PAGE
        assert (f"first {completed * PAGE} bytes" in str(caught.value)) == (completed > 0)
        if completed == 0:
            assert seals_of_files() == before
        assert seals_of_files().count(UNWRITABLE) == (completed + 2) // 4
        assert vmm.handle_info(clone).seals == Seal(0)
        vmm.free(va, PAGE)
    vmm.mdl_seal(clone, Seal.FREEZE)
    assert vmm.handle_info(handle).seals == Seal.FREEZE


def test_readers_keep_no_segment_from_being_frozen(vmm: VMM) -> None:
    handle = in_segments(vmm)
    va = vmm.mdl_map(handle, 0, BYTES, 0, R)
    vmm.mdl_seal(handle, Seal.FREEZE)
    assert vmm.read(va + 9 * PAGE, 8) == text_of(9)


# ---- what leaves the process


def receive_without_the_package(path: str, kind: int) -> None:
    """Receive one message by the kernel's own calls, and tell all that can be reached with it."""
    import array
    import contextlib
    import json
    import os
    import socket
    from pathlib import Path

    page = os.sysconf("SC_PAGE_SIZE")
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(path)
        room = socket.CMSG_SPACE(253 * 4)
        message, ancillary, flags, _ = sock.recvmsg(1000, room)
    descriptors = array.array("i")
    for _, _, data in ancillary:
        descriptors.frombytes(data)
    files = []
    for fd in descriptors:
        size = os.fstat(fd).st_size
        assert os.pread(fd, 1, size) == b""
        texts = [os.pread(fd, 8, at).decode() for at in range(0, size, page)]
        with contextlib.suppress(OSError):
            os.ftruncate(fd, size + page)
        assert os.fstat(fd).st_size == size
        files.append([size, os.fstat(fd).st_ino, texts])
    open_memory = 0
    for link in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):  # the one that listed them
            open_memory += str(link.readlink()).startswith("/memfd:")
    print(json.dumps([len(message), flags, files, open_memory]))


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize(
    ("cloned", "reached"),
    [
        (range(4, 8), range(4, 8)),
        (range(4), range(4)),
        (range(8, 10), range(8, 10)),
        (range(8), range(8)),
        (range(4, 10), range(4, 10)),
        (range(5, 6), range(4, 8)),
        (range(3, 5), range(8)),
        (range(9, 10), range(8, 10)),
    ],
)
@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
def test_a_clone_takes_along_the_segments_that_it_touches_and_no_others(
    vmm: VMM, cloned: range, reached: range, rights: Rights, nobody: bool
) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, cloned[0] * PAGE, len(cloned) * PAGE)
    with in_process(receive_without_the_package, nobody=nobody) as peer:
        vmm.send_handle(peer.sock, clone, rights)
    length, flags, files, open_memory = peer.answer
    assert (length, flags & ~socket.MSG_CMSG_CLOEXEC) == (48, 0)
    told = vmm.handle_info(clone)
    own, origin, *segments = files
    assert [own[0], origin[0]] == [0, 0]
    texts = [text for segment in segments for text in segment[2]]
    assert texts == [text_of(page).decode() for page in reached]
    assert len(segments) == -(-len(reached) // SEGMENT)
    assert open_memory == len(files)
    inodes = {segment[1] for segment in segments}
    assert inodes <= set(memory_files())
    assert len(inodes) == len(segments)
    assert told.sid != told.origin_sid


def test_a_clone_of_a_clone_takes_along_no_more(vmm: VMM) -> None:
    clone = vmm.mdl_clone(in_segments(vmm), 2 * PAGE, 8 * PAGE)
    inner = vmm.mdl_clone(clone, 3 * PAGE, PAGE)
    with in_process(receive_without_the_package) as peer:
        vmm.send_handle(peer.sock, inner)
    _, _, files, open_memory = peer.answer
    assert open_memory == 3
    assert [file[0] // PAGE for file in files] == [0, 0, 4]
    assert files[2][2] == [text_of(page).decode() for page in range(4, 8)]


KINDS: Mapping[str, Callable[[VMM], Handle]] = {
    "segments": in_segments,
    "one": lambda vmm: in_segments(vmm, segment=PAGES),
}


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
@pytest.mark.parametrize("kind", KINDS)
def test_buffers_of_both_kinds_and_their_clones_arrive_whole(
    vmm: VMM, kind: str, rights: Rights, nobody: bool
) -> None:
    handle = KINDS[kind](vmm)
    clone = vmm.mdl_clone(handle, 3 * PAGE, 6 * PAGE)
    windows = {
        handle: range(PAGES),
        clone: range(3, 9),
        vmm.mdl_clone(clone, PAGE, 5 * PAGE): range(4, 9),
        vmm.mdl_clone(clone, PAGE, 2 * PAGE): range(4, 6),
        vmm.mdl_clone(handle, 8 * PAGE, 2 * PAGE): range(8, 10),
    }
    with in_process(receive_and_tell, len(windows), nobody=nobody) as peer:
        for sent in windows:
            vmm.send_handle(peer.sock, sent, rights)
    for told, (sent, pages) in zip(peer.answer, windows.items(), strict=True):
        assert told["facts"] == [int(rights), *told_of(vmm, sent)[1:]]
        assert [text.encode() for text in told["texts"][1:]] == [text_of(p) for p in pages[1:]]
        assert all(told["closed by exec"])
        assert told["modes"].count(os.O_RDONLY) == (
            0
            if Rights.MAP_WRITE in rights
            else len({p // SEGMENT for p in pages})
            if kind == "segments"
            else 1
        )


def test_what_was_received_can_be_cloned_and_sent_on(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = in_segments(vmm)
    clone = vmm.mdl_clone(handle, 3 * PAGE, 6 * PAGE)
    for sent, pages in ((handle, range(PAGES)), (clone, range(3, 9))):
        for rights in (ALL_BUT_EXECUTE, READ_ONLY):
            vmm.send_handle(packets.sender, sent, rights)
            there = receiver.recv_handle(packets.receiver)
            assert told_of(receiver, there)[1:] == told_of(vmm, sent)[1:]
            for _ in range(2):
                receiver.send_handle(packets.sender, there)
                there = receiver.recv_handle(packets.receiver)
                assert told_of(receiver, there) == [int(rights), *told_of(vmm, sent)[1:]]
            inner = receiver.mdl_clone(there, PAGE, 4 * PAGE)
            receiver.send_handle(packets.sender, inner)
            back = vmm.recv_handle(packets.receiver)
            assert told_of(vmm, back) == told_of(receiver, inner)
            assert vmm.handle_info(back).origin_sid == vmm.handle_info(sent).sid
            assert contents(vmm, back) == [text_of(page) for page in pages[1:5]]


def test_a_message_carries_253_descriptors_and_no_more(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = vmm.mdl_create(300 * PAGE, RW, PAGE)
    clones = {pages: vmm.mdl_clone(handle, PAGE, pages * PAGE) for pages in (1, 251, 252, 253, 299)}
    before = kernel.descriptors()
    for pages, clone in clones.items():
        if pages <= 251:
            vmm.send_handle(packets.sender, clone)
            there = receiver.recv_handle(packets.receiver)
            assert len(kernel.descriptors()) - len(before) == pages + 2
            assert told_of(receiver, there) == told_of(vmm, clone)
            receiver.handle_close(there)
        else:
            with refused_by(f"{pages} segments .* clone a smaller part", InvalidOperation):
                vmm.send_handle(packets.sender, clone)
            with refused_by("larger segments", InvalidOperation):
                vmm.send_handle(packets.sender, clone, READ_ONLY)
    with refused_by("300 segments", InvalidOperation):
        vmm.send_handle(packets.sender, handle)
    assert kernel.descriptors() == before
    whole = vmm.mdl_create(252 * PAGE, RW, PAGE)
    vmm.send_handle(packets.sender, whole)
    there = receiver.recv_handle(packets.receiver)
    assert told_of(receiver, there) == told_of(vmm, whole)


def at_the_limit_of_descriptors() -> None:
    """Send and receive with room for fewer descriptors than go; runs in a child."""
    import socket

    import test_segments as here
    import test_transfer as t
    from kernel_oracle import PAGE
    from vmm_linux import VMM

    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
        with VMM() as vmm, VMM() as receiver, t.connected(kind) as pair:
            handle = here.in_segments(vmm)
            clone = vmm.mdl_clone(handle, PAGE, 5 * PAGE)
            for sent, needed in ((handle, 4), (clone, 4)):
                for room in range(needed):
                    with t.refused_for_want_of(room):
                        vmm.send_handle(pair.sender, sent)
                    vmm.send_handle(pair.sender, sent)
                    with t.refused_for_want_of(room):
                        receiver.recv_handle(pair.receiver)
                vmm.send_handle(pair.sender, sent)
                with t.room_for(needed):
                    received = receiver.recv_handle(pair.receiver)
                assert t.contents(receiver, received) == t.contents(vmm, sent)
            other = here.in_segments(vmm)
            for room in range(7):
                with t.refused_for_want_of(room):
                    vmm.send_handle(pair.sender, other, t.READ_ONLY)
            for room in range(3):
                with t.refused_for_want_of(room):
                    vmm.mdl_map(other, 0, here.BYTES, 0, t.READ)
            with t.room_for(7):
                vmm.send_handle(pair.sender, other, t.READ_ONLY)


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
def test_at_the_limit_of_descriptors_segments_leave_nothing(nobody: bool) -> None:
    child = run_child(at_the_limit_of_descriptors, nobody=nobody, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


def test_seals_are_demanded_of_every_segment(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    handle = in_segments(vmm)
    for page in (0, 9, 5):
        for require in (Seal.PUBLISH, Seal.FREEZE):
            vmm.send_handle(packets.sender, handle)
            with refused_by("not sealed", SecurityDisallow):
                receiver.recv_handle(packets.receiver, require=require)
        vmm.mdl_seal(vmm.mdl_clone(handle, page * PAGE, PAGE), Seal.FREEZE)
    vmm.send_handle(packets.sender, handle)
    received = receiver.recv_handle(packets.receiver, require=Seal.FREEZE | Seal.PUBLISH)
    assert receiver.handle_info(received).seals == Seal.FREEZE


def test_a_frozen_segment_is_a_published_one_for_who_demands_that(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = in_segments(vmm)
    vmm.mdl_seal(vmm.mdl_clone(handle, 0, 8 * PAGE), Seal.FREEZE)
    vmm.mdl_seal(vmm.mdl_clone(handle, 8 * PAGE, 2 * PAGE), Seal.PUBLISH)
    vmm.send_handle(packets.sender, handle)
    assert receiver.recv_handle(packets.receiver, require=Seal.PUBLISH)
    vmm.send_handle(packets.sender, handle)
    with refused_by("not sealed", SecurityDisallow):
        receiver.recv_handle(packets.receiver, require=Seal.FREEZE)


# ---- hostile messages


def three(sizes: tuple[int, ...] = (4, 4, 2), seals: int = SIZED) -> list[int]:
    """The segments of a read-only buffer, by the kernel's own calls."""
    return [read_only(size * PAGE, seals) for size in sizes]


WHOLE: dict[str, Any] = {"size": BYTES, "segment_size": SEGMENT * PAGE, "memory_size": BYTES}
PART: dict[str, Any] = {**WHOLE, "offset": 3 * PAGE, "size": 6 * PAGE}


def test_segments_sent_by_hand_are_as_good_as_the_package_s(receiver: VMM, packets: Pair) -> None:
    with open_files(identity(), identity(), *three()) as fds:
        for identities, values in ((1, WHOLE), (2, WHOLE), (2, PART)):
            message = forged(segments=3, identities=identities, **values)
            send_raw(packets.sender, message, fds[2 - identities :])
            handle = receiver.recv_handle(packets.receiver)
            told = receiver.handle_info(handle)
            assert told.size == values["size"]
            assert told.sid != told.origin_sid
            assert (told.origin_sid is None) == (identities == 1)
            assert contents(receiver, handle) == [bytes(8)] * (told.size // PAGE)


LIES: dict[str, dict[str, Any]] = {
    "one segment fewer": {"segments": 2},
    "one segment more": {"segments": 4},
    "an identity fewer": {"identities": 0, "segments": 3},
    "no identity": {"identities": 0, "segments": 4},
    "three identities": {"identities": 3, "segments": 1},
    "larger segments": {"segment_size": 5 * PAGE},
    "smaller segments": {"segment_size": 3 * PAGE},
    "segments of no bytes": {"segment_size": -(2**64)},
    "segments of half a page": {"segment_size": 4 * PAGE + 1},
    "segments of all bytes": {"segment_size": BYTES},
    "segments beyond all": {"segment_size": 2**64 - PAGE},
    "more memory": {"memory_size": BYTES + PAGE},
    "much more memory": {"memory_size": 2**64 - PAGE},
    "less memory": {"memory_size": BYTES - PAGE},
    "a segment less memory": {"memory_size": 8 * PAGE},
    "no memory": {"memory_size": 0},
    "a size beyond": {"size": BYTES + PAGE},
    "a part that is no clone": {"size": BYTES - PAGE},
    "an offset and no clone": {"offset": PAGE, "size": BYTES - PAGE},
}


def lie(values: dict[str, Any]) -> bytes:
    """A message about three segments with some wrong numbers."""
    head: dict[str, Any] = {"segments": 3, "identities": 1, **WHOLE, **values}
    segment_size = head.pop("segment_size")
    message = bytearray(forged(**head, segment_size=PAGE))
    message[32:40] = max(segment_size, 0).to_bytes(8, "little")
    return bytes(message)


@pytest.mark.parametrize("name", LIES)
def test_numbers_that_are_not_the_kernel_s_are_refused(
    name: str, receiver: VMM, packets: Pair
) -> None:
    with open_files(identity(), *three()) as fds:
        send_raw(packets.sender, lie(LIES[name]), fds)
        with refused_by("bad message"):
            receiver.recv_handle(packets.receiver)


@pytest.mark.parametrize(
    ("offset", "size"),
    [(4, 6), (4, 2), (8, 2), (0, 8), (0, 4), (3, 5), (3, 1), (10, 1), (0, 0)],
)
def test_segments_that_a_window_does_not_need_are_refused(
    offset: int, size: int, receiver: VMM, packets: Pair
) -> None:
    values: dict[str, Any] = {**WHOLE, "offset": offset * PAGE, "size": size * PAGE}
    with open_files(identity(), identity(), *three()) as fds:
        send_raw(packets.sender, forged(segments=3, identities=2, **values), fds)
        with refused_by("bad message: .*(do not touch every segment|of a memory of|whole pages)"):
            receiver.recv_handle(packets.receiver)


WRONG_SEGMENTS: dict[str, tuple[Callable[[], list[int]], str]] = {
    "a short one in the middle": (lambda: three((4, 3, 3)), "not the size that is announced"),
    "a short first one": (lambda: three((2, 4, 4)), "not the size that is announced"),
    "a long last one": (lambda: three((4, 4, 4)), "not the size that is announced"),
    "an empty one": (lambda: three((4, 4, 0)), "memory of 0 bytes"),
    "an identity among them": (
        lambda: [*three((4, 4)), reopened(identity(), os.O_RDONLY)],
        "memory of 0 bytes",
    ),
    "one writable": (lambda: [*three((4, 4)), memory(2 * PAGE)], "access mode 2"),
    "the first writable": (lambda: [memory(4 * PAGE), *three((4, 2))], "access mode 2"),
    "one that can shrink": (
        lambda: [*three((4,)), read_only(4 * PAGE, 4), *three((2,))],
        "seals 0x4",
    ),
    "no memfd": (
        lambda: [*three((4,)), os.open("/dev/null", os.O_RDONLY), *three((2,))],
        "no memfd",
    ),
    "huge pages": (
        lambda: [
            *three((4, 4)),
            reopened(memory(1 << 30, flags=os.MFD_HUGETLB), os.O_RDONLY),
        ],
        "no memfd of ordinary pages",
    ),
    "half a page": (lambda: [*three((4, 4)), read_only(2 * PAGE - 1)], "not whole pages"),
}


@pytest.mark.parametrize("name", WRONG_SEGMENTS)
def test_each_segment_is_looked_at(name: str, receiver: VMM, packets: Pair) -> None:
    make, why = WRONG_SEGMENTS[name]
    with open_files(identity(), identity(), *make()) as fds:
        for identities, values in ((1, WHOLE), (2, PART)):
            message = forged(segments=3, identities=identities, **values)
            send_raw(packets.sender, message, fds[2 - identities :])
            with refused_by(f"bad message: .*({why})"):
                receiver.recv_handle(packets.receiver)


def test_the_same_memory_twice_is_refused(receiver: VMM, packets: Pair) -> None:
    first_one, last = three((4, 2))
    again = os.open(f"/proc/self/fd/{first_one}", os.O_RDONLY)
    with open_files(identity(), first_one, again, last) as fds:
        for middle in (first_one, again):
            message = forged(segments=3, identities=1, **WHOLE)
            send_raw(packets.sender, message, [fds[0], first_one, middle, last])
            with refused_by("the same memory twice"):
                receiver.recv_handle(packets.receiver)


def test_whatever_byte_of_it_is_flipped_the_kernel_is_believed(
    receiver: VMM, packets: Pair
) -> None:
    message = forged(segments=3, identities=2, **PART)
    free_to_say = 0
    with open_files(identity(), identity(), *three()) as fds:
        for place in range(len(message)):
            for change in range(1, 256):
                flipped = bytearray(message)
                flipped[place] ^= change
                send_raw(packets.sender, bytes(flipped), fds)
                try:
                    handle = receiver.recv_handle(packets.receiver)
                except InvalidArgument:
                    continue
                free_to_say += 1
                assert 12 <= place < 32, place
                assert flipped[12] & 0x10 == 0
                size = receiver.mdl_get_size(handle)
                assert size == struct.unpack_from("<Q", flipped, 24)[0]
                if Rights.MAP_READ in receiver.handle_info(handle).rights:
                    assert contents(receiver, handle) == [bytes(8)] * (size // PAGE)
                receiver.handle_close(handle)
    # 31 other sets of rights; one to nine pages that touch all three segments.
    assert free_to_say > 31


def test_every_descriptor_of_a_refused_message_is_closed(receiver: VMM, packets: Pair) -> None:
    with open_files(identity(), *(read_only() for _ in range(200))) as fds:
        for came in (2, 3, 50, 201):
            many: dict[str, Any] = {"memory_size": (came - 1) * PAGE, "size": (came - 1) * PAGE}
            good = forged(segments=came - 1, identities=came > 2, **many)
            for bad_message in (b"", good[:-1], bytes([*good[:12], 0xFF, *good[13:]])):
                send_raw(packets.sender, bad_message or b"x", fds[:came])
                with refused_by("bad message"):
                    receiver.recv_handle(packets.receiver)


# ---- every call to the system made to fail

library = pytest.fixture(faults.make_library, scope="session")

THIRD = 6 * PAGE


def segmented(ground: Ground) -> None:
    """A buffer in segments of six, six and four pages, something else in every page."""
    handle = ground.mdl_create(SIZE, RW, THIRD)
    va = ground.mdl_map(handle, 0, SIZE, 0, RW)
    ground.write(va, pattern(SIZE))
    ground.free(va, SIZE)
    ground.handles.append(handle)


def segmented_holes(ground: Ground) -> None:
    """One that has no memory yet."""
    ground.handles.append(ground.mdl_create(SIZE, RW, THIRD))


def empty_segments(ground: Ground, error: VmmError) -> None:
    """A failed LOCKED mapping may leave memory in the buffer: see ``make_holes_again``."""
    nothing_to_take_back(ground, error)
    for number, target in kernel.descriptors().items():
        if target == "/memfd:vmm_linux (deleted)":
            size = os.fstat(number).st_size
            assert os.pread(number, size, 0) == bytes(size)
            punch = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
            assert kernel.libc.fallocate(number, punch, ctypes.c_long(0), ctypes.c_long(size)) == 0


MAKING = "malloc memfd_create ftruncate fcntl"
SCENARIOS: Mapping[str, list[Scenario]] = {
    "mdl_create": [
        Scenario("plain", segmented_holes, lambda g: g.mdl_create(SIZE, RW, THIRD), MAKING),
        Scenario(
            "LOCKED",
            segmented_holes,
            lambda g: g.mdl_create(SIZE, RW | LOCKED, THIRD),
            f"{MAKING} fallocate sysinfo",
        ),
    ],
    "mdl_map": [
        *(
            Scenario(f"{flags!r}", segmented, mapping(flags), calls, placed=True)
            for flags, calls in (
                (RW, "malloc mmap"),
                (RW | GUARDS, "malloc mmap"),
                (R, "malloc mmap open"),
                (R | GUARDS, "malloc mmap open"),
                (VmmFlags(0), "malloc mmap open"),
            )
        ),
        Scenario(
            "read-only, one description there already",
            first(segmented, newest("mdl_map", THIRD, PAGE, BASE, R | FIXED)),
            mapping(R),
            "malloc mmap open",
            placed=True,
        ),
        Scenario(
            "a clone, read-only",
            first(segmented, window),
            newest("mdl_map", 0, SIZE - 2 * PAGE, 0, R),
            "malloc mmap open",
            size=SIZE - 2 * PAGE,
            placed=True,
        ),
        *(
            Scenario(
                f"LOCKED {flags!r}",
                segmented_holes,
                mapping(flags | LOCKED),
                "malloc mmap madvise mlock sysinfo fstat",
                LOCKS,
                take_back=empty_segments,
                placed=True,
            )
            for flags in (RW, R | GUARDS)
        ),
    ],
    "mdl_clone": [
        Scenario(
            name,
            prepare,
            newest("mdl_clone", PAGE, 8 * PAGE),
            "malloc memfd_create fcntl",
        )
        for name, prepare in (("whole", segmented), ("a clone", first(segmented, window)))
    ],
    "handles": [
        Scenario("close", segmented, newest("handle_close"), "close"),
        Scenario("info", segmented, info, "fcntl name_to_handle_at", ask=False),
        Scenario(
            "query",
            first(segmented, mapped(RW)),
            ask_buffer(smaps=False),
            "open",
            ask=False,
            survives={**faults.UNTOLD},
        ),
    ],
    "send_handle": [
        Scenario(name, first(prepare, connected), send(rights), calls)
        for name, prepare, rights, calls in (
            ("whole", segmented, None, "fcntl"),
            ("whole, read-only", segmented, READ_ONLY, "fcntl open"),
            ("a clone", first(segmented, window), None, "fcntl"),
            ("a clone, read-only", first(segmented, window), READ_ONLY, "fcntl open"),
            ("a clone of a clone", first(segmented, window, window), None, "fcntl"),
        )
    ],
    "recv_handle": [
        Scenario(
            name,
            first(prepare, send(rights)),
            receive,
            "malloc",
            take_back=send_again(rights),
            spare="fcntl",
        )
        for name, prepare, rights in (
            ("whole", segmented, None),
            ("whole, read-only", segmented, READ_ONLY),
            ("a clone", first(segmented, window), None),
            ("a clone of a clone", first(segmented, window, window), READ_ONLY),
        )
    ],
    "pages": [
        *(
            Scenario(f"free {name}", first(segmented, mapped(flags), closed), call, "munmap")
            for flags in (RW, R | GUARDS)
            for name, call in (
                ("middle", over("free", 4, 10)),
                ("one segment", over("free", 6, 6)),
                ("low edge", over("free", 0, 8)),
            )
        ),
        *(
            Scenario(
                f"protect {protection!r}",
                first(segmented, mapped(RW | GUARDS)),
                over("protect", 4, 10, protection),
                "malloc mprotect",
            )
            for protection in (R, VmmFlags(0))
        ),
    ],
}


def try_method(method: str) -> None:
    """Try all scenarios of a method; runs in a child."""
    import faults
    import test_segments

    faults.try_all(test_segments.SCENARIOS[method])


@pytest.mark.parametrize("method", SCENARIOS)
def test_a_failed_call_leaves_segments_as_they_were(library: Path, method: str) -> None:
    faults.run(library, try_method, method)


def try_refusals() -> None:
    """The kernel refuses for another reason; runs in a child."""
    import errno

    import faults
    import test_segments as here

    for method in ("mdl_create", "mdl_clone", "send_handle"):
        faults.try_all(here.SCENARIOS[method], errno.EPERM)


def test_a_refusal_for_any_other_reason_leaves_segments_as_they_were(library: Path) -> None:
    faults.run(library, try_refusals)


def seal_with_failure(library: Faults, seal: Seal, n: int) -> None:
    """Seal with the n-th call failing, and hold ``completed`` against the kernel."""
    with Ground() as ground:
        segmented(ground)
        (handle,) = ground.handles
        clone = ground.mdl_clone(handle, 2 * PAGE, 14 * PAGE)
        before = facts(ground)
        completed = 14
        try:
            with library.armed(Mode.ALONE, n, error=errno.EBUSY):
                ground.mdl_seal(clone, seal)
        except VmmError as problem:
            completed = problem.completed // PAGE
        assert library.name == ("fcntl" if n < 4 else "")
        assert completed == (0, 4, 10, 14)[n - 1]
        assert sum(map(bool, seals_of_files())) == n - 1
        assert facts(ground) == before
        ground.mdl_seal(clone, seal)
        assert ground.handle_info(handle).seals == seal


def try_sealing() -> None:
    """Let each call of a sealing fail; runs in a child."""
    import test_segments as here
    from faults import Faults
    from vmm_linux import Seal

    library = Faults()
    for n in range(1, 5):
        here.seal_with_failure(library, Seal.PUBLISH, n)
        here.seal_with_failure(library, Seal.FREEZE, n)


def test_a_failed_sealing_says_how_many_bytes_are_sealed(library: Path) -> None:
    faults.run(library, try_sealing)

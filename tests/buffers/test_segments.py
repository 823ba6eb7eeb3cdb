"""A buffer in segments is a buffer like any other.

The functions that are not tests run in other processes. They import for themselves what they use.
"""

from __future__ import annotations

import resource
from itertools import pairwise
from typing import Any

import pytest

import kernel_oracle as kernel
from buffer_scenarios import refused
from children import TESTS_IMPORTABLE, run_child
from constants import FIXED, GUARDS, LOCKED, READ_ONLY, RESERVE, RW
from faults import Ground, R, pattern
from forged_messages import UNWRITABLE
from forked import in_child
from kernel_oracle import ARENA, PAGE
from segments import (
    BYTES,
    PAGES,
    PIECES,
    SEGMENT,
    in_segments,
    mapped_files,
    memory_descriptors,
    memory_files,
    pages_of,
    pieces_at,
    seals_of_files,
)
from transfers import contents, nothing_opened, text_of
from vmm_linux import VMM, Limits, PageKind, Retcode, Seal, VmmError, VmmFlags
from vmm_linux.errors import Busy, InvalidArgument, InvalidOperation, NoCapability, QuotaExceeded
from walls import (
    FILL,
    ONE_HEAP,
    Singles,
    count_mappings,
    fill_map_count,
    steady_heap,
)

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited


# ---- what is made --------------------------------------------------------------------------------


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


# ---- mapped side by side -------------------------------------------------------------------------


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


# ---- clones and handles --------------------------------------------------------------------------


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


# ---- seals ---------------------------------------------------------------------------------------


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

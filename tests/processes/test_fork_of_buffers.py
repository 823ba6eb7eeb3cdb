"""Buffers, handles and mappings across fork."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import RW, SHAREABLE
from faces import Face, call
from forked import Waiting, in_child
from inherited import buffer, frames, outcome, region
from kernel_oracle import PAGE
from refusals import faces
from vmm_linux import VMM, PageKind, Retcode, Rights, Seal, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable


def test_pages_of_a_buffer_stay_shared_both_ways(vmm: VMM) -> None:
    handle, va = buffer(vmm)

    def question() -> list[object]:
        seen = vmm.read(va, 6).decode()
        vmm.write(va + PAGE, b"child!")
        again = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
        vmm.write(again + 2 * PAGE, b"mapped")
        return [seen, frames(va, 8), frames(again, 8)]

    child = Waiting(question)
    vmm.write(va, b"later!")
    seen, inherited, mapped = child.answer()
    assert seen == "later!"
    assert inherited == mapped == frames(va, 8)
    assert os.geteuid() != 0 or all(inherited), "root is told the page frame numbers"
    assert vmm.read(va + PAGE, 6) == b"child!"
    assert vmm.read(va + 2 * PAGE, 6) == b"mapped"


@pytest.mark.parametrize("extra", [0, SHAREABLE], ids=["private", "SHAREABLE"])
def test_pages_that_became_a_buffer_are_shared_from_then_on(vmm: VMM, extra: int) -> None:
    va = region(vmm, extra)
    handle = vmm.mdl_create_from_vm(va, 8 * PAGE, RW)

    def child() -> list[object]:
        vmm.write(va, b"child!")
        other = vmm.mdl_map(handle, 0, PAGE, 0, VmmFlags.READ)
        return [vmm.read(other, 6).decode(), outcome(vmm, "decommit", va, PAGE)]

    assert in_child(child) == ["child!", Retcode.INVALID_OPERATION]
    assert vmm.read(va, 6) == b"child!"


@faces
def test_a_child_may_not_decommit_pages_of_a_buffer(vmm: VMM, face: Face) -> None:
    _, va = buffer(vmm)

    def child() -> list[object]:
        codes = [call(vmm, face, "decommit", va, pages * PAGE).rc for pages in (1, 8)]
        return [codes, vmm.read(va, 6).decode()]

    assert in_child(child) == [[Retcode.INVALID_OPERATION] * 2, "parent"]
    assert vmm.read(va, 6) == b"parent"


@pytest.mark.parametrize(
    "end",
    ["free", "free some", "protect", "handle_close", "everything", "revoke", "close", "drop"],
)
def test_nothing_that_a_child_ends_disturbs_its_parents_buffers(vmm: VMM, end: str) -> None:
    handle, va = buffer(vmm)
    copied = vmm.handle_copy(handle, handle.rights)
    clone = vmm.mdl_clone(copied, 0, 4 * PAGE)
    window = vmm.mdl_map(clone, 0, 4 * PAGE, 0, VmmFlags.READ)

    def everything() -> None:
        for each in (handle, copied, clone):
            vmm.handle_close(each)
        vmm.free(va, 8 * PAGE)
        vmm.free(window, 4 * PAGE)

    def child() -> int:
        ends: dict[str, Callable[[], object]] = {
            "free": lambda: vmm.free(va, 8 * PAGE),
            "free some": lambda: vmm.free(va + PAGE, 2 * PAGE),
            "protect": lambda: vmm.protect(va, 8 * PAGE, 0),
            "handle_close": lambda: vmm.handle_close(copied),
            "everything": everything,
            "revoke": lambda: vmm.handle_revoke(handle),
            "close": vmm.close,
            "drop": lambda: None,
        }
        ends[end]()
        vmm._check()
        return sum("/memfd:" in name for name in kernel.descriptors().values())

    held = {"everything": 0, "close": 0}.get(end, 3)
    assert in_child(child) == held, "the memory, its read-only description, the clone's identity"
    vmm._check()
    assert kernel.page_permissions(va, va + 8 * PAGE) == ["rw-s"] * 8
    assert kernel.page_permissions(window, window + 4 * PAGE) == ["r--s"] * 4
    for place in (va, window):
        assert vmm.read(place, 6) == b"parent"
    for each in (handle, copied, clone):
        again = vmm.mdl_map(each, 0, PAGE, 0, RW)
        assert vmm.read(again, 6) == b"parent"
    vmm.write(va, b"after!")
    assert vmm.read(window, 6) == b"after!"


def test_handles_work_in_a_child(vmm: VMM) -> None:
    handle, va = buffer(vmm)
    reader = vmm.handle_copy(handle, Rights.MAP_READ)
    closed = vmm.handle_copy(handle, handle.rights)
    vmm.handle_close(closed)

    def child() -> list[object]:
        clone = vmm.mdl_clone(handle, PAGE, 2 * PAGE)
        nested = vmm.mdl_clone(clone, PAGE, PAGE)
        window = vmm.mdl_map(nested, 0, PAGE, 0, RW)
        vmm.write(window, b"nested")
        sizes = [vmm.mdl_get_size(each) for each in (handle, reader, clone, nested)]
        codes = [
            outcome(vmm, "mdl_map", reader, 0, PAGE, 0, 3),
            outcome(vmm, "mdl_clone", reader, 0, PAGE),
            outcome(vmm, "mdl_get_size", closed),
            outcome(vmm, "mdl_get_size", handle ^ 1 << 40),
        ]
        vmm.handle_revoke(handle)
        codes += [outcome(vmm, "mdl_get_size", each) for each in (reader, clone, nested)]
        return [[size // PAGE for size in sizes], codes]

    sizes, codes = in_child(child)
    assert sizes == [8, 8, 2, 1]
    assert codes == [
        Retcode.NO_CAPABILITY,
        Retcode.NO_CAPABILITY,
        Retcode.RESOURCE_NOT_FOUND,
        Retcode.INVALID_ARGUMENT,
        *[Retcode.HANDLE_REVOKED] * 3,
    ]
    assert vmm.read(va + 2 * PAGE, 6) == b"nested"
    assert vmm.mdl_get_size(reader) == 8 * PAGE


def test_a_child_still_has_buffers_that_its_parent_let_go_of(vmm: VMM) -> None:
    handle, va = buffer(vmm)
    clone = vmm.mdl_clone(handle, 0, PAGE)

    def question() -> list[str]:
        window = vmm.mdl_map(clone, 0, PAGE, 0, VmmFlags.READ)
        whole = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
        return [vmm.read(place, 6).decode() for place in (va, window, whole)]

    child = Waiting(question)
    vmm.free(va, 8 * PAGE)
    vmm.handle_close(handle)
    vmm.handle_close(clone)
    assert child.answer() == ["parent"] * 3


def test_what_a_child_makes_is_its_own(vmm: VMM) -> None:
    handle, _ = buffer(vmm)

    def child() -> list[int]:
        made: list[int] = [vmm.mdl_create(PAGE, RW), vmm.mdl_clone(handle, 0, PAGE)]
        made.append(vmm.handle_copy(handle, handle.rights))
        assert len({*made, handle}) == 4
        return made

    for each in in_child(child):
        assert outcome(vmm, "mdl_get_size", each) is Retcode.INVALID_ARGUMENT
    assert vmm.mdl_get_size(handle) == 8 * PAGE


@pytest.mark.parametrize("asked", [True, False], ids=["asked before", "not asked before"])
def test_security_ids_are_the_same_in_parent_and_child(vmm: VMM, asked: bool) -> None:
    handle, va = buffer(vmm)
    clone = vmm.mdl_clone(handle, PAGE, PAGE)
    nested = vmm.mdl_clone(clone, 0, PAGE)
    window = vmm.mdl_map(nested, 0, PAGE, 0, RW)

    def sids() -> list[object]:
        infos = [vmm.handle_info(each) for each in (handle, clone, nested)]
        told = [vmm.query(place, smaps=False).sid for place in (va, window)]
        return [[[info.sid, info.origin_sid] for info in infos], told]

    before = sids() if asked else None
    child = in_child(sids)
    assert child == sids()
    assert before in (None, child)

    def made_by_child() -> int:
        return vmm.handle_info(vmm.mdl_clone(handle, 0, PAGE)).sid

    known = {vmm.handle_info(each).sid for each in (handle, clone, nested)}
    here = vmm.handle_info(vmm.mdl_clone(handle, 0, PAGE)).sid
    assert len({*known, here, in_child(made_by_child)}) == 5


def test_a_seal_set_by_a_child_holds_for_its_parent(vmm: VMM) -> None:
    handle, va = buffer(vmm)

    def child() -> int:
        vmm.free(va, 8 * PAGE)
        busy = outcome(vmm, "mdl_seal", handle, int(Seal.FREEZE))
        vmm.mdl_seal(handle, Seal.PUBLISH)
        return busy

    assert in_child(child) == Retcode.BUSY, "the parent can still write"
    assert vmm.handle_info(handle).seals == Seal.PUBLISH
    vmm.write(va, b"goes on")
    assert outcome(vmm, "mdl_map", handle, 0, PAGE, 0, int(RW)) is Retcode.NO_CAPABILITY


def test_a_childs_buffer_of_private_pages_is_its_own(vmm: VMM) -> None:
    va = region(vmm, 0)

    def child() -> list[object]:
        handle = vmm.mdl_create_from_vm(va, 8 * PAGE, RW)
        seen = vmm.read(va, 6).decode()
        vmm.write(vmm.mdl_map(handle, 0, PAGE, 0, RW), b"child!")
        return [seen, vmm.read(va, 6).decode()]

    assert in_child(child) == ["parent", "child!"]
    assert vmm.read(va, 6) == b"parent"
    assert vmm.query(va).kind is PageKind.PRIVATE
    assert kernel.page_permissions(va, va + 8 * PAGE) == ["rw-p"] * 8


@pytest.mark.parametrize(("first", "count"), [(0, 8), (2, 3)], ids=["whole", "part"])
def test_a_childs_buffer_of_inherited_shareable_pages_is_a_copy(
    vmm: VMM, first: int, count: int
) -> None:
    """Otherwise it could send its parent's memory away."""
    va = region(vmm, SHAREABLE)
    start = va + first * PAGE
    vmm.write(start, b"parent")
    parents = frames(va, 8)

    def child() -> tuple[str, list[int]]:
        vmm.mdl_create_from_vm(start, count * PAGE, RW)
        seen = vmm.read(start, 6).decode()
        moved = frames(start, count)
        vmm.write(start, b"child!")
        vmm.free(start, count * PAGE)
        return seen, moved

    seen, moved = in_child(child)
    assert seen == "parent"
    assert os.geteuid() != 0 or not set(moved) & set(parents)
    assert vmm.read(start, 6) == b"parent"
    assert frames(va, 8) == parents
    assert vmm.query(start).kind is PageKind.PRIVATE


@pytest.mark.parametrize(("first", "count"), [(0, 8), (0, 3)], ids=["whole", "part"])
def test_a_child_keeps_shareable_pages_of_which_its_parent_makes_a_buffer(
    vmm: VMM, first: int, count: int
) -> None:
    va = region(vmm, SHAREABLE)
    vmm.write(va + 7 * PAGE, b"parent")
    child = Waiting(lambda: [vmm.read(va + page * PAGE, 6).decode() for page in (0, 7)])
    handle = vmm.mdl_create_from_vm(va + first * PAGE, count * PAGE, RW)
    vmm.handle_close(handle)
    vmm.free(va + first * PAGE, count * PAGE)
    assert child.answer() == ["parent", "parent"]


def test_a_grandchild_shares_buffers_too(vmm: VMM) -> None:
    handle, va = buffer(vmm)

    def grandchild() -> list[object]:
        vmm.write(va, b"grand!")
        vmm.free(va, 8 * PAGE)
        again = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
        vmm.write(again + PAGE, b"grand!")
        vmm.handle_close(handle)
        return [vmm.handle_info(vmm.mdl_create(PAGE, RW)).sid]

    def child() -> list[object]:
        vmm.write(va, b"child!")
        answer = in_child(grandchild)
        return [*answer, vmm.read(va, 6).decode(), vmm.mdl_get_size(handle) // PAGE]

    sid, seen, pages = in_child(child)
    assert sid != vmm.handle_info(handle).sid
    assert (seen, pages) == ("grand!", 8)
    assert vmm.read(va, 6) == vmm.read(va + PAGE, 6) == b"grand!"

"""A VMM across fork: what is copied, what stays shared, and that nobody disturbs anybody."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import signal
import sys
import threading
import traceback
import warnings
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
from children import run_child
from faces import Face, call
from forked import in_child
from kernel_oracle import ARENA, PAGE, TESTS_IMPORTABLE
from vmm_linux import (
    VMM,
    Handle,
    PageKind,
    PageState,
    Retcode,
    Rights,
    Seal,
    VmmFlags,
    _features,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

RW = VmmFlags.READ | VmmFlags.WRITE
RESERVE = VmmFlags.RESERVE
COMMIT = VmmFlags.RESERVE | VmmFlags.COMMIT
FIXED = VmmFlags.FIXED
LOCKED = VmmFlags.LOCKED
SHAREABLE = VmmFlags.SHAREABLE

faces = pytest.mark.parametrize("face", list(Face), ids=lambda face: face.value)
backings = pytest.mark.parametrize("backing", [0, SHAREABLE], ids=["private", "SHAREABLE"])


@pytest.fixture
def vmm() -> Iterator[VMM]:
    with VMM() as it:
        yield it


class Waiting:
    """A child that answers a question when it is told to, so that its parent comes first."""

    def __init__(self, question: Callable[[], object]) -> None:
        wait, self.go = os.pipe()
        self.answers, answer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.read(wait, 1)
                os.write(answer, json.dumps(question()).encode())
                status = 0
            except BaseException:  # noqa: BLE001  a child must not go on with its parent's work
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(wait)
        os.close(answer)

    def answer(self) -> Any:  # noqa: ANN401  whatever the question answers
        """Have it go on, and wait for its end."""
        os.write(self.go, b".")
        os.close(self.go)
        with os.fdopen(self.answers, "rb") as stream:
            text = stream.read()
        assert os.waitpid(self.pid, 0)[1] == 0, "the child failed"
        return json.loads(text)


def region(vmm: VMM, backing: int, pages: int = 8) -> int:
    """A committed region that begins with ``parent``."""
    va = vmm.allocate(0, pages * PAGE, COMMIT | RW | VmmFlags(backing))
    vmm.write(va, b"parent")
    return va


def outcome(vmm: VMM, method: str, *arguments: object) -> Retcode:
    """A call's return code; it is the same through both faces."""
    rc = call(vmm, Face.METHODS, method, *arguments).rc
    if rc is not Retcode.OK:
        assert call(vmm, Face.ENDPOINT, method, *arguments).rc is rc
    return rc


# ------------------------------------------------------------------------------ copied and shared


def test_private_pages_are_the_childs_own_copies(vmm: VMM) -> None:
    va = region(vmm, 0)

    def child() -> list[str]:
        first = vmm.read(va, 6)
        vmm.write(va, b"child!")
        return [first.decode(), vmm.read(va, 6).decode()]

    assert in_child(child) == ["parent", "child!"]
    assert vmm.read(va, 6) == b"parent"


def test_a_child_keeps_its_copy_whatever_the_parent_does_afterwards(vmm: VMM) -> None:
    va = region(vmm, 0)
    freed = region(vmm, 0)
    child = Waiting(lambda: [vmm.read(place, 6).decode() for place in (va, freed)])
    vmm.write(va, b"later!")
    vmm.free(freed, 8 * PAGE)
    assert child.answer() == ["parent", "parent"]


def test_shareable_pages_stay_shared_both_ways(vmm: VMM) -> None:
    va = region(vmm, SHAREABLE)

    def question() -> str:
        vmm.write(va + PAGE, b"child!")
        return vmm.read(va, 6).decode()

    child = Waiting(question)
    vmm.write(va, b"later!")
    assert child.answer() == "later!"
    assert vmm.read(va + PAGE, 6) == b"child!"


def test_a_child_still_has_shareable_pages_that_its_parent_freed(vmm: VMM) -> None:
    va = region(vmm, SHAREABLE)
    part = region(vmm, SHAREABLE)
    child = Waiting(lambda: [vmm.read(place, 6).decode() for place in (va, part)])
    vmm.free(va, 8 * PAGE)
    vmm.free(part, PAGE)
    assert child.answer() == ["parent", "parent"]


@backings
def test_what_a_child_commits_and_protects_is_its_own_business(vmm: VMM, backing: int) -> None:
    va = vmm.allocate(0, 8 * PAGE, RESERVE | RW | VmmFlags(backing))

    def child() -> list[str | None]:
        vmm.commit(va, 2 * PAGE)
        vmm.protect(va + PAGE, PAGE, VmmFlags.READ)
        return kernel.page_permissions(va, va + 3 * PAGE)

    kind = "s" if backing else "p"
    assert in_child(child) == ["rw-" + kind, "r--" + kind, "---" + kind]
    assert kernel.page_permissions(va, va + 8 * PAGE) == ["---" + kind] * 8
    assert vmm.query(va).state is PageState.RESERVED


# ---------------------------------------------------------------------------- giving memory back


@faces
def test_a_child_may_not_decommit_shareable_pages_that_it_inherited(vmm: VMM, face: Face) -> None:
    va = region(vmm, SHAREABLE)

    def child() -> list[object]:
        before = kernel.page_permissions(va, va + 8 * PAGE)
        codes = [
            call(vmm, face, "decommit", va, size * PAGE).rc for size in (1, 8) for _ in range(2)
        ]
        vmm._check()
        same = kernel.page_permissions(va, va + 8 * PAGE) == before
        return [codes, same, vmm.read(va, 6).decode()]

    assert in_child(child) == [[int(Retcode.INVALID_OPERATION)] * 4, True, "parent"]
    assert vmm.read(va, 6) == b"parent"
    vmm.decommit(va, 8 * PAGE)
    vmm.commit(va, 8 * PAGE)
    assert vmm.read(va, 6) == bytes(6)


def test_a_child_may_not_decommit_inherited_pages_that_it_committed_itself(vmm: VMM) -> None:
    """They are the parent's all the same: it may have committed them meanwhile."""
    va = vmm.allocate(0, 4 * PAGE, RESERVE | RW | SHAREABLE)

    def question() -> list[int]:
        codes = [outcome(vmm, "decommit", va, PAGE), outcome(vmm, "commit", va, PAGE)]
        return [*codes, outcome(vmm, "decommit", va, PAGE)]

    child = Waiting(question)
    vmm.commit(va, PAGE)
    vmm.write(va, b"parent")
    assert child.answer() == [Retcode.OK, Retcode.OK, Retcode.INVALID_OPERATION]
    assert vmm.read(va, 6) == b"parent"


def test_a_childs_decommit_of_private_pages_leaves_the_parents(vmm: VMM) -> None:
    va = region(vmm, 0)

    def child() -> list[object]:
        vmm.decommit(va, 4 * PAGE)
        vmm.commit(va, 4 * PAGE)
        return [vmm.read(va, 6) == bytes(6), kernel.present_pages(va + PAGE, 1)]

    assert in_child(child) == [True, [False]]
    assert vmm.read(va, 6) == b"parent"


@backings
@pytest.mark.parametrize("end", ["free", "free some", "close", "drop", "leave"])
def test_a_child_that_lets_go_does_not_disturb_its_parent(vmm: VMM, backing: int, end: str) -> None:
    va = region(vmm, backing)
    other = region(vmm, backing)

    def child() -> list[str | None]:
        ends: dict[str, Callable[[], object]] = {
            "free": lambda: vmm.free(va, 8 * PAGE),
            "free some": lambda: vmm.free(va, 2 * PAGE),
            "close": vmm.close,
            "drop": lambda: None,
            "leave": lambda: vmm.__exit__(None, None, None),
        }
        ends[end]()
        vmm._check()
        return kernel.page_permissions(va, va + PAGE)

    gone = None if end != "drop" else "rw-" + ("s" if backing else "p")
    assert in_child(child) == [gone]
    for place in (va, other):
        assert vmm.read(place, 6) == b"parent"
        vmm.write(place, b"after!")
        assert kernel.page_permissions(place, place + PAGE) == ["rw-" + ("s" if backing else "p")]
    vmm._check()
    vmm.query(va)
    vmm.decommit(va, 8 * PAGE)
    vmm.commit(va, 8 * PAGE)
    assert vmm.read(va, 6) == bytes(6)


def test_shareable_pages_that_a_child_made_itself_can_be_decommitted(vmm: VMM) -> None:
    region(vmm, SHAREABLE)

    def child() -> list[object]:
        va = region(vmm, SHAREABLE)
        vmm.decommit(va, 4 * PAGE)
        vmm.commit(va, 4 * PAGE)
        held = kernel.in_core(va, 2)
        grandchild = in_child(lambda: outcome(vmm, "decommit", va, PAGE))
        vmm.write(va, b"x")
        with VMM() as fresh:
            own = region(fresh, SHAREABLE)
            fresh.decommit(own, PAGE)
        return [held, grandchild, outcome(vmm, "decommit", va, PAGE)]

    assert in_child(child) == [[False, False], Retcode.INVALID_OPERATION, Retcode.OK]


# --------------------------------------------------------------------------- buffers and handles


def buffer(vmm: VMM) -> tuple[Handle, int]:
    """A buffer of eight pages that begins with ``parent``, and where it is mapped."""
    handle = vmm.mdl_create(8 * PAGE, RW)
    va = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
    vmm.write(va, b"parent")
    return handle, va


def frames(va: int, pages: int) -> list[int]:
    """The page frame numbers behind pages: zeros for those who may not know them."""
    for page in range(pages):
        ctypes.string_at(va + page * PAGE, 1)
    return [entry & (1 << 55) - 1 for entry in kernel.pagemap(va, pages)]


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


# ------------------------------------------------------------------------------------- query

FALLBACKS = {
    "this kernel": (),
    "no PROCMAP_QUERY": (_features.Feature.PROCMAP_QUERY,),
    "no PAGEMAP_SCAN": (_features.Feature.PAGEMAP_SCAN,),
    "neither": (_features.Feature.PROCMAP_QUERY, _features.Feature.PAGEMAP_SCAN),
}
kernels = pytest.mark.parametrize("missing", FALLBACKS.values(), ids=FALLBACKS.keys())


@kernels
def test_query_in_a_child_answers_about_the_child(
    vmm: VMM, missing: tuple[_features.Feature, ...]
) -> None:
    with _features.without(*missing):
        va = region(vmm, 0)
        vmm.query(va)  # whatever descriptors it keeps, it has from here on

        def child() -> list[object]:
            vmm.allocate(ARENA, 2 * PAGE, COMMIT | FIXED | RW)
            vmm.write(ARENA, b"x")
            vmm.free(va + 4 * PAGE, PAGE)
            foreign = ARENA + 8 * PAGE
            kernel.map_at(foreign, PAGE, kernel.PROT_READ)
            places = (ARENA, ARENA + PAGE, va + 4 * PAGE, foreign)
            infos = [vmm.query(place, smaps=False) for place in places]
            return [[info.kind.name, info.state.name, info.resident] for info in infos]

        assert in_child(child) == [
            ["PRIVATE", "COMMITTED", True],
            ["PRIVATE", "COMMITTED", False],
            ["FREE", "FREE", False],
            ["FOREIGN", "COMMITTED", False],
        ]
        for place in (ARENA, ARENA + 8 * PAGE):
            assert vmm.query(place).kind is PageKind.FREE
        assert vmm.query(va + 4 * PAGE).kind is PageKind.PRIVATE


def record(vmm: VMM, va: int) -> list[int]:
    """Rss, Pss and dirty bytes of the record of ``va``, after Query and the kernel agree."""
    told = vmm.query(va).smaps
    assert told is not None
    (mapping,) = [
        found for found in kernel.smaps() if found.mapping.start <= va < found.mapping.end
    ]
    labels = ("Rss", "Pss", "Private_Dirty")
    figures = [getattr(told, label.lower()) for label in labels]
    assert figures == [mapping.figures[label] for label in labels]
    return figures


def test_the_smaps_record_in_a_child_is_the_childs(vmm: VMM) -> None:
    va = vmm.allocate(ARENA, 8 * PAGE, COMMIT | FIXED | RW)
    vmm.write(va, bytes(2 * PAGE))
    assert record(vmm, va) == [2 * PAGE, 2 * PAGE, 2 * PAGE]

    def child() -> list[list[int]]:
        inherited = record(vmm, va)
        vmm.write(va, bytes(6 * PAGE))
        return [inherited, record(vmm, va)]

    shared, own = in_child(child)
    assert shared == [2 * PAGE, PAGE, 0]
    assert own == [6 * PAGE, 6 * PAGE, 6 * PAGE]
    assert record(vmm, va) == [2 * PAGE, 2 * PAGE, 2 * PAGE]


@backings
def test_locked_pages_are_not_locked_in_a_child(vmm: VMM, backing: int) -> None:
    va = vmm.allocate(0, 4 * PAGE, COMMIT | LOCKED | RW | VmmFlags(backing))

    def locked() -> list[object]:
        answers = [vmm.query(va, smaps).locked for smaps in (False, True)]
        return [*answers, kernel.is_locked(va), kernel.status("VmLck")]

    assert locked() == [True, True, True, 4 * PAGE]
    assert in_child(locked) == [False, False, False, 0]

    def commit_again() -> list[object]:
        vmm.free(va, PAGE)
        own = vmm.allocate(0, 2 * PAGE, COMMIT | LOCKED | RW | VmmFlags(backing))
        return [vmm.query(own).locked, vmm.query(own).resident, vmm.query(va + PAGE).locked]

    assert in_child(commit_again) == [True, True, False]
    assert locked() == [True, True, True, 4 * PAGE]


# ------------------------------------------------------------------------------------- views


@backings
def test_a_view_pins_its_pages_in_the_child_too(vmm: VMM, backing: int) -> None:
    va = region(vmm, backing)
    view = vmm.view(va, PAGE)

    def child() -> list[object]:
        nonlocal view
        before = [outcome(vmm, "free", va, PAGE), outcome(vmm, "protect", va, 8 * PAGE, 1)]
        seen = bytes(view[:6]).decode()
        del view
        return [before, seen, outcome(vmm, "free", va, PAGE)]

    assert in_child(child) == [[Retcode.BUSY, Retcode.BUSY], "parent", Retcode.OK]
    assert outcome(vmm, "free", va, PAGE) is Retcode.BUSY
    assert bytes(view[:6]) == b"parent"
    del view
    vmm.free(va, PAGE)


def test_a_view_outlives_the_closing_of_the_vmm_in_the_child_alone(vmm: VMM) -> None:
    va = region(vmm, 0)
    view = vmm.view(va, PAGE)

    def child() -> list[object]:
        nonlocal view
        vmm.close()
        seen = bytes(view[:6]).decode()
        del view
        return [seen, kernel.page_permissions(va, va + PAGE)]

    assert in_child(child) == ["parent", [None]]
    assert not vmm.closed
    assert bytes(view[:6]) == b"parent"
    del view


# ------------------------------------------------------------------------- further generations


def test_a_grandchild_is_to_its_parent_as_a_child_is(vmm: VMM) -> None:
    private, shared = region(vmm, 0), region(vmm, SHAREABLE)
    vmm.query(private)

    def grandchild() -> list[object]:
        vmm.write(private, b"grand!")
        vmm.write(shared, b"grand!")
        codes = [outcome(vmm, "decommit", shared, PAGE), outcome(vmm, "decommit", private, PAGE)]
        vmm.allocate(ARENA, PAGE, COMMIT | FIXED | RW)
        return [codes, vmm.query(ARENA).kind.name]

    def child() -> list[object]:
        vmm.write(private, b"child!")
        answer = in_child(grandchild)
        contents = [vmm.read(place, 6).decode() for place in (private, shared)]
        return [answer, contents, vmm.query(ARENA).kind.name]

    codes = [Retcode.INVALID_OPERATION, Retcode.OK]
    assert in_child(child) == [[codes, "PRIVATE"], ["child!", "grand!"], "FREE"]
    assert vmm.read(private, 6) == b"parent"
    assert vmm.read(shared, 6) == b"grand!"


def test_siblings_share_what_is_shareable_and_nothing_else(vmm: VMM) -> None:
    private, shared = region(vmm, 0), region(vmm, SHAREABLE)

    def child() -> list[str]:
        contents = [vmm.read(place, 6).decode() for place in (private, shared)]
        for place in (private, shared):
            vmm.write(place, b"child!")
        vmm.close()
        return contents

    assert in_child(child) == ["parent", "parent"]
    assert in_child(child) == ["parent", "child!"]
    assert vmm.read(private, 6) == b"parent"


# ----------------------------------------------------------------- threads, exits, other libraries


def in_own_process(work: Callable[..., None], *arguments: object) -> str:
    """Run a function of this module in a new process, and answer what it wrote to stderr."""
    child = run_child(
        f"from {__name__} import *\n{work.__name__}(*{arguments!r})\nprint('done')",
        environment=TESTS_IMPORTABLE,
        timeout=60,
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.endswith("done\n"), child.stdout
    return child.stderr


def hammer(vmm: VMM, seed: int, stop: threading.Event) -> None:
    """Hold this VMM's mutex, and the list of all mutexes, as often as can be."""
    choose = random.Random(seed)  # noqa: S311
    pages = 128
    va = vmm.allocate(0, pages * PAGE, RESERVE | RW | VmmFlags((0, SHAREABLE)[seed % 2]))
    while not stop.is_set():
        first = choose.randrange(pages)
        size = choose.randrange(1, pages - first + 1) * PAGE
        method = choose.choice(["commit", "commit", "decommit", "query", "short", "write", "view"])
        arguments: tuple[object, ...] = (va + first * PAGE, size)
        if method in {"query", "short"}:
            arguments = (va, method == "query")
            method = "query"
        if method == "write":
            arguments = (va, b"x" * size)
        call(vmm, Face.METHODS, method, *arguments)
        with VMM() as other:
            other.allocate(0, PAGE, COMMIT | RW)


def use(vmm: VMM, shared: int) -> None:
    """Everything a child might do with a VMM that threads of its parent were using."""
    vmm._check()
    assert vmm.query(shared).kind is PageKind.PRIVATE
    va = vmm.allocate(0, 100 * PAGE, COMMIT | RW)
    vmm.write(va, b"child!" * 1000)
    assert vmm.read(va, 6) == b"child!"
    vmm.decommit(va, PAGE)
    vmm.free(va, 100 * PAGE)
    assert outcome(vmm, "decommit", shared, PAGE) is Retcode.INVALID_OPERATION
    with VMM() as other:
        other.write(other.allocate(0, PAGE, COMMIT | RW), b"x")
    vmm._check()
    vmm.close()


def fork_among_threads(forks: int) -> None:
    """Fork while four threads are inside the VMM. A deadlock ends in SIGALRM, here and there."""
    signal.alarm(40)
    warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from Python 3.12 on
    sys.setswitchinterval(1e-5)
    stop = threading.Event()
    with VMM() as vmm:
        shared = region(vmm, SHAREABLE)
        threads = [threading.Thread(target=hammer, args=(vmm, seed, stop)) for seed in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(forks):
                child = os.fork()
                if child == 0:
                    status = 1
                    signal.alarm(20)
                    try:
                        use(vmm, shared)
                        status = 0
                    except BaseException:  # noqa: BLE001  a child must not go on as its parent
                        traceback.print_exc()
                    finally:
                        os._exit(status)
                assert os.waitpid(child, 0)[1] == 0, "a child failed, or hung until SIGALRM"
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert vmm.read(shared, 6) == b"parent"
        vmm._check()


def test_a_child_forked_while_threads_are_inside_the_vmm_can_use_it() -> None:
    in_own_process(fork_among_threads, 300)


def fork_from_every_thread(forks: int) -> None:
    """Four threads fork at once, each while the others are in a call or in a fork."""
    signal.alarm(40)
    warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads, from Python 3.12 on
    sys.setswitchinterval(1e-5)
    failures: list[int] = []
    with VMM() as vmm:
        va = region(vmm, 0)

        def work() -> None:
            for _ in range(forks):
                vmm.write(va, b"parent" * 2000)
                child = os.fork()
                if child == 0:
                    signal.alarm(20)
                    status = 1
                    with contextlib.suppress(BaseException):
                        vmm.query(va)
                        vmm.decommit(va, PAGE)
                        vmm.close()
                        status = 0
                    os._exit(status)
                failures.append(os.waitpid(child, 0)[1])

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == [0] * 4 * forks
        assert vmm.read(va, 6) == b"parent"


def test_threads_that_fork_at_the_same_time_get_children_that_work() -> None:
    in_own_process(fork_from_every_thread, 40)


def leave_open(how: str) -> None:
    """A child that ends with its parent's VMM open, and one of its own."""
    vmm = VMM()
    va = region(vmm, SHAREABLE)
    child = os.fork()
    if child == 0:
        if how == "_exit":
            os._exit(0)
        if how == "dropped":
            del vmm
            gc.collect()
        if how == "its own":
            VMM().__enter__()
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert vmm.read(va, 6) == b"parent"
    vmm.close()


@pytest.mark.parametrize("how", ["_exit", "exit", "dropped"])
def test_a_child_does_not_warn_of_its_parents_open_vmm(how: str) -> None:
    assert "ResourceWarning" not in in_own_process(leave_open, how)


def test_a_child_warns_of_an_open_vmm_that_it_made_itself() -> None:
    assert "was never closed" in in_own_process(leave_open, "its own")


def use_multiprocessing() -> None:
    """A process of multiprocessing's fork context, and a pool of them."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    with VMM() as vmm:
        private, shared = region(vmm, 0), region(vmm, SHAREABLE)
        ours, theirs = context.Pipe()

        def work() -> None:
            vmm.write(private, b"child!")
            vmm.write(shared + PAGE, b"child!")
            theirs.send((vmm.read(shared, 6), outcome(vmm, "decommit", shared, PAGE)))

        process = context.Process(target=work)
        process.start()
        assert ours.recv() == (b"parent", Retcode.INVALID_OPERATION)
        process.join()
        assert process.exitcode == 0
        assert vmm.read(private, 6) == b"parent"
        assert vmm.read(shared + PAGE, 6) == b"child!"


def test_multiprocessing_with_fork_works() -> None:
    assert in_own_process(use_multiprocessing) == ""


def exec_after_fork() -> None:
    """Nothing of a VMM goes through exec."""
    import subprocess

    with VMM() as vmm:
        vmm.query(region(vmm, SHAREABLE))
        listing = (
            "import os; print([os.readlink(f'/proc/self/fd/{n}') for n in range(3, 20)"
            " if os.path.exists(f'/proc/self/fd/{n}')])"
        )
        child = subprocess.run(
            [sys.executable, "-c", listing],
            check=True,
            capture_output=True,
            text=True,
            close_fds=False,
        )
        assert "memfd" not in child.stdout
        assert "/proc/" not in child.stdout


def test_no_descriptor_of_a_vmm_goes_through_exec() -> None:
    in_own_process(exec_after_fork)


def test_a_raw_pointer_in_a_child_sees_the_childs_page(vmm: VMM) -> None:
    va = region(vmm, 0)

    def child() -> str:
        ctypes.memmove(va, b"child!", 6)
        return vmm.read(va, 6).decode()

    assert in_child(child) == "child!"
    assert ctypes.string_at(va, 6) == b"parent"

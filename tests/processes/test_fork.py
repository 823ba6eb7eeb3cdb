"""A VMM across fork: what is copied, what stays shared, and that nobody disturbs anybody."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import FIXED, LOCKED, RESERVE, RESERVE_COMMIT, RW, SHAREABLE
from faces import Face, call
from forked import Waiting, in_child
from inherited import outcome, region
from kernel_oracle import ARENA, PAGE
from refusals import faces
from vmm_linux import VMM, PageKind, PageState, Retcode, VmmFlags
from vmm_linux._core import kernel as core

if TYPE_CHECKING:
    from collections.abc import Callable


backings = pytest.mark.parametrize("backing", [0, SHAREABLE], ids=["private", "SHAREABLE"])


# ---- copied and shared ---------------------------------------------------------------------------


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


# ---- giving memory back --------------------------------------------------------------------------


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


# ---- query ---------------------------------------------------------------------------------------

FALLBACKS = {
    "this kernel": (),
    "no PROCMAP_QUERY": (core.Feature.PROCMAP_QUERY,),
    "no PAGEMAP_SCAN": (core.Feature.PAGEMAP_SCAN,),
    "neither": (core.Feature.PROCMAP_QUERY, core.Feature.PAGEMAP_SCAN),
}
kernels = pytest.mark.parametrize("missing", FALLBACKS.values(), ids=FALLBACKS.keys())


@kernels
def test_query_in_a_child_answers_about_the_child(
    vmm: VMM, missing: tuple[core.Feature, ...]
) -> None:
    with core.without(*missing):
        va = region(vmm, 0)
        vmm.query(va)  # whatever descriptors it keeps, it has from here on

        def child() -> list[object]:
            vmm.allocate(ARENA, 2 * PAGE, RESERVE_COMMIT | FIXED | RW)
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
    va = vmm.allocate(ARENA, 8 * PAGE, RESERVE_COMMIT | FIXED | RW)
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
    va = vmm.allocate(0, 4 * PAGE, RESERVE_COMMIT | LOCKED | RW | VmmFlags(backing))

    def locked() -> list[object]:
        answers = [vmm.query(va, smaps).locked for smaps in (False, True)]
        return [*answers, kernel.is_locked(va), kernel.status("VmLck")]

    assert locked() == [True, True, True, 4 * PAGE]
    assert in_child(locked) == [False, False, False, 0]

    def commit_again() -> list[object]:
        vmm.free(va, PAGE)
        own = vmm.allocate(0, 2 * PAGE, RESERVE_COMMIT | LOCKED | RW | VmmFlags(backing))
        return [vmm.query(own).locked, vmm.query(own).resident, vmm.query(va + PAGE).locked]

    assert in_child(commit_again) == [True, True, False]
    assert locked() == [True, True, True, 4 * PAGE]


# ---- views ---------------------------------------------------------------------------------------


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


# ---- further generations -------------------------------------------------------------------------


def test_a_grandchild_is_to_its_parent_as_a_child_is(vmm: VMM) -> None:
    private, shared = region(vmm, 0), region(vmm, SHAREABLE)
    vmm.query(private)

    def grandchild() -> list[object]:
        vmm.write(private, b"grand!")
        vmm.write(shared, b"grand!")
        codes = [outcome(vmm, "decommit", shared, PAGE), outcome(vmm, "decommit", private, PAGE)]
        vmm.allocate(ARENA, PAGE, RESERVE_COMMIT | FIXED | RW)
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

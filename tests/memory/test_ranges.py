"""Many ranges in one call: all of them, or none."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import kernel_oracle as kernel
from constants import CHUNK, RESERVE_FIXED, RW
from guarding import RULES, rule
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, Limits, PageState, Retcode, VmmError, VmmFlags
from vmm_linux._core.kernel import Feature, without

if TYPE_CHECKING:
    from collections.abc import Iterator

BOTH = pytest.mark.parametrize("method", ["commit_ranges", "decommit_ranges"])


@pytest.fixture(params=RULES)
def vmm(request: pytest.FixtureRequest) -> Iterator[VMM]:
    """A VMM that takes guards always, where it is crowded, never."""
    with rule(*RULES[request.param]), VMM(limits=Limits.unlimited()) as instance:
        yield instance


def picture(vmm: VMM, low: int, high: int) -> tuple[object, ...]:
    """All that a call over these pages could change."""
    vmm._check()
    pages = range(low, high, PAGE)
    states = [vmm.query(va, smaps=False).state for va in pages]
    held = [
        vmm.read(va, PAGE)
        for va, state in zip(pages, states, strict=True)
        if state is PageState.COMMITTED
    ]
    return states, held, kernel.page_permissions(low, high)


def every_other(pages: int, start: int = ARENA) -> list[tuple[int, int]]:
    """Single pages with a gap after each, in no order."""
    ranges = [(start + 2 * page * PAGE, PAGE) for page in range(pages)]
    random.Random(1).shuffle(ranges)  # noqa: S311
    return ranges


def refused(vmm: VMM, method: str, ranges: Any) -> Retcode:  # noqa: ANN401
    """The return code with which a call fails, which changes nothing."""
    before = picture(vmm, ARENA, ARENA + 64 * PAGE)
    with pytest.raises(VmmError) as caught:
        getattr(vmm, method)(ranges)
    assert caught.value.method == method
    assert caught.value.completed == 0
    assert picture(vmm, ARENA, ARENA + 64 * PAGE) == before
    return caught.value.rc


def test_every_range_is_committed_and_decommitted(vmm: VMM) -> None:
    vmm.allocate(ARENA, 3 * CHUNK, RESERVE_FIXED | RW)
    ranges = every_other(600)
    vmm.commit_ranges(ranges)
    assert kernel.page_permissions(ARENA, ARENA + 1200 * PAGE) == ["rw-p", "---p"] * 600
    for va, _ in ranges:
        vmm.write(va, b"\xff" * PAGE)
    vmm.commit_ranges(ranges)
    assert vmm.read(ARENA, PAGE) == b"\xff" * PAGE
    vmm.decommit_ranges(ranges)
    assert kernel.page_permissions(ARENA, ARENA + 1200 * PAGE) == ["---p"] * 1200
    assert not any(kernel.present_pages(ARENA, 1200))
    assert len(kernel.maps_between(ARENA, ARENA + 3 * CHUNK)) == 1
    vmm.commit_ranges(ranges)
    assert vmm.read(ARENA, PAGE) == bytes(PAGE)


def test_ranges_of_several_regions_and_kinds_go_together(vmm: VMM) -> None:
    flags = [RW, RW | VmmFlags.LOCKED, RW | VmmFlags.SHAREABLE, RW | VmmFlags.HUGE]
    bases = [ARENA + 2 * number * CHUNK for number in range(len(flags))]
    for base, flag in zip(bases, flags, strict=True):
        vmm.allocate(base, CHUNK, RESERVE_FIXED | flag)
    ranges = [pair for base in bases for pair in every_other(8, base)]
    vmm.commit_ranges(ranges)
    for va, _ in ranges:
        vmm.write(va, b"x")
    assert kernel.is_locked(bases[1])
    vmm.decommit_ranges([(base, 16 * PAGE) for base in bases])
    vmm.commit_ranges(ranges)
    assert {vmm.read(va, 1) for va, _ in ranges} == {b"\0"}


@BOTH
def test_no_range_at_all_is_fine(vmm: VMM, method: str) -> None:
    getattr(vmm, method)([])
    getattr(vmm, method)(iter(()))


@BOTH
def test_whatever_gives_pairs_of_integers_will_do(vmm: VMM, method: str) -> None:
    vmm.allocate(ARENA, 8 * PAGE, RESERVE_FIXED | RW)
    getattr(vmm, method)(np.array([[ARENA, PAGE], [ARENA + 2 * PAGE, PAGE]], dtype=np.uint64))
    getattr(vmm, method)((va, PAGE) for va in (ARENA, ARENA + PAGE))
    getattr(vmm, method)([[ARENA, np.int64(PAGE)]])


@BOTH
@pytest.mark.parametrize(
    "ranges",
    [
        None,
        7,
        [7],
        [None],
        [(ARENA,)],
        [(ARENA, PAGE, 0)],
        ["ab"],
        [(ARENA, 0)],
        [(ARENA, -PAGE)],
        [(ARENA, 1.0 * PAGE)],
        [(ARENA, True)],
        [(ARENA, PAGE + 1)],
        [(ARENA + 1, PAGE)],
        [(2**64, PAGE)],
        [(2**64 - PAGE, PAGE)],
        [(ARENA, PAGE), (ARENA, PAGE)],
        [(ARENA, 4 * PAGE), (ARENA + 3 * PAGE, PAGE)],
        [(ARENA + PAGE, PAGE), (ARENA, 4 * PAGE)],
    ],
)
def test_bad_ranges_are_an_invalid_argument(
    vmm: VMM,
    method: str,
    ranges: Any,  # noqa: ANN401
) -> None:
    vmm.allocate(ARENA, 64 * PAGE, RESERVE_FIXED | RW)
    vmm.commit(ARENA + PAGE, PAGE)
    assert refused(vmm, method, ranges) is Retcode.INVALID_ARGUMENT


@BOTH
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_range_outside_among_a_thousand_changes_nothing(
    vmm: VMM, method: str, place: int
) -> None:
    vmm.allocate(ARENA, CHUNK, RESERVE_FIXED | RW)
    vmm.allocate(ARENA + 2 * CHUNK, 4 * CHUNK, RESERVE_FIXED | RW)
    vmm.commit(ARENA, 32 * PAGE)
    vmm.write(ARENA, b"\xff" * 32 * PAGE)
    ranges = [*every_other(30), *every_other(970, ARENA + 2 * CHUNK)]
    for bad in [(ARENA + CHUNK, PAGE), (ARENA + CHUNK - PAGE, 2 * PAGE), (PAGE, PAGE)]:
        assert (
            refused(vmm, method, [*ranges[:place], bad, *ranges[place:]])
            is Retcode.RESOURCE_NOT_FOUND
        )


def test_one_page_in_view_among_a_thousand_ranges_changes_nothing(vmm: VMM) -> None:
    vmm.allocate(ARENA, 4 * CHUNK, RESERVE_FIXED | RW)
    ranges = every_other(1000)
    vmm.commit_ranges(ranges)
    vmm.write(ARENA, b"kept")
    view = vmm.view(ARENA + 100 * PAGE, PAGE)
    assert refused(vmm, "decommit_ranges", ranges) is Retcode.BUSY
    del view
    vmm.decommit_ranges(ranges)
    assert vmm.query(ARENA).state is PageState.RESERVED


def test_a_refused_commit_takes_back_what_was_committed_before_it(vmm: VMM) -> None:
    vmm.allocate(ARENA, 64 * PAGE, RESERVE_FIXED | RW)
    vmm.commit(ARENA + 10 * PAGE, PAGE)
    vmm.write(ARENA + 10 * PAGE, b"old")
    huge = vmm.allocate(0, 1 << 44, VmmFlags.RESERVE | RW)
    ranges = [*every_other(32), (huge, 1 << 44)]
    assert refused(vmm, "commit_ranges", ranges) is Retcode.OUT_OF_MEMORY
    assert vmm.read(ARENA + 10 * PAGE, 3) == b"old"


def test_a_kernel_without_the_vectored_call_does_the_same(vmm: VMM) -> None:
    with without(Feature.VECTORED_GUARDS):
        test_every_range_is_committed_and_decommitted(vmm)


def test_ranges_that_make_a_chunk_crowded_open_it_before_the_first_is_committed() -> None:
    crowd = (8, 1 << 40)
    for islands, mappings in ((crowd[0], 2 * crowd[0]), (crowd[0] + 1, 1)):
        with rule(*crowd), VMM() as vmm:
            vmm.allocate(ARENA, CHUNK, RESERVE_FIXED | RW)
            vmm.commit_ranges(every_other(islands))
            assert len(kernel.maps_between(ARENA, ARENA + CHUNK)) == mappings


def test_a_closed_vmm_takes_no_ranges(vmm: VMM) -> None:
    vmm.close()
    for method in (vmm.commit_ranges, vmm.decommit_ranges):
        with pytest.raises(VmmError) as caught:
            method([(ARENA, PAGE)])
        assert caught.value.rc is Retcode.INVALID_OPERATION

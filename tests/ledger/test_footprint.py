"""What the ledger and its regions cost, in memory and in mappings.

The functions that are not tests are what children do.
"""

from __future__ import annotations

import ctypes
import random
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from constants import LOCKED, READ, RESERVE, RW, SHAREABLE
from kernel_oracle import ARENA, PAGE
from vmm_linux import VMM, PageKind, PageState, VmmFlags
from vmm_linux._core.ledger import Ledger
from walls import EXACT_HEAP, MEBI, heap_used, in_own_process, steady_heap

if TYPE_CHECKING:
    from collections.abc import Callable


def many_regions() -> None:
    """A hundred thousand at once, each known, each freed."""
    steady_heap()
    count = 100_000
    choose = random.Random(4)  # noqa: S311
    before = kernel.mapping_count()
    # The kernel fills the holes between libraries first, of which it leaves more or less.
    holes = sum(one.end < next_one.start for one, next_one in pairwise(kernel.maps()))
    with VMM() as vmm:
        bases = [vmm.allocate(0, 2 * PAGE, RESERVE | RW) for _ in range(count)]
        assert len(set(bases)) == count
        assert kernel.mapping_count() - before <= holes, "neighbours did not merge"
        for base in bases:
            info = vmm.query(base + PAGE, smaps=False)
            assert (info.state, info.base, info.size) == (PageState.RESERVED, base, 2 * PAGE)
        vmm._check()
        choose.shuffle(bases)
        for base in bases[: count // 2]:
            vmm.free(base, 2 * PAGE)
        for base in bases[: count // 2]:
            assert vmm.query(base, smaps=False).kind is PageKind.FREE
        vmm._check()
        for base in bases[count // 2 :]:
            vmm.commit(base, PAGE)
            vmm.write(base, b"x")
            vmm.free(base, 2 * PAGE)
        assert kernel.mapping_count() == before
        assert all(vmm.query(base, smaps=False).kind is PageKind.FREE for base in bases)


def test_a_hundred_thousand_reserved_regions_are_alive_at_once() -> None:
    in_own_process(many_regions)


def footprint() -> tuple[int, int]:
    """How many mappings there are, and the commit charge; both without the heap."""
    records = [record for record in kernel.smaps() if record.mapping.pathname != "[heap]"]
    charge = sum(record.figures["Size"] for record in records if "ac" in record.vm_flags)
    return len(records), charge


def cycles(seed: int, extra: int) -> None:
    """Ten thousand random commits, touches and decommits."""
    steady_heap()
    choose = random.Random(seed)  # noqa: S311
    pages = 256
    with VMM() as vmm:
        va = vmm.allocate(0, pages * PAGE, RESERVE | RW | VmmFlags(extra))
        before = footprint()
        for turn in range(10_000):
            first = choose.randrange(pages)
            count = choose.randrange(1, min(16, pages - first) + 1)
            vmm.commit(va + first * PAGE, count * PAGE)
            touched = va + (first + choose.randrange(count)) * PAGE
            ctypes.memset(touched, turn & 0xFF, PAGE)
            if turn % 3:
                vmm.decommit(va + first * PAGE, count * PAGE)
            if turn % 250 == 249:
                vmm.decommit(va, pages * PAGE)
                assert footprint() == before
                assert not any(kernel.present_pages(va, pages))
        assert footprint() == before
        vmm.commit(va, pages * PAGE)
        assert vmm.read(va, pages * PAGE) == bytes(pages * PAGE)


@pytest.mark.parametrize(
    "extra", [0, int(SHAREABLE), int(LOCKED), int(VmmFlags.HUGE)], ids=lambda f: str(VmmFlags(f))
)
def test_ten_thousand_cycles_leave_mappings_and_charge_where_they_were(extra: int) -> None:
    in_own_process(cycles, 7, extra)


def bytes_per_run() -> None:
    """A hundred thousand runs, in the ledger alone and behind a VMM."""
    runs = 100_000
    ledger = Ledger()
    assert ledger.add(ARENA, runs * PAGE)
    before = heap_used()
    for page in range(1, runs, 2):
        assert ledger.try_isolate(ARENA + page * PAGE, ARENA + (page + 1) * PAGE)
        ledger.set_state(ARENA + page * PAGE, ARENA + (page + 1) * PAGE, PageState.COMMITTED)
    used = heap_used() - before
    assert len(ledger.listing()) == runs
    ledger.check()
    assert 0 < used <= 100 * runs, used / runs
    ledger.set_state(ARENA, ARENA + runs * PAGE, PageState.RESERVED)
    assert heap_used() - before < 1000, "runs that merged were kept"


def bytes_per_run_of_a_vmm() -> None:
    """Reserved pages of alternate protections, which the kernel keeps in one mapping."""
    runs = 100_000
    with VMM() as vmm:
        va = vmm.allocate(0, runs * PAGE, RESERVE | RW)
        before = heap_used()
        for page in range(0, runs, 2):
            vmm.protect(va + page * PAGE, PAGE, READ)
        assert 0 < heap_used() - before <= 100 * runs
        info = vmm.query(va + 5 * PAGE, smaps=False)
        assert (info.run_start, info.run_end) == (va + 5 * PAGE, va + 6 * PAGE)
        vmm.protect(va, runs * PAGE, RW)
        assert heap_used() - before < 1000


@pytest.mark.parametrize("work", [bytes_per_run, bytes_per_run_of_a_vmm], ids=["ledger", "VMM"])
def test_a_run_costs_at_most_a_hundred_bytes(work: Callable[[], None]) -> None:
    in_own_process(work, heap=EXACT_HEAP)


def cost_of_region(vmm: VMM, size: int) -> tuple[int, int]:
    """Heap and page tables that a region takes of which pages were in use, in bytes."""
    page_tables = kernel.status("VmPTE")
    before = heap_used()
    va = vmm.allocate(0, size, RESERVE | RW)
    for offset in (0, size // 2 // PAGE * PAGE, size - PAGE):
        vmm.commit(va + offset, PAGE)
        vmm.decommit(va + offset, PAGE)
    vmm.protect(va, size, READ)
    info = vmm.query(va + size // 2, smaps=False)
    assert (info.run_start, info.run_end) == (va, va + size)
    used = heap_used() - before
    return used, kernel.status("VmPTE") - page_tables


#: malloc reuses a free chunk that is up to this many bytes larger than what is asked for.
CHUNK_MAY_BE_LARGER = 64


def the_largest_region() -> None:
    """Sixty-four tebibytes beside one page."""
    size = 64 << 40
    big, small = Ledger(), Ledger()
    before = heap_used()
    assert small.add(ARENA, PAGE)
    after_small = heap_used()
    assert big.add(ARENA, size)
    assert heap_used() - after_small <= after_small - before + CHUNK_MAY_BE_LARGER
    assert len(big.listing()) == len(small.listing()) == 1
    with VMM() as vmm:
        cost_of_region(vmm, PAGE)  # what is made once is made here
        of_page = cost_of_region(vmm, PAGE)
        of_tebibytes = cost_of_region(vmm, size)
        assert of_tebibytes[0] <= of_page[0] + CHUNK_MAY_BE_LARGER, "more for a larger region"
        assert of_tebibytes[1] < MEBI


def test_a_region_of_64_tebibytes_costs_as_little_as_one_of_a_page() -> None:
    in_own_process(the_largest_region, heap=EXACT_HEAP)

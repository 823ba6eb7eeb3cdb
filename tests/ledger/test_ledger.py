"""The ledger beside a plain model, and what it costs."""

import gc
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

from vmm_linux._core.ledger import Ledger, set_leaf_limit
from vmm_linux.states import PageState

PAGE = 0x1000
RESERVED, COMMITTED = PageState.RESERVED, PageState.COMMITTED


class Page(NamedTuple):
    """What the model knows of a page."""

    region: int
    state: int
    protection: int
    pins: int


class LedgerMachine(RuleBasedStateMachine):
    """Drives a ledger beside a dictionary of pages."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.pages: dict[int, Page] = {}
        self.pinned: list[tuple[int, int]] = []

    @override
    def teardown(self) -> None:
        set_leaf_limit()

    @rule(entries=st.sampled_from([1, 2, 3, 1000]))
    def limit_leaves(self, entries: int) -> None:
        """Leaves that hold fewer entries, or more again: nobody may notice."""
        set_leaf_limit(entries)

    def region_ends(self) -> dict[int, int]:
        """The end of every region, by its base, in pages."""
        ends: dict[int, int] = {}
        for number, page in self.pages.items():
            ends[page.region] = max(ends.get(page.region, 0), number + 1)
        return ends

    def range_in_a_region(self, data: st.DataObject) -> tuple[int, int]:
        """Some pages of one region."""
        base, end = data.draw(st.sampled_from(sorted(self.region_ends().items())))
        start = data.draw(st.integers(base, end - 1))
        return start, data.draw(st.integers(start + 1, end))

    def change(self, start: int, end: int, **fields: int) -> None:
        """Change pages of the model."""
        for number in range(start, end):
            self.pages[number] = self.pages[number]._replace(**fields)

    @rule(base=st.integers(1, 60), size=st.integers(1, 12), protection=st.sampled_from([0, 1, 3]))
    def insert(self, base: int, size: int, protection: int) -> None:
        """Enter a region where nothing is."""
        if any(number in self.pages for number in range(base, base + size)):
            return
        assert self.ledger.add(base * PAGE, size * PAGE, protection)
        for number in range(base, base + size):
            self.pages[number] = Page(base, RESERVED, protection, 0)

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), state=st.sampled_from([RESERVED, COMMITTED]))
    def set_state(self, data: st.DataObject, state: int) -> None:
        """Change the state of some pages."""
        start, end = self.range_in_a_region(data)
        assert self.ledger.try_isolate(start * PAGE, end * PAGE)
        self.ledger.set_state(start * PAGE, end * PAGE, state)
        self.change(start, end, state=state)

    @precondition(lambda self: self.pages)
    @rule(data=st.data(), protection=st.sampled_from([0, 1, 3, 5, 7]))
    def set_protection(self, data: st.DataObject, protection: int) -> None:
        """Change the protection of some pages."""
        start, end = self.range_in_a_region(data)
        assert self.ledger.try_isolate(start * PAGE, end * PAGE)
        self.ledger.set_protection(start * PAGE, end * PAGE, protection)
        self.change(start, end, protection=protection)

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def isolate_and_think_again(self, data: st.DataObject) -> None:
        """Cutting runs means nothing by itself."""
        start, end = self.range_in_a_region(data)
        assert self.ledger.try_isolate(start * PAGE, end * PAGE)
        self.ledger.coalesce(start * PAGE, end * PAGE)

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        """Hold some pages."""
        start, end = self.range_in_a_region(data)
        assert self.ledger.try_pin(start * PAGE, end * PAGE)
        for number in range(start, end):
            self.change(number, number + 1, pins=self.pages[number].pins + 1)
        self.pinned.append((start, end))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        """Let go of pages held before."""
        start, end = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.ledger.unpin(start * PAGE, end * PAGE)
        for number in range(start, end):
            self.change(number, number + 1, pins=self.pages[number].pins - 1)

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def split_and_join(self, data: st.DataObject) -> None:
        """A split that is undone leaves one region."""
        start, _ = self.range_in_a_region(data)
        if start == self.pages[start].region:
            return
        assert self.ledger.try_split(start * PAGE)
        assert start * PAGE in {row[0] for row in self.ledger.listing()}
        self.ledger.undo_split(start * PAGE)

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        """Forget some pages; in the middle, one region becomes two."""
        start, end = self.range_in_a_region(data)
        if any(self.pages[number].pins for number in range(start, end)):
            return
        region = self.pages[start].region
        region_end = self.region_ends()[region]
        assert self.ledger.try_isolate(start * PAGE, end * PAGE)
        if end < region_end:
            assert self.ledger.try_split(end * PAGE)
        self.ledger.remove(start * PAGE, end * PAGE)
        for number in range(start, end):
            del self.pages[number]
        self.change(end, region_end, region=end)

    @invariant()
    def the_listing_is_the_model(self) -> None:
        """Every page of every run is what the model says, and the invariants hold."""
        self.ledger.check()
        listed = {
            number: Page(base // PAGE, state, protection, pins)
            for base, start, end, state, protection, pins in self.ledger.listing()
            for number in range(start // PAGE, end // PAGE)
        }
        assert listed == self.pages

    @invariant()
    def holds_says_what_lies_in_one_region(self) -> None:
        """A range is held if all of its pages are of one region."""
        for start in range(0, 72, 5):
            for size in (1, 3, 8):
                regions = {
                    self.pages[number].region if number in self.pages else None
                    for number in range(start, start + size)
                }
                held = len(regions) == 1 and None not in regions
                assert self.ledger.holds(start * PAGE, size * PAGE) == held


TestLedgerMachine = LedgerMachine.TestCase


def resident() -> int:
    """Bytes of this process that are resident."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE


def test_a_run_costs_at_most_100_bytes() -> None:
    """Two hundred thousand runs, counted by the kernel."""
    pages = 200_000
    ledger = Ledger()
    assert ledger.add(PAGE, pages * PAGE)
    gc.collect()
    before = resident()
    for number in range(1, pages, 2):
        start = number * PAGE
        assert ledger.try_isolate(start, start + PAGE)
        ledger.set_state(start, start + PAGE, COMMITTED)
    grown = resident() - before
    assert len(ledger.listing()) == pages
    assert grown / pages <= 100


def test_a_region_of_64_tib_is_one_run() -> None:
    """Size costs nothing."""
    ledger = Ledger()
    assert ledger.add(PAGE, 1 << 46)
    assert ledger.try_isolate(1 << 45, (1 << 45) + PAGE)
    ledger.set_state(1 << 45, (1 << 45) + PAGE, COMMITTED)
    assert len(ledger.listing()) == 3
    ledger.check()


def test_check_names_a_broken_invariant() -> None:
    """Two neighbours that say the same are a defect, and told as one."""
    ledger = Ledger()
    assert ledger.add(PAGE, 4 * PAGE)
    assert ledger.try_isolate(2 * PAGE, 3 * PAGE)
    with pytest.raises(AssertionError, match="two runs that should be one at 0x2000"):
        ledger.check()

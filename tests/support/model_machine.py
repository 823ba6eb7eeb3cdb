"""Every call over regions, beside the plain model: what all the state machines have in common.

A machine has sides: each is a VMM in some process, with its model. After each step the kernel's
permissions page by page, the memory files behind them, the contents, the memory held and Query's
answers are what the models say, and nothing outside has changed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

import kernel_oracle as kernel
from constants import PERMISSIONS
from faces import Face
from guarding import RULES
from kernel_oracle import ARENA, PAGE, USER_SPACE_END
from mdl_model import MdlModel
from model import LOWEST, Answer, Page, Region
from model_memory import ZEROS, Buffer, Memory
from model_servant import Look
from vmm_linux import PageKind, PageState, Retcode, VmmFlags

if TYPE_CHECKING:
    from model_servant import Info, Peer, Servant, Sight

ARENA_PAGES = 96
ARENA_END = ARENA + ARENA_PAGES * PAGE
#: Foreign pages in the arena, by slot, with their protection.
FOREIGN = {20: kernel.PROT_READ, 45: kernel.PROT_READ | kernel.PROT_WRITE, 70: kernel.PROT_NONE}
PATTERN = bytes(range(251)) * (33 * PAGE // 251 + 1)
MOST_REGIONS = 10

EXTRAS = (
    VmmFlags.COMMIT,
    VmmFlags.LOCKED,
    VmmFlags.LOW_GUARD,
    VmmFlags.HIGH_GUARD,
    VmmFlags.GROW_DOWN,
    VmmFlags.WRITE_BACK,
    VmmFlags.HUGE,
    VmmFlags.SHAREABLE,
)


class Span(NamedTuple):
    """A drawn range: ``length`` pages from page ``first`` of some region, or sticking out of it."""

    pick: int
    first: int
    length: int
    how: str


class Pin(NamedTuple):
    """A view, or only what keeps its pages pinned, that a servant keeps by this key."""

    key: int
    start: int
    size: int
    writable: bool
    pages: list[Page]


@dataclass
class Side:
    """A VMM, the model of it, and the views that were taken of it."""

    servant: Servant | Peer
    model: MdlModel
    pins: list[Pin] = field(default_factory=list)
    files: list[kernel.Mapping] = field(default_factory=list)


class Seen(NamedTuple):
    """What the kernel has behind one page: access, and which page of which file."""

    permissions: str
    inode: int = 0
    offset: int = 0


SIDES = st.integers(0, 1)
SPANS = st.builds(
    Span,
    st.integers(0, MOST_REGIONS - 1),
    st.integers(-2, 33),
    st.integers(0, 33),
    st.sampled_from(["whole", "inside", "inside", "inside", "inside", "anywhere"]),
)
FACES = st.sampled_from(Face)
PROTECTIONS = st.sampled_from([0, 1, 3, 3, 3, 5, 7, 2, 4, 6])
PLACES = st.sampled_from(["fixed", "fixed", "fixed", "hint", "chosen", "taken"])
ODD_FLAGS = [0, 0, 0, 0, 0, 0, 0, 0, 1 << 31, 1 << 3, int(VmmFlags.WRITE_COMBINE), -(1 << 40)]
ODD_NUMBERS = st.sampled_from(
    [
        0,
        1,
        PAGE - 1,
        PAGE,
        LOWEST,
        ARENA,
        ARENA + 1,
        ARENA + 20 * PAGE,
        USER_SPACE_END - PAGE,
        USER_SPACE_END,
        (1 << 63) - PAGE,
        1 << 63,
        (1 << 64) - PAGE,
        (1 << 64) - 1,
        1 << 64,
        -1,
        -PAGE,
    ]
)
HOLDERS = st.sampled_from(["view", "object", "slice", "cast"])


class RegionMachine(RuleBasedStateMachine):
    """Some VMMs and their models, driven by rules."""

    steps: ClassVar[int] = 0
    #: Of a region that Allocate makes.
    most_pages: ClassVar[int] = 32

    @classmethod
    def surroundings(cls) -> AbstractContextManager[object]:
        """What must be there while the machine runs, however often."""
        return nullcontext()

    def __init__(self) -> None:
        super().__init__()
        self.tick = 0
        models = [
            MdlModel(foreign={ARENA + slot * PAGE for slot in FOREIGN}) for _ in self.servants()
        ]
        self.sides = [Side(*pair) for pair in zip(self.servants(), models, strict=True)]
        for side in self.sides:
            side.model.world = models
            side.servant.start({ARENA + slot * PAGE: access for slot, access in FOREIGN.items()})
            side.files = side.servant.mapped_files()

    def servants(self) -> list[Servant | Peer]:
        """Who does what the rules say."""
        raise NotImplementedError

    def side(self, which: int) -> Side:
        """The side that a drawn number means."""
        return self.sides[which % len(self.sides)]

    # -------------------------------------------------------------------------- ranges

    @staticmethod
    def resolve(side: Side, span: Span) -> tuple[int, int]:
        """The addresses that a drawn span means now."""
        regions = side.model.regions
        if not regions:
            return ARENA + span.first * PAGE, span.length * PAGE
        region = regions[span.pick % len(regions)]
        if span.how == "whole":
            return region.base, region.size
        if span.how == "anywhere":
            return region.base + span.first * PAGE, span.length * PAGE
        first = span.first % len(region.pages)
        count = 1 + span.length % (len(region.pages) - first)
        return region.base + first * PAGE, count * PAGE

    def resolve_bytes(self, side: Side, span: Span, skip: int, trim: int) -> tuple[int, int]:
        """The same with ends inside pages."""
        va, size = self.resolve(side, span)
        return va + skip, max(0, size - skip - trim)

    @staticmethod
    def resolve_place(side: Side, place: str, slot: int) -> tuple[int, int]:
        """The address that a drawn place means now, and FIXED where it must be this one."""
        addr = 0 if place == "chosen" else ARENA + slot * PAGE
        if place == "taken" and side.model.regions:
            region = side.model.regions[slot % len(side.model.regions)]
            addr = region.outer[0] if slot % 2 else region.base
        return addr, int(VmmFlags.FIXED) if place in ("fixed", "taken") else 0

    # --------------------------------------------------------------------------- rules

    @rule(name=st.sampled_from(sorted(RULES)))
    def take_guards(self, name: str) -> None:
        """Another rule for the way to commit, in the middle of it all: nobody may notice."""
        for side in self.sides:
            side.servant.take_guards(*RULES[name])

    @rule(entries=st.sampled_from([1, 3, 1000]))
    def limit_leaves(self, entries: int) -> None:
        """Leaves of the ledger that hold fewer entries, or more again: nobody may notice."""
        for side in self.sides:
            side.servant.limit_leaves(entries)

    @precondition(lambda self: any(len(s.model.regions) < MOST_REGIONS for s in self.sides))
    @rule(
        which=SIDES,
        face=FACES,
        slot=st.integers(0, ARENA_PAGES - 1),
        pages=st.integers(0, 32),
        protection=PROTECTIONS,
        extras=st.integers(0, (1 << len(EXTRAS)) - 1),
        odd=st.sampled_from(ODD_FLAGS),
        place=PLACES,
    )
    def allocate(  # noqa: PLR0917  (the drawn values go by name)
        self,
        which: int,
        face: Face,
        slot: int,
        pages: int,
        protection: int,
        extras: int,
        odd: int,
        place: str,
    ) -> None:
        """At a place, near one, anywhere, or where something is already."""
        side = self.side(which)
        if len(side.model.regions) >= MOST_REGIONS:
            return
        addr, fixed = self.resolve_place(side, place, slot)
        flags = int(VmmFlags.RESERVE) | protection | odd | fixed
        for bit, extra in enumerate(EXTRAS):
            flags |= extra * (extras >> bit & 1)
        pages = min(pages, self.most_pages)
        if place == "fixed":
            pages = min(pages, max((ARENA_END - addr) // PAGE - 1, 1))
        size = pages * PAGE

        expected, where = side.model.allocate(addr, size, flags)
        got = side.servant.call(face, "allocate", addr, size, flags)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        if expected is Retcode.OK:
            self.placed_well(side, got.value, where, size, flags)
            side.model.allocated(got.value, size, flags)

    @staticmethod
    def placed_well(side: Side, va: int, where: int | None, size: int, flags: int) -> None:
        """A new region must lie where it was wished, if that can be told, and on nothing else."""
        assert where in (None, va), "a free address was asked for and not used"
        low = va - PAGE * bool(flags & VmmFlags.LOW_GUARD)
        high = va + size + PAGE * bool(flags & VmmFlags.HIGH_GUARD)
        assert va % PAGE == 0
        assert LOWEST <= low < high <= USER_SPACE_END
        assert side.model.is_free(low, high), "the new region overlaps an older one"

    @rule(which=SIDES, face=FACES, span=SPANS)
    def commit(self, which: int, face: Face, span: Span) -> None:
        """Commit."""
        side = self.side(which)
        va, size = self.resolve(side, span)
        got = side.servant.call(face, "commit", va, size)
        assert got.rc is side.model.commit(va, size)

    @rule(which=SIDES, face=FACES, span=SPANS)
    def decommit(self, which: int, face: Face, span: Span) -> None:
        """Decommit."""
        side = self.side(which)
        va, size = self.resolve(side, span)
        got = side.servant.call(face, "decommit", va, size)
        assert got.rc is side.model.decommit(va, size)

    @rule(
        which=SIDES, face=FACES, span=SPANS, protection=PROTECTIONS, odd=st.sampled_from(ODD_FLAGS)
    )
    def protect(self, which: int, face: Face, span: Span, protection: int, odd: int) -> None:
        """Protect."""
        side = self.side(which)
        va, size = self.resolve(side, span)
        got = side.servant.call(face, "protect", va, size, protection | odd)
        assert got.rc is side.model.protect(va, size, protection | odd)

    @rule(which=SIDES, face=FACES, span=SPANS)
    def free(self, which: int, face: Face, span: Span) -> None:
        """Free of a whole region or of any part."""
        side = self.side(which)
        va, size = self.resolve(side, span)
        got = side.servant.call(face, "free", va, size)
        assert got.rc is side.model.free(va, size)

    @rule(
        which=SIDES,
        face=FACES,
        method=st.sampled_from(["commit", "decommit", "protect", "free"]),
        va=ODD_NUMBERS,
        size=ODD_NUMBERS,
    )
    def nonsense(self, which: int, face: Face, method: str, va: int, size: int) -> None:
        """Addresses and sizes that no range ever has."""
        side = self.side(which)
        arguments = (va, size, 1) if method == "protect" else (va, size)
        expected = getattr(side.model, method)(*arguments)
        assert side.servant.call(face, method, *arguments).rc is expected

    @rule(which=SIDES, span=SPANS, skip=st.integers(0, PAGE), trim=st.integers(0, PAGE))
    def read(self, which: int, span: Span, skip: int, trim: int) -> None:
        """Read of any bytes."""
        side = self.side(which)
        va, size = self.resolve_bytes(side, span, skip, trim)
        expected, data = side.model.read(va, size)
        got = side.servant.call(Face.METHODS, "read", va, size)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        assert got.value == data or expected is not Retcode.OK

    @rule(
        which=SIDES,
        span=SPANS,
        skip=st.integers(0, PAGE),
        trim=st.integers(0, PAGE),
        start=st.integers(0, 9),
    )
    def write(self, which: int, span: Span, skip: int, trim: int, start: int) -> None:
        """Write of any bytes."""
        side = self.side(which)
        va, size = self.resolve_bytes(side, span, skip, trim)
        data = PATTERN[start : start + size]
        expected = side.model.write(va, data)
        got = side.servant.call(Face.METHODS, "write", va, data)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        assert got.value == len(data) or expected is not Retcode.OK
        assert got.error is None or got.error.completed == 0

    @rule(
        which=SIDES,
        span=SPANS,
        skip=st.integers(0, PAGE),
        trim=st.integers(0, PAGE),
        writable=st.sampled_from([None, None, True, False]),
        holder=HOLDERS,
    )
    def view(  # noqa: PLR0917  (the drawn values go by name)
        self, which: int, span: Span, skip: int, trim: int, writable: bool | None, holder: str
    ) -> None:
        """Take a view and keep it, a part of it, or only the object it comes from."""
        side = self.side(which)
        va, size = self.resolve_bytes(side, span, skip, trim)
        expected, can_write, pages = side.model.view(va, size, writable)
        got = side.servant.view(holder, va, size, writable)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        if expected is not Retcode.OK:
            return
        key, *facts = got.value
        assert facts == [size, "B", not can_write]
        if holder == "slice" and size > 1:
            va, size = va + 1, size - 1
        side.pins.append(Pin(key, va, size, can_write, pages))

    @precondition(lambda self: any(side.pins for side in self.sides))
    @rule(which=SIDES, pick=st.integers(0, 99), release=st.booleans())
    def let_go(self, which: int, pick: int, release: bool) -> None:
        """The last reference to a view, or to its object, goes."""
        side = self.side_with_pins(which)
        pin = side.pins.pop(pick % len(side.pins))
        side.servant.let_go(pin.key, release)
        for page in pin.pages:
            page.pins -= 1

    @precondition(lambda self: any(side.pins for side in self.sides))
    @rule(which=SIDES, pick=st.integers(0, 99), value=st.integers(0, 255))
    def write_through_a_view(self, which: int, pick: int, value: int) -> None:
        """A store through a view is a store to the page; read-only views refuse it."""
        side = self.side_with_pins(which)
        pin = side.pins[pick % len(side.pins)]
        assert side.servant.poke(pin.key, value) is pin.writable
        if pin.writable:
            assert side.model.write(pin.start, bytes([value])) is Retcode.OK

    def side_with_pins(self, which: int) -> Side:
        """One of the sides that have views."""
        sides = [side for side in self.sides if side.pins]
        return sides[which % len(sides)]

    @rule(which=SIDES, span=SPANS, extra=st.integers(0, PAGE - 1), smaps=st.booleans())
    def query(self, which: int, span: Span, extra: int, smaps: bool) -> None:
        """Query of a page of ours, of a guard, of a hole or of a stranger."""
        side = self.side(which)
        va = self.resolve(side, span)[0] + extra
        before, info, after = side.servant.query_between(va, smaps)
        self.check_info(side, info, after.mapping, va)
        assert (info.smaps is not None) is (smaps and info.state is not PageState.FREE)
        if before != after:
            return  # Python's own memory next to it has changed meanwhile
        if info.state is PageState.FREE:
            assert (info.base, info.base + info.size) == after.hole
        if info.smaps is not None:
            assert after.mapping is not None
            assert info.smaps == after.mapping[:3]

    @rule(which=SIDES, face=FACES, va=ODD_NUMBERS)
    def query_nonsense(self, which: int, face: Face, va: int) -> None:
        """Query of addresses that are no user address, or hold nothing of ours."""
        side = self.side(which)
        expected = side.model.query(va)
        got = side.servant.call(face, "query", va)
        if isinstance(expected, Retcode):
            assert got.rc is expected
        else:
            assert got.rc is Retcode.OK
            self.check_info(side, got.value, side.servant.mapping_at(va), va)

    # ---------------------------------------------------------------------- invariants

    @invariant()
    def the_kernel_and_the_models_agree(self) -> None:
        """Whatever can be seen is what the models say: all sides look at once."""
        type(self).steps += 1
        self.tick += 1
        looks = [self.look(side) for side in self.sides]
        started = [s.servant.looking(look) for s, look in zip(self.sides, looks, strict=True)]
        sights = [sight() for sight in started]
        for side, look, sight in zip(self.sides, looks, sights, strict=True):
            self.check(side, look, sight)

    def look(self, side: Side) -> Look:
        """What to look at now: the pages of all sides, Query and page table of one."""
        ranges = [(ARENA, ARENA_END), *((r.base, r.end) for r in self.elsewhere(side))]
        look = Look(ranges, list(self.pages_to_read(side)))
        if self.side(self.tick) is not side or not side.model.regions:
            return look
        region = self.region_of_interest(side)
        slot = self.tick * 7 % (len(region.pages) + 2) - 1
        addresses = [region.base + slot * PAGE, ARENA + self.tick * 13 % ARENA_PAGES * PAGE]
        return look._replace(present=(region.base, len(region.pages)), addresses=addresses)

    def elsewhere(self, side: Side) -> list[Region]:
        """Regions outside the arena: the newest, and all of them every now and then."""
        return [
            region
            for region in side.model.regions
            if not ARENA <= region.base < ARENA_END
            and (self.tick % 8 == 0 or region is side.model.regions[-1])
        ]

    def region_of_interest(self, side: Side) -> Region:
        """One region at a time."""
        return side.model.regions[self.tick // len(self.sides) % len(side.model.regions)]

    def check(self, side: Side, look: Look, sight: Sight) -> None:
        """``/proc/PID/maps`` shows just what the model says, every page what was written, ..."""
        ranges = zip(look.ranges, sight.mappings, strict=True)
        arena, *others = [self.by_page(*bounds, found) for bounds, found in ranges]
        self.check_arena(side, arena)
        for region, found in zip(self.elsewhere(side), others, strict=True):
            self.check_region(region, found)
        pages = self.pages_to_read(side)
        for (va, page), held in zip(pages.items(), sight.contents, strict=True):
            assert held == page.contents, f"the page at {va:#x}"
        for page in pages.values():
            page.touch()
        if sight.present:
            self.check_memory_held(self.region_of_interest(side), sight.present)
        if self.tick % 4 == 0:
            self.check_usage(side, dict(sight.usage))
        for va, (info, mapping) in zip(look.addresses, sight.answers, strict=True):
            self.check_info(side, info, mapping, va)

    @staticmethod
    def check_usage(side: Side, used: dict[str, int]) -> None:
        """Each figure of the usage is the model's."""
        least, most = side.model.bounds_of_mappings()
        mappings = used.pop("mappings")
        assert used == side.model.usage()
        assert least <= mappings <= most

    def pages_to_read(self, side: Side) -> dict[int, Page]:
        """All readable pages that were written, and every now and then one that was not."""
        return {
            region.base + slot * PAGE: page
            for region in side.model.regions
            for slot, page in enumerate(region.pages)
            if page.readable and (page.contents is not ZEROS or (slot + self.tick) % 11 == 0)
        }

    @staticmethod
    def by_page(low: int, high: int, mappings: list[kernel.Mapping]) -> list[Seen | None]:
        """What lies behind every page of ``[low, high)``; None is a hole."""
        pages: list[Seen | None] = [None] * ((high - low) // PAGE)
        for mapping in mappings:
            first = (max(mapping.start, low) - low) // PAGE
            last = (min(mapping.end, high) - low) // PAGE
            if mapping.inode == 0:
                pages[first:last] = [Seen(mapping.permissions)] * (last - first)
                continue
            offset = mapping.offset + low - mapping.start
            for slot in range(first, last):
                pages[slot] = Seen(mapping.permissions, mapping.inode, offset + slot * PAGE)
        return pages

    def check_arena(self, side: Side, seen: list[Seen | None]) -> None:
        """The regions in the arena with their guards, the foreign pages, and nothing more."""
        expected: list[Seen | None] = [None] * ARENA_PAGES
        for slot, protection in FOREIGN.items():
            expected[slot] = Seen(PERMISSIONS[protection] + "p")
        for region in side.model.regions:
            if not ARENA <= region.base < ARENA_END:
                continue
            first = (region.base - ARENA) // PAGE
            last = first + len(region.pages)
            self.check_region(region, seen[first:last])
            expected[first:last] = seen[first:last]
            for guarded, slot in ((region.low_guard, first - 1), (region.high_guard, last)):
                if guarded and 0 <= slot < ARENA_PAGES:
                    expected[slot] = Seen("---p")
        assert seen == expected[: len(seen)]

    def check_region(self, region: Region, seen: list[Seen | None]) -> None:
        """The access of each page, and which page of which memory file is behind it."""
        for slot, (page, found) in enumerate(zip(region.pages, seen, strict=False)):
            wanted = Seen(region.kernel_permissions(page))
            if page.backing is not None and found is not None:
                memory = page.backing.memory
                segment, index = divmod(page.index, memory.segment)
                if memory.inodes[segment] is None:
                    self.learn_inode(memory, segment, found.inode)
                wanted = Seen(wanted.permissions, memory.inodes[segment] or 0, index * PAGE)
            assert found == wanted, f"page {slot} of {region.base:#x}"

    def learn_inode(self, memory: Memory, segment: int, inode: int) -> None:
        """The kernel's number of a memory file, which no other one has."""
        assert inode != 0
        backings = [backing for side in self.sides for backing in side.model.backings()]
        assert all(inode not in other.memory.inodes for other in backings), "two are the same"
        memory.inodes[segment] = inode

    def learn_sid(self, buffer: Buffer, sid: int) -> None:
        """The security id of a buffer: the same in every process, and of no other buffer."""
        if buffer.sid is None:
            backings = [backing for side in self.sides for backing in side.model.backings()]
            assert all(other.buffer.sid != sid for other in backings), "two are the same"
            buffer.sid = sid
        assert sid == buffer.sid

    @staticmethod
    def check_memory_held(region: Region, present: list[bool]) -> None:
        """Reserved pages hold no memory; committed pages of LOCKED regions hold theirs."""
        for page, held in zip(region.pages, present, strict=True):
            if not page.committed:
                assert not held, "a reserved page holds memory"
            elif page.populated:
                assert held, "a committed page of a LOCKED region is not resident"

    def check_info(self, side: Side, info: Info, mapping: kernel.Mapping | None, va: int) -> None:
        """Query's answer about ``va`` is the model's, or the kernel's where it is not ours."""
        expected = side.model.query(va)
        if not isinstance(expected, Answer):
            self.check_foreign_info(side, info, mapping, va)
            return
        assert info.va == expected.va
        assert (info.state, info.kind) == (expected.state, expected.kind)
        assert (info.base, info.size) == (expected.base, expected.size)
        assert info.mdl_offset == expected.mdl_offset
        if expected.buffer is None:
            assert info.sid is None
        else:
            assert info.sid is not None
            self.learn_sid(expected.buffer, info.sid)
        if expected.protection is not None:
            assert info.protection == expected.protection
            assert info.flags == expected.flags
            assert (info.run_start, info.run_end) == expected.run
            if expected.state is PageState.RESERVED:
                assert info.resident in (False, None)

    @staticmethod
    def check_foreign_info(side: Side, info: Info, mapping: kernel.Mapping | None, va: int) -> None:
        """A page that is not ours: a hole, or a stranger's mapping."""
        assert info.va == va - va % PAGE
        assert info.base <= va < info.base + info.size
        assert (info.run_start, info.run_end) == (info.base, info.base + info.size)
        if mapping is None:
            assert (info.state, info.kind) == (PageState.FREE, PageKind.FREE)
            assert (info.flags, info.protection) == (0, 0)
            return
        rwx = mapping.permissions[:3]
        assert info.kind is PageKind.FOREIGN
        assert info.state is (PageState.RESERVED if rwx == "---" else PageState.COMMITTED)
        assert info.protection == sum(1 << bit for bit in range(3) if rwx[bit] != "-")
        assert mapping.start <= info.base
        assert info.base + info.size <= mapping.end
        for region in side.model.regions:
            low, high = region.outer
            assert info.base + info.size <= low or high <= info.base, "it counts pages of ours"

    # ------------------------------------------------------------------------ the end

    @override
    def teardown(self) -> None:
        """Closing frees everything, but what views still hold only when they go."""
        try:
            for side in self.sides:
                self.close(side)
        finally:
            for side in self.sides:
                side.servant.clear()

    @staticmethod
    def close(side: Side) -> None:
        """Close a VMM, and see that nothing of it is left."""
        kept = {pin.key: side.model.read(pin.start, pin.size)[1] for pin in side.pins}
        held = side.servant.close()
        side.model.closed = True
        for face in Face:
            got = side.servant.call(face, "query", ARENA)
            assert got.rc is Retcode.INVALID_OPERATION
        assert held == kept, "a view lost its bytes when the VMM was closed"
        whole = Look([(ARENA - PAGE, ARENA_END + PAGE)])
        left = [mapping.start for mapping in side.servant.looking(whole)().mappings[0]]
        assert left == [ARENA + slot * PAGE for slot in sorted(FOREIGN)]
        assert side.servant.mapped_files() == side.files, "a foreign mapping has changed"
        files = side.servant.files()
        assert (files.memories, files.identities) == (0, 0), "descriptors are left"


def settings_of_the_suite(examples: int, steps: int) -> settings:
    """As many steps as the suite has time for, the same ones in every run.

    Only scripts/soak looks for the shortest failure, which takes minutes.
    """
    return settings(
        stateful_step_count=steps,
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

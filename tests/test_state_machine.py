"""Every method of one VMM in every order, beside the plain model of ``model.py``.

After each step the kernel's permissions page by page, the contents, the memory held and
Query's answers are what the model says, and nothing outside has changed. The same machine
runs as long as one likes under ``scripts/soak``.
"""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, NamedTuple

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from typing_extensions import override

import kernel_oracle as kernel
from faces import Face, call
from kernel_oracle import ARENA, PAGE, USER_SPACE_END
from model import LOWEST, PERMISSIONS, ZEROS, Answer, Model, Page, Region
from vmm_linux import VMM, PageInfo, PageKind, PageState, Retcode, VmmFlags

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
    """Somebody who holds a view, or only what keeps its pages pinned."""

    holder: Any
    start: int
    size: int
    writable: bool
    pages: list[Page]


SPANS = st.builds(
    Span,
    st.integers(0, MOST_REGIONS - 1),
    st.integers(-2, 33),
    st.integers(0, 33),
    st.sampled_from(["whole", "inside", "inside", "inside", "inside", "anywhere"]),
)
FACES = st.sampled_from(Face)
PROTECTIONS = st.sampled_from([0, 1, 3, 3, 3, 5, 7, 2, 4, 6])
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


class VirtualMemory(RuleBasedStateMachine):
    """One VMM and its model, driven by rules."""

    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        for slot, protection in FOREIGN.items():
            kernel.map_at(ARENA + slot * PAGE, PAGE, protection)
        self.vmm = VMM()
        self.model = Model(foreign={ARENA + slot * PAGE for slot in FOREIGN})
        self.pins: list[Pin] = []
        self.tick = 0
        self.files = self.mapped_files()

    @staticmethod
    def mapped_files() -> list[kernel.Mapping]:
        """What no call of the package may change: every mapping of a file on disk."""
        return [mapping for mapping in kernel.maps() if mapping.pathname.endswith((".so", ".so.6"))]

    # -------------------------------------------------------------------------- ranges

    def resolve(self, span: Span) -> tuple[int, int]:
        """The addresses that a drawn span means now."""
        if not self.model.regions:
            return ARENA + span.first * PAGE, span.length * PAGE
        region = self.model.regions[span.pick % len(self.model.regions)]
        if span.how == "whole":
            return region.base, region.size
        if span.how == "anywhere":
            return region.base + span.first * PAGE, span.length * PAGE
        first = span.first % len(region.pages)
        count = 1 + span.length % (len(region.pages) - first)
        return region.base + first * PAGE, count * PAGE

    def resolve_bytes(self, span: Span, skip: int, trim: int) -> tuple[int, int]:
        """The same with ends inside pages."""
        va, size = self.resolve(span)
        return va + skip, max(0, size - skip - trim)

    # --------------------------------------------------------------------------- rules

    @precondition(lambda self: len(self.model.regions) < MOST_REGIONS)
    @rule(
        face=FACES,
        slot=st.integers(0, ARENA_PAGES - 1),
        pages=st.integers(0, 32),
        protection=PROTECTIONS,
        extras=st.integers(0, (1 << len(EXTRAS)) - 1),
        odd=st.sampled_from(ODD_FLAGS),
        place=st.sampled_from(["fixed", "fixed", "fixed", "hint", "chosen", "taken"]),
    )
    def allocate(  # noqa: PLR0917  (the drawn values go by name)
        self, face: Face, slot: int, pages: int, protection: int, extras: int, odd: int, place: str
    ) -> None:
        """At a place, near one, anywhere, or where something is already."""
        flags = int(VmmFlags.RESERVE) | protection | odd
        for bit, extra in enumerate(EXTRAS):
            flags |= extra * (extras >> bit & 1)
        addr = ARENA + slot * PAGE
        if place == "chosen":
            addr = 0
        elif place == "taken" and self.model.regions:
            region = self.model.regions[slot % len(self.model.regions)]
            addr = region.outer[0] if slot % 2 else region.base
        if place in ("fixed", "taken"):
            flags |= VmmFlags.FIXED
        room_above = (ARENA_END - addr) // PAGE - 1
        size = (min(pages, max(room_above, 1)) if place == "fixed" else pages) * PAGE

        expected, where = self.model.allocate(addr, size, flags)
        got = call(self.vmm, face, "allocate", addr, size, flags)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        if expected is Retcode.OK:
            if where is not None:
                assert got.value == where, "a free address was asked for and not used"
            self.placed_well(got.value, size, flags)
            self.model.allocated(got.value, size, flags)

    def placed_well(self, va: int, size: int, flags: int) -> None:
        """A new region must lie on nothing that was there."""
        low = va - PAGE * bool(flags & VmmFlags.LOW_GUARD)
        high = va + size + PAGE * bool(flags & VmmFlags.HIGH_GUARD)
        assert va % PAGE == 0
        assert LOWEST <= low < high <= USER_SPACE_END
        assert self.model.is_free(low, high), "the new region overlaps an older one"

    @rule(face=FACES, span=SPANS)
    def commit(self, face: Face, span: Span) -> None:
        """Commit."""
        va, size = self.resolve(span)
        assert call(self.vmm, face, "commit", va, size).rc is self.model.commit(va, size)

    @rule(face=FACES, span=SPANS)
    def decommit(self, face: Face, span: Span) -> None:
        """Decommit."""
        va, size = self.resolve(span)
        assert call(self.vmm, face, "decommit", va, size).rc is self.model.decommit(va, size)

    @rule(face=FACES, span=SPANS, protection=PROTECTIONS, odd=st.sampled_from(ODD_FLAGS))
    def protect(self, face: Face, span: Span, protection: int, odd: int) -> None:
        """Protect."""
        va, size = self.resolve(span)
        got = call(self.vmm, face, "protect", va, size, protection | odd)
        assert got.rc is self.model.protect(va, size, protection | odd)

    @rule(face=FACES, span=SPANS)
    def free(self, face: Face, span: Span) -> None:
        """Free of a whole region or of any part."""
        va, size = self.resolve(span)
        assert call(self.vmm, face, "free", va, size).rc is self.model.free(va, size)

    @rule(
        face=FACES,
        method=st.sampled_from(["commit", "decommit", "protect", "free"]),
        va=ODD_NUMBERS,
        size=ODD_NUMBERS,
    )
    def nonsense(self, face: Face, method: str, va: int, size: int) -> None:
        """Addresses and sizes that no range ever has."""
        arguments = (va, size, 1) if method == "protect" else (va, size)
        expected = getattr(self.model, method)(*arguments)
        assert call(self.vmm, face, method, *arguments).rc is expected

    @rule(span=SPANS, skip=st.integers(0, PAGE), trim=st.integers(0, PAGE))
    def read(self, span: Span, skip: int, trim: int) -> None:
        """Read of any bytes."""
        va, size = self.resolve_bytes(span, skip, trim)
        expected, data = self.model.read(va, size)
        got = call(self.vmm, Face.METHODS, "read", va, size)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        assert got.value == data or expected is not Retcode.OK

    @rule(span=SPANS, skip=st.integers(0, PAGE), trim=st.integers(0, PAGE), start=st.integers(0, 9))
    def write(self, span: Span, skip: int, trim: int, start: int) -> None:
        """Write of any bytes."""
        va, size = self.resolve_bytes(span, skip, trim)
        data = PATTERN[start : start + size]
        expected = self.model.write(va, data)
        got = call(self.vmm, Face.METHODS, "write", va, data)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        assert got.value == len(data) or expected is not Retcode.OK
        assert got.error is None or got.error.completed == 0

    @rule(
        span=SPANS,
        skip=st.integers(0, PAGE),
        trim=st.integers(0, PAGE),
        writable=st.sampled_from([None, None, True, False]),
        holder=HOLDERS,
    )
    def view(self, span: Span, skip: int, trim: int, writable: bool | None, holder: str) -> None:
        """Take a view and keep it, a part of it, or only the object it comes from."""
        va, size = self.resolve_bytes(span, skip, trim)
        expected, can_write, pages = self.model.view(va, size, writable)
        got = call(self.vmm, Face.METHODS, "view", va, size, writable)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        if expected is not Retcode.OK:
            return
        view = got.value
        assert isinstance(view, memoryview)
        assert (view.nbytes, view.format, view.readonly) == (size, "B", not can_write)
        kept: Any = view
        if holder == "object":
            kept = view.obj
            view.release()
        elif holder == "slice" and size > 1:
            kept, va, size = view[1:], va + 1, size - 1
            view.release()
        elif holder == "cast":
            kept = view.cast("b")
            view.release()
        self.pins.append(Pin(kept, va, size, can_write, pages))

    @precondition(lambda self: self.pins)
    @rule(pick=st.integers(0, 99), release=st.booleans())
    def let_go(self, pick: int, release: bool) -> None:
        """The last reference to a view, or to its object, goes."""
        pin = self.pins.pop(pick % len(self.pins))
        if release and isinstance(pin.holder, memoryview):
            pin.holder.release()
        for page in pin.pages:
            page.pins -= 1

    @precondition(lambda self: self.pins)
    @rule(pick=st.integers(0, 99), value=st.integers(0, 255))
    def write_through_a_view(self, pick: int, value: int) -> None:
        """A store through a view is a store to the page; read-only views refuse it."""
        pin = self.pins[pick % len(self.pins)]
        with memoryview(pin.holder) as again, again.cast("B") as window:
            assert window.readonly is not pin.writable
            if pin.writable:
                window[0] = value
                assert self.model.write(pin.start, bytes([value])) is Retcode.OK

    @rule(span=SPANS, extra=st.integers(0, PAGE - 1), smaps=st.booleans())
    def query(self, span: Span, extra: int, smaps: bool) -> None:
        """Query of a page of ours, of a guard, of a hole or of a stranger."""
        va = self.resolve(span)[0] + extra
        before = kernel.mapping_at(va), kernel.hole_at(va)
        info = self.vmm.query(va, smaps=smaps)
        mapping, hole = kernel.mapping_at(va), kernel.hole_at(va)
        self.check_info(info, va)
        assert (info.smaps is not None) is (smaps and info.state is not PageState.FREE)
        if before != (mapping, hole):
            return  # Python's own memory next to it has changed meanwhile
        if info.state is PageState.FREE:
            assert (info.base, info.base + info.size) == hole
        if info.smaps is not None:
            assert mapping is not None
            assert (info.smaps.start, info.smaps.end) == (mapping.start, mapping.end)
            assert info.smaps.permissions == mapping.permissions

    @rule(face=FACES, va=ODD_NUMBERS)
    def query_nonsense(self, face: Face, va: int) -> None:
        """Query of addresses that are no user address, or hold nothing of ours."""
        expected = self.model.query(va)
        got = call(self.vmm, face, "query", va)
        if isinstance(expected, Retcode):
            assert got.rc is expected
        else:
            assert got.rc is Retcode.OK
            self.check_info(got.value, va)

    # ---------------------------------------------------------------------- invariants

    @invariant()
    def the_kernel_and_the_model_agree(self) -> None:
        """Permissions, contents, memory held and Query's answers."""
        type(self).steps += 1
        self.tick += 1
        self.check_permissions()
        for region in self.model.regions:
            self.check_contents(region)
        if self.model.regions:
            region = self.model.regions[self.tick % len(self.model.regions)]
            self.check_memory_held(region)
            slot = self.tick * 7 % (len(region.pages) + 2) - 1
            for va in (region.base + slot * PAGE, ARENA + self.tick * 13 % ARENA_PAGES * PAGE):
                self.check_info(self.vmm.query(va, smaps=False), va)

    def check_permissions(self) -> None:
        """``/proc/self/maps`` shows what state and protection say, and nothing more."""
        expected: list[str | None] = [None] * ARENA_PAGES
        for slot, protection in FOREIGN.items():
            expected[slot] = PERMISSIONS[protection] + "p"
        seen = kernel.page_permissions(ARENA, ARENA_END)
        for region in self.model.regions:
            wanted = [region.kernel_permissions(page) for page in region.pages]
            if not ARENA <= region.base < ARENA_END:
                if self.tick % 8 == 0 or region is self.model.regions[-1]:
                    assert kernel.page_permissions(region.base, region.end) == wanted
                continue
            first = (region.base - ARENA) // PAGE
            expected[first : first + len(wanted)] = wanted
            for guarded, slot in (
                (region.low_guard, first - 1),
                (region.high_guard, first + len(wanted)),
            ):
                if guarded and 0 <= slot < ARENA_PAGES:
                    assert (seen[slot] or "").startswith("---"), "a guard page is accessible"
                    expected[slot] = seen[slot]
        assert seen == expected[: len(seen)]

    def check_contents(self, region: Region) -> None:
        """Readable pages hold what was written, zeros where nothing was."""
        for slot, page in enumerate(region.pages):
            if page.readable and (page.contents is not ZEROS or (slot + self.tick) % 11 == 0):
                held = ctypes.string_at(region.base + slot * PAGE, PAGE)
                assert held == page.contents, f"page {slot} of {region.base:#x}"

    def check_memory_held(self, region: Region) -> None:
        """Reserved pages hold no memory; committed pages of LOCKED regions hold theirs."""
        present = kernel.present_pages(region.base, len(region.pages))
        for page, held in zip(region.pages, present, strict=True):
            if not page.committed:
                assert not held, "a reserved page holds memory"
            elif region.flags & VmmFlags.LOCKED:
                assert held, "a committed page of a LOCKED region is not resident"

    def check_info(self, info: PageInfo, va: int) -> None:
        """Query's answer about ``va`` is the model's, or the kernel's where it is not ours."""
        expected = self.model.query(va)
        if not isinstance(expected, Answer):
            self.check_foreign_info(info, va)
            return
        assert info.va == expected.va
        assert (info.state, info.kind) == (expected.state, expected.kind)
        assert (info.base, info.size) == (expected.base, expected.size)
        assert (info.mdl_offset, info.sid) == (None, None)
        if expected.protection is not None:
            assert info.protection == expected.protection
            assert info.flags == expected.flags
            assert (info.run_start, info.run_end) == expected.run
            if expected.state is PageState.RESERVED:
                assert info.resident in (False, None)

    def check_foreign_info(self, info: PageInfo, va: int) -> None:
        """A page that is not ours: a hole, or a stranger's mapping."""
        mapping = kernel.mapping_at(va)
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
        for region in self.model.regions:
            low, high = region.outer
            assert info.base + info.size <= low or high <= info.base, "it counts pages of ours"

    # ------------------------------------------------------------------------ the end

    @override
    def teardown(self) -> None:
        """Closing frees everything, but what views still hold only when they go."""
        try:
            kept = [self.model.read(pin.start, pin.size)[1] for pin in self.pins]
            self.vmm.close()
            self.vmm.close()
            self.model.closed = True
            assert self.vmm.closed
            for face in Face:
                assert call(self.vmm, face, "query", ARENA).rc is Retcode.INVALID_OPERATION
            held = [bytes(pin.holder) for pin in self.pins]
            assert held == kept, "a view lost its bytes when the VMM was closed"
            self.pins.clear()
            left = kernel.page_permissions(ARENA - PAGE, ARENA_END + PAGE)
            assert [slot - 1 for slot, seen in enumerate(left) if seen] == sorted(FOREIGN)
            assert self.mapped_files() == self.files, "a mapping that is not ours has changed"
        finally:
            self.pins.clear()
            for slot in FOREIGN:
                kernel.unmap(ARENA + slot * PAGE, PAGE)


VirtualMemory.TestCase.settings = settings(
    stateful_step_count=100,
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    phases=[Phase.generate],  # scripts/soak looks for the shortest failure, which takes minutes
    suppress_health_check=list(HealthCheck),
)
TestVirtualMemoryInAnyOrder = VirtualMemory.TestCase

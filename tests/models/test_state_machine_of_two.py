"""All eleven methods, handles and their journeys, in two processes and in every order.

Each process has a VMM and its plain model (``mdl_model.py``); the models share the buffers. The
peer is started once and driven over a socket. After each step everything that ``model_machine.py``
checks holds in both processes, and the descriptors, the memory of the buffers and the answers
about handles are the models'. The same machine runs as long as one likes under ``scripts/soak``.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule, run_state_machine_as_test
from typing_extensions import override

from faces import Face
from kernel_oracle import ARENA, PAGE, in_core
from mdl_model import GET_SID, MAP_SHIFT, Demands, Entry, serial
from model_machine import (
    ARENA_END,
    ARENA_PAGES,
    EXTRAS,
    FACES,
    FOREIGN,
    MOST_REGIONS,
    ODD_FLAGS,
    ODD_NUMBERS,
    PATTERN,
    PLACES,
    SIDES,
    SPANS,
    RegionMachine,
    Side,
    Span,
    settings_of_the_suite,
)
from model_servant import Peer, Servant
from vmm_linux import Retcode, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faces import Outcome
    from model_memory import Backing
    from model_servant import Look, Sight

MOST_HANDLES = 12
NO_RIGHTS_BUT_TO_MAP = 0x7
MAP_EXTRAS = (VmmFlags.LOCKED, VmmFlags.LOW_GUARD, VmmFlags.HIGH_GUARD)


def pages_come_alone() -> bool:
    """Whether the kernel gives a memory file just the page that is touched, even if asked for more.

    Settings under ``/sys/kernel/mm/transparent_hugepage`` may have it give several.
    """
    with contextlib.closing(mmap.mmap(-1, 16 * PAGE)) as memory:
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[0] = 1
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return in_core(start, 16).count(True) == 1


PAGES_COME_ALONE = pages_come_alone()


class Pick(NamedTuple):
    """A drawn handle: a live one, any that there ever was, the other side's, or a forged one."""

    number: int
    how: str
    bit: int


class Window(NamedTuple):
    """A drawn part of a buffer, in pages, inside or not; ``off`` bytes beside the page."""

    first: int
    length: int
    inside: bool
    off: int


PICKS = st.builds(
    Pick,
    st.integers(0, 99),
    st.sampled_from(["live"] * 15 + ["any", "theirs", "forged"]),
    st.integers(0, 64),
)
WINDOWS = st.builds(
    Window,
    st.integers(0, 9),
    st.integers(0, 9),
    st.sampled_from([True] * 11 + [False]),
    st.sampled_from([0] * 22 + [1, PAGE // 2]),
)
PROTS = st.sampled_from([3, 3, 3, 3, 7, 7, 1, 1, 5, 0, 2])
#: Bytes that a buffer ends before its pages do.
SHORT = st.sampled_from([0, 0, 0, 1, 15, PAGE - 1, PAGE - 1, PAGE, PAGE + 1, 9 * PAGE, -1])
#: All, all but MAP_WRITE, all but another one, few.
RIGHTS = st.sampled_from([63] * 6 + [47] * 4 + [31, 55, 59, 61, 62, 15, 9, 8, 1, 0])
KINDS = st.sampled_from(["fresh", "bytes", "clone", "copy", "seal", "old"])
ODD_BITS = st.sampled_from([0] * 30 + [1 << 6, 1 << 20, 1 << 64, -8])


class TwoProcesses(RegionMachine):
    """A VMM here, a VMM in a peer process, and their models."""

    here: ClassVar[Servant]
    peer: ClassVar[Peer | None] = None
    most_pages = 8
    #: Every handle of either process, in all runs: none may come twice.
    seen_handles: ClassVar[tuple[set[int], set[int]]]

    @classmethod
    @override
    @contextlib.contextmanager
    def surroundings(cls) -> Iterator[None]:
        """A peer, another one if it dies, and none in the end."""
        try:
            yield
        finally:
            cls.dismiss()

    @staticmethod
    def dismiss() -> None:
        """Have the peer end, if there is one."""
        if TwoProcesses.peer is not None:
            TwoProcesses.peer.end()
            TwoProcesses.peer = None

    @override
    def servants(self) -> list[Servant | Peer]:
        """One here, one in the peer process."""
        if TwoProcesses.peer is not None and not TwoProcesses.peer.alive:
            self.dismiss()
        if TwoProcesses.peer is None:
            TwoProcesses.peer = Peer()
            TwoProcesses.here = Servant(TwoProcesses.peer.sockets)
            TwoProcesses.seen_handles = (set(), set())
        return [TwoProcesses.here, TwoProcesses.peer]

    def __init__(self) -> None:
        super().__init__()
        for side in self.sides:
            side.servant.query_between(ARENA + min(FOREIGN) * PAGE, True)  # opens what it needs
        self.others = [side.servant.files().others for side in self.sides]

    # ------------------------------------------------------------------- what is drawn

    def resolve_handle(self, which: int, pick: Pick) -> int:
        """The value that a drawn handle means now."""
        side = self.side(which + (pick.how == "theirs"))
        table = list(side.model.handles.values())
        entries = (side.model.live_handles() if pick.how in ("live", "forged") else table) or table
        if not entries:
            return pick.number
        value = entries[pick.number % len(entries)].value
        return value ^ 1 << pick.bit if pick.how == "forged" else value

    def resolve_window(self, side: Side, handle: int, window: Window) -> tuple[int, int]:
        """The offset and the length that a drawn window means now."""
        entry = side.model.handles.get(serial(handle))
        first, length = window.first, window.length
        if window.inside and entry is not None:
            first %= entry.backing.buffer.pages
            length = 1 + length % (entry.backing.buffer.pages - first)
        return first * PAGE + window.off * (first % 2), length * PAGE + window.off * (1 - first % 2)

    def full(self, side: Side) -> bool:
        """Whether this side has handles enough for now."""
        return len(side.model.live_handles()) >= MOST_HANDLES

    def new_handle(
        self,
        which: int,
        got: object,
        rights: int,
        backing: Backing,
        parent: Entry | None = None,
    ) -> None:
        """Check the value of a new handle and record it."""
        side = self.side(which)
        assert isinstance(got, int)
        assert (got >> 32 & 0xFFFF, got >> 63) == (rights, 0)
        assert got not in self.seen_handles[which], "a handle came twice"
        self.seen_handles[which].add(got)
        side.model.handed_out(got, rights, backing, parent)

    # ------------------------------------------------- what would seldom come by itself

    def newest(self, which: int) -> Pick:
        """The handle that a side got last."""
        return Pick(len(self.side(which).model.live_handles()) - 1, "live", 0)

    def hand_over(self, which: int, rights: int, stream: bool, prots: tuple[int, int]) -> None:
        """The newest handle goes to the other side, and both map a part of the buffer."""
        nothing = Demands(0, None, None)
        newest = self.newest(which)
        self.transfer(
            which=which, stream=stream, pick=newest, rights=rights, odd=0, demands=nothing
        )
        for number, prot in ((which, prots[0]), (1 - which, prots[1])):
            self.mdl_map(
                which=number,
                face=Face.METHODS,
                pick=self.newest(number),
                window=Window(prot, 7, inside=True, off=0),
                place="chosen" if stream else "hint",
                slot=len(self.side(number).model.regions) * 9,
                prot=prot,
                extras=0,
                odd=0,
            )

    @initialize(
        kinds=st.lists(KINDS, min_size=2, max_size=6),
        which=SIDES,
        rights=RIGHTS,
        prots=st.tuples(PROTS, PROTS),
        shareable=st.booleans(),
    )
    def begin(
        self,
        kinds: list[str],
        which: int,
        rights: int,
        prots: tuple[int, int],
        shareable: bool,
    ) -> None:
        """Each run begins with buffers that both know, not with empty tables."""
        self.convert(
            which=which,
            flags=int(shareable),
            first=0,
            length=5,
            protection=3,
            rights=rights,
            prots=prots,
        )
        for number, how in enumerate(kinds):
            self.share(
                which=which + number,
                how=how,
                prot=3,
                seals=1,
                rights=rights,
                stream=bool(number & 1),
                prots=prots,
            )

    @rule(
        which=SIDES,
        how=KINDS,
        prot=st.sampled_from([3, 7, 1]),
        seals=st.sampled_from([1, 2]),
        rights=RIGHTS,
        stream=st.booleans(),
        prots=st.tuples(PROTS, PROTS),
    )
    def share(  # noqa: PLR0917  (the drawn values go by name)
        self,
        which: int,
        how: str,
        prot: int,
        seals: int,
        rights: int,
        stream: bool,
        prots: tuple[int, int],
    ) -> None:
        """A buffer of any kind that both map."""
        which %= 2
        newest = self.newest(which)
        if how in ("fresh", "seal"):
            locked = how == "fresh" and stream
            self.mdl_create(
                which=which,
                face=Face.METHODS,
                pages=5,
                prot=7,
                odd=0,
                locked=locked,
                segment=2 * seals % 4,
                short=prots[0] * 5,
            )
        if how == "bytes":
            self.mdl_create_from_buf(which=which, start=seals, size=2 * PAGE - 7, prot=prot)
        elif how == "clone":
            window = Window(prot, 5, inside=True, off=0)
            self.mdl_clone(which=which, face=Face.METHODS, pick=newest, window=window)
        elif how == "copy":
            self.handle_copy(which=which, pick=newest, rights=rights, odd=0)
        elif how == "seal":
            self.mdl_seal(which=which, pick=self.newest(which), seals=seals)
        self.hand_over(which, rights, stream, prots)

    @rule(
        which=SIDES,
        flags=st.sampled_from([0, 0, 1, 2, 3]),
        first=st.sampled_from([0, 0, 0, 1]),
        length=st.sampled_from([5, 5, 2]),
        protection=st.sampled_from([3, 3, 1, 7, 0]),
        rights=RIGHTS,
        prots=st.tuples(PROTS, PROTS),
    )
    def convert(  # noqa: PLR0917  (the drawn values go by name)
        self,
        which: int,
        flags: int,
        first: int,
        length: int,
        protection: int,
        rights: int,
        prots: tuple[int, int],
    ) -> None:
        """A written region, SHAREABLE or LOCKED or neither, becomes a buffer that both map."""
        side = self.side(which)
        extras = VmmFlags.COMMIT | VmmFlags.SHAREABLE * (flags & 1) | VmmFlags.LOCKED * (flags >> 1)
        bits = sum(1 << bit for bit, extra in enumerate(EXTRAS) if extra & extras)
        self.allocate(
            which=which,
            face=Face.METHODS,
            slot=0,
            pages=6,
            protection=3,
            extras=bits,
            odd=0,
            place="chosen",
        )
        last = len(side.model.regions) - 1
        self.write(which=which, span=Span(last, 0, 2, "inside"), skip=9, trim=1, start=length)
        span = Span(last, first, length, "inside")
        methods = Face.METHODS
        self.protect(which=which, face=methods, span=span, protection=protection, odd=0)
        self.mdl_create_from_vm(which=which, face=methods, span=span, prot=7, odd=0)
        self.hand_over(which, rights, bool(first), prots)

    @rule(which=SIDES, pick=PICKS, rights=RIGHTS, orphan=st.booleans(), revoke=st.booleans())
    def descend(self, which: int, pick: Pick, rights: int, orphan: bool, revoke: bool) -> None:
        """A handle's copy and the clone of that, which may lose the one between them."""
        live = self.side(which).model.live_handles()
        oldest = pick._replace(number=pick.number % max(len(live), 1))
        self.handle_copy(which=which, pick=oldest, rights=rights, odd=0)
        between = self.newest(which)
        window = Window(0, pick.bit, inside=True, off=0)
        self.mdl_clone(which=which, face=Face.METHODS, pick=between, window=window)
        if orphan:
            self.handle_close(which=which, pick=between)
        if revoke:
            self.handle_revoke(which=which, pick=oldest)

    # --------------------------------------------------------------------------- rules

    @rule(
        which=SIDES,
        face=FACES,
        pages=st.integers(0, 8),
        prot=PROTS,
        locked=st.booleans(),
        odd=ODD_BITS,
        segment=st.sampled_from([0, 0, 1, 2, 3, 4]),
        short=SHORT,
    )
    def mdl_create(  # noqa: PLR0917  (the drawn values go by name)
        self,
        which: int,
        face: Face,
        pages: int,
        prot: int,
        locked: bool,
        odd: int,
        segment: int,
        short: int,
    ) -> None:
        """A buffer of holes or of memory, perhaps in segments; odd ones are a byte too long.

        It ends ``short`` bytes before its last page does. The reference's face makes none in
        segments, and none that ends before its page.
        """
        side = self.side(which)
        if self.full(side):
            return
        size = pages * PAGE + (odd == 1 << 6)
        flags = prot | int(VmmFlags.LOCKED) * locked | odd & ~(1 << 6)
        arguments = [size, flags]
        if face is Face.METHODS and (segment or short):
            arguments.append(segment * PAGE + (odd == 1 << 20))
        if face is Face.METHODS and short:
            arguments.append(size - short)
        expected = side.model.mdl_create(*arguments)
        got = side.servant.call(face, "mdl_create", *arguments)
        self.check_new(which, expected, got, (prot & 7) << MAP_SHIFT | NO_RIGHTS_BUT_TO_MAP)

    @rule(which=SIDES, start=st.integers(0, 250), size=st.integers(0, 3 * PAGE), prot=PROTS)
    def mdl_create_from_buf(self, which: int, start: int, size: int, prot: int) -> None:
        """A buffer of bytes."""
        side = self.side(which)
        if self.full(side):
            return
        data = PATTERN[start : start + size]
        expected = side.model.mdl_create_from_buf(data, prot)
        got = side.servant.call(Face.METHODS, "mdl_create_from_buf", data, prot)
        self.check_new(which, expected, got, prot << MAP_SHIFT | NO_RIGHTS_BUT_TO_MAP)

    @rule(which=SIDES, face=FACES, span=SPANS, prot=PROTS, odd=ODD_BITS)
    def mdl_create_from_vm(self, which: int, face: Face, span: Span, prot: int, odd: int) -> None:
        """A buffer of pages where they are."""
        side = self.side(which)
        if self.full(side):
            return
        va, size = self.resolve(side, span)
        expected = side.model.mdl_create_from_vm(va, size, prot | odd)
        got = side.servant.call(face, "mdl_create_from_vm", va, size, prot | odd)
        self.check_new(which, expected, got, prot << MAP_SHIFT | NO_RIGHTS_BUT_TO_MAP)

    def check_new(
        self,
        which: int,
        expected: Retcode | Backing,
        got: Outcome,
        rights: int,
        parent: Entry | None = None,
    ) -> None:
        """A call that was to make a handle ended as the model says."""
        if isinstance(expected, Retcode):
            assert got.rc is expected, f"{got.rc} where the model says {expected}"
            return
        assert got.rc is Retcode.OK, f"{got.rc} where the model says OK"
        self.new_handle(which, got.value, rights, expected, parent)

    @rule(which=SIDES, face=FACES, pick=PICKS)
    def mdl_get_size(self, which: int, face: Face, pick: Pick) -> None:
        """The size of a buffer."""
        side = self.side(which)
        handle = self.resolve_handle(which, pick)
        expected = side.model.mdl_get_size(handle)
        got = side.servant.call(face, "mdl_get_size", handle)
        if isinstance(expected, Retcode):
            assert got.rc is expected, f"{got.rc} where the model says {expected}"
        else:
            assert (got.rc, got.value) == (Retcode.OK, expected)

    @rule(
        which=SIDES,
        face=FACES,
        pick=PICKS,
        window=WINDOWS,
        place=PLACES,
        slot=st.integers(0, ARENA_PAGES - 1),
        prot=PROTS,
        extras=st.integers(0, (1 << len(MAP_EXTRAS)) - 1),
        odd=st.sampled_from(ODD_FLAGS),
    )
    def mdl_map(  # noqa: PLR0917  (the drawn values go by name)
        self,
        which: int,
        face: Face,
        pick: Pick,
        window: Window,
        place: str,
        slot: int,
        prot: int,
        extras: int,
        odd: int,
    ) -> None:
        """A window of a buffer, at a place, near one, anywhere, or where something is already."""
        side = self.side(which)
        if len(side.model.regions) >= MOST_REGIONS:
            return
        handle = self.resolve_handle(which, pick)
        offset, length = self.resolve_window(side, handle, window)
        hint, fixed = self.resolve_place(side, place, slot)
        hint = min(hint, ARENA_END - 10 * PAGE)
        flags = prot | odd | fixed
        for bit, extra in enumerate(MAP_EXTRAS):
            flags |= int(extra) * (extras >> bit & 1)
        arguments = (handle, offset, length, hint, flags)
        expected, where = side.model.mdl_map(*arguments)
        got = side.servant.call(face, "mdl_map", *arguments)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"
        if expected is Retcode.OK:
            self.placed_well(side, got.value, where, length, flags)
            side.model.mapped(got.value, handle, offset, length, flags)

    @rule(which=SIDES, face=FACES, pick=PICKS, window=WINDOWS)
    def mdl_clone(self, which: int, face: Face, pick: Pick, window: Window) -> None:
        """A window on a buffer or on a clone."""
        side = self.side(which)
        if self.full(side):
            return
        handle = self.resolve_handle(which, pick)
        arguments = (handle, *self.resolve_window(side, handle, window))
        expected = side.model.mdl_clone(*arguments)
        got = side.servant.call(face, "mdl_clone", *arguments)
        parent = side.model.handles.get(serial(handle))
        self.check_new(which, expected, got, parent.rights if parent else 0, parent)

    @rule(
        which=SIDES,
        face=FACES,
        method=st.sampled_from(["mdl_create", "mdl_create_from_vm", "mdl_map", "mdl_clone"]),
        pick=PICKS,
        numbers=st.lists(ODD_NUMBERS, min_size=4, max_size=4),
    )
    def mdl_nonsense(
        self, which: int, face: Face, method: str, pick: Pick, numbers: list[int]
    ) -> None:
        """Numbers that no part of a buffer has, and numbers that are no handles."""
        side = self.side(which)
        model = side.model
        handle = self.resolve_handle(which, pick) if numbers[0] % 2 else numbers[0]
        arguments: tuple[int, ...] = (numbers[0] | 1, 3)
        expected: object = model.mdl_create(numbers[0] | 1, 3)
        if method == "mdl_create_from_vm":
            arguments = (numbers[1], numbers[2], 3)
            expected = model.mdl_create_from_vm(numbers[1], numbers[2], 3)
        elif method == "mdl_map":
            arguments = (handle, numbers[1], numbers[2], numbers[3] | 1, 1)
            expected = model.mdl_map(handle, numbers[1], numbers[2], numbers[3] | 1, 1)[0]
        elif method == "mdl_clone":
            arguments = (handle, numbers[1] | 1, numbers[2])
            expected = model.mdl_clone(handle, numbers[1] | 1, numbers[2])
        assert isinstance(expected, Retcode), "this makes sense"
        assert side.servant.call(face, method, *arguments).rc is expected

    @rule(which=SIDES, pick=PICKS, seals=st.sampled_from([1, 1, 2, 2, 3, 0, 4, -1]))
    def mdl_seal(self, which: int, pick: Pick, seals: int) -> None:
        """PUBLISH and FREEZE."""
        side = self.side(which)
        handle = self.resolve_handle(which, pick)
        expected = side.model.mdl_seal(handle, seals)
        got = side.servant.call(Face.METHODS, "mdl_seal", handle, seals)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"

    @rule(which=SIDES, pick=PICKS, rights=RIGHTS, odd=ODD_BITS)
    def handle_copy(self, which: int, pick: Pick, rights: int, odd: int) -> None:
        """A copy with fewer rights, or with more."""
        side = self.side(which)
        if self.full(side):
            return
        handle = self.resolve_handle(which, pick)
        expected = side.model.handle_copy(handle, rights | odd)
        got = side.servant.call(Face.METHODS, "handle_copy", handle, rights | odd)
        parent = side.model.handles.get(serial(handle))
        self.check_new(which, expected, got, rights, parent)

    @precondition(lambda self: any(len(s.model.live_handles()) > 4 for s in self.sides))
    @rule(which=SIDES, pick=PICKS)
    def handle_close(self, which: int, pick: Pick) -> None:
        """The end of a handle."""
        side = self.side(which)
        handle = self.resolve_handle(which, pick)
        expected = side.model.handle_close(handle)
        got = side.servant.call(Face.METHODS, "handle_close", handle)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"

    @rule(which=SIDES, pick=PICKS)
    def handle_revoke(self, which: int, pick: Pick) -> None:
        """The end of a handle's descendants."""
        side = self.side(which)
        handle = self.resolve_handle(which, pick)
        expected = side.model.handle_revoke(handle)
        got = side.servant.call(Face.METHODS, "handle_revoke", handle)
        assert got.rc is expected, f"{got.rc} where the model says {expected}"

    @rule(which=SIDES, pick=PICKS)
    def handle_info(self, which: int, pick: Pick) -> None:
        """What a handle says of itself."""
        side = self.side(which)
        handle = self.resolve_handle(which, pick)
        got = side.servant.call(Face.METHODS, "handle_info", handle)
        self.check_handle(side, handle, got)

    @rule(
        which=SIDES,
        stream=st.booleans(),
        pick=PICKS,
        rights=st.none() | RIGHTS,
        odd=ODD_BITS,
        demands=st.builds(
            Demands,
            st.sampled_from([0, 0, 0, 1, 2, 3]),
            st.sampled_from([None, None, 2 * PAGE - 8, 2 * PAGE - 7, 4 * PAGE, 5 * PAGE - 15]),
            st.sampled_from([None, os.geteuid(), os.geteuid() + 1]),
        ),
    )
    def transfer(  # noqa: PLR0917  (the drawn values go by name)
        self,
        which: int,
        stream: bool,
        pick: Pick,
        rights: int | None,
        odd: int,
        demands: Demands,
    ) -> None:
        """A handle goes to the other process, with all its rights or with these."""
        side, other = self.side(which), self.side(which + 1)
        if self.full(other):
            return
        handle = self.resolve_handle(which, pick)
        rights = None if rights is None else rights | odd
        expected = side.model.send_handle(handle, rights)
        got = side.servant.send(1 - stream, handle, rights)
        if isinstance(expected, Retcode):
            assert got.rc is expected, f"{got.rc} where the model says {expected}"
            return
        assert got.rc is Retcode.OK, f"{got.rc} where the model says OK"
        going, backing = expected
        arrived = other.model.recv_handle(going, backing, demands, os.geteuid())
        answer = other.servant.receive(1 - stream, *demands)
        self.check_new(1 - which, arrived, answer, going)

    # ---------------------------------------------------------------------- invariants

    @override
    def look(self, side: Side) -> Look:
        """One handle too."""
        handles = list(side.model.handles.values())
        one = handles[self.tick * 7 % len(handles)].value if handles else None
        return super().look(side)._replace(handle=one)

    @override
    def check(self, side: Side, look: Look, sight: Sight) -> None:
        """What it says of itself."""
        super().check(side, look, sight)
        if look.handle is not None and sight.handle is not None:
            self.check_handle(side, look.handle, sight.handle)

    def check_handle(self, side: Side, handle: int, got: Outcome) -> None:
        """What handle_info tells is the model's word, the security ids included."""
        expected = side.model.find(handle)
        if isinstance(expected, Retcode):
            assert got.rc is expected, f"{got.rc} where the model says {expected}"
            return
        assert got.rc is Retcode.OK
        info, buffer = got.value, expected.backing.buffer
        facts = (int(info.rights), info.size, info.nbytes, int(info.seals))
        assert facts == (expected.rights, buffer.size, buffer.nbytes, buffer.seals)
        if expected.rights & GET_SID:
            self.learn_sid(buffer, info.sid)
            assert (info.origin_sid is None) is (buffer.origin is None)
            if buffer.origin is not None:
                self.learn_sid(buffer.origin, info.origin_sid)

    @invariant()
    def descriptors_and_memory_agree(self) -> None:
        """At every fourth step the descriptors of one side, when nobody looks at anything."""
        if self.tick % 4 == 0:
            number = self.tick // 4 % 2
            self.check_files(self.sides[number], self.others[number])

    def check_files(self, side: Side, others: dict[str, str]) -> None:
        """As many descriptors as the model says, and no memory where nothing was ever touched."""
        files = side.servant.files()
        backings = side.model.backings()
        roots = [backing for backing in backings if backing.origin is None]
        assert files.identities == sum(backing.has_identity for backing in backings)
        assert files.memories == sum(root.descriptors for root in roots)
        assert files.others == others, "descriptors that are no memory files are lost"
        for memory, number in {(root.memory, number) for root in roots for number in root.segments}:
            inode = memory.inodes[number]
            if inode is not None:
                least, most = memory.bounds_of_held(number)
                assert files.held[inode] >= least, "memory is lost"
                if PAGES_COME_ALONE:
                    assert files.held[inode] <= most, "memory that nobody touched"
                assert files.sizes[inode] == memory.size_of(number)


TwoProcesses.TestCase.settings = settings_of_the_suite(examples=50, steps=100)


def test_two_processes_that_share_buffers_agree_with_their_models_in_any_order() -> None:
    with TwoProcesses.surroundings():
        run_state_machine_as_test(TwoProcesses, settings=TwoProcesses.TestCase.settings)

"""A plain model of one VMM: what every call must answer and leave behind.

It knows no kernel and no Cython, only the promises: regions of pages, each page reserved
or committed, with a protection, contents and pins. Where the system chooses an address,
the model is told which one it was; all else it predicts.

The order of checks is the package's documented one: closed, then arguments, then cache
modes, then the range, then states, then pins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

from constants import PERMISSIONS
from kernel_oracle import PAGE, USER_SPACE_END, sysctl
from model_memory import ZEROS, Backing, Buffer, Memory
from vmm_linux import PageKind, PageState, Retcode, VmmFlags

LOWEST = sysctl("vm.mmap_min_addr")
LEGAL_PROTECTIONS = frozenset({0, 1, 3, 5, 7})
KNOWN_FLAGS = 0x7F777  # every bit that VmmFlags documents, written out
UNIMPLEMENTED_CACHE_MODES = 0xE000
READ, WRITE = int(VmmFlags.READ), int(VmmFlags.WRITE)
SHAREABLE = int(VmmFlags.SHAREABLE)
LOCKED = int(VmmFlags.LOCKED)


@dataclass(eq=False)
class Page:
    """One page of a region: private, or page ``index`` of a memory file."""

    protection: int
    committed: bool = False
    own: bytes = ZEROS
    pins: int = 0
    backing: Backing | None = None
    index: int = 0
    kind: PageKind = PageKind.PRIVATE
    #: The most that Protect may give.
    ceiling: int = 7
    #: Whether the kernel mapped it such that it can become writable, which a FREEZE waits for.
    may_write: bool = True
    #: Whether it was made resident where it is.
    populated: bool = False

    @property
    def contents(self) -> bytes:
        """What a read gives."""
        return self.own if self.backing is None else self.backing.memory.pages[self.index]

    def store(self, contents: bytes) -> None:
        """Write, for everybody who has the page."""
        if self.backing is None:
            self.own = contents
        else:
            self.backing.memory.pages[self.index] = contents
            self.backing.memory.held[self.index] = True

    def touch(self) -> None:
        """Look at it: a hole of a memory file gets memory."""
        if self.backing is not None:
            self.backing.memory.held[self.index] = True

    def discard(self) -> None:
        """Give its memory back."""
        self.own = ZEROS
        if self.backing is not None:
            self.backing.memory.discard(self.index)

    @property
    def state(self) -> PageState:
        """RESERVED or COMMITTED."""
        return PageState.COMMITTED if self.committed else PageState.RESERVED

    @property
    def readable(self) -> bool:
        """Whether a read is allowed."""
        return self.committed and bool(self.protection & READ)

    @property
    def writable(self) -> bool:
        """Whether a write is allowed."""
        return self.committed and bool(self.protection & WRITE)


@dataclass(eq=False)
class Region:
    """What one Allocate made, or what a Free left of it."""

    base: int
    pages: list[Page]
    flags: int
    low_guard: bool
    high_guard: bool

    @property
    def size(self) -> int:
        """Bytes, guards not counted."""
        return len(self.pages) * PAGE

    @property
    def end(self) -> int:
        """First address above the last page."""
        return self.base + self.size

    @property
    def outer(self) -> tuple[int, int]:
        """Bounds with the guards."""
        return self.base - PAGE * self.low_guard, self.end + PAGE * self.high_guard

    def kernel_permissions(self, page: Page) -> str:
        """What ``/proc/self/maps`` must show for ``page``."""
        sharing = "p" if page.backing is None else "s"
        return PERMISSIONS[page.protection if page.committed else 0] + sharing

    def runs(self) -> int:
        """Into how many runs the pages fall that are alike, segments of a buffer apart."""

        def nature(index: int) -> tuple[object, ...]:
            page = self.pages[index]
            same = (page.committed, page.protection, page.ceiling, page.kind)
            if page.backing is None:
                return same
            segment = page.index // page.backing.memory.segment
            return (*same, page.backing, page.index - index, segment)

        natures = [nature(index) for index in range(len(self.pages))]
        return 1 + sum(left != right for left, right in pairwise(natures))

    def run_around(self, index: int) -> tuple[int, int]:
        """Addresses of the pages around ``index`` with the same state and protection."""

        def alike(other: Page) -> bool:
            mine = self.pages[index]
            return (other.committed, other.protection) == (mine.committed, mine.protection)

        first = last = index
        while first > 0 and alike(self.pages[first - 1]):
            first -= 1
        while last + 1 < len(self.pages) and alike(self.pages[last + 1]):
            last += 1
        return self.base + first * PAGE, self.base + (last + 1) * PAGE


@dataclass(frozen=True)
class Answer:
    """What Query must say of a page."""

    va: int
    state: PageState
    kind: PageKind
    base: int
    size: int
    protection: int | None = None
    flags: int | None = None
    run: tuple[int, int] | None = None
    mdl_offset: int | None = None
    buffer: Buffer | None = None


@dataclass
class Model:
    """One VMM and the foreign pages that stand in its way."""

    foreign: set[int] = field(default_factory=set)
    regions: list[Region] = field(default_factory=list)
    closed: bool = False

    # ---------------------------------------------------------------- where things are

    def is_free(self, low: int, high: int) -> bool:
        """Whether no page of ``[low, high)`` is taken, as far as the model knows."""
        if any(low <= address < high for address in self.foreign):
            return False
        return all(high <= region.outer[0] or region.outer[1] <= low for region in self.regions)

    def region_of(self, va: int, size: int) -> Region | None:
        """The region that holds the whole range."""
        for region in self.regions:
            if region.base <= va and va + size <= region.end:
                return region
        return None

    @staticmethod
    def slots(region: Region, va: int, size: int) -> range:
        """Indices of the pages that ``[va, va + size)`` touches."""
        return range((va - region.base) // PAGE, -(-(va + size - region.base) // PAGE))

    # ------------------------------------------------------------------------- checks

    def _range(self, va: int, size: int, *, aligned: bool) -> Retcode | Region:
        if self.closed:
            return Retcode.INVALID_OPERATION
        if not (0 <= va < 1 << 64 and 0 < size < 1 << 64 and va + size < 1 << 64):
            return Retcode.INVALID_ARGUMENT
        if aligned and (va % PAGE or size % PAGE):
            return Retcode.INVALID_ARGUMENT
        return self.region_of(va, size) or Retcode.RESOURCE_NOT_FOUND

    # ------------------------------------------------------------------------ methods

    def allocate(self, addr: int, size: int, flags: int) -> tuple[Retcode, int | None]:
        """The return code, and the address where the model can tell it."""
        if self.closed:
            return Retcode.INVALID_OPERATION, None
        fixed = bool(flags & VmmFlags.FIXED)
        low_guard = PAGE * bool(flags & VmmFlags.LOW_GUARD)
        high_guard = PAGE * bool(flags & VmmFlags.HIGH_GUARD)
        legal = (
            0 < size < 1 << 64
            and size % PAGE == 0
            and addr >= 0
            and addr % PAGE == 0
            and addr + size < 1 << 64
            and flags >= 0
            and not flags & ~KNOWN_FLAGS
            and flags & VmmFlags.RESERVE
            and flags & 7 in LEGAL_PROTECTIONS
        )
        low, high = addr - low_guard, addr + size + high_guard
        reachable = low >= LOWEST and high <= USER_SPACE_END
        if not legal or (fixed and not reachable):
            return Retcode.INVALID_ARGUMENT, None
        if flags & UNIMPLEMENTED_CACHE_MODES:
            return Retcode.UNIMPLEMENTED, None
        free = reachable and self.is_free(low, high)
        if fixed and not free:
            return Retcode.ALREADY_EXISTS, None
        return Retcode.OK, addr if free else None

    def allocated(self, va: int, size: int, flags: int) -> Region:
        """Record what an Allocate made at ``va``."""
        flags = int(flags)
        pages = [
            Page(flags & 7, committed=bool(flags & VmmFlags.COMMIT)) for _ in range(size // PAGE)
        ]
        if flags & SHAREABLE:
            backing = Backing(Buffer(Memory(len(pages)), 0, len(pages)))
            for index, page in enumerate(pages):
                page.backing, page.index = backing, index
        for page in pages:
            self._settle(page, flags)
        return self._enter(va, pages, flags)

    def _enter(self, va: int, pages: list[Page], flags: int) -> Region:
        guards = bool(flags & VmmFlags.LOW_GUARD), bool(flags & VmmFlags.HIGH_GUARD)
        region = Region(va, pages, flags, *guards)
        self.regions.append(region)
        return region

    @staticmethod
    def _settle(page: Page, flags: int) -> None:
        """A page that may just have been committed is made resident if its region is LOCKED."""
        if page.committed and flags & LOCKED:
            page.populated = True
            page.touch()

    def backings(self) -> set[Backing]:
        """Everything that the process has descriptors of."""
        tops = {page.backing for region in self.regions for page in region.pages}
        return {backing for top in tops if top is not None for backing in top.chain()}

    def usage(self) -> dict[str, int]:
        """What ``VMM.usage`` must say, in bytes where it says bytes; ``mappings`` apart."""
        pages = [(region, page) for region in self.regions for page in region.pages]
        return {
            "regions": len(self.regions),
            "reserved": sum(high - low for low, high in (r.outer for r in self.regions)),
            "committed": PAGE
            * sum(page.committed and page.kind is PageKind.PRIVATE for _, page in pages),
            "locked": PAGE * sum(page.committed and bool(r.flags & LOCKED) for r, page in pages),
            "mdls": 0,
            "mdl_bytes": 0,
            "mdl_mappings": 0,
            "handles": 0,
        }

    def bounds_of_mappings(self) -> tuple[int, int]:
        """At least and at most how many mappings ``VMM.usage`` may count.

        Views cut runs that are alike, reserved pages behind guards differ from others, and a
        border of runs can be one of segments too.
        """
        guards = sum(region.low_guard + region.high_guard for region in self.regions)
        pages = sum(len(region.pages) for region in self.regions)
        return guards + sum(region.runs() for region in self.regions), guards + 2 * pages

    def commit(self, va: int, size: int) -> Retcode:
        """Reserved pages become committed and zeroed, committed ones stay."""
        found = self._range(va, size, aligned=True)
        if isinstance(found, Retcode):
            return found
        for slot in self.slots(found, va, size):
            page = found.pages[slot]
            if not page.committed:
                page.committed = True
                self._settle(page, found.flags)
        return Retcode.OK

    def decommit(self, va: int, size: int) -> Retcode:
        """Back to reserved, contents gone."""
        found = self._range(va, size, aligned=True)
        if isinstance(found, Retcode):
            return found
        pages = [found.pages[slot] for slot in self.slots(found, va, size)]
        if any(page.kind is PageKind.MDL for page in pages):
            return Retcode.INVALID_OPERATION
        if any(page.pins for page in pages):
            return Retcode.BUSY
        for page in pages:
            page.committed = page.populated = False
            page.discard()
        return Retcode.OK

    def protect(self, va: int, size: int, flags: int) -> Retcode:
        """A new protection, now or when committed."""
        if not self.closed and flags not in LEGAL_PROTECTIONS:
            return Retcode.INVALID_ARGUMENT
        found = self._range(va, size, aligned=True)
        if isinstance(found, Retcode):
            return found
        pages = [found.pages[slot] for slot in self.slots(found, va, size)]
        if any(flags & ~page.ceiling for page in pages):
            return Retcode.NO_CAPABILITY
        if any(page.pins for page in pages):
            return Retcode.BUSY
        for page in pages:
            page.protection = flags
        return Retcode.OK

    def free(self, va: int, size: int) -> Retcode:
        """The pages go, and the guard next to each end that goes; the rest stays."""
        found = self._range(va, size, aligned=True)
        if isinstance(found, Retcode):
            return found
        slots = self.slots(found, va, size)
        if any(found.pages[slot].pins for slot in slots):
            return Retcode.BUSY
        for slot in slots:
            if found.pages[slot].kind is PageKind.PRIVATE:
                found.pages[slot].discard()
        below, above = found.pages[: slots.start], found.pages[slots.stop :]
        self.regions.remove(found)
        if below:
            self.regions.append(Region(found.base, below, found.flags, found.low_guard, False))
        if above:
            self.regions.append(Region(va + size, above, found.flags, False, found.high_guard))
        return Retcode.OK

    def view(self, va: int, size: int, writable: bool | None) -> tuple[Retcode, bool, list[Page]]:
        """The return code, whether the view is writable, and the pages that it pins."""
        found = self._range(va, size, aligned=False)
        if isinstance(found, Retcode):
            return found, False, []
        pages = [found.pages[slot] for slot in self.slots(found, va, size)]
        all_writable = all(page.writable for page in pages)
        if not all(page.readable for page in pages) or (writable and not all_writable):
            return Retcode.INVALID_OPERATION, False, []
        for page in pages:
            page.pins += 1
        return Retcode.OK, all_writable if writable is None else writable, pages

    def read(self, va: int, size: int) -> tuple[Retcode, bytes]:
        """The return code and the bytes."""
        found = self._range(va, size, aligned=False)
        if isinstance(found, Retcode):
            return found, b""
        pages = [found.pages[slot] for slot in self.slots(found, va, size)]
        if not all(page.readable for page in pages):
            return Retcode.INVALID_OPERATION, b""
        for page in pages:
            page.touch()
        offset = (va - found.base) % PAGE
        return Retcode.OK, b"".join(page.contents for page in pages)[offset : offset + size]

    def write(self, va: int, data: bytes) -> Retcode:
        """The bytes go to their pages."""
        found = self._range(va, len(data), aligned=False)
        if isinstance(found, Retcode):
            return found
        pages = [found.pages[slot] for slot in self.slots(found, va, len(data))]
        if not all(page.writable for page in pages):
            return Retcode.INVALID_OPERATION
        offset = (va - found.base) % PAGE
        whole = bytearray().join(page.contents for page in pages)
        whole[offset : offset + len(data)] = data
        for index, page in enumerate(pages):
            page.store(bytes(whole[index * PAGE : (index + 1) * PAGE]))
        return Retcode.OK

    def query(self, va: int) -> Answer | Retcode | None:
        """What Query must say; None where only the kernel knows (foreign pages and holes)."""
        if self.closed:
            return Retcode.INVALID_OPERATION
        if not 0 <= va < USER_SPACE_END:
            return Retcode.INVALID_ARGUMENT
        start = va - va % PAGE
        for region in self.regions:
            low, high = region.outer
            if low <= start < high and not region.base <= start < region.end:
                kind, state = PageKind.GUARD, PageState.RESERVED
                return Answer(start, state, kind, region.base, region.size)
            if low <= start < high:
                slot = (start - region.base) // PAGE
                return self._answer(region, slot)
        return None

    @staticmethod
    def _answer(region: Region, slot: int) -> Answer:
        """What Query must say of a region's page."""
        page = region.pages[slot]
        mdl_offset = buffer = None
        if page.kind is PageKind.MDL:
            assert page.backing is not None
            buffer = page.backing.buffer
            mdl_offset = (page.index - buffer.first) * PAGE
        return Answer(
            region.base + slot * PAGE,
            page.state,
            page.kind,
            region.base,
            region.size,
            page.protection,
            region.flags,
            region.run_around(slot),
            mdl_offset,
            buffer,
        )

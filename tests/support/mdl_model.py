"""The plain model of one VMM with MDL buffers and handles.

Like ``model.py`` it knows only the promises. Several of these share the buffers, as processes do:
what one of them does to a memory file, all of them see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from typing_extensions import override

from kernel_oracle import PAGE, USER_SPACE_END
from model import LEGAL_PROTECTIONS, LOCKED, LOWEST, SHAREABLE, WRITE, Model, Page, Region
from model_memory import FREEZE, PUBLISH, Backing, Buffer, Memory
from vmm_linux import PageKind, Retcode, VmmFlags

TRANSFER, COPY, GET_SID, MAP_READ, MAP_WRITE, MAP_EXECUTE = (1 << bit for bit in range(6))
ALL_RIGHTS = 0x3F
MAP_SHIFT = 3
MAP_FLAGS = 0x10347  # protection, LOCKED, guards, FIXED: written out
MASK_64 = (1 << 64) - 1


@dataclass(eq=False)
class Entry:
    """A handle that was handed out; it stays in the table when it has ended."""

    value: int
    rights: int
    backing: Backing
    parent: Entry | None = None
    closed: bool = False
    revoked: bool = False

    @property
    def live(self) -> bool:
        """Whether it names a buffer still."""
        return not self.closed and not self.revoked


class Demands(NamedTuple):
    """What the receiver of a handle demands."""

    require: int
    max_size: int | None
    peer_uid: int | None


def serial(value: int) -> int:
    """What of a handle says which one it is: its number and its generation."""
    return value & ~(0xFFFF << 32)


def prot_is_legal(prot: int, others: int) -> bool:
    """Whether this can be the protection of a buffer, with ``others`` beside it."""
    return prot >= 0 and not prot & ~(7 | others) and prot & 7 in LEGAL_PROTECTIONS - {0}


@dataclass
class MdlModel(Model):
    """One VMM among those that share buffers with it, itself included."""

    #: By what of their value does not depend on rights.
    handles: dict[int, Entry] = field(default_factory=dict)
    world: list[MdlModel] = field(default_factory=list)

    # ---------------------------------------------------------------------- what there is

    def live_handles(self) -> list[Entry]:
        """The handles that name a buffer, oldest first."""
        return [entry for entry in self.handles.values() if entry.live]

    def backings(self) -> set[Backing]:
        """Everything that the process has descriptors of."""
        tops = [entry.backing for entry in self.live_handles()]
        return super().backings() | {backing for top in tops for backing in top.chain()}

    def find(self, value: int, rights: int = 0) -> Entry | Retcode:
        """The handle with just this value, if it has these rights; else why not."""
        if self.closed:
            return Retcode.INVALID_OPERATION
        entry = self.handles.get(serial(value))
        if entry is None:
            return Retcode.INVALID_ARGUMENT
        if entry.closed:
            return Retcode.RESOURCE_NOT_FOUND
        if entry.value != value:
            return Retcode.INVALID_ARGUMENT
        if entry.revoked:
            return Retcode.HANDLE_REVOKED
        return Retcode.NO_CAPABILITY if rights & ~entry.rights else entry

    def writable_somewhere(self, memory: Memory, segment: int) -> bool:
        """Whether any process has a mapping of a segment that is, or can become, writable."""
        return any(
            page.may_write
            for model in self.world
            for region in model.regions
            for page in region.pages
            if page.backing is not None
            and page.backing.memory is memory
            and page.index // memory.segment == segment
        )

    def buffers(self) -> set[Backing]:
        """The MDL buffers that handles, mappings and clones keep."""
        pages = [page for region in self.regions for page in region.pages]
        tops = {page.backing for page in pages if page.kind is PageKind.MDL}
        tops |= {entry.backing for entry in self.live_handles()}
        return {backing for top in tops if top is not None for backing in top.chain()}

    @override
    def usage(self) -> dict[str, int]:
        """What buffers and handles add."""
        usage = super().usage()
        buffers = self.buffers()
        roots = [backing for backing in buffers if backing.origin is None]
        usage["locked"] += sum(root.bytes for root in roots if root.locked)
        return usage | {
            "mdls": len(buffers),
            "mdl_bytes": sum(root.bytes for root in roots),
            "mdl_mappings": sum(not region.flags & VmmFlags.RESERVE for region in self.regions),
            "handles": sum(not entry.closed for entry in self.handles.values()),
        }

    # ---------------------------------------------------------------------------- buffers

    def mdl_create(
        self, size: int, prot: int, segment_size: int = 0, nbytes: int = 0
    ) -> Retcode | Backing:
        """A fresh buffer, which ends in its last page; LOCKED has all its memory."""
        if self.closed:
            return Retcode.INVALID_OPERATION
        sizes_are_legal = 0 < size < 1 << 64 and size % PAGE == segment_size % PAGE == 0
        sizes_are_legal = sizes_are_legal and size - PAGE < (nbytes or size) <= size
        if not (sizes_are_legal and prot_is_legal(prot, LOCKED)):
            return Retcode.INVALID_ARGUMENT
        if size > USER_SPACE_END:
            return Retcode.OUT_OF_MEMORY
        backing = self._fresh(size // PAGE, min(size, segment_size) // PAGE, nbytes)
        if prot & LOCKED:
            backing.memory.held = [True] * (size // PAGE)
            backing.locked = True
        return backing

    @staticmethod
    def _fresh(pages: int, segment: int = 0, nbytes: int = 0) -> Backing:
        return Backing(Buffer(Memory(pages, segment, nbytes), 0, pages))

    def mdl_create_from_buf(self, data: bytes, prot: int) -> Retcode | Backing:
        """A buffer of these bytes, frozen without WRITE."""
        if self.closed:
            return Retcode.INVALID_OPERATION
        if not data or not prot_is_legal(prot, 0):
            return Retcode.INVALID_ARGUMENT
        backing = self._fresh(-(-len(data) // PAGE), nbytes=len(data))
        memory = backing.memory
        for index in range(len(memory.pages)):
            memory.pages[index] = data[index * PAGE : (index + 1) * PAGE].ljust(PAGE, b"\0")
            memory.held[index] = True
        if not prot & WRITE:
            memory.seals = [FREEZE]
        return backing

    def mdl_create_from_vm(self, va: int, size: int, flags: int) -> Retcode | Backing:
        """The pages become a buffer where they are."""
        if not self.closed and not prot_is_legal(flags, 0):
            return Retcode.INVALID_ARGUMENT
        found = self._range(va, size, aligned=True)
        if isinstance(found, Retcode):
            return found
        pages = [found.pages[slot] for slot in self.slots(found, va, size)]
        if any(not page.committed or page.kind is PageKind.MDL for page in pages):
            return Retcode.INVALID_OPERATION
        if any(page.pins for page in pages):
            return Retcode.BUSY
        backing = self._whole(found, pages) or self._copied(found, pages)
        for page in pages:
            page.kind = PageKind.MDL
        return backing

    @staticmethod
    def _whole(region: Region, pages: list[Page]) -> Backing | None:
        """The memory file of a SHAREABLE region, if these pages are all of it."""
        backing = pages[0].backing if region.flags & SHAREABLE else None
        whole = backing is not None and len(backing.memory.pages) == len(pages)
        same = all(page.backing is backing for page in pages)
        in_order = all(left.index + 1 == right.index for left, right in pairwise(pages))
        return backing if whole and same and in_order else None

    def _copied(self, region: Region, pages: list[Page]) -> Backing:
        """A memory file of copies. Which untouched private pages it takes up, nobody says."""
        backing = self._fresh(len(pages))
        memory = backing.memory
        for index, page in enumerate(pages):
            memory.pages[index] = page.contents
            if region.flags & LOCKED:
                memory.held[index] = True
            elif page.backing is not None:
                memory.held[index] = page.backing.memory.held[page.index]
            elif page.contents.count(0) == PAGE:
                memory.held[index] = None
            else:
                memory.held[index] = True
            page.discard()
            page.backing, page.index, page.populated = backing, index, False
        return backing

    def mdl_get_size(self, handle: int) -> Retcode | int:
        """Bytes."""
        found = self.find(handle)
        return found if isinstance(found, Retcode) else found.backing.buffer.size

    def mdl_map(
        self, handle: int, offset: int, length: int, hint: int, prot: int
    ) -> tuple[Retcode, int | None]:
        """The return code, and the address where the model can tell it."""
        if self.closed:
            return Retcode.INVALID_OPERATION, None
        fixed = bool(prot & VmmFlags.FIXED)
        legal = (
            self._window_is_legal(offset, length)
            and hint >= 0
            and hint % PAGE == 0
            and hint + length < 1 << 64
            and prot >= 0
            and not prot & ~MAP_FLAGS
            and prot & 7 in LEGAL_PROTECTIONS
            and not (fixed and hint == 0)
        )
        if not legal:
            return Retcode.INVALID_ARGUMENT, None
        found = self.find(handle, (prot & 7) << MAP_SHIFT)
        if isinstance(found, Retcode):
            return found, None
        if offset + length > found.backing.buffer.size:
            return Retcode.INVALID_ARGUMENT, None
        first = found.backing.buffer.first + offset // PAGE
        return self._place(found.backing, hint, range(first, first + length // PAGE), prot)

    def _place(
        self, backing: Backing, hint: int, pages: range, prot: int
    ) -> tuple[Retcode, int | None]:
        """What becomes of a mapping with arguments that are all right."""
        low = hint - PAGE * bool(prot & VmmFlags.LOW_GUARD)
        high = hint + len(pages) * PAGE + PAGE * bool(prot & VmmFlags.HIGH_GUARD)
        segments = backing.memory.segments(pages[0], len(pages))
        reachable = low >= LOWEST and high <= USER_SPACE_END
        free = reachable and self.is_free(low, high)
        if prot & VmmFlags.FIXED and not reachable:
            return Retcode.INVALID_ARGUMENT, None
        if prot & VmmFlags.FIXED and not free:
            return Retcode.ALREADY_EXISTS, None
        if prot & WRITE and any(backing.memory.seals[number] for number in segments):
            return Retcode.NO_CAPABILITY, None
        if not prot & WRITE:
            backing.need_read_only(segments)
        return Retcode.OK, hint if free else None

    def mapped(self, va: int, handle: int, offset: int, length: int, prot: int) -> Region:
        """Record what an MdlMap made at ``va``."""
        backing = self.handles[serial(handle)].backing
        first = backing.buffer.first + offset // PAGE
        protection = prot & 7
        pages = [
            Page(
                protection,
                committed=True,
                backing=backing,
                index=first + number,
                kind=PageKind.MDL,
                ceiling=protection,
                may_write=bool(prot & WRITE),
            )
            for number in range(length // PAGE)
        ]
        if protection:
            for page in pages:
                self._settle(page, prot)
        return self._enter(va, pages, prot)

    @staticmethod
    def _window_is_legal(offset: int, length: int) -> bool:
        """Whether these numbers can be a part of some buffer."""
        return (
            offset >= 0
            and length > 0
            and offset % PAGE == length % PAGE == 0
            and offset + length < 1 << 64
        )

    def mdl_clone(self, handle: int, offset: int, length: int) -> Retcode | Backing:
        """A window on a buffer."""
        if self.closed:
            return Retcode.INVALID_OPERATION
        if not (0 <= handle <= MASK_64 and self._window_is_legal(offset, length)):
            return Retcode.INVALID_ARGUMENT
        found = self.find(handle, COPY)
        if isinstance(found, Retcode):
            return found
        origin = found.backing.buffer
        if offset + length > origin.size:
            return Retcode.INVALID_ARGUMENT
        first = origin.first + offset // PAGE
        return Backing(Buffer(origin.memory, first, length // PAGE, origin), found.backing)

    def mdl_seal(self, handle: int, seals: int) -> Retcode:
        """No more writers from now on, or none at all."""
        if not self.closed and (seals <= 0 or seals & ~(PUBLISH | FREEZE)):
            return Retcode.INVALID_ARGUMENT
        found = self.find(handle, MAP_WRITE)
        if isinstance(found, Retcode):
            return found
        memory = found.backing.memory
        for number in found.backing.buffer.segments:
            freezes = seals & FREEZE and not memory.seals[number] & FREEZE
            if freezes and self.writable_somewhere(memory, number):
                return Retcode.BUSY
            memory.seals[number] |= seals
        return Retcode.OK

    # ---------------------------------------------------------------------------- handles

    def handed_out(
        self, value: int, rights: int, backing: Backing, parent: Entry | None = None
    ) -> None:
        """Record a new handle."""
        self.handles[serial(value)] = Entry(value, rights, backing, parent)

    def handle_copy(self, handle: int, rights: int) -> Retcode | Backing:
        """Another handle of the same buffer."""
        if not self.closed and (rights < 0 or rights & ~ALL_RIGHTS):
            return Retcode.INVALID_ARGUMENT
        found = self.find(handle, COPY | rights)
        return found if isinstance(found, Retcode) else found.backing

    def handle_close(self, handle: int) -> Retcode:
        """The handle ends; what came from it counts as coming from where it came from."""
        found = self.find(handle)
        if found is Retcode.HANDLE_REVOKED:
            found = self.handles[serial(handle)]
        if isinstance(found, Retcode):
            return found
        found.closed = True
        for entry in self.handles.values():
            if entry.parent is found:
                entry.parent = found.parent
        return Retcode.OK

    def handle_revoke(self, handle: int) -> Retcode:
        """Everything that came from the handle ends."""
        found = self.find(handle)
        if isinstance(found, Retcode):
            return found
        for entry in self.handles.values():
            ancestor = entry.parent
            while ancestor is not None and ancestor is not found:
                ancestor = ancestor.parent
            entry.revoked = entry.revoked or ancestor is found
        return Retcode.OK

    # --------------------------------------------------------------------------- transfer

    def send_handle(self, handle: int, rights: int | None) -> Retcode | tuple[int, Backing]:
        """The rights that go out, and the buffer."""
        if rights is not None and not self.closed and (rights < 0 or rights & ~ALL_RIGHTS):
            return Retcode.INVALID_ARGUMENT
        found = self.find(handle, TRANSFER | (rights or 0))
        if isinstance(found, Retcode):
            return found
        going = found.rights if rights is None else rights
        if not going & MAP_WRITE:
            found.backing.need_read_only(found.backing.buffer.segments)
        return going, found.backing

    @staticmethod
    def recv_handle(
        rights: int, sent: Backing, demands: Demands, sender_uid: int
    ) -> Retcode | Backing:
        """What the receiver has then: the segments of the buffer, and its identities."""
        buffer = sent.buffer
        wanted = demands.require
        if all(sent.memory.seals[number] for number in buffer.segments):
            wanted &= ~PUBLISH  # which FREEZE includes
        refused = (
            bool(wanted & ~buffer.seals)
            or (demands.max_size is not None and buffer.nbytes > demands.max_size)
            or (demands.peer_uid is not None and demands.peer_uid != sender_uid)
        )
        if refused:
            return Retcode.SECURITY_DISALLOW
        known = [backing.buffer for backing in list(sent.chain())[:2] if backing.has_identity]
        base = known.pop() if len(buffer.segments) > 1 else sent.root.buffer
        received = Backing(base, writable=bool(rights & MAP_WRITE), part=buffer.segments)
        for clone in reversed(known):
            received = Backing(clone, received)
        return received

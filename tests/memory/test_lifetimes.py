"""Regions, buffers and what is made of them, dropped and closed in any order: the kernel agrees.

Every region is of memory files, so that the kernel can tell which are mapped and which are open.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis.strategies as st
import numpy as np
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from constants import RW
from kernel_oracle import PAGE
from leaks import read_descriptors, read_mappings
from model_machine import settings_of_the_suite
from vmm_linux import VMM, Mdl, Region, Rights, VmmError, VmmFlags
from vmm_linux.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable

SHAREABLE = RW | VmmFlags.COMMIT | VmmFlags.SHAREABLE
#: Where to look for one of several things.
PICK = st.integers(0, 1 << 16)

CONSUMERS: list[Callable[[Region], Any]] = [
    memoryview,
    Region.view,
    lambda region: region.view(PAGE, 1),
    lambda region: np.asarray(memoryview(region))[3:],
    lambda region: np.frombuffer(memoryview(region), "u1"),
    lambda region: memoryview(region)[5:][1:],
]


@dataclass
class Memory:
    """A memory file: its inode, and the objects that are to keep it open."""

    inode: int
    handles: set[int] = field(default_factory=set)


@dataclass
class Mapping:
    """What the model knows of one region."""

    memory: Memory
    size: int
    #: The object, while it is not dropped.
    region: Region | None
    freed: bool = False
    #: Of one that arrays share: the buffer's security id, and what they may do.
    shared: tuple[int, Rights] | None = None
    consumers: list[Any] = field(default_factory=list)

    @property
    def is_mapped(self) -> bool:
        """Whether its pages must be there."""
        return not self.freed and (self.region is not None or bool(self.consumers))


def open_files() -> set[int]:
    """The inodes of the memory files, no identities of clones, that this process has open."""
    return {
        Path(f"/proc/self/fd/{number}").stat().st_ino
        for number, target in read_descriptors().items()
        if target == "/memfd:vmm_linux (deleted)"
    }


def mapped_bytes() -> dict[int, int]:
    """How many bytes of each memory file this process maps, by inode."""
    found: dict[int, int] = {}
    for (start, end), _, backing in read_mappings():
        if "/memfd:vmm_linux" in backing:
            inode = int(backing.split()[1])
            found[inode] = found.get(inode, 0) + end - start
    return found


class Lifetimes(RuleBasedStateMachine):
    """One VMM, its regions and buffers, and a model of who keeps what."""

    def __init__(self) -> None:
        super().__init__()
        self.vmm = VMM()
        self.mappings: list[Mapping] = []
        self.mdls: list[tuple[Mdl, Memory]] = []
        self.before = open_files()

    def keep(self, region: Region, memory: Memory) -> None:
        """Remember a region."""
        self.mappings.append(Mapping(memory, region.size, region))

    def with_region(self) -> list[Mapping]:
        """The mappings whose object is at hand and usable."""
        return [mapping for mapping in self.mappings if mapping.region is not None]

    @precondition(lambda self: not self.vmm.closed)
    @rule(pages=st.integers(2, 4))
    def make_region(self, pages: int) -> None:
        """A region of its own memory, which is a file."""
        known = open_files()
        region = self.vmm.region(pages * PAGE, SHAREABLE)
        (inode,) = open_files() - known
        self.keep(region, Memory(inode))

    @precondition(lambda self: not self.vmm.closed)
    @rule(pages=st.integers(2, 4))
    def make_mdl(self, pages: int) -> None:
        """A buffer."""
        mdl = self.vmm.mdl(pages * PAGE)
        self.mdls.append((mdl, Memory(os.fstat(mdl.fileno()).st_ino, {id(mdl)})))

    @precondition(lambda self: self.mdls and not self.vmm.closed)
    @rule(pick=PICK, how=st.sampled_from(["read_only", "clone"]))
    def make_another(self, pick: int, how: str) -> None:
        """Another handle of a buffer, or a clone."""
        mdl, memory = self.mdls[pick % len(self.mdls)]
        if not mdl.closed:
            made = getattr(mdl, how)()
            memory.handles.add(id(made))
            self.mdls.append((made, memory))

    @precondition(lambda self: self.mdls and not self.vmm.closed)
    @rule(pick=PICK, writable=st.booleans())
    def map_mdl(self, pick: int, writable: bool) -> None:
        """Map a buffer."""
        mdl, memory = self.mdls[pick % len(self.mdls)]
        if not mdl.closed:
            self.keep(mdl.map(None if writable else VmmFlags.READ), memory)

    @precondition(lambda self: self.mdls and not self.vmm.closed)
    @rule(pick=PICK)
    def make_array(self, pick: int) -> None:
        """An array: arrays of the same part of a buffer, with the same rights, share a mapping."""
        mdl, memory = self.mdls[pick % len(self.mdls)]
        if mdl.closed:
            return
        key = mdl.sid, mdl.rights
        alive = [each for each in self.mappings if each.shared == key and each.is_mapped]
        mapping = alive[0] if alive else Mapping(memory, PAGE, None, shared=key)
        mapping.consumers.append(mdl.array((4, 4), "i4")[1:].T)
        if not alive:
            self.mappings.append(mapping)

    @precondition(lambda self: self.with_region())
    @rule(pick=PICK, how=st.integers(0, len(CONSUMERS) - 1))
    def consume(self, pick: int, how: int) -> None:
        """Make something of a region's buffer."""
        mapping = self.with_region()[pick % len(self.with_region())]
        assert mapping.region is not None
        try:
            mapping.consumers.append(CONSUMERS[how](mapping.region))
        except VmmError:
            assert mapping.region.freed

    @precondition(lambda self: self.mappings)
    @rule(pick=PICK, which=PICK)
    def let_go(self, pick: int, which: int) -> None:
        """Drop something that was made of a region."""
        mapping = self.mappings[pick % len(self.mappings)]
        if mapping.consumers:
            del mapping.consumers[which % len(mapping.consumers)]

    @precondition(lambda self: self.with_region())
    @rule(pick=PICK)
    def free(self, pick: int) -> None:
        """Free a region, or find that something holds it."""
        mapping = self.with_region()[pick % len(self.with_region())]
        assert mapping.region is not None
        if mapping.region.freed:
            return
        try:
            mapping.region.free()
        except Busy:
            assert mapping.consumers
        else:
            assert not mapping.consumers
            mapping.freed = True

    @precondition(lambda self: self.with_region())
    @rule(pick=PICK)
    def drop_region(self, pick: int) -> None:
        """Drop the object of a region."""
        self.with_region()[pick % len(self.with_region())].region = None

    @precondition(lambda self: self.mdls)
    @rule(pick=PICK, explicitly=st.booleans())
    def end_mdl(self, pick: int, explicitly: bool) -> None:
        """Close or drop a buffer's handle."""
        mdl, memory = self.mdls.pop(pick % len(self.mdls))
        memory.handles.discard(id(mdl))
        if explicitly:
            mdl.close()

    @rule()
    def close(self) -> None:
        """Close the VMM: what nothing is made of goes, and every handle."""
        self.vmm.close()
        for mapping in self.mappings:
            mapping.freed |= not mapping.consumers
        for mdl, memory in self.mdls:
            memory.handles.clear()
            mdl.close()  # its descriptor is its own
        # What a view holds goes with the last view, whether or not there is an object.
        for mapping in self.mappings:
            mapping.region = None

    @invariant()
    def the_kernel_has_just_what_is_kept(self) -> None:
        """Mappings and files are those that something keeps."""
        expected: dict[int, int] = {}
        for mapping in self.mappings:
            if mapping.is_mapped:
                inode = mapping.memory.inode
                expected[inode] = expected.get(inode, 0) + mapping.size
        assert mapped_bytes() == expected
        kept = {memory.inode for _, memory in self.mdls if memory.handles}
        assert open_files() - self.before == kept | expected.keys()
        self.vmm._check()

    def teardown(self) -> None:
        """Let go of everything, in no special order, and find nothing left."""
        self.mdls.clear()
        self.mappings.clear()
        gc.collect()
        assert (mapped_bytes(), open_files()) == ({}, self.before)
        self.vmm.close()


TestLifetimes = Lifetimes.TestCase
TestLifetimes.settings = settings_of_the_suite(examples=20, steps=30)

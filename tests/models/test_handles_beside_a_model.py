"""The table of handles in every order of calls, beside a plain model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
)
from typing_extensions import override

import kernel_oracle as kernel
from constants import ALL_RIGHTS, FIRST_RIGHTS, SUBSETS_OF_RIGHTS
from faces import Face, Outcome, call
from kernel_oracle import PAGE
from vmm_linux import VMM, Handle, Retcode, Rights

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(eq=False)
class Buffer:
    """What the model knows of one buffer; its security id once a handle has told it."""

    pages: int
    nbytes: int
    origin: Buffer | None = None
    sid: int | None = None

    def chain(self) -> Iterator[Buffer]:
        """The buffer, what it was cloned from, and so on."""
        at: Buffer | None = self
        while at is not None:
            yield at
            at = at.origin


@dataclass(eq=False)
class Entry:
    """What the model knows of one handle."""

    rights: Rights
    buffer: Buffer
    parent: Entry | None = None
    fate: Retcode = Retcode.OK

    def descends_from(self, other: Entry) -> bool:
        """Whether it was made from the other one, however many closed ones lie between."""
        at = self.parent
        while at is not None and at is not other:
            at = at.parent
        return at is other


RIGHTS = st.sampled_from(
    [*SUBSETS_OF_RIGHTS, *[ALL_RIGHTS] * 20, *[ALL_RIGHTS & ~Rights.GET_SID] * 10]
)


class HandleMachine(RuleBasedStateMachine):
    """Handles of one VMM in every order, beside entries that remember where each came from."""

    handles: Bundle[Handle] = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.vmm = VMM()
        self.known: dict[int, Entry] = {}

    def expect(self, method: str, handle: int, needed: Rights, *rest: int) -> Outcome:
        """Call a method; its return code must be what the model says."""
        entry = self.known[handle]
        wanted = entry.fate
        if wanted is Retcode.OK and needed & ~entry.rights:
            wanted = Retcode.NO_CAPABILITY
        got = call(self.vmm, Face.METHODS, method, handle, *rest)
        assert got.rc is wanted, (method, got)
        return got

    def enter(self, handle: Handle, entry: Entry) -> Handle:
        """Write a new handle down."""
        assert int(handle) not in self.known, "no handle is handed out twice"
        assert handle.rights == entry.rights
        self.known[int(handle)] = entry
        return handle

    def fresh(self, prot: int, pages: int, short: int = 0) -> Handle:
        """The first handle of a new buffer, which ends ``short`` bytes before its pages."""
        nbytes = pages * PAGE - short
        entry = Entry(FIRST_RIGHTS[prot], Buffer(pages, nbytes))
        return self.enter(self.vmm.mdl_create(pages * PAGE, prot, 0, nbytes), entry)

    @initialize(target=handles, prot=st.sampled_from([3, 7]), pages=st.integers(2, 4))
    def begin(self, prot: int, pages: int) -> Handle:
        """A first buffer."""
        return self.fresh(prot, pages)

    @rule(
        target=handles,
        prot=st.sampled_from([1, 3, 5, 7]),
        pages=st.integers(1, 4),
        short=st.integers(0, PAGE - 1),
    )
    def create(self, prot: int, pages: int, short: int) -> Handle:
        """Another buffer."""
        return self.fresh(prot, pages, short)

    @rule(target=handles, handle=handles, rights=RIGHTS)
    def copy(self, handle: Handle, rights: Rights) -> Handle | MultipleResults[Handle]:
        """A copy with some rights, or none."""
        origin = self.known[handle]
        got = self.expect("handle_copy", handle, Rights.COPY | rights, int(rights))
        if got.rc is not Retcode.OK:
            return multiple()
        return self.enter(got.value, Entry(rights, origin.buffer, origin))

    @rule(target=handles, handle=handles, first=st.integers(0, 2), pages=st.integers(1, 4))
    def clone(self, handle: Handle, first: int, pages: int) -> Handle | MultipleResults[Handle]:
        """A window on a buffer, or none."""
        origin = self.known[handle]
        window = first * PAGE, pages * PAGE
        usable = origin.fate is Retcode.OK and Rights.COPY in origin.rights
        if usable and first + pages > origin.buffer.pages:
            got = call(self.vmm, Face.METHODS, "mdl_clone", handle, *window)
            assert got.rc is Retcode.INVALID_ARGUMENT
            return multiple()
        got = self.expect("mdl_clone", handle, Rights.COPY, *window)
        if got.rc is not Retcode.OK:
            return multiple()
        nbytes = min(pages * PAGE, origin.buffer.nbytes - first * PAGE)
        made = Buffer(pages, nbytes, origin.buffer)
        return self.enter(got.value, Entry(origin.rights, made, origin))

    @rule(handle=handles)
    def close(self, handle: Handle) -> None:
        """The end of a handle, revoked or not."""
        entry = self.known[handle]
        got = call(self.vmm, Face.METHODS, "handle_close", handle)
        over = entry.fate is Retcode.RESOURCE_NOT_FOUND
        assert got.rc is (Retcode.RESOURCE_NOT_FOUND if over else Retcode.OK)
        entry.fate = Retcode.RESOURCE_NOT_FOUND

    @rule(handle=handles)
    def revoke(self, handle: Handle) -> None:
        """The end of all that came from a handle."""
        self.expect("handle_revoke", handle, Rights(0))
        entry = self.known[handle]
        if entry.fate is not Retcode.OK:
            return
        for other in self.known.values():
            if other.fate is Retcode.OK and other.descends_from(entry):
                other.fate = Retcode.HANDLE_REVOKED

    @rule(handle=handles, bit=st.integers(0, 63), face=st.sampled_from(Face))
    def forge(self, handle: Handle, bit: int, face: Face) -> None:
        """A flipped bit: another handle by chance, else refused."""
        forged = handle ^ 1 << bit
        got = call(self.vmm, face, "mdl_get_size", forged)
        if forged in self.known:
            assert got.rc is self.known[forged].fate
        elif 32 <= bit < 48 and self.known[handle].fate is not Retcode.RESOURCE_NOT_FOUND:
            assert got.rc is Retcode.INVALID_ARGUMENT, "the number is in use"
        else:
            assert got.rc in {Retcode.INVALID_ARGUMENT, Retcode.RESOURCE_NOT_FOUND}

    @invariant()
    def every_handle_is_what_the_model_says(self) -> None:
        """All of them, after each step."""
        for handle, entry in self.known.items():
            got = call(self.vmm, Face.METHODS, "handle_info", handle)
            assert got.rc is entry.fate
            if got.rc is not Retcode.OK:
                continue
            info, buffer = got.value, entry.buffer
            facts = (info.rights, info.size, info.nbytes)
            assert facts == (entry.rights, buffer.pages * PAGE, buffer.nbytes)
            if Rights.GET_SID in entry.rights:
                buffer.sid = buffer.sid or info.sid
                assert info.sid == buffer.sid
                assert (info.origin_sid is None) == (buffer.origin is None)
                if buffer.origin is not None:
                    buffer.origin.sid = buffer.origin.sid or info.origin_sid
                    assert info.origin_sid == buffer.origin.sid

    @invariant()
    def buffers_are_told_apart(self) -> None:
        """No two have the same security id."""
        buffers = {each for entry in self.known.values() for each in entry.buffer.chain()}
        sids = [each.sid for each in buffers if each.sid is not None]
        assert len(set(sids)) == len(sids)

    @invariant()
    def descriptors_are_held_for_live_buffers_alone(self) -> None:
        """One for each that a live handle names, and for what these were cloned from."""
        live = [entry.buffer for entry in self.known.values() if entry.fate is Retcode.OK]
        needed = {each for buffer in live for each in buffer.chain()}
        names = kernel.descriptors().values()
        assert sum("/memfd:vmm_linux" in name for name in names) == len(needed)

    @override
    def teardown(self) -> None:
        self.vmm.close()


TestHandlesBesideAModel = HandleMachine.TestCase
TestHandlesBesideAModel.settings = settings(
    max_examples=100,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

"""The table of names beside a model of it: owners, lifetimes, quotas."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

from vmm_linux.broker.table import FIGURES, Bounds, Entry, Table
from vmm_linux.errors import (
    AlreadyExists,
    InvalidOperation,
    QuotaExceeded,
    ResourceNotFound,
)
from vmm_linux.names.protocol import Lifetime

if TYPE_CHECKING:
    from collections.abc import Iterable

USERS = st.sampled_from([None, 0, 1000, 1001])
NAMES = st.sampled_from([f"name {number}" for number in range(6)])
TOKENS = st.sampled_from([b"first", b"second"])
PIDS = st.integers(1, 3)
EACH = Bounds(connections=3, names=3, bytes=10, descriptors=8)
IN_ALL = Bounds(connections=6, names=5, bytes=20, descriptors=15)


class Known(NamedTuple):
    """What the model knows of a name."""

    uid: int | None
    connection: int
    family: tuple[int | None, bytes] | None
    lifetime: Lifetime
    nbytes: int


class Names(RuleBasedStateMachine):
    """A table, and what it is to have."""

    connections: Bundle[int] = Bundle("connections")

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.users: dict[int, int | None] = {}
        self.families: dict[int, tuple[int | None, bytes] | None] = {}
        self.ancestors: set[tuple[tuple[int | None, bytes], int]] = set()
        self.names: dict[str, Known] = {}
        self.holders: dict[str, set[int]] = {}

    @initialize()
    def begin(self) -> None:
        """Begin with an empty table."""
        self.table = Table(IN_ALL, EACH)

    # ---- the model ----------------------------------------------------------------------------

    def used(self, uid: int | None, figure: str) -> int:
        """What a user has."""
        mine = [known for known in self.names.values() if known.uid == uid]
        return {
            "connections": sum(other == uid for other in self.users.values()),
            "names": len(mine),
            "bytes": sum(known.nbytes for known in mine),
            "descriptors": 2 * len(mine),
            "tickets": 0,
        }[figure]

    def fits(self, uid: int | None, **more: int) -> bool:
        """Whether so much more fits."""
        everybody = {uid, *self.users.values(), *(known.uid for known in self.names.values())}
        return all(
            self.used(uid, figure) + amount <= getattr(EACH, figure)
            and sum(self.used(each, figure) for each in everybody) + amount
            <= getattr(IN_ALL, figure)
            for figure, amount in more.items()
        )

    def settle(self, ended: Iterable[Entry], connection: int | None = None) -> None:
        """Names of a connection that ended, and of families without a process, are gone."""
        alive = {key for key in self.families.values() if key}
        alive |= {key for key, _ in self.ancestors}
        gone = {
            name
            for name, known in self.names.items()
            if (known.lifetime is Lifetime.CONNECTION and known.connection == connection)
            or (known.lifetime is Lifetime.FAMILY and known.family not in alive)
        }
        assert {entry.name for entry in ended} == gone
        for name in gone:
            del self.names[name], self.holders[name]
        self.forget_families()

    def forget_families(self) -> None:
        """Ancestors matter as long as their family has a member or a name."""
        kept = {key for key in self.families.values() if key}
        kept |= {
            known.family
            for known in self.names.values()
            if known.lifetime is Lifetime.FAMILY and known.family
        }
        self.ancestors = {each for each in self.ancestors if each[0] in kept}

    # ---- what happens -------------------------------------------------------------------------

    @rule(target=connections, uid=USERS)
    def connect(self, uid: int | None) -> int:
        """A client connects."""
        self.number += 1
        if not self.fits(uid, connections=1):
            with pytest.raises(QuotaExceeded, match="connections"):
                self.table.connect(self.number, uid, 1)
            return 0
        self.table.connect(self.number, uid, 1)
        self.users[self.number] = uid
        self.families[self.number] = None
        return self.number

    @rule(number=consumes(connections))
    def disconnect(self, number: int) -> None:
        """A client goes."""
        if number in self.users:
            ended = self.table.disconnect(number)
            del self.users[number], self.families[number]
            for holders in self.holders.values():
                holders.discard(number)
            self.settle(ended, number)

    @rule(number=connections, token=TOKENS)
    def join(self, number: int, token: bytes) -> None:
        """A client says its family."""
        if number in self.users:
            ended = self.table.join(self.table.members[number], token)
            self.families[number] = (self.users[number], token)
            self.settle(ended)

    @rule(
        number=connections,
        name=NAMES,
        lifetime=st.sampled_from(Lifetime),
        nbytes=st.integers(0, 6),
    )
    def add(self, number: int, name: str, lifetime: Lifetime, nbytes: int) -> None:
        """A client makes a name."""
        if number not in self.users:
            return
        uid = self.users[number]
        entry = Entry(
            name,
            7,
            self.table.members[number],
            rights=1,
            lifetime=lifetime,
            nbytes=nbytes,
            descriptors=2,
        )
        expected: type[Exception] | None = None
        if name in self.names:
            expected = AlreadyExists
        elif (lifetime is Lifetime.FAMILY and self.families[number] is None) or (
            lifetime is Lifetime.KEPT and uid is None
        ):
            expected = InvalidOperation
        elif not self.fits(uid, names=1, bytes=nbytes, descriptors=2):
            expected = QuotaExceeded
        if expected is not None:
            with pytest.raises(expected):
                self.table.add("publish", entry)
            return
        self.table.add("publish", entry)
        self.names[name] = Known(uid, number, self.families[number], lifetime, nbytes)
        self.holders[name] = {number}

    @rule(number=connections, name=NAMES)
    def hold(self, number: int, name: str) -> None:
        """A client opens a name."""
        if number in self.users and name in self.names:
            self.table.hold(self.table.members[number], self.table.get("open", name))
            self.holders[name].add(number)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        """A name is unlinked."""
        if name not in self.names:
            with pytest.raises(ResourceNotFound):
                self.table.get("unlink", name)
            return
        self.table.remove(self.table.get("unlink", name))
        del self.names[name], self.holders[name]
        self.forget_families()

    @rule(name=NAMES)
    def keep(self, name: str) -> None:
        """A name is kept."""
        if name not in self.names:
            return
        if self.names[name].uid is None:
            with pytest.raises(InvalidOperation, match="unknown"):
                self.table.keep("keep", self.table.get("keep", name))
            return
        self.table.keep("keep", self.table.get("keep", name))
        self.names[name] = self.names[name]._replace(lifetime=Lifetime.KEPT)
        self.forget_families()

    @rule(number=connections, pid=PIDS)
    def add_ancestor(self, number: int, pid: int) -> None:
        """An ancestor of a client is known."""
        key = self.families.get(number)
        if key is not None:
            self.table.add_ancestor(key, pid)
            self.ancestors.add((key, pid))

    @precondition(lambda self: self.ancestors)
    @rule(data=st.data())
    def end_ancestor(self, data: st.DataObject) -> None:
        """An ancestor ends."""
        key, pid = data.draw(st.sampled_from(sorted(self.ancestors, key=repr)))
        self.ancestors.discard((key, pid))
        self.settle(self.table.ancestor_ended(key, pid))

    # ---- what always holds --------------------------------------------------------------------

    @invariant()
    def has_the_names_of_the_model(self) -> None:
        """Names, owners, lifetimes, holders."""
        table = self.table
        assert [entry.name for entry in table.listed("")] == sorted(self.names)
        assert [entry.name for entry in table.listed("name 2")] == [
            name for name in sorted(self.names) if name > "name 2"
        ]
        for name, known in self.names.items():
            entry = table.get("stat", name)
            assert (entry.uid, entry.lifetime) == (known.uid, known.lifetime)
            assert entry.holders == self.holders[name]
        assert table.leases == sum(
            known.lifetime is not Lifetime.CONNECTION for known in self.names.values()
        )

    @invariant()
    def counts_what_the_model_counts(self) -> None:
        """Quotas."""
        table = self.table
        everybody = {*self.users.values(), *(known.uid for known in self.names.values())}
        assert set(table.users) == everybody
        for figure in FIGURES:
            for uid in everybody:
                assert getattr(table.users[uid], figure) == self.used(uid, figure)
            total = sum(self.used(uid, figure) for uid in everybody)
            assert getattr(table.in_all, figure) == total

    @invariant()
    def holds_nothing_that_ended(self) -> None:
        """Members and families."""
        table = self.table
        entries = set(table.entries.values())
        assert set(table.members) == set(self.users)
        for member in table.members.values():
            assert member.made <= member.held | entries
            assert member.held <= entries
            assert member.family == self.families[member.number]
        for key, family in table.families.items():
            assert family.members or family.entries
            assert family.entries <= entries
            assert family.members == {number for number, of in self.families.items() if of == key}
            assert {(key, pid) for pid in family.ancestors} <= self.ancestors


TestNames = Names.TestCase
TestNames.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


def test_room_is_what_the_tighter_bound_leaves() -> None:
    table = Table(Bounds(bytes=10), Bounds(bytes=7))
    member = table.connect(1, 1000, 1)
    table.add("publish", Entry("a", 1, member, rights=0, lifetime=Lifetime.KEPT, nbytes=5))
    assert (table.room_for_bytes(1000), table.room_for_bytes(1001)) == (2, 5)
    assert Table().room_for_bytes(1000) is None


def test_the_end_of_a_family_is_reported_once() -> None:
    table = Table()
    member = table.connect(1, 1000, 1)
    table.join(member, b"family")
    table.add("publish", Entry("a", 1, member, rights=0, lifetime=Lifetime.FAMILY))
    table.add_ancestor((1000, b"family"), 5)
    assert table.disconnect(1) == []
    assert [entry.name for entry in table.ancestor_ended((1000, b"family"), 5)] == ["a"]
    assert table.ended_families == [(1000, b"family")]

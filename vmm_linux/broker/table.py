"""The names of a broker: who owns them, how long they live, how many there may be. No I/O.

What a name stands for is whatever the caller puts there. Connections are numbers of the caller's,
users are uids or None for an unknown one; all unknown users count as one.
"""

from __future__ import annotations

import bisect
import operator
from typing import TYPE_CHECKING, Final, NamedTuple

from vmm_linux._core.values import quoted
from vmm_linux.errors import AlreadyExists, InvalidOperation, QuotaExceeded, ResourceNotFound
from vmm_linux.names.protocol import Lifetime

if TYPE_CHECKING:
    from collections.abc import Iterator

    FamilyKey = tuple[int | None, bytes]


class Bounds(NamedTuple):
    """The most that there may be; None is no bound.

    Attributes:
        connections: that are open.
        names: of any lifetime.
        bytes: lengths of the buffers that have names or tickets, in whole pages, each time; a
            clone counts too.
        descriptors: that the broker holds open for these buffers.
        tickets: that wait to be redeemed, or are kept.
    """

    connections: int | None = None
    names: int | None = None
    bytes: int | None = None
    descriptors: int | None = None
    tickets: int | None = None


class Figures(NamedTuple):
    """How much there is of each, or how much more there is to be."""

    connections: int = 0
    names: int = 0
    bytes: int = 0
    descriptors: int = 0
    tickets: int = 0

    def plus(self, more: Figures) -> Figures:
        """The sums."""
        return Figures(*map(operator.add, self, more))

    def minus(self, less: Figures) -> Figures:
        """The differences."""
        return Figures(*map(operator.sub, self, less))

    def within(self, bounds: Bounds) -> bool:
        """Whether there is no more than that."""
        return all(
            bound is None or there <= bound for there, bound in zip(self, bounds, strict=True)
        )


NOTHING: Final = Figures()
A_CONNECTION: Final = Figures(connections=1)
FIGURES: Final = Figures._fields
"""What is counted, of each user and in all."""


class Entry:
    """A name, and what it stands for."""

    __slots__ = (
        "connection",
        "family",
        "figures",
        "holders",
        "item",
        "lifetime",
        "name",
        "pid",
        "revoked",
        "rights",
        "uid",
        "weight",
    )

    def __init__(
        self,
        name: str,
        item: int,
        maker: Member,
        *,
        rights: int,
        lifetime: Lifetime,
        nbytes: int = 0,
        descriptors: int = 0,
        weight: int = 1,
    ) -> None:
        self.name = name
        self.item = item
        self.uid = maker.uid
        self.pid = maker.pid
        self.connection = maker.number
        self.family = maker.family
        self.rights = rights
        self.lifetime = lifetime
        self.weight = weight
        """Descriptors that travel with the buffer."""
        self.revoked = False
        self.holders: set[int] = set()
        self.figures = Figures(0, 1, nbytes, descriptors)


class Member:
    """What the table knows of a connection."""

    __slots__ = ("family", "held", "made", "number", "pid", "uid")

    def __init__(self, number: int, uid: int | None, pid: int) -> None:
        self.number = number
        self.uid = uid
        self.pid = pid
        self.family: FamilyKey | None = None
        self.made: set[Entry] = set()
        """Names that live as long as this connection."""
        self.held: set[Entry] = set()
        """Names that it made or opened."""


class Family:
    """Processes that ``multiprocessing`` made of one program, as far as the broker knows them."""

    __slots__ = ("ancestors", "entries", "members")

    def __init__(self) -> None:
        self.members: set[int] = set()
        self.ancestors: set[int] = set()
        self.entries: set[Entry] = set()


class Table:
    """All names of a broker.

    Args:
        bounds: of all users together.
        each: of each user.
    """

    def __init__(self, bounds: Bounds | None = None, each: Bounds | None = None) -> None:
        self.bounds = bounds or Bounds()
        self.each = each or Bounds()
        self.entries: dict[str, Entry] = {}
        self.order: list[str] = []
        self.members: dict[int, Member] = {}
        self.families: dict[FamilyKey, Family] = {}
        self.ended_families: list[FamilyKey] = []
        """Families that ended since the caller last looked, whose ancestors matter no more."""
        self.in_all = NOTHING
        self.users: dict[int | None, Figures] = {}

    # ---- quotas -------------------------------------------------------------------------------

    def check_room(self, method: str, uid: int | None, more: Figures) -> None:
        """Whether so much more fits.

        Errors:
            QUOTA_EXCEEDED: a bound of this user or of all.
        """
        mine = self.users.get(uid, NOTHING)
        if mine.plus(more).within(self.each) and self.in_all.plus(more).within(self.bounds):
            return
        for bounds, there, whose in (
            (self.each, mine, f"of user {'unknown' if uid is None else uid}"),
            (self.bounds, self.in_all, "in all"),
        ):
            for figure, used, bound, amount in zip(FIGURES, there, bounds, more, strict=True):
                if bound is not None and used + amount > bound:
                    raise QuotaExceeded(
                        method,
                        f"{used} {figure} {whose} are there and {amount} more are asked for; the "
                        f"broker's limit is {bound} (limits in its policy file)",
                    )

    def room_for_bytes(self, uid: int | None) -> int | None:
        """How many more bytes fit; None for any number."""
        rooms = [
            max(0, bounds.bytes - there.bytes)
            for bounds, there in (
                (self.each, self.users.get(uid, NOTHING)),
                (self.bounds, self.in_all),
            )
            if bounds.bytes is not None
        ]
        return min(rooms, default=None)

    def charge(self, uid: int | None, more: Figures) -> None:
        """A user has so much more."""
        self.users[uid] = self.users.get(uid, NOTHING).plus(more)
        self.in_all = self.in_all.plus(more)

    def refund(self, uid: int | None, less: Figures) -> None:
        """A user has so much less."""
        left = self.users[uid].minus(less)
        if left == NOTHING:
            del self.users[uid]
        else:
            self.users[uid] = left
        self.in_all = self.in_all.minus(less)

    # ---- connections and families ---------------------------------------------------------------

    def connect(self, number: int, uid: int | None, pid: int) -> Member:
        """A connection begins.

        Errors:
            QUOTA_EXCEEDED: too many of this user or in all.
        """
        self.check_room("connect", uid, A_CONNECTION)
        member = self.members[number] = Member(number, uid, pid)
        self.charge(uid, A_CONNECTION)
        return member

    def release(self, member: Member) -> list[Entry]:
        """A connection can ask for nothing any more: the names that end with it or its family."""
        for entry in member.held:
            entry.holders.discard(member.number)
        member.held.clear()
        ended = list(member.made)
        for entry in ended:
            self.remove(entry)
        if member.family is not None:
            self.families[member.family].members.discard(member.number)
            ended += self._end_family(member.family)
            member.family = None
        return ended

    def disconnect(self, number: int) -> list[Entry]:
        """A connection is closed: the names that end, as of ``release``."""
        member = self.members.pop(number)
        ended = self.release(member)
        self.refund(member.uid, A_CONNECTION)
        return ended

    def join(self, member: Member, token: bytes) -> list[Entry]:
        """A connection says which family it is of: the names that end as it left another one."""
        key = (member.uid, token)
        before = member.family
        if before == key:
            return []
        member.family = key
        self.families.setdefault(key, Family()).members.add(member.number)
        if before is None:
            return []
        self.families[before].members.discard(member.number)
        return self._end_family(before)

    def add_ancestor(self, key: FamilyKey, pid: int) -> None:
        """A process is an ancestor of one that made a name of this family."""
        self.families[key].ancestors.add(pid)

    def ancestor_ended(self, key: FamilyKey, pid: int) -> list[Entry]:
        """An ancestor ended: the names that end with it."""
        family = self.families.get(key)
        if family is None:
            return []
        family.ancestors.discard(pid)
        return self._end_family(key)

    def _end_family(self, key: FamilyKey) -> list[Entry]:
        """The names of a family that has no process left, which end."""
        family = self.families[key]
        if family.members or (family.ancestors and family.entries):
            return []
        ended = list(family.entries)
        for entry in ended:
            self.remove(entry)
        self._forget_family(key)
        return ended

    def _forget_family(self, key: FamilyKey) -> None:
        """Drop a family that has neither a process nor a name."""
        family = self.families.get(key)
        if family is not None and not family.members and not family.entries:
            del self.families[key]
            self.ended_families.append(key)

    # ---- names ----------------------------------------------------------------------------------

    def check_free(self, method: str, name: str) -> None:
        """Whether a name can be made.

        Errors:
            ALREADY_EXISTS: it is taken.
        """
        if name in self.entries:
            raise AlreadyExists(method, f"the name {quoted(name)} is taken")

    def check_new(
        self, method: str, member: Member, name: str, lifetime: Lifetime, more: Figures
    ) -> None:
        """Whether a connection can make a name.

        Errors:
            ALREADY_EXISTS: it is taken.
            QUOTA_EXCEEDED: too much of this user or in all.
            INVALID_OPERATION: a lifetime that its maker cannot ask for.
        """
        self.check_free(method, name)
        self.check_lifetime(method, member, lifetime)
        self.check_room(method, member.uid, more)

    def add(self, method: str, entry: Entry) -> None:
        """Take in a name, which its maker holds; errors as of ``check_new``."""
        member = self.members[entry.connection]
        self.check_new(method, member, entry.name, entry.lifetime, entry.figures)
        self.insert(member, entry)

    def insert(self, member: Member, entry: Entry) -> None:
        """The same, checked just before."""
        self.entries[entry.name] = entry
        bisect.insort(self.order, entry.name)
        self.charge(entry.uid, entry.figures)
        if entry.lifetime is Lifetime.CONNECTION:
            member.made.add(entry)
        elif entry.lifetime is Lifetime.FAMILY and entry.family is not None:
            self.families[entry.family].entries.add(entry)
        self.hold(member, entry)

    @staticmethod
    def check_lifetime(method: str, member: Member, lifetime: Lifetime) -> None:
        """Whether a connection can ask for a lifetime.

        Errors:
            INVALID_OPERATION: it cannot.
        """
        if lifetime is Lifetime.FAMILY and member.family is None:
            raise InvalidOperation(method, "the client has not said which family it belongs to")
        if lifetime is Lifetime.KEPT and member.uid is None:
            raise InvalidOperation(
                method, "the client's user is unknown, and nobody could unlink what is kept for it"
            )

    def get(self, method: str, name: str) -> Entry:
        """What a name stands for.

        Errors:
            RESOURCE_NOT_FOUND: no such name.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise ResourceNotFound(method, f"there is no name {quoted(name)}")
        return entry

    @staticmethod
    def hold(member: Member, entry: Entry) -> None:
        """A connection has the buffer of a name."""
        entry.holders.add(member.number)
        member.held.add(entry)

    def remove(self, entry: Entry) -> None:
        """A name ends."""
        del self.entries[entry.name]
        del self.order[bisect.bisect_left(self.order, entry.name)]
        self._leave(entry)
        for number in entry.holders:
            self.members[number].held.discard(entry)
        entry.holders.clear()
        self.refund(entry.uid, entry.figures)

    def keep(self, method: str, entry: Entry) -> None:
        """Let a name live until it is unlinked.

        Errors:
            INVALID_OPERATION: its owner is unknown.
        """
        if entry.uid is None:
            raise InvalidOperation(
                method, f"the owner of {quoted(entry.name)} is unknown, and nobody could unlink it"
            )
        self._leave(entry)
        entry.lifetime = Lifetime.KEPT

    def _leave(self, entry: Entry) -> None:
        """Take a name from what it would end with."""
        maker = self.members.get(entry.connection)
        if maker is not None:
            maker.made.discard(entry)
        if entry.lifetime is Lifetime.FAMILY and entry.family is not None:
            family = self.families.get(entry.family)
            if family is not None:
                family.entries.discard(entry)
                self._forget_family(entry.family)

    def listed(self, after: str) -> Iterator[Entry]:
        """Names in order, those after one."""
        for name in self.order[bisect.bisect_right(self.order, after) :]:
            yield self.entries[name]

    @property
    def leases(self) -> int:
        """Names that live without a connection."""
        return sum(entry.lifetime is not Lifetime.CONNECTION for entry in self.entries.values())

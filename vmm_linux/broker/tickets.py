"""Tickets: each holds a buffer until it is redeemed, or its deadline has passed. No I/O.

A ticket outlives the connection that made it, so that what a process put into a pickle arrives
even if that process has ended. The table knows digests alone: who reads it can redeem nothing.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from vmm_linux.broker.table import Figures
from vmm_linux.errors import AlreadyExists, ResourceNotFound

if TYPE_CHECKING:
    from vmm_linux.broker.table import Table

SLACK: Final = 1024
"""Deadlines of ended tickets that do not matter."""
REMEMBERED: Final = 4096
"""Tickets of which is known why they ended."""


class Ticket:
    """A buffer that waits for the owner of the secret."""

    __slots__ = (
        "deadline",
        "digest",
        "figures",
        "item",
        "keeper",
        "rights",
        "seconds",
        "uid",
        "weight",
    )

    def __init__(
        self,
        digest: bytes,
        item: int,
        uid: int | None,
        *,
        rights: int,
        seconds: float,
        nbytes: int = 0,
        descriptors: int = 0,
        weight: int = 1,
    ) -> None:
        self.digest = digest
        self.item = item
        self.uid = uid
        self.rights = rights
        self.seconds = seconds
        """How long it waits."""
        self.deadline = 0.0
        self.keeper: int | None = None
        """The connection with which it ends, where it has no deadline."""
        self.weight = weight
        self.figures = Figures(0, 0, nbytes, descriptors, 1)


class Tickets:
    """All tickets of a broker.

    Args:
        table: that counts what users have.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        self.waiting: dict[bytes, Ticket] = {}
        self.deadlines: list[tuple[float, bytes]] = []
        self.kept: dict[int, set[Ticket]] = {}
        """By the connection that keeps them."""
        self.ended: OrderedDict[bytes, tuple[int | None, str]] = OrderedDict()

    def check_new(self, digest: bytes, uid: int | None, figures: Figures) -> None:
        """Whether a ticket can be made.

        Errors:
            ALREADY_EXISTS: this digest is known.
            QUOTA_EXCEEDED: too much of this user or in all.
        """
        if digest in self.waiting or digest in self.ended:
            raise AlreadyExists("ticket", "there is, or was, such a ticket")
        self.table.check_room("ticket", uid, figures)

    def add(self, ticket: Ticket, now: float) -> None:
        """Take in a ticket; errors as of ``check_new``."""
        self.check_new(ticket.digest, ticket.uid, ticket.figures)
        self.table.charge(ticket.uid, ticket.figures)
        self.waiting[ticket.digest] = ticket
        self._wait(ticket, now)

    def _wait(self, ticket: Ticket, now: float) -> None:
        ticket.deadline = now + ticket.seconds
        heapq.heappush(self.deadlines, (ticket.deadline, ticket.digest))
        if len(self.deadlines) > 2 * len(self.waiting) + SLACK:  # most are of ended tickets
            self.deadlines = [
                (each.deadline, each.digest) for each in self.waiting.values() if not each.keeper
            ]
            heapq.heapify(self.deadlines)

    def find(self, method: str, digest: bytes, uid: int | None) -> Ticket:
        """The ticket of a user with this digest.

        Errors:
            RESOURCE_NOT_FOUND: there is none, and why, as far as that is this user's to know.
        """
        ticket = self.waiting.get(digest)
        if ticket is not None and ticket.uid is not None and ticket.uid == uid:
            return ticket
        whose, why = self.ended.get(digest, (None, ""))
        if why and whose is not None and whose == uid:
            raise ResourceNotFound(method, f"this ticket {why}")
        raise ResourceNotFound(
            method, "there is no such ticket: the broker was started anew, or it is another user's"
        )

    def end(self, ticket: Ticket, why: str) -> None:
        """A ticket ends; what it holds is the caller's."""
        self.hand_out(ticket, why)
        self.table.refund(ticket.uid, ticket.figures)

    def hand_out(self, ticket: Ticket, why: str) -> None:
        """The same, but what it holds counts until the caller refunds it."""
        del self.waiting[ticket.digest]
        self._let_go(ticket)
        self.ended[ticket.digest] = ticket.uid, why
        if len(self.ended) > REMEMBERED:
            self.ended.popitem(last=False)

    def keep(self, ticket: Ticket, connection: int) -> None:
        """Let a ticket be redeemed any number of times, as long as a connection lives."""
        self._let_go(ticket)
        ticket.keeper = connection
        self.kept.setdefault(connection, set()).add(ticket)

    def _let_go(self, ticket: Ticket) -> None:
        """A ticket is no longer kept."""
        if ticket.keeper is not None:
            mine = self.kept[ticket.keeper]
            mine.discard(ticket)
            if not mine:
                del self.kept[ticket.keeper]
            ticket.keeper = None

    def disconnected(self, connection: int, now: float) -> None:
        """A connection ended: what it kept waits for its deadline again."""
        for ticket in self.kept.pop(connection, ()):
            ticket.keeper = None
            self._wait(ticket, now)

    def lapse(self, now: float) -> list[Ticket]:
        """The tickets whose deadline has passed, which end."""
        lapsed = []
        while self.deadlines and self.deadlines[0][0] <= now:
            deadline, digest = heapq.heappop(self.deadlines)
            ticket = self.waiting.get(digest)
            if ticket is not None and ticket.keeper is None and ticket.deadline == deadline:
                self.end(ticket, f"lapsed: it was not redeemed within {ticket.seconds:g} seconds")
                lapsed.append(ticket)
        return lapsed

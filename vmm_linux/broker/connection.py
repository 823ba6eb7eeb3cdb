"""A client's connection, as its broker sees it."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import socket

    from vmm_linux.broker.table import Member
    from vmm_linux.broker.tickets import Ticket
    from vmm_linux.errors import VmmError
    from vmm_linux.names.protocol import Request


class Parcel(NamedTuple):
    """A buffer that is to be sent: the answer to a request."""

    handle: int
    rights: int
    weight: int
    """Descriptors that travel with it."""
    redeemed: Ticket | None = None
    """The ticket whose handle it is, which is closed when it was sent, or cannot be. Until then it
    counts as its user's."""


class Connection:
    """A connection, and what is under way on it.

    Args:
        sock: which does not block.
        peer: process, user and group at the other end, by the kernel's word when it connected; None
            for a user or a group that is unknown.
        member: what the table of names knows of it.
        now: the time.
    """

    __slots__ = (
        "claimed",
        "decided",
        "expected",
        "fd",
        "gid",
        "greeted",
        "in_flight",
        "member",
        "peer",
        "queue",
        "refusal",
        "since",
        "sock",
        "uid",
    )

    def __init__(
        self,
        sock: socket.socket,
        peer: tuple[int, int | None, int | None],
        member: Member,
        now: float,
    ) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self.peer = peer
        _, self.uid, self.gid = peer
        self.member = member
        self.since = now
        """When it last did something, or what it waits for began."""
        self.greeted = False
        """Whether a request came."""
        self.in_flight = 0
        """Descriptors that were sent, as far as is known unread."""
        self.queue: deque[bytes | Parcel] = deque()
        """What waits to be sent. Nothing is received meanwhile."""
        self.expected: Request | None = None
        """The request to publish whose buffer comes next."""
        self.refusal: VmmError | None = None
        """Why that buffer will not be taken."""
        self.decided: tuple[str | None, str | None] = (None, None)
        """What the policy said of it: the decision, and the rule."""
        self.claimed: set[int] = set()
        """Processes that the client calls its ancestors; asked about once."""

    @property
    def holds_nothing(self) -> bool:
        """Whether nobody would miss it."""
        return not (self.queue or self.expected or self.member.held or self.in_flight)

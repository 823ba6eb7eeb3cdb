"""Tickets: a buffer handed to a process that is not there yet, by bytes that anything can carry."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from vmm_linux._core.values import describe, is_a
from vmm_linux.errors import InvalidArgument
from vmm_linux.flags import Rights
from vmm_linux.names.arguments import buffer_of, number_in, path_of
from vmm_linux.names.client import NO_WRITE, client_of
from vmm_linux.names.protocol import (
    MOST_RIGHTS,
    SECRET,
    Answer,
    Operation,
    digest_of,
    request,
)

if TYPE_CHECKING:
    import socket
    from typing import Self, SupportsIndex

    from vmm_linux._core.endpoint import VMM
    from vmm_linux.mdl import Mdl

WAIT = 60.0
"""Seconds that a ticket waits where nothing else is asked for."""


class Ticket:
    """Lets a process of this user open a buffer: once, until its deadline.

    The broker holds the buffer meanwhile, whatever becomes of the process that made the ticket. It
    is 32 random bytes, which are shown nowhere: whoever of this user has them can redeem it. It can
    be pickled.
    """

    __slots__ = ("_broker", "_secret")

    def __init__(self, secret: bytes, broker: str | os.PathLike[str] | None = None) -> None:
        """The ticket with these bytes, which ``Ticket.of`` made elsewhere.

        Errors:
            INVALID_ARGUMENT: no 32 bytes.
        """
        if not is_a(secret, bytes) or bytes.__len__(secret) != SECRET:
            raise InvalidArgument("Ticket", f"a ticket is {SECRET} bytes, and not what was given")
        self._secret = bytes(secret)
        self._broker = None if broker is None else path_of(broker)

    @classmethod
    def of(
        cls,
        mdl: Mdl,
        seconds: float = WAIT,
        *,
        rights: SupportsIndex | None = None,
        broker: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Make a ticket for a buffer.

        Args:
            mdl: the buffer.
            seconds: until it lapses, a millisecond to a day.
            rights: ``Rights`` that it gives, or None for all that this handle has.
            broker: path of a broker's socket; None for ``VMM_LINUX_BROKER``, or this user's own.

        Errors:
            INVALID_ARGUMENT: no such time.
            NO_CAPABILITY: the handle lacks TRANSFER, or some of ``rights``.
            QUOTA_EXCEEDED: the broker's limits.
            SECURITY_DISALLOW: its policy.
        """
        mdl = buffer_of("ticket", mdl)
        made = cls(os.urandom(SECRET), broker)
        bits = None if rights is None else number_in("ticket", "rights", rights, MOST_RIGHTS)
        message = request(
            Operation.TICKET,
            digest_of(made._secret),
            size=mdl.nbytes,
            needed=int(mdl.rights) if bits is None else bits,
            offset=milliseconds(seconds),
        )

        def then(sock: socket.socket) -> None:
            mdl.send(sock, bits)

        client_of(made._broker)._plain("ticket", message, then=then)  # noqa: SLF001
        return made

    @property
    def secret(self) -> bytes:
        """Its bytes."""
        return self._secret

    def redeem(self, writable: bool | None = None, *, vmm: VMM | None = None) -> Mdl:
        """Open the buffer. A ticket that is not kept ends with that.

        Args:
            writable: True, False, or None for all that the ticket allows.
            vmm: that the handle is to belong to; None for the default one.

        Errors:
            RESOURCE_NOT_FOUND: it was redeemed or released, or has lapsed; which, is said.
            NO_CAPABILITY: it allows less.
        """
        message = request(
            Operation.REDEEM,
            self._secret,
            most=NO_WRITE if writable is False else MOST_RIGHTS,
            needed=int(Rights.MAP_WRITE) if writable else 0,
        )
        return client_of(self._broker)._buffer("redeem", message, vmm)  # noqa: SLF001

    def keep(self) -> None:
        """Let it be redeemed any number of times, as long as this process is connected.

        Then its deadline begins anew. ``release`` ends it.
        """
        self._ask("keep_ticket", Operation.KEEP_TICKET)

    def release(self) -> None:
        """End it: the broker holds the buffer no more."""
        self._ask("release_ticket", Operation.RELEASE_TICKET)

    def _ask(self, method: str, operation: Operation) -> Answer:
        message = request(operation, self._secret)
        return client_of(self._broker)._plain(method, message)  # noqa: SLF001

    def __repr__(self) -> str:
        return "<Ticket>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._secret, self._broker)


def milliseconds(seconds: object) -> int:
    """A time as a broker takes it.

    Errors:
        INVALID_ARGUMENT: no number, or none that it could be.
    """
    if is_a(seconds, bool) or not (is_a(seconds, int) or is_a(seconds, float)):
        raise InvalidArgument("ticket", f"seconds is {describe(seconds)}, not a number")
    if not 0 < seconds <= 1e9:
        raise InvalidArgument("ticket", f"seconds is {seconds!r}; a millisecond to a day")
    return round(1000 * seconds)

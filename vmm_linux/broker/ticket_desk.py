"""What a broker does with tickets, for its clients."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Final

from vmm_linux.broker.connection import Parcel
from vmm_linux.broker.service import SPARE, check_needed, check_transfer, sid_of, weight_of
from vmm_linux.broker.table import Figures
from vmm_linux.broker.tickets import Ticket, Tickets
from vmm_linux.errors import InvalidArgument, InvalidOperation, VmmError
from vmm_linux.names.protocol import SECRET, Operation, answer, digest_of

if TYPE_CHECKING:
    from vmm_linux.broker.connection import Connection
    from vmm_linux.broker.service import Service
    from vmm_linux.handles import Handle
    from vmm_linux.names.protocol import Request

LONGEST_WAIT: Final = 86_400_000
"""Milliseconds until a ticket lapses, at most."""


class TicketDesk:
    """Tickets, and what clients may do with them. Policies know them without names.

    Args:
        service: that has the VMM, the policy and the table.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.tickets = Tickets(service.table)
        service.handlers[Operation.REDEEM] = self.redeem
        service.handlers[Operation.KEEP_TICKET] = self.keep
        service.handlers[Operation.RELEASE_TICKET] = self.release

    def check(self, connection: Connection, request: Request) -> None:
        """Whether a buffer that comes next would be held, as far as the request tells."""
        if len(request.name) != SECRET:
            raise InvalidArgument("ticket", f"a digest of {len(request.name)} bytes, not {SECRET}")
        if not 1 <= request.offset <= LONGEST_WAIT:
            raise InvalidArgument(
                "ticket", f"{request.offset} milliseconds; 1 to {LONGEST_WAIT} are possible"
            )
        if connection.uid is None:
            raise InvalidOperation("ticket", "the client's user is unknown: nobody could redeem it")
        self.service.allow("ticket", connection, size=request.size, rights=request.needed)
        figures = Figures(0, 0, 0, 2 + SPARE, 1)
        self.tickets.check_new(request.name, connection.uid, figures)

    def take(self, connection: Connection, request: Request, handle: Handle) -> bytes:
        """Hold a buffer that came from a client; the handle is ours from here on."""
        service = self.service
        try:
            info = service.vmm.handle_info(handle)
            service.sid = sid_of(info)
            check_transfer("ticket", info)
            rights = int(info.rights)
            service.allow("ticket", connection, size=info.nbytes, rights=rights)
            ticket = Ticket(
                request.name,
                handle,
                connection.uid,
                rights=rights,
                seconds=request.offset / 1000,
                nbytes=info.size,
                descriptors=2 * info.segments + SPARE,
                weight=weight_of(info),
            )
            self.tickets.add(ticket, time.monotonic())
        except BaseException:
            service.vmm.handle_close(handle)
            raise
        return answer()

    def find(self, method: str, connection: Connection, request: Request) -> Ticket:
        """The ticket of a request, which must be of the client's user."""
        if len(request.name) != SECRET:
            raise InvalidArgument(method, f"a ticket of {len(request.name)} bytes, not {SECRET}")
        self.lapse(time.monotonic())
        return self.tickets.find(method, digest_of(request.name), connection.uid)

    def redeem(self, connection: Connection, request: Request) -> Parcel:
        """Give the buffer of a ticket. That is once, unless it is kept."""
        ticket = self.find("redeem", connection, request)
        rights = ticket.rights & request.most
        size = ticket.figures.bytes
        self.service.allow("redeem", connection, size=size, rights=rights)
        check_needed("redeem", "ticket", ticket.rights, rights, request.needed)
        self.service.note(ticket.item)
        if ticket.keeper is not None:
            return Parcel(ticket.item, rights, ticket.weight)
        self.tickets.hand_out(ticket, "was redeemed")
        return Parcel(ticket.item, rights, ticket.weight, redeemed=ticket)

    def keep(self, connection: Connection, request: Request) -> bytes:
        """Let a ticket be redeemed as often as wanted, as long as this client is connected."""
        ticket = self.find("keep_ticket", connection, request)
        self.service.allow("keep_ticket", connection)
        self.tickets.keep(ticket, connection.member.number)
        return answer()

    def release(self, connection: Connection, request: Request) -> bytes:
        """End a ticket."""
        ticket = self.find("release_ticket", connection, request)
        self.service.allow("release_ticket", connection)
        self.tickets.end(ticket, "was released")
        self.service.vmm.handle_close(ticket.item)
        return answer()

    def lapse(self, now: float) -> None:
        """End the tickets whose deadline has passed."""
        for ticket in self.tickets.lapse(now):
            self.service.vmm.handle_close(ticket.item)

    def handed_out(self, ticket: Ticket) -> None:
        """What a redeemed ticket held was sent, or cannot be: close it, and count it no more."""
        with contextlib.suppress(VmmError):  # it was closed before
            self.service.vmm.handle_close(ticket.item)
            self.service.table.refund(ticket.uid, ticket.figures)

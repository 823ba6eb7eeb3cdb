"""Requests of a broker's clients: received, carried out, audited and answered."""

from __future__ import annotations

import socket
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from vmm_linux.broker.service import failure
from vmm_linux.broker.standard_error import say
from vmm_linux.errors import InvalidArgument, Retcode, VmmError
from vmm_linux.names import protocol
from vmm_linux.names.protocol import (
    HANDLE_MAGIC,
    BadMessageError,
    Lifetime,
    Operation,
    error_answer,
    read_request,
)

if TYPE_CHECKING:
    from vmm_linux.broker.connection import Connection, Parcel
    from vmm_linux.broker.server import Server
    from vmm_linux.names.protocol import Request


# As plain integers, which compare faster.
HELLO: Final = int(Operation.HELLO)
TICKET: Final = int(Operation.TICKET)
BRINGING: Final = frozenset((int(Operation.PUBLISH), TICKET))
"""Requests after which a buffer comes."""
SECRETS: Final = frozenset(range(TICKET, int(Operation.RELEASE_TICKET) + 1))
"""Requests whose name is a ticket, which no audit has."""


class Requests:
    """What a server does with the messages of its clients.

    Args:
        server: that sends the answers.
    """

    def __init__(self, server: Server) -> None:
        self.server = server

    def take(self, connection: Connection, message: bytes) -> None:
        """Carry out a request."""
        try:
            request = read_request(message)
        except BadMessageError as problem:
            self.server.send(
                connection, error_answer(Retcode.INVALID_ARGUMENT, f"bad message: {problem}", 0)
            )
            return
        connection.greeted = True
        connection.since = time.monotonic()
        operation = request.operation
        if operation in BRINGING:
            self.expect(connection, request)
        elif operation == HELLO:
            self.greet(connection, request)
        elif self.server.audit is None:
            self.server.send(connection, self.outcome(connection, request))
        else:
            self.server.send(connection, self.audited(connection, request, None))

    def greet(self, connection: Connection, request: Request) -> None:
        """A client says which family it is of."""
        size = protocol.PID.size
        if len(request.name) != protocol.FAMILY or len(request.other) % size:
            self.server.hang_up(connection)
            return
        connection.claimed = {
            protocol.PID.unpack_from(request.other, at)[0]
            for at in range(0, len(request.other), size)[: protocol.MOST_ANCESTORS]
        }
        self.server.end(self.server.table.join(connection.member, request.name))

    def outcome(self, connection: Connection, request: Request) -> bytes | Parcel:
        """The answer to a request."""
        try:
            return self.carry_out(connection, request)
        except Exception as problem:  # noqa: BLE001  whatever it is, the others are served on
            return self.refusal(request, problem)

    def refusal(self, request: Request, problem: Exception) -> bytes:
        """A failure as an answer. What no client can cause is reported here, too."""
        error = failure(name_of(request.operation), problem)
        if error.rc == Retcode.INTERNAL_ERROR:
            say("".join(traceback.format_exception(problem)))
        return error_answer(error.rc, error.message, error.errno)

    def carry_out(self, connection: Connection, request: Request) -> bytes | Parcel:
        """Carry out an operation that needs no more messages."""
        service = self.server.service
        handler = service.handlers.get(request.operation)
        if handler is None:
            raise InvalidArgument("request", f"operation {request.operation} is unknown")
        result = handler(connection, request)
        if connection.claimed and request.lifetime == Lifetime.FAMILY:
            self.server.ancestors.hold(connection)
        if self.server.table.ended_families:
            self.server.end(())
        return result

    def audited(
        self,
        connection: Connection,
        request: Request,
        handle: Any,  # noqa: ANN401
    ) -> bytes | Parcel:
        """The same, with a line of the audit; ``handle`` is what came to be published, or None."""
        audit, service = self.server.audit, self.server.service
        assert audit is not None  # noqa: S101  for the type checker
        operation = name_of(request.operation)
        arguments: dict[str, int | str] = {}
        if request.operation not in SECRETS:
            arguments["name"] = request.name.decode(errors="replace")
        if request.other:
            arguments["other"] = request.other.decode(errors="replace")
        for key in ("size", "offset", "seals", "lifetime"):
            if value := getattr(request, key):
                arguments[key] = value
        service.decision = service.rule = service.sid = None
        try:
            record = audit._begin(operation, arguments, connection.peer)  # noqa: SLF001
        except VmmError as problem:
            if handle is not None:
                self.server.vmm.handle_close(handle)
            return error_answer(problem.rc, problem.message, problem.errno)
        rc, error = Retcode.OK, None
        try:
            result: bytes | Parcel
            if request.operation in BRINGING:
                result = self.published(connection, request, handle)
            else:
                result = self.carry_out(connection, request)
        except Exception as problem:  # noqa: BLE001  as in outcome
            failed = failure(operation, problem)
            rc, error = failed.rc, str(failed)
            result = self.refusal(request, problem)
        audit._end(record, rc, error, service.decision, service.rule, service.sid)  # noqa: SLF001
        return result

    # ---- publishing ---------------------------------------------------------------------------

    def expect(self, connection: Connection, request: Request) -> None:
        """A client publishes a buffer, or wants a ticket for one, which comes next."""
        connection.expected = request
        connection.refusal = None
        connection.since = time.monotonic()
        service = self.server.service
        service.decision = service.rule = None
        try:
            if request.operation == TICKET:
                self.server.desk.check(connection, request)
            else:
                service.check_publication(connection, request)
        except VmmError as problem:
            connection.refusal = problem
        connection.decided = service.decision, service.rule

    def take_published(self, connection: Connection) -> None:
        """Take the buffer that comes after such a request."""
        request = connection.expected
        assert request is not None  # noqa: S101  for the type checker
        head = connection.sock.recv(len(HANDLE_MAGIC), socket.MSG_PEEK)
        if not head:
            self.server.hang_up(connection)
            return
        if head != HANDLE_MAGIC:
            # The client has given up, and asks for something else: that has its own answer.
            self.give_up(connection)
            return
        connection.expected = None
        handle = None
        if connection.refusal is not None:
            connection.sock.recv(1)  # without room for descriptors, which are discarded
        else:
            try:
                handle = self.server.vmm.recv_handle(
                    connection.sock, 0, self.server.table.room_for_bytes(connection.uid)
                )
            except VmmError as problem:
                connection.refusal = problem
        if self.server.audit is not None:
            self.server.send(connection, self.audited(connection, request, handle))
            return
        try:
            result = self.published(connection, request, handle)
        except Exception as problem:  # noqa: BLE001  as in outcome
            result = self.refusal(request, problem)
        self.server.send(connection, result)

    def give_up(self, connection: Connection) -> None:
        """Wait no longer for a buffer. The connection goes on: names may depend on it."""
        connection.expected = None
        self.server.send(connection, error_answer(Retcode.INVALID_ARGUMENT, "no buffer came", None))

    def published(
        self,
        connection: Connection,
        request: Request,
        handle: Any,  # noqa: ANN401
    ) -> bytes | Parcel:
        """Put the buffer that came under its name, or its ticket."""
        service = self.server.service
        service.decision, service.rule = connection.decided
        if connection.refusal is not None:
            raise connection.refusal
        if request.operation == TICKET:
            return self.server.desk.take(connection, request, handle)
        result = service.publish(connection, request, handle)
        if request.lifetime == Lifetime.FAMILY and connection.claimed:
            self.server.ancestors.hold(connection)
        return result


def name_of(operation: int) -> str:
    """An operation in words."""
    try:
        return Operation(operation).name.lower()
    except ValueError:
        return "request"

"""The loop of a broker: one thread, epoll, connections of AF_UNIX SOCK_SEQPACKET.

A client cannot stop the others. Nothing is waited for: what a client does not read waits in its own
queue, and its requests are not received meanwhile. Messages are bounded, and so are connections,
descriptors on their way, and the time for which a client may be silent in the middle of something.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import socket
import time
import traceback
from typing import TYPE_CHECKING, Any, Final

from vmm_linux._core.credentials import known_gid, known_uid
from vmm_linux._core.values import one_line
from vmm_linux._sharer import CREDENTIALS
from vmm_linux.broker.connection import Connection, Parcel
from vmm_linux.broker.family import Ancestors
from vmm_linux.broker.flight import Flight
from vmm_linux.broker.requests import Requests
from vmm_linux.broker.service import Service
from vmm_linux.broker.standard_error import say
from vmm_linux.broker.table import Bounds, Table
from vmm_linux.broker.ticket_desk import TicketDesk
from vmm_linux.errors import QuotaExceeded, Retcode, VmmError
from vmm_linux.names.protocol import LONGEST_REQUEST, error_answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm_linux import VMM
    from vmm_linux.audit import Audit
    from vmm_linux.broker.policy import BrokerPolicy
    from vmm_linux.broker.table import Entry

EVENTS_AT_ONCE: Final = 64
GREETING: Final = 10.0
"""Seconds until the first request of a connection."""
PATIENCE: Final = 10.0
"""Seconds in which a client reads what it asked for, and sends the buffer that it publishes."""
IDLE: Final = 600.0
"""Seconds after which a connection ends that holds nothing and asks nothing."""
LINGER: Final = 5.0
"""Seconds after which a broker on demand ends that has neither clients nor names."""
MOST_NOTICES: Final = 64
"""Messages that wait for a client; one that has more is disconnected."""
RETRY: Final = (0.01, 0.5)
"""Seconds between attempts to send what the bounds of descriptors on their way hold back: the
first, and the longest."""
# A broker stays in its user namespace, so that what a number means does not change.
user = functools.lru_cache(1024)(known_uid)
group = functools.lru_cache(1024)(known_gid)
QUIET, WRITING = select.EPOLLIN, select.EPOLLOUT | select.EPOLLET | select.EPOLLRDHUP
GONE: Final = select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP


class Server:
    """A broker.

    Args:
        listener: the listening socket, which does not block.
        vmm: that holds the buffers.
        policy: decides about every operation, and has the limits.
        files: descriptors that this process may have.
        audit: gets a line for every operation, or None.
        reload: makes the policy anew at SIGHUP, or None.
        on_demand: whether it ends with its last client and lease.
        may_end: takes what only one broker may have, before it ends; False if it has to go on.
    """

    def __init__(
        self,
        listener: socket.socket,
        vmm: VMM,
        policy: BrokerPolicy,
        *,
        files: int,
        audit: Audit | None = None,
        reload: Callable[[], BrokerPolicy] | None = None,
        on_demand: bool = False,
        may_end: Callable[[], bool] = lambda: True,
    ) -> None:
        self.listener = listener
        self.vmm = vmm
        self.files = files
        self.audit = audit
        self.reload = reload
        self.on_demand = on_demand
        self.may_end = may_end
        self.table = Table()
        self.service = Service(vmm, policy, self.table, self.notify)
        self.desk = TicketDesk(self.service)
        self.service.audited = audit is not None
        self.flight = Flight(max(16, files // 8), max(8, files // 16))
        self.connections: dict[int, Connection] = {}
        self.numbers: dict[int, Connection] = {}
        self.leaving: set[Connection] = set()
        """Ended connections whose last buffer is unread."""
        self.held_back: set[Connection] = set()
        """Connections whose buffer waits for the bounds of descriptors on their way."""
        self.ancestors = Ancestors(self, files // 16)
        self.others: dict[int, Callable[[], None]] = {}
        self.next_number = 1
        self.ending = False
        self.resting = False
        """Whether nothing is accepted until the next sweep."""
        self.swept = self.used = time.monotonic()
        self.retry = RETRY[0]
        self.retry_at = 0.0
        self.idle = IDLE
        self.take_policy(policy)
        self.requests = Requests(self)
        self.epoll = select.epoll()
        self.spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self.wakeup, self.waker = socket.socketpair()
        self.wakeup.setblocking(False)
        self.waker.setblocking(False)
        self.watch(listener.fileno(), self.accept)
        self.watch(self.wakeup.fileno(), self.take_signals)

    def take_policy(self, policy: BrokerPolicy) -> None:
        """Go by this policy, and by its limits as far as it sets any."""
        self.service.policy = policy
        files = self.files
        for which, given, share in (("bounds", policy.bounds, 1), ("each", policy.each, 2)):
            usual = {
                "connections": files // 4 // share,
                "names": 65536 // share,
                "bytes": None,
                "descriptors": files // 2 // share,
                "tickets": 65536 // share,
            }
            given_or_usual: dict[str, Any] = {
                figure: bound if getattr(given, figure) is None else getattr(given, figure)
                for figure, bound in usual.items()
            }
            setattr(self.table, which, Bounds(**given_or_usual))
        self.idle = IDLE if policy.idle is None else float(policy.idle)

    # ---- the loop -----------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT, or until it is no longer needed."""
        try:
            while not self.ending:
                self.turn(self.timeout())
        finally:
            signal.set_wakeup_fd(-1)
            self.close()

    def timeout(self) -> float | None:
        """Seconds until something is due."""
        if self.resting:
            return 1.0
        if self.held_back:
            return max(0.0, self.retry_at - time.monotonic())
        if self.connections or self.leaving or self.desk.tickets.waiting or self.on_demand:
            return 1.0
        return None

    def turn(self, timeout: float | None) -> None:
        """Wait for something, and do it."""
        for fd, events in self.epoll.poll(timeout, EVENTS_AT_ONCE):
            connection = self.connections.get(fd)
            if connection is not None:
                self.serve(connection, events)
            elif fd in self.others:
                self.others[fd]()
        now = time.monotonic()
        if self.held_back and now >= self.retry_at:
            self.retry_held_back()
        if now - self.swept >= 1.0:
            self.swept = now
            self.sweep(now)

    def close(self) -> None:
        """End all connections."""
        for connection in list(self.connections.values()):
            self.hang_up(connection)
        for connection in list(self.leaving):
            self.leave(connection)
        self.ancestors.close()
        self.listener.close()
        self.wakeup.close()
        self.waker.close()
        if self.spare >= 0:
            os.close(self.spare)
        self.epoll.close()

    def watch(self, fd: int, action: Callable[[], None]) -> None:
        """Do this whenever a descriptor is readable."""
        self.others[fd] = action
        self.epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Do it no more."""
        self.epoll.unregister(fd)
        del self.others[fd]

    # ---- signals ------------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """Have signals come as messages, from here on."""
        signal.set_wakeup_fd(self.waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)

    def take_signals(self) -> None:
        """Do what the signals that came ask for."""
        for number in self.wakeup.recv(64):
            if number == signal.SIGHUP:
                self.reload_policy()
            else:
                self.ending = True

    def reload_policy(self) -> None:
        """Read the policy again. One that does not parse leaves the old one in force."""
        if self.reload is None:
            return
        error = None
        rc = Retcode.OK
        try:
            self.take_policy(self.reload())
            say("the policy was read again")
        except (VmmError, OSError) as problem:
            rc = problem.rc if isinstance(problem, VmmError) else Retcode.FAIL
            error = str(problem)
            say(f"the policy stays as it was: {one_line(error)}")
        if self.audit is not None:
            try:
                record = self.audit._begin("reload", {}, None)  # noqa: SLF001
                self.audit._end(record, rc, error, None, None, None)  # noqa: SLF001
            except VmmError as problem:
                say(str(problem))

    # ---- connections --------------------------------------------------------------------------

    def accept(self) -> None:
        """Accept a connection that waits; the next one has its turn after the others' requests."""
        try:
            sock, _ = self.listener.accept()
        except BlockingIOError:
            return
        except OSError as problem:
            if problem.errno in {errno.EMFILE, errno.ENFILE}:
                self.turn_away()
            elif problem.errno != errno.ECONNABORTED:
                self.rest()
            return
        try:
            sock.setblocking(False)
            self.admit(sock)
        except OSError:  # such as from epoll, of which a user has only so much
            sock.close()
            self.rest()

    def turn_away(self) -> None:
        """Close the connection that waits: no descriptor is left for it."""
        try:
            if self.spare >= 0:
                os.close(self.spare)
                self.spare = -1
            self.listener.accept()[0].close()
            self.spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self.rest()

    def rest(self) -> None:
        """Accept nothing for a while: else the connection that waits would wake this for ever."""
        self.resting = True
        self.epoll.modify(self.listener.fileno(), 0)

    def admit(self, sock: socket.socket) -> None:
        """Begin with a connection, or say why not."""
        pid, uid, gid = CREDENTIALS.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
        )
        peer = pid, user(uid), group(gid)
        number = self.next_number
        try:
            member = self.table.connect(number, peer[1], peer[0])
        except QuotaExceeded as problem:
            with_it = error_answer(problem.rc, problem.message, None)
            with contextlib.suppress(OSError):
                sock.send(with_it, socket.MSG_NOSIGNAL)
            sock.close()
            return
        self.next_number += 1
        connection = Connection(sock, peer, member, time.monotonic())
        try:
            self.epoll.register(connection.fd, QUIET)
        except OSError:
            self.table.disconnect(number)
            raise
        self.connections[connection.fd] = self.numbers[number] = connection

    def hang_up(self, connection: Connection) -> None:
        """End a connection. One whose last buffer is unread is kept until it is read or closed."""
        self.used = time.monotonic()
        self.epoll.unregister(connection.fd)
        del self.connections[connection.fd], self.numbers[connection.member.number]
        self.held_back.discard(connection)
        for message in connection.queue:
            self.dispose(message)
        connection.queue.clear()
        self.desk.tickets.disconnected(connection.member.number, self.used)
        self.end(self.table.release(connection.member))
        if self.flight.lands(connection):
            self.leave(connection)
        else:
            self.leaving.add(connection)
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def leave(self, connection: Connection) -> None:
        """Close a connection."""
        self.leaving.discard(connection)
        self.flight.forget(connection)
        self.end(self.table.disconnect(connection.member.number))
        connection.sock.close()

    def end(self, entries: Iterable[Entry]) -> None:
        """Names ended: close what they stood for, and forget families that ended with them."""
        self.service.close(entries)
        while self.table.ended_families:
            self.ancestors.forget_family(self.table.ended_families.pop())

    def dispose(self, message: bytes | Parcel) -> None:
        """A message was sent, or will not be: close what it alone held."""
        if isinstance(message, Parcel) and message.redeemed is not None:
            self.desk.handed_out(message.redeemed)

    def notify(self, numbers: Iterable[int], message: bytes) -> None:
        """Send an unrequested message to some connections."""
        for number in numbers:
            connection = self.numbers.get(number)
            if connection is None:
                continue
            if len(connection.queue) >= MOST_NOTICES:
                self.hang_up(connection)
            else:
                self.send(connection, message)

    # ---- requests -----------------------------------------------------------------------------

    def serve(self, connection: Connection, events: int) -> None:
        """Something happened on a connection: receive and answer one message."""
        try:
            if connection.queue:
                if not self.flush(connection) and events & GONE:
                    self.hang_up(connection)
                return
            if connection.expected is not None:
                self.requests.take_published(connection)
                return
            # No room for control data: the kernel discards descriptors that come with a request.
            message = connection.sock.recv(LONGEST_REQUEST + 1)
            if not message:
                self.hang_up(connection)
                return
            self.requests.take(connection, message)
        except BlockingIOError:
            return
        except Exception as problem:  # noqa: BLE001  one client must not end the others'
            if not isinstance(problem, OSError):
                say("".join(traceback.format_exception(problem)))
            if self.connections.get(connection.fd) is connection:
                self.hang_up(connection)

    # ---- sending ------------------------------------------------------------------------------

    def send(self, connection: Connection, message: bytes | Parcel) -> None:
        """Send a message, or let it wait until its client has read the others."""
        if self.connections.get(connection.fd) is not connection:  # it was ended meanwhile
            self.dispose(message)
            return
        if connection.queue or not self.sent(connection, message):
            if not connection.queue:
                connection.since = time.monotonic()
                self.epoll.modify(connection.fd, WRITING)
            connection.queue.append(message)

    def flush(self, connection: Connection) -> bool:
        """Send what waits, as far as the client takes it; whether nothing waits any more."""
        while connection.queue:
            if not self.sent(connection, connection.queue[0]):
                return False
            if connection.fd not in self.connections:
                return True
            connection.queue.popleft()
            connection.since = time.monotonic()
        self.held_back.discard(connection)
        self.epoll.modify(connection.fd, QUIET)
        return True

    def sent(self, connection: Connection, message: bytes | Parcel) -> bool:
        """Send a message now: False if it has to wait."""
        try:
            if isinstance(message, Parcel):
                return self.launched(connection, message)
            connection.sock.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return False
        except VmmError as problem:  # the name ended meanwhile
            self.dispose(message)
            return self.sent(connection, error_answer(problem.rc, problem.message, problem.errno))
        except OSError:
            if not connection.queue:  # whose messages are disposed of there
                self.dispose(message)
            self.hang_up(connection)
        return True

    def launched(self, connection: Connection, parcel: Parcel) -> bool:
        """Send a buffer now: False if too many descriptors are on their way.

        Errors:
            OSError: the connection is lost, or full (``BlockingIOError``).
            VmmError: the buffer has no name any more.
        """
        if connection.in_flight and not self.flight.lands(connection):
            return False
        if self.flight.has_room(connection, parcel.weight):
            try:
                self.vmm.send_handle(connection.sock, parcel.handle, parcel.rights)
            except OSError as problem:
                # Other processes of this user may have too many on the way.
                if problem.errno != errno.ETOOMANYREFS:
                    raise
            else:
                self.flight.begin(connection, parcel.weight)
                self.dispose(parcel)
                return True
        self.held_back.add(connection)
        return False

    def retry_held_back(self) -> None:
        """Try again to send what the bounds of descriptors on their way hold back."""
        before = len(self.held_back)
        full: set[int | None] = set()
        """Users one of whose buffers still has no room: their others are not tried."""
        for connection in list(self.held_back):
            if connection.uid not in full and connection.fd in self.connections:
                self.flush(connection)
                if connection in self.held_back:
                    full.add(connection.uid)
        eased = len(self.held_back) < before
        self.retry = RETRY[0] if eased else min(2 * self.retry, RETRY[1])
        self.retry_at = time.monotonic() + self.retry

    # ---- what takes too long --------------------------------------------------------------------

    def sweep(self, now: float) -> None:
        """End what takes too long."""
        if self.resting:
            self.resting = False
            self.epoll.modify(self.listener.fileno(), select.EPOLLIN)
        self.desk.lapse(now)
        for connection in list(self.leaving):
            if self.flight.lands(connection):
                self.leave(connection)
        for connection in list(self.connections.values()):
            if self.is_late(connection, now):
                self.hang_up(connection)
        leases = self.table.leases or self.desk.tickets.waiting
        busy = self.connections or self.leaving or leases
        if busy:
            self.used = now
        elif self.on_demand and now - self.used > LINGER and self.may_end():
            self.ending = True

    def is_late(self, connection: Connection, now: float) -> bool:
        """Whether a connection has kept this waiting for too long."""
        quiet = now - connection.since
        if connection.expected:
            if quiet > PATIENCE:
                self.requests.give_up(connection)
            return False
        if connection.queue:
            return quiet > PATIENCE and connection not in self.held_back
        if connection.greeted:
            return self.is_idle(connection, now)
        return quiet > GREETING

    def is_idle(self, connection: Connection, now: float) -> bool:
        """Whether a connection holds nothing, and has asked nothing for long."""
        if not connection.holds_nothing:
            self.flight.lands(connection)
            connection.since = now
        return now - connection.since > self.idle

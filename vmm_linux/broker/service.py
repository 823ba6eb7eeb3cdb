"""What a broker does for its clients: an operation for each request. No sockets.

Each takes the connection and the request and returns the answer: bytes, or the buffer to send.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from vmm_linux._core import kernel
from vmm_linux._core.values import quoted
from vmm_linux.broker.connection import Parcel
from vmm_linux.broker.table import Entry, Figures, Table
from vmm_linux.errors import (
    RETCODES,
    HandleRevoked,
    InvalidArgument,
    NoCapability,
    OutOfMemory,
    Retcode,
    SecurityDisallow,
    VmmError,
    error,
)
from vmm_linux.flags import Rights, VmmFlags
from vmm_linux.names import protocol
from vmm_linux.names.protocol import Lifetime, Operation, Stat, answer, decoded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from vmm_linux import VMM
    from vmm_linux.broker.connection import Connection
    from vmm_linux.broker.policy import BrokerPolicy
    from vmm_linux.handles import Handle, HandleInfo
    from vmm_linux.names.protocol import Request

    Outcome = bytes | Parcel
    Handler = Callable[[Connection, Request], Outcome]

PAGE: Final = kernel.page_size()
LARGEST: Final = 2**62
ALL_RIGHTS: Final = int(~Rights(0))
RWX: Final = int(VmmFlags.RWX_MASK)
# As plain integers: arithmetic with enumerations takes a microsecond each time.
MAP_RIGHTS: Final = (
    (int(VmmFlags.READ), int(Rights.MAP_READ)),
    (int(VmmFlags.WRITE), int(Rights.MAP_WRITE)),
    (int(VmmFlags.EXECUTE), int(Rights.MAP_EXECUTE)),
)
EVERY_HANDLE: Final = int(Rights.TRANSFER | Rights.COPY | Rights.GET_SID)
"""What a new handle has beside what its protection gives."""
OF_DESCRIPTOR: Final = int(EVERY_HANDLE | Rights.MAP_READ)
"""What the holder of a descriptor can do without this package."""
LIFETIMES: Final = {int(each): each for each in Lifetime}
SPARE: Final = 3
"""Descriptors of a buffer beside its segments, each of which can be open twice."""


class Service:
    """The names of a broker, and what clients may do with them.

    Args:
        vmm: that holds the buffers.
        policy: decides about every operation.
        table: of names.
        notify: sends a message to connections, by their numbers.
    """

    def __init__(
        self,
        vmm: VMM,
        policy: BrokerPolicy,
        table: Table,
        notify: Callable[[Iterable[int], bytes], None],
    ) -> None:
        self.vmm = vmm
        self.policy = policy
        self.table = table
        self.notify = notify
        self.audited = False
        """Whether an audit wants to know about which buffer each operation is."""
        self.decision: str | None = None
        self.rule: str | None = None
        self.sid: int | None = None
        self.handlers: dict[int, Handler] = {
            Operation.OPEN: self.open,
            Operation.CREATE: self.create,
            Operation.CLONE: self.clone,
            Operation.SEAL: self.seal,
            Operation.UNLINK: self.unlink,
            Operation.LIST: self.list,
            Operation.STAT: self.stat,
            Operation.KEEP: self.keep,
            Operation.REVOKE: self.revoke,
            Operation.SYNC: self.sync,
        }

    # ---- decisions ----------------------------------------------------------------------------

    def allow(
        self,
        operation: str,
        connection: Connection,
        *names: str,
        size: int = 0,
        rights: int = 0,
        seals: int = 0,
    ) -> None:
        """Ask the policy.

        Errors:
            SECURITY_DISALLOW: it does not allow this.
        """
        allowed, rule = self.policy.decide(
            operation,
            (connection.uid, connection.gid),
            names,
            size=size,
            rights=rights,
            seals=seals,
        )
        self.decision = "allow" if allowed else "deny"
        self.rule = rule
        if not allowed:
            raise SecurityDisallow(operation, f"the broker's policy denies it (rule: {rule})")

    def manage(self, operation: str, connection: Connection, name: str, *, seals: int = 0) -> Entry:
        """A name that this client owns. Root and the broker's own user own all.

        Errors:
            RESOURCE_NOT_FOUND: no such name.
            NO_CAPABILITY: it belongs to another user.
            SECURITY_DISALLOW: the policy denies it.
        """
        self.allow(operation, connection, name, seals=seals)
        entry = self.table.get(operation, name)
        if connection.member.number == entry.connection:
            return entry
        if connection.uid is None or connection.uid not in {entry.uid, 0, os.geteuid()}:
            owner = "an unknown user" if entry.uid is None else f"user {entry.uid}"
            raise NoCapability(operation, f"the name {quoted(name)} belongs to {owner}")
        return entry

    # ---- operations ---------------------------------------------------------------------------

    def open(self, connection: Connection, request: Request) -> Outcome:
        """Give a buffer to a client."""
        name = decoded("open", request.name)
        entry = self.table.entries.get(name)
        rights = 0 if entry is None else entry.rights & request.most
        size = 0 if entry is None else entry.figures.bytes
        # Whatever rights a client asks for, it gets a descriptor, and with it these.
        gives = 0 if entry is None else rights | entry.rights & OF_DESCRIPTOR
        self.allow("open", connection, name, size=size, rights=gives)
        if entry is None:
            entry = self.table.get("open", name)  # raises
        if entry.revoked:
            raise HandleRevoked("open", f"the name {quoted(name)} was revoked")
        check_needed("open", f"name {quoted(name)}", entry.rights, rights, request.needed)
        self.table.hold(connection.member, entry)
        self.note(entry.item)
        return Parcel(entry.item, rights, entry.weight)

    def create(self, connection: Connection, request: Request) -> Outcome:
        """Make a buffer under a name."""
        name = decoded("create", request.name)
        lifetime = lifetime_of("create", request)
        prot = request.most
        if prot & ~RWX:
            raise InvalidArgument(
                "create",
                f"a protection of {prot:#x}; READ, WRITE and EXECUTE are known. Locked memory is "
                "made by its user, and published",
            )
        if not 1 <= request.size <= LARGEST:
            raise InvalidArgument("create", f"size {request.size}; 1 to 2**62 bytes are possible")
        rights = EVERY_HANDLE
        for flag, right in MAP_RIGHTS:
            rights |= right if prot & flag else 0
        size = -(-request.size // PAGE) * PAGE
        self.allow("create", connection, name, size=request.size, rights=rights)
        member = connection.member
        figures = Figures(0, 1, size, 2 + SPARE)
        self.table.check_new("create", member, name, lifetime, figures)
        handle = self.vmm.mdl_create(size, prot, 0, request.size)
        self.table.insert(
            member,
            Entry(
                name,
                handle,
                member,
                rights=rights,
                lifetime=lifetime,
                nbytes=size,
                descriptors=2 + SPARE,
            ),
        )
        self.note(handle)
        return Parcel(handle, rights, 1)

    def check_publication(self, connection: Connection, request: Request) -> None:
        """Whether a buffer that comes next would be taken, as far as the request tells."""
        name = decoded("publish", request.name)
        lifetime = lifetime_of("publish", request)
        self.allow("publish", connection, name, size=request.size, rights=request.needed)
        figures = Figures(0, 1, 0, 2 + SPARE)
        self.table.check_new("publish", connection.member, name, lifetime, figures)

    def publish(self, connection: Connection, request: Request, handle: Handle) -> Outcome:
        """Put a buffer that came from a client under a name; the handle is ours from here on."""
        try:
            name = decoded("publish", request.name)
            info = self.vmm.handle_info(handle)
            self.sid = sid_of(info)
            rights = int(info.rights)
            self.allow("publish", connection, name, size=info.nbytes, rights=rights)
        except BaseException:
            self.vmm.handle_close(handle)
            raise
        self.add("publish", connection, name, handle, lifetime=lifetime_of("publish", request))
        return answer()

    def add(
        self,
        method: str,
        connection: Connection,
        name: str,
        handle: Handle,
        *,
        lifetime: Lifetime,
        rights: int = ALL_RIGHTS,
    ) -> None:
        """Put a handle, which is ours, under a name; close it if that fails."""
        try:
            info = self.vmm.handle_info(handle)
            check_transfer(method, info)
            self.sid = sid_of(info)
            entry = Entry(
                name,
                handle,
                connection.member,
                rights=rights & int(info.rights),
                lifetime=lifetime,
                nbytes=info.size,
                descriptors=2 * info.segments + SPARE,
                weight=weight_of(info),
            )
            self.table.add(method, entry)
        except BaseException:
            self.vmm.handle_close(handle)
            raise

    def clone(self, connection: Connection, request: Request) -> Outcome:
        """Put a window on a buffer under another name."""
        name, new = decoded("clone", request.name), decoded("clone", request.other)
        lifetime = lifetime_of("clone", request)
        entry = self.table.entries.get(name)
        rights = 0 if entry is None else entry.rights & request.most
        self.allow("open", connection, name, size=request.size, rights=rights)
        self.allow("clone", connection, name, new, size=request.size, rights=rights)
        entry = self.table.get("clone", name)
        if entry.revoked:
            raise HandleRevoked("clone", f"the name {quoted(name)} was revoked")
        figures = entry.figures._replace(bytes=request.size)
        self.table.check_new("clone", connection.member, new, lifetime, figures)
        handle = self.vmm.mdl_clone(entry.item, request.offset, request.size)
        self.add("clone", connection, new, handle, lifetime=lifetime, rights=rights)
        return answer()

    def seal(self, connection: Connection, request: Request) -> Outcome:
        """Seal the buffer of a name; from then on nobody gets it writable."""
        entry = self.manage("seal", connection, decoded("seal", request.name), seals=request.seals)
        self.note(entry.item)
        self.vmm.mdl_seal(entry.item, request.seals)
        entry.rights &= ~int(Rights.MAP_WRITE)
        return answer()

    def unlink(self, connection: Connection, request: Request) -> Outcome:
        """End a name."""
        entry = self.manage("unlink", connection, decoded("unlink", request.name))
        self.table.remove(entry)
        self.close([entry])
        return answer()

    def keep(self, connection: Connection, request: Request) -> Outcome:
        """Let a name live until it is unlinked."""
        entry = self.manage("keep", connection, decoded("keep", request.name))
        self.table.keep("keep", entry)
        return answer()

    def revoke(self, connection: Connection, request: Request) -> Outcome:
        """Let nobody open a name any more, and say so to those that have it."""
        entry = self.manage("revoke", connection, decoded("revoke", request.name))
        if not entry.revoked:
            entry.revoked = True
            others = entry.holders - {connection.member.number}
            notice = answer(data=entry.name.encode(), kind=protocol.Kind.REVOKED)
            self.notify(others, notice)
        return answer()

    def stat(self, connection: Connection, request: Request) -> Outcome:
        """Say what is known of a name."""
        name = decoded("stat", request.name)
        self.allow("stat", connection, name)
        entry = self.table.get("stat", name)
        return answer(data=protocol.record(self.stat_of(entry)), count=1)

    def list(self, connection: Connection, request: Request) -> Outcome:
        """Say what is known of the names after one, as many as an answer holds."""
        after = request.name.decode(errors="replace")
        self.allow("list", connection)
        decision = self.decision, self.rule
        records: list[bytes] = []
        room = protocol.LONGEST_ANSWER - protocol.ANSWER.size
        more = 0
        for entry in self.table.listed(after):
            try:
                self.allow("stat", connection, entry.name)
            except SecurityDisallow:
                continue
            record = protocol.record(self.stat_of(entry))
            if len(record) > room:
                more = 1
                break
            room -= len(record)
            records.append(record)
        self.decision, self.rule = decision
        return answer(data=b"".join(records), count=len(records), number=more)

    @staticmethod
    def sync(connection: Connection, request: Request) -> Outcome:  # noqa: ARG004
        """Answer with the request's number."""
        return answer(number=request.offset)

    # ---- the rest -----------------------------------------------------------------------------

    def note(self, handle: int) -> None:
        """Note for the audit, if there is one, which buffer an operation is about."""
        if self.audited:
            self.sid = sid_of(self.vmm.handle_info(handle))

    def stat_of(self, entry: Entry) -> Stat:
        """What a name has."""
        info = self.vmm.handle_info(entry.item)
        return Stat(
            entry.name,
            info.nbytes,
            sid_of(info) or 0,
            entry.uid,
            entry.pid,
            Rights(entry.rights),
            info.seals,
            len(entry.holders),
            entry.lifetime,
            entry.revoked,
        )

    def close(self, entries: Iterable[Entry]) -> None:
        """Close the handles of names that ended."""
        for entry in entries:
            self.vmm.handle_close(entry.item)


def lifetime_of(method: str, request: Request) -> Lifetime:
    """The lifetime that a request asks for.

    Errors:
        INVALID_ARGUMENT: there is no such one.
    """
    lifetime = LIFETIMES.get(request.lifetime)
    if lifetime is None:
        raise InvalidArgument(method, f"lifetime {request.lifetime} is unknown")
    return lifetime


def check_needed(method: str, what: str, allowed: int, given: int, needed: int) -> None:
    """Whether a client gets the rights that it needs.

    Errors:
        NO_CAPABILITY: it does not.
    """
    if needed & ~given:
        raise NoCapability(
            method,
            f"the {what} allows {Rights(allowed)!r}, and "
            f"{Rights(needed & ALL_RIGHTS)!r} are needed",
        )


def check_transfer(method: str, info: HandleInfo) -> None:
    """Whether a handle can be sent to anybody.

    Errors:
        NO_CAPABILITY: it lacks TRANSFER.
    """
    if Rights.TRANSFER not in info.rights:
        raise NoCapability(method, "the handle lacks TRANSFER: nobody could open the name")


def weight_of(info: HandleInfo) -> int:
    """Descriptors that travel with a buffer, identities included."""
    return info.segments + (2 if info.segments > 1 or is_clone(info) else 0)


def is_clone(info: HandleInfo) -> bool:
    """Whether a buffer is a window on another one; True where its handle does not tell."""
    return Rights.GET_SID not in info.rights or info.origin_sid is not None


def sid_of(info: HandleInfo) -> int | None:
    """The security id of a buffer; None where its handle does not tell."""
    return info.sid if Rights.GET_SID in info.rights else None


def failure(method: str, problem: BaseException) -> VmmError:
    """What went wrong, as the client gets it."""
    if isinstance(problem, VmmError):
        return problem
    if isinstance(problem, MemoryError):
        return OutOfMemory(method, "the broker has no memory left")
    if isinstance(problem, OSError):
        rc = RETCODES.get(problem.errno or 0, Retcode.FAIL)
        return error(rc, method, "the kernel refused it to the broker", problem.errno)
    return error(
        Retcode.INTERNAL_ERROR, method, f"a defect of the broker: {type(problem).__name__}"
    )

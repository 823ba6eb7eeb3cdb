"""A client of a broker: one connection, which threads share, made anew where it was lost."""

from __future__ import annotations

import atexit
import errno
import os
import socket
import sys
import time
from _thread import allocate_lock
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from vmm_linux._core import imports
from vmm_linux._core.values import is_a
from vmm_linux._default_vmm import given_or_default
from vmm_linux.errors import (
    Fail,
    InternalError,
    VmmError,
)
from vmm_linux.flags import Rights, VmmFlags
from vmm_linux.mdl import Mdl
from vmm_linux.names import connecting, place, protocol
from vmm_linux.names.answers import check_kind, error_of, read, read_all
from vmm_linux.names.arguments import buffer_of, lifetime_of, number_in, path_of
from vmm_linux.names.connecting import ATTEMPTS, PATIENCE
from vmm_linux.names.protocol import (
    HANDLE_MAGIC,
    LONGEST_ANSWER,
    MOST_RIGHTS,
    Answer,
    Kind,
    Lifetime,
    Operation,
    Stat,
    encoded,
    request,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import SupportsIndex

    from vmm_linux._core.endpoint import VMM

READ_WRITE: Final = VmmFlags.READ | VmmFlags.WRITE
NO_WRITE: Final = MOST_RIGHTS & ~int(Rights.MAP_WRITE)
STILL_CONNECTED: Final = frozenset((errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM))
"""Errors of the kernel's shortages, which end no connection: names depend on it."""
MOST_NOTICES: Final = 65536
"""Notices that wait to be asked for; the oldest are dropped."""


class Notice(NamedTuple):
    """What a broker said unasked: this name can no longer be opened."""

    name: str


class LostError(Exception):
    """The connection ended, and may be made again."""


class Client:
    """A connection to a broker, made when it is first needed.

    Threads share it; a forked child makes its own, and a broker that was started again is
    connected to again. Names of lifetime ``"connection"`` end with it.

    Args:
        broker: path of the broker's socket; None for ``VMM_LINUX_BROKER``, or this user's own
            broker, which is started where it does not run.
    """

    def __init__(self, broker: str | os.PathLike[str] | None = None) -> None:
        self._given = None if broker is None else path_of(broker)
        self._begin()
        CLIENTS.add(self)

    def _begin(self) -> None:
        """Begin without a connection."""
        self._lock = allocate_lock()
        self._sock: socket.socket | None = None
        self._unsure = False
        self._family = b""
        self._notices: list[Notice] = []

    # ---- operations ---------------------------------------------------------------------------

    def create(
        self,
        name: str,
        size: SupportsIndex,
        prot: SupportsIndex = READ_WRITE,
        *,
        lifetime: str = "connection",
        vmm: VMM | None = None,
    ) -> Mdl:
        """Make a buffer under a name.

        Args:
            name: 1 to 255 bytes in UTF-8, without NUL and '/'.
            size: bytes, one or more.
            prot: ``VmmFlags``: the most that the name allows, READ at least.
            lifetime: ``"connection"``, ``"family"`` or ``"kept"``.
            vmm: that the handle is to belong to; None for the default one.

        Errors:
            ALREADY_EXISTS: the name is taken.
            QUOTA_EXCEEDED: the broker's limits.
            SECURITY_DISALLOW: its policy.
            INVALID_ARGUMENT: no such name, size, protection or lifetime.
        """
        length = number_in("create", "size", size)
        ending = lifetime_of("create", lifetime)
        bits = number_in("create", "prot", prot, MOST_RIGHTS)
        asked = request(
            Operation.CREATE, encoded("create", name), most=bits, size=length, lifetime=ending
        )
        return self._buffer("create", asked, vmm, ending)

    def open(
        self,
        name: str,
        writable: bool | None = None,
        *,
        rights: SupportsIndex | None = None,
        vmm: VMM | None = None,
    ) -> Mdl:
        """Open the buffer of a name. See ``vmm_linux.attach``."""
        asked = encoded("open", name)
        if rights is not None:
            exact = number_in("open", "rights", rights, MOST_RIGHTS)
            message = request(Operation.OPEN, asked, most=exact, needed=exact)
        elif writable is None:
            message = request(Operation.OPEN, asked)
        elif writable:
            message = request(Operation.OPEN, asked, needed=int(Rights.MAP_WRITE))
        else:
            message = request(Operation.OPEN, asked, most=NO_WRITE)
        return self._buffer("open", message, vmm)

    def publish(
        self,
        mdl: Mdl,
        name: str,
        *,
        lifetime: str = "connection",
        rights: SupportsIndex | None = None,
    ) -> None:
        """Put a buffer under a name. See ``Mdl.publish_as``."""
        mdl = buffer_of("publish", mdl)
        ending = lifetime_of("publish", lifetime)
        bits = None if rights is None else number_in("publish", "rights", rights, MOST_RIGHTS)
        message = request(
            Operation.PUBLISH,
            encoded("publish", name),
            size=mdl.nbytes,
            needed=int(mdl.rights) if bits is None else bits,
            lifetime=ending,
        )

        def then(sock: socket.socket) -> None:
            mdl.send(sock, bits)

        self._plain("publish", message, ending, then)

    def clone(
        self,
        name: str,
        new: str,
        offset: SupportsIndex,
        length: SupportsIndex,
        *,
        lifetime: str = "connection",
    ) -> None:
        """Put a window on the buffer of a name under another name. See ``VMM.mdl_clone``."""
        ending = lifetime_of("clone", lifetime)
        message = request(
            Operation.CLONE,
            encoded("clone", name),
            other=encoded("clone", new),
            offset=number_in("clone", "offset", offset),
            size=number_in("clone", "length", length),
            lifetime=ending,
        )
        self._plain("clone", message, ending)

    def seal(self, name: str, seals: SupportsIndex) -> None:
        """Seal the buffer of a name. See ``VMM.mdl_seal``; only its owner may."""
        bits = number_in("seal", "seals", seals, MOST_RIGHTS)
        self._plain("seal", request(Operation.SEAL, encoded("seal", name), seals=bits))

    def unlink(self, name: str) -> None:
        """End a name; only its owner may. Who has the buffer keeps it."""
        self._plain("unlink", request(Operation.UNLINK, encoded("unlink", name)))

    def keep(self, name: str) -> None:
        """Let a name live until it is unlinked; only its owner may."""
        self._plain("keep", request(Operation.KEEP, encoded("keep", name)))

    def revoke(self, name: str) -> None:
        """Let nobody open a name any more; only its owner may. Who has the buffer keeps it.

        The connections that have it get a notice. The name stays taken until it ends.
        """
        self._plain("revoke", request(Operation.REVOKE, encoded("revoke", name)))

    def stat(self, name: str) -> Stat:
        """What the broker says of a name."""
        found = self._plain("stat", request(Operation.STAT, encoded("stat", name)))
        for each in read_all("stat", found):
            return each
        raise InternalError("stat", "the broker's answer: no record")

    def names(self) -> list[Stat]:
        """What the broker says of all names that this user may see, in their order."""
        names: list[Stat] = []
        after = b""
        while True:
            found = self._plain("list", request(Operation.LIST, after))
            names += read_all("list", found)
            if not found.number or not found.records:
                return names
            before, after = after, names[-1].name.encode()
            if after <= before:  # else this could last for ever
                raise InternalError("list", "the broker's answer: names out of order")

    def notices(self) -> list[Notice]:
        """What the broker said unasked since this was last called, the oldest first."""
        with self._lock:
            sock = self._sock
            # After an interrupted call an answer may come first: the next call sorts them out.
            while sock is not None and not self._unsure:
                try:
                    data = sock.recv(LONGEST_ANSWER, socket.MSG_DONTWAIT)
                except OSError:
                    break
                if not data:
                    self._drop()
                    break
                self._note(read(data))
            found, self._notices = self._notices, []
        return found

    def close(self) -> None:
        """Close the connection; its names end. The next call makes another one."""
        with self._lock:
            self._drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- requests and answers -------------------------------------------------------------------

    def _buffer(self, method: str, message: bytes, vmm: VMM | None, ending: int = 0) -> Mdl:
        """The buffer that the broker answers with."""
        vmm = given_or_default(method, vmm)
        return Mdl._made(vmm, self._ask, method, message, ending, vmm, None)  # noqa: SLF001

    def _plain(
        self,
        method: str,
        message: bytes,
        ending: int = 0,
        then: Callable[[socket.socket], None] | None = None,
    ) -> Answer:
        """The answer without a buffer."""
        found: Answer = self._ask(method, message, ending, None, then)
        return found

    def _ask(
        self,
        method: str,
        message: bytes,
        ending: int,
        vmm: VMM | None,
        then: Callable[[socket.socket], None] | None,
    ) -> Any:  # noqa: ANN401  a Handle or an Answer
        """Send a request, and return its answer.

        A connection that was lost before is made again; on a new one the answer counts.
        """
        with self._lock:
            cause: BaseException | None = None
            for _ in range(ATTEMPTS):
                kept = self._sock is not None
                try:
                    return self._ask_once(method, message, ending, vmm, then)
                except LostError as problem:
                    self._drop()
                    cause = problem.__cause__
                    if not kept:
                        break
            raise Fail(
                method, f"the broker at {self.broker!r} ended the connection", errno_of(cause)
            )

    def _ask_once(
        self,
        method: str,
        message: bytes,
        ending: int,
        vmm: VMM | None,
        then: Callable[[socket.socket], None] | None,
    ) -> Any:  # noqa: ANN401  as above
        """The same on the connection that there is, or a new one.

        Errors:
            LostError: the connection ended.
        """
        sock = self._sock
        if sock is None:
            sock = self._connect(method)
        if self._unsure:
            self._synchronize(method, sock)
        if ending == Lifetime.FAMILY:
            self._join(method, sock)
        # Whatever interrupts this, the next request first makes sure of what is owed.
        self._unsure = True
        try:
            sock.send(message, socket.MSG_NOSIGNAL)
            if then is not None:
                then(sock)
            found = self._receive(method, sock, vmm)
            check_kind(found, vmm is not None)
        except VmmError:  # some are OSErrors too
            raise
        except BlockingIOError:
            raise unanswered(method, self.broker) from None
        except (EOFError, OSError) as problem:
            if errno_of(problem) in STILL_CONNECTED:
                raise Fail(method, f"nothing was sent: {problem}", errno_of(problem)) from None
            raise LostError from problem
        self._unsure = False
        if is_a(found, Answer) and found.rc:
            raise error_of(method, found)
        return found

    def _receive(self, method: str, sock: socket.socket, vmm: VMM | None) -> Any:  # noqa: ANN401
        """The next answer: a handle, or an ``Answer``. Notices that come first are noted.

        A buffer that was not asked for is None: it is not taken.
        """
        deadline = 0.0
        while True:
            if sock.recv(len(HANDLE_MAGIC), socket.MSG_PEEK) == HANDLE_MAGIC:
                if vmm is not None:
                    return vmm.recv_handle(sock)
                sock.recv(1)  # without room for descriptors
                return None
            data = sock.recv(LONGEST_ANSWER)
            if not data:
                raise EOFError(method)
            found = read(data)
            if found.kind == Kind.ANSWER:
                return found
            self._note(found)
            # Each wait has a limit of its own; this is that of all.
            deadline = deadline or time.monotonic() + PATIENCE
            if time.monotonic() > deadline:
                raise BlockingIOError(method)

    def _note(self, found: Answer) -> None:
        """Keep a notice."""
        if found.kind == Kind.REVOKED:
            if len(self._notices) >= MOST_NOTICES:
                del self._notices[: MOST_NOTICES // 2]
            self._notices.append(Notice(found.data.decode(errors="replace")))

    def _synchronize(self, method: str, sock: socket.socket) -> None:
        """Drop answers that an interrupted call left behind, or that it is still owed."""
        number = int.from_bytes(os.urandom(8)) >> 1
        deadline = time.monotonic() + PATIENCE
        try:
            sock.send(request(Operation.SYNC, offset=number), socket.MSG_NOSIGNAL)
            while time.monotonic() < deadline:
                found = self._receive(method, sock, None)
                if found is not None and found.number == number:
                    break
            else:
                raise unanswered(method, self.broker)
        except VmmError:
            raise
        except BlockingIOError:
            raise unanswered(method, self.broker) from None
        except (EOFError, OSError) as problem:
            raise LostError from problem
        self._unsure = False

    # ---- the connection -------------------------------------------------------------------------

    @property
    def broker(self) -> str:
        """The path of the broker's socket."""
        return self._given or os.environ.get(place.VARIABLE) or place.own_socket()

    def _connect(self, method: str) -> socket.socket:
        """A new connection, to a broker that is started if it is this user's own."""
        given = self._given or os.environ.get(place.VARIABLE)
        sock = connecting.to_path(method, given) if given else connecting.to_own(method)
        self._sock = sock
        self._unsure = False
        self._family = b""
        if "multiprocessing.process" in sys.modules:
            self._join(method, sock)
        return sock

    def _join(self, method: str, sock: socket.socket) -> None:
        """Say which family of processes this one is of."""
        process: Any = imports.needed(method, "multiprocessing.process")
        key = bytes(process.current_process().authkey)
        token = blake2b(key, digest_size=protocol.FAMILY, person=b"vmm_linux names").digest()
        if token == self._family:
            return
        parent = process.parent_process()
        ancestors = b"" if parent is None else protocol.PID.pack(parent.pid)
        try:
            sock.send(request(Operation.HELLO, token, other=ancestors), socket.MSG_NOSIGNAL)
        except OSError as problem:
            raise LostError from problem
        self._family = token

    def _drop(self) -> None:
        """Close the connection."""
        sock, self._sock = self._sock, None
        self._unsure = False
        if sock is not None:
            sock.close()

    def _forget(self) -> None:
        """In a forked child, close the parent's connection, and begin anew."""
        sock = self._sock
        self._begin()
        if sock is not None:
            sock.close()


def unanswered(method: str, broker: str) -> Fail:
    """The exception for a broker that does not answer."""
    return Fail(method, f"the broker at {broker!r} did not answer for {PATIENCE} seconds")


def errno_of(problem: BaseException | None) -> int | None:
    """The kernel's error number of an exception, if it has one."""
    return problem.errno if isinstance(problem, OSError) else None


# ---- one for each broker -------------------------------------------------------------------------

CLIENTS: Any = imports.needed("Client", "weakref").WeakSet()
"""All clients of this process."""
KEPT: dict[tuple[str | None, ...], Client] = {}
"""The clients of ``attach`` and ``publish_as``, by what their brokers' paths come from."""


def client_of(broker: str | os.PathLike[str] | None) -> Client:
    """The client that ``attach``, ``publish_as`` and ``Ticket`` use in this process.

    Args:
        broker: path of a broker's socket; None for ``VMM_LINUX_BROKER``, or this user's own.
    """
    environ = os.environ
    key = (
        None if broker is None else path_of(broker),
        environ.get(place.VARIABLE),
        environ.get("XDG_RUNTIME_DIR"),
    )
    found = KEPT.get(key)
    if found is None:
        found = KEPT.setdefault(key, Client(broker))
    return found


def close_kept() -> None:
    """Close the connections of ``attach`` and ``publish_as``: names of theirs end."""
    for client in list(KEPT.values()):
        client.close()
    KEPT.clear()


def forget_in_child() -> None:
    """A forked child has neither its parent's connections nor its locks."""
    for client in list(CLIENTS):
        client._forget()  # noqa: SLF001


os.register_at_fork(after_in_child=forget_in_child)
atexit.register(close_kept)

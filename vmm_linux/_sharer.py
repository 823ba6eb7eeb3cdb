"""Descriptors that wait in this process until their receivers fetch them.

A pickle carries a ``Ticket``: the name of a socket of this process, and 32 random bytes. The
receiver sends the first half of these to that socket, and gets the descriptor with the second half.
So only a process of the same user that has the pickle gets the descriptor, and the receiver accepts
one only from the process that made the ticket. A ticket works once.

The socket has an abstract name, which needs no directory and ends with the process. One datagram
socket serves all: a client takes no descriptor here, and makes no other client wait. A daemon
thread answers; it starts with the first descriptor.

The number of waiting descriptors is limited, and they are closed when the process ends. A process
that ends by itself waits for a while until all are fetched.
"""

from __future__ import annotations

import _socket
import atexit
import errno
import os
import signal
import struct
import sys
import threading
import time

from vmm_linux._core import imports, kernel
from vmm_linux._core.kernel import Descriptor, duplicate
from vmm_linux._core.typed import NamedTuple
from vmm_linux._core.values import counted
from vmm_linux.errors import OutOfMemory, QuotaExceeded, ResourceNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, Final

MOST_WAITING: Final = 512
"""Descriptors that wait here at most; half of RLIMIT_NOFILE where that is less."""
GIVES_WAY: Final = 60.0
"""Seconds after which one that waits gives its place to another where there is none left. Its
receiver may have been killed, which nothing shows; without this a process whose receivers are
killed could in the end send nothing more."""
AT_EXIT: Final = 10.0
"""Seconds that an ending process waits at most until its receivers have fetched all."""
PATIENCE: Final = 30.0
"""Seconds after which a receiver gives up on a live sender that does not answer."""
PROBE: Final = 0.2
"""Seconds between two checks whether the sender still exists."""
AFTER_QUEUES: Final = -10
"""Priority at exit: after the threads of queues, at -5, which still send their items."""
HALF: Final = 16
"""Bytes of each half of a ticket's secret."""
CREDENTIALS: Final = struct.Struct("iII")
INT_SIZE: Final = struct.calcsize("i")
PASS_CREDENTIALS: Final = _socket.CMSG_SPACE(CREDENTIALS.size)
NO_DESCRIPTOR_LEFT: Final = "no descriptor is left; raise RLIMIT_NOFILE (ulimit -n) or close some"
GONE: Final = (
    "the descriptor of this pickle is gone: each is loaded once, by a process of the same user "
    "and network namespace, while its sender still runs"
)


class Ticket(NamedTuple):
    """Lets its owner fetch a descriptor, once."""

    address: bytes
    request: bytes
    proof: bytes

    def detach(self) -> int:
        """Fetch the descriptor, which the caller then owns.

        Errors:
            RESOURCE_NOT_FOUND: it was fetched before; its sender ended, or does not answer.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.
        """
        try:
            with new_socket("unpickle") as sock:
                sock.bind(b"")  # the kernel gives it a name for the answer
                sock.connect(self.address)
                sock.settimeout(PROBE)
                return self._fetch(sock)
        except OSError as problem:
            if problem.errno in {errno.EMFILE, errno.ENFILE}:
                raise QuotaExceeded("unpickle", NO_DESCRIPTOR_LEFT, problem.errno) from None
            raise ResourceNotFound("unpickle", f"{GONE} ({problem})", problem.errno) from None

    def _fetch(self, sock: socket.socket) -> int:
        """Ask, and wait for the answer as long as the sender exists."""
        asked = False
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                if not asked:
                    sock.send(self.request)
                    asked = True
                return self._taken(sock)
            except TimeoutError:
                pass
            try:
                # An unknown name is refused; the sender keeps the connection.
                sock.connect(self.address)
            except OSError as problem:
                sock.settimeout(0)
                try:  # its last act was the answer
                    return self._taken(sock)
                except BlockingIOError:
                    pass
                raise problem from None
        raise ResourceNotFound(
            "unpickle", f"the sender of this pickle did not answer for {PATIENCE:g} seconds"
        )

    def _taken(self, sock: socket.socket) -> int:
        """The descriptor out of an answer."""
        room = _socket.CMSG_LEN(INT_SIZE)
        answer, control, flags, _ = sock.recvmsg(HALF, room, _socket.MSG_CMSG_CLOEXEC)
        found: list[int] = []
        for level, kind, data in control:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                found += memoryview(data[: len(data) - len(data) % INT_SIZE]).cast("i")
        if len(found) == 1 and answer == self.proof:
            return found[0]
        for each in found:
            kernel.close(each)
        if answer == self.proof and flags & _socket.MSG_CTRUNC:
            raise QuotaExceeded("unpickle", NO_DESCRIPTOR_LEFT)
        raise ResourceNotFound("unpickle", GONE)


class Sharer:
    """The descriptors that wait in this process, and the thread that hands them out."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: dict[bytes, tuple[Descriptor, bytes, float]] = {}
        self.sock: socket.socket | None = None
        self.kept: Descriptor | None = None
        self.thread: threading.Thread | None = None
        self.finalizer: Any = None

    def share(self, fd: int) -> Ticket:
        """Let a duplicate of a descriptor wait for the process that has the ticket."""
        secret = os.urandom(2 * HALF)
        request, proof = secret[:HALF], secret[HALF:]
        with self.changed:
            most = min(MOST_WAITING, kernel.resource_limit(kernel.RESOURCES["RLIMIT_NOFILE"]) // 2)
            if len(self.waiting) >= most and not self._gives_way():
                raise QuotaExceeded(
                    "pickle",
                    f"{len(self.waiting)} descriptors that were sent wait for their receivers, and "
                    f"no more than {most} may (the bound is {MOST_WAITING}, or half of "
                    "RLIMIT_NOFILE): have the receivers fetch them before more are sent",
                )
            kept = duplicate(fd)
            ticket = Ticket(self._started().getsockname(), request, proof)
            self.waiting[request] = (kept, proof, time.monotonic())
            if is_ending():
                self._hold_the_end()
        return ticket

    def _gives_way(self) -> bool:
        """Close what has waited longest, if that is long enough."""
        oldest = next(iter(self.waiting), None)
        if oldest is None or time.monotonic() - self.waiting[oldest][2] < GIVES_WAY:
            return False
        self.waiting.pop(oldest)[0].close()
        return True

    def _started(self) -> socket.socket:
        """The socket, with the thread that serves it."""
        if self.sock is not None and self.kept is not None and self.kept.is_open:
            return self.sock
        self.stop()
        self.prepare()
        sock = new_socket("pickle")
        try:
            sock.bind(b"")  # a name of the kernel's choice, in no directory
            sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_PASSCRED, 1)
            kept = Descriptor()
            kept.take(sock.fileno())
            thread = threading.Thread(
                target=self._serve, args=(sock, kept), name="vmm_linux sharer", daemon=True
            )
            self.sock, self.kept = sock, kept
            try:
                thread.start()
                self.thread = thread
            except RuntimeError as problem:
                if not is_ending():  # else the exit hook itself answers
                    raise OutOfMemory(
                        "pickle", f"no thread can be started to hand the descriptor out: {problem}"
                    ) from None
        except BaseException:
            self.sock = self.kept = None
            sock.close()
            raise
        return sock

    def _serve(self, sock: socket.socket, kept: Descriptor) -> None:
        """Answer until the socket is shut down, or closed by the program."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self.kept is kept and kept.is_open:
            self._serve_one(sock, kept)

    def _serve_one(self, sock: socket.socket, kept: Descriptor) -> None:
        """Answer the next request."""
        try:
            request, control, _, address = sock.recvmsg(2 * HALF, PASS_CREDENTIALS)
            if not address:  # no answer could reach its sender
                return
            if not kept.is_open:  # the program took the number during the wait
                return
            if same_user(control):
                self._answer(sock, request, address)
            else:
                sock.sendto(b"", _socket.MSG_DONTWAIT, address)
        except OSError:
            pass

    def _answer(self, sock: socket.socket, request: bytes, address: str | bytes) -> None:
        """Send the ticket's descriptor, or an answer without one."""
        with self.changed:
            found = self.waiting.pop(request, None)
            self.changed.notify_all()
            if found is not None:
                kept, proof, _ = found
                try:
                    if kept.is_open:
                        rights = struct.pack("i", kept.number)
                        control = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)]
                        # The ticket's owner waits for one answer, and has room for one.
                        sock.sendmsg([proof], control, _socket.MSG_DONTWAIT, address)
                        return
                except OSError:  # it ended, or too many descriptors are in flight
                    pass
                finally:
                    kept.close()
            sock.sendto(b"", _socket.MSG_DONTWAIT, address)

    # ---- the end ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the process wait at its end, which multiprocessing reports once it is loaded."""
        if self.finalizer is not None:
            return
        util: Any = imports.loaded("multiprocessing.util")
        if util is None or is_ending():
            return
        # A child of multiprocessing forgets its exit hooks, and then runs this anew.
        util.register_after_fork(self, Sharer._prepare_again)
        self._prepare_again()

    def _prepare_again(self) -> None:
        """As ``prepare``, in a process that lost its exit hooks."""
        util = sys.modules["multiprocessing.util"]
        self.finalizer = util.Finalize(None, finish, exitpriority=AFTER_QUEUES)

    def finish(self) -> None:
        """Wait for a limited time until all is fetched; then stop, and report what is lost."""
        try:
            self._wait(AT_EXIT)
        finally:
            self._give_up()

    def _hold_the_end(self) -> None:
        """Make an ending process wait for the items that its other threads still send.

        ``multiprocessing`` ends a process first, and then waits for its threads: this adds one.
        After that, or where no thread can be started, ``finish`` waits.
        """

        def hold() -> None:
            self._wait(AT_EXIT)
            if self.waiting:
                self._give_up()

        try:
            threading.Thread(target=hold, name="vmm_linux sharer's end", daemon=False).start()
        except RuntimeError:
            pass

    def _give_up(self) -> None:
        """Stop, and report what is lost."""
        left = self.stop()
        if left and sys.stderr is not None:
            sys.stderr.write(
                f"vmm_linux: process {os.getpid()} ends and closes {counted(left, 'descriptor')} "
                "of buffers or events, which it sent and nobody fetched within "
                f"{AT_EXIT:g} seconds\n"
            )

    def _wait(self, seconds: float) -> None:
        """Wait until all is fetched, for so many seconds at most."""
        sock, kept = self.sock, self.kept
        if sock is None or kept is None:
            return
        if self.thread is not None:
            with self.changed:
                self.changed.wait_for(lambda: not (self.waiting and kept.is_open), seconds)
            return
        deadline = time.monotonic() + seconds
        while kept.is_open and self.waiting and time.monotonic() < deadline:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            self._serve_one(sock, kept)

    def stop(self) -> int:
        """Close all waiting descriptors, and end the thread; returns how many there were."""
        with self.changed:
            sock, kept, thread = self.sock, self.kept, self.thread
            self.sock = self.kept = self.thread = None
            left = list(self.waiting.values())
            self.waiting.clear()
        for each, _, _ in left:
            each.close()
        if sock is not None and kept is not None:
            if kept.is_open:
                try:
                    sock.shutdown(_socket.SHUT_RDWR)
                except OSError:
                    pass
                if thread is not None:
                    thread.join()
            let_go(sock, kept)
        return len(left)

    def forget(self) -> None:
        """In a forked child, close the inherited descriptors, which only the parent sends."""
        for each, _, _ in list(self.waiting.values()):
            each.close()
        self.waiting.clear()
        if self.sock is not None and self.kept is not None:
            let_go(self.sock, self.kept)
        self.sock = self.kept = self.thread = None


def new_socket(method: str) -> socket.socket:
    """A datagram socket. Its module is loaded where multiprocessing is."""
    made: socket.socket = imports.needed(method, "socket").socket(
        _socket.AF_UNIX, _socket.SOCK_DGRAM
    )
    return made


def is_ending() -> bool:
    """Whether multiprocessing has begun to end this process, and accepts nothing more."""
    util: Any = imports.loaded("multiprocessing.util")
    return util is not None and bool(util.is_exiting())


def let_go(sock: socket.socket, kept: Descriptor) -> None:
    """Close a socket, if its number still names it."""
    sock.detach()
    kept.close()


def same_user(control: list[tuple[int, int, bytes]]) -> bool:
    """Whether a message is of this process's user, by the kernel's credentials.

    Where this user has the kernel's placeholder for unmapped users, others have the same number;
    then the ticket alone decides.
    """
    for level, kind, data in control:
        if (
            level == _socket.SOL_SOCKET
            and kind == _socket.SCM_CREDENTIALS
            and len(data) == CREDENTIALS.size
        ):
            uid: int = CREDENTIALS.unpack(data)[1]
            return uid in {os.getuid(), os.geteuid()}
    return False


HERE: dict[str, Sharer] = {"sharer": Sharer()}
"""This process's sharer, under ``"sharer"``."""


def share(fd: int) -> Ticket:
    """A ticket with which another process of this user fetches this descriptor, once.

    The caller may close its own. A failure leaves nothing open.

    Errors:
        QUOTA_EXCEEDED: too many wait already; RLIMIT_NOFILE.
        OUT_OF_MEMORY: no thread can be started.
    """
    return HERE["sharer"].share(fd)


def prepare() -> None:
    """Make this process's end wait for receivers, as soon as it may have any."""
    HERE["sharer"].prepare()


def finish() -> None:
    """The end of the process."""
    HERE["sharer"].finish()


def stop() -> int:
    """Close all waiting descriptors, for tests; returns how many there were."""
    return HERE["sharer"].stop()


def in_child() -> None:
    """Begin anew in a forked child, which has neither locks nor threads of its parent."""
    inherited = HERE["sharer"]
    HERE["sharer"] = Sharer()
    inherited.forget()
    HERE["sharer"].prepare()


os.register_at_fork(after_in_child=in_child)


@atexit.register
def finish_at_exit() -> None:
    """The end of a process that loaded multiprocessing so late that only its end sends anything.

    Such a process imported this package first, so that this comes after multiprocessing's end.
    """
    if HERE["sharer"].finalizer is None:
        finish()

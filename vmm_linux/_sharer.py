"""Descriptors that wait here until the processes that they were sent to come for them.

What travels inside a pickle is a ``Ticket``: the name of a socket of this process, and 32 random
bytes. The receiver sends the first half of these to that socket, and gets the descriptor with the
second half. So this process hands a descriptor to nobody but who has the pickle, and of its own
user; and the receiver takes one from nobody but who made the ticket. A ticket is good for once.

The socket's name is an abstract one, which needs no directory and vanishes with the process. One
socket for datagrams serves all: nobody who connects takes a descriptor here, or makes others wait.
A daemon thread answers, started with the first descriptor.

What was not fetched is bounded in number, and closed when the process ends. A process that ends
by itself waits for a while until all was fetched.
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
from vmm_linux.errors import OutOfMemory, QuotaExceeded, ResourceNotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any, Final

__all__ = ["GONE", "NO_DESCRIPTOR_LEFT", "Ticket", "prepare", "share", "stop"]

MOST_WAITING: Final = 512
"""Descriptors that wait here at most; half of RLIMIT_NOFILE where that is less."""
AT_EXIT: Final = 10.0
"""Seconds that an ending process waits at most, until what it sent was fetched."""
PATIENCE: Final = 30.0
"""Seconds after which a sender that lives and does not answer is given up."""
PROBE: Final = 0.2
"""Seconds between two looks whether the sender is still there."""
AFTER_QUEUES: Final = -10
"""Priority at exit: when the threads of queues, at -5, have sent what was put into them."""
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
    """What a receiver needs to fetch a descriptor. Whoever has it can fetch it."""

    address: bytes
    request: bytes
    proof: bytes

    def detach(self) -> int:
        """Fetch the descriptor, which is the caller's then.

        Errors:
            RESOURCE_NOT_FOUND: it was fetched before; its sender ended, or does not answer.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.
        """
        try:
            with new_socket("unpickle") as sock:
                sock.bind(b"")  # the kernel gives it a name, to which the answer goes
                sock.connect(self.address)
                sock.settimeout(PROBE)
                return self._fetch(sock)
        except OSError as problem:
            if problem.errno in {errno.EMFILE, errno.ENFILE}:
                raise QuotaExceeded("unpickle", NO_DESCRIPTOR_LEFT, problem.errno) from None
            raise ResourceNotFound("unpickle", f"{GONE} ({problem})", problem.errno) from None

    def _fetch(self, sock: socket.socket) -> int:
        """Ask, and wait for the answer as long as there is somebody to give it."""
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
                # Who is asked keeps the connection; a name that nobody has is refused.
                sock.connect(self.address)
            except OSError as problem:
                sock.settimeout(0)
                try:  # the last that it did was to answer
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
        self.waiting: dict[bytes, tuple[Descriptor, bytes]] = {}
        self.sock: socket.socket | None = None
        self.kept: Descriptor | None = None
        self.thread: threading.Thread | None = None
        self.finalizer: Any = None

    def share(self, fd: int) -> Ticket:
        """Have a duplicate of a descriptor wait for who comes with the ticket."""
        secret = os.urandom(2 * HALF)
        request, proof = secret[:HALF], secret[HALF:]
        with self.changed:
            most = min(MOST_WAITING, kernel.most_descriptors() // 2)
            if len(self.waiting) >= most:
                raise QuotaExceeded(
                    "pickle",
                    f"{len(self.waiting)} descriptors that were sent wait for their receivers, and "
                    f"no more than {most} may (the bound is {MOST_WAITING}, or half of "
                    "RLIMIT_NOFILE): have the receivers fetch them before more are sent",
                )
            kept = duplicate(fd)
            ticket = Ticket(self._started().getsockname(), request, proof)
            self.waiting[request] = (kept, proof)
            if is_ending():
                self._hold_the_end()
        return ticket

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
                if not is_ending():  # else the end itself answers, and does nothing else any more
                    raise OutOfMemory(
                        "pickle", f"no thread can be started to hand the descriptor out: {problem}"
                    ) from None
        except BaseException:
            self.sock = self.kept = None
            sock.close()
            raise
        return sock

    def _serve(self, sock: socket.socket, kept: Descriptor) -> None:
        """Answer until the socket is shut down, or closed by somebody else."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while self.kept is kept and kept.is_open:
            self._serve_one(sock, kept)

    def _serve_one(self, sock: socket.socket, kept: Descriptor) -> None:
        """Answer to who comes next."""
        try:
            request, control, _, address = sock.recvmsg(2 * HALF, PASS_CREDENTIALS)
            if not address:  # nobody whom an answer could reach
                return
            if not kept.is_open:  # the program took the number while this waited
                return
            if same_user(control):
                self._answer(sock, request, address)
            else:
                sock.sendto(b"", _socket.MSG_DONTWAIT, address)
        except OSError:
            pass

    def _answer(self, sock: socket.socket, request: bytes, address: str | bytes) -> None:
        """Give a descriptor to who has its ticket, or say that there is none."""
        with self.changed:
            found = self.waiting.pop(request, None)
            self.changed.notify_all()
            if found is not None:
                kept, proof = found
                try:
                    if kept.is_open:
                        rights = struct.pack("i", kept.number)
                        control = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)]
                        # Whose ticket it is waits for one answer, and has room for one.
                        sock.sendmsg([proof], control, _socket.MSG_DONTWAIT, address)
                        return
                except OSError:  # it is gone, or too many descriptors are on their way
                    pass
                finally:
                    kept.close()
            sock.sendto(b"", _socket.MSG_DONTWAIT, address)

    # ---- the end ------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have the end of the process wait, once multiprocessing is loaded, which says when."""
        if self.finalizer is not None:
            return
        util: Any = imports.loaded("multiprocessing.util")
        if util is None or is_ending():
            return
        # A child of multiprocessing's forgets what is to be done at the end, and then asks anew.
        util.register_after_fork(self, Sharer._prepare_again)
        self._prepare_again()

    def _prepare_again(self) -> None:
        """As ``prepare``, in a process that has forgotten."""
        util = sys.modules["multiprocessing.util"]
        self.finalizer = util.Finalize(None, finish, exitpriority=AFTER_QUEUES)

    def finish(self) -> None:
        """Wait until all was fetched, but not for ever; then stop, and say what was lost."""
        try:
            self._wait(AT_EXIT)
        finally:
            self._give_up()

    def _hold_the_end(self) -> None:
        """Have a process whose end has begun wait for what its other threads still send.

        ``multiprocessing`` ends a process first, and then waits for its threads: this is one more.
        Where that is over too, or no thread can be started, ``finish`` waits.
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
        """Stop, and say what was lost."""
        left = self.stop()
        if left and sys.stderr is not None:
            sys.stderr.write(
                f"vmm_linux: process {os.getpid()} ends and closes {left} descriptors of buffers "
                f"or events, which it sent and nobody fetched within {AT_EXIT:g} seconds\n"
            )

    def _wait(self, seconds: float) -> None:
        """Wait until all was fetched, for so long at most."""
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
        """Close all that waits, and end the thread. Returns how many were not fetched."""
        with self.changed:
            sock, kept, thread = self.sock, self.kept, self.thread
            self.sock = self.kept = self.thread = None
            left = list(self.waiting.values())
            self.waiting.clear()
        for each, _ in left:
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
        """Close what a child of fork inherited: it is the parent's to hand out."""
        for each, _ in list(self.waiting.values()):
            each.close()
        self.waiting.clear()
        if self.sock is not None and self.kept is not None:
            let_go(self.sock, self.kept)
        self.sock = self.kept = self.thread = None


def new_socket(method: str) -> socket.socket:
    """A socket for datagrams. Its module is loaded where multiprocessing is."""
    made: socket.socket = imports.needed(method, "socket").socket(
        _socket.AF_UNIX, _socket.SOCK_DGRAM
    )
    return made


def is_ending() -> bool:
    """Whether multiprocessing has begun to end this process, and takes nothing in any more."""
    util: Any = imports.loaded("multiprocessing.util")
    return util is not None and bool(util.is_exiting())


def let_go(sock: socket.socket, kept: Descriptor) -> None:
    """Close a socket, if its number still names it."""
    sock.detach()
    kept.close()


def same_user(control: list[tuple[int, int, bytes]]) -> bool:
    """Whether the kernel says that a message is of this process's user.

    Strangers have this user's number too where that is the kernel's placeholder for those it does
    not map; then the ticket alone decides.
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
"""This process's own, under ``"sharer"``."""


def share(fd: int) -> Ticket:
    """A ticket with which another process of this user fetches this descriptor, once.

    The caller may close his own. Fails wholly, with nothing left open.

    Errors:
        QUOTA_EXCEEDED: too many wait already; RLIMIT_NOFILE.
        OUT_OF_MEMORY: no thread can be started.
    """
    return HERE["sharer"].share(fd)


def prepare() -> None:
    """Have this process's end wait for receivers: as early as it is known that it may have any."""
    HERE["sharer"].prepare()


def finish() -> None:
    """The end of the process."""
    HERE["sharer"].finish()


def stop() -> int:
    """Close all that waits. Returns how many descriptors that were. For tests."""
    return HERE["sharer"].stop()


def in_child() -> None:
    """Begin anew in a child of fork: no lock and no thread of the parent's is there."""
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

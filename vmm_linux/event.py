"""Events, by which one process wakes others.

On the wire an event is one message, little-endian, 8 bytes, with its descriptor in one SCM_RIGHTS
control message:

====== ====== =======================================
bytes  type   what
====== ====== =======================================
0 to 3 text   ``VMME``
4 to 5 uint16 version of this format: 1
6 to 7 uint16 number of descriptors: 1
====== ====== =======================================
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import struct
import sys
import time

from vmm_linux import _pickling, aio
from vmm_linux._core import endpoint, kernel
from vmm_linux._core.kernel import Descriptor
from vmm_linux._core.values import counted, describe, index, is_a
from vmm_linux.errors import (
    RETCODES,
    Fail,
    InvalidArgument,
    InvalidOperation,
    Retcode,
    VmmError,
    error,
    refuse_copies,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Final, Self, SupportsFloat, SupportsIndex

    from _typeshed import HasFileno

__all__ = ["Event"]

FOREVER: Final = float("inf")
MESSAGE: Final = struct.Struct("<4sHH")
MAGIC: Final = b"VMME"
VERSION: Final = 1
COUNTER_SIZE: Final = 8
EVENTFD: Final = "anon_inode:[eventfd]"
"""The kernel's name of an eventfd. The name of a file begins with a slash."""
LONGEST_POLL: Final = 86_400_000
"""Milliseconds of one poll(2), at most 24 days; longer waits take several."""


class Event:
    """A ``threading.Event`` that threads, tasks and processes share: an eventfd.

    It travels to other processes over Unix sockets (``send``, ``recv``) and multiprocessing
    (arguments of a ``Process``, ``Queue``, ``Pipe``, ``Pool``). All its owners share one state.
    ``Queue.put`` pickles later, in a thread: an event that is closed before that arrives as an
    error that ``get`` raises.
    It is always close-on-exec. ``select``, ``selectors`` and event loops take it: it is readable
    while it is set.

    A context manager: leaving it closes it. One that is dropped is closed. Methods may be called
    from any thread. A closed event raises INVALID_OPERATION.

    A peer that shares the event cannot make any method here wait, except ``wait``. Linux leaves
    one gap: ``set`` checks that the kernel would not block it, and then writes; a peer that fills
    the kernel's counter and makes the event blocking just in between makes ``set`` wait until the
    event is cleared. A peer can also make the event lost to all who share it (see
    ``kernel.Descriptor``).

    Errors:
        QUOTA_EXCEEDED: RLIMIT_NOFILE.
        OUT_OF_MEMORY: the system has no free file left.

    Source: eventfd(2).
    """

    __slots__ = ("__weakref__", "_descriptor")

    __reduce__ = refuse_copies(
        "bytes cannot carry an event; send it by Event.send, or let multiprocessing pickle it"
    )

    _descriptor: Descriptor | None

    def __init__(self) -> None:
        if hasattr(self, "_descriptor"):
            raise InvalidOperation("Event", "an Event does not change; make another one")
        self._descriptor = None
        try:
            self._descriptor = kernel.new_eventfd()
        except OSError as problem:
            raise refused("Event", problem.errno or 0) from None
        _pickling.enable(type(self), reduce)

    @classmethod
    def from_fd(cls, fd: SupportsIndex) -> Self:
        """An event of an eventfd that is open in this process, such as an inherited one.

        Args:
            fd: its descriptor, which stays the caller's; the event has a duplicate.

        Errors:
            INVALID_ARGUMENT: no descriptor, not open, no eventfd, one with EFD_SEMAPHORE.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.

        Source: fcntl(2) F_DUPFD_CLOEXEC.
        """
        method = "Event.from_fd"
        number = index(method, "fd", fd)
        if not 0 <= number <= endpoint.MOST_FD:
            raise InvalidArgument(method, f"descriptor {number} is not open: no such number")
        # The duplicate is checked, because the duplicate is used.
        try:
            descriptor = kernel.duplicate(number)
        except OSError as problem:
            if problem.errno == errno.EBADF:
                raise InvalidArgument(method, f"descriptor {number} is not open") from None
            raise refused(method, problem.errno or 0) from None
        check_eventfd(method, descriptor.number)
        return cls._of(descriptor)

    @classmethod
    def recv(cls, sock: HasFileno) -> Self:
        """Receive an event that another process sent, without trust in its message.

        Reads one message and nothing after it. A refused message is consumed, and its
        descriptors are closed. Timeouts and non-blocking sockets behave as in
        ``socket.recvmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket: any object with ``fileno()`` that is one.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket; a message that is none of ``send``'s; a
                descriptor that is no eventfd, or one with EFD_SEMAPHORE.
            QUOTA_EXCEEDED: RLIMIT_NOFILE.
            EOFError: the other end is closed.

        Source: recvmsg(2), unix(7) SCM_RIGHTS.
        """
        method = "Event.recv"
        endpoint.check_socket(method, sock)
        message, received, flags = endpoint.read_message(sock, MESSAGE.size, 1)
        if not (message or received or flags) and not endpoint.is_datagram(sock):
            raise EOFError(f"{method}: the other end is closed")
        check_message(method, sock, message, len(received), flags)
        descriptor = received.take()
        check_eventfd(method, descriptor.number)
        return cls._of(descriptor)

    @classmethod
    def _of(cls, descriptor: Descriptor) -> Self:
        """An event of an eventfd, with any flags that a peer or multiprocessing set."""
        os.set_inheritable(descriptor.number, False)
        keep_from_blocking(descriptor.number)
        event = cls.__new__(cls)
        event._descriptor = descriptor  # noqa: SLF001
        _pickling.enable(cls, reduce)
        return event

    def _open(self, method: str) -> tuple[Descriptor, int]:
        """The descriptor, which a caller keeps while it uses the number, and the number."""
        descriptor = self._descriptor
        if descriptor is None:
            raise InvalidOperation(f"Event.{method}", "the event is closed")
        try:
            return descriptor, descriptor.number
        except OSError:
            raise lost(f"Event.{method}") from None

    def set(self) -> None:
        """Set it, and wake all waiters.

        Each call counts for ``clear``. The count ends at 2**64 - 2; another call is no error.

        Source: write(2), eventfd(2).
        """
        _held, number = self._open("set")
        if not ready("Event.set", number, select.POLLOUT, 0):
            return  # the counter is full
        keep_from_blocking(number)
        try:  # noqa: SIM105  leaving a ``with`` takes memory, after the event is set
            os.eventfd_write(number, 1)
        except BlockingIOError:  # it became full just now
            pass

    def is_set(self) -> bool:
        """Whether it was set since it was last cleared.

        Source: poll(2).
        """
        _held, number = self._open("is_set")
        return ready("Event.is_set", number, select.POLLIN, 0)

    def clear(self) -> int:
        """Make it unset.

        This is one step for the kernel: each ``set`` either counts in the result, or leaves the
        event set again. A program that clears the event, and then does all pending work, misses
        nothing.

        Returns:
            How often it was set since it was last cleared; 0 if it was not set.

        Source: preadv2(2) RWF_NOWAIT, eventfd(2).
        """
        _held, number = self._open("clear")
        counter = bytearray(COUNTER_SIZE)
        try:
            os.preadv(number, [counter], -1, os.RWF_NOWAIT)
        except BlockingIOError:
            return 0
        except OSError as problem:
            if problem.errno == errno.EBADF:
                raise lost("Event.clear") from None
            if problem.errno not in {errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE, errno.EPERM}:
                raise refused("Event.clear", problem.errno or 0) from None
            return clear_by_read(number)
        try:
            return int.from_bytes(counter, sys.byteorder)
        except MemoryError:
            os.write(number, counter)  # put it back: the caller does not get the count
            raise

    def wait(self, timeout: SupportsFloat | SupportsIndex | None = None) -> bool:
        """Wait until it is set. This does not clear it. Other threads run meanwhile.

        ``close`` does not end a wait that has begun.

        Args:
            timeout: seconds to wait at most, 0 or more, or None for ever.

        Returns:
            Whether it was set in that time.

        Errors:
            INVALID_ARGUMENT: no number, negative, not a number.

        Source: poll(2).
        """
        held, number = self._open("wait")
        deadline = FOREVER if timeout is None else time.monotonic() + seconds("wait", timeout)
        while True:
            left = max(0.0, deadline - time.monotonic())
            if ready("Event.wait", number, select.POLLIN, min(left * 1e3, LONGEST_POLL)):
                if not held.is_open:  # the program took the number meanwhile
                    raise lost("Event.wait")
                return True
            if time.monotonic() >= deadline:
                return False

    async def wait_async(self) -> bool:
        """Wait until it is set, and let other tasks run. This does not clear it.

        The event loop is asyncio's, uvloop's or trio's; anyio runs on these. Any number of tasks
        may wait. For a timeout, use the library's own: ``asyncio.timeout``, ``trio.fail_after``.

        Returns:
            True.

        Errors:
            INVALID_OPERATION: no event loop of asyncio or trio runs.
            QUOTA_EXCEEDED: RLIMIT_NOFILE; a task that waits holds one descriptor more.
            UNIMPLEMENTED: the event loop has no ``add_reader``.

        Source: ``loop.add_reader``, ``trio.lowlevel.wait_readable``.
        """
        await aio.checkpoint()
        held, number = self._open("wait_async")
        if not ready("Event.wait_async", number, select.POLLIN, 0):
            await aio.wait("Event.wait_async", number)
            if not held.is_open:  # the program took the number meanwhile
                raise lost("Event.wait_async")
        return True

    def send(self, sock: HasFileno) -> None:
        """Send it to another process, which gets it by ``Event.recv``. This one is unchanged.

        One message; a stream carries other data before and after it. Timeouts and non-blocking
        sockets behave as in ``socket.sendmsg``, whose exceptions pass through.

        Args:
            sock: a connected AF_UNIX socket: any object with ``fileno()`` that is one.

        Errors:
            INVALID_ARGUMENT: no AF_UNIX socket.

        Source: sendmsg(2), unix(7) SCM_RIGHTS.
        """
        held, _ = self._open("send")
        endpoint.check_socket("Event.send", sock)
        try:
            sent = endpoint.send_descriptor(sock, MESSAGE.pack(MAGIC, VERSION, 1), held)
        except OSError as problem:
            if problem.errno == errno.EBADF and not held.is_open:
                raise lost("Event.send") from None
            raise
        if sent != MESSAGE.size:
            raise Fail("Event.send", f"{sent} of {MESSAGE.size} bytes were sent; close the socket")

    def fileno(self) -> int:
        """Its descriptor, for ``select`` and its like: readable while the event is set."""
        return self._open("fileno")[1]

    def close(self) -> None:
        """Close it here. Other owners keep it. A second call does nothing."""
        self._descriptor = None

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._descriptor is None

    def __enter__(self) -> Self:
        self._open("__enter__")
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.closed:
            return "<Event closed>"
        try:
            text = f"<Event fd={self.fileno()} {'set' if self.is_set() else 'unset'}>"
        except VmmError:
            text = "<Event lost>"
        return text

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:  # noqa: ANN401
        """Only multiprocessing's own pickler can carry descriptors."""
        if _pickling.is_multiprocessing(sys._getframe(1)):  # noqa: SLF001
            return reduce(self)
        return self.__reduce__()


def ready(method: str, fd: int, asked: int, milliseconds: float) -> bool:
    """Whether a descriptor has these poll events within that time."""
    poll = select.poll()
    poll.register(fd, asked)
    found = poll.poll(milliseconds)
    if found and found[0][1] & select.POLLNVAL:
        raise lost(method)
    return bool(found and found[0][1] & asked)


def lost(method: str) -> VmmError:
    """The exception for a number that no longer names this package's descriptor."""
    return InvalidOperation(
        method,
        "the program closed the event's descriptor, or put another file under its number "
        "(os.closerange, os.dup2); the event is lost here: make another, or have it sent again",
    )


def keep_from_blocking(fd: int) -> None:
    """Set O_NONBLOCK, which all owners of the event share and can change."""
    if os.get_blocking(fd):
        os.set_blocking(fd, False)


def clear_by_read(fd: int) -> int:
    """Read the counter where the kernel has no RWF_NOWAIT for eventfds (before Linux 5.8)."""
    keep_from_blocking(fd)
    try:
        return os.eventfd_read(fd) if ready("Event.clear", fd, select.POLLIN, 0) else 0
    except BlockingIOError:
        return 0


def seconds(method: str, timeout: SupportsFloat | SupportsIndex) -> float:
    """A timeout as a float that is 0 or more."""
    cause: Exception | None = None
    try:
        # Not float() alone, which reads text too.
        is_number = hasattr(type(timeout), "__float__") or hasattr(type(timeout), "__index__")
        number = float(timeout) if is_number and not is_a(timeout, bool) else None
    except Exception as problem:  # noqa: BLE001  the conversion may raise anything
        number, cause = None, problem
    if number is None:
        raise InvalidArgument(
            f"Event.{method}", f"timeout is {describe(timeout)}, not a number of seconds or None"
        ) from cause
    if not number >= 0:
        raise InvalidArgument(f"Event.{method}", f"timeout is {number}; 0 or more is expected")
    return number


def check_message(method: str, sock: HasFileno, message: bytes, count: int, flags: int) -> None:
    """Refuse a message that is not ``Event.send``'s, with its one descriptor."""
    if len(message) != MESSAGE.size or flags & _socket.MSG_TRUNC:
        size = counted(len(message), "byte")
        raise bad(method, f"{size}, not the {MESSAGE.size} of an event's message")
    magic, version, announced = MESSAGE.unpack(message)
    if magic != MAGIC:
        raise bad(method, "not an event's message")
    if version != VERSION:
        raise bad(method, f"version {version} of the format; this package knows {VERSION}")
    if flags & _socket.MSG_CTRUNC and count == 0:
        raise endpoint.cut_off(method, sock, "the descriptor did not fit")
    if flags & _socket.MSG_CTRUNC and announced == count == 1:
        raise bad(
            method,
            "1 descriptor is announced, and 1 or more came; if that is all that was sent, "
            "control data of the socket took the room: switch off SO_INQ",
        )
    if flags & _socket.MSG_CTRUNC or not announced == count == 1:
        are = "is" if announced == 1 else "are"
        announced = counted(announced, "descriptor")
        raise bad(method, f"{announced} {are} announced, and {count} or more came")


def bad(method: str, why: str) -> VmmError:
    """The exception for a message that is not ``Event.send``'s."""
    return InvalidArgument(method, f"bad message: {why}")


def check_eventfd(method: str, fd: int) -> None:
    """Refuse a descriptor that the kernel does not report as an eventfd of the right kind."""
    if not is_eventfd(fd):
        raise InvalidArgument(method, f"descriptor {fd} is no eventfd")
    try:
        # Kernels before 6.7 do not report semaphores; clear() takes 1 from those, not all.
        with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:  # noqa: PTH123
            is_semaphore = b"eventfd-semaphore: 1" in file.read()
        if is_semaphore:
            raise InvalidArgument(method, f"descriptor {fd} is an eventfd with EFD_SEMAPHORE")
    except FileNotFoundError:
        raise InvalidArgument(method, f"descriptor {fd} is not open") from None
    except OSError as problem:
        raise refused(method, problem.errno or 0) from None


def is_eventfd(fd: int) -> bool:
    """Whether the kernel reports the descriptor as an open eventfd."""
    try:
        # Plain strings: without memory for a path object, Python raises no MemoryError.
        return os.readlink(f"/proc/self/fd/{fd}") == EVENTFD  # noqa: PTH115
    except FileNotFoundError:
        return False


def refused(method: str, code: int) -> VmmError:
    """The exception for a refusal of the kernel with this errno."""
    rc = RETCODES.get(code, Retcode.FAIL)
    advice = "; raise RLIMIT_NOFILE (ulimit -n) or close some" if code == errno.EMFILE else ""
    return error(rc, method, f"{os.strerror(code)}{advice}", code)


def reduce(event: Event) -> tuple[Any, ...]:
    """The contents of multiprocessing's pickle of an event."""
    return _pickling.reduced(event, packed, event)


def packed(event: Event) -> tuple[Any, ...]:
    """An event in a form that ``multiprocessing`` can pickle."""
    _held, number = event._open("__reduce__")  # noqa: SLF001
    return restore, (type(event), _pickling.carry(number))


def restore(kind: type[Event], sent: _pickling.Sent) -> Any:  # noqa: ANN401
    """The event of multiprocessing's pickle, or what stands in for it."""
    return _pickling.delivered(received, kind, sent)


def received(kind: type[Event], sent: _pickling.Sent) -> Event:
    """The event of multiprocessing's pickle."""
    number = _pickling.arrived(sent)
    if not is_eventfd(number):
        raise _pickling.gone()
    descriptor = Descriptor()
    descriptor.take(number)
    return kind._of(descriptor)  # noqa: SLF001

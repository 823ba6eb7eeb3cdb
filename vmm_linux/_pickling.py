"""Handles on their way through ``multiprocessing``.

A pickle carries one descriptor for any handle: of a socket that holds the handle's message, as
``send_handle`` wrote it. A process that is being started inherits the descriptor, a running one
fetches it (``_sharer``). The receiver's checks are those of ``recv_handle``.

Nothing here imports ``multiprocessing``: a program that pickles with it has loaded it.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import sys
import weakref

from vmm_linux import _sharer
from vmm_linux._core import imports, kernel
from vmm_linux._core.kernel import duplicate
from vmm_linux._sharer import GONE, NO_DESCRIPTOR_LEFT
from vmm_linux.errors import (
    RETCODES,
    NotCopyable,
    OutOfMemory,
    QuotaExceeded,
    ResourceNotFound,
    Retcode,
    VmmError,
    error,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn, Protocol

    from vmm_linux._core.endpoint import VMM
    from vmm_linux.flags import Rights
    from vmm_linux.handles import Handle

    class Sent(Protocol):
        """A descriptor on its way."""

        def detach(self) -> int:
            """The descriptor, in the process where it arrived."""

    class Closable(Protocol):
        """The object that is pickled."""

        @property
        def closed(self) -> bool:
            """Whether it is closed."""


REDUCTION = "multiprocessing.reduction"
ENABLED: set[type] = set()
"""Classes that ``multiprocessing``'s pickler knows."""
PARKED: set[weakref.finalize[[], Any]] = set()
"""Ends of sockets for processes that are being started."""


# ---- picklers -----------------------------------------------------------------------------------


def refusal(advice: str) -> Callable[[object], NoReturn]:
    """A ``__reduce__`` for every pickler but ``multiprocessing``'s; ``advice`` is what to do."""

    def refuse(self: object) -> NoReturn:
        raise NotCopyable(
            "pickle",
            f"{type(self).__name__} objects are pickled by multiprocessing alone (Process, Queue, "
            f"Pipe, pools; concurrent.futures), which can carry descriptors. {advice}",
        )

    return refuse


def enable(kind: type, reduce: Callable[[Any], object]) -> None:
    """Register a class with ``multiprocessing``'s pickler, if that is loaded.

    If it is loaded later, ``__reduce_ex__`` knows it by its frame.
    """
    _sharer.prepare()
    if kind not in ENABLED:
        pickler: Any = getattr(sys.modules.get(REDUCTION), "ForkingPickler", None)
        if pickler is not None:
            pickler.register(kind, reduce)
            ENABLED.add(kind)


def is_multiprocessing(frame: FrameType) -> bool:
    """Whether a frame that called ``__reduce_ex__`` is ``multiprocessing``'s.

    A pickler has no frame of its own: the frame is its caller's.
    """
    reduction = sys.modules.get(REDUCTION)
    return reduction is not None and frame.f_globals is vars(reduction)


# ---- sending ------------------------------------------------------------------------------------


def reduced(
    thing: Closable, reduce: Callable[..., tuple[Any, ...]], *arguments: object
) -> tuple[Any, ...]:
    """The contents of a pickle; an error instead, where only the receiver could get an exception.

    A function with arguments, and no closure: where memory for one is short, Python 3.11 loses
    what it would hold.

    ``Queue.put`` pickles in a thread of the queue. An exception there is printed, the item is
    lost, and its receiver would wait for ever.
    """
    try:
        return reduce(*arguments)
    except (VmmError, MemoryError) as problem:
        if not feeds_a_queue(sys._getframe()):  # noqa: SLF001  there is no other way to know
            raise
        return fail, (for_the_receiver(thing, problem),)


def feeds_a_queue(frame: FrameType | None) -> bool:
    """Whether this runs in the thread of a ``multiprocessing.Queue`` that prints its errors.

    A queue that handles errors itself, as the one of ``concurrent.futures`` that passes them to a
    future, gets them as exceptions.
    """
    queue: Any = getattr(sys.modules.get("multiprocessing.queues"), "Queue", None)
    feed = getattr(getattr(queue, "_feed", None), "__code__", None)
    while frame is not None:
        if frame.f_code is feed:
            return frame.f_locals.get("onerror") is queue._on_queue_feeder_error  # noqa: SLF001
        frame = frame.f_back
    return False


def for_the_receiver(thing: Closable, problem: VmmError | MemoryError) -> VmmError:
    """An error in words for the receiver, which does not know what happened to the object."""
    kind = type(thing).__name__
    if thing.closed:
        return ResourceNotFound(
            "pickle",
            f"the {kind} was closed before its sender's queue could pickle it: put() returns "
            f"first, and a thread of the queue pickles then; close the {kind} when the receiver "
            "said that it has it, or leave that to the garbage collector",
        )
    if not isinstance(problem, VmmError):
        return OutOfMemory("pickle", f"in the sender's queue: {problem!r}")
    return error(problem.rc, "pickle", f"in the sender's queue: {problem.message}", problem.errno)


def fail(problem: VmmError) -> NoReturn:
    """Raise, where a pickle is loaded, the exception of the place where it was made."""
    raise problem


def pack(vmm: VMM, handle: Handle, rights: Rights | None = None) -> tuple[Sent, int]:
    """A handle in a form that ``multiprocessing`` can pickle.

    Args:
        vmm: the VMM of the handle.
        handle: to send.
        rights: that the receiver's handle gets, or None for all that this one has.

    Returns:
        The descriptor on its way, and the inode number of the socket behind it.

    Errors:
        NO_CAPABILITY: the handle lacks TRANSFER.
        RESOURCE_NOT_FOUND, HANDLE_REVOKED: it was closed, was revoked.
        QUOTA_EXCEEDED: RLIMIT_NOFILE; too many descriptors wait to be fetched.
    """
    try:
        ours, theirs = imports.needed("pickle", "socket").socketpair()
        with ours, theirs:
            vmm.send_handle(ours, handle, rights)
            return carry(theirs.fileno()), os.fstat(theirs.fileno()).st_ino
    except VmmError as problem:
        raise not_pickled(problem) from None
    except OSError as problem:
        raise refused("pickle", problem) from problem


def not_pickled(problem: VmmError) -> VmmError:
    """The exception of pickling, for one of a method that it uses."""
    return error(problem.rc, "pickle", problem.message, problem.errno)


def refused(method: str, problem: OSError) -> VmmError:
    """The exception for a refusal of the kernel."""
    code = problem.errno or 0
    if code in {errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS}:
        return QuotaExceeded(method, NO_DESCRIPTOR_LEFT, code)
    return error(RETCODES.get(code, Retcode.FAIL), method, str(problem), code)


def carry(descriptor: int) -> Sent:
    """Send a descriptor with a pickle. The caller may close it afterwards.

    Errors:
        QUOTA_EXCEEDED: RLIMIT_NOFILE; too many descriptors wait to be fetched.
        OUT_OF_MEMORY: no thread can be started to serve it.
    """
    context: Any = sys.modules.get("multiprocessing.context")
    popen: Any = None if context is None else context.get_spawning_popen()
    try:
        return _sharer.share(descriptor) if popen is None else inherited(descriptor, popen)
    except VmmError:
        raise
    except OSError as problem:
        raise refused("pickle", problem) from problem


def inherited(descriptor: int, popen: Any) -> Sent:  # noqa: ANN401  of several classes
    """Let a process that is being started inherit a descriptor.

    It must stay open until then, which this process cannot observe.
    """
    for parked in list(PARKED):
        starting = parked.peek()
        if starting is None or hasattr(starting[0], "pid"):
            parked()
            PARKED.discard(parked)
    own = duplicate(descriptor)
    parked = weakref.finalize(popen, own.close)
    parked.atexit = False
    PARKED.add(parked)
    sent: Sent = popen.DupFd(popen.duplicate_for_child(own.number))
    return sent


# ---- receiving ----------------------------------------------------------------------------------


class Missing:
    """Stands in a pool for an object that did not arrive: each use of it raises the reason.

    An exception at loading would be lost there (see ``loads_for_a_pool``).
    """

    __slots__ = ("problem",)

    def __init__(self, problem: VmmError | MemoryError) -> None:
        self.problem = problem

    def __getattr__(self, _name: str) -> NoReturn:
        raise self.problem

    def _fail(self, *_arguments: object) -> NoReturn:
        raise self.problem

    # Python looks these up in the class.
    __enter__ = __len__ = __iter__ = __contains__ = __getitem__ = __setitem__ = _fail
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _fail
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _fail
    __matmul__ = __rmatmul__ = __neg__ = __pos__ = __abs__ = __invert__ = _fail
    __and__ = __or__ = __xor__ = __rand__ = __ror__ = __rxor__ = __lshift__ = __rshift__ = _fail
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _fail
    __hash__ = object.__hash__
    __bool__ = __int__ = __float__ = __index__ = _fail
    __array__ = __array_ufunc__ = __array_function__ = _fail
    __buffer__ = _fail  # from Python 3.12 on

    def __exit__(self, *exception: object) -> None:
        """Be usable in ``with``."""

    def __repr__(self) -> str:
        return f"<did not arrive: {self.problem}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Missing, (self.problem,)


def delivered(load: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """The object of a pickle; in a pool, which an error would end, one that raises at its use."""
    try:
        return load(*arguments)
    except (VmmError, MemoryError) as problem:
        if not loads_for_a_pool(sys._getframe()):  # noqa: SLF001  there is no other way to know
            raise
        return Missing(problem.with_traceback(None))


def loads_for_a_pool(frame: FrameType | None) -> bool:
    """Whether a worker of ``multiprocessing.Pool`` loads its task here, or the pool a result.

    An exception ends the worker, and its task is lost, or the thread that takes the results, and
    the caller waits for ever.
    """
    pool: Any = sys.modules.get("multiprocessing.pool")
    if pool is None:
        return False
    takers = {pool.worker.__code__, pool.Pool._handle_results.__code__}  # noqa: SLF001
    queue: Any = sys.modules["multiprocessing.queues"]
    connection: Any = sys.modules["multiprocessing.connection"]
    readers = {queue.SimpleQueue.get.__code__, connection.Connection.recv.__code__}
    while frame is not None:
        if frame.f_code in readers:
            return frame.f_back is not None and frame.f_back.f_code in takers
        frame = frame.f_back
    return False


def unpack(vmm: VMM, sent: Sent, inode: int) -> Handle:
    """The handle that came, in this VMM.

    Errors:
        RESOURCE_NOT_FOUND: its descriptor does not exist, or is used up.
        QUOTA_EXCEEDED: RLIMIT_NOFILE.
        Others as of ``recv_handle``.
    """
    fd = arrived(sent)
    if not is_socket(fd, inode):
        raise gone()
    try:
        os.set_inheritable(fd, False)
        sockets = imports.needed("unpickle", "socket")
        sock = sockets.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fd)
    except BaseException:
        kernel.close(fd)
        raise
    with sock:
        try:
            return vmm.recv_handle(sock)
        except EOFError:
            raise gone() from None
        except VmmError as problem:
            raise error(problem.rc, "unpickle", problem.message, problem.errno) from None


def arrived(sent: Sent) -> int:
    """The number of the descriptor that came. It may name another file by now."""
    try:
        return sent.detach()
    except VmmError:
        raise
    except (OSError, EOFError, RuntimeError, LookupError, TypeError) as problem:
        if isinstance(problem, OSError) and problem.errno in {errno.EMFILE, errno.ENFILE}:
            raise QuotaExceeded("unpickle", NO_DESCRIPTOR_LEFT) from problem
        raise ResourceNotFound("unpickle", f"{GONE} ({problem!r})") from problem


def gone() -> VmmError:
    """The exception for a number that names another file, which stays open."""
    return ResourceNotFound("unpickle", GONE)


def is_socket(fd: int, inode: int) -> bool:
    """Whether a descriptor is this very socket."""
    try:
        file = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISSOCK(file.st_mode) and file.st_ino == inode

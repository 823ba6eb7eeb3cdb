"""Handles on their way through ``multiprocessing``.

What is pickled is one descriptor, whatever the handle has: of a socket in which the handle's
message lies, as ``send_handle`` put it there. A process that is being started inherits it, one that
runs fetches it (``_sharer``). The receiver's checks are those of ``recv_handle``.

Nothing here imports ``multiprocessing``: whoever pickles with it has loaded it.
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
from vmm_linux._default_vmm import default_vmm
from vmm_linux._sharer import GONE, NO_DESCRIPTOR_LEFT
from vmm_linux.errors import (
    RETCODES,
    OutOfMemory,
    QuotaExceeded,
    ResourceNotFound,
    Retcode,
    VmmError,
    error,
    refuse_copies,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, NoReturn, Protocol

    from vmm_linux._core.endpoint import VMM
    from vmm_linux.handles import Handle

    class Sent(Protocol):
        """A descriptor on its way."""

        def detach(self) -> int:
            """The descriptor, in the process where it arrived."""

    class Closable(Protocol):
        """What is pickled."""

        @property
        def closed(self) -> bool:
            """Whether somebody closed it."""


__all__ = [
    "REFUSAL",
    "arrived",
    "carry",
    "delivered",
    "enable",
    "gone",
    "is_multiprocessing",
    "pack",
    "reduced",
    "unpack",
]

REDUCTION = "multiprocessing.reduction"
ENABLED: set[type] = set()
"""Classes that ``multiprocessing``'s pickler was told of."""
REFUSAL = refuse_copies(
    "they go to other processes through multiprocessing alone (Process, Queue, Pipe, pools), "
    "which can carry descriptors; elsewhere use send_handle, or fileno"
)
"""The ``__reduce__`` of an ``Mdl``, for every other pickler."""
PARKED: set[weakref.finalize[[], Any]] = set()
"""Ends of sockets that processes which are being started are to inherit."""


# ---- whose pickler it is ------------------------------------------------------------------------


def enable(kind: type, reduce: Callable[[Any], object]) -> None:
    """Tell ``multiprocessing``'s pickler of a class, if it is loaded by now.

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

    Picklers have no frame: it is that of whoever called the pickler.
    """
    reduction = sys.modules.get(REDUCTION)
    return reduction is not None and frame.f_globals is vars(reduction)


# ---- sending ------------------------------------------------------------------------------------


def reduced(thing: Closable, reduce: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What a pickle has of something; an error, where nobody but the receiver would hear of it.

    ``Queue.put`` leaves the pickling to a thread of the queue's. What is raised there is printed,
    the item is lost, and its receiver would wait for ever.
    """
    try:
        return reduce()
    except (VmmError, MemoryError) as problem:
        if not feeds_a_queue(sys._getframe()):  # noqa: SLF001  there is no other way to know
            raise
        return fail, (for_the_receiver(thing, problem),)


def feeds_a_queue(frame: FrameType | None) -> bool:
    """Whether this happens in the thread of a ``multiprocessing.Queue`` that prints its errors.

    A class that does otherwise with them, as the one of ``concurrent.futures`` which hands them to
    a future, gets them as exceptions.
    """
    queue: Any = getattr(sys.modules.get("multiprocessing.queues"), "Queue", None)
    feed = getattr(getattr(queue, "_feed", None), "__code__", None)
    while frame is not None:
        if frame.f_code is feed:
            return frame.f_locals.get("onerror") is queue._on_queue_feeder_error  # noqa: SLF001
        frame = frame.f_back
    return False


def for_the_receiver(thing: Closable, problem: VmmError | MemoryError) -> VmmError:
    """An error in words for the receiver, who did not see what was done to the thing."""
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
    """Raise, where a pickle is loaded, what was raised where it was made."""
    raise problem


def pack(vmm: VMM, handle: Handle) -> tuple[Sent, int]:
    """A handle as something that ``multiprocessing`` can pickle.

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
            vmm.send_handle(ours, handle)
            return carry(theirs.fileno()), os.fstat(theirs.fileno()).st_ino
    except VmmError as problem:
        raise error(problem.rc, "pickle", problem.message, problem.errno) from None
    except OSError as problem:
        raise refused("pickle", problem) from problem


def refused(method: str, problem: OSError) -> VmmError:
    """The exception for what the kernel refused."""
    code = problem.errno or 0
    if code in {errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS}:
        return QuotaExceeded(method, NO_DESCRIPTOR_LEFT, code)
    return error(RETCODES.get(code, Retcode.FAIL), method, str(problem), code)


def carry(descriptor: int) -> Sent:
    """Send a descriptor with a pickle. The caller may close it then.

    Errors:
        QUOTA_EXCEEDED: RLIMIT_NOFILE; too many descriptors wait to be fetched.
        OUT_OF_MEMORY: no thread can be started that hands it out.
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
    """Have a process that is being started inherit a descriptor from here.

    It must stay open until then, and nobody tells when that was.
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
    """What a pool gets in place of what did not arrive: each use of it raises why.

    Nobody would hear of an exception there (see ``loads_for_a_pool``).
    """

    __slots__ = ("problem",)

    def __init__(self, problem: VmmError | MemoryError) -> None:
        self.problem = problem

    def __getattr__(self, _name: str) -> NoReturn:
        raise self.problem

    def __len__(self) -> NoReturn:
        raise self.problem

    def __enter__(self) -> NoReturn:
        raise self.problem

    def __exit__(self, *exception: object) -> None:
        """Be something that ``with`` takes."""

    def __repr__(self) -> str:
        return f"<did not arrive: {self.problem}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return Missing, (self.problem,)


def delivered(load: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What a pickle brings; something that raises when it is used, where a pool would end by it."""
    try:
        return load()
    except (VmmError, MemoryError) as problem:
        if not loads_for_a_pool(sys._getframe()):  # noqa: SLF001  there is no other way to know
            raise
        return Missing(problem.with_traceback(None))


def loads_for_a_pool(frame: FrameType | None) -> bool:
    """Whether a worker of ``multiprocessing.Pool`` takes its task here, or the pool a result.

    What is raised there ends the worker, whose task is lost, or the thread that takes the results;
    who asked for them waits for ever.
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


def unpack(sent: Sent, inode: int) -> tuple[VMM, Handle]:
    """The handle that came, in the default VMM.

    Errors:
        RESOURCE_NOT_FOUND: its descriptor is not there, or was used up.
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
        vmm = default_vmm()
        try:
            return vmm, vmm.recv_handle(sock)
        except EOFError:
            raise gone() from None
        except VmmError as problem:
            raise error(problem.rc, "unpickle", problem.message, problem.errno) from None


def arrived(sent: Sent) -> int:
    """The number of the descriptor that came. It may name something else by now."""
    try:
        return sent.detach()
    except VmmError:
        raise
    except (OSError, EOFError, RuntimeError, LookupError, TypeError) as problem:
        if isinstance(problem, OSError) and problem.errno in {errno.EMFILE, errno.ENFILE}:
            raise QuotaExceeded("unpickle", NO_DESCRIPTOR_LEFT) from problem
        raise ResourceNotFound("unpickle", f"{GONE} ({problem!r})") from problem


def gone() -> VmmError:
    """The exception for a number that names something else: it is not this package's to close."""
    return ResourceNotFound("unpickle", GONE)


def is_socket(fd: int, inode: int) -> bool:
    """Whether a descriptor is this very socket."""
    try:
        file = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISSOCK(file.st_mode) and file.st_ino == inode

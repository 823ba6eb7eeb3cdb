"""Handles on their way through ``multiprocessing``.

What is pickled is one descriptor, whatever the handle has: of a socket in which the handle's
message lies, as ``send_handle`` put it there. ``multiprocessing`` carries descriptors from process
to process in its own ways; the receiver's checks are those of ``recv_handle``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import stat
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from vmm_linux._own_vmm import own_vmm
from vmm_linux.errors import (
    RETCODES,
    QuotaExceeded,
    ResourceNotFound,
    Retcode,
    VmmError,
    error,
    refuse_copies,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_linux._vmm import VMM
    from vmm_linux.handles import Handle

__all__ = ["GONE", "REFUSAL", "Sent", "arrived", "carry", "enable", "pack", "unpack"]

NO_DESCRIPTOR_LEFT = "no descriptor is left; raise RLIMIT_NOFILE (ulimit -n) or close some"
GONE = (
    "the descriptor of this pickle is gone: each is loaded once, by the process that it was sent "
    "to, while its sender still runs"
)
REFUSAL = refuse_copies(
    "they go to other processes through multiprocessing alone (Process, Queue, Pipe, pools), "
    "which can carry descriptors; elsewhere use send_handle, or fileno"
)
"""The ``__reduce__`` of an ``Mdl``, for every other pickler."""
PARKED: set[weakref.finalize[[int], Any]] = set()
"""Ends of sockets that processes which are being started are to inherit."""


class Sent(Protocol):
    """What ``multiprocessing`` makes of a descriptor that it is to carry."""

    def detach(self) -> int:
        """The descriptor, in the process where it arrived."""


def enable(kind: type, reduce: Callable[[Any], object]) -> None:
    """Let ``multiprocessing``, and no other pickler, pickle objects of this class.

    Where it cannot be loaded, as no descriptor is left or a sandbox hides the standard library,
    the objects do all else, and the next one tries again.
    """
    with contextlib.suppress(ImportError, OSError):
        register(kind, reduce)


@functools.cache
def register(kind: type, reduce: Callable[[Any], object]) -> None:
    """Tell ``multiprocessing``'s pickler, once."""
    from multiprocessing.reduction import ForkingPickler  # noqa: PLC0415  takes milliseconds

    ForkingPickler.register(kind, reduce)  # type: ignore[arg-type]


def pack(vmm: VMM, handle: Handle) -> tuple[Sent, int]:
    """A handle as something that ``multiprocessing`` can pickle.

    Returns:
        The descriptor on its way, and the inode number of the socket behind it.

    Errors:
        NO_CAPABILITY: the handle lacks TRANSFER.
        RESOURCE_NOT_FOUND, HANDLE_REVOKED: it was closed, was revoked.
        QUOTA_EXCEEDED: RLIMIT_NOFILE.
    """
    try:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            vmm.send_handle(ours, handle)
            return carry(theirs.fileno()), os.fstat(theirs.fileno()).st_ino
    except VmmError as problem:
        raise error(problem.rc, "pickle", problem.message, problem.errno) from None
    except OSError as problem:
        rc = RETCODES.get(problem.errno or 0, Retcode.FAIL)
        why = NO_DESCRIPTOR_LEFT if is_shortage(problem) else str(problem)
        raise error(rc, "pickle", why, problem.errno) from problem


def is_shortage(problem: BaseException) -> bool:
    """Whether descriptors ran out."""
    return isinstance(problem, OSError) and problem.errno in {errno.EMFILE, errno.ENFILE}


def carry(descriptor: int) -> Sent:
    """Have ``multiprocessing`` carry a descriptor, which the caller may close then."""
    from multiprocessing import context, reduction  # noqa: PLC0415  takes milliseconds

    popen: Any = context.get_spawning_popen()
    if popen is None:
        # To a process that runs: a thread of multiprocessing's waits until it comes for it.
        sent: Sent = reduction.DupFd(descriptor)
        return sent
    # To a process that is being started, which inherits it from here: it must stay open until
    # then, and nobody tells when that was.
    for parked in list(PARKED):
        starting = parked.peek()
        if starting is None or hasattr(starting[0], "pid"):
            parked()
            PARKED.discard(parked)
    fd = os.dup(descriptor)
    parked = weakref.finalize(popen, os.close, fd)
    parked.atexit = False
    PARKED.add(parked)
    inherited: Sent = reduction.DupFd(fd)
    return inherited


def unpack(sent: Sent, inode: int) -> tuple[VMM, Handle]:
    """The handle that came, in the VMM of this package's own.

    Errors:
        RESOURCE_NOT_FOUND: its descriptor is not there, or was used up.
        QUOTA_EXCEEDED: RLIMIT_NOFILE.
        Others as of ``recv_handle``.
    """
    fd = arrived(sent)
    if not is_socket(fd, inode):
        # A number that names something else by now, which is not this function's to close.
        raise ResourceNotFound("unpickle", GONE)
    os.set_inheritable(fd, False)
    with socket.socket(fileno=fd) as sock:
        vmm = own_vmm()
        try:
            return vmm, vmm.recv_handle(sock)
        except EOFError:
            raise ResourceNotFound("unpickle", GONE) from None
        except VmmError as problem:
            raise error(problem.rc, "unpickle", problem.message, problem.errno) from None


def arrived(sent: Sent) -> int:
    """The descriptor that ``multiprocessing`` carried here."""
    from multiprocessing import ProcessError  # noqa: PLC0415  takes milliseconds

    try:
        return sent.detach()
    except (OSError, EOFError, RuntimeError, LookupError, TypeError, ProcessError) as problem:
        if is_shortage(problem):
            raise QuotaExceeded("unpickle", NO_DESCRIPTOR_LEFT) from problem
        raise ResourceNotFound("unpickle", f"{GONE} ({problem!r})") from problem


def is_socket(fd: int, inode: int) -> bool:
    """Whether a descriptor is this very socket."""
    try:
        file = os.fstat(fd)
    except OSError:
        return False
    return stat.S_ISSOCK(file.st_mode) and file.st_ino == inode

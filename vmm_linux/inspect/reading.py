"""Reads files of ``/proc/PID``, with an exception for each failure."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vmm_linux._core.inspect import read_mappings
from vmm_linux._core.values import index
from vmm_linux.errors import RETCODES, InvalidArgument, Retcode, Unimplemented, VmmError, error
from vmm_linux.inspect.errors import (
    AccessDenied,
    KernelThread,
    NoSuchProcess,
    ProcessExited,
    UnreadableText,
    ZombieProcess,
)
from vmm_linux.inspect.processes import is_of_kernel, stat_of
from vmm_linux.inspect.snapshots import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from typing import SupportsIndex, TypeVar

    from vmm_linux._core.inspect import Mapping

    Answer = TypeVar("Answer")

LAST_PID = (1 << 31) - 1


def process_asked(method: str, pid: SupportsIndex | None) -> int | None:
    """The checked id of the process to read, None for this one."""
    if pid is None:
        return None
    number = index(method, "pid", pid)
    if not 0 < number <= LAST_PID:
        raise InvalidArgument(method, "pid is not positive and of 32 bits; expected a process id")
    return None if number == os.getpid() else number


def mappings_of(method: str, pid: SupportsIndex | None, name: str) -> Snapshot:
    """The mappings of a process, from its file of this name."""
    process = process_asked(method, pid)

    def read(fd: int) -> Sequence[Mapping]:
        found = read_mappings(fd, name == "smaps", process is None)
        if found.backslashes:
            with contextlib.suppress(VmmError):
                asked_of(method, process, "maps", found.settle_names)
        # For a process that ends or starts another program, the list ends there without an error.
        # The open file still belongs to the old program, and is empty from then on.
        if process is not None and not found:
            raise without_memory(method, process, opened=True)
        if process is not None and not os.pread(fd, 1, 0):
            raise ended(method, process)
        return found

    return Snapshot(
        os.getpid() if process is None else process, asked_of(method, process, name, read)
    )


def asked_of(method: str, pid: int | None, name: str, read: Callable[[int], Answer]) -> Answer:
    """The result of ``read`` for a file of ``/proc/PID``.

    The first thread of a process can end while others live on. Then its files are empty, and
    another thread's have the data.
    """
    try:
        with opened(method, pid, name) as fd:
            return read(fd)
    except ZombieProcess:
        for thread in other_threads(pid):
            with (
                contextlib.suppress(ZombieProcess, NoSuchProcess),
                opened(method, pid, f"task/{thread}/{name}") as fd,
            ):
                return read(fd)
        raise


def other_threads(pid: int | None) -> list[str]:
    """The threads of a process but for its first one."""
    try:
        threads = [each.name for each in Path(f"/proc/{pid}/task").iterdir()]
        return [thread for thread in threads if thread != str(pid)]
    except OSError:
        return []


@contextlib.contextmanager
def opened(method: str, pid: int | None, name: str) -> Generator[int]:
    """A file of ``/proc/PID``, open for reading; a refusal becomes one of our errors."""
    fd = None
    # Plain strings: without memory for a path object, Python raises another error than MemoryError.
    path = f"/proc/{pid or 'thread-self'}/{name}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        yield fd
    except VmmError:
        raise
    except OSError as reason:
        raise refused(method, pid, reason, opened=fd is not None) from None
    except ValueError as reason:
        raise UnreadableText(
            method, f"what the kernel tells of {named(pid)} cannot be read: {reason}"
        ) from None
    finally:
        if fd is not None:
            os.close(fd)


def named(pid: int | None) -> str:
    """The process, in words."""
    return "this process" if pid is None else f"process {pid}"


def refused(method: str, pid: int | None, reason: OSError, *, opened: bool = False) -> VmmError:
    """The exception for an errno of ``/proc``; ``opened``: the file was already open."""
    number = reason.errno or errno.EIO
    if number in (errno.EACCES, errno.EPERM):
        advice = "be its user or root (ptrace(2), CAP_SYS_PTRACE)"
        message = f"the kernel does not let this process look at {named(pid)}; {advice}"
        return AccessDenied(method, message, number)
    # By its folder: that of a thread goes with the thread.
    if number == errno.ENOENT and reason.filename and Path(reason.filename).parent.exists():
        return Unimplemented(method, f"this kernel has no {reason.filename}", number)
    if pid is not None and number in (errno.ENOENT, errno.ESRCH):
        return without_memory(method, pid, opened=opened)
    message = f"the kernel did not tell about {named(pid)}: {reason.strerror}"
    return error(RETCODES.get(number, Retcode.FAIL), method, message, number)


def without_memory(method: str, pid: int | None, *, opened: bool) -> VmmError:
    """The exception for a process without memory; ``opened``: it existed a moment ago."""
    try:
        _, fields = stat_of(pid or "thread-self")
    except (FileNotFoundError, ProcessLookupError):
        fields = []
    if fields and is_of_kernel(fields):
        return KernelThread(method, f"{pid} is a thread of the kernel; it has no memory of its own")
    if fields and fields[0] in (b"Z", b"X"):
        return ZombieProcess(
            method, f"process {pid} has ended and waits for its parent; it has no memory any more"
        )
    if fields or opened:
        return ended(method, pid)
    return NoSuchProcess(method, f"there is no process {pid}", errno.ESRCH)


def ended(method: str, pid: int | None) -> ProcessExited:
    """The error for a process that ended meanwhile."""
    return ProcessExited(
        method, f"process {pid} ended, or started another program, while it was read", errno.ESRCH
    )

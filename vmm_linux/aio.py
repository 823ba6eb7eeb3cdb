"""Waits in event loops: for a socket that carries handles, and for an event.

The loop is asyncio's, another of its interface (uvloop), or trio's; anyio runs on either. This
module imports none of them: where one runs, it is loaded.
"""

from __future__ import annotations

import errno
import sys

from vmm_linux._core import endpoint, imports, kernel
from vmm_linux._core.values import kind_of
from vmm_linux.errors import InvalidArgument, InvalidOperation, QuotaExceeded, Unimplemented

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import FrameType
    from typing import Any, SupportsIndex, TypeVar

    from _typeshed import HasFileno

    from vmm_linux._core.endpoint import VMM
    from vmm_linux._core.kernel import Descriptor
    from vmm_linux.handles import Handle
    from vmm_linux.mdl import Mdl

    Outcome = TypeVar("Outcome")

__all__ = ["checkpoint", "recv_handle", "send_handle", "wait"]


async def send_handle(
    vmm: VMM, sock: HasFileno, handle: SupportsIndex | Mdl, rights: SupportsIndex | None
) -> None:
    """See ``VMM.send_handle_async``."""

    def attempt() -> None:
        vmm.send_handle(sock, handle, rights)

    await repeat("send_handle_async", vmm, sock, attempt, to_send=True)


async def recv_handle(
    vmm: VMM,
    sock: HasFileno,
    require: SupportsIndex,
    max_size: SupportsIndex | None,
    peer_uid: SupportsIndex | None,
) -> Handle:
    """See ``VMM.recv_handle_async``."""

    def attempt() -> Handle:
        return vmm.recv_handle(sock, require, max_size, peer_uid)

    return await repeat("recv_handle_async", vmm, sock, attempt, to_send=False)


async def repeat(
    method: str,
    vmm: VMM,
    sock: HasFileno,
    attempt: Callable[[], Outcome],
    *,
    to_send: bool,
) -> Outcome:
    """Try; as long as the socket would block, wait for it and try again.

    An attempt is one call without a pause. So a task that is cancelled has either not begun or
    is done, and no message is half received.
    """
    await checkpoint()
    while True:
        if vmm.closed:
            raise InvalidOperation(method, "the VMM is closed")
        check_not_blocking(method, sock)
        try:
            return attempt()
        except BlockingIOError:
            await wait(method, sock.fileno(), to_send=to_send)


def check_not_blocking(method: str, sock: object) -> None:
    """Refuse a socket that blocks, or that a transport uses. The call refuses what is no socket."""
    if endpoint.is_of_transport(sock):
        raise InvalidArgument(method, f"sock is a {kind_of(sock)}{endpoint.NO_TRANSPORT}")
    if endpoint.blocks(sock):
        raise InvalidArgument(
            method, "sock blocks, which would stop the event loop: sock.setblocking(False)"
        )


async def checkpoint() -> None:
    """Let trio cancel this task and run others, as it expects of every ``async`` function.

    Before the work, because a task that is cancelled afterwards would lose what it received.
    """
    trio = running_trio()
    if trio is not None:
        await trio.checkpoint()


async def wait(method: str, fd: int, *, to_send: bool = False) -> None:
    """Wait until a descriptor can be read, or written.

    The event loop gets a duplicate. asyncio has one reader and one writer a descriptor: a second
    one replaces the first, which then waits for ever. trio refuses a second one.
    """
    trio = running_trio()
    loop = running_loop(method) if trio is None else None
    watched = duplicate(method, fd)
    try:
        if trio is not None:
            await (trio.wait_writable if to_send else trio.wait_readable)(watched.number)
        elif loop is not None:
            await watch(method, loop, watched, to_send=to_send)
    finally:
        watched.close()


def running_trio() -> Any:  # noqa: ANN401  trio may not be installed
    """The module ``trio.lowlevel`` where this runs in a task of trio's; None elsewhere.

    Both trio and asyncio can have a running task in this thread: a task of one starts the other,
    or trio-asyncio joins them. Then the task counts whose code called this.
    """
    trio: Any = imports.loaded("trio.lowlevel")
    if trio is None:
        return None
    try:
        task = trio.current_task()
    except RuntimeError:  # another thread, or the host of trio's guest mode
        return None
    outermost = frame_of_asyncio_task()
    if outermost is None:
        return trio
    caller: FrameType | None = sys._getframe()  # noqa: SLF001
    while caller is not None and caller is not outermost:
        if caller is getattr(task.coro, "cr_frame", None):
            return trio
        caller = caller.f_back
    return None if caller is outermost else trio


def frame_of_asyncio_task() -> FrameType | None:
    """Where the coroutine of asyncio's running task is; None if none runs in this thread."""
    tasks: Any = imports.loaded("asyncio.tasks")
    loop = asyncio_loop()
    task = None if tasks is None or loop is None else tasks.current_task(loop)
    return None if task is None else getattr(task.get_coro(), "cr_frame", None)


def asyncio_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop of asyncio's interface that runs in this thread."""
    events: Any = imports.loaded("asyncio.events")
    loop: asyncio.AbstractEventLoop | None
    loop = None if events is None else events._get_running_loop()  # noqa: SLF001
    return loop


def running_loop(method: str) -> asyncio.AbstractEventLoop:
    """The same; there must be one."""
    loop = asyncio_loop()
    if loop is None:
        raise InvalidOperation(method, "no event loop of asyncio or trio is running here")
    return loop


async def watch(
    method: str, loop: asyncio.AbstractEventLoop, watched: Descriptor, *, to_send: bool
) -> None:
    """Wait until asyncio's event loop finds a descriptor ready."""
    woken = loop.create_future()
    number = watched.number
    add = loop.add_writer if to_send else loop.add_reader
    remove = loop.remove_writer if to_send else loop.remove_reader
    try:
        add(number, wake, woken)
    except NotImplementedError:
        raise Unimplemented(
            method, "this event loop cannot watch descriptors (add_reader); use another one"
        ) from None
    try:
        await woken
    finally:
        if watched.is_open:  # else another file may have this number now
            remove(number)


def wake(woken: asyncio.Future[None]) -> None:
    """Wake the task that waits for this."""
    if not woken.done():
        woken.set_result(None)


def duplicate(method: str, fd: int) -> Descriptor:
    """Another descriptor of the same open file."""
    try:
        return kernel.duplicate(fd)
    except OSError as problem:
        if problem.errno != errno.EMFILE:
            raise
        message = "waiting takes a descriptor; raise RLIMIT_NOFILE (ulimit -n) or close some"
        raise QuotaExceeded(method, message, problem.errno) from None

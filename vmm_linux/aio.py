"""Waits in asyncio: for a socket that carries handles, and for an event.

This module does not import asyncio: where one of its loops runs, it is loaded.
"""

from __future__ import annotations

import _socket
import errno

from vmm_linux._core import imports, kernel
from vmm_linux._core.values import is_a
from vmm_linux.errors import InvalidArgument, InvalidOperation, QuotaExceeded, Unimplemented

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    import socket
    from collections.abc import Awaitable, Callable
    from typing import Any, SupportsIndex, TypeVar

    from vmm_linux._core.endpoint import VMM
    from vmm_linux._core.kernel import Descriptor
    from vmm_linux.handles import Handle
    from vmm_linux.mdl import Mdl

    Outcome = TypeVar("Outcome")

__all__ = ["readable", "recv_handle", "send_handle"]


async def send_handle(
    vmm: VMM, sock: socket.socket, handle: SupportsIndex | Mdl, rights: SupportsIndex | None
) -> None:
    """See ``VMM.send_handle_async``."""
    await repeat(
        "send_handle_async", vmm, sock, lambda: vmm.send_handle(sock, handle, rights), writable
    )


async def recv_handle(
    vmm: VMM,
    sock: socket.socket,
    require: SupportsIndex,
    max_size: SupportsIndex | None,
    peer_uid: SupportsIndex | None,
) -> Handle:
    """See ``VMM.recv_handle_async``."""

    def attempt() -> Handle:
        return vmm.recv_handle(sock, require, max_size, peer_uid)

    return await repeat("recv_handle_async", vmm, sock, attempt, readable)


async def repeat(
    method: str,
    vmm: VMM,
    sock: socket.socket,
    attempt: Callable[[], Outcome],
    ready: Callable[[str, int], Awaitable[None]],
) -> Outcome:
    """Try; as long as the socket would block, wait for it and try again.

    An attempt is one call without a pause. So a task that is cancelled has either not begun or
    is done, and no message is half received.
    """
    while True:
        if vmm.closed:
            raise InvalidOperation(method, "the VMM is closed")
        check_not_blocking(method, sock)
        try:
            return attempt()
        except BlockingIOError:
            await ready(method, sock.fileno())


def check_not_blocking(method: str, sock: object) -> None:
    """Refuse a socket that blocks. The call itself refuses what is no socket."""
    if is_a(sock, _socket.socket) and sock.gettimeout() != 0:
        raise InvalidArgument(
            method, "sock blocks, which would stop the event loop: sock.setblocking(False)"
        )


async def readable(method: str, fd: int) -> None:
    """Wait until a descriptor can be read."""
    loop = running_loop(method)
    await watch(method, fd, loop.create_future(), loop.add_reader, loop.remove_reader)


async def writable(method: str, fd: int) -> None:
    """Wait until a descriptor can be written."""
    loop = running_loop(method)
    await watch(method, fd, loop.create_future(), loop.add_writer, loop.remove_writer)


def running_loop(method: str) -> asyncio.AbstractEventLoop:
    """The event loop that runs this task."""
    events: Any = imports.loaded("asyncio.events")
    running = None if events is None else events._get_running_loop()  # noqa: SLF001
    loop: asyncio.AbstractEventLoop | None = running
    if loop is None:
        raise InvalidOperation(method, "no event loop of asyncio is running here")
    return loop


async def watch(
    method: str,
    fd: int,
    woken: asyncio.Future[None],
    add: Callable[..., object],
    remove: Callable[[int], object],
) -> None:
    """Wait until the event loop finds a descriptor ready.

    The loop gets a duplicate. It has one reader and one writer a descriptor, and a second one
    replaces the first, which then waits for ever: another task's, or the user's.
    """
    watched = duplicate(method, fd)
    number = watched.number
    try:
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
    finally:
        watched.close()


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

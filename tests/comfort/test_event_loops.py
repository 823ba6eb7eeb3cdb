"""What waits with which library: sockets of event loops, and loops inside one another."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute, UNIXSocketStream
from trio.lowlevel import wait_readable

import kernel_oracle as kernel
from children import run_child
from constants import RW
from event_loops import LOOPS, EventLoop
from kernel_oracle import PAGE
from vmm_linux import Event, Rights
from vmm_linux.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from vmm_linux import VMM


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that do not block."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


@pytest.fixture(params=["asyncio", "uvloop"])
def loop(request: pytest.FixtureRequest) -> EventLoop:
    """Each event loop of asyncio's interface."""
    return LOOPS[request.param]


async def travel(loop: EventLoop, vmm: VMM, ours: Any, theirs: Any) -> None:  # noqa: ANN401
    """Send a handle to a job that waits, then an event."""
    before = kernel.descriptors()
    handle = vmm.mdl_create(2 * PAGE, RW)
    waiting = loop.start(vmm.recv_handle_async(theirs, 0, 2 * PAGE))
    await loop.settle()
    assert not waiting.done
    await vmm.send_handle_async(ours, handle, Rights.MAP_READ)
    received = await waiting.result()
    assert (received.rights, vmm.mdl_get_size(received)) == (Rights.MAP_READ, 2 * PAGE)
    for each in (received, handle):
        vmm.handle_close(each)
    with Event() as event:
        event.send(ours)
        with Event.recv(theirs) as same:
            event.set()
            assert await same.wait_async()
    assert kernel.descriptors() == before


# ---- sockets of the libraries --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trio", "anyio on trio"])
def test_sockets_of_trio_are_sockets(name: str, vmm: VMM) -> None:
    async def work() -> None:
        ours, theirs = trio.socket.socketpair()
        with ours, theirs:
            await travel(LOOPS[name], vmm, ours, theirs)
        ours, theirs = trio.socket.socketpair()
        async with trio.SocketStream(ours) as stream, trio.SocketStream(theirs) as other:
            await travel(LOOPS[name], vmm, stream.socket, other.socket)
            with pytest.raises(InvalidArgument, match=r"SocketStream, not a socket: pass its \.so"):
                await vmm.recv_handle_async(stream)  # type: ignore[arg-type]

    LOOPS[name].run(work())


@pytest.mark.parametrize("name", ["anyio on asyncio", "anyio on trio"])
def test_the_raw_socket_of_an_anyio_stream_is_a_socket(name: str, vmm: VMM) -> None:
    async def work() -> None:
        ours, theirs = [await UNIXSocketStream.from_socket(sock) for sock in socket.socketpair()]
        async with ours, theirs:
            raw = [each.extra(SocketAttribute.raw_socket) for each in (ours, theirs)]  # noqa: S610
            await travel(LOOPS[name], vmm, *raw)
            with pytest.raises(InvalidArgument, match=r"not a socket: pass \.extra\(anyio.*raw_so"):
                await vmm.recv_handle_async(ours)  # type: ignore[arg-type]

    LOOPS[name].run(work())


@contextlib.asynccontextmanager
async def streams(
    sock: socket.socket,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Any]]:
    """Streams of asyncio over a duplicate of a socket, and their transport."""
    reader, writer = await asyncio.open_connection(sock=sock.dup())
    try:
        yield reader, writer, writer.transport
    finally:
        writer.close()
        await writer.wait_closed()


def test_streams_and_transports_are_told_what_they_lack(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        async with streams(pair[0]) as (reader, writer, transport):
            transports_own = writer.get_extra_info("socket")
            for bad in (reader, writer, transport):
                with pytest.raises(InvalidArgument, match=r"not a socket.*pause_reading.*dup\(\)"):
                    vmm.recv_handle(bad)  # type: ignore[arg-type]
            for bad in (reader, writer, transport, transports_own):
                with pytest.raises(InvalidArgument, match=r"its transport reads.*pause_reading"):
                    await vmm.send_handle_async(bad, handle)  # type: ignore[arg-type]
                with pytest.raises(InvalidArgument, match=r"its transport reads.*pause_reading"):
                    await vmm.recv_handle_async(bad)  # type: ignore[arg-type]

    loop.call(work())  # not run: a loop of uvloop's opens descriptors for its first stream


def test_a_transport_that_pauses_lets_a_duplicate_receive(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    async def work() -> None:
        async with streams(pair[1]) as (reader, writer, transport):
            pair[0].send(b"first")
            assert await reader.readexactly(5) == b"first"
            transport.pause_reading()
            with writer.get_extra_info("socket").dup() as own:
                await travel(loop, vmm, pair[0], own)
            transport.resume_reading()
            pair[0].send(b"last")
            assert await reader.readexactly(4) == b"last"

    loop.call(work())  # not run: a loop of uvloop's opens descriptors for its first stream


def test_a_call_that_does_not_wait_takes_the_socket_of_a_transport(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        async with streams(pair[1]) as (_, writer, transport):
            transport.pause_reading()
            theirs = writer.get_extra_info("socket")
            with pytest.raises(BlockingIOError):
                vmm.recv_handle(theirs)
            for sender, receiver in ((pair[0], theirs), (theirs, pair[0])):
                vmm.send_handle(sender, handle)
                vmm.handle_close(vmm.recv_handle(receiver))

    loop.call(work())  # not run: a loop of uvloop's opens descriptors for its first stream


def test_an_object_that_has_only_a_descriptor_is_a_socket(
    vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    class Bare:
        def __init__(self, sock: socket.socket) -> None:
            self.fileno = sock.fileno

    async def work() -> None:
        await travel(LOOPS["trio"], vmm, Bare(pair[0]), Bare(pair[1]))
        pair[1].setblocking(True)
        with pytest.raises(InvalidArgument, match="sock blocks"):
            await vmm.recv_handle_async(Bare(pair[1]))

    LOOPS["trio"].run(work())


# ---- trio ----------------------------------------------------------------------------------------


def test_a_cancelled_scope_of_trio_receives_nothing_that_is_there(
    vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        with Event() as event:
            event.set()
            vmm.send_handle(pair[0], handle)
            for call in (lambda: vmm.recv_handle_async(pair[1]), event.wait_async):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught
        vmm.handle_close(vmm.recv_handle(pair[1]))

    LOOPS["trio"].run(work())


def test_a_task_of_trio_that_never_waits_lets_others_run(
    vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def forever() -> None:
        while True:
            await vmm.send_handle_async(pair[0], handle)
            vmm.handle_close(await vmm.recv_handle_async(pair[1]))

    async def work() -> None:
        job = LOOPS["trio"].start(forever())
        for _ in range(10):
            await LOOPS["trio"].pause()
        job.cancel()
        await job.ended()
        assert job.cancelled

    LOOPS["trio"].run(work())


def test_the_users_own_waiter_of_trio_stays_in_its_place(
    vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        users = LOOPS["trio"].start(wait_readable(pair[1]))  # noqa: ASYNC105
        waiting = LOOPS["trio"].start(vmm.recv_handle_async(pair[1]))
        await LOOPS["trio"].settle()
        await vmm.send_handle_async(pair[0], handle)
        vmm.handle_close(await waiting.result())
        await users.result()

    LOOPS["trio"].run(work())


# ---- loops inside one another --------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:It looks like Trio's signal handling:RuntimeWarning")
@pytest.mark.parametrize(
    ("outer", "inner"),
    [
        (outer, inner)
        for outer in LOOPS
        for inner in ("asyncio", "uvloop", "trio")
        if ("trio" in outer) != ("trio" in inner)
    ],
)
def test_the_innermost_loop_is_the_one_that_waits(
    outer: str, inner: str, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    """As in a notebook, whose cells run in asyncio and may start trio."""

    async def inside() -> None:
        await travel(LOOPS[inner], vmm, *pair)

    async def work() -> None:
        await travel(LOOPS[outer], vmm, *pair)
        LOOPS[inner].call(inside())
        await travel(LOOPS[outer], vmm, *pair)

    LOOPS[outer].run(work())


def run_as_guest() -> None:
    """Let trio and its host wait in one thread; in a child, as a thread of trio's stays."""
    import asyncio

    import trio
    import trio.testing

    from vmm_linux import Event

    async def guest() -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(events[0].wait_async)
            await trio.testing.wait_all_tasks_blocked()
            events[1].set()
        return "guest"

    async def host() -> None:
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=lambda outcome: ended.set_result(outcome.unwrap()),
        )
        assert await events[1].wait_async()
        events[0].set()
        print(await ended)

    events = [Event(), Event()]
    asyncio.run(host())


def test_a_guest_run_of_trio_and_its_host_wait_side_by_side() -> None:
    child = run_child(run_as_guest)
    assert (child.returncode, child.stdout, child.stderr) == (0, "guest\n", "")

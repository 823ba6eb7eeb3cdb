"""Handles through event loops: nothing blocks one, nothing is lost, nothing stays open."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import TESTS_IMPORTABLE, run_child
from constants import RW
from event_loops import LOOPS, Asyncio, EventLoop
from kernel_oracle import PAGE
from vmm_linux import INVALID_HANDLE, VMM, Rights, Seal
from vmm_linux.errors import (
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    SecurityDisallow,
    Unimplemented,
)

if TYPE_CHECKING:
    from collections.abc import Iterator


MESSAGES = 150
"""Of a test that cancels at random."""


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> EventLoop:
    """Each library."""
    return LOOPS[request.param]


@pytest.fixture(params=["asyncio", "uvloop"])
def asyncio_loop(request: pytest.FixtureRequest) -> Asyncio:
    """Each event loop of asyncio's interface."""
    found = LOOPS[request.param]
    assert isinstance(found, Asyncio)
    return found


@pytest.fixture(params=["stream", "seqpacket"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that do not block."""
    kinds = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}
    with connected(kinds[request.param]) as sockets:
        yield sockets


@contextlib.contextmanager
def connected(
    kind: int = socket.SOCK_STREAM,
) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected sockets that do not block, for the time of the block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


def fill(vmm: VMM, sock: socket.socket, handle: int) -> int:
    """Send until the socket is full; returns how often."""
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            vmm.send_handle(sock, handle)
            sent += 1
    return sent


def test_a_handle_goes_through(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    async def work() -> None:
        handle = vmm.mdl_create(3 * PAGE, RW)
        await vmm.send_handle_async(pair[0], handle, Rights.MAP_READ)
        vmm.handle_close(handle)
        received = await vmm.recv_handle_async(pair[1], 0, 3 * PAGE)
        assert (received.rights, vmm.mdl_get_size(received)) == (Rights.MAP_READ, 3 * PAGE)
        vmm.handle_close(received)

    loop.run(work())


def test_other_tasks_run_while_one_waits_for_a_handle(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        waiting = loop.start(vmm.recv_handle_async(pair[1]))
        await loop.settle()
        assert not waiting.done
        await vmm.send_handle_async(pair[0], handle)
        vmm.handle_close(await waiting.result())

    loop.run(work())


def test_a_sender_waits_while_the_socket_is_full(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        count = fill(vmm, pair[0], handle)
        assert count > 1
        waiting = loop.start(vmm.send_handle_async(pair[0], handle))
        await loop.settle()
        assert not waiting.done
        for _ in range(count):
            vmm.handle_close(vmm.recv_handle(pair[1]))
        await waiting.result()
        vmm.handle_close(vmm.recv_handle(pair[1]))
        with pytest.raises(BlockingIOError):
            vmm.recv_handle(pair[1])

    loop.run(work())


async def send_all(
    loop: EventLoop, vmm: VMM, sock: socket.socket, sizes: list[int], choose: random.Random
) -> None:
    """Send a buffer of each size by jobs that are cancelled at random, until one is not."""
    for size in sizes:
        handle = vmm.mdl_create(size, RW)
        job = loop.start(vmm.send_handle_async(sock, handle))
        while not job.done:
            if choose.random() < 0.3:
                job.cancel()
            await loop.pause()
            if job.cancelled:
                job = loop.start(vmm.send_handle_async(sock, handle))
        await job.result()
        vmm.handle_close(handle)


async def receive_some(
    loop: EventLoop, vmm: VMM, sock: socket.socket, arrived: list[int], choose: random.Random
) -> None:
    """Receive by jobs that are cancelled at random, until all have arrived."""
    while len(arrived) < MESSAGES:
        job = loop.start(vmm.recv_handle_async(sock))
        for _ in range(choose.randrange(20)):
            await loop.pause()
        job.cancel()
        await job.ended()
        if not job.cancelled:
            received = await job.result()
            arrived.append(vmm.mdl_get_size(received))
            vmm.handle_close(received)


@pytest.mark.parametrize("seed", range(5))
def test_no_message_is_lost_when_tasks_are_cancelled_at_random(
    loop: EventLoop, vmm: VMM, seed: int
) -> None:
    """Each buffer has a size of its own, so that it is known on the other side."""
    choose = random.Random(seed)  # noqa: S311
    sizes = [PAGE * (number + 1) for number in range(MESSAGES)]
    arrived: list[int] = []

    async def work() -> None:
        with connected() as (ours, theirs):
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            receivers = [receive_some(loop, vmm, theirs, arrived, choose) for _ in range(2)]
            await loop.all(send_all(loop, vmm, ours, sizes, choose), *receivers)

    loop.run(work())
    assert sorted(arrived) == sizes


def test_after_a_timeout_the_message_can_still_be_received(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        with pytest.raises(TimeoutError):
            async with loop.deadline(0.01):
                await vmm.recv_handle_async(pair[1])
        await vmm.send_handle_async(pair[0], handle)
        vmm.handle_close(await vmm.recv_handle_async(pair[1]))
        fill(vmm, pair[0], handle)
        with pytest.raises(TimeoutError):
            async with loop.deadline(0.01):
                await vmm.send_handle_async(pair[0], handle)

    loop.run(work())


def test_many_transfers_run_side_by_side_over_several_sockets(loop: EventLoop, vmm: VMM) -> None:
    handles = [vmm.mdl_create((number + 1) * PAGE, RW) for number in range(20)]

    async def send(sock: socket.socket) -> None:
        for handle in handles:
            await vmm.send_handle_async(sock, handle)

    async def receive(sock: socket.socket) -> list[int]:
        sizes = []
        for _ in handles:
            received = await vmm.recv_handle_async(sock)
            sizes.append(vmm.mdl_get_size(received))
            vmm.handle_close(received)
        return sizes

    async def work() -> None:
        with contextlib.ExitStack() as stack:
            pairs = [stack.enter_context(connected()) for _ in range(20)]
            for ours, _ in pairs:
                ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            works = [receive(theirs) for _, theirs in pairs]
            results = await loop.all(*works, *(send(ours) for ours, _ in pairs))
            sizes = results[: len(pairs)]
        assert sizes == [[vmm.mdl_get_size(handle) for handle in handles]] * len(pairs)

    loop.run(work())


def test_tasks_that_wait_on_one_socket_get_one_message_each(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    """A loop alone would forget all readers of a descriptor but the last."""

    async def work() -> None:
        waiting = [loop.start(vmm.recv_handle_async(pair[1])) for _ in range(10)]
        await loop.settle()
        for number in range(10):
            handle = vmm.mdl_create((number + 1) * PAGE, RW)
            await vmm.send_handle_async(pair[0], handle)
            vmm.handle_close(handle)
        received = [await job.result() for job in waiting]
        sizes = sorted(vmm.mdl_get_size(handle) for handle in received)
        assert sizes == [(number + 1) * PAGE for number in range(10)]
        for handle in received:
            vmm.handle_close(handle)

    loop.run(work())


def test_tasks_that_wait_for_room_on_one_socket_all_send(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        count = fill(vmm, pair[0], handle)
        waiting = [loop.start(vmm.send_handle_async(pair[0], handle)) for _ in range(10)]
        await loop.settle()
        for _ in range(count + len(waiting)):
            vmm.handle_close(await vmm.recv_handle_async(pair[1]))
        for job in waiting:
            await job.result()

    loop.run(work())


def test_a_receiver_is_told_when_the_other_end_closes(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    async def work() -> None:
        waiting = loop.start(vmm.recv_handle_async(pair[1]))
        await loop.settle()
        pair[0].shutdown(socket.SHUT_RDWR)
        with pytest.raises(EOFError, match="closed"):
            await waiting.result()

    loop.run(work())


def test_a_sender_is_told_when_the_other_end_closes(
    loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        fill(vmm, pair[0], handle)
        waiting = loop.start(vmm.send_handle_async(pair[0], handle))
        await loop.settle()
        pair[1].shutdown(socket.SHUT_RDWR)
        with pytest.raises(ConnectionError):
            await waiting.result()

    loop.run(work())


def test_the_demands_of_the_receiver_hold(loop: EventLoop, vmm: VMM) -> None:
    handle = vmm.mdl_create(4 * PAGE, RW)

    async def work() -> None:
        with connected() as (ours, theirs):
            for demand in ({"require": Seal.FREEZE}, {"max_size": PAGE}, {"peer_uid": 12345}):
                await vmm.send_handle_async(ours, handle)
                with pytest.raises(SecurityDisallow):
                    await vmm.recv_handle_async(theirs, **demand)

    loop.run(work())


def test_what_cannot_be_sent_is_refused_as_by_send_handle(loop: EventLoop, vmm: VMM) -> None:
    no_transfer = vmm.handle_copy(vmm.mdl_create(PAGE, RW), Rights.MAP_READ)

    async def work() -> None:
        with connected() as (ours, _):
            with pytest.raises(NoCapability):
                await vmm.send_handle_async(ours, no_transfer)
            for bad in (INVALID_HANDLE, 0, True, "1", None, -1):
                with pytest.raises(InvalidArgument):
                    await vmm.send_handle_async(ours, bad)  # type: ignore[arg-type]
            with pytest.raises(InvalidArgument):
                await vmm.recv_handle_async(ours, require=1 << 40)

    loop.run(work())


def test_a_socket_that_blocks_or_is_none_is_refused(loop: EventLoop, vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)

    async def work() -> None:
        with connected() as (ours, theirs):
            for timeout in (None, 1.0):
                ours.settimeout(timeout)
                theirs.settimeout(timeout)
                with pytest.raises(InvalidArgument, match="setblocking"):
                    await vmm.send_handle_async(ours, handle)
                with pytest.raises(InvalidArgument, match="setblocking"):
                    await vmm.recv_handle_async(theirs)
            for bad in (ours.fileno(), None, "sock"):
                with pytest.raises(InvalidArgument, match="not a socket"):
                    await vmm.recv_handle_async(bad)  # type: ignore[arg-type]
        with socket.socket() as other:
            other.setblocking(False)
            with pytest.raises(InvalidArgument, match="AF_UNIX"):
                await vmm.recv_handle_async(other)

    loop.run(work())


def test_a_closed_vmm_is_told_at_once_and_to_those_who_wait(
    loop: EventLoop, pair: tuple[socket.socket, socket.socket]
) -> None:
    async def work() -> None:
        with VMM() as sender, VMM() as closing:
            waiting = loop.start(closing.recv_handle_async(pair[1]))
            await loop.settle()
            closing.close()
            await sender.send_handle_async(pair[0], sender.mdl_create(PAGE, RW))
            with pytest.raises(InvalidOperation, match="closed"):
                await waiting.result()
            with pytest.raises(InvalidOperation, match="closed"):
                await closing.send_handle_async(pair[0], 1)
            # The message is not used up.
            sender.handle_close(await sender.recv_handle_async(pair[1]))

    loop.run(work())


def test_the_users_own_reader_stays_in_its_place(
    asyncio_loop: EventLoop, vmm: VMM, pair: tuple[socket.socket, socket.socket]
) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    seen = []

    async def work() -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(pair[1], lambda: seen.append(loop.remove_reader(pair[1])))
        waiting = asyncio_loop.start(vmm.recv_handle_async(pair[1]))
        await asyncio_loop.settle()
        await vmm.send_handle_async(pair[0], handle)
        vmm.handle_close(await waiting.result())
        await asyncio_loop.settle()

    asyncio_loop.run(work())
    # uvloop does not tell that there was one.
    assert seen == [True if asyncio_loop is LOOPS["asyncio"] else None]


class Unwatching(asyncio.SelectorEventLoop):
    """An event loop without add_reader, as there are on other systems."""

    add_reader = asyncio.AbstractEventLoop.add_reader


def test_an_event_loop_that_cannot_watch_descriptors_is_told(vmm: VMM) -> None:
    before = kernel.descriptors()
    with (
        connected() as (_, theirs),
        asyncio.Runner(loop_factory=Unwatching) as runner,
        pytest.raises(Unimplemented, match="add_reader"),
    ):
        runner.run(vmm.recv_handle_async(theirs))
    assert kernel.descriptors() == before


def test_without_an_event_loop_there_is_nothing_to_wait_with(vmm: VMM) -> None:
    with connected() as (_, theirs), pytest.raises(InvalidOperation, match="no event loop"):
        vmm.recv_handle_async(theirs).send(None)


def test_a_loop_that_ends_while_a_task_waits_leaves_nothing(
    asyncio_loop: Asyncio, vmm: VMM
) -> None:
    before = kernel.descriptors()
    with connected() as (_, theirs):
        loop = asyncio_loop.new_loop()
        waiting = vmm.recv_handle_async(theirs)
        loop.call_soon(loop.stop)
        task = loop.create_task(waiting)
        loop.run_forever()
        loop.close()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        del task
        waiting.close()
    assert kernel.descriptors() == before


def wait_without_a_descriptor(name: str) -> None:
    """No descriptor is left to wait with."""
    import os
    import resource

    async def work() -> None:
        handle = vmm.mdl_create(PAGE, RW)
        await vmm.send_handle_async(ours, handle)  # so that its modules are loaded
        vmm.handle_close(await vmm.recv_handle_async(theirs))
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        spare = []
        with contextlib.suppress(OSError):
            while True:
                spare.append(os.dup(0))
        try:
            await vmm.recv_handle_async(theirs)
        except MemoryError as problem:
            print(type(problem).__name__, "RLIMIT_NOFILE" in str(problem))
        for fd in spare:
            os.close(fd)
        await vmm.send_handle_async(ours, handle)
        vmm.handle_close(await vmm.recv_handle_async(theirs))
        print("done")

    with VMM() as vmm, connected() as (ours, theirs):
        LOOPS[name].call(work())


@pytest.mark.parametrize("name", LOOPS)
def test_the_limit_of_descriptors_is_named(name: str) -> None:
    child = run_child(
        f"from {__name__} import *\nwait_without_a_descriptor({name!r})",
        environment=TESTS_IMPORTABLE,
    )
    assert (child.returncode, child.stdout) == (0, "QuotaExceeded True\ndone\n"), child.stderr

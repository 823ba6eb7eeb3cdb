"""The event loops that the package runs in, behind one interface: jobs, deadlines and pauses."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import anyio
import trio
import trio.testing
import uvloop

import kernel_oracle as kernel
from constants import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from contextlib import AbstractAsyncContextManager

    Work = Coroutine[Any, Any, Any]

__all__ = ["LOOPS", "Asyncio", "EventLoop", "Job"]


class Job:
    """A coroutine that runs beside the one that started it."""

    def __init__(self, finished: asyncio.Event | trio.Event | anyio.Event) -> None:
        self.finished = finished
        self.value: Any = None
        self.problem: BaseException | None = None
        self.cancelled = False
        self.cancel: Callable[[], object]

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finished.is_set()

    async def ended(self) -> None:
        """Wait until it has ended, in whatever way."""
        await self.finished.wait()

    async def result(self) -> Any:  # noqa: ANN401
        """Wait for what it returns; what it raises is raised here."""
        await self.finished.wait()
        if self.problem is not None:
            raise self.problem
        assert not self.cancelled
        return self.value


class EventLoop(ABC):
    """A library that runs coroutines."""

    @abstractmethod
    def call(self, work: Work) -> None:
        """Run a coroutine on a new loop, for PATIENCE seconds at most."""

    @abstractmethod
    def start(self, work: Work) -> Job:
        """Run a coroutine beside this one."""

    @abstractmethod
    async def pause(self) -> None:
        """Let others run."""

    @abstractmethod
    async def settle(self) -> None:
        """Let all others run until they wait."""

    @abstractmethod
    def deadline(self, seconds: float) -> AbstractAsyncContextManager[None]:
        """Cancel the body after so many seconds, and raise ``TimeoutError`` then."""

    def run(self, work: Work) -> None:
        """Run this on a new loop, and hold that no descriptor stays open."""

        async def counted() -> None:
            before = kernel.descriptors()
            await work
            assert kernel.descriptors() == before

        self.call(counted())

    async def all(self, *works: Work) -> list[Any]:
        """Run coroutines side by side: what they return."""
        jobs = [self.start(work) for work in works]
        return [await job.result() for job in jobs]


class Asyncio(EventLoop):
    """asyncio, with its own loop or another one."""

    def __init__(self, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        self.new_loop = new_loop

    def call(self, work: Work) -> None:
        """See ``EventLoop``."""

        async def limited() -> None:
            async with asyncio.timeout(PATIENCE):
                await work

        with asyncio.Runner(loop_factory=self.new_loop) as runner:
            runner.run(limited())

    def start(self, work: Work) -> Job:
        """See ``EventLoop``."""

        def ended(task: asyncio.Task[Any]) -> None:
            job.cancelled = task.cancelled()
            job.problem = None if job.cancelled else task.exception()
            job.value = None if job.cancelled or job.problem else task.result()
            job.finished.set()

        job = Job(asyncio.Event())
        task = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(ended)
        job.cancel = task.cancel
        return job

    async def pause(self) -> None:
        """See ``EventLoop``."""
        await asyncio.sleep(0)

    async def settle(self) -> None:
        """See ``EventLoop``."""
        for _ in range(5):
            await asyncio.sleep(0)

    @contextlib.asynccontextmanager
    async def deadline(self, seconds: float) -> Any:  # noqa: ANN401
        """See ``EventLoop``."""
        async with asyncio.timeout(seconds):
            yield


class Trio(EventLoop):
    """trio itself."""

    nursery: trio.Nursery

    def call(self, work: Work) -> None:
        async def limited() -> None:
            with trio.fail_after(PATIENCE):
                async with trio.open_nursery() as self.nursery:
                    await work

        trio.run(limited)

    def start(self, work: Work) -> Job:
        job, scope = Job(trio.Event()), trio.CancelScope()
        job.cancel = scope.cancel
        self.nursery.start_soon(run_job, job, scope, work)
        return job

    async def pause(self) -> None:
        await trio.lowlevel.checkpoint()

    async def settle(self) -> None:
        await trio.testing.wait_all_tasks_blocked()

    @contextlib.asynccontextmanager
    async def deadline(self, seconds: float) -> Any:  # noqa: ANN401
        try:
            with trio.fail_after(seconds):
                yield
        except trio.TooSlowError:
            raise TimeoutError from None


class Anyio(EventLoop):
    """anyio, on either of its backends."""

    group: Any

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def call(self, work: Work) -> None:
        async def limited() -> None:
            with anyio.fail_after(PATIENCE):
                async with anyio.create_task_group() as self.group:
                    await work

        anyio.run(limited, backend=self.backend)

    def start(self, work: Work) -> Job:
        job, scope = Job(anyio.Event()), anyio.CancelScope()
        job.cancel = scope.cancel
        self.group.start_soon(run_job, job, scope, work)
        return job

    async def pause(self) -> None:
        await anyio.lowlevel.checkpoint()

    async def settle(self) -> None:
        await anyio.wait_all_tasks_blocked()

    @contextlib.asynccontextmanager
    async def deadline(self, seconds: float) -> Any:  # noqa: ANN401
        with anyio.fail_after(seconds):
            yield


async def run_job(job: Job, scope: Any, work: Work) -> None:  # noqa: ANN401
    """Run a job in its own cancel scope."""
    with scope:
        try:
            job.value = await work
        except Exception as problem:  # noqa: BLE001  it is raised by ``result``
            job.problem = problem
    job.cancelled = scope.cancelled_caught
    job.finished.set()


LOOPS: dict[str, EventLoop] = {
    "asyncio": Asyncio(asyncio.SelectorEventLoop),
    "uvloop": Asyncio(uvloop.new_event_loop),
    "trio": Trio(),
    "anyio on asyncio": Anyio("asyncio"),
    "anyio on trio": Anyio("trio"),
}

# The first loop of a process opens what libuv keeps for good: a pipe for signals.
with contextlib.closing(uvloop.new_event_loop()) as first:
    first.run_until_complete(asyncio.sleep(0))

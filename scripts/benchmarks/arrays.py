"""Benchmarks of buffers in use: arrays handed over, many handles, many buffers."""

from __future__ import annotations

import os
import resource
import struct
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from socket import recv_fds, send_fds
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Final

import vmm_linux
from benchmarks.harness import (
    FORK,
    US,
    CannotMeasureError,
    Contestant,
    at_most,
    benchmark,
    faster,
    loop,
    peer_is_gone,
)
from benchmarks.memory import PAGE, READ_WRITE
from benchmarks.sharing import bytes_of, memfd
from vmm_linux import VMM, Mdl

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue
    from socket import socket

    from benchmarks.harness import Stage

ELEMENTS: Final = 8 << 20
"""Elements of 8 bytes of an array of 64 MiB."""
ARRAY_SIZE: Final = 8 * ELEMENTS
SUM: Final = struct.Struct("d")
READY: Final = f"{US}, made in a buffer"
SHARED_READY: Final = "SharedMemory, made in one"
US_SHARED: Final = f"{US}, shared before"
ALIVE: Final = 10_000
NAMED_ALIVE: Final = ALIVE // 2
"""The number of SharedMemory objects, which take two descriptors each."""
DESCRIPTORS: Final = ALIVE + 200
"""Descriptors that so many and the rest of the process take."""


# ---- an array of 64 MiB -------------------------------------------------------------------------


def expect_sum(sock: socket, expected: float) -> None:
    """The child has summed the array up."""
    if sock.recv(SUM.size) != SUM.pack(expected):
        peer_is_gone()


def serve_arrays(sock: socket) -> None:
    """Sum up each array that arrives as an MDL buffer."""
    with VMM() as vmm:
        while True:
            try:
                mdl = Mdl.recv(sock, vmm=vmm)
            except EOFError:
                return
            array = mdl.array(ELEMENTS, writable=False)
            sock.send(SUM.pack(array.sum()))
            del array
            mdl.close()


def serve_named_arrays(sock: socket) -> None:
    """Sum up each array that arrives as the name of a SharedMemory."""
    import numpy as np  # noqa: PLC0415  not every benchmark needs it

    while name := sock.recv(64):
        shared = SharedMemory(name.decode())
        total = np.frombuffer(bytes_of(shared), count=ELEMENTS).sum()
        sock.send(SUM.pack(total))
        shared.close()


def serve_queued_arrays(sock: socket, queue: Queue[Any]) -> None:
    """Sum up each array that arrives through a queue."""
    while sock.recv(1):
        sock.send(SUM.pack(queue.get().sum()))


def by_buffer(stage: Stage, array: Any) -> dict[str, Contestant]:  # noqa: ANN401  NumPy's
    """The array copied into a buffer, and one that is there already.

    The speed of reading depends on the memory's place: every turn uses other memory.
    """
    vmm = stage.vmm()
    sock = stage.child(serve_arrays)
    expected = float(array.sum())

    def send(mdl: Mdl) -> None:
        vmm.send_handle(sock, mdl.handle)
        expect_sum(sock, expected)

    def copied(count: int) -> None:
        for _ in range(count):
            with Mdl.from_bytes(array, vmm=vmm) as mdl:
                send(mdl)

    def ready(count: int) -> float:
        with vmm.mdl(ARRAY_SIZE) as mdl:
            mdl.array(ELEMENTS)[:] = array
            start = perf_counter_ns()
            for _ in range(count):
                send(mdl)
            return perf_counter_ns() - start

    return {US: loop(copied), READY: Contestant(ready)}


def by_shared_memory(stage: Stage, array: Any) -> dict[str, Contestant]:  # noqa: ANN401
    """The array copied into a SharedMemory, and one that is there already."""
    import numpy as np  # noqa: PLC0415

    resource_tracker.ensure_running()
    sock = stage.child(serve_named_arrays)
    expected = float(array.sum())

    def fill(shared: SharedMemory) -> None:
        np.frombuffer(bytes_of(shared), count=ELEMENTS)[:] = array

    def send(shared: SharedMemory) -> None:
        sock.send(shared.name.encode())
        expect_sum(sock, expected)

    def copied(count: int) -> None:
        for _ in range(count):
            shared = SharedMemory(create=True, size=ARRAY_SIZE)
            fill(shared)
            send(shared)
            shared.close()
            shared.unlink()

    def ready(count: int) -> float:
        shared = SharedMemory(create=True, size=ARRAY_SIZE)
        fill(shared)
        start = perf_counter_ns()
        for _ in range(count):
            send(shared)
        taken = perf_counter_ns() - start
        shared.close()
        shared.unlink()
        return taken

    return {"SharedMemory": loop(copied), SHARED_READY: Contestant(ready)}


def by_queue(stage: Stage, array: Any) -> Contestant:  # noqa: ANN401
    """The array pickled through a queue."""
    queue: Queue[Any] = FORK.Queue()
    stage.callback(queue.join_thread)
    stage.callback(queue.close)
    sock = stage.child(serve_queued_arrays, queue)
    expected = float(array.sum())

    def measure(count: int) -> None:
        for _ in range(count):
            sock.send(b"?")
            queue.put(array)
            expect_sum(sock, expected)

    return loop(measure)


def by_joblib(stage: Stage, array: Any) -> dict[str, Contestant]:  # noqa: ANN401
    """The array dumped into a file in memory, which joblib's worker maps."""
    joblib = stage.peer("joblib")
    if joblib is None:
        return {}
    import numpy as np  # noqa: PLC0415

    parallel = stage.enter_context(joblib.Parallel(n_jobs=2, max_nbytes="1M"))
    expected = float(array.sum())

    def measure(count: int) -> None:
        for _ in range(count):
            # Another object each time: joblib dumps the same one only once.
            (total,) = parallel([joblib.delayed(np.sum)(array.view())])
            if total != expected:
                peer_is_gone()

    return {"joblib": loop(measure)}


@benchmark(
    "NumPy array of 64 MiB handed over and summed",
    faster(1, "SharedMemory"),
    faster(1, "multiprocessing.Queue"),
    faster(1, "joblib"),
    rarely=20,
    apart=True,
)
def hand_over_array(stage: Stage) -> dict[str, Contestant]:
    """Parent and child each have a CPU of their own."""
    np = stage.peer("numpy")
    if np is None:
        raise CannotMeasureError("NumPy is not installed: pip install 'vmm-linux[numpy]'")
    array = np.arange(ELEMENTS, dtype="float64") % 7
    # The queue and joblib come last: they start threads, and children are forked before them.
    return {
        **by_buffer(stage, array),
        **by_shared_memory(stage, array),
        "multiprocessing.Queue": by_queue(stage, array),
        **by_joblib(stage, array),
    }


# ---- an array as an argument --------------------------------------------------------------------


def total_of(array: Any) -> float:  # noqa: ANN401  NumPy's
    """The sum, in a worker."""
    return float(array.sum())


@benchmark(
    "NumPy array of 64 MiB as an argument in a ProcessPoolExecutor",
    faster(1, "pickled"),
    faster(1, "pickled", ours=US_SHARED),
    rarely=20,
    apart=True,
)
def pass_array(stage: Stage) -> dict[str, Contestant]:
    """The array copied into shared memory, one that is there already, and one that is pickled."""
    np = stage.peer("numpy")
    if np is None:
        raise CannotMeasureError("NumPy is not installed: pip install 'vmm-linux[numpy]'")
    array = np.arange(ELEMENTS, dtype="float64") % 7
    executor = stage.enter_context(ProcessPoolExecutor(1, FORK))
    expected = float(array.sum())

    def submit(argument: Any) -> None:  # noqa: ANN401
        if executor.submit(total_of, argument).result() != expected:
            peer_is_gone()

    def repeat(argument: Callable[[], Any]) -> Contestant:
        def measure(count: int) -> None:
            for _ in range(count):
                submit(argument())

        return loop(measure)

    shared = vmm_linux.share(array)
    stage.callback(shared.mdl.close)
    return {
        US: repeat(lambda: vmm_linux.share(array)),
        US_SHARED: repeat(lambda: shared),
        "pickled": repeat(lambda: array),
    }


# ---- many handles through one socket ------------------------------------------------------------


def serve_many(sock: socket, take: Callable[[socket], object]) -> None:
    """Receive as many as each question announces, and answer after the last one."""
    while question := sock.recv(8):
        for _ in range(int.from_bytes(question, "little")):
            take(sock)
        sock.send(b"!")


def serve_many_handles(sock: socket) -> None:
    """Receive handles and close them."""
    with VMM() as vmm:
        serve_many(sock, lambda sock: vmm.handle_close(vmm.recv_handle(sock)))


def serve_many_descriptors(sock: socket) -> None:
    """Receive bare descriptors without any check, and close them."""
    serve_many(sock, lambda sock: os.close(recv_fds(sock, 1, 1)[1][0]))


def in_a_row(sock: socket, send: Callable[[], object]) -> Contestant:
    """Send many, one after the other, and wait for the last."""

    def measure(count: int) -> float:
        start = perf_counter_ns()
        sock.send(count.to_bytes(8, "little"))
        for _ in range(count):
            send()
        if sock.recv(1) != b"!":
            peer_is_gone()
        return perf_counter_ns() - start

    return Contestant(measure)


@benchmark("a handle, of many through one socket", at_most(10, "socket.send_fds"), apart=True)
def handles_in_a_row(stage: Stage) -> dict[str, Contestant]:
    """Sender and receiver work at the same time, each on a CPU of its own."""
    vmm = stage.vmm()
    handle = vmm.mdl_create(PAGE, READ_WRITE)
    handles = stage.child(serve_many_handles)
    descriptors = stage.child(serve_many_descriptors)
    fd = memfd()
    stage.callback(os.close, fd)
    return {
        US: in_a_row(handles, lambda: vmm.send_handle(handles, handle)),
        "socket.send_fds": in_a_row(descriptors, lambda: send_fds(descriptors, [b"."], [fd])),
    }


# ---- many buffers -------------------------------------------------------------------------------


def allow_descriptors(stage: Stage) -> None:
    """Raise the limit of descriptors during the benchmark."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < DESCRIPTORS:
        raise CannotMeasureError(f"RLIMIT_NOFILE: {DESCRIPTORS} are needed, {hard} allowed")
    if soft != resource.RLIM_INFINITY and soft < DESCRIPTORS:
        resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, hard))
        stage.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))


@benchmark(
    "a buffer made, mapped and written, of 10,000 alive", faster(1, "SharedMemory"), rarely=100
)
def many_buffers(stage: Stage) -> dict[str, Contestant]:
    """All live until the last one is there, of SharedMemory half as many; the end is not timed."""
    allow_descriptors(stage)
    resource_tracker.ensure_running()

    def ours(count: int) -> float:
        with VMM() as vmm:
            start = perf_counter_ns()
            for _ in range(count):
                handle = vmm.mdl_create(PAGE, READ_WRITE)
                vmm.write(vmm.mdl_map(handle, 0, PAGE, 0, READ_WRITE), b"x")
            return perf_counter_ns() - start

    def by_name(count: int) -> float:
        alive: list[SharedMemory] = []
        start = perf_counter_ns()
        try:
            for _ in range(count):
                alive.append(SharedMemory(create=True, size=PAGE))
                bytes_of(alive[-1])[0] = 1
            return perf_counter_ns() - start
        finally:
            for shared in alive:
                shared.close()
                shared.unlink()

    return {US: Contestant(ours, ALIVE), "SharedMemory": Contestant(by_name, NAMED_ALIVE)}

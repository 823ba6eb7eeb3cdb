"""Many clients of one broker at once, and the same work with SharedMemory.

Part of the tests with few operations, and of ``scripts/soak --names`` with many.
"""

from __future__ import annotations

import array
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import get_context, resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from brokers import running
from vmm_linux._tools.children import die_with_parent
from vmm_linux.names import Client

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

SIZE = 1 << 16
CLIENTS_A_PROCESS = 20
SLACK = 2 << 20
"""Bytes by which the broker's memory may vary, whatever it served."""


class Load(NamedTuple):
    """What so many operations took, and what was left of them."""

    ours: list[float]
    """Microseconds of each open by name, with mapping and closing."""
    theirs: list[float]
    """The same of SharedMemory."""
    descriptors: int
    """That the broker has more than before; 0 where only root sees them."""
    memory: int
    """Bytes that the broker has more than before."""
    names: int
    """That are left."""


def measure(clients: int, operations: int) -> Load:
    """Have so many clients do so many operations together."""
    processes = max(1, clients // CLIENTS_A_PROCESS)
    each = operations // processes
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder)) as broker,
        Client(broker.path) as client,
        client.create("shared", SIZE),
    ):
        together(processes, use_names, broker.path, each // 10)  # what it keeps, it has then
        root = os.geteuid() == 0
        before = (broker.descriptors() if root else 0), broker.memory()
        ours = together(processes, use_names, broker.path, each)
        if root:
            broker.settle(before[0])
        after = (broker.descriptors() if root else 0), broker.memory()
        names = len(client.names()) - 1
    resource_tracker.ensure_running()  # all are to have the same one
    shared = SharedMemory(create=True, size=SIZE)
    try:
        theirs = together(processes, use_shared_memory, shared.name, each)
    finally:
        shared.close()
        shared.unlink()
    return Load(ours, theirs, after[0] - before[0], after[1] - before[1], names)


def together(
    processes: int, work: Callable[[str, int, int], array.array[float]], name: str, count: int
) -> list[float]:
    """Have processes do some work at once: the times of all."""
    context = get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(processes)]
    children = [
        context.Process(target=serve, args=(os.getpid(), writing, work, (name, number, count)))
        for number, (_, writing) in enumerate(ends)
    ]
    times: list[float] = []
    for child in children:
        child.start()
    for reading, writing in ends:
        writing.close()
        times += array.array("d", reading.recv_bytes())
        reading.close()
    for child in children:
        child.join()
        assert child.exitcode == 0
        child.close()
    return times


def serve(
    parent: int,
    results: Connection,
    work: Callable[[str, int, int], array.array[float]],
    arguments: tuple[str, int, int],
) -> None:
    """Do the work in a child, and send the times."""
    die_with_parent(parent)
    results.send_bytes(work(*arguments).tobytes())


def use_names(path: str, number: int, count: int) -> array.array[float]:
    """Use names through several clients: in four of five operations, open one."""
    times = array.array("d")
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(path)) for _ in range(CLIENTS_A_PROCESS)]
        for turn in range(count):
            client = clients[turn % CLIENTS_A_PROCESS]
            if turn % 5 == 0:
                name = f"{number} {turn}"
                client.create(name, SIZE).close()
                client.unlink(name)
                continue
            began = time.perf_counter()
            mdl = client.open("shared")
            mdl.map().free()
            mdl.close()
            times.append(1e6 * (time.perf_counter() - began))
    return times


def use_shared_memory(name: str, number: int, count: int) -> array.array[float]:
    """The same with SharedMemory."""
    assert number >= 0
    times = array.array("d")
    for turn in range(count):
        if turn % 5 == 0:
            made = SharedMemory(create=True, size=SIZE)
            made.close()
            made.unlink()
            continue
        began = time.perf_counter()
        SharedMemory(name).close()
        times.append(1e6 * (time.perf_counter() - began))
    return times


def centiles(times: list[float]) -> tuple[float, float]:
    """The median and the 99th centile."""
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    return cuts[49], cuts[98]


def told(load: Load) -> str:
    """What is to be said of it, in lines."""
    lines = [
        f"{name:14} p50 {centiles(times)[0]:7.1f} µs  p99 {centiles(times)[1]:7.1f} µs"
        for name, times in (("by name", load.ours), ("SharedMemory", load.theirs))
    ]
    left = f"{load.descriptors} descriptors, {load.memory} bytes and {load.names} names"
    return "\n".join([*lines, f"left in the broker: {left}"])


def is_clean(load: Load) -> bool:
    """Whether the broker has no more than before."""
    return load.descriptors <= 0 and load.names == 0 and load.memory < SLACK

"""Benchmarks of buffers by name: opened, made and unlinked, through a broker."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from socket import AF_UNIX, SOCK_DGRAM, socket
from typing import TYPE_CHECKING, Final

from benchmarks.harness import PATIENCE, US, Contestant, at_most, benchmark, loop, peer_is_gone
from benchmarks.memory import SIZE
from vmm_linux.names import Client

if TYPE_CHECKING:
    from benchmarks.harness import Stage

FIRST: Final = f"{US}, first open"
READY: Final = b"READY=1"


def broker(stage: Stage) -> str:
    """A broker on the CPU of children, which ends with the stage: its socket."""
    folder = stage.enter_context(tempfile.TemporaryDirectory())
    with socket(AF_UNIX, SOCK_DGRAM) as ready:
        ready.bind(f"{folder}/ready")
        ready.settimeout(PATIENCE)
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vmm_linux.broker"),
                *("--socket", f"{folder}/socket", "--die-with-parent"),
            ],
            env={**os.environ, "NOTIFY_SOCKET": f"{folder}/ready"},
            stdin=subprocess.DEVNULL,
        )
        stage.callback(process.wait)
        stage.callback(process.terminate)
        if ready.recv(len(READY)) != READY:
            peer_is_gone()
    os.sched_setaffinity(process.pid, {stage.cpu_of_children})
    return f"{folder}/socket"


@benchmark(
    "64 KiB opened by name, mapped and closed",
    at_most(0.8, "SharedMemory"),
    at_most(1.8, "SharedMemory", ours=FIRST),
)
def open_by_name(stage: Stage) -> dict[str, Contestant]:
    """A buffer of another process. The broker, as SharedMemory's tracker, is on the same CPU."""
    path = broker(stage)
    client = stage.enter_context(Client(path))
    stage.enter_context(client.create("bench", SIZE))
    resource_tracker.ensure_running()
    shared = SharedMemory(create=True, size=SIZE)
    stage.callback(shared.unlink)
    stage.callback(shared.close)

    def ours(count: int) -> None:
        for _ in range(count):
            mdl = client.open("bench")
            mdl.map().free()
            mdl.close()

    def first(count: int) -> None:
        for _ in range(count):
            with Client(path) as new:
                mdl = new.open("bench")
                mdl.map().free()
                mdl.close()

    def by_name(count: int) -> None:
        for _ in range(count):
            SharedMemory(shared.name).close()

    return {US: loop(ours), FIRST: loop(first), "SharedMemory": loop(by_name)}


@benchmark("64 KiB made by name, mapped, closed and unlinked", at_most(1, "SharedMemory"))
def create_by_name(stage: Stage) -> dict[str, Contestant]:
    """A buffer with a name, made and ended each time."""
    client = stage.enter_context(Client(broker(stage)))
    resource_tracker.ensure_running()

    def ours(count: int) -> None:
        for _ in range(count):
            mdl = client.create("bench", SIZE)
            mdl.map().free()
            mdl.close()
            client.unlink("bench")

    def by_name(count: int) -> None:
        for _ in range(count):
            shared = SharedMemory(create=True, size=SIZE)
            shared.close()
            shared.unlink()

    return {US: loop(ours), "SharedMemory": loop(by_name)}

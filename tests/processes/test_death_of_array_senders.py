"""kill -9 of who sends or receives shared arrays, at any moment: nothing is left of them."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import kernel_oracle as kernel
import leaks
import vmm_linux
from array_workers import begun
from children import TESTS_IMPORTABLE, run_child
from constants import MIB
from kernel_oracle import PAGE
from mdl_workers import descriptors
from onlookers import wait_until
from own_shared_memory import have_own_shared_memory, left_in_shared_memory
from segments import mapped_files
from vmm_linux import _sharer
from vmm_linux._default_vmm import default_vmm
from vmm_linux.errors import ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

ROUNDS, SEEDS = 100, 3
FORK = multiprocessing.get_context("fork")
#: How one notices that the other is gone.
GONE = (EOFError, BrokenPipeError, ConnectionResetError, ResourceNotFound)
#: Elements of the arrays: pages and a bit, and a mebibyte.
LENGTHS = [PAGE + 3, 5 * PAGE, MIB // 8]
#: Seconds within which the kill comes: a few exchanges take as long.
MOMENTS = 0.02


def send_all_the_time(connection: Connection) -> None:
    """Send an array, and have it back with other numbers, until the other one is gone."""
    kept = None
    with suppress(*GONE):
        for number in itertools.count():
            array = vmm_linux.full(LENGTHS[number % len(LENGTHS)], 1.0)
            connection.send([array, array[1::2]])
            back = connection.recv()
            assert back.mdl is array.mdl
            assert (array == 2).all()
            kept = array
    # What the dead one had is here as it was.
    assert kept is None or (kept == 2).all()


def answer_all_the_time(connection: Connection) -> None:
    """Count all numbers up, and send the array back, until the other one is gone."""
    kept = None
    with suppress(*GONE):
        while True:
            array, odd = connection.recv()
            assert odd.mdl is array.mdl
            array[::2] += 1
            odd += 1
            kept = array
            connection.send(array)
    assert kept is None or (kept == 2).all()


def in_child(work: Callable[[Any], None], mine: Any, other: Any) -> None:  # noqa: ANN401
    """In a child: do this with an end of the pipe, of which the other end is not here."""
    other.close()
    _sharer.AT_EXIT = 0.05  # type: ignore[misc]
    # Who ends and says that nobody has fetched what it sent is right.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    work(mine)


def kill_later(seconds: float, processes: list[Any]) -> None:
    """Kill these processes at that moment, wherever this one is then."""

    def kill(*_: object) -> None:
        for process in processes:
            process.kill()

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def kill_once(choose: random.Random) -> str:
    """One round; returns who was killed."""
    ours, theirs = FORK.Pipe()
    # A process on both sides, or this one, which lives on, on one of them.
    sides = choose.choice(["both", "sender", "receiver"])
    sender = receiver = None
    if sides != "receiver":
        sender = begun(FORK, in_child, send_all_the_time, ours, theirs)
    if sides != "sender":
        receiver = begun(FORK, in_child, answer_all_the_time, theirs, ours)
    processes = [process for process in (sender, receiver) if process]
    victims = choose.choice([processes, [choose.choice(processes)]])
    kill_later(choose.uniform(1e-6, MOMENTS), victims)
    if sender is None:
        theirs.close()
        send_all_the_time(ours)
    elif receiver is None:
        ours.close()
        answer_all_the_time(theirs)
    ours.close()
    theirs.close()
    for process in processes:
        process.join()
        # The second of two may see the end of the first, and end by itself.
        allowed = {-signal.SIGKILL} if process in victims[:1] else {0}
        if process in victims[1:]:
            allowed.add(-signal.SIGKILL)
        assert process.exitcode in allowed, (sides, victims)
        process.close()
    return " and ".join(
        name for name, each in (("sender", sender), ("receiver", receiver)) if each in victims
    )


def waiting() -> int:
    """How many descriptors wait in this process for receivers, which may be dead."""
    return len(_sharer.HERE["sharer"].waiting)


def shared_memory() -> int:
    """The machine's shared memory in bytes, of all programs."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) << 10
    raise LookupError("Shmem")


def kill_again_and_again(seed: int) -> None:
    """The rounds of one seed, in a process that has nothing else to do."""
    choose = random.Random(seed)  # noqa: S311
    own = have_own_shared_memory()
    before, memory = kernel.descriptors(), shared_memory()
    killed: set[str] = set()
    kill_once(choose)
    there = descriptors() - waiting()
    for number in range(ROUNDS):
        killed.add(kill_once(choose))
        gc.collect()
        # What was sent to the dead waits in its sender, if that lives, until it ends.
        with _sharer.HERE["sharer"].changed:
            assert len(kernel.descriptors()) - waiting() <= there + 1, f"round {number}"
        assert mapped_files() == []
        assert left_in_shared_memory(own=own) == []
        assert leaks.read_children() == frozenset()
    _sharer.stop()
    default_vmm().close()
    assert kernel.descriptors() == before
    # Far more was made than others on this machine take meanwhile.
    wait_until(lambda: shared_memory() - memory < ROUNDS // 2 * MIB)
    print(sorted(killed))


@pytest.mark.parametrize("seed", range(SEEDS))
def test_of_arrays_between_processes_that_are_killed_at_any_moment_nothing_is_left(
    seed: int,
) -> None:
    child = run_child(
        f"from {__name__} import *\nkill_again_and_again({seed})",
        environment=TESTS_IMPORTABLE,
        timeout=240,
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout == "['receiver', 'sender', 'sender and receiver']\n"

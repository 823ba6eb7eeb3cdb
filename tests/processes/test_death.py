"""kill -9 at any moment: the survivor's data stays, and nothing else does.

A creator makes buffers, fills them and sends them; a receiver maps, checks and writes to them.
Both tell of every step. At a random step one of them is killed, or both.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import time
import traceback
from typing import TYPE_CHECKING, NamedTuple

import pytest

import kernel_oracle as kernel
import leaks
from children import TESTS_IMPORTABLE, run_child
from constants import COMMITTED, READ, RW
from kernel_oracle import PAGE
from own_shared_memory import have_own_shared_memory, left_in_shared_memory
from vmm_linux import VMM, Rights
from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable


ROUNDS, SEEDS = 100, 5
#: A round that is not killed before ends by itself after so many buffers.
BUFFERS = 40
#: How many buffers a process keeps to check them at its end.
KEPT = 8
VICTIMS = {"creator": (0,), "receiver": (1,), "both": (0, 1), "both, backwards": (1, 0)}


class Plan(NamedTuple):
    """One buffer, as both know it from the round's seed."""

    kind: str
    pages: int
    creators: bytes
    receivers: bytes

    @classmethod
    def of(cls, seed: int, number: int) -> Plan:
        """The plan of a round's buffer; the two halves belong to one writer each."""
        choose = random.Random(f"{seed}/{number}")  # noqa: S311
        pages = 2 * choose.randint(1, 8)
        half = pages // 2 * PAGE
        kind = choose.choice(["shared", "frozen", "converted", "clone"])
        return cls(kind, pages, choose.randbytes(half), choose.randbytes(half))


class Kept(NamedTuple):
    """A mapped buffer that is checked again later."""

    plan: Plan
    va: int


class Side:
    """What creator and receiver have in common."""

    def __init__(self, seed: int, sock: socket.socket, progress: int) -> None:
        self.seed, self.sock, self.progress = seed, sock, progress
        self.vmm = VMM()
        self.kept: list[Kept] = []

    def step(self) -> None:
        """Tell that something was done: a moment to be killed at."""
        os.write(self.progress, b".")

    def keep(self, plan: Plan, va: int) -> None:
        """Keep a mapping, and let the oldest go."""
        self.kept.append(Kept(plan, va))
        if len(self.kept) > KEPT:
            old = self.kept.pop(0)
            self.vmm.free(old.va, old.plan.pages * PAGE)

    def check(self, mine: Callable[[Plan], bytes], theirs: Callable[[Plan], bytes]) -> None:
        """What is mine is there wholly; what the other wrote, as far as it came."""
        for plan, va in self.kept:
            half = plan.pages // 2 * PAGE
            first, second = self.vmm.read(va, half), self.vmm.read(va + half, half)
            own, other = (first, second) if mine(plan) == plan.creators else (second, first)
            assert own == mine(plan)
            written = other.rstrip(b"\0")
            assert theirs(plan).startswith(written)

    def finish(self) -> None:
        """Give everything back."""
        self.vmm.close()
        self.sock.close()


def create(side: Side) -> None:
    """Create, fill, send, until the other one is gone."""
    vmm = side.vmm
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for number in range(BUFFERS):
            plan = Plan.of(side.seed, number)
            size = plan.pages * PAGE
            if plan.kind == "converted":
                va = vmm.allocate(0, size, COMMITTED)
                vmm.write(va, plan.creators)
                handle = vmm.mdl_create_from_vm(va, size, RW)
            elif plan.kind == "frozen":
                handle = vmm.mdl_create_from_buf(plan.creators + plan.receivers, READ)
                va = vmm.mdl_map(handle, 0, size, 0, READ)
            else:
                handle = vmm.mdl_create(size + 2 * PAGE, RW)
                if plan.kind == "clone":
                    handle = vmm.mdl_clone(handle, PAGE, size)
                va = vmm.mdl_map(handle, 0, size, 0, RW)
                side.step()
                vmm.write(va, plan.creators)
            side.keep(plan, va)
            side.step()
            vmm.send_handle(side.sock, handle)
            side.step()
            vmm.handle_close(handle)
        # What the receiver writes is a beginning of its data only once it writes no more.
        assert side.sock.recv(1) == b""
    side.check(lambda plan: plan.creators, lambda plan: plan.receivers)


def receive(side: Side) -> None:
    """Receive, map, check, write, until the other one is gone."""
    vmm = side.vmm
    with contextlib.suppress(EOFError, ConnectionResetError):
        for number in range(BUFFERS):
            plan = Plan.of(side.seed, number)
            size = plan.pages * PAGE
            handle = vmm.recv_handle(side.sock)
            side.step()
            writable = Rights.MAP_WRITE in handle.rights
            va = vmm.mdl_map(handle, 0, size, 0, RW if writable else READ)
            vmm.handle_close(handle)
            side.step()
            assert vmm.read(va, size // 2) == plan.creators
            if writable:
                vmm.write(va + size // 2, plan.receivers)
            side.keep(plan, va)
            side.step()
    side.check(lambda plan: plan.receivers, lambda plan: plan.creators)


def start(
    work: Callable[[Side], None],
    seed: int,
    sock: socket.socket,
    other: socket.socket,
    progress: int,
) -> int:
    """A child that does this, and that dies with its parent.

    It must see the end of the other one, so it closes the other's socket.
    """
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        die_with_parent()
        if os.getppid() == parent:
            other.close()
            side = Side(seed, sock, progress)
            work(side)
            side.finish()
            status = 0
    except BaseException:  # noqa: BLE001  a child must not go on with its parent's work
        traceback.print_exc()
    finally:
        os._exit(status)


def kill_at_random(seed: int, choose: random.Random) -> tuple[str, list[int]]:
    """One round; returns who was to die and the wait status of each."""
    who = choose.choice(list(VICTIMS))
    steps, progress = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        children = [
            start(create, seed, ours, theirs, progress),
            start(receive, seed, theirs, ours, progress),
        ]
    os.close(progress)
    for _ in range(choose.randrange(60)):
        if not os.read(steps, 1):
            break  # both came to their ends before
    time.sleep(choose.random() / 1000)  # somewhere within a step; any moment will do
    for victim in VICTIMS[who]:
        os.kill(children[victim], signal.SIGKILL)
    while os.read(steps, 1 << 16):
        pass
    os.close(steps)
    return who, [os.waitpid(child, 0)[1] for child in children]


def kill_again_and_again(seed: int) -> None:
    """The rounds of one seed, in a process that has nothing else to do."""
    choose = random.Random(seed)  # noqa: S311
    own = have_own_shared_memory()
    descriptors = kernel.descriptors()
    killed = 0
    for number in range(ROUNDS):
        who, statuses = kill_at_random(seed * ROUNDS + number, choose)
        for side, status in enumerate(statuses):
            # Whoever was done before is not killed by being killed.
            allowed = {0, signal.SIGKILL} if side in VICTIMS[who] else {0}
            assert status in allowed, f"round {number}: {who} killed, {statuses}"
            killed += status == signal.SIGKILL
        assert left_in_shared_memory(own=own) == []
        assert kernel.descriptors() == descriptors
        assert leaks.read_children() == frozenset()
    print("killed" if killed > ROUNDS // 2 else f"only {killed} were killed")


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_death_at_any_moment_costs_the_survivor_nothing_and_leaves_nothing(seed: int) -> None:
    child = run_child(
        f"from {__name__} import *\nkill_again_and_again({seed})",
        environment=TESTS_IMPORTABLE,
        timeout=240,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "killed\n", "")

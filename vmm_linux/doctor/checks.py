"""Tries each need of the package, on a page or two of its own."""

import contextlib
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from vmm_linux import VMM, PageState, Rights, Seal, VmmError, VmmFlags

PAGE = os.sysconf("SC_PAGE_SIZE")
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE


@dataclass(frozen=True)
class Check:
    """One need, and the result of the trial.

    Attributes:
        name: the need.
        ok: whether it works.
        problem: what happened instead; None if it works.
        advice: how to make it work; None if it works.
    """

    name: str
    ok: bool
    problem: str | None = None
    advice: str | None = None


class UnexpectedError(Exception):
    """A call succeeded, but with a wrong result."""


class Trial(NamedTuple):
    """A trial: its name, its function, and the advice for a failure."""

    name: str
    carry_out: Callable[[VMM], None]
    advice: str


def attempt(trial: Trial) -> Check:
    """Try it on a VMM of its own, which leaves nothing behind. A refusal does not raise."""
    try:
        with VMM() as vmm:
            trial.carry_out(vmm)
    except (VmmError, OSError, UnexpectedError) as problem:
        return Check(trial.name, ok=False, problem=str(problem), advice=trial.advice)
    return Check(trial.name, ok=True)


def expect(what: str, found: object, wanted: object) -> None:
    """Raise unless the condition holds."""
    if found != wanted:
        raise UnexpectedError(f"{what}: {found!r}, where {wanted!r} was expected")


def pages(vmm: VMM) -> None:
    """Reserve, commit, write, decommit, commit again, free."""
    va = vmm.allocate(0, PAGE, VmmFlags.RESERVE | READ_WRITE)
    vmm.commit(va, PAGE)
    vmm.write(va, b"doctor")
    expect("bytes read back", vmm.read(va, 6), b"doctor")
    vmm.protect(va, PAGE, VmmFlags.READ)
    vmm.decommit(va, PAGE)
    vmm.commit(va, PAGE)
    expect("bytes after decommit", vmm.read(va, 6), bytes(6))
    vmm.free(va, PAGE)


def locked_pages(vmm: VMM) -> None:
    """Have a page at once."""
    flags = VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.LOCKED
    va = vmm.allocate(0, PAGE, flags | READ_WRITE)
    expect("residency of a LOCKED page", vmm.query(va, smaps=False).resident, True)


def answers(vmm: VMM) -> None:
    """Ask about a page in every state."""
    va = vmm.allocate(0, 2 * PAGE, VmmFlags.RESERVE | READ_WRITE)
    vmm.commit(va, PAGE)
    states = [vmm.query(va + at, smaps=False).state for at in (0, PAGE)]
    expect("states reported", states, [PageState.COMMITTED, PageState.RESERVED])
    record = vmm.query(va).smaps
    expect("a record of /proc/self/smaps there", record is not None, True)
    vmm.free(va, 2 * PAGE)
    expect("state after free", vmm.query(va).state, PageState.FREE)


def buffers(vmm: VMM) -> None:
    """Make a buffer, write to it, and freeze it."""
    handle = vmm.mdl_create(PAGE, READ_WRITE)
    va = vmm.mdl_map(handle, 0, PAGE, 0, READ_WRITE)
    vmm.write(va, b"doctor")
    vmm.free(va, PAGE)
    vmm.mdl_seal(handle, Seal.FREEZE)
    expect("seals", vmm.handle_info(handle).seals, Seal.FREEZE)
    va = vmm.mdl_map(handle, 0, PAGE, 0, VmmFlags.READ)
    expect("bytes in the buffer", vmm.read(va, 6), b"doctor")


def handles(vmm: VMM) -> None:
    """Hand a buffer over, read-only."""
    handle, rights = vmm.mdl_create(PAGE, READ_WRITE), Rights.MAP_READ | Rights.GET_SID
    with contextlib.ExitStack() as at_end:
        ours, theirs = map(at_end.enter_context, socket.socketpair())
        vmm.send_handle(ours, handle, rights)
        received = vmm.recv_handle(theirs)
    expect("rights received", received.rights, rights)
    expect("the same buffer there", vmm.handle_info(received).sid, vmm.handle_info(handle).sid)


TRIALS = (
    Trial(
        "pages are reserved, committed, decommitted and freed",
        pages,
        "mmap(2) and mprotect(2) must be allowed, and RLIMIT_AS, RLIMIT_DATA, vm.max_map_count "
        "and the commit limit must leave room",
    ),
    Trial(
        "LOCKED pages are resident at once",
        locked_pages,
        "Linux 5.14 or newer (MADV_POPULATE_WRITE), and memory for a page",
    ),
    Trial(
        "query answers",
        answers,
        "/proc must be mounted, and /proc/self/maps and /proc/self/smaps readable (a process that "
        "changed its user: PR_SET_DUMPABLE)",
    ),
    Trial(
        "buffers are made, mapped and frozen",
        buffers,
        "memfd_create(2) with seals must be allowed, and RLIMIT_NOFILE must leave four descriptors",
    ),
    Trial(
        "handles are sent and received, read-only",
        handles,
        "Unix sockets must be allowed, /proc/self/fd readable, and RLIMIT_NOFILE must leave eight "
        "descriptors",
    ),
)
"""The trials, in order."""

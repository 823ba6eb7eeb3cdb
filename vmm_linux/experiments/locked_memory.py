"""How much memory users can lock, and the effect of LOCKED beyond that."""

import os
import resource
from multiprocessing.connection import Connection
from typing import NamedTuple

from vmm_linux import VmmFlags
from vmm_linux.experiments import NOBODY, Run, become, equal, errno_of, libc, need, status

ORDER = 150
TITLE = "Locked memory and its limit"
QUESTION = "What does LOCKED do where RLIMIT_MEMLOCK allows less, and for whom does it hold?"
PREDICTION = """
    An ordinary user's LOCKED pins as much as RLIMIT_MEMLOCK allows, to the page; the rest is
    resident too, but not pinned. mlock(2) would pin nothing at all. Query says of each page whether
    it is pinned, and the kernel's VmLck agrees. With CAP_IPC_LOCK no limit applies. Decommit gives
    the allowance back, and a forked child has the memory but no lock on it.
"""
EXPLANATION = """
    Pinned memory stays with its process even when memory is short, so the kernel bounds how much
    of it each process may have. A call of mlock(2) that would go beyond is refused as a whole,
    with ENOMEM, or with EPERM where the limit is 0. LOCKED makes every page resident first, then
    pins the longest leading part that the kernel allows: a program gets memory that is there, and
    Query says how much of it will stay. The limit does not bind who has CAP_IPC_LOCK, as root
    usually has. A lock belongs to a mapping of one process: fork() copies the mapping without it.
"""

KIB, MIB = 1 << 10, 1 << 20
LOCKED = VmmFlags.READ | VmmFlags.WRITE | VmmFlags.COMMIT | VmmFlags.LOCKED
ORDINARY, PRIVILEGED = "ordinary user", "with CAP_IPC_LOCK"


class Found(NamedTuple):
    """A request for LOCKED memory under a limit: bytes, and mlock's answer."""

    pinned: int
    pinned_by_kernel: int
    resident: int
    after_decommit: int
    mlock: str


def measure(run: Run) -> None:
    """Request the same LOCKED memory under rising limits, without a privilege and with it."""
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    most = run.choose(quick=2 * MIB, full=16 * MIB)
    top = most if hard == resource.RLIM_INFINITY else min(most, hard)
    step = top // 4 // run.page * run.page
    need(step, f"RLIMIT_MEMLOCK lets this process set no limit above {hard} bytes")
    limits, size = [n * step for n in range(5)], 8 * step
    table = run.table(
        f"{size // KIB} KiB asked for as LOCKED",
        "who | RLIMIT_MEMLOCK [B] | pinned, by Query [B] | pinned, by VmLck [B] | resident [B]",
        "pinned after Decommit [B] | mlock(2) of as much",
    )
    plot = run.plot(f"{size // KIB} KiB asked for as LOCKED", "RLIMIT_MEMLOCK [B]", "pinned [B]")
    for who, claim in ((ORDINARY, claim_bound), (PRIVILEGED, claim_unbound)):
        with run.part(f"LOCKED, {who}"):
            rows = []
            for limit in run.steps(limits, who):
                with run.child(lock_under, run, who, limit, size) as child:
                    rows.append(Found(*child.receive()))
            for limit, row in zip(limits, rows, strict=True):
                table.add(who, limit, *row)
            plot.add(who, limits, [row.pinned for row in rows])
            claim(run, rows, limits, size)
    with run.part("A lock and fork()"):
        fork_a_lock(run)


def claim_bound(run: Run, rows: list[Found], limits: list[int], size: int) -> None:
    """Compare with the prediction for an ordinary user."""
    exceptions = sum(row.pinned != limit for row, limit in zip(rows, limits, strict=True))
    run.physical("LOCKED pins as much as the limit allows", exceptions, equal(0), "exceptions")
    least = min(row.resident for row in rows)
    run.physical("All of it is resident all the same", least, equal(size), "B")
    differences = sum(row.pinned != row.pinned_by_kernel for row in rows)
    run.physical("VmLck agrees with Query", differences, equal(0), "differences")
    answers = ", ".join(dict.fromkeys(row.mlock for row in rows))
    run.physical("mlock(2) refuses as a whole", answers, equal("EPERM, ENOMEM"))
    most = max(row.after_decommit for row in rows)
    run.physical("Decommit gives the allowance back", most, equal(0), "B")


def claim_unbound(run: Run, rows: list[Found], limits: list[int], size: int) -> None:
    """Compare with the prediction for a user with the privilege."""
    del limits
    least = min(row.pinned for row in rows)
    run.physical("With CAP_IPC_LOCK all is pinned under any limit", least, equal(size), "B")


def fork_a_lock(run: Run) -> None:
    """Check a locked page in a forked child."""
    with run.vmm.region(run.page, LOCKED) as region:
        need(region.query(0, smaps=False).locked, "this process may lock nothing")

        def look(connection: Connection) -> None:
            connection.send((region.query(0, smaps=False).resident, status("VmLck")))

        with run.child(look) as child:
            inherited, pinned = child.receive()
    run.physical("A forked child has the memory", inherited, equal(value=True))
    run.physical("It has no lock", pinned, equal(0), "B")


def lock_under(connection: Connection, run: Run, who: str, limit: int, size: int) -> None:
    """In a child: become that user, set the limit, and lock."""
    resource.setrlimit(
        resource.RLIMIT_MEMLOCK, (limit, resource.getrlimit(resource.RLIMIT_MEMLOCK)[1])
    )
    if who == ORDINARY and os.geteuid() == 0:
        try:
            become(NOBODY)
        except OSError as refusal:
            need(False, f"this process cannot become an ordinary user: {refusal.strerror}")
    answer = mlock(run, size)
    if who == PRIVILEGED:
        need(answer == "done", "this process has no CAP_IPC_LOCK")
    else:
        need(answer != "done", "this user has CAP_IPC_LOCK: no limit applies")
    with run.vmm.region(size, LOCKED) as region:
        pages = [region.query(place, smaps=False) for place in range(0, size, run.page)]
        by_kernel = status("VmLck")
        region.decommit()
        pinned = sum(bool(page.locked) for page in pages) * run.page
        there = sum(bool(page.resident) for page in pages) * run.page
        connection.send((pinned, by_kernel, there, status("VmLck"), answer))


def mlock(run: Run, size: int) -> str:
    """Lock so much memory by the system call alone: the name of its error, or "done"."""
    with run.vmm.region(size, LOCKED & ~VmmFlags.LOCKED) as region:
        try:
            libc("mlock", region.base, size)
        except OSError as refusal:
            return errno_of(refusal)
        return "done"

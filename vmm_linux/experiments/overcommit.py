"""Overcommit: the kernel's promises, a process's memory, and which requests fail."""

import contextlib
import os
import resource
import shutil
from collections.abc import Callable
from typing import NamedTuple

from vmm_linux import Limits, Region, VmmFlags
from vmm_linux import experiments as lab
from vmm_linux.errors import OutOfMemory

ORDER = 60
TITLE = "Overcommit"
QUESTION = "Who may be promised more memory than there is, who is refused, and when?"
PREDICTION = """
    A promise takes no memory; touching does. Addresses, read-only memory and MDL buffers are no
    promise, and to be had at any size. In mode 0, the usual, twice the memory of the machine is
    refused at once and granted piece by piece; fork() then fails if the pieces have become one
    mapping, not if they are several, and posix_spawn() does not. In mode 1 nothing is refused. In
    mode 2 whatever passes CommitLimit is refused: Commit, and Protect that makes pages writable.
"""
EXPLANATION = """
    Private writable memory is charged when it is committed, for each page may need memory of its
    own one day. vm.overcommit_memory says how strictly. Mode 0 asks of each request alone whether
    it is more than all memory and swap, and not what they come to together. fork() makes the
    request again for every mapping, so a large program may be unable to start a small one, unless
    by posix_spawn(), which copies nothing. Mode 2 adds them up: all promises together stay below
    CommitLimit, so the one that is too much fails in Commit, whosever the others are. Where
    promises can be broken, it shows at a touch that finds no memory: the kernel then ends some
    process, and no call fails. Memory of files (MDL buffers) is charged only at that touch.
"""

MIB = 1 << 20
READ = VmmFlags.READ
READ_WRITE = VmmFlags.READ | VmmFlags.WRITE
MODE = "vm.overcommit_memory"
TOO_MUCH = "in mode 2 it would take what all other processes may be promised"
PIECES = 8


class Answer(NamedTuple):
    """The result of a request: "OK" or an error's name, and bytes as the kernel counts them."""

    outcome: str
    charged: int | None = None
    resident: int | None = None


def measure(run: lab.Run) -> None:
    """Request twice the machine's memory, in many ways, and touch almost nothing of it."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    run.vmm.limits = Limits.unlimited()  # the kernel must answer, not the package's limits
    mode = lab.sysctl(MODE)
    lab.need(mode in MODES, f"{MODE} is {mode}, which this experiment does not know")
    # In some containers /proc/meminfo is not the kernel's.
    memory = max(lab.meminfo("MemTotal"), os.sysconf("SC_PHYS_PAGES") * run.page) + lab.meminfo(
        "SwapTotal"
    )
    limit = lab.meminfo("CommitLimit")
    least = max(memory, limit if mode == 2 else 0)
    size = 2 * least // (PIECES * run.page) * (PIECES * run.page)
    columns = f"{MODE} | memory and swap [B] | CommitLimit [B] | Committed_AS [B] | asked for [B]"
    machine = run.table("The machine, and what it is asked for", columns)
    machine.add(mode, memory, limit, lab.meminfo("Committed_AS"), size)
    ask(run, size, mode)
    with run.part("Promise and possession"):
        lab.need(mode != 2, TOO_MUCH)
        possession(run, size, memory)
    leave_out(run, mode)


def ask(run: lab.Run, size: int, mode: int) -> None:
    """Make every request, and compare its result with the prediction for this mode."""
    table = run.table("Requests", "request | outcome | charged [B] | resident [B]")
    for name, (request, *expected) in run.steps(list(REQUESTS.items()), "asking"):
        with run.part(name):
            due = expected[mode]
            lab.need(due, TOO_MUCH)
            try:
                answer = request(run, size)
            except OutOfMemory as refusal:  # during the preparation
                answer = Answer(refusal.rc.name)
            table.add(name, *answer)
            run.physical(f"In mode {mode}: {name}", answer.outcome, lab.equal(due))


def leave_out(run: lab.Run, mode: int) -> None:
    """Report a request that is not tried."""
    for other in (each for each in MODES if each != mode):
        with run.part(f"Mode {other}"):
            raise lab.NotObservable(
                f"{MODE} is {mode}; it belongs to the whole machine, and to its administrator"
            )
    with run.part("A touch that finds no memory"):
        raise lab.NotObservable("it would take all memory, and the kernel would end some process")


def outcome(call: Callable[..., object], *arguments: object) -> str:
    """OK, or the name of the error for lack of memory."""
    try:
        call(*arguments)
    except OutOfMemory as refusal:
        return refusal.rc.name
    except OSError as refusal:
        return lab.errno_of(refusal)
    return "OK"


def seen(said: str, region: Region) -> Answer:
    """An outcome, with the kernel's data about the region."""
    there = None
    with contextlib.suppress(lab.NotObservable):  # the outcome is useful without it
        there = lab.resident(region.base, region.size)
    return Answer(said, lab.charged(region), there)


def reserve(run: lab.Run, size: int) -> Answer:
    """Addresses alone."""
    with run.vmm.region(size) as region:
        return seen("OK", region)


def commit(run: lab.Run, size: int) -> Answer:
    """All of it in one call."""
    with run.vmm.region(size) as region:
        return seen(outcome(region.commit), region)


def commit_in_pieces(run: lab.Run, size: int) -> Answer:
    """All of it in calls for a part each."""
    with run.vmm.region(size) as region:
        return seen(outcome(pieces, region, size // PIECES), region)


def pieces(region: Region, each: int, gap: int = 0) -> None:
    """Commit pieces of this size, so far apart."""
    for number in range(PIECES):
        region.commit(number * (each + gap), each)


def commit_read_only(run: lab.Run, size: int) -> Answer:
    """All of it, read-only."""
    with run.vmm.region(size, READ) as region:
        return seen(outcome(region.commit), region)


def make_writable(run: lab.Run, size: int) -> Answer:
    """Committed as read-only, and then made writable."""
    with run.vmm.region(size, READ) as region:
        region.commit()
        return seen(outcome(region.protect, READ_WRITE), region)


def share(run: lab.Run, size: int) -> Answer:
    """An MDL buffer, mapped."""
    with run.vmm.mdl(size) as mdl, mdl.map() as region:
        return seen("OK", region)


def fork_one(run: lab.Run, size: int) -> Answer:
    """A child of a process with that much in one mapping."""
    with run.vmm.region(size) as region:
        pieces(region, size // PIECES)
        return seen(outcome(fork, run), region)


def fork_several(run: lab.Run, size: int) -> Answer:
    """A child of a process with that much in mappings that cannot merge."""
    with run.vmm.region(size + PIECES * run.page) as region:
        pieces(region, size // PIECES, run.page)
        return seen(outcome(fork, run), region)


def fork(run: lab.Run) -> None:
    """Make a child, which ends at once."""
    with run.child(lambda _: None) as child:
        child.wait()


def spawn(run: lab.Run, size: int) -> Answer:
    """Another program, from a process with that much in one mapping."""
    program = shutil.which("true")
    lab.need(program, "there is no program named true")
    with run.vmm.region(size) as region:
        pieces(region, size // PIECES)

        def start() -> None:
            os.waitpid(os.posix_spawn(str(program), ["true"], os.environ), 0)

        return seen(outcome(start), region)


NO_MEMORY = "OUT_OF_MEMORY"
NOT_TRIED = ""
REQUESTS: dict[str, tuple[Callable[[lab.Run, int], Answer], str, str, str]] = {
    "Reserve": (reserve, "OK", "OK", "OK"),
    "Commit, at once": (commit, NO_MEMORY, "OK", NO_MEMORY),
    "Commit, piece by piece": (commit_in_pieces, "OK", "OK", NOT_TRIED),
    "Commit, read-only": (commit_read_only, "OK", "OK", "OK"),
    "Protect, making that writable": (make_writable, NO_MEMORY, "OK", NO_MEMORY),
    "MdlCreate and MdlMap": (share, "OK", "OK", "OK"),
    "fork(), all in one mapping": (fork_one, "ENOMEM", "OK", NOT_TRIED),
    "fork(), in several mappings": (fork_several, "OK", "OK", NOT_TRIED),
    "posix_spawn(), all in one mapping": (spawn, "OK", "OK", NOT_TRIED),
}
"""The requests, and the expected results in the modes 0, 1 and 2."""
MODES = (0, 1, 2)


def possession(run: lab.Run, size: int, memory: int) -> None:
    """Commit piece by piece, then touch a little, and measure after each step."""
    each, few = size // PIECES, 16 * MIB
    columns = "promised [B] | touched [B] | charged [B] | resident [B]"
    table = run.table("Promise and possession", columns)
    with run.vmm.region(size) as region, lab.small_pages():
        lab.need(seen("", region).resident is not None, "/proc/self/pagemap may not be read")
        table.add(0, 0, *seen("", region)[1:])
        for number in range(PIECES):
            region.commit(number * each, each)
            table.add((number + 1) * each, 0, *seen("", region)[1:])
        promise = table.rows[-1]
        with region.view(0, few) as view:
            lab.touch(view)
        table.add(size, few, *seen("", region)[1:])
    plot = run.plot("Promise and possession", "promised [B]", "memory [B]")
    plot.add_columns(table, "promised", "charged", "resident")
    plot.add("memory and swap", [0, size], [memory, memory])
    run.physical("All that is promised is charged", promise[2], lab.equal(size), "B")
    run.physical("A promise takes no memory", promise[3], lab.equal(0), "B")
    run.physical("Touching takes just what is touched", table.rows[-1][3], lab.equal(few), "B")

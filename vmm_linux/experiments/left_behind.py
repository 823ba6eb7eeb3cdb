"""The memory that a killed process leaves behind."""

import contextlib
import ctypes
import errno
import mmap
import os
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from vmm_linux import VMM
from vmm_linux._tools.children import outlive_parent
from vmm_linux.experiments import NotObservable, Run, equal, libc, meminfo, need, sysctl, touch
from vmm_linux.inspect import Kind, sharing

ORDER = 140
TITLE = "What kill -9 leaves behind"
QUESTION = "Whose memory stays when its process is killed: memfd, /dev/shm, System V?"
PREDICTION = """
    SIGKILL gives nobody time to clean up. An MDL buffer, which is a memfd and has no name, goes
    with the last process that has it: at once, or when another one ends that was sent it. A file in
    /dev/shm and a System V segment stay, with all their memory, until somebody removes them or the
    machine is started anew. If the name was taken away while they were in use (unlink(), IPC_RMID),
    they go as the buffer does.
"""
EXPLANATION = """
    The kernel keeps memory as long as something leads to it. Descriptors and mappings are a
    process's, and the kernel takes them away however it ends; a name in a directory and a key in
    the table of segments are nobody's. What has a name needs somebody to remove it, and a crash is
    when nobody does. To take the name away early helps, once all who need it have come; what is
    passed on as a descriptor never needs one ("MDL, held" is what another process was sent, which
    ends last). This experiment has a process of its own that outlives all others, even if they are
    killed, and removes what they made: /dev/shm and ipcs -m show nothing of it.
"""

MIB = 1 << 20
SHM = Path("/dev/shm")  # noqa: S108 (the subject of the measurement)
IPC_CREAT, IPC_EXCL, IPC_RMID = 0o1000, 0o2000, 0


class Means(NamedTuple):
    """The means of a way to make memory: a file's name, a segment's key, a receiver."""

    file: Path
    key: int
    sock: socket.socket


class Made(NamedTuple):
    """The memory that was made: its kind, its number, and the object that keeps it."""

    kind: Kind
    number: int
    keeps: object = None


class Way(NamedTuple):
    """A way to make shareable memory, and how much of it should outlive kill -9."""

    make: Callable[[int, Means], Made]
    left: int


MOMENTS = ("alive", "after kill -9", "cleaned up")


class Looks(NamedTuple):
    """The findings at each moment: bytes by way, and the machine's growth."""

    found: list[dict[str, int]]
    growth: list[int]


def measure(run: Run) -> None:
    """Make memory in each way in a process of its own, kill them all, and measure."""
    wished = run.choose(quick=8 * MIB, full=16 * MIB)  # containers have 64 MiB in /dev/shm
    size = run.fitting(wished, times=len(WAYS))
    need(SHM.is_dir(), "there is no /dev/shm")
    ours, its = socket.socketpair()
    with ours, its:
        means = {
            way: Means(SHM / f"vmm-linux-{secrets.token_hex(8)}", free_key(), ours) for way in WAYS
        }
        with cleaner(run, list(means.values())) as clean:
            looks = make_kill_and_look(run, size, means, its, clean)
    tabulate(run, size, looks)
    claim(run, size, looks)


def make_kill_and_look(
    run: Run, size: int, means: dict[str, Means], sock: socket.socket, clean: Callable[[], None]
) -> Looks:
    """Kill all at once, because each measurement reads all processes of the machine."""
    before, looks = meminfo("Shmem"), Looks([], [])
    places: dict[str, Made] = {}
    victims = []

    def record() -> None:
        looks.found.append(sizes_of(places))
        looks.growth.append(meminfo("Shmem") - before)

    with contextlib.ExitStack() as at_end:
        holder = at_end.enter_context(run.child(hold, sock))
        for way in run.steps(list(WAYS), "making memory"):
            with run.part(way):
                victims.append(at_end.enter_context(run.child(live_on, way, size, means[way])))
                places[way] = victims[-1].receive()
        if HELD in places:
            holder.receive()
        record()
        for victim in victims:
            victim.kill()
        record()
        holder.kill()
        clean()
        record()
    return looks


def tabulate(run: Run, size: int, looks: Looks) -> None:
    """Show the findings."""
    columns = [f"{moment} [B]" for moment in MOMENTS]
    table = run.table(f"{size // MIB} MiB each", "way", *columns)
    plot = run.plot("Shared memory of a process that is killed", "way", "memory [B]")
    for way in looks.found[0]:
        table.add(way, *(each[way] for each in looks.found))
    plot.add_columns(table, "way", *MOMENTS)
    title = "All together, and all shared memory of the machine (Shmem of /proc/meminfo)"
    names = ("found of ours", "Shmem, more than before")
    table = run.table(title, "moment", *(f"{name} [B]" for name in names))
    for moment, found, growth in zip(MOMENTS, *looks, strict=True):
        table.add(moment, sum(found.values()), growth)


def claim(run: Run, size: int, looks: Looks) -> None:
    """Compare with the prediction."""
    alive, killed, cleaned = looks.found
    run.physical("Alive, all of it is there", sum(alive.values()), equal(len(alive) * size), "B")
    for way, left in killed.items():
        with run.part(way):
            forced = way == "System V" and sysctl("kernel.shm_rmid_forced", otherwise=0)
            need(not forced, "kernel.shm_rmid_forced has the kernel remove what is left")
            statement = f"{way}: left after kill -9"
            run.physical(statement, left / size, equal(WAYS[way].left), "of it")
    run.physical("In the end nothing is left", sum(cleaned.values()), equal(0), "B")


def sizes_of(places: dict[str, Made]) -> dict[str, int]:
    """The present bytes of each, in any process."""
    channels = {(each.kind, each.inode): each for each in sharing(all=True).channels}
    there = {way: channels.get((made.kind, made.number)) for way, made in places.items()}
    return {way: (channel.resident or 0) if channel else 0 for way, channel in there.items()}


def live_on(connection: Connection, way: str, size: int, means: Means) -> None:
    """In the process to be killed: make memory, report it, and wait."""
    try:
        made = WAYS[way].make(size, means)
    except OSError as refusal:
        raise NotObservable(f"making it failed: {refusal}") from None
    connection.send(made._replace(keeps=None))
    connection.recv()


def hold(connection: Connection, sock: socket.socket) -> None:
    """In another process: hold a buffer."""
    with VMM() as vmm:
        vmm.recv_handle(sock)
        connection.send("has it")
        connection.recv()


@contextlib.contextmanager
def cleaner(run: Run, means: Sequence[Means]) -> Iterator[Callable[[], None]]:
    """Start a process that removes all names on request, or after this one is killed."""
    with run.child(clean_up, means) as child:
        child.receive()

        def clean() -> None:
            with contextlib.suppress(OSError, EOFError):
                child.send("now")
                child.receive()

        try:
            yield clean
        finally:
            clean()


def clean_up(connection: Connection, means: Sequence[Means]) -> None:
    """Remove every name, on request or when this is the last process."""
    # It must outlive its parent and its group, to clean up after them.
    outlive_parent()
    os.setpgid(0, 0)
    connection.send("ready")
    with contextlib.suppress(EOFError):  # all who could have made something have ended
        connection.recv()
    for each in means:
        with contextlib.suppress(OSError):  # it was never made
            each.file.unlink()
        with contextlib.suppress(OSError):
            libc("shmctl", libc("shmget", each.key, 0, 0), IPC_RMID, 0)
    with contextlib.suppress(OSError):
        connection.send("done")


def buffer(size: int, means: Means) -> Made:
    """An MDL buffer, mapped."""
    del means
    mdl = VMM().mdl(size)
    region = mdl.map()
    touch(region)
    return Made(Kind.MEMFD, os.fstat(mdl.fileno()).st_ino, (mdl, region))


def held_buffer(size: int, means: Means) -> Made:
    """An MDL buffer, mapped, which another process has too."""
    mdl = VMM().mdl(size)
    touch(mdl.map())
    mdl.vmm.send_handle(means.sock, mdl.handle)
    return Made(Kind.MEMFD, os.fstat(mdl.fileno()).st_ino, mdl)


def file(size: int, means: Means) -> Made:
    """A file in /dev/shm, as shm_open(3) makes it, mapped."""
    fd = os.open(means.file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.posix_fallocate(fd, 0, size)
    return Made(Kind.DEV_SHM, os.fstat(fd).st_ino, mmap.mmap(fd, size))


def unlinked_file(size: int, means: Means) -> Made:
    """A file in /dev/shm, mapped, without its name."""
    made = file(size, means)
    means.file.unlink()
    return made


def segment(size: int, means: Means) -> Made:
    """A System V segment, attached."""
    number = libc("shmget", means.key, size, IPC_CREAT | IPC_EXCL | 0o600)
    ctypes.memset(libc("shmat", number, 0, 0), 1, size)
    return Made(Kind.SYSTEM_V, number)


def removed_segment(size: int, means: Means) -> Made:
    """A System V segment, attached, destroyed when no process has it attached."""
    made = segment(size, means)
    libc("shmctl", made.number, IPC_RMID, 0)
    return made


def free_key() -> int:
    """A key that no segment has."""
    while True:
        key = 1 + secrets.randbelow((1 << 31) - 1)
        try:
            libc("shmget", key, 0, 0)
        except OSError as refusal:
            if refusal.errno != errno.EACCES:
                return key


HELD = "MDL, held"
WAYS = {
    "MDL": Way(buffer, left=0),
    HELD: Way(held_buffer, left=1),
    str(SHM): Way(file, left=1),
    f"{SHM}, unlinked": Way(unlinked_file, left=0),
    "System V": Way(segment, left=1),
    "System V, removed": Way(removed_segment, left=0),
}

"""The limits of a read-only handle, attack by attack."""

import ctypes
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterable
from mmap import MAP_PRIVATE, MAP_SHARED, PAGESIZE, PROT_READ, PROT_WRITE
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

from vmm_linux import VMM, Rights, Seal, VmmFlags
from vmm_linux.experiments import NOBODY, Run, at_least, become, equal, errno_of, libc, need

ORDER = 90
TITLE = "Rights"
QUESTION = (
    "What can a process do with a read-only handle, and what changes the buffer all the same?"
)
PREDICTION = """
    The kernel keeps whoever has the descriptor to reading: EACCES for every way to a writable
    mapping, EBADF for writing, EINVAL for another size, EPERM for seals. The same user, and root,
    have ways around the descriptor: they change the file's mode and open it anew, or reach into the
    process that may write. Another user has none. Nothing changes a frozen buffer, nor a published
    one that nobody has a writable mapping of; one with a writer is changed through its writer.
"""
EXPLANATION = """
    A handle without MAP_WRITE travels as a descriptor that is open for reading. What may be done
    with a descriptor was settled when it was opened: a shared mapping made from it has no right to
    be made writable, neither itself nor its double, and /proc/self/mem, which ignores protection
    elsewhere, does not ignore that. But a descriptor is not the file. Whoever owns the file, as all
    processes of its maker's user do, may change its mode; whoever may trace a process can take its
    descriptors and write to its memory. So a read-only handle binds other users, and a seal, which
    lies on the file itself, binds everybody: F_SEAL_WRITE for ever, F_SEAL_FUTURE_WRITE all but
    those who had a writable mapping before ("published, writer": the sender kept one).
"""

SIZE = 2 * PAGESIZE
TEXT, MARK = b"the sender's own", b"the attacker was here"
RW = VmmFlags.READ | VmmFlags.WRITE
READ_ONLY = ~Rights(0) & ~Rights.MAP_EXECUTE & ~Rights.MAP_WRITE
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
MADV_REMOVE, MREMAP_MAYMOVE = 9, 1
SYS_PIDFD_GETFD = 438
F_SEAL_FUTURE_WRITE = 0x10

USERS = {"same user": (NOBODY, NOBODY), "another user": (NOBODY - 1, NOBODY), "root": (NOBODY, 0)}
"""The senders and the attackers. Only root can become another user."""


class State(NamedTuple):
    """The sender's protection of its buffer."""

    rights: Rights = READ_ONLY
    seals: Seal = Seal(0)
    writes: bool = True


UNSEALED = "no seal"
STATES = {
    UNSEALED: State(),
    "MAP_WRITE": State(rights=READ_ONLY | Rights.MAP_WRITE),
    "published, writer": State(seals=Seal.PUBLISH),
    "published": State(seals=Seal.PUBLISH, writes=False),
    "frozen": State(seals=Seal.FREEZE, writes=False),
}


class Target(NamedTuple):
    """The attacker's means: a descriptor, a mapping, and the place of the sender's own."""

    fd: int
    va: int
    sender: int
    senders_fd: int
    senders_va: int


# ---- the attacks --------------------------------------------------------------------------------


def mapped(fd: int, protection: int, flags: int = MAP_SHARED) -> int:
    """The address where all of a file is mapped."""
    return libc("mmap", 0, SIZE, protection, flags, fd, 0)


def scribble(va: int) -> None:
    """Make a mapping writable, and write to it."""
    libc("mprotect", va, SIZE, PROT_READ | PROT_WRITE)
    ctypes.memmove(va, MARK, len(MARK))


def reopen(path: str) -> None:
    """Open a file for writing, and write."""
    with Path(path).open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), MARK, 0)


def change_mode(target: Target) -> None:
    """Permit all users to write to the file first."""
    os.fchmod(target.fd, 0o666)
    reopen(f"/proc/self/fd/{target.fd}")


def take_descriptor(target: Target) -> None:
    """Make the kernel copy the sender's own descriptor."""
    pidfd = os.pidfd_open(target.sender)
    os.pwrite(libc("syscall", SYS_PIDFD_GETFD, pidfd, target.senders_fd, 0), MARK, 0)


def write_to(pid: int, va: int) -> None:
    """Write to a process's memory with the call made for that."""
    text = ctypes.create_string_buffer(MARK)
    here = (ctypes.c_size_t * 2)(ctypes.addressof(text), len(MARK))
    there = (ctypes.c_size_t * 2)(va, len(MARK))
    addresses = ctypes.addressof(here), ctypes.addressof(there)
    libc("process_vm_writev", pid, addresses[0], 1, addresses[1], 1, 0)


def write_to_file_of(pid: int, va: int) -> None:
    """Write to a process's memory through its file."""
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), MARK, va)


CHANGED, UNCHANGED = "changed", "unchanged"
"""The outcomes of an attack that are no errno."""
FORBIDDEN = {"EPERM", "EACCES", "ENOENT", "ENOSYS"}
"""The errors of sandboxes, security modules and hidepid."""


class Attack(NamedTuple):
    """An attack, and its predicted outcomes; by default the same for all attackers."""

    carry_out: Callable[[Target], object]
    same_user: str
    another_user: str = ""
    root: str = ""

    def predicted(self, user: str) -> str:
        """The predicted outcome for an attacker."""
        return {"another user": self.another_user, "root": self.root}.get(user) or self.same_user


ATTACKS = {
    "make a mapping writable (mprotect)": Attack(lambda t: scribble(t.va), "EACCES"),
    "map the descriptor writable (mmap)": Attack(
        lambda t: scribble(mapped(t.fd, PROT_READ | PROT_WRITE)), "EACCES"
    ),
    "double a mapping and make that writable (mremap)": Attack(
        lambda t: scribble(libc("mremap", t.va, 0, SIZE, MREMAP_MAYMOVE)), "EACCES"
    ),
    "write to the descriptor (write, pwrite)": Attack(lambda t: os.pwrite(t.fd, MARK, 0), "EBADF"),
    "shrink the memory (ftruncate)": Attack(lambda t: os.ftruncate(t.fd, 0), "EINVAL"),
    "grow the memory (ftruncate)": Attack(lambda t: os.ftruncate(t.fd, 2 * SIZE), "EINVAL"),
    "seal the memory (F_ADD_SEALS)": Attack(
        lambda t: fcntl.fcntl(t.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE), "EPERM"
    ),
    "punch a hole (fallocate)": Attack(
        lambda t: libc("fallocate", t.fd, PUNCH_HOLE, 0, SIZE), "EBADF"
    ),
    "punch a hole through a mapping (MADV_REMOVE)": Attack(
        lambda t: libc("madvise", t.va, SIZE, MADV_REMOVE), "EACCES"
    ),
    "open the descriptor for writing (/proc/self/fd)": Attack(
        lambda t: reopen(f"/proc/self/fd/{t.fd}"), "EACCES", root=CHANGED
    ),
    "open the sender's descriptor for writing (/proc/PID/fd)": Attack(
        lambda t: reopen(f"/proc/{t.sender}/fd/{t.senders_fd}"), "EACCES", root=CHANGED
    ),
    "change the mode, then open for writing (fchmod)": Attack(
        change_mode, CHANGED, another_user="EPERM"
    ),
    "take the sender's descriptor (pidfd_getfd)": Attack(
        take_descriptor, CHANGED, another_user="EPERM"
    ),
    "write into the sender's mapping (process_vm_writev)": Attack(
        lambda t: write_to(t.sender, t.senders_va), CHANGED, another_user="EPERM"
    ),
    "write into the sender's mapping (/proc/PID/mem)": Attack(
        lambda t: write_to_file_of(t.sender, t.senders_va), CHANGED, another_user="EACCES"
    ),
    "write into the own mapping (process_vm_writev)": Attack(
        lambda t: write_to(os.getpid(), t.va), "EFAULT"
    ),
    "write into the own mapping (/proc/self/mem)": Attack(
        lambda t: write_to_file_of(os.getpid(), t.va), "EIO"
    ),
    "write to a private copy (MAP_PRIVATE)": Attack(
        lambda t: scribble(mapped(t.fd, PROT_READ, MAP_PRIVATE)), UNCHANGED
    ),
}


# ---- sender and receiver ------------------------------------------------------------------------


def withstand(
    connection: Connection, ends: tuple[socket.socket, socket.socket], user: int, state: State
) -> None:
    """In the sender: make a buffer for each attack, and report the outcome."""
    sock, its = ends
    its.close()
    become(user)
    for _ in ATTACKS:
        with VMM() as vmm:
            handle = vmm.mdl_create(SIZE, RW)
            va = vmm.mdl_map(handle, 0, SIZE, 0, RW)
            vmm.write(va, TEXT)
            if not state.writes:
                vmm.free(va, SIZE)
                va = vmm.mdl_map(handle, 0, SIZE, 0, VmmFlags.READ)
            if state.seals:
                vmm.mdl_seal(handle, state.seals)
            fd = vmm.handle_fileno(handle)
            before = contents_of(fd)
            vmm.send_handle(sock, handle, state.rights)
            sock.send(json.dumps([os.getpid(), fd, va]).encode())
            answer = sock.recv(100).decode()
            connection.send(CHANGED if contents_of(fd) != before else answer)
            os.close(fd)


def contents_of(fd: int) -> tuple[bytes, int, int]:
    """The properties of a buffer that an attack may change: contents, size, seals."""
    return os.pread(fd, 4 * SIZE, 0), os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)


def attack(connection: Connection, ends: tuple[socket.socket, socket.socket], user: int) -> None:
    """In the receiver: attack each received buffer, and send the errno to the sender."""
    del connection
    its, sock = ends
    its.close()
    become(user)
    for each in ATTACKS.values():
        with VMM() as vmm:
            fd = vmm.handle_fileno(vmm.recv_handle(sock))
        target = Target(fd, mapped(fd, PROT_READ), *json.loads(sock.recv(100)))
        answer = UNCHANGED
        try:
            each.carry_out(target)
        except OSError as refusal:
            answer = errno_of(refusal)
        os.close(fd)
        sock.send(answer.encode())


def outcomes(run: Run, state: State, sender: int, attacker: int) -> dict[str, str]:
    """The outcomes of all attacks of a user on another's buffers."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with run.child(withstand, ends, sender, state) as defender, run.child(attack, ends, attacker):
        for end in ends:
            end.close()
        return {name: defender.receive() for name in ATTACKS}


# ---- outcomes -----------------------------------------------------------------------------------

Found = dict[tuple[str, str], dict[str, str]]
"""The outcome of every attack, by state and by attacker."""


def measure(run: Run) -> None:
    """Run every attack by every attacker in every state."""
    me, others = os.geteuid(), may_become_others(run)
    need(others or me != 0, "root may do anything, and cannot become another user here")
    users = USERS if others else {"same user": (me, me)}
    found: Found = {}
    for state in run.steps(list(STATES), "attacking"):
        for user, ids in users.items():
            found[state, user] = outcomes(run, STATES[state], *ids)

    tabulate(run, "A read-only handle, no seal", found, {user: (UNSEALED, user) for user in USERS})
    states = {state: (state, "same user") for state in STATES if state != UNSEALED}
    tabulate(run, "The same user, with another handle or seal", found, states)
    plot = run.plot("Attacks that change the buffer", "state", "attacks")
    for user in users:
        plot.add(user, list(STATES), [len(having(found[state, user])) for state in STATES])
    for user in USERS:
        with run.part(f"No seal, {user}"):
            need(user in users, "only root can become another user")
            claim_of_user(run, user, found[UNSEALED, user])
    claim_of_states(run, found)


def may_become_others(run: Run) -> bool:
    """Whether this process may change its user."""
    with run.child(lambda _: become(NOBODY)) as child:
        return os.geteuid() != NOBODY and child.wait() == 0


def tabulate(run: Run, title: str, found: Found, columns: dict[str, tuple[str, str]]) -> None:
    """A table with a row for each attack."""
    table = run.table(title, "attack", *columns)
    for name in ATTACKS:
        table.add(name, *(found.get(case, {}).get(name) for case in columns.values()))


def having(came: dict[str, str]) -> set[str]:
    """The attacks that change the buffer."""
    return {name for name in came if came[name] == CHANGED}


def listed(names: Iterable[str]) -> str:
    """A list of attacks in a text."""
    return "; ".join(names) or "none"


def claim_of_user(run: Run, user: str, came: dict[str, str]) -> None:
    """Compare with the prediction for a user and a buffer without a seal."""
    predicted = {name: attack.predicted(user) for name, attack in ATTACKS.items()}
    surprises = listed(having(came) - having(predicted))
    run.physical(f"No seal, {user}: attacks that succeed unexpectedly", surprises, equal("none"))
    with run.part(f"No seal, {user}: the other outcomes"):
        others = {name: came[name] for name in ATTACKS if came[name] != predicted[name]}
        stricter = [name for name in others if others[name] in FORBIDDEN]
        need(not stricter, f"this system forbids more than Linux by itself: {listed(stricter)}")
        differing = listed(f"{name}: {outcome}" for name, outcome in others.items())
        run.physical(f"No seal, {user}: outcomes not as predicted", differing, equal("none"))


def claim_of_states(run: Run, found: Found) -> None:
    """Compare with the prediction for other handles and for seals, for every attacker."""
    gained = having(found["MAP_WRITE", "same user"]) - having(found[UNSEALED, "same user"])
    # Newer kernels have a seventh: MADV_REMOVE accepts a mapping that could become writable.
    statement = "With MAP_WRITE: attacks that succeed besides"
    run.physical(statement, len(gained), at_least(6), "attacks")
    for state, through in {
        "published, writer": {name for name in ATTACKS if "the sender's mapping" in name},
        "published": set[str](),
        "frozen": set[str](),
    }.items():
        changed = {name for (of, _), came in found.items() if of == state for name in having(came)}
        but = " but through the writer" if through else ""
        statement = f"{state.capitalize()}: attacks that succeed{but}"
        run.physical(statement, listed(changed - through), equal("none"))

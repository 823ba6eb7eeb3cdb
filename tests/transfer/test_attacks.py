"""A receiver with a read-only handle attacks the buffer, without the package.

Two processes are forked before there is any buffer, and become the users that they are to be. The
sender makes a buffer for each attack, sends a handle without MAP_WRITE, lets the other one attack,
and looks whether its buffer is what it was. The functions that are not tests run there.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import signal
import socket
import time
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import kernel_oracle as kernel
from children import NOBODY, TESTS_IMPORTABLE, run_child
from constants import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, READ_ONLY, RW
from kernel_oracle import PAGE, PROT_READ, PROT_WRITE
from readme import rows_of
from vmm_linux import VMM, Rights, Seal, VmmFlags
from vmm_linux._tools.children import die_with_parent
from vmm_linux.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Callable

SIZE = 2 * PAGE
#: Seconds; a lease lasts 45.
PATIENCE = 20
TEXT, MARK = b"the sender's own", b"the attacker was here"

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_PTRACER = 1, 4, 0x59616D61
MADV_REMOVE, MREMAP_MAYMOVE = 9, 1
SYS_PIDFD_GETFD = 438
F_SEAL_SEAL, F_SEAL_FUTURE_WRITE = 1, 0x10

#: Who sends and who attacks. Only root can become others.
USERS = {"same user": (NOBODY, NOBODY), "another user": (NOBODY - 1, NOBODY), "root": (NOBODY, 0)}
if os.geteuid() != 0:
    USERS = {"same user": (os.geteuid(), os.geteuid())}

#: What the sender did before it sent the handle: its seals, and whether it still has a writable
#: mapping of its own.
STATES = {
    "unsealed": (Seal(0), True),
    "published": (Seal.PUBLISH, False),
    "published, and its sender goes on writing": (Seal.PUBLISH, True),
    "frozen": (Seal.FREEZE, False),
}


# ---- the attacks


class Target(NamedTuple):
    """What an attacker has and knows."""

    fd: int
    va: int
    sender: int
    senders_fd: int
    senders_va: int


def system(result: int) -> int:
    """What a call of the C library returned; -1 is an OSError."""
    if result in {-1, 2**64 - 1}:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def map_file(fd: int, protection: int) -> int:
    """Map a descriptor, shared."""
    return system(kernel.libc.mmap(None, SIZE, protection, kernel.MAP_SHARED, fd, 0))


def scribble(va: int) -> None:
    """Make a mapping writable, and write to it."""
    kernel.protect(va, SIZE, PROT_READ | PROT_WRITE)
    ctypes.memmove(va, MARK, len(MARK))


def punch(fd: int) -> None:
    """Take the first page out of a file."""
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    system(kernel.libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(PAGE)))


def write(fd: int) -> None:
    """Write to a file in two ways."""
    with contextlib.suppress(OSError):
        os.write(fd, MARK)
    os.pwrite(fd, MARK, 0)


def use(fd: int) -> None:
    """Do all the harm that a descriptor open for writing may allow."""
    for way in (
        write,
        punch,
        lambda fd: scribble(map_file(fd, PROT_READ)),
        lambda fd: scribble(map_file(fd, PROT_READ | PROT_WRITE)),
        lambda fd: os.ftruncate(fd, 0),
        lambda fd: os.ftruncate(fd, 2 * SIZE),
    ):
        with contextlib.suppress(OSError):
            way(fd)


def reopen(path: str) -> None:
    """Open a file for writing, and use that."""
    use(os.open(path, os.O_RDWR))


def change_mode_and_reopen(target: Target) -> None:
    """Let everybody read and write the file first."""
    os.fchmod(target.fd, 0o666)
    reopen(f"/proc/self/fd/{target.fd}")


def double(target: Target) -> None:
    """Have the kernel make a second mapping of the first one's pages."""
    kernel.libc.mremap.restype = ctypes.c_void_p
    old = ctypes.c_void_p(target.va)
    scribble(system(kernel.libc.mremap(old, ctypes.c_size_t(0), SIZE, MREMAP_MAYMOVE)))


def remove(target: Target) -> None:
    """Take the first page out of the file, through the mapping."""
    system(kernel.libc.madvise(ctypes.c_void_p(target.va), ctypes.c_size_t(PAGE), MADV_REMOVE))


def take_descriptor(target: Target) -> None:
    """Have the kernel copy the sender's own descriptor."""
    pidfd = os.pidfd_open(target.sender)
    use(system(kernel.libc.syscall(SYS_PIDFD_GETFD, pidfd, target.senders_fd, 0)))


class Piece(ctypes.Structure):
    """``struct iovec``."""

    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def write_to_sender(target: Target) -> None:
    """Write where the sender has mapped the buffer."""
    text = ctypes.create_string_buffer(MARK)
    here = Piece(ctypes.addressof(text), len(MARK))
    there = Piece(target.senders_va, len(MARK))
    one = ctypes.c_ulong(1)
    system(
        kernel.libc.process_vm_writev(
            target.sender, ctypes.byref(here), one, ctypes.byref(there), one, ctypes.c_ulong(0)
        )
    )


def write_to_sender_s_memory(target: Target) -> None:
    """Write there through the file of its memory, which ignores protection where it can."""
    with Path(f"/proc/{target.sender}/mem").open("r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), MARK, target.senders_va)


class Attack(NamedTuple):
    """What is done, and who succeeds against a buffer that is not sealed."""

    carry_out: Callable[[Target], object]
    succeeds: frozenset[str] = frozenset()


OWNERS = frozenset({"same user", "root"})
ATTACKS = {
    "make a mapping writable (mprotect)": Attack(lambda t: scribble(t.va)),
    "map the descriptor writable (mmap)": Attack(
        lambda t: scribble(map_file(t.fd, PROT_READ | PROT_WRITE))
    ),
    "double a mapping and make that writable (mremap)": Attack(double),
    "write to the descriptor (write, pwrite)": Attack(lambda t: write(t.fd)),
    "shrink the memory (ftruncate)": Attack(lambda t: os.ftruncate(t.fd, 0)),
    "grow the memory (ftruncate)": Attack(lambda t: os.ftruncate(t.fd, 2 * SIZE)),
    "seal the memory (F_ADD_SEALS)": Attack(
        lambda t: fcntl.fcntl(t.fd, fcntl.F_ADD_SEALS, F_SEAL_SEAL | F_SEAL_FUTURE_WRITE)
    ),
    "punch a hole (fallocate)": Attack(lambda t: punch(t.fd)),
    "punch a hole through a mapping (MADV_REMOVE)": Attack(remove),
    "open the descriptor for writing (/proc/self/fd)": Attack(
        lambda t: reopen(f"/proc/self/fd/{t.fd}"), frozenset({"root"})
    ),
    "open the sender's descriptor for writing (/proc/PID/fd)": Attack(
        lambda t: reopen(f"/proc/{t.sender}/fd/{t.senders_fd}"), frozenset({"root"})
    ),
    "change the mode, then open for writing (fchmod)": Attack(change_mode_and_reopen, OWNERS),
    "take the sender's descriptor (pidfd_getfd)": Attack(take_descriptor, OWNERS),
    "write into the sender's mapping (process_vm_writev)": Attack(write_to_sender, OWNERS),
    "write into the sender's mapping (/proc/PID/mem)": Attack(write_to_sender_s_memory, OWNERS),
}
#: The attacks that make the sender's process write.
THROUGH_THE_SENDER = [name for name in ATTACKS if "into the sender's mapping" in name]
#: What not even a writable handle allows.
SIZES = [name for name in ATTACKS if "ftruncate" in name]


# ---- the two processes


def become(user: int) -> None:
    """Be this user from now on, as a program that this user started would be."""
    if user != os.geteuid():
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    kernel.libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
    kernel.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # Where Yama is, a process may be traced by its children only if it says so.
    kernel.libc.prctl(PR_SET_PTRACER, ctypes.c_ulong(2**64 - 1), 0, 0, 0)


def carry_out(sender: int, attacker: int, seals: int, writes: bool, rights: int) -> None:
    """Have every attack made by one user on buffers of another, and print which ones succeed."""
    import json
    import os
    import socket

    from test_attacks import ATTACKS, attack, become, withstand
    from vmm_linux import VMM

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        ours.close()
        become(attacker)
        with VMM() as vmm:
            for name in ATTACKS:
                attack(vmm, theirs, name)
        os._exit(0)
    theirs.close()
    become(sender)
    with ours, VMM() as vmm:
        harm = {name: withstand(vmm, ours, seals, writes, rights) for name in ATTACKS}
    assert os.waitpid(child, 0)[1] == 0
    print(json.dumps(harm))


def attack(vmm: VMM, sock: socket.socket, name: str) -> None:
    """Receive a handle, and make one attack with the descriptor that came with it."""
    before = kernel.descriptors()
    vmm.recv_handle(sock)
    (fd,) = kernel.descriptors().keys() - before.keys()
    target = Target(fd, map_file(fd, PROT_READ), *json.loads(sock.recv(1000)))
    try:
        ATTACKS[name].carry_out(target)
        answer = "done"
    except OSError as refusal:
        answer = str(refusal)
    sock.send(answer.encode())


def withstand(vmm: VMM, sock: socket.socket, seals: int, writes: bool, rights: int) -> list[str]:
    """Have a buffer attacked, and tell what is not as it was, and what the attacker says."""
    before = kernel.descriptors()
    handle = vmm.mdl_create(SIZE, RW)
    (fd,) = kernel.descriptors().keys() - before.keys()
    va = vmm.mdl_map(handle, 0, SIZE, 0, RW)
    vmm.write(va, TEXT * (SIZE // len(TEXT)))
    if not writes:
        vmm.free(va, SIZE)
        va = vmm.mdl_map(handle, 0, SIZE, 0, VmmFlags.READ)
    if seals:
        vmm.mdl_seal(handle, seals)
    looks = look(fd)
    vmm.send_handle(sock, handle, rights)
    sock.send(json.dumps([os.getpid(), fd, va]).encode())
    answer = sock.recv(1000).decode()
    return [*(name for name, value in look(fd).items() if value != looks[name]), answer]


def look(fd: int) -> dict[str, Any]:
    """All of a buffer that an attack may change."""
    return {
        "contents": os.pread(fd, 4 * SIZE, 0),
        "size": os.fstat(fd).st_size,
        "seals": fcntl.fcntl(fd, fcntl.F_GET_SEALS),
    }


@cache
def harm_done(user: str, state: str, rights: Rights = READ_ONLY) -> dict[str, list[str]]:
    """What every attack changed, and what the attacker said, with two processes of their own."""
    seals, writes = STATES[state]
    child = run_child(
        carry_out, *USERS[user], int(seals), writes, int(rights), environment=TESTS_IMPORTABLE
    )
    assert (child.returncode, child.stderr) == (0, "")
    harm: dict[str, list[str]] = json.loads(child.stdout)
    return harm


# ---- the tests


@pytest.mark.parametrize("user", USERS)
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_succeeds_or_is_refused_as_the_table_says(
    name: str, state: str, user: str
) -> None:
    *changed, answer = harm_done(user, state)[name]
    allowed = ATTACKS[name].succeeds if state == "unsealed" else frozenset()
    if "goes on writing" in state and name in THROUGH_THE_SENDER:
        # Not the buffer gives way: its writer is made to write.
        allowed = OWNERS
    assert bool(changed) == (user in allowed), (changed, answer)


def test_nothing_succeeds_against_what_is_published_or_frozen() -> None:
    for user in USERS:
        for state in ("published", "frozen"):
            harm = {name: changed for name, (*changed, _) in harm_done(user, state).items()}
            assert harm == {name: [] for name in ATTACKS}


def test_what_a_read_only_handle_prevents_works_with_a_writable_one() -> None:
    everything = ~Rights(0) & ~Rights.MAP_EXECUTE
    harm = harm_done("same user", "unsealed", everything)
    prevented = [name for name, attack in ATTACKS.items() if not attack.succeeds]
    assert [name for name in prevented if not harm[name][:-1]] == SIZES


def test_the_readme_lists_what_succeeds() -> None:
    users = ["same user", "another user", "root"]
    rows = [
        [name, *("succeeds" if user in succeeds else "refused" for user in users)]
        for name, (_, succeeds) in ATTACKS.items()
    ]
    assert rows_of("Attacks") == rows


def seal_what_is_reopened(state: int) -> None:
    """As the same user, reopen a buffer that was sent read-only, and seal it for good."""
    import fcntl
    import os

    import kernel_oracle as kernel
    import test_attacks as t
    from constants import RW
    from vmm_linux import VMM
    from vmm_linux.errors import NoCapability

    with VMM() as vmm:
        before = kernel.descriptors()
        handle = vmm.mdl_create(t.SIZE, RW)
        (fd,) = kernel.descriptors().keys() - before.keys()
        if state:
            vmm.mdl_seal(handle, state)
        looks = t.look(fd)
        os.fchmod(fd, 0o666)
        other = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        fcntl.fcntl(other, fcntl.F_ADD_SEALS, t.F_SEAL_SEAL)
        os.close(other)
        assert {**t.look(fd), "seals": 0} == {**looks, "seals": 0}
        try:
            vmm.mdl_seal(handle, 3)
        except NoCapability as refusal:
            print(refusal.rc)


@pytest.mark.parametrize("state", [Seal(0), Seal.PUBLISH])
def test_whoever_can_open_a_buffer_for_writing_can_keep_its_maker_from_sealing_it(
    state: Seal,
) -> None:
    child = run_child(seal_what_is_reopened, int(state), nobody=True, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "rcNoCapability\n", "")


def pass_on_and_reopen(second_user: int, third_user: int) -> None:
    """Send a buffer to another user, to write; who sends it to a third one, to read."""
    import os
    import socket

    from constants import READ_ONLY, RW
    from kernel_oracle import PAGE
    from test_attacks import become, reopen_what_comes
    from vmm_linux import VMM

    first, second = (socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(2))
    with first[0], first[1], second[0], second[1]:
        writer = os.fork()
        if writer == 0:
            become(second_user)
            with VMM() as vmm:
                vmm.send_handle(second[0], vmm.recv_handle(first[1]), READ_ONLY)
            os._exit(0)
        reader = os.fork()
        if reader == 0:
            become(third_user)
            reopen_what_comes(second[1])
            os._exit(0)
        with VMM() as vmm:
            vmm.send_handle(first[0], vmm.mdl_create(PAGE, RW))
            assert os.waitpid(writer, 0)[1] == os.waitpid(reader, 0)[1] == 0


def reopen_what_comes(sock: socket.socket) -> None:
    """Receive a read-only handle, and print what opening its descriptor for writing gives."""
    with VMM() as vmm:
        before = kernel.descriptors()
        vmm.recv_handle(sock)
        (fd,) = kernel.descriptors().keys() - before.keys()
        try:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
        except PermissionError:
            print("refused", flush=True)
        else:
            print("opened", flush=True)


def test_another_user_cannot_open_for_writing_what_a_third_one_passed_on() -> None:
    users = USERS.get("another user", USERS["same user"])
    child = run_child(pass_on_and_reopen, *users, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "refused\n", "")


# ---- against the receiver


def test_the_maker_of_a_buffer_cannot_keep_its_receiver_waiting_by_a_lease() -> None:
    ours, theirs = socket.socketpair()
    maker = hold_a_lease(theirs)
    with ours, theirs, VMM() as vmm:
        handle = vmm.recv_handle(ours)
        assert ours.recv(6) == b"leased"
        before = kernel.descriptors()
        began = time.monotonic()
        for call in (
            lambda: vmm.mdl_map(handle, 0, SIZE, 0, VmmFlags.READ),
            lambda: vmm.send_handle(ours, handle, Rights.MAP_READ),
            lambda: vmm.handle_fileno(handle, Rights.MAP_READ),
        ):
            with pytest.raises(Busy, match="lease"):
                call()
        assert time.monotonic() - began < PATIENCE
        assert kernel.descriptors() == before
        os.kill(maker, signal.SIGKILL)
        os.waitpid(maker, 0)
        vmm.mdl_map(handle, 0, SIZE, 0, VmmFlags.READ)


def hold_a_lease(sock: socket.socket) -> int:
    """Fork a process that sends a buffer and holds a lease on it until it dies."""
    parent = os.getpid()
    child = os.fork()
    if child != 0:
        return child
    try:
        die_with_parent()
        signal.signal(signal.SIGIO, signal.SIG_IGN)  # the kernel's wish to have it back
        vmm = VMM()
        handle = vmm.mdl_create(SIZE, RW)
        vmm.send_handle(sock, handle)
        fd = vmm.handle_fileno(handle)
        os.fchmod(fd, 0o600)
        leased = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        fcntl.fcntl(leased, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        sock.send(b"leased")
        while os.getppid() == parent:
            signal.pause()
    finally:
        os._exit(1)

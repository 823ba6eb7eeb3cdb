"""The program closes descriptors of this package, and others get their numbers.

A program that becomes a daemon closes all that is open; others close too much, or put a file under
a number with ``dup2``. What the package keeps is then somebody else's: it is not used, not sent and
not closed. What is mapped goes on. Each test is a process of its own, whose descriptors it spends.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import kernel_oracle as kernel
from children import in_own_process
from constants import COMMITTED, RW
from descriptors import a_memfd
from kernel_oracle import PAGE
from onlookers import wait_until
from vmm_linux import VMM, Event, Mdl, Rights, Seal, VmmFlags
from vmm_linux._core.kernel import Feature, without
from vmm_linux.audit import Audit
from vmm_linux.errors import InvalidOperation, SecurityDisallow
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm_linux import Handle

CONTENTS = b"the program's own"
CLOSED = "the program closed"


# ---- what happens to descriptors -----------------------------------------------------------------


def open_numbers() -> set[int]:
    """The descriptors of this process."""
    return set(kernel.descriptors())


def refused(use: Callable[[], object], name: str, why: str = CLOSED) -> None:
    """Hold that a use is refused in words."""
    refusal = None
    try:
        use()
    except InvalidOperation as problem:
        refusal = problem
    assert refusal is not None, name
    assert why in refusal.message, (name, refusal)


class Strangers:
    """The program's own files, under the numbers that the package believes to be its own."""

    def __init__(self, numbers: set[int], make: Callable[[], int]) -> None:
        self.files: dict[int, tuple[int, int, int]] = {}
        for number in sorted(numbers):
            fd = make()
            os.dup2(fd, number)
            if fd != number:
                os.close(fd)
            self.files[number] = self.looks(number)

    @staticmethod
    def looks(number: int) -> tuple[int, int, int]:
        """Which file it is, its size, its flags."""
        status = os.fstat(number)
        return status.st_ino, status.st_size, fcntl.fcntl(number, fcntl.F_GETFL)

    def check(self) -> None:
        """Each is open, and as it was."""
        assert {number: self.looks(number) for number in self.files} == self.files
        for number, (_, size, _) in self.files.items():
            if size:
                assert os.pread(number, len(CONTENTS), 0) == CONTENTS


def a_file() -> int:
    """An ordinary file with contents, as large as a buffer's memory."""
    with tempfile.TemporaryFile() as file:
        file.write(CONTENTS)
        file.truncate(8 * PAGE)
        return os.dup(file.fileno())


def a_memory_file() -> int:
    """A memfd that passes for a buffer's, but that it is another."""
    fd = a_memfd(8 * PAGE)
    os.pwrite(fd, CONTENTS, 0)
    return fd


def a_socket() -> int:
    """One end of a pair, the other of which is closed."""
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def an_eventfd() -> int:
    """An eventfd, which has the inode of all eventfds."""
    return os.eventfd(0, os.EFD_NONBLOCK)


def another_process() -> int:
    """What the kernel says about the mappings of another process."""
    return os.open(f"/proc/{os.getppid()}/maps", os.O_RDONLY)


STRANGERS = {
    "a file": a_file,
    "a memory file": a_memory_file,
    "a socket": a_socket,
    "an eventfd": an_eventfd,
    "another process": another_process,
}


# ---- buffers -------------------------------------------------------------------------------------


def uses_of(vmm: VMM, handle: Handle, sock: socket.socket) -> dict[str, Callable[[], object]]:
    """Every call that needs the descriptor of a buffer."""
    return {
        "map": lambda: vmm.mdl_map(handle, 0, PAGE, 0, RW),
        "map to read": lambda: vmm.mdl_map(handle, 0, PAGE, 0, VmmFlags.READ),
        "map locked": lambda: vmm.mdl_map(handle, 0, PAGE, 0, RW | VmmFlags.LOCKED),
        "clone": lambda: vmm.mdl_clone(handle, 0, PAGE),
        "publish": lambda: vmm.mdl_seal(handle, Seal.PUBLISH),
        "freeze": lambda: vmm.mdl_seal(handle, Seal.FREEZE),
        "info": lambda: vmm.handle_info(handle),
        "send": lambda: vmm.send_handle(sock, handle),
        "send to read": lambda: vmm.send_handle(sock, handle, Rights.MAP_READ),
        "fileno": lambda: vmm.handle_fileno(handle),
        "fileno to read": lambda: vmm.handle_fileno(handle, Rights.MAP_READ),
    }


def refuse_all(vmm: VMM, handle: Handle, *, segments: bool) -> None:
    """Every use is refused in words, and leaves nothing behind."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for name, use in uses_of(vmm, handle, ours).items():
            before = open_numbers(), vmm.usage()
            refused(use, name, "in segments" if segments and "fileno" in name else CLOSED)
            assert (open_numbers(), vmm.usage()) == before, name
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
    assert vmm.mdl_get_size(handle) == 8 * PAGE


def lose_buffers(stranger: str | None) -> None:
    """Buffers of every kind lose their descriptors to files of the program's."""
    before = open_numbers()
    vmm = VMM()
    whole = vmm.mdl_create(8 * PAGE, RW)
    in_segments = vmm.mdl_create(8 * PAGE, RW, 2 * PAGE)
    received = vmm.handle_from_fd(fd := a_memfd(8 * PAGE))
    os.close(fd)
    clone = vmm.mdl_clone(in_segments, 0, 8 * PAGE)
    maps = {}
    for text, handle in enumerate((whole, in_segments, received, clone)):
        # Mapped to read too, so that there is a read-only description of each.
        vmm.mdl_map(handle, 0, 8 * PAGE, 0, VmmFlags.READ)
        maps[handle] = vmm.mdl_map(handle, 0, 8 * PAGE, 0, RW)
        vmm.write(maps[handle], b"old %d" % text)
    kept = open_numbers() - before
    assert len(kept) == 2 + 2 * 4 + 1 + 2 + 1
    for number in kept:
        os.close(number)
    strangers = Strangers(kept if stranger else set(), STRANGERS[stranger or "a file"])
    refuse_all(vmm, whole, segments=False)
    refuse_all(vmm, received, segments=False)
    refuse_all(vmm, in_segments, segments=True)
    new = vmm.mdl(8 * PAGE)
    new.map().write(b"NEW")
    # A copy and the end of a handle need no descriptor. What is mapped goes on.
    vmm.handle_close(vmm.handle_copy(whole, Rights.MAP_READ))
    assert vmm.read(maps[whole], 5) == b"old 0"
    assert vmm.read(maps[received], 5) == b"old 2"
    assert vmm.read(maps[in_segments], 5) == b"old 3", "the clone is the same memory"
    info = vmm.query(maps[whole])
    assert (info.kind.name, info.resident, info.mdl_offset) == ("MDL", True, 0)
    vmm.free(maps[received], 8 * PAGE)
    for handle in (whole, in_segments, received, clone):
        vmm.handle_close(handle)
    assert new.map().read(3) == b"NEW"
    vmm.close()
    strangers.check()


@pytest.mark.parametrize("stranger", [None, "a file", "a memory file", "a socket"])
def test_buffers_whose_descriptors_the_program_took_are_neither_used_nor_closed(
    stranger: str | None,
) -> None:
    in_own_process(lose_buffers, stranger)


def lose_one_at_a_time() -> None:
    """Each of a buffer's two descriptors is put under the other's number."""
    before = open_numbers()
    vmm = VMM()
    handle = vmm.mdl_create(PAGE, RW)
    (writable,) = open_numbers() - before
    vmm.mdl_map(handle, 0, PAGE, 0, VmmFlags.READ)
    (read_only,) = open_numbers() - before - {writable}
    ours, theirs = socket.socketpair()
    os.dup2(writable, read_only)
    # A reader never gets a descriptor that can write, whatever is under our number.
    for use in (
        lambda: vmm.send_handle(ours, handle, Rights.MAP_READ),
        lambda: vmm.handle_fileno(handle, Rights.MAP_READ),
    ):
        with pytest.raises(InvalidOperation, match=CLOSED):
            use()
    other = vmm.mdl(PAGE)
    other.map().write(b"other")
    os.dup2(other.fileno(), writable)
    with pytest.raises(InvalidOperation, match=CLOSED):
        vmm.mdl_map(handle, 0, PAGE, 0, RW)
    with pytest.raises(InvalidOperation, match=CLOSED):
        vmm.send_handle(ours, handle)
    vmm.close()
    assert os.pread(writable, 5, 0) == b"other"
    ours.close()
    theirs.close()


def test_a_descriptor_under_the_number_of_another_is_not_taken_for_it() -> None:
    in_own_process(lose_one_at_a_time)


def lose_shareable_memory(stranger: str) -> None:
    """A SHAREABLE region's memory is asked of no file of the program's, and none is punched."""
    before = open_numbers()
    vmm = VMM()
    va = vmm.allocate(0, 8 * PAGE, COMMITTED | VmmFlags.SHAREABLE)
    locked = vmm.allocate(0, 8 * PAGE, VmmFlags.RESERVE | RW | VmmFlags.SHAREABLE | VmmFlags.LOCKED)
    vmm.write(va, bytes([7]) * 8 * PAGE)
    strangers = Strangers(open_numbers() - before, STRANGERS[stranger])
    for change in (
        lambda: vmm.decommit(va, PAGE),
        lambda: vmm.decommit_ranges([(va, PAGE)]),
        lambda: vmm.commit(locked, PAGE),
        lambda: vmm.mdl_create_from_vm(va, PAGE, RW),
    ):
        usage = vmm.usage()
        with pytest.raises(InvalidOperation, match=CLOSED):
            change()
        assert vmm.usage() == usage
    assert vmm.read(va, 8 * PAGE) == bytes([7]) * 8 * PAGE
    vmm.protect(va, PAGE, VmmFlags.READ)
    vmm.free(va, 2 * PAGE)
    vmm.free(va + 2 * PAGE, 6 * PAGE)
    vmm.close()
    strangers.check()


@pytest.mark.parametrize("stranger", ["a file", "a memory file"])
def test_no_hole_is_punched_into_a_file_of_the_program_s(stranger: str) -> None:
    in_own_process(lose_shareable_memory, stranger)


# ---- what the kernel tells -----------------------------------------------------------------------


def lose_the_view_of_memory(stranger: str, missing: tuple[int, ...]) -> None:
    """Query answers about this process, whatever is under the numbers of its files."""
    before = open_numbers()
    with without(*missing):
        vmm = VMM()
        va = vmm.allocate(0, 4 * PAGE, COMMITTED)
        vmm.write(va, b"here")
        told = vmm.query(va), vmm.query(va, smaps=False)
        strangers = Strangers(open_numbers() - before, STRANGERS[stranger])
        assert (vmm.query(va), vmm.query(va, smaps=False)) == told
        assert told[0].resident
        strangers.check()
        vmm.close()
        strangers.check()


WITHOUT: dict[str, tuple[Feature, ...]] = {
    "ioctls": (),
    "text": (Feature.PROCMAP_QUERY, Feature.PAGEMAP_SCAN),
}


@pytest.mark.parametrize("way", WITHOUT)
@pytest.mark.parametrize("stranger", ["a file", "another process", "a socket"])
def test_query_is_about_this_process_whatever_took_its_descriptors(stranger: str, way: str) -> None:
    in_own_process(
        lose_the_view_of_memory, stranger, tuple(int(feature) for feature in WITHOUT[way])
    )


# ---- events, audits, descriptors handed out ------------------------------------------------------


def lose_events(stranger: str) -> None:
    """An event that lost its descriptor does nothing to what has the number."""
    before = open_numbers()
    event, other = Event(), Event()
    (number,) = open_numbers() - before - {other.fileno()}
    os.close(number)
    strangers = Strangers({number}, STRANGERS[stranger])
    ours, theirs = socket.socketpair()
    uses: dict[str, Callable[[], object]] = {
        "set": event.set,
        "clear": event.clear,
        "is_set": event.is_set,
        "wait": lambda: event.wait(0),
        "send": lambda: event.send(ours),
        "fileno": event.fileno,
        "async": lambda: asyncio.run(event.wait_async()),
    }
    for name, use in uses.items():
        refused(use, name, "closed")
    assert "lost" in repr(event)
    other.set()
    assert other.wait(0)
    event.close()
    strangers.check()
    ours.close()
    theirs.close()


@pytest.mark.parametrize("stranger", ["a file", "an eventfd", "a socket"])
def test_an_event_whose_descriptor_the_program_took_is_lost(stranger: str) -> None:
    in_own_process(lose_events, stranger)


def lose_an_event_to_another() -> None:
    """The next event gets the number, and in the kernel's books the same id."""
    event = Event()
    number = event.fileno()
    os.close(number)
    other = Event()
    assert other.fileno() == number
    with pytest.raises(InvalidOperation, match="closed"):
        event.set()
    event.close()
    del event
    assert not other.is_set()
    other.set()
    assert other.clear() == 1
    # And one of the program's own, which the kernel gives the same id too.
    os.close(number)
    own = os.eventfd(0, os.EFD_NONBLOCK)
    assert own == number
    for use in (other.set, other.close):
        with contextlib.suppress(InvalidOperation):
            use()
    del other, use
    with pytest.raises(BlockingIOError):
        os.eventfd_read(own)


def test_an_event_does_not_take_the_next_one_for_itself() -> None:
    in_own_process(lose_an_event_to_another)


def lose_all_to_a_daemon(folder: str) -> None:
    """What a program does that becomes a daemon, and goes on with what it had."""
    path, log = Path(folder, "file"), Path(folder, "calls")
    vmm = VMM(audit=Audit(log, failure="continue"))
    old = vmm.mdl(4096)
    region = old.map()
    region.write(b"OLD")
    event = Event()
    handed = old.fileno()
    os.closerange(3, 1000)
    new = vmm.mdl(4096)
    new.map().write(b"NEW")
    with pytest.raises(InvalidOperation, match=CLOSED):
        old.map()
    assert region.read(3) == b"OLD"
    old.close()
    assert new.map().read(3) == b"NEW"
    with path.open("w+b", buffering=0) as file:
        with pytest.raises(InvalidOperation, match="closed"):
            event.set()
        vmm.close()
        event.close()
        file.write(CONTENTS)
    assert path.read_bytes() == CONTENTS
    with contextlib.suppress(OSError):
        os.fstat(handed)
        raise AssertionError("closed by closerange, and open again")


@pytest.mark.filterwarnings("ignore")
def test_a_program_that_becomes_a_daemon_harms_nothing_but_what_it_closed(tmp_path: Path) -> None:
    in_own_process(lose_all_to_a_daemon, str(tmp_path), environment={"PYTHONWARNINGS": "ignore"})


def lose_what_was_handed_out() -> None:
    """``fileno`` of a buffer gives another descriptor where the program closed the first."""
    with VMM() as vmm, vmm.mdl(PAGE) as mdl:
        inode = os.fstat(mdl.fileno()).st_ino
        number = mdl.fileno()
        os.close(number)
        own = os.open("/dev/null", os.O_RDONLY)
        assert own == number
        assert os.fstat(mdl.fileno()).st_ino == inode
        mdl.close()
        assert kernel.descriptors()[own] == "/dev/null"
        last = Mdl.from_bytes(b"x", vmm=vmm)
        number = last.fileno()
        os.close(number)
        own_too = os.open("/dev/null", os.O_RDONLY)
        assert own_too == number
        del last
        assert kernel.descriptors()[own_too] == "/dev/null"


def test_a_descriptor_handed_out_and_closed_by_the_program_is_made_anew() -> None:
    in_own_process(lose_what_was_handed_out)


def lose_an_audit_file_to_one_s_own(folder: str) -> None:
    """The program opens the audit's file itself, and gets the number of the audit's descriptor."""
    log = Path(folder, "calls")
    before = open_numbers()
    audit = Audit(log)
    (number,) = open_numbers() - before
    with VMM(audit=audit) as vmm:
        vmm.allocate(0, PAGE, VmmFlags.RESERVE)
        written = log.read_bytes()
        os.close(number)
        own = os.open(log, os.O_RDWR)
        assert own == number
        with pytest.raises(SecurityDisallow, match="cannot be written"):
            vmm.allocate(0, PAGE, VmmFlags.RESERVE)
    del audit, vmm
    assert os.lseek(own, 0, os.SEEK_CUR) == 0
    assert os.read(own, 2 * len(written)) == written


@pytest.mark.filterwarnings("ignore")
def test_an_audit_writes_through_its_own_descriptor_of_its_file_alone(tmp_path: Path) -> None:
    in_own_process(
        lose_an_audit_file_to_one_s_own,
        str(tmp_path),
        environment={"PYTHONWARNINGS": "ignore"},
    )


# ---- numbers that change hands inside the package ------------------------------------------------


def lose_a_buffer_to_itself() -> None:
    """The same memory comes again, and gets the number that the first descriptor of it had."""
    ours, theirs = socket.socketpair()
    with VMM() as sender, VMM() as vmm, VMM() as third, ours, theirs:
        sent = sender.mdl_create(PAGE, RW)

        def come(receiver: VMM) -> tuple[Handle, int]:
            before = open_numbers()
            sender.send_handle(ours, sent)
            handle = receiver.recv_handle(theirs)
            (number,) = open_numbers() - before
            return handle, number

        for receiver in (vmm, third):
            old, number = come(vmm)
            os.close(number)
            new, again = come(receiver)
            assert again == number
            with pytest.raises(InvalidOperation, match=CLOSED):
                vmm.mdl_map(old, 0, PAGE, 0, RW)
            vmm.handle_close(old)
            receiver.free(receiver.mdl_map(new, 0, PAGE, 0, RW), PAGE)
            receiver.handle_close(new)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(number)


def test_a_handle_does_not_close_the_descriptor_of_another_one_of_the_same_memory() -> None:
    in_own_process(lose_a_buffer_to_itself)


def lose_the_access_of_a_descriptor(access: int) -> None:
    """The number names the same memory, but not with the access that is ours."""
    before = open_numbers()
    with VMM() as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        (number,) = open_numbers() - before
        other = os.open(f"/proc/self/fd/{number}", access)
        os.dup2(other, number)
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        uses = uses_of(vmm, handle, ours)
        for name in ("map", "map locked", "send", "fileno"):
            refused(uses[name], name)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
    ours.close()
    theirs.close()
    os.close(other)


@pytest.mark.parametrize("access", [os.O_RDONLY, os.O_PATH])
def test_a_descriptor_with_another_access_is_not_sent(access: int) -> None:
    in_own_process(lose_the_access_of_a_descriptor, access)


# ---- while a call waits --------------------------------------------------------------------------


def lose_what_waits_for_room(what: str, timeout: float | None) -> None:
    """A socket has no room, and before it has some the program puts a file under each number."""
    before = open_numbers()
    ours, theirs = socket.socketpair()
    vmm = VMM()
    handle = vmm.mdl_create(3 * PAGE, RW, PAGE)
    event = Event()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(bytes(PAGE))
    ours.settimeout(timeout)
    sockets = {ours.fileno(), theirs.fileno()}
    problems: list[BaseException] = []

    def send() -> None:
        try:
            if what == "handle":
                vmm.send_handle(ours, handle)
            else:
                event.send(ours)
        except InvalidOperation as problem:
            problems.append(problem)

    thread = threading.Thread(target=send)
    thread.start()
    wait_until(lambda: sleeps_in_poll(thread))
    strangers = Strangers(open_numbers() - before - sockets, a_file)
    theirs.setblocking(False)
    came = []
    while thread.is_alive() or select.select([theirs], [], [], 0)[0]:
        with contextlib.suppress(BlockingIOError):
            came += theirs.recvmsg(1 << 20, 1 << 10)[1]
    thread.join()
    assert came == []
    (problem,) = problems
    assert CLOSED in str(problem)
    event.close()
    vmm.close()
    strangers.check()


def sleeps_in_poll(thread: threading.Thread) -> bool:
    """Whether a thread waits for a descriptor, and for nothing else, by the kernel's word."""
    wchan = Path(f"/proc/self/task/{thread.native_id}/wchan").read_text(encoding="ascii")
    return "poll" in wchan


@pytest.mark.parametrize("timeout", [None, 60.0])
@pytest.mark.parametrize("what", ["handle", "event"])
def test_what_waits_for_room_in_a_socket_is_looked_at_when_there_is_room(
    what: str, timeout: float | None
) -> None:
    in_own_process(lose_what_waits_for_room, what, timeout)


def lose_the_socket_that_a_policy_allowed() -> None:
    """Another socket gets the number of the one that the policy was asked about."""
    ours, theirs = socket.socketpair()
    other, others_end = socket.socketpair()
    before: set[int] = set()
    replaced: set[int] = set()

    def ask(question: object) -> bool:
        if "_handle" in str(getattr(question, "method", "")):
            replaced.update(open_numbers() - before)
            for number in replaced:
                os.dup2(other.fileno(), number)
        return True

    with VMM(policy=Policy(ask=ask)) as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        before |= open_numbers()
        refused(lambda: vmm.send_handle(ours, handle), "send")
        refused(lambda: vmm.recv_handle(theirs), "receive")
        for end in (theirs, others_end):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(1)
        for number in replaced:
            assert os.fstat(number).st_ino == os.fstat(other.fileno()).st_ino
        assert len(replaced) > 0
    for end in (ours, theirs, other, others_end):
        end.close()


def test_nothing_goes_through_another_socket_than_the_policy_allowed() -> None:
    in_own_process(lose_the_socket_that_a_policy_allowed)

"""Descriptors wait for their receivers, and for nobody else, and none is left behind."""

from __future__ import annotations

import array
import os
import pickle
import resource
import signal
import socket
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from children import NOBODY, TESTS_IMPORTABLE, in_own_process, run_child
from constants import PATIENCE
from forked import in_child
from kernel_oracle import PAGE
from leaks import read_descriptors
from vmm_linux import VMM, Event, Mdl, _sharer
from vmm_linux import event as event_module
from vmm_linux._default_vmm import default_vmm
from vmm_linux._sharer import HALF, Ticket
from vmm_linux.errors import InvalidOperation, OutOfMemory, QuotaExceeded, ResourceNotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(autouse=True)
def _ended() -> Iterator[None]:
    """What a test sent waits no longer."""
    yield
    _sharer.stop()
    default_vmm().close()


def a_ticket(text: bytes = b"it") -> Ticket:
    """A ticket for a pipe in which this text lies."""
    reading, writing = os.pipe()
    os.write(writing, text)
    os.close(writing)
    try:
        return _sharer.share(reading)
    finally:
        os.close(reading)


def content(ticket: Ticket) -> bytes:
    """What lies in the pipe that a ticket is for."""
    fd = ticket.detach()
    try:
        assert not os.get_inheritable(fd)
        return os.read(fd, 100)
    finally:
        os.close(fd)


def settled() -> dict[int, str]:
    """The open descriptors, when the thread has closed what it handed out."""
    with _sharer.HERE["sharer"].changed:
        return read_descriptors()


def a_client(address: bytes | None = None) -> socket.socket:
    """A socket of somebody who wants something."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    if address is not None:
        sock.bind(b"")
        sock.connect(address)
    return sock


# ---- fetching --------------------------------------------------------------------------------


def test_a_ticket_is_good_once_and_leaves_no_descriptor() -> None:
    tickets = [a_ticket(bytes([number])) for number in range(20)]
    before = len(read_descriptors())
    for number in reversed(range(20)):
        assert content(tickets[number]) == bytes([number])
    assert len(settled()) == before - 20
    for ticket in tickets:
        with pytest.raises(ResourceNotFound, match="loaded once"):
            ticket.detach()
    assert len(settled()) == before - 20


def test_a_half_known_ticket_is_no_ticket() -> None:
    ticket = a_ticket()
    with pytest.raises(ResourceNotFound):
        ticket._replace(request=os.urandom(HALF)).detach()
    assert content(ticket) == b"it"
    ticket = a_ticket()
    before = read_descriptors()
    # An answer that does not prove that it is the sender's is not taken.
    with pytest.raises(ResourceNotFound):
        ticket._replace(proof=os.urandom(HALF)).detach()
    assert len(settled()) == len(before) - 1


def test_a_sender_that_is_gone_is_noticed_at_once() -> None:
    ticket = a_ticket()
    _sharer.stop()
    with pytest.raises(ResourceNotFound, match="its sender still runs"):
        ticket.detach()


def test_strangers_messages_stop_nobody_and_leave_nothing() -> None:
    ticket = a_ticket()
    before = read_descriptors()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1]))]
    for message in (b"", b"x", os.urandom(HALF), ticket.request + b"x", bytes(5000)):
        with a_client(ticket.address) as client:
            client.sendmsg([message], rights)
            assert client.recv(100) == b""
        with a_client() as nameless:  # it can get no answer
            nameless.sendto(message, ticket.address)
    with a_client(ticket.address) as impatient:
        impatient.send(os.urandom(HALF))
    with pytest.raises(ResourceNotFound):
        ticket._replace(request=bytes(HALF)).detach()
    assert read_descriptors() == before
    assert content(ticket) == b"it"


def ask_as_nobody(address: str, request: str) -> None:
    """Ask for a descriptor, and print what is answered."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(20)
        sock.bind(b"")
        sock.connect(bytes.fromhex(address))
        sock.send(bytes.fromhex(request))
        print(sock.recvmsg(100, 100)[:2])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_gets_nothing_for_a_good_ticket() -> None:
    ticket = a_ticket()
    child = run_child(ask_as_nobody, ticket.address.hex(), ticket.request.hex(), nobody=True)
    assert (child.returncode, child.stdout) == (0, "(b'', [])\n"), child.stderr
    assert content(ticket) == b"it"


# ---- senders that do not answer --------------------------------------------------------------


def share_and_stop() -> tuple[int, Ticket]:
    """A child that has something to fetch, and is stopped: it answers nobody."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, pickle.dumps(a_ticket()))
        os.close(writing)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        ticket: Ticket = pickle.load(stream)  # noqa: S301  our own child's
    os.waitpid(child, os.WUNTRACED)
    return child, ticket


def wait_for_a_stopped_sender() -> None:
    """Fetch from a process that is stopped, and then killed."""
    _sharer.PATIENCE = 0.5  # type: ignore[misc]
    child, ticket = share_and_stop()
    before = read_descriptors()
    with pytest.raises(ResourceNotFound, match=r"did not answer for 0\.5 seconds"):
        ticket.detach()
    _sharer.PATIENCE = 60  # type: ignore[misc]
    killer = threading.Timer(0.3, os.kill, (child, signal.SIGKILL))
    killer.start()
    with pytest.raises(ResourceNotFound, match="its sender still runs"):
        ticket.detach()
    killer.join()
    os.waitpid(child, 0)
    assert read_descriptors() == before


def test_a_stopped_sender_is_given_up_and_a_killed_one_is_noticed() -> None:
    in_own_process(wait_for_a_stopped_sender)


# ---- forks and programs that close what is not theirs ------------------------------------------


def test_a_forked_child_has_nothing_of_its_parents_and_shares_for_itself() -> None:
    ticket = a_ticket(b"parent's")
    before = read_descriptors()
    here = {fd for fd, name in before.items() if name.startswith(("socket:", "pipe:"))}

    def child() -> list[object]:
        inherited = _sharer.HERE["sharer"].waiting
        own = content(a_ticket(b"child's"))
        fetched = content(ticket)
        return [len(inherited), own.decode(), fetched.decode(), _sharer.stop()]

    def left() -> list[int]:
        return sorted(here & read_descriptors().keys())

    waiting = {kept.number for kept, _, _ in _sharer.HERE["sharer"].waiting.values()}
    listening = _sharer.HERE["sharer"].kept
    assert listening is not None
    assert not {*waiting, listening.number} & {*in_child(left)}
    assert in_child(child) == [0, "child's", "parent's", 0]
    with pytest.raises(ResourceNotFound):
        ticket.detach()


def daemonise() -> None:
    """Close every descriptor, as daemons do, with things on their way; then send again."""
    ticket = a_ticket()
    os.closerange(3, 1000)
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(10)]
    with pytest.raises(ResourceNotFound):
        ticket.detach()
    again = a_ticket(b"again")
    assert content(again) == b"again"
    _sharer.stop()
    for fd in files:
        assert os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"  # noqa: PTH115


def test_a_program_that_closed_all_descriptors_keeps_those_it_opened_since() -> None:
    in_own_process(daemonise)


def daemonise_while_somebody_asks() -> None:
    """Close every descriptor, and open sockets under their numbers, from which nothing may go."""
    ticket = a_ticket()
    thread, listening = _sharer.HERE["sharer"].thread, _sharer.HERE["sharer"].kept
    assert thread is not None
    assert listening is not None
    # Until it waits in recvmsg, whose first argument is the descriptor.
    calls = Path(f"/proc/self/task/{thread.native_id}/syscall")
    while calls.read_text().split()[1:2] != [hex(listening.number)]:
        time.sleep(0.001)
    os.closerange(3, 1000)
    sockets = [a_client() for _ in range(10)]
    with a_client() as client:  # unconnected, it would take an answer from whomever
        client.bind(b"")
        client.sendto(ticket.request, ticket.address)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        client.settimeout(0)
        with pytest.raises(BlockingIOError):
            client.recv(100)
    with pytest.raises(ResourceNotFound):
        ticket.detach()
    for sock in sockets:
        sock.close()


def test_no_answer_goes_through_a_socket_of_the_programs() -> None:
    in_own_process(daemonise_while_somebody_asks)


# ---- what fails leaves nothing ---------------------------------------------------------------


@pytest.mark.parametrize("folder", ["x" * 90, "absent", "read-only"])
def test_no_directory_is_needed(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / folder
    if folder != "absent":
        place.mkdir(mode=0o500)
    monkeypatch.setenv("TMPDIR", str(place))
    in_own_process(pickle_here, folder)
    assert not place.exists() or not list(place.iterdir())


def pickle_here(_folder: str) -> None:
    """Send a buffer and an event, many times, under a TMPDIR that multiprocessing cannot use."""
    mdl = Mdl.from_bytes(bytes(PAGE))
    with Event() as event:
        before = None
        for _ in range(50):
            loaded = pickle.loads(ForkingPickler.dumps([mdl, event]))  # noqa: S301  our own
            assert loaded[0].sid == mdl.sid
            for each in loaded:
                each.close()
            before = before or settled().keys()
        assert settled().keys() == before


def test_at_every_limit_of_descriptors_sending_is_whole_or_leaves_nothing(vmm: VMM) -> None:
    mdl = vmm.mdl(PAGE)
    mdl.map().write(b"it")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    filling = [os.dup(0)]
    while filling[-1] < max(read_descriptors().keys() - {*filling}):
        filling.append(os.dup(0))
    with Event() as event:
        for thing in (mdl, event):
            outcomes = []
            for more in range(7):
                before = read_descriptors()
                limit = max(before) + 1 + more
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
                try:
                    ForkingPickler.dumps(thing)
                    outcomes.append(True)
                except QuotaExceeded:
                    outcomes.append(False)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                assert outcomes[-1] or read_descriptors() == before
                _sharer.stop()
                assert read_descriptors() == before
            assert outcomes == sorted(outcomes)
            assert (outcomes[0], outcomes[-1]) == (False, True)
    for fd in filling:
        os.close(fd)


def test_at_every_limit_of_descriptors_receiving_is_whole_or_leaves_nothing(vmm: VMM) -> None:
    mdl, event = vmm.mdl(PAGE), Event()
    default_vmm()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for thing in (mdl, event):
        outcomes = []
        for more in range(5):
            text = bytes(ForkingPickler.dumps(thing))
            before = read_descriptors()
            waiting = {kept.number for kept, _, _ in _sharer.HERE["sharer"].waiting.values()}
            low = [os.dup(0) for fd in range(max(before)) if fd not in before]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(before) + 1 + more, limits[1]))
            try:
                pickle.loads(text).close()  # noqa: S301  our own
                outcomes.append(True)
            except QuotaExceeded:
                outcomes.append(False)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                for fd in low:
                    os.close(fd)
            left = settled().keys()
            assert before.keys() - waiting <= left <= before.keys()
            _sharer.stop()
        assert outcomes == sorted(outcomes)
        assert outcomes[0] is False
        assert outcomes[-1] is True
    event.close()


def start_no_thread(nobody: int) -> None:
    """Send where the user may have no more threads than this one."""
    mdl, event = Mdl.from_bytes(b"x"), Event()
    ForkingPickler.dumps(mdl)  # from now on the buffer keeps a read-only descriptor
    assert _sharer.stop() == 1
    before = read_descriptors()
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    os.setresuid(nobody, nobody, nobody)
    for thing in (mdl, event):
        with pytest.raises(OutOfMemory, match="no thread can be started"):
            ForkingPickler.dumps(thing)
    assert len(read_descriptors()) == len(before)


@pytest.mark.skipif(os.geteuid() != 0, reason="threads of root are not limited")
def test_where_no_thread_can_be_started_nothing_is_left() -> None:
    in_own_process(start_no_thread, NOBODY)


class Starting:
    """What starts a process, as far as pickles know it."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def duplicate_for_child(self, fd: int) -> int:
        """Have the process inherit a descriptor."""
        self.numbers.append(fd)
        return fd

    def DupFd(self, _fd: int) -> object:  # noqa: N802  multiprocessing's name
        """It cannot."""
        raise RuntimeError("no process today")


def test_a_process_that_cannot_be_started_leaves_no_descriptor(vmm: VMM) -> None:
    from multiprocessing import context

    mdl = vmm.mdl(PAGE)
    with Event() as event:
        before = read_descriptors()
        for thing in (mdl, event):
            starting: Any = Starting()
            context.set_spawning_popen(starting)
            try:
                with pytest.raises(RuntimeError, match="no process today"):
                    ForkingPickler.dumps(thing)
            finally:
                context.set_spawning_popen(None)
            assert len(starting.numbers) == 1
            del starting
            assert read_descriptors() == before


def test_an_event_arrives_whole_where_no_descriptor_is_left() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Event() as event:
        before = read_descriptors()

        class Arrived:
            def detach(self) -> int:
                fd = os.dup(event.fileno())
                resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
                return fd

        try:
            event_module.restore(Event, Arrived()).close()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert read_descriptors() == before


# ---- which pickler it is -----------------------------------------------------------------------


def make_then_load() -> None:
    """Buffers and events of a time when multiprocessing was not there."""
    import contextlib
    import pickle
    import sys

    from vmm_linux import Event, Mdl, VmmError, _sharer

    mdl, event = Mdl.from_bytes(b"x"), Event()
    assert "multiprocessing" not in sys.modules
    from multiprocessing import reduction

    for thing in (mdl, event):
        assert reduction.ForkingPickler.dumps(thing)
        with contextlib.suppress(VmmError):
            pickle.dumps(thing)
            raise AssertionError("bytes carry no descriptor")
    assert _sharer.stop() == 2


def test_what_was_made_before_multiprocessing_was_loaded_goes_through_it() -> None:
    child = run_child(make_then_load, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


class PicklesForItself:
    """What pickles its parts by itself, with the standard pickler."""

    def __init__(self, part: object) -> None:
        self.part = part

    def __reduce__(self) -> tuple[Callable[[bytes], object], tuple[bytes]]:
        return pickle.loads, (pickle.dumps(self.part),)


def test_another_pickler_within_multiprocessings_is_refused(vmm: VMM) -> None:
    mdl = vmm.mdl(PAGE)
    with pytest.raises(InvalidOperation, match="multiprocessing alone"):
        ForkingPickler.dumps(PicklesForItself(mdl))

"""Handles travel between processes, and a receiver believes only what the kernel says.

The functions that are not tests run in other processes. They import for themselves what they use.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import kernel_oracle as kernel
from children import NOBODY, run_child
from forked import in_child
from kernel_oracle import PAGE, TESTS_IMPORTABLE
from vmm_linux import INVALID_HANDLE, VMM, Limits, Retcode, Rights, Seal, VmmError, VmmFlags
from vmm_linux.errors import (
    InvalidArgument,
    InvalidOperation,
    NoCapability,
    OutOfMemory,
    QuotaExceeded,
    ResourceNotFound,
    SecurityDisallow,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm_linux import Handle

READ = VmmFlags.READ
RW = VmmFlags.READ | VmmFlags.WRITE
ALL_BUT_EXECUTE = ~Rights(0) & ~Rights.MAP_EXECUTE
READ_ONLY = ALL_BUT_EXECUTE & ~Rights.MAP_WRITE

KINDS = {
    "stream": socket.SOCK_STREAM,
    "seqpacket": socket.SOCK_SEQPACKET,
    "datagram": socket.SOCK_DGRAM,
}
#: The documented message.
MESSAGE = struct.Struct("<4sHHHHIQQQQ")
#: Socket options and messages that this Python has no names for.
SO_TIMESTAMP, SO_TIMESTAMPNS, SO_PASSPIDFD = 29, 35, 76
#: F_SEAL_SEAL, SHRINK and GROW, WRITE.
SEALED, SIZED, UNWRITABLE = 1, 2 | 4, 8


# ---- what the tests share


@pytest.fixture
def vmm() -> Iterator[VMM]:
    """The sender's endpoint."""
    with VMM() as endpoint:
        yield endpoint


@pytest.fixture
def receiver(vmm: VMM) -> Iterator[VMM]:
    """The receiver's endpoint, where that is in this process too."""
    with VMM() as endpoint:
        assert endpoint is not vmm
        yield endpoint


class Pair(NamedTuple):
    """Two connected sockets."""

    sender: socket.socket
    receiver: socket.socket


@contextlib.contextmanager
def connected(kind: int) -> Iterator[Pair]:
    """Two sockets of a kind, for the time of the ``with`` block."""
    pair = Pair(*socket.socketpair(socket.AF_UNIX, kind))
    with pair.sender, pair.receiver:
        yield pair


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """Two connected sockets of each kind."""
    with connected(KINDS[request.param]) as sockets:
        yield sockets


@pytest.fixture
def packets() -> Iterator[Pair]:
    """Two connected sockets that keep messages apart and tell of their end."""
    with connected(socket.SOCK_SEQPACKET) as sockets:
        yield sockets


@pytest.fixture
def stream() -> Iterator[Pair]:
    """Two connected stream sockets."""
    with connected(socket.SOCK_STREAM) as sockets:
        yield sockets


@contextlib.contextmanager
def nothing_opened() -> Iterator[None]:
    """Hold that the descriptors after the block are those before it.

    Pipes may go: a child that ends meanwhile closes those that it answered through.
    """
    before = kernel.descriptors().items()
    yield
    after = kernel.descriptors().items()
    assert after <= before
    assert all(target.startswith("pipe:") for _, target in before - after)


@contextlib.contextmanager
def refused(why: str, kind: type[VmmError] = InvalidArgument) -> Iterator[None]:
    """Hold that the block is refused with such a message and opens nothing."""
    with nothing_opened(), pytest.raises(kind, match=why) as caught:
        yield
    assert caught.value.method in {"send_handle", "recv_handle"}


def filled(vmm: VMM, pages: int, *, prot: VmmFlags = RW) -> Handle:
    """A buffer with another text in each page."""
    handle = vmm.mdl_create(pages * PAGE, prot)
    va = vmm.mdl_map(handle, 0, pages * PAGE, 0, RW)
    for page in range(pages):
        vmm.write(va + page * PAGE, text_of(page))
    vmm.free(va, pages * PAGE)
    return handle


def text_of(page: int) -> bytes:
    """What ``filled`` writes to a page."""
    return f"page {page:>3}".encode()


def contents(vmm: VMM, handle: Handle) -> list[bytes]:
    """The beginning of each page of a buffer."""
    size = vmm.mdl_get_size(handle)
    va = vmm.mdl_map(handle, 0, size, 0, READ)
    found = [vmm.read(page, len(text_of(0))) for page in range(va, va + size, PAGE)]
    vmm.free(va, size)
    return found


def facts(vmm: VMM, handle: Handle) -> list[Any]:
    """What a handle tells, as JSON knows it."""
    info = vmm.handle_info(handle)
    return [int(info.rights), info.size, info.sid, info.origin_sid, int(info.seals)]


def page_frames(va: int, pages: int) -> list[int]:
    """The physical pages behind addresses; zeros for an ordinary user."""
    return [entry & (1 << 55) - 1 for entry in kernel.pagemap(va, pages)]


# ---- other processes


@dataclass
class Peer:
    """A process at the other end of a socket; its answer is there once it has ended."""

    sock: socket.socket
    answer: Any = None


@contextlib.contextmanager
def in_process(
    work: Callable[..., object],
    *arguments: object,
    kind: int = socket.SOCK_STREAM,
    nobody: bool = False,
    ending: int = 0,
) -> Iterator[Peer]:
    """Have an unrelated process connect to a socket in a folder, and wait for its end afterwards.

    ``work(path, kind, *arguments)`` runs there; what it prints is its answer, in JSON. ``ending``
    is the return code that it must have.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, kind))
        listener.settimeout(30)
        listener.bind(str(folder / "socket"))
        (folder / "socket").chmod(0o777)
        if kind != socket.SOCK_DGRAM:
            listener.listen()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        options: dict[str, Any] = {"nobody": nobody, "environment": TESTS_IMPORTABLE}
        child = pool.submit(
            run_child, work, str(folder / "socket"), int(kind), *arguments, **options
        )
        peer = Peer(stack.enter_context(accepted(listener)))
        with peer.sock:
            yield peer
        ended = child.result()
        assert ended.returncode == ending, ended.stderr
        peer.answer = json.loads(ended.stdout or "null")


def accepted(listener: socket.socket) -> socket.socket:
    """The socket to whoever connects first; a datagram socket is told who by a message."""
    if listener.type == socket.SOCK_DGRAM:
        listener.connect(listener.recvfrom(16)[1])
        return listener.dup()
    connection, _ = listener.accept()
    connection.settimeout(30)
    return connection


def connect(path: str, kind: int) -> socket.socket:
    """The child's end of that."""
    sock = socket.socket(socket.AF_UNIX, kind)
    if kind == socket.SOCK_DGRAM:
        sock.bind("")
    sock.connect(path)
    if kind == socket.SOCK_DGRAM:
        sock.send(b"here I am")
    return sock


def receive_and_tell(path: str, kind: int, count: int = 1) -> None:
    """Receive handles, and tell all about them; what can be written is written to."""
    import json

    from test_transfer import connect, tell_of_one
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:
        print(json.dumps([tell_of_one(vmm, sock) for _ in range(count)]))


def tell_of_one(vmm: VMM, sock: socket.socket) -> dict[str, Any]:
    """Receive a handle, map its buffer, write to it if that is possible."""
    before = kernel.descriptors()
    handle = vmm.recv_handle(sock)
    new = sorted(kernel.descriptors().keys() - before.keys())
    info = vmm.handle_info(handle)
    writable = Rights.MAP_WRITE in info.rights
    va = vmm.mdl_map(handle, 0, info.size, 0, RW if writable else READ)
    texts = contents(vmm, handle)
    if writable:
        vmm.write(va, b"from the receiver")
    vmm.read(va, info.size)
    return {
        "facts": facts(vmm, handle),
        "texts": [text.decode() for text in texts],
        "frames": page_frames(va, info.size // PAGE),
        "modes": [fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE for fd in new],
        "closed by exec": [bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC) for fd in new],
        "cannot be mapped writable": not can_map_writable(new[0], info.size),
    }


def can_map_writable(fd: int, size: int) -> bool:
    """Whether the kernel gives a writable mapping of a descriptor."""
    found = kernel.libc.mmap(
        None, size, kernel.PROT_READ | kernel.PROT_WRITE, kernel.MAP_SHARED, fd, 0
    )
    if found == 2**64 - 1:
        return False
    kernel.unmap(found, size)
    return True


# ---- the same buffer in another process


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_handle_names_the_same_memory_in_an_unrelated_process(
    kind: int, nobody: bool, vmm: VMM
) -> None:
    handle = filled(vmm, 4)
    va = vmm.mdl_map(handle, 0, 4 * PAGE, 0, RW)
    assert vmm.read(va, 4 * PAGE)
    with in_process(receive_and_tell, kind=kind, nobody=nobody) as peer:
        vmm.send_handle(peer.sock, handle)
    (told,) = peer.answer
    assert told["facts"] == facts(vmm, handle)
    assert told["texts"] == [text_of(page).decode() for page in range(4)]
    assert told["modes"] == [os.O_RDWR]
    assert told["closed by exec"] == [True]
    assert vmm.read(va, 17) == b"from the receiver"
    if os.geteuid() == 0 and not nobody:
        assert all(told["frames"])
        assert told["frames"] == page_frames(va, 4)


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
def test_without_map_write_the_descriptor_that_arrives_is_read_only(nobody: bool, vmm: VMM) -> None:
    handle = filled(vmm, 2)
    with in_process(receive_and_tell, 2, nobody=nobody) as peer:
        vmm.send_handle(peer.sock, handle, READ_ONLY)
        vmm.send_handle(peer.sock, vmm.handle_copy(handle, READ_ONLY))
    for told in peer.answer:
        assert told["facts"] == [int(READ_ONLY), *facts(vmm, handle)[1:]]
        assert told["modes"] == [os.O_RDONLY]
        assert told["cannot be mapped writable"]
    assert contents(vmm, handle) == [text_of(0), text_of(1)]


@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
def test_a_clone_and_a_clone_s_clone_keep_their_identities_and_windows(
    rights: Rights, vmm: VMM
) -> None:
    handle = filled(vmm, 8)
    clone = vmm.mdl_clone(handle, PAGE, 6 * PAGE)
    inner = vmm.mdl_clone(clone, 2 * PAGE, 3 * PAGE)
    innermost = vmm.mdl_clone(inner, PAGE, PAGE)
    windows = {clone: range(1, 7), inner: range(3, 6), innermost: range(4, 5)}
    with in_process(receive_and_tell, len(windows)) as peer:
        for sent in windows:
            vmm.send_handle(peer.sock, sent, rights)
    for told, (sent, pages) in zip(peer.answer, windows.items(), strict=True):
        assert told["facts"] == [int(rights), *facts(vmm, sent)[1:]]
        texts = [text.encode() for text in told["texts"]]
        assert texts[1:] == [text_of(page) for page in pages[1:]]
        assert all(told["closed by exec"])
    first = b"from the" if Rights.MAP_WRITE in rights else text_of(4)
    assert contents(vmm, innermost) == [first]
    assert len({facts(vmm, sent)[2] for sent in (handle, *windows)}) == 4


def test_what_was_received_can_be_sent_on(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    inner = vmm.mdl_clone(vmm.mdl_clone(filled(vmm, 4), PAGE, 3 * PAGE), PAGE, PAGE)
    for rights in (ALL_BUT_EXECUTE, READ_ONLY, Rights.TRANSFER | Rights.GET_SID):
        handle = inner
        for _ in range(3):
            vmm.send_handle(packets.sender, handle, rights)
            handle = receiver.recv_handle(packets.receiver)
            assert facts(receiver, handle) == [int(rights), *facts(vmm, inner)[1:]]
            receiver.send_handle(packets.sender, handle)
            handle = vmm.recv_handle(packets.receiver)
    assert contents(vmm, inner) == [text_of(2)]


def test_the_buffer_lives_on_when_its_maker_is_closed(packets: Pair, receiver: VMM) -> None:
    with VMM() as maker:
        maker.send_handle(packets.sender, filled(maker, 2))
    assert contents(receiver, receiver.recv_handle(packets.receiver)) == [text_of(0), text_of(1)]


def tell_over(sock: socket.socket) -> None:
    """Receive a handle, and send what can be told of it back."""
    with sock, VMM() as vmm:
        told = tell_of_one(vmm, sock)
        sock.sendall(json.dumps([told["facts"], told["texts"]]).encode())


def send_to_a_spawned_process() -> None:
    """Send a handle to a process that multiprocessing starts afresh."""
    import json
    import multiprocessing
    import socket

    from test_transfer import facts, filled, tell_over, text_of
    from vmm_linux import VMM

    ours, theirs = socket.socketpair()
    with ours, theirs, VMM() as vmm:
        process = multiprocessing.get_context("spawn").Process(target=tell_over, args=(theirs,))
        process.start()
        handle = filled(vmm, 2)
        vmm.send_handle(ours, handle)
        told = json.loads(ours.recv(1 << 16))
        process.join()
        assert process.exitcode == 0
        assert told == [facts(vmm, handle), [text_of(page).decode() for page in range(2)]]


def test_a_spawned_process_receives() -> None:
    child = run_child(send_to_a_spawned_process, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


def test_a_forked_process_receives(vmm: VMM, stream: Pair) -> None:
    handle = filled(vmm, 2)
    vmm.send_handle(stream.sender, handle, READ_ONLY)

    def told_by_child() -> dict[str, Any]:
        with VMM() as other:
            return tell_of_one(other, stream.receiver)

    told = in_child(told_by_child)
    assert told["facts"] == [int(READ_ONLY), *facts(vmm, handle)[1:]]
    assert told["texts"] == [text_of(page).decode() for page in range(2)]


def test_a_forked_process_sends(receiver: VMM, stream: Pair) -> None:
    def send() -> list[Any]:
        with VMM() as other:
            handle = filled(other, 2)
            other.send_handle(stream.sender, handle)
            return facts(other, handle)

    told = in_child(send)
    handle = receiver.recv_handle(stream.receiver)
    assert facts(receiver, handle) == told
    assert contents(receiver, handle) == [text_of(0), text_of(1)]


def test_what_is_received_is_closed_by_exec(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    inner = vmm.mdl_clone(vmm.mdl_clone(vmm.mdl_create(PAGE, RW), 0, PAGE), 0, PAGE)
    vmm.send_handle(pair.sender, inner)
    before = kernel.descriptors()
    receiver.recv_handle(pair.receiver)
    new = kernel.descriptors().keys() - before.keys()
    assert len(new) == 3
    assert not any(os.get_inheritable(fd) for fd in new)


# ---- what a sender may send


@pytest.mark.parametrize(
    ("rights", "asked"),
    [
        (ALL_BUT_EXECUTE & ~Rights.TRANSFER, None),
        (ALL_BUT_EXECUTE & ~Rights.TRANSFER, Rights.MAP_READ),
        (READ_ONLY, ALL_BUT_EXECUTE),
        (ALL_BUT_EXECUTE, Rights.MAP_EXECUTE),
        (Rights.TRANSFER, Rights.GET_SID),
    ],
)
def test_rights_that_a_handle_lacks_are_not_sent(
    rights: Rights, asked: Rights | None, vmm: VMM, pair: Pair
) -> None:
    handle = vmm.handle_copy(vmm.mdl_create(PAGE, RW), rights)
    with refused("does not give", NoCapability):
        vmm.send_handle(pair.sender, handle, asked)
    pair.receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        pair.receiver.recv(1)


def test_rights_that_nobody_knows_are_not_sent(vmm: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for rights in (0x40, 1 << 32, -1, "TRANSFER", True, 1.0):
        with refused("rights"):
            vmm.send_handle(pair.sender, handle, rights)  # type: ignore[arg-type]


def test_a_handle_that_is_none_is_not_sent(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    foreign = receiver.mdl_create(PAGE, RW)
    for value in (0, INVALID_HANDLE, handle ^ 1 << 37, foreign):
        with refused("not a handle of this VMM"):
            vmm.send_handle(pair.sender, value)
    copy = vmm.handle_copy(handle, ALL_BUT_EXECUTE)
    vmm.handle_revoke(handle)
    with nothing_opened(), pytest.raises(VmmError) as caught:
        vmm.send_handle(pair.sender, copy)
    assert caught.value.rc is Retcode.HANDLE_REVOKED
    vmm.handle_close(handle)
    with refused("was closed", ResourceNotFound):
        vmm.send_handle(pair.sender, handle)


def test_no_rights_at_all_can_be_sent(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    vmm.send_handle(pair.sender, vmm.mdl_create(PAGE, RW), 0)
    handle = receiver.recv_handle(pair.receiver)
    assert handle.rights == 0
    with pytest.raises(NoCapability):
        receiver.mdl_map(handle, 0, PAGE, 0, READ)
    with refused("TRANSFER", NoCapability):
        receiver.send_handle(pair.sender, handle)


# ---- sockets


def test_a_stream_carries_other_bytes_before_between_and_after(
    vmm: VMM, receiver: VMM, stream: Pair
) -> None:
    handles = [vmm.mdl_create((n + 1) * PAGE, RW) for n in range(4)]
    for n, handle in enumerate(handles):
        stream.sender.sendall(b"header %d" % n)
        vmm.send_handle(stream.sender, handle)
        vmm.send_handle(stream.sender, handle, READ_ONLY)
    stream.sender.sendall(b"the end")
    stream.sender.close()
    for n, handle in enumerate(handles):
        assert stream.receiver.recv(8, socket.MSG_WAITALL) == b"header %d" % n
        for rights in (ALL_BUT_EXECUTE, READ_ONLY):
            received = receiver.recv_handle(stream.receiver)
            assert facts(receiver, received) == [int(rights), *facts(vmm, handle)[1:]]
    assert stream.receiver.recv(100) == b"the end"
    with pytest.raises(EOFError):
        receiver.recv_handle(stream.receiver)


def test_bytes_that_should_have_been_read_first_spoil_one_message_and_leak_nothing(
    vmm: VMM, receiver: VMM, stream: Pair
) -> None:
    stream.sender.sendall(b"unread")
    vmm.send_handle(stream.sender, vmm.mdl_create(PAGE, RW))
    with refused("not a handle's message"):
        receiver.recv_handle(stream.receiver)


def test_non_blocking_sockets_do_not_block(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    pair.sender.setblocking(False)
    pair.receiver.setblocking(False)
    with nothing_opened(), pytest.raises(BlockingIOError):
        receiver.recv_handle(pair.receiver)
    sent = fill(vmm, handle, pair, BlockingIOError)
    for _ in range(sent):
        receiver.handle_close(receiver.recv_handle(pair.receiver))
    with nothing_opened(), pytest.raises(BlockingIOError):
        receiver.recv_handle(pair.receiver)


def fill(vmm: VMM, handle: Handle, pair: Pair, ending: type[OSError]) -> int:
    """Send until that fails so, and tell how many handles were sent."""
    pair.sender.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    sent = 0
    with nothing_opened():
        while sends(vmm, handle, pair.sender, ending):
            sent += 1
    assert sent
    return sent


def sends(vmm: VMM, handle: Handle, sock: socket.socket, ending: type[OSError]) -> bool:
    """Whether a handle is sent; False: it failed so."""
    try:
        vmm.send_handle(sock, handle)
    except ending:
        return False
    return True


def test_timeouts_end_the_waiting(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    pair.sender.settimeout(0.01)
    pair.receiver.settimeout(0.01)
    with nothing_opened(), pytest.raises(TimeoutError):
        receiver.recv_handle(pair.receiver)
    sent = fill(vmm, vmm.mdl_create(PAGE, RW), pair, TimeoutError)
    for _ in range(sent):
        receiver.handle_close(receiver.recv_handle(pair.receiver))


def test_closed_sockets_are_the_system_s_error(vmm: VMM, receiver: VMM, pair: Pair) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    pair.sender.close()
    pair.receiver.close()
    with nothing_opened(), pytest.raises(OSError, match="Bad file descriptor"):
        vmm.send_handle(pair.sender, handle)
    with nothing_opened(), pytest.raises(OSError, match="Bad file descriptor"):
        receiver.recv_handle(pair.receiver)


def send_to_nobody(way: str) -> None:
    """Send where nobody receives any more, in a program that SIGPIPE ends; runs in a child."""
    import asyncio
    import os
    import signal
    import socket

    from vmm_linux import VMM, Event, VmmFlags

    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, VMM() as vmm, Event() as event:
        handle = vmm.mdl_create(os.sysconf("SC_PAGE_SIZE"), VmmFlags.READ)
        try:
            if way == "send_handle":
                vmm.send_handle(ours, handle)
            elif way == "send_handle_async":
                ours.setblocking(False)
                asyncio.run(vmm.send_handle_async(ours, handle))
            else:
                event.send(ours)
        except BrokenPipeError:
            print("refused")


@pytest.mark.parametrize("way", ["send_handle", "send_handle_async", "Event.send"])
def test_sending_to_nobody_ends_no_program_whatever_sigpipe_does_there(way: str) -> None:
    child = run_child(send_to_nobody, way)
    assert (child.returncode, child.stdout, child.stderr) == (0, "refused\n", "")


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_a_closed_other_end_is_the_end(kind: str, vmm: VMM, receiver: VMM) -> None:
    with connected(KINDS[kind]) as pair:
        pair.sender.close()
        with nothing_opened(), pytest.raises(EOFError, match="other end is closed"):
            receiver.recv_handle(pair.receiver)
    with connected(KINDS[kind]) as pair:
        handle = vmm.mdl_create(PAGE, RW)
        pair.receiver.close()
        with nothing_opened(), pytest.raises(BrokenPipeError):
            vmm.send_handle(pair.sender, handle)


def test_datagrams_have_no_end(vmm: VMM, receiver: VMM) -> None:
    with connected(socket.SOCK_DGRAM) as pair:
        pair.sender.send(b"")
        with refused("0 bytes"):
            receiver.recv_handle(pair.receiver)
        handle = vmm.mdl_create(PAGE, RW)
        pair.receiver.close()
        with nothing_opened(), pytest.raises(ConnectionRefusedError):
            vmm.send_handle(pair.sender, handle)
    nowhere = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with nowhere, nothing_opened(), pytest.raises(OSError, match="not connected"):
        vmm.send_handle(nowhere, handle)


def test_only_unix_sockets_carry_handles(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    for family in (socket.AF_INET, socket.AF_NETLINK):
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            with refused("only AF_UNIX"):
                vmm.send_handle(sock, handle)
            with refused("only AF_UNIX"):
                vmm.recv_handle(sock)


def test_what_is_no_socket_is_refused(vmm: VMM) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    with Path("/dev/null").open("rb") as file:
        for sock in (None, 0, file.fileno(), "socket", file, object(), socket.socket):
            with refused("not a socket"):
                vmm.send_handle(sock, handle)  # type: ignore[arg-type]
            with refused("not a socket"):
                vmm.recv_handle(sock)  # type: ignore[arg-type]


OPTIONS = {
    "SO_PASSCRED": [socket.SO_PASSCRED],
    "SO_PASSPIDFD": [SO_PASSPIDFD],
    "SO_TIMESTAMP": [SO_TIMESTAMP],
    "SO_TIMESTAMPNS": [SO_TIMESTAMPNS],
    "all": [socket.SO_PASSCRED, SO_PASSPIDFD, SO_TIMESTAMP],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_what_socket_options_add_to_a_message_is_no_part_of_it(
    options: list[int], vmm: VMM, receiver: VMM, pair: Pair
) -> None:
    for option in options:
        with contextlib.suppress(OSError):
            pair.receiver.setsockopt(socket.SOL_SOCKET, option, 1)
    inner = vmm.mdl_clone(vmm.mdl_clone(filled(vmm, 3), 0, 2 * PAGE), PAGE, PAGE)
    before = kernel.descriptors()
    vmm.send_handle(pair.sender, inner)
    handle = receiver.recv_handle(pair.receiver)
    assert contents(receiver, handle) == [text_of(1)]
    receiver.handle_close(handle)
    for fds in ([], [0] * 8, [0] * 200):
        send_raw(pair.sender, forged(), fds)
        with refused("announced"):
            receiver.recv_handle(pair.receiver)
    assert kernel.descriptors() == before


class ClosesFirst(socket.socket):
    """A socket whose owner closes a VMM while a message is on its way into it."""

    vmm: VMM

    def recvmsg(self, *arguments: Any) -> Any:  # noqa: ANN401  (as the base class has it)
        """Receive, and close the VMM before the answer is there."""
        answer = super().recvmsg(*arguments)
        self.vmm.close()
        return answer


def test_a_vmm_that_is_closed_while_it_waits_keeps_nothing(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    with ClosesFirst(fileno=os.dup(packets.receiver.fileno())) as sock:
        sock.vmm = receiver
        vmm.send_handle(packets.sender, vmm.mdl_create(PAGE, RW))
        with refused("closed", InvalidOperation):
            receiver.recv_handle(sock)
        with refused("closed", InvalidOperation):
            receiver.recv_handle(sock)
        with refused("closed", InvalidOperation):
            receiver.send_handle(sock, 0)


# ---- peers that die


def send_and_die(path: str, kind: int, cut: int) -> None:
    """Send the beginning of a handle's message, and be killed."""
    import os
    import signal

    from test_transfer import connect, filled
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:

        class Cutting(type(sock)):  # type: ignore[misc]
            """A socket that sends no more than the beginning."""

            def sendmsg(self, messages: list[bytes], *ancillary: object) -> int:
                cut_off = [messages[0][:cut]]
                return int(super().sendmsg(cut_off, *ancillary)) if cut else 0

        handle = filled(vmm, 2)
        half = Cutting(fileno=sock.fileno())
        try:
            vmm.send_handle(half, handle)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
@pytest.mark.parametrize("cut", [0, 1, 10, MESSAGE.size - 1])
def test_a_peer_that_is_killed_half_way_leaves_nothing(kind: str, cut: int, receiver: VMM) -> None:
    arguments = {"kind": KINDS[kind], "ending": -signal.SIGKILL}
    with in_process(send_and_die, cut, **arguments) as peer:  # type: ignore[arg-type]
        if cut:
            with refused(f"{cut} bytes"):
                receiver.recv_handle(peer.sock)
        with nothing_opened(), pytest.raises(EOFError):
            receiver.recv_handle(peer.sock)


def test_what_a_peer_sent_before_it_was_killed_is_whole(receiver: VMM) -> None:
    with in_process(send_and_die, MESSAGE.size, ending=-signal.SIGKILL) as peer:
        select.select([peer.sock], [], [])
        handle = receiver.recv_handle(peer.sock)
        with nothing_opened(), pytest.raises(EOFError):
            receiver.recv_handle(peer.sock)
    assert contents(receiver, handle) == [text_of(0), text_of(1)]


def receive_write_and_die(path: str, kind: int) -> None:
    """Receive a handle, write to the buffer, and be killed with it mapped."""
    import os
    import signal

    from test_transfer import RW, connect
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:
        handle = vmm.recv_handle(sock)
        vmm.write(vmm.mdl_map(handle, 0, vmm.mdl_get_size(handle), 0, RW), b"last words")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_receiver_that_is_killed_takes_nothing_with_it(vmm: VMM) -> None:
    handle = filled(vmm, 2)
    with in_process(receive_write_and_die, ending=-signal.SIGKILL) as peer:
        vmm.send_handle(peer.sock, handle)
        assert peer.sock.recv(1) == b""
        with nothing_opened(), pytest.raises(BrokenPipeError):
            vmm.send_handle(peer.sock, handle)
    assert contents(vmm, handle) == [b"last wor", text_of(1)]
    vmm.mdl_seal(handle, Seal.FREEZE)


# ---- what a receiver demands


EVERY_SEAL = [Seal(0), Seal.PUBLISH, Seal.FREEZE, Seal.PUBLISH | Seal.FREEZE]


@pytest.mark.parametrize("require", EVERY_SEAL)
@pytest.mark.parametrize("seals", EVERY_SEAL)
def test_seals_are_demanded(
    require: Seal, seals: Seal, vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = vmm.mdl_create(PAGE, RW)
    if seals:
        vmm.mdl_seal(handle, seals)
    for rights in (ALL_BUT_EXECUTE, READ_ONLY):
        vmm.send_handle(packets.sender, handle, rights)
        strongest = Seal.PUBLISH | Seal.FREEZE if Seal.FREEZE in seals else seals
        if require in strongest:
            received = receiver.recv_handle(packets.receiver, require=require)
            assert receiver.handle_info(received).seals == seals
        else:
            with refused("not sealed", SecurityDisallow):
                receiver.recv_handle(packets.receiver, require=require)


def test_the_largest_size_is_demanded(vmm: VMM, receiver: VMM, packets: Pair) -> None:
    handle = vmm.mdl_create(4 * PAGE, RW)
    sizes = {handle: 4 * PAGE, vmm.mdl_clone(handle, PAGE, 2 * PAGE): 2 * PAGE}
    for sent, size in sizes.items():
        for most in (0, size - 1):
            vmm.send_handle(packets.sender, sent)
            with refused(f"max_size is {most}", SecurityDisallow):
                receiver.recv_handle(packets.receiver, max_size=most)
        for most in (size, 2**64 - 1):
            vmm.send_handle(packets.sender, sent)
            received = receiver.recv_handle(packets.receiver, max_size=most)
            assert receiver.mdl_get_size(received) == size


def send_two(path: str, kind: int) -> None:
    """Send two handles, and tell who does."""
    import os

    from kernel_oracle import PAGE
    from test_transfer import RW, connect
    from vmm_linux import VMM

    with connect(path, kind) as sock, VMM() as vmm:
        for _ in range(2):
            vmm.send_handle(sock, vmm.mdl_create(PAGE, RW))
        # The other end goes first, so that it always finds these messages.
        sock.recv(1)
        print(os.getuid())


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_the_user_at_the_other_end_is_demanded(kind: str, nobody: bool, receiver: VMM) -> None:
    user = NOBODY if nobody and os.geteuid() == 0 else os.geteuid()
    with in_process(send_two, kind=KINDS[kind], nobody=nobody) as peer:
        with refused(f"user {user} is at the other end", SecurityDisallow):
            receiver.recv_handle(peer.sock, peer_uid=user + 1)
        assert receiver.recv_handle(peer.sock, peer_uid=user)
    assert peer.answer == user


def test_users_of_large_numbers_are_told_apart(receiver: VMM) -> None:
    user = 0xFFFF_FFF0 if os.geteuid() == 0 else os.geteuid()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()

        def connect_and_send() -> None:
            os.setuid(user)
            with socket.socket(socket.AF_UNIX) as sock, VMM() as vmm:
                sock.connect(listener.getsockname())
                vmm.send_handle(sock, vmm.mdl_create(PAGE, RW))

        in_child(connect_and_send)
        sock, _ = listener.accept()
    with sock:
        assert receiver.recv_handle(sock, peer_uid=user)


def test_a_socket_that_cannot_tell_who_sends_meets_no_user(vmm: VMM, receiver: VMM) -> None:
    with connected(socket.SOCK_DGRAM) as pair:
        vmm.send_handle(pair.sender, vmm.mdl_create(PAGE, RW))
        assert receiver.recv_handle(pair.receiver, peer_uid=os.geteuid())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as anybody_s:
        anybody_s.bind("")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(anybody_s.getsockname())
            for user in (os.geteuid(), 2**32 - 1):
                vmm.send_handle(sock, vmm.mdl_create(PAGE, RW))
                with refused("does not tell", SecurityDisallow):
                    receiver.recv_handle(anybody_s, peer_uid=user)


def test_demands_that_mean_nothing_are_refused_before_anything_is_read(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    vmm.send_handle(packets.sender, vmm.mdl_create(PAGE, RW))
    wrong: list[dict[str, Any]] = [
        *({"require": value} for value in (4, -1, None, "FREEZE", True)),
        *({name: value} for name in ("max_size", "peer_uid") for value in (-1, 2**64, 1.0, "1")),
    ]
    for demand in wrong:
        with refused("|".join(demand)):
            receiver.recv_handle(packets.receiver, **demand)
    assert receiver.recv_handle(packets.receiver)


# ---- descriptors are scarce


@contextlib.contextmanager
def room_for(count: int) -> Iterator[None]:
    """Leave room for just so many more descriptors."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0) for _ in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[-1] + 1, limits[1]))
    for _ in range(count):
        os.close(taken.pop())
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)


@contextlib.contextmanager
def refused_for_want_of(room: int) -> Iterator[None]:
    """Hold that the block is refused where there is room for just so many more descriptors."""
    with nothing_opened(), pytest.raises(QuotaExceeded, match="RLIMIT_NOFILE"), room_for(room):
        yield


def handles_of_three_sizes(vmm: VMM) -> dict[int, Handle]:
    """A handle that travels with one descriptor, one with two, one with three."""
    handle = filled(vmm, 1)
    clone = vmm.mdl_clone(handle, 0, PAGE)
    return {1: handle, 2: clone, 3: vmm.mdl_clone(clone, 0, PAGE)}


def receive_at_the_limit() -> None:
    """Receive where there is room for fewer descriptors than come, and for just as many."""
    import test_transfer as t
    from vmm_linux import VMM

    for kind in t.KINDS.values():
        with VMM() as vmm, VMM() as receiver, t.connected(kind) as pair:
            for needed, handle in t.handles_of_three_sizes(vmm).items():
                for room in range(needed):
                    vmm.send_handle(pair.sender, handle)
                    with t.refused_for_want_of(room):
                        receiver.recv_handle(pair.receiver)
                vmm.send_handle(pair.sender, handle)
                with t.room_for(needed):
                    received = receiver.recv_handle(pair.receiver)
                assert t.contents(receiver, received) == [t.text_of(0)]


def send_at_the_limit() -> None:
    """Send where there is room for fewer descriptors than go, and for just as many."""
    import socket

    import test_transfer as t
    from kernel_oracle import PAGE
    from vmm_linux import VMM

    with VMM() as vmm, t.connected(socket.SOCK_STREAM) as pair:
        for needed, handle in t.handles_of_three_sizes(vmm).items():
            for room in range(needed):
                with t.refused_for_want_of(room):
                    vmm.send_handle(pair.sender, handle)
            with t.nothing_opened(), t.room_for(needed):
                vmm.send_handle(pair.sender, handle)
        handle = vmm.mdl_create(PAGE, t.RW)
        with t.refused_for_want_of(0):
            vmm.send_handle(pair.sender, handle, t.READ_ONLY)
        # One for the read-only description, which stays, and one that goes.
        with t.room_for(2):
            vmm.send_handle(pair.sender, handle, t.READ_ONLY)


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
@pytest.mark.parametrize("work", [receive_at_the_limit, send_at_the_limit])
def test_at_the_limit_of_descriptors_nothing_is_left(
    work: Callable[[], None], nobody: bool
) -> None:
    child = run_child(work, nobody=nobody, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


# ---- hostile messages


def forged(
    *,
    magic: bytes = b"VMML",
    version: int = 2,
    segments: int = 1,
    identities: int = 0,
    zero: int = 0,
    rights: int = int(READ_ONLY),
    offset: int = 0,
    size: int = PAGE,
    segment_size: int = 0,
    memory_size: int = PAGE,
) -> bytes:
    """A message made by hand; as it stands, of a read-only buffer of one page.

    A ``segment_size`` of 0 is the one that all segments have where these are as large.
    """
    head = (magic, version, segments, identities, zero, rights)
    return MESSAGE.pack(*head, offset, size, segment_size or memory_size // segments, memory_size)


def send_raw(sock: socket.socket, message: bytes, fds: list[int]) -> None:
    """Send bytes with descriptors in one message."""
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    assert sock.sendmsg([message], [rights] if fds else []) == len(message)


def memory(size: int = PAGE, seals: int = SIZED, flags: int = 0) -> int:
    """A memfd, by the kernel's own calls."""
    fd = os.memfd_create("hostile", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def identity() -> int:
    """The identity of a clone, by the kernel's own calls."""
    return memory(0, SEALED | SIZED | UNWRITABLE)


def reopened(fd: int, mode: int) -> int:
    """Another description of the file, in place of this one."""
    other = os.open(f"/proc/self/fd/{fd}", mode)
    os.close(fd)
    return other


def read_only(size: int = PAGE, seals: int = SIZED) -> int:
    """A memory as a reader's handle has it."""
    return reopened(memory(size, seals), os.O_RDONLY)


@contextlib.contextmanager
def open_files(*fds: int) -> Iterator[list[int]]:
    """Close these in the end."""
    try:
        yield list(fds)
    finally:
        for fd in fds:
            os.close(fd)


def test_a_message_made_by_hand_is_as_good_as_one_of_the_package_s(
    receiver: VMM, pair: Pair
) -> None:
    for rights, fd in ((ALL_BUT_EXECUTE, memory(4 * PAGE)), (READ_ONLY, read_only(4 * PAGE))):
        with open_files(identity(), identity(), fd) as fds:
            for count in range(3):
                size = 4 * PAGE if count == 0 else 2 * PAGE
                offset = 4 * PAGE - size
                window: dict[str, Any] = {"offset": offset, "size": size, "memory_size": 4 * PAGE}
                message = forged(identities=count, rights=rights, **window)
                send_raw(pair.sender, message, fds[2 - count :])
                info = receiver.handle_info(receiver.recv_handle(pair.receiver))
                assert (info.rights, info.size, info.seals) == (rights, size, Seal(0))


@pytest.mark.parametrize("with_descriptors", [False, True], ids=["bytes alone", "descriptors"])
def test_a_message_cut_at_any_byte_is_refused(
    with_descriptors: bool, receiver: VMM, packets: Pair
) -> None:
    message = forged(identities=1)
    with open_files(identity(), read_only()) as fds:
        for length in range(0 if with_descriptors else 1, len(message)):
            send_raw(packets.sender, message[:length], fds if with_descriptors else [])
            with refused(f"bad message: {length} bytes, not the 48"):
                receiver.recv_handle(packets.receiver)


def test_a_stream_that_ends_at_any_byte_of_a_message_is_refused(receiver: VMM) -> None:
    message = forged()
    with open_files(read_only()) as fds:
        for length in range(1, len(message)):
            with connected(socket.SOCK_STREAM) as stream:
                send_raw(stream.sender, message[:length], fds)
                stream.sender.close()
                with refused(f"bad message: {length} bytes, not the 48"):
                    receiver.recv_handle(stream.receiver)
                with nothing_opened(), pytest.raises(EOFError):
                    receiver.recv_handle(stream.receiver)


def test_a_message_in_two_parts_is_refused_and_what_follows_the_first_stays_unread(
    receiver: VMM, stream: Pair
) -> None:
    message = forged()
    with open_files(read_only()) as fds:
        for length in range(1, len(message)):
            send_raw(stream.sender, message[:length], fds)
            send_raw(stream.sender, message[length:], fds)
            with refused("bad message"):
                receiver.recv_handle(stream.receiver)
            assert stream.receiver.recv(100) == message[length:]


def test_a_message_with_more_bytes_is_refused_where_messages_are_kept_apart(
    receiver: VMM,
) -> None:
    for kind in (socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        with connected(kind) as pair, open_files(read_only()) as fds:
            for surplus in (1, 32, 1000):
                send_raw(pair.sender, forged() + bytes(surplus), fds)
                with refused("not the 48"):
                    receiver.recv_handle(pair.receiver)


@pytest.mark.parametrize("rights", [ALL_BUT_EXECUTE, READ_ONLY], ids=["writable", "read-only"])
@pytest.mark.parametrize("identities", [0, 1])
def test_whatever_byte_is_flipped_no_handle_says_more_than_the_kernel(
    identities: int, rights: Rights, receiver: VMM, packets: Pair
) -> None:
    pages = 8
    fd = memory(pages * PAGE)
    for page in range(pages):
        os.pwrite(fd, text_of(page), page * PAGE)
    if Rights.MAP_WRITE not in rights:
        fd = reopened(fd, os.O_RDONLY)
    offset, size = (2 * PAGE, 3 * PAGE) if identities else (0, pages * PAGE)
    message = forged(
        identities=identities,
        rights=int(rights),
        offset=offset,
        size=size,
        memory_size=pages * PAGE,
    )
    with open_files(identity(), fd) as fds:
        for place in range(len(message)):
            for change in range(1, 256):
                flipped = bytearray(message)
                flipped[place] ^= change
                send_raw(packets.sender, bytes(flipped), fds[1 - identities :])
                is_legal = says_no_more(bytes(flipped), message, pages * PAGE)
                assert receive_the_truth(receiver, packets.receiver, bytes(flipped)) == is_legal


def says_no_more(flipped: bytes, message: bytes, memory_size: int) -> bool:
    """Whether a flipped message is what a sender may say of these descriptors.

    Rights that the kernel does not hold may be put in or left out, and a clone may be any window.
    """
    rights, offset, size = MESSAGE.unpack(flipped)[5:8]
    changed = rights ^ MESSAGE.unpack(message)[5]
    is_window = 0 < size <= memory_size - offset and offset % PAGE == size % PAGE == 0
    is_clone = message[8] > 0
    return (
        (flipped[:12], flipped[32:]) == (message[:12], message[32:])
        and not changed & ~int(~Rights(0) & ~Rights.MAP_WRITE)
        and (is_window if is_clone else (offset, size) == (0, memory_size))
    )


def open_descriptors() -> list[str]:
    """The numbers of the open descriptors, quickly."""
    with os.scandir("/proc/self/fd") as entries:
        return [entry.name for entry in entries]


def receive_the_truth(receiver: VMM, sock: socket.socket, message: bytes) -> bool:
    """Receive, and hold the handle against the message and the kernel; False: it was refused."""
    before = open_descriptors()
    try:
        handle = receiver.recv_handle(sock)
    except InvalidArgument:
        assert open_descriptors() == before
        return False
    info = receiver.handle_info(handle)
    rights, offset, size = MESSAGE.unpack(message)[5:8]
    assert (info.rights, info.size) == (rights, size)
    if Rights.MAP_READ in info.rights:
        first = offset // PAGE
        assert contents(receiver, handle) == [
            text_of(page) for page in range(first, first + size // PAGE)
        ]
    receiver.handle_close(handle)
    assert open_descriptors() == before
    return True


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
@pytest.mark.parametrize("announced", [0, 1, 2, 3, 4, 100, 253, 254, 2**16 - 1])
@pytest.mark.parametrize("came", [0, 1, 2, 3, 4, 100, 253])
def test_as_many_descriptors_come_as_are_announced_or_all_are_closed(
    announced: int, came: int, kind: str, receiver: VMM
) -> None:
    every_split = {(max(announced - identities, 0), identities) for identities in (0, 1, 2, 3)}
    with connected(KINDS[kind]) as pair, open_files(read_only(), identity()) as fds:
        for segments, identities in every_split:
            every = [*[fds[1]] * identities, *[fds[0]] * 253][:came]
            total = segments + identities
            if total == came and segments == 1 and identities < 3:
                continue
            head: dict[str, Any] = {"segments": max(segments, 1), "identities": identities}
            message = bytearray(forged(**head, memory_size=max(segments, 1) * PAGE))
            message[6:8] = segments.to_bytes(2, "little")
            send_raw(pair.sender, bytes(message), every)
            why = f"{total} descriptors are announced, and {came}"
            if total == came:
                why = f"{segments} segments with {identities} identities|the same memory twice"
            with refused(why):
                receiver.recv_handle(pair.receiver)


def first_of(fds: tuple[int, int]) -> int:
    """The first of two descriptors; the other one is closed."""
    os.close(fds[1])
    return fds[0]


def regular_file(folder: str) -> int:
    """A file without a name in a folder."""
    return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)


def path_of(fd: int) -> int:
    """An O_PATH descriptor of the file, in place of this one."""
    return reopened(fd, os.O_PATH)


def epoll() -> int:
    """An epoll descriptor."""
    with select.epoll() as poll:
        return os.dup(poll.fileno())


SHARED_MEMORY = "/dev/shm"  # noqa: S108  (that very folder)
HUGE = 1 << 30
NO_MEMFD = "a descriptor that is no memfd$"

#: What is no buffer's memory, and why not.
NO_MEMORY: dict[str, tuple[Callable[[], int], str]] = {
    "pipe": (lambda: first_of(os.pipe()), NO_MEMFD),
    "terminal": (lambda: first_of(os.openpty()), NO_MEMFD),
    "null device": (lambda: os.open("/dev/null", os.O_RDWR), NO_MEMFD),
    "zero device": (lambda: os.open("/dev/zero", os.O_RDONLY), NO_MEMFD),
    "file": (lambda: regular_file(tempfile.gettempdir()), "no memfd|seals"),
    "program": (lambda: os.open("/proc/self/exe", os.O_RDONLY), NO_MEMFD),
    "file in /dev/shm": (lambda: regular_file(SHARED_MEMORY), "seals 0x1; 0x[6f] are needed"),
    "folder": (lambda: os.open("/", os.O_RDONLY), NO_MEMFD),
    "folder /dev/shm": (lambda: os.open(SHARED_MEMORY, os.O_RDONLY), NO_MEMFD),
    "file of /proc": (lambda: os.open("/proc/self/mem", os.O_RDONLY), NO_MEMFD),
    "path of memory": (lambda: path_of(memory()), NO_MEMFD),
    "path of a folder": (lambda: os.open("/", os.O_PATH), NO_MEMFD),
    "eventfd": (lambda: os.eventfd(0), NO_MEMFD),
    "epoll": (epoll, NO_MEMFD),
    "pidfd": (lambda: os.pidfd_open(os.getpid()), NO_MEMFD),
    "socket": (lambda: socket.socket(socket.AF_UNIX).detach(), NO_MEMFD),
    "internet socket": (lambda: socket.socket(socket.AF_INET).detach(), NO_MEMFD),
    "unsealed memfd": (lambda: reopened(memory(seals=0), os.O_RDONLY), "seals 0x0; 0x6"),
    "memfd that takes no seals": (lambda: os.memfd_create("hostile"), "seals 0x1; 0x6"),
    "memfd that can grow": (lambda: read_only(seals=2), "seals 0x2; 0x6"),
    "memfd that can shrink": (lambda: read_only(seals=4), "seals 0x4; 0x6"),
    "memfd of huge pages": (
        lambda: reopened(memory(HUGE, flags=os.MFD_HUGETLB), os.O_RDONLY),
        "no memfd of ordinary pages",
    ),
    "empty memfd of huge pages": (
        lambda: reopened(memory(0, flags=os.MFD_HUGETLB), os.O_RDONLY),
        "no memfd of ordinary pages",
    ),
    "writable memory": (memory, "access mode 2, the rights need 0"),
    "memory that can only be written": (
        lambda: reopened(memory(), os.O_WRONLY),
        "access mode 1, the rights need 0",
    ),
    "no bytes": (lambda: read_only(0), "memory of 0 bytes, not whole pages"),
    "an identity": (lambda: reopened(identity(), os.O_RDONLY), "memory of 0 bytes"),
    "less than a page": (lambda: read_only(PAGE - 1), f"memory of {PAGE - 1} bytes"),
    "more than a page": (lambda: read_only(PAGE + 1), f"memory of {PAGE + 1} bytes"),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_what_is_no_memory_of_a_buffer_is_refused(name: str, receiver: VMM, pair: Pair) -> None:
    make, why = NO_MEMORY[name]
    with open_files(identity(), identity(), make()) as fds:
        for count in range(3):
            send_raw(pair.sender, forged(identities=count), fds[2 - count :])
            with refused(f"bad message: .*({why})"):
                receiver.recv_handle(pair.receiver)


#: What can be no clone's identity, and why not.
NO_IDENTITY = {
    **{name: case for name, case in NO_MEMORY.items() if case[1] == NO_MEMFD},
    "file in /dev/shm": NO_MEMORY["file in /dev/shm"],
    "empty memfd": (lambda: memory(0, seals=0), "seals 0x0; 0xf are needed"),
    "memfd that can grow": (lambda: memory(0, 0xB), "seals 0xb; 0xf are needed"),
    "memfd that takes more seals": (lambda: memory(0, 0xE), "seals 0xe; 0xf are needed"),
    "memfd that can be written": (lambda: memory(0, 0x7), "seals 0x7; 0xf are needed"),
    "memfd of a page": (lambda: memory(PAGE, 0xF), "an identity that is not empty"),
    "memfd of a byte": (lambda: memory(1, 0xF), "an identity that is not empty"),
    "memfd of huge pages": (
        lambda: memory(0, 0xF, os.MFD_HUGETLB),
        "no memfd of ordinary pages",
    ),
}


@pytest.mark.parametrize("name", NO_IDENTITY)
def test_what_is_no_identity_of_a_clone_is_refused(name: str, receiver: VMM, pair: Pair) -> None:
    make, why = NO_IDENTITY[name]
    with open_files(read_only(), make(), identity()) as (fd, wrong, right):
        for fds in ([wrong, fd], [wrong, right, fd], [right, wrong, fd]):
            send_raw(pair.sender, forged(identities=len(fds) - 1), fds)
            with refused(f"bad message: .*({why})"):
                receiver.recv_handle(pair.receiver)


def test_rights_and_access_mode_that_do_not_agree_are_refused(receiver: VMM, pair: Pair) -> None:
    with open_files(memory(), read_only()) as (writable, not_writable):
        for rights in (READ_ONLY, Rights(0), Rights.MAP_READ | Rights.MAP_EXECUTE):
            send_raw(pair.sender, forged(rights=int(rights)), [writable])
            with refused("access mode 2, the rights need 0"):
                receiver.recv_handle(pair.receiver)
        for rights in (ALL_BUT_EXECUTE, Rights.MAP_WRITE, ~Rights(0)):
            send_raw(pair.sender, forged(rights=int(rights)), [not_writable])
            with refused("access mode 0, the rights need 2"):
                receiver.recv_handle(pair.receiver)


HEADS: dict[str, tuple[dict[str, Any], str]] = {
    "no magic": ({"magic": bytes(4)}, "not a handle's message"),
    "other magic": ({"magic": b"LMMV"}, "not a handle's message"),
    "version 0": ({"version": 0}, "version 0 of the format; this package knows 2"),
    "version 1": ({"version": 1}, "version 1 of the format; this package knows 2"),
    "version 3": ({"version": 3}, "version 3 of the format; this package knows 2"),
    "version 256": ({"version": 256}, "version 256 of the format"),
    "unknown rights": ({"rights": 0x4F}, "unknown rights 0x4f"),
    "all rights": ({"rights": 2**32 - 1}, "unknown rights 0xffffffff"),
    "not zero": ({"zero": 1}, "not a handle's message"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_that_is_none_of_this_format_s_is_refused(
    name: str, receiver: VMM, pair: Pair
) -> None:
    values, why = HEADS[name]
    with open_files(read_only()) as fds:
        send_raw(pair.sender, forged(**values), fds)
        with refused(why):
            receiver.recv_handle(pair.receiver)


TOP = 2**64 - PAGE
#: Buffers that do not lie in a memory of four pages: whether a clone, offset, size.
LIES = [
    *((clone, 0, size) for clone in (False, True) for size in (0, 1, PAGE + 1, 5 * PAGE, TOP)),
    *((clone, PAGE, size) for clone in (False, True) for size in (4 * PAGE, TOP)),
    *((False, 0, PAGE), (False, PAGE, PAGE), (False, PAGE, 3 * PAGE), (False, 4 * PAGE, 4 * PAGE)),
    *((True, offset, PAGE) for offset in (1, PAGE - 1, 4 * PAGE, 5 * PAGE, 2**63, TOP)),
    *((True, TOP, size) for size in (2 * PAGE, 4 * PAGE, TOP)),
    (True, 2**64 - 1, 2**64 - 1),
    (True, 4 * PAGE, 0),
]


@pytest.mark.parametrize(("clone", "offset", "size"), LIES)
def test_a_buffer_that_is_not_inside_its_memory_is_refused(
    clone: bool, offset: int, size: int, receiver: VMM, packets: Pair
) -> None:
    window: dict[str, Any] = {"offset": offset, "size": size, "memory_size": 4 * PAGE}
    with open_files(identity(), identity(), read_only(4 * PAGE)) as fds:
        for count in (1, 2) if clone else (0,):
            send_raw(packets.sender, forged(identities=count, **window), fds[2 - count :])
            with refused("not whole pages|of a memory of"):
                receiver.recv_handle(packets.receiver)


def test_a_memory_larger_than_all_addresses_is_a_buffer_of_that_size(
    receiver: VMM, packets: Pair
) -> None:
    size = 2**63 - PAGE
    receiver.limits = Limits.unlimited()
    with open_files(read_only(size)) as fds:
        send_raw(packets.sender, forged(size=size, memory_size=size), fds)
        with refused("max_size", SecurityDisallow):
            receiver.recv_handle(packets.receiver, max_size=1 << 30)
        send_raw(packets.sender, forged(size=size, memory_size=size), fds)
        handle = receiver.recv_handle(packets.receiver)
    assert receiver.mdl_get_size(handle) == size
    with pytest.raises(OutOfMemory):
        receiver.mdl_map(handle, 0, size, 0, READ)
    va = receiver.mdl_map(handle, size - PAGE, PAGE, 0, READ)
    assert receiver.read(va, PAGE) == bytes(PAGE)


def test_the_same_descriptor_as_memory_and_identity_is_refused(
    receiver: VMM, packets: Pair
) -> None:
    with open_files(read_only(), read_only(seals=SIZED | UNWRITABLE | SEALED)) as fds:
        for fd, why in zip(fds, ("seals", "not empty"), strict=True):
            send_raw(packets.sender, forged(identities=1), [fd, fd])
            with refused(why):
                receiver.recv_handle(packets.receiver)


def test_control_data_without_descriptors_is_refused(receiver: VMM, packets: Pair) -> None:
    credentials = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())
    control = (socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)
    packets.receiver.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    packets.sender.sendmsg([forged()], [control])
    with refused("1 descriptors are announced, and 0"):
        receiver.recv_handle(packets.receiver)


def test_a_receiver_goes_on_after_messages_that_it_refused(
    vmm: VMM, receiver: VMM, packets: Pair
) -> None:
    handle = filled(vmm, 1)
    with open_files(*(make() for make, _ in NO_MEMORY.values())) as fds, nothing_opened():
        for fd in fds:
            send_raw(packets.sender, forged(), [fd])
            vmm.send_handle(packets.sender, handle)
            with refused("bad message"):
                receiver.recv_handle(packets.receiver)
            received = receiver.recv_handle(packets.receiver)
            assert contents(receiver, received) == [text_of(0)]
            receiver.handle_close(received)

"""What tests of transfers share: connected sockets, other processes, and scarce descriptors.

The functions that run in other processes import for themselves what they use.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import socket
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import kernel_oracle as kernel
from children import TESTS_IMPORTABLE, run_child
from constants import READ, RW
from kernel_oracle import PAGE
from vmm_linux import VMM, Rights, VmmError, VmmFlags
from vmm_linux.errors import InvalidArgument, QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm_linux import Handle


KINDS = {
    "stream": socket.SOCK_STREAM,
    "seqpacket": socket.SOCK_SEQPACKET,
    "datagram": socket.SOCK_DGRAM,
}


# ---- what the tests share ------------------------------------------------------------------------


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


# ---- other processes -----------------------------------------------------------------------------


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

    from transfers import connect, tell_of_one
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


# ---- descriptors are scarce ----------------------------------------------------------------------


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

"""Benchmarks of shared memory: made and ended, handed to another process, read there."""

from __future__ import annotations

import fcntl
import mmap
import os
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from socket import recv_fds, send_fds, socketpair
from typing import TYPE_CHECKING, Final

from benchmarks.harness import FORK, US, Contestant, at_most, benchmark, faster, loop, peer_is_gone
from benchmarks.memory import PAGE, READ, READ_WRITE, SIZE
from vmm_linux import VMM

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.queues import Queue
    from socket import socket

    from benchmarks.harness import Stage
    from vmm_linux.handles import Handle

SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
BULK: Final = 256 << 20
MARKS: Final = b"\1" * (BULK // PAGE)
"""The first byte of every page of the bulk."""
PIPE: Final = 1 << 20
"""Bytes in a pipe: the usual fs.pipe-max-size."""
NUMBER: Final = b"8 bytes."
RIGHT: Final = b"\1"
HELD: Final = f"{US}, held by both"
HELD_IN_C: Final = "C, held by both"


def ask(sock: socket, question: bytes = b"?") -> bytes:
    """Send a child a question, or nothing if it has one; wait for its answer."""
    sock.send(question)
    return sock.recv(64)


def answer_questions(sock: socket, work: Callable[[], bytes]) -> None:
    """Do the work for each question of the parent."""
    while sock.recv(1):
        sock.send(work())


def expect(answer: bytes, expected: bytes) -> None:
    """Check that the child has read the written bytes."""
    if answer != expected:
        peer_is_gone()


def memfd() -> int:
    """A sealed memfd of 64 KiB, by Python's own means."""
    fd = os.memfd_create("bench", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


@benchmark("MDL create + map + free + close, 64 KiB", at_most(1.35), faster(3.5, "SharedMemory"))
def mdl_cycle(stage: Stage) -> dict[str, Contestant]:
    """A buffer without a name, against those with one that is made and unlinked."""
    vmm = stage.vmm()
    create, map_it, free, close = vmm.mdl_create, vmm.mdl_map, vmm.free, vmm.handle_close
    resource_tracker.ensure_running()

    def ours(count: int) -> None:
        for _ in range(count):
            handle = create(SIZE, READ_WRITE)
            free(map_it(handle, 0, SIZE, 0, READ_WRITE), SIZE)
            close(handle)

    def by_os(count: int) -> None:
        for _ in range(count):
            fd = memfd()
            mmap.mmap(fd, SIZE).close()
            os.close(fd)

    def by_shared_memory(count: int) -> None:
        for _ in range(count):
            shared = SharedMemory(create=True, size=SIZE)
            shared.close()
            shared.unlink()

    contestants = {
        "C": stage.in_c("create_map_free_close", SIZE),
        US: loop(ours),
        "os + mmap": loop(by_os),
        "SharedMemory": loop(by_shared_memory),
    }
    if posix_ipc := stage.peer("posix_ipc"):

        def by_posix_ipc(count: int) -> None:
            for _ in range(count):
                named = posix_ipc.SharedMemory(None, posix_ipc.O_CREX, size=SIZE)
                mmap.mmap(named.fd, SIZE).close()
                named.close_fd()
                named.unlink()

        contestants["posix_ipc"] = loop(by_posix_ipc)
    return contestants


# ---- handed over --------------------------------------------------------------------------------


def serve_handles(sock: socket) -> None:
    """Map each received buffer, answer with its first bytes, and end it."""
    with VMM() as vmm:
        while True:
            try:
                handle = vmm.recv_handle(sock)
            except EOFError:
                return
            va = vmm.mdl_map(handle, 0, vmm.mdl_get_size(handle), 0, READ)
            sock.send(vmm.read(va, len(NUMBER)))
            vmm.free(va, SIZE)
            vmm.handle_close(handle)


def serve_held(sock: socket) -> None:
    """Map the one received buffer; answer each question with its first bytes."""
    with VMM() as vmm:
        handle = vmm.recv_handle(sock)
        va = vmm.mdl_map(handle, 0, SIZE, 0, READ)
        with vmm.view(va, len(NUMBER)) as view:
            answer_questions(sock, lambda: bytes(view))


def serve_descriptors(sock: socket) -> None:
    """As ``serve_handles``, with Python's own calls, and without checks."""
    while True:
        descriptors = recv_fds(sock, 64, 1)[1]
        if not descriptors:
            return
        with mmap.mmap(descriptors[0], SIZE, prot=mmap.PROT_READ) as memory:
            sock.send(memory[: len(NUMBER)])
        os.close(descriptors[0])


def serve_names(sock: socket) -> None:
    """Attach each SharedMemory by its received name, and answer with its first bytes."""
    while name := sock.recv(64):
        shared = SharedMemory(name.decode())
        sock.send(bytes(bytes_of(shared)[: len(NUMBER)]))
        shared.close()


def bytes_of(shared: SharedMemory) -> memoryview:
    """The memory of one that is open; only a closed one has none."""
    if shared.buf is None:
        raise ValueError("SharedMemory without memory")
    return shared.buf


def hand_over_fresh(stage: Stage) -> Callable[[int], None]:
    """A buffer made, filled, sent, answered for and ended, each time."""
    vmm = stage.vmm()
    sock = stage.child(serve_handles)

    def ours(count: int) -> None:
        for _ in range(count):
            handle = vmm.mdl_create(SIZE, READ_WRITE)
            va = vmm.mdl_map(handle, 0, SIZE, 0, READ_WRITE)
            vmm.write(va, NUMBER)
            vmm.send_handle(sock, handle)
            expect(sock.recv(64), NUMBER)
            vmm.free(va, SIZE)
            vmm.handle_close(handle)

    return ours


def ask_about_held(stage: Stage) -> Callable[[int], None]:
    """A buffer that both sides have mapped, filled and answered for each time."""
    vmm = stage.vmm()
    sock = stage.child(serve_held)
    handle = vmm.mdl_create(SIZE, READ_WRITE)
    view = stage.enter_context(vmm.view(vmm.mdl_map(handle, 0, SIZE, 0, READ_WRITE), SIZE))
    vmm.send_handle(sock, handle)

    def ours(count: int) -> None:
        for _ in range(count):
            view[: len(NUMBER)] = NUMBER
            expect(ask(sock), NUMBER)

    return ours


def ask_in_c_about_held(stage: Stage) -> Contestant:
    """As ``ask_about_held``, by the baseline."""
    sock = stage.child(lambda sock: stage.baseline.call("serve", sock.fileno(), 1))
    fd = memfd()
    stage.callback(os.close, fd)
    for at in range(0, SIZE, PAGE):
        os.pwrite(fd, b"\1", at)
    stage.baseline.call("hand_over_populated", 1, sock.fileno(), fd, SIZE)
    return stage.in_c("ask_about_held", sock.fileno(), SIZE)


def hand_over_descriptor(stage: Stage) -> Callable[[int], None]:
    """As ``hand_over_fresh``, with Python's own calls."""
    sock = stage.child(serve_descriptors)

    def by_os(count: int) -> None:
        for _ in range(count):
            fd = memfd()
            with mmap.mmap(fd, SIZE) as memory:
                memory[: len(NUMBER)] = NUMBER
                send_fds(sock, [NUMBER], [fd])
                expect(sock.recv(64), NUMBER)
            os.close(fd)

    return by_os


def hand_over_name(stage: Stage) -> Callable[[int], None]:
    """As ``hand_over_fresh``, with SharedMemory."""
    resource_tracker.ensure_running()  # the child must have the same one
    sock = stage.child(serve_names)

    def by_name(count: int) -> None:
        for _ in range(count):
            shared = SharedMemory(create=True, size=SIZE)
            bytes_of(shared)[: len(NUMBER)] = NUMBER
            expect(ask(sock, shared.name.encode()), NUMBER)
            shared.close()
            shared.unlink()

    return by_name


@benchmark(
    "64 KiB handed to another process, mapped and answered",
    faster(2.5, "SharedMemory"),
    faster(10, "SharedMemory", ours=HELD),
)
def hand_over(stage: Stage) -> dict[str, Contestant]:
    """A fresh buffer each time, but for the one that both hold.

    Parent and child are on one CPU: waking another one would hide the rest.
    """
    in_c = stage.child(lambda sock: stage.baseline.call("serve", sock.fileno(), 0))
    return {
        "C": stage.in_c("hand_over_fresh", in_c.fileno(), SIZE),
        HELD_IN_C: ask_in_c_about_held(stage),
        US: loop(hand_over_fresh(stage)),
        HELD: loop(ask_about_held(stage)),
        "os + mmap + send_fds": loop(hand_over_descriptor(stage)),
        "SharedMemory": loop(hand_over_name(stage)),
    }


# ---- 256 MiB ------------------------------------------------------------------------------------


def read_every_page(memory: memoryview) -> bytes:
    """Read the first byte of every page: whether all are as written."""
    return RIGHT if memory[::PAGE] == MARKS else b"\0"


def serve_bulk_handles(sock: socket) -> None:
    """Map each received buffer, read every page, and end it."""
    with VMM() as vmm:
        while True:
            try:
                handle = vmm.recv_handle(sock)
            except EOFError:
                return
            va = vmm.mdl_map(handle, 0, BULK, 0, READ)
            with vmm.view(va, BULK) as view:
                answer = read_every_page(view)
            del view  # or the pages could not be freed
            vmm.free(va, BULK)
            vmm.handle_close(handle)
            sock.send(answer)


def serve_bulk_held(sock: socket) -> None:
    """Map the one received buffer; read every page for each question."""
    with VMM() as vmm:
        va = vmm.mdl_map(vmm.recv_handle(sock), 0, BULK, 0, READ)
        with vmm.view(va, BULK) as view:
            answer_questions(sock, lambda: read_every_page(view))


def serve_pipe(sock: socket, pipe: int) -> None:
    """Read the bulk out of a pipe, and then every page of it."""
    with memoryview(mmap.mmap(-1, BULK)) as memory:

        def work() -> bytes:
            got = 0
            while got < BULK:
                got += os.readv(pipe, [memory[got:]])
            return read_every_page(memory)

        answer_questions(sock, work)


def serve_stream(sock: socket) -> None:
    """Read the bulk out of the socket, and then every page of it."""
    with memoryview(mmap.mmap(-1, BULK)) as memory:
        while got := sock.recv_into(memory):
            while got < BULK:
                got += sock.recv_into(memory[got:])
            sock.send(read_every_page(memory))


def serve_queue(sock: socket, queue: Queue[bytes]) -> None:
    """Take the bulk out of a queue, and read every page of it."""
    answer_questions(sock, lambda: read_every_page(memoryview(queue.get())))


def populated(stage: Stage) -> tuple[VMM, Handle, memoryview]:
    """A buffer with all its memory, a mark in every page; its VMM, handle, and a view of it."""
    vmm = stage.vmm()
    handle = vmm.mdl_create(BULK, READ_WRITE)
    view = stage.enter_context(vmm.view(vmm.mdl_map(handle, 0, BULK, 0, READ_WRITE), BULK))
    view[::PAGE] = MARKS
    return vmm, handle, view


def bulk_by_handle(stage: Stage, vmm: VMM, handle: Handle) -> dict[str, Contestant]:
    """The buffer sent each time, and held by both."""
    sock = stage.child(serve_bulk_handles)
    held = stage.child(serve_bulk_held)
    vmm.send_handle(held, handle)

    def sent(count: int) -> None:
        for _ in range(count):
            vmm.send_handle(sock, handle)
            expect(sock.recv(1), RIGHT)

    def asked(count: int) -> None:
        for _ in range(count):
            expect(ask(held), RIGHT)

    return {US: loop(sent), HELD: loop(asked)}


def descriptor_of(vmm: VMM, handle: Handle) -> int:
    """The memory of a buffer, as a receiver without a VMM gets it."""
    sending, receiving = socketpair()
    with sending, receiving:
        vmm.send_handle(sending, handle)
        return recv_fds(receiving, 64, 1)[1][0]


def bulk_in_c(stage: Stage, vmm: VMM, handle: Handle) -> dict[str, Contestant]:
    """The same memory by the baseline: the speed of reading depends on the memory's place."""
    sent = stage.child(lambda sock: stage.baseline.call("serve", sock.fileno(), 0))
    held = stage.child(lambda sock: stage.baseline.call("serve", sock.fileno(), 1))
    fd = descriptor_of(vmm, handle)
    stage.callback(os.close, fd)
    stage.baseline.call("hand_over_populated", 1, held.fileno(), fd, BULK)
    return {
        "C": stage.in_c("hand_over_populated", sent.fileno(), fd, BULK),
        HELD_IN_C: stage.in_c("ask_about_held", held.fileno(), BULK),
    }


def bulk_by_pipe(stage: Stage, view: memoryview) -> Contestant:
    """All bytes through a pipe as large as a user may make it, which is faster than a usual one."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, PIPE)
    stage.callback(os.close, writing)
    stage.callback(os.close, reading)
    sock = stage.child(serve_pipe, reading)

    def measure(count: int) -> None:
        for _ in range(count):
            sock.send(b"?")
            sent = 0
            while sent < BULK:
                sent += os.write(writing, view[sent:])
            expect(sock.recv(1), RIGHT)

    return loop(measure)


def bulk_by_socket(stage: Stage, view: memoryview) -> Contestant:
    """All bytes through a Unix socket."""
    sock = stage.child(serve_stream)

    def measure(count: int) -> None:
        for _ in range(count):
            sock.sendall(view)
            expect(sock.recv(1), RIGHT)

    return loop(measure)


def bulk_by_queue(stage: Stage, view: memoryview) -> Contestant:
    """All bytes through a queue; that they have to be ``bytes`` is not timed."""
    data = bytes(view)
    queue: Queue[bytes] = FORK.Queue()
    stage.callback(queue.join_thread)
    stage.callback(queue.close)
    sock = stage.child(serve_queue, queue)

    def measure(count: int) -> None:
        for _ in range(count):
            sock.send(b"?")
            queue.put(data)
            expect(sock.recv(1), RIGHT)

    return loop(measure)


@benchmark(
    "256 MiB to another process, every page read",
    at_most(1.15),
    faster(12, "pipe"),
    faster(50, "pipe", ours=HELD),
    rarely=30,
    apart=True,
)
def bulk(stage: Stage) -> dict[str, Contestant]:
    """A buffer with all its memory. Parent and child each have a CPU of their own."""
    vmm, handle, view = populated(stage)
    # The queue comes last: it starts a thread, and children are forked before it.
    return {
        **bulk_in_c(stage, vmm, handle),
        **bulk_by_handle(stage, vmm, handle),
        "pipe": bulk_by_pipe(stage, view),
        "Unix socket": bulk_by_socket(stage, view),
        "multiprocessing.Queue": bulk_by_queue(stage, view),
    }

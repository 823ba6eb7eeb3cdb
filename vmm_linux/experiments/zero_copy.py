"""Messages through a pipe, compared with messages in shared memory."""

import math
import mmap
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from statistics import median
from typing import NamedTuple

from vmm_linux import VMM, Mdl, Rights
from vmm_linux import experiments as lab

ORDER = 85
TITLE = "Zero-copy against pipes"
QUESTION = "From what size on is shared memory faster than a pipe, and how must it be used?"
PREDICTION = """
    A pipe copies every byte in and out, so its time grows with the message. A buffer that both
    processes hold takes a signal, whatever the length: it wins from some KiB on, and for MiB many
    times over. A buffer made anew for each message costs a dozen system calls and page faults on
    both sides: it loses while messages are small, and its gain stays small when they are large.
"""
EXPLANATION = """
    Each time is that of a message and its answer: the sender writes to every page, the receiver
    looks at every page, and a byte comes back. Through the pipe both processes copy the message,
    as much at a time as the pipe holds (64 KiB as a rule). Of the buffer that both hold, a byte
    through a socket says that it is filled, and nothing else moves. A fresh buffer is made, filled
    with a fault and a cleared page at a time, sent as a descriptor, mapped and unmapped by both: it
    saves two copies, and spends as much or more on getting memory, on virtual machines above all,
    so that its line may meet the pipe's late or never. It is using memory again that makes sharing
    fast: a ring of buffers, not a buffer a message. Beyond the size of the caches copying is
    dearer, and the gain larger. With one core, each message costs two switches between the
    processes in any way.
"""

KIB, MIB = 1 << 10, 1 << 20
PAGE = mmap.PAGESIZE


class Ends(NamedTuple):
    """One side's means: a socket, and an end of a pipe."""

    sock: socket.socket
    pipe: int

    def close(self) -> None:
        """Close both."""
        self.sock.close()
        os.close(self.pipe)


Sender = Callable[[VMM, int, Ends], Callable[[int], None]]
"""Prepares a sender's side, and returns a function that sends a message with a number."""
Receiver = Callable[[VMM, int, Ends], Callable[[], None]]
"""Prepares a receiver's side, and returns a function that receives a message and answers."""


class Cost(NamedTuple):
    """The cost of a message: seconds, how often read(2) and write(2) copied it, page faults."""

    seconds: float
    copies: float
    faults: float


def measure(run: lab.Run) -> None:
    """Send messages of many sizes in each way."""
    largest = run.choose(quick=4 * MIB, full=64 * MIB)
    sizes = [64]
    while sizes[-1] < min(largest, run.memory // 8):
        sizes.append(sizes[-1] * run.choose(quick=16, full=4))
    costs = [
        [cost_of(run, size, *way) for way in WAYS.values()] for size in run.steps(sizes, "sizes")
    ]
    title = "A message to another process, and its answer"
    table = run.table(title, "message [B]", *(f"{way} [µs]" for way in WAYS))
    for size, row in zip(sizes, costs, strict=True):
        table.add(size, *(cost.seconds * 1e6 for cost in row))
    plot = run.plot(title, "message [B]", "time [µs]", log="xy")
    plot.add_columns(table, "message", *WAYS)
    claim(run, sizes, costs)


def cost_of(run: lab.Run, size: int, sender: Sender, receiver: Receiver) -> Cost:
    """Send messages of a size in a way to a process that answers each."""
    rounds = run.choose(quick=15, full=30)
    (ours, its), (source, sink) = socket.socketpair(), os.pipe()
    mine, theirs = Ends(ours, sink), Ends(its, source)
    with closing(mine), run.child(receive, receiver, size, rounds, (theirs, mine)) as child:
        theirs.close()
        send = sender(run.vmm, size, mine)

        def exchange(number: int) -> None:
            send(number)
            if ours.recv(1) != bytes([number]):
                raise ValueError(f"message {number} of {size} bytes did not arrive as it was sent")

        exchange(0)  # mapping during the first message does not count
        written = copied("wchar")
        times = [lab.timed(exchange, number) for number in range(1, rounds + 1)]
        written = copied("wchar") - written
        read, faults = child.receive()
    return Cost(median(times), (written + read) / size / rounds, faults / rounds)


def receive(
    connection: Connection, receiver: Receiver, size: int, rounds: int, ends: tuple[Ends, Ends]
) -> None:
    """In the receiver: read and answer every message, and report the cost."""
    mine, its = ends
    its.close()  # else the pipe would not end with the sender
    with VMM() as vmm:
        look = receiver(vmm, size, mine)
        look()
        read, faults = copied("rchar"), lab.minor_faults()
        for _ in range(rounds):
            look()
        connection.send((copied("rchar") - read, lab.minor_faults() - faults))


def copied(what: str) -> int:
    """The bytes that read(2) ("rchar") or write(2) ("wchar") copied so far; 0: unknown."""
    with suppress(OSError, lab.NotObservable):
        return lab.told("/proc/self/io", what)
    return 0


def fill(view: memoryview, number: int) -> None:
    """Make a message: write its number to every page."""
    view[::PAGE] = bytes([number]) * -(-len(view) // PAGE)


def answer(sock: socket.socket, view: memoryview) -> None:
    """Read every page of a message, and send its number back if all have it."""
    seen = bytes(view[::PAGE])
    sock.send(seen[:1] if seen.count(seen[0]) == len(seen) else b"?")


def in_pages(size: int) -> int:
    """A size rounded up to pages, in bytes."""
    return -(-size // PAGE) * PAGE


def private(vmm: VMM, size: int) -> memoryview:
    """Private memory of a process."""
    region = vmm.region(in_pages(size))
    region.commit()
    return region.view(0, size)


def through_a_pipe(vmm: VMM, size: int, ends: Ends) -> Callable[[int], None]:
    """Make each message in private memory, and write it to a pipe."""
    view = private(vmm, size)

    def send(number: int) -> None:
        fill(view, number)
        done = 0
        while done < size:
            done += os.write(ends.pipe, view[done:])

    return send


def out_of_a_pipe(vmm: VMM, size: int, ends: Ends) -> Callable[[], None]:
    """Read each message into private memory."""
    view = private(vmm, size)

    def receive_one() -> None:
        done = 0
        while done < size:
            count = os.readv(ends.pipe, [view[done:]])
            if count == 0:
                raise EOFError("the sender is gone")
            done += count
        answer(ends.sock, view)

    return receive_one


def into_a_held_buffer(vmm: VMM, size: int, ends: Ends) -> Callable[[int], None]:
    """Make each message in one buffer, and send a byte when it is ready."""
    mdl = vmm.mdl(in_pages(size))
    view = mdl.map().view(0, size)
    vmm.send_handle(ends.sock, mdl.handle, Rights.MAP_READ)

    def send(number: int) -> None:
        fill(view, number)
        ends.sock.send(b"!")

    return send


def in_a_held_buffer(vmm: VMM, size: int, ends: Ends) -> Callable[[], None]:
    """Read each message in place."""
    view = Mdl.from_handle(vmm, vmm.recv_handle(ends.sock)).map().view(0, size)

    def receive_one() -> None:
        ends.sock.recv(1)
        answer(ends.sock, view)

    return receive_one


def into_a_fresh_buffer(vmm: VMM, size: int, ends: Ends) -> Callable[[int], None]:
    """Make a buffer for each message, and send its handle."""

    def send(number: int) -> None:
        with vmm.mdl(in_pages(size)) as mdl, mdl.map() as region:
            fill(region.view(0, size), number)
            vmm.send_handle(ends.sock, mdl.handle, Rights.MAP_READ)

    return send


def in_a_fresh_buffer(vmm: VMM, size: int, ends: Ends) -> Callable[[], None]:
    """Map the received buffer of each message."""

    def receive_one() -> None:
        with Mdl.from_handle(vmm, vmm.recv_handle(ends.sock)) as mdl, mdl.map() as region:
            answer(ends.sock, region.view(0, size))

    return receive_one


WAYS: dict[str, tuple[Sender, Receiver]] = {
    "pipe": (through_a_pipe, out_of_a_pipe),
    "buffer held by both": (into_a_held_buffer, in_a_held_buffer),
    "fresh buffer": (into_a_fresh_buffer, in_a_fresh_buffer),
}


def claim(run: lab.Run, sizes: Sequence[int], costs: Sequence[Sequence[Cost]]) -> None:
    """Compare with the prediction."""
    pipe, held, fresh = costs[-1]
    with run.part("Bytes that read(2) and write(2) copied"):
        lab.need(copied("rchar"), "this kernel does not count them for a process (/proc/self/io)")
        run.physical("A pipe copies every byte twice", pipe.copies, lab.between(2, 2.1), "times")
        most = max(held.copies, fresh.copies)
        run.physical("Shared memory is not copied", most, lab.at_most(0.01), "times")
    run.physical("A buffer that both hold does not fault", held.faults, lab.at_most(5), "a message")
    run.physical(
        "A fresh buffer faults in its receiver", fresh.faults, lab.at_least(1), "a message"
    )

    table = run.table("Where the lines cross", "way | beats the pipe from [B]")
    for number, way in enumerate(WAYS):
        if number:
            gains = [math.log(row[0].seconds / row[number].seconds) for row in costs]
            table.add(way, crossing(sizes, gains))
    of_held, of_fresh = table.column("beats the pipe from")
    run.timing("A buffer that both hold beats the pipe", of_held, lab.at_most(64 * KIB), "B")
    run.timing(
        "A fresh buffer needs more bytes for that", of_fresh, lab.at_least(of_held or 0), "B"
    )
    gain = pipe.seconds / held.seconds
    run.timing("A large message shows many times the gain", gain, lab.at_least(5), "times")


def crossing(sizes: Sequence[int], gains: Sequence[float]) -> int | None:
    """The smallest size with a gain, interpolated between measured ones; None: no gain."""
    without = [number for number, gain in enumerate(gains) if gain <= 0]
    if not without:
        return sizes[0]
    last = without[-1]
    if last + 1 == len(sizes):
        return None
    part = gains[last] / (gains[last] - gains[last + 1])
    return round(sizes[last] * math.pow(sizes[last + 1] / sizes[last], part))

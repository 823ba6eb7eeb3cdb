"""Two programs that are no relatives, and share an array by multiprocessing's listener.

Each is started from a command line of its own.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any

import kernel_oracle as kernel
import vmm_linux
from array_workers import address_of, answer, clear, is_clear, look, numbers
from constants import PATIENCE
from kernel_oracle import PAGE

if TYPE_CHECKING:
    from vmm_linux import SharedArray

KEY = b"both know it"
PAGES = 64


def listen(address: str) -> None:
    """Share arrays with the one who connects, both ways."""
    array = vmm_linux.full(PAGES * PAGE, 7, "u1")
    parts = [array[1::3], array[::-1], array.read_only(), array.freeze(), numbers().T]
    with Listener(address, authkey=KEY) as listener, listener.accept() as connection:
        connection.send([array, *parts])
        # The other one has the same memory: the kernel halves what each is charged.
        assert connection.recv() == PAGES * PAGE * 7
        record = next(each for each in kernel.smaps() if each.mapping.start == address_of(array))
        assert record.figures["Rss"] == 2 * record.figures["Pss"] == PAGES * PAGE
        for part in parts:
            before = look(part)
            connection.send(part)
            found, ways, back = connection.recv()
            assert (found, ways) == (before, [])
            assert is_clear(part) if part.flags.writeable else look(part) == before
            assert look(back) == look(part)
        made = connection.recv()
        assert connection.recv() == look(made)
        clear(made)
        connection.send("cleared")
    print("listener")


def connect(address: str) -> None:
    """Answer to the other one."""
    with client(address) as connection:
        array, *_parts = connection.recv()
        connection.send(int(array.sum(dtype="u8")))
        for _ in range(5):
            connection.send(answer(connection.recv()))
        made: SharedArray[Any] = numbers()[1:, ::2]
        connection.send(made)
        connection.send(look(made))
        assert connection.recv() == "cleared"
        assert is_clear(made)
    print("client")


def client(address: str) -> Connection:
    """A connection to the listener, as soon as there is one."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return Client(address, authkey=KEY)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.01)

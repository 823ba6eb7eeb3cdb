"""A Wayland compositor that can do one thing: send a client the keymap of its keyboard."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

KEYMAP = b'xkb_keymap {\nxkb_keycodes "(unnamed)" {\n' + b"<AE01> = 10;\n" * 500 + b"};\n};\n\0"
REFUSAL = (
    "handle_from_fd: memory with seals 0x0, not sealed against shrinking: its owner can cut it, "
    "and a process that touches what was cut ends with SIGBUS; Mdl.from_fd(fd, copy=True) copies "
    "what can be read of a file\n"
)


def event(target: int, opcode: int, contents: bytes) -> bytes:
    """A message of the protocol."""
    return struct.pack("=II", target, (8 + len(contents)) << 16 | opcode) + contents


def globals_of_registry() -> bytes:
    """What the compositor has: one thing that no client here wants, and a seat."""
    shm = event(2, 0, struct.pack("=II8sI", 1, 7, b"wl_shm", 1))
    seat = event(2, 0, struct.pack("=II8sI", 2, 8, b"wl_seat", 9))
    return shm + seat


REQUESTS = (
    event(1, 1, struct.pack("=I", 2)),
    event(2, 0, struct.pack("=II8sII", 2, 8, b"wl_seat", 7, 3)),
    event(3, 1, struct.pack("=I", 4)),
)


def read(client: socket.socket, expected: bytes) -> None:
    """Read a request, which is as expected."""
    assert client.recv(len(expected), socket.MSG_WAITALL) == expected


def serve(server: socket.socket, sealed: bool) -> None:
    """Send one client the keymap, as libwayland's clients get it: a memfd of just its bytes."""
    client, _ = server.accept()
    with client:
        read(client, REQUESTS[0])
        # In two pieces: messages of a stream do not come one by one.
        listed = globals_of_registry()
        client.sendall(listed[:13])
        client.sendall(listed[13:])
        read(client, REQUESTS[1])
        read(client, REQUESTS[2])
        client.sendall(event(3, 0, struct.pack("=I", 3)))
        fd = os.memfd_create("keymap", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.write(fd, KEYMAP)
        if sealed:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        socket.send_fds(client, [event(4, 0, struct.pack("=II", 1, len(KEYMAP)))], [fd])
        os.close(fd)


@contextlib.contextmanager
def compositor(folder: Path, sealed: bool) -> Iterator[tuple[dict[str, str], str]]:
    """A compositor with its socket in a folder.

    Args:
        folder: of the socket.
        sealed: whether it seals the memory of its keymap.

    Yields:
        The environment of its clients, and what they are told of its memory.
    """
    environment = {"XDG_RUNTIME_DIR": str(folder), "WAYLAND_DISPLAY": "wayland-test"}
    with socket.socket(socket.AF_UNIX) as server:
        server.settimeout(60)
        server.bind(str(folder / "wayland-test"))
        server.listen()
        thread = threading.Thread(target=serve, args=(server, sealed))
        thread.start()
        yield environment, "" if sealed else REFUSAL
        thread.join()

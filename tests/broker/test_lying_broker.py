"""Clients of a broker that keeps to no rule: they fail, and neither hang nor take what it sends."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest

from leaks import read_descriptors
from vmm_linux import VMM, Mdl
from vmm_linux.errors import Fail, InternalError, VmmError
from vmm_linux.flags import Rights, Seal
from vmm_linux.names import Client, client
from vmm_linux.names.protocol import Kind, Lifetime, Stat, answer, record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Behaviour = Callable[[socket.socket], object]

RECORD = record(
    Stat("frames", 1, 1, 0, 1, Rights.MAP_READ, Seal(0), 1, Lifetime.CONNECTION, revoked=False)
)


@contextlib.contextmanager
def lying(folder: Path, behave: Behaviour) -> Iterator[str]:
    """A broker that does this for every request, whatever it is."""
    folder.chmod(0o700)
    path = f"{folder}/socket"

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = listener.accept()[0]
                with connection, contextlib.suppress(OSError):
                    while connection.recv(4096):
                        behave(connection)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield path
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def send_buffer(sock: socket.socket) -> None:
    """Answer with a buffer."""
    with VMM() as vmm:
        vmm.send_handle(sock, vmm.mdl_create(4096, 3))


def send_descriptors(sock: socket.socket) -> None:
    """Answer well, with descriptors that nobody asked for."""
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        socket.send_fds(sock, [answer()], [fd] * 50)
    finally:
        os.close(fd)


def descriptors_of_nothing() -> int:
    """How many descriptors of /dev/null this process has."""
    return sum(target == os.devnull for target in read_descriptors().values())


OPERATIONS: dict[str, Callable[[Client], object]] = {
    "open": lambda client: client.open("frames"),
    "create": lambda client: client.create("frames", 10),
    "stat": lambda client: client.stat("frames"),
    "names": lambda client: client.names(),
    "unlink": lambda client: client.unlink("frames"),
    "clone": lambda client: client.clone("frames", "new", 0, 4096),
}


@pytest.mark.parametrize("operation", ["stat", "names", "unlink", "clone"])
def test_a_buffer_in_place_of_an_answer_is_not_taken(tmp_path: Path, operation: str) -> None:
    with (
        lying(tmp_path, send_buffer) as path,
        Client(path) as client,
        pytest.raises(Fail, match="ended the connection"),
    ):
        OPERATIONS[operation](client)


@pytest.mark.parametrize("operation", ["open", "create"])
def test_an_answer_in_place_of_a_buffer_is_no_buffer(tmp_path: Path, operation: str) -> None:
    with (
        lying(tmp_path, lambda sock: sock.send(answer())) as path,
        Client(path) as client,
        pytest.raises(Fail, match="ended the connection"),
    ):
        OPERATIONS[operation](client)


def test_a_name_without_a_record_is_an_error(tmp_path: Path) -> None:
    with (
        lying(tmp_path, lambda sock: sock.send(answer())) as path,
        Client(path) as client,
        pytest.raises(InternalError, match="no record"),
    ):
        client.stat("frames")


def test_a_list_that_does_not_go_on_ends(tmp_path: Path) -> None:
    again = answer(data=RECORD, count=1, number=1)
    with (
        lying(tmp_path, lambda sock: sock.send(again)) as path,
        Client(path) as client,
        pytest.raises(InternalError, match="out of order"),
    ):
        client.names()


def test_descriptors_with_an_answer_are_not_taken(tmp_path: Path) -> None:
    with lying(tmp_path, send_descriptors) as path, Client(path) as client:
        before = descriptors_of_nothing()
        client.unlink("frames")
        assert descriptors_of_nothing() - before < 2, "at most the sender's own"


def test_notices_without_end_are_waited_for_no_longer_than_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 0.1)

    def notify(sock: socket.socket) -> None:
        while True:
            sock.send(answer(data=b"frames", kind=Kind.REVOKED))

    with lying(tmp_path, notify) as path, Client(path) as one:
        with pytest.raises(Fail, match="did not answer"):
            one.unlink("frames")
        with pytest.raises(Fail, match="did not answer"):
            one.unlink("frames")


@pytest.mark.parametrize(
    "message",
    [b"", b"junk", b"VMML", b"VMMN" + bytes(60), answer(250), answer(count=2**32 - 1)],
    ids=["empty", "junk", "head", "zeros", "code", "count"],
)
@pytest.mark.parametrize("operation", ["open", "create", "stat", "names"])
def test_whatever_it_answers_is_an_error_of_this_package(
    tmp_path: Path, operation: str, message: bytes
) -> None:
    with (
        lying(tmp_path, lambda sock: sock.send(message)) as path,
        Client(path) as client,
        pytest.raises(VmmError),
    ):
        OPERATIONS[operation](client)


def test_a_publication_is_not_done_because_a_buffer_came_back(tmp_path: Path) -> None:
    with (
        lying(tmp_path, send_buffer) as path,
        Client(path) as client,
        Mdl(4096) as mdl,
        pytest.raises(Fail),
    ):
        client.publish(mdl, "frames")

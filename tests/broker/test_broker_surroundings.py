"""A broker among things that are not as it would like them: each is borne, or refused and named."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from brokers import Peer, own_runtime, wait_until_ready
from children import ROOT
from vmm_linux import VMM
from vmm_linux._tools.commands import CannotTryError
from vmm_linux.broker import server as server_module
from vmm_linux.broker.command import Binding, say_ready
from vmm_linux.broker.connection import Connection
from vmm_linux.broker.policy import BrokerPolicy
from vmm_linux.broker.server import Server
from vmm_linux.names import Client
from vmm_linux.names.protocol import Operation, request

if TYPE_CHECKING:
    from pathlib import Path


def test_a_socket_of_another_kind_that_is_listened_at_is_not_removed(tmp_path: Path) -> None:
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(CannotTryError, match="in use"):
            Binding(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.connect(path)
    binding = Binding(path)  # what nobody listens at is replaced, as ever
    binding.listener.close()
    binding.remove()
    os.close(binding.lock)


@pytest.mark.parametrize("fate", ["full", "closed"])
def test_a_standard_error_that_takes_nothing_does_not_stop_it(tmp_path: Path, fate: str) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "policy.toml").write_text('default = "allow"\n')
    reading, writing = os.pipe()
    room = fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{tmp_path}/ready")
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "vmm_linux.broker", "--die-with-parent"),
                *("--socket", f"{tmp_path}/socket", "--policy", f"{tmp_path}/policy.toml"),
            ],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/ready"},
            stderr=writing,
            text=True,
        )
        try:
            wait_until_ready(ready, process)
            if fate == "full":
                os.write(writing, bytes(room))
            else:
                os.close(reading)
            process.send_signal(signal.SIGHUP)
            with Peer(f"{tmp_path}/socket") as peer:
                for number in range(20):
                    assert peer.ask(request(Operation.SYNC, offset=number)).number == number
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()
            os.close(writing)
            if fate == "full":
                os.close(reading)


def test_the_first_client_passes_on_nothing_of_what_systemd_told_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, own_runtime(tmp_path):
        manager.bind(f"{tmp_path}/notify")
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        with Client() as client:
            assert client.names() == []
        with pytest.raises(BlockingIOError):
            manager.recv(64)


def test_a_manager_that_is_not_there_does_not_keep_a_broker_from_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/nothing")
    say_ready()
    assert "NOTIFY_SOCKET" not in os.environ


class Exhausted:
    """A listening socket that the kernel can accept nothing from, as long as it says so."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.fileno = listener.fileno
        self.close = listener.close
        self.problem: OSError | None = OSError(errno.ENOMEM, "no memory")
        self.asked = 0

    def accept(self) -> tuple[socket.socket, object]:
        """Accept a connection."""
        self.asked += 1
        if self.problem is not None:
            raise self.problem
        return self.listener.accept()


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENFILE])
def test_a_connection_that_cannot_be_accepted_does_not_keep_it_busy(
    tmp_path: Path, number: int
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
        VMM() as vmm,
    ):
        listener.bind(f"{tmp_path}/socket")
        listener.listen()
        exhausted = Exhausted(listener)
        exhausted.problem = OSError(number, os.strerror(number))
        server = Server(listener, vmm, BrokerPolicy(), files=1000)
        server.listener = exhausted  # type: ignore[assignment]
        try:
            client.connect(f"{tmp_path}/socket")
            for _ in range(10):
                server.turn(0)
            assert exhausted.asked <= 2, "once, and once with the spare descriptor"
            assert server.timeout() == 1.0
            exhausted.problem = None
            server.swept -= 2
            for _ in range(2):
                server.turn(0)
            assert len(server.connections) == 1
        finally:
            server.close()


def test_a_connection_that_cannot_be_watched_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
        VMM() as vmm,
    ):
        listener.bind(f"{tmp_path}/socket")
        listener.listen()
        server = Server(listener, vmm, BrokerPolicy(), files=1000)
        # One that is no descriptor at all, in place of one that is beyond the user's watches.
        monkeypatch.setattr(server_module, "Connection", unwatched)
        try:
            client.connect(f"{tmp_path}/socket")
            server.turn(0)
            assert not server.connections
            assert server.table.in_all.connections == 0
            assert client.recv(10) == b""
        finally:
            server.close()


def unwatched(*arguments: Any) -> Connection:  # noqa: ANN401  those of any connection
    """A connection that epoll refuses."""
    made = Connection(*arguments)
    made.fd = 2**20
    return made

"""Brokers for tests, and clients that keep to no rule."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from children import ROOT
from vmm_linux.names import Client, protocol
from vmm_linux.names.client import close_kept

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmm_linux.names.protocol import Answer

ALLOW = 'default = "allow"\n'
"""The policy that allows everything."""
PATIENCE = 30.0
"""Seconds after which a test gives up on a broker."""


class Broker(NamedTuple):
    """A broker that runs."""

    process: subprocess.Popen[str]
    path: str

    def descriptors(self) -> int:
        """How many descriptors it has; only root sees them."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def memory(self) -> int:
        """Bytes of memory that it has to itself."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        line = next(line for line in text.splitlines() if line.startswith("RssAnon:"))
        return int(line.split()[1]) * 1024

    def settle(self, descriptors: int) -> None:
        """Wait until it has no more descriptors than these: it is told of ends one by one."""
        deadline = time.monotonic() + PATIENCE
        while (now := self.descriptors()) > descriptors:
            assert time.monotonic() < deadline, f"{now} descriptors, not {descriptors}"
            with Client(self.path) as client:  # it serves, and so has seen what came before
                client.names()

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """End it: its exit code, and what it wrote on standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@contextlib.contextmanager
def running(
    folder: Path, *options: str, wrapper: Sequence[str] = (), **environment: str
) -> Iterator[Broker]:
    """A broker in a private folder, which ends with the block and with this process."""
    folder.chmod(0o700)
    place = f"{folder}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(signalled := f"{place}.ready")
        ready.settimeout(PATIENCE)
        process = subprocess.Popen(
            [
                *wrapper,
                *(sys.executable, "-W", "error", "-m", "vmm_linux.broker"),
                *("--socket", place, "--die-with-parent", *options),
            ],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": signalled, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            wait_until_ready(ready, process)
            yield Broker(process, place)
        finally:
            close_kept()
            process.kill()
            process.communicate()
            with contextlib.suppress(FileNotFoundError):
                Path(signalled).unlink()


def wait_until_ready(ready: socket.socket, process: subprocess.Popen[str]) -> None:
    """Wait until a broker serves, or has ended."""
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        poll.register(pidfd, select.POLLIN)
        found = dict(poll.poll(PATIENCE * 1e3))
        assert found, "the broker is not ready in time"
        assert ready.fileno() in found, f"the broker ended: {process.communicate()[1]}"
        assert ready.recv(64) == b"READY=1"
    finally:
        os.close(pidfd)


@contextlib.contextmanager
def own_runtime(folder: Path) -> Iterator[str]:
    """A folder for this user's own broker, which is ended with the block."""
    folder.chmod(0o700)
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        yield f"{folder}/vmm-linux/broker"
    finally:
        close_kept()
        end_own(f"{folder}/vmm-linux/broker")
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


def broker_of(path: str) -> int:
    """The process of the broker that serves at a socket that its starter bound for it."""
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if process.name.isdigit() and (process / "comm").read_text() == "vmm-broker\n":
                text = (process / "net/unix").read_text()
                for line in text.splitlines():
                    if line.endswith(f" {path}"):
                        inode = line.split()[6]
                        links = [str(each.readlink()) for each in (process / "fd").iterdir()]
                        if f"socket:[{inode}]" in links:
                            return int(process.name)
    raise LookupError(f"no broker at {path}")


def end_own(path: str, number: int = signal.SIGTERM) -> None:
    """End the broker that listens at a socket, if one does, and wait for its end."""
    try:
        pid = broker_of(path)
        pidfd = os.pidfd_open(pid)
    except (OSError, LookupError):
        return
    try:
        signal.pidfd_send_signal(pidfd, number)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(PATIENCE * 1e3), "the broker does not end"
    finally:
        os.close(pidfd)


class Peer:
    """A connection that sends whatever it is told to."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(PATIENCE)
        self.sock.connect(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    def send(self, message: bytes, descriptors: int = 0) -> None:
        """Send a message, with so many descriptors of nothing."""
        if descriptors:
            fd = os.open(os.devnull, os.O_RDONLY)
            try:
                socket.send_fds(self.sock, [message], [fd] * descriptors)
            finally:
                os.close(fd)
        else:
            self.sock.send(message)

    def answer(self) -> Answer:
        """The next answer, which brings no buffer."""
        return protocol.read_answer(self.sock.recv(protocol.LONGEST_ANSWER))

    def ask(self, message: bytes, descriptors: int = 0) -> Answer:
        """Send a message, and return its answer."""
        self.send(message, descriptors)
        return self.answer()

    def is_ended(self) -> bool:
        """Wait for the end of the connection: whether it came, rather than a message."""
        try:
            return self.sock.recv(protocol.LONGEST_ANSWER) == b""
        except ConnectionError:
            return True


def lines_of(audit: Path) -> list[dict[str, Any]]:
    """The lines of an audit."""
    return [json.loads(line) for line in audit.read_text().splitlines()]

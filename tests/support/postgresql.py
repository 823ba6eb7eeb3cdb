"""A PostgreSQL server that ends with the test, and sessions with it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Where Debian puts the server's programs, the newest version last; None if it is not installed.
PROGRAMS = max(
    Path("/usr/lib/postgresql").glob("*/bin"), default=None, key=lambda path: path.parent
)
#: What the server has of shared buffers.
SHARED_BUFFERS = 64 << 20
#: Seconds until the server must answer.
PATIENCE = 60.0


class Session(NamedTuple):
    """A connection, and the server's process behind it.

    Attributes:
        pid: the process that serves it.
        client: psql, which reads commands.
    """

    pid: int
    client: subprocess.Popen[str]

    def ask(self, command: str) -> str:
        """The one line that a command answers."""
        return asked(self.client, command)


class Server(NamedTuple):
    """A server on a Unix socket.

    Attributes:
        pid: its first process.
        folder: where its socket and its data are.
    """

    pid: int
    folder: Path

    @contextlib.contextmanager
    def session(self) -> Iterator[Session]:
        """A connection to it."""
        command = ["-h", str(self.folder), "-U", "postgres", "-d", "postgres", "-AtqX"]
        with subprocess.Popen(
            [program("psql"), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **as_its_user(),
        ) as client:
            yield Session(int(asked(client, "select pg_backend_pid()")), client)


def asked(client: subprocess.Popen[str], command: str) -> str:
    """What psql answers in one line."""
    commands, answers = cast("IO[str]", client.stdin), cast("IO[str]", client.stdout)
    commands.write(f"{command};\n")
    commands.flush()
    return answers.readline().strip()


def program(name: str) -> str:
    """One of the server's programs."""
    if PROGRAMS is None:
        raise FileNotFoundError("postgresql")
    return str(PROGRAMS / name)


def its_user() -> pwd.struct_passwd | None:
    """The user that the package made: the server refuses to be root's. None: whoever we are."""
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else None


def as_its_user() -> dict[str, Any]:
    """How a program is started that ends with this process: as the server's user."""
    user = its_user()
    identity: dict[str, Any] = (
        {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    )
    # After the change of users, which would take the signal away again.
    return {**identity, "preexec_fn": die_with_parent, "cwd": "/"}


@contextlib.contextmanager
def postgresql() -> Iterator[Server]:
    """A server with empty data in a folder of its own, which both go when this ends."""
    folder = Path(tempfile.mkdtemp(prefix="vmm-linux-postgresql-"))
    with contextlib.ExitStack() as at_end:
        at_end.callback(shutil.rmtree, folder)
        if user := its_user():
            os.chown(folder, user.pw_uid, user.pw_gid)
        subprocess.run(
            [program("initdb"), "-D", folder / "data", "-A", "trust", "-U", "postgres", "-N"],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            **as_its_user(),
        )
        log = at_end.enter_context((folder / "log").open("wb"))
        process = subprocess.Popen(
            [program("postgres"), "-D", folder / "data", "-k", folder, *settings()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **as_its_user(),
        )
        at_end.callback(end, process)
        wait_until_it_answers(process, folder)
        yield Server(process.pid, folder)


def settings() -> list[str]:
    """The server's settings: no network, and buffers of a size that is known."""
    chosen = {
        "listen_addresses": "",
        "shared_buffers": f"{SHARED_BUFFERS >> 10}kB",
        "huge_pages": "off",
        # In its folder, which goes with it, not in /dev/shm.
        "dynamic_shared_memory_type": "mmap",
        "fsync": "off",
    }
    return [word for name, value in chosen.items() for word in ("-c", f"{name}={value}")]


def wait_until_it_answers(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Ask again and again whether the server takes connections."""
    deadline = time.monotonic() + PATIENCE
    while subprocess.run([program("pg_isready"), "-q", "-h", folder], check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError((folder / "log").read_text())
        time.sleep(0.02)


def end(process: subprocess.Popen[bytes]) -> None:
    """A fast shutdown; if that does not come, a sudden one."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

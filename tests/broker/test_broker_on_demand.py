"""The broker of each user: started by the first client, one at a time, in a place to be trusted."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmm_linux
from brokers import PATIENCE, broker_of, end_own, own_runtime
from children import NOBODY, in_own_process
from vmm_linux import Mdl
from vmm_linux.broker import command
from vmm_linux.broker.command import Binding
from vmm_linux.errors import Fail, ResourceNotFound, SecurityDisallow
from vmm_linux.names import Client, connecting, place, start

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def path(tmp_path: Path) -> Iterator[str]:
    """Where the socket of this user's own broker will be."""
    with own_runtime(tmp_path) as made:
        yield made


def test_the_first_client_starts_the_broker(path: str) -> None:
    assert not os.path.lexists(path)
    with Mdl(10) as mdl:
        mdl.publish_as("frames")
        with vmm_linux.attach("frames") as found:
            assert found.sid == mdl.sid
    folder = Path(path).parent.stat()
    assert (stat.S_IMODE(folder.st_mode), folder.st_uid) == (0o700, os.geteuid())
    assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600


def test_the_broker_is_a_process_of_its_own(path: str) -> None:
    with Client() as client:
        client.names()
    pid = broker_of(path)
    status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    session = int(status[3])
    assert session == pid != os.getsid(0)
    assert Path(f"/proc/{pid}/cwd").readlink() == Path("/")
    files = {Path(f"/proc/{pid}/fd/{fd}").readlink() for fd in range(3)}
    assert files == {Path(os.devnull)}


CLIENT = """
import sys
from vmm_linux.names import Client
sys.stdin.read(1)
with Client() as client:
    client.create(sys.argv[1], 10).close()
    print("made", flush=True)
    sys.stdin.read()
"""


def test_however_many_clients_start_at_once_there_is_one_broker(path: str) -> None:
    assert not os.path.lexists(path)
    clients = [
        subprocess.Popen(
            [sys.executable, "-c", CLIENT, f"of {number}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(8)
    ]
    try:
        for client in clients:
            assert client.stdin is not None
            client.stdin.write("x")
            client.stdin.flush()
        for client in clients:
            assert client.stdout is not None
            assert client.stdout.readline() == "made\n"
        with Client() as ours:
            names = [each.name for each in ours.names()]
        assert names == [f"of {number}" for number in range(8)]
    finally:
        for client in clients:
            client.communicate()


def test_it_ends_when_nobody_needs_it_and_leaves_no_socket(path: str) -> None:
    with Client() as client:
        client.names()
    pidfd = os.pidfd_open(broker_of(path))
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert poll.poll(PATIENCE * 1e3), "it goes on without clients"
    finally:
        os.close(pidfd)
    assert not os.path.lexists(path)
    with Client() as client:
        assert client.names() == []


def test_a_kept_name_keeps_it(path: str) -> None:
    with Client() as client:
        client.create("frames", 10, lifetime="kept").close()
    pidfd = os.pidfd_open(broker_of(path))
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        assert not poll.poll(7e3), "it ended with a name that is kept"
    finally:
        os.close(pidfd)
    with Client() as client:
        client.unlink("frames")


def test_what_a_killed_broker_left_is_repaired(path: str) -> None:
    with Client() as client, client.create("frames", 10):
        end_own(path, signal.SIGKILL)
        assert os.path.lexists(path)
        assert client.names() == []
        with client.create("frames", 10):
            assert len(client.names()) == 1


@pytest.mark.parametrize("mode", [0o755, 0o777, 0o770, 0o701])
def test_a_folder_that_is_open_to_others_is_refused(path: str, mode: int) -> None:
    folder = Path(path).parent
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(SecurityDisallow, match="open to other users"):
        Client().names()
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_a_link_is_refused(path: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    Path(path).parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SecurityDisallow, match="symbolic link"):
        Client().names()


def test_a_folder_that_is_a_file_is_refused(path: str) -> None:
    Path(path).parent.write_text("")
    with pytest.raises(SecurityDisallow, match="no folder"):
        Client().names()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives folders away")
def test_a_folder_of_another_user_is_refused(path: str) -> None:
    folder = Path(path).parent
    folder.mkdir(mode=0o700)
    os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(SecurityDisallow, match=f"belongs to user {NOBODY}"):
        Client().names()


def test_a_file_in_the_place_of_the_socket_is_not_removed(path: str) -> None:
    folder = Path(path).parent
    folder.mkdir(mode=0o700)
    Path(path).write_text("mine")
    with pytest.raises(Fail, match="is there, and no socket"):
        Client().names()
    assert Path(path).read_text() == "mine"


def test_a_broker_that_cannot_start_says_why(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert path
    monkeypatch.setattr(start, "CODE", "import sys; sys.exit('no broker today')")
    with pytest.raises(Fail, match=r"did not start \(1\): no broker today"):
        Client().names()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(Fail, match=r"sys\.executable"):
        Client().names()


def test_without_a_runtime_folder_there_is_a_private_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    uid = os.geteuid()
    expected = f"/run/user/{uid}" if Path(f"/run/user/{uid}").is_dir() else None
    found = place.own_folder()
    assert found == (f"{expected}/vmm-linux" if expected else f"/tmp/vmm-linux-{uid}")  # noqa: S108
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert place.own_folder() == found


def check_another_user(path: str) -> None:
    """What a user meets in the place of another."""
    with pytest.raises(SecurityDisallow, match="belongs to"):
        Client().names()
    with pytest.raises((SecurityDisallow, ResourceNotFound)):
        Client(path).names()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_another_user_does_not_get_in(path: str, tmp_path: Path) -> None:
    with Client() as client:
        client.names()
        for each in (tmp_path, *tmp_path.parents[:3]):
            each.chmod(0o755)
        in_own_process(check_another_user, path, nobody=True)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda at: at.symlink_to("elsewhere"), "symbolic link"),
        (lambda at: at.write_text(""), "no socket"),
        (lambda at: at.mkdir(), "no socket"),
    ],
    ids=["link", "file", "folder"],
)
def test_what_is_no_socket_of_ours_is_not_connected_to(
    tmp_path: Path, make: object, why: str
) -> None:
    tmp_path.chmod(0o700)
    make(tmp_path / "socket")  # type: ignore[operator]
    with pytest.raises(SecurityDisallow, match=why):
        Client(tmp_path / "socket").names()


def test_a_socket_in_a_folder_open_to_all_is_not_connected_to(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{tmp_path}/socket")
        listener.listen()
        tmp_path.chmod(0o1777)
        with pytest.raises(SecurityDisallow, match="can be written to by other users"):
            Client(tmp_path / "socket").names()
        tmp_path.chmod(0o700)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives sockets away")
def test_a_socket_of_another_user_is_not_connected_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{tmp_path}/socket")
        os.chown(f"{tmp_path}/socket", NOBODY, NOBODY)
        with pytest.raises(SecurityDisallow, match=f"belongs to user {NOBODY}"):
            Client(tmp_path / "socket").names()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_a_socket_at_which_another_user_listens_is_not_spoken_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{tmp_path}/socket")
        os.seteuid(NOBODY)
        try:
            listener.listen()
        finally:
            os.seteuid(0)
        with pytest.raises(SecurityDisallow, match=f"is where user {NOBODY} listens"):
            Client(tmp_path / "socket").names()


def test_a_broker_that_accepts_nothing_is_an_error_of_this_package(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connecting, "PATIENCE", 1)
    Path(path).parent.mkdir(0o700)
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first,
    ):
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        with pytest.raises(Fail, match="cannot be reached"):
            Client().names()


def test_an_ending_broker_goes_on_if_a_client_comes_just_then(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    binding = Binding(f"{tmp_path}/socket")
    binding.release()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(binding.path)
            assert not binding.may_end()
            binding.listener.accept()[0].close()
        assert binding.may_end()
        assert not os.path.lexists(binding.path)
    finally:
        binding.listener.close()
        os.close(binding.lock)


def test_signals_that_the_first_client_blocks_still_end_the_broker(path: str) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP})
    try:
        with Client() as client:
            client.names()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    end_own(path, signal.SIGTERM)
    assert not os.path.lexists(path)


def test_a_client_that_comes_in_the_moment_of_the_end_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    binding = Binding(f"{tmp_path}/socket")
    binding.release()
    has_waiting = command.has_waiting
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as late:

        def look(listener: socket.socket) -> bool:
            found = has_waiting(listener)
            with contextlib.suppress(FileNotFoundError):  # it finds no socket, and starts another
                late.connect(binding.path)
            return found

        monkeypatch.setattr(command, "has_waiting", look)
        assert binding.may_end()
        with pytest.raises(OSError, match="not connected"):
            late.getpeername()
    assert [each.name for each in tmp_path.iterdir()] == ["socket.lock"]
    binding.listener.close()
    os.close(binding.lock)

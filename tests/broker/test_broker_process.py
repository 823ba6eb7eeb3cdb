"""The broker as a process: hardened, ended and told by signals, started by systemd; its audit."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmm_linux
from brokers import ALLOW, PATIENCE, Broker, Peer, lines_of, running
from children import NOBODY, ROOT, in_own_process
from vmm_linux import Mdl
from vmm_linux.broker import hardening
from vmm_linux.errors import (
    NoCapability,
    ResourceNotFound,
    SecurityDisallow,
)
from vmm_linux.names import Client

if TYPE_CHECKING:
    from collections.abc import Iterator

UNITS = sorted((ROOT / "vmm_linux" / "broker").glob("vmm-linux-broker.*"))
DENY_OPEN = ALLOW + '[[rule]]\nname = "closed"\ndeny = ["open"]\n'
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root looks into the broker")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker of the test's own."""
    with running(tmp_path) as started:
        yield started


def status_of(broker: Broker) -> dict[str, str]:
    """What the kernel says of a broker."""
    lines = Path(f"/proc/{broker.process.pid}/status").read_text().splitlines()
    return {label: value.strip() for label, _, value in (line.partition(":") for line in lines)}


# ---- hardening -----------------------------------------------------------------------------------


def test_it_has_a_name_and_neither_capabilities_nor_a_way_to_more_rights(broker: Broker) -> None:
    status = status_of(broker)
    assert status["Name"] == "vmm-broker"
    assert status["NoNewPrivs"] == "1"
    for label in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[label], 16) == 0, label
    if os.geteuid() == 0:
        assert int(status["CapBnd"], 16) == 0


@root_only
def test_no_process_of_its_user_looks_into_it(broker: Broker) -> None:
    # A process that can be dumped owns its files in /proc; root owns those of others.
    assert Path(f"/proc/{broker.process.pid}/environ").stat().st_uid == 0
    limits = Path(f"/proc/{broker.process.pid}/limits").read_text()
    core = next(line for line in limits.splitlines() if line.startswith("Max core"))
    assert core.split()[4:6] == ["0", "0"]


def hardens_without_prctl() -> None:
    """Harden this process, which has no python-prctl."""
    vars(hardening)["prctl"] = None
    hardening.harden()
    status = Path("/proc/self/status").read_text()
    assert "NoNewPrivs:\t1" in status
    assert "CapEff:\t0000000000000000" in status
    assert Path("/proc/self/comm").read_text() == "vmm-broker\n"


def test_it_hardens_itself_without_python_prctl_too() -> None:
    in_own_process(hardens_without_prctl)


def test_it_ends_with_its_parent_where_that_is_asked_for(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-m', "
        "'vmm_linux.broker', '--die-with-parent', '--socket', sys.argv[1]]); "
        "print(child.pid, flush=True); sys.stdin.read()"
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
        ready.bind(f"{tmp_path}/ready")
        ready.settimeout(PATIENCE)
        parent = subprocess.Popen(
            [sys.executable, "-c", code, f"{tmp_path}/socket"],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": f"{tmp_path}/ready"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        assert ready.recv(64) == b"READY=1"
    with Client(tmp_path / "socket") as client:
        client.names()
        parent.kill()
        parent.communicate()
        assert client._sock is not None
        assert client._sock.recv(1) == b""
    os.close(pidfd)


# ---- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly(broker: Broker, number: int) -> None:
    with Client(broker.path) as client, client.create("frames", 10) as mdl:
        assert broker.end(number) == (0, "")
        assert not os.path.lexists(broker.path)
        mdl[0] = 1
        with pytest.raises(ResourceNotFound, match="no broker listens"):
            client.names()


def test_it_does_not_remove_the_socket_of_its_successor(broker: Broker) -> None:
    Path(broker.path).unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(broker.path)
        assert broker.end() == (0, "")
        assert os.path.lexists(broker.path)


def told(broker: Broker) -> str:
    """The next line that it writes on standard error."""
    assert broker.process.stderr is not None
    return broker.process.stderr.readline()


def test_it_reads_its_policy_again_when_told(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(ALLOW)
    with running(tmp_path, "--policy", str(policy)) as broker, Client(broker.path) as client:
        client.create("frames", 10).close()
        client.open("frames").close()
        policy.write_text(DENY_OPEN)
        broker.process.send_signal(signal.SIGHUP)
        assert "read again" in told(broker)
        with pytest.raises(SecurityDisallow, match="rule: closed"):
            client.open("frames")
        assert len(client.names()) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("default = ", "policy.toml:1"),
        (ALLOW + '[[rule]]\ndeny = ["opne"]\n', "did you mean 'open'"),
        ("", "default is missing"),
    ],
)
def test_a_policy_that_does_not_parse_leaves_the_old_one_in_force(
    tmp_path: Path, text: str, why: str
) -> None:
    policy, audit = tmp_path / "policy.toml", tmp_path / "audit.jsonl"
    policy.write_text(DENY_OPEN)
    options = ("--policy", str(policy), "--audit", str(audit))
    with running(tmp_path, *options) as broker, Client(broker.path) as client:
        client.create("frames", 10).close()
        policy.write_text(text)
        broker.process.send_signal(signal.SIGHUP)
        line = told(broker)
        assert "stays as it was" in line
        assert why in line
        with pytest.raises(SecurityDisallow, match="rule: closed"):
            client.open("frames")
    ends = [each for each in lines_of(audit) if each["event"] == "end"]
    assert [each["method"] for each in ends] == ["create", "reload", "open"]
    assert ends[1]["rc"] == "rcInvalidArgument"
    assert why in ends[1]["error"]


def test_a_policy_that_does_not_parse_at_the_start_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "policy.toml").write_text("rule = 5")
    code, errors = run_command(tmp_path, "--policy", f"{tmp_path}/policy.toml")
    assert code == 2
    assert "rule is no list of tables" in errors
    assert not os.path.lexists(tmp_path / "socket")


def run_command(folder: Path, *options: str, **environment: str) -> tuple[int, str]:
    """Run a broker that is not to start: its exit code, and what it says."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "vmm_linux.broker"),
            *("--socket", f"{folder}/socket", "--die-with-parent", *options),
        ],
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stderr


# ---- its place -----------------------------------------------------------------------------------


def test_a_second_broker_at_a_socket_is_refused(broker: Broker, tmp_path: Path) -> None:
    code, errors = run_command(tmp_path)
    assert code == 2
    assert "a broker listens at" in errors
    with Client(broker.path) as client:
        assert client.names() == []


def test_a_file_in_the_place_of_the_socket_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "socket").write_text("mine")
    code, errors = run_command(tmp_path)
    assert (code, (tmp_path / "socket").read_text()) == (2, "mine")
    assert "no socket" in errors


def test_a_folder_open_to_all_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code, errors = run_command(tmp_path)
    tmp_path.chmod(0o700)
    assert code == 2
    assert "can be written to by other users (mode 0777)" in errors


def test_a_socket_that_a_killed_broker_left_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path) as first:
        first.end(signal.SIGKILL)
        assert os.path.lexists(first.path)
        (tmp_path / "socket.ready").unlink()
        with running(tmp_path) as second, Client(second.path) as client:
            assert client.names() == []


@pytest.mark.parametrize("option", ["0o600x", "9", "1777", ""])
def test_a_mode_that_is_none_is_refused(tmp_path: Path, option: str) -> None:
    code, errors = run_command(tmp_path, f"--mode={option}")
    assert code == 2
    assert "three octal digits" in errors


# ---- systemd -------------------------------------------------------------------------------------

PASSED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.environ["LISTEN_FDS"] = sys.argv[2]
os.execv(sys.executable, [sys.executable, "-m", "vmm_linux.broker", "--die-with-parent"])
"""


def pass_socket(listener: socket.socket, count: str) -> subprocess.Popen[str]:
    """Start a broker as systemd does."""
    return subprocess.Popen(
        [sys.executable, "-c", PASSED, str(listener.fileno()), count],
        cwd=ROOT,
        pass_fds=[listener.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_it_serves_the_socket_that_systemd_passes(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = f"{tmp_path}/socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen()
        process = pass_socket(listener, "1")
        try:
            with Client(path) as client, client.create("frames", 10):
                assert client.stat("frames").pid == os.getpid()
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=PATIENCE)
        assert (process.returncode, errors) == (0, "")
        assert os.path.lexists(path), "the socket is systemd's"


@pytest.mark.parametrize(
    ("kind", "count", "why"),
    [
        (socket.SOCK_SEQPACKET, "2", "passes 2 sockets"),
        (socket.SOCK_STREAM, "1", "ListenSequentialPacket="),
        (socket.SOCK_SEQPACKET, "1", "Accept=no"),
    ],
    ids=["two", "stream", "connected"],
)
def test_another_socket_of_systemds_is_refused(kind: int, count: str, why: str) -> None:
    with socket.socket(socket.AF_UNIX, kind) as listener:
        _, errors = (process := pass_socket(listener, count)).communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert why in errors


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    assert len(UNITS) == 2
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, UNITS)],  # noqa: S607  wherever it is
        check=False,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- two users -----------------------------------------------------------------------------------


def check_denied(path: str) -> None:
    """What another user may not do."""
    with Client(path) as client:
        for ask in (
            lambda: client.create("mine", 10),
            lambda: client.open("frames"),
            lambda: client.unlink("frames"),
            client.names,
        ):
            with pytest.raises(SecurityDisallow, match="rule: own user only"):
                ask()


def check_allowed(path: str) -> None:
    """What another user may do by the policy."""
    with Client(path) as client:
        with client.open("shared frames") as found:
            assert found[0] == 7
            assert not found.rights & vmm_linux.Rights.MAP_WRITE
        with pytest.raises(SecurityDisallow, match="rule: default"):
            client.open("secret", False)
        for change in (client.unlink, client.keep, client.revoke):
            with pytest.raises(NoCapability, match="belongs to user 0"):
                change("shared frames")
        assert [each.name for each in client.names()] == ["shared frames"]
        client.create("shared by nobody", 10, lifetime="kept").close()
        assert client.stat("shared by nobody").uid == NOBODY


READERS = f"""
default = "deny"
[[rule]]
allow = "*"
peer_uid = 0
[[rule]]
allow = ["unlink", "keep", "revoke", "stat", "list", "create"]
names = ["shared *"]
peer_uid = {NOBODY}
[[rule]]
allow = ["list"]
[[rule]]
name = "no writers"
deny = ["open"]
any_rights = ["MAP_WRITE"]
[[rule]]
allow = ["open"]
names = ["shared *"]
"""


@root_only
def test_without_a_policy_other_users_get_nothing(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "666") as broker, Client(broker.path) as client:
        client.create("frames", 10).close()
        open_to_all(tmp_path)
        in_own_process(check_denied, broker.path, nobody=True)
        assert [each.name for each in client.names()] == ["frames"]


@root_only
def test_a_policy_says_what_other_users_get(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(READERS)
    options = ("--mode", "666", "--policy", str(policy))
    with running(tmp_path, *options) as broker, Client(broker.path) as client, Mdl(10) as mdl:
        mdl[0] = 7
        with mdl.read_only() as reader:
            client.publish(reader, "shared frames")
        client.publish(mdl, "secret")
        open_to_all(tmp_path)
        in_own_process(check_allowed, broker.path, nobody=True)
        assert client.stat("shared by nobody").uid == NOBODY
        client.unlink("shared by nobody")


def open_to_all(folder: Path) -> None:
    """Let other users enter a folder and those around it."""
    for each in (folder, *folder.parents[:3]):
        each.chmod(0o755)


@root_only
def test_a_peer_that_says_it_is_somebody_else_is_who_the_kernel_says(tmp_path: Path) -> None:
    with running(tmp_path, "--mode", "666") as broker:
        open_to_all(tmp_path)
        with Peer(broker.path) as peer, Client(broker.path) as client:
            # Credentials beside a request are discarded with all other control data.
            from vmm_linux.names.protocol import Operation, request

            message = request(Operation.CREATE, b"frames", lifetime=3, most=3, size=10)
            import struct

            forged = struct.pack("iII", os.getpid(), NOBODY, NOBODY)
            peer.sock.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, forged)])
            peer.sock.recv(64)
            assert client.stat("frames").uid == 0

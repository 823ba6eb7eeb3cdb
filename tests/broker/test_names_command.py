"""``vmm-linux names``: what a broker has, and what can be done with a name."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from brokers import Broker, own_runtime, running
from commands import run
from vmm_linux import Seal
from vmm_linux.names import Client

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker of the test's own."""
    with running(tmp_path) as started:
        yield started


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    """A client of it, which has two names."""
    with (
        Client(broker.path) as made,
        made.create("frames", 3 << 20),
        made.create("a\n\x1b[31mb", 10, lifetime="kept"),
    ):
        yield made


def test_names_are_listed_with_what_they_have(broker: Broker, client: Client) -> None:
    client.seal("frames", Seal.PUBLISH)
    done = run("names", "--broker", broker.path)
    assert (done.returncode, done.stderr) == (0, "")
    title, columns, first, second = done.stdout.strip().splitlines()
    assert title == f"2 names at {broker.path}"
    assert columns.split()[:4] == ["name", "size", "rights", "seals"]
    assert first.split() == [
        *(r"'a\n\x1b[31mb'", "10", "B", "transfer", "copy", "get_sid", "map_read", "map_write"),
        *("none", "kept", str(os.geteuid()), str(os.getpid()), "1"),
    ]
    assert second.split()[:3] == ["frames", "3", "MiB"]
    assert second.split()[-5:] == [
        *("publish", "connection", str(os.geteuid()), str(os.getpid()), "1")
    ]


def test_the_broker_of_the_environment_is_asked(broker: Broker, client: Client) -> None:
    assert client.names()
    done = run("names", "frames", "--json", VMM_LINUX_BROKER=broker.path)
    assert (done.returncode, done.stderr) == (0, "")
    (found,) = json.loads(done.stdout)
    assert found["name"] == "frames"
    assert found["rights"] == ["transfer", "copy", "get_sid", "map_read", "map_write"]
    assert (found["seals"], found["lifetime"], found["revoked"]) == ([], "connection", False)


def test_a_name_is_kept_revoked_and_unlinked(broker: Broker, client: Client) -> None:
    for verb in ("--keep", "--revoke"):
        done = run("names", "frames", verb, "--broker", broker.path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    stat = client.stat("frames")
    assert (stat.lifetime.name, stat.revoked) == ("KEPT", True)
    assert " revoked " in run("names", "frames", "--broker", broker.path).stdout
    assert run("names", "frames", "--unlink", "--broker", broker.path).returncode == 0
    assert [each.name for each in client.names()] == ["a\n\x1b[31mb"]
    done = run("names", "frames", "--unlink", "--broker", broker.path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vmm-linux names: unlink: there is no name 'frames'\n"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--unlink"], "--unlink needs a NAME"),
        (["a", "--keep", "--revoke"], "not allowed with"),
        (["a", "b"], "unrecognized"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], why: str) -> None:
    done = run("names", *arguments)
    assert done.returncode == 2
    assert why in done.stderr


def test_nothing_is_started_to_list_names(tmp_path: Path) -> None:
    with own_runtime(tmp_path) as path:
        done = run("names")
        assert done.returncode == 2
        assert f"no broker listens at {path}" in done.stderr
        assert not os.path.lexists(path)
        with Client() as client:
            client.names()
            done = run("names")
            assert done.returncode == 0
            assert done.stdout.startswith(f"0 names at {path}\n  name  size  rights  seals  ")


def test_a_path_without_a_broker_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    done = run("names", "--broker", f"{tmp_path}/socket")
    assert done.returncode == 2
    assert "no broker listens at" in done.stderr

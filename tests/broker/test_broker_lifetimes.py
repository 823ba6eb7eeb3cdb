"""How long names live: with a connection, with a family of processes, until they are unlinked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

import vmm_linux
from brokers import Broker, running
from vmm_linux import Mdl
from vmm_linux.broker.family import Ancestors
from vmm_linux.errors import InvalidOperation, ResourceNotFound, Retcode
from vmm_linux.names import Client, Lifetime, protocol
from vmm_linux.names.protocol import Operation, request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection
    from pathlib import Path

METHODS = ["fork", "forkserver", "spawn"]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker of the test's own."""
    with running(tmp_path) as started:
        yield started


def publish_and_end(path: str, lifetime: str) -> None:
    """Publish a buffer, and end."""
    with Mdl(10) as mdl:
        mdl[0] = 42
        mdl.publish_as("of a child", lifetime=lifetime, broker=path)


def hand_over(path: str, pipe: Connection) -> None:
    """Let a child of this process's own publish a buffer, and say whether it is there then."""
    run_to_end("fork", publish_and_end, path, "family")
    with Client(path) as client:
        pipe.send([stat.name for stat in client.names()])


def run_to_end(method: str, work: object, *arguments: object) -> None:
    """Run a function in a child of multiprocessing, and wait for its end."""
    child = multiprocessing.get_context(method).Process(  # type: ignore[attr-defined]
        target=work, args=arguments
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0
    child.close()


def stop_forkserver() -> None:
    """End the server that makes children, which otherwise lasts as long as this process."""
    from multiprocessing import forkserver, resource_tracker

    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", METHODS)
def test_a_family_name_outlives_the_child_that_made_it(broker: Broker, method: str) -> None:
    try:
        run_to_end(method, publish_and_end, broker.path, "family")
        with vmm_linux.attach("of a child", broker=broker.path) as found:
            assert found[0] == 42
    finally:
        stop_forkserver()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_family_name_outlives_its_maker_though_no_other_process_has_connected_yet(
    broker: Broker, method: str
) -> None:
    reading, writing = multiprocessing.Pipe(duplex=False)
    try:
        with reading, writing:
            run_to_end(method, hand_over, broker.path, writing)
            assert reading.poll(60)
            assert reading.recv() == ["of a child"]
    finally:
        stop_forkserver()


def test_a_connection_name_ends_with_the_child_that_made_it(broker: Broker) -> None:
    run_to_end("fork", publish_and_end, broker.path, "connection")
    with Client(broker.path) as client:
        while client.names():
            pass
        with pytest.raises(ResourceNotFound):
            client.open("of a child")


FAMILY_OF_ITS_OWN = """
import multiprocessing, sys
from vmm_linux import Mdl
def work(path):
    with Mdl(10) as mdl:
        mdl.publish_as("of a grandchild", lifetime="family", broker=path)
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=work, args=(sys.argv[1],))
    child.start()
    child.join()
    print("made", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_family_name_ends_with_the_last_process_of_its_program(
    broker: Broker, number: int
) -> None:
    import subprocess

    program = subprocess.Popen(
        [sys.executable, "-c", FAMILY_OF_ITS_OWN, broker.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert program.stdout is not None
        assert program.stdout.readline() == "made\n"
        with Client(broker.path) as client:
            assert client.stat("of a grandchild").lifetime is Lifetime.FAMILY
            program.send_signal(number)
            program.wait(60)
            while client.names():
                pass
    finally:
        program.kill()
        program.communicate()


def test_an_ancestor_that_the_kernel_does_not_confirm_is_not_believed(broker: Broker) -> None:
    with Client(broker.path) as client:
        client.names()
        assert client._sock is not None
        strangers = b"".join(
            protocol.PID.pack(pid) for pid in (broker.process.pid, os.getpid(), -1, 0, 2**31 - 1)
        )
        client._sock.send(request(Operation.HELLO, b"f" * protocol.FAMILY, other=strangers))
        asked = request(Operation.CREATE, b"mine", lifetime=Lifetime.FAMILY, most=3, size=10)
        client._buffer("create", asked, None).close()
        assert client.stat("mine").lifetime is Lifetime.FAMILY
    with Client(broker.path) as client:
        while client.names():
            pass


def test_a_client_that_has_said_no_family_has_no_family_names(broker: Broker) -> None:
    from brokers import Peer

    with Peer(broker.path) as peer:
        answer = peer.ask(
            request(Operation.CREATE, b"mine", lifetime=Lifetime.FAMILY, most=3, size=10)
        )
        assert answer.rc == Retcode.INVALID_OPERATION == InvalidOperation.rc
        assert b"family" in answer.data


def test_the_broker_closes_what_it_held_of_a_family(broker: Broker) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root sees the broker's descriptors")
    with Client(broker.path) as client:
        client.names()
        before = broker.descriptors()
    run_to_end("fork", publish_and_end, broker.path, "family")
    with Client(broker.path) as client:
        client.unlink("of a child")
        client.names()
        broker.settle(before + 1)


def test_one_user_leaves_others_room_for_their_ancestors() -> None:
    server: Any = None
    noticed = Ancestors(server, 4)
    for number in range(2):
        noticed.pidfds[(5, b"family"), number] = -1
    assert not noticed.has_room(5)
    assert noticed.has_room(6)
    for number in range(2):
        noticed.pidfds[(6, b"family"), number] = -1
    assert not noticed.has_room(7)

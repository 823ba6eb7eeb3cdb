"""Clients that keep to no rule: each is refused, and the others are served."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from brokers import PATIENCE, Broker, Peer, running
from children import NOBODY, in_own_process
from namespaces import needs_user_namespace
from vmm_linux import VMM, Mdl
from vmm_linux._tools.children import die_with_parent
from vmm_linux.errors import QuotaExceeded, Retcode, SecurityDisallow, VmmError
from vmm_linux.names import Client, protocol
from vmm_linux.names.protocol import (
    LONGEST_REQUEST,
    REQUEST,
    Operation,
    request,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

OPEN = request(Operation.OPEN, b"frames")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker with one name, that in the end serves as before and holds no more than before."""
    with (
        running(tmp_path) as started,
        Client(started.path) as client,
        client.create("frames", 8192),
    ):
        client.open("frames", False).close()  # it keeps a read-only descriptor from then on
        client.open("frames").close()
        before = started.descriptors() if os.geteuid() == 0 else 0
        yield started
        with client.open("frames") as found:
            assert found.nbytes == 8192
        if os.geteuid() == 0:
            started.settle(before)
        assert [each.name for each in client.names()] == ["frames"]


def is_served(broker: Broker) -> None:
    """Another client is served."""
    with Client(broker.path) as client, client.open("frames") as found:
        assert found.nbytes == 8192


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_refused(broker: Broker, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  nothing secret
    for _ in range(50):
        with Peer(broker.path) as peer:
            for _ in range(5):
                message = chance.randbytes(chance.randint(1, 2 * LONGEST_REQUEST))
                assert peer.ask(message).rc == Retcode.INVALID_ARGUMENT
    is_served(broker)


@pytest.mark.parametrize("seed", range(4))
def test_requests_with_random_numbers_are_answered(broker: Broker, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  nothing secret
    edges = [0, 1, 2, 7, 255, 4095, 4096, 2**31, 2**32 - 1]
    with Peer(broker.path) as peer, Client(broker.path) as client:
        for _ in range(500):
            name = chance.choice([b"frames", b"a/b", b"\0", b"\xff\xfe", b"", b"x" * 255])
            operation = chance.choice([*range(3, 13), 0, 77, 255])
            if operation == Operation.PUBLISH:
                continue
            message = REQUEST.pack(
                protocol.MAGIC,
                protocol.VERSION,
                operation,
                chance.choice([0, 1, 2, 9, 255]),
                *(chance.choice(edges) for _ in range(3)),
                len(name),
                0,
                *(chance.choice([*edges, 2**62, 2**64 - 1]) for _ in range(2)),
            )
            if operation in {Operation.UNLINK, Operation.REVOKE, Operation.SEAL}:
                continue  # it is the same user, and may
            peer.send(message + name)
            assert peer.sock.recv(protocol.LONGEST_ANSWER)
        for stat in client.names():
            if stat.name != "frames":
                client.unlink(stat.name)
    is_served(broker)


@pytest.mark.parametrize("length", [1, 4, 39, 40, 45, LONGEST_REQUEST + 1, 100_000])
def test_truncated_and_oversized_messages_are_refused(broker: Broker, length: int) -> None:
    message = (OPEN + bytes(length))[:length]
    with Peer(broker.path) as peer:
        assert peer.ask(message).rc == Retcode.INVALID_ARGUMENT
        assert peer.ask(request(Operation.SYNC, offset=5)).number == 5


@pytest.mark.parametrize("lengths", [(7, 0), (5, 0), (6, 1), (65535, 65535), (0, 0)])
def test_names_of_other_lengths_than_announced_are_refused(
    broker: Broker, lengths: tuple[int, int]
) -> None:
    head = REQUEST.pack(protocol.MAGIC, 1, Operation.OPEN, 0, 31, 0, 0, *lengths, 0, 0)
    with Peer(broker.path) as peer:
        found = peer.ask(head + b"frames")
        assert found.rc == Retcode.INVALID_ARGUMENT
        assert b"names are not as long" in found.data


def test_another_version_is_named(broker: Broker) -> None:
    with Peer(broker.path) as peer:
        found = peer.ask(OPEN[:4] + b"\2\0" + OPEN[6:])
        assert b"version 2 of the format; this broker knows 1" in found.data


def test_an_empty_message_ends_the_connection(broker: Broker) -> None:
    with Peer(broker.path) as peer:
        peer.sock.send(b"")
        assert peer.is_ended()


@pytest.mark.parametrize(
    "name",
    [b"a/b", b"a\0b", b"\xff", "främes".encode("latin-1"), "frames".encode("utf-16"), b""],
    ids=["slash", "NUL", "no text", "latin", "wide", "empty"],
)
@pytest.mark.parametrize(
    "operation", [each for each in Operation if each not in {1, 2, 5, 10, 13}], ids=str
)
def test_names_that_are_none_are_refused_by_the_broker_too(
    broker: Broker, name: bytes, operation: Operation
) -> None:
    if operation is Operation.LIST:
        return  # its name is a place in the list
    with Peer(broker.path) as peer:
        message = request(operation, name, other=b"new", lifetime=1, most=3, size=4096)
        assert peer.ask(message).rc == Retcode.INVALID_ARGUMENT


# ---- descriptors ---------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees the broker's descriptors")
@pytest.mark.parametrize("count", [1, 2, 253])
def test_descriptors_with_a_request_are_never_taken(broker: Broker, count: int) -> None:
    with Peer(broker.path) as peer:
        peer.ask(request(Operation.SYNC))
        before = broker.descriptors()
        for message in (
            request(Operation.SYNC, offset=1),
            request(Operation.STAT, b"frames"),
            request(Operation.LIST),
            b"nonsense",
        ):
            for _ in range(20):
                peer.ask(message, count)
                assert broker.descriptors() == before
        peer.send(request(Operation.HELLO, b"f" * protocol.FAMILY), count)
        peer.ask(request(Operation.SYNC, offset=2))
        assert broker.descriptors() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees the broker's descriptors")
def test_what_is_published_is_only_taken_if_it_is_a_buffer(broker: Broker) -> None:
    publish = request(Operation.PUBLISH, b"mine", lifetime=1, size=10)
    with Peer(broker.path) as peer, VMM() as vmm:
        peer.ask(request(Operation.SYNC))
        before = broker.descriptors()
        for second, count in (
            (b"VMML" + bytes(44), 1),
            (b"VMML" + bytes(44), 253),
            (b"VMML", 1),
            (b"VMML" + bytes(1000), 3),
        ):
            peer.send(publish)
            assert peer.ask(second, count).rc == Retcode.INVALID_ARGUMENT
            assert broker.descriptors() == before
        # What is refused already is not even looked at.
        handle = vmm.mdl_create(4096, 3)
        peer.send(request(Operation.PUBLISH, b"frames", lifetime=1))
        vmm.send_handle(peer.sock, handle)
        assert peer.answer().rc == Retcode.ALREADY_EXISTS
        assert broker.descriptors() == before
        peer.send(publish)
        vmm.send_handle(peer.sock, handle)
        assert peer.answer().rc == Retcode.OK
        assert broker.descriptors() == before + 1
    is_served(broker)


def test_a_request_in_place_of_the_buffer_ends_the_publication(broker: Broker) -> None:
    with Peer(broker.path) as peer:
        peer.send(request(Operation.PUBLISH, b"mine", lifetime=1))
        peer.send(request(Operation.SYNC, offset=9))
        assert peer.answer().rc == Retcode.INVALID_ARGUMENT
        assert peer.answer().number == 9


def test_a_client_that_never_reads_costs_only_itself(broker: Broker) -> None:
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(Peer(broker.path)) for _ in range(50)]
        for peer in peers:
            peer.sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for _ in range(1000):
                    peer.sock.send(OPEN)
        is_served(broker)
        for peer in peers[:10]:
            # One buffer is on its way, however many were asked for; the rest comes as it is read.
            for _ in range(3):
                peer.sock.settimeout(PATIENCE)
                assert peer.sock.recv(100)[:4] == protocol.HANDLE_MAGIC


@pytest.mark.skipif(os.geteuid() != 0, reason="only root sees the broker's descriptors")
def test_a_buffer_on_its_way_to_one_that_shut_its_side_is_remembered(broker: Broker) -> None:
    with Peer(broker.path) as peer:
        peer.ask(request(Operation.SYNC))
        before = broker.descriptors()
        peer.send(OPEN)
        select.select([peer.sock], [], [], PATIENCE)
        peer.sock.shutdown(socket.SHUT_WR)
        is_served(broker)
        broker.settle(before)
        assert broker.descriptors() == before, "the connection is kept until the buffer is read"
        assert peer.sock.recv(100)[:4] == protocol.HANDLE_MAGIC
        broker.settle(before - 1)


# ---- connections ---------------------------------------------------------------------------------


def test_disconnects_at_every_step_leave_nothing(broker: Broker) -> None:
    steps = (
        (),
        (OPEN,),
        (OPEN, OPEN),
        (request(Operation.PUBLISH, b"mine", lifetime=1),),
        (request(Operation.CREATE, b"mine", lifetime=1, most=3, size=10),),
        (request(Operation.HELLO, b"f" * 16), request(Operation.LIST)),
        (b"nonsense",),
        (request(Operation.REVOKE, b"nothing"), OPEN),
    )
    for turn in range(240):
        with Peer(broker.path) as peer:
            for message in steps[turn % len(steps)]:
                peer.send(message)
            if turn % 3 == 1:
                peer.sock.shutdown(socket.SHUT_RD)
            elif turn % 3 == 2:
                peer.sock.shutdown(socket.SHUT_WR)
    is_served(broker)


def test_thousands_of_connections_are_bounded_and_the_rest_is_told(broker: Broker) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(3000, soft // 2)
    peers: list[socket.socket] = []
    try:
        for _ in range(count):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            peers.append(sock)
            sock.connect(broker.path)  # without a time limit: else a full queue is an error
            sock.settimeout(PATIENCE)
        refused = 0
        for sock in peers:
            # Those beyond the limit were answered at once; the others are when they ask.
            with contextlib.suppress(OSError):
                sock.send(request(Operation.SYNC))
            found = protocol.read_answer(sock.recv(1000))
            if found.rc:
                refused += 1
                assert found.rc == Retcode.QUOTA_EXCEEDED
                assert b"connections of user" in found.data
        most = min(hard, 65536) // 8
        assert refused == max(0, count + 1 - most)
    finally:
        for sock in peers:
            sock.close()
    is_served(broker)


def test_quotas_hold_for_each_user(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'default = "allow"\n[limits]\nnames = 5\n[limits.user]\nnames = 3\nbytes = 16384\n'
        "connections = 4\n"
    )
    with running(tmp_path, "--policy", str(policy)) as broker, Client(broker.path) as client:
        client.create("first", 8192).close()
        with pytest.raises(QuotaExceeded, match="bytes of user"):
            client.create("second", 12288)
        with Mdl(12288) as mdl, pytest.raises(VmmError, match=r"8192"):
            client.publish(mdl, "second")
        client.clone("first", "second", 0, 8192)
        with pytest.raises(QuotaExceeded, match="bytes of user"):
            client.clone("first", "third", 0, 4096)
        client.unlink("second")
        client.create("second", 1).close()
        client.create("third", 1).close()
        with pytest.raises(QuotaExceeded, match="names of user"):
            client.create("fourth", 1)
        client.unlink("third")
        client.create("fourth", 1).close()
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(Client(broker.path)).names()
            with pytest.raises(VmmError), Client(broker.path) as fifth:
                fifth.names()


def test_one_that_says_nothing_is_ended_and_one_that_publishes_nothing_is_not_waited_for(
    broker: Broker,
) -> None:
    with Peer(broker.path) as silent, Peer(broker.path) as half, Peer(broker.path) as kept:
        kept.ask(request(Operation.SYNC))
        half.send(request(Operation.PUBLISH, b"mine", lifetime=1))
        began = time.monotonic()
        assert silent.is_ended()
        assert half.answer().rc == Retcode.INVALID_ARGUMENT
        assert 9 < time.monotonic() - began < 20
        assert kept.ask(request(Operation.SYNC, offset=3)).number == 3


def test_one_that_asks_nothing_and_holds_nothing_is_ended_where_the_policy_says_so(
    tmp_path: Path,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "allow"\n[limits]\nidle = 1\n')
    with (
        running(tmp_path, "--policy", str(policy)) as broker,
        Peer(broker.path) as idle,
        Client(broker.path) as holder,
        holder.create("frames", 10),
    ):
        idle.ask(request(Operation.SYNC))
        assert idle.is_ended()
        assert holder.names()[0].holders == 1


# ---- death ---------------------------------------------------------------------------------------

KILLED = """
import sys, random
from vmm_linux import Mdl
from vmm_linux.names import Client
chance = random.Random(int(sys.argv[2]))
with Client(sys.argv[1]) as client:
    client.names()
    print("begun", flush=True)
    for turn in range(100_000):
        name = f"{sys.argv[2]} {turn}"
        with client.create(name, 4096), client.open("frames") as found, Mdl(100) as mdl:
            client.publish(mdl, name + " too")
            if chance.random() < 0.9:
                client.unlink(name)
                client.unlink(name + " too")
"""


def test_clients_that_are_killed_at_random_leave_nothing(broker: Broker) -> None:
    chance = random.Random(1)  # noqa: S311  nothing secret
    for turn in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", KILLED, broker.path, str(turn)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        pidfd = os.pidfd_open(child.pid)
        # As long as it takes to do something of its work.
        select.select([pidfd], [], [], chance.random() / 20)
        os.close(pidfd)
        child.kill()
        child.communicate()
    with Client(broker.path) as client:
        deadline = time.monotonic() + PATIENCE
        while len(client.names()) > 1:
            assert time.monotonic() < deadline


def test_a_broker_that_is_killed_at_random_costs_holders_nothing(tmp_path: Path) -> None:
    chance = random.Random(2)  # noqa: S311  nothing secret
    held: list[Mdl] = []
    with Client(tmp_path / "socket") as client:
        for _ in range(6):
            with running(tmp_path) as broker:
                assert client.names() == [], "a new broker knows no names"
                for number in range(chance.randint(1, 30)):
                    held.append(client.create(f"{number}", 10))
                    held[-1][0] = number
                broker.end(signal.SIGKILL)
                (tmp_path / "socket.ready").unlink()
        for mdl in held:
            assert mdl[0] < 30
            mdl.close()


# ---- others --------------------------------------------------------------------------------------


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("prlimit") is None, reason="needs two users, and prlimit"
)
def test_a_user_that_reads_nothing_does_not_stop_another(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "allow"\n')
    # With so few descriptors, more peers than the bound of those on their way to a user fit.
    few = ("prlimit", "--nofile=1024:1024", "--")
    options = ("--mode", "666", "--policy", str(policy))
    with running(tmp_path, *options, wrapper=few) as broker:
        for each in (tmp_path, *tmp_path.parents[:3]):
            each.chmod(0o755)
        with Client(broker.path) as client, client.create("frames", 10):
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                try:
                    os.setgid(NOBODY)
                    os.setuid(NOBODY)
                    die_with_parent()
                    peers = [Peer(broker.path) for _ in range(100)]
                    for peer in peers:
                        peer.send(OPEN)
                    os.write(writing, b"x")
                    signal.pause()
                finally:
                    os._exit(1)
            try:
                os.close(writing)
                assert os.read(reading, 1) == b"x"
                for _ in range(300):
                    client.open("frames").close()
            finally:
                os.close(reading)
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            client.open("frames").close()


def check_unknown(path: str) -> None:
    """A user whom the broker's user namespace does not map is nobody to it."""
    with Client(path) as client:
        with pytest.raises(SecurityDisallow, match="rule: own user only"):
            client.open("frames")
        with pytest.raises(SecurityDisallow, match="rule: own user only"):
            client.create("mine", 10)


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs two users, and unshare"
)
@needs_user_namespace
def test_a_user_that_the_brokers_namespace_does_not_map_is_denied(tmp_path: Path) -> None:
    inside = ("unshare", "--user", "--map-root-user", "--")
    with running(tmp_path, "--mode", "666", wrapper=inside) as broker:
        for each in (tmp_path, *tmp_path.parents[:3]):
            each.chmod(0o755)
        with Client(broker.path) as client, client.create("frames", 10):
            in_own_process(check_unknown, broker.path, nobody=True)
            assert [each.name for each in client.names()] == ["frames"]


def test_tickets_that_are_redeemed_and_not_read_still_count(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "allow"\n[limits.user]\ntickets = 2\n')
    # With so few descriptors, more peers than the bound of those on their way to a user fit.
    few = ("prlimit", "--nofile=1024:1024", "--") if shutil.which("prlimit") else ()
    with (
        running(tmp_path, "--policy", str(policy), wrapper=few) as broker,
        Client(broker.path) as client,
        client.create("frames", 10),
        VMM() as vmm,
        contextlib.ExitStack() as stack,
    ):
        handle = vmm.mdl_create(4096, 3)

        def ask_for_ticket() -> tuple[Peer, bytes]:
            peer, secret = stack.enter_context(Peer(broker.path)), os.urandom(protocol.SECRET)
            digest = protocol.digest_of(secret)
            peer.send(request(Operation.TICKET, digest, size=4096, offset=60_000))
            vmm.send_handle(peer.sock, handle)
            return peer, secret

        unread = [stack.enter_context(Peer(broker.path)) for _ in range(64)]
        for peer in unread:
            peer.send(OPEN)
        client.names()
        redeeming = []
        for _ in range(2):
            peer, secret = ask_for_ticket()
            assert peer.answer().rc == Retcode.OK
            peer.send(request(Operation.REDEEM, secret))
            redeeming.append(peer)
        if few:
            assert ask_for_ticket()[0].answer().rc == Retcode.QUOTA_EXCEEDED
        for peer in unread:
            peer.sock.close()
        for peer in redeeming:
            assert peer.sock.recv(100)[:4] == protocol.HANDLE_MAGIC
        assert ask_for_ticket()[0].answer().rc == Retcode.OK


def test_a_client_that_asks_for_no_rights_is_decided_about_with_those_of_a_descriptor(
    tmp_path: Path,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "allow"\n[[rule]]\ndeny = ["open"]\nany_rights = ["MAP_READ"]\n')
    with (
        running(tmp_path, "--policy", str(policy)) as broker,
        Client(broker.path) as client,
        client.create("frames", 10),
        Peer(broker.path) as peer,
    ):
        for most in (0, 1, protocol.MOST_RIGHTS):
            answer = peer.ask(request(Operation.OPEN, b"frames", most=most))
            assert answer.rc == Retcode.SECURITY_DISALLOW, most

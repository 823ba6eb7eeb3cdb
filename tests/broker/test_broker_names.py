"""Buffers by name: what a program sees of a broker."""

from __future__ import annotations

import errno
import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

import vmm_linux
from brokers import Broker, running
from vmm_linux import VMM, Mdl, Rights, Seal, VmmFlags
from vmm_linux.errors import (
    AlreadyExists,
    Fail,
    HandleRevoked,
    InvalidArgument,
    NoCapability,
    ResourceNotFound,
    VmmError,
)
from vmm_linux.names import Client, Lifetime, Notice, client_of, protocol

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker of the test's own."""
    with running(tmp_path) as started:
        yield started


@pytest.fixture
def client(broker: Broker) -> Iterator[Client]:
    """A client of it."""
    with Client(broker.path) as made:
        yield made


def test_a_published_buffer_is_the_same_memory_where_it_is_attached(broker: Broker) -> None:
    with Mdl(1000) as mdl:
        mdl.publish_as("frames", broker=broker.path)
        with vmm_linux.attach("frames", broker=broker.path) as attached:
            attached[:5] = b"hello"
            assert mdl[:5] == b"hello"
            assert (attached.nbytes, attached.sid) == (1000, mdl.sid)
            assert attached.rights == mdl.rights


def test_a_broker_is_named_by_the_environment(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMM_LINUX_BROKER", broker.path)
    with Mdl(5) as mdl:
        mdl.publish_as("frames")
        with vmm_linux.attach("frames") as attached:
            assert attached.sid == mdl.sid


def test_a_name_of_a_read_only_handle_is_never_writable(broker: Broker) -> None:
    with Mdl(5) as mdl, mdl.read_only() as reader:
        reader.publish_as("frames", broker=broker.path)
        with vmm_linux.attach("frames", broker=broker.path) as attached:
            assert Rights.MAP_WRITE not in attached.rights
        with pytest.raises(NoCapability, match="MAP_WRITE"):
            vmm_linux.attach("frames", True, broker=broker.path)


def test_rights_that_a_name_allows_are_set_when_it_is_published(broker: Broker) -> None:
    with Mdl(5) as mdl:
        rights = Rights.TRANSFER | Rights.MAP_READ
        mdl.publish_as("frames", rights=rights, broker=broker.path)
        with vmm_linux.attach("frames", broker=broker.path) as attached:
            assert attached.rights == rights
        with pytest.raises(NoCapability, match="allows"):
            vmm_linux.attach("frames", rights=rights | Rights.COPY, broker=broker.path)
        with vmm_linux.attach("frames", rights=Rights.MAP_READ, broker=broker.path) as attached:
            assert attached.rights == Rights.MAP_READ


def test_attach_is_read_only_when_asked(client: Client) -> None:
    with (
        client.create("frames", 10) as mdl,
        client.open("frames", False) as reader,
        client.open("frames", True) as writer,
    ):
        writer[0] = 7
        assert (mdl[0], reader[0]) == (7, 7)
        with pytest.raises(VmmError):
            reader[0] = 8


def test_an_attached_buffer_belongs_to_the_given_vmm(client: Client, vmm: VMM) -> None:
    with client.create("frames", 10), client.open("frames", vmm=vmm) as attached:
        assert attached.vmm is vmm


def test_a_taken_name_is_refused(client: Client) -> None:
    with client.create("frames", 10), Mdl(5) as mdl:
        with pytest.raises(AlreadyExists, match="'frames' is taken"):
            client.create("frames", 10)
        with pytest.raises(AlreadyExists, match="'frames' is taken"):
            client.publish(mdl, "frames")
        assert len(client.names()) == 1


def test_an_unknown_name_is_refused_by_every_operation(client: Client) -> None:
    for ask in (
        lambda: client.open("frames"),
        lambda: client.stat("frames"),
        lambda: client.unlink("frames"),
        lambda: client.keep("frames"),
        lambda: client.revoke("frames"),
        lambda: client.seal("frames", Seal.FREEZE),
        lambda: client.clone("frames", "part", 0, 4096),
    ):
        with pytest.raises(ResourceNotFound, match="no name 'frames'"):
            ask()


def test_what_a_name_has_is_the_kernels_word(client: Client) -> None:
    with client.create("frames", 5000, lifetime="kept") as mdl, client.open("frames"):
        stat = client.stat("frames")
        assert stat == client.names()[0]
        assert (stat.name, stat.nbytes, stat.sid) == ("frames", 5000, mdl.sid)
        assert (stat.uid, stat.pid, stat.lifetime) == (os.geteuid(), os.getpid(), Lifetime.KEPT)
        assert (stat.rights, stat.seals, stat.revoked) == (mdl.rights, Seal(0), False)
        assert stat.holders == 1  # one connection has both
    client.unlink("frames")
    assert client.names() == []


def test_a_name_that_is_unlinked_leaves_the_memory(client: Client) -> None:
    with client.create("frames", 10) as mdl:
        client.unlink("frames")
        mdl[0] = 3
        assert mdl[0] == 3
        with client.create("frames", 10) as other:
            assert other.sid != mdl.sid


def test_a_clone_is_a_window_under_another_name(client: Client) -> None:
    with client.create("frames", 8192) as mdl:
        client.clone("frames", "second", 4096, 4096)
        with client.open("second") as part:
            part[0] = 9
            assert (mdl[4096], part.nbytes) == (9, 4096)
        with pytest.raises(InvalidArgument):
            client.clone("frames", "third", 4096, 8192)
        assert [each.name for each in client.names()] == ["frames", "second"]


def test_a_published_name_is_opened_without_write_from_then_on(client: Client) -> None:
    with client.create("frames", 4096) as mdl:
        client.seal("frames", Seal.PUBLISH)
        with client.open("frames") as reader:
            assert Rights.MAP_WRITE not in reader.rights
            assert reader.seals == Seal.PUBLISH
        with pytest.raises(NoCapability):
            client.open("frames", True)
        client.seal("frames", Seal.FREEZE)
        assert mdl.seals & Seal.FREEZE


def test_a_revoked_name_opens_for_nobody_and_its_holders_are_told(broker: Broker) -> None:
    with (
        Client(broker.path) as owner,
        Client(broker.path) as holder,
        Client(broker.path) as third,
        owner.create("frames", 10),
        holder.open("frames") as held,
    ):
        third.names()
        owner.revoke("frames")
        with pytest.raises(HandleRevoked, match="was revoked"):
            third.open("frames")
        assert holder.stat("frames").revoked
        assert holder.notices() == [Notice("frames")]
        assert holder.notices() == owner.notices() == third.notices() == []
        held[0] = 1  # what was given stays
        with pytest.raises(AlreadyExists):
            third.create("frames", 10)


def test_a_kept_name_outlives_its_maker(broker: Broker) -> None:
    with Client(broker.path) as maker, maker.create("frames", 10) as mdl:
        mdl[0] = 5
        maker.keep("frames")
    with Client(broker.path) as other:
        with other.open("frames") as found:
            assert found[0] == 5
        other.unlink("frames")


def test_a_name_ends_with_its_makers_connection(broker: Broker) -> None:
    with Client(broker.path) as other:
        with Client(broker.path) as maker, maker.create("frames", 10):
            assert len(other.names()) == 1
        wait_for_no_names(other)


def wait_for_no_names(client: Client) -> None:
    """Ask until the broker has seen the end of another connection."""
    for _ in range(10_000):
        if not client.names():
            return
    raise AssertionError(client.names())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "0 bytes"),
        ("x" * 256, "256 bytes"),
        ("x" * 10_000, "10000 bytes"),
        ("é" * 128, "256 bytes"),
        ("a/b", "'/'"),
        ("a\0b", "NUL"),
        ("\udc80", "UTF-8"),
        (b"frames", "not text"),
        (None, "not text"),
    ],
)
def test_what_can_be_no_name_is_refused_with_the_reason(
    client: Client, name: str, why: str
) -> None:
    with Mdl(5) as mdl:
        for ask in (
            lambda: client.open(name),
            lambda: client.create(name, 10),
            lambda: client.publish(mdl, name),
            lambda: client.unlink(name),
            lambda: client.stat(name),
        ):
            with pytest.raises(InvalidArgument, match=why):
                ask()


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "\n\x1b[31m", ".", "..", "名前", " "])
def test_any_other_text_is_a_name(client: Client, name: str) -> None:
    with client.create(name, 10) as mdl, client.open(name) as found:
        assert found.sid == mdl.sid
        assert client.names()[0].name == name


def test_wrong_arguments_are_refused_here(client: Client) -> None:
    with Mdl(5) as mdl:
        with pytest.raises(InvalidArgument, match="'connection', 'family', 'kept'"):
            client.publish(mdl, "frames", lifetime="always")
        with pytest.raises(InvalidArgument, match="size"):
            client.create("frames", -1)
        with pytest.raises(InvalidArgument, match="rights"):
            client.open("frames", rights=1 << 40)
        with pytest.raises(InvalidArgument, match="not a path"):
            vmm_linux.attach("frames", broker=5)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 2**62 + 1, 2**64 - 1])
def test_impossible_sizes_are_refused_by_the_broker(client: Client, size: int) -> None:
    with pytest.raises(InvalidArgument, match="size"):
        client.create("frames", size)
    with pytest.raises(InvalidArgument, match="protection"):
        client.create("frames", 10, VmmFlags.READ | VmmFlags.LOCKED)


def test_a_refused_publication_leaves_the_connection_of_use(client: Client) -> None:
    with Mdl(5) as mdl, mdl.read_only() as reader:
        with pytest.raises(NoCapability):
            client.publish(reader, "frames", rights=mdl.rights)
        assert client.names() == []
        client.publish(reader, "frames")
        assert client.stat("frames").rights == reader.rights
    with pytest.raises(ResourceNotFound):
        client.publish(mdl, "closed")
    assert len(client.names()) == 1


def test_a_broker_that_was_killed_is_found_again_and_holders_keep_their_memory(
    tmp_path: Path,
) -> None:
    with running(tmp_path) as first, Client(first.path) as client:
        kept = client.create("frames", 10)
        kept[0] = 1
        first.end(signal.SIGKILL)
        (tmp_path / "socket.ready").unlink()
        with running(tmp_path):
            assert client.names() == []
            assert kept[0] == 1
            client.publish(kept, "frames")
            with client.open("frames") as found:
                assert found.sid == kept.sid
        kept.close()


def test_no_broker_at_a_given_path_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    with pytest.raises(ResourceNotFound, match="no broker listens at"):
        vmm_linux.attach("frames", broker=tmp_path / "socket")


def test_threads_share_a_connection(client: Client) -> None:
    problems: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(20):
                name = f"{number} {turn}"
                with client.create(name, 10) as mdl, client.open(name) as found:
                    assert found.sid == mdl.sid
                client.unlink(name)
        except BaseException as problem:  # noqa: BLE001
            problems.append(problem)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert client.names() == []


def test_a_forked_child_has_a_connection_of_its_own(client: Client) -> None:
    with client.create("frames", 10) as mdl:
        pid = os.fork()
        if pid == 0:
            try:
                with client.open("frames") as found:
                    found[0] = 6
                client.create("of the child", 10)
                os._exit(0 if client.stat("frames").holders == 2 else 1)
            except BaseException:  # noqa: BLE001
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert mdl[0] == 6
        assert client.stat("frames").name == "frames"


def test_an_interrupted_call_costs_the_connection_nothing(client: Client, vmm: VMM) -> None:
    class Interrupted(Exception):  # noqa: N818
        pass

    armed = False

    def interrupt(*_: object) -> None:
        if armed:
            raise Interrupted

    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    found: Mdl | None = None
    try:
        with client.create("frames", 10) as mdl:
            for turn in range(2000):
                try:
                    armed = True
                    signal.setitimer(signal.ITIMER_REAL, 1e-6 * (1 + turn % 97))
                    # An exception of a signal handler can lose the handle; its VMM has it then.
                    found = client.open("frames", vmm=vmm)
                    armed = False
                    assert found.sid == mdl.sid
                except Interrupted:
                    interrupted += 1
                finally:
                    armed = False
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    found = None
            assert client.stat("frames").holders == 1
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted


def test_a_stopped_broker_is_given_up_on(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmm_linux.names.connecting.PATIENCE", 1)
    with Client(broker.path) as client, client.create("frames", 10):
        broker.process.send_signal(signal.SIGSTOP)
        with pytest.raises(Fail, match="did not answer"):
            client.open("frames")
        broker.process.send_signal(signal.SIGCONT)
        with client.open("frames"):
            assert len(client.names()) == 1


def test_notices_wait_for_what_an_interrupted_call_left_behind(client: Client) -> None:
    with client.create("frames", 10) as mdl, Mdl(5) as other:
        with pytest.raises(NoCapability):
            client.publish(mdl.read_only(), "other", rights=other.rights)
        assert client.notices() == []
        with client.open("frames") as found:
            assert found.sid == mdl.sid


def test_the_client_of_attach_is_told_of_what_was_revoked(broker: Broker, client: Client) -> None:
    with (
        client.create("frames", 10),
        vmm_linux.attach("frames", broker=broker.path) as attached,
    ):
        client.revoke("frames")
        assert client_of(broker.path).stat("frames").revoked
        assert client_of(broker.path).notices() == [Notice("frames")]
        assert attached[0] == 0


def test_too_many_descriptors_on_their_way_cost_no_names(broker: Broker) -> None:
    def refuse(_: socket.socket) -> None:
        raise OSError(errno.ETOOMANYREFS, "too many references")

    with Client(broker.path) as client:
        client.create("frames", 10).close()
        message = protocol.request(protocol.Operation.PUBLISH, b"mine", lifetime=1)
        with pytest.raises(Fail, match="nothing was sent") as raised:
            client._plain("publish", message, then=refuse)
        assert raised.value.errno == errno.ETOOMANYREFS
        assert [each.name for each in client.names()] == ["frames"]

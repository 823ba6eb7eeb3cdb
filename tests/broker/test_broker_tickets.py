"""Tickets: a buffer is held until it is redeemed, or its deadline has passed."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from brokers import PATIENCE, Broker, Peer, running
from children import in_own_process
from vmm_linux import Mdl, Rights
from vmm_linux.broker.table import Bounds, Table
from vmm_linux.broker.tickets import Ticket as Waiting
from vmm_linux.broker.tickets import Tickets
from vmm_linux.errors import (
    AlreadyExists,
    InvalidArgument,
    NoCapability,
    QuotaExceeded,
    ResourceNotFound,
    Retcode,
    SecurityDisallow,
)
from vmm_linux.names import Client, Ticket
from vmm_linux.names.protocol import SECRET, Operation, digest_of, request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root looks into the broker")


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Broker]:
    """A broker of the test's own, which holds no more in the end than before."""
    with running(tmp_path) as started, Client(started.path) as client:
        client.names()
        before = started.descriptors() if os.geteuid() == 0 else 0
        yield started
        if os.geteuid() == 0:
            started.settle(before + 1)  # the connection that this process keeps


def test_a_ticket_gives_the_same_memory_once(broker: Broker) -> None:
    with Mdl(1000) as mdl:
        ticket = Ticket.of(mdl, broker=broker.path)
        with ticket.redeem() as found:
            found[0] = 5
            assert (mdl[0], found.sid, found.rights) == (5, mdl.sid, mdl.rights)
        with pytest.raises(ResourceNotFound, match="was redeemed"):
            ticket.redeem()


def test_a_ticket_holds_the_buffer_of_a_maker_that_was_killed(broker: Broker) -> None:
    code = (
        "import pickle, sys; from vmm_linux import Mdl; from vmm_linux.names import Ticket\n"
        "mdl = Mdl(10); mdl[0] = 42\n"
        "print(pickle.dumps(Ticket.of(mdl, broker=sys.argv[1])).hex(), flush=True)\n"
        "sys.stdin.read()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code, broker.path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert maker.stdout is not None
    data = bytes.fromhex(maker.stdout.readline())
    maker.kill()
    maker.communicate()
    with pickle.loads(data).redeem() as found:  # noqa: S301  our own
        assert found[0] == 42


def test_a_ticket_gives_no_more_rights_than_it_was_made_with(broker: Broker) -> None:
    with Mdl(10) as mdl, mdl.read_only() as reader:
        readers = Ticket.of(reader, broker=broker.path)
        with pytest.raises(NoCapability, match="MAP_WRITE"):
            readers.redeem(True)
        readers.redeem().close()
        few = Rights.TRANSFER | Rights.MAP_READ
        with Ticket.of(mdl, rights=few, broker=broker.path).redeem() as found:
            assert found.rights == few
        with Ticket.of(mdl, broker=broker.path).redeem(False) as found:
            assert Rights.MAP_WRITE not in found.rights
        with pytest.raises(NoCapability):
            Ticket.of(reader, rights=mdl.rights, broker=broker.path)


def test_a_ticket_lapses_and_says_so(broker: Broker) -> None:
    with Mdl(10) as mdl:
        ticket = Ticket.of(mdl, 0.001, broker=broker.path)
        time.sleep(0.01)  # longer than its deadline, however late this goes on
        why = r"lapsed: it was not redeemed within 0\.001 seconds"
        for ask in (ticket.redeem, ticket.keep, ticket.release):
            with pytest.raises(ResourceNotFound, match=why):
                ask()


@root_only
def test_the_broker_lets_go_of_a_ticket_that_nobody_asks_for(broker: Broker) -> None:
    with Mdl(10) as mdl, Client(broker.path) as client:
        Ticket.of(mdl, 60, broker=broker.path).redeem().close()
        client.names()
        before = broker.descriptors()
        for _ in range(20):
            Ticket.of(mdl, 0.5, broker=broker.path)
        assert broker.descriptors() > before
        broker.settle(before)


def test_a_kept_ticket_is_redeemed_as_often_as_wanted_until_it_is_released(
    broker: Broker,
) -> None:
    with Mdl(10) as mdl:
        ticket = Ticket.of(mdl, 0.05, broker=broker.path)
        ticket.keep()
        for _ in range(5):
            with ticket.redeem() as found:
                assert found.sid == mdl.sid
        ticket.release()
        with pytest.raises(ResourceNotFound, match="was released"):
            ticket.redeem()


def test_a_kept_ticket_waits_for_its_deadline_when_its_keeper_ends(broker: Broker) -> None:
    with Mdl(10) as mdl:
        ticket = Ticket.of(mdl, 60, broker=broker.path)
        pid = os.fork()
        if pid == 0:
            ticket.keep()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        with Client(broker.path) as client:
            client.names()
        with ticket.redeem() as found:
            assert found.sid == mdl.sid
        # Its keeper's end may come after that: then it is kept still.
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                ticket.redeem().close()
            except ResourceNotFound:
                return
    raise AssertionError("it is kept for ever")


def test_wrong_tickets_give_nothing_and_cost_nothing(broker: Broker) -> None:
    with Mdl(10) as mdl, Peer(broker.path) as peer:
        ticket = Ticket.of(mdl, broker=broker.path)
        used = broker.memory()
        for number in range(20_000):
            secret = number.to_bytes(SECRET)
            assert peer.ask(request(Operation.REDEEM, secret)).rc == Retcode.RESOURCE_NOT_FOUND
        assert broker.memory() - used < 1 << 20
        # A digest that was seen gives nothing.
        assert peer.ask(request(Operation.REDEEM, digest_of(ticket.secret))).rc
        for length in (0, 1, 31, 33, 255):
            found = peer.ask(request(Operation.REDEEM, bytes(length)))
            assert found.rc == Retcode.INVALID_ARGUMENT
        ticket.redeem().close()


def test_a_secret_is_shown_nowhere(tmp_path: Path) -> None:
    audit = tmp_path / "audit.jsonl"
    with running(tmp_path, "--audit", str(audit)) as broker, Mdl(10) as mdl:
        ticket = Ticket.of(mdl, 60, broker=broker.path)
        ticket.keep()
        ticket.redeem().close()
        ticket.release()
        shown = [repr(ticket), str(ticket), f"{ticket}"]
        for ask in (ticket.redeem, ticket.keep, ticket.release):
            with pytest.raises(ResourceNotFound) as caught:
                ask()
            shown.append(repr(caught.value))
        shown.append(audit.read_text())
        sid = mdl.sid
    forms = (ticket.secret.hex(), repr(ticket.secret)[2:-1], digest_of(ticket.secret).hex())
    assert not any(form in text for form in forms for text in shown)
    ends = [each for each in map(json.loads, shown[-1].splitlines()) if each["event"] == "end"]
    assert [each["method"] for each in ends] == [
        *("ticket", "keep_ticket", "redeem", "release_ticket"),
        *("redeem", "keep_ticket", "release_ticket"),
    ]
    assert ends[0]["arguments"] == {"size": 10, "offset": 60000}
    assert (ends[0]["sid"], ends[2]["sid"]) == (sid, sid)
    assert ends[0]["peer"] == [os.getpid(), os.geteuid(), os.getegid()]


def redeem_of_another(path: str, secret: bytes) -> None:
    """Redeem the ticket of another user."""
    with pytest.raises(ResourceNotFound, match="no such ticket"):
        Ticket(secret, path).redeem()
    with Mdl(10) as mdl:
        own = Ticket.of(mdl, broker=path)
        own.redeem().close()
        with pytest.raises(SecurityDisallow, match="rule: no keeping"):
            Ticket.of(mdl, broker=path).keep()


@root_only
def test_a_ticket_is_its_users_alone_and_the_policy_decides(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'default = "allow"\n[[rule]]\nname = "no keeping"\ndeny = ["keep_ticket"]\n'
        "other_user = true\n"
    )
    options = ("--mode", "666", "--policy", str(policy))
    with running(tmp_path, *options) as broker, Mdl(10) as mdl:
        for each in (tmp_path, *tmp_path.parents[:3]):
            each.chmod(0o755)
        ticket = Ticket.of(mdl, broker=broker.path)
        in_own_process(redeem_of_another, broker.path, ticket.secret, nobody=True)
        ticket.redeem().close()


def test_tickets_are_bounded(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default = "allow"\n[limits.user]\ntickets = 3\n')
    with running(tmp_path, "--policy", str(policy)) as broker, Mdl(10) as mdl:
        tickets = [Ticket.of(mdl, broker=broker.path) for _ in range(3)]
        with pytest.raises(QuotaExceeded, match="3 tickets of user"):
            Ticket.of(mdl, broker=broker.path)
        tickets[0].redeem().close()
        Ticket.of(mdl, broker=broker.path).redeem().close()


@pytest.mark.parametrize("seconds", [0, -1, 1e-9, 86_401, float("nan"), float("inf"), True, "5"])
def test_an_impossible_time_is_refused(broker: Broker, seconds: float) -> None:
    with Mdl(10) as mdl, pytest.raises(InvalidArgument, match=r"seconds"):
        Ticket.of(mdl, seconds, broker=broker.path)


@pytest.mark.parametrize("secret", [b"", b"x" * 31, b"x" * 33, "x" * 32, None])
def test_other_bytes_are_no_ticket(secret: bytes) -> None:
    with pytest.raises(InvalidArgument, match="32 bytes"):
        Ticket(secret)


def test_after_a_broker_that_was_killed_a_ticket_is_unknown(tmp_path: Path) -> None:
    with running(tmp_path) as first, Mdl(10) as mdl:
        ticket = Ticket.of(mdl, broker=first.path)
        first.end(signal.SIGKILL)
        (tmp_path / "socket.ready").unlink()
        with running(tmp_path), pytest.raises(ResourceNotFound, match="started anew"):
            ticket.redeem()


@root_only
def test_a_redeemed_buffer_that_is_never_read_is_given_up_with_its_connection(
    broker: Broker,
) -> None:
    with Mdl(10) as mdl:
        tickets = [Ticket.of(mdl, broker=broker.path) for _ in range(5)]
        with Peer(broker.path) as peer:
            for ticket in tickets:  # one is on its way, the others wait behind it
                peer.send(request(Operation.REDEEM, ticket.secret))
        with Client(broker.path) as client:
            client.names()
        for ticket in tickets:
            try:
                ticket.redeem().close()
            except ResourceNotFound as problem:
                assert "redeemed" in str(problem)  # noqa: PT017


# ---- beside a model ------------------------------------------------------------------------------

DIGESTS = st.sampled_from([bytes([number]) for number in range(8)])
USERS = st.sampled_from([1000, 1001])


class Desk(RuleBasedStateMachine):
    """Tickets, and what there is to be of them."""

    @initialize()
    def begin(self) -> None:
        """Begin with none."""
        self.table = Table(Bounds(tickets=5), Bounds(tickets=3, bytes=100))
        self.tickets = Tickets(self.table)
        self.now = 0.0
        self.known: dict[bytes, tuple[int, float, int | None]] = {}
        """User, deadline, and keeper."""
        self.ended: set[bytes] = set()

    @rule(digest=DIGESTS, uid=USERS, seconds=st.integers(1, 5), nbytes=st.integers(0, 60))
    def add(self, digest: bytes, uid: int, seconds: int, nbytes: int) -> None:
        """Make one."""
        ticket = Waiting(digest, 7, uid, rights=1, seconds=seconds, nbytes=nbytes)
        mine = [each for each in self.known.values() if each[0] == uid]
        used = sum(each.figures.bytes for each in self.tickets.waiting.values() if each.uid == uid)
        if digest in self.known or digest in self.ended:
            with pytest.raises(AlreadyExists):
                self.tickets.add(ticket, self.now)
        elif len(mine) >= 3 or len(self.known) >= 5 or used + nbytes > 100:
            with pytest.raises(QuotaExceeded):
                self.tickets.add(ticket, self.now)
        else:
            self.tickets.add(ticket, self.now)
            self.known[digest] = uid, self.now + seconds, None

    @rule(digest=DIGESTS, uid=USERS)
    def redeem(self, digest: bytes, uid: int) -> None:
        """Redeem one."""
        if self.known.get(digest, (None,))[0] != uid:
            with pytest.raises(ResourceNotFound):
                self.tickets.find("redeem", digest, uid)
            return
        ticket = self.tickets.find("redeem", digest, uid)
        assert ticket.keeper == self.known[digest][2]
        if ticket.keeper is None:
            self.tickets.end(ticket, "was redeemed")
            del self.known[digest]
            self.ended.add(digest)

    @rule(digest=DIGESTS, connection=st.integers(1, 2))
    def keep(self, digest: bytes, connection: int) -> None:
        """Keep one."""
        if digest in self.known:
            uid, deadline, _ = self.known[digest]
            self.tickets.keep(self.tickets.find("keep_ticket", digest, uid), connection)
            self.known[digest] = uid, deadline, connection

    @rule(connection=st.integers(1, 2))
    def disconnect(self, connection: int) -> None:
        """A keeper ends."""
        self.tickets.disconnected(connection, self.now)
        for digest, (uid, _, keeper) in list(self.known.items()):
            if keeper == connection:
                seconds = self.tickets.waiting[digest].seconds
                self.known[digest] = uid, self.now + seconds, None

    @rule(seconds=st.integers(0, 3))
    def wait(self, seconds: int) -> None:
        """Time passes."""
        self.now += seconds
        lapsed = {ticket.digest for ticket in self.tickets.lapse(self.now)}
        expected = {
            digest
            for digest, (_, deadline, keeper) in self.known.items()
            if keeper is None and deadline <= self.now
        }
        assert lapsed == expected
        for digest in lapsed:
            del self.known[digest]
        self.ended |= lapsed

    @invariant()
    def is_as_the_model(self) -> None:
        """The same tickets, counted."""
        assert set(self.tickets.waiting) == set(self.known)
        assert self.table.in_all.tickets == len(self.known)
        kept = {each.digest for some in self.tickets.kept.values() for each in some}
        assert kept == {digest for digest, each in self.known.items() if each[2] is not None}


TestDesk = Desk.TestCase
TestDesk.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)


def test_deadlines_of_redeemed_tickets_are_forgotten() -> None:
    tickets = Tickets(Table())
    for number in range(20_000):
        ticket = Waiting(number.to_bytes(4), 7, 1000, rights=1, seconds=1e6)
        tickets.add(ticket, 0.0)
        tickets.end(ticket, "was redeemed")
    assert len(tickets.deadlines) < 2000
    assert len(tickets.ended) <= 4096

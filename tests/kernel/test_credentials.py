"""Users and groups in user namespaces: the kernel's placeholder is nobody's number."""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from commands import run
from forked import in_child
from kernel_oracle import PAGE
from namespaces import enter_user_namespace, needs_user_namespace
from vmm_linux import VMM, Rights, VmmFlags
from vmm_linux._core.credentials import known_gid, known_uid
from vmm_linux.audit import Audit
from vmm_linux.errors import SecurityDisallow
from vmm_linux.inspect import sharing
from vmm_linux.policy import Policy, Question, Rule

if TYPE_CHECKING:
    from pathlib import Path

OVERFLOW = 65534
EVERYBODY = f"0 0 {2**32 - 1}"
ROOT = os.geteuid() == 0
needs_root = pytest.mark.skipif(not ROOT, reason="only root can map others than itself")
#: Of who enters: as root a stranger's, who has the placeholder's number in the namespace; of
#: another user that user's own, under that number. In both the kernel reports its peer by it.
OWN_UIDS = f"{OVERFLOW} {OVERFLOW if ROOT else os.geteuid()} 1"
OWN_GIDS = f"{OVERFLOW} {OVERFLOW if ROOT else os.getegid()} 1"

pytestmark = needs_user_namespace


def become_nobody() -> None:
    """Enter a namespace in which this process is the user whose number is the placeholder."""
    enter_user_namespace(OWN_UIDS, OWN_GIDS)
    if ROOT:
        os.setgroups([])
        os.setresgid(OVERFLOW, OVERFLOW, OVERFLOW)
        os.setresuid(OVERFLOW, OVERFLOW, OVERFLOW)
    assert os.geteuid() == OVERFLOW


def pair_of(user: int, group: int) -> tuple[socket.socket, socket.socket]:
    """A socket pair that this user made."""
    me, mine = os.geteuid(), os.getegid()
    os.setegid(group)
    os.seteuid(user)
    try:
        return socket.socketpair()
    finally:
        os.seteuid(me)
        os.setegid(mine)


def outcomes(policies: list[Policy | None], *, peer_uid: int | None = None) -> list[str]:
    """Whether a handle can be received under each policy, by who made the pair before it entered.

    "sent" and "received", or what refused.
    """
    pairs = [socket.socketpair() for _ in policies]
    become_nobody()
    told = []
    for policy, (ours, theirs) in zip(policies, pairs, strict=True):
        with ours, theirs, VMM() as sender, VMM(policy=policy) as vmm:
            sender.send_handle(theirs, sender.mdl_create(PAGE, VmmFlags.READ))
            try:
                vmm.recv_handle(ours, peer_uid=peer_uid)
            except SecurityDisallow as refusal:
                told.append(str(refusal))
            else:
                told.append("received")
    return told


def allowing(**condition: Any) -> Policy:  # noqa: ANN401
    """Receives from these alone."""
    return Policy([Rule(allow=["recv_handle"], **condition)], default="deny")


def denying(**condition: Any) -> Policy:  # noqa: ANN401
    """Receives from all but these."""
    return Policy([Rule(deny=["recv_handle"], **condition)])


def test_nothing_is_sent_to_a_stranger_who_looks_like_this_user() -> None:
    def send() -> str:
        ours, theirs = socket.socketpair()
        become_nobody()
        policy = Policy(ready=["no transfer to other users"])
        with ours, theirs, VMM(policy=policy) as vmm:
            handle = vmm.mdl_create(PAGE, VmmFlags.READ)
            with pytest.raises(SecurityDisallow, match="no transfer to other users"):
                vmm.send_handle(ours, handle)
            theirs.setblocking(False)
            with pytest.raises(BlockingIOError):
                theirs.recv(1)
        return "refused"

    assert in_child(send) == "refused"


@pytest.mark.parametrize("number", [OVERFLOW, 0, 1000])
def test_a_stranger_is_not_the_user_that_is_demanded(number: int) -> None:
    (refusal,) = in_child(lambda: outcomes([None], peer_uid=number))
    assert "the user at the other end is unknown" in refusal
    assert f"peer_uid is {number}" in refusal


def test_a_stranger_is_denied_by_every_rule_that_denies_some_and_allowed_by_none() -> None:
    ids: list[dict[str, Any]] = [
        {"peer_uid": OVERFLOW},
        {"peer_uid": [5, OVERFLOW]},
        {"peer_uid": 5},
        {"other_user": True},
        {"peer_gid": OVERFLOW},
        {"peer_gid": [7]},
        {"peer_uid": OVERFLOW, "peer_gid": OVERFLOW},
    ]
    told = in_child(
        lambda: outcomes([kind(**each) for each in ids for kind in (allowing, denying)])
    )
    assert len(told) == 2 * len(ids)
    for refusal in told:
        assert refusal.startswith("recv_handle: the policy does not allow it")


@needs_root
def test_one_part_of_a_peer_can_be_known_and_the_other_not() -> None:
    def ask() -> list[Any]:
        pairs = [pair_of(1000, 2000) for _ in range(6)]
        enter_user_namespace(f"{OVERFLOW} {OVERFLOW} 1\n1000 1000 1", f"{OVERFLOW} {OVERFLOW} 1")
        peers: list[Any] = []

        def look(question: Question) -> bool:
            peers.append(question.peer)
            return True

        policies = [
            Policy(ask=look),
            allowing(peer_uid=1000),
            allowing(peer_uid=1000, peer_gid=2000),
            allowing(peer_gid=OVERFLOW),
            denying(peer_gid=5),
            denying(peer_uid=5, peer_gid=5),  # the user is known, and is another one
        ]
        told = []
        for policy, (ours, theirs) in zip(policies, pairs, strict=True):
            with ours, theirs, VMM() as sender, VMM(policy=policy) as vmm:
                sender.send_handle(theirs, sender.mdl_create(PAGE, VmmFlags.READ))
                try:
                    vmm.recv_handle(ours)
                except SecurityDisallow:
                    told.append("denied")
                else:
                    told.append("received")
        return [told, peers[-1][1:]]

    told, peer = in_child(ask)
    assert told == ["received", "received", "denied", "denied", "denied", "received"]
    assert peer == [1000, None]


@needs_root
def test_the_placeholders_number_is_a_user_where_everybody_is_mapped() -> None:
    def receive() -> list[object]:
        ours, theirs = pair_of(OVERFLOW, OVERFLOW)
        enter_user_namespace(EVERYBODY, EVERYBODY)
        with ours, theirs, VMM() as sender, VMM(policy=allowing(peer_gid=OVERFLOW)) as vmm:
            sender.send_handle(theirs, sender.mdl_create(PAGE, VmmFlags.READ))
            vmm.recv_handle(ours, peer_uid=OVERFLOW)
        return [known_uid(OVERFLOW), known_gid(OVERFLOW)]

    assert in_child(receive) == [OVERFLOW, OVERFLOW]


@needs_root
@pytest.mark.parametrize(
    ("uids", "known"),
    [
        (EVERYBODY, True),
        (f"0 0 1000\n1000 1000 {2**32 - 1001}", True),
        (f"5 0 1000\n2000 1000 {2**32 - 2001}\n1005 4294966295 995\n0 4294967290 5", True),
        (f"0 0 {2**32 - 2}", False),
        ("0 0 65536", False),
        (f"0 0 1\n{OVERFLOW} {OVERFLOW} 1", False),
        ("0 0 1", False),
    ],
)
def test_the_placeholders_number_is_known_where_no_id_is_left_out(
    uids: str, *, known: bool
) -> None:
    def ask() -> list[int | None]:
        enter_user_namespace(uids, EVERYBODY)
        return [known_uid(OVERFLOW), known_gid(OVERFLOW), known_uid(3)]

    assert in_child(ask) == [OVERFLOW if known else None, OVERFLOW, 3]


@needs_root
def test_a_namespace_is_asked_anew_each_time() -> None:
    def ask() -> list[int | None]:
        before = known_uid(OVERFLOW)
        enter_user_namespace("0 0 1", "0 0 1")
        return [before, known_uid(OVERFLOW)]

    here = known_uid(OVERFLOW)
    assert in_child(ask) == [here, None]
    assert known_uid(OVERFLOW) == here


def test_no_id_at_all_is_nobodys() -> None:
    assert known_uid(2**32 - 1) is None
    assert known_gid(2**32 - 1) is None


def test_the_audit_says_that_a_stranger_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "calls"

    def send() -> list[Any]:
        ours, theirs = socket.socketpair()
        with ours, theirs, VMM(audit=Audit(path)) as vmm:
            handle = vmm.mdl_create(PAGE, VmmFlags.READ)
            become_nobody()
            vmm.send_handle(ours, handle, Rights.MAP_READ)
            record = vmm.history()[-1]
            return [vmm.handle_info(handle).sid, record.peer, record.as_dict()["peer"]]

    sid, peer, told = in_child(send)
    assert peer == told
    assert peer[1:] == [None, None]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert {line["method"]: line["peer"] for line in lines}["send_handle"] == peer
    traced = run("audit", "trace", hex(sid), str(path))
    assert traced.returncode == 0, traced.stderr
    assert f"sent to pid {peer[0]} (uid unknown)" in " ".join(traced.stdout.split())


@needs_root
def test_owners_of_shared_memory_are_unknown_where_they_are_not_mapped() -> None:
    parent = os.getpid()

    def look() -> list[int | None]:
        become_nobody()
        return [each.uid for each in sharing(all=True).unread if each.pid == parent]

    assert in_child(look) == [None]

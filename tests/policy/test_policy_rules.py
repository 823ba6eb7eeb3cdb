"""Rules of a policy, and those that are ready made."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any

import pytest

from children import NOBODY
from constants import COMMITTED, READ, RESERVED, RW
from kernel_oracle import PAGE
from policies import outcome_of
from vmm_linux import VMM, Rights, Seal, VmmFlags
from vmm_linux.audit import Audit
from vmm_linux.errors import NoCapability, SecurityDisallow
from vmm_linux.policy import Policy, PolicyError, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


READ_EXECUTE = VmmFlags.READ | VmmFlags.EXECUTE


# ---- rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "flags", "expected"),
    [
        (Rule(deny=["allocate"], all_flags=["WRITE", "COMMIT"]), COMMITTED, False),
        (Rule(deny=["allocate"], all_flags=["WRITE", "COMMIT"]), RESERVED, True),
        (Rule(deny=["allocate"], any_flags=["HUGE", "WRITE"]), RESERVED, False),
        (Rule(deny=["allocate"], any_flags=["HUGE", "EXECUTE"]), RESERVED, True),
        (Rule(deny=["allocate"], no_flags=["COMMIT"]), RESERVED, False),
        (Rule(deny=["allocate"], no_flags=["COMMIT"]), COMMITTED, True),
        (Rule(deny=["allocate"], min_size=PAGE), RESERVED, False),
        (Rule(deny=["allocate"], min_size=PAGE + 1), RESERVED, True),
        (Rule(deny=["allocate"], max_size=PAGE), RESERVED, False),
        (Rule(deny=["allocate"], max_size=PAGE - 1), RESERVED, True),
        (Rule(deny="*", any_flags=["WRITE"], max_size=PAGE), RESERVED, False),
        (Rule(deny=["commit"]), RESERVED, True),
    ],
)
def test_a_rule_matches_where_all_its_conditions_hold(
    rule: Rule, flags: VmmFlags, expected: bool
) -> None:
    rc = outcome_of(Policy([rule]), "allocate", 0, PAGE, flags)
    assert rc == ("OK" if expected else "SECURITY_DISALLOW")
    allowing = Rule(**{**vars(rule), "allow": rule.deny, "deny": None})
    rc = outcome_of(Policy([allowing], default="deny"), "allocate", 0, PAGE, flags)
    assert rc == ("SECURITY_DISALLOW" if expected else "OK")


def test_the_first_rule_that_matches_answers() -> None:
    rules = [Rule(allow=["allocate"], max_size=PAGE), Rule(deny=["allocate"], name="the second")]
    assert outcome_of(Policy(rules), "allocate", 0, PAGE, RESERVED) == "OK"
    with VMM(policy=Policy(rules)) as vmm, pytest.raises(SecurityDisallow, match="the second"):
        vmm.allocate(0, 2 * PAGE, RESERVED)


def test_rights_and_seals_of_what_leaves_are_looked_at() -> None:
    ours, theirs = socket.socketpair()
    rules = [
        Rule(deny=["send_handle"], any_rights=["MAP_WRITE"]),
        Rule(deny=["handle_copy"], all_rights=["COPY", "TRANSFER"]),
        Rule(deny=["mdl_seal"], any_seals=["FREEZE"]),
        Rule(deny=["recv_handle"], no_seals=["FREEZE"]),
    ]
    with ours, theirs, VMM(policy=Policy(rules)) as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        for denied in (
            lambda: vmm.send_handle(ours, handle),
            lambda: vmm.send_handle(ours, handle, Rights.MAP_WRITE),
            lambda: vmm.handle_copy(handle, Rights.COPY | Rights.TRANSFER),
            lambda: vmm.mdl_seal(handle, Seal.FREEZE),
            lambda: vmm.recv_handle(theirs),
            lambda: vmm.recv_handle(theirs, Seal.PUBLISH),
        ):
            with pytest.raises(SecurityDisallow, match="rule: rule"):
                denied()
        vmm.send_handle(ours, handle, Rights.MAP_READ)
        vmm.handle_copy(handle, Rights.COPY)
        vmm.mdl_seal(handle, Seal.PUBLISH)
        with pytest.raises(SecurityDisallow, match="not sealed"):
            vmm.recv_handle(theirs, Seal.FREEZE)


def test_peers_are_looked_at() -> None:
    ours, theirs = socket.socketpair()
    us = os.geteuid()
    rules = [
        Rule(allow=["send_handle"], peer_uid=[us + 1, us], peer_gid=os.getegid()),
        Rule(allow=["recv_handle"], peer_uid=us + 1),
        Rule(allow=["mdl_create"]),
    ]
    with ours, theirs, VMM(policy=Policy(rules, default="deny")) as vmm:
        vmm.send_handle(ours, vmm.mdl_create(PAGE, READ))
        with pytest.raises(SecurityDisallow, match="default"):
            vmm.recv_handle(theirs)


@contextlib.contextmanager
def sockets_that_do_not_tell() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends that were connected without the kernel noting by whom."""
    address = f"\0vmm-linux-unknown-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as theirs,
    ):
        theirs.bind(address)
        ours.connect(address)
        ours.settimeout(10)
        theirs.settimeout(10)
        yield ours, theirs


ABOUT_PEERS: list[dict[str, Any]] = [
    {"peer_uid": os.geteuid()},
    {"peer_uid": os.geteuid() + 1},
    {"peer_gid": [os.getegid(), os.getegid() + 1]},
    {"peer_uid": os.geteuid(), "peer_gid": os.getegid()},
    {"other_user": True},
]


@pytest.mark.parametrize("about", ABOUT_PEERS)
def test_somebody_unknown_is_denied_by_every_rule_that_denies_some_peer(
    about: dict[str, Any],
) -> None:
    rule = Rule(deny=["send_handle", "recv_handle"], **about, name="not to them")
    with sockets_that_do_not_tell() as (ours, theirs), VMM(policy=Policy([rule])) as vmm:
        handle = vmm.mdl_create(PAGE, READ)
        with pytest.raises(SecurityDisallow, match="not to them"):
            vmm.send_handle(ours, handle)
        with pytest.raises(SecurityDisallow, match="not to them"):
            vmm.recv_handle(theirs)


@pytest.mark.parametrize("about", ABOUT_PEERS)
def test_somebody_unknown_is_allowed_by_no_rule_that_allows_some_peer(
    about: dict[str, Any],
) -> None:
    rules = [Rule(allow="*", **about), Rule(allow=["mdl_create"])]
    with (
        sockets_that_do_not_tell() as (ours, theirs),
        VMM(policy=Policy(rules, default="deny")) as vmm,
    ):
        handle = vmm.mdl_create(PAGE, READ)
        with pytest.raises(SecurityDisallow, match="default"):
            vmm.send_handle(ours, handle)
        with pytest.raises(SecurityDisallow, match="default"):
            vmm.recv_handle(theirs)


def test_with_somebody_unknown_the_other_conditions_have_to_hold_all_the_same() -> None:
    rules = [Rule(deny=["send_handle"], other_user=True, any_rights=["MAP_WRITE"])]
    with sockets_that_do_not_tell() as (ours, theirs), VMM(policy=Policy(rules)) as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        with pytest.raises(SecurityDisallow):
            vmm.send_handle(ours, handle)
        vmm.send_handle(ours, handle, Rights.MAP_READ)
        assert vmm.recv_handle(theirs).rights == Rights.MAP_READ


@pytest.mark.parametrize("about", ABOUT_PEERS)
def test_after_a_rule_that_allows_the_same_peers_one_that_denies_answers_for_the_unknown(
    about: dict[str, Any],
) -> None:
    allow, deny = Rule(allow=["send_handle"], **about), Rule(deny=["send_handle"], **about)
    with (
        sockets_that_do_not_tell() as (ours, _),
        VMM(policy=Policy([allow, deny])) as vmm,
        pytest.raises(SecurityDisallow, match="rule 2"),
    ):
        vmm.send_handle(ours, vmm.mdl_create(PAGE, READ))
    with pytest.raises(PolicyError, match="'rule 1' says the opposite"):
        Policy([deny, allow])
    with pytest.raises(PolicyError, match="'rule 1' always answers first"):
        Policy([allow, allow])


# ---- ready rules ---------------------------------------------------------------------------------


def test_nothing_is_writable_and_executable_under_w_xor_x() -> None:
    both = VmmFlags.RWX_MASK
    with VMM(policy=Policy(ready=["W^X"])) as vmm:
        va = vmm.allocate(0, PAGE, COMMITTED)
        read = vmm.mdl_create(PAGE, READ_EXECUTE)
        for denied in (
            lambda: vmm.allocate(0, PAGE, VmmFlags.RESERVE | both),
            lambda: vmm.protect(va, PAGE, both),
            lambda: vmm.mdl_create(PAGE, both),
            lambda: vmm.mdl_create_from_vm(va, PAGE, both),
            lambda: vmm.mdl_create_from_buf(b"x", both),
            lambda: vmm.mdl_map(read, 0, PAGE, 0, both),
        ):
            with pytest.raises(SecurityDisallow, match=r"W\^X"):
                denied()
        vmm.protect(va, PAGE, READ_EXECUTE)


@pytest.mark.parametrize("flags", [COMMITTED, COMMITTED | VmmFlags.SHAREABLE])
def test_no_page_of_a_buffer_becomes_executable(flags: VmmFlags) -> None:
    with VMM(policy=Policy(ready=["no executable MDL"]), audit=Audit()) as vmm:
        calls: list[Callable[[], object]] = [
            lambda: vmm.mdl_create(PAGE, READ_EXECUTE),
            lambda: vmm.mdl_create_from_buf(b"x", READ_EXECUTE),
            lambda: vmm.mdl_map(vmm.mdl_create(PAGE, READ), 0, PAGE, 0, READ_EXECUTE),
        ]
        for denied in calls:
            with pytest.raises(SecurityDisallow, match="no executable MDL"):
                denied()
        va = vmm.allocate(0, 2 * PAGE, flags)
        vmm.protect(va, PAGE, READ_EXECUTE)
        with pytest.raises(SecurityDisallow, match="no executable MDL"):
            vmm.mdl_create_from_vm(va, 2 * PAGE, READ)
        denial = vmm.history()[-1]
        assert (denial.decision, denial.rule) == ("deny", "no executable MDL")
        vmm.protect(va, PAGE, RW)
        vmm.mdl_create_from_vm(va, 2 * PAGE, READ)
        with pytest.raises(NoCapability):
            vmm.protect(va, PAGE, READ_EXECUTE)
        vmm.protect(va, PAGE, READ)
        vmm._check()


def test_only_sealed_buffers_leave() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, VMM(policy=Policy(ready=["only frozen or published buffers leave"])) as vmm:
        handle = vmm.mdl_create(PAGE, RW)
        for denied in (
            lambda: vmm.send_handle(ours, handle),
            lambda: vmm.handle_fileno(handle),
            lambda: vmm.send_handle(ours, handle + 1),
        ):
            with pytest.raises(SecurityDisallow, match="only frozen or published"):
                denied()
        vmm.mdl_seal(handle, Seal.PUBLISH)
        vmm.send_handle(ours, handle)
        frozen = vmm.mdl_create_from_buf(b"x", READ)
        os.close(vmm.handle_fileno(frozen))


def test_nothing_goes_to_somebody_unknown() -> None:
    policy = Policy(ready=["no transfer to other users"])
    with VMM(policy=policy) as vmm, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        handle = vmm.mdl_create(PAGE, READ)
        with pytest.raises(SecurityDisallow, match="no transfer"):
            vmm.send_handle(ours, handle)
        with pytest.raises(SecurityDisallow, match="no transfer"):
            vmm.handle_fileno(handle)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_nothing_goes_to_another_user() -> None:
    address = f"\0vmm-linux-policy-{os.getpid()}"
    with (
        socket.socket(socket.AF_UNIX) as listener,
        VMM(policy=Policy(ready=["no transfer to other users"])) as vmm,
    ):
        listener.bind(address)
        listener.listen()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setuid(NOBODY)
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(address)
                    status = len(sock.recv(1))
            finally:
                os._exit(status)
        connection, _ = listener.accept()
        with connection:
            handle = vmm.mdl_create(PAGE, READ)
            with pytest.raises(SecurityDisallow, match="no transfer"):
                vmm.send_handle(connection, handle)
        # It saw the end of the connection, and not a byte.
        assert os.waitpid(child, 0)[1] == 0

"""The policy of a broker: the package's rules, about operations and names, and limits."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from readme import blocks
from vmm_linux import Rights, Seal
from vmm_linux.broker.policy import OPERATIONS, BrokerPolicy, NameRule
from vmm_linux.broker.table import Bounds
from vmm_linux.names.protocol import Operation
from vmm_linux.policy import Policy, PolicyError

if TYPE_CHECKING:
    from pathlib import Path

ME, OTHER, UNKNOWN = (0, 0), (1000, 100), (None, None)


def decided(policy: BrokerPolicy, operation: str, *names: str, **facts: int) -> str:
    """The rule that decides about an operation of another user, and how."""
    allowed, rule = policy.decide(operation, OTHER, names, **facts)
    return f"{'allow' if allowed else 'deny'} {rule}"


def test_every_operation_with_an_answer_is_decided_about() -> None:
    undecided = {Operation.HELLO, Operation.SYNC}
    assert set(OPERATIONS) == {each.name.lower() for each in set(Operation) - undecided}


def test_without_a_file_only_the_brokers_own_user_is_allowed() -> None:
    policy = BrokerPolicy.own_user_only()
    for operation in OPERATIONS:
        mine = policy.decide(operation, (os.geteuid(), os.getegid()), ["frames"])
        assert mine == (True, "default")
        for peer in ((os.geteuid() + 1, 0), UNKNOWN):
            assert policy.decide(operation, peer, ["frames"]) == (False, "own user only")


def test_the_first_rule_that_matches_decides() -> None:
    policy = BrokerPolicy(
        [
            NameRule(name="cameras", allow=["open", "stat"], names=["camera.*", "frames"]),
            NameRule(name="small", allow=["create"], max_size=4096, names=["tmp.*"]),
            NameRule(name="readers", allow=["open"], no_rights=["MAP_WRITE"]),
        ],
        default="deny",
    )
    write = int(Rights.MAP_WRITE)
    assert decided(policy, "open", "camera.1", rights=write) == "allow cameras"
    assert decided(policy, "open", "frames", rights=write) == "allow cameras"
    assert decided(policy, "open", "frames2", rights=write) == "deny default"
    assert decided(policy, "open", "frames2") == "allow readers"
    assert decided(policy, "create", "tmp.a", size=4096) == "allow small"
    assert decided(policy, "create", "tmp.a", size=4097) == "deny default"
    assert decided(policy, "create", "camera.1", size=1) == "deny default"
    assert decided(policy, "list") == "deny default"


def test_of_two_names_all_must_match_to_allow_and_one_to_deny() -> None:
    policy = BrokerPolicy(
        [
            NameRule(name="closed", deny=["clone"], names=["secret*"]),
            NameRule(name="open", allow=["clone"], names=["tmp*"]),
        ],
        default="deny",
    )
    assert decided(policy, "clone", "secret", "tmp") == "deny closed"
    assert decided(policy, "clone", "tmp", "secret") == "deny closed"
    assert decided(policy, "clone", "tmp", "other") == "deny default"
    assert decided(policy, "clone", "tmp", "tmp2") == "allow open"


def test_patterns_match_whole_names_and_case() -> None:
    policy = BrokerPolicy([NameRule(name="it", deny=["open"], names=["a?[xy]*"])])
    for name, answer in (
        ("abx", "deny it"),
        ("abyz\n", "deny it"),
        ("Abx", "allow default"),
        ("zabx", "allow default"),
        ("ab", "allow default"),
    ):
        assert decided(policy, "open", name) == answer


def test_unknown_users_are_denied_by_rules_about_some_and_allowed_by_none() -> None:
    policy = BrokerPolicy(
        [
            NameRule(name="friends", allow=["open"], peer_uid=[1000]),
            NameRule(name="strangers", deny=["open"], peer_gid=5),
        ]
    )
    assert policy.decide("open", (1000, 7), ["a"]) == (True, "friends")
    assert policy.decide("open", (None, None), ["a"]) == (False, "strangers")
    assert policy.decide("open", (7, 7), ["a"]) == (True, "default")


def test_seals_are_compared() -> None:
    policy = BrokerPolicy([NameRule(name="no", deny=["seal"], any_seals=["FREEZE"])])
    assert decided(policy, "seal", "a", seals=int(Seal.FREEZE)) == "deny no"
    assert decided(policy, "seal", "a", seals=int(Seal.PUBLISH)) == "allow default"


FILE = """
default = "deny"

[limits]
names = 100
bytes = 1_000_000
idle = 60

[limits.user]
names = 10
connections = 5

[[rule]]
allow = "*"
other_user = true
names = ["public.*"]

[[rule]]
allow = ["list"]
"""


def read(folder: Path, text: str) -> BrokerPolicy:
    """The policy that a file has."""
    (folder / "policy.toml").write_text(text)
    return BrokerPolicy.from_toml(folder / "policy.toml")


def test_a_file_has_rules_and_limits(tmp_path: Path) -> None:
    policy = read(tmp_path, FILE)
    assert policy.bounds == Bounds(names=100, bytes=1_000_000)
    assert policy.each == Bounds(names=10, connections=5)
    assert policy.idle == 60
    assert decided(policy, "open", "public.a") == "allow rule 1"
    assert decided(policy, "list") == "allow rule 2"
    assert decided(policy, "open", "private") == "deny default"


HIDDEN = """default = "deny"
[[rule]]
allow = ["open"]
names = ["a", "b"]
[[rule]]
deny = ["open"]
names = ["b"]
"""


@pytest.mark.parametrize(
    ("text", "line", "why"),
    [
        ("", None, "default is missing"),
        ('default = "maybe"', 1, "'allow' or 'deny'"),
        ('default = "deny"\nready = []', 2, "unknown key 'ready'"),
        ('default = "deny"\n[[rule]]\nallow = ["opne"]', 3, "did you mean 'open'"),
        ('default = "deny"\n[[rule]]\nallow = ["mdl_map"]', 3, "unknown method"),
        ('default = "deny"\n[[rule]]\nallow = ["open"]\nnmaes = ["a"]', 4, "did you mean 'names'"),
        ('default = "deny"\n[[rule]]\nallow = ["open"]\nnames = "a"', 4, "not a list of names"),
        ('default = "deny"\n[[rule]]\nallow = ["open"]\nall_flags = ["READ"]', 4, "has no flags"),
        ('default = "deny"\n[[rule]]\nallow = ["stat"]\nmax_size = 5', 4, "has no size"),
        ('default = "deny"\n[limits]\nname = 5', 3, "did you mean 'names'"),
        ('default = "deny"\n[limits]\nnames = -5', 3, "not a number from 0"),
        ('default = "deny"\n[limits]\nnames = true', 3, "not a number from 0"),
        ('default = "deny"\n[limits.user]\nidle = 5', 3, "unknown key 'idle'"),
        ('default = "deny"\nlimits = 5', 2, "no table"),
        (
            'default = "deny"\n[[rule]]\nallow = ["open"]\n[[rule]]\ndeny = ["open"]',
            4,
            "can never match",
        ),
        (
            HIDDEN,
            5,
            "can never match",
        ),
    ],
)
def test_a_mistake_in_a_file_has_its_line_and_reason(
    tmp_path: Path, text: str, line: int | None, why: str
) -> None:
    with pytest.raises(PolicyError, match=why) as caught:
        read(tmp_path, text)
    assert caught.value.line == line


def test_rules_with_other_patterns_do_not_hide_each_other() -> None:
    BrokerPolicy(
        [
            NameRule(allow=["open"], names=["a"]),
            NameRule(allow=["open"], names=["a", "b"]),
            NameRule(allow=["open"]),
        ]
    )


def test_a_policy_of_methods_knows_no_names(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        'default = "deny"\n[[rule]]\nallow = ["mdl_map"]\nnames = ["a"]\n'
    )
    with pytest.raises(PolicyError, match="unknown key 'names'"):
        Policy.from_toml(tmp_path / "policy.toml")


def test_the_file_in_the_readme_is_a_policy(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    policy = read(tmp_path, text)
    assert policy.each == Bounds(connections=100, names=1000, descriptors=2000, tickets=500)
    assert policy.decide("publish", (1000, 1000), ["camera.1"]) == (True, "rule 1")
    assert decided(policy, "open", "public.a") == "allow rule 2"

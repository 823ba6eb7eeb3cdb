"""Policies in files and in the environment, and what is no policy."""

from __future__ import annotations

import gc
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from constants import RESERVED
from kernel_oracle import PAGE
from policies import outcome_of
from vmm_linux import VMM, Mdl
from vmm_linux.errors import InvalidArgument, SecurityDisallow
from vmm_linux.policy import READY, Policy, PolicyError, Rule, toml_lines


def write_policy(folder: Path, text: str) -> Path:
    """A file with this policy."""
    path = folder / "policy.toml"
    path.write_text(text)
    return path


# ---- files ---------------------------------------------------------------------------------------


def test_a_file_says_all_that_rules_can(tmp_path: Path) -> None:
    path = write_policy(
        tmp_path,
        """
        default = "deny"
        audit_failure = "continue"
        ready = ["W^X", "no executable MDL"]
        [[rule]]
        name = "small"
        allow = ["allocate"]
        max_size = 0x10_0000
        [[rule]]
        allow = "*"
        peer_uid = 0
        """,
    )
    policy = Policy.from_toml(path)
    assert policy.audit_failure == "continue"
    assert outcome_of(policy, "allocate", 0, PAGE, RESERVED) == "OK"
    assert outcome_of(policy, "allocate", 0, 2 << 20, RESERVED) == "SECURITY_DISALLOW"
    assert outcome_of(policy, "query", 0) == "SECURITY_DISALLOW"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('default = "deny\n', 1, "Illegal character"),
        ("a = 1\nb = = 2", 2, "Invalid value"),
        ("[[rule]]\nallow = [", 2, "at end of document"),
        ("x = " + "[" * 5000, 1, ""),
        ('\ndefault = "denied"', 2, "default is 'denied', not 'allow' or 'deny'; did you mean"),
        ("default = true", 1, "default is True"),
        ('\n\ndefalt = "deny"', 3, "unknown key 'defalt'; did you mean 'default'?"),
        ('audit_failure = "stop"', 1, "audit_failure"),
        ('ready = ["w^x"]', 1, "unknown ready rule 'w^x'; did you mean 'W^X'?"),
        ('ready = ["W^X", "W^X"]', 1, "twice"),
        ('ready = "W^X"', 1, "not a list"),
        ("rule = 1", 1, r"[[rule]]"),
        ('[[rule]]\nallow = ["alocate"]', 2, "unknown method 'alocate'; did you mean 'allocate'?"),
        ('[[rule]]\nallow = "allocate"', 2, "not a list of names"),
        ('[[rule]]\ndeny = ["close"]', 2, "close cannot be decided about"),
        ("[[rule]]\ndeny = []", 2, "names no method"),
        ('[[rule]]\nname = "x"', 1, "one of allow and deny"),
        ('[[rule]]\nallow = "*"\ndeny = "*"', 1, "one of allow and deny"),
        ('[[rule]]\nallow = "*"\nsise = 3', 3, "unknown key 'sise'"),
        ('[[rule]]\ndeny = ["protect"]\nany_flags = ["WRIT"]', 3, "unknown flags 'WRIT'"),
        ('[[rule]]\ndeny = ["protect"]\nany_flags = ["HUGE"]', 3, "protect does not take these"),
        ('[[rule]]\ndeny = ["free"]\nany_flags = ["WRITE"]', 3, "free has no flags"),
        ('[[rule]]\ndeny = ["free"]\npeer_uid = 1', 3, "free has no peer"),
        ('[[rule]]\ndeny = ["handle_copy"]\nall_rights = ["MAP"]', 3, "unknown rights 'MAP'"),
        ('[[rule]]\ndeny = ["mdl_seal"]\nall_seals = ["frozen"]', 3, "did you mean 'FREEZE'?"),
        (
            '[[rule]]\ndeny = ["free"]\nmin_size = 2\nmax_size = 1',
            3,
            "min_size 2 is above max_size",
        ),
        ('[[rule]]\ndeny = ["free"]\nmin_size = -1', 3, "min_size is -1"),
        ('[[rule]]\ndeny = ["free"]\nmax_size = 1.5', 3, "max_size is 1.5"),
        ('[[rule]]\ndeny = ["free"]\nmax_size = true', 3, "max_size is True"),
        ('[[rule]]\ndeny = ["send_handle"]\npeer_uid = []', 3, "matches nobody"),
        ('[[rule]]\ndeny = ["send_handle"]\npeer_uid = ["root"]', 3, "'root' is no number"),
        ('[[rule]]\ndeny = ["send_handle"]\nother_user = false', 3, "true, or leave it out"),
        ('[[rule]]\ndeny = "*"\nname = "a\\u0007"', 3, "no printable text"),
        (
            '[[rule]]\ndeny = ["protect"]\nall_flags = ["READ"]\nno_flags = ["READ"]',
            4,
            "READ in all_flags and in no_flags",
        ),
        (
            '[[rule]]\ndeny = ["protect"]\nany_flags = ["READ"]\nno_flags = ["READ"]',
            3,
            "can never match",
        ),
        (
            '[[rule]]\nallow = ["free"]\n\n# the same\n[[rule]]\ndeny = ["free"]',
            5,
            "'rule 1' says the opposite",
        ),
        ('[[rule]]\nallow = "*"\n[[rule]]\ndeny = ["free"]\nmin_size = 9', 3, "always answers"),
        (
            'ready = ["no transfer to other users"]\n[[rule]]\nallow = ["handle_fileno"]',
            2,
            "'no transfer to other users' says the opposite",
        ),
        ("", None, "default is missing"),
        ('ready = ["W^X"]', None, "default is missing"),
        ("[[rule]]\ndeny = '*'\nany_flags=['READ']\nany_seals=['FREEZE']", 1, "no method has all"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_with_line_and_reason(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    path = write_policy(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        Policy.from_toml(path)
    problem = caught.value
    assert (problem.file, problem.line) == (str(path), line), problem
    assert words in problem.reason
    where = f"{path}:{line}" if line else str(path)
    assert str(problem) == f"Policy: {where}: {problem.reason}"
    copy = pickle.loads(pickle.dumps(problem))  # noqa: S301
    assert (type(copy), str(copy), copy.line) == (PolicyError, str(problem), line)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        pytest.param("\nx = " + "9" * 5000, 2, "too many digits", id="digits"),
        pytest.param(
            '[[rule]]\ndeny = ["free"]\nmax_size = 0x' + "f" * 9999,
            3,
            "is a number of 39996 bits, not",
            id="bits",
        ),
        pytest.param(
            "[[rule]]\nallow" + ".a" * 2000 + " = 1", 2, "is a dict, not a list", id="depth"
        ),
        pytest.param("ready = [\n" + '"x",\n' * 9999 + "]", None, "ready rule 'x'", id="lines"),
    ],
)
def test_values_out_of_all_proportion_are_refused_soon(
    tmp_path: Path, text: str, line: int | None, words: str
) -> None:
    with pytest.raises(PolicyError, match=words) as caught:
        Policy.from_toml(write_policy(tmp_path, text))
    assert caught.value.line == line


def test_files_of_bytes_and_files_too_long_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(b"a = 1\nb = '\xff'\n")
    with pytest.raises(PolicyError, match=":2: not UTF-8"):
        Policy.from_toml(path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(PolicyError, match="longer than"):
        Policy.from_toml(path)
    with pytest.raises(FileNotFoundError):
        Policy.from_toml(tmp_path / "none.toml")
    with pytest.raises(PolicyError, match="null byte"):
        Policy.from_toml("a\0b")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for odd in (pipe, tmp_path, Path("/dev/null")):
        with pytest.raises(PolicyError, match="no ordinary file"):
            Policy.from_toml(odd)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"rules": [3]}, "rule 1: 3 is no Rule"),
        ({"rules": [Rule(deny=["free"]), Rule(deny=["fre"])]}, "rule 2: unknown method"),
        ({"default": "no"}, "default is 'no'"),
        ({"ready": ["x"]}, "unknown ready rule"),
        ({"ask": 3}, "cannot be called"),
        ({"audit_failure": 1}, "audit_failure"),
    ],
)
def test_a_policy_in_python_is_checked_alike(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        Policy(**arguments)


def test_rules_that_differ_somewhere_are_no_contradiction() -> None:
    Policy(
        [
            Rule(allow=["allocate"], max_size=PAGE),
            Rule(deny=["allocate"], max_size=2 * PAGE),
            Rule(allow=["allocate", "free"], any_flags=[], all_flags=[]),
            Rule(deny=["protect"], all_flags=["READ", "EXECUTE"]),
            Rule(deny=["protect"], any_flags=["READ", "EXECUTE"]),
            Rule(allow=["send_handle"], peer_uid=[1, 2]),
            Rule(deny=["send_handle"], peer_uid=[2, 3]),
            Rule(deny=["send_handle"]),
            Rule(allow="*"),
        ],
        ready=list(READY),
    )


@pytest.mark.parametrize("methods", ["*", ["allocate", "free"]])
def test_the_interpreters_work_grows_with_the_rules_and_not_with_their_pairs(
    methods: list[str],
) -> None:
    def work(count: int) -> int:
        rules = [Rule(allow=methods, max_size=number) for number in range(count)]
        calls: list[str] = []
        gc.disable()  # what others have it call is no work of the policy's
        sys.setprofile(lambda _frame, event, _argument: calls.append(event))
        try:
            Policy(rules)
        finally:
            sys.setprofile(None)
            gc.enable()
        return len(calls)

    few, twice, thrice = (work(count) for count in (50, 100, 150))
    assert thrice - twice == twice - few > 0


def test_among_many_rules_the_one_that_never_answers_is_named_with_the_one_that_does() -> None:
    rules = [Rule(allow=["allocate", "free"], max_size=number) for number in range(1000)]
    hidden = Rule(deny=["free", "allocate"], max_size=700)
    with pytest.raises(PolicyError, match=r"^Policy: rule 1001: .*'rule 701' says the opposite"):
        Policy([*rules, hidden])
    apart = [Rule(allow=["allocate"]), Rule(allow=["commit", "free"], min_size=1)]
    with pytest.raises(PolicyError, match=r"^Policy: rule 3: .*'rule 2' always answers first"):
        Policy([*apart, Rule(deny=["free", "allocate"], min_size=2)])


@pytest.mark.parametrize("value", [3, "deny", Policy, object()])
def test_what_is_no_policy_is_refused(value: Any) -> None:  # noqa: ANN401
    with pytest.raises(InvalidArgument, match="not a Policy"):
        VMM(policy=value)


def test_a_policy_that_was_never_made_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="not a Policy"):
        VMM(policy=Policy.__new__(Policy))


TEXT = '''# [[rule]]
title = """
[[rule]]
allow = 1
"""

[[rule]]   # the first
allow = [
    "free",   # one
    # a comment

    "query",
]
[[rule]]
inner = {a = 1, b = [2, 3]}
other.key = 3
'''


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("path", "line"),
    [
        ((), None),
        (("missing",), None),
        (("title",), 2),
        (("rule",), 7),
        (("rule", 0), 7),
        (("rule", 0, "allow"), 8),
        (("rule", 0, "deny"), 7),
        (("rule", 1), 14),
        (("rule", 1, "inner"), 15),
        (("rule", 1, "inner", "b", 1), 15),
        (("rule", 1, "other"), 16),
        (("rule", 2), 7),
    ],
)
def test_a_thing_is_found_in_the_line_in_which_it_begins(
    path: tuple[str | int, ...], line: int | None, newline: str
) -> None:
    text = TEXT.replace("\n", newline)
    assert toml_lines.line_of(text, path) == line


# ---- the environment -----------------------------------------------------------------------------


def test_a_vmm_that_names_no_policy_has_the_environments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMM_LINUX_POLICY", str(write_policy(tmp_path, 'default = "deny"')))
    from vmm_linux._default_vmm import DEFAULT

    made_before = DEFAULT.pop("vmm", None)
    bare = VMM.__new__(VMM)
    with VMM() as vmm, VMM(policy=Policy()) as own:
        for each in (vmm, bare):
            with pytest.raises(SecurityDisallow, match="default"):
                each.allocate(0, PAGE, RESERVED)
        own.allocate(0, PAGE, RESERVED)
        with pytest.raises(SecurityDisallow):
            Mdl.from_bytes(b"x").close()
    bare.close()
    DEFAULT.pop("vmm").close()
    if made_before is not None:
        DEFAULT["vmm"] = made_before


def test_a_file_of_the_environment_that_is_no_policy_leaves_no_vmm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_policy(tmp_path, "x = 1")
    monkeypatch.setenv("VMM_LINUX_POLICY", str(path))
    with pytest.raises(PolicyError, match=":1: unknown key 'x'"):
        VMM()
    bare = VMM.__new__(VMM)
    with pytest.raises(PolicyError):
        bare.allocate(0, PAGE, RESERVED)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        VMM()
    monkeypatch.setenv("VMM_LINUX_POLICY", "")
    bare.allocate(0, PAGE, RESERVED)
    bare.close()

"""Policies, which a VMM checks before every call, as the security module does in KasperskyOS.

A policy is a list of rules. The first rule that matches a call decides; where none matches, the
user's callable decides if there is one, and the default otherwise. Ready rules only deny, and come
before all others. A denied call raises ``SecurityDisallow``, which names the method and the rule,
and has changed nothing.

A policy inside a process guards against mistakes, and against components that use this package
unchanged. Native code and ``ctypes`` in the same process can bypass it, and so can code that
replaces functions of this package, or takes a buffer's descriptor out of ``/proc/self/fd``.
"""

import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Self

from vmm_linux._core.endpoint import Question, RuleTable
from vmm_linux._core.values import exact_text, quoted, shown
from vmm_linux.flags import VmmFlags
from vmm_linux.policy import toml_lines
from vmm_linux.policy.compile import (
    check_reachable,
    compile_rule,
    compiled_ready,
    members,
    names_in,
    one_of,
    suggestion,
)
from vmm_linux.policy.rule import KEYS, READY, FlawError, PolicyError, Rule

__all__ = ["READY", "Policy", "PolicyError", "Question", "Rule"]

for _public in (PolicyError, Rule):
    _public.__module__ = __name__  # as tracebacks and pickles name it

LONGEST_FILE: Final = 1 << 20
DEFAULTS: Final = ("allow", "deny")
FAILURES: Final = ("deny", "continue")
TOP_KEYS: Final = ("default", "ready", "audit_failure", "rule")


class Policy(RuleTable):
    """Decides about every call of a VMM: ``VMM(policy=Policy(...))``. Immutable.

    Args:
        rules: checked in order; the first that matches decides.
        default: ``"allow"`` or ``"deny"``: the answer where no rule matches.
        ready: names of ready rules (``READY``), which deny before ``rules`` are checked.
        ask: a callable, called with a ``Question`` where no rule matches, in place of the default.
            Only ``True`` allows; a text denies with a reason; any other value, and an exception,
            denies. It may read ``question.usage``; calls of the VMM's methods inside it are denied.
        audit_failure: the answer to a call that the audit cannot record: ``"deny"``,
            ``"continue"``, or None for the ``Audit``'s own setting.

    Errors:
        INVALID_ARGUMENT (``PolicyError``): unknown names, bounds with nothing between them, a rule
            that can never match because an earlier one always does.
    """

    def __init__(
        self,
        rules: Iterable[Rule] = (),
        *,
        default: str = "allow",
        ready: Iterable[str] = (),
        ask: Callable[[Question], object] | None = None,
        audit_failure: str | None = None,
    ) -> None:
        try:
            self._take(
                members("rules", rules), default, members("ready", ready), ask, audit_failure
            )
        except FlawError as flaw:
            raise PolicyError(f"{place_of(flaw.path)}{flaw.reason}") from None

    def _take(
        self,
        rules: Sequence[object],
        default: object,
        ready: Sequence[object],
        ask: Callable[[Question], object] | None,
        audit_failure: object,
    ) -> None:
        """Compile the rules."""
        one_of(default, DEFAULTS, "default")
        if audit_failure is not None:
            one_of(audit_failure, FAILURES, "audit_failure")
        if ask is not None and not callable(ask):
            raise FlawError(f"{shown(ask)} cannot be called", "ask")
        names = names_in(ready, "ready")
        readied = compiled_ready(names)
        compiled = readied + [
            compile_rule(rule, number, len(readied)) for number, rule in enumerate(rules)
        ]
        numbers = [rule.as_numbers() for rule in compiled]
        check_reachable(compiled, numbers, len(readied))
        self._compile(
            numbers,
            tuple(rule.name for rule in compiled),
            exact_text(default) == "allow",
            ask,
            int(VmmFlags.EXECUTE) if "no executable MDL" in names else 0,
            exact_text(audit_failure),
        )

    @classmethod
    def from_callable(cls, ask: Callable[[Question], object]) -> Self:
        """A policy in which a callable decides about every call. See ``ask``."""
        return cls(ask=ask, default="deny")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy from a file.

        The keys ``default``, ``ready`` and ``audit_failure`` are those of this class; each
        ``[[rule]]`` has the keys of ``Rule``. ``default`` is required: a file that lost its
        contents must not allow everything.

        Args:
            path: an ordinary TOML file in UTF-8, of at most 1 MiB.

        Errors:
            INVALID_ARGUMENT (``PolicyError``): it does not parse, or is no policy; the error has
                file, line and reason.
            OSError: it cannot be read.
        """
        made = cls.__new__(cls)
        read_file(path, made._take_table)  # noqa: SLF001
        return made

    def _take_table(self, table: Mapping[str, object]) -> None:
        """Compile the contents of a file."""
        check_keys(table, TOP_KEYS)
        rules = [Rule(**each) for each in rules_in(table, KEYS)]
        ready = names_in(table.get("ready", []), "ready")
        self._take(
            rules, table.get("default", "allow"), list(ready), None, table.get("audit_failure")
        )
        if "default" not in table:
            raise FlawError("default is missing: 'allow' or 'deny'", "default")


def read_file(path: str | os.PathLike[str], take: Callable[[Mapping[str, object]], None]) -> None:
    """Have ``take`` compile the contents of a TOML file.

    Errors:
        INVALID_ARGUMENT (``PolicyError``): it does not parse, or ``take`` finds a flaw in it.
        OSError: it cannot be read.
    """
    try:
        file = str.__str__(os.fsdecode(path))
    except Exception as problem:
        raise PolicyError(f"{shown(path)} is no path") from problem
    data = contents_of(file)
    try:
        text, table = toml_lines.parse(data)
    except toml_lines.SyntaxProblem as problem:
        raise PolicyError(problem.reason, file, problem.line) from None
    try:
        take(table)
    except FlawError as flaw:
        line = toml_lines.line_of(text, flaw.path)
        raise PolicyError(flaw.reason, file, line) from None


def check_keys(table: Mapping[str, object], known: Sequence[str], *path: str | int) -> None:
    """Refuse a key of a table that is unknown."""
    for key in table:
        if key not in known:
            raise FlawError(f"unknown key {quoted(key)}{suggestion(key, known)}", *path, key)


def rules_in(table: Mapping[str, object], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The tables of the rules in a file, which have known keys."""
    listed = table.get("rule", [])
    if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
        raise FlawError("rule is no list of tables; write [[rule]]", "rule")
    for number, each in enumerate(listed):
        check_keys(each, keys, "rule", number)
    return listed


def contents_of(path: str) -> bytes:
    """The contents of a policy file."""
    # A pipe without a writer must neither block nor count as an empty file.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except ValueError as problem:
        raise PolicyError(f"no path: {problem}", path) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise PolicyError("no ordinary file", path)
        with open(fd, "rb", closefd=False) as file:
            data = file.read(LONGEST_FILE + 1)
    finally:
        os.close(fd)
    if len(data) > LONGEST_FILE:
        raise PolicyError(f"longer than {LONGEST_FILE} bytes", path)
    return data


def place_of(path: Sequence[str | int]) -> str:
    """The place of a mistake in a policy that is no file."""
    if len(path) > 1 and path[0] == "rule":
        return f"rule {int(path[1]) + 1}: "
    return ""

"""Policies: what a VMM asks before every call, in the security module's place.

A policy is a list of rules. The first rule that matches a call answers; where none does, a callable
of the user's is asked if there is one, and otherwise the default answers. Ready rules only deny,
and come before all others. What is denied is ``SecurityDisallow``, names the method and the rule,
and has changed nothing.

A policy inside a process guards against mistakes, and against components that use this package as
it is. Native code and ``ctypes`` in the same process go past it, and so does who replaces functions
of this package, or takes a buffer's descriptor out of ``/proc/self/fd``.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, fields
from difflib import get_close_matches
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

from vmm_linux import _toml_lines
from vmm_linux._core.endpoint import METHODS, Kind, Question, RuleTable, first_hidden
from vmm_linux._values import exact_text, is_a, kind_of, one_line, quoted, shown
from vmm_linux.errors import InvalidArgument
from vmm_linux.flags import Rights, Seal, VmmFlags

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from enum import IntFlag

    from vmm_linux._core.endpoint import MethodInfo as Method

__all__ = ["READY", "Policy", "PolicyError", "Question", "Rule"]

LONGEST_FILE: Final = 1 << 20
LONGEST_NAME: Final = 100
"""Of characters that may be meant for one of the names that there are."""
MOST: Final = 2**64 - 1
MOST_ID: Final = 2**32 - 2
ANSWERS: Final = ("allow", "deny")
FAILURES: Final = ("deny", "continue")
EVERY: Final = "*"
DECIDED: Final = {method.name: method for method in METHODS if method.name != "close"}
"""The methods that can be denied. Closing is none: it only gives back."""
ORDER: Final = {method.name: number for number, method in enumerate(METHODS)}
"""The methods' numbers, by name."""
BITS: Final = ("all", "any", "no")


class PolicyError(InvalidArgument):
    """A policy is none: ``INVALID_ARGUMENT``.

    Attributes:
        file: where it was read, or None.
        line: of the file, counted from 1, or None.
        reason: what is wrong, and what is expected.
    """

    def __init__(self, reason: str, file: str | None = None, line: int | None = None) -> None:
        name = "" if file is None else one_line(file)
        where = "" if file is None else f"{name}:{line}: " if line else f"{name}: "
        super().__init__("Policy", f"{where}{reason}")
        self.reason = reason
        self.file = file
        self.line = line

    def __reduce__(self) -> Any:  # noqa: ANN401  other arguments than those of the base class
        return type(self), (self.reason, self.file, self.line)


class FlawError(Exception):
    """What is wrong in a policy, and under which keys: of a table, or of a list by number."""

    def __init__(self, reason: str, *path: str | int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.path = path


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What to answer to which calls. All conditions that are given have to hold.

    Attributes:
        allow, deny: one of the two: names of methods, or ``"*"`` for all that have what the
            conditions are about.
        name: what a denial calls it.
        all_flags, any_flags, no_flags: ``VmmFlags`` by name, of which the call's argument has
            every one, one at least, none.
        min_size, max_size: bytes that the call is about, bounds included. Of ranges their sum; of
            what is received ``max_size``, and without one more than any bound.
        all_rights, any_rights, no_rights: ``Rights`` that a copy, a receiver or a descriptor gets.
        all_seals, any_seals, no_seals: ``Seal``: of a buffer that leaves (``send_handle``,
            ``handle_fileno``) those that it has, of others those that are put on or demanded.
        peer_uid, peer_gid: users and groups, one of which made the other end of the socket.
        other_user: True: that was another user than this process's.

    Where the kernel does not tell who made the other end, a condition about that holds in a rule
    that denies, and does not in one that allows. Nor does it tell of users and groups that this
    process's user namespace does not map: all have one number, ``kernel.overflowuid`` (65534),
    which in such a namespace is nobody's for sure.
    """

    allow: str | Sequence[str] | None = None
    deny: str | Sequence[str] | None = None
    name: str | None = None
    all_flags: Sequence[str] = ()
    any_flags: Sequence[str] = ()
    no_flags: Sequence[str] = ()
    min_size: int | None = None
    max_size: int | None = None
    all_rights: Sequence[str] = ()
    any_rights: Sequence[str] = ()
    no_rights: Sequence[str] = ()
    all_seals: Sequence[str] = ()
    any_seals: Sequence[str] = ()
    no_seals: Sequence[str] = ()
    peer_uid: int | Sequence[int] | None = None
    peer_gid: int | Sequence[int] | None = None
    other_user: bool | None = None


KEYS: Final = tuple(each.name for each in fields(Rule))
ABOUT: Final = {
    **{f"{which}_{what}": what for which in BITS for what in ("flags", "rights", "seals")},
    "min_size": "size",
    "max_size": "size",
    "peer_uid": "peer",
    "peer_gid": "peer",
    "other_user": "peer",
}
"""What a condition is about, by its key."""
TOP_KEYS: Final = ("default", "ready", "audit_failure", "rule")

READY: Final[Mapping[str, tuple[Rule, ...]]] = MappingProxyType(
    {
        "W^X": (
            Rule(
                name="W^X",
                deny=(
                    "allocate",
                    "protect",
                    "mdl_create",
                    "mdl_create_from_vm",
                    "mdl_create_from_buf",
                    "mdl_map",
                ),
                all_flags=(
                    "WRITE",
                    "EXECUTE",
                ),
            ),
        ),
        "no executable MDL": (
            Rule(
                name="no executable MDL",
                deny=(
                    "mdl_create",
                    "mdl_create_from_vm",
                    "mdl_create_from_buf",
                    "mdl_map",
                ),
                any_flags=("EXECUTE",),
            ),
        ),
        "no transfer to other users": (
            Rule(name="no transfer to other users", deny=("send_handle",), other_user=True),
            # Nobody can tell where a descriptor goes.
            Rule(name="no transfer to other users", deny=("handle_fileno",)),
        ),
        "only frozen or published buffers leave": (
            Rule(
                name="only frozen or published buffers leave",
                deny=(
                    "send_handle",
                    "handle_fileno",
                ),
                no_seals=(
                    "PUBLISH",
                    "FREEZE",
                ),
            ),
        ),
    }
)
"""The ready rules, by name."""


class Mask(NamedTuple):
    """Bits that a value has to have: all of these, one of those, none of the others."""

    all: int = 0
    any: int = 0
    no: int = 0


@dataclass(frozen=True)
class Condition:
    """When a rule matches, in numbers."""

    flags: Mask
    rights: Mask
    seals: Mask
    sizes: tuple[int, int]
    uids: frozenset[int]
    gids: frozenset[int]
    other_user: bool


@dataclass(frozen=True)
class Compiled:
    """A rule in numbers."""

    number: int
    name: str
    allows: bool
    methods: tuple[str, ...]
    condition: Condition

    def as_numbers(self) -> tuple[Any, ...]:
        """As ``RuleTable`` takes it."""
        condition = self.condition
        return (
            [ORDER[name] for name in self.methods],
            self.allows,
            self.number,
            condition.flags,
            condition.rights,
            condition.seals,
            condition.sizes,
            (sorted(condition.uids), sorted(condition.gids), condition.other_user),
        )


class Policy(RuleTable):
    """What a VMM asks before every call: ``VMM(policy=Policy(...))``. It never changes.

    Args:
        rules: gone through in order; the first that matches answers.
        default: ``"allow"`` or ``"deny"``: the answer where no rule matches.
        ready: names of ready rules (``READY``), which deny before ``rules`` are looked at.
        ask: a callable, asked with a ``Question`` where no rule matches, in place of the default.
            Only ``True`` allows; a text says why not; whatever else, and an exception, denies. It
            may ask for ``question.usage``; calls of the VMM's methods from inside it are denied.
        audit_failure: what becomes of a call that cannot be written down: ``"deny"``,
            ``"continue"``, or None for what the ``Audit`` says.

    Errors:
        INVALID_ARGUMENT (``PolicyError``): unknown names, bounds that nothing is between, a rule
            that can never match, as an earlier one always answers.
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
        """Compile it."""
        one_of(default, ANSWERS, "default")
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
        """A policy that asks a callable about every call. See ``ask``."""
        return cls(ask=ask, default="deny")

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy from a file.

        The keys ``default``, ``ready`` and ``audit_failure`` are those of this class; each
        ``[[rule]]`` has the keys of ``Rule``. ``default`` has to be there: a file that lost its
        contents is not to allow everything.

        Args:
            path: of an ordinary file in TOML, in UTF-8, of at most 1 MiB.

        Errors:
            INVALID_ARGUMENT (``PolicyError``): it does not parse, or is no policy; file, line and
                reason are said.
            OSError: it cannot be read.
        """
        try:
            file = str.__str__(os.fsdecode(path))
        except Exception as problem:
            raise PolicyError(f"{shown(path)} is no path") from problem
        data = contents_of(file)
        try:
            text, table = _toml_lines.parse(data)
        except _toml_lines.SyntaxProblem as problem:
            raise PolicyError(problem.reason, file, problem.line) from None
        made = cls.__new__(cls)
        try:
            made._take_table(table)  # noqa: SLF001  its own
        except FlawError as flaw:
            line = _toml_lines.line_of(text, flaw.path)
            raise PolicyError(flaw.reason, file, line) from None
        return made

    def _take_table(self, table: Mapping[str, object]) -> None:
        """Compile what a file says."""
        for key in table:
            if key not in TOP_KEYS:
                raise FlawError(f"unknown key {quoted(key)}{suggestion(key, TOP_KEYS)}", key)
        listed = table.get("rule", [])
        if not isinstance(listed, list) or not all(isinstance(each, dict) for each in listed):
            raise FlawError("rule is no list of tables; write [[rule]]", "rule")
        rules = []
        for number, each in enumerate(listed):
            for key in each:
                if key not in KEYS:
                    raise FlawError(
                        f"unknown key {quoted(key)}{suggestion(key, KEYS)}", "rule", number, key
                    )
            rules.append(Rule(**each))
        ready = names_in(table.get("ready", []), "ready")
        self._take(
            rules,
            table.get("default", "allow"),
            list(ready),
            None,
            table.get("audit_failure"),
        )
        if "default" not in table:
            raise FlawError("default is missing: 'allow' or 'deny'", "default")


# ---- checks -------------------------------------------------------------------------------------


def contents_of(path: str) -> bytes:
    """What is in a file, if it is one for policies."""
    # A pipe that nobody writes is not to be waited for, nor taken for an empty file.
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


def compiled_ready(ready: tuple[str, ...]) -> list[Compiled]:
    """The ready rules with these names."""
    compiled: list[Compiled] = []
    for name in ready:
        if name not in READY:
            close = suggestion(name, READY)
            raise FlawError(f"unknown ready rule {quoted(name)}{close}", "ready")
        if ready.count(name) > 1:
            raise FlawError(f"{quoted(name)} is named twice", "ready")
        for rule in READY[name]:
            number = len(compiled)
            compiled.append(Compiled(number, name, *parts_of(rule, "ready")))
    return compiled


def compile_rule(rule: object, number: int, before: int) -> Compiled:
    """A rule of the user's, the first of which is number 0, in numbers."""
    if not is_a(rule, Rule):
        raise FlawError(f"{shown(rule)} is no Rule", "rule", number)
    rule = plain_rule(rule, "rule", number)
    name = rule.name
    if name is None:
        name = f"rule {number + 1}"
    elif not is_text(name):
        raise FlawError("name is no printable text", "rule", number, "name")
    return Compiled(before + number, name, *parts_of(rule, "rule", number))


def plain_rule(rule: Rule, *path: str | int) -> Rule:
    """The same with Python's own strings, ints and tuples, which answer the same each time."""
    values = {}
    for key in KEYS:
        try:
            values[key] = plain(getattr(rule, key))
        except Exception as problem:
            raise FlawError(f"{key} cannot be had: {kind_of(problem)}", *path, key) from problem
    return Rule(**values)


def plain(value: object) -> Any:  # noqa: ANN401  whatever it is
    """A string, an int or a list of them without what a subclass adds; others as they are."""
    if is_a(value, list):
        return tuple(map(plain_one, list.__iter__(value)))
    if is_a(value, tuple):
        return tuple(map(plain_one, tuple.__iter__(value)))
    return plain_one(value)


def plain_one(value: object) -> object:
    """A string or an int without what a subclass adds; anything else as it is."""
    if is_a(value, str):
        return exact_text(value)
    if is_a(value, int) and not is_a(value, bool):
        return int.__index__(value)
    return value


def members(name: str, values: object) -> list[object]:
    """What is in an argument that can be gone through."""
    try:
        return list(values)  # type: ignore[call-overload,no-any-return]
    except Exception as problem:
        raise FlawError(f"{name} is {shown(values)}, which nothing is in", name) from problem


def parts_of(rule: Rule, *path: str | int) -> tuple[bool, tuple[str, ...], Condition]:
    """Whether a rule allows, which methods, and when."""
    answers = [answer for answer in ANSWERS if getattr(rule, answer) is not None]
    if len(answers) != 1:
        raise FlawError("a rule has one of allow and deny, with the methods that it is for", *path)
    answer = answers[0]
    condition = Condition(
        mask_of(rule, "flags", VmmFlags, *path),
        mask_of(rule, "rights", Rights, *path),
        mask_of(rule, "seals", Seal, *path),
        sizes_of(rule, *path),
        ids_of(rule.peer_uid, *path, "peer_uid"),
        ids_of(rule.peer_gid, *path, "peer_gid"),
        truth_of(rule.other_user, *path, "other_user"),
    )
    return answer == "allow", methods_of(rule, answer, condition, *path), condition


def methods_of(rule: Rule, answer: str, condition: Condition, *path: str | int) -> tuple[str, ...]:
    """The methods that a rule is for: each has what the rule's conditions are about."""
    named = getattr(rule, answer)
    if type(named) is str and named == EVERY:
        methods = tuple(name for name in DECIDED if lack_of(rule, condition, DECIDED[name]) is None)
        if not methods:
            raise FlawError("no method has all that this rule asks about", *path)
        return methods
    names = names_in(named, *path, answer)
    if not names:
        raise FlawError(f"{answer} names no method; '*' means all", *path, answer)
    for name in names:
        if name == "close":
            raise FlawError("close cannot be decided about: it only gives back", *path, answer)
        if name not in DECIDED:
            close = suggestion(name, DECIDED)
            raise FlawError(f"unknown method {quoted(name)}{close}", *path, answer)
        lack = lack_of(rule, condition, DECIDED[name])
        if lack is not None:
            raise FlawError(f"the rule can never match: {name} {lack[0]}", *path, lack[1])
    return names


def lack_of(rule: Rule, condition: Condition, method: Method) -> tuple[str, str] | None:
    """What a rule asks about that a method does not have, and under which key; None if nothing."""
    kinds = {kind for _, kind in method.arguments}
    leaves = method.name in {"send_handle", "handle_fileno"}
    has = {
        "flags": Kind.FLAGS in kinds,
        "size": bool(kinds & {Kind.SIZE, Kind.MAX_SIZE, Kind.DATA, Kind.RANGES}),
        "rights": Kind.RIGHTS in kinds,
        "seals": leaves or Kind.SEALS in kinds,
        "peer": Kind.SOCKET in kinds,
    }
    for key, about in ABOUT.items():
        value = getattr(rule, key)
        if not has[about] and value is not None and not (type(value) is tuple and not value):
            return (f"has no {about}", key)
    unknown = (condition.flags.all or condition.flags.any) and not (
        condition.flags.all & ~method.flags == 0
        and (not condition.flags.any or condition.flags.any & method.flags)
    )
    if unknown:
        key = "all_flags" if condition.flags.all & ~method.flags else "any_flags"
        return ("does not take these flags", key)
    return None


def mask_of(rule: Rule, what: str, kind: type[IntFlag], *path: str | int) -> Mask:
    """The bits that a rule names."""
    values = {}
    for which in BITS:
        key = f"{which}_{what}"
        value = 0
        for name in names_in(getattr(rule, key), *path, key):
            if name not in kind.__members__:
                close = suggestion(name, kind.__members__)
                raise FlawError(f"unknown {what} {quoted(name)}{close}", *path, key)
            value |= kind[name]
        values[which] = int(value)
    mask = Mask(**values)
    if mask.all & mask.no:
        named = kind(mask.all & mask.no).name
        raise FlawError(
            f"the rule can never match: {named} in all_{what} and in no_{what}", *path, f"no_{what}"
        )
    if mask.any and mask.any & ~mask.no == 0:
        raise FlawError(
            f"the rule can never match: no_{what} has all of any_{what}", *path, f"any_{what}"
        )
    return mask


def sizes_of(rule: Rule, *path: str | int) -> tuple[int, int]:
    """The bounds of a rule, in bytes."""
    bounds = []
    for key, otherwise in (("min_size", 0), ("max_size", MOST)):
        value = getattr(rule, key)
        if value is None:
            value = otherwise
        elif type(value) is not int or not 0 <= value <= MOST:
            raise FlawError(f"{key} is {shown(value)}, not 0 to 2**64 - 1 bytes", *path, key)
        bounds.append(value)
    if bounds[0] > bounds[1]:
        raise FlawError(
            f"the rule can never match: min_size {bounds[0]} is above max_size {bounds[1]}",
            *path,
            "min_size",
        )
    return bounds[0], bounds[1]


def ids_of(value: object, *path: str | int) -> frozenset[int]:
    """Numbers of users or groups."""
    if value is None:
        return frozenset()
    ids = set()
    for each in value if type(value) is tuple else (value,):
        if type(each) is not int or not 0 <= each <= MOST_ID:
            raise FlawError(f"{shown(each)} is no number of a user or group", *path)
        ids.add(each)
    if not ids:
        raise FlawError("an empty list matches nobody", *path)
    return frozenset(ids)


def is_text(value: object) -> bool:
    """Whether a value is text for a message."""
    text = exact_text(value)
    return text is not None and text != "" and text.isprintable()


def truth_of(value: object, *path: str | int) -> bool:
    """True, or not given."""
    if value is not None and value is not True:
        raise FlawError("true, or leave it out", *path)
    return value is True


def names_in(value: object, *path: str | int) -> tuple[str, ...]:
    """A list of names."""
    names = plain(value)
    if type(names) is not tuple or not all(type(each) is str for each in names):
        raise FlawError(f"{path[-1]} is {shown(value)}, not a list of names", *path)
    return names


def one_of(value: object, known: Sequence[str], key: str) -> None:
    """Whether a value is one of a few words."""
    word = exact_text(value)
    if word not in known:
        words = " or ".join(map(repr, known))
        close = "" if word is None else suggestion(word, known)
        raise FlawError(f"{key} is {shown(value)}, not {words}{close}", key)


def check_reachable(
    compiled: Sequence[Compiled], numbers: Sequence[tuple[Any, ...]], readied: int
) -> None:
    """Whether every rule of the user's can be the first to match a call of one method at least."""
    hidden = first_hidden(numbers, readied)
    if hidden is None:
        return
    rule, first = (compiled[place] for place in hidden)
    same = first.condition == rule.condition and first.allows != rule.allows
    why = "says the opposite of the same calls" if same else "always answers first"
    raise FlawError(
        f"the rule can never match: {quoted(first.name)} {why}", "rule", rule.number - readied
    )


def suggestion(name: str, known: Iterable[str]) -> str:
    """The nearest known name, if one is near."""
    if len(name) > LONGEST_NAME:
        return ""
    names = list(known)
    folded = {each.casefold(): each for each in names}
    close = get_close_matches(name.casefold(), folded, 1)
    return f"; did you mean {folded[close[0]]!r}?" if close else ""


def place_of(path: Sequence[str | int]) -> str:
    """Where in a policy that is no file."""
    if len(path) > 1 and path[0] == "rule":
        return f"rule {int(path[1]) + 1}: "
    return ""

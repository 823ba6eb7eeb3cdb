"""The policy of a broker: which user may do what with which names, and how much there may be.

The rules are those of ``vmm_linux.policy``, about the broker's operations in place of methods, and
with one more key: ``names``. The same file has the limits.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final, Self

from vmm_linux._core.endpoint import Kind, MethodInfo, RuleTable
from vmm_linux._core.values import shown
from vmm_linux.broker.table import FIGURES, Bounds
from vmm_linux.policy import DEFAULTS, check_keys, read_file, rules_in
from vmm_linux.policy.compile import Compiled, check_reachable, compile_rule, names_in, one_of
from vmm_linux.policy.rule import FlawError, Rule

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

PEER: Final = ("peer", Kind.SOCKET)
SIZE: Final = ("size", Kind.SIZE)
RIGHTS: Final = ("rights", Kind.RIGHTS)
OPERATIONS: Final = {
    info.name: info
    for info in (
        MethodInfo("create", (PEER, SIZE, RIGHTS)),
        MethodInfo("open", (PEER, SIZE, RIGHTS)),
        MethodInfo("publish", (PEER, SIZE, RIGHTS)),
        MethodInfo("clone", (PEER, SIZE, RIGHTS)),
        MethodInfo("seal", (PEER, ("seals", Kind.SEALS))),
        MethodInfo("unlink", (PEER,)),
        MethodInfo("list", (PEER,)),
        MethodInfo("stat", (PEER,)),
        MethodInfo("keep", (PEER,)),
        MethodInfo("revoke", (PEER,)),
        MethodInfo("ticket", (PEER, SIZE, RIGHTS)),
        MethodInfo("redeem", (PEER, SIZE, RIGHTS)),
        MethodInfo("keep_ticket", (PEER,)),
        MethodInfo("release_ticket", (PEER,)),
    )
}
"""What a broker decides about, and what rules can ask of it."""
ORDER: Final = {name: number for number, name in enumerate(OPERATIONS)}
TOP_KEYS: Final = ("default", "rule", "limits")
LIMITS: Final = ("idle", *FIGURES, "user")
MOST_RULES: Final = 1000
MOST: Final = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class NameRule(Rule):
    """Allows or denies operations of a broker.

    Attributes:
        names: patterns, one of which the name matches, as of file names: ``camera.*``. Of the two
            names of ``clone``, both must in a rule that allows, one in a rule that denies.
            ``list`` and tickets have no name, and are matched by no rule with patterns.
    """

    names: Sequence[str] = ()


NAME_KEYS: Final = tuple(each.name for each in fields(NameRule))


class BrokerPolicy(RuleTable):
    """Decides about every operation of a broker. Immutable.

    Args:
        rules: checked in order; the first that matches decides.
        default: ``"allow"`` or ``"deny"``: the answer where no rule matches.
        limits: as in a file.

    Errors:
        INVALID_ARGUMENT (``PolicyError``): unknown names, a rule that can never match.
    """

    bounds: Bounds
    """In all."""
    each: Bounds
    """Of each user."""
    idle: int | None
    """Seconds after which a connection ends that holds nothing and asks nothing, or None."""

    def __init__(
        self,
        rules: Sequence[NameRule] = (),
        *,
        default: str = "allow",
        limits: Mapping[str, object] | None = None,
    ) -> None:
        self._take(rules, default, limits or {})

    @classmethod
    def own_user_only(cls) -> Self:
        """The policy without a file: the broker's own user may do anything, others nothing."""
        return cls([NameRule(name="own user only", deny="*", other_user=True)])

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy from a file; ``default`` is required.

        Errors:
            INVALID_ARGUMENT (``PolicyError``): it does not parse, or is no policy.
            OSError: it cannot be read.
        """
        made = cls.__new__(cls)
        read_file(path, made._take_table)  # noqa: SLF001
        return made

    def _take_table(self, table: Mapping[str, object]) -> None:
        """Compile the contents of a file."""
        check_keys(table, TOP_KEYS)
        limits = table.get("limits", {})
        if not isinstance(limits, dict):
            raise FlawError("limits is no table; write [limits]", "limits")
        rules = [NameRule(**each) for each in rules_in(table, NAME_KEYS)]
        self._take(rules, table.get("default", "deny"), limits)
        if "default" not in table:
            raise FlawError("default is missing: 'allow' or 'deny'", "default")

    def _take(
        self, rules: Sequence[NameRule], default: object, limits: Mapping[str, object]
    ) -> None:
        """Compile the rules, and take the limits."""
        one_of(default, DEFAULTS, "default")
        if len(rules) > MOST_RULES:
            raise FlawError(f"{len(rules)} rules; {MOST_RULES} are the most", "rule")
        compiled = [compile_rule(each, number, 0, OPERATIONS) for number, each in enumerate(rules)]
        patterns = [
            names_in(rule.names, "rule", number, "names") for number, rule in enumerate(rules)
        ]
        check_order(compiled, patterns)
        self.patterns = {
            number: (
                re.compile("|".join(map(fnmatch.translate, some))),
                all if compiled[number].allows else any,
            )
            for number, some in enumerate(patterns)
            if some
        }
        check_keys(limits, LIMITS, "limits")
        user = limits.get("user", {})
        if not isinstance(user, dict):
            raise FlawError("user is no table; write [limits.user]", "limits", "user")
        check_keys(user, FIGURES, "limits", "user")
        self.bounds = bounds_of(limits, "limits")
        self.each = bounds_of(user, "limits", "user")
        self.idle = number_of(limits, "limits", "idle")
        numbers = [rule.as_numbers(ORDER) for rule in compiled]
        self._compile(
            numbers, tuple(rule.name for rule in compiled), default == "allow", None, 0, None
        )

    def decide(
        self,
        operation: str,
        peer: tuple[int | None, int | None],
        names: Sequence[str],
        *,
        size: int = 0,
        rights: int = 0,
        seals: int = 0,
    ) -> tuple[bool, str]:
        """Whether a user may carry out an operation, and the name of the rule that says so.

        Args:
            operation: by its name.
            peer: the user and the group, each None where it is unknown.
            names: that the operation is about.
            size: bytes of the buffer.
            rights: that the client gets.
            seals: to put on.
        """
        passed = self.patterns and {
            number
            for number, (pattern, enough) in self.patterns.items()
            if not names or not enough(map(pattern.match, names))
        }
        return self._decide(ORDER[operation], size, rights, seals, peer, passed)


def check_order(compiled: Sequence[Compiled], patterns: Sequence[tuple[str, ...]]) -> None:
    """Refuse a rule that is never the first to match, as far as its patterns are written alike."""
    numbers = [rule.as_numbers(ORDER) for rule in compiled]
    for number, mine in enumerate(patterns):
        wider = [
            place
            for place in range(number)
            if not patterns[place] or (mine and set(mine) <= set(patterns[place]))
        ]
        some = [*wider, number]
        check_reachable([compiled[place] for place in some], [numbers[place] for place in some], 0)


def bounds_of(table: Mapping[str, object], *path: str) -> Bounds:
    """The bounds in a table."""
    found: dict[str, Any] = {figure: number_of(table, *path, figure) for figure in FIGURES}
    return Bounds(**found)


def number_of(table: Mapping[str, object], *path: str) -> int | None:
    """A count, or None where there is none."""
    value = table.get(path[-1])
    if value is not None and (type(value) is not int or not 0 <= value <= MOST):
        raise FlawError(f"{path[-1]} is {shown(value)}, not a number from 0", *path)
    return value

"""Compiles rules into numbers for the core, and checks them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import IntFlag
from typing import Any, Final, NamedTuple

from vmm_linux._core.endpoint import METHODS, Kind, first_hidden
from vmm_linux._core.endpoint import MethodInfo as Method
from vmm_linux._core.values import exact_text, is_a, kind_of, quoted, shown
from vmm_linux.flags import Rights, Seal, VmmFlags
from vmm_linux.policy.rule import BITS, KEYS, READY, FlawError, Rule

LONGEST_NAME: Final = 100
"""The most characters of a name for which a suggestion is searched."""
MOST: Final = 2**64 - 1
MOST_ID: Final = 2**32 - 2
ANSWERS: Final = ("allow", "deny")
EVERY: Final = "*"
DECIDED: Final = {method.name: method for method in METHODS if method.name != "close"}
"""The methods that can be denied: all but ``close``, which only gives back."""
ORDER: Final = {method.name: number for number, method in enumerate(METHODS)}
"""The methods' numbers, by name."""
ABOUT: Final = {
    **{f"{which}_{what}": what for which in BITS for what in ("flags", "rights", "seals")},
    "min_size": "size",
    "max_size": "size",
    "peer_uid": "peer",
    "peer_gid": "peer",
    "other_user": "peer",
}
"""The property in a condition, by its key."""


class Mask(NamedTuple):
    """Required bits of a value: all of these, one of those, none of the others."""

    all: int = 0
    any: int = 0
    no: int = 0


class Condition(NamedTuple):
    """The conditions of a rule, in the form that ``RuleTable`` takes."""

    flags: Mask
    rights: Mask
    seals: Mask
    sizes: tuple[int, int]
    peer: tuple[list[int], list[int], bool]
    """Its users and groups, and whether it must be another user."""


@dataclass(frozen=True)
class Compiled:
    """A rule in numbers."""

    number: int
    name: str
    allows: bool
    methods: tuple[str, ...]
    condition: Condition

    def as_numbers(self, order: Mapping[str, int] = ORDER) -> tuple[Any, ...]:
        """The form that ``RuleTable`` takes; ``order`` has the methods' numbers."""
        return [order[name] for name in self.methods], self.allows, self.number, *self.condition


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


def compile_rule(
    rule: object, number: int, before: int, decided: Mapping[str, Method] = DECIDED
) -> Compiled:
    """A rule of the user, counted from 0, in numbers; ``decided`` are the methods there are."""
    if not is_a(rule, Rule):
        raise FlawError(f"{shown(rule)} is no Rule", "rule", number)
    rule = plain_rule(rule, "rule", number)
    name = rule.name
    if name is None:
        name = f"rule {number + 1}"
    elif not is_text(name):
        raise FlawError("name is no printable text", "rule", number, "name")
    return Compiled(before + number, name, *parts_of(rule, "rule", number, decided=decided))


def plain_rule(rule: Rule, *path: str | int) -> Rule:
    """The rule with plain strings, ints and tuples, which never change their answers."""
    values = {}
    for key in KEYS:
        try:
            values[key] = plain(getattr(rule, key))
        except Exception as problem:
            raise FlawError(f"{key} cannot be had: {kind_of(problem)}", *path, key) from problem
    return Rule(**values)


def plain(value: object) -> Any:  # noqa: ANN401  any type
    """A string, an int or a list of them as plain objects; others unchanged."""
    if is_a(value, list):
        return tuple(map(plain_one, list.__iter__(value)))
    if is_a(value, tuple):
        return tuple(map(plain_one, tuple.__iter__(value)))
    return plain_one(value)


def plain_one(value: object) -> object:
    """A string or an int as a plain object; others unchanged."""
    if is_a(value, str):
        return exact_text(value)
    if is_a(value, int) and not is_a(value, bool):
        return int.__index__(value)
    return value


def members(name: str, values: object) -> list[object]:
    """The members of an iterable argument."""
    try:
        return list(values)  # type: ignore[call-overload,no-any-return]
    except Exception as problem:
        raise FlawError(f"{name} is {shown(values)}, which nothing is in", name) from problem


def parts_of(
    rule: Rule, *path: str | int, decided: Mapping[str, Method] = DECIDED
) -> tuple[bool, tuple[str, ...], Condition]:
    """Whether a rule allows, its methods, and its conditions."""
    answers = [answer for answer in ANSWERS if getattr(rule, answer) is not None]
    if len(answers) != 1:
        raise FlawError("a rule has one of allow and deny, with the methods that it is for", *path)
    answer = answers[0]
    condition = Condition(
        mask_of(rule, "flags", VmmFlags, *path),
        mask_of(rule, "rights", Rights, *path),
        mask_of(rule, "seals", Seal, *path),
        sizes_of(rule, *path),
        peer_of(rule, *path),
    )
    return answer == "allow", methods_of(rule, answer, condition, decided, *path), condition


def methods_of(
    rule: Rule, answer: str, condition: Condition, decided: Mapping[str, Method], *path: str | int
) -> tuple[str, ...]:
    """The methods of a rule, which all have the properties in its conditions."""
    named = getattr(rule, answer)
    if type(named) is str and named == EVERY:
        methods = tuple(name for name in decided if lack_of(rule, condition, decided[name]) is None)
        if not methods:
            raise FlawError("no method has all that this rule asks about", *path)
        return methods
    names = names_in(named, *path, answer)
    if not names:
        raise FlawError(f"{answer} names no method; '*' means all", *path, answer)
    for name in names:
        if name == "close":
            raise FlawError("close cannot be decided about: it only gives back", *path, answer)
        if name not in decided:
            close = suggestion(name, decided)
            raise FlawError(f"unknown method {quoted(name)}{close}", *path, answer)
        lack = lack_of(rule, condition, decided[name])
        if lack is not None:
            raise FlawError(f"the rule can never match: {name} {lack[0]}", *path, lack[1])
    return names


def lack_of(rule: Rule, condition: Condition, method: Method) -> tuple[str, str] | None:
    """The property that a rule needs and a method lacks, and its key; None if there is none."""
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
    if condition.flags.all & ~method.flags:
        return ("does not take these flags", "all_flags")
    if condition.flags.any and not condition.flags.any & method.flags:
        return ("does not take these flags", "any_flags")
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
        why = f"{kind(mask.all & mask.no).name} in all_{what} and in no_{what}"
        raise FlawError(f"the rule can never match: {why}", *path, f"no_{what}")
    if mask.any and mask.any & ~mask.no == 0:
        why = f"no_{what} has all of any_{what}"
        raise FlawError(f"the rule can never match: {why}", *path, f"any_{what}")
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
        why = f"min_size {bounds[0]} is above max_size {bounds[1]}"
        raise FlawError(f"the rule can never match: {why}", *path, "min_size")
    return bounds[0], bounds[1]


def peer_of(rule: Rule, *path: str | int) -> tuple[list[int], list[int], bool]:
    """The conditions about the maker of the socket's other end."""
    uids, gids = (ids_of(getattr(rule, key), *path, key) for key in ("peer_uid", "peer_gid"))
    if rule.other_user is not None and rule.other_user is not True:
        raise FlawError("true, or leave it out", *path, "other_user")
    return uids, gids, rule.other_user is True


def ids_of(value: object, *path: str | int) -> list[int]:
    """Numbers of users or groups, in order."""
    if value is None:
        return []
    ids = set()
    for each in value if type(value) is tuple else (value,):
        if type(each) is not int or not 0 <= each <= MOST_ID:
            raise FlawError(f"{shown(each)} is no number of a user or group", *path)
        ids.add(each)
    if not ids:
        raise FlawError("an empty list matches nobody", *path)
    return sorted(ids)


def is_text(value: object) -> bool:
    """Whether a value is text for a message."""
    text = exact_text(value)
    return text is not None and text != "" and text.isprintable()


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
    """Refuse a rule of the user that is never the first to match a call."""
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

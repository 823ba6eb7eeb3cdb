"""Values that a caller passed: recognised and described, of any class.

A wrong value may be hostile or broken: ``repr``, ``format``, ``__class__``, ``__eq__`` and the
attributes of its metaclass can raise, lie, or take for ever. None of them runs here. Only
``__index__`` runs, which makes a number of the value and may raise any ``Exception``. Words for a
message are short, on one line.
"""

from __future__ import annotations

import operator

from vmm_linux.errors import InvalidArgument

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypeGuard, TypeVar

    Kind = TypeVar("Kind")

LONGEST_TEXT = 40
"""Characters of a value that are shown."""
LONGEST_LINE = 400
"""Characters that are shown of a text."""
MOST_BITS = 64


# The getter of ``type`` itself, which no metaclass overrides.
_name_of = type.__dict__["__name__"].__get__


def is_a(value: object, kind: type[Kind]) -> TypeGuard[Kind]:
    """Whether a value is of a class, by its type alone: ``__class__`` may be anything.

    The class has no metaclass of its own.
    """
    return issubclass(type(value), kind)


def kind_of(value: object) -> str:
    """The name of a value's class, without its metaclass."""
    return one_line(_name_of(type(value)))


def describe(value: object) -> str:
    """A value of a wrong type for a message: its class, and its text if that is short and safe."""
    text, kind = _text_of(value), kind_of(value)
    return f"{text} of type {kind}" if text else f"a {kind}"


def shown(value: object) -> str:
    """A value for a message that states what was expected: its text, or else its class."""
    return _text_of(value) or f"a {kind_of(value)}"


def _text_of(value: object) -> str:
    """The text of a number, a string or None; empty for a long one, and for other values."""
    if value is None or value is True or value is False:
        return str(value)
    if is_a(value, int):
        return written(value)
    text = ""
    if is_a(value, str):
        text = str.__repr__(value) if str.__len__(value) <= LONGEST_TEXT else ""
    elif is_a(value, bytes):
        text = bytes.__repr__(value) if bytes.__len__(value) <= LONGEST_TEXT else ""
    elif is_a(value, float):
        text = float.__repr__(value)
    elif is_a(value, complex):
        text = complex.__repr__(value)
    return text if len(text) <= LONGEST_TEXT else ""


def written(number: int, form: str = "d") -> str:
    """A number for a message: its digits, as in "#x", or its size where it is beyond 64 bits."""
    exact = int.__index__(number)
    bits = exact.bit_length()
    if bits > MOST_BITS:
        return f"a {'negative ' if exact < 0 else ''}number of {bits} bits"
    return format(exact, form)


def index(method: str, name: str, value: object, wanted: str = "an integer") -> int:
    """The plain int that an argument with ``__index__`` stands for, of at most 64 bits and a sign.

    Errors:
        INVALID_ARGUMENT: a bool, no integer, or one beyond 64 bits.
    """
    number = value if type(value) is int else _plain(method, name, value, wanted)
    if number.bit_length() > MOST_BITS:
        raise InvalidArgument(
            method, f"{name} is {written(number)}; at most {MOST_BITS} are expected"
        )
    return number


def _plain(method: str, name: str, value: object, wanted: str) -> int:
    """The plain int that a value of another class stands for."""
    if is_a(value, bool):
        raise InvalidArgument(method, f"{name} is {shown(value)}, not {wanted}")
    try:
        return int.__index__(operator.index(value))  # type: ignore[arg-type]
    except Exception as problem:
        if isinstance(problem, MemoryError) and is_a(value, int):
            raise  # it is an int, and there is no memory for a plain one
        raise InvalidArgument(method, f"{name} is {describe(value)}, not {wanted}") from problem


def exact_text(value: object) -> str | None:
    """The plain string of a string; None for other values."""
    return str.__str__(value) if is_a(value, str) else None


def one_line(text: str) -> str:
    """Foreign text for a message: short, and without line ends and other controls."""
    text = str.__str__(text)
    if len(text) > LONGEST_LINE:
        text = text[:LONGEST_LINE] + "..."
    return text if text.isprintable() else quoted(text)[1:-1]


def quoted(text: str) -> str:
    """Foreign text in quotes, for a message; a long one is cut."""
    text = str.__str__(text)
    return repr(text if len(text) <= LONGEST_LINE else text[:LONGEST_LINE] + "...")


def counted(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun in a message: ``1 byte``, ``2 bytes``."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"

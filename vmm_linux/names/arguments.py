"""Arguments of a client's methods."""

from __future__ import annotations

import os

from vmm_linux._core.values import describe, index, is_a, quoted
from vmm_linux.errors import InvalidArgument
from vmm_linux.mdl import Mdl
from vmm_linux.names.protocol import Lifetime


def number_in(method: str, name: str, value: object, most: int = 2**64 - 1) -> int:
    """An argument that is a number, no larger than its field in a request."""
    number = index(method, name, value)
    if not 0 <= number <= most:
        raise InvalidArgument(method, f"{name} is {number}, not 0 to {most}")
    return number


def lifetime_of(method: str, name: object) -> Lifetime:
    """A lifetime by its name."""
    for each in Lifetime:
        if is_a(name, str) and str.__eq__(name, each.name.lower()):
            return each
    names = ", ".join(repr(each.name.lower()) for each in Lifetime)
    raise InvalidArgument(method, f"lifetime is {describe(name)}; there are {names}")


def path_of(broker: object) -> str:
    """A path as text."""
    try:
        path = str.__str__(os.fsdecode(broker))  # type: ignore[arg-type]
    except Exception as problem:
        raise InvalidArgument("Client", f"broker is {describe(broker)}, not a path") from problem
    if not path or "\0" in path:
        raise InvalidArgument("Client", f"broker is {quoted(path)}, which no file is called")
    return path


def buffer_of(method: str, mdl: object) -> Mdl:
    """An argument that is a buffer."""
    if not is_a(mdl, Mdl):
        raise InvalidArgument(method, f"mdl is {describe(mdl)}, not an Mdl")
    return mdl

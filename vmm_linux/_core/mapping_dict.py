"""Checks of a dict of ``Mapping.as_dict``, before it becomes a mapping again.

Every value has exactly a type that JSON has: a subclass could answer anything.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from vmm_linux._core.values import describe
from vmm_linux.errors import InvalidArgument
from vmm_linux.flags import VmmFlags
from vmm_linux.states import PageKind, PageState

Parts = Mapping[str, tuple[Callable[[object], bool], str]]


def is_number(value: object) -> bool:
    """Whether it is an unsigned whole number of 64 bits."""
    return any(type(value) is kind for kind in NUMBERS) and 0 <= cast("int", value) < 1 << 64


def is_text(value: object, form: str) -> bool:
    """Whether it is a text that matches this pattern."""
    return type(value) is str and re.fullmatch(form, value) is not None


def are_flags(value: object) -> bool:
    """Whether these are the kernel's flags of a mapping, or None."""
    return value is None or (
        any(type(value) is kind for kind in (list, tuple, set, frozenset))
        and all(type(flag) is str for flag in cast("Iterable[object]", value))
    )


def are_vmm_flags(value: object) -> bool:
    """Whether these are bits of ``VmmFlags``."""
    return is_number(value) and not cast("int", value) & ~int(~VmmFlags(0))


def are_figures(value: object) -> bool:
    """Whether these are numbers by name."""
    return type(value) is dict and all(
        type(name) is str and is_number(figure) for name, figure in value.items()
    )


NUMBERS = (int, VmmFlags, PageState, PageKind)
"""The classes of numbers: JSON's, and the package's enumerations."""
NUMBER = "a whole number from 0 to 2^64 - 1"
OF_A_MAPPING: Parts = {
    **dict.fromkeys(("start", "end", "offset", "inode"), (is_number, NUMBER)),
    "permissions": (lambda value: is_text(value, "[r-][w-][x-][sp]"), "permissions as 'rw-p'"),
    "device": (lambda value: is_text(value, "[0-9a-f]{1,8}:[0-9a-f]{1,8}"), "a device as '08:01'"),
    "pathname": (lambda value: value is None or type(value) is str, "a name or None"),
    "vm_flags": (are_flags, "flags as ['rd', 'wr'], or None"),
    "figures": (are_figures, f"a dict whose values are each {NUMBER}"),
    "region": (lambda value: value is None or type(value) is dict, "a dict or None"),
    "whole": (lambda value: value is None or type(value) is dict, "a dict or None"),
}
"""The parts of ``Mapping.as_dict``: a check of each, and the expected value in words."""
OF_A_REGION: Parts = {
    **dict.fromkeys(("base", "size"), (is_number, NUMBER)),
    **dict.fromkeys(("flags", "protection"), (are_vmm_flags, "a number of VmmFlags")),
    "state": (lambda value: is_number(value) and value in list(PageState), "a number of PageState"),
    "kind": (lambda value: is_number(value) and value in list(PageKind), "a number of PageKind"),
    "sid": (lambda value: value is None or is_number(value), f"{NUMBER}, or None"),
}
"""The parts of its region."""


def check_told(values: object, *, is_whole: bool = False) -> None:
    """Refuse a value that is no dict of ``Mapping.as_dict``; a whole mapping is no part itself."""
    parts = check_parts(values, OF_A_MAPPING, "")
    if parts["start"] > parts["end"]:
        raise refused(f"start {parts['start']:#x} is above end {parts['end']:#x}")
    if parts["region"] is not None:
        check_parts(parts["region"], OF_A_REGION, "region.")
    if parts["whole"] is not None:
        if is_whole:
            raise refused("whole.whole is another mapping; expected None")
        check_told(parts["whole"], is_whole=True)


def check_parts(values: object, parts: Parts, where: str) -> dict[str, Any]:
    """The value, if it is a dict with these parts; refused otherwise."""
    if type(values) is not dict:
        raise refused(f"it is {describe(values)}; expected a dict of as_dict()")
    for name, (fits, wanted) in parts.items():
        if name not in values:
            raise refused(f"{where}{name} is missing; expected {wanted}")
        if not fits(values[name]):
            raise refused(f"{where}{name} is {describe(values[name])}; expected {wanted}")
    return values


def refused(problem: str) -> InvalidArgument:
    """The error for a value that is no mapping."""
    return InvalidArgument("Mapping.from_dict", problem)

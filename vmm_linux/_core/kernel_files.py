"""Small files in which the kernel tells one number, or a figure a line."""

from __future__ import annotations

import os

__all__ = ["figure", "lines_of", "number", "text_of"]


def text_of(path: str) -> str | None:
    """What a file of the kernel says, or None where it does not."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).strip()
    except OSError:
        return None


def lines_of(path: str) -> list[str]:
    """The lines of a file of the kernel: a path in one may have all that ends lines elsewhere."""
    return [line for line in (text_of(path) or "").split("\n") if line]


def number(path: str) -> int | None:
    """The number in a file of the kernel, or None where there is none."""
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None


def figure(text: str | None, label: str) -> int | None:
    """A figure of a text as that of /proc/meminfo or /proc/PID/status, or None where there is none.

    Args:
        text: lines, each a label, a colon and a number. None counts as no lines.
        label: the figure's.

    Returns:
        Bytes, where the text has kB; else the number as it is.
    """
    for line in (text or "").splitlines():
        name, _, value = line.partition(":")
        if name == label:
            digits, *unit = value.split()
            return int(digits) << (10 if unit == ["kB"] else 0)
    return None

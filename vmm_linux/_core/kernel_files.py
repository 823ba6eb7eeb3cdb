"""Small files of the kernel: one number, or one labelled number a line."""

from __future__ import annotations

import os

__all__ = ["lines_of", "number", "text_of", "value_of"]


def text_of(path: str) -> str | None:
    """The text of a kernel file, or None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read()).strip()
    except OSError:
        return None


def lines_of(path: str) -> list[str]:
    """The lines of a kernel file: a path in one may hold any other line separator."""
    return [line for line in (text_of(path) or "").split("\n") if line]


def number(path: str) -> int | None:
    """The number in a kernel file, or None if there is none."""
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None


def value_of(text: str | None, label: str) -> int | None:
    """A labelled number in text like /proc/meminfo or /proc/PID/status, or None if there is none.

    Args:
        text: lines, each a label, a colon and a number. None counts as no lines.
        label: of the number.

    Returns:
        Bytes where the text has kB; otherwise the number itself.
    """
    for line in (text or "").splitlines():
        name, _, value = line.partition(":")
        if name == label:
            digits, *unit = value.split()
            return int(digits) << (10 if unit == ["kB"] else 0)
    return None

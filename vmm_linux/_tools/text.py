"""Byte counts and foreign texts in output for people."""

from __future__ import annotations


def human(size: int) -> str:
    """A byte count in the largest unit that it reaches."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def printable(text: str) -> str:
    """A name as it is where a terminal can show it, else escaped and in quotes."""
    return text if text and text.isprintable() else f"'{escaped(text)}'"


def escaped(text: str) -> str:
    r"""A text without characters that a terminal obeys or cannot show: ``\n``, ``\x1b``, ``\xff``.

    A backslash becomes two, so that the result is unambiguous. Bytes that are no UTF-8 appear as
    such.
    """
    return "".join(
        letter if letter.isprintable() and letter != "\\" else escape(letter) for letter in text
    )


def escape(letter: str) -> str:
    """One letter as an escape."""
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode("ascii")

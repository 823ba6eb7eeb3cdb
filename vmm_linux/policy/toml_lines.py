"""TOML with line numbers of its values, which ``tomllib`` reports only for syntax errors.

The parser itself finds a value: it begins in the last line of the shortest text, cut after that
line, that has it. A text that is cut inside a value does not parse, and is made a line longer.
"""

import re
import tomllib
from collections.abc import Sequence
from typing import Any

MOST_EFFORT = 400_000
"""The most lines that are parsed, counted each time, to find one: some seconds."""


class SyntaxProblem(ValueError):  # noqa: N818  a finding, as in errors.py
    """A text is no TOML: the line, counted from 1, and the reason."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line


def parse(data: bytes) -> tuple[str, dict[str, Any]]:
    """The text and its contents.

    Errors:
        SyntaxProblem: the text is no TOML.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise SyntaxProblem("not UTF-8", line) from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        reason = str(problem)
        found = re.search(r"\(at line (\d+), column \d+\)$", reason)
        line = int(found[1]) if found else max(1, len(text.splitlines()))
        raise SyntaxProblem(reason, line) from None
    except ValueError:
        # Python's own, which reports no line.
        digits = re.search(r"[0-9_]{1000}", text)
        line = text.count("\n", 0, digits.start()) + 1 if digits else 1
        raise SyntaxProblem("a number of too many digits", line) from None
    except RecursionError:
        raise SyntaxProblem("nested too deeply", 1) from None


def line_of(text: str, path: Sequence[str | int]) -> int | None:
    """The line, counted from 1, in which a value begins.

    Args:
        text: TOML without a mistake.
        path: keys of tables and numbers of lists, counted from 0, that lead to the value. For a
            missing one, its nearest container counts.

    Returns:
        None if no part of the path exists, and where values of very many lines hide it.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    table = parsed(lines)
    while path:
        if has(table, path):
            return first_line(lines, path)
        path = path[:-1]
    return None


def first_line(lines: list[str], path: Sequence[str | int]) -> int | None:
    """The first line of a value in these lines; None if the search takes too long."""
    # The first ``without`` lines lack it, the first ``enough`` have it, and no number from
    # ``unknown`` on up to that one makes a text that parses.
    without, unknown, enough = 0, len(lines), len(lines)
    effort = 0
    while unknown - without > 1:
        taken = table = None
        middle = (without + unknown) // 2
        for number in range(middle, unknown):
            effort += number
            if effort > MOST_EFFORT:
                return None
            table = parsed(lines[:number])
            if table is not None:
                taken = number
                break
        if taken is None:
            unknown = middle
        elif has(table, path):
            unknown = enough = taken
        else:
            without = taken
    return next(
        number + 1
        for number in range(without, enough)
        if lines[number].strip() and not lines[number].lstrip().startswith("#")
    )


def has(found: Any, path: Sequence[str | int]) -> bool:  # noqa: ANN401  a table, a list, a value
    """Whether the parsed text has a value."""
    for key in path:
        try:
            found = found[key]
        except (LookupError, TypeError):
            return False
    return True


def parsed(lines: list[str]) -> dict[str, Any] | None:
    """The contents of the lines; None if they do not parse."""
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError:
        return None

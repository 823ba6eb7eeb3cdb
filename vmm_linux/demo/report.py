"""Reports of the demonstration: lines on a terminal, plain lines, or one JSON object."""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import IntFlag
from typing import Any, Self

from vmm_linux._tools.machine import Memory
from vmm_linux._tools.tables import print_line
from vmm_linux._tools.text import human, printable
from vmm_linux.errors import Retcode
from vmm_linux.flags import VmmFlags
from vmm_linux.handles import Handle


@dataclass
class Subject:
    """The file, as read without this package. ``size`` is in bytes."""

    file: str
    size: int
    sha256: str


@dataclass
class Step:
    """A call with its outcome, the kernel's data, and the checks.

    Attributes:
        method: the reference's name, or the Python name where the reference has none.
        arguments: by name; addresses are called ``addr``, ``hint`` or ``va``, byte counts
            ``size``, ``max_size``, ``length`` or ``offset``.
        rc: its outcome; None for a step without a call of the endpoint.
        kernel: the kernel's data, by its own names in snake case, figures in bytes.
        facts: these in a few words, the most important first.
        checks: every required statement, and whether it holds.
    """

    method: str
    arguments: Mapping[str, Any]
    rc: Retcode | None = None
    kernel: dict[str, Any] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)
    checks: dict[str, bool] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every check held."""
        return all(self.checks.values())


class Lines:
    """One line a step: coloured with a console of rich, plain for pipes and without rich."""

    def __init__(self, console: Any = None) -> None:  # noqa: ANN401 (rich may be missing)
        self.console = console
        self.marks = "ok      ", "FAILED  "
        if console is not None:
            self.marks = ("✓ ", "✗ ") if console.encoding.startswith("utf") else ("+ ", "- ")

    @classmethod
    def coloured(cls) -> Self:
        """For a terminal of 80 columns or more. Needs rich."""
        from rich.console import Console  # noqa: PLC0415 (needed only here)

        return cls(Console(highlight=False, soft_wrap=True))

    def begin(self, subject: Subject, memory: Memory) -> None:
        """Show the file and the machine."""
        for line in headlines(subject, memory):
            self.write((line, "bold"))

    def show(self, step: Step) -> None:
        """Show the step in columns, with as many facts as fit."""
        columns = math.inf if self.console is None else self.console.width
        call, outcome = columns_of(step, WIDE if columns >= 100 else NARROW)
        room = columns - len(f"+ {call}{outcome}") - 1  # the last column stays empty
        facts = list(step.facts)
        while len(facts) > 1 and len(", ".join(facts)) > room:
            facts.pop()
        mark, colour = (self.marks[0], "green") if step.ok else (self.marks[1], "red")
        texts = (call, "cyan"), (outcome, colour), (", ".join(facts), "")
        self.write((mark, f"bold {colour}"), *texts)

    def end(self, ok: bool) -> None:
        """The verdict."""
        self.write((verdict(ok), "bold green" if ok else "bold red"))

    def write(self, *pieces: tuple[str, str]) -> None:
        """Print a line of texts, each with its style, at once: a reader sees the progress."""
        if self.console is None:
            print_line("".join(text for text, _ in pieces))
            sys.stdout.flush()
        else:
            from rich.text import Text  # noqa: PLC0415 (as above)

            self.console.print(Text.assemble(*pieces))


class Json:
    """One JSON object, at the end."""

    def begin(self, subject: Subject, memory: Memory) -> None:
        """The object's first members."""
        self.steps: list[dict[str, Any]] = []
        machine = dict(zip(("memory", "available", "swap_free"), memory, strict=True))
        self.object = {**asdict(subject), "machine": machine, "steps": self.steps}

    def show(self, step: Step) -> None:
        """One of its steps."""
        self.steps.append(
            {
                "method": step.method,
                "arguments": {name: simple(value) for name, value in step.arguments.items()},
                "rc": None if step.rc is None else str(step.rc),
                "kernel": step.kernel,
                "checks": step.checks,
                "ok": step.ok,
            }
        )

    def end(self, ok: bool) -> None:
        """All of it."""
        sys.stdout.write(json.dumps({**self.object, "ok": ok}, indent=2) + "\n")


Report = Lines | Json
"""Receives the steps as they are made; ``begin`` before the first, ``end`` after the last."""


WIDE, NARROW = 51, 38
"""Room for the call, in columns: for all of them, and for all but the longest, whose short return
code leaves it the rest."""
OUTCOME = 20
"""Room for the return code."""


def headlines(subject: Subject, memory: Memory) -> list[str]:
    """The file and the machine, in lines of less than 80 columns (but for a long name)."""
    total, available, swap = map(human, memory)
    return [
        f"FILE     {printable(subject.file)}, {human(subject.size)}",
        f"SHA-256  {subject.sha256}",
        f"Machine  {total} of memory, {available} available, {swap} of swap free",
    ]


def verdict(ok: bool) -> str:
    """The outcome in one line."""
    return "Every check held." if ok else "FAILED: see the last step."


def simple(value: object) -> int | str:
    """An argument for JSON."""
    if isinstance(value, IntFlag):
        return value.name or "0"
    return value if isinstance(value, int) else repr(value)


def shown(name: str, value: Any) -> str:  # noqa: ANN401 (any argument of a method)
    """An argument in a line."""
    if isinstance(value, Handle):
        return f"#{value.number}"
    if isinstance(value, VmmFlags) and value & VmmFlags.RWX_MASK:
        access = "".join(flag.name[0] for flag in value & VmmFlags.RWX_MASK if flag.name)
        others = value & ~VmmFlags.RWX_MASK
        return f"{others.name}|{access}" if others else access
    if name in {"size", "max_size", "length"} or (name == "offset" and value):
        return human(value)
    return f"{value:#x}" if name == "va" else str(simple(value))


def columns_of(step: Step, width: int) -> tuple[str, str]:
    """The call and its outcome, together as wide as the two columns where they fit."""
    texts = [shown(name, value) for name, value in step.arguments.items()]
    call = f"{step.method}({', '.join(texts)})  ".ljust(width)
    outcome = "" if step.rc is None else f"{step.rc}  "
    return call, outcome.ljust(width + OUTCOME - len(call))

"""The output of scripts/bench: a table for people, a document for programs."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from vmm_linux._core.values import counted

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.harness import Outcome, Spread, Target

HEAD = ("work", "target", "measured", "verdict")
TIMES_HEAD = ("work", "medians of one piece of work")
SCALES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1, "ns"))


def amount(value: float, unit: str) -> str:
    """A value in the unit that suits its size."""
    if unit != "ns":
        return f"{value:,.0f} {unit}".rstrip()
    scale, name = next((pair for pair in SCALES if value >= pair[0]), SCALES[-1])
    return f"{value / scale:.3g} {name}"


def spread_text(spread: Spread, target: Target, unit: str) -> str:
    """A median with its quartiles."""
    if target.other is None:
        return amount(spread.median, unit)
    return f"{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})"


def target_rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str, str, str]]:
    """A line for each target; its work stands in the first one of them."""
    for outcome in outcomes:
        title = outcome.benchmark.title
        for target in outcome.benchmark.targets:
            spread = outcome.ratio(target)
            if spread is None:
                yield title, str(target), "nothing", "not measured"
            else:
                verdict = "met" if target.is_met_by(spread.median) else "MISSED"
                measured = spread_text(spread, target, outcome.benchmark.unit)
                yield title, str(target), measured, verdict
            title = "the same"


def time_rows(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, str]]:
    """A line for each benchmark: the time of a piece of its work for each contestant."""
    for outcome in outcomes:
        unit = outcome.benchmark.unit
        yield (
            outcome.benchmark.title,
            "; ".join(
                f"{name} {amount(outcome.figures(name).median, unit)}" for name in outcome.rounds[0]
            ),
        )


def left_out(outcomes: Sequence[Outcome]) -> dict[str, str]:
    """The contestants that could not take part, with the reasons."""
    return {name: why for outcome in outcomes for name, why in outcome.left_out.items()}


def notes(report: dict[str, Any]) -> list[str]:
    """The notes below the tables."""
    machine = report["machine"]
    where = f"{machine['cpu'] or machine['architecture']}, {counted(machine['cpus'], 'CPU')}"
    system = f"Linux {machine['kernel']}; Python {report['python']}"
    lines = [
        (
            "Medians of rounds in which each contestant had a turn; ratios within a round, with "
            "quartiles."
        ),
        f"{where}; {system}; {counted(report['rounds'], 'round')}.",
    ]
    if report["left_out"]:
        missing = ", ".join(f"{name} ({why})" for name, why in sorted(report["left_out"].items()))
        lines.append(f"Left out: {missing}.")
    return lines


def show(outcomes: Sequence[Outcome], report: dict[str, Any]) -> None:
    """Print the tables: with rich on a terminal, as Markdown everywhere else."""
    with_rich = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    show_table = show_rich_table if with_rich else show_markdown_table
    show_table(HEAD, list(target_rows(outcomes)))
    show_table(TIMES_HEAD, list(time_rows(outcomes)))
    print("\n".join(notes(report)))


def show_markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in the README's form."""
    for cells in [head, ["---"] * len(head), *rows]:
        print(f"| {' | '.join(cells)} |")
    print()


def show_rich_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for a terminal."""
    # Only here is rich known to be installed.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415

    table = Table(*head)
    for cells in rows:
        style = {"met": "green", "MISSED": "bold red"}.get(cells[-1])
        table.add_row(*cells, style=style)
    Console().print(table)


def document(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """The benchmarks for ``--json``."""
    return [
        {
            "name": outcome.benchmark.name,
            "title": outcome.benchmark.title,
            "unit": outcome.benchmark.unit,
            "contestants": {
                name: {
                    **vars(outcome.figures(name)),
                    "rounds": [figures[name] for figures in outcome.rounds],
                }
                for name in outcome.rounds[0]
            },
            "targets": [target_document(outcome, target) for target in outcome.benchmark.targets],
            "left_out": outcome.left_out,
        }
        for outcome in outcomes
    ]


def target_document(outcome: Outcome, target: Target) -> dict[str, Any]:
    """A target with its measurement and its verdict; None without a measurement."""
    spread = outcome.ratio(target)
    return {
        "text": str(target),
        "limit": target.limit,
        "ours": target.ours,
        "other": target.other,
        "ratio": None if spread is None else vars(spread),
        "met": None if spread is None else target.is_met_by(spread.median),
    }

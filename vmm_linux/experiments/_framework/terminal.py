"""Shows experiments on a terminal or in a pipe."""

import contextlib
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence

from vmm_linux._tools.tables import Table, choose_printer, print_line
from vmm_linux._tools.text import printable
from vmm_linux.experiments._framework.catalogue import Experiment
from vmm_linux.experiments._framework.laboratory import Result
from vmm_linux.experiments._framework.run import ignore_progress
from vmm_linux.experiments._framework.words import (
    CLAIM_COLUMNS,
    cells_of,
    claim_cells,
    headings_of,
    verdict,
)

WIDEST = 100
PADDING = 3
"""Blanks of a drawn table for each column."""


def show_list(experiments: Sequence[Experiment]) -> None:
    """Show every experiment and its question."""
    rows = [(each.name, each.question) for each in experiments]
    choose_printer()(Table("Experiments", ("name", "question"), rows))


def show(result: Result) -> None:
    """Show one experiment: question, prediction, findings and explanation."""
    experiment = result.experiment
    heading = f"{experiment.title} ({experiment.name})"
    print_line(heading)
    print_line("=" * min(len(heading), width()))
    paragraph("Question", experiment.question)
    paragraph("Prediction", experiment.prediction)
    print_line()
    for table in result.findings.tables:
        rows = [tuple(row) for row in cells_of(table)]
        print_table(Table(table.title, tuple(headings_of(table)), rows))
    claims = [claim_cells(claim) for claim in result.findings.claims]
    if claims:
        print_table(Table("What came of the prediction", CLAIM_COLUMNS, claims))
    for line in verdict(result).splitlines():
        print_line(printable(line) if line else "")
    if not result.problem:
        paragraph("Explanation", experiment.explanation)
    print_line()
    sys.stdout.flush()


def print_table(table: Table) -> None:
    """Print a table; row by row where the terminal is too narrow for its words."""
    columns = zip(table.columns, *table.rows, strict=True)
    words = [max(map(len, " ".join(column).split()), default=0) for column in columns]
    if not sys.stdout.isatty() or sum(words) + PADDING * len(words) < terminal_width():
        choose_printer()(table)
        return
    print_line(table.title)
    for row in table.rows:
        for number, (name, cell) in enumerate(zip(table.columns, row, strict=True)):
            paragraph(name, printable(cell), " " * (4 if number else 2), "  ")
    print_line()


def paragraph(name: str, text: str, indent: str = "", more: str = "") -> None:
    """Print a text with its heading, as wide as the terminal; ``more`` indents its later lines."""
    print_line(
        textwrap.fill(
            f"{name}: {text}", width(), initial_indent=indent, subsequent_indent=indent + more
        )
    )


def width() -> int:
    """The width of a text in columns."""
    return max(20, min(WIDEST, terminal_width()))


def terminal_width() -> int:
    """The width of the terminal in columns, if there is one."""
    return shutil.get_terminal_size((WIDEST, 24)).columns


@contextlib.contextmanager
def progress_of(name: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show progress where standard error is a terminal and rich is installed."""
    try:
        from rich.console import Console  # noqa: PLC0415 (needed only here)
        from rich.progress import Progress  # noqa: PLC0415 (as above)
    except ModuleNotFoundError:
        yield ignore_progress
        return
    if not sys.stderr.isatty():
        yield ignore_progress
        return
    # Drawn at each step, and not by a thread: nothing else may run during a measurement.
    console = Console(file=sys.stderr, highlight=False)
    with Progress(console=console, transient=True, auto_refresh=False) as bar:
        task = bar.add_task(name, total=None)
        bar.refresh()

        def progress(done: int, total: int, what: str) -> None:
            what = f"{name}: {what}"
            bar.update(task, completed=done, total=total, description=what, refresh=True)

        yield progress

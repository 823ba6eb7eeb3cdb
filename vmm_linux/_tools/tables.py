"""Prints tables: drawn on a terminal where rich is installed, in plain columns elsewhere."""

import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from vmm_linux._tools.text import printable


class Table(NamedTuple):
    """A heading, the columns' names, and rows with a cell for each of them."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def choose_printer() -> Callable[[Table], None]:
    """The function that prints a table on this standard output."""
    if not sys.stdout.isatty():
        return print_plain
    try:
        import rich.table  # noqa: F401, PLC0415 (needed only here)
    except ModuleNotFoundError:
        return print_plain
    return print_drawn


def print_line(text: str = "") -> None:
    """Print a line of text."""
    sys.stdout.write(text.rstrip() + "\n")


def print_plain(table: Table) -> None:
    """Print a table in columns as wide as they need, two blanks between them."""
    rows = [table.columns, *(tuple(map(shown, row)) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print_line(table.title)
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print_line("  " + "  ".join(cells))
    print_line()


def print_drawn(table: Table) -> None:
    """Print a table as rich draws it: as wide as the terminal, long cells on several lines."""
    import rich.box  # noqa: PLC0415 (as above)
    import rich.console  # noqa: PLC0415
    import rich.table  # noqa: PLC0415
    import rich.text  # noqa: PLC0415

    drawn = rich.table.Table(
        title=table.title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD
    )
    for column in table.columns:
        drawn.add_column(column, overflow="fold")
    for row in table.rows:
        drawn.add_row(*(rich.text.Text(shown(cell)) for cell in row))
    rich.console.Console(highlight=False).print(drawn)


def shown(cell: str) -> str:
    """A cell without control characters: names of files and processes can hold anything."""
    return printable(cell) if cell else ""

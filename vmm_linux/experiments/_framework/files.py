"""Results as files: JSON, CSV, PNG and SVG, and checks of their places."""

import csv
import errno
import io
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vmm_linux._tools.atomic_write import is_special, naming
from vmm_linux.experiments._framework.laboratory import Result
from vmm_linux.experiments._framework.plots import picture_of
from vmm_linux.experiments._framework.results import Claim, Expected, Table, Value

CLAIM_COLUMNS = (
    "experiment",
    "kind",
    "prediction",
    "outcome",
    "measured",
    "least measured",
    "largest measured",
    "least expected",
    "largest expected",
    "unit",
    "reason",
)


def as_json(results: Sequence[Result], machine: dict[str, Any]) -> bytes:
    """One object: the machine, and every experiment with its texts and all findings."""
    whole = {"machine": machine, "experiments": [result.as_dict() for result in results]}
    return (json.dumps(whole, indent=1, allow_nan=False) + "\n").encode()


def as_csv(results: Sequence[Result], folder: str) -> dict[str, bytes]:
    """A file for every table, and one for all claims, by name."""
    files = {
        str(Path(folder, f"{result.experiment.name}-{number}.csv")): table_as_csv(table)
        for result in results
        for number, table in enumerate(result.findings.tables, 1)
    }
    claims = [
        (result.experiment.name, *claim_as_row(claim))
        for result in results
        for claim in result.findings.claims
    ]
    files[str(Path(folder, "claims.csv"))] = written([CLAIM_COLUMNS, *claims])
    return files


def claim_as_row(claim: Claim) -> list[Value]:
    """A claim, its values as they were measured."""
    expected = claim.expected or Expected(None, None)
    low, high = claim.spread or (None, None)
    values = [claim.measured, low, high, expected.low, expected.high, claim.unit]
    return [claim.kind, claim.statement, claim.outcome, *values, claim.reason]


def table_as_csv(table: Table) -> bytes:
    """A table: numbers as they were measured, their unit in the heading, bounds in columns."""
    head = [
        f"{column.name} [{column.unit}]" if column.unit else column.name for column in table.columns
    ]
    if not table.spread:
        return written([head, *table.rows])
    measured = [n for n in range(len(head)) if any(row[n] is not None for row in table.spread)]
    bounds = [f"{head[n]} {bound}" for n in measured for bound in ("least", "largest")]
    rows = [
        [*row, *(each for n in measured for each in spread[n] or ("", ""))]
        for row, spread in zip(table.rows, table.spread, strict=True)
    ]
    return written([[*head, *bounds], *rows])


def written(rows: Iterable[Sequence[object]]) -> bytes:
    """Rows as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def as_plots(results: Sequence[Result], folder: str) -> dict[str, bytes]:
    """Every plot as PNG and as SVG, by name."""
    return {
        str(Path(folder, f"{result.experiment.name}-{number}.{kind}")): picture_of(plot, kind)
        for result in results
        for number, plot in enumerate(result.findings.plots, 1)
        for kind in ("png", "svg")
    }


def check_folder(name: str) -> None:
    """Check now that files can be made in a folder, which may not exist yet.

    Errors:
        OSError: they cannot.
    """
    folder = Path(name)
    if name and not os.path.lexists(folder):
        folder = folder.absolute().parent
    if not name or not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
    with naming(name), tempfile.TemporaryFile(dir=folder):
        pass


def check_file(name: str) -> None:
    """Check now that a file can be written.

    Errors:
        OSError: it cannot.
    """
    if is_special(name):
        return
    place = Path(os.path.realpath(name))
    if not name or place.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not place.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    with naming(name), tempfile.TemporaryFile(dir=place.parent):
        pass

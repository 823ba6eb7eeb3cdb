"""Results in words, for all outputs."""

from collections import Counter

from vmm_linux._tools.text import human
from vmm_linux.experiments._framework.laboratory import Result
from vmm_linux.experiments._framework.results import Claim, Expected, Kind, Outcome, Table, Value

NOTHING = "-"
"""Stands for a missing value."""
CLAIM_COLUMNS = ("prediction", "measured", "expected", "outcome")


def shown(value: Value, unit: str = "") -> str:
    """A value with its unit, bytes in the largest that fits."""
    if value is None:
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if unit == "B":
        return f"-{human(-int(value))}" if value < 0 else human(int(value))
    digits = "" if isinstance(value, int) else ".0f" if abs(value) >= 1000 else ".4g"
    number = f"{value:,{digits}}"
    return f"{number} {unit}".rstrip()


def headings_of(table: Table) -> list[str]:
    """The columns' names with their units, which bytes have in the cells."""
    return [
        f"{column.name} ({column.unit})" if column.unit not in {"", "B"} else column.name
        for column in table.columns
    ]


def cells_of(table: Table) -> list[list[str]]:
    """The cells of every row, medians with their bounds."""
    units = ["B" if column.unit == "B" else "" for column in table.columns]
    bounds = table.spread or [[None] * len(units)] * len(table.rows)
    return [
        [spread(*cell) for cell in zip(*row, units, strict=True)]
        for row in zip(table.rows, bounds, strict=True)
    ]


def spread(value: Value, bounds: list[int | float] | None, unit: str) -> str:
    """A value, and its range if it varied."""
    if not bounds or bounds[0] == bounds[1]:
        return shown(value, unit)
    within = unit if unit == "B" else ""
    median, low, high = (shown(each, within) for each in (value, *bounds))
    return f"{median} [{low} … {high}] {unit if not within else ''}".rstrip()


def claim_cells(claim: Claim) -> tuple[str, str, str, str]:
    """A claim as a row of ``CLAIM_COLUMNS``."""
    if claim.outcome is Outcome.NOT_OBSERVABLE:
        return claim.statement, NOTHING, NOTHING, f"not observable here, because {claim.reason}"
    outcome = f"{claim.outcome}{' (timing)' if claim.kind is Kind.TIMING else ''}"
    measured = spread(claim.measured, claim.spread, claim.unit)
    return claim.statement, measured, words(claim.expected, claim.unit), outcome


def words(expected: Expected | None, unit: str) -> str:
    """The expected range, in words."""
    if expected is None:
        return NOTHING
    low, high = expected.low, expected.high
    if low == high:
        return shown(low, unit)
    if high is None:
        return f"at least {shown(low, unit)}"
    if low is None:
        return f"at most {shown(high, unit)}"
    return f"{shown(low, unit if unit == 'B' else '')} to {shown(high, unit)}"


def verdict(result: Result) -> str:
    """The outcome of an experiment, in a sentence."""
    if result.problem:
        return f"FAILED: {result.problem}"
    if result.findings.reason:
        return f"Not observable here, because {result.findings.reason}."
    counts = Counter(claim.outcome for claim in result.findings.claims)
    listed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome if counts[outcome])
    return f"Of the prediction: {listed or 'nothing was claimed'}."

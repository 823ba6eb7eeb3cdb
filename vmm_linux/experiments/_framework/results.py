"""The findings of an experiment: tables, plots and claims, as typed data for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Value = int | float | str | bool | None
"""A cell's value; None where nothing could be measured."""
Number = int | float


class NotObservable(Exception):  # noqa: N818 (it is an answer, not an error)
    """This machine cannot show it; the text has the reason. A result, not a failure."""


def need(condition: object, because: str) -> None:
    """Continue only if this machine can show what follows.

    Args:
        condition: whether it can.
        because: the reason if not, to follow the words "not observable here, because".

    Errors:
        NotObservable: the condition is false.
    """
    if not condition:
        raise NotObservable(because)


# ---- tables and plots ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """A column of a table: its name, and the unit of its numbers, as "B" or "µs"."""

    name: str
    unit: str = ""


@dataclass
class Table:
    """Rows with a cell for each column.

    Attributes:
        title: its subject.
        columns: the columns.
        rows: the cells; of several runs, the medians.
        spread: of several runs, the least and the largest value of each cell of numbers; else
            empty.
    """

    title: str
    columns: list[Column]
    rows: list[list[Value]] = field(default_factory=list)
    spread: list[list[list[Number] | None]] = field(default_factory=list)

    def add(self, *cells: Value) -> None:
        """Add a row.

        Args:
            cells: a value for each column.
        """
        if len(cells) != len(self.columns):
            raise ValueError(
                f"table {self.title!r}: {len(cells)} cells, where {len(self.columns)} are expected"
            )
        self.rows.append([sound(cell) for cell in cells])

    def column(self, name: str) -> list[Any]:
        """All cells of a column.

        Args:
            name: the column's.
        """
        place = [column.name for column in self.columns].index(name)
        return [row[place] for row in self.rows]


@dataclass(frozen=True)
class Axis:
    """An axis of a plot: its label, its unit, and whether it is logarithmic."""

    label: str
    unit: str = ""
    log: bool = False


@dataclass
class Series:
    """A line of a plot, or bars where ``x`` has names; of several runs, medians and bounds."""

    label: str
    x: list[Number | str]
    y: list[Number]
    low: list[Number] = field(default_factory=list)
    high: list[Number] = field(default_factory=list)


@dataclass
class Plot:
    """Series over two axes."""

    title: str
    x: Axis
    y: Axis
    series: list[Series] = field(default_factory=list)

    def add(self, label: str, x: Sequence[Number | str], y: Sequence[Number]) -> None:
        """Add a series.

        Args:
            label: the series' name.
            x: places on the first axis: numbers, or names for bars.
            y: a number for each of them.
        """
        if len(x) != len(y):
            raise ValueError(f"series {label!r}: {len(x)} places and {len(y)} values")
        self.series.append(Series(label, list(map(sound, x)), list(map(sound, y))))

    def add_columns(self, table: Table, x: str, *names: str) -> None:
        """Add columns of a table as series, each under its name.

        Args:
            table: the table.
            x: the name of the column with the places on the first axis.
            names: the names of the columns with the numbers.
        """
        for name in names:
            self.add(name, table.column(x), table.column(name))


def sound(value: Any) -> Any:  # noqa: ANN401 (the cell's type is unchanged)
    """A value that JSON can hold unchanged; an error otherwise."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no measured number; say None or NotObservable")
    if value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{value!r} is no number, text, truth or None")
    return value if value is None or isinstance(value, bool) else plain(value)


def plain(value: Any) -> Any:  # noqa: ANN401 (as above)
    """A number or a text as a plain object."""
    kind = next(kind for kind in (str, int, float) if isinstance(value, kind))
    return kind(value)


# ---- claims -------------------------------------------------------------------------------------


class Kind(StrEnum):
    """The basis of a claim."""

    PHYSICAL = "physical"
    """The kernel's own figures: the claim must hold."""
    TIMING = "timing"
    """A clock: the claim may fail."""


class Outcome(StrEnum):
    """The outcome of a claim."""

    HELD = "held"
    FAILED = "did not hold"
    NOT_OBSERVABLE = "not observable"


@dataclass(frozen=True)
class Expected:
    """The expected range of a measured value; None is no bound."""

    low: Value
    high: Value

    def admits(self, value: Value) -> bool:
        """Whether a value is as expected."""
        if value is None:
            return False
        if self.low == self.high:
            return value == self.low
        return not (
            (self.low is not None and value < self.low)  # type: ignore[operator]
            or (self.high is not None and value > self.high)  # type: ignore[operator]
        )


def equal(value: Value) -> Expected:
    """Expect exactly this value."""
    return Expected(value, value)


def at_least(low: Number) -> Expected:
    """Expect this number or more."""
    return Expected(low, None)


def at_most(high: Number) -> Expected:
    """Expect this number or less."""
    return Expected(None, high)


def between(low: Number, high: Number) -> Expected:
    """Expect a number between two, both included."""
    return Expected(low, high)


@dataclass
class Claim:
    """A statement of the prediction, and the measured value.

    Attributes:
        statement: the prediction, in a sentence.
        kind: its basis.
        outcome: its outcome.
        measured: the value; of several runs, the median, or the first where it is no number.
        expected: the expected range.
        unit: of both.
        reason: the reason if it is not observable.
        spread: of several runs, the least and the largest value.
    """

    statement: str
    kind: Kind
    outcome: Outcome
    measured: Value = None
    expected: Expected | None = None
    unit: str = ""
    reason: str = ""
    spread: list[Number] | None = None


@dataclass
class Findings:
    """All findings of one experiment.

    Attributes:
        tables: the tables, in the order of their making.
        plots: likewise.
        claims: likewise; parts that are not observable are among them.
        reason: the reason if nothing at all is observable, or "".
    """

    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    reason: str = ""

    def without_empty(self) -> Findings:
        """The findings without tables and plots that are empty, as not observable here."""
        tables = [table for table in self.tables if table.rows]
        plots = [
            Plot(plot.title, plot.x, plot.y, [series for series in plot.series if series.x])
            for plot in self.plots
        ]
        return Findings(tables, [p for p in plots if p.series], self.claims, self.reason)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def findings_from(found: dict[str, Any]) -> Findings:
    """The findings in a dict of ``as_dict``."""
    return Findings(
        [
            Table(
                each["title"],
                [Column(**column) for column in each["columns"]],
                each["rows"],
                each["spread"],
            )
            for each in found["tables"]
        ],
        [
            Plot(
                each["title"],
                Axis(**each["x"]),
                Axis(**each["y"]),
                [Series(**series) for series in each["series"]],
            )
            for each in found["plots"]
        ],
        [
            Claim(
                **{
                    **each,
                    "kind": Kind(each["kind"]),
                    "outcome": Outcome(each["outcome"]),
                    "expected": each["expected"] and Expected(**each["expected"]),
                }
            )
            for each in found["claims"]
        ],
        found["reason"],
    )


# ---- several runs -------------------------------------------------------------------------------


def merged(runs: Sequence[Findings]) -> Findings:
    """The merged findings of several runs: medians, with the least and the largest value.

    A table or a plot whose shape differs between runs is the first run's, without bounds.
    A claim held if it held in every run that could observe it.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    return Findings(
        [
            merged_table([run.tables[n] for run in runs if len(run.tables) > n])
            for n in range(len(first.tables))
        ],
        [
            merged_plot([run.plots[n] for run in runs if len(run.plots) > n])
            for n in range(len(first.plots))
        ],
        merged_claims(runs),
        next((run.reason for run in runs if run.reason), ""),
    )


def are_numbers(values: Sequence[object]) -> bool:
    """Whether all of these can have a median."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def middle(values: Sequence[Number]) -> Number:
    """The median: a whole number where it is one of whole numbers."""
    found = median(values)
    whole = all(isinstance(value, int) for value in values) and found == int(found)
    return int(found) if whole else found


def merged_table(tables: list[Table]) -> Table:
    """One table of several runs."""
    first = tables[0]
    if len({(table.title, len(table.rows)) for table in tables}) > 1:
        return first
    rows: list[list[Value]] = []
    spread: list[list[list[Number] | None]] = []
    for same in zip(*(table.rows for table in tables), strict=True):
        cells: list[list[Any]] = [list(cell) for cell in zip(*same, strict=True)]
        rows.append([middle(c) if are_numbers(c) else c[0] for c in cells])
        spread.append([[min(c), max(c)] if are_numbers(c) else None for c in cells])
    return Table(first.title, first.columns, rows, spread)


def merged_plot(plots: list[Plot]) -> Plot:
    """One plot of several runs."""
    first = plots[0]

    def shape(plot: Plot) -> object:
        return plot.title, [(series.label, len(series.x)) for series in plot.series]

    if any(shape(plot) != shape(first) for plot in plots):
        return first
    return Plot(
        first.title,
        first.x,
        first.y,
        [merged_series(list(same)) for same in zip(*(plot.series for plot in plots), strict=True)],
    )


def merged_series(runs: list[Series]) -> Series:
    """One series of several runs."""

    def each_place(pick: Callable[[list[Any]], Any], values: list[list[Any]]) -> list[Any]:
        return [pick(list(place)) for place in zip(*values, strict=True)]

    x = [run.x for run in runs]
    y = [run.y for run in runs]
    return Series(
        runs[0].label,
        each_place(lambda place: middle(place) if are_numbers(place) else place[0], x),
        each_place(middle, y),
        each_place(min, y),
        each_place(max, y),
    )


def merged_claims(runs: Sequence[Findings]) -> list[Claim]:
    """Each claim once, in the order in which the runs made them."""
    alike: dict[str, list[Claim]] = {}
    for run in runs:
        for claim in run.claims:
            alike.setdefault(claim.statement, []).append(claim)
    return [merged_claim(claims) for claims in alike.values()]


def merged_claim(claims: list[Claim]) -> Claim:
    """A claim of several runs: failed if any failed, with the value of one that failed."""
    order = [Outcome.FAILED, Outcome.HELD, Outcome.NOT_OBSERVABLE]
    worst = min(claims, key=lambda claim: order.index(claim.outcome))
    values: list[Any] = [
        claim.measured for claim in claims if claim.outcome is not Outcome.NOT_OBSERVABLE
    ]
    if not values or not are_numbers(values):
        return worst
    measured = worst.measured if worst.outcome is Outcome.FAILED else middle(values)
    return Claim(**{**vars(worst), "measured": measured, "spread": [min(values), max(values)]})

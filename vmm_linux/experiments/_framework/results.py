"""The findings of an experiment: tables, plots and claims, as typed data for JSON."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Value = int | float | str | bool | None
"""A cell's value; None where nothing could be measured."""
Number = int | float


class NotObservable(Exception):  # noqa: N818 (it is an answer, not an error)
    """This machine cannot show it; the text has the reason. A result, not a failure."""


def need(condition: object, because: str) -> None:
    """Continue only if this machine can show what follows, else raise ``NotObservable``.

    The reason follows the words "not observable here, because".
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
        """Add a row: a value for each column."""
        if len(cells) != len(self.columns):
            raise ValueError(
                f"table {self.title!r}: {len(cells)} cells, where {len(self.columns)} are expected"
            )
        self.rows.append([sound(cell) for cell in cells])

    def column(self, name: str) -> list[Any]:
        """All cells of the column of this name."""
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
        """Add a series: at each place ``x``, a number or for bars a name, a number ``y``."""
        if len(x) != len(y):
            raise ValueError(f"series {label!r}: {len(x)} places and {len(y)} values")
        self.series.append(Series(label, list(map(sound, x)), list(map(sound, y))))

    def add_columns(self, table: Table, x: str, *names: str) -> None:
        """Add columns of a table as series, each under its name; ``x`` is that of the places."""
        for name in names:
            self.add(name, table.column(x), table.column(name))


def sound(value: Any) -> Any:  # noqa: ANN401 (the cell's type is unchanged)
    """A plain object that JSON can hold unchanged; an error otherwise."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no measured number; say None or NotObservable")
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{value!r} is no number, text, truth or None")


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

    Of several runs, ``measured`` is the median, or the first where it is no number, and ``spread``
    has the least and the largest. ``unit`` is that of ``measured`` and ``expected``; ``reason`` is
    why it is not observable.
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
    """All findings of one experiment, in the order of their making.

    Parts that are not observable are among the claims. ``reason`` is why nothing at all is, or "".
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
    made = Findings(reason=found["reason"])
    for each in found["tables"]:
        columns = [Column(**column) for column in each["columns"]]
        made.tables.append(Table(**{**each, "columns": columns}))
    for each in found["plots"]:
        series = [Series(**each_of_it) for each_of_it in each["series"]]
        made.plots.append(Plot(each["title"], Axis(**each["x"]), Axis(**each["y"]), series))
    for each in found["claims"]:
        claim = Claim(**{**each, "kind": Kind(each["kind"]), "outcome": Outcome(each["outcome"])})
        claim.expected = each["expected"] and Expected(**each["expected"])
        made.claims.append(claim)
    return made


# ---- several runs -------------------------------------------------------------------------------


def merged(runs: Sequence[Findings]) -> Findings:
    """The merged findings of several runs: medians, with the least and the largest value.

    A table or a plot whose shape differs between runs is the first run's, without bounds.
    A claim held if it held in every run that could observe it.
    """
    first = runs[0]
    if len(runs) == 1:
        return first
    reason = next((run.reason for run in runs if run.reason), "")
    made = Findings(claims=merged_claims(runs), reason=reason)
    for n in range(len(first.tables)):
        made.tables.append(merged_table([run.tables[n] for run in runs if len(run.tables) > n]))
    for n in range(len(first.plots)):
        made.plots.append(merged_plot([run.plots[n] for run in runs if len(run.plots) > n]))
    return made


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
    made = Table(first.title, first.columns)
    for same in zip(*(table.rows for table in tables), strict=True):
        cells: list[Sequence[Any]] = [*zip(*same, strict=True)]
        made.rows.append([middle(c) if are_numbers(c) else c[0] for c in cells])
        made.spread.append([[min(c), max(c)] if are_numbers(c) else None for c in cells])
    return made


def merged_plot(plots: list[Plot]) -> Plot:
    """One plot of several runs."""
    first = plots[0]
    shapes = [(plot.title, [(it.label, len(it.x)) for it in plot.series]) for plot in plots]
    if any(shape != shapes[0] for shape in shapes):
        return first
    series = [merged_series(same) for same in zip(*(plot.series for plot in plots), strict=True)]
    return Plot(first.title, first.x, first.y, series)


def merged_series(runs: Sequence[Series]) -> Series:
    """One series of several runs."""
    x: list[Sequence[Any]] = [*zip(*(run.x for run in runs), strict=True)]
    y: list[Sequence[Number]] = [*zip(*(run.y for run in runs), strict=True)]
    places = [middle(each) if are_numbers(each) else each[0] for each in x]
    return Series(runs[0].label, places, [*map(middle, y)], [*map(min, y)], [*map(max, y)])


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

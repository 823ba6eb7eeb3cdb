"""Plots of findings: SVG and PNG, by matplotlib, readable without colours."""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from vmm_linux.experiments._framework.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis as DrawnAxis
    from matplotlib.figure import Figure

    from vmm_linux.experiments._framework.results import Axis, Plot

COLOURS = ("#2f6fde", "#d9480f", "#2b9a3e", "#a03fc4", "#b08900", "#0b8ba3")
"""Colours that colour-blind readers can distinguish, on white and on black."""
MARKERS = "os^Dv*"
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "ooo")
INK, GRID = "#010203", "#040506"
"""Ink and grid of an inline picture, which the page's own colours replace."""


def picture_of(plot: Plot, kind: str) -> bytes:
    """A plot as a file of a kind, "png" or "svg"."""
    return rendered(plot, kind, "black", "#d0d0d0", "path", transparent=False)


def inline(plot: Plot, prefix: str) -> str:
    """A plot as an element of a page, in the page's own colours.

    ``prefix`` is that of the names of its parts, which must be unique in a page.
    """
    text = rendered(plot, "svg", INK, GRID, "none", transparent=True).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", text)
    return text.replace(INK, "currentColor").replace(GRID, "var(--line)")


def rendered(plot: Plot, kind: str, ink: str, grid: str, fonts: str, *, transparent: bool) -> bytes:
    """A plot in these colours, its letters as shapes ("path") or as letters ("none")."""
    from matplotlib import rc_context  # noqa: PLC0415 (as above)

    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings: Any = {
        **dict.fromkeys(inks, ink),
        "grid.color": grid,
        "svg.fonttype": fonts,
        "svg.hashsalt": "vmm-linux",
        "text.parse_math": False,
        "hatch.color": ink,
        "hatch.linewidth": 0.6,
    }
    target = io.BytesIO()
    with rc_context(settings):
        metadata = {"Title": plot.title, **({"Date": None} if kind == "svg" else {})}
        figure_of(plot).savefig(
            target, format=kind, dpi=200, transparent=transparent, metadata=metadata
        )
    return target.getvalue()


def figure_of(plot: Plot) -> Figure:
    """A plot as matplotlib's figure."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (as above)

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = [place for place in plot.series[0].x if isinstance(place, str)] if plot.series else []
    (draw_bars if names else draw_lines)(axes, plot)
    if plot.x.log and not names:
        axes.set_xscale("log", base=base_of(plot.x))
    if plot.y.log:
        axes.set_yscale("log", base=base_of(plot.y))
    axes.set_title(plot.title, loc="left", fontweight="bold", fontsize=11)
    if not plot.y.log:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    set_axis(axes.yaxis, plot.y)
    if not names:
        set_axis(axes.xaxis, plot.x)
    axes.set_xlabel(label_of(plot.x))
    axes.set_ylabel(label_of(plot.y))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="both" if not names else "y", linewidth=0.6)
    if len(plot.series) > 1:
        columns = min(len(plot.series), 4)
        figure.legend(loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def draw_lines(axes: Axes, plot: Plot) -> None:
    """A line with markers for each series, its bounds beside it."""
    for number, series in enumerate(plot.series):
        colour = COLOURS[number % len(COLOURS)]
        (line,) = axes.plot(series.x, series.y, label=series.label, color=colour)
        line.set(linestyle=LINES[number % len(LINES)], linewidth=1.6)
        line.set(marker=MARKERS[number % len(MARKERS)], markersize=5)
        if series.low:
            axes.fill_between(series.x, series.low, series.high, color=colour, alpha=0.2)


def draw_bars(axes: Axes, plot: Plot) -> None:
    """A group of bars for each name, a bar for each series, all from one list of names."""
    names = list(dict.fromkeys(str(place) for series in plot.series for place in series.x))
    width = 0.8 / len(plot.series)
    for number, series in enumerate(plot.series):
        places = [
            names.index(str(place)) + (number - (len(plot.series) - 1) / 2) * width
            for place in series.x
        ]
        axes.bar(
            places,
            series.y,
            width * 0.92,
            label=series.label,
            color=COLOURS[number % len(COLOURS)],
            hatch=HATCHES[number % len(HATCHES)],
        )
        if series.low:
            for place, low, high in zip(places, series.low, series.high, strict=True):
                axes.plot([place, place], [low, high], color="#808080", linewidth=2)
    axes.set_xticks(range(len(names)), names, fontsize=9)


def base_of(axis: Axis) -> int:
    """Sizes grow in powers of two, all else in powers of ten."""
    return 2 if axis.unit == "B" else 10


def set_axis(drawn: DrawnAxis, axis: Axis) -> None:
    """Put ticks at round sizes, with units; write powers as plain numbers."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator, NullLocator  # noqa: PLC0415

    if axis.unit == "B":
        drawn.set_major_formatter(FuncFormatter(lambda size, _: shown(int(size), "B")))
        if axis.log:
            drawn.set_minor_locator(NullLocator())
        else:
            low, high = drawn.get_view_interval()
            drawn.set_major_locator(MultipleLocator(1 << int((high - low) / 5).bit_length()))
    elif axis.log:
        drawn.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        drawn.set_minor_formatter("")


def label_of(axis: Axis) -> str:
    """What an axis shows, and its unit, which bytes have at the marks."""
    unit = {"": "", "B": " (bytes)"}.get(axis.unit, f" ({axis.unit})")
    return f"{axis.label}{unit}"

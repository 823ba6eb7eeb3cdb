"""The map as a picture for reports: PNG or SVG, by matplotlib."""

import io
from typing import TYPE_CHECKING

from vmm_linux._core.values import counted
from vmm_linux._tools.matplotlib import need_matplotlib
from vmm_linux._tools.text import escaped, human
from vmm_linux.cli.map.model import GROUPS, Group, Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plotted(picture: Picture, kind: str) -> bytes:
    """The groups, biggest first, as bars over one logarithmic axis: a "png" or "svg".

    Errors:
        CannotTryError: there is no matplotlib.
    """
    need_matplotlib("--png and --svg")
    from matplotlib import rc_context  # noqa: PLC0415 (needed only here)
    from matplotlib.figure import Figure  # noqa: PLC0415 (as above)

    groups = picture.groups[::-1]
    # A name may hold a formula of mathtext, or letters that the font lacks.
    title = f"Memory of {picture.title}".encode("ascii", "backslashreplace").decode()
    with rc_context({"svg.hashsalt": "vmm-linux", "text.parse_math": False}):
        figure = Figure(figsize=(10, 1.9 + 0.52 * max(1, len(groups))), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, groups, picture.page_size)
        axes.set_title(title, loc="left", fontweight="bold")
        totals = picture.totals
        figure.supxlabel(
            f"{human(totals['reserved'])} reserved, {human(totals['committed'])} committed, "
            f"{human(totals['resident'])} resident, {human(totals['pss'])} PSS in "
            f"{counted(len(picture.entries), 'mapping')}, {picture.taken:%Y-%m-%d %H:%M:%S} UTC",
            fontsize=9,
            color="#555555",
        )
        target = io.BytesIO()
        metadata = {"Title": escaped(title)}
        if kind == "svg":
            metadata["Date"] = picture.taken.isoformat(timespec="seconds")
        figure.savefig(target, format=kind, dpi=150, metadata=metadata)
    return target.getvalue()


def draw(axes: "Axes", groups: list[Group], smallest: int) -> None:
    """Draw the bars of the groups, the first lowest."""
    from matplotlib.ticker import FuncFormatter, NullLocator  # noqa: PLC0415 (as above)

    sums = [group.sums for group in groups]
    largest = max((each["reserved"] for each in sums), default=smallest)
    axes.set_xscale("log", base=2)
    axes.set_xlim(smallest / 2, largest * 64)
    for label, alpha in (("reserved", 0.2), ("committed", 0.45), ("resident", 1.0)):
        bars = axes.barh(
            [group.title for group in groups],
            [max(0, each[label] - smallest / 2) for each in sums],
            left=smallest / 2,
            height=0.66,
            color=[GROUPS[group.key].in_a_plot for group in groups],
            alpha=alpha,
        )
        bars.set_label(label)
    for row, each in enumerate(sums):
        text = " / ".join(human(each[name]) for name in ("resident", "committed", "reserved"))
        axes.text(each["reserved"] * 1.25, row, text, va="center", fontsize=8.5)
    axes.set_xticks(ticks(smallest, largest))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: human(int(size))))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#dddddd")
    axes.set_xlabel("resident / committed / reserved: full, middle and light shade", fontsize=9)


def ticks(smallest: int, largest: int) -> list[int]:
    """Sizes for the axis, at most nine."""
    powers = range(smallest.bit_length() - 1, largest.bit_length() + 1)
    return [1 << power for power in powers[:: len(powers) // 9 + 1]]

"""The picture of an address space and its changes, in lines of text."""

import math
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vmm_linux._tools.text import escaped, human
from vmm_linux.cli.map.model import GROUPS, SUMS, Group, MapEntry, Picture, name_of, size_of
from vmm_linux.inspect import Difference, Mapping

NAMES_SHOWN = 3
"""The number of names below the bar of a group."""
CHANGES_SHOWN = 12
"""The most changes that are shown."""
SIZE_WIDTH, SIZES_WIDTH = 10, 40
"""Columns of a size with its unit, and of the four sizes of a line."""
SHOWN_FIGURES = ("rss", "pss", "swap", "private_dirty", "locked")
"""The figures whose changes are shown. Others change with every reading."""


class Line(NamedTuple):
    """Texts of a line, each with a style of rich."""

    pieces: tuple[tuple[str, str], ...]

    @property
    def text(self) -> str:
        """The line without styles."""
        return "".join(text for text, _ in self.pieces).rstrip()


def line(*pieces: tuple[str, str] | str) -> Line:
    """A line of texts, those without a style plain."""
    return Line(tuple((piece, "") if isinstance(piece, str) else piece for piece in pieces))


class Screen(NamedTuple):
    """The properties of the terminal."""

    width: int
    """Columns, of which the last stays empty."""
    shades: str
    """Characters for resident, committed and reserved memory."""

    @classmethod
    def of(cls, width: int, encoding: str) -> "Screen":
        """A screen of so many columns and an encoding, which may have no shades."""
        try:
            "█▓░".encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return cls(max(width, 72), "#+.")
        return cls(max(width, 72), "█▓░")

    @property
    def bar(self) -> int:
        """Columns of a bar."""
        return max(8, min(60, (self.width - SIZES_WIDTH) // 3))

    @property
    def name(self) -> int:
        """Columns of a name."""
        return self.width - SIZES_WIDTH - self.bar - 2


# ---- the picture --------------------------------------------------------------------------------


def picture_lines(picture: Picture, screen: Screen) -> list[Line]:
    """The groups, biggest first, with the biggest of each and the totals."""
    groups = picture.groups
    largest = max((group.sums["reserved"] for group in groups), default=picture.page_size)
    found = heading(picture, screen)
    for group in groups:
        found += group_lines(group, screen, picture.page_size, largest)
    totals = picture.totals
    title = fitted("Total", screen.name + screen.bar + 2)
    legend = "{} resident  {} committed  {} reserved   (logarithmic)".format(*screen.shades)
    sums = figures(totals[name] for name in SUMS)
    return [*found, line((title + sums, "bold")), line((legend, "dim"))]


def heading(picture: Picture, screen: Screen) -> list[Line]:
    """The process, and the heads of the columns."""
    count = len(picture.entries)
    title = f"{picture.title}, {count} mapping{'s' if count != 1 else ''}"
    lines = [line((clipped(title, screen.width - 1), "bold"))]
    if picture.command:
        lines.append(line((clipped(escaped(picture.command), screen.width - 1), "dim")))
    heads = "".join(f"{head:>{SIZE_WIDTH}}" for head in SUMS)
    return [*lines, line((" " * (screen.name + screen.bar + 2) + heads, "dim"))]


def group_lines(group: Group, screen: Screen, smallest: int, largest: int) -> list[Line]:
    """A group with its bar, and the biggest of its names."""
    colour = GROUPS[group.key].on_a_terminal
    bar = bar_of(group, screen, smallest, largest)
    lines = [
        line(
            (fitted(group.title, screen.name), f"bold {colour}"),
            " ",
            *((text, colour) for text in bar),
            " ",
            figures(group.sums.values()),
        )
    ]
    names = group.by_name()
    shown = names[:NAMES_SHOWN] if len(names) > NAMES_SHOWN + 1 else names
    for name, part in shown:
        count = f" x {len(part.entries)}" if len(part.entries) > 1 else ""
        room = screen.name + screen.bar + 1
        title = f"  {clipped(name, room - 3 - len(count))}{count}"
        lines.append(line(fitted(title, room + 1), (figures(part.sums.values()), "dim")))
    if len(names) > len(shown):
        lines.append(line((f"  and {len(names) - len(shown)} more", "dim")))
    return lines


def bar_of(group: Group, screen: Screen, smallest: int, largest: int) -> list[str]:
    """Resident, committed and reserved memory over each other, as long as their logarithms."""
    sums, done, pieces = group.sums, 0, []
    for name, shade in zip(("resident", "committed", "reserved"), screen.shades, strict=True):
        end = length(sums[name], smallest, largest, screen.bar)
        pieces.append(shade * max(0, end - done))
        done = max(done, end)
    return [*pieces, " " * (screen.bar - done)]


def length(size: int, smallest: int, largest: int, room: int) -> int:
    """The columns of a size: at least one if it is not 0."""
    if size == 0:
        return 0
    steps = math.log2(max(2, largest / smallest)) + 1
    return max(1, min(room, round(room * (math.log2(max(1, size / smallest)) + 1) / steps)))


def figures(sizes: Iterable[int]) -> str:
    """Sizes in columns."""
    return "".join(f"{human(size) if size else '-':>{SIZE_WIDTH}}" for size in sizes)


def clipped(text: str, room: int) -> str:
    """A text that fits, cut in its middle: names differ at their ends."""
    if len(text) <= room:
        return text
    head = max(0, room // 3 - 1)
    return f"{text[:head]}...{text[len(text) - max(0, room - head - 3) :]}"[: max(room, 0)]


def fitted(text: str, room: int) -> str:
    """A text in exactly so many columns."""
    return clipped(text, room).ljust(room)


# ---- the table ----------------------------------------------------------------------------------


def region_lines(picture: Picture, screen: Screen) -> list[Line]:
    """Every mapping in a line of its own, lowest address first."""
    wide = max((len(f"{entry.mapping.end:x}") for entry in picture.entries), default=12)
    heads = f"{'start':>{wide}} {'end':>{wide}} perm" + "".join(
        f"{head:>{SIZE_WIDTH}}" for head in ("size", "resident", "pss", "swap")
    )
    lines = [*heading(picture, screen)[:-1], line((heads + "  name", "dim"))]
    lines += [region_line(entry, wide) for entry in picture.entries]
    totals = picture.totals
    sums = figures(totals[name] for name in ("reserved", "resident", "pss", "swap"))
    return [*lines, line((f"{'Total':<{wide * 2 + 6}}{sums}", "bold"))]


def region_line(entry: MapEntry, wide: int) -> Line:
    """A mapping."""
    mapping = entry.mapping
    sums = figures((entry.reserved, entry.resident, entry.pss, entry.swapped))
    place = f"{mapping.start:{wide}x} {mapping.end:{wide}x} {mapping.permissions}"
    return line(place, sums, (f"  {name_of(mapping)}", GROUPS[entry.group].on_a_terminal))


# ---- changes ------------------------------------------------------------------------------------


def change_lines(difference: Difference, shown: int | None = CHANGES_SHOWN) -> list[Line]:
    """The changes, the biggest first; all of them if ``shown`` is None."""
    found = [
        *((size_of(each), whole("+ ", "green", each)) for each in difference.appeared),
        *((size_of(each), whole("- ", "red", each)) for each in difference.went),
        *changed(difference),
    ]
    found.sort(key=lambda item: -item[0])
    lines = [line for _, line in (found if shown is None else found[:shown])]
    if len(found) > len(lines):
        lines.append(line((f"  and {len(found) - len(lines)} more", "dim")))
    return lines


def place(mapping: Mapping) -> str:
    """The address and the name of a mapping."""
    return f"{mapping.start:x}-{mapping.end:x} {mapping.permissions}  {name_of(mapping)}"


def whole(mark: str, colour: str, mapping: Mapping) -> Line:
    """A mapping that is new or gone."""
    size = f"{human(size_of(mapping)):>{SIZE_WIDTH}}"
    return line((mark, f"bold {colour}"), f"{size}  {place(mapping)}")


def changed(difference: Difference) -> Iterable[tuple[int, Line]]:
    """The changes in mappings that stayed, with their sizes."""
    for change in difference.changed:
        figures = {
            name: change.figures[name] for name in SHOWN_FIGURES if change.figures.get(name)
        } or change.figures
        grown = {"size": change.grown} if change.grown else {}
        said = [
            f"{name} {'+' if by > 0 else '-'}{human(abs(by))}"
            for name, by in {**grown, **figures}.items()
            if name != "size" or grown
        ]
        if change.before.permissions != change.after.permissions:
            said.insert(0, f"{change.before.permissions} before")
        if not said:
            said = ["its record"]
        most = max((abs(by) for by in (change.grown, *figures.values())), default=0)
        yield (most, line(("~ ", "bold yellow"), f"{', '.join(said)}  {place(change.after)}"))


# ---- printing -----------------------------------------------------------------------------------


def write_plain(lines: Sequence[Line]) -> None:
    """Print lines without styles."""
    sys.stdout.write("".join(f"{line.text}\n" for line in lines))
    sys.stdout.flush()

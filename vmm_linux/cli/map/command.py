"""``vmm-linux map``: a picture of where a process's memory is."""

import argparse
import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from vmm_linux import VMM, Mdl, Region, VmmError, inspect
from vmm_linux._tools.atomic_write import write_whole
from vmm_linux._tools.commands import CannotTryError
from vmm_linux._tools.text import escaped
from vmm_linux.cli.map.file import as_csv, as_json
from vmm_linux.cli.map.model import Picture, take
from vmm_linux.cli.map.page import page_of
from vmm_linux.cli.map.picture import (
    Line,
    Screen,
    change_lines,
    picture_lines,
    region_lines,
    write_plain,
)
from vmm_linux.cli.map.plot import plotted

STANDARD_OUTPUT = "-"
PAUSE = 2.0
"""The default of seconds between two snapshots."""
LONGEST_PAUSE = 86400.0

MIB = 1 << 20

Write = Callable[[Sequence[Line]], None]


# ---- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if the map was shown, 2 if it could not be."""
    made = parser()
    asked = made.parse_args(arguments)
    wanted = {kind: getattr(asked, kind) for kind in WRITERS if getattr(asked, kind) is not None}
    check(made, asked, wanted)
    try:
        with demonstration() if asked.pid is None else contextlib.nullcontext():
            if asked.watch is not None:
                return watch(asked.pid, asked.watch, asked.regions)
            picture = take(asked.pid)
            if wanted:
                deliver(picture, asked.pid, wanted)
            if asked.regions or not wanted:
                printer()(lines_of(picture, asked.regions))
    except (BrokenPipeError, VmmError):
        raise
    except OSError as error:
        place = escaped(str(error.filename or "output"))
        raise CannotTryError(f"{place}: {error.strerror}") from error
    return 0


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    made = argparse.ArgumentParser(
        prog="vmm-linux map",
        usage="%(prog)s [-h] [PID] [--regions] [--watch [SECONDS]]\n"
        "           [--json FILE] [--csv FILE] [--html FILE] [--png FILE] [--svg FILE]",
        description="Show where the memory of a process is: what kind, how much of it is reserved, "
        "committed and resident. Without PID: this very process, with a region and a buffer "
        "of its own to look at. FILE may be - for the standard output.",
    )
    made.add_argument("pid", nargs="?", type=process_id, metavar="PID", help="the process")
    made.add_argument("--regions", action="store_true", help="every mapping, in a table")
    made.add_argument(
        "--watch",
        nargs="?",
        type=pause,
        const=PAUSE,
        metavar="SECONDS",
        help=f"look again every so often ({PAUSE:g}), and tell what changed; until Ctrl-C or until "
        "the process ends",
    )
    made.add_argument("--json", metavar="FILE", help="complete records, for 'vmm-linux diff' too")
    made.add_argument("--csv", metavar="FILE", help="complete records, a line each")
    made.add_argument("--html", metavar="FILE", help="one page with a map to zoom into")
    made.add_argument("--png", metavar="FILE", help="a picture (needs matplotlib)")
    made.add_argument("--svg", metavar="FILE", help="the same as vectors")
    return made


def check(made: argparse.ArgumentParser, asked: argparse.Namespace, wanted: dict[str, str]) -> None:
    """Refuse options that exclude each other."""
    if asked.watch is not None and asked.pid is None:
        made.error("--watch needs a process: vmm-linux map PID --watch [SECONDS]")
    if asked.watch is not None and wanted:
        made.error("--watch writes no files")
    if len(set(wanted.values())) < len(wanted):
        made.error("two outputs to one place")
    if STANDARD_OUTPUT in wanted.values() and asked.regions:
        made.error("two outputs to one place: --regions and -")
    if "" in wanted.values():
        made.error("an empty name of a file")


def process_id(text: str) -> int:
    """A process's id."""
    # int() refuses a number of a thousand digits, which is no process's.
    if not (text.isascii() and text.isdecimal() and len(text) < 100 and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{escaped(text)!r} is no process id, a number above 0")
    return int(text)


def pause(text: str) -> float:
    """Seconds to wait."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST_PAUSE:
        raise argparse.ArgumentTypeError(
            f"{escaped(text)!r} is no number of seconds above 0 and up to {LONGEST_PAUSE:g}"
        )
    return seconds


@contextlib.contextmanager
def demonstration() -> Iterator[tuple[Region, Mdl]]:
    """Make an example to show: 64 GiB reserved, little of it in use, and a buffer."""
    with VMM() as vmm, vmm.region(64 << 30) as region, vmm.mdl(8 * MIB) as mdl, mdl.map() as mapped:
        region.commit(0, 32 * MIB)
        region.view(0, 12 * MIB)[:] = bytes(12 * MIB)
        mapped.view(0, 2 * MIB)[:] = bytes(2 * MIB)
        yield region, mdl


# ---- files --------------------------------------------------------------------------------------


def in_ascii(text: str) -> bytes:
    """Encode a text, with escapes for characters that are not ASCII."""
    return text.encode("utf-8", "backslashreplace")


WRITERS: dict[str, Callable[[Picture, int | None], bytes]] = {
    "json": lambda picture, _: in_ascii(as_json(picture)),
    "csv": lambda picture, _: in_ascii(as_csv(picture)),
    "html": lambda picture, pid: in_ascii(page_of(picture, pid)),
    "png": lambda picture, _: plotted(picture, "png"),
    "svg": lambda picture, _: plotted(picture, "svg"),
}


def deliver(picture: Picture, pid: int | None, wanted: dict[str, str]) -> None:
    """Write each output to its place: all files or none."""
    contents = {place: WRITERS[kind](picture, pid) for kind, place in wanted.items()}
    output = contents.pop(STANDARD_OUTPUT, None)
    write_whole(contents)
    if output is not None:
        sys.stdout.flush()
        sys.stdout.buffer.write(output)
        sys.stdout.buffer.flush()


# ---- the terminal -------------------------------------------------------------------------------


def lines_of(picture: Picture, regions: bool) -> list[Line]:
    """The lines for this terminal."""
    width = shutil.get_terminal_size((100, 24)).columns
    screen = Screen.of(width, sys.stdout.encoding or "ascii")
    return region_lines(picture, screen) if regions else picture_lines(picture, screen)


def printer() -> Write:
    """The function that prints lines: coloured on a terminal where rich is installed."""
    if not sys.stdout.isatty():
        return write_plain
    try:
        from rich.console import Console  # noqa: PLC0415 (needed only here)
        from rich.text import Text  # noqa: PLC0415 (as above)
    except ModuleNotFoundError:
        sys.stderr.write("plain text; for colours: pip install 'vmm-linux[tools]'\n")
        return write_plain
    console = Console(highlight=False, soft_wrap=True)

    def write(lines: Sequence[Line]) -> None:
        for line in lines:
            console.print(Text.assemble(*line.pieces))

    return write


def watch(pid: int, seconds: float, regions: bool) -> int:
    """Show the process, and then its changes, again and again."""
    write = printer()
    before = take(pid)
    write(lines_of(before, regions))
    try:
        while True:
            time.sleep(seconds)
            after = take(pid)
            write(news(before, after, regions))
            before = after
    except (inspect.NoSuchProcess, inspect.ZombieProcess):
        write([Line(((f"The process has ended (PID {pid}).", "bold"),))])
    except KeyboardInterrupt:
        return 0
    return 0


def news(before: Picture, after: Picture, regions: bool) -> list[Line]:
    """The changes between two snapshots; on a terminal, below the whole picture."""
    changes = change_lines(inspect.diff(mappings_of(before), mappings_of(after)))
    totals = ", ".join(
        f"{name} {after.totals[name] - before.totals[name]:+,} B"
        for name in ("reserved", "resident")
        if after.totals[name] != before.totals[name]
    )
    times = f"{after.taken:%H:%M:%S}Z, since {before.taken:%H:%M:%S}Z"
    found = [Line(((f"{times}: {totals or 'no more, no less'}", "bold"),)), *changes]
    if not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return found
    sys.stdout.write("\x1b[H\x1b[2J")
    return [*lines_of(after, regions), Line((("", ""),)), *found]


def mappings_of(picture: Picture) -> list[inspect.Mapping]:
    """The records behind a picture."""
    return [entry.mapping for entry in picture.entries]

"""The map as one self-contained page of HTML."""

import html
import json
from importlib import resources
from typing import Any

from vmm_linux import inspect
from vmm_linux._core.kernel import Feature, available
from vmm_linux._core.values import counted
from vmm_linux._tools.text import escaped, human
from vmm_linux.cli.map.model import MapEntry, Picture, name_of
from vmm_linux.errors import VmmError
from vmm_linux.inspect import Mapping, PageFlags

LOOKED_AT_MOST = 64 << 30
"""The most that is read page by page, in bytes: of memory where the kernel skips empty addresses
(PAGEMAP_SCAN skips terabytes in microseconds), else of addresses."""
PIECE = 1 << 30
"""Addresses in the first scan, in bytes; a scan that finds little doubles the next one."""
LITTLE = 1000
RUNS_AT_MOST = 200_000
"""Runs of like pages in the page, at most."""

PRESENT, SWAPPED, SHARED, HUGE, GUARD = (1 << bit for bit in range(5))
"""The bits of the page's own flags."""
FIXED_TEXT = ("permissions", "offset", "device", "inode", "pathname")
NO_SIZES = ("thp_eligible", "protection_key")
"""Figures that are no sizes."""

Runs = list[tuple[int, int, int]]


def page_of(picture: Picture, pid: int | None) -> str:
    """The page with all its data; its own policy forbids it to load anything.

    If the process has ended, or is unreadable, the result lacks its pages. ``pid`` None is this
    process.
    """
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    data = json.dumps(data_of(picture, pid), separators=(",", ":"))
    # In a script element nothing but "</script" and "<!--" means anything.
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    before, rest = template.split("@TITLE@")
    between, after = rest.split("@DATA@")
    return f"{before}{html.escape(f'Memory of {picture.title}')}{between}{data}{after}"


def data_of(picture: Picture, pid: int | None) -> dict[str, Any]:
    """The data of the page. Addresses are page numbers, which are exact in JavaScript."""
    groups = picture.groups
    index = {group.key: number for number, group in enumerate(groups)}
    names = list(dict.fromkeys(name for entry in picture.entries for name in entry.mapping.figures))
    fixed = list(FIXED_TEXT)
    strips, scanned = strips_of(picture, pid)
    return {
        "title": f"Memory of {picture.title}",
        "taken": f"{picture.taken:%Y-%m-%d %H:%M:%S} UTC",
        "command": escaped(picture.command)[:300],
        "page_size": picture.page_size,
        "totals": picture.totals,
        "scanned": scanned,
        "fields": [*fixed, *names, "vm_flags", "region"],
        "in_bytes": [name for name in names if name not in NO_SIZES],
        "groups": [{"key": each.key, "name": each.title, **each.as_object()} for each in groups],
        "mappings": [
            mapping_of(entry, index[entry.group], [*fixed, *names], strip, picture.page_size)
            for entry, strip in zip(picture.entries, strips, strict=True)
        ],
    }


def mapping_of(
    entry: MapEntry, group: int, names: list[str], strip: Runs | None, page: int
) -> dict[str, Any]:
    """A mapping with its record as a row, with printable texts."""
    mapping = entry.mapping
    name = name_of(mapping)
    found = {**mapping.figures, **{field: getattr(mapping, field) for field in FIXED_TEXT}}
    values = map(found.get, names)
    record = [escaped(value) if isinstance(value, str) else value for value in values]
    return {
        "start": mapping.start // page,
        "end": mapping.end // page,
        "group": group,
        "name": name,
        "label": name.rsplit("/", 1)[-1] if entry.group in {"libraries", "files"} else name,
        "size": entry.reserved,
        "committed": entry.committed,
        "resident": entry.resident,
        "record": [*record, " ".join(sorted(mapping.vm_flags or ())), region_words(mapping)],
        "pages": strip,
    }


def region_words(mapping: Mapping) -> str:
    """The region of a mapping, in a few words."""
    region = mapping.region
    if region is None:
        return ""
    return f"{region.state.name}, {region.protection.name or 'no access'}"


def strips_of(picture: Picture, pid: int | None) -> tuple[list[Runs | None], str]:
    """Runs of present pages of every mapping, and a text about them.

    Mappings without resident or swapped memory are skipped. Of the rest, those with the most memory
    are scanned first, up to the limits; None where none was scanned.
    """
    strips: list[Runs | None] = []
    for entry in picture.entries:
        # Guards have no memory, but are shown.
        may_be_guards = "gu" in (entry.mapping.whole.vm_flags or ())
        strips.append(None if entry.resident + entry.swapped or may_be_guards else [])
    wanted = [number for number, strip in enumerate(strips) if strip is None]
    wanted.sort(key=lambda number: picture.entries[number].weight, reverse=True)
    budget = Budget()
    try:
        for number in wanted:
            strips[number] = budget.scan(picture.entries[number], pid, picture.page_size)
    except (VmmError, OSError) as error:
        return strips, f"not all looked at: {escaped(str(error))}"
    missed = sum(strip is None for strip in strips)
    if missed:
        return strips, (
            f"the {counted(len(strips) - missed, 'mapping')} with the most memory "
            f"({missed} left out: at most {human(LOOKED_AT_MOST)} and {RUNS_AT_MOST} runs are "
            "looked at)"
        )
    return strips, "all looked at"


class Budget:
    """The rest of the scan limits."""

    def __init__(self) -> None:
        self.bytes = LOOKED_AT_MOST
        self.runs = RUNS_AT_MOST
        self.skips = available(Feature.PAGEMAP_SCAN)

    def scan(self, entry: MapEntry, pid: int | None, page: int) -> Runs | None:
        """The runs of a mapping; None if that would exceed the limits."""
        self.bytes -= entry.resident + entry.swapped if self.skips else entry.reserved
        if self.bytes < 0:
            return None
        found: Runs = []
        at, piece, start = entry.mapping.start, PIECE, entry.mapping.start
        while at < entry.mapping.end:
            size = min(piece, entry.mapping.end - at)
            runs = inspect.pages(at, size, pid, exclusive=True)
            for run in runs:
                if flags := flags_of(run.flags):
                    count = (run.end - run.start) // page
                    found.append(((run.start - start) // page, count, flags))
            if len(found) > self.runs:
                return None
            piece = piece * 2 if self.skips and len(runs) < LITTLE else PIECE
            at += size
        self.runs -= len(found)
        return found


def flags_of(flags: PageFlags) -> int:
    """The page's own flags for the kernel's; 0 for a page that is not there."""
    if flags & PageFlags.GUARD:
        return GUARD
    if flags & PageFlags.SWAPPED:
        return SWAPPED
    if not flags & PageFlags.PRESENT:
        return 0
    shared = 0 if flags & PageFlags.EXCLUSIVE else SHARED
    return PRESENT | shared | (HUGE if flags & PageFlags.HUGE else 0)

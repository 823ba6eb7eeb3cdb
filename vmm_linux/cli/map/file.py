"""Maps in files: JSON, which can be loaded again, and CSV."""

import csv
import io
import json
import re
from collections.abc import Callable
from collections.abc import Mapping as Object
from enum import IntEnum, IntFlag
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

from vmm_linux._core.mapping_dict import NUMBER, is_number
from vmm_linux._tools.commands import CannotTryError
from vmm_linux._tools.text import escaped
from vmm_linux.cli.map.model import MapEntry, Picture
from vmm_linux.flags import VmmFlags
from vmm_linux.inspect import Mapping, Snapshot
from vmm_linux.states import PageKind, PageState

FORMAT = "vmm-linux map"
VERSION = 1
PLACE = ("start", "end", "permissions", "offset", "device", "inode", "pathname", "deleted")
FIXED = (*PLACE, "group", "region", "cut_from", "vm_flags", "committed", "resident")
"""The parts of a record that are no figures."""

T = TypeVar("T")
Reader = Callable[[object, str], T]
"""Checks a value, and returns it; the text is its place."""


# ---- written ------------------------------------------------------------------------------------


def record_of(mapping: Mapping, group: str | None) -> dict[str, Any]:
    """A record for JSON: every figure under its own name, in bytes.

    The kernel reports figures only for its own mappings: a part of one has few, and ``cut_from`` is
    the record of the whole.
    """
    region, whole = mapping.region, mapping.whole
    figures = {name: value for name, value in mapping.figures.items() if name not in FIXED}
    return {
        **{name: getattr(mapping, name) for name in PLACE},
        "group": group,
        "region": region
        and {
            "base": region.base,
            "size": region.size,
            "state": region.state.name,
            "kind": region.kind.name,
            "flags": region.flags.name or "",
            "protection": region.protection.name or "",
            "sid": region.sid,
        },
        "cut_from": None if whole is mapping else record_of(whole, None),
        "vm_flags": None if mapping.vm_flags is None else sorted(mapping.vm_flags),
        **figures,
    }


def record_of_entry(entry: MapEntry) -> dict[str, Any]:
    """A record with the counts of parts too: bytes committed and resident."""
    record = record_of(entry.mapping, entry.group)
    return {**record, "committed": entry.committed, "resident": entry.resident}


def as_json(picture: Picture) -> str:
    """The whole map as one JSON object, in ASCII.

    A byte of a name that is no UTF-8 is the escape of a lone surrogate, as in Python.
    """
    head = {
        "format": FORMAT,
        "version": VERSION,
        "pid": picture.pid,
        "program": picture.program,
        "command": picture.command,
        "taken": picture.taken.isoformat(timespec="milliseconds"),
        "page_size": picture.page_size,
        "totals": picture.totals,
        "groups": [{"group": group.key, **group.as_object()} for group in picture.groups],
    }
    # A mapping is a line: half the size of one member a line, and other programs can compare it.
    lines = ",\n".join(json.dumps(record_of_entry(entry)) for entry in picture.entries)
    return f'{json.dumps(head, indent=1)[:-2]},\n "mappings": [\n{lines}\n]}}\n'


def as_csv(picture: Picture) -> str:
    """Every mapping in a line, under a line with the names.

    Names have escapes for unprintable characters, so that they contain no line ends.
    """
    records = [flat(entry) for entry in picture.entries]
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or FIXED, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def flat(entry: MapEntry) -> dict[str, str | int]:
    """The cells of a record."""
    record = record_of_entry(entry)
    region, cut, flags = record.pop("region"), record.pop("cut_from"), record.pop("vm_flags")
    record["pathname"] = escaped(record["pathname"] or "")
    record["vm_flags"] = " ".join(flags or ())
    record["region_base"] = region["base"] if region else ""
    record["region_state"] = region["state"] if region else ""
    record["cut_from_start"] = cut["start"] if cut else ""
    record["cut_from_end"] = cut["end"] if cut else ""
    return record


# ---- read ---------------------------------------------------------------------------------------


class UnfitMapError(Exception):
    """A file is no map; the message has the place and the reason, without the file's name."""


class Saved(Snapshot):
    """A map from a file; ``taken`` is its time, as the file has it."""

    def __init__(self, pid: int, taken: str, mappings: list[Mapping]) -> None:
        super().__init__(pid, mappings)
        self.taken = taken


def load(path: str) -> Saved:
    """Read a file of ``map --json``.

    Errors:
        CannotTryError: it is unreadable, no JSON, or no such map.
    """
    try:
        return map_of(parsed(path))
    except UnfitMapError as error:
        raise CannotTryError(f"{escaped(path)} {error}") from error


def map_of(found: object) -> Saved:
    """The map in the JSON of a file."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UnfitMapError(f"is JSON, but no map: 'format' is not {FORMAT!r}")
    if found.get("version") != VERSION:
        version = json.dumps(found.get("version"))[:40]
        raise UnfitMapError(f"is a map of version {version}; this program reads {VERSION}")
    pid = member(found, "pid", "", number)
    taken = member(found, "taken", "", text)
    rows = member(found, "mappings", "", listed)
    mappings: list[Mapping] = []
    for index, row in enumerate(rows):
        where = f"mappings[{index}]"
        mapping = read_record(row, where)
        if mappings and mapping.start < mappings[-1].end:
            refuse(f"{where}.start", "an address above the mapping before it", mapping.start)
        mappings.append(mapping)
    return Saved(pid, taken, mappings)


def parsed(path: str) -> object:
    """The contents of a JSON file."""
    if not path:
        raise UnfitMapError("is no name of a file")
    try:
        content = Path(path).read_bytes().decode()
        return json.loads(content)
    except OSError as error:
        raise UnfitMapError(f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnfitMapError(f"is no JSON: byte {error.start} is no UTF-8") from error
    except json.JSONDecodeError as error:
        raise UnfitMapError(
            f"is no JSON: line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except (RecursionError, ValueError) as error:
        raise UnfitMapError(f"is no JSON that can be read: {error}") from error


def refuse(where: str, wanted: str, found: object) -> NoReturn:
    """Raise the error for a wrong value."""
    shown = json.dumps(found)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise UnfitMapError(f"is no map: {where}: {shown} is not {wanted}")


def optional(kind: Reader[T]) -> Reader[T | None]:
    """A reader of what may be null."""
    return lambda value, where: None if value is None else kind(value, where)


def plain(kind: type[T], wanted: str) -> Reader[T]:
    """A reader of values of exactly this class."""

    def check(value: object, where: str) -> T:
        if type(value) is not kind:
            refuse(where, wanted, value)
        return value

    return check


text = plain(str, "a text")
listed = plain(list, "a list")
truth = plain(bool, "true or false")


def number(value: object, where: str) -> int:
    """An unsigned whole number of 64 bits."""
    if not is_number(value):
        refuse(where, NUMBER, value)
    return cast("int", value)


def member(row: object, name: str, where: str, kind: Reader[T]) -> T:
    """A member of an object."""
    place = f"{where}.{name}" if where else name
    if not isinstance(row, Object):
        refuse(where, "an object", row)
    if name not in row:
        raise UnfitMapError(f"is no map: {place} is missing")
    return kind(row[name], place)


def read_record(row: object, where: str) -> Mapping:
    """A mapping of a file."""
    values: dict[str, Any] = {name: member(row, name, where, number) for name in NUMBERS}
    if values["start"] >= values["end"]:
        refuse(f"{where}.end", f"above the start, {values['start']}", values["end"])
    member(row, "deleted", where, truth)  # which the name says too
    values |= {name: member(row, name, where, kind) for name, kind in PARTS.items()}
    values["figures"] = figures_of(row, where)
    values["whole"] = member(row, "cut_from", where, optional(read_whole))
    try:
        return Mapping.from_dict(values)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UnfitMapError(f"is no map: {where}: {escaped(str(error))}") from error


def read_whole(row: object, where: str) -> dict[str, Any]:
    """The whole mapping of a part, which is no part itself."""
    member(row, "cut_from", where, null)
    return read_record(row, where).as_dict()


def null(value: object, where: str) -> None:
    """Nothing, in place of a record."""
    if value is not None:
        refuse(where, "null", "a record")


def matching(pattern: str, wanted: str) -> Reader[str]:
    """A reader of texts that match a pattern."""

    def check(value: object, where: str) -> str:
        if not re.fullmatch(pattern, text(value, where)):
            refuse(where, wanted, value)
        return text(value, where)

    return check


FLAG = matching(r"[ -~]{2}", "a flag of two letters")


def flags_of(value: object, where: str) -> list[str]:
    """The kernel's flags."""
    return [FLAG(flag, f"{where}[{index}]") for index, flag in enumerate(listed(value, where))]


def figures_of(row: object, where: str) -> dict[str, int]:
    """All other members: figures, those of newer kernels too."""
    figures = {}
    for name, value in row.items() if isinstance(row, Object) else ():
        if name in FIXED or value is None:
            continue
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UnfitMapError(f"is no map: {where}: {json.dumps(name)[:60]} is no figure's name")
        figures[name] = number(value, f"{where}.{name}")
    return figures


def region_of(value: object, where: str) -> dict[str, int | None]:
    """The region in numbers."""
    return {name: member(value, name, where, kind) for name, kind in REGION.items()}


def named(kind: type[IntEnum | IntFlag]) -> Reader[int]:
    """A reader of names of an enumeration's members, with | between them."""

    def check(value: object, where: str) -> int:
        total = 0
        for name in filter(None, text(value, where).split("|")):
            if name not in kind.__members__:
                refuse(where, f"a {kind.__name__}", value)
            total |= kind[name]
        return total

    return check


NUMBERS = ("start", "end", "offset", "inode")
PARTS: dict[str, Reader[object]] = {
    "permissions": matching(r"[r-][w-][x-][sp]", "permissions as 'rw-p'"),
    "device": matching(r"[0-9a-f]{2,8}:[0-9a-f]{2,8}", "a device as '08:01'"),
    "pathname": optional(text),
    "vm_flags": optional(flags_of),
    "region": optional(region_of),
}
"""The parts of a record that are neither numbers nor figures."""
REGION: dict[str, Reader[int | None]] = {
    "base": number,
    "size": number,
    "state": named(PageState),
    "kind": named(PageKind),
    "flags": named(VmmFlags),
    "protection": named(VmmFlags),
    "sid": optional(number),
}
"""The parts of a region."""

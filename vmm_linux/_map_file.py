"""Maps in files: JSON that can be read again, and CSV."""

import csv
import io
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vmm_linux._map_model import Entry, Picture, escaped
from vmm_linux._smaps import parse_smaps
from vmm_linux.inspect import Mapping as MappingOfMemory
from vmm_linux.inspect import Snapshot

__all__ = ["Saved", "UnfitMapError", "as_csv", "as_json", "load", "record_of"]

FORMAT = "vmm-linux map"
VERSION = 1
#: What a record has beside figures.
FIXED = (
    "start",
    "end",
    "permissions",
    "offset",
    "device",
    "inode",
    "pathname",
    "deleted",
    "group",
    "region",
    "cut_from",
    "vm_flags",
)
#: Names go into the kernel's text as they came out of it.
AS_IN_NAMES = ("utf-8", "surrogateescape")
#: Labels of which snake case does not tell the capitals.
LABELS = {
    "kernel_page_size": "KernelPageSize",
    "mmu_page_size": "MMUPageSize",
    "pss_dirty": "Pss_Dirty",
    "shared_clean": "Shared_Clean",
    "shared_dirty": "Shared_Dirty",
    "private_clean": "Private_Clean",
    "private_dirty": "Private_Dirty",
    "ksm": "KSM",
    "lazy_free": "LazyFree",
    "anon_huge_pages": "AnonHugePages",
    "shmem_pmd_mapped": "ShmemPmdMapped",
    "file_pmd_mapped": "FilePmdMapped",
    "shared_hugetlb": "Shared_Hugetlb",
    "private_hugetlb": "Private_Hugetlb",
    "swap_pss": "SwapPss",
}
#: Figures that are no sizes.
PLAIN = {"thp_eligible": "THPeligible", "protection_key": "ProtectionKey"}
END_OF_ADDRESSES = 1 << 64

T = TypeVar("T")


# ---- written ------------------------------------------------------------------------------------


def record_of(mapping: MappingOfMemory, group: str | None) -> dict[str, Any]:
    """A record as JSON has it: every figure under its own name, in bytes.

    The figures of a part of a mapping are the whole mapping's; ``cut_from`` tells its borders.
    """
    region, whole = mapping.region, mapping.whole
    return {
        "start": mapping.start,
        "end": mapping.end,
        "permissions": mapping.permissions,
        "offset": mapping.offset,
        "device": mapping.device,
        "inode": mapping.inode,
        "pathname": mapping.pathname,
        "deleted": mapping.deleted,
        "group": group,
        "region": None
        if region is None
        else {
            "base": region.base,
            "size": region.size,
            "state": region.state.name,
            "kind": region.kind.name,
            "flags": region.flags.name or "0",
            "protection": region.protection.name or "0",
            "sid": region.sid,
        },
        "cut_from": None if whole is mapping else {"start": whole.start, "end": whole.end},
        "vm_flags": None if mapping.vm_flags is None else sorted(mapping.vm_flags),
        **{name: value for name, value in mapping.figures.items() if name not in FIXED},
    }


def as_json(picture: Picture) -> str:
    """The whole map as one JSON object, in ASCII.

    A byte of a name that is no UTF-8 is the escape of a lone surrogate, as Python has it.
    """
    return (
        json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "pid": picture.pid,
                "program": picture.program,
                "command": picture.command,
                "taken": picture.taken.isoformat(timespec="milliseconds"),
                "page_size": picture.page_size,
                "totals": picture.totals,
                "groups": [
                    {
                        "group": group.key,
                        "mappings": len(group.entries),
                        "reserved": group.reserved,
                        "committed": group.committed,
                        "resident": group.resident,
                        "pss": group.pss,
                    }
                    for group in picture.groups
                ],
                "mappings": [record_of(entry.mapping, entry.group) for entry in picture.entries],
            },
            indent=1,
        )
        + "\n"
    )


def as_csv(picture: Picture) -> str:
    """Every mapping in a line, with the names of its figures in the first.

    Names are written with escapes for what cannot be shown, so that a line is a line.
    """
    records = [flat(entry) for entry in picture.entries]
    columns = list(dict.fromkeys(name for record in records for name in record))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns or FIXED, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def flat(entry: Entry) -> dict[str, str | int]:
    """A record in cells."""
    record = record_of(entry.mapping, entry.group)
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
    """A file is no map; the message says where and why, and goes on where its name ends."""


class Saved(Snapshot):
    """A map that was read from a file.

    Attributes:
        pid: the process.
        taken: when, as the file says it.
    """

    def __init__(self, pid: int, taken: str, mappings: list[MappingOfMemory]) -> None:
        super().__init__(pid, mappings)
        self.taken = taken


def load(path: str) -> Saved:
    """Read what ``map --json`` wrote.

    Errors:
        UnfitMapError: it cannot be read, is no JSON, or is not such a map.
    """
    found = parsed(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UnfitMapError(f"is JSON, but no map: 'format' is not {FORMAT!r}")
    if found.get("version") != VERSION:
        version = json.dumps(found.get("version"))[:40]
        raise UnfitMapError(f"is a map of version {version}; this program reads {VERSION}")
    pid = member(found, "pid", "", number)
    taken = member(found, "taken", "", text)
    rows = member(found, "mappings", "", listed)
    mappings: list[MappingOfMemory] = []
    for index, row in enumerate(rows):
        where = f"mappings[{index}]"
        mapping = read_record(row, where)
        if mappings and mapping.start < mappings[-1].end:
            refuse(f"{where}.start", "an address above the mapping before it", mapping.start)
        mappings.append(mapping)
    return Saved(pid, taken, mappings)


def parsed(path: str) -> object:
    """What the JSON of a file says."""
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
    """Say what was wrong."""
    shown = json.dumps(found)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    raise UnfitMapError(f"is no map: {where}: {shown} is not {wanted}")


def number(value: object, where: str) -> int:
    """A whole number of 64 bits without a sign."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < END_OF_ADDRESSES:
        refuse(where, "a whole number from 0 to 2^64 - 1", value)
    return value


def text(value: object, where: str) -> str:
    """A text."""
    if not isinstance(value, str):
        refuse(where, "a text", value)
    return value


def listed(value: object, where: str) -> list[object]:
    """A list."""
    if not isinstance(value, list):
        refuse(where, "a list", value)
    return value


def member(row: object, name: str, where: str, kind: Callable[[object, str], T]) -> T:
    """A member of an object."""
    place = f"{where}.{name}" if where else name
    if not isinstance(row, Mapping):
        refuse(where, "an object", row)
    if name not in row:
        raise UnfitMapError(f"is no map: {place} is missing")
    return kind(row[name], place)


def optional_text(value: object, where: str) -> str:
    """A text; null is none."""
    return "" if value is None else text(value, where)


def truth(value: object, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        refuse(where, "true or false", value)
    return value


def read_record(row: object, where: str) -> MappingOfMemory:
    """A mapping of a file: written as the kernel writes it, it is read by the parser for that."""
    start, end, offset, inode = (
        member(row, name, where, number) for name in ("start", "end", "offset", "inode")
    )
    if start >= end:
        refuse(f"{where}.end", f"above the start, {start}", end)
    name = member(row, "pathname", where, optional_text)
    member(row, "deleted", where, truth)  # which the name says too
    head = (
        f"{start:x}-{end:x} {member(row, 'permissions', where, text)} {offset:08x} "
        f"{member(row, 'device', where, text)} {inode} {name}"
    )
    if "\0" in head:
        refuse(f"{where}.pathname", "a name without NUL", name)
    lines = [head.replace("\n", "\\012"), *figure_lines(row, where)]
    flags = row.get("vm_flags") if isinstance(row, Mapping) else None
    if flags is not None:
        names = [text(flag, f"{where}.vm_flags") for flag in listed(flags, f"{where}.vm_flags")]
        lines.append(" ".join(["VmFlags:", *names]))
    try:
        (record,) = parse_smaps("".join(f"{line}\n" for line in lines).encode(*AS_IN_NAMES))
    except ValueError as error:
        raise UnfitMapError(f"is no map: {where}: {escaped(str(error))}") from error
    return MappingOfMemory(record)


def figure_lines(row: object, where: str) -> list[str]:
    """The figures of a record as lines of smaps."""
    lines = []
    for name, value in row.items() if isinstance(row, Mapping) else ():
        if name in FIXED:
            continue
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UnfitMapError(f"is no map: {where}: {json.dumps(name)[:60]} is no figure's name")
        size = number(value, f"{where}.{name}")
        if name in PLAIN:
            lines.append(f"{PLAIN[name]}: {size}")
        elif size % 1024:
            refuse(f"{where}.{name}", "a multiple of 1024, as sizes of the kernel are", size)
        else:
            lines.append(f"{LABELS.get(name, name.capitalize())}: {size // 1024} kB")
    return lines

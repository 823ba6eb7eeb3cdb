"""``vmm-linux query``: the page and the mapping at an address of a process."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from vmm_linux import inspect
from vmm_linux._tools.text import escaped, human
from vmm_linux.cli.map.command import demonstration, process_id
from vmm_linux.cli.map.file import record_of
from vmm_linux.cli.map.model import name_of
from vmm_linux.inspect import Mapping, PageFlags

END_OF_ADDRESSES = 1 << 64
"""The end of the address range: numbers from here on are no addresses."""


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if the process could be read, 2 if not."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux query",
        usage="%(prog)s [-h] [--json] [PID] ADDRESS",
        description="Tell what lies at an address: the page and the record of its mapping. ADDRESS "
        "is a number as Python writes it: 0x7f..., 0o17..., 0b1..., or decimal. Without PID: of a "
        "process of this command's own, as 'vmm-linux map' shows it.",
    )
    parser.add_argument("numbers", nargs="+", metavar="[PID] ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    asked = parser.parse_args(arguments)
    if len(asked.numbers) > 2:
        parser.error(f"unrecognized arguments: {' '.join(map(escaped, asked.numbers[2:]))}")
    try:
        va = address(asked.numbers[-1])
        pid = process_id(asked.numbers[0]) if len(asked.numbers) == 2 else None
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    with demonstration() if pid is None else contextlib.nullcontext():
        answer = page_at(va, pid)
    shown = json.dumps(answer, indent=1) if asked.json else "\n".join(lines_of(answer))
    sys.stdout.write(shown + "\n")
    return 0


def address(text: str) -> int:
    """An address in any base."""
    try:
        value = int(text, 0)
    except ValueError:
        value = -1
    if not 0 <= value < END_OF_ADDRESSES:
        raise argparse.ArgumentTypeError(
            f"{escaped(text)!r} is no address: a number from 0 to 2^64 - 1, as 0x7f0000001000 "
            "or decimal"
        )
    return value


def page_at(va: int, pid: int | None) -> dict[str, Any]:
    """The page that includes an address, and its mapping with its whole record, or the hole."""
    page_size = os.sysconf("SC_PAGE_SIZE")
    page = va // page_size * page_size
    snapshot = inspect.snapshot(pid)
    answer: dict[str, Any] = {
        "pid": snapshot.pid,
        "address": va,
        "page": page,
        "page_flags": None,
        "name": None,
        "mapping": None,
        "hole": None,
    }
    found = snapshot.at(va)
    if found is None:
        answer["hole"] = hole(snapshot, va)
        return answer
    answer["name"] = name_of(found)
    answer["mapping"] = record_of(found, None)
    if found.end <= 1 << 63:  # pagemap lacks the kernel's own pages, which are above
        flags = inspect.pages(page, page_size, pid, exclusive=True)[0].flags
        answer["page_flags"] = [
            each.name.lower() for each in PageFlags if each.name and each in flags
        ]
    return answer


def hole(mappings: Sequence[Mapping], va: int) -> dict[str, int]:
    """The boundaries of the free range around an address."""
    before = (each.end for each in mappings if each.end <= va)
    after = (each.start for each in mappings if each.start > va)
    return {"start": max(before, default=0), "end": min(after, default=END_OF_ADDRESSES)}


def lines_of(answer: dict[str, Any]) -> list[str]:
    """The answer in lines."""
    lines = [f"{answer['address']:#x} of PID {answer['pid']}"]
    if answer["hole"] is not None:
        start, end = answer["hole"].values()
        free = f"free: nothing is mapped from {start:#x} to {end:#x}, {human(end - start)}"
        return [*lines, free]
    record, flags = answer["mapping"], answer["page_flags"]
    if flags is not None:
        lines.append(f"page     {', '.join(flags).replace('_', ' ') or 'nothing there yet'}")
    lines.append(f"mapping  {record['start']:x}-{record['end']:x} {record['permissions']}")
    lines.append(f"name     {answer['name']}")
    region = record["region"]
    if region is not None:
        lines.append(
            f"region   {region['state']}, {region['kind']}, {human(region['size'])} from "
            f"{region['base']:#x}, {region['protection']}"
        )
    lines.append(
        f"file     device {record['device']}, inode {record['inode']}, offset {record['offset']:#x}"
    )
    for name, value in record.items():
        if isinstance(value, int) and name not in NO_FIGURES:
            lines.append(f"  {name:<18} {value if name in PLAIN else human(value)}")
    lines.append(f"  {'vm_flags':<18} {' '.join(record['vm_flags'] or ())}")
    return lines


NO_FIGURES = {"start", "end", "offset", "inode", "deleted"}
"""Numbers that are shown elsewhere, and figures that are no sizes."""
PLAIN = {"thp_eligible", "protection_key"}

"""``vmm-linux sharing``: the memory that processes of this machine share."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from vmm_linux._core.values import counted
from vmm_linux._tools.tables import Table, choose_printer, print_line
from vmm_linux._tools.text import human
from vmm_linux.inspect import Channel, Mapper, Sharing, sharing

COLUMNS = ("memory", "size", "taken", "seals", "process", "holds", "maps")
NAMED = 20
"""The most unreadable processes that are named."""


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if it could look, 2 if not. Unreadable processes are named."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux sharing",
        description="Find the memory that processes of this machine share: memfds, files of "
        "/dev/shm and of other tmpfs, System V segments, shared anonymous memory, deleted files "
        "mapped shared. Who holds a descriptor of it, with which access; who maps it, with which "
        "protection. Nothing is changed. Processes that may not be read are counted.",
    )
    every = "also what only one process has, or none"
    parser.add_argument("--all", action="store_true", help=every)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked = parser.parse_args(arguments)
    found = sharing(all=asked.all)
    if asked.json:
        print_line(json.dumps(as_object(found), indent=2))
    else:
        show(found)
    return 0


def as_object(found: Sharing) -> dict[str, object]:
    """The channels for JSON."""
    channels = [{**asdict(each), "processes": each.processes} for each in found.channels]
    return {**asdict(found), "channels": channels}


def show(found: Sharing) -> None:
    """Print a table, and the unreadable processes."""
    rows = [row for channel in found.channels for row in rows_of(channel)]
    if rows:
        choose_printer()(Table("Memory that processes share", COLUMNS, rows))
    was = "was" if found.read == 1 else "were"
    read = counted(found.read, "process", "processes")
    print_line(f"Channels: {len(found.channels)}, in {read} that {was} read.")
    if found.unread:
        named = ", ".join(str(each.pid) for each in found.unread[:NAMED])
        more = ", ..." if len(found.unread) > NAMED else ""
        unread = counted(len(found.unread), "process", "processes")
        print_line(f"NOT to be read, and may have others: {unread} ({named}{more})")


def rows_of(channel: Channel) -> Iterator[tuple[str, ...]]:
    """A row for each process, the first with the description of the channel."""
    about = (
        f"{channel.kind} {channel.name}{' (deleted)' if channel.deleted else ''}".rstrip()
        + f" [{channel.device} {channel.inode}]",
        human(channel.size),
        "" if channel.resident is None else human(channel.resident),
        " ".join(seal.removeprefix("F_SEAL_") for seal in channel.seals or ()),
    )
    ends: dict[int, tuple[str, list[str], list[str]]] = {}
    for holder in channel.holders:
        held = f"{holder.access} fd {' '.join(map(str, holder.descriptors))}"
        ends.setdefault(holder.pid, (holder.name, [], []))[1].append(held)
    for mapper in channel.mappers:
        ends.setdefault(mapper.pid, (mapper.name, [], []))[2].append(mapped(mapper))
    unseen = channel.attached is not None and not channel.mappers
    if unseen or not ends:
        count = channel.attached or 0
        yield (*about, "", "", f"attached {counted(count, 'time')}" if unseen else "")
        about = ("", "", "", "")
    for pid, (name, holds, maps) in sorted(ends.items()):
        yield (*about, f"{pid} {name}", ", ".join(holds), ", ".join(maps))
        about = ("", "", "", "")


def mapped(mapper: Mapper) -> str:
    """Mappings in a few words."""
    could = " (may write)" if mapper.may_write and "w" not in mapper.permissions else ""
    return f"{mapper.permissions}{could} {human(mapper.size)}"

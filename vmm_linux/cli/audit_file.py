"""Reads audit files without trust: records, and lines that are none."""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, Final, NamedTuple

from vmm_linux._core.endpoint import START

LONGEST_LINE: Final = 4 << 20
"""Bytes; the longest parts are a policy's names, from a file of at most 1 MiB."""
NUMBER: Final = (int,)
NUMBER_OR_NONE: Final = (int, type(None))
TEXT_OR_NONE: Final = (str, type(None))
TYPES: Final = {
    "v": NUMBER,
    "event": (str,),
    "time": NUMBER,
    "duration": NUMBER,
    "pid": NUMBER,
    "thread": NUMBER,
    "call": NUMBER,
    "method": (str,),
    "arguments": (dict, type(None)),
    "decision": TEXT_OR_NONE,
    "rule": TEXT_OR_NONE,
    "rc": TEXT_OR_NONE,
    "error": TEXT_OR_NONE,
    "result": NUMBER_OR_NONE,
    "sid": NUMBER_OR_NONE,
    "origin_sid": NUMBER_OR_NONE,
    "peer": (list, type(None)),
}
"""The members of a line, and their types."""
LEAVING: Final = frozenset(("send_handle", "handle_fileno"))
"""These count at their begin; all others at their end."""


class AuditLine(NamedTuple):
    """A line with a record: its place and contents."""

    file: str
    line: int
    record: dict[str, Any]

    @property
    def moment(self) -> int:
        """Its time for the order: sending is before receiving."""
        record = self.record
        leaving = record["method"] in LEAVING
        return int(record["time"] + (0 if leaving else record["duration"]))


class Problem(NamedTuple):
    """A line without a record, and whether its writer was killed during the write."""

    file: str
    line: int
    reason: str
    killed: bool


def read(paths: Iterable[str], sid: int | None = None) -> tuple[list[AuditLine], list[Problem]]:
    """The calls in the files, in the order of time.

    A call with its end in a file appears once. With a ``sid``, only calls with this buffer, itself
    or as an origin.

    Errors:
        OSError: a file cannot be read.
    """
    entries: list[AuditLine] = []
    problems: list[Problem] = []
    for path in dict.fromkeys(paths):
        for found in lines_of(path):
            if isinstance(found, AuditLine):
                if sid is None or sid in (found.record["sid"], found.record["origin_sid"]):
                    entries.append(found)
            else:
                problems.append(found)
    ended = {key_of(entry) for entry in entries if entry.record["event"] == "end"}
    calls = [
        entry for entry in entries if entry.record["event"] == "end" or key_of(entry) not in ended
    ]
    return sorted(calls, key=lambda entry: entry.moment), problems


def key_of(entry: AuditLine) -> tuple[int, int, int]:
    """The key of a call, which its two lines share."""
    return entry.record["pid"], entry.record["call"], entry.record["time"]


def lines_of(path: str) -> Iterator[AuditLine | Problem]:
    """The record or the problem of each line."""
    with Path(path).open("rb") as file:
        for number in count(1):
            line = file.readline(LONGEST_LINE)
            if not line:
                return
            whole = line.endswith(b"\n")
            if not whole and len(line) == LONGEST_LINE:
                yield Problem(path, number, f"longer than {LONGEST_LINE} bytes", killed=False)
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_LINE)
                continue
            if not line.strip():
                continue
            record, reason = parsed(line)
            if record is None:
                yield Problem(
                    path, number, reason if whole else "half a line, the last one", not whole
                )
                # What another process wrote behind half a line is whole.
                start = line.rfind(START.encode())
                record = parsed(line[start:])[0] if start > 0 else None
            if record is not None:
                yield AuditLine(path, number, record)


def parsed(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """The record in a line, or the reason why there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None, "no JSON"
    if not isinstance(record, dict):
        return None, "no object"
    reason = flaw_of(record)
    return (None, reason) if reason else (record, "")


def is_peer(peer: list[Any]) -> bool:
    """Whether these are a process, a user and a group; the last two may be unknown."""
    kinds = [type(each) for each in peer]
    return len(kinds) == 3 and kinds[0] is int and {*kinds} <= {int, type(None)}


def flaw_of(record: dict[str, Any]) -> str:
    """The mistake in a record; empty if there is none."""
    for name, kinds in TYPES.items():
        if name not in record:
            return f"{name} is missing"
        if type(record[name]) not in kinds:
            return f"{name} is of a wrong type"
    if record["v"] != 1:
        return "of another version"
    peer = record["peer"]
    if peer is not None and not is_peer(peer):
        return "peer is not a process, a user and a group"
    return ""

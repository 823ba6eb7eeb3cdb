"""``vmm-linux audit trace``: a buffer's way through processes, from their audit files."""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from vmm_linux._tools.tables import Table, choose_printer, print_line
from vmm_linux._tools.text import human, printable
from vmm_linux.cli.audit_file import AuditLine, read
from vmm_linux.flags import Rights, Seal, VmmFlags

COLUMNS = ("time", "process", "what", "outcome")
WORDS: Final = {
    "mdl_create": "created, {data}",
    "mdl_create_from_vm": "created of pages, {data}",
    "mdl_create_from_buf": "created of data, {data}",
    "mdl_get_size": "size asked",
    "mdl_map": "mapped {prot}, {data}",
    "mdl_seal": "sealed {seals}",
    "handle_copy": "handle copied with {rights}",
    "handle_close": "handle closed",
    "handle_revoke": "descendants revoked",
    "handle_info": "looked at",
    "send_handle": "sent to {peer}",
    "recv_handle": "received from {peer}",
    "handle_fileno": "left as {fd}",
    "handle_from_fd": "came as a descriptor",
    "create": "created as {name} for {peer}",
    "publish": "published as {name} by {peer}",
    "open": "opened as {name} by {peer}",
    "clone": "cloned from {name} by {peer}",
    "seal": "sealed {seals} as {name} by {peer}",
    "ticket": "held for a ticket of {peer}",
    "redeem": "ticket redeemed by {peer}",
}
"""The effect of each method, and of each operation of a broker, on a buffer."""
BILLION: Final = 1_000_000_000


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if the buffer was found, 1 if not or if a line is corrupt."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux audit",
        description="Follow a buffer through processes: what their audit files say of it, in the "
        "order of time. The security id is the kernel's and the same in all of them "
        "(VMM.handle_info, Mdl.sid, or the sid of a record). A buffer that is passed on without "
        "this package is in no audit file; 'vmm-linux sharing' finds it. Exit code 0: the buffer "
        "was found; 1: it was not, or a line is corrupt; 2: a file could not be read.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="trace")
    trace = commands.add_parser("trace", help="every call about one buffer")
    trace.add_argument(
        "sid", metavar="SID", type=number, help="its security id, 0x for hexadecimal"
    )
    trace.add_argument("files", metavar="FILE", nargs="+", help="audit files, in any order")
    trace.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    asked = parser.parse_args(arguments)
    found, problems = read(asked.files, asked.sid)
    for problem in problems:
        sys.stderr.write(
            f"vmm-linux audit: {printable(problem.file)}:{problem.line}: {problem.reason}\n"
        )
    if asked.json:
        events = [
            {**it.record, "what": what_of(it, asked.sid), "file": it.file, "line": it.line}
            for it in found
        ]
        left_out = [problem._asdict() for problem in problems]
        print_line(json.dumps({"sid": asked.sid, "events": events, "left_out": left_out}, indent=2))
    else:
        show(found, asked.sid)
    return 0 if found and all(problem.killed for problem in problems) else 1


def number(text: str) -> int:
    """A security id in the form of the command line."""
    value = int(text, 0)
    if not 0 <= value < 2**64:
        raise ValueError(text)
    return value


def show(found: Sequence[AuditLine], sid: int) -> None:
    """Print a table, and the number of calls."""
    if found:
        rows = [row_of(entry, sid) for entry in found]
        choose_printer()(Table(f"Buffer {sid:#x}", COLUMNS, rows))
    processes = {entry.record["pid"] for entry in found}
    print_line(f"Calls: {len(found)}. Processes: {len(processes)}.")


def row_of(entry: AuditLine, sid: int) -> tuple[str, ...]:
    """The table row of a call."""
    record = entry.record
    try:
        seconds, rest = divmod(record["time"], BILLION)
        time = f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}.{rest // 1000:06}Z"
    except (OverflowError, ValueError, OSError):
        time = str(record["time"])
    return time, str(record["pid"]), what_of(entry, sid), outcome_of(record)


def outcome_of(record: dict[str, Any]) -> str:
    """The outcome of a call, in a few words."""
    if record["event"] == "begin":
        return "began; how it ended is not written"
    rule = f" (rule: {record['rule']})" if record["decision"] == "deny" else ""
    return f"{record['rc'] or record['error']}{rule}"


def what_of(entry: AuditLine, sid: int) -> str:
    """The effect of a call on the buffer, in a few words."""
    record = entry.record
    method = record["method"]
    if method == "mdl_clone":
        return cloned(record, sid)
    if method not in WORDS:
        return str(method)
    arguments = numbers_of(record)
    return WORDS[method].format(
        data=size_of(arguments, "size", "data", "length"),
        prot=names(VmmFlags, arguments.get("prot")),
        seals=names(Seal, arguments.get("seals")),
        rights=names(Rights, arguments.get("rights")),
        fd="a descriptor" if record["result"] is None else f"descriptor {record['result']}",
        peer=peer_of(record["peer"]),
        name=name_of(record),
    )


def name_of(record: dict[str, Any]) -> str:
    """The name that a broker's operation is about."""
    name = (record["arguments"] or {}).get("name")
    return printable(name) if isinstance(name, str) else "an unknown name"


def peer_of(peer: list[int | None] | None) -> str:
    """The peer at the other end of a socket."""
    if peer is None:
        return "somebody"
    return f"pid {peer[0]} (uid {'unknown' if peer[1] is None else peer[1]})"


def cloned(record: dict[str, Any], sid: int) -> str:
    """A clone, as seen from the clone or from its origin."""
    size = size_of(numbers_of(record), "length")
    if record["origin_sid"] is None:
        return f"cloned, {size}"
    if record["sid"] == sid:
        return f"cloned from {record['origin_sid']:#x}, {size}"
    return f"cloned into {record['sid'] or 0:#x}, {size}"


def numbers_of(record: dict[str, Any]) -> dict[str, int]:
    """The arguments that are numbers."""
    arguments = record["arguments"] or {}
    return {name: value for name, value in arguments.items() if type(value) is int}


def size_of(arguments: dict[str, int], *known: str) -> str:
    """The size of a call in bytes."""
    return next((human(arguments[name]) for name in known if name in arguments), "size unknown")


def names(kind: type[VmmFlags | Seal | Rights], value: int | None) -> str:
    """Bits by their names, unnamed ones as a number."""
    if value is None or value < 0:
        return "?"
    known = value & int(~kind(0))
    rest = value & ~known
    return "|".join(filter(None, [kind(known).name if known else "", f"{rest:#x}" if rest else ""]))

"""``vmm-linux diff``: the changes between two maps that were saved as JSON."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from vmm_linux import inspect
from vmm_linux._tools.text import escaped
from vmm_linux.cli.map.command import printer
from vmm_linux.cli.map.file import Saved, load, record_of
from vmm_linux.cli.map.picture import Line, change_lines


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if both could be read, 2 if not."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux diff",
        description="Tell what changed between two files that 'vmm-linux map --json FILE' wrote: "
        "mappings that appeared (+), went (-) and changed (~).",
    )
    parser.add_argument("before", metavar="A.json")
    parser.add_argument("after", metavar="B.json")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    asked = parser.parse_args(arguments)
    before, after = load(asked.before), load(asked.after)
    difference = inspect.diff(before, after)
    if asked.json:
        sys.stdout.write(json.dumps(as_object(before, after, difference), indent=1) + "\n")
    else:
        printer()([heading(before, after), *change_lines(difference, shown=None)])
    return 0


def heading(before: Saved, after: Saved) -> Line:
    """The line about the two maps."""
    whose = f"PID {before.pid}" if before.pid == after.pid else f"PID {before.pid} and {after.pid}"
    return Line(((f"{whose}, {escaped(before.taken)} to {escaped(after.taken)}", "bold"),))


def as_object(before: Saved, after: Saved, difference: inspect.Difference) -> dict[str, Any]:
    """The difference for JSON, with whole records."""
    changed = []
    for was, now, grown, figures in difference.changed:
        records = {"before": record_of(was, None), "after": record_of(now, None)}
        changed.append({**records, "grown": grown, "figures": figures})
    return {
        "before": {"pid": before.pid, "taken": before.taken},
        "after": {"pid": after.pid, "taken": after.taken},
        "appeared": [record_of(mapping, None) for mapping in difference.appeared],
        "went": [record_of(mapping, None) for mapping in difference.went],
        "changed": changed,
    }

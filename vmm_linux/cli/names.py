"""``vmm-linux names``: the names that a broker has, and what can be done with one."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

from vmm_linux._core.values import counted
from vmm_linux._tools.commands import CannotTryError
from vmm_linux._tools.tables import Table, choose_printer
from vmm_linux._tools.text import escaped, human
from vmm_linux.names import Client, place

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm_linux.names import Stat

COLUMNS: Final = ("name", "size", "rights", "seals", "lifetime", "user", "process", "holders")
VERBS: Final = ("unlink", "keep", "revoke")


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if the broker did it, 2 if not."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux names",
        description="List the names that a broker has: this user's own, or that of "
        "VMM_LINUX_BROKER or --broker. Nothing is started.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="only this one")
    parser.add_argument("--broker", metavar="PATH", help="the socket of another broker")
    parser.add_argument("--json", action="store_true", help="one JSON array instead of a table")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--unlink", action="store_true", help="end the name")
    actions.add_argument("--keep", action="store_true", help="let it live until it is unlinked")
    actions.add_argument("--revoke", action="store_true", help="let nobody open it any more")
    asked = parser.parse_args(arguments)
    verb = next((verb for verb in VERBS if getattr(asked, verb)), None)
    if verb is not None and asked.name is None:
        parser.error(f"--{verb} needs a NAME")
    path = asked.broker or os.environ.get(place.VARIABLE) or place.own_socket()
    if asked.broker is None and not os.path.lexists(path):
        raise CannotTryError(f"no broker listens at {escaped(path)}: none was needed yet")
    client = Client(path)
    try:
        if verb is not None:
            getattr(client, verb)(asked.name)
            return 0
        found = client.names() if asked.name is None else [client.stat(asked.name)]
    finally:
        client.close()
    if asked.json:
        sys.stdout.write(json.dumps(list(map(as_dict, found)), indent=1) + "\n")
    else:
        title = f"{counted(len(found), 'name')} at {escaped(path)}"
        choose_printer()(Table(title, COLUMNS, [row_of(each) for each in found]))
    return 0


def as_dict(stat: Stat) -> dict[str, Any]:
    """What JSON has of a name."""
    return stat._asdict() | {
        "rights": words_of(stat.rights),
        "seals": words_of(stat.seals),
        "lifetime": stat.lifetime.name.lower(),
    }


def words_of(bits: Any) -> list[str]:  # noqa: ANN401  Rights or Seal
    """The names of bits."""
    return [str(each.name).lower() for each in bits]


def row_of(stat: Stat) -> tuple[str, ...]:
    """A name in a table."""
    return (
        stat.name,
        human(stat.nbytes),
        " ".join(words_of(stat.rights)),
        " ".join(words_of(stat.seals)) or "none",
        "revoked" if stat.revoked else stat.lifetime.name.lower(),
        "unknown" if stat.uid is None else str(stat.uid),
        str(stat.pid),
        str(stat.holders),
    )

"""The command line: ``vmm-linux COMMAND ...``.

Every command is a module of its own with ``main(arguments) -> exit code``, imported only when it is
run. Exit codes: 0 done, 1 it did not come out as it should, 2 it could not be tried.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmm_linux import VmmError, __version__

__all__ = ["main"]

CANNOT_TRY = 2
INTERRUPTED = 130
PIPE_CLOSED = 141


class Command(NamedTuple):
    """Where a command lies, and what it does in half a line."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command("vmm_linux.demo", "a real file in real memory, the kernel's figures beside it"),
    "map": Command("vmm_linux.cli.map.command", "a picture of where a process's memory is"),
    "query": Command("vmm_linux.cli.query", "what lies at an address of a process"),
    "diff": Command("vmm_linux.cli.diff", "what changed between two maps in JSON files"),
    "sharing": Command("vmm_linux.cli.sharing", "which memory processes share with each other"),
    "experiment": Command(
        "vmm_linux.experiments._framework.command", "experiments on how this machine treats memory"
    ),
    "audit": Command("vmm_linux.cli.audit", "a buffer's way through processes"),
    "doctor": Command("vmm_linux.doctor", "what this kernel and these limits give, and advice"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name: its exit code.

    Args:
        arguments: without the program's name; those of this process if left out.
    """
    prepare_output()
    name = "vmm-linux"
    try:
        asked = parser().parse_args(arguments)
        name += f" {asked.command}"
        command = importlib.import_module(COMMANDS[asked.command].module)
        code = int(command.main(asked.arguments))
        sys.stdout.flush()
    except (OSError, VmmError) as error:
        return cannot_try(name, error)
    except SystemExit:
        # argparse has printed the help, and does not look whether it arrived.
        try:
            sys.stdout.flush()
        except OSError as error:
            return cannot_try(name, error)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def cannot_try(name: str, error: OSError | VmmError) -> int:
    """Say in a line what was refused; but to have no reader any more is no error."""
    drop_output()
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    sys.stderr.write(f"{name}: {error}\n")
    return CANNOT_TRY


def parser() -> argparse.ArgumentParser:
    """What the command line looks like up to the command; the rest is the command's own."""
    width = max(map(len, COMMANDS))
    made = argparse.ArgumentParser(
        prog="vmm-linux",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="The KasperskyOS endpoint vmm.VMM on real Linux memory.",
        epilog="commands:\n"
        + "".join(f"  {name:<{width}}  {command.summary}\n" for name, command in COMMANDS.items())
        + "\n'vmm-linux COMMAND --help' tells about one of them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    made.add_argument("command", metavar="COMMAND", choices=COMMANDS, help=argparse.SUPPRESS)
    rest = made.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    rest.required = False  # or a missing COMMAND would be complained of with this beside it
    return made


def drop_output() -> None:
    """Python flushes standard output once more at its end, which must not fail again."""
    number = sys.stdout.fileno()
    os.close(number)  # first: there may be no other descriptor to be had
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def prepare_output() -> None:
    """Print what an encoding lacks as an escape; print nowhere where there is nowhere to print."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started this process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdout, "reconfigure"):
        # Kept back until it is flushed, under PYTHONUNBUFFERED too: argparse takes no notice of a
        # write that fails.
        sys.stdout.reconfigure(write_through=False)

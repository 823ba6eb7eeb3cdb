"""The command line: ``vmm-linux COMMAND ...``.

Every command is a module with ``main(arguments) -> exit code``, imported only when it runs. Exit
codes: 0 success, 1 failure, 2 it could not be tried.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vmm_linux import __version__
from vmm_linux._tools.commands import CANNOT_TRY, run

INTERRUPTED = 130
PIPE_CLOSED = 141


class Command(NamedTuple):
    """A command's module, and its purpose in half a line."""

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
    "broker": Command("vmm_linux.broker.command", "keeps buffers by name, for several users"),
    "names": Command("vmm_linux.cli.names", "the names that a broker has"),
    "audit": Command("vmm_linux.cli.audit", "a buffer's way through processes"),
    "doctor": Command("vmm_linux.doctor", "what this kernel and these limits give, and advice"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the arguments name, and return its exit code.

    Args:
        arguments: without the program's name; None for those of this process.
    """
    prepare_output()
    name = "vmm-linux"
    try:
        asked = parser().parse_args(arguments)
        name += f" {asked.command}"
        command = importlib.import_module(COMMANDS[asked.command].module)
        code = run(name, command.main, asked.arguments)
        sys.stdout.flush()
    except OSError as error:
        return cannot_try(name, error)
    except SystemExit:
        # argparse has printed the help, and does not check whether it arrived.
        try:
            sys.stdout.flush()
        except OSError as error:
            return cannot_try(name, error)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def cannot_try(name: str, error: OSError) -> int:
    """Print a system call's refusal, and return the exit code; a closed reader is no error."""
    drop_output()
    if isinstance(error, BrokenPipeError):
        return PIPE_CLOSED
    sys.stderr.write(f"{name}: {error}\n")
    return CANNOT_TRY


def parser() -> argparse.ArgumentParser:
    """The parser of the command line up to the command; the command parses the rest."""
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
    rest.required = False  # else the error for a missing COMMAND would list this too
    return made


def drop_output() -> None:
    """Redirect standard output, which Python flushes at exit, so that this cannot fail again."""
    number = sys.stdout.fileno()
    os.close(number)  # first: there may be no other descriptor
    nowhere = os.open(os.devnull, os.O_WRONLY)
    if nowhere != number:
        os.dup2(nowhere, number)
        os.close(nowhere)


def prepare_output() -> None:
    """Escape characters that the encoding lacks; without a standard output, print nowhere."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdout, "reconfigure"):
        # Buffered until the flush, under PYTHONUNBUFFERED too: argparse ignores a failed write.
        sys.stdout.reconfigure(write_through=False)

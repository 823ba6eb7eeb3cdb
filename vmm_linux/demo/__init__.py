"""The demonstration: a real file in real memory, with the kernel's figures beside each step.

The steps are in ``steps.py`` and ``mdl_steps.py``, those of the other process in
``peer.py``. The first step that fails is the last.
"""

import argparse
import contextlib
import hashlib
import os
import stat
import sys
from collections.abc import Sequence
from io import FileIO
from pathlib import Path

from vmm_linux import VMM
from vmm_linux._core.values import counted
from vmm_linux._tools import machine
from vmm_linux._tools.commands import CannotTryError
from vmm_linux._tools.text import human, printable
from vmm_linux.demo import mdl_steps, steps
from vmm_linux.demo.caller import RESERVATION, Footprint, made
from vmm_linux.demo.report import Json, Lines, Report, Subject
from vmm_linux.demo.steps import Run


class UnfitFileError(Exception):
    """FILE cannot be used; the message continues after its name."""


def examine(path: str) -> Subject:
    """Read FILE once, without keeping it."""
    if not path:  # to pathlib this is the working directory
        raise UnfitFileError("is no name of a file")
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            raise UnfitFileError(f"is {'a directory' if stat.S_ISDIR(mode) else 'no regular file'}")
        with Path(path).open("rb", buffering=0) as file:
            return read_through(path, file)
    except OSError as error:
        raise UnfitFileError(f"cannot be read: {error.strerror}") from error


def read_through(path: str, file: FileIO) -> Subject:
    """Size and hash of an open file."""
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        raise UnfitFileError("is empty")
    check_room(size)
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if file.tell() != size:
        size_in_words = counted(size, "byte")
        raise UnfitFileError(f"has a size of {size_in_words}, but {file.tell()} could be read")
    return Subject(path, size, sha256)


def has_changed(subject: Subject) -> bool:
    """Whether FILE has changed."""
    try:
        return examine(subject.file) != subject
    except UnfitFileError:
        return True


def check_room(size: int) -> None:
    """Refuse a FILE that does not fit into memory twice: it is copied into an MDL buffer."""
    here = machine.memory()
    room = min((here.available + here.swap_free) // 2, RESERVATION)
    if size > room:
        raise UnfitFileError(f"is too big: {human(size)}, and there is room for {human(room)}")


def carry_out(subject: Subject, report: Report) -> bool:
    """Make the steps: whether all succeeded."""
    report.begin(subject, machine.memory())
    ok = True
    before = Footprint.take()
    with VMM() as vmm, contextlib.ExitStack() as at_end:
        run = Run(vmm, before, subject, at_end)
        for step in made(run, (*steps.STEPS, *mdl_steps.STEPS)):
            for check in (check for check, held in step.checks.items() if not held):
                complain(f"{step.method}: not so: {check}")
            if not step.ok and has_changed(subject):
                raise UnfitFileError("changed while it was read")
            report.show(step)
            ok = step.ok
    report.end(ok)
    return ok


def complain(message: str) -> None:
    """Print a line on standard error."""
    sys.stderr.write(f"vmm-linux demo: {message}\n")


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if every check held, 1 if one failed, 2 if FILE cannot be used."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux demo",
        description="Reserve 64 GiB, read FILE into just the memory that it needs, give half of it "
        "back and take it again, share all of it with another process that can only read, and "
        "free everything, with what the kernel says at every step. Exit code 0 if every step did "
        "what it had to do, 1 if one did not, 2 if FILE is not fit.",
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="default: this Python's binary")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    asked = parser.parse_args(arguments)
    file = os.path.realpath(sys.executable) if asked.file is None else asked.file
    try:
        return 0 if carry_out(examine(file), choose(asked.json)) else 1
    except UnfitFileError as error:
        raise CannotTryError(f"{printable(file)} {error}") from error


def choose(as_json: bool) -> Report:
    """The report for these options."""
    if as_json:
        return Json()
    if sys.stdout.isatty():
        try:
            return Lines.coloured()
        except ModuleNotFoundError:
            complain("plain text; for colours: pip install 'vmm-linux[tools]'")
    return Lines()

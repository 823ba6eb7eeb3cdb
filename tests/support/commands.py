"""The command line as people start it: the console script in a process of its own."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import termios
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from children import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from io import FileIO

SCRIPT = str(Path(sysconfig.get_path("scripts"), "vmm-linux"))
#: What a terminal obeys and does not show.
CONTROL = re.compile(r"\x1b\[[0-9;]*m")
#: A Python that acts as if rich were not installed; the command line follows.
WITHOUT_RICH = (
    sys.executable,
    "-c",
    "import sys; sys.modules['rich'] = None; from vmm_linux.cli import main; sys.exit(main())",
)


class Shown(NamedTuple):
    """What a terminal got, without its control sequences, and how the command ended."""

    returncode: int
    text: str
    lines: list[str]


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with changes, and with nothing that tells of its own terminal."""
    kept = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    return {**kept, "TERM": "xterm", "PYTHONUTF8": "1", **changes}


def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run ``vmm-linux ARGUMENTS`` with its output in pipes; ``changes`` of the environment."""
    return subprocess.run(
        [SCRIPT, *arguments],
        check=False,
        cwd=ROOT,
        env=environment(changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def run_on_terminal(columns: int, *command: str, **changes: str) -> Shown:
    """Run a command on a terminal that is so wide."""
    ours, its = os.openpty()
    with open(ours, "rb", buffering=0) as screen:  # noqa: PTH123  a descriptor is no path
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(changes),
            stdin=its,
            stdout=its,
            stderr=its,
        ) as process:
            os.close(its)
            text = b"".join(pieces_until_hang_up(screen)).decode().replace("\r\n", "\n")
            returncode = process.wait(timeout=60)
    return Shown(returncode, text, CONTROL.sub("", text).splitlines())


def install_for_everybody(folder: Path, *modules: str) -> list[str]:
    """Put this interpreter, and just what it takes to import these, where every user can use it.

    The checkout and the interpreter may lie where nobody else may look. The interpreter's command
    line; the environment is to have PYTHONHOME and LD_LIBRARY_PATH as ``of_installed`` says.
    """
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = folder / "lib" / version
    script = (
        f"import {', '.join(modules)}, sys, encodings.idna, runpy\n"  # runpy is for -m
        "for name, module in sys.modules.items():\n"
        "    print(name, getattr(module, '__file__', None) or '', sep='\\t')\n"
    )
    listed = subprocess.check_output([sys.executable, "-c", script], cwd=ROOT, text=True)
    for name, file in (line.split("\t") for line in listed.splitlines()):
        if file and name != "__main__":
            is_package = Path(file).name.startswith("__init__.")
            place = library.joinpath(*name.split(".")[: None if is_package else -1])
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place)
    program = folder / version
    shutil.copy(Path(sys.executable).resolve(), program)
    shared = Path(sysconfig.get_config_var("LIBDIR"), sysconfig.get_config_var("INSTSONAME"))
    if shared.suffix != ".a":
        shutil.copy(shared, folder / "lib")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755)
    return [str(program), "-S", "-W", "error"]


def of_installed(folder: Path) -> dict[str, str]:
    """The environment of what ``install_for_everybody`` put into a folder."""
    return environment({"PYTHONHOME": str(folder), "LD_LIBRARY_PATH": str(folder / "lib")})


def pieces_until_hang_up(screen: FileIO) -> Iterator[bytes]:
    """What is written to a terminal until nobody has its other end any more."""
    while True:
        try:
            yield screen.read(1 << 16)
        except OSError as problem:
            if problem.errno == errno.EIO:
                return
            raise

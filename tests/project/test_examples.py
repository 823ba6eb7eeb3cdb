"""The programs of docs/examples.md do what the page says, exactly as they are written there."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from children import ROOT
from compositor import KEYMAP, compositor
from readme import blocks, section
from torch_python import TORCH_PYTHON
from vmm_linux._tools.children import die_with_parent
from weston import WESTON, XVFB, weston

if TYPE_CHECKING:
    from collections.abc import Mapping

EXAMPLES = (ROOT / "docs" / "examples.md").read_text()
SUM = "Add up 2 GB with four workers"
STRANGERS = "Two programs that never met"
FRAME = "A pandas frame in two processes"
LOADER = "A PyTorch DataLoader"
WAYLAND = "The keymap of a Wayland compositor"
#: Seconds that a program may take.
PATIENCE = 120.0
COUNT = "COUNT = 250_000_000"
Program = subprocess.Popen[str]


def titles() -> list[str]:
    """The headings of the examples."""
    return [line[3:] for line in EXAMPLES.splitlines() if line.startswith("## ")]


def save(title: str, folder: Path, changes: Mapping[str, str]) -> None:
    """Write the programs of an example under their names into a folder."""
    programs = blocks("python", section(title, EXAMPLES))
    assert programs
    for program in programs:
        text = program
        for old, new in changes.items():
            assert text.count(old) == 1
            text = text.replace(old, new)
        (folder / text.partition("\n")[0].removeprefix("# ")).write_text(text)


def start(program: str, folder: Path, python: str, environment: Mapping[str, str]) -> Program:
    """Start a program of an example; warnings are errors."""
    return subprocess.Popen(
        [python, "-W", "error", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=die_with_parent,  # noqa: PLW1509 (no other thread runs here)
    )


def wait_until_it_listens(program: Program) -> None:
    """Wait until a program accepts connections, as who starts the next one by hand does."""
    deadline = time.monotonic() + PATIENCE
    accepts = "00010000"
    while program.poll() is None:
        assert time.monotonic() < deadline
        lines = Path("/proc/net/unix").read_text().splitlines()[1:]
        inodes = {fields[6] for line in lines if (fields := line.split())[3] == accepts}
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for link in Path(f"/proc/{program.pid}/fd").iterdir():
                if str(link.readlink())[8:-1] in inodes:
                    return
        time.sleep(0.01)


def run(
    title: str,
    folder: Path,
    *,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    changes: Mapping[str, str] | None = None,
    answers: Mapping[str, str] | None = None,
) -> None:
    """Do what an example says, and compare what its programs print.

    Args:
        title: of the example.
        folder: where its programs are started.
        python: the interpreter.
        environment: added to this process's.
        changes: texts in the programs, and what to put there.
        answers: the same, of what they print.
    """
    save(title, folder, changes or {})
    sessions = blocks("console", section(title, EXAMPLES))
    assert sessions
    for session in sessions:
        lines = session.splitlines()
        commands = [line for line in lines if line.startswith("$ ")]
        expected = "".join(f"{line}\n" for line in lines if not line.startswith("$ "))
        for old, new in (answers or {}).items():
            expected = expected.replace(old, new)
        with contextlib.ExitStack() as at_end:
            started = []
            for command in commands:
                shell, interpreter, program, *background = command.split()
                assert (shell, interpreter, background in ([], ["&"])) == ("$", "python", True)
                started.append(start(program, folder, python, environment or {}))
                at_end.enter_context(started[-1])
                at_end.callback(started[-1].kill)
                if background:
                    wait_until_it_listens(started[-1])
            printed = "".join(each.communicate(timeout=PATIENCE)[0] for each in started)
            assert (printed, [each.returncode for each in started]) == (
                expected,
                [0] * len(started),
            )


def test_every_example_of_the_page_is_run_here() -> None:
    assert titles() == [SUM, STRANGERS, FRAME, LOADER, WAYLAND]


def test_four_workers_add_up_an_array(tmp_path: Path) -> None:
    run(
        SUM,
        tmp_path,
        changes={COUNT: COUNT.replace("_000_000", "_000")},
        answers={"500000000": "500000"},
    )


@pytest.mark.gigabytes
def test_four_workers_add_up_two_gigabytes(tmp_path: Path) -> None:
    run(SUM, tmp_path)


def test_two_programs_that_never_met_share_memory(tmp_path: Path) -> None:
    run(STRANGERS, tmp_path)
    assert not list(tmp_path.glob("*.socket"))


def test_two_processes_have_the_same_frame(tmp_path: Path) -> None:
    run(FRAME, tmp_path)


@pytest.mark.torch
@pytest.mark.skipif(
    TORCH_PYTHON is None, reason="PyTorch is missing: apt-get install python3-torch"
)
def test_a_loader_s_workers_read_the_data_set_s_memory(tmp_path: Path) -> None:
    assert TORCH_PYTHON
    run(LOADER, tmp_path, python=TORCH_PYTHON)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "not sealed"])
def test_the_keymap_of_a_compositor_is_read(sealed: bool, tmp_path: Path) -> None:
    with compositor(tmp_path, sealed=sealed) as (environment, complaint):
        answers = {"64434": str(len(KEYMAP)), "b'xkb": f"{complaint}b'xkb"}
        run(WAYLAND, tmp_path, environment=environment, answers=answers)


@pytest.mark.weston
@pytest.mark.skipif(
    WESTON is None or XVFB is None, reason="Weston is missing: apt-get install weston xvfb"
)
def test_the_keymap_of_weston_is_read(tmp_path: Path) -> None:
    with weston(tmp_path) as environment:
        save(WAYLAND, tmp_path, {})
        with start("keymap.py", tmp_path, sys.executable, environment) as program:
            printed = program.communicate(timeout=PATIENCE)[0]
    # Which keys a keyboard has depends on the machine; the memory is sealed, and taken as it is.
    text, _, length = printed.rpartition(" ")
    assert (text, program.returncode) == ("b'xkb_keymap'", 0)
    assert int(length) > 10_000

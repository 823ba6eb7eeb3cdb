"""The program that passes frames: it checks what it says, and leaves nothing behind."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from children import ROOT

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = ROOT / "scripts" / "frames"
#: Seconds after which what hangs has failed.
PATIENCE = 120


def command(*options: str) -> list[str]:
    """The program with this Python, and no warning unseen."""
    return [sys.executable, "-W", "error", str(SCRIPT), *options]


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return subprocess.run(
        command(*options), check=False, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.fixture(scope="module")
def frames() -> ModuleType:
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("frames_script", str(SCRIPT))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    loader.exec_module(module)
    return module


def test_every_consumer_checks_every_frame_and_one_is_killed_and_started_anew() -> None:
    ended = run("--frames", "40", "--json")
    assert (ended.returncode, ended.stderr) == (0, "")
    told: dict[str, Any] = json.loads(ended.stdout)
    assert (told["frames"], told["copies"]) == (40, 0)
    assert told["frames_per_second"] == pytest.approx(40 / told["seconds"])
    killed = [one for one in told["consumers"] if one["killed"]]
    others = [one for one in told["consumers"] if not one["killed"]]
    assert (len(killed), len(others)) == (1, 3)
    assert killed[0]["first"] == 0
    assert killed[0]["checked"] <= 40 // 3
    assert sorted(one["first"] == 0 for one in others) == [False, True, True]
    assert all(one["checked"] == 40 - one["first"] for one in others)


def test_it_tells_people_too() -> None:
    ended = run("--frames", "24")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "frames a second" in ended.stdout
    assert "copies made: 0" in ended.stdout
    assert ended.stdout.endswith("All checks held.\n")


@pytest.mark.parametrize("wrong", ["23", "0", "-1", "x", "1.5"])
def test_too_few_frames_are_refused(wrong: str) -> None:
    ended = run("--frames", wrong)
    assert ended.returncode == 2
    assert "--frames" in ended.stderr


@pytest.mark.parametrize("checker", ["Plain", "Vectorized"])
@pytest.mark.parametrize("drawer", ["Plain", "Vectorized"])
def test_a_frame_is_told_from_every_other_and_from_one_with_a_wrong_byte(
    frames: ModuleType, drawer: str, checker: str
) -> None:
    memory = bytearray(frames.SIZE)
    view = memoryview(memory)
    check = getattr(frames, checker)().is_drawn
    getattr(frames, drawer)().draw(view, 300)
    assert check(view, 300)
    assert not any(check(view, other) for other in (299, 301, 300 - frames.SLOTS, 0))
    for place in (0, frames.FRAME // 2, frames.FRAME - 1):
        memory[place] ^= 1
        assert not check(view, 300)
        memory[place] ^= 1
    assert check(view, 300)


def children_of(pid: int) -> set[int]:
    """The children of a process, as the kernel lists them."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        found.update(map(int, path.read_text().split()))
    return found


def is_consumer(pid: int) -> bool:
    """Whether this process is one of the consumers; the others belong to multiprocessing."""
    return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()


def is_alive(pid: int) -> bool:
    """Whether a process of that number has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_the_consumers_die_with_the_producer() -> None:
    deadline = time.monotonic() + PATIENCE
    with subprocess.Popen(
        command("--frames", "1000000"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as producer:
        consumers: set[int] = set()
        while len(consumers) < 3:
            assert time.monotonic() < deadline
            consumers = {child for child in children_of(producer.pid) if is_consumer(child)}
        os.kill(producer.pid, signal.SIGKILL)
    while any(is_alive(consumer) for consumer in consumers):
        assert time.monotonic() < deadline

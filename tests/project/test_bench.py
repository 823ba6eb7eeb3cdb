"""The script that measures: what it prints, what it writes, how it ends. No figure is judged."""

# ruff: noqa: RUF001
# (its tables have the sign for "times")

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from children import ROOT, run_child
from commands import CONTROL, run_on_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BENCH = (sys.executable, str(ROOT / "scripts" / "bench"))
#: A Python that runs scripts/bench as if the modules that its first argument names were missing.
WITHOUT = (
    sys.executable,
    "-c",
    """if True:
    import runpy, sys
    names, *sys.argv = sys.argv[1:]
    sys.modules.update(dict.fromkeys(names.split(",")))
    sys.path[0] = sys.argv[0].rpartition("/")[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    """,
)
#: One benchmark of each kind, none of which takes long.
PRIVATE, FIGURE, QUESTION, SHARED, CHILDREN, INTERPRETERS = (
    "allocate-free",
    "ledger-memory",
    "query-record",
    "mdl-cycle",
    "hand-over",
    "import-time",
)
SPREAD = {"median", "low", "high"}


def run(*command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run a command with its output in pipes; ``changes`` of the environment."""
    return subprocess.run(
        command,
        check=False,
        env={**os.environ, **changes},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


def one_round_of(*names: str) -> list[str]:
    """The arguments that measure these benchmarks as fast as can be."""
    return ["--quick", "--rounds", "1", "--only", *names]


def report_of(folder: Path, *command: str) -> dict[str, Any]:
    """The document that a run writes which ends well."""
    path = folder / "report.json"
    child = run(*command, "--json", str(path))
    assert child.returncode == 0, child.stderr
    report = json.loads(path.read_text())
    assert isinstance(report, dict)
    return report


def cells_of(text: str) -> Iterator[list[str]]:
    """The cells of each line of a Markdown table."""
    for line in text.splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_document_has_every_contestant_every_round_and_every_target(tmp_path: Path) -> None:
    names = [PRIVATE, FIGURE, QUESTION, SHARED, CHILDREN, INTERPRETERS]
    report = report_of(tmp_path, *BENCH, *one_round_of(*names), "--rounds", "2")
    assert report.keys() == {"machine", "python", "rounds", "seconds", "left_out", "benchmarks"}
    assert [entry["name"] for entry in report["benchmarks"]] == names
    for entry in report["benchmarks"]:
        assert entry.keys() == {"name", "title", "unit", "contestants", "targets", "left_out"}
        assert "vmm_linux" in entry["contestants"]
        for figures in entry["contestants"].values():
            assert figures.keys() == {*SPREAD, "rounds"}
            assert len(figures["rounds"]) == 2
            assert min(figures["rounds"]) > 0
            assert figures["low"] <= figures["median"] <= figures["high"]
        assert entry["targets"], "nothing is wanted"


def test_a_targets_ratio_and_verdict_follow_from_the_figures(tmp_path: Path) -> None:
    report = report_of(tmp_path, *BENCH, *one_round_of(SHARED, FIGURE))
    (shared, figure) = report["benchmarks"]
    taken = {name: figures["median"] for name, figures in shared["contestants"].items()}
    slower, faster = shared["targets"]
    assert slower["text"] == "≤ 1.35 × C"
    assert slower["ratio"]["median"] == pytest.approx(taken["vmm_linux"] / taken["C"])
    assert slower["met"] is (slower["ratio"]["median"] <= 1.35)
    assert faster["text"] == "≥ 3.5 × faster than SharedMemory"
    assert faster["ratio"]["median"] == pytest.approx(taken["SharedMemory"] / taken["vmm_linux"])
    assert faster["met"] is (faster["ratio"]["median"] >= 3.5)
    (most,) = figure["targets"]
    assert most["ratio"]["median"] == figure["contestants"]["vmm_linux"]["median"]


def test_the_output_is_a_markdown_table_with_every_target_and_its_verdict() -> None:
    child = run(*BENCH, *one_round_of(PRIVATE, FIGURE))
    assert child.returncode == 0, child.stderr
    assert "\x1b" not in child.stdout
    rows = list(cells_of(child.stdout))
    assert rows[0] == ["work", "target", "measured", "verdict"]
    verdicts = {target: verdict for _, target, _, verdict in rows[2:5]}
    assert verdicts.keys() == {"≤ 1.25 × C", "≥ 1 × faster than mmap.mmap", "≤ 100"}
    assert set(verdicts.values()) <= {"met", "MISSED"}
    assert [row[0] for row in rows[7:]] == [rows[2][0], rows[4][0]]


def test_a_terminal_gets_the_same_table_in_colours() -> None:
    shown = run_on_terminal(120, *BENCH, *one_round_of(PRIVATE))
    assert shown.returncode == 0
    assert CONTROL.search(shown.text)
    assert any("≤ 1.25 × C" in line for line in shown.lines)


def test_a_terminal_without_rich_gets_markdown() -> None:
    shown = run_on_terminal(120, *WITHOUT, "rich", BENCH[1], *one_round_of(PRIVATE))
    assert shown.returncode == 0
    assert "| work | target | measured | verdict |" in shown.lines


def test_peers_that_are_not_installed_are_named_as_left_out(tmp_path: Path) -> None:
    command = [*WITHOUT, "posix_ipc,psutil", BENCH[1], *one_round_of(SHARED, QUESTION)]
    report = report_of(tmp_path, *command)
    assert report["left_out"] == {"posix_ipc": "not installed", "psutil": "not installed"}
    for entry in report["benchmarks"]:
        assert not entry["contestants"].keys() & {"posix_ipc", "psutil"}
    last = run(*command).stdout.splitlines()[-1]
    assert last == "Left out: posix_ipc (not installed), psutil (not installed)."


def test_an_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    child = run(*BENCH, "--only", PRIVATE, "nonsense")
    assert (child.returncode, child.stdout) == (2, "")
    assert "no benchmark nonsense; there are allocate-free, " in child.stderr


@pytest.mark.parametrize("rounds", ["0", "-1", "many"])
def test_a_number_of_rounds_that_is_none_is_refused(rounds: str) -> None:
    child = run(*BENCH, "--rounds", rounds, "--only", PRIVATE)
    assert (child.returncode, child.stdout) == (2, "")
    assert "--rounds" in child.stderr


def test_without_a_compiler_that_works_it_says_so() -> None:
    child = run(*BENCH, *one_round_of(PRIVATE), CC="false")
    assert (child.returncode, child.stdout) == (2, "")
    assert "bench: the C baseline does not compile" in child.stderr


def test_a_document_that_cannot_be_written_is_told_before_anything_is_measured() -> None:
    child = run(*BENCH, *one_round_of(PRIVATE), "--json", "/nowhere/report.json")
    assert (child.returncode, child.stdout) == (2, "")
    assert "/nowhere/report.json" in child.stderr


def kill_a_harness(scripts: str) -> None:
    """Be killed, with a stopped child that has this process's output."""
    import os
    import signal
    import sys
    from socket import socket  # noqa: TC003  this function runs elsewhere

    sys.path.insert(0, scripts)
    from benchmarks import harness

    def serve(sock: socket) -> None:
        sock.send(str(os.getpid()).encode())
        sock.recv(1)

    stage = harness.Stage(harness.Baseline(), min(os.sched_getaffinity(0)))
    sock = stage.child(serve)
    # A stopped one does not see that its socket's other end is closed.
    os.kill(int(sock.recv(64)), signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGKILL)


def test_children_die_with_the_script() -> None:
    # It returns when nobody has the output any more.
    child = run_child(kill_a_harness, str(ROOT / "scripts"))
    assert (child.returncode, child.stderr) == (-signal.SIGKILL, "")

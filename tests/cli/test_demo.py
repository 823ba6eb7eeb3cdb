"""The demonstration, run for real: what it shows, what it checks and how it ends."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from children import NOBODY, ROOT, run_child
from commands import (
    CONTROL,
    SCRIPT,
    WITHOUT_RICH,
    environment,
    install_for_everybody,
    of_installed,
    run,
    run_on_terminal,
)
from constants import GIB
from kernel_oracle import PAGE
from vmm_linux.endpoint import Endpoint

#: The steps: method, return code. Those of the other process begin with ``peer``.
STEPS = [
    ("Allocate", "rcOk"),
    ("Commit", "rcOk"),
    ("view", "rcOk"),
    ("read", "rcOk"),
    ("Query", "rcOk"),
    ("Decommit", "rcOk"),
    ("touch", None),
    ("Commit", "rcOk"),
    ("view", "rcOk"),
    ("Protect", "rcOk"),
    ("write", "rcInvalidOperation"),
    ("MdlCreateFromVm", "rcOk"),
    ("read", "rcOk"),
    ("mdl_seal", "rcOk"),
    ("MdlGetSize", "rcOk"),
    ("MdlClone", "rcOk"),
    ("MdlCreate", "rcOk"),
    ("MdlMap", "rcOk"),
    ("start", None),
    ("send_handle", "rcOk"),
    ("peer.recv_handle", "rcOk"),
    ("send_handle", "rcOk"),
    ("peer.recv_handle", "rcOk"),
    ("send_handle", "rcOk"),
    ("peer.recv_handle", "rcOk"),
    ("peer.MdlMap", "rcOk"),
    ("peer.view", "rcOk"),
    ("peer.mprotect", None),
    ("peer.poke", None),
    ("peer.reopen", None),
    ("peer.MdlMap", "rcOk"),
    ("peer.Free", "rcOk"),
    ("peer.MdlMap", "rcOk"),
    ("peer.write", "rcOk"),
    ("peer.Query", "rcOk"),
    ("Query", "rcOk"),
    ("read", "rcOk"),
    ("peer.Free", "rcOk"),
    ("peer.close", "rcOk"),
    ("wait", None),
    ("Free", "rcOk"),
    ("close", "rcOk"),
]
#: A line of the plain report: mark, call, return code, what the kernel says.
LINE = re.compile(r"(?P<mark>ok|FAILED) +(?P<method>[\w.]+)\((?P<arguments>.*?)\)  +(?P<rest>.*)")
#: What a report has beside its steps: three lines before, one after.
HEAD, TAIL = 3, 1


def make_file(folder: Path) -> Path:
    """A file of five pages, the last one not full, without two equal pages."""
    path = folder / "some file"
    path.write_bytes(os.urandom(5 * PAGE - 100))
    return path


@pytest.fixture
def some_file(tmp_path: Path) -> Path:
    """Such a file, which the test may change."""
    return make_file(tmp_path)


@pytest.fixture(scope="module")
def shown_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a file, which nobody changes."""
    return make_file(tmp_path_factory.mktemp("shown"))


@pytest.fixture(scope="module")
def report(shown_file: Path) -> dict[str, Any]:
    """The JSON report about it: the tests look at one run together."""
    return report_of(shown_file)


def report_of(path: str | Path) -> dict[str, Any]:
    """The JSON report about a file that all went well with."""
    child = run("demo", "--json", str(path))
    assert (child.returncode, child.stderr) == (0, "")
    report = json.loads(child.stdout)
    assert isinstance(report, dict)
    return report


def steps_of(report: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The steps that call this method."""
    return [step for step in report["steps"] if step["method"] == method]


def step_of(report: dict[str, Any], method: str) -> dict[str, Any]:
    """The first step that calls this method."""
    return steps_of(report, method)[0]


# ---- what it shows ------------------------------------------------------------------------------


def test_every_step_is_one_line_with_call_return_code_and_the_kernels_word(some_file: Path) -> None:
    child = run("demo", str(some_file))
    assert (child.returncode, child.stderr) == (0, "")
    lines = child.stdout.splitlines()
    assert len(lines) == HEAD + len(STEPS) + TAIL
    assert lines[-1] == "Every check held."
    for line, (method, rc) in zip(lines[HEAD:-TAIL], STEPS, strict=True):
        found = LINE.fullmatch(line)
        assert found is not None, line
        assert (found["mark"], found["method"]) == ("ok", method)
        told, _, kernel = f"{rc or ''}  {found['rest'].removeprefix(rc or '')}".partition("  ")
        assert told == (rc or "")
        assert kernel.strip(), "nothing of the kernel"


def test_the_report_begins_with_the_file_its_hash_and_the_machine(some_file: Path) -> None:
    name, digest, machine, *_ = run("demo", str(some_file)).stdout.splitlines()
    assert name.endswith(f"{some_file}, {(5 * PAGE - 100) / 1024:.4g} KiB")
    assert digest.split() == ["SHA-256", hashlib.sha256(some_file.read_bytes()).hexdigest()]
    assert machine.startswith("Machine  ")


def test_piped_output_is_plain_text(some_file: Path) -> None:
    output = run("demo", str(some_file), FORCE_COLOR="1").stdout
    assert output.isascii()
    assert "\x1b" not in output


@pytest.mark.parametrize("columns", [80, 100, 120, 200])
@pytest.mark.parametrize("size", [1, 5 * PAGE, (100 << 20) + 1])
def test_on_a_terminal_no_line_is_wider_than_it(columns: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, size)
    shown = run_on_terminal(columns, SCRIPT, "demo", str(path))
    assert shown.returncode == 0
    assert len(shown.lines) == HEAD + len(STEPS) + TAIL
    assert max(map(len, shown.lines[1:])) < columns
    assert [line[:2] for line in shown.lines[HEAD:-TAIL]] == ["✓ "] * len(STEPS)
    assert CONTROL.search(shown.text), "no colours"


def test_what_the_kernel_says_stands_in_one_column_of_the_terminal(some_file: Path) -> None:
    lines = run_on_terminal(80, SCRIPT, "demo", str(some_file)).lines[HEAD:-TAIL]
    assert len(lines) == len(STEPS)
    for line in lines:
        assert line[58:60].isspace(), line
        assert not line[60].isspace(), line


def test_a_terminal_that_lacks_the_signs_gets_others(some_file: Path) -> None:
    shown = run_on_terminal(
        80, SCRIPT, "demo", str(some_file), PYTHONUTF8="0", PYTHONIOENCODING="ascii"
    )
    assert [line[0] for line in shown.lines[HEAD:-TAIL]] == ["+"] * len(STEPS)


def test_without_rich_a_terminal_gets_plain_text_and_the_line_to_install(some_file: Path) -> None:
    shown = run_on_terminal(80, *WITHOUT_RICH, "demo", str(some_file))
    assert shown.returncode == 0
    install, *lines = shown.lines
    assert install == "vmm-linux demo: plain text; for colours: pip install 'vmm-linux[tools]'"
    assert lines[HEAD].startswith("ok      Allocate(")
    assert not CONTROL.search(shown.text)


def test_without_rich_a_pipe_gets_what_it_always_gets(some_file: Path) -> None:
    child = subprocess.run(
        [*WITHOUT_RICH, "demo", str(some_file)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert len(child.stdout.splitlines()) == HEAD + len(STEPS) + TAIL


def test_a_name_that_would_command_the_terminal_is_shown_escaped(tmp_path: Path) -> None:
    path = tmp_path / "red\x1b[31m\nline"
    path.write_bytes(b"x")
    assert r"red\x1b[31m\nline" in run("demo", str(path)).stdout.splitlines()[0]


# ---- what it says and checks --------------------------------------------------------------------


def test_json_has_every_step_with_its_call_figures_and_checks(report: dict[str, Any]) -> None:
    assert report.keys() == {"file", "size", "sha256", "machine", "steps", "ok"}
    assert report["ok"] is True
    assert report["machine"].keys() == {"memory", "available", "swap_free"}
    assert [(step["method"], step["rc"]) for step in report["steps"]] == STEPS
    for step in report["steps"]:
        assert step.keys() == {"method", "arguments", "rc", "kernel", "checks", "ok"}
        assert step["checks"], "nothing had to hold"
        assert set(step["checks"].values()) == {True}
        assert step["kernel"], "nothing of the kernel"
        assert step["ok"] is True


def test_it_reserves_64_gib_and_commits_just_what_the_file_needs(report: dict[str, Any]) -> None:
    reserved, committed = (step_of(report, name) for name in ("Allocate", "Commit"))
    assert reserved["arguments"]["size"] == 64 * GIB
    assert reserved["kernel"]["rss"] == 0
    assert "ac" not in reserved["kernel"]["vm_flags"]
    assert committed["arguments"]["size"] == committed["kernel"]["size"] == 5 * PAGE
    assert "ac" in committed["kernel"]["vm_flags"]


def test_the_files_hash_is_taken_from_memory(shown_file: Path, report: dict[str, Any]) -> None:
    digest = hashlib.sha256(shown_file.read_bytes()).hexdigest()
    assert (report["sha256"], step_of(report, "read")["kernel"]["sha256"]) == (digest, digest)


def test_half_becomes_read_only_and_the_other_half_is_returned(report: dict[str, Any]) -> None:
    assert step_of(report, "Query")["kernel"]["rss"] == 5 * PAGE
    assert step_of(report, "Protect")["kernel"]["size"] == 2 * PAGE
    assert step_of(report, "Protect")["kernel"]["permissions"] == "r--p"
    returned = step_of(report, "Decommit")
    assert returned["kernel"]["returned"] == returned["arguments"]["size"] == 3 * PAGE


def test_the_child_dies_on_a_page_that_was_given_back(report: dict[str, Any]) -> None:
    touched, returned = step_of(report, "touch"), step_of(report, "Decommit")["arguments"]
    assert touched["kernel"]["signal"] == "SIGSEGV"
    assert 0 <= touched["arguments"]["va"] - returned["va"] < returned["size"]


def test_the_process_ends_with_the_mappings_and_descriptors_of_its_beginning(
    report: dict[str, Any],
) -> None:
    closed = step_of(report, "close")["kernel"]
    assert closed["mappings_changed"] == closed["descriptors_changed"] == []
    assert closed["mappings"] > 0
    assert closed["descriptors"] > 0


@pytest.mark.parametrize(
    ("size", "pages"), [(1, 1), (PAGE - 1, 1), (PAGE, 1), (PAGE + 1, 2), (100 << 20, None)]
)
def test_files_of_every_size_fit(size: int, pages: int | None, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(min(size, 1 << 20)) * max(size >> 20, 1))
    report = report_of(path)
    assert report["size"] == size
    assert step_of(report, "Commit")["arguments"]["size"] == (pages or size // PAGE) * PAGE


def test_the_default_is_the_interpreters_binary() -> None:
    child = run("demo", "--json")
    assert child.returncode == 0
    assert json.loads(child.stdout)["file"] == str(Path(sys.executable).resolve())


# ---- the other process --------------------------------------------------------------------------


def test_every_method_of_the_reference_is_called(report: dict[str, Any]) -> None:
    called = {step["method"] for step in report["steps"]}
    assert {name for name in vars(Endpoint) if name[0] != "_"} <= called


def test_what_was_given_back_is_taken_again_and_read_in_again(report: dict[str, Any]) -> None:
    again = steps_of(report, "Commit")[1]
    assert again["arguments"] == step_of(report, "Decommit")["arguments"] | {"flags": 0}
    assert again["checks"]["it is zeros"]
    assert steps_of(report, "view")[1]["kernel"]["rss"] == 5 * PAGE


def test_the_files_pages_become_a_buffer_where_they_are(report: dict[str, Any]) -> None:
    shared = step_of(report, "MdlCreateFromVm")
    assert shared["arguments"]["va"] == step_of(report, "Commit")["arguments"]["va"]
    assert shared["arguments"]["size"] == step_of(report, "MdlGetSize")["kernel"]["size"]
    assert shared["kernel"]["permissions"] == "r--s"
    assert shared["kernel"]["inode"] != 0


def test_the_other_process_is_a_program_of_its_own_without_any_of_the_memory(
    report: dict[str, Any],
) -> None:
    started = step_of(report, "start")["kernel"]
    assert started["mappings"] > 0
    assert started["shared"] == []


def test_the_other_process_gets_the_file_to_read_and_one_page_to_write(
    report: dict[str, Any],
) -> None:
    whole, window, board = steps_of(report, "peer.recv_handle")
    modes = [[*step["kernel"]["descriptors"].values()] for step in (whole, window, board)]
    assert modes == [["O_RDONLY"], ["O_RDONLY"], ["O_RDWR"]]
    assert [step["arguments"]["require"] for step in (whole, window, board)] == [
        "PUBLISH",
        "PUBLISH",
        "0",
    ]
    assert whole["kernel"]["size"] == 5 * PAGE


def test_the_other_process_finds_the_whole_file(shown_file: Path, report: dict[str, Any]) -> None:
    found, told = step_of(report, "peer.view")["kernel"], steps_of(report, "read")[-1]["kernel"]
    digest = hashlib.sha256(shown_file.read_bytes()).hexdigest()
    assert (found["sha256"], told["sha256"]) == (digest, digest)
    assert found["inode"] == step_of(report, "MdlCreateFromVm")["kernel"]["inode"]


def test_the_kernel_refuses_the_other_process_every_way_to_write(report: dict[str, Any]) -> None:
    assert step_of(report, "peer.mprotect")["kernel"]["errno"] == "EACCES"
    assert step_of(report, "peer.poke")["kernel"]["signal"] == "SIGSEGV"
    assert step_of(report, "peer.reopen")["kernel"] == {
        "mode": "O_RDWR",
        "write": "EPERM",
        "mmap": "EPERM",
        "ftruncate": "EPERM",
    }


def test_the_clone_is_the_second_half_of_the_same_memory(report: dict[str, Any]) -> None:
    whole, window, _ = steps_of(report, "peer.MdlMap")
    sent, cloned = steps_of(report, "peer.recv_handle")[1], step_of(report, "MdlClone")
    assert window["kernel"]["inode"] == whole["kernel"]["inode"]
    assert window["kernel"]["offset"] == cloned["arguments"]["offset"] == 2 * PAGE
    assert window["kernel"]["size"] == cloned["arguments"]["length"] == 3 * PAGE
    assert sent["kernel"]["sid"] == cloned["kernel"]["sid"]
    assert sent["kernel"]["origin_sid"] == cloned["kernel"]["origin_sid"]


def test_each_of_the_two_processes_pays_for_half_of_the_file(report: dict[str, Any]) -> None:
    here, there = steps_of(report, "Query")[1]["kernel"]["file"], step_of(report, "peer.Query")
    assert here["rss"] == there["kernel"]["rss"] == 5 * PAGE
    assert here["pss"] + there["kernel"]["pss"] == 5 * PAGE
    assert step_of(report, "wait")["kernel"]["file"]["pss"] == 5 * PAGE


def test_the_other_process_ends_with_the_mappings_and_descriptors_of_its_beginning(
    report: dict[str, Any],
) -> None:
    closed = step_of(report, "peer.close")["kernel"]
    assert closed["mappings_changed"] == closed["descriptors_changed"] == []
    assert closed["mappings"] > 0
    assert closed["descriptors"] > 0
    assert step_of(report, "wait")["kernel"]["exit_code"] == 0


def begin_and_wait(sha256: str) -> None:
    """Start the other process, tell its number, and do no more."""
    import sys
    from contextlib import ExitStack

    from vmm_linux.demo.peer import READY, Other

    with ExitStack() as at_end:
        other = Other(at_end, 1, sha256)
        assert other.packet() == READY
        print(other.process.pid, flush=True)
        sys.stdin.read()


def test_the_other_process_dies_with_the_first() -> None:
    code = f"{inspect.getsource(begin_and_wait)}\nbegin_and_wait('')"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as first:
        assert first.stdout is not None
        other = os.pidfd_open(int(first.stdout.readline()))
        assert select.select([other], [], [], 0)[0] == []
        first.kill()
        assert select.select([other], [], [], 60)[0] == [other]
        os.close(other)
    assert first.returncode == -signal.SIGKILL


def test_another_process_that_never_answers_is_told_so(some_file: Path) -> None:
    code = (
        "import sys; sys.executable = '/bin/true'\nfrom vmm_linux.cli import main; sys.exit(main())"
    )
    child = subprocess.run(
        [sys.executable, "-c", code, "demo", str(some_file)],
        check=False,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1
    *_, step, verdict = child.stdout.splitlines()
    assert step == "FAILED  start()"
    assert verdict == "FAILED: see the last step."
    (complaint,) = child.stderr.splitlines()
    assert complaint.startswith("vmm-linux demo: start: not so: the other process is there (")


def test_the_childs_death_is_silent_under_faulthandler(some_file: Path) -> None:
    child = run("demo", str(some_file), PYTHONFAULTHANDLER="1")
    assert (child.returncode, child.stderr) == (0, "")


# ---- how it ends otherwise ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "'' is no name of a file"),
        ("missing", "missing cannot be read: No such file or directory"),
        ("empty", "empty is empty"),
        ("folder", "folder is a directory"),
        ("pipe", "pipe is no regular file"),
        ("loop", "loop cannot be read: Too many levels of symbolic links"),
        ("huge", "huge is too big: 1 TiB, and there is room for "),
        ("empty/inside", "empty/inside cannot be read: Not a directory"),
    ],
)
def test_an_unfit_file_is_told_so(name: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(1 << 40)
    path = str(tmp_path / name) if name else ""
    for arguments in (["demo", path], ["demo", "--json", path]):
        child = run(*arguments)
        assert (child.returncode, child.stdout) == (2, "")
        (line,) = child.stderr.splitlines()
        assert line.startswith("vmm-linux demo: ")
        assert complaint in line


def demonstrate(path: str) -> None:
    """Run the command, with all imported early that it uses: nobody may not read the checkout."""
    import shutil  # by argparse
    import sys

    from vmm_linux import cli, demo

    assert {shutil.__name__, demo.__name__} <= sys.modules.keys()
    sys.exit(cli.main(["demo", path]))


def test_a_file_that_an_ordinary_user_may_not_read_is_told_so(some_file: Path) -> None:
    some_file.chmod(0)
    child = run_child(demonstrate, str(some_file), nobody=True)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.endswith("cannot be read: Permission denied\n")


def test_an_ordinary_user_sees_all_of_it() -> None:
    nobody = NOBODY if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory() as name:  # pytest's own is closed to others
        folder = Path(name)
        python = install_for_everybody(
            folder, "vmm_linux.cli.__main__", "vmm_linux.demo", "vmm_linux.demo.peer", "shutil"
        )
        child = subprocess.run(
            [*python, "-m", "vmm_linux.cli", "demo", "/bin/sh"],
            check=False,
            cwd="/",
            env=of_installed(folder),
            capture_output=True,
            text=True,
            user=nobody,
            group=nobody,
            extra_groups=None if nobody is None else [],
        )
    assert (child.returncode, child.stderr) == (0, "")
    assert len(child.stdout.splitlines()) == HEAD + len(STEPS) + TAIL
    assert child.stdout.endswith("Every check held.\n")


def test_a_step_that_fails_is_the_last_and_says_why(some_file: Path) -> None:
    child = subprocess.run(
        ["/bin/sh", "-c", f'ulimit -v {32 << 20} && exec "$0" demo "$1"', SCRIPT, str(some_file)],
        check=False,
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
    )
    assert child.returncode == 1
    step, verdict = child.stdout.splitlines()[HEAD:]
    assert step.startswith("FAILED  Allocate(0, 64 GiB, ")
    assert step.endswith("rcQuotaExceeded")
    assert verdict == "FAILED: see the last step."
    assert child.stderr.startswith("vmm-linux demo: Allocate: not so: allocate: ")
    assert "RLIMIT_AS" in child.stderr


def test_a_file_that_changes_meanwhile_is_told_so(some_file: Path) -> None:
    # A name so long that the line with it fills the pipe: the command waits before its first step.
    longest = 4060
    name = f"{some_file.parent}{'/.' * ((longest - len(str(some_file))) // 2)}/{some_file.name}"
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    filler = os.write(writer, bytes(PAGE - 4096))
    with subprocess.Popen(
        [SCRIPT, "demo", name],
        stdout=writer,
        stderr=subprocess.PIPE,
        env=environment({}),
        text=True,
    ) as process:
        os.close(writer)
        with open(reader, "rb", buffering=0) as lines:  # noqa: PTH123  a descriptor is no path
            assert len(lines.read(filler)) == filler
            assert lines.read(4) == b"FILE"
            some_file.write_bytes(b"another content")
            while lines.read(1 << 16):
                pass
        _, complaint = process.communicate(timeout=60)
    assert process.returncode == 2
    assert complaint.splitlines()[-1].endswith("changed while it was read")

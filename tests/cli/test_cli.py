"""The command ``vmm-linux``, started as people start it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import vmm_linux
from children import ROOT, run_child
from commands import SCRIPT, environment, run
from vmm_linux.cli import COMMANDS


def test_the_version_is_the_packages() -> None:
    child = run("--version")
    assert (child.returncode, child.stdout) == (0, f"vmm-linux {vmm_linux.__version__}\n")


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_command_with_what_it_does(option: str) -> None:
    child = run(option)
    assert (child.returncode, child.stderr) == (0, "")
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        assert f"  {name:<{width}}  {command.summary}\n" in child.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_of_its_own(name: str) -> None:
    child = run(name, "--help")
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith(f"usage: vmm-linux {name} ")


@pytest.mark.parametrize(
    ("module", "usage"),
    [
        ("cli", "vmm-linux [-h]"),
        ("demo", "vmm-linux demo [-h]"),
        ("broker", "vmm-linux broker [-h]"),
        ("doctor", "vmm-linux doctor [-h]"),
        ("experiments", "vmm-linux experiment [-h]"),
    ],
)
def test_what_has_commands_is_run_as_a_module_too(module: str, usage: str) -> None:
    child = subprocess.run(
        [sys.executable, "-W", "error", "-m", f"vmm_linux.{module}", "--help"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith(f"usage: {usage}")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "the following arguments are required: COMMAND\n"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("--nonsense",), "the following arguments are required: COMMAND\n"),
        (("demo", "--nonsense"), "unrecognized arguments: --nonsense\n"),
        (("demo", "a", "b"), "unrecognized arguments: b\n"),
    ],
)
def test_what_is_no_command_line_is_told_so(arguments: tuple[str, ...], complaint: str) -> None:
    child = run(*arguments)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.startswith("usage: vmm-linux")
    assert complaint in child.stderr


def test_the_module_is_the_command_too() -> None:
    command = [sys.executable, "-m", "vmm_linux.cli", "--version"]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == run("--version").stdout


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [SCRIPT, "demo"], check=False, stdout=writer, stderr=subprocess.PIPE, env=environment({})
    )
    os.close(writer)
    assert (child.returncode, child.stderr) == (128 + signal.SIGPIPE, b"")


def test_a_full_disk_is_told_in_one_line() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123  a device
        child = subprocess.run([SCRIPT, "demo"], check=False, stdout=full, stderr=subprocess.PIPE)
    assert child.returncode == 2
    assert child.stderr == b"vmm-linux demo: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["map", "--help"]])
def test_help_that_does_not_arrive_is_no_success(arguments: list[str], unbuffered: str) -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123  a device
        child = subprocess.run(
            [SCRIPT, *arguments],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment({"PYTHONUNBUFFERED": unbuffered}),
        )
    assert child.returncode == 2
    assert child.stderr.endswith(b": [Errno 28] No space left on device\n")
    assert child.stderr.count(b"\n") == 1


def run_with_few_descriptors(arguments: list[str], most: int) -> None:
    """Run a command with so many descriptors, of which it has three."""
    import os
    import resource
    import sys

    import vmm_linux.cli

    os.closerange(3, 100)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    sys.exit(vmm_linux.cli.main(arguments))


#: What commands cannot do without.
ARGUMENTS = {
    "query": ["0"],
    "diff": ["before.json", "after.json"],
    "experiment": ["run", "decommit", "--quick"],
    "audit": ["trace", "1", "audit.jsonl"],
    "broker": ["--socket", "broker.socket"],
}


@pytest.mark.parametrize("most", [3, 4])
@pytest.mark.parametrize("command", COMMANDS)
def test_too_few_descriptors_are_told_in_a_line(command: str, most: int) -> None:
    child = run_child(run_with_few_descriptors, [command, *ARGUMENTS.get(command, [])], most)
    if child.returncode == 1:
        assert command == "doctor"
        assert "CANNOT do its work" in child.stdout
        assert child.stderr == ""
    else:
        assert child.returncode == 2
        *_, line = child.stderr.splitlines()
        assert line.startswith("vmm-linux")
        assert "Traceback" not in child.stderr
        assert child.stderr.count("\n") == 1


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_it_works_without_its_standard_streams(closed: tuple[int, ...]) -> None:
    redirections = " ".join(f"{descriptor}>&-" for descriptor in closed)
    shell = ["/bin/sh", "-c", f'exec "$0" demo {redirections}', SCRIPT]
    assert subprocess.run(shell, check=False, stdout=subprocess.DEVNULL).returncode == 0

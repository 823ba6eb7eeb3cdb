"""Shared memory that somebody hides, that may not be read, and what the command says of it."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import commands
from channels import give, holder, mapper, memory_file, take_and_map
from children import NOBODY, run_child
from kernel_oracle import PAGE
from partners import partner
from vmm_linux.inspect import sharing, snapshot

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator


#: What a child answers that may not do what its test needs.
CANNOT_MOUNT = 77
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs another user's processes")


# ---- what somebody does so as not to be seen -----------------------------------------------------


def map_in_deep_folder(sock: socket.socket, top: Path, depth: int, *, close: bool) -> object:
    """Share a file whose path has more characters than a system call would take."""
    os.chdir(top)
    for _ in range(depth):
        os.mkdir("d" * 200)  # noqa: PTH102 (the path is too long for anything else)
        os.chdir("d" * 200)
    fd = os.open("file", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(fd, PAGE)
    sock.sendall(os.fstat(fd).st_ino.to_bytes(8, "little"))
    mapped = mmap.mmap(fd, PAGE)
    if close:
        os.close(fd)
    return mapped


@contextlib.contextmanager
def folder_in_memory() -> Iterator[Path]:
    folder = tempfile.mkdtemp(dir="/dev/shm")
    try:
        yield Path(folder)
    finally:  # shutil.rmtree goes by recursion
        subprocess.run(["/bin/rm", "-rf", folder], check=True)


@pytest.mark.parametrize("depth", [30, 400])
def test_a_path_of_any_length_hides_nothing(depth: int) -> None:
    with (
        folder_in_memory() as top,
        partner(lambda sock: map_in_deep_folder(sock, top, depth, close=False)) as other,
    ):
        inode = int.from_bytes(other.sock.recv(8), "little")
        other.wait_until_ready()
        (channel,) = [e for e in sharing(all=True).channels if e.inode == inode]
        assert channel.name == f"{top}{'/' + 'd' * 200}" + f"/{'d' * 200}" * (depth - 1) + "/file"
        assert holder(channel, other.pid).access == "rw"
        assert mapper(channel, other.pid).size == PAGE
        assert [e.pathname for e in snapshot(other.pid) if e.inode == inode] == [channel.name]


@needs_root
def test_a_carriage_return_in_the_name_of_a_mount_hides_nothing(tmp_path: Path) -> None:
    done = run_child(share_beside_odd_mount, str(tmp_path))
    if done.returncode == CANNOT_MOUNT:
        pytest.skip("this process may not mount")
    assert (done.returncode, done.stdout, done.stderr) == (0, "seen\n", "")


def share_beside_odd_mount(top: str) -> None:
    """Look at this process, which has mounts of its own; 77 if it may not."""
    import ctypes
    import os
    import sys
    from pathlib import Path

    from vmm_linux.doctor import diagnose
    from vmm_linux.inspect import sharing

    libc = ctypes.CDLL(None)
    point = f"{top}/a\r b\x0bc\u2028d"
    Path(point).mkdir()
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
        sys.exit(77)
    if libc.mount(b"x", os.fsencode(point), b"tmpfs", 0, None):
        sys.exit(77)
    fd = os.memfd_create("seen")
    sys.stdout.write("".join(f"{e.name}\n" for e in sharing(all=True).channels if e.name == "seen"))
    os.close(fd)
    diagnose()


@needs_root
def test_a_file_system_that_was_taken_away_hides_nothing(tmp_path: Path) -> None:
    done = run_child(share_without_mount, str(tmp_path))
    if done.returncode == CANNOT_MOUNT:
        pytest.skip("this process may not mount")
    assert (done.returncode, done.stdout, done.stderr) == (0, "detached file /kept\n", "")


def share_without_mount(point: str) -> None:
    """Map a file of a tmpfs, take the mount away, and look at this process; 77 if it may not."""
    import ctypes
    import mmap
    import os
    import sys
    from pathlib import Path

    from vmm_linux.inspect import sharing

    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
        sys.exit(77)
    if libc.mount(b"x", os.fsencode(point), b"tmpfs", 0, None):
        sys.exit(77)
    with Path(point, "kept").open("w+b") as file:
        file.truncate(4096)
        mapped = mmap.mmap(file.fileno(), 4096)
    if libc.umount2(os.fsencode(point), 2):
        sys.exit(77)
    channels = [each for each in sharing(all=True).channels if each.name == "/kept"]
    sys.stdout.write("".join(f"{each.kind} {each.name}\n" for each in channels))
    mapped.close()


@needs_root
def test_processes_of_which_nothing_is_told_are_counted_too() -> None:
    done = run_child(look_with_hidden_processes)
    if done.returncode == CANNOT_MOUNT:
        pytest.skip("this process may not mount")
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def look_with_hidden_processes() -> None:
    """Look as a user to whom /proc tells no more than that processes are there (hidepid=1)."""
    import ctypes
    import os
    import sys

    from vmm_linux.inspect import sharing

    libc = ctypes.CDLL(None)
    if libc.unshare(0x20000) or libc.mount(None, b"/", None, 0x44000, None):
        sys.exit(77)
    if libc.mount(b"proc", b"/proc", b"proc", 0, b"hidepid=1"):
        sys.exit(77)
    parent = os.getppid()
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    libc.prctl(4, 1, 0, 0, 0)
    sys.stdout.write(f"{parent in [each.pid for each in sharing().unread]}\n")


# ---- what may not be read ------------------------------------------------------------------------


@needs_root
def test_what_an_ordinary_user_may_not_read_is_counted_and_named() -> None:
    with memory_file() as fd, partner(lambda _: None) as other:
        other.wait_until_ready()
        done = run_child(look_as_nobody, nobody=True)
        assert done.stderr == ""
        answer = json.loads(done.stdout)
        inode = os.fstat(fd).st_ino
    unread = {each["pid"]: each for each in answer["unread"]}
    assert {os.getpid(), other.pid} <= unread.keys()
    assert unread[other.pid]["uid"] == 0
    assert answer["own"]
    assert inode not in answer["inodes"]
    assert answer["uid"] == NOBODY


def look_as_nobody() -> None:
    """Print what this user sees, of a memfd of its own that it shares with a child, too."""
    import json
    import os
    import traceback  # by errors

    from vmm_linux.inspect import sharing

    fd = os.memfd_create("nobody's")
    os.truncate(fd, 4096)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    # Of a process that changed its user, the child may not be read; its own it may.
    found = sharing(all=True)
    os.close(writer)
    os.waitpid(child, 0)
    own = [each for each in found.channels if each.inode == os.fstat(fd).st_ino]
    answer = {
        "uid": os.geteuid(),
        "own": [each.name for each in own] == ["nobody's"] and own[0].seals is not None,
        "inodes": [each.inode for each in found.channels],
        "unread": [{"pid": each.pid, "uid": each.uid} for each in found.unread],
    }
    print(json.dumps(answer), end=traceback.__name__[:0])


def test_kernel_threads_are_neither_read_nor_missed() -> None:
    found = sharing(all=True)
    kernel_threads = {
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdecimal() and not cmdline(path) and is_kernels(path)
    }
    assert kernel_threads.isdisjoint(each.pid for each in found.unread)
    assert os.getpid() not in {each.pid for each in found.unread}
    assert found.read > 0


def cmdline(path: Path) -> bytes:
    try:
        return (path / "cmdline").read_bytes()
    except (OSError, ProcessLookupError):
        return b"gone"


def is_kernels(path: Path) -> bool:
    try:
        return (path / "status").read_text().count("Kthread:\t1") == 1
    except OSError as error:
        assert error.errno in {errno.ENOENT, errno.ESRCH}  # noqa: PT017  gone meanwhile
        return False


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_shows_both_ends_in_plain_text() -> None:
    with partner(take_and_map) as other, memory_file("seen \x1b[31m") as fd:
        give(other, fd)
        inode = os.fstat(fd).st_ino
        done = commands.run("sharing")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    (at,) = [n for n, line in enumerate(lines) if f" {inode}]" in line and "memfd" in line]
    ends = lines[at : at + 2]
    (ours,) = [line for line in ends if f" {os.getpid()} " in line]
    (theirs,) = [line for line in ends if f" {other.pid} " in line]
    assert f"rw fd {fd}" in ours
    assert "rw-s 16 KiB" in theirs or PAGE != 4096
    assert any(line.startswith("Channels: ") for line in lines)


def test_the_command_writes_json() -> None:
    with partner(take_and_map) as other, memory_file("for programs") as fd:
        give(other, fd)
        inode = os.fstat(fd).st_ino
        done = commands.run("sharing", "--json")
        lone = os.memfd_create("alone", os.MFD_CLOEXEC)
        all_of_it = commands.run("sharing", "--json", "--all")
        alone = os.fstat(lone).st_ino
        os.close(lone)
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer.keys() == {"channels", "unread", "read"}
    (found,) = [e for e in answer["channels"] if (e["kind"], e["inode"]) == ("memfd", inode)]
    assert (found["name"], found["size"], found["processes"]) == ("for programs", 4 * PAGE, 2)
    assert [each["pid"] for each in found["mappers"]] == [other.pid]
    assert alone not in [each["inode"] for each in answer["channels"]]
    assert alone in [each["inode"] for each in json.loads(all_of_it.stdout)["channels"]]


@pytest.mark.parametrize("columns", [80, 160])
def test_on_a_terminal_no_line_is_wider_than_it(columns: int) -> None:
    with partner(take_and_map) as other, memory_file() as fd:
        give(other, fd)
        shown = commands.run_on_terminal(columns, commands.SCRIPT, "sharing")
    assert shown.returncode == 0
    assert str(other.pid) in "".join(shown.lines)
    assert max(len(line) for line in shown.lines if not line.startswith("NOT")) <= columns


@needs_root
def test_the_command_says_what_it_could_not_read() -> None:
    done = run_child(command_as_nobody, nobody=True)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NOT to be read")]
    assert " processes (1, " in line


def command_as_nobody() -> None:
    """Run the command as whom it may be."""
    import gettext  # by argparse
    import locale
    import shutil
    import sys

    from vmm_linux import cli
    from vmm_linux.cli import sharing

    modules = (gettext, locale, shutil, sharing)
    assert {module.__name__ for module in modules} <= sys.modules.keys()
    sys.exit(cli.main(["sharing"]))

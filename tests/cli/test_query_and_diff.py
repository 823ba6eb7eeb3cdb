"""``vmm-linux query`` and ``diff``, and processes that cannot be looked at."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO, Any, cast

import pytest

from children import run_child
from commands import SCRIPT, run
from constants import MIB
from map_subject import subject
from vmm_linux import inspect


def map_of(*arguments: str) -> dict[str, Any]:
    """The map in JSON."""
    child = run("map", *arguments, "--json", "-")
    assert (child.returncode, child.stderr) == (0, "")
    found: dict[str, Any] = json.loads(child.stdout)
    return found


# ---- query ---------------------------------------------------------------------------------------


def test_an_address_in_any_base_has_its_page_and_its_record() -> None:
    with subject() as it:
        va = it.reserved + (1 << 40) + 5
        child = run("query", str(it.pid), hex(va), "--json")
        answers = [run("query", str(it.pid), text).stdout for text in (str(va), oct(va), bin(va))]
        untouched = json.loads(run("query", str(it.pid), hex(it.reserved), "--json").stdout)
    assert (child.returncode, child.stderr) == (0, "")
    found = json.loads(child.stdout)
    assert found["page"] == va - 5
    assert "present" in found["page_flags"]
    assert found["mapping"]["start"] <= va < found["mapping"]["end"]
    assert found["mapping"]["rss"] > 0
    assert found["hole"] is None
    assert untouched["page_flags"] == []
    for answer in answers:
        assert answer == answers[0]
        assert answer.startswith(f"{va:#x} of PID {it.pid}\npage     present")
        assert "rss" in answer


def test_a_free_address_has_the_borders_of_its_hole() -> None:
    with subject() as it:
        found = json.loads(run("query", str(it.pid), "0x1000", "--json").stdout)
        lowest = inspect.snapshot(it.pid)[0].start
        child = run("query", str(it.pid), "0x1000")
    assert found["hole"] == {"start": 0, "end": lowest}
    assert found["mapping"] is None
    assert f"free: nothing is mapped from 0x0 to {lowest:#x}" in child.stdout


@pytest.mark.parametrize("address", ["", "x", "-1", "0x", "1.5", "010", hex(1 << 64), "0x1 2"])
def test_what_is_no_address_is_told_so(address: str) -> None:
    child = run("query", str(os.getpid()), "--", address)
    assert (child.returncode, child.stdout) == (2, "")
    assert "is no address: a number from 0 to 2^64 - 1" in child.stderr


# ---- diff ----------------------------------------------------------------------------------------


def test_two_maps_differ_in_what_the_process_took_meanwhile(tmp_path: Path) -> None:
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    with subject() as it:
        assert run("map", str(it.pid), "--json", str(before)).returncode == 0
        it.take(24)
        assert run("map", str(it.pid), "--json", str(after)).returncode == 0
    child = run("diff", str(before), str(after))
    assert (child.returncode, child.stderr) == (0, "")
    assert re.search(r"^[+~] .*24 MiB", child.stdout, re.MULTILINE)
    found = json.loads(run("diff", str(before), str(after), "--json").stdout)
    grown = [change["grown"] for change in found["changed"]]
    appeared = [mapping["end"] - mapping["start"] for mapping in found["appeared"]]
    assert any(size >= 24 * MIB for size in grown + appeared)
    nothing = json.loads(run("diff", str(before), str(before), "--json").stdout)
    assert (nothing["appeared"], nothing["went"], nothing["changed"]) == ([], [], [])


def test_a_map_with_regions_and_fields_of_a_newer_kernel_is_read_again(tmp_path: Path) -> None:
    file, newer = tmp_path / "a.json", tmp_path / "b.json"
    assert run("map", "--json", str(file)).returncode == 0
    found = json.loads(file.read_text())
    found["mappings"][0]["new_figure"] = 4096
    newer.write_text(json.dumps(found))
    assert run("diff", str(file), str(file)).stdout.count("\n") == 1
    changed = json.loads(run("diff", str(file), str(newer), "--json").stdout)["changed"]
    assert [change["after"]["new_figure"] for change in changed] == [4096]


RECORD = {
    "start": 4096,
    "end": 8192,
    "permissions": "rw-p",
    "offset": 0,
    "device": "00:00",
    "inode": 0,
    "pathname": None,
    "deleted": False,
    "region": None,
    "cut_from": None,
    "vm_flags": ["rd"],
    "size": 4096,
}
MAP = {"format": "vmm-linux map", "version": 1, "pid": 1, "taken": "now", "mappings": [RECORD]}


def with_record(**changes: object) -> dict[str, object]:
    """A map with one record, which is another in these members."""
    return {**MAP, "mappings": [{**RECORD, **changes}]}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is no JSON: line 1, column 1: Expecting value"),
        (b"{]", "is no JSON: line 1, column 2"),
        (b"\xff\xfe", "is no JSON: byte 0 is no UTF-8"),
        (b"[" * 100_000, "is no JSON that can be read"),
        (b"[]", "is JSON, but no map: 'format' is not 'vmm-linux map'"),
        (b'{"steps": []}', "is JSON, but no map"),
        ({**MAP, "version": 2}, "is a map of version 2; this program reads 1"),
        ({**MAP, "pid": "1"}, 'pid: "1" is not a whole number'),
        ({**MAP, "pid": True}, "pid: true is not a whole number"),
        ({**MAP, "mappings": {}}, "mappings: {} is not a list"),
        ({**MAP, "mappings": [1]}, "mappings[0]: 1 is not an object"),
        ({**MAP, "mappings": [{}]}, "mappings[0].start is missing"),
        ({**MAP, "mappings": [RECORD, RECORD]}, "mappings[1].start: 4096 is not an address above"),
        (with_record(start=1.5), "mappings[0].start: 1.5 is not a whole number"),
        (with_record(end=4096), "mappings[0].end: 4096 is not above the start"),
        (with_record(end=1 << 64), "mappings[0].end: 18446744073709551616 is not a whole number"),
        (with_record(permissions="rwxp\n"), "mappings[0].permissions"),
        (with_record(device="x"), "mappings[0].device"),
        (with_record(pathname=3), "mappings[0].pathname: 3 is not a text"),
        (with_record(vm_flags="rd"), 'mappings[0].vm_flags: "rd" is not a list'),
        (with_record(rss=-1), "mappings[0].rss: -1 is not a whole number"),
        (with_record(rss="4096"), 'mappings[0].rss: "4096" is not a whole number'),
        (with_record(**{"\x1b[31m": 1}), "is no figure's name"),
        (with_record(region={"base": 1}), "mappings[0].region.size is missing"),
        (with_record(cut_from=RECORD | {"end": 1}), "mappings[0].cut_from.end"),
    ],
)
def test_what_is_no_map_is_told_with_where_and_why(
    content: bytes | dict[str, object], complaint: str, tmp_path: Path
) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    child = run("diff", str(file), str(file))
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.startswith(f"vmm-linux diff: {file} ")
    assert complaint in child.stderr
    assert child.stderr.count("\n") == 1
    assert "\x1b" not in child.stderr


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "No such file"), (tmp_path, "Is a directory")):
        child = run("diff", str(path), str(path))
        assert (child.returncode, child.stdout) == (2, "")
        assert child.stderr.startswith(f"vmm-linux diff: {path} cannot be read: {reason}")


# ---- processes that cannot be looked at ----------------------------------------------------------


@pytest.mark.parametrize("pid", ["0", "-1", "x", "1.5", "", "٣"])
def test_what_is_no_process_id_is_told_so(pid: str) -> None:
    child = run("map", "--", pid)
    assert (child.returncode, child.stdout) == (2, "")
    assert "is no process id, a number above 0" in child.stderr


def no_process() -> int:
    """An id that no process has: that of one that has ended."""
    process = subprocess.Popen(["/bin/true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("pid", [None, 1 << 22 | 1, 1 << 31, 1 << 70])
def test_a_process_that_there_is_not_is_told_so(pid: int | None) -> None:
    wanted = str(no_process() if pid is None else pid)
    for command in (("map", wanted), ("query", wanted, "0x1000")):
        child = run(*command)
        assert (child.returncode, child.stdout) == (2, "")
        assert child.stderr.startswith(f"vmm-linux {command[0]}: ")
        assert child.stderr.count("\n") == 1


def test_a_zombie_has_no_memory() -> None:
    process = subprocess.Popen(["/bin/true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    child = run("map", str(process.pid))
    process.wait()
    assert (child.returncode, child.stdout) == (2, "")
    assert "zombie" in child.stderr.lower() or "ended" in child.stderr


def test_a_thread_of_the_kernel_has_no_memory_of_its_own() -> None:
    name = Path("/proc/2/comm")
    if not name.exists() or name.read_text() != "kthreadd\n":
        pytest.skip("no thread of the kernel is seen from here")
    child = run("map", "2")
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.startswith("vmm-linux map: snapshot: ")
    assert "kernel" in child.stderr


def look_at(pid: int) -> None:
    """Ask for the map of a process; the exit code says how it went."""
    import locale  # noqa: F401  argparse does later, when the library may not be read any more

    from vmm_linux._tools.commands import run
    from vmm_linux.cli.map.command import main

    sys.exit(run("vmm-linux map", main, [str(pid)]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a process that others may not see")
def test_another_users_process_is_refused_to_an_ordinary_user() -> None:
    child = run_child(look_at, os.getpid(), nobody=True)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.startswith("vmm-linux map: snapshot: ")
    assert child.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--watch",), "--watch needs a process"),
        (("1", "--watch", "0"), "is no number of seconds"),
        (("1", "--watch", "nan"), "is no number of seconds"),
        (("1", "--watch", "1", "--json", "-"), "--watch writes no files"),
        (("--json", "-", "--csv", "-"), "two outputs to one place"),
        (("--json", "-", "--regions"), "two outputs to one place"),
        (("--json", ""), "an empty name of a file"),
        (("1", "2"), "unrecognized arguments: 2"),
    ],
)
def test_what_does_not_go_together_is_told_so(arguments: tuple[str, ...], complaint: str) -> None:
    child = run("map", *arguments)
    assert (child.returncode, child.stdout) == (2, "")
    assert complaint in child.stderr


def test_one_place_under_two_names_is_refused_and_nothing_left_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    child = run("map", "--json", f"{tmp_path}/file", "--csv", f"{tmp_path}/link")
    assert (child.returncode, child.stdout) == (2, "")
    assert "two outputs to one place" in child.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("end", ["/", "//", "/.", "/.."])
@pytest.mark.parametrize("there", [None, "file", "folder", "pipe"])
def test_the_name_of_a_folder_is_no_files(tmp_path: Path, end: str, there: str | None) -> None:
    place = tmp_path / "place"
    if there == "file":
        place.touch()
    elif there == "folder":
        place.mkdir()
    elif there == "pipe":
        os.mkfifo(place)
    before = [(each.name, each.stat().st_size) for each in tmp_path.iterdir()]
    child = run("map", "--json", f"{place}{end}")
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == f"vmm-linux map: {place}{end}: Is a directory\n"
    assert [(each.name, each.stat().st_size) for each in tmp_path.iterdir()] == before


def test_words_of_a_process_that_are_no_text_are_shown_as_they_are() -> None:
    code = (
        "import ctypes, sys; ctypes.CDLL(None).prctl(15, b'od\\xffd) (', 0, 0, 0); "
        "print(flush=True); sys.stdin.read()"
    )
    command = [os.fsencode(sys.executable), b"-c", code.encode(), b"\xff", b"a b", b"", b"\x1b[1m"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        cast("IO[bytes]", process.stdout).readline()
        found = map_of(str(process.pid))
        process.communicate()
    assert os.fsencode(found["program"]) == b"od\xffd) ("
    assert os.fsencode(found["command"]) == b" ".join(filter(None, command))


def test_a_link_to_itself_stays_one(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    child = run("map", "--json", f"{tmp_path}/loop")
    assert (child.returncode, child.stdout) == (2, "")
    assert os.strerror(errno.ELOOP) in child.stderr
    assert [each.is_symlink() for each in tmp_path.iterdir()] == [True]


def test_whose_rights_a_file_ran_with_are_not_taken_over(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    place.chmod(0o4751)
    assert run("map", "--json", str(place)).returncode == 0
    assert place.stat().st_mode & 0o7777 == 0o751


def test_a_process_of_thousands_of_digits_is_no_process() -> None:
    for arguments in (("map", "1" * 5000), ("query", "1" * 5000, "0x1000")):
        child = run(*arguments)
        assert (child.returncode, child.stdout) == (2, "")
        assert "is no process id" in child.stderr


def test_errno_of_a_full_disk_is_told() -> None:
    with open("/dev/full", "wb") as full:  # noqa: PTH123  a device
        child = subprocess.run(
            [SCRIPT, "map", "--json", "-"], check=False, stdout=full, stderr=subprocess.PIPE
        )
    assert child.returncode == 2
    assert os.strerror(errno.ENOSPC).encode() in child.stderr

"""``vmm-linux map``: pictures of real processes, in files and as they change."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import signal
import stat
import subprocess
import time
from typing import IO, TYPE_CHECKING, Any, cast

import pytest

from children import ROOT, run_child
from commands import SCRIPT, WITHOUT_RICH, environment, run, run_on_terminal
from constants import MIB
from map_subject import HOSTILE, subject
from vmm_linux import inspect

if TYPE_CHECKING:
    from pathlib import Path

#: A Python that acts as if a module were not installed; the command line follows.
WITHOUT_MATPLOTLIB = tuple(word.replace("rich", "matplotlib") for word in WITHOUT_RICH)


def map_of(*arguments: str) -> dict[str, Any]:
    """The map in JSON."""
    child = run("map", *arguments, "--json", "-")
    assert (child.returncode, child.stderr) == (0, "")
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def groups_of(found: dict[str, Any]) -> dict[str, dict[str, int]]:
    """The groups of a map by their names."""
    return {group["group"]: group for group in found["groups"]}


# ---- what is seen --------------------------------------------------------------------------------


def test_every_kind_of_memory_is_in_its_group_with_what_is_resident_of_it() -> None:
    with subject() as it:
        found = map_of(str(it.pid))
        kernel = inspect.rollup(it.pid)
    groups = groups_of(found)
    assert groups.keys() >= {"anonymous", "heap", "stacks", "libraries", "shared", "kernel"}
    assert groups["shared"]["reserved"] >= 32 * MIB
    assert 4 * MIB <= groups["shared"]["resident"] < 5 * MIB
    anonymous = groups["anonymous"]
    assert anonymous["reserved"] >= (4 << 40) + (1 << 30)
    # What may not be accessed is reserved alone.
    assert anonymous["reserved"] - anonymous["committed"] >= 1 << 30
    assert anonymous["resident"] >= 8 * MIB
    assert found["totals"]["resident"] == kernel.figures["rss"]
    for name in ("reserved", "committed", "resident"):
        assert sum(group[name] for group in groups.values()) == found["totals"][name]


def test_the_biggest_group_comes_first() -> None:
    with subject() as it:
        found = map_of(str(it.pid))
    residents = [group["resident"] for group in found["groups"]]
    assert residents == sorted(residents, reverse=True)


def test_json_has_every_record_with_every_figure_in_bytes() -> None:
    with subject() as it:
        found = map_of(str(it.pid))
        records = inspect.snapshot(it.pid)
    assert len(found["mappings"]) == len(records)
    for told, record in zip(found["mappings"], records, strict=True):
        assert (told["start"], told["end"]) == (record.start, record.end)
        assert told["pathname"] == record.pathname
        assert told["vm_flags"] == sorted(record.vm_flags or ())
        assert record.figures.keys() <= told.keys()
        assert told["size"] == record.end - record.start


def test_csv_has_a_line_for_every_mapping_with_the_same_figures() -> None:
    with subject() as it:
        child = run("map", str(it.pid), "--csv", "-")
        records = inspect.snapshot(it.pid)
    rows = list(csv.DictReader(io.StringIO(child.stdout)))
    assert len(rows) == len(records) == child.stdout.count("\n") - 1
    for row, record in zip(rows, records, strict=True):
        assert int(row["start"]) == record.start
        assert int(row["size"]) == record.figures["size"]
        assert row["permissions"] == record.permissions


def test_the_table_has_every_mapping_once() -> None:
    with subject() as it:
        child = run("map", str(it.pid), "--regions")
        records = inspect.snapshot(it.pid)
    assert (child.returncode, child.stderr) == (0, "")
    found = re.findall(r"^ *([0-9a-f]+) +([0-9a-f]+) [r-][w-][x-][sp]", child.stdout, re.MULTILINE)
    expected = [(f"{record.start:x}", f"{record.end:x}") for record in records]
    assert found == expected


def test_regions_of_the_package_are_told_apart_by_state() -> None:
    found = map_of()
    ours = groups_of(found)["ours"]
    # 64 GiB reserved, 32 MiB of it committed, 12 of it used; a buffer of 8 MiB, 2 of it used.
    assert ours["reserved"] == (64 << 30) + 8 * MIB
    assert ours["committed"] == 40 * MIB
    assert ours["resident"] == 14 * MIB
    states = {
        mapping["region"]["state"] for mapping in found["mappings"] if mapping["region"] is not None
    }
    assert states == {"RESERVED", "COMMITTED"}


def show_itself() -> None:
    """Make regions, and show the map of this very process."""
    import os

    from vmm_linux import VMM
    from vmm_linux.cli import main

    with VMM() as vmm, vmm.region(1 << 24) as region:
        region.commit(0, 1 << 22)
        assert main(["map", str(os.getpid()), "--json", "-"]) == 0


def test_a_program_can_show_its_own_regions() -> None:
    child = run_child(show_itself)
    assert (child.returncode, child.stderr) == (0, "")
    ours = groups_of(json.loads(child.stdout))["ours"]
    assert (ours["reserved"], ours["committed"], ours["resident"]) == (1 << 24, 1 << 22, 0)


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_colours_and_shades_and_no_line_too_long(columns: int) -> None:
    with subject() as it:
        shown = run_on_terminal(columns, SCRIPT, "map", str(it.pid))
    assert shown.returncode == 0
    assert "\x1b[" in shown.text
    assert max(map(len, shown.lines)) <= columns
    for shade in "█▓░":
        assert shade in shown.text


def test_without_rich_a_terminal_gets_plain_text_and_is_told_why() -> None:
    with subject() as it:
        shown = run_on_terminal(80, *WITHOUT_RICH, "map", str(it.pid))
    assert shown.returncode == 0
    assert "\x1b" not in shown.text
    assert "pip install 'vmm-linux[tools]'" in shown.text


def test_an_encoding_without_shades_gets_signs() -> None:
    with subject() as it:
        child = run("map", str(it.pid), PYTHONIOENCODING="ascii")
    assert child.returncode == 0
    assert child.stdout.isascii()
    assert re.search(r"^Anonymous +#+\+*\.* +4\.0\d+ TiB", child.stdout, re.MULTILINE)


# ---- files ---------------------------------------------------------------------------------------


def test_several_files_are_written_in_one_go(tmp_path: Path) -> None:
    files = {kind: tmp_path / f"map.{kind}" for kind in ("json", "csv", "html", "png", "svg")}
    options = [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    with subject() as it:
        child = run("map", str(it.pid), *options)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")
    assert sorted(tmp_path.iterdir()) == sorted(files.values())
    assert json.loads(files["json"].read_text())["pid"] == it.pid
    assert files["png"].read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert "<svg" in files["svg"].read_text()
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(files["html"].stat().st_mode) == 0o666 & ~mask


def test_the_page_asks_for_nothing_and_has_pages_of_terabytes_that_are_hardly_used(
    tmp_path: Path,
) -> None:
    file = tmp_path / "map.html"
    with subject() as it:
        began = time.monotonic()
        assert run("map", str(it.pid), "--html", str(file)).returncode == 0
        assert time.monotonic() - began < 20
        page_size = os.sysconf("SC_PAGE_SIZE")
    text = file.read_text()
    assert "default-src 'none'" in text
    for word in ("http://", "https://", '<link rel="stylesheet', "<script src", "@import", "url("):
        assert word not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    huge = next(row for row in data["mappings"] if row["size"] >= 4 << 40)
    page = it.reserved // page_size + ((1 << 40) // page_size)
    assert [page - huge["start"], 3] in [run[:2] for run in huge["pages"]]
    used = [row for row in data["mappings"] if row["resident"]]
    assert used
    assert all(row["pages"] for row in used)


def test_names_that_would_be_obeyed_are_shown_as_escapes(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/" + HOSTILE.replace(b"/", b"")
    outputs = {kind: tmp_path / f"map.{kind}" for kind in ("json", "csv", "html", "svg", "png")}
    options = [word for kind, file in outputs.items() for word in (f"--{kind}", str(file))]
    with subject(name) as it:
        assert run("map", str(it.pid), *options).returncode == 0
        plain = run("map", str(it.pid), COLUMNS="200")
        table = run("map", str(it.pid), "--regions")
        shown = run_on_terminal(200, SCRIPT, "map", str(it.pid), "--regions")
        found = next(
            mapping
            for mapping in inspect.snapshot(it.pid)
            if b"alert" in os.fsencode(mapping.pathname or "")
        )
        query = run("query", str(it.pid), hex(found.start))
    assert os.fsencode(found.pathname or "") == name
    for text in (plain.stdout, table.stdout, query.stdout):
        assert "alert(1)" in text
        assert re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text) is None
        assert r"\n" in text
        assert r"\x1b" in text
    assert "\x1b]" not in shown.text
    assert "\x07" not in shown.text

    mappings = json.loads(outputs["json"].read_text())["mappings"]
    assert os.fsdecode(name) in [mapping["pathname"] for mapping in mappings]
    rows = list(csv.DictReader(outputs["csv"].read_text().splitlines()))
    assert len(rows) == len(mappings) == len(outputs["csv"].read_text().splitlines()) - 1
    page = outputs["html"].read_text()
    assert "<script>alert" not in page
    assert page.count("</script>") == 2
    assert "alert" not in re.sub(r'<script type="application/json".*?</script>', "", page)
    assert run("diff", str(outputs["json"]), str(outputs["json"])).returncode == 0


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    before.write_text("before")
    missing = tmp_path / "no" / "such" / "folder.html"
    child = run("map", "--json", str(before), "--html", str(missing))
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == f"vmm-linux map: {missing}: No such file or directory\n"
    assert before.read_text() == "before"
    assert list(tmp_path.iterdir()) == [before]


@pytest.mark.parametrize(
    ("place", "reason"),
    [(".", "Is a directory"), ("/dev/full", "No space left on device"), ("/proc/none", "")],
)
def test_places_that_take_no_file_are_named(place: str, reason: str) -> None:
    child = run("map", "--csv", place)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr.startswith(f"vmm-linux map: {place}: {reason}")
    assert child.stderr.count("\n") == 1


def test_a_file_that_grows_too_long_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    shell = ["/bin/sh", "-c", 'ulimit -f 8; exec "$0" map "$1" --json "$2"']
    shell += [SCRIPT, str(os.getpid()), str(file)]
    child = subprocess.run(shell, check=False, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (2, "")
    assert child.stderr == f"vmm-linux map: {file}: {os.strerror(errno.EFBIG)}\n"
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_a_link_and_a_pipe_a_pipe(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to(target)
    assert run("map", "--json", str(link)).returncode == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["format"] == "vmm-linux map"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    child = run("map", "--json", "/dev/stdout")
    assert child.returncode == 0
    assert json.loads(child.stdout)["format"] == "vmm-linux map"


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_without_matplotlib_a_picture_says_which_extra_it_needs(kind: str, tmp_path: Path) -> None:
    child = subprocess.run(
        [*WITHOUT_MATPLOTLIB, "map", f"--{kind}", str(tmp_path / "map")],
        check=False,
        cwd=ROOT,
        env=environment({}),
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout) == (2, "")
    assert "pip install 'vmm-linux[plot]'" in child.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_ends_it_quietly() -> None:
    for options in ((), ("--json", "-"), ("--html", "-"), (str(os.getpid()), "--watch", "0.1")):
        reader, writer = os.pipe()
        os.close(reader)
        child = subprocess.run(
            [SCRIPT, "map", *options], check=False, stdout=writer, stderr=subprocess.PIPE
        )
        os.close(writer)
        assert (child.returncode, child.stderr) == (128 + signal.SIGPIPE, b"")


# ---- watching ------------------------------------------------------------------------------------


def test_watching_tells_what_appeared_and_ends_with_the_process() -> None:
    with subject() as it:
        with subprocess.Popen(
            [SCRIPT, "map", str(it.pid), "--watch", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment({}),
        ) as watcher:
            lines = cast("IO[str]", watcher.stdout)
            while "logarithmic" not in lines.readline():
                pass
            it.take(16)
            seen = lines.readline()
            while not re.match(r"[+~] .*16 MiB", seen):
                seen = lines.readline()
                assert seen
            it.process.kill()
            rest = lines.read()
            errors = cast("IO[str]", watcher.stderr).read()
        assert (watcher.returncode, errors) == (0, "")
    assert rest.endswith(f"The process has ended (PID {it.pid}).\n")


def test_on_a_terminal_a_watch_draws_the_picture_anew() -> None:
    with subprocess.Popen(["/bin/sleep", "3"]) as process:
        shown = run_on_terminal(90, SCRIPT, "map", str(process.pid), "--watch", "0.3")
    assert shown.returncode == 0
    assert shown.text.count("\x1b[H\x1b[2J") == shown.text.count("since") > 0
    assert shown.text.count("logarithmic") == shown.text.count("since") + 1
    assert shown.lines[-1] == f"The process has ended (PID {process.pid})."


def test_interrupting_a_watch_is_its_good_end() -> None:
    with (
        subject() as it,
        subprocess.Popen(
            # Whoever runs the tests in the background may ignore the signal.
            ["/usr/bin/env", "--default-signal=INT", SCRIPT, "map", str(it.pid), "--watch", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as watcher,
    ):
        lines = cast("IO[str]", watcher.stdout)
        while "since" not in lines.readline():
            pass
        watcher.send_signal(signal.SIGINT)
        assert watcher.wait(timeout=30) == 0
        assert cast("IO[str]", watcher.stderr).read() == ""

"""``vmm-linux experiment``: what it prints and writes, and what it refuses."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from browser import CHROMIUM, chromium
from children import ROOT, run_child
from commands import SCRIPT, environment, run, run_on_terminal
from onlookers import wait_until
from vmm_linux.experiments._framework.catalogue import catalogue, chosen

NAMES = [each.name for each in catalogue()]
#: A command line that acts as if matplotlib were not installed.
HIDDEN = "import sys; sys.modules['matplotlib'] = None"
WITHOUT_MATPLOTLIB = (
    sys.executable,
    "-c",
    HIDDEN + "; from vmm_linux.cli import main; sys.exit(main())",
)


def names_in(folder: Path) -> set[str]:
    """What is in a folder."""
    return {path.name for path in folder.iterdir()}


# ---- pictures and pages --------------------------------------------------------------------------


def draw_bars() -> None:
    """Draw a plot of bars in every way: matplotlib keeps files of letters open."""
    import re
    import xml.etree.ElementTree as ET

    from vmm_linux.experiments import Axis
    from vmm_linux.experiments._framework.plots import inline, picture_of
    from vmm_linux.experiments._framework.results import Plot

    plot = Plot("Bars $1_2$", Axis("way"), Axis("memory", "B"))
    plot.add("before", ["a", "b"], [1 << 20, 3 << 20])
    plot.add("after", ["a", "b"], [1 << 19, 0])
    assert picture_of(plot, "png").startswith(b"\x89PNG")
    assert b"<svg" in picture_of(plot, "svg")
    drawn = inline(plot, "prefix-")
    root = ET.fromstring(drawn)  # noqa: S314 (our own)
    words = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"before", "after", "Bars $1_2$", "way", "memory (bytes)", "2 MiB"} <= words
    assert all(name.startswith("prefix-") for name in re.findall(r'\bid="([^"]*)"', drawn))
    assert set(re.findall(r"#prefix-[\w-]+", drawn))


def test_a_plot_of_bars_is_drawn_as_png_and_as_svg() -> None:
    child = run_child(draw_bars)
    assert (child.returncode, child.stderr) == (0, "")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the command writes, of the first two experiments, twice run."""
    folder = tmp_path_factory.mktemp("written")
    common = [*NAMES[:2], "--quick", "--repeat", "2", "--seed", "7"]
    child = run(
        "experiment", "run", *common, f"--json={folder / 'all.json'}", f"--csv={folder / 'csv'}",
        f"--plot={folder / 'plots'}",
    )  # fmt: skip
    assert (child.returncode, child.stderr) == (0, ""), child.stdout
    (folder / "terminal").write_text(child.stdout)
    child = run("experiment", "report", *common, "--output", str(folder / "page.html"))
    assert (child.returncode, child.stderr) == (0, "")
    return folder


def test_the_command_writes_what_it_is_asked_for(written: Path) -> None:
    whole = json.loads((written / "all.json").read_text())
    assert [each["name"] for each in whole["experiments"]] == NAMES[:2]
    assert {each["seed"] for each in whole["experiments"]} == {7}
    assert whole["machine"]["facts"]["page"] == os.sysconf("SC_PAGE_SIZE")
    tables = [f"{each['name']}-{n + 1}.csv" for each in whole["experiments"]
              for n in range(len(each["tables"]))]  # fmt: skip
    assert names_in(written / "csv") == {*tables, "claims.csv"}
    plots = [f"{each['name']}-{n + 1}.{kind}" for each in whole["experiments"]
             for n in range(len(each["plots"])) for kind in ("png", "svg")]  # fmt: skip
    assert names_in(written / "plots") == set(plots)
    assert names_in(written) == {"all.json", "csv", "plots", "page.html", "terminal"}


def test_the_command_shows_question_prediction_outcome_and_explanation(written: Path) -> None:
    text = (written / "terminal").read_text()
    for experiment in chosen(NAMES[:2]):
        for words in ("title", "question", "prediction", "explanation"):
            assert " ".join(getattr(experiment, words).split()[:6]) in " ".join(text.split())
    assert "What came of the prediction" in text
    assert " … " in text


def test_json_on_the_standard_output_stands_alone() -> None:
    child = run("experiment", "run", NAMES[0], "--quick", "--json")
    assert (child.returncode, child.stderr) == (0, "")
    assert json.loads(child.stdout)["experiments"][0]["status"] == "done"


def test_the_page_has_every_experiment_and_loads_nothing(written: Path) -> None:
    page = (written / "page.html").read_text()
    for experiment in chosen(NAMES[:2]):
        assert f'<section id="{experiment.name}">' in page
        assert f'href="#{experiment.name}"' in page
    assert "@BODY@" not in page
    assert "<script" not in page
    names = re.findall(r'\bid="([^"]*)"', page)
    assert len(set(names)) == len(names)
    assert set(re.findall(r'href="#([^"]*)"', page)) <= set(names)
    assert re.findall(r'(?:src|href)="(?!#|data:)', page) == []


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is missing: apt-get install chromium")
def test_the_page_opens_in_a_browser_without_complaints(written: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as page:
        page.open(written / "page.html")
        backgrounds = set()
        for scheme in ("light", "dark"):
            page.prefer(scheme)
            backgrounds.add(page.run("getComputedStyle(document.body).backgroundColor"))
        assert len(backgrounds) == 2
        assert page.run("document.querySelectorAll('figure svg path').length") > 20
        assert "What came of the prediction" in page.run("document.body.innerText")
        assert page.complaints() == []
        asked_for = [url for url in page.requests() if not url.startswith("data:")]
        assert asked_for == [(written / "page.html").as_uri()]


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("run", "decomit"), "no experiment is called 'decomit'; did you mean decommit?"),
        (("run", "\x1b[31m"), r"no experiment is called '\x1b[31m'"),
        (("run",), "nothing to run: give names or --all"),
        (("run", "decommit", "--all"), "either names or --all"),
        (("run", "--all", "--seed", "-1"), "-1 is no number from 0 to 4294967295"),
        (("run", "--all", "--seed", "1" * 30), "is no number from 0 to 4294967295"),
        (("run", "--all", "--repeat", "0"), "0 is no number from 1 to 1000"),
        (("run", "--all", "--repeat", "many"), "many is no number from 1 to 1000"),
        (("run", "--all", "--memory", "1"), "--memory 1 is out of range: from 67108864 to"),
        (("run", "--all", "--memory", "9999999G"), "which this machine has available"),
        (("run", "--all", "--memory", "lots"), "lots is no size, as 512M or 2G"),
        (("run", "--json", "decommit"), "that is an experiment"),
        (("run", "--all", "--json", "/nowhere/file"), "/nowhere/file: No such file or directory"),
        (("run", "--all", "--json", "/proc"), "/proc: Is a directory"),
        (("run", "--all", "--json", "/proc/file"), "/proc/file: "),
        (("run", "--all", "--csv", "/nowhere/folder"), "/nowhere/folder: Not a directory"),
        (("run", "--all", "--csv", "/dev/null"), "/dev/null: Not a directory"),
        (("run", "--all", "--plot", ""), ": Not a directory"),
        (("report", "--output", "/nowhere/page"), "/nowhere/page: No such file or directory"),
        (("report",), "the following arguments are required: --output"),
        (("measure",), "invalid choice: 'measure'"),
    ],
)
def test_what_cannot_be_tried_is_told_before_anything_is(
    arguments: tuple[str, ...], complaint: str
) -> None:
    child = run("experiment", *arguments)
    assert (child.returncode, child.stdout) == (2, "")
    line = child.stderr.splitlines()[-1]
    assert line.startswith("vmm-linux experiment")
    assert complaint in line


@pytest.mark.parametrize(
    "arguments", [("run", "--all", "--plot", "."), ("report", "--output", "page.html")]
)
def test_without_matplotlib_it_says_which_extra(arguments: tuple[str, ...], tmp_path: Path) -> None:
    child = subprocess.run(
        [*WITHOUT_MATPLOTLIB, "experiment", *arguments],
        check=False,
        cwd=tmp_path,
        env=environment({"PYTHONPATH": str(ROOT)}),
        capture_output=True,
        text=True,
    )
    assert (child.returncode, child.stdout) == (2, "")
    expected = "plots need matplotlib: pip install 'vmm-linux[plot]'"
    assert child.stderr == f"vmm-linux experiment: {expected}\n"
    assert names_in(tmp_path) == set()


def test_a_file_that_cannot_be_written_is_told_before_measuring(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/sys/kernel/mm")  # where not even root makes files
    else:
        place = tmp_path
        place.chmod(0o500)
    child = run("experiment", "run", "--all", "--quick", f"--csv={place}")
    assert (child.returncode, child.stdout) == (2, "")
    assert str(place) in child.stderr


def test_where_files_cannot_be_written_there_is_no_folder_either(tmp_path: Path) -> None:
    folder = tmp_path / "csv"
    child = run("experiment", "run", "sharing", "--quick", "--json=/dev/full", f"--csv={folder}")
    assert child.returncode == 2
    assert child.stderr == "vmm-linux experiment: /dev/full: No space left on device\n"
    assert names_in(tmp_path) == set()


# ---- on a terminal, and Ctrl-C -------------------------------------------------------------------


def test_on_a_terminal_tables_are_drawn_and_progress_is_cleaned_up() -> None:
    shown = run_on_terminal(100, SCRIPT, "experiment", "run", NAMES[0], "--quick")
    assert shown.returncode == 0
    assert "─" in shown.text
    assert "\x1b[2K" in shown.text


def test_on_a_narrow_terminal_each_row_of_a_table_stands_for_itself() -> None:
    shown = run_on_terminal(40, SCRIPT, "experiment", "run", "sharing", "--quick")
    assert shown.returncode == 0
    result = shown.lines[next(n for n, line in enumerate(shown.lines) if "(sharing)" in line) + 1 :]
    assert max(map(len, result)) <= 40
    assert {"  processes: 8", "    sum of RSS: 64 MiB", "    outcome: held"} <= set(result)


def processes_with(mark: str) -> list[str]:
    """The processes that have this in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def be_told_to_end_while_writing() -> None:
    """Get every request to end, and say that one is still there."""
    import os
    import signal

    from vmm_linux.experiments._framework.command import uninterrupted

    with uninterrupted():
        for request in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), request)
        print("written", flush=True)
    print("and more")


def test_a_request_to_end_waits_while_files_are_written() -> None:
    child = run_child(be_told_to_end_while_writing)
    assert child.returncode in {-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT}
    assert child.stdout == "written\n"


@pytest.mark.parametrize("number", range(6))
def test_ctrl_c_leaves_no_process_and_no_unfinished_file(number: int, tmp_path: Path) -> None:
    after = random.Random(number).randrange(1, 600 * (number + 1) ** 2)  # noqa: S311
    mark = f"VMM_LINUX_TEST_{uuid.uuid4().hex}"
    ours, its = os.openpty()
    with open(ours, "rb", buffering=0) as screen:  # noqa: PTH123  a descriptor is no path
        files = [f"--json={tmp_path / 'json'}", f"--csv={tmp_path / 'csv'}"]
        process = subprocess.Popen(
            [SCRIPT, "experiment", "run", *NAMES[:2], "--quick", *files],
            stdin=subprocess.DEVNULL,
            stdout=its,
            stderr=its,
            env=environment({mark: "1"}),
        )
        os.close(its)
        text = b""
        with contextlib.suppress(OSError):  # it has ended
            while len(text) < after:
                text += screen.read(after - len(text))
            process.send_signal(signal.SIGINT)
            while True:
                text += screen.read(1 << 16)
        code = process.wait(timeout=60)
    assert code in {0, 130, -signal.SIGINT}, text.decode()
    assert b"Traceback" not in text or code != 130
    left = names_in(tmp_path)
    assert left in (set(), {"json", "csv"})
    if left:
        assert len(json.loads((tmp_path / "json").read_text())["experiments"]) == 2
    wait_until(lambda: processes_with(mark) == [])

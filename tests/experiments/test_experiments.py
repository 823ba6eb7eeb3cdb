"""The laboratory: every experiment, how one is added, and how it is run."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import signal
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from commands import run
from constants import MIB
from onlookers import state_of, wait_until
from vmm_linux import experiments
from vmm_linux.experiments import Axis, Column, NotObservable, at_least, at_most, between, equal
from vmm_linux.experiments._framework.catalogue import UnfitError, catalogue, chosen
from vmm_linux.experiments._framework.files import as_csv, as_json
from vmm_linux.experiments._framework.laboratory import Order, Result, carry_out
from vmm_linux.experiments._framework.plots import figure_of
from vmm_linux.experiments._framework.results import (
    Claim,
    Findings,
    Kind,
    Outcome,
    Plot,
    Table,
    findings_from,
    merged,
)
from vmm_linux.experiments._framework.run import ignore_progress
from vmm_linux.experiments._framework.words import claim_cells

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


NAMES = [each.name for each in catalogue()]
QUICK = Order(quick=True, seed=1, repeat=1, memory=512 * MIB)


@functools.cache
def result_of(name: str) -> Result:
    """What came of an experiment, which is run once for all tests."""
    (experiment,) = chosen([name])
    return carry_out(experiment, QUICK, ignore_progress)


# ---- every experiment ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_what_the_kernels_figures_must_say_they_say(name: str) -> None:
    result = result_of(name)
    assert not result.problem
    assert result.broken == []
    assert result.findings.claims or result.findings.reason
    assert all(
        claim.reason for claim in result.findings.claims if claim.outcome is Outcome.NOT_OBSERVABLE
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_limit_of_the_packages_own_keeps_anything_from_being_observed(name: str) -> None:
    found = result_of(name).findings
    reasons = [found.reason, *(claim.reason for claim in found.claims)]
    assert [reason for reason in reasons if "this VMM's limit" in (reason or "")] == []


@pytest.mark.parametrize("name", NAMES)
def test_an_experiment_shows_what_it_measured(name: str) -> None:
    found = result_of(name).findings
    assert found.tables or found.reason
    assert all(table.rows for table in found.tables)
    assert all(plot.series for plot in found.plots)
    statements = [claim.statement for claim in found.claims]
    assert len(set(statements)) == len(statements), "two claims that nobody can tell apart"


@pytest.mark.parametrize("name", NAMES)
def test_the_texts_of_an_experiment_are_sentences(name: str) -> None:
    (experiment,) = chosen([name])
    assert experiment.question.endswith("?")
    assert experiment.prediction.endswith(".")
    assert experiment.explanation.endswith(".")
    assert not experiment.title.endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_the_json_of_an_experiment_is_complete(name: str) -> None:
    result = result_of(name)
    (told,) = json.loads(as_json([result], {}))["experiments"]
    texts = ("name", "title", "question", "prediction", "explanation", "status", "problem")
    assert all(isinstance(told[text], str) for text in texts)
    assert (told["seed"], told["repeat"], told["quick"]) == (1, 1, True)
    assert findings_from({key: told[key] for key in result.findings.as_dict()}) == result.findings
    for table in told["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    for plot in told["plots"]:
        assert all(len(series["x"]) == len(series["y"]) > 0 for series in plot["series"])
    for claim in told["claims"]:
        assert claim["kind"] in {"physical", "timing"}
        assert claim["outcome"] in {"held", "did not hold", "not observable"}


@pytest.mark.parametrize("name", NAMES)
def test_the_csv_of_an_experiment_has_every_cell(name: str) -> None:
    result = result_of(name)
    files = as_csv([result], "folder")
    claims = list(csv.reader(io.StringIO(files.pop("folder/claims.csv").decode())))
    assert [row[2] for row in claims[1:]] == [each.statement for each in result.findings.claims]
    for table, content in zip(result.findings.tables, files.values(), strict=True):
        rows = list(csv.reader(io.StringIO(content.decode())))
        assert len(rows[0]) == len(table.columns)
        assert rows[1:] == [
            ["" if cell is None else str(cell) for cell in row] for row in table.rows
        ]


@pytest.mark.parametrize("name", NAMES)
def test_the_plots_of_an_experiment_have_every_point_and_labelled_axes(name: str) -> None:
    for plot in result_of(name).findings.plots:
        (axes,) = figure_of(plot).axes
        assert axes.get_xlabel().startswith(plot.x.label)
        assert axes.get_ylabel().startswith(plot.y.label)
        assert plot.y.unit in axes.get_ylabel() or plot.y.unit == "B"
        points = [np.size(line.get_xdata()) for line in axes.lines]
        assert sum([*points, len(axes.patches)]) == sum(len(series.x) for series in plot.series)
        scales = ["log" if axis.log else "linear" for axis in (plot.x, plot.y)]
        assert [axes.get_xscale(), axes.get_yscale()] == scales


# ---- adding one ----------------------------------------------------------------------------------

EXPERIMENT = """
import ctypes, os, signal, sys
from vmm_linux.experiments import *
ORDER, TITLE, QUESTION, PREDICTION = 1, "Added", "Is it found?", "Yes."
EXPLANATION = "It is."
def measure(run):
"""


@pytest.fixture
def add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Result]]:
    """Adds a file with an experiment that does this, and tells what came of it."""
    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(tmp_path)])
    # A file that is written twice in a second would be taken for the first of them.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")

    def added(body: str, order: Order = QUICK) -> Result:
        (tmp_path / "just_added.py").write_text(EXPERIMENT + textwrap.indent(body, "    "))
        (experiment,) = chosen(["just-added"])
        return carry_out(experiment, order, ignore_progress)

    yield added
    sys.modules.pop("vmm_linux.experiments.just_added", None)


def test_the_list_has_every_file_and_nothing_else() -> None:
    files = {path.stem.replace("_", "-") for path in Path(*experiments.__path__).glob("[a-z]*.py")}
    assert set(NAMES) == files
    child = run("experiment", "list", "--json")
    assert (child.returncode, child.stderr) == (0, "")
    assert [each["name"] for each in json.loads(child.stdout)["experiments"]] == NAMES
    assert set(NAMES) <= set(run("experiment", "list").stdout.split())


def test_one_more_file_is_one_more_experiment(add: Callable[..., Result]) -> None:
    result = add("run.physical('It is so', run.page, equal(run.page), 'B')")
    assert result.experiment.name == "just-added"
    assert "just-added" in [each.name for each in catalogue()]
    assert (result.status, [claim.outcome for claim in result.findings.claims]) == (
        "done",
        ["held"],
    )


def test_the_example_in_the_guide_is_an_experiment(add: Callable[..., Result]) -> None:
    example = str(experiments.__doc__).partition("::\n")[2].partition("\n* ")[0]
    result = add(f"exec({textwrap.dedent(example)!r}, space := {{}}); space['measure'](run)")
    assert (result.problem, result.status) == ("", "done")
    assert len(result.findings.claims) == len(result.findings.tables) == 1


@pytest.mark.parametrize(
    ("text", "why"), [("import nowhere", "No module named 'nowhere'"), ("def", "invalid syntax")]
)
def test_a_file_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.setattr(experiments, "__path__", [str(tmp_path)])
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UnfitError, match=rf"^broken\.py cannot be imported: {why}"):
        catalogue()


def test_a_file_that_is_no_experiment_is_named_with_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiments, "__path__", [str(tmp_path)])
    (tmp_path / "unfit.py").write_text("TITLE = 'Unfit'\nORDER = 1\n")
    with pytest.raises(UnfitError, match=r"unfit\.py is no experiment: it lacks QUESTION.*measure"):
        catalogue()
    del sys.modules["vmm_linux.experiments.unfit"]


# ---- how one is run ------------------------------------------------------------------------------


def test_what_cannot_be_observed_is_a_result(add: Callable[..., Result]) -> None:
    result = add("need(False, 'there is one core')")
    assert (result.status, result.findings.reason) == ("not observable", "there is one core")
    assert result.ok


def test_what_a_limit_of_the_user_forbids_is_not_observable(add: Callable[..., Result]) -> None:
    result = add(
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "run.vmm.region(64 << 30)"
    )
    assert result.status == "not observable"
    assert "RLIMIT_AS" in result.findings.reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("machine_code(run.vmm, {'vax': '00'})", "there is none for"),
        ("status('VmNothing')", "this kernel does not tell VmNothing"),
    ],
)
def test_what_this_machine_lacks_is_not_observable(
    add: Callable[..., Result], body: str, reason: str
) -> None:
    result = add(body)
    assert result.status == "not observable"
    assert reason in result.findings.reason


def test_a_size_is_halved_until_what_is_touched_fits(add: Callable[..., Result]) -> None:
    result = add(
        "run.memory = 100\n"
        "run.physical('It fits as it is', run.fitting(100), equal(100), 'B')\n"
        "run.physical('It is halved', run.fitting(101, times=2), equal(50), 'B')"
    )
    assert [claim.outcome for claim in result.findings.claims] == ["held", "held"]


def test_a_setting_that_this_kernel_lacks_is_not_observable(add: Callable[..., Result]) -> None:
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    result = add(
        f"run.physical('It is told', sysctl('vm.max_map_count'), equal({most}))\n"
        "run.physical('Something holds', sysctl('vm.no_such', otherwise=7), equal(7))\n"
        "sysctl('vm.no_such')"
    )
    assert [claim.outcome for claim in result.findings.claims] == ["held", "held"]
    assert (result.status, result.findings.reason) == (
        "not observable",
        "this kernel has no vm.no_such",
    )


def test_figures_are_those_of_smaps_and_of_nothing_where_nothing_is(
    add: Callable[..., Result],
) -> None:
    result = add(
        "with run.vmm.region(4 * run.page) as region:\n"
        "    region.commit()\n"
        "    touch(region)\n"
        "    (rss,) = figures(region.base, ['rss'])\n"
        "    run.physical('They are told', rss, at_least(4 * run.page), 'B')\n"
        "figures(0, ['rss'])"
    )
    assert [claim.outcome for claim in result.findings.claims] == ["held"]
    assert result.findings.reason == "nothing is found in /proc/self/smaps at 0x0"


def test_code_that_must_not_be_executed_is_not_observable(add: Callable[..., Result]) -> None:
    result = add(
        "need(ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0, 'this kernel has no PR_SET_MDWE')\n"
        "machine_code(run.vmm, {os.uname().machine: '00'})"
    )
    assert result.status == "not observable"
    assert re.search("nothing that was written may be executed|no PR_SET_MDWE", str(result))


def test_what_the_kernel_has_no_memory_for_is_not_observable(add: Callable[..., Result]) -> None:
    result = add("from vmm_linux.errors import OutOfMemory\nraise OutOfMemory('commit', 'none')")
    assert (result.status, result.findings.reason) == ("not observable", "commit: none")


def test_what_did_not_hold_is_told_though_the_rest_cannot_be_observed(
    add: Callable[..., Result],
) -> None:
    result = add("run.physical('So many', 1, at_least(2)); need(False, 'there is no more')")
    assert (result.ok, result.status) == (False, "did not hold")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("NotObservable('there are none')", "there are none"),
        ("QuotaExceeded('commit', 'too much')", "commit: too much"),
    ],
)
def test_a_part_that_cannot_be_observed_leaves_the_rest(
    add: Callable[..., Result], answer: str, reason: str
) -> None:
    result = add(
        "from vmm_linux.errors import QuotaExceeded\n"
        f"with run.part('huge pages'): raise {answer}\n"
        "run.physical('The rest', 1, at_least(1))"
    )
    assert [(claim.outcome, claim.reason) for claim in result.findings.claims] == [
        (Outcome.NOT_OBSERVABLE, reason),
        (Outcome.HELD, ""),
    ]
    assert result.ok


def test_a_physical_claim_that_does_not_hold_is_a_failure_and_a_timing_is_none(
    add: Callable[..., Result],
) -> None:
    assert not add("run.physical('So many', 1, at_least(2))").ok
    assert add("run.timing('So fast', 1, at_least(2))").ok


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise ValueError('that is why')", "ValueError: that is why\nTraceback"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "without a result, by SIGSEGV"),
        ("os._exit(3)", "without a result, with exit code 3"),
        ("run.child(lambda _: 1 / 0).receive()", "a child ended with exit code 1, without an ans"),
        ("run.physical('No number', float('nan'), equal(1))", "is no measured number"),
        ("bytearray(4 << 30)", "MemoryError"),
        ("run.table('Table', Column('a')).add(1, 2)", "2 cells, where 1 are expected"),
    ],
)
def test_an_experiment_that_fails_is_told_with_its_reason(
    add: Callable[..., Result], body: str, problem: str
) -> None:
    result = add(body)
    assert (result.ok, result.status) == (False, "failed")
    assert problem in result.problem


def test_an_experiment_that_does_not_end_is_ended_with_its_children(
    add: Callable[..., Result], tmp_path: Path
) -> None:
    file = tmp_path / "child"
    result = add(
        f"child = run.child(lambda connection: (connection.send(1), signal.pause()))\n"
        f"child.receive(); open({str(file)!r}, 'w').write(str(child.pid)); signal.pause()",
        Order(quick=True, seed=1, repeat=1, memory=64 * MIB, deadline=2),
    )
    assert result.problem == "stopped: it took more than 2 seconds"
    wait_until(lambda: state_of(int(file.read_text())) in {"", "Z"})


def test_a_child_of_an_experiment_answers_and_tells_how_it_ended(
    add: Callable[..., Result],
) -> None:
    result = add(
        "with run.child(lambda pipe, more: pipe.send(pipe.recv() + more), 2) as child:\n"
        "    child.send(40); run.physical('Sum', child.receive(), equal(42))\n"
        "    run.physical('Code', child.wait(), equal(0))\n"
        "with run.child(lambda pipe: ctypes.string_at(0)) as child:\n"
        "    run.physical('Signal', child.wait(), equal(-signal.SIGSEGV))\n"
        "    run.physical('In words', child.ended(), equal('by SIGSEGV'))"
    )
    assert (result.problem, [claim.measured for claim in result.findings.claims]) == (
        "",
        [42, 0, -signal.SIGSEGV, "by SIGSEGV"],
    )


def test_a_child_that_becomes_another_user_still_dies_with_its_parent(
    add: Callable[..., Result],
) -> None:
    result = add(
        "def look(pipe):\n"
        "    become(NOBODY)\n"
        "    libc('prctl', 2, ctypes.addressof(number := ctypes.c_int()))  # PR_GET_PDEATHSIG\n"
        "    pipe.send((os.geteuid(), number.value, os.access('/proc/self/pagemap', os.R_OK)))\n"
        "need(os.geteuid() in {0, NOBODY}, 'only root can become another user')\n"
        "with run.child(look) as child:\n"
        "    run.physical('It', str(child.receive()), equal(str((NOBODY, 9, True))))"
    )
    assert result.ok, result


def test_an_experiment_finds_what_the_users_path_has(
    add: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "_of_the_user.py").touch()
    assert add("import _of_the_user").status == "done"


def test_what_a_child_cannot_observe_cannot_be_observed(add: Callable[..., Result]) -> None:
    result = add(
        "with run.part('There'):\n"
        "    with run.child(lambda _: need(False, 'there is nothing')) as child: child.receive()"
    )
    assert [claim.reason for claim in result.findings.claims] == ["there is nothing"]
    assert (result.problem, result.ok) == ("", True)


def test_the_same_seed_gives_the_same_and_each_repetition_another(
    add: Callable[..., Result],
) -> None:
    body = "run.table('T', Column('n')).add(run.random.getrandbits(20))"
    first, second = (add(body).findings.tables[0].rows[0][0] for _ in range(2))
    assert first == second
    several = add(body, Order(quick=True, seed=1, repeat=3, memory=64 * MIB)).findings.tables[0]
    (bounds,) = several.spread[0]
    assert bounds is not None
    assert bounds[0] < several.rows[0][0] < bounds[1]  # type: ignore[operator]
    assert first in {*bounds, several.rows[0][0]}


def test_several_runs_give_medians_and_bounds() -> None:
    def found(value: int, outcome: Outcome) -> Findings:
        table = Table("T", [Column("name"), Column("value")])
        table.add("a", value)
        plot = Plot("P", Axis("x"), Axis("y"))
        plot.add("s", [1, 2], [value, 2 * value])
        claim = Claim("C", Kind.PHYSICAL, outcome, value, at_most(2))
        return Findings([table], [plot], [claim])

    held, failed, unseen = Outcome.HELD, Outcome.FAILED, Outcome.NOT_OBSERVABLE
    whole = merged([found(1, held), found(3, failed), found(2, unseen)])
    assert whole.tables[0].rows == [["a", 2]]
    assert whole.tables[0].spread == [[None, [1, 3]]]
    series = whole.plots[0].series[0]
    assert (series.y, series.low, series.high) == ([2, 4], [1, 2], [3, 6])
    assert (whole.claims[0].outcome, whole.claims[0].measured) == (failed, 3)
    assert findings_from(json.loads(json.dumps(whole.as_dict()))) == whole


@pytest.mark.parametrize(
    ("expected", "yes", "no"),
    [
        (equal("ENOMEM"), "ENOMEM", "EINVAL"),
        (equal(0), 0, 1),
        (equal(value=True), True, False),
        (at_least(2), 2, 1.9),
        (at_most(2), 2, 2.1),
        (between(1, 2), 1.5, 3),
    ],
)
def test_a_value_is_as_expected_or_not(expected: Any, yes: Any, no: Any) -> None:  # noqa: ANN401
    assert expected.admits(yes)
    assert not expected.admits(no)
    assert not expected.admits(None)


def test_a_claim_is_told_in_words_with_its_unit_once() -> None:
    claim = Claim("C", Kind.TIMING, Outcome.HELD, 2, between(1, 3), "times", spread=[1, 2.5])
    assert claim_cells(claim) == ("C", "2 [1 … 2.5] times", "1 to 3 times", "held (timing)")
    claim = Claim("C", Kind.PHYSICAL, Outcome.HELD, MIB, at_least(1), "B", spread=[0, 2 * MIB])
    assert claim_cells(claim)[1:3] == ("1 MiB [0 B … 2 MiB]", "at least 1 B")


def test_what_cannot_be_observed_is_not_caught_as_an_error_of_the_system() -> None:
    assert not issubclass(NotObservable, OSError)

"""The doctor says what the kernel says, tries what it claims, and changes nothing."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import pytest

import commands
from children import run_child
from vmm_linux._core import kernel
from vmm_linux._core.kernel import NO_LIMIT, Feature, MemoryCgroup
from vmm_linux.doctor import FEATURES, Diagnosis, Setting, diagnose
from vmm_linux.doctor.checks import TRIALS, Check, Trial, attempt, expect
from vmm_linux.doctor.kernel_settings import UNLIMITED, chosen, settings_of

#: What a child answers that may not do what its test needs.
CANNOT_UNMOUNT = 77
LIMIT_NAMES = {
    "RLIMIT_MEMLOCK": "Max locked memory",
    "RLIMIT_NOFILE": "Max open files",
    "RLIMIT_AS": "Max address space",
    "RLIMIT_DATA": "Max data size",
}


def setting(diagnosis: Diagnosis, name: str) -> Setting:
    (found,) = [each for each in diagnosis.settings if each.name == name]
    return found


def answer_of(done: Any) -> dict[str, Any]:  # noqa: ANN401 (of a child, text)
    """The JSON object that a command wrote, and nothing else."""
    assert done.stderr == ""
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def run_doctor(settings: str = "") -> None:
    """Run the command in this process, after settings: of limits, as ``NOFILE=5:5``."""
    import gettext  # by argparse
    import locale
    import resource
    import shutil
    import sys

    from vmm_linux import cli, doctor

    assert {gettext.__name__, locale.__name__, shutil.__name__} <= sys.modules.keys()
    doctor.diagnose()  # everything is imported that it imports when asked
    for name, _, pair in (each.partition("=") for each in settings.split()):
        soft, hard = map(int, pair.split(":"))
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))
    sys.exit(cli.main(["doctor", "--json"]))


# ---- what it says is so -------------------------------------------------------------------------


def test_the_package_can_do_its_work_here() -> None:
    diagnosis = diagnose()
    assert diagnosis.ok
    assert diagnosis.checks == tuple(Check(trial.name, ok=True) for trial in TRIALS)


def test_the_machine_is_the_kernels() -> None:
    machine = diagnose().machine
    system = os.uname()
    assert (machine.kernel, machine.architecture) == (system.release, system.machine)
    assert machine.page == os.sysconf("SC_PAGE_SIZE")
    assert machine.user_space_end == kernel.user_space_end()


@pytest.mark.parametrize(
    "name",
    ["vm.max_map_count", "vm.overcommit_memory", "vm.overcommit_ratio", "vm.memfd_noexec",
     "kernel.yama.ptrace_scope"],
)  # fmt: skip
def test_a_sysctl_is_what_its_file_says(name: str) -> None:
    found = setting(diagnose(), name)
    file = Path("/proc/sys", *name.split("."))
    assert found.source == str(file)
    assert found.value == (int(file.read_text()) if file.exists() else None)


@pytest.mark.parametrize("name", LIMIT_NAMES)
def test_a_limit_is_what_the_kernel_lists(name: str) -> None:
    found = setting(diagnose(), name)
    lines = Path("/proc/self/limits").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(LIMIT_NAMES[name])]
    soft, hard = line.removeprefix(LIMIT_NAMES[name]).split()[:2]
    assert (str(found.value), str(found.ceiling)) == (soft, hard)


@pytest.mark.parametrize("name", ["enabled", "shmem_enabled"])
def test_a_switch_is_the_word_in_brackets(name: str) -> None:
    found = setting(diagnose(), f"transparent_hugepage/{name}")
    file = Path(found.source)
    if file.exists():
        assert f"[{found.value}]" in file.read_text()
    else:
        assert found.value is None
    assert chosen("always [madvise] never") == "madvise"
    assert chosen("nothing in brackets") is None


def test_the_commit_limit_is_that_of_meminfo() -> None:
    figure = re.search(r"^CommitLimit: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert figure
    assert setting(diagnose(), "CommitLimit").value == int(figure[1]) * 1024


def test_the_cgroups_limit_is_in_the_file_that_is_named() -> None:
    (found,) = [each for each in diagnose().settings if each.name.endswith("memory limit")]
    if found.value is None:
        pytest.skip("no cgroup counts this process's memory, or it is not mounted here")
    limit = Path(found.source).read_text().strip()
    if found.value == UNLIMITED:
        assert limit == "max" or int(limit) >= NO_LIMIT
    else:
        assert int(limit) == found.value


@pytest.mark.parametrize(
    ("version", "limit", "usage", "none"),
    [
        ("v1", "memory.limit_in_bytes", "memory.usage_in_bytes", "9223372036854771712"),
        ("v2", "memory.max", "memory.current", "max"),
    ],
)
def test_the_tightest_of_the_groups_above_counts(
    version: str, limit: str, usage: str, none: str, tmp_path: Path
) -> None:
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    bounds = {tmp_path: none, inner.parent: f"{1 << 30}", inner: f"{1 << 31}"}
    for folder, text in bounds.items():
        (folder / limit).write_text(f"{text}\n")
    (inner / usage).write_text("4096\n")
    group = MemoryCgroup(version, tmp_path, "outer/inner")
    bound, used = settings_of(group)
    assert (bound.value, bound.source) == (1 << 30, str(inner.parent / limit))
    assert bound.advice
    assert "kills a process of the group" in bound.advice
    assert (used.value, used.source) == (4096, str(inner / usage))
    for folder in (inner, inner.parent):
        (folder / limit).write_text(f"{none}\n")
    bound, _ = settings_of(group)
    assert (bound.value, bound.advice) == (UNLIMITED, None)


def test_a_group_that_is_not_to_be_seen_from_a_container_is_where_it_is_mounted(
    tmp_path: Path,
) -> None:
    (tmp_path / "memory.max").write_text("1048576\n")
    bound, _ = settings_of(MemoryCgroup("v2", tmp_path, "host/only"))
    assert (bound.value, bound.source) == (1 << 20, str(tmp_path / "memory.max"))


# ---- features -----------------------------------------------------------------------------------


def test_every_feature_is_told_as_the_package_finds_it() -> None:
    found = {each.name: each for each in diagnose().features}
    assert found.keys() == Feature.__members__.keys()
    for feature in Feature:
        report = found[feature.name]
        present = kernel.available(feature)
        assert report.state == ("present" if present else "absent")
        assert (report.since, report.without) == FEATURES[feature]


@pytest.mark.parametrize("feature", Feature, ids=lambda feature: feature.name)
def test_a_feature_switched_off_is_told_and_the_work_goes_on(feature: Feature) -> None:
    with kernel.without(feature):
        diagnosis = diagnose()
    off = [each.name for each in diagnosis.features if each.state == "switched off"]
    assert off == [feature.name]
    assert diagnosis.ok


def test_without_guard_regions_the_map_count_is_spoken_of() -> None:
    with kernel.without(Feature.GUARD_REGIONS):
        advice = setting(diagnose(), "vm.max_map_count").advice
    assert advice
    assert "fragments" in advice


def test_the_environment_switches_every_feature_off() -> None:
    done = commands.run("doctor", "--json", VMM_LINUX_WITHOUT=",".join(Feature.__members__))
    answer = answer_of(done)
    assert done.returncode == 0
    assert {each["state"] for each in answer["features"]} == {"switched off"}
    assert answer["ok"]


def test_a_shortage_makes_a_feature_unknown_not_absent() -> None:
    done = run_child(without_descriptors)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "unknown False\n"


def without_descriptors() -> None:
    """Ask for a feature while no descriptor can be had."""
    import resource

    from vmm_linux._core import kernel

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    scan = kernel.Feature.PAGEMAP_SCAN
    print(kernel.state(scan), kernel.available(scan))


# ---- when it cannot work ------------------------------------------------------------------------


def test_without_descriptors_it_says_which_limit() -> None:
    done = run_child(run_doctor, "NOFILE=4:4")
    answer = answer_of(done)
    assert done.returncode == 1
    assert not answer["ok"]
    failed = [each for each in answer["checks"] if not each["ok"]]
    assert failed
    assert any("RLIMIT_NOFILE" in each["problem"] for each in failed)
    assert all(each["advice"] for each in failed)


def test_without_address_space_it_says_which_limit() -> None:
    # The interpreter itself has memory to go on with: a heap that grew beforehand.
    heap = {"PYTHONMALLOC": "malloc", "MALLOC_TOP_PAD_": f"{32 << 20}"}
    done = run_child(run_doctor, f"AS={1 << 20}:{1 << 20}", environment=heap)
    answer = answer_of(done)
    assert done.returncode == 1
    first = answer["checks"][0]
    assert not first["ok"]
    assert "RLIMIT_AS" in first["problem"]
    assert "RLIMIT_AS" in first["advice"]


def test_without_proc_it_says_so() -> None:
    done = run_child(without_proc)
    if done.returncode == CANNOT_UNMOUNT:
        pytest.skip("this process may not make a mount namespace")
    answer = answer_of(done)
    assert done.returncode == 1
    outcomes = {each["name"]: each for each in answer["checks"]}
    assert not outcomes["query answers"]["ok"]
    assert "/proc must be mounted" in outcomes["query answers"]["advice"]
    assert {each["value"] for each in answer["settings"] if each["name"].startswith("vm.")} == {
        None
    }


def without_proc() -> None:
    """Run the command where nothing is in /proc, which this process alone sees."""
    import ctypes
    import sys

    from vmm_linux import cli

    libc = ctypes.CDLL(None)
    new_namespace, private = 0x20000, 1 << 18 | 1 << 14
    if libc.unshare(new_namespace) != 0:
        sys.exit(77)
    assert libc.mount(b"none", b"/", None, private, None) == 0
    assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
    sys.exit(cli.main(["doctor", "--json"]))


@pytest.mark.parametrize("nobody", [False, True])
def test_an_ordinary_user_with_little_to_lock_is_advised(nobody: bool) -> None:
    done = run_child(run_doctor, "MEMLOCK=0:0 NOFILE=64:128", nobody=nobody)
    answer = answer_of(done)
    assert done.returncode == 0
    found = {each["name"]: each for each in answer["settings"]}
    assert (found["RLIMIT_MEMLOCK"]["value"], found["RLIMIT_MEMLOCK"]["ceiling"]) == (0, 0)
    assert (found["RLIMIT_NOFILE"]["value"], found["RLIMIT_NOFILE"]["ceiling"]) == (64, 128)
    may_lock = os.geteuid() == 0 and not nobody
    assert (found["RLIMIT_MEMLOCK"]["advice"] is None) == may_lock
    assert "32 to 64 buffers" in found["RLIMIT_NOFILE"]["advice"]


def test_a_limit_on_data_is_spoken_of() -> None:
    bound = 1 << 40
    old = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (bound, old[1]))
    try:
        found = setting(diagnose(), "RLIMIT_DATA")
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old)
    assert found.value == bound
    assert found.advice
    assert str(bound) in found.advice


def test_what_does_something_else_is_a_failed_need() -> None:
    trial = Trial("a trial", lambda _: expect("a sum", 1 + 1, 3), "another arithmetic")
    found = attempt(trial)
    assert found == Check("a trial", False, "a sum: 2, where 3 was expected", "another arithmetic")


# ---- how it prints ------------------------------------------------------------------------------


def test_plain_text_has_everything_in_it() -> None:
    done = commands.run("doctor")
    assert (done.returncode, done.stderr) == (0, "")
    diagnosis = diagnose()
    names = [each.name for each in diagnosis.checks]
    names += [each.name for each in diagnosis.features]
    names += [each.name for each in diagnosis.settings]
    lines = done.stdout.splitlines()
    for name in names:
        assert any(line.startswith(f"  {name} ") or line == f"  {name}" for line in lines)
    said = [each.advice for each in diagnosis.settings if each.advice]
    assert all(any(advice in line for line in lines) for advice in said)
    assert lines[-1] == "The package can do its work here."
    assert "\x1b" not in done.stdout


def test_json_is_the_diagnosis() -> None:
    answer = answer_of(commands.run("doctor", "--json"))
    assert answer.keys() == {"machine", "checks", "features", "settings", "ok"}
    diagnosis = diagnose()
    for kind in ("checks", "features", "settings"):
        names = [each.name for each in getattr(diagnosis, kind)]
        assert [each["name"] for each in answer[kind]] == names


@pytest.mark.parametrize("columns", [80, 160])
def test_on_a_terminal_no_line_is_wider_than_it(columns: int) -> None:
    shown = commands.run_on_terminal(columns, commands.SCRIPT, "doctor")
    assert shown.returncode == 0
    assert shown.text != "\n".join(shown.lines)  # rich was at work
    assert max(map(len, shown.lines)) <= columns
    assert all(feature in "".join(shown.lines) for feature in ("PAGEMAP_SCAN", "PROCESS_VM"))


def test_a_terminal_without_rich_gets_plain_text() -> None:
    shown = commands.run_on_terminal(200, *commands.WITHOUT_RICH, "doctor")
    assert shown.returncode == 0
    assert shown.lines[-1] == "The package can do its work here."


def test_it_changes_nothing() -> None:
    before = Path("/proc/self/limits").read_text()
    diagnose()
    assert Path("/proc/self/limits").read_text() == before

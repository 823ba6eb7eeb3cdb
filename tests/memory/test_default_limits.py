"""The limits of a VMM that is given none, and that they hold against runaway loops."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from children import TESTS_IMPORTABLE, run_child
from dangers import BY_DEFAULT, DANGERS, HELD, bystander
from kernel_oracle import maps
from memory_groups import cgroup, in_place
from vmm_linux import VMM
from vmm_linux._core import kernel
from vmm_linux._core.kernel import (
    MOST_HANDLES,
    MOST_MDLS,
    MOST_REGIONS,
    bounds_for,
    memory_headroom,
)

#: Of ``vmm``.
pytestmark = pytest.mark.unlimited


# ---- defaults ------------------------------------------------------------------------------------


def test_a_vmm_that_is_told_nothing_has_bounds() -> None:
    with VMM() as vmm, VMM(limits=None) as other:
        limits = vmm.limits
        available = kernel.available_without_swap()
        assert (limits.regions, limits.mdls, limits.handles) == (
            MOST_REGIONS,
            MOST_MDLS,
            MOST_HANDLES,
        )
        assert (limits.reserved, limits.mappings, limits.mdl_mappings) == (None, None, None)
        assert limits.committed == limits.locked == limits.mdl_bytes
        assert limits.committed is not None
        assert 0 < limits.committed <= available
        assert other.limits.regions == MOST_REGIONS


def test_available_memory_is_the_kernels_figure_without_swap() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    figures = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    assert abs(kernel.available_without_swap() - figures["MemAvailable"]) < 1 << 30
    assert kernel.available_bytes() >= kernel.available_without_swap()


def test_the_defaults_are_three_quarters_of_what_can_be_had() -> None:
    share = 3 << 30
    assert bounds_for(4 << 30) == (
        MOST_REGIONS,
        None,
        share,
        share,
        None,
        MOST_MDLS,
        share,
        None,
        MOST_HANDLES,
    )


@pytest.mark.parametrize(("version", "none"), [("v1", "9223372036854771712"), ("v2", "max")])
def test_the_tightest_group_counts_without_the_cache_that_it_gives_up(
    tmp_path: Path, version: str, none: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 1 << 30
    levels = {
        "": (none, 9 * gib, 0, 0),
        "outer": (f"{8 * gib}", 7 * gib, gib // 2, gib // 2),
        "outer/inner": (f"{4 * gib}", gib, 0, 0),
    }
    with in_place(cgroup(tmp_path, version, levels)):
        assert memory_headroom(100 * gib) == 2 * gib
        assert memory_headroom(gib) == gib
    with in_place(None), monkeypatch.context() as patched:
        patched.setattr(kernel, "memory_cgroup", lambda: None)
        assert memory_headroom(gib) == gib
    with in_place(cgroup(tmp_path, version, levels | {"outer": (none, 7 * gib, 0, 0)})):
        assert memory_headroom(100 * gib) == 3 * gib
    with in_place(cgroup(tmp_path, version, {"outer/inner": (f"{gib}", 2 * gib, 0, 0)})):
        assert memory_headroom(100 * gib) == 0


def make_without_a_descriptor() -> None:
    """The first VMM of a process that has no descriptor left."""
    import os
    import resource

    from vmm_linux import VMM

    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    with VMM() as vmm:
        limits = vmm.limits
    assert limits.committed is not None
    assert limits.committed <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    print(limits.regions)


def test_without_a_descriptor_to_ask_with_there_are_defaults_too() -> None:
    child = run_child(make_without_a_descriptor)
    assert (child.returncode, child.stdout, child.stderr) == (0, f"{MOST_REGIONS}\n", "")


def test_this_processs_own_group_is_read_without_trouble() -> None:
    assert memory_headroom(1 << 40) >= 0


# ---- under attack --------------------------------------------------------------------------------


def attack(name: str) -> None:
    """Drive one danger; runs in a child."""
    import dangers

    dangers.attack(name)


def attack_by_default(name: str) -> None:
    """Drive a loop against the defaults; runs in a child."""
    import dangers

    dangers.attack_by_default(name)


@pytest.mark.parametrize("nobody", [False, True], ids=["as-we-are", "as-nobody"])
@pytest.mark.parametrize("name", DANGERS)
def test_a_runaway_loop_ends_with_quota_exceeded(name: str, nobody: bool) -> None:
    child = run_child(attack, name, nobody=nobody, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")
    assert child.stdout.startswith("stood: ")


def test_what_is_done_to_a_bystander_is_seen() -> None:
    with bystander() as other:
        state = other.state()
        assert (other.answers(), other.state()) == (True, state)
        code = next(each.start for each in maps() if each.permissions == "r-xp")  # the same in both
        with Path(f"/proc/{other.pid}/mem").open("r+b", buffering=0) as memory:
            os.pwrite(memory.fileno(), os.pread(memory.fileno(), 1, code), code)
            assert other.state() != state, "a page of a file became one of its own"
            assert other.answers()
            os.pwrite(memory.fileno(), b"x", other.memory + HELD - 1)
        assert not other.answers()
        os.kill(other.pid, signal.SIGKILL)
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises((OSError, StopIteration)):
            other.state()
        with pytest.raises(OSError, match="Broken pipe"):
            other.answers()


@pytest.mark.parametrize("nobody", [False, True], ids=["as-we-are", "as-nobody"])
@pytest.mark.parametrize("name", BY_DEFAULT)
def test_the_defaults_end_a_runaway_loop(name: str, nobody: bool) -> None:
    child = run_child(attack_by_default, name, nobody=nobody, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stdout, child.stderr) == (0, "stood\n", "")

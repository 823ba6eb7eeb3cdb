"""Benchmarks of a policy and an audit: their cost for a call."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from benchmarks.harness import US, Contestant, at_most, benchmark, loop
from vmm_linux import VMM, VmmFlags
from vmm_linux.audit import Audit
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.harness import Stage

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
SIZE: Final = 16 * PAGE
RESERVED: Final = VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE
TYPICAL: Final = """
default = "deny"
ready = ["W^X", "no executable MDL", "no transfer to other users"]

[[rule]]
name = "no region above 64 GiB"
deny = ["allocate", "mdl_create"]
min_size = 68_719_476_737

[[rule]]
name = "nothing huge, locked or shareable"
deny = ["allocate"]
any_flags = ["HUGE", "LOCKED", "SHAREABLE"]

[[rule]]
allow = "*"
"""
"""Ready rules, bounds, and rules of which the last one decides."""


def pairs_of(vmm: VMM) -> Callable[[int], None]:
    """Regions reserved and freed again."""
    allocate, free = vmm.allocate, vmm.free

    def work(count: int) -> None:
        for _ in range(count):
            free(allocate(0, SIZE, RESERVED), SIZE)

    return work


def difference(work: Callable[[int], None], without: Callable[[int], None]) -> Contestant:
    """The difference of a call's time between two pairs of calls."""

    def measure(count: int) -> float:
        start = perf_counter_ns()
        work(count)
        middle = perf_counter_ns()
        without(count)
        return max(1, 2 * middle - start - perf_counter_ns()) / 2

    return Contestant(measure, 2000)


def typical_policy(folder: str) -> Policy:
    """The typical policy, out of a file."""
    path = Path(folder, "policy.toml")
    path.write_text(TYPICAL)
    return Policy.from_toml(path)


EMPTY: Final = f"{US}, a policy without rules"
POLICY: Final = f"{US}, a policy of a TOML file"
CALLABLE: Final = f"{US}, a policy in Python"


@benchmark(
    "what a policy adds to a call of allocate + free",
    at_most(1000, None, ours=EMPTY),
    at_most(1000, None, ours=POLICY),
    at_most(5000, None, ours=CALLABLE),
)
def policy(stage: Stage) -> dict[str, Contestant]:
    """The additional time of a call with a policy; and the two calls without one."""
    folder = stage.enter_context(tempfile.TemporaryDirectory())
    without = pairs_of(stage.vmm())

    def under(made: Policy) -> Contestant:
        return difference(pairs_of(stage.enter_context(VMM(policy=made))), without)

    return {
        US: loop(without),
        EMPTY: under(Policy()),
        POLICY: under(typical_policy(folder)),
        CALLABLE: under(Policy.from_callable(lambda question: question.size <= 1 << 30)),
    }


RING: Final = f"{US}, a ring in memory"
LINES: Final = f"{US}, a file"
TWICE: Final = f"{US}, a file, two lines a call"


@benchmark(
    "what an audit adds to a call of allocate + free",
    at_most(3000, None, ours=RING),
    at_most(10_000, None, ours=LINES),
    at_most(20_000, None, ours=TWICE),
)
def audit(stage: Stage) -> dict[str, Contestant]:
    """The additional time of a call with an audit."""
    folder = stage.enter_context(tempfile.TemporaryDirectory())
    without = pairs_of(stage.vmm())

    def audited(made: Audit) -> Contestant:
        return difference(pairs_of(stage.enter_context(VMM(audit=made))), without)

    return {
        RING: audited(Audit()),
        LINES: audited(Audit(Path(folder, "lines"), failure="continue")),
        TWICE: audited(Audit(Path(folder, "twice"))),
    }

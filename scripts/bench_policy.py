"""Benchmarks of a policy and an audit: what they cost a call."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import TYPE_CHECKING, Final

from bench_harness import US, Contestant, at_most, benchmark, loop
from vmm_linux import VMM, VmmFlags
from vmm_linux.audit import Audit
from vmm_linux.policy import Policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench_harness import Stage

PAGE: Final = os.sysconf("SC_PAGE_SIZE")
SIZE: Final = 16 * PAGE
RESERVED: Final = VmmFlags.RESERVE | VmmFlags.READ | VmmFlags.WRITE
#: Ready rules, bounds, and rules of which the last one answers.
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


def pairs_of(vmm: VMM) -> Callable[[int], None]:
    """Regions reserved and freed again."""
    allocate, free = vmm.allocate, vmm.free

    def work(count: int) -> None:
        for _ in range(count):
            free(allocate(0, SIZE, RESERVED), SIZE)

    return work


def difference(work: Callable[[int], None], without: Callable[[int], None]) -> Contestant:
    """What a call takes longer in the one than in the other, of which each makes two."""

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


EMPTY: Final = f"{US}, an empty policy"
POLICY: Final = f"{US}, a policy of a TOML file"
DECISION: Final = f"{US}, a decision"


@benchmark(
    "allocate + free, 64 KiB, under a policy",
    at_most(1.25, US, ours=EMPTY),
    at_most(1.5, US, ours=POLICY),
    at_most(1000, None, ours=DECISION),
)
def policy(stage: Stage) -> dict[str, Contestant]:
    """The same without a policy, with one that has no rules, and with a typical one."""
    folder = stage.enter_context(tempfile.TemporaryDirectory())
    typical = typical_policy(folder)
    without = pairs_of(stage.vmm())
    under = pairs_of(stage.enter_context(VMM(policy=typical)))
    return {
        US: loop(without),
        EMPTY: loop(pairs_of(stage.enter_context(VMM(policy=Policy())))),
        POLICY: loop(under),
        DECISION: difference(under, without),
    }


RING: Final = f"{US}, a ring in memory"
LINES: Final = f"{US}, a file"
TWICE: Final = f"{US}, a file, two lines a call"


@benchmark(
    "allocate + free, 64 KiB, audited",
    at_most(5000, None, ours=RING),
    at_most(25_000, None, ours=LINES),
    at_most(45_000, None, ours=TWICE),
)
def audit(stage: Stage) -> dict[str, Contestant]:
    """What a call takes longer that is written down."""
    folder = stage.enter_context(tempfile.TemporaryDirectory())
    without = pairs_of(stage.vmm())

    def audited(made: Audit) -> Contestant:
        return difference(pairs_of(stage.enter_context(VMM(audit=made))), without)

    return {
        RING: audited(Audit()),
        LINES: audited(Audit(Path(folder, "lines"), failure="continue")),
        TWICE: audited(Audit(Path(folder, "twice"))),
    }

"""The doctor: what this kernel and these limits offer to the package, with advice.

``vmm-linux doctor`` is for people, ``diagnose()`` for programs. Each run tries and reads everything
anew, for this process; it changes nothing.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from vmm_linux._core import kernel
from vmm_linux._core.kernel import Feature
from vmm_linux._tools.tables import Table, choose_printer, print_line
from vmm_linux._tools.text import human
from vmm_linux.doctor.checks import TRIALS, Check, attempt
from vmm_linux.doctor.kernel_settings import Setting, settings

__all__ = ["Check", "Diagnosis", "FeatureReport", "Machine", "Setting", "diagnose", "main"]

for _public in (Check, Setting):
    _public.__module__ = __name__  # the name in pickles


@dataclass(frozen=True)
class Machine:
    """The kernel, as uname(2) names it, and its sizes in bytes.

    Attributes:
        kernel: its release.
        architecture: the processor's.
        page: a page.
        huge_page: a transparent huge page; 0 where there are none.
        user_space_end: the first address that no process can map.
        lowest_address: the lowest that may be mapped (``vm.mmap_min_addr``).
    """

    kernel: str
    architecture: str
    page: int
    huge_page: int
    user_space_end: int
    lowest_address: int


@dataclass(frozen=True)
class FeatureReport:
    """An optional feature of kernels.

    Attributes:
        name: the name of the ``Feature``.
        state: ``"present"``; ``"absent"``; ``"switched off"`` by VMM_LINUX_WITHOUT; ``"unknown"``
            where a shortage kept it from being tried (it counts as absent then).
        since: the Linux that brought it, None where a version says nothing.
        without: what the package does without it.
    """

    name: str
    state: Literal["present", "absent", "switched off", "unknown"]
    since: str | None
    without: str


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's findings.

    Attributes:
        machine: the kernel and its sizes.
        checks: the package's needs, each tried.
        features: optional features of the kernel.
        settings: sysctls, limits and switches, with advice.
    """

    machine: Machine
    checks: tuple[Check, ...]
    features: tuple[FeatureReport, ...]
    settings: tuple[Setting, ...]

    @property
    def ok(self) -> bool:
        """Whether the package can do its work."""
        return all(check.ok for check in self.checks)


FEATURES: dict[Feature, tuple[str | None, str]] = {
    Feature.PROCMAP_QUERY: (
        "6.11",
        "query reads /proc/self/maps, whose cost grows with the number of mappings",
    ),
    Feature.PAGEMAP_SCAN: (
        "6.7",
        "query reads the page's entry in /proc/self/pagemap; PageInfo.huge is None",
    ),
    Feature.PAGEMAP: (
        None,
        "mdl_create_from_vm copies untouched pages; query has PAGEMAP_SCAN, or else mincore(2)",
    ),
    Feature.PAGEMAP_GUARD: (
        "6.15",
        "PageInfo.swapped is None for pages that may as well be guards",
    ),
    Feature.GUARD_REGIONS: (
        "6.13",
        "each fragment of committed pages takes a mapping, and commits end at vm.max_map_count",
    ),
    Feature.DONTNEED_LOCKED: ("5.18", "nothing else: no method depends on it"),
    Feature.MEMFD_NOEXEC_SEAL: (
        "6.3",
        "whoever has a buffer's descriptor can make the memory an executable file",
    ),
    Feature.PROCESS_VM: (None, "read and write copy twice, through a memory file of their own"),
    Feature.TRANSPARENT_HUGE_PAGES: (None, "allocate with HUGE is UNIMPLEMENTED"),
    Feature.FILE_HANDLES: (
        None,
        "security ids are inode numbers, which the kernel may give again once a buffer is gone",
    ),
    Feature.VECTORED_GUARDS: (
        "6.13",
        "commit_ranges and decommit_ranges ask the kernel once for each range",
    ),
    Feature.ANONYMOUS_NAMES: (
        "5.17",
        "other tools show the memory of regions without a name; this package knows it all the same",
    ),
}
"""For each feature, the Linux that brought it, and the package's replacement for it."""


def diagnose() -> Diagnosis:
    """Find what this kernel and these limits offer to this process.

    Each need is tried on a page or two, each feature as the package itself tries it, each setting
    read. Nothing is changed and nothing left behind. A need that fails is an answer.

    Returns:
        The ``Diagnosis``; ``ok`` is whether the package can do its work.

    Errors:
        None.
    """
    system = os.uname()
    machine = Machine(
        kernel=system.release,
        architecture=system.machine,
        page=kernel.page_size(),
        huge_page=kernel.huge_page_size(),
        user_space_end=kernel.user_space_end(),
        lowest_address=kernel.mmap_min_addr(),
    )
    checks = tuple(map(attempt, TRIALS))
    features = (FeatureReport(each.name, kernel.state(each), *FEATURES[each]) for each in Feature)
    return Diagnosis(machine, checks, tuple(features), settings())


def main(arguments: Sequence[str]) -> int:
    """Run the command: 0 if the package can do its work here, 1 if it cannot."""
    parser = argparse.ArgumentParser(
        prog="vmm-linux doctor",
        description="Try what this package needs, and tell what this kernel and these limits give: "
        "features, sysctls, limits, and what to do about them. Exit code 0 if the package can do "
        "its work here, 1 if it cannot.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    asked = parser.parse_args(arguments)
    diagnosis = diagnose()
    if asked.json:
        print_line(json.dumps({**asdict(diagnosis), "ok": diagnosis.ok}, indent=2))
    else:
        show(diagnosis)
    return 0 if diagnosis.ok else 1


def show(diagnosis: Diagnosis) -> None:
    """Print everything as tables, then the advice and the verdict."""
    machine, show_table = diagnosis.machine, choose_printer()
    huge = f"huge ones of {human(machine.huge_page)}" if machine.huge_page else "no huge ones"
    print_line(f"Linux {machine.kernel}, {machine.architecture}")
    print_line(
        f"Pages of {human(machine.page)}, {huge}; addresses from {machine.lowest_address:#x} to "
        f"{machine.user_space_end:#x}"
    )
    print_line()
    needs = [(it.name, "ok" if it.ok else f"FAILED: {it.problem}") for it in diagnosis.checks]
    features = [(it.name, it.since or "", it.state, it.without) for it in diagnosis.features]
    settings = [
        (it.name, written(it.name, it.value, "unknown"), written(it.name, it.ceiling, ""))
        for it in diagnosis.settings
    ]
    show_table(Table("Needs, each tried", ("need", "outcome"), needs))
    show_table(Table("Features", ("feature", "since", "state", "without it"), features))
    show_table(Table("Settings", ("setting", "value", "can be raised to"), settings))
    show_table(Table("Advice", ("about", "what to do"), advice(diagnosis)))
    failed = "CANNOT do its work here: see the needs that failed"
    print_line(f"The package {'can do its work here' if diagnosis.ok else failed}.")


def advice(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    """The advice, on needs first."""
    checks = [(each.name, each.advice) for each in diagnosis.checks if each.advice]
    return checks + [(each.name, each.advice) for each in diagnosis.settings if each.advice]


BYTES = ("Commit", "RLIMIT_MEMLOCK", "RLIMIT_AS", "RLIMIT_DATA", "cgroup")
"""Prefixes of the names of settings in bytes."""


def written(name: str, value: int | str | None, missing: str) -> str:
    """The value of a setting for people."""
    if isinstance(value, int) and name.startswith(BYTES):
        return human(value)
    return missing if value is None else str(value)

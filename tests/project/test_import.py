"""Importing the package costs little and does nothing."""

from __future__ import annotations

from children import run_child

#: What the package uses in places, and does not need to be imported.
UNUSED = (
    "asyncio",
    "dataclasses",
    "difflib",
    "ipaddress",
    "logging",
    "multiprocessing",
    "numpy",
    "pathlib",
    "prctl",
    "psutil",
    "rich",
    "tempfile",
    "tomllib",
    "urllib",
)


def import_and_compare() -> None:
    """Import the package and fail if anything but modules came with it."""
    import sys
    import threading
    from pathlib import Path

    def possessions() -> tuple[object, ...]:
        tasks = sorted(Path("/proc/self/task").iterdir())
        children = [(task / "children").read_text() for task in tasks]
        return sorted(Path("/proc/self/fd").iterdir()), tasks, children, threading.enumerate()

    before = possessions()
    import vmm_linux

    assert vmm_linux.__name__ in sys.modules
    assert possessions() == before


def import_and_list() -> None:
    """Import the package and print what modules there are."""
    import sys

    import vmm_linux

    print(vmm_linux.__name__, *sys.modules, sep="\n")


def test_importing_opens_nothing_and_starts_nothing() -> None:
    child = run_child(import_and_compare)
    assert (child.returncode, child.stderr) == (0, "")


def test_importing_loads_nothing_that_is_not_needed_yet() -> None:
    child = run_child(import_and_list)
    assert (child.returncode, child.stderr) == (0, "")
    modules = set(child.stdout.split())
    assert "vmm_linux" in modules
    assert modules & set(UNUSED) == set()


def list_misplaced_modules() -> None:
    """Import the package and print the modules in it that are others' under a public name."""
    from types import ModuleType

    import vmm_linux

    for name, value in vars(vmm_linux).items():
        if isinstance(value, ModuleType) and not name.startswith("_"):
            print(*({value.__name__} - {f"vmm_linux.{name}"}), end="")


def test_the_package_has_no_private_module_under_a_public_name() -> None:
    child = run_child(list_misplaced_modules)
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")

"""The container of the ledger, beside the standard library's, under the compiler's sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest

from children import ROOT

SOURCE = ROOT / "tests/support/ordered_map.cpp"
HEADERS = ROOT / "cython_src/vmm_linux/_core/ledger"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What compares the two."""
    made = tmp_path_factory.mktemp("ordered_map") / "ordered_map"
    options = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"]
    options += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    options += ["-Wl,--wrap=malloc,--wrap=free"]
    compiler = os.environ.get("CXX", "g++").split()
    subprocess.run([*compiler, *options, SOURCE, "-o", made], check=True)
    return made


@pytest.mark.parametrize("seed", range(4))
def test_random_steps_change_the_map_as_they_change_a_standard_one(
    program: Path, seed: int
) -> None:
    run = subprocess.run(
        [program, str(seed), "20000"],
        capture_output=True,
        text=True,
        check=False,
        # Not for a child of a traced process; what is left is counted by the program.
        env={"ASAN_OPTIONS": "detect_leaks=0"},
    )
    assert (run.returncode, run.stdout) == (0, "the same\n"), run.stdout + run.stderr

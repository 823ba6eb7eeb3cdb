"""Shared arrays in PyTorch: worker processes of a DataLoader have the same memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from array_workers import FLAGGED, READ_ONLY, WRITABLE
from children import ROOT

pytestmark = pytest.mark.pytorch

#: Debian's interpreter, which has Debian's packages.
PYTHON = Path("/usr/bin/python3")
SUPPORT = ROOT / "tests" / "support"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run that interpreter with this package."""
    return subprocess.run(
        [PYTHON, "-W", "error", *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def pytorch() -> None:
    """That there is PyTorch, and that the package was built for its interpreter's version."""
    if not PYTHON.exists():
        pytest.skip(f"{PYTHON} is missing")
    for module, advice in (
        ("torch", "apt-get install python3-torch"),
        ("vmm_linux", "the package is built for another version of Python"),
    ):
        child = run("-c", f"import {module}")
        if child.returncode != 0:
            reason = child.stderr.splitlines()[-1]
            pytest.skip(f"{PYTHON} cannot import {module} ({reason}): {advice}")


@pytest.mark.usefixtures("pytorch")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_a_dataloader_have_a_shared_array_as_the_same_memory(method: str) -> None:
    child = run(str(SUPPORT / "torch_program.py"), method)
    assert (child.returncode, child.stderr) == (0, "")
    *travelled, versions = child.stdout.splitlines()
    assert len(travelled) >= 3 * len({**WRITABLE, **READ_ONLY, **FLAGGED})
    assert re.fullmatch(r"NumPy [\d.]+ PyTorch [\w.+]+", versions)

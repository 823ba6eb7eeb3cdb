"""Shared arrays in PyTorch: worker processes of a DataLoader have the same memory."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from array_workers import FLAGGED, READ_ONLY, WRITABLE
from children import ROOT
from torch_python import TORCH_PYTHON
from vmm_linux._tools.children import die_with_parent

pytestmark = [
    pytest.mark.torch,
    pytest.mark.skipif(
        TORCH_PYTHON is None, reason="PyTorch is missing: apt-get install python3-torch"
    ),
]

SUPPORT = ROOT / "tests" / "support"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run that interpreter with this package."""
    assert TORCH_PYTHON
    return subprocess.run(
        [TORCH_PYTHON, "-W", "error", *arguments],
        check=False,
        env={**os.environ, "PYTHONPATH": f"{SUPPORT}:{ROOT}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=die_with_parent,
    )


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_of_a_dataloader_have_a_shared_array_as_the_same_memory(method: str) -> None:
    child = run(str(SUPPORT / "torch_program.py"), method)
    assert (child.returncode, child.stderr) == (0, "")
    *travelled, versions = child.stdout.splitlines()
    assert len(travelled) >= 3 * len({**WRITABLE, **READ_ONLY, **FLAGGED})
    assert re.fullmatch(r"NumPy [\d.]+ PyTorch [\w.+]+", versions)

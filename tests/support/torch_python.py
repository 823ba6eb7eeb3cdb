"""A Python that has PyTorch: Debian's, as PyTorch's own packages are very large."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DEBIAN = "/usr/bin/python3"
QUESTION = """
import importlib.util, sys
print(sys.version_info[:2], *map(importlib.util.find_spec, ("numpy", "torch")), sep="\\n")
"""


def python_with_torch() -> str | None:
    """Debian's Python, if it has PyTorch and can load this checkout's modules; else None."""
    if not Path(DEBIAN).exists():
        return None
    answer = subprocess.run(
        [DEBIAN, "-c", QUESTION], check=False, capture_output=True, text=True, timeout=60
    ).stdout.splitlines()
    usable = answer[:1] == [str(sys.version_info[:2])] and "None" not in answer
    return DEBIAN if usable else None


TORCH_PYTHON = python_with_torch()

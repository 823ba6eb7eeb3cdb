"""Children of the tools: their names, and their end with their parent.

By python-prctl where it is installed, else by prctl(2) itself.
"""

from __future__ import annotations

import ctypes
import os
import signal

try:
    import prctl
except ImportError:
    prctl = None

PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15


def die_with_parent(parent: int | None = None) -> None:
    """Make the kernel kill this process when its parent's thread ends.

    With the parent's process id, from the parent itself, it ends now if that one has ended already.
    """
    set_signal(signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def outlive_parent() -> None:
    """Undo ``die_with_parent``."""
    set_signal(0)


def set_signal(number: int) -> None:
    """Set the signal that this process gets when its parent's thread ends, 0 for none."""
    if prctl is not None:
        prctl.set_pdeathsig(number)
    else:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


def name_process(name: str) -> None:
    """Set the name by which ps and top show this process; the kernel keeps 15 bytes of it."""
    if prctl is not None:
        prctl.set_name(name)
    else:
        ctypes.CDLL(None).prctl(PR_SET_NAME, os.fsencode(name), 0, 0, 0)

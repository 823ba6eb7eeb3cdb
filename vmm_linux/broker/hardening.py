"""What a broker takes from itself at its start: it holds the memory of others.

By python-prctl where it is installed, else by prctl(2) and capset(2) themselves.
"""

from __future__ import annotations

import os
import resource
from typing import Final

from vmm_linux._core import kernel
from vmm_linux._tools.children import name_process

try:
    import prctl
except ImportError:
    prctl = None

NAME: Final = "vmm-broker"
PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 4, 24, 38
MOST_CAPABILITIES: Final = 64
MOST_FILES: Final = 65536


def harden() -> None:
    """Give up what a broker never needs.

    Afterwards nobody of the same user reads its memory or takes its descriptors, it leaves no core
    file, no program that it could run gets more rights, and it has no capability.

    Errors:
        OSError: the kernel refused; the caller does not go on.
    """
    name_process(NAME)
    if prctl is not None:
        prctl.set_dumpable(0)
        prctl.set_no_new_privs(1)
    else:
        refused(kernel.prctl(PR_SET_DUMPABLE, 0))
        refused(kernel.prctl(PR_SET_NO_NEW_PRIVS, 1))
    drop_bounding_set()
    refused(kernel.drop_capabilities())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def drop_bounding_set() -> None:
    """Drop every capability from the bounding set, where this process may.

    Without CAP_SETPCAP it has none that no_new_privs would let it get either.
    """
    for number in range(MOST_CAPABILITIES):
        if kernel.prctl(PR_CAPBSET_DROP, number) < 0:  # no such one, or not allowed
            return


def refused(result: int) -> None:
    """Raise what the kernel answered, if it is an error."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def raise_file_limit() -> int:
    """As many descriptors as this process may have; returns how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return MOST_FILES if soft == resource.RLIM_INFINITY else soft

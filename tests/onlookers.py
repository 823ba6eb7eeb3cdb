"""Processes to look at, and ways to look."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import kernel_oracle as kernel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm_linux.inspect import Mapping


PR_SET_PDEATHSIG = 1


@contextmanager
def stopped_child() -> Iterator[int]:
    """A forked child that does not run."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            kernel.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            while os.getppid() == parent:
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        yield child
    finally:
        end(child)


@contextmanager
def stopped_program() -> Iterator[int]:
    """A program that does not run, and shares no page that anybody writes to."""
    child = os.fork()
    if child == 0:
        try:
            kernel.libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            stop = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
            os.execv(sys.executable, [sys.executable, "-c", stop])  # noqa: S606  its own program
        finally:
            os._exit(1)
    try:
        os.waitpid(child, os.WUNTRACED)
        yield child
    finally:
        end(child)


def end(child: int) -> None:
    with suppress(ChildProcessError, ProcessLookupError):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def plain(mapping: Mapping) -> kernel.Mapping:
    """The mapping as the oracle tells one."""
    return kernel.Mapping(
        mapping.start,
        mapping.end,
        mapping.permissions,
        mapping.offset,
        mapping.device,
        mapping.inode,
        mapping.pathname or "",
    )

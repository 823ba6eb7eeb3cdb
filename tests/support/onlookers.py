"""Processes to look at, and how to look at them."""

from __future__ import annotations

import os
import platform
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import kernel_oracle as kernel
from vmm_linux._tools.children import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmm_linux.inspect import Mapping


@contextmanager
def stopped_child() -> Iterator[int]:
    """A forked child that does not run."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
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
            die_with_parent()
            stop = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
            os.execv(sys.executable, [sys.executable, "-c", stop])  # noqa: S606  its own program
        finally:
            os._exit(1)
    try:
        os.waitpid(child, os.WUNTRACED)
        yield child
    finally:
        end(child)


@contextmanager
def child_without_first_thread(prepare: Callable[[], object] = lambda: None) -> Iterator[int]:
    """A forked child whose first thread has ended, and another one waits.

    Args:
        prepare: what it does before.
    """
    child = os.fork()
    if child == 0:
        try:
            die_with_parent()
            prepare()
            threading.Thread(target=signal.pause).start()
            kernel.libc.syscall({"x86_64": 60, "aarch64": 93}[platform.machine()], 0)
        finally:
            os._exit(1)
    try:
        wait_until(lambda: state_of(child) == "Z")
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


def state_of(pid: int) -> str:
    """The state of a process as one letter, "" where there is none."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what the kernel does by itself, soon."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)

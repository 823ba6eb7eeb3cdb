"""The first client of a user starts the user's broker.

The broker is a process of its own, with its own session, which no client waits for: what is started
here binds the socket, leaves the broker behind and ends. However many clients start one at once,
they go through one lock, under which one finds no broker and makes it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from vmm_linux._core.values import one_line
from vmm_linux.errors import Fail

ROOT: Final = str(Path(__file__).resolve().parents[2])
CODE: Final = (
    "import sys; sys.path.insert(0, sys.argv[1]); "
    "from vmm_linux.broker.command import on_demand; sys.exit(on_demand(sys.argv[2]))"
)
DROPPED: Final = ("VMM_LINUX_", "PYTHON", "NOTIFY_SOCKET", "LISTEN_")
"""Beginnings of environment variables that are the client's alone."""
LONGEST_REASON: Final = 4096


def start(method: str, folder: str) -> None:
    """Start the broker of this user, and return when it listens.

    Args:
        method: that needs it.
        folder: the private one, which is there.

    Errors:
        FAIL: it did not start, and why.
    """
    if not sys.executable:
        raise Fail(
            method,
            "this interpreter does not know its program (sys.executable), which the "
            "broker needs; start 'vmm-linux broker' first",
        )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(DROPPED)
    }
    reading, writing = os.pipe()
    try:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-c", CODE, ROOT, folder],
            environment,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDWR, 0),
                (os.POSIX_SPAWN_DUP2, 0, 1),
                (os.POSIX_SPAWN_DUP2, writing, 2),
            ],
            setsigmask=(),  # else the broker would not see what this program blocks
        )
        os.close(writing)
        writing = -1
        reason = b""
        while piece := os.read(reading, LONGEST_REASON):  # until the broker has let go of it
            reason = (reason + piece)[-LONGEST_REASON:]
    finally:
        os.close(reading)
        if writing >= 0:
            os.close(writing)
    try:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # the program has the kernel wait for its children
        return
    if status != 0:
        words = one_line(reason.decode(errors="replace").strip())
        raise Fail(method, f"the broker of this user did not start ({status}): {words}")

"""User namespaces of a forked child's own."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from forked import in_child

CLONE_NEWUSER = 0x10000000
LIBC = ctypes.CDLL(None, use_errno=True)


def enter_user_namespace(uids: str, gids: str) -> None:
    """Enter a new user namespace with these maps, as the kernel takes them.

    Another process writes them, as who enters has no right to map others. Whoever is not root can
    map just himself.
    """
    ready, go = os.pipe()
    me = Path(f"/proc/{os.getpid()}")
    helper = os.fork()
    if helper == 0:
        status = 1
        try:
            if os.read(ready, 1):
                if os.geteuid() != 0:
                    (me / "setgroups").write_text("deny")
                (me / "uid_map").write_text(uids)
                (me / "gid_map").write_text(gids)
                status = 0
        finally:
            os._exit(status)
    entered = LIBC.unshare(CLONE_NEWUSER) == 0
    os.close(ready)
    if entered:
        os.write(go, b".")
    os.close(go)
    assert os.waitpid(helper, 0)[1] == 0, "the maps were not written"
    assert entered


def can_enter() -> bool:
    """Whether the kernel lets this process's child have a user namespace."""

    def enter() -> bool:
        return bool(LIBC.unshare(CLONE_NEWUSER) == 0)

    return in_child(enter)


needs_user_namespace = pytest.mark.skipif(
    not can_enter(), reason="the kernel refuses user namespaces"
)

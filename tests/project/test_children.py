"""Children die alone, die with their parent, and can be an ordinary user's."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from children import NOBODY, TESTS_IMPORTABLE, run_child


def die() -> None:
    """Touch an address that nobody has."""
    import ctypes

    ctypes.string_at(0)


def tell_who(greeting: str) -> None:
    """Print the user, and what an ordinary program can do: import the package, read its maps."""
    import os
    from pathlib import Path

    from vmm_linux import Retcode

    readable = Path("/proc/self/maps").read_text() != ""
    print(greeting, os.getuid(), os.geteuid(), os.getgroups(), readable, Retcode.OK)


def test_a_child_that_touches_what_it_must_not_dies_of_sigsegv() -> None:
    assert run_child(die).returncode == -signal.SIGSEGV


def test_a_child_s_words_and_exit_code_come_back() -> None:
    child = run_child("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (child.returncode, child.stdout, child.stderr) == (7, "out\n", "err\n")


def test_a_child_can_be_an_ordinary_user_s() -> None:
    child = run_child(tell_who, "I am", nobody=True)
    user = NOBODY if os.geteuid() == 0 else os.geteuid()
    groups = [] if os.geteuid() == 0 else os.getgroups()
    assert (child.stdout, child.stderr) == (f"I am {user} {user} {groups} True rcOk\n", "")


def test_a_child_that_takes_too_long_is_killed() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run_child("import signal; signal.pause()", timeout=0.5)


def test_a_child_gets_the_environment_it_is_given() -> None:
    child = run_child("import os; print(os.environ['GIVEN'])", environment={"GIVEN": "yes"})
    assert child.stdout == "yes\n"


def connect_and_wait(address: bytes) -> None:
    """Be connected to this address until death."""
    import signal
    import socket

    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
    connection.sendall(b"alive")
    signal.pause()


@pytest.mark.parametrize("nobody", [False, True], ids=["same user", "nobody"])
def test_a_child_dies_with_its_parent(nobody: bool) -> None:
    code = f"""
from children import run_child
from test_children import connect_and_wait
run_child(connect_and_wait, {{!r}}, nobody={nobody})
"""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(b"")
        listener.listen()
        listener.settimeout(60)
        with subprocess.Popen(
            [sys.executable, "-c", code.format(listener.getsockname())],
            env={**os.environ, **TESTS_IMPORTABLE},
        ) as parent:
            connection, _address = listener.accept()
            with connection:
                connection.settimeout(60)
                assert connection.recv(5) == b"alive"
                parent.kill()
                assert connection.recv(5) == b""

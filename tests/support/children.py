"""Children: code that runs in a process of its own, which may die."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

ROOT = Path(__file__).resolve().parents[2]
#: The folders of the tests and of what they share.
TEST_FOLDERS = sorted(str(path) for path in (ROOT / "tests").iterdir() if path.is_dir())
#: The environment in which a child can import what is in them.
TESTS_IMPORTABLE = {"PYTHONPATH": os.pathsep.join(TEST_FOLDERS)}
#: The user and group that own nothing.
NOBODY = 65534

# What every child does first. Changing users takes away both the death signal and the right to
# look at its own /proc, which a program started by that user has: the two come after it.
# A core limit of one byte turns off core files and core handlers; zero turns off only the files.
PROLOGUE = """
import ctypes, os, resource, signal, sys
parent, user = map(int, sys.argv[1:])
if user != os.geteuid():
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE = 1, 4
ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
if os.getppid() != parent:
    sys.exit("the parent is dead already")
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (0, 0) if hard == 0 else (1, 1))
del ctypes, hard, resource, signal, parent, user
"""


def imports_of(code: str) -> str:
    """The import statements of this code, wherever they stand."""
    statements = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Import)
        or (isinstance(node, ast.ImportFrom) and node.module != "__future__")
    ]
    return "".join(f"{ast.unparse(statement)}\n" for statement in statements)


def run_child(
    code: str | Callable[..., object],
    *arguments: object,
    nobody: bool = False,
    timeout: float = 60,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run code in a new interpreter that dies with this process, and wait for its end.

    ``code`` is text, or a function whose source is taken: it must import for itself what it uses,
    and is called with ``arguments``, which must be literals. ``nobody`` runs it as an ordinary
    user (a process that is not root's is one's already); the modules that the code names are
    imported before it becomes one. After ``timeout`` seconds it is killed and
    ``subprocess.TimeoutExpired`` raised. ``environment`` is added to this process's.

    Returns the return code (``-signal.SIGSEGV`` where that killed it) and what it wrote.
    """
    if not isinstance(code, str):
        function = textwrap.dedent(inspect.getsource(code))
        code = f"{function}\n{code.__name__}(*{arguments!r})\n"
    user = NOBODY if nobody and os.geteuid() == 0 else os.geteuid()
    # Nobody may not be allowed to read the checkout or the interpreter's library.
    early = "" if user == os.geteuid() else imports_of(code)
    options = ["-W", "error", "-X", "faulthandler"]
    identity = [str(os.getpid()), str(user)]
    return subprocess.run(
        [sys.executable, *options, "-c", early + PROLOGUE + code, *identity],
        check=False,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def in_own_process(
    work: Callable[..., object],
    *arguments: object,
    nobody: bool = False,
    timeout: float = 60,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a function of a test module in a new process; its assertions are the test's.

    Unlike one that ``run_child`` takes the source of, it may use whatever its module has.

    Returns what it wrote to stderr.
    """
    imports = f"from {work.__module__} import {work.__name__} as work"
    child = run_child(
        f"{imports}\nwork(*{arguments!r})\nprint('done')",
        nobody=nobody,
        timeout=timeout,
        environment={**TESTS_IMPORTABLE, **(environment or {})},
    )
    assert (child.returncode, child.stdout) == (0, "done\n"), child.stderr
    return child.stderr

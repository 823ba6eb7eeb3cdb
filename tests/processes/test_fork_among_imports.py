"""A child forked while another thread imports something waits for no import."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any

import pytest

from children import ROOT, TESTS_IMPORTABLE, in_own_process, run_child
from constants import PATIENCE
from event_loops import LOOPS
from kernel_oracle import PAGE
from sources import MODULES, SOURCES, name_of
from vmm_linux import audit, policy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

    from event_loops import EventLoop

"""Seconds after which a child hangs."""
#: Modules of tools, which show things by packages that may be absent.
#: What the layers of the core include.
PARTS = sorted((ROOT / "cython_src").rglob("*.pxi"))

SHOWING = {
    "_tools.machine",
    "_tools.matplotlib",
    "_tools.tables",
    "cli.map.command",
    "cli.map.plot",
    "demo.report",
}


# ---- no method has an import statement -------------------------------------------------------


def late_imports_of_python(text: str) -> Iterator[str]:
    """What this source imports inside of functions."""
    importers = {"__import__", "importlib.import_module"}
    for function in ast.walk(ast.parse(text)):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            calls = isinstance(node, ast.Call) and ast.unparse(node.func) in importers
            if calls or isinstance(node, ast.Import | ast.ImportFrom):
                yield ast.unparse(node)


def late_imports_of_cython(text: str) -> Iterator[str]:
    """The same of Cython source: what is indented, but for conditions of a module."""
    for line in text.splitlines():
        if re.match(r"\s+(import|from\s+\S+\s+import)\s", line):
            yield line.strip()


def test_no_method_has_an_import_statement() -> None:
    found = {
        (name_of(source), statement)
        for source in [*SOURCES, *PARTS]
        if not name_of(source).startswith("experiments.")
        and name_of(source) not in SHOWING
        and source.suffix != ".pxd"
        for statement in (
            late_imports_of_python if source.suffix == ".py" else late_imports_of_cython
        )(source.read_text())
    }
    assert found == {
        ("_core.imports", "__import__(name)"),  # the one place, which knows when not to
        ("cli", "importlib.import_module(COMMANDS[asked.command].module)"),
    }


def test_the_search_for_import_statements_finds_them() -> None:
    python = "import a\nif a:\n    import b\ndef f():\n    from c import d\n    __import__('e')\n"
    assert [*late_imports_of_python(python)] == ["from c import d", "__import__('e')"]
    cython = "import a\ncdef int f():\n    import b\n    from c import d\n# import e\n"
    assert [*late_imports_of_cython(cython)] == ["import b", "from c import d"]
    assert MODULES >= SHOWING


# ---- forks in the middle of an import --------------------------------------------------------


class Stuck:
    """A finder of modules, whose import of one of them does not come to an end."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def find_spec(self, name: str, *_others: object) -> ModuleSpec | None:
        """Be the one who imports that module."""
        return ModuleSpec(name, self) if name == self.name else None  # type: ignore[arg-type]

    def create_module(self, _spec: ModuleSpec) -> None:
        """Leave that to the interpreter."""

    def exec_module(self, _module: ModuleType) -> None:
        """Take long."""
        self.reached.set()
        self.go_on.wait(PATIENCE)


@contextlib.contextmanager
def importing(name: str) -> Iterator[None]:
    """While another thread imports this module, and holds its lock."""
    stuck = Stuck(name)
    original = sys.modules.pop(name, None)
    sys.meta_path.insert(0, stuck)

    def run() -> None:
        __import__(name)

    thread = threading.Thread(target=run)
    thread.start()
    assert stuck.reached.wait(PATIENCE)
    try:
        yield
    finally:
        stuck.go_on.set()
        thread.join()
        sys.meta_path.remove(stuck)
        del sys.modules[name]
        if original is not None:
            sys.modules[name] = original


def in_child_of(name: str, calls: Callable[[], object]) -> None:
    """Make calls in a child that is forked while another thread imports a module."""
    with importing(name):
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            status = 1
            try:
                calls()
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
                raise
            finally:
                os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def refuses(needed: str, call: Callable[[], object]) -> None:
    """Whether a call says which module it would have to import."""
    with pytest.raises(Exception, match=f"needs the module {needed}.* before the fork") as caught:
        call()
    assert type(caught.value).__name__ == "InvalidOperation"


def everything() -> None:
    """Every method of every face, and all else that is public and imported something once."""
    from vmm_linux import VMM, Event, Mdl, VmmFlags

    with VMM(policy=policy.Policy(default="allow"), audit=audit.Audit(failure="continue")) as vmm:
        va = vmm.allocate(0, PAGE, VmmFlags.RESERVE | VmmFlags.COMMIT | VmmFlags.READ)
        vmm.query(va)
        vmm.free(va, PAGE)
        with vmm.mdl(PAGE) as mdl, vmm.region(PAGE, VmmFlags.COMMIT | VmmFlags.READ) as region:
            mdl.map().write(b"x") if mdl.seals else region.read(1)
            mdl.read_only().close()
            mdl.clone().close()
    with Event() as event, Mdl.from_bytes(b"x") as frozen:
        event.set()
        assert event.clear() == 1
        with pytest.raises(Exception, match="no event loop"):
            event.wait_async().send(None)
        with pytest.raises(Exception, match="multiprocessing alone"):
            frozen.__reduce_ex__(4)
    with pytest.raises(Exception, match="did you mean 'allocate'"):
        policy.Policy([policy.Rule(deny=["alocate"])])


#: Modules that are imported late, by the package as it was or by the standard library for it.
LATE = ["multiprocessing.reduction", "multiprocessing.util", "tracemalloc", "xml.sax", "asyncio"]


def fork_while_others_import(*names: str) -> None:
    """Children that are forked in the middle of an import do all that they could do."""
    for name in names:
        in_child_of(name, everything)


def test_a_child_needs_none_of_the_modules_that_somebody_was_importing() -> None:
    in_own_process(fork_while_others_import, *LATE)


def fork_without_the_modules(rules: str, log: str) -> None:
    """What a call needs and was not loaded is named; without an import under way it is loaded."""
    from vmm_linux import VMM, Mdl

    mdl = Mdl.from_bytes(bytes(PAGE))

    def calls() -> None:
        refuses("numpy", lambda: mdl.array(4, "u1"))
        refuses("numpy", lambda: mdl.map().__array__())
        for variable, path, module in (
            ("VMM_LINUX_POLICY", rules, "vmm_linux.policy"),
            ("VMM_LINUX_AUDIT", log, "vmm_linux.audit"),
        ):
            os.environ[variable] = path
            refuses(module, VMM)
            del os.environ[variable]
        VMM().close()

    for name in ("numpy", "vmm_linux.policy", "vmm_linux.audit", "logging", "xml"):
        in_child_of(name, calls)


def load_in_a_child(rules: str, log: str) -> None:
    """A child of a process in which nobody imported anything at the fork."""
    from vmm_linux import VMM, Mdl

    mdl = Mdl.from_bytes(bytes(PAGE))
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)
        assert mdl.array(4, "u1").sum() == 0
        os.environ.update(VMM_LINUX_POLICY=rules, VMM_LINUX_AUDIT=log)
        VMM().close()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.fixture
def files(tmp_path: Any) -> tuple[str, str]:  # noqa: ANN401
    """A policy, and where an audit writes."""
    (tmp_path / "policy.toml").write_text('default = "allow"\n')
    return str(tmp_path / "policy.toml"), str(tmp_path / "calls.jsonl")


@pytest.mark.parametrize("work", ["fork_without_the_modules", "load_in_a_child"])
def test_a_child_says_what_it_would_have_to_import(work: str, files: tuple[str, str]) -> None:
    # The tests' own modules load much of this: these functions must come without them.
    source = f"{RELOAD}\n{work}(*{files!r})"
    child = run_child(source, environment=TESTS_IMPORTABLE)
    assert (child.returncode, child.stderr) == (0, "")


RELOAD = """
import sys
import pytest
from test_fork_among_imports import *
from test_fork_among_imports import fork_without_the_modules, load_in_a_child
for name in [*sys.modules]:
    if name.split(".")[0] in {"numpy"} or name in {"vmm_linux.policy", "vmm_linux.audit"}:
        del sys.modules[name]
"""


def make_what_the_environment_names(log: str) -> None:
    """A child whose parent had policy and audit in its environment from the start."""
    import vmm_linux

    with importing("xml"):
        child = os.fork()
        if child == 0:
            signal.alarm(PATIENCE)
            with vmm_linux.VMM() as vmm:
                vmm.mdl_create(PAGE, vmm_linux.VmmFlags.READ)
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    with open(log) as lines:  # noqa: PTH123
        assert "mdl_create" in lines.read()


def test_policy_and_audit_of_the_environment_are_loaded_with_the_package(
    files: tuple[str, str],
) -> None:
    environment = {"VMM_LINUX_POLICY": files[0], "VMM_LINUX_AUDIT": files[1]}
    in_own_process(make_what_the_environment_names, files[1], environment=environment)


# ---- no call imports -------------------------------------------------------------------------


def import_nothing() -> None:
    """Every call that is made in a child, with the interpreter telling of each import."""
    imported: list[object] = []
    pid = os.fork()
    if pid == 0:
        sys.addaudithook(lambda event, given: imported.append(given[0]) if event == "import" else 0)
        everything()
        for name in ("asyncio", "trio"):
            LOOPS[name].call(wait_for_an_event(LOOPS[name]))
        ours = [name for name in imported if not str(name).startswith(("_pytest", "pytest"))]
        print(ours, file=sys.stderr, end="") if ours else None
        os._exit(len(ours))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


async def wait_for_an_event(loop: EventLoop) -> None:
    """As a task does."""
    from vmm_linux import Event

    with Event() as event:
        waiting = loop.start(event.wait_async())
        await loop.settle()
        event.set()
        assert await waiting.result()


def test_calls_in_a_child_import_nothing() -> None:
    assert in_own_process(import_nothing) == ""

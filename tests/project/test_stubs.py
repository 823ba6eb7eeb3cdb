"""The stubs of the compiled modules are true: docstrings, signatures, members."""

from __future__ import annotations

import ast
import importlib
import runpy
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from children import ROOT

if TYPE_CHECKING:
    from pathlib import Path

STUBS = sorted((ROOT / "vmm_linux" / "_core").glob("*.pyi"))
#: What stubs say and the compiled modules do not have, as patterns of stubtest, each with a reason.
ALLOWED = r"""
# Until Python 3.12 a buffer has no methods; they are how type checkers know one.
vmm_linux\._core\.endpoint\.(Exporter|Holder)\.__(release_)?buffer__
"""


def run(*arguments: str) -> tuple[int, str]:
    """Run Python with these arguments; its exit code, and what it says."""
    done = subprocess.run(
        [sys.executable, *arguments],
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout


def test_every_compiled_module_has_a_stub() -> None:
    sources = (ROOT / "cython_src" / "vmm_linux" / "_core").glob("*.pyx")
    assert [path.stem for path in STUBS] == sorted(path.stem for path in sources)


def test_stubs_have_the_docstrings_of_the_compiled_modules() -> None:
    assert run("scripts/stubs", "--check") == (0, "")


BEFORE = '''class Bare: ...
class Kept:
    # Why it takes all.
    def __new__(cls, *arguments: object) -> Self: ...
    def method(self, wanted: int = 1) -> str: ...  # a comment
    @property
    def fact(self) -> int:
        """Of old."""
    @fact.setter
    def fact(self, fact: int) -> None: ...
    @overload
    def any(self, wanted: int) -> int: ...
    @overload
    def any(self, wanted: str) -> str: ...
class Changed:
    """Of old."""
    def silent(self) -> None:
        """Of old."""
'''
AFTER = '''class Bare:
    """A class without members."""

class Kept:
    """A class with members.

    In two paragraphs.
    """
    # Why it takes all.
    def __new__(cls, *arguments: object) -> Self: ...
    def method(self, wanted: int = 1) -> str:
        r"""A method with a \\n."""  # a comment
    @property
    def fact(self) -> int:
        """A fact."""
    @fact.setter
    def fact(self, fact: int) -> None: ...
    @overload
    def any(self, wanted: int) -> int:
        """An overload."""
    @overload
    def any(self, wanted: str) -> str: ...

class Changed:
    def silent(self) -> None: ...
'''


class Bare:
    """A class without members."""


class Kept:
    """A class with members.

    In two paragraphs.
    """

    def method(self) -> None:
        r"""A method with a \n."""

    @property
    def fact(self) -> None:
        """A fact."""

    def any(self) -> None:
        """An overload."""


class Changed:  # noqa: D101  that is what it is here for
    def silent(self) -> None:  # noqa: D102
        pass


def test_types_and_comments_stay_and_docstrings_are_written_replaced_and_removed() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "stubs"))
    module = SimpleNamespace(Bare=Bare, Kept=Kept, Changed=Changed)
    path = ROOT / "vmm_linux" / "_core" / "made_up.pyi"
    made = script["formatted"](script["with_docstrings"](BEFORE, module), path)
    assert made == AFTER
    assert script["formatted"](script["with_docstrings"](made, module), path) == AFTER
    with pytest.raises(script["UnknownNameError"], match="has no Kept"):
        script["with_docstrings"](BEFORE, SimpleNamespace(Bare=Bare))


def test_signatures_in_stubs_are_those_of_the_compiled_modules(tmp_path: Path) -> None:
    """What only compiled code and tests use needs no stub: mypy finds every use of a name."""
    allowed = tmp_path / "allowed"
    allowed.write_text(ALLOWED)
    modules = [f"vmm_linux._core.{path.stem}" for path in STUBS]
    options = ("--ignore-missing-stub", "--ignore-unused-allowlist", "--allowlist", str(allowed))
    code, words = run("-m", "mypy.stubtest", *options, *modules)
    assert code == 0, words


@pytest.mark.parametrize("path", STUBS, ids=lambda path: path.stem)
def test_a_class_in_a_stub_has_all_its_public_members(path: Path) -> None:
    module = importlib.import_module(f"vmm_linux._core.{path.stem}")
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            stub = {each.name for each in ast.walk(node) if isinstance(each, ast.FunctionDef)}
            names = (each for each in ast.walk(node) if isinstance(each, ast.Name))
            stub |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
            compiled = vars(vars(module)[node.name])
            assert {name for name in compiled if not name.startswith("_")} <= stub

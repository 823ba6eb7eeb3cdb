"""The design's layers hold: a module imports only from layers below its own."""

from __future__ import annotations

import ast
import fnmatch
import graphlib
import re
from typing import TYPE_CHECKING

import pytest

import vmm_linux
from children import ROOT
from sources import MODULES, PACKAGE, SOURCES, name_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

#: The layers, the lowest first, and what is in each: modules, and folders with all that is in them.
#: A module imports only from its own layer and those above it here, and no layer has a circle.
LAYERS = {
    "vocabulary": "errors flags states handles limits _core _core.vocabulary _core.containers "
    "_core.imports _core.old_names _core.typed _core.values",
    "kernel": "_core.kernel _core.credentials _core.shortage",
    "procfs": "_core.procfs",
    "ledger": "_core.ledger",
    "memory": "_core.memory",
    "endpoint": "_core.endpoint audit endpoint policy",
    "comfort": "_array_layout _default_vmm _file_copies _mappings _parts _pickling _sharer _span "
    "aio event mdl names region shared_array vmm",
    "package": "__init__",
    "inspect": "_core.inspect _core.mapping_dict _core.page_runs inspect",
    "shared by tools": "_tools",
    "broker": "broker",
    "doctor": "doctor",
    "demo": "demo",
    "command line": "cli",
    "what experiments use": "experiments experiments._framework.machine_code "
    "experiments._framework.results experiments._framework.run experiments._framework.system",
    "experiments": "experiments.*",
    "laboratory": "experiments._framework experiments.__main__",
}

#: What the top level of the project consists of; anything else there is ignored by git.
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "cython_src",
    "docs",
    "pyproject.toml",
    "scripts",
    "setup.py",
    "tests",
    "vmm_linux",
}

#: What the package itself offers.
PUBLIC = {*vmm_linux.__all__, "__version__"}


def imports_of_python(text: str) -> set[str]:
    """The modules of the package that this Python source imports, not only for types."""
    found = set()
    for node in nodes_that_run(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
            found |= imported_from(module, {alias.name for alias in node.names})
    return members(found)


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node below this one, but for what only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from nodes_that_run(node)


def imports_of_cython(text: str) -> set[str]:
    """The modules of the package that this Cython source imports or cimports."""
    text = re.sub(r"#.*|\\\n", "", text)
    names = r"(\([^)]*\)|.*)"
    found = set()
    for listed in re.findall(r"^\s*c?import\s+(.+)", text, re.MULTILINE):
        found |= names_in(listed)
    for module, listed in re.findall(
        rf"^\s*from\s+([\w.]+)\s+c?import\s+{names}", text, re.MULTILINE
    ):
        absolute = re.sub(r"^\.", f"{PACKAGE}.", module).rstrip(".")
        found |= imported_from(absolute, names_in(listed))
    return members(found)


def names_in(listed: str) -> set[str]:
    """The names in ``a as b, c``, in parentheses or not."""
    return {name.split()[0] for name in listed.strip("()").split(",") if name.strip()}


def imported_from(module: str, names: set[str]) -> set[str]:
    """What ``from module import names`` imports: modules of that package, or the module itself."""
    inside = {f"{module}.{name}" for name in names}
    if module == PACKAGE:
        return inside
    modules = {name for name in inside if name.removeprefix(f"{PACKAGE}.") in MODULES}
    return modules | ({module} if modules != inside else set())


def members(modules: set[str]) -> set[str]:
    """The modules of the package among these, without the package's name.

    What is no module is a name of the package itself, whose module is ``__init__``.
    """
    found = {name.removeprefix(f"{PACKAGE}.") for name in modules if name.startswith(f"{PACKAGE}.")}
    return {"__init__" if name in PUBLIC else name for name in found}


def layer_of(module: str) -> str:
    """The layer of a module: where it is named, or else the nearest folder around it is."""
    for layer, contents in LAYERS.items():
        if module in contents.split():
            return layer
    folder = module.rpartition(".")[0]
    for layer, contents in LAYERS.items():
        if f"{folder}.*" in contents.split():
            return layer
    assert folder, f"{module} has no layer"
    return layer_of(folder)


def imports_of(source: Path) -> set[str]:
    """The modules of the package that this file uses, itself left out."""
    read = imports_of_python if source.suffix == ".py" else imports_of_cython
    return read(source.read_text()) - {name_of(source)}


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: f"{name_of(source)}{source.suffix}")
def test_a_module_imports_only_from_its_own_and_lower_layers(source: Path) -> None:
    order = list(LAYERS)
    own = layer_of(name_of(source))
    imports = imports_of(source)
    assert imports <= MODULES, "an import of no module of the package"
    higher = {each for each in imports if order.index(layer_of(each)) > order.index(own)}
    assert higher == set() or name_of(source) == "__init__"


@pytest.mark.parametrize("layer", LAYERS)
def test_no_layer_has_a_circle(layer: str) -> None:
    uses: dict[str, set[str]] = {name: set() for name in MODULES if layer_of(name) == layer}
    assert uses, "a layer without modules"
    for source in SOURCES:
        if name_of(source) in uses:
            uses[name_of(source)] |= imports_of(source) & uses.keys()
    graphlib.TopologicalSorter(uses).prepare()


def test_every_name_in_the_layers_is_a_module_or_a_folder() -> None:
    listed = [name for contents in LAYERS.values() for name in contents.split()]
    assert len(listed) == len(set(listed))
    assert {name.removesuffix(".*") for name in listed} <= MODULES


def test_every_form_of_import_is_seen_in_python() -> None:
    text = """
import os, vmm_linux.a
import vmm_linux.b as b
from vmm_linux import c, d as e
from vmm_linux.f import g
from . import h
from .i import j
def function():
    from vmm_linux import (
        k,
        l,
    )
"""
    assert imports_of_python(text) == set("abcdfhikl")


def test_every_form_of_import_is_seen_in_cython() -> None:
    text = """
cimport cython, vmm_linux.a  # and vmm_linux.z
cimport vmm_linux.b as b
from libc.stdint cimport uint64_t
from vmm_linux cimport c, d as e
from vmm_linux.f cimport g
from . cimport h
from .i cimport (
    j,
)
from vmm_linux cimport (
    k,  # why
    l as m,
)
def function():
    from vmm_linux import n
    import vmm_linux.o
# from vmm_linux cimport z
from vmm_linux cimport p, \\
    q
"""
    assert imports_of_cython(text) == set("abcdfhiklnopq")


def test_nothing_else_lies_at_the_top_level() -> None:
    ignored = [
        pattern.rstrip("/")
        for pattern in (ROOT / ".gitignore").read_text().splitlines()
        if pattern and not pattern.startswith("#")
    ]
    found = {
        path.name
        for path in ROOT.iterdir()
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in [".git", *ignored])
    }
    assert found - TOP_LEVEL == set()

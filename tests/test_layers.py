"""The design's layers hold: a module imports only from layers below its own."""

from __future__ import annotations

import ast
import fnmatch
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import vmm_linux

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vmm_linux"

#: Every module and its layer. A module imports only those of lower numbers; the package itself
#: may import all.
LAYERS = {
    # 0: vocabulary
    "_containers": 0.0,
    "_imports": 0.1,
    "_vocabulary": 0.0,
    "errors": 0.0,
    "flags": 0.0,
    "_values": 0.05,
    "handles": 0.1,
    "limits": 0.1,
    "states": 0.0,
    # 1: the kernel; the ledger
    "_file_signals": 0.9,
    "_fork": 1.0,
    "_credentials": 1.0,
    "_ledger": 1.0,
    "_mutex": 1.0,
    "_syscalls": 1.0,
    "_group_room": 1.05,
    "_features": 1.1,
    "_open_file": 1.1,
    "_room": 1.1,
    "_copy": 1.2,
    "_maps_text": 1.2,
    "_smaps_record": 1.3,
    "_smaps_store": 1.31,
    "_smaps_parser": 1.32,
    "_own_process": 1.4,
    "_page_map": 1.2,
    "_shortage": 1.2,
    # 2: memory objects
    "_identity": 1.9,
    "_memory_object": 2.0,
    "_plan": 2.1,
    "_answer": 2.2,
    "_conversion": 2.2,
    "_location": 2.2,
    "_guards": 2.2,
    "_placement": 2.3,
    # 3: the address space
    "_address_space": 3.0,
    "_buffer_mappings": 3.1,
    "_ranges": 3.1,
    "_views": 3.1,
    # 4: query; handles and buffers
    "_handles": 4.0,
    "_query": 4.0,
    "_mdl": 4.1,
    # 5: transfer
    "_transfer": 5.0,
    # 6: the endpoint
    "_arguments": 6.0,
    "endpoint": 6.0,
    "_toml_lines": 6.0,
    "_calls": 6.01,
    "_audit": 6.01,
    "_rules": 6.02,
    "audit": 6.02,
    "policy": 6.03,
    "_watched": 6.04,
    "_client": 6.1,
    "_memory_methods": 6.2,
    "_vmm": 6.3,
    # 7: comfort
    "aio": 7.0,
    "event": 7.2,
    "_exporter": 7.0,
    "_own_vmm": 7.0,
    "_span": 7.0,
    "_sharer": 7.0,
    "_pickling": 7.1,
    "region": 7.1,
    "_arrays": 7.2,
    "mdl": 7.3,
    "vmm": 7.5,
    "__init__": 7.6,
    # 8: tools
    "_report": 8.0,
    "_settings": 8.0,
    "_trials": 8.0,
    "_descriptors": 8.0,
    "_inspect_types": 8.0,
    "_mapping_dict": 8.0,
    "_tables": 8.1,
    "_sharing": 8.1,
    "_inspect": 8.1,
    "inspect": 8.2,
    "_demo_run": 8.1,
    "_demo_peer": 8.2,
    "_demo_steps": 8.3,
    "_demo_mdl": 8.4,
    "demo": 8.5,
    "doctor": 8.5,
    "_sharing_command": 8.5,
    "_audit_file": 8.0,
    "_audit_command": 8.5,
    "_whole_file": 8.0,
    "_map_model": 8.3,
    "_map_file": 8.4,
    "_map_page": 8.4,
    "_map_picture": 8.4,
    "_map_plot": 8.4,
    "_map_command": 8.5,
    "_diff_command": 8.6,
    "_query_command": 8.6,
    "cli": 8.9,
    # 8: the laboratory; experiments themselves see nothing of it but "experiments"
    "experiments._results": 8.3,
    "experiments._code": 8.305,
    "experiments._system": 8.305,
    "experiments._run": 8.31,
    "experiments": 8.32,
    "experiments.*": 8.33,
    "experiments._catalogue": 8.34,
    "experiments._laboratory": 8.35,
    "experiments._worker": 8.35,
    "experiments._words": 8.36,
    "experiments._plots": 8.365,
    "experiments._terminal": 8.37,
    "experiments._files": 8.37,
    "experiments._page": 8.37,
    "experiments._command": 8.7,
}

#: What the top level of the project consists of; anything else there is ignored by git.
TOP_LEVEL = {
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "cython_src",
    "pyproject.toml",
    "scripts",
    "setup.py",
    "tests",
    "vmm_linux",
}

#: What the package itself offers.
PUBLIC = {*vmm_linux.__all__, "__version__"}

SOURCES = sorted(
    [
        *(ROOT / PACKAGE).glob("*.py"),
        *(ROOT / PACKAGE / "experiments").glob("*.py"),
        *(ROOT / "cython_src" / PACKAGE).glob("*.pyx"),
        *(ROOT / "cython_src" / PACKAGE).glob("*.pxd"),
    ]
)


def imports_of_python(text: str) -> set[str]:
    """The modules of the package that this Python source imports, not only for types."""
    found = set()
    for node in nodes_that_run(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, [PACKAGE if node.level else "", node.module]))
            found |= {module} if module != PACKAGE else {f"{module}.{a.name}" for a in node.names}
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
        found |= {absolute} if absolute != PACKAGE else {f"{PACKAGE}.{n}" for n in names_in(listed)}
    return members(found)


def names_in(listed: str) -> set[str]:
    """The names in ``a as b, c``, in parentheses or not."""
    return {name.split()[0] for name in listed.strip("()").split(",") if name.strip()}


def members(modules: set[str]) -> set[str]:
    """The modules of the package among these, without the package's name.

    What is no module is a name of the package itself, whose module is ``__init__``.
    """
    found = {
        layered(name.removeprefix(f"{PACKAGE}."))
        for name in modules
        if name.startswith(f"{PACKAGE}.")
    }
    return {"__init__" if name in PUBLIC else name for name in found}


def layered(name: str) -> str:
    """The module's name in the table of layers: an experiment has no name of its own there."""
    package, _, module = name.partition(".")
    if package != "experiments":
        return package
    return name if module.startswith("_") or not module else "experiments.*"


def name_of(source: Path) -> str:
    """The name in the table of layers of the module that this file is."""
    if source.parent.name != "experiments":
        return source.stem
    return layered(f"experiments.{source.stem}".removesuffix(".__init__"))


def imports_of(source: Path) -> set[str]:
    """The modules of the package that this file uses, itself left out."""
    read = imports_of_python if source.suffix == ".py" else imports_of_cython
    return read(source.read_text()) - {name_of(source)}


@pytest.mark.parametrize(
    "source", SOURCES, ids=lambda source: f"{source.parent.name}/{source.name}"
)
def test_a_module_imports_only_from_lower_layers(source: Path) -> None:
    name = name_of(source)
    if name == "__init__":
        return
    assert name in LAYERS, "a module without a layer"
    imports = imports_of(source)
    assert imports <= LAYERS.keys(), "an import of no module of the package"
    assert {each for each in imports if LAYERS[each] >= LAYERS[name]} == set()


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

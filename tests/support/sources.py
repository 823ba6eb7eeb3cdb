"""The source files of the package, and the modules that they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from children import ROOT

if TYPE_CHECKING:
    from pathlib import Path

PACKAGE = "vmm_linux"

SOURCES = sorted(
    [
        *(ROOT / PACKAGE).rglob("*.py"),
        *(ROOT / "cython_src" / PACKAGE).rglob("*.pyx"),
        *(ROOT / "cython_src" / PACKAGE).rglob("*.pxd"),
    ]
)


def name_of(source: Path) -> str:
    """The module that this file is, without the package's name; ``__init__`` is the package."""
    (folders,) = (
        source.relative_to(ROOT / top / PACKAGE).with_suffix("").parts
        for top in ("", "cython_src")
        if source.is_relative_to(ROOT / top / PACKAGE)
    )
    return ".".join(folders).removesuffix(".__init__")


MODULES = {name_of(source) for source in SOURCES}

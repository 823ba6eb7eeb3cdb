"""The modules that pickles of version 0.1.0 name, under their present names.

A pickle names the module and the function or class that makes its object. Here a removed module
stays available under its old name; it is loaded when a pickle first needs it.
"""

from __future__ import annotations

import sys
from types import ModuleType

from vmm_linux._core import imports

OLD_NAMES: dict[str, tuple[str, dict[str, str]]] = {
    "vmm_linux._audit": ("vmm_linux._core.endpoint", {"_restore_record": "restore_audit_record"}),
    "vmm_linux._inspect": ("vmm_linux._core.inspect", {"_restore": "restore_mapping"}),
    "vmm_linux._inspect_types": ("vmm_linux.inspect", {}),
    "vmm_linux._query": ("vmm_linux._core.endpoint", {"_restore": "restore_page_info"}),
    "vmm_linux._settings": ("vmm_linux.doctor", {}),
    "vmm_linux._sharing": ("vmm_linux.inspect", {}),
    "vmm_linux._smaps_record": ("vmm_linux._core.procfs", {"_restore": "restore_record"}),
    "vmm_linux._trials": ("vmm_linux.doctor", {}),
}
"""The present module of each, and the names that differ in it."""


class OldModule(ModuleType):
    """A module under its old name."""

    def __getattr__(self, name: str) -> object:
        """The object of this name, present or old."""
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module, names = OLD_NAMES[self.__name__]
        return getattr(imports.needed("unpickle", module), names.get(name, name))


for old in OLD_NAMES:
    sys.modules[old] = OldModule(old)

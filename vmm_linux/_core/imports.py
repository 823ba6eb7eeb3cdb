"""Late imports, and why a forked child may not make them.

A thread that imports a module holds a lock. A fork at that moment gives the child the lock but not
the thread, so an import of that module in the child waits for ever. Public methods therefore have
no import statements: the few that need a module which the package does not load itself (NumPy, the
policy and the audit of an environment that changed later) use this module.
"""

from __future__ import annotations

import os
import sys
from _thread import get_ident

from vmm_linux.errors import InvalidOperation

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType
    from typing import Any

# Python imports these to print a warning, when it prints one. Without them it prints less.
if sys.warnoptions:
    try:
        import linecache  # noqa: F401
        import tracemalloc  # noqa: F401
    except ImportError:
        pass

INTERRUPTED: set[str] = set()
"""Modules that other threads were importing at the fork of this process or an ancestor."""


def look_for_interrupted() -> None:
    """Note which imports never end in this child."""
    machinery: Any = sys.modules.get("_frozen_importlib")
    locks = getattr(machinery, "_module_locks", None)
    if locks is None:  # an interpreter with its locks elsewhere: any import may be unfinished
        INTERRUPTED.add("unknown modules")
        return
    for name, reference in list(locks.items()):
        owner = getattr(reference(), "owner", None)
        if owner is not None and owner != get_ident():
            INTERRUPTED.add(name)


os.register_at_fork(after_in_child=look_for_interrupted)


def loaded(name: str) -> ModuleType | None:
    """A module, if it is completely loaded. Imports nothing, and never waits."""
    module = sys.modules.get(name)
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return module


def needed(method: str, name: str) -> ModuleType:
    """A module, imported if it is not loaded yet.

    Errors:
        INVALID_OPERATION: this is a forked child, where the import could wait for ever.
        ImportError: there is no such module.
    """
    module = loaded(name)
    if module is not None:
        return module
    if INTERRUPTED:
        raise InvalidOperation(
            method,
            f"needs the module {name}, which was not loaded when this process was forked. Another "
            f"thread was importing {', '.join(sorted(INTERRUPTED))} then, so that an import can "
            f"wait for ever here: import {name} before the fork",
        )
    __import__(name)
    return sys.modules[name]

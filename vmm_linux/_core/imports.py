"""Modules that are loaded when they are needed first, and why a forked child may not do that.

A thread that imports a module holds a lock. A fork in that moment leaves the child with the lock
and without the thread, and whoever imports that module there waits for ever. So public methods
have no import statement of their own: the few that need a module which the package does not load
with itself (NumPy, the policy and the audit of an environment that was changed later) ask here.
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

# What Python itself imports to print a warning, in the moment when it prints one. Where it cannot
# be read, Python prints without.
if sys.warnoptions:
    try:
        import linecache  # noqa: F401
        import tracemalloc  # noqa: F401
    except ImportError:
        pass

__all__ = ["loaded", "needed"]

INTERRUPTED: set[str] = set()
"""Modules that other threads were importing when this process, or one above it, was forked."""


def look_for_interrupted() -> None:
    """Note which imports this child will never see the end of."""
    machinery: Any = sys.modules.get("_frozen_importlib")
    locks = getattr(machinery, "_module_locks", None)
    if locks is None:  # an interpreter that keeps its locks elsewhere: any import may be one
        INTERRUPTED.add("unknown modules")
        return
    for name, reference in list(locks.items()):
        owner = getattr(reference(), "owner", None)
        if owner is not None and owner != get_ident():
            INTERRUPTED.add(name)


os.register_at_fork(after_in_child=look_for_interrupted)


def loaded(name: str) -> ModuleType | None:
    """A module, if it is loaded to its end. Imports nothing, and waits for nothing."""
    module = sys.modules.get(name)
    if getattr(getattr(module, "__spec__", None), "_initializing", False):
        return None
    return module


def needed(method: str, name: str) -> ModuleType:
    """A module, which is imported if it is not loaded yet.

    Errors:
        INVALID_OPERATION: this is a forked child, and importing could make it wait for ever.
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

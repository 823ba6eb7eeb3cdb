"""The machine's memory."""

from __future__ import annotations

from typing import NamedTuple

from vmm_linux._core.kernel import text_of, value_of

LABELS = ("MemTotal", "MemAvailable", "SwapFree")


class Memory(NamedTuple):
    """The machine's memory in bytes."""

    total: int
    available: int
    swap_free: int


def memory() -> Memory:
    """The machine's memory now, from psutil where it is installed, else from /proc/meminfo."""
    try:
        import psutil  # noqa: PLC0415 (needed only here)
    except ImportError:
        text = text_of("/proc/meminfo")
        total, available, free = (value_of(text, label) or 0 for label in LABELS)
        return Memory(total, available, free)
    now = psutil.virtual_memory()
    return Memory(now.total, now.available, psutil.swap_memory().free)

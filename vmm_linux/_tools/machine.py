"""How much memory the machine has."""

from __future__ import annotations

from typing import NamedTuple

from vmm_linux._core.kernel import figure_in, text_of

__all__ = ["Memory", "memory"]


LABELS = ("MemTotal", "MemAvailable", "SwapFree")


class Memory(NamedTuple):
    """Bytes."""

    total: int
    available: int
    swap_free: int


def memory() -> Memory:
    """What there is now, as psutil tells it where it is installed, else as /proc/meminfo does."""
    try:
        import psutil  # noqa: PLC0415 (nobody else needs it)
    except ImportError:
        told = text_of("/proc/meminfo")
        total, available, free = (figure_in(told, label) or 0 for label in LABELS)
        return Memory(total, available, free)
    now = psutil.virtual_memory()
    return Memory(now.total, now.available, psutil.swap_memory().free)

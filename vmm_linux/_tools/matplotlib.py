"""Access to matplotlib, which is optional."""

from __future__ import annotations


class NoMatplotlibError(Exception):
    """matplotlib is not installed."""


def need_matplotlib(wanted: str) -> None:
    """Raise unless there is matplotlib, which this, in the plural, needs."""
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (needed only here)
    except ModuleNotFoundError as error:
        raise NoMatplotlibError(
            f"{wanted} need matplotlib: pip install 'vmm-linux[plot]'"
        ) from error

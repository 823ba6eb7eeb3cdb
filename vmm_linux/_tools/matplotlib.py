"""Access to matplotlib, which is optional."""

from __future__ import annotations


class NoMatplotlibError(Exception):
    """matplotlib is not installed."""


def need_matplotlib(wanted: str) -> None:
    """Check for matplotlib, before the work that leads to a drawing.

    Args:
        wanted: what needs it, in the plural.

    Errors:
        NoMatplotlibError: there is no matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (needed only here)
    except ModuleNotFoundError as error:
        raise NoMatplotlibError(
            f"{wanted} need matplotlib: pip install 'vmm-linux[plot]'"
        ) from error

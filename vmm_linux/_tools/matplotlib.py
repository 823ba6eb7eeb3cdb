"""matplotlib, which need not be installed."""

from __future__ import annotations

__all__ = ["NoMatplotlibError", "need_matplotlib"]


class NoMatplotlibError(Exception):
    """matplotlib is not installed."""


def need_matplotlib(wanted: str) -> None:
    """Complain now rather than when all is ready to be drawn.

    Args:
        wanted: what cannot be had without it, in the plural.

    Errors:
        NoMatplotlibError: there is no matplotlib.
    """
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (nobody else needs it)
    except ModuleNotFoundError as error:
        raise NoMatplotlibError(
            f"{wanted} need matplotlib: pip install 'vmm-linux[plot]'"
        ) from error

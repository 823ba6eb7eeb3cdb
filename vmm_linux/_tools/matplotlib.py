"""Access to matplotlib, which is optional."""

from __future__ import annotations

from vmm_linux._tools.commands import CannotTryError


def need_matplotlib(wanted: str) -> None:
    """Raise unless there is matplotlib, which this, in the plural, needs."""
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 (needed only here)
    except ModuleNotFoundError as error:
        raise CannotTryError(f"{wanted} need matplotlib: pip install 'vmm-linux[plot]'") from error

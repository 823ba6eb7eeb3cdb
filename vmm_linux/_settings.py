"""Where pickles that version 0.1.0 made look for classes of ``vmm_linux.doctor``."""

from vmm_linux.doctor import Setting

__all__ = ["Setting"]

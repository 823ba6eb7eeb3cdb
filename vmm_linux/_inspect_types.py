"""Where pickles that version 0.1.0 made look for classes of ``vmm_linux.inspect``."""

from vmm_linux.inspect import PageFlags, PageRun, RegionRun

__all__ = ["PageFlags", "PageRun", "RegionRun"]

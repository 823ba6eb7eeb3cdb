"""Where pickles that version 0.1.0 made look for classes of ``vmm_linux.inspect``."""

from vmm_linux.inspect import Channel, Holder, Kind, Mapper, Sharing, Unread

__all__ = ["Channel", "Holder", "Kind", "Mapper", "Sharing", "Unread"]

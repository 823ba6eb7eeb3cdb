"""What a broker says to the one that started it. It waits for no reader."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from typing import Final

STANDARD_ERROR: Final = 2


def say(text: str) -> None:
    """Tell the one that started this, if there is a standard error that takes it at once."""
    if sys.stderr is None:
        return
    poll = select.poll()
    poll.register(STANDARD_ERROR, select.POLLOUT)
    # A pipe that is ready takes this much without waiting; one that nobody reads is an error.
    data = f"vmm-linux broker: {text}\n".encode(errors="replace")[-select.PIPE_BUF :]
    with contextlib.suppress(OSError):
        if poll.poll(0):
            os.write(STANDARD_ERROR, data)

"""``python -m vmm_linux.broker``: the same as ``vmm-linux broker``."""

import sys

from vmm_linux._tools.commands import run
from vmm_linux.broker.command import main

if __name__ == "__main__":
    sys.exit(run("vmm-linux broker", main, sys.argv[1:]))

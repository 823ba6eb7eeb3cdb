"""``python -m vmm_linux.demo`` is ``vmm-linux demo``."""

import sys

from vmm_linux._tools.commands import run
from vmm_linux.demo import main

if __name__ == "__main__":
    sys.exit(run("vmm-linux demo", main, sys.argv[1:]))

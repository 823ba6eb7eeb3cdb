"""``python -m vmm_linux.experiments`` is ``vmm-linux experiment``."""

import sys

from vmm_linux._tools.commands import run
from vmm_linux.experiments._framework.command import main

if __name__ == "__main__":
    sys.exit(run("vmm-linux experiment", main, sys.argv[1:]))

"""``python -m vmm_linux.broker``: the same as ``vmm-linux broker``."""

import sys

from vmm_linux.cli import main

if __name__ == "__main__":
    sys.exit(main(["broker", *sys.argv[1:]]))

"""``python -m vmm_linux.cli`` is ``vmm-linux``."""

import sys

from vmm_linux.cli import main

if __name__ == "__main__":
    sys.exit(main())

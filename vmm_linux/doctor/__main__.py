"""``python -m vmm_linux.doctor`` is ``vmm-linux doctor``."""

import sys

from vmm_linux.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

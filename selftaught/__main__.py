"""`python -m selftaught`, the same as the `selftaught` command."""

import sys

from selftaught.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())

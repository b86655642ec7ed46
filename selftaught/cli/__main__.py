"""The entry point of the `selftaught` command and of `python -m selftaught.cli`."""

import signal
import sys

from selftaught.cli.interrupt import end_at_once, ended


def main() -> int:
    """Run the command line and return its exit code."""
    signal.signal(signal.SIGINT, end_at_once)
    from selftaught.cli.command import main as run

    return ended(run())


if __name__ == "__main__":
    sys.exit(main())

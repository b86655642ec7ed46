"""The entry point of the `selftaught` command and of `python -m selftaught`.

It imports next to nothing, so that Ctrl-C is handled before the rest of the package is loaded.
"""

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C by ending the process with one line and exit code 130."""
    del number, frame
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


def main() -> int:
    """Run the command line and return its exit code."""
    signal.signal(signal.SIGINT, end_at_once)
    from selftaught.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

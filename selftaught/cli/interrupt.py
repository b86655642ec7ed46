"""Ctrl-C and the exit code 130.

This module imports next to nothing, so that Ctrl-C is handled before the rest of the package is loaded.
"""

import atexit
import os
import sys
from contextlib import suppress
from types import FrameType

INTERRUPTED = 130


def end_at_once(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C by ending the process with one line and exit code 130."""
    del number, frame
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


def ended(code: int) -> int:
    """Return an exit code; after an interrupt, end the process with it.

    An interrupt inside `exec` makes Python end by the signal whatever the exit code is, and threads
    that still wait for a model would be waited for.
    """
    if code == INTERRUPTED:
        atexit._run_exitfuncs()
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return code

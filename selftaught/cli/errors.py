"""Errors and interrupts of the command line: messages of one paragraph, and exit codes."""

import _thread
import errno
import os
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from selftaught.cli.interrupt import end_at_once
from selftaught.cli.output import BAD_INPUT, FAILED, NOTHING_LEARNED, tell
from selftaught.hub import without_tokens

INTERRUPTED_HERE = threading.Event()
"""Set after the first Ctrl-C of a command."""

_AGAIN = threading.Event()
"""Set while the next interrupt is a postponed one, not another Ctrl-C."""


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise `KeyboardInterrupt` on the first Ctrl-C, and end the process on the second.

    Python drops an exception that is raised inside a callback of C code, and passes it to
    `sys.unraisablehook`. An interrupt that was dropped is raised again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGINT, _interrupt), sys.unraisablehook

    def dropped(what: Any) -> None:
        if INTERRUPTED_HERE.is_set() and issubclass(what.exc_type, KeyboardInterrupt):
            _postpone()
        else:
            hook(what)

    INTERRUPTED_HERE.clear()
    _AGAIN.clear()
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    again = _AGAIN.is_set()
    _AGAIN.clear()
    if INTERRUPTED_HERE.is_set() and not again:
        end_at_once(number, frame)
    INTERRUPTED_HERE.set()
    if _importing(frame):  # an exception during an import can crash C++ code, such as torch's
        _postpone()
    else:
        raise KeyboardInterrupt


def _postpone() -> None:
    """Interrupt this process again after 50 ms."""
    _AGAIN.set()
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def failed(error: BaseException, given: Sequence[str], place: Path | None) -> int:
    """Print an error message of one paragraph and return the exit code.

    The traceback of an unexpected error is written to a file.

    Args:
        error: the exception.
        given: the command line, for the traceback file.
        place: the output file or folder of the command, if it has one.
    """
    from selftaught.rollouts.selection import NothingToLearn

    if isinstance(error, NothingToLearn):
        tell(f"selftaught: nothing to learn from. {error}")
        return NOTHING_LEARNED
    if isinstance(error, BrokenPipeError) and _stdout_closed():
        return FAILED
    bad_input = isinstance(error, ValueError | OSError | ImportError)
    words = _words(error, place)
    if bad_input and (_raised_here(error) or (isinstance(error, OSError) and error.strerror)):
        tell(f"selftaught: error: {words}")
        return BAD_INPUT
    log = _traceback_file(error, given, place)
    name = "" if bad_input else f"{type(error).__name__}: "
    tell(f"selftaught: error: {name}{words}\n"
          f"selftaught did not expect this error. Its traceback is in {log}.")  # fmt: skip
    return BAD_INPUT if bad_input else FAILED


def _raised_here(error: BaseException) -> bool:
    """Return whether this package raised the error, so that its message is written for users."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return Path(last[0].f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def _words(error: BaseException, place: Path | None) -> str:
    """Return the message of an error.

    Errors of the operating system get the path and, if the disk is full, what to do about it.
    """
    words = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror
        if error.filename:
            words += f": {error.filename}"
        elif error.errno is not None and words == os.strerror(error.errno) and place is not None:
            words += f", while {place} was written"
    if FULL in words and "Free space" not in words:
        words += (
            ". Free space on that disk, then repeat the command: it continues from what is stored."
        )
    return words


FULL = os.strerror(errno.ENOSPC)


def _stdout_closed() -> bool:
    """Return whether the reader of standard output has closed it, as in `| head`.

    Further output is then discarded.
    """
    try:
        sys.stdout.flush()
        closed = _reader_gone()
    except (BrokenPipeError, ValueError):
        closed = True
    if closed:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


def _reader_gone() -> bool:
    """Return whether standard output is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):
        return False
    with suppress(OSError, ValueError):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return any(events & select.POLLERR for _, events in poll.poll(0))
    return False


def _traceback_file(error: BaseException, given: Sequence[str], place: Path | None) -> str:
    """Write a traceback to a file and return the file's path.

    The file is in the run folder, beside the output file, or in the folder for temporary files.
    """
    text = without_tokens(
        f"selftaught {shlex.join(given)}\n\n{''.join(traceback.format_exception(error))}"
    )
    for path in (*_beside(place), None):
        with suppress(OSError):
            if path is None:
                number, name = tempfile.mkstemp(
                    prefix="selftaught-error-", suffix=".log", text=True
                )
                os.close(number)
                path = Path(name)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(path)
    tell(text)
    return "the text above, because no file could be written"


def _beside(place: Path | None) -> list[Path]:
    if place is None:
        return []
    if place.is_dir():
        return [place / "error.log"]
    return [place.with_name(f"{place.name}.error.log")] if place.parent.is_dir() else []

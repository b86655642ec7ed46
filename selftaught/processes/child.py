"""A worker process that is asked over pipes."""

import json
import os
import signal
import subprocess
import sys
from threading import Event, Timer
from typing import BinaryIO


def started(module: str) -> subprocess.Popen[bytes]:
    """A process that runs `serve` of a module, with pipes to it; it imports what this one could."""
    path = os.pathsep.join(entry or os.curdir for entry in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {module} import serve; serve()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )


def answers_only() -> BinaryIO:
    """Standard output of a worker process, for what the parent reads; all else goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed must not be read as an answer
    return answers


def answered_in_time(
    process: subprocess.Popen[bytes], message: object, seconds: float
) -> tuple[bytes, bool]:
    """The line a worker answers (empty: it ended first), and whether it was killed for lateness."""
    assert process.stdin is not None and process.stdout is not None
    late = Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    return (line if line.endswith(b"\n") else b""), late.is_set()


def how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

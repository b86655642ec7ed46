"""Worker subprocesses that answer messages over pipes, one at a time.

A worker is a plain subprocess that imports one module and calls its `serve`. The caller's main
script therefore needs no `__main__` guard, and workers can be started from any thread. A message
is one line of JSON with a value and the number of bytes of data that follow the line.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from threading import Event, Timer
from typing import Any, NamedTuple


class Reply(NamedTuple):
    """The reply of a worker to a message."""

    message: Any
    """A JSON value. None if the worker ended before it replied."""
    data: bytes
    late: bool
    """Whether the worker was killed because of the time limit."""


class Child:
    """A worker process that runs `serve` of a module.

    It has the same import path as this process.

    Args:
        module: Name of the module.
    """

    def __init__(self, module: str) -> None:
        path = os.pathsep.join(entry or os.curdir for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {module} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )

    def ask(self, message: Any, data: bytes = b"", *, seconds: float | None = None) -> Reply:
        """Send a message and wait for the reply.

        Args:
            message: Any JSON value except None.
            data: Bytes sent after the message.
            seconds: Time limit, after which the worker is killed. None means no limit.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        late = Event()

        def kill() -> None:
            late.set()
            self._process.kill()

        timer = Timer(seconds, kill) if seconds is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            stdin.write(json.dumps([message, len(data)]).encode() + b"\n" + data)
            stdin.flush()
            line = stdout.readline()
            answer, size = json.loads(line) if line.endswith(b"\n") else (None, 0)
            received = stdout.read(size)
        except BrokenPipeError:
            return Reply(None, b"", late.is_set())
        finally:
            if timer is not None:
                timer.cancel()
        return Reply(answer if len(received) == size else None, received, late.is_set())

    def stop(self) -> None:
        """Kill the process immediately. Can be called from any thread."""
        self._process.kill()

    def close(self) -> None:
        """Kill the process and close its pipes. No thread may be waiting for a reply."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def how_it_ended(self) -> str:
        """Wait until the process has ended and describe how: by signal or with an exit code."""
        code = self._process.wait()
        return f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"


def conversation() -> tuple[Iterator[tuple[Any, bytes]], Callable[[Any, bytes], None]]:
    """Return the messages to this worker process, and a function that replies to one.

    Called in the worker. Standard output is redirected to standard error, because the parent reads
    replies from standard output. Ctrl-C is ignored, because the parent handles it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def messages() -> Iterator[tuple[Any, bytes]]:
        while line := sys.stdin.buffer.readline():
            message, size = json.loads(line)
            data = sys.stdin.buffer.read(size)
            if len(data) < size:
                return
            yield message, data

    def answer(message: Any, data: bytes = b"") -> None:
        try:
            answers.write(json.dumps([message, len(data)]).encode() + b"\n" + data)
            answers.flush()
        except BrokenPipeError:
            os._exit(1)  # the parent has ended

    return messages(), answer

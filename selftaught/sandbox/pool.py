"""The sandbox: runs untrusted programs against their tests in a pool of worker processes."""

import json
import os
import queue
import re
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import selftaught.sandbox.messages as messages
from selftaught.printable import printable
from selftaught.sandbox.program import Limits, Outcome, Program, Result

Isolation = Literal["namespaces", "process"]

_START_SECONDS = 60.0
_GRACE_SECONDS = 30.0
"""Time beyond the time limit in which a worker must have killed a program."""
_DETAIL = 300


class _Lost(Exception):
    """A worker ended before it had a result."""


class Sandbox:
    """Runs untrusted programs against their tests. A context manager.

    Args:
        limits: Limits of each program. Default: `Limits()`.
        workers: Number of programs that run at the same time. Default: one per CPU core.
        isolation: `namespaces` (Linux) or the weaker `process`; docs/sandbox.md compares them.

    Raises:
        RuntimeError: this machine cannot provide the isolation. The message names what is missing.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        isolation: Isolation = "namespaces",
    ) -> None:
        if isolation not in get_args(Isolation):
            raise ValueError(f"Expected isolation namespaces or process, got {isolation!r}.")
        if workers is not None and workers < 1:
            raise ValueError(f"Expected at least 1 worker, got {workers}.")
        self.limits = limits or Limits()
        self.isolation: Isolation = isolation
        self.workers = workers or os.cpu_count() or 1
        self._free: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(self.workers - 1):
            self._free.put(None)  # started when it is needed
        self._free.put(_Worker(self.limits, isolation))
        self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        self._closed = False

    def run(self, programs: Sequence[Program]) -> list[Result]:
        """Run programs and return their results, in the same order."""
        if self._closed:
            raise ValueError("The sandbox is closed.")
        return list(self._executor.map(self._result, programs))

    def close(self) -> None:
        """End all worker processes. Programs that run are finished first."""
        if self._closed:
            return
        self._closed = True
        self._executor.shutdown(cancel_futures=True)
        with suppress(queue.Empty):
            while True:
                if worker := self._free.get_nowait():
                    worker.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _result(self, program: Program) -> Result:
        if reason := _refusal(program, self.limits):
            return Result("refused", reason)
        worker = self._free.get()
        try:
            for _ in range(2):
                worker = worker or _Worker(self.limits, self.isolation)
                try:
                    return worker.run(program)
                except _Lost:
                    worker.close()
                    worker = None
        finally:
            self._free.put(worker)
        return Result("refused", "the worker process of the sandbox ended twice with this program")


def missing() -> list[str]:
    """Return what this machine lacks for the isolation `namespaces`, in words. Empty: nothing."""
    try:
        _Worker(Limits(), "namespaces").close()
    except RuntimeError as error:
        return [str(error.args[-1])]
    return []


def _refusal(program: Program, limits: Limits) -> str | None:
    """Return why a program is not run, or None."""
    if not program.tests:
        return "there are no tests"
    if any("\0" in text for text in (program.code, program.setup, *program.tests)):
        return "the source contains NUL characters"
    if len(program.code) > limits.source_characters:
        count, limit = len(program.code), limits.source_characters
        return f"the source has {count:,} characters; the limit is {limit:,}"
    return None


def _one_line(text: str) -> str:
    text = printable(re.sub(r"\s+", " ", text)).strip()
    return text if len(text) <= _DETAIL else text[: _DETAIL - 3] + "..."


class _Worker:
    """A worker process, as the caller sees it."""

    def __init__(self, limits: Limits, isolation: Isolation) -> None:
        self.limits = limits
        if sys.platform == "win32" or (isolation == "namespaces" and sys.platform != "linux"):
            raise _cannot(f"namespaces of Linux: this system is {sys.platform}")
        self.control, theirs = socket.socketpair()
        package = str(Path(__file__).resolve().parents[2])
        start = f"import sys; path = sys.path[:]; sys.path.insert(0, {package!r}); "
        start += "from selftaught.sandbox.worker import main; main()"
        options = {
            "limits": asdict(limits),
            "isolation": isolation,
            "path": [entry for entry in sys.path if _is_standard(entry)],
        }
        environment = {"PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # the interpreter may need it
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-c", start, json.dumps(options)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        line = self._line(_START_SECONDS)
        if line is None or (reply := json.loads(line)) != {"ready": True}:
            self.close()
            if isolation == "namespaces" and line is not None:
                raise _cannot(reply["missing"])
            raise RuntimeError("A worker process of the sandbox ended before it was ready.")

    def run(self, program: Program) -> Result:
        """Run one program.

        Raises:
            _Lost: the worker has ended.
            RuntimeError: the isolation could not be set up.
        """
        job_read, job = os.pipe()
        result, result_write = os.pipe()
        try:
            try:
                socket.send_fds(self.control, [b"r"], [job_read, result_write])
            except OSError:
                raise _Lost from None
            finally:
                os.close(job_read)
                os.close(result_write)
            with suppress(BrokenPipeError):
                messages.send(job, asdict(program), 2**31)
            state = self._line(self.limits.wall + _GRACE_SECONDS)
            reply = _read_all(result)
        finally:
            os.close(job)
            os.close(result)
        if state is None:
            raise _Lost
        return _parsed(reply, late=state == b"late")

    def _line(self, seconds: float) -> bytes | None:
        """Return the next line from the worker. None if it has ended or the time is over."""
        data = b""
        deadline = time.monotonic() + seconds
        while not data.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self.control], [], [], left)[0]:
                return None
            try:
                part = self.control.recv(4096)
            except OSError:
                return None
            if not part:
                return None
            data += part
        return data.rstrip(b"\n")

    def close(self) -> None:
        """End the worker and everything that it started."""
        self.control.close()
        try:
            self.process.wait(2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _cannot(reason: str) -> RuntimeError:
    return RuntimeError(
        f"This machine cannot isolate programs in namespaces. Missing: {reason}. "
        '`--task-options.sandbox process` (in Python, isolation="process") accepts the weaker isolation; '
        "docs/sandbox.md says what it does not protect.",
        reason,
    )


def _is_standard(entry: str) -> bool:
    return bool(entry) and not re.search(r"(site|dist)-packages", entry)


def _read_all(fd: int) -> bytes:
    """Return what the test process wrote. It has ended."""
    os.set_blocking(fd, False)
    data = b""
    with suppress(BlockingIOError):
        while len(data) < 2**16 and (part := os.read(fd, 2**16)):
            data += part
    return data


def _parsed(reply: bytes, *, late: bool) -> Result:
    """Return the result that the test process wrote."""
    try:
        values: Any = json.loads(reply) if reply.endswith(b"\n") and not late else None
        outcome, detail, test = values
    except (ValueError, TypeError):
        if late:
            return Result("time limit")
        return Result("error", "the test process ended without a result")
    if outcome == "broken":
        raise RuntimeError(f"The isolation of a program could not be set up: {detail}")
    if outcome not in get_args(Outcome) or type(detail) is not str:
        return Result("error", "the test process wrote an invalid result")
    return Result(outcome, _one_line(detail), test if type(test) is int else None)

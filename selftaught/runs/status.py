"""Status of a run: `status.json`, written by the running process and readable by any other."""

import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, TypedDict, cast

from selftaught.runs.folder import Advance, ProgressReporter, Row, read_json

State = Literal["running", "done", "stopped", "failed", "killed"]

WINDOW = 60.0
"""Time window of the speed estimate, in seconds."""
EVERY = 1.0
"""Minimum time between two progress updates of the file, in seconds."""


class StatusRow(TypedDict):
    """Contents of a status file."""

    method: str
    """Name of the method or command."""
    state: State
    stage: str | None
    """The stage that is running. None means no stage."""
    iteration: int | str | None
    """The last finished iteration, or the name of the last finished part of a run."""
    done: int
    """Finished items of the stage."""
    total: int | None
    """Items of the stage. None: not known."""
    unit: Literal["samples", "steps"]
    """What an item of the stage is."""
    per_second: float | None
    """Items per second in the last `WINDOW` seconds."""
    seconds_left: int | None
    """Estimated time until the stage ends."""
    began: str
    updated: str
    process: int
    """Process id on `host`."""
    host: str
    last_error: str | None


class Status:
    """Writes the status file of a running process.

    Args:
        path: The status file. It is replaced atomically: at every change of stage or state, and at
            most once per second in between.
        method: Name of the method or command, such as "STaR".
    """

    def __init__(self, path: Path, method: str) -> None:
        self._path = path
        self._written = 0.0
        self._points: deque[tuple[float, int]] = deque()
        self._lock = threading.RLock()
        before = None
        with suppress(ValueError, OSError):
            before = read_json(path)
        self._before = cast("StatusRow | None", before)
        self._staged = False
        self._status: StatusRow = {
            "method": method, "state": "running", "stage": None,
            "iteration": (before or {}).get("iteration"), "done": 0,
            "total": None, "unit": "samples", "per_second": None, "seconds_left": None,
            "began": _now(), "updated": _now(), "process": os.getpid(),
            "host": socket.gethostname(),
            "last_error": (before or {}).get("last_error"),
        }  # fmt: skip
        self._write()

    def iteration(self, row: Row) -> None:
        """Record that an iteration, or a named part of a run, has finished."""
        with self._lock:
            self._status["iteration"] = row.get("iteration", row.get("name"))
            self._write()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Context manager for a stage; gives a function to call with the number of items finished.

        The items are samples, or optimizer steps in a training stage.
        """
        with self._lock:
            self._staged = True
            self._points = deque()
            self._status.update({
                "stage": name, "done": 0, "total": total or None, "per_second": None,
                "seconds_left": None, "unit": "steps" if "training" in name else "samples",
            })  # fmt: skip
            self._write()
        try:
            yield self._advanced
        finally:
            with self._lock:
                self._write()

    def _advanced(self, finished: int) -> None:
        """Add finished items. The first call of a stage may report items from an earlier run."""
        with self._lock:
            status, now = self._status, time.monotonic()
            if status["state"] != "running":
                return  # a thread that ends after the run
            status["done"] += finished
            self._points.append((now, status["done"]))
            while len(self._points) > 2 and now - self._points[1][0] > WINDOW:
                self._points.popleft()
            then, before = self._points[0]
            if now > then and status["done"] > before:
                status["per_second"] = rate = round((status["done"] - before) / (now - then), 3)
                left = max(0, status["total"] - status["done"]) if status["total"] else None
                status["seconds_left"] = round(left / rate) if left is not None and rate else None
            if now - self._written >= EVERY:
                self._write()

    def end(self, state: State, error: str | None = None) -> None:
        """Record how the run ended."""
        with self._lock:
            before = self._before
            if state == "failed" and not self._staged and before and before.get("state") == "done":
                self._status = before  # a refused command leaves a finished run as it was
                self._write()
                return
            self._status["state"] = state
            if error is not None:
                self._status["last_error"] = error
            if state == "done":
                self._status.update(
                    {
                        "stage": None,
                        "seconds_left": None,
                        "per_second": None,
                        "last_error": None,
                    }
                )
            self._write()

    def _write(self) -> None:
        """Write the file and rename it into place, so that readers never see an incomplete file.

        It is not synced to disk, because losing it does no harm. Write errors, such as a full disk,
        are ignored here; the run itself will report them.
        """
        self._written = time.monotonic()
        self._status["updated"] = _now()
        partial = self._path.with_name(f"{self._path.name}.partial")
        text = json.dumps(self._status, indent=1) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            if self._status["state"] != "running":
                self._overwrite(text)

    def _overwrite(self, text: str) -> None:
        """Overwrite the file in place with the final state, for when the disk is full."""
        with suppress(OSError):
            self._path.with_name(f"{self._path.name}.partial").unlink(missing_ok=True)
            with self._path.open("r+b") as file:
                file.write(text.encode())
                file.truncate()


@contextmanager
def tracked_status(
    path: Path, method: str, reporter: ProgressReporter | None = None
) -> Iterator[ProgressReporter]:
    """Context manager that gives a `ProgressReporter` which also writes the status file.

    The final state is recorded when the block ends: done, stopped (Ctrl-C) or failed.

    Args:
        path: The status file; see `status_file`.
        method: Name of the method or command, such as "STaR".
        reporter: Its callbacks are called too.
    """
    inner = reporter or ProgressReporter()
    status = Status(path, method)

    @contextmanager
    def progress(stage: str, total: int) -> Iterator[Advance]:
        with status.stage(stage, total) as ours, inner.progress(stage, total) as theirs:

            def advance(finished: int) -> None:
                ours(finished)
                if theirs is not None:
                    theirs(finished)

            yield advance

    def iteration(row: Row) -> None:
        status.iteration(row)
        inner.iteration(row)

    try:
        yield ProgressReporter(iteration=iteration, progress=progress)
    except KeyboardInterrupt:
        status.end("stopped")
        raise
    except BaseException as error:
        status.end("failed", f"{type(error).__name__}: {error}"[:2000])
        raise
    status.end("done")


def status_file(run: Path) -> Path:
    """Return the path of a status file: inside a run folder, otherwise next to the file or model.

    A run folder is recognized by its `run.lock`.
    """
    return run / "status.json" if _is_run(run) else run.with_name(f"{run.name}.status.json")


def _is_run(run: Path) -> bool:
    return (run / "run.lock").exists()


def read_status(run: Path) -> StatusRow:
    """Read the status of a run.

    The state is "killed" if the file says "running" but the process no longer exists.

    Args:
        run: A run folder, or a file or model folder that a command writes.

    Raises:
        ValueError: There is no status file, or it cannot be read.
    """
    path = status_file(run)
    read = read_json(path)
    if not isinstance(read, dict):
        raise ValueError(
            f"Expected a run folder, or the output of a command, with the status file {path}; "
            "there is none. The file is written when a run starts. Check the path."
        )
    status = cast(StatusRow, read)
    lock = run / "run.lock" if _is_run(run) else run.with_name(f"{run.name}.lock")
    if status.get("state") == "running" and not _is_locked(lock):
        status["state"] = "killed"
    return status


def _is_locked(lock: Path) -> bool:
    """Return whether a process has locked a file; without `fcntl`, True is assumed."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        with lock.open("r", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def status_lines(status: StatusRow) -> list[str]:
    """Return a status as lines of text.

    Args:
        status: The status, from `read_status`.
    """
    done, total = (
        value if isinstance(value := status.get(name), int) else 0 for name in ("done", "total")
    )
    items = status.get("unit")
    process = f"process {status.get('process')} on {status.get('host')}"
    lines = [f"{status.get('method')}  {status.get('state')}, {process}"]
    if status.get("iteration") is not None:
        lines.append(f"finished   {status['iteration']}")
    if status.get("stage"):
        lines.append(f"stage      {status['stage']}")
        share = f" of {total:,} ({done / total:.0%})" if total else ""
        lines.append(f"done       {done:,}{share} {items}")
    if isinstance(status.get("per_second"), int | float):
        lines.append(f"speed      {status['per_second']:,.1f} {items}/s")
    if isinstance(left := status.get("seconds_left"), int | float):
        lines.append(f"time left  {_duration(left)} of this stage")
    lines.append(f"started    {status.get('began')}, last update {status.get('updated')}")
    if status.get("last_error"):
        lines.append(f"last error {status['last_error']}")
    return lines


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""Where a run stands: `status.json`, written by the process that runs and read by any other."""

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
from typing import Any, Literal

from selftaught.runs.folder import Advance, ProgressReporter, read_json

State = Literal["running", "done", "stopped", "failed", "killed"]

WINDOW = 60.0
"""Seconds over which a rate is measured."""
EVERY = 1.0
"""Seconds between two writings of the file, at least."""


class Status:
    """What a process tells of its run while it runs.

    Args:
        path: the file; written whole or not at all, at most once a second and at every turn.
        method: what runs, such as "STaR".
    """

    def __init__(self, path: Path, method: str) -> None:
        self._path = path
        self._written = 0.0
        self._points: deque[tuple[float, int]] = deque()
        self._lock = threading.RLock()
        before = None
        with suppress(ValueError, OSError):
            before = read_json(path)
        self._told: dict[str, Any] = {
            "method": method, "state": "running", "stage": None,
            "iteration": (before or {}).get("iteration"), "done": 0,
            "total": None, "unit": "samples", "per_second": None, "seconds_left": None,
            "began": _now(), "updated": _now(), "process": os.getpid(), "host": socket.gethostname(),
            "last_error": (before or {}).get("last_error"),
        }  # fmt: skip
        self._write()

    def iteration(self, row: dict[str, Any]) -> None:
        """An iteration, or a part of a run with a name, has been finished."""
        with self._lock:
            self._told["iteration"] = row.get("iteration", row.get("name"))
            self._write()

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """A stage, and what is to be called with the number of samples, or steps, just finished."""
        with self._lock:
            self._points = deque()
            self._told |= {"stage": name, "done": 0, "total": total or None, "per_second": None,
                           "seconds_left": None, "unit": "steps" if "training" in name else "samples"}  # fmt: skip
            self._write()
        try:
            yield self._advanced
        finally:
            with self._lock:
                self._write()

    def _advanced(self, finished: int) -> None:
        """Count what was finished; the first call of a stage may tell of what was stored before it."""
        with self._lock:
            told, now = self._told, time.monotonic()
            if told["state"] != "running":
                return  # a thread that ends after the run
            told["done"] += finished
            self._points.append((now, told["done"]))
            while len(self._points) > 2 and now - self._points[1][0] > WINDOW:
                self._points.popleft()
            then, before = self._points[0]
            if now > then and told["done"] > before:
                told["per_second"] = rate = round((told["done"] - before) / (now - then), 3)
                left = max(0, told["total"] - told["done"]) if told["total"] else None
                told["seconds_left"] = round(left / rate) if left is not None and rate else None
            if now - self._written >= EVERY:
                self._write()

    def end(self, state: State, error: str | None = None) -> None:
        """The run has ended, and how."""
        with self._lock:
            self._told["state"] = state
            if error is not None:
                self._told["last_error"] = error
            if state == "done":
                self._told |= {
                    "stage": None,
                    "seconds_left": None,
                    "per_second": None,
                    "last_error": None,
                }
            self._write()

    def _write(self) -> None:
        """Renamed into place, so a reader never sees half; not flushed to the disk, being only news.

        A disk that is full is the run's to tell about, and not a reason to end it here.
        """
        self._written = time.monotonic()
        self._told["updated"] = _now()
        partial = self._path.with_name(f"{self._path.name}.partial")
        text = json.dumps(self._told, indent=1) + "\n"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text, encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            if self._told["state"] != "running":
                self._overwrite(text)

    def _overwrite(self, text: str) -> None:
        """Write the last state over the file in place: a full disk has no room for a second file."""
        with suppress(OSError):
            self._path.with_name(f"{self._path.name}.partial").unlink(missing_ok=True)
            with self._path.open("r+b") as file:
                file.write(text.encode())
                file.truncate()


@contextmanager
def tracked_status(
    path: Path, method: str, reporter: ProgressReporter | None = None
) -> Iterator[ProgressReporter]:
    """A watch that also writes the status file, to its end and whatever ends it.

    Args:
        path: the status file; see `status_file`.
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

    def iteration(row: dict[str, Any]) -> None:
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
    """Where a run's status stands: in its folder, which has a `run.lock`; else beside the file or model."""
    return run / "status.json" if _is_run(run) else run.with_name(f"{run.name}.status.json")


def _is_run(run: Path) -> bool:
    return (run / "run.lock").exists()


def read_status(run: Path) -> dict[str, Any]:
    """What a run tells; a run whose process is gone without a word has been "killed".

    Raises:
        ValueError: there is no status, or it cannot be read.
    """
    path = status_file(run)
    told = read_json(path)
    if not isinstance(told, dict):
        raise ValueError(
            f"Expected the folder of a run, or a file that a command makes, with {path}; there is "
            "none. It is written as soon as a run begins."
        )
    lock = run / "run.lock" if _is_run(run) else run.with_name(f"{run.name}.lock")
    if told.get("state") == "running" and not _held(lock):
        told["state"] = "killed"
    return told


def _held(lock: Path) -> bool:
    """Whether a process holds a lock file; without `fcntl` it is not known and taken to be so."""
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


def status_lines(told: dict[str, Any]) -> list[str]:
    """A status in words, one thing per line."""
    done, total = (
        found if isinstance(found := told.get(name), int) else 0 for name in ("done", "total")
    )
    unit = told.get("unit")
    lines = [f"{told.get('method')}  {told.get('state')}, process {told.get('process')} on {told.get('host')}"]  # fmt: skip
    if told.get("iteration") is not None:
        lines.append(f"finished   {told['iteration']}")
    if told.get("stage"):
        lines.append(f"stage      {told['stage']}")
        share = f" of {total:,} ({done / total:.0%})" if total else ""
        lines.append(f"done       {done:,}{share} {unit}")
    if isinstance(told.get("per_second"), int | float):
        lines.append(f"speed      {told['per_second']:,.1f} {unit}/s")
    if isinstance(told.get("seconds_left"), int | float):
        lines.append(f"time left  {_duration(told['seconds_left'])} of this stage")
    lines.append(f"began      {told.get('began')}, last word {told.get('updated')}")
    if told.get("last_error"):
        lines.append(f"last error {told['last_error']}")
    return lines


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

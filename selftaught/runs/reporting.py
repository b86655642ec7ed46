"""Reports of a run to experiment trackers.

The results of a run are in its files, such as `metrics.jsonl`. They are copied to the trackers as
points, by a thread, so that a tracker that is slow or fails does not delay or end the run. Every
tracker gets the points that it does not have yet. A resumed run therefore continues its tracker run,
and a tracker that is added later gets everything.
"""

import contextvars
import logging
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from selftaught.runs.folder import ProgressReporter, Row
from selftaught.runs.trackers import (
    TRACKERS,
    Point,
    Tracker,
    import_tracker,
    last_steps,
    tracker_run,
)

logger = logging.getLogger(__name__)

ReadPoints = Callable[[], Iterable[Point]]
"""Returns points that were not returned before; tags in the order of their steps."""
POLL = 20.0
"""Seconds between two looks at the checkpoints of a training."""
WAIT = 30.0
"""Maximum number of seconds that the end of a run waits for the trackers."""
WAIT_FAILED = 5.0
"""The same for a run that failed or was interrupted."""


class Reporting:
    """Copies points to trackers in a thread, until it is closed."""

    def __init__(self, folder: Path, names: Sequence[str], read: ReadPoints) -> None:
        for name in names:  # here, because two threads must not import the same packages at once
            import_tracker(name)
        self._folder, self._names, self._read = (
            folder,
            [one for one in TRACKERS if one in names],
            read,
        )
        self._open: dict[str, Tracker] = {}
        self._news, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(
            # a new context, because Trackio keeps the current run of a context
            target=contextvars.Context().run, args=(self._work,), name="trackers", daemon=True
        )  # fmt: skip
        self._thread.start()

    def update(self) -> None:
        """Have the thread look for new points."""
        self._news.set()

    def close(self, wait: float) -> None:
        """Have the thread write the last points and end; wait for it for some seconds."""
        self._ended.set()
        self._news.set()
        self._thread.join(wait)
        if self._thread.is_alive():
            logger.warning(
                "The trackers (%s) did not finish within %.0f s. The run is complete. Repeat its "
                "command to send the rest.", ", ".join(self._names), wait,
            )  # fmt: skip

    def _work(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.is_set()  # before the points are read, so that none is missed
            self._news.clear()
            points: list[Point] = []
            with self._warning(self._names):
                points = [point for point in map(_finite, self._read()) if point.values]
            for name in list(self._names):
                with self._warning([name]):
                    if name not in self._open:
                        self._open[name] = TRACKERS[name](tracker_run(self._folder))
                    _write_new(self._open[name], points)
            if not ended:
                self._news.wait(POLL)
        for name in list(self._names):
            with self._warning([name]):
                self._open[name].close()

    @contextmanager
    def _warning(self, names: Sequence[str]) -> Iterator[None]:
        """Turn an error into one warning; these trackers are not used any more."""
        try:
            yield
        except Exception as error:
            logger.warning(
                "Nothing more is reported to %s (%s: %s). The run continues, and its own files are "
                "complete. Repeat its command to send the rest.",
                ", ".join(names), type(error).__name__, str(error)[:500],
            )  # fmt: skip
            self._names = [name for name in self._names if name not in names]


def _finite(point: Point) -> Point:
    """Return the point without values that are not finite."""
    finite = {name: float(value) for name, value in point.values.items() if math.isfinite(value)}
    return Point(point.axis, point.step, finite)


def _write_new(tracker: Tracker, points: Sequence[Point]) -> None:
    """Write the values that a tracker does not have."""
    new, last = [], defaultdict[str, int](lambda: -1, tracker.last)
    for point in points:
        values = {name: value for name, value in point.values.items() if point.step > last[name]}
        last |= dict.fromkeys(values, point.step)
        if values:
            new.append(Point(point.axis, point.step, values))
    if new:
        tracker.write(new)
        tracker.last = last_steps(new, tracker.last)


@contextmanager
def reported(
    folder: Path, names: Sequence[str], read: ReadPoints, reporter: ProgressReporter
) -> Iterator[ProgressReporter]:
    """Context manager that gives progress callbacks which also report a run to trackers.

    Nothing is sent before the first stage of the run, so that a refused command leaves no trace.

    Args:
        folder: The run folder.
        names: Names of trackers. Empty or "none": nothing is reported.
        read: Reads the points from the files of the run.
        reporter: Its callbacks are called too.
    """
    wanted = [name for name in names if name in TRACKERS]
    if not wanted:
        yield reporter
        return
    started: list[Reporting] = []

    def start() -> Reporting:
        if not started:
            started.append(Reporting(folder, wanted, read))
        return started[0]

    def progress(stage: str, total: int) -> Any:
        start()
        return reporter.progress(stage, total)

    def iteration(row: Row) -> None:
        reporter.iteration(row)
        start().update()

    try:
        yield ProgressReporter(iteration=iteration, progress=cast(Any, progress))
    except BaseException:
        for one in started:
            one.close(WAIT_FAILED)
        raise
    start().close(WAIT)

"""The decoding thread of the server: it runs one model and takes jobs from other threads."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from selftaught.samplers.base import Closing
from selftaught.serving.jobs import Delivery, Job, Step

logger = logging.getLogger(__name__)


class Full(Exception):
    """Too many requests are waiting."""


class Decoder(Protocol):
    """Decodes several jobs at the same time."""

    @property
    def rows(self) -> int:
        """Number of completions in progress."""
        ...

    def fits(self, job: Job) -> bool:
        """Return whether there are enough free rows for a job."""
        ...

    def add(self, job: Job) -> None:
        """Start a job."""
        ...

    def step(self) -> Iterator[Delivery]:
        """Compute the next token of every completion."""
        ...

    def drop_cancelled(self) -> None:
        """Free the rows of jobs that were cancelled."""
        ...

    def clear(self) -> list[Job]:
        """Drop everything after an error, and return the jobs that were in progress."""
        ...


@dataclass(frozen=True)
class Load:
    """What an engine does at the moment."""

    rows: int
    """Number of completions in progress."""
    waiting: int
    """Number of completions that wait for a free row."""


class DecodingEngine(Closing):
    """Runs a decoder in a thread of its own.

    Args:
        decoder: the decoder.
        inside: returns a context manager in which the model must run.
        max_rows: maximum number of completions in progress.
        max_waiting: maximum number of completions that wait.
    """

    def __init__(
        self,
        decoder: Decoder,
        inside: Callable[[], AbstractContextManager[object]],
        *,
        max_rows: int,
        max_waiting: int,
    ) -> None:
        self._decoder, self._inside = decoder, inside
        self.max_rows, self._max_waiting = max_rows, max_waiting
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._cancelled = False
        self._rows = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    @property
    def load(self) -> Load:
        """The number of completions in progress and waiting."""
        with self._changed:
            return Load(self._rows, sum(job.n for job in self._waiting))

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none. Their steps are delivered from the decoding thread.

        Raises:
            Full: too many completions wait, or the engine is closed. While none wait, jobs are
                queued however many they are, since they would never fit otherwise.
            ValueError: a job has more completions than fit at the same time.
        """
        if (most := max(job.n for job in jobs)) > self.max_rows:
            raise ValueError(f"n must be at most {self.max_rows}; got {most}.")
        with self._changed:
            waiting, new = (sum(one.n for one in some) for some in (self._waiting, jobs))
            if self._closed or (waiting and waiting + new > self._max_waiting):
                raise Full
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Give up a job: its rows are freed before the next step."""
        with self._changed:
            job.cancelled = self._cancelled = True
            self._changed.notify()

    def close(self) -> None:
        """Stop the thread. Jobs in progress fail."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode(), self._inside():
            while self._wait():
                try:
                    self._admit()
                    for job, steps in self._decoder.step():
                        if not job.cancelled:
                            job.deliver(steps)
                except Exception as error:  # one request must not end the server
                    logger.exception("Decoding failed; the requests in progress get an error.")
                    self._fail(self._decoder.clear(), error)
        self._fail([*self._decoder.clear(), *self._waiting], RuntimeError("The server is closing."))

    def _wait(self) -> bool:
        """Wait for work; return False if the engine is closed."""
        with self._changed:
            self._rows = self._decoder.rows
            while not (self._closed or self._waiting or self._rows):
                self._changed.wait()
            return not self._closed

    def _admit(self) -> None:
        """Drop cancelled jobs, then start waiting jobs while rows are free, first come first served."""
        with self._changed:
            if self._cancelled:
                self._cancelled = False
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
                self._decoder.drop_cancelled()
        while True:
            with self._changed:
                if not self._waiting or not self._decoder.fits(self._waiting[0]):
                    return
                job = self._waiting.popleft()
            try:
                self._decoder.add(job)
            except Exception as error:
                self._fail([job], error)

    def _fail(self, jobs: Iterable[Job], error: BaseException) -> None:
        for job in jobs:
            if not job.cancelled:
                job.deliver([Step(0, error=error)])

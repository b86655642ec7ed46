"""What the decoding thread is given, and what it returns: jobs, rows and steps."""

import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from selftaught.records import FinishReason
from selftaught.samplers.local.token_choice import uniforms
from selftaught.samplers.stopping import Ending

logger = logging.getLogger(__name__)
_numbers = itertools.count()


@dataclass(frozen=True)
class LogProb:
    """Log-probability of a token, in nats, and of the most likely tokens in its place."""

    token: int
    value: float
    top: tuple[tuple[int, float], ...] = ()
    """Most likely token ids with their log-probabilities, most likely first."""


@dataclass(frozen=True)
class Step:
    """One new token of one completion, or the end of a job."""

    index: int
    """Index of the completion in its job."""
    token: int | None = None
    """Id of the new token; None if the job has no new token."""
    log_prob: LogProb | None = None
    thoughts: tuple[tuple[int, ...], ...] = ()
    """Token ids of the hidden thoughts before the token (Quiet-STaR)."""
    gain: float | None = None
    """Log-probability of the token with the hidden thoughts minus that without, in nats."""
    finished: FinishReason | None = None
    """Why the completion ends with this token; None if it continues."""
    prompt: tuple[LogProb, ...] = ()
    """Log-probabilities of the prompt's tokens from the second on, if they were asked for. Given
    once, before the first token."""
    error: BaseException | None = None
    """The job failed; there are no more steps."""


@dataclass(eq=False)
class Job:
    """A prompt, and how it is completed.

    Raises:
        ValueError: `n` or `max_tokens` is out of bounds.
    """

    prompt: tuple[int, ...]
    """Token ids of the prompt."""
    ending: Ending
    """Decides when a completion ends."""
    deliver: Callable[[Sequence[Step]], None]
    """Called in the decoding thread with the new steps."""
    n: int = 1
    """Number of completions."""
    max_tokens: int = 16
    """Maximum number of new tokens. 0: only the prompt's log-probabilities."""
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    log_probs: int | None = None
    """Number of most likely tokens to return for every token; None: no log-probabilities."""
    prompt_log_probs: bool = False
    """Return the log-probabilities of the prompt."""
    first: int = 0
    """Number of the request's completions that come before those of this prompt. It decides, with
    the seed, their random numbers."""
    number: int = field(default_factory=lambda: next(_numbers))
    cancelled: bool = False
    """Set by the caller when nobody waits for the result."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1; got {self.n}.")
        if self.max_tokens < (0 if self.prompt_log_probs else 1):
            raise ValueError(f"max_tokens must be at least 1; got {self.max_tokens}.")
        if not self.prompt:
            raise ValueError("The prompt is empty: expected at least one token.")


class Row:
    """A completion during decoding."""

    def __init__(self, job: Job, index: int) -> None:
        self.job, self.index = job, index
        self.tokens: list[int] = []
        self.finished: FinishReason | None = None
        self._uniforms = uniforms(job.seed, "", job.first + index, job.max_tokens).tolist()
        self.last = 0
        """The token that is read next."""
        self.stored = 0
        """Number of the row's own tokens whose keys and values are stored."""

    @property
    def uniform(self) -> float:
        """The uniform random number for the next token."""
        return self._uniforms[len(self.tokens)]

    def accept(self, token: int, log_prob: LogProb | None) -> Step:
        """Append a token, decide whether the completion has ended, and return the step."""
        self.tokens.append(token)
        if token in self.job.ending.eos or self.job.ending.stopped(self.tokens):
            self.finished = "stop"
        elif len(self.tokens) == self.job.max_tokens:
            self.finished = "length"
        return Step(self.index, token, log_prob, finished=self.finished)


Delivery = tuple[Job, list[Step]]
"""A job and its new steps."""


def failed(jobs: Iterable[Job], error: Exception) -> list[Delivery]:
    """Log an error, and return the last step of the jobs that it ends."""
    logger.error("Decoding failed; its requests get an error.", exc_info=error)
    return [(job, [Step(0, error=error)]) for job in jobs]

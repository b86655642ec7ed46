"""One request while it is answered: its jobs, and the texts of its completions."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selftaught.records import Completion, Text
from selftaught.rendering import TemplateOptions
from selftaught.samplers.stopping import Ending
from selftaught.serving.engine import DecodingEngine, Full
from selftaught.serving.jobs import Job, LogProb, Step
from selftaught.serving.protocol import ApiError
from selftaught.serving.text import CompletionText, Piece
from selftaught.thought_marks import ThoughtMarks


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model reads it."""

    ids: tuple[int, ...]
    """Token ids."""
    text: Text
    """Text or messages."""
    ending: Ending
    """Decides when a completion of it ends."""
    options: TemplateOptions
    """Variables of the chat template."""


@dataclass(frozen=True)
class Wanted:
    """How the prompts of a request are completed."""

    n: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    log_probs: int | None
    prompt_log_probs: bool = False


@dataclass(frozen=True)
class Usage:
    """Number of tokens of a request."""

    prompt: int
    completion: int
    reasoning: int

    def body(self) -> dict[str, Any]:
        """Return the usage with OpenAI's names."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class Generation:
    """The completions of a request's prompts.

    Args:
        engine: decodes.
        tokenizer: the model's tokenizer.
        prompts: the prompts.
        wanted: how they are completed.
        marks: the texts that open and close a thought.

    Raises:
        ApiError: too many requests are waiting.
    """

    def __init__(
        self,
        engine: DecodingEngine,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        wanted: Wanted,
        marks: ThoughtMarks,
    ) -> None:
        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Sequence[Step]]] = asyncio.Queue()
        self.prompts, self.wanted = prompts, wanted
        self.texts = [
            CompletionText(tokenizer, prompt.ending, marks)
            for prompt in prompts for _ in range(wanted.n)
        ]  # fmt: skip
        self.prompt_log_probs: list[tuple[LogProb, ...]] = [() for _ in prompts]
        self._jobs = [self._job(at, prompt) for at, prompt in enumerate(prompts)]
        self._more: list[Generation] = []
        try:
            engine.submit(*self._jobs)
        except Full:
            raise ApiError(
                "The server has too many requests. Try again later.", 429,
                code="rate_limit_exceeded", kind="rate_limit_error",
            ) from None  # fmt: skip

    def _job(self, at: int, prompt: Prompt) -> Job:
        """Return the job for a prompt, which puts its steps into the queue."""

        def deliver(steps: Sequence[Step]) -> None:
            try:
                self._loop.call_soon_threadsafe(self._queue.put_nowait, (at, steps))
            except RuntimeError:
                return  # the event loop is closed: the server ends

        wanted = self.wanted
        return Job(
            prompt.ids, prompt.ending, deliver, wanted.n, wanted.max_tokens, wanted.temperature,
            wanted.top_p, wanted.seed, wanted.log_probs, wanted.prompt_log_probs, at * wanted.n,
        )  # fmt: skip

    def cancel(self) -> None:
        """Free the rows of completions that have not ended."""
        for job in self._jobs:
            self._engine.cancel(job)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield the index of a completion and its new text, until all have ended.

        Raises:
            ApiError: decoding failed.
        """
        left = len(self.texts)
        try:
            while left:
                at, steps = await self._queue.get()
                for step in steps:
                    if step.error is not None:
                        raise _api_error(step.error)
                    if step.prompt:
                        self.prompt_log_probs[at] = step.prompt
                    index = at * self.wanted.n + step.index
                    if step.token is not None or step.finished is not None:
                        yield index, self.texts[index].add(step)
                    left -= step.finished is not None
        finally:
            if left:
                self.cancel()

    async def finish(self) -> None:
        """Wait until all completions have ended."""
        async for _ in self.pieces():
            pass

    def also(self, other: "Generation") -> None:
        """Count the tokens of completions that were drawn anew."""
        self._more.append(other)

    def completions(self) -> list[Completion]:
        """Return the completions of a request with one prompt."""
        ending = self.prompts[0].ending
        return [ending.completion(text.token_ids) for text in self.texts]

    @property
    def usage(self) -> Usage:
        """The number of tokens so far."""
        texts = [text for one in (self, *self._more) for text in one.texts]
        return Usage(
            sum(len(prompt.ids) for prompt in self.prompts),
            sum(len(text.token_ids) + text.hidden_tokens for text in texts),
            sum(text.reasoning_tokens for text in texts),
        )


def _api_error(error: BaseException) -> ApiError:
    """Return the error that a client gets when decoding fails."""
    if isinstance(error, ValueError):
        return ApiError(str(error))
    return ApiError(
        f"Decoding failed ({type(error).__name__}). The server's log has the details.", 500,
        kind="server_error",
    )  # fmt: skip


def request_seed(given: int | None) -> int:
    """Return the seed of a request; a random one if none is given."""
    return secrets.randbits(63) if given is None else given


def redrawn(wanted: Wanted, attempt: int, n: int) -> Wanted:
    """Return how to draw completions anew: with another seed, and at a temperature above 0."""
    return replace(
        wanted, seed=wanted.seed + attempt + 1, temperature=wanted.temperature or 1.0, n=n
    )

"""The sampler interface: prompts in, completions out."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from types import TracebackType
from typing import Any, Protocol, Self

from selftaught.records import Completion, Text, parse_json_line
from selftaught.rendering import check_template_options
from selftaught.thought_marks import THINK, ThoughtMarks, checked_marks, outside_thoughts

STORE_BATCH = 512
"""Number of completions that are requested in one call and stored together.

If a run is killed, at most this many completions are sampled again per concurrent call.
"""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters, with vLLM's names.

    Raises:
        ValueError: A value is out of bounds, or `n` > 1 with temperature 0.
    """

    n: int = 1
    """Number of completions per prompt."""
    temperature: float = 0.0
    """Sampling temperature; 0 is greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling threshold; 1.0 disables it."""
    max_tokens: int = 256
    """Maximum number of new tokens."""
    stop: tuple[str, ...] = ()
    """Stop strings. They end a completion only outside thoughts, and are removed from its text."""
    seed: int = 0
    """Random seed for sampling."""
    first: int = 0
    """Index of the first sample: `first=8, n=4` gives the last four of `n=12`."""
    thought_marks: ThoughtMarks = THINK
    """The texts that open and close a thought."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the model's chat template, such as `enable_thinking`. Used only for messages."""

    def __post_init__(self) -> None:
        checked_marks(self.thought_marks)
        check_template_options(self.chat_template_kwargs)
        for name, is_valid, expected in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("stop", "" not in self.stop, "a list of non-empty strings"),
            ("first", self.first >= 0, "0 or more"),
        ):
            if not is_valid:
                raise ValueError(f"{name} must be {expected}; got {getattr(self, name)!r}.")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} with temperature 0 gives {self.n} equal completions. Set a "
                "temperature above 0, or n=1."
            )

    def for_prompt(
        self, stop: Sequence[str], chat_template_kwargs: Mapping[str, Any]
    ) -> "SamplingParams":
        """Return the parameters with a prompt style's stop strings and template variables added."""
        return replace(
            self,
            stop=tuple(dict.fromkeys((*self.stop, *stop))),
            chat_template_kwargs={**self.chat_template_kwargs, **chat_template_kwargs},
        )

    def stored(self) -> dict[str, Any]:
        """Return the parameters as the header of a store contains them.

        Parameters that earlier versions did not have are omitted if they have their default values.
        """
        options = asdict(self) | {"stop": list(self.stop)}
        if self.first == 0:
            del options["first"]
        if self.thought_marks == THINK:
            del options["thought_marks"]
        else:
            options["thought_marks"] = list(self.thought_marks)
        if not self.chat_template_kwargs:
            del options["chat_template_kwargs"]
        return options


def stop_at(
    text: str, stop: Sequence[str], marks: ThoughtMarks = THINK, *, opened: bool = False
) -> int | None:
    """Return the index of the first stop string outside thoughts, or None if there is none.

    Stop strings inside a thought are ignored, and so are stop strings inside the white space
    between a thought and the answer.

    Args:
        text: A completion.
        stop: Stop strings.
        marks: The opening and the closing mark of a thought.
        opened: The prompt ended inside a thought, so the text starts inside one.
    """
    found = [at for string in stop for at in _occurrences(text, string)[:1]]
    if not found or not (opened or marks[0] in text or marks[1] in text):
        return min(found, default=None)
    ignored = list(_ignored(text, marks, opened))
    found = [
        at
        for string in stop
        for at in _occurrences(text, string)
        if not any(start <= at and at + len(string) <= end for start, end in ignored)
    ]
    return min(found, default=None)


def _occurrences(text: str, stop: str) -> list[int]:
    """Return the indices at which a stop string occurs, including overlapping occurrences."""
    return [match.start() for match in re.finditer(f"(?={re.escape(stop)})", text)]


def _ignored(text: str, marks: ThoughtMarks, opened: bool) -> Iterator[tuple[int, int]]:
    """Yield the spans where stop strings are ignored: thoughts and the white space after them."""
    begin, end = marks
    before = 0
    for start, finish in [*outside_thoughts(text, marks, opened=opened), (len(text), len(text))]:
        if start > before:
            inner = before + len(begin) * text.startswith(begin, before)
            ended = start - len(end) if text.endswith(end, inner, start) else start
            yield inner, ended
            if ended < start:
                yield start, start + len(text[start:]) - len(text[start:].lstrip())
        before = finish


def without_stop(
    text: str, stop: Sequence[str], marks: ThoughtMarks = THINK, *, opened: bool = False
) -> str | None:
    """Return the text before the first stop string outside thoughts, or None if there is none."""
    at = stop_at(text, stop, marks, opened=opened)
    return None if at is None else text[:at]


@dataclass(frozen=True)
class Usage:
    """Requests to a server with their tokens, time and cost."""

    requests: int = 0
    """Number of requests, including retries."""
    retries: int = 0
    """Number of retries."""
    prompt_tokens: int = 0
    """Number of prompt tokens, as counted by the server."""
    completion_tokens: int = 0
    """Number of completion tokens, as counted by the server."""
    seconds: float = 0.0
    """Seconds since the sampler was opened."""
    cost: float | None = None
    """Cost of the tokens; None if no price was given."""

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum of two usages."""
        costs = [usage.cost for usage in (self, other) if usage.cost is not None]
        return Usage(
            self.requests + other.requests,
            self.retries + other.retries,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
            sum(costs) if costs else None,
        )

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Self:
        """Parse a usage written as JSON.

        Args:
            text: JSON object as UTF-8 bytes.
            where: Name of the file, for error messages.

        Raises:
            ValueError: The JSON is not a usage.
        """
        row = parse_json_line(text, where)
        names = [column.name for column in fields(cls)]
        numbers = all(isinstance(row[name], int | float) for name in row if name != "cost")
        if set(row) != set(names) or not numbers or not isinstance(row["cost"], int | float | None):
            raise ValueError(
                f"{where}: expected an object with the numbers {', '.join(names)}, got other "
                "content. Move the file away."
            )
        return cls(**row)

    def __str__(self) -> str:
        """Return a one-line summary, as printed at the end of a command."""
        retries = f" ({self.retries:,} retries)" if self.retries else ""
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        return (
            f"{self.requests:,} requests{retries}, {self.prompt_tokens:,} prompt tokens, "
            f"{self.completion_tokens:,} completion tokens, {self.seconds:.0f} s{cost}"
        )


class Closing:
    """Base class of samplers and scorers: a context manager that calls `close`."""

    at_once = 1
    """Number of concurrent calls of `sample`; see `Sampler`."""
    usage: Usage | None = None
    """Requests to a server so far; None without a server."""

    def close(self) -> None:
        """Free the memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Sampler(Protocol):
    """Interface of samplers. Use a sampler in a `with` statement, which frees its memory."""

    @property
    def model(self) -> str:
        """The name or folder of the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the weights. It changes when a model is trained again into the same folder."""
        ...

    @property
    def at_once(self) -> int:
        """Number of calls of `sample` to make concurrently, each in a thread; 1: no threads."""
        ...

    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        prefix_tokens: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `params.n` completions for every prompt.

        Args:
            prompts: Texts or messages.
            params: Sampling parameters.
            keys: One name per prompt, such as the problem's id. The randomness of a token depends
                only on (seed, key, sample index) and its position in the completion, not on the
                batch. Default: the prompt itself.
            prefix_tokens: For every prompt, the first token ids of its completion, which sampling
                continues. The result is the whole completion, and `max_tokens` applies to the
                whole. A prefix that already ends with an end token or contains a stop string is
                returned without sampling.
            progress: Called with the number of completions just finished.

        Returns:
            Completions as `[prompt][sample]`.

        Raises:
            ValueError: A prompt with `max_tokens` exceeds the model's context, or a prefix has
                `max_tokens` or more tokens. The message names the key.
        """
        ...

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Check that all prompts can be sampled, before sampling starts.

        Raises:
            ValueError: A prompt with `max_tokens` exceeds the model's context. The message names
                the key.
        """
        ...

    def close(self) -> None:
        """Free the memory. Calls of `sample` in other threads raise an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def checked_keys(keys: Sequence[str] | None, prompts: Sequence[Text]) -> Sequence[str]:
    """Return one key per prompt; by default the prompt itself.

    Raises:
        ValueError: The numbers of keys and prompts differ.
    """
    if keys is None:
        return [
            prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
            for prompt in prompts
        ]
    if len(keys) != len(prompts):
        raise ValueError(f"Expected one key per prompt, got {len(keys)} for {len(prompts)}.")
    return keys


def draw_number(seed: int, key: str, index: int) -> int:
    """Return the random seed of one completion: 0 to 2**63 - 1, from (seed, key, sample index)."""
    name = f"{seed}\0{key}\0{index}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def checked_prefix_tokens(
    prefix_tokens: Sequence[Sequence[int]] | None, keys: Sequence[str], max_tokens: int
) -> list[tuple[int, ...]]:
    """Return the prefix tokens for each key; empty ones if `prefix_tokens` is None.

    Raises:
        ValueError: The numbers of prefixes and keys differ, or a prefix has `max_tokens` or more
            tokens.
    """
    if prefix_tokens is None:
        return [()] * len(keys)
    if len(prefix_tokens) != len(keys):
        raise ValueError(
            f"Expected one sequence of prefix tokens per prompt, got {len(prefix_tokens)} for "
            f"{len(keys)} prompts."
        )
    for tokens, key in zip(prefix_tokens, keys, strict=True):
        if len(tokens) >= max_tokens:
            raise ValueError(
                f"The prefix for {key!r} has {len(tokens)} tokens; expected fewer than "
                f"max_tokens={max_tokens}, which limits the whole completion. Increase max_tokens, "
                "or leave out this prompt."
            )
    return [tuple(tokens) for tokens in prefix_tokens]

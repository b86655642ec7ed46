"""What every sampler is: prompts in, completions out."""

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
"""Completions that are asked for in one call and stored together: what a killed run asks again, for each
call in hand, at most."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample; the names are vLLM's."""

    n: int = 1
    """Completions per prompt."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    """Strings that end a completion outside its thoughts; they are cut from its text."""
    seed: int = 0
    first: int = 0
    """Index of the first sample: `first=8, n=4` gives the last four of `n=12`."""
    thought_marks: ThoughtMarks = THINK
    """The texts that open and end a thought."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Variables of the model's chat template, such as `enable_thinking`; for messages only."""

    def __post_init__(self) -> None:
        checked_marks(self.thought_marks)
        check_template_options(self.chat_template_kwargs)
        for name, holds, want in (
            ("n", self.n >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("stop", "" not in self.stop, "strings that are not empty"),
            ("first", self.first >= 0, "0 or more"),
        ):
            if not holds:
                raise ValueError(f"{name} must be {want}; got {getattr(self, name)!r}.")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n={self.n} with temperature 0 gives {self.n} equal completions; "
                "set a temperature above 0 or n to 1."
            )

    def for_prompt(
        self, stop: Sequence[str], chat_template_kwargs: Mapping[str, Any]
    ) -> "SamplingParams":
        """Return these options with the stop strings and template variables of a prompt style."""
        return replace(
            self,
            stop=tuple(dict.fromkeys((*self.stop, *stop))),
            chat_template_kwargs={**self.chat_template_kwargs, **chat_template_kwargs},
        )

    def stored(self) -> dict[str, Any]:
        """Return the options as a store's header has them.

        Options that came later than the first stores are left out where they are not used.
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
    """Return where the first stop string outside a thought begins, or None.

    A stop string inside a thought does not end a completion, and neither does one that is part of
    the white space between a thought and the answer.

    Args:
        opened: the prompt ended inside a thought, which the text continues.
    """
    found = [at for one in stop for at in _places(text, one)[:1]]
    if not found or not (opened or marks[0] in text or marks[1] in text):
        return min(found, default=None)
    closed = list(_ignored(text, marks, opened))
    found = [
        at
        for one in stop
        for at in _places(text, one)
        if not any(start <= at and at + len(one) <= end for start, end in closed)
    ]
    return min(found, default=None)


def _places(text: str, stop: str) -> list[int]:
    """Return where a stop string begins in a text, overlapping places included."""
    return [match.start() for match in re.finditer(f"(?={re.escape(stop)})", text)]


def _ignored(text: str, marks: ThoughtMarks, opened: bool) -> Iterator[tuple[int, int]]:
    """Yield the spans in which stop strings are ignored: thoughts, and the white space after them."""
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
    """Return the text before the first stop string outside a thought, or None if there is none."""
    at = stop_at(text, stop, marks, opened=opened)
    return None if at is None else text[:at]


@dataclass(frozen=True)
class Usage:
    """What the requests to a server came to."""

    requests: int = 0
    """With those that were tried again."""
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    """As the server counts them."""
    seconds: float = 0.0
    """From opening on."""
    cost: float | None = None
    """None where no price is known."""

    def plus(self, other: "Usage") -> "Usage":
        """Both together."""
        costs = [one.cost for one in (self, other) if one.cost is not None]
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
        """The usage that was written as JSON; `where` names the file in the error.

        Raises:
            ValueError: it is not one.
        """
        row = parse_json_line(text, where)
        names = [one.name for one in fields(cls)]
        numbers = all(isinstance(row[name], int | float) for name in row if name != "cost")
        if set(row) != set(names) or not numbers or not isinstance(row["cost"], int | float | None):
            raise ValueError(f"{where}: expected {', '.join(names)}; move the file away.")
        return cls(**row)

    def __str__(self) -> str:
        """In words, for the end of a command."""
        again = f" ({self.retries:,} tried again)" if self.retries else ""
        cost = "" if self.cost is None else f", cost {self.cost:.4f}"
        return (
            f"{self.requests:,} requests{again}, {self.prompt_tokens:,} prompt tokens, "
            f"{self.completion_tokens:,} completion tokens, {self.seconds:.0f} s{cost}"
        )


class Closing:
    """What is given back at the end of a `with`."""

    at_once = 1
    """See `Sampler`."""
    usage: Usage | None = None
    """What was asked of a server; None without one."""

    def close(self) -> None:
        """Give the memory back."""

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
    """Anything that turns prompts into completions; use it in a `with`, which frees its memory."""

    @property
    def model(self) -> str:
        """The name or folder of the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash of the weights: a model trained again keeps its folder but not this."""
        ...

    @property
    def at_once(self) -> int:
        """How many calls of `sample` it serves at the same time, each in a thread; 1: in none."""
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
        """`params.n` completions for every prompt, as `[prompt][sample]`.

        Args:
            keys: one name per prompt (a problem's id). Draws depend on (seed, key, sample index)
                and on a token's place in its completion, not on the batch; default: the prompt
                itself.
            begun: for every prompt the token ids of a completion that is continued. What comes back
                is the whole completion, and `max_tokens` counts the whole. One that has ended
                already, by its last token or a stop string in its text, comes back as it is.
            progress: called with the number of completions that have just been finished.

        Raises:
            ValueError: a prompt and `max_tokens` do not fit the model's context, or a completion
                begun leaves no room under `max_tokens`; names the key.
        """
        ...

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Refuse what could not be sampled, before anything is.

        Raises:
            ValueError: a prompt and `max_tokens` do not fit the model's context; names the key.
        """
        ...

    def close(self) -> None:
        """Give the memory back; calls of `sample` in other threads end with an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def checked_keys(keys: Sequence[str] | None, prompts: Sequence[Text]) -> Sequence[str]:
    """One name per prompt, by default the prompt itself.

    Raises:
        ValueError: their number is not that of the prompts.
    """
    if keys is None:
        return [
            one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in prompts
        ]
    if len(keys) != len(prompts):
        raise ValueError(f"Expected one key per prompt, got {len(keys)} for {len(prompts)}.")
    return keys


def draw_number(seed: int, key: str, index: int) -> int:
    """A number from 0 to 2**63 - 1 for (seed, key, sample index) alone: what a completion is drawn by."""
    name = f"{seed}\0{key}\0{index}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1


def checked_prefix_tokens(
    prefix_tokens: Sequence[Sequence[int]] | None, keys: Sequence[str], max_tokens: int
) -> list[tuple[int, ...]]:
    """The tokens of the completion begun for each key, none where `begun` is None.

    Raises:
        ValueError: their number is not that of the keys, or one has `max_tokens` or more tokens.
    """
    if prefix_tokens is None:
        return [()] * len(keys)
    if len(prefix_tokens) != len(keys):
        raise ValueError(
            f"Expected one begun completion per prompt, got {len(prefix_tokens)} for {len(keys)}."
        )
    for tokens, key in zip(prefix_tokens, keys, strict=True):
        if len(tokens) >= max_tokens:
            raise ValueError(
                f"The completion begun for {key!r} has {len(tokens)} tokens; expected fewer than "
                f"max_tokens={max_tokens}, which counts the whole completion. Raise max_tokens or "
                "leave this one out."
            )
    return [tuple(tokens) for tokens in prefix_tokens]

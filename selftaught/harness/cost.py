"""Number of forward passes and tokens that a model computes, for comparisons at equal cost."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from selftaught.quiet.attention import current_pass
from selftaught.quiet.passes import Thinking


@dataclass
class Cost:
    """What a model computed for requests of one type."""

    requests: int = 0
    """Number of requests."""
    passes: int = 0
    """Number of forward passes, each with all rows of a batch."""
    text_tokens: int = 0
    """Number of tokens of texts that the model read or wrote, padding included."""
    thoughts: int = 0
    """Number of thoughts."""
    thought_tokens: int = 0
    """Number of tokens of thoughts, start and end tokens included."""


class CostMeter:
    """Counts the forward passes of a module from now on.

    Everything that is computed is counted: also padding, and texts that have ended but are in one
    batch with texts that have not.

    Args:
        module: a model of transformers, or its decoder.
        tokens_per_thought: number of tokens of a thought, start and end tokens included. None for a
            model that does not think.
    """

    def __init__(self, module: nn.Module, tokens_per_thought: int | None = None) -> None:
        self._tokens_per_thought = tokens_per_thought
        self._costs: dict[str, Cost] = {}
        self._now = Cost()
        module.register_forward_pre_hook(self._count, with_kwargs=True)

    @contextmanager
    def during(self, request_type: str, requests: int) -> Iterator[Cost]:
        """Context manager: forward passes count for this type of request."""
        before = self._now
        self._now = self._costs.setdefault(request_type, Cost())
        self._now.requests += requests
        try:
            yield self._now
        finally:
            self._now = before

    def to_dict(self) -> dict[str, dict[str, int]]:
        """Return the costs by type of request, for JSON."""
        return {request_type: asdict(cost) for request_type, cost in self._costs.items()}

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = (kwargs.get(name) for name in ("input_ids", "inputs_embeds"))
        given = next(one for one in (*named, *args) if isinstance(one, Tensor))
        tokens = given.shape[:2].numel()
        self._now.passes += 1
        now = current_pass()
        if isinstance(now, Thinking):
            self._now.thought_tokens += tokens
            if now.stored == 0:  # the first pass of these thoughts
                self._now.thoughts += len(given)
        else:
            self._now.text_tokens += tokens

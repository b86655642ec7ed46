"""Conversions from a wide type to the narrower one that a test expects; any other value fails."""

from typing import TYPE_CHECKING

from selftaught.records import Completion, Rollout
from selftaught.tasks.answers import Verdict
from selftaught.tasks.base import Task

if TYPE_CHECKING:
    from torch import Tensor


def text(value: object) -> str:
    """Return a prompt, completion, rationale or decoded text that is a string."""
    assert isinstance(value, str), value
    return value


def token_id(value: object) -> int:
    """Return the id of a special token that the tokenizer has."""
    assert isinstance(value, int), value
    return value


def token_ids(sampled: Rollout | Completion) -> tuple[int, ...]:
    """Return the token ids of a rollout or completion that has them."""
    assert sampled.token_ids is not None, sampled
    return sampled.token_ids


def tensor(value: object) -> "Tensor":
    """Return a weight of a module, or a gradient, that is a tensor."""
    from torch import Tensor

    assert isinstance(value, Tensor), value
    return value


def verdict(task: Task, gold: str, answer: str) -> Verdict:
    """Return `task.equal(gold, answer)` of a task that gives the stage of its decision."""
    found = task.equal(gold, answer)
    assert isinstance(found, Verdict), found
    return found

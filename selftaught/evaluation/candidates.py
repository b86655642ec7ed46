"""Choosing among several candidates per problem, and how often each way of choosing is right.

Every number is over the same N candidates of a problem and all (or, for weighted votes, many) of their
subsets of k, and every interval is over problems, whose candidates succeed and fail together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selftaught import metrics
from selftaught.records import Rollout
from selftaught.tasks.latex import normalised
from selftaught.tasks.quantities import quantity

Choice = Literal["sample", "pass", "majority", "best", "weighted"]
"""One drawn at random; any right one; the commonest answer; the highest score; the answer with the most
weight, a candidate's weight being the exponential of its score, relative to the problem's highest."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of every problem, as `[problem][candidate]`."""

    answers: list[list[str | None]]
    """As they are voted for: numbers by their value, text without case and white space."""
    right: list[list[bool]]
    scores: list[list[float]] | None = None

    @property
    def n(self) -> int:
        """Candidates per problem; of the problem with the fewest."""
        return min(map(len, self.right))


def candidates_of(rollouts: Sequence[Rollout], scores: Sequence[float] | None = None) -> Candidates:
    """Graded rollouts by problem.

    Raises:
        ValueError: there are none, or one is not graded.
    """
    places: dict[str, list[int]] = {}
    for at, rollout in enumerate(rollouts):
        if rollout.correct is None:
            raise ValueError(
                f"The rollout of problem {rollout.problem.id!r} is not graded; call grade first."
            )
        places.setdefault(rollout.problem.id, []).append(at)
    if not places:
        raise ValueError("Expected candidates to choose among, got none.")
    groups = list(places.values())
    return Candidates(
        [[vote(rollouts[at].answer) for at in group] for group in groups],
        [[bool(rollouts[at].correct) for at in group] for group in groups],
        None if scores is None else [[scores[at] for at in group] for group in groups],
    )


def vote(answer: str | None) -> str | None:
    """An answer as it is voted for: 1,000, 1000.0 and $1000 have one vote, units being left out."""
    if answer is None:
        return None
    number = quantity(answer)
    if number is None:
        return normalised(answer).casefold()
    kept = number.unit if number.unit == "%" or number.letter else ""
    return f"{number.value} {kept}".strip()


def chosen(candidates: Candidates, way: Choice, k: int) -> list[float]:
    """For every problem, the chance that choosing among k of its candidates gives a right one."""
    problems = range(len(candidates.right))
    match way:
        case "sample":
            return [sum(right) / len(right) for right in candidates.right]
        case "pass":
            return [metrics.pass_at_k(len(right), sum(right), k) for right in candidates.right]
        case "majority":
            return [
                metrics.majority_at_k(candidates.answers[at], candidates.right[at], k)
                for at in problems
            ]
    if candidates.scores is None:
        raise ValueError(f"Choosing by {way!r} wants scores, and there are none.")
    if way == "best":
        return [
            metrics.best_of_k(candidates.scores[at], candidates.right[at], k) for at in problems
        ]
    return [
        metrics.weighted_majority_at_k(
            candidates.answers[at], candidates.right[at], candidates.scores[at], k, logs=True, seed=at
        )
        for at in problems
    ]  # fmt: skip


def share(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean of per-problem values and its 95% interval."""
    return (math.fsum(values) / len(values), *metrics.share_interval(values))


def powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    found = [2**power for power in range(n.bit_length()) if 2**power <= n]
    return found if found[-1] == n else [*found, n]

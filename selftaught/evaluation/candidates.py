"""Choice among several candidates per problem, and the accuracy of each rule of choice.

Every accuracy is an average over all subsets of k of the same N candidates of a problem (for
weighted votes, over many random subsets). Every interval is over problems, because the candidates
of a problem are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selftaught import metrics
from selftaught.deprecation import renamed_parameter
from selftaught.records import Rollout
from selftaught.tasks.latex import normalised
from selftaught.tasks.quantities import quantity

Choice = Literal["sample", "pass", "majority", "best", "weighted"]
"""Rule of choice among k candidates.

- "sample": a random candidate.
- "pass": any correct candidate (pass@k).
- "majority": the most frequent answer.
- "best": the candidate with the highest score.
- "weighted": the answer with the largest total weight, where a candidate's weight is the
  exponential of its score relative to the problem's highest score.
"""


@dataclass(frozen=True)
class Candidates:
    """The candidates of every problem, as `[problem][candidate]`."""

    answers: list[list[str | None]]
    """Normalized answers; see `vote`. None means that the candidate has no answer."""
    right: list[list[bool]]
    """Whether each candidate is correct."""
    scores: list[list[float]] | None = None
    """Scores of a verifier, if there are any."""

    @property
    def n(self) -> int:
        """Number of candidates per problem; the smallest, if it differs between problems."""
        return min(map(len, self.right))


def candidates_of(rollouts: Sequence[Rollout], scores: Sequence[float] | None = None) -> Candidates:
    """Group graded rollouts by problem.

    Args:
        rollouts: graded rollouts.
        scores: one score per rollout, in the same order.

    Raises:
        ValueError: there are no rollouts, or one is not graded.
    """
    indices: dict[str, list[int]] = {}
    for at, rollout in enumerate(rollouts):
        if rollout.correct is None:
            raise ValueError(
                f"Expected graded rollouts, but a rollout of problem {rollout.problem.id!r} has no "
                "outcome; call grade(rollouts, task) first."
            )
        indices.setdefault(rollout.problem.id, []).append(at)
    if not indices:
        raise ValueError("Expected at least one candidate to choose from, got none.")
    groups = list(indices.values())
    return Candidates(
        [[vote(rollouts[at].answer) for at in group] for group in groups],
        [[bool(rollouts[at].correct) for at in group] for group in groups],
        None if scores is None else [[scores[at] for at in group] for group in groups],
    )


def vote(answer: str | None) -> str | None:
    """Return the normalized form of an answer, by which votes are counted.

    Numbers are compared by value and without units: 1,000, 1000.0 and $1000 are the same vote. Text
    is compared without case and extra white space.
    """
    if answer is None:
        return None
    number = quantity(answer)
    if number is None:
        return normalised(answer).casefold()
    kept = number.unit if number.unit == "%" or number.letter else ""
    return f"{number.value} {kept}".strip()


@renamed_parameter("way", "rule")
def chosen(candidates: Candidates, rule: Choice, k: int) -> list[float]:
    """Return, for every problem, the probability that the choice among k of its candidates is
    correct.

    Args:
        candidates: the candidates of every problem.
        rule: rule of choice; see `Choice`.
        k: number of candidates to choose from.

    Raises:
        ValueError: the rule needs scores, and there are none.
    """
    problems = range(len(candidates.right))
    match rule:
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
        raise ValueError(f"Expected candidates with scores for the choice {rule!r}, got none.")
    if rule == "best":
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
    """Return the mean of per-problem values, and the low and high end of its 95% interval."""
    return (math.fsum(values) / len(values), *metrics.share_interval(values))


def powers(n: int) -> list[int]:
    """Return the powers of two up to n, and n itself: 1, 2, 4, ..., n."""
    found = [2**power for power in range(n.bit_length()) if 2**power <= n]
    return found if found[-1] == n else [*found, n]

"""Measuring a model on a task: sample, grade, and tally the outcomes."""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from selftaught import metrics
from selftaught.prompts import PromptStyle
from selftaught.records import (
    OUTCOMES,
    Problem,
    Rollout,
)
from selftaught.rollouts.graded import graded_beside
from selftaught.rollouts.store import collect
from selftaught.samplers.base import Sampler, SamplingParams
from selftaught.tasks.base import Task

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tally:
    """How many of `n` rollouts are right, with the 95% interval, clustered by problem."""

    n: int
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """What one model reached on one set of problems."""

    name: str
    """What was measured, such as "validation, iteration 3"."""
    model: str
    n: int
    """Rollouts, not problems, where there are several per problem."""
    right: int
    accuracy: float
    low: float
    """The lower end of the accuracy's 95% interval, clustered by problem."""
    high: float
    outcomes: dict[str, int]
    """Rollouts by outcome; every outcome is named, also with 0."""
    groups: dict[str, Tally]
    """Tallies by the task's groups, in natural order; empty where the task has none."""
    seconds: float

    @property
    def group_mean(self) -> Tally:
        """The unweighted mean of the groups' accuracies; without groups, the accuracy itself."""
        if not self.groups:
            return Tally(self.n, self.right, self.accuracy, self.low, self.high)
        tallies = self.groups.values()
        low, high = metrics.mean_interval([(t.accuracy, t.low, t.high) for t in tallies])
        mean = sum(tally.accuracy for tally in tallies) / len(tallies)
        return Tally(self.n, self.right, mean, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """The evaluation that `to_dict` gave as `row`."""
        groups = {name: Tally(**tally) for name, tally in row["groups"].items()}
        return cls(**{**row, "groups": groups})


def evaluate(
    sampler: Sampler,
    task: Task,
    problems: Sequence[Problem],
    prompt: PromptStyle,
    params: SamplingParams,
    *,
    store: Path,
    name: str,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Sample every problem, grade the completions and tally the outcomes.

    Args:
        store: where the rollouts are kept; the graded ones stand beside it, in `graded_path(store)`.
            What is already there is not done again.
        progress: called with the number of completions that have just been finished.
    """
    started = time.monotonic()
    rollouts = collect(sampler, problems, prompt, params, store=store, progress=progress)
    graded = graded_beside(store, rollouts, task)
    return evaluation_from(graded, task, name=name, seconds=time.monotonic() - started)


def evaluation_from(
    rollouts: Sequence[Rollout], task: Task, *, name: str, seconds: float = 0.0
) -> Evaluation:
    """The tally of graded rollouts of one model.

    Raises:
        ValueError: there is no rollout, or one is not graded.
    """
    if not rollouts:
        raise ValueError(f"{name}: expected at least one rollout to evaluate, got none.")
    for rollout in rollouts:
        if rollout.outcome is None:
            raise ValueError(
                f"{name}: the rollout of problem {rollout.problem.id!r} is not graded; "
                "pass the rollouts through `grade` first."
            )
    grouped: dict[str, list[Rollout]] = {}
    if task.group is not None:
        for rollout in rollouts:
            grouped.setdefault(task.group(rollout.problem), []).append(rollout)
    counted = Counter(rollout.outcome for rollout in rollouts)
    return Evaluation(
        name=name,
        model=rollouts[0].model,
        **asdict(_tally(rollouts)),
        outcomes={outcome: counted[outcome] for outcome in OUTCOMES},
        groups={group: _tally(grouped[group]) for group in sorted(grouped, key=natural_order)},
        seconds=seconds,
    )


def _tally(rollouts: Iterable[Rollout]) -> Tally:
    by_problem: dict[str, list[bool]] = {}
    for rollout in rollouts:
        by_problem.setdefault(rollout.problem.id, []).append(rollout.outcome == "right")
    verdicts = list(by_problem.values())
    n, right = sum(map(len, verdicts)), sum(map(sum, verdicts))
    low, high = metrics.clustered_interval(verdicts)
    return Tally(n, right, metrics.accuracy(right, n), low, high)


def natural_order(name: str) -> list[tuple[int, int | str]]:
    """A sort key that puts "2 digits" before "10 digits"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]


def accuracy_of(row: Mapping[str, Any]) -> Evaluation:
    """The greedy test evaluation in a row."""
    return Evaluation.from_dict(row["test"])

"""Evaluation of a model on a task: sampling, grading and counting the outcomes."""

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
    """Accuracy on `n` rollouts, with a 95% interval that is clustered by problem."""

    n: int
    right: int
    accuracy: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on a set of problems."""

    name: str
    """Name of the evaluation, such as "validation, iteration 3"."""
    model: str
    n: int
    """Number of rollouts, not of problems."""
    right: int
    """Number of correct rollouts."""
    accuracy: float
    low: float
    """Lower end of the 95% interval of the accuracy, clustered by problem."""
    high: float
    """Upper end of the 95% interval."""
    outcomes: dict[str, int]
    """Numbers of rollouts by outcome, including outcomes with 0."""
    groups: dict[str, Tally]
    """Tallies by the task's groups, in natural order; empty if the task has no groups."""
    seconds: float

    @property
    def group_mean(self) -> Tally:
        """Unweighted mean of the accuracies of the groups; without groups, the accuracy."""
        if not self.groups:
            return Tally(self.n, self.right, self.accuracy, self.low, self.high)
        tallies = self.groups.values()
        low, high = metrics.mean_interval([(t.accuracy, t.low, t.high) for t in tallies])
        mean = sum(tally.accuracy for tally in tallies) / len(tallies)
        return Tally(self.n, self.right, mean, low, high)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """Return the evaluation that `to_dict` converted to `row`."""
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
    """Sample completions of every problem, grade them, and return the evaluation.

    Args:
        sampler: the sampler.
        task: the task whose rules are used for grading.
        problems: the problems.
        prompt: prompt style.
        params: sampling options.
        store: file for the rollouts. The graded rollouts are written beside it, in
            `graded_path(store)`. Stored rollouts and grades are used again.
        name: name of the evaluation.
        progress: called with the number of completions just finished.
    """
    started = time.monotonic()
    rollouts = collect(sampler, problems, prompt, params, store=store, progress=progress)
    graded = graded_beside(store, rollouts, task)
    return evaluation_from(graded, task, name=name, seconds=time.monotonic() - started)


def evaluation_from(
    rollouts: Sequence[Rollout], task: Task, *, name: str, seconds: float = 0.0
) -> Evaluation:
    """Return the evaluation of the graded rollouts of one model.

    Args:
        rollouts: graded rollouts.
        task: the task, whose groups are used.
        name: name of the evaluation.
        seconds: duration of the evaluation.

    Raises:
        ValueError: there is no rollout, or one is not graded.
    """
    if not rollouts:
        raise ValueError(f"{name}: expected at least one rollout to evaluate, got none.")
    for rollout in rollouts:
        if rollout.outcome is None:
            raise ValueError(
                f"{name}: expected graded rollouts, but a rollout of problem "
                f"{rollout.problem.id!r} has no outcome; call grade(rollouts, task) first."
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
    """Return a sort key that puts "2 digits" before "10 digits"."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name)]


def accuracy_of(row: Mapping[str, Any]) -> Evaluation:
    """Return the test evaluation of a row of `metrics.jsonl`."""
    return Evaluation.from_dict(row["test"])

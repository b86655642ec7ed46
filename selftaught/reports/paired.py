"""Two measurements on the same problems: what was gained and lost, and the paired difference."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from selftaught.records import Problem, iter_rollouts

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Paired:
    """The difference of two accuracies on the problems that both measured."""

    n: int
    """Number of shared problems."""
    gained: int
    """Problems that only the second measurement has right."""
    lost: int
    """Problems that only the first measurement has right."""
    difference: float
    """Second minus first; with groups, the unweighted mean over the groups."""
    low: float
    """Lower end of the 95% interval of the difference."""
    high: float
    p: float
    """Two-sided exact McNemar test of `gained` against `lost`."""


def problem_key(problem: Problem) -> str:
    """Return what identifies a problem in two runs: other questions may have the same id."""
    return "\0".join((problem.id, problem.question, problem.gold))


def outcomes(graded: Path) -> dict[str, float]:
    """Return the share of right completions of every problem in a file of graded completions.

    Empty where there is no such file.
    """
    if not graded.is_file():
        return {}
    right: dict[str, list[bool]] = {}
    for one in iter_rollouts(graded):
        right.setdefault(problem_key(one.problem), []).append(bool(one.correct))
    return {name: sum(found) / len(found) for name, found in right.items()}


def paired(
    first: Mapping[str, float], second: Mapping[str, float], groups: Mapping[str, str] | None = None
) -> Paired | None:
    """Compare two measurements on the problems they share; None if they share none.

    Args:
        first, second: the share of right completions by problem.
        groups: the group of every problem. The difference is then the unweighted mean over the groups,
            as in `Evaluation.group_mean`.
    """
    shared = [name for name in first if name in second]
    if not shared:
        return None
    by_group: dict[str, list[float]] = {}
    for name in shared:
        group = (groups or {}).get(name, "")
        by_group.setdefault(group, []).append(second[name] - first[name])
    means = [sum(values) / len(values) for values in by_group.values()]
    variance = sum(_variance_of_mean(values) for values in by_group.values()) / len(by_group) ** 2
    difference, margin = sum(means) / len(means), Z95 * math.sqrt(variance)
    gained = sum(second[name] > first[name] for name in shared)
    lost = sum(second[name] < first[name] for name in shared)
    return Paired(len(shared), gained, lost, difference, max(-1.0, difference - margin),
                  min(1.0, difference + margin), mcnemar(gained, lost))  # fmt: skip


def _variance_of_mean(differences: list[float]) -> float:
    """Return the variance of a mean of paired differences, after Agresti and Min (2005).

    Half a problem is added to each of the four outcomes of a pair, so that the interval of two equal
    measurements is not a single point.
    """
    n = len(differences) + 2
    squares = sum(one * one for one in differences) + 1
    return (squares - sum(differences) ** 2 / n) / n**2


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test.

    Under the hypothesis of no difference, each discordant problem is gained or lost with probability 1/2.
    """
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)

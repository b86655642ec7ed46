"""Which rollouts to learn from, and in what form. Filters say what stays; builders what comes out."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence

from selftaught.equations import wrong_equations
from selftaught.prompts import PromptStyle
from selftaught.records import Example, Problem, Rollout


class NothingToLearn(Exception):
    """No example came out of an iteration; the message says how many were asked and what to try."""


def keep_correct(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """The rollouts whose answer is right.

    Raises:
        ValueError: a rollout has not been graded.
    """
    kept = []
    for rollout in rollouts:
        if rollout.correct is None:
            raise ValueError(
                f"Expected graded rollouts, but that of problem {rollout.problem.id!r} has no "
                "outcome; call grade(rollouts, task) first."
            )
        if rollout.correct:
            kept.append(rollout)
    return kept


def keep_sound(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """The rollouts without an inline equation that does not hold (Yuan et al. 2023, arXiv:2308.01825)."""
    return [rollout for rollout in rollouts if not wrong_equations(rollout.completion)]


def keep_distinct(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """The first of each problem's rollouts with the same text, white space aside."""
    first: dict[tuple[str, str], Rollout] = {}
    for rollout in rollouts:
        first.setdefault((rollout.problem.id, " ".join(rollout.completion.split())), rollout)
    return list(first.values())


def keep_at_most(rollouts: Iterable[Rollout], k: int) -> list[Rollout]:
    """The first k rollouts of each problem."""
    seen: Counter[str] = Counter()
    kept = []
    for rollout in rollouts:
        seen[rollout.problem.id] += 1
        if seen[rollout.problem.id] <= k:
            kept.append(rollout)
    return kept


def unsolved(problems: Iterable[Problem], rollouts: Iterable[Rollout]) -> list[Problem]:
    """The problems that no rollout got right."""
    solved = {rollout.problem.id for rollout in keep_correct(rollouts)}
    return [problem for problem in problems if problem.id not in solved]


def share_of(problems: Sequence[Problem], share: float, seed: int) -> list[Problem]:
    """Each problem with probability `share`; its id and the seed decide, so it is repeatable."""

    def draw(problem: Problem) -> float:
        digest = hashlib.sha256(f"{seed} {problem.id}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return [problem for problem in problems if draw(problem) < share]


def draw_problems(problems: Sequence[Problem], count: int | None, seed: str) -> Sequence[Problem]:
    """`count` of the problems, in their own order; all of them where there are no more."""
    if count is None or count >= len(problems):
        return problems
    chosen = random.Random(seed).sample(range(len(problems)), count)
    return [problems[index] for index in sorted(chosen)]


def make_examples(rollouts: Iterable[Rollout], style: PromptStyle) -> list[Example]:
    """Examples to imitate: each problem in `style`, whatever prompt its completion came from.

    With a style that gives no hint, a rationalized completion is learned as if the model had found
    it unaided (Section 3.2 of Zelikman et al. 2022, arXiv:2203.14465).
    """
    return [example(style, rollout.problem, rollout.completion) for rollout in rollouts]


def example(style: PromptStyle, problem: Problem, completion: str) -> Example:
    """A problem in a style and the completion to imitate, both as text or both as messages."""
    prompt = style(problem)
    if isinstance(prompt, str):
        return Example(prompt, completion)
    return Example(prompt, [{"role": "assistant", "content": completion}])


def why_dropped(rollouts: Iterable[Rollout]) -> dict[str, int]:
    """How many rollouts were not right, by outcome."""
    return dict(Counter(str(rollout.outcome) for rollout in rollouts if not rollout.correct))

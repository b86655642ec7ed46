"""Selection of rollouts, and training examples and preference pairs made from them.

Functions named `keep_...` are filters; functions named `make_...` build training data.
"""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from selftaught.prompts import PromptStyle
from selftaught.records import Example, Preference, Problem, Rollout
from selftaught.rollouts.equations import SPAN, equations, wrong_equations

DistinctBy = Literal["text", "equations", "numbers", "edits"]

_NUMBER = re.compile(r"[0-9]++(?:[.,][0-9]++)*+")
_TEXT_OF: Callable[[str], object] = lambda text: " ".join(text.split())  # noqa: E731
_NUMBERS_OF: Callable[[str], object] = lambda text: tuple(_NUMBER.findall(text))  # noqa: E731


class NothingToLearn(Exception):
    """There is no training example; the message gives the counts and what to try."""


def keep_correct(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return the rollouts with a correct answer.

    Raises:
        ValueError: a rollout is not graded.
    """
    kept: list[Rollout] = []
    for rollout in rollouts:
        if rollout.correct is None:
            raise ValueError(
                f"Expected graded rollouts, but a rollout of problem {rollout.problem.id!r} has no "
                "outcome; call grade(rollouts, task) first."
            )
        if rollout.correct:
            kept.append(rollout)
    return kept


def keep_sound(rollouts: Iterable[Rollout]) -> list[Rollout]:
    """Return the rollouts without a wrong equation (Yuan et al. 2023, arXiv:2308.01825)."""
    return [rollout for rollout in rollouts if not wrong_equations(rollout.completion)]


def keep_distinct(
    rollouts: Iterable[Rollout], by: DistinctBy = "text", *, edits: float = 0.2
) -> list[Rollout]:
    """Remove duplicates among the rollouts of each problem.

    Args:
        rollouts: rollouts of one or more problems.
        by: criterion by which rollouts of a problem are duplicates:

            - "text": the same text, apart from white space. The first is kept.
            - "equations": the same ordered list of equations (solution path). The one with the
              largest sum of Levenshtein distances to the problem's other paths is kept (Algorithm 1
              of Yuan et al. 2023, arXiv:2308.01825). All rationales without an equation have the
              same, empty path.
            - "numbers": the same numbers in the same order, with any text between. The first is
              kept.
            - "edits": a normalized edit distance of at most `edits`. The first is kept.
        edits: largest edit distance of duplicates, as a share of the longer text's characters.

    Returns:
        The kept rollouts, grouped by problem. Problems, and the duplicates within each, are in the
        order of their first rollout.
    """
    by_problem: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        by_problem.setdefault(rollout.problem.id, []).append(rollout)
    kept: list[Rollout] = []
    for same in by_problem.values():
        match by:
            case "equations":
                kept += _most_distant(same)
            case "edits":
                kept += _unlike(same, edits)
            case _:
                key = _NUMBERS_OF if by == "numbers" else _TEXT_OF
                first: dict[object, Rollout] = {}
                for rollout in same:
                    first.setdefault(key(rollout.completion), rollout)
                kept += first.values()
    return kept


def solution_path(completion: str) -> tuple[str, ...]:
    """Return the equations of a rationale in order, without white space: its solution path in RFT.

    If there are calculator spans, they are the path, including spans that are not arithmetic.
    """
    if spans := SPAN.findall(completion):
        return tuple("".join(span.split()) for span in spans)
    return tuple(f"{one.left}={one.right}".replace(" ", "") for one in equations(completion))


def _most_distant(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Return one of a problem's rollouts per list of equations (arXiv:2308.01825, Algorithm 1)."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    index_of: dict[tuple[str, ...], int] = {}
    kept: list[Rollout] = []
    texts: list[str] = []
    sums: list[int] = []
    """For each kept text, the sum of its distances to the other kept texts."""
    paths: dict[str, tuple[str, ...]] = {}
    for rollout in rollouts:
        text = rollout.completion
        if text not in paths:
            paths[text] = solution_path(text)
        at = index_of.setdefault(paths[text], len(kept))
        if at < len(kept) and texts[at] == text:
            continue
        far: list[int] = []
        if texts:
            far = cdist([text], texts, scorer=Levenshtein.distance)[0].tolist()
        if at == len(kept):
            sums = [total + one for total, one in zip(sums, far, strict=True)]
            kept.append(rollout)
            texts.append(text)
            sums.append(sum(far))
        elif sum(far) - far[at] > sums[at]:
            was: list[int] = cdist([texts[at]], texts, scorer=Levenshtein.distance)[0].tolist()
            sums = [total + new - old for total, new, old in zip(sums, far, was, strict=True)]
            kept[at], texts[at], sums[at] = rollout, text, sum(far) - far[at]
    return kept


def _unlike(rollouts: Sequence[Rollout], edits: float) -> list[Rollout]:
    """Return the rollouts with an edit distance above `edits` to all rollouts kept before."""
    from rapidfuzz.distance import Levenshtein

    kept: list[Rollout] = []
    for rollout in rollouts:
        text = rollout.completion
        if all(Levenshtein.normalized_distance(text, one.completion) > edits for one in kept):
            kept.append(rollout)
    return kept


def most_distant(rollouts: Sequence[Rollout], other: Rollout) -> Rollout:
    """Return the rollout with the largest Levenshtein distance to the completion of `other`."""
    from rapidfuzz.distance import Levenshtein

    return max(rollouts, key=lambda one: Levenshtein.distance(one.completion, other.completion))


def keep_at_most(rollouts: Iterable[Rollout], k: int) -> list[Rollout]:
    """Return the first k rollouts of each problem."""
    return list(iter_at_most(rollouts, k))


def iter_at_most(rollouts: Iterable[Rollout], k: int) -> Iterator[Rollout]:
    """Yield the first k rollouts of each problem."""
    seen: Counter[str] = Counter()
    for rollout in rollouts:
        seen[rollout.problem.id] += 1
        if seen[rollout.problem.id] <= k:
            yield rollout


def unsolved(problems: Iterable[Problem], rollouts: Iterable[Rollout]) -> list[Problem]:
    """Return the problems without a correct rollout."""
    solved = {rollout.problem.id for rollout in keep_correct(rollouts)}
    return [problem for problem in problems if problem.id not in solved]


def share_of(problems: Sequence[Problem], share: float, seed: int) -> list[Problem]:
    """Return each problem with probability `share`, reproducibly by its id and the seed."""

    def draw(problem: Problem) -> float:
        digest = hashlib.sha256(f"{seed} {problem.id}".encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return [problem for problem in problems if draw(problem) < share]


def draw_problems(problems: Sequence[Problem], count: int | None, seed: str) -> Sequence[Problem]:
    """Draw `count` problems without replacement, in their original order.

    Returns all problems if `count` is None or not below their number.
    """
    if count is None or count >= len(problems):
        return problems
    chosen = random.Random(seed).sample(range(len(problems)), count)
    return [problems[index] for index in sorted(chosen)]


def draw_as_many(
    rollouts: Iterable[Rollout], others: Iterable[Rollout], seed: int
) -> list[Rollout]:
    """Draw, for each problem, as many of its `rollouts` as it has among `others`, at random."""
    wanted = Counter(one.problem.id for one in others)
    by_problem: dict[str, list[Rollout]] = {}
    for one in rollouts:
        by_problem.setdefault(one.problem.id, []).append(one)
    drawn: list[Rollout] = []
    for name, same in by_problem.items():
        count = min(wanted[name], len(same))
        chosen = random.Random(f"{seed} {name}").sample(range(len(same)), count)
        drawn += [same[index] for index in sorted(chosen)]
    return drawn


def make_examples(rollouts: Iterable[Rollout], style: PromptStyle) -> list[Example]:
    """Make training examples from rollouts, with prompts in `style`, not those that were sampled.

    With a style without a hint, a rationalized completion is learned as if the model had found it
    without the hint (Section 3.2 of Zelikman et al. 2022, arXiv:2203.14465). An example has the
    sampled token ids, unless its completion was cut by length.
    """
    return [example_of(style, rollout) for rollout in rollouts]


def example_of(style: PromptStyle, rollout: Rollout) -> Example:
    """Return a rollout as an example; see `make_examples`."""
    ids = rollout.token_ids if rollout.finish_reason == "stop" else None
    return example(style, rollout.problem, rollout.completion, ids)


def example(
    style: PromptStyle,
    problem: Problem,
    completion: str,
    completion_ids: tuple[int, ...] | None = None,
) -> Example:
    """Return a training example: prompt and completion, both as text or both as messages.

    Args:
        style: style of the prompt.
        problem: the problem.
        completion: text of the completion.
        completion_ids: token ids of the completion as they were sampled, including the end token.
    """
    prompt = style(problem)
    if isinstance(prompt, str):
        return Example(prompt, completion, completion_ids)
    answer = [{"role": "assistant", "content": completion}]
    return Example(prompt, answer, completion_ids, style.chat_template_kwargs or None)


def gold_rollouts(problems: Iterable[Problem], style: PromptStyle) -> list[Rollout]:
    """Return the gold rationales as correct rollouts; problems without one are skipped."""
    return [
        Rollout(
            problem, style(problem), style.completion(problem.rationale), "stop", "gold", 0, "gold",
            answer=problem.gold, outcome="right", decided_by="gold",
        )
        for problem in problems
        if problem.rationale is not None
    ]  # fmt: skip


def make_preferences(
    rollouts: Iterable[Rollout],
    style: PromptStyle,
    ids: Callable[[Rollout], tuple[int, ...]],
    *,
    at_most: int | None = None,
    seed: int = 0,
) -> list[Preference]:
    """Pair every correct rollout of a problem with every wrong one (V-STaR, arXiv:2402.06457,
    Section 3).

    A problem whose rollouts are all correct or all wrong gives no pair.

    Args:
        rollouts: graded rollouts.
        style: style of the prompts.
        ids: returns the token ids of a rollout's completion, including the end token.
        at_most: maximum number of pairs per problem, drawn at random. None means all.
        seed: random seed for drawing the pairs.

    Raises:
        ValueError: a rollout is not graded.
    """
    by_problem: dict[str, tuple[list[Rollout], list[Rollout]]] = {}
    for rollout in rollouts:
        (right, wrong) = by_problem.setdefault(rollout.problem.id, ([], []))
        (right if keep_correct([rollout]) else wrong).append(rollout)
    pairs: list[Preference] = []
    for name, (right, wrong) in by_problem.items():
        count = len(right) * len(wrong)
        numbers: Sequence[int] = range(count)
        if at_most is not None and count > at_most:
            numbers = sorted(random.Random(f"{seed} {name}").sample(numbers, at_most))
        for number in numbers:
            better, worse = right[number // len(wrong)], wrong[number % len(wrong)]
            pairs.append(preference(style, better, worse, ids))
    return pairs


def preference(
    style: PromptStyle,
    better: Rollout,
    worse: Rollout,
    ids: Callable[[Rollout], tuple[int, ...]],
) -> Preference:
    """Return a preference pair of two whole completions of the same problem.

    Args:
        style: style of the prompt.
        better, worse: the chosen and the rejected rollout.
        ids: returns the token ids of a rollout's completion, including the end token.
    """
    return Preference(
        style(better.problem), better.completion, worse.completion,
        chosen_ids=ids(better), rejected_ids=ids(worse),
        chat_template_kwargs=style.chat_template_kwargs or None,
    )  # fmt: skip


def why_dropped(rollouts: Iterable[Rollout]) -> dict[str, int]:
    """Return the numbers of rollouts that are not correct, by outcome."""
    return dict(Counter(str(rollout.outcome) for rollout in rollouts if not rollout.correct))

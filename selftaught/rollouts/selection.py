"""Which rollouts to learn from, and in what form. Filters say what stays; builders what comes out."""

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


def keep_distinct(
    rollouts: Iterable[Rollout], by: DistinctBy = "text", *, edits: float = 0.2
) -> list[Rollout]:
    """One of each problem's rollouts that go the same way; what that means, `by` says.

    - "text": the same text, white space aside; the first is kept.
    - "equations": the same ordered list of equations; of those the one that lies further from the
      problem's other ways, in sums of Levenshtein distances, is kept (Algorithm 1 of Yuan et al. 2023,
      arXiv:2308.01825). A rationale without an equation is of the empty list's class.
    - "numbers": the same numbers in the same order, whatever stands between them; the first is kept.
    - "edits": at most this share of the longer text's characters differs; the first is kept.

    They come in the order of `rollouts`, problem by problem; a way keeps the place of its first.
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
    """The equations of a rationale in their order, each without white space: its class in RFT.

    Where there are calculator spans they are the class, also those that are no arithmetic.
    """
    if spans := SPAN.findall(completion):
        return tuple("".join(span.split()) for span in spans)
    return tuple(f"{one.left}={one.right}".replace(" ", "") for one in equations(completion))


def _most_distant(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """One rollout for each list of equations: Algorithm 1 of arXiv:2308.01825, on one problem."""
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    place: dict[tuple[str, ...], int] = {}
    kept: list[Rollout] = []
    texts: list[str] = []
    sums: list[int] = []
    """Of each kept text's distances to the other kept ones."""
    classes: dict[str, tuple[str, ...]] = {}
    for rollout in rollouts:
        text = rollout.completion
        if text not in classes:
            classes[text] = solution_path(text)
        at = place.setdefault(classes[text], len(kept))
        if at < len(kept) and texts[at] == text:
            continue
        far = cdist([text], texts, scorer=Levenshtein.distance)[0].tolist() if texts else []
        if at == len(kept):
            sums = [total + one for total, one in zip(sums, far, strict=True)]
            kept.append(rollout)
            texts.append(text)
            sums.append(sum(far))
        elif sum(far) - far[at] > sums[at]:
            was = cdist([texts[at]], texts, scorer=Levenshtein.distance)[0].tolist()
            sums = [total + new - old for total, new, old in zip(sums, far, was, strict=True)]
            kept[at], texts[at], sums[at] = rollout, text, sum(far) - far[at]
    return kept


def _unlike(rollouts: Sequence[Rollout], edits: float) -> list[Rollout]:
    """The rollouts that differ from every one kept before in more than a share of their characters."""
    from rapidfuzz.distance import Levenshtein

    kept: list[Rollout] = []
    for rollout in rollouts:
        text = rollout.completion
        if all(Levenshtein.normalized_distance(text, one.completion) > edits for one in kept):
            kept.append(rollout)
    return kept


def most_distant(rollouts: Sequence[Rollout], other: Rollout) -> Rollout:
    """The rollout whose completion is the largest Levenshtein distance from another's."""
    from rapidfuzz.distance import Levenshtein

    return max(rollouts, key=lambda one: Levenshtein.distance(one.completion, other.completion))


def keep_at_most(rollouts: Iterable[Rollout], k: int) -> list[Rollout]:
    """The first k rollouts of each problem."""
    return list(iter_at_most(rollouts, k))


def iter_at_most(rollouts: Iterable[Rollout], k: int) -> Iterator[Rollout]:
    """`keep_at_most`, one at a time."""
    seen: Counter[str] = Counter()
    for rollout in rollouts:
        seen[rollout.problem.id] += 1
        if seen[rollout.problem.id] <= k:
            yield rollout


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


def draw_as_many(
    rollouts: Iterable[Rollout], others: Iterable[Rollout], seed: int
) -> list[Rollout]:
    """Of each problem's rollouts as many as it has among `others`, drawn at random by the seed."""
    wanted = Counter(one.problem.id for one in others)
    by_problem: dict[str, list[Rollout]] = {}
    for one in rollouts:
        by_problem.setdefault(one.problem.id, []).append(one)
    drawn = []
    for name, same in by_problem.items():
        count = min(wanted[name], len(same))
        chosen = random.Random(f"{seed} {name}").sample(range(len(same)), count)
        drawn += [same[index] for index in sorted(chosen)]
    return drawn


def make_examples(rollouts: Iterable[Rollout], style: PromptStyle) -> list[Example]:
    """Examples to imitate: each problem in `style`, whatever prompt its completion came from.

    With a style that gives no hint, a rationalized completion is learned as if the model had found
    it unaided (Section 3.2 of Zelikman et al. 2022, arXiv:2203.14465). The tokens that were sampled go
    with the example, unless the completion was cut by length.
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
    """A problem in a style and the completion to imitate, both as text or both as messages.

    Args:
        completion_ids: the tokens of the completion as they were sampled, with what ended them.
    """
    prompt = style(problem)
    if isinstance(prompt, str):
        return Example(prompt, completion, completion_ids)
    answer = [{"role": "assistant", "content": completion}]
    return Example(prompt, answer, completion_ids, style.chat_template_kwargs or None)


def gold_rollouts(problems: Iterable[Problem], style: PromptStyle) -> list[Rollout]:
    """The problems' own rationales, as right rollouts; problems without one are passed over."""
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
    """Every right rollout of a problem over every wrong one (V-STaR, arXiv:2402.06457, Section 3).

    A problem whose rollouts are all right or all wrong gives none.

    Args:
        ids: the tokens of a rollout's completion, its ending included.
        at_most: of each problem's pairs so many are drawn, by the seed and the problem's id.

    Raises:
        ValueError: a rollout has not been graded.
    """
    by_problem: dict[str, tuple[list[Rollout], list[Rollout]]] = {}
    for rollout in rollouts:
        (right, wrong) = by_problem.setdefault(rollout.problem.id, ([], []))
        (right if keep_correct([rollout]) else wrong).append(rollout)
    pairs = []
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
    """One whole completion over another of the same problem, by their tokens."""
    return Preference(
        style(better.problem), better.completion, worse.completion,
        chosen_ids=ids(better), rejected_ids=ids(worse),
        chat_template_kwargs=style.chat_template_kwargs or None,
    )  # fmt: skip


def why_dropped(rollouts: Iterable[Rollout]) -> dict[str, int]:
    """How many rollouts were not right, by outcome."""
    return dict(Counter(str(rollout.outcome) for rollout in rollouts if not rollout.correct))

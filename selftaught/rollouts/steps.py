"""Values of a completion's steps, and preference pairs made from them.

In Setlur et al. 2024 (arXiv:2406.14532), the value of the prefix after a step is the probability
that a continuation of it is correct. The first pit is the step of a wrong completion at which that
probability is lost; the model learns to prefer something else to it. This module does not sample,
grade or train. Prefixes are slices of the sampled token ids and are never tokenized again.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from selftaught.metrics import pass_at_k
from selftaught.records import Preference, Rollout, Text, rollout_from
from selftaught.rollouts.step_ends import Decode, SplitBy, split_steps, text_after

__all__ = [
    "SAME",
    "Chosen",
    "Decode",
    "PairForm",
    "PitRule",
    "SplitBy",
    "ValuedRollout",
    "advantages",
    "first_pit",
    "prefix_pair",
    "split_steps",
    "step_pair",
    "step_preferences",
    "step_value",
    "text_after",
    "truncated_pair",
]

PitRule = Literal["lowest_value", "lowest_advantage", "first_zero"]
PairForm = Literal["prefix", "step", "truncated"]

SAME = 1e-9
"""Tolerance for equal values, which are quotients of counts."""


# Values of steps


def step_value(right: int, n: int, k: int) -> float:
    """Return the value of a prefix under a best-of-k policy.

    It is the probability that one of k continuations is correct: 1 - C(n - right, k) / C(n, k), the
    unbiased estimate of 1 - (1 - q)^k, where q is the probability that one continuation is correct.
    Setlur et al. 2024 use best-of-5. With n = k the value is 0 or 1; a larger n gives a finer
    value. With k = 1 it is the share of correct continuations.

    Args:
        right: number of correct continuations.
        n: number of continuations.
        k: number of continuations of the policy.

    Raises:
        ValueError: not 0 <= right <= n, or not 1 <= k <= n.
    """
    return pass_at_k(n, right, k)


def advantages(values: Sequence[float]) -> list[float]:
    """Return the advantage of each step: A_i = Q_i - Q_(i-1) (Setlur et al. 2024, Eq. 3).

    Args:
        values: the value before the first step, then the value after each step.

    Raises:
        ValueError: `values` is empty.
    """
    if not values:
        raise ValueError("values must contain the value before the first step; got no values.")
    return [after - before for before, after in pairwise(values)]


def first_pit(values: Sequence[float], rule: PitRule) -> int | None:
    """Return the index of the first pit, the step at which a completion goes wrong; None if there
    is none.

    The value after the last step of a wrong completion is 0. So for wrong completions
    "lowest_value" and "first_zero" agree, unless the value before the first step is already 0: then
    only "first_zero" returns a step. "lowest_advantage" differs if the value drops several times:
    for 0.9, 0.3, 0.2, 0 it returns the first step, which has the largest drop, and the others
    return the last step. If all values are 0 or 1, all three agree on a completion that starts at 1
    and drops once.

    Args:
        values: the value before the first step, then the value after each step.
        rule: definition of the first pit:

            - "lowest_value": the first step with the lowest value (Setlur et al. 2024, Section
              6.1); None if that is not below the value before the first step.
            - "first_zero": the first step with value 0 (the "first pit" of Self-Explore,
              arXiv:2404.10346).
            - "lowest_advantage": the first step with the lowest advantage (as Setlur et al.
              describe it in arXiv:2410.08146); None if no advantage is below 0.

    Returns:
        The index of the step, counted from 0.

    Raises:
        ValueError: the rule is unknown, or `values` is empty.
    """
    if rule not in get_args(PitRule):
        raise ValueError(f"rule must be one of {', '.join(get_args(PitRule))}; got {rule!r}.")
    gained = advantages(values)
    if rule == "first_zero":
        return _first_at_most(values[1:], SAME)
    measure, bound = (gained, 0.0) if rule == "lowest_advantage" else (values[1:], values[0])
    lowest = min(measure, default=bound)
    return _first_at_most(measure, lowest + SAME) if lowest < bound - SAME else None


def _first_at_most(values: Sequence[float], bound: float) -> int | None:
    return next((index for index, value in enumerate(values) if value <= bound), None)


@dataclass(frozen=True)
class ValuedRollout:
    """A completion split into steps, with the value of every prefix."""

    rollout: Rollout
    """The completion, with token ids."""
    ends: tuple[int, ...]
    """Ends of the steps in tokens; see `split_steps`."""
    values: tuple[float, ...]
    """The value before the first step, then the value after each step."""
    counts: tuple[tuple[int, int], ...]
    """(correct, n) of the continuations sampled from each prefix; n = 0 if none was needed."""

    def __post_init__(self) -> None:
        ids, steps = self.rollout.token_ids, len(self.ends)
        if ids is None:
            raise ValueError(
                "Expected a rollout with token ids, but that of problem "
                f"{self.rollout.problem.id!r} has none; prefixes are slices of the sampled token "
                "ids."
            )
        if any(a >= b for a, b in pairwise((0, *self.ends))) or (self.ends or (0,))[-1] != len(ids):
            raise ValueError(
                f"ends must increase and end with {len(ids)}, the number of tokens; got "
                f"{self.ends}."
            )
        if not len(self.values) == len(self.counts) == steps + 1:
            raise ValueError(
                f"Expected {steps + 1} values and counts for {steps} steps; got {len(self.values)} "
                f"values and {len(self.counts)} counts."
            )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Token ids of the completion."""
        return self.rollout.token_ids or ()

    @property
    def advantages(self) -> list[float]:
        """Advantage of each step; see `advantages`."""
        return advantages(self.values)

    def prefix(self, steps: int) -> tuple[int, ...]:
        """Return the token ids of the first `steps` steps."""
        return self.token_ids[: self.ends[steps - 1] if steps else 0]

    def step(self, index: int) -> tuple[int, ...]:
        """Return the token ids of a step, counted from 0."""
        return self.prefix(index + 1)[len(self.prefix(index)) :]

    def pit(self, rule: PitRule) -> int | None:
        """Return the index of the first pit, or None; see `first_pit`."""
        return first_pit(self.values, rule)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` is the inverse."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """Return the valued rollout that `to_dict` converted to `row`."""
        counts = tuple((right, n) for right, n in row["counts"])
        return cls(rollout_from(row["rollout"]), tuple(row["ends"]), tuple(row["values"]), counts)


# Preference pairs


@dataclass(frozen=True)
class Chosen:
    """A correct completion or continuation, for the chosen side of a pair."""

    token_ids: tuple[int, ...]
    """Token ids as they were sampled."""
    ends: tuple[int, ...]
    """Ends of the steps in tokens; see `split_steps`."""


def prefix_pair(
    valued: ValuedRollout, pit: int, chosen: Chosen, *, decode: Decode, end: int
) -> Preference | None:
    """Return the pair of a whole correct completion and the wrong one up to and including its pit.

    (x, y, y^_1:c) of Setlur et al. 2024, Section 6.1. The sides share no prefix. The chosen side
    ends with the end token; the rejected side ends with the pit, and has an end token only if the
    pit is its last step.

    Args:
        valued: the wrong completion.
        pit: index of its first pit.
        chosen: a whole correct completion of the same problem.
        decode: decodes token ids.
        end: id of the end token.

    Returns:
        The pair; None if both sides are equal or one is empty.
    """
    ids = _ended(chosen.token_ids, end)
    return _preference(valued.rollout.prompt, (), ids, valued.prefix(pit + 1), decode)


def step_pair(
    valued: ValuedRollout, pit: int, chosen: Chosen, *, decode: Decode
) -> Preference | None:
    """Return the pair of a step that leads to a correct answer and the pit, after the same prefix.

    Theorem 6.1 of Setlur et al. 2024 assumes a shared prefix. Self-Explore (arXiv:2404.10346) makes
    such pairs with the whole continuation as the chosen side. Here each side is one step as it was
    sampled: only the last step of a completion has an end token.

    Args:
        valued: the wrong completion.
        pit: index of its first pit.
        chosen: a correct continuation of the steps before the pit, WITHOUT those steps. Only its
            first step is used.
        decode: decodes token ids.

    Returns:
        The pair; None if both sides are equal or one is empty.
    """
    step = chosen.token_ids[: chosen.ends[0]] if chosen.ends else ()
    prefix = valued.prefix(pit)
    return _preference(valued.rollout.prompt, prefix, step, valued.step(pit), decode)


def truncated_pair(
    valued: ValuedRollout,
    pit: int,
    chosen: Chosen,
    *,
    decode: Decode,
    end: int,
    kept: int | None = None,
) -> Preference | None:
    """Return the pair of the first steps of a correct completion and the wrong one up to its pit.

    Both sides are truncated and share no prefix, so that neither is preferred for being complete.
    The chosen side has an end token only if all of its steps are kept.

    Args:
        valued: the wrong completion.
        pit: index of its first pit, which is included.
        chosen: a whole correct completion of the same problem.
        decode: decodes token ids.
        end: id of the end token.
        kept: number of steps of the chosen completion to keep. None means as many as the rejected
            side has.

    Returns:
        The pair; None if both sides are equal or one is empty.

    Raises:
        ValueError: `kept` is below 1.
    """
    kept = pit + 1 if kept is None else kept
    if kept < 1:
        raise ValueError(f"kept must be at least 1 step of the chosen completion; got {kept}.")
    whole = kept >= len(chosen.ends)
    ids = _ended(chosen.token_ids, end) if whole else chosen.token_ids[: chosen.ends[kept - 1]]
    return _preference(valued.rollout.prompt, (), ids, valued.prefix(pit + 1), decode)


def step_preferences(
    valued: ValuedRollout,
    *,
    rule: PitRule,
    form: PairForm,
    chosen: Iterable[Chosen],
    decode: Decode,
    end: int,
    kept: int | None = None,
) -> list[Preference]:
    """Return one preference pair per chosen completion; none if the wrong completion has no pit.

    Args:
        valued: the wrong completion.
        rule: definition of the first pit; see `first_pit`.
        form: "prefix", "step" or "truncated"; see `prefix_pair`, `step_pair` and `truncated_pair`.
        chosen: for "step", correct continuations of `valued.prefix(valued.pit(rule))`, without that
            prefix; for the other forms, whole correct completions.
        decode: decodes token ids.
        end: id of the end token.
        kept: for "truncated" only: number of steps of the chosen completion to keep.

    Raises:
        ValueError: the rule or the form is unknown.
    """
    if form not in get_args(PairForm):
        raise ValueError(f"form must be one of {', '.join(get_args(PairForm))}; got {form!r}.")
    pit = valued.pit(rule)
    if pit is None:
        return []

    def paired(one: Chosen) -> Preference | None:
        if form == "step":
            return step_pair(valued, pit, one, decode=decode)
        if form == "prefix":
            return prefix_pair(valued, pit, one, decode=decode, end=end)
        return truncated_pair(valued, pit, one, decode=decode, end=end, kept=kept)

    return [pair for pair in map(paired, chosen) if pair is not None]


def _ended(token_ids: Sequence[int], end: int) -> tuple[int, ...]:
    """Return the token ids with `end` as the last one, added if it is missing."""
    whole = tuple(token_ids)
    return whole if whole[-1:] == (end,) else (*whole, end)


def _preference(
    prompt: Text,
    prefix: tuple[int, ...],
    chosen: tuple[int, ...],
    rejected: tuple[int, ...],
    decode: Decode,
) -> Preference | None:
    """Return the preference pair with token ids; None if both sides are equal or one is empty."""
    if chosen == rejected or not chosen or not rejected:
        return None
    better, worse = (
        _as_prompt(prompt, text_after(decode, prefix, ids)) for ids in (chosen, rejected)
    )
    return Preference(prompt, better, worse, prefix, chosen, rejected)


def _as_prompt(prompt: Text, text: str) -> Text:
    """Return a text in the form of its prompt: plain text, or an assistant message."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

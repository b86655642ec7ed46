"""Step explorer page: completions in steps, colored by advantage, with continuations of each step.

The page uses `<details>` elements and no script. Model text is escaped, its control characters are
replaced and its length is limited, as on the other pages (`pages.py`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from selftaught.records import Rollout, write_atomically
from selftaught.reports.pages import rendered, shortened
from selftaught.rollouts.steps import SAME, Decode, PitRule, ValuedRollout, text_after

Continuations = Mapping[tuple[str, int, int], Sequence[Rollout]]
"""(problem id, rollout index, number of steps in the prefix) -> continuations sampled after the
prefix. A rollout whose tokens start with those of the prefix is a whole completion; otherwise it
contains only the continuation."""

PROBLEMS_SHOWN, STEPS_SHOWN, DRAWN_SHOWN = 10, 20, 5
"""Maximum numbers of problems, of steps per problem, and of continuations per step."""
QUESTION_SHOWN, STEP_SHOWN, CONTINUATION_SHOWN = 900, 700, 500
"""Maximum number of characters that are shown of a text."""

FULL = 0.5
"""Absolute advantage that is shown with the full color."""

CONTEXT = 32
"""Number of tokens that are decoded before a step, so that a leading space of the step is kept."""

RULES: dict[PitRule, str] = {
    "lowest_value": "the first step with the lowest value, if that is below the value at the start",
    "lowest_advantage": "the first step with the lowest advantage, if that is below 0",
    "first_zero": "the first step with value 0",
}


@dataclass(frozen=True)
class Drawn:
    """One continuation: its outcome, answer and text."""

    outcome: str
    answer: str | None
    text: str


@dataclass(frozen=True)
class Step:
    """One row of a completion."""

    number: int
    """Number of the step, from 1. 0 is the state before any step, without text and advantage."""
    text: str
    value: float
    """Estimated value after the step."""
    gain: float | None
    """Advantage of the step."""
    right: int
    """Number of correct continuations after the step."""
    n: int
    """Number of continuations sampled after the step."""
    pit: bool
    """Whether the step is the first pit."""
    drawn: list[Drawn]
    """The continuations shown, at most `DRAWN_SHOWN`: correct and other ones."""

    @property
    def signed(self) -> str:
        """Advantage with its sign. Zero has no sign."""
        return signed(self.gain or 0.0)

    @property
    def kind(self) -> str:
        """Sign of the rounded advantage: "gain", "loss" or "even"."""
        return {"+": "gain", "\N{MINUS SIGN}": "loss"}.get(self.signed[0], "even")

    @property
    def shade(self) -> float:
        """Color intensity, from 0 to 1."""
        return round(min(1.0, abs(self.gain or 0.0) / FULL), 3)

    @property
    def low(self) -> float:
        """The lower of the values before and after the step."""
        return round(min(self.value, self.value - (self.gain or 0.0)), 4)

    @property
    def high(self) -> float:
        """The higher of the values before and after the step."""
        return round(max(self.value, self.value - (self.gain or 0.0)), 4)

    @property
    def counted(self) -> str:
        """Counts from which the value is estimated."""
        return f"{self.right:,} of {self.n:,} right" if self.n else "known"


@dataclass(frozen=True)
class Worked:
    """A problem with one completion in steps."""

    rollout: Rollout
    start: Step
    steps: list[Step]
    """The steps shown: all, or a window that contains the pit."""
    before: int
    """Number of steps before the window."""
    after: int
    """Number of steps after the window."""
    pit: int | None
    """Number of the first pit, from 1. None means no pit."""

    @property
    def count(self) -> int:
        """Number of steps of the completion."""
        return self.before + len(self.steps) + self.after

    @property
    def description(self) -> str:
        """Number of steps and the first pit, as text and for screen readers."""
        steps = f"{self.count} step{'s' * (self.count != 1)}"
        return (
            f"{steps}, no pit" if self.pit is None else f"{steps}, the first pit at step {self.pit}"
        )


@dataclass(frozen=True)
class Totals:
    """Counts over all rollouts, shown or not."""

    rollouts: int
    outcomes: dict[str, int]
    pits: int
    """Number of completions with a pit."""
    pit_at: float
    """Mean number of the first pit, from 1, over completions with a pit."""
    pit_of: float
    """Mean number of steps of the completions with a pit."""
    steps: int
    losing: int
    """Number of steps with an advantage below 0."""


def write_step_page(
    valued: Sequence[ValuedRollout],
    decode: Decode,
    continuations: Continuations,
    path: Path,
    *,
    title: str,
    rule: PitRule,
    k: int,
) -> Path:
    """Write the step explorer, one HTML file without external resources.

    It shows one rollout of each of at most ten problems. Problems with a pit come first, evenly
    spaced over those given. The counts at the top of the page are over all rollouts.

    Args:
        valued: rollouts with the values of their steps.
        decode: converts token ids to text.
        continuations: continuations sampled after each prefix. Keys may be missing.
        path: HTML file to write.
        title: title of the page.
        rule: definition of the first pit.
        k: the values are those of best-of-k.

    Returns:
        `path`.
    """
    problems = [worked(one, decode, continuations, rule) for one in chosen_rollouts(valued, rule)]
    page = rendered(
        "steps.html.j2",
        title=title,
        problems=problems,
        totals=totals(valued, rule),
        rule=RULES[rule],
        k=k,
        full=FULL,
        question_shown=QUESTION_SHOWN,
        step_shown=STEP_SHOWN,
    )
    write_atomically(path, page)
    return path


def chosen_rollouts(valued: Sequence[ValuedRollout], rule: PitRule) -> list[ValuedRollout]:
    """Select at most ten rollouts of different problems, evenly spaced, those with a pit first.

    Of each problem, it is the first rollout with a pit, or else the first rollout.
    """
    first: dict[str, ValuedRollout] = {}
    pitted: dict[str, ValuedRollout] = {}
    for one in valued:
        first.setdefault(one.rollout.problem.id, one)
        if one.pit(rule) is not None:
            pitted.setdefault(one.rollout.problem.id, one)
    others = [one for name, one in first.items() if name not in pitted]
    chosen = _spread(list(pitted.values()), PROBLEMS_SHOWN)
    return [*chosen, *_spread(others, PROBLEMS_SHOWN - len(chosen))]


def totals(valued: Sequence[ValuedRollout], rule: PitRule) -> Totals:
    """Return the counts at the top of the page."""
    pits = [(pit + 1, len(one.ends)) for one in valued if (pit := one.pit(rule)) is not None]
    gains = [gain for one in valued for gain in one.advantages]
    return Totals(
        rollouts=len(valued),
        outcomes=dict(Counter(one.rollout.outcome or "not graded" for one in valued)),
        pits=len(pits),
        pit_at=fmean(at for at, _ in pits) if pits else 0.0,
        pit_of=fmean(of for _, of in pits) if pits else 0.0,
        steps=len(gains),
        losing=sum(gain < -SAME for gain in gains),
    )


def worked(
    one: ValuedRollout, decode: Decode, continuations: Continuations, rule: PitRule
) -> Worked:
    """Return the data of a rollout for the page."""
    pit, count = one.pit(rule), len(one.ends)
    begin = max(0, min((pit or 0) - STEPS_SHOWN // 2, count - STEPS_SHOWN))
    shown = range(begin, min(begin + STEPS_SHOWN, count))
    rows = [
        _row(one, number, pit, decode, continuations) for number in (0, *(i + 1 for i in shown))
    ]
    return Worked(
        one.rollout,
        rows[0],
        rows[1:],
        begin,
        count - shown.stop,
        None if pit is None else pit + 1,
    )


def _row(
    one: ValuedRollout, number: int, pit: int | None, decode: Decode, continuations: Continuations
) -> Step:
    """Return the row of step `number`; 0 is the state before any step."""
    problem, index = one.rollout.problem.id, one.rollout.index
    prefix = one.prefix(number)
    drawn = _mixed(continuations.get((problem, index, number), ()))
    text = ""
    if number:
        before = one.prefix(number - 1)[-CONTEXT:]
        text = text_after(decode, before, one.step(number - 1))
    return Step(
        number,
        shortened(text.rstrip(), STEP_SHOWN),
        one.values[number],
        one.values[number] - one.values[number - 1] if number else None,
        *one.counts[number],
        pit is not None and number == pit + 1,
        [_drawn(rollout, prefix, decode) for rollout in drawn],
    )


def _drawn(rollout: Rollout, prefix: tuple[int, ...], decode: Decode) -> Drawn:
    text, ids = rollout.completion, rollout.token_ids
    if prefix and ids is not None and ids[: len(prefix)] == prefix:
        text = text_after(decode, prefix[-CONTEXT:], ids[len(prefix) :])
    answer = None if rollout.answer is None else shortened(rollout.answer, 80)
    return Drawn(
        rollout.outcome or "not graded", answer, shortened(text.strip("\n"), CONTINUATION_SHOWN)
    )


def _mixed(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Select at most `DRAWN_SHOWN` continuations, correct ones first.

    The share of correct ones is about that of all continuations, with at least one of each kind.
    """
    right = [one for one in rollouts if one.correct]
    others = [one for one in rollouts if not one.correct]
    if not right or not others:
        return [*right, *others][:DRAWN_SHOWN]
    share = round(DRAWN_SHOWN * len(right) / len(rollouts))
    kept = min(len(right), max(1, DRAWN_SHOWN - len(others), min(DRAWN_SHOWN - 1, share)))
    return [*right[:kept], *others[: DRAWN_SHOWN - kept]]


def _spread(items: Sequence[ValuedRollout], limit: int) -> list[ValuedRollout]:
    """Select at most `limit` items, evenly spaced."""
    count = min(limit, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def signed(number: float) -> str:
    """Format a number with two decimals and its sign, such as +0.25. A rounded zero has no sign."""
    shown = f"{abs(number):.2f}"
    if not float(shown):
        return shown
    return ("+" if number > 0 else "\N{MINUS SIGN}") + shown

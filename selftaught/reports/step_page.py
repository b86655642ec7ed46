"""The page of valued steps: completions, coloured by what each step gained, and what followed it.

Native `<details>` and no script. Text of models is escaped, its control characters spelled out and
its length bounded, as on the other pages (`report.py`).
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
"""(problem id, rollout index, number of steps in the prefix) -> what was drawn after it. Each is the
whole completion, its prefix included, where it begins with the prefix's tokens; else it is taken as
the continuation alone."""

PROBLEMS_SHOWN, STEPS_SHOWN, DRAWN_SHOWN = 10, 20, 5
QUESTION_SHOWN, STEP_SHOWN, CONTINUATION_SHOWN = 900, 700, 500
"""Characters shown of a text."""

FULL = 0.5
"""An advantage of this size, up or down, has the full colour."""

CONTEXT = 32
"""Tokens decoded before a step, so that its first space is seen."""

RULES: dict[PitRule, str] = {
    "lowest_value": "the first step with the lowest value, where that is below the value at the start",
    "lowest_advantage": "the first step with the lowest advantage, where that is below 0",
    "first_zero": "the first step with value 0",
}


@dataclass(frozen=True)
class Drawn:
    """One continuation: how it ended and its text."""

    outcome: str
    answer: str | None
    text: str


@dataclass(frozen=True)
class Step:
    """One row of a completion; number 0 stands before any step and has no text and no gain."""

    number: int
    text: str
    value: float
    gain: float | None
    right: int
    n: int
    pit: bool
    drawn: list[Drawn]
    """At most `DRAWN_SHOWN`, right ones and others."""

    @property
    def signed(self) -> str:
        """The advantage with its sign, which zero has not."""
        return signed(self.gain or 0.0)

    @property
    def kind(self) -> str:
        """gain, loss or even, as the number shown says."""
        return {"+": "gain", "\N{MINUS SIGN}": "loss"}.get(self.signed[0], "even")

    @property
    def shade(self) -> float:
        """How much of the full colour."""
        return round(min(1.0, abs(self.gain or 0.0) / FULL), 3)

    @property
    def low(self) -> float:
        """The lower of the values before and after the step."""
        return round(min(self.value, self.value - (self.gain or 0.0)), 4)

    @property
    def high(self) -> float:
        """The higher of them."""
        return round(max(self.value, self.value - (self.gain or 0.0)), 4)

    @property
    def counted(self) -> str:
        """What the value was counted from."""
        return f"{self.right:,} of {self.n:,} right" if self.n else "known"


@dataclass(frozen=True)
class Worked:
    """One problem with one completion in steps."""

    rollout: Rollout
    start: Step
    steps: list[Step]
    """Those shown: all, or a window with the pit in it."""
    before: int
    """How many are left out before them."""
    after: int
    pit: int | None
    """The number of the pit, from 1."""

    @property
    def count(self) -> int:
        """How many steps the completion has."""
        return self.before + len(self.steps) + self.after

    @property
    def told(self) -> str:
        """The completion in one line, for those who do not see its strip."""
        word = f"{self.count} step{'s' * (self.count != 1)}"
        return (
            f"{word}, no pit" if self.pit is None else f"{word}, the first pit at step {self.pit}"
        )


@dataclass(frozen=True)
class Totals:
    """Counts over all rollouts, shown or not."""

    rollouts: int
    outcomes: dict[str, int]
    pits: int
    pit_at: float
    """The mean number of the pit, from 1, over completions that have one."""
    pit_of: float
    """The mean number of steps of those completions."""
    steps: int
    losing: int
    """Steps with an advantage below 0."""


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
    """Write one self-contained page of completions in valued steps; returns its path.

    Shows one rollout of each of at most ten problems, spread over those given, problems with a pit
    first; the counts at its top are over all.

    Args:
        continuations: what was drawn after each prefix; a key may be missing.
        rule: what makes a step the first pit.
        k: values are those of Best-of-k.
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
    """At most ten rollouts of different problems, evenly spread; of a problem the first with a pit."""
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
    """The counts at the top of the page."""
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
    """A valued rollout as the page shows it."""
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
    """The state after `number` steps, and the last of them."""
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
    """A few, right ones first, in about their own proportion, and at least one of each kind."""
    right = [one for one in rollouts if one.correct]
    others = [one for one in rollouts if not one.correct]
    if not right or not others:
        return [*right, *others][:DRAWN_SHOWN]
    share = round(DRAWN_SHOWN * len(right) / len(rollouts))
    kept = min(len(right), max(1, DRAWN_SHOWN - len(others), min(DRAWN_SHOWN - 1, share)))
    return [*right[:kept], *others[: DRAWN_SHOWN - kept]]


def _spread(items: Sequence[ValuedRollout], limit: int) -> list[ValuedRollout]:
    """At most `limit` of the items, evenly spaced."""
    count = min(limit, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def signed(number: float) -> str:
    """A number with two decimals and its sign, such as +0.25; what rounds to zero has none."""
    shown = f"{abs(number):.2f}"
    if not float(shown):
        return shown
    return ("+" if number > 0 else "\N{MINUS SIGN}") + shown

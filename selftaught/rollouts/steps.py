"""Steps of a completion: where each ends, what it is worth, and the preferences that follow.

Setlur et al. 2024 (arXiv:2406.14532) value the prefix after every step by the chance that a
continuation drawn from there is right, find the step of a wrong completion where that chance is
lost, the first pit, and learn to prefer another way. Nothing here draws, grades or trains; prefixes
are slices of the tokens that the model produced and are never tokenized again.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal, Self, get_args

from selftaught.metrics import pass_at_k
from selftaught.records import Preference, Rollout, Text, rollout_from

Decode = Callable[[Sequence[int]], str]
"""From token ids to text, special tokens left out."""

SplitBy = Literal["newline", "sentence", "numbered", "separator"]
PitRule = Literal["lowest_value", "lowest_advantage", "first_zero"]
PairForm = Literal["prefix", "step", "truncated"]

ABBREVIATIONS = frozenset(
    ("mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "jr.", "sr.", "vs.", "cf.", "e.g.", "i.e.",
     "approx.", "resp.", "fig.", "eq.", "eqs.", "sec.")
)  # fmt: skip
"""After these a sentence goes on, in any case of letters."""

SAME = 1e-9
"""Values that differ by less are the same: they are quotients of counts."""

_BYTES = 4
"""Of a character in UTF-8, at most."""

_LINE_END = re.compile(r"\n\s*+")
_BLANK = re.compile(r"\s++")
_NUMBERED = re.compile(
    r"(?:[#*_]{1,6}[ \t]{0,4})?(?:[0-9]{1,3}[.)](?![0-9])|step[ \t]{1,4}[0-9]{1,3}\b)", re.I
)
_LIST_NUMBER = re.compile(r"(?:^|[.!?\n])\s*+[0-9]{1,3}\.$")
_OPENING = "([\"'\u201c\u2018*_"
_CLOSING = ")]\"'\u201d\u2019*_"
_LOOK_BACK = 24
"""Characters before a blank that say whether a sentence ends there; so a search stays linear."""


# Where steps end


def split_steps(
    token_ids: Sequence[int], decode: Decode, by: SplitBy = "newline", separator: str = ";"
) -> list[int]:
    """The ends of the steps, as numbers of tokens: step i is `token_ids[ends[i - 1]:ends[i]]`.

    A step ends with the token that holds the last character of its separator and of the blank space
    after it; where that token reaches into the next step, it still belongs to this one. No step is
    blank: blank text before the first is part of it, and what is blank at the end, such as an end
    token that `decode` leaves out, joins the last. The last end is `len(token_ids)`.

    Args:
        token_ids: what the model produced. Without any, there is no step.
        decode: special tokens left out; a character whose bytes are not all there is U+FFFD.
        by: "newline": after a line. "sentence": after . ! ? (and quotes or brackets that close) with
            white space after, but not after `ABBREVIATIONS` or the number of a list item; so never
            within a decimal number. "numbered": before a line that begins with a number such as
            `1.` or `2)`, or with `Step 3`; Markdown's #, * and _ may stand before it.
            "separator": after the string `separator`, or several in a row.
        separator: for "separator" only.

    Raises:
        ValueError: `by` is none of these, or the separator is empty or has a U+FFFD in it.
    """
    text = decode(token_ids)
    ends: list[int] = []
    first, at = 0, 0  # the token before which the last step begins; the characters of all steps
    for cut in _cuts(text, by, separator):
        end = ends[-1] if ends else 0
        if cut <= at or end == len(token_ids) or (not ends and not text[:cut].strip()):
            continue
        reached, characters = _reaching(token_ids, decode, first, end, cut - at)
        if ends and not text[at:cut].strip():  # the token before has taken the words of this step
            ends[-1] = reached
        else:
            first = end
            ends.append(reached)
        at += characters
    return _closed(ends, len(token_ids), blank=not text[at:].strip())


def _closed(ends: list[int], count: int, *, blank: bool) -> list[int]:
    """The ends with the last at `count`; a blank rest joins the step before it."""
    if ends and (blank or ends[-1] == count):
        return [*ends[:-1], count]
    return [*ends, count] if count else []


def _cuts(text: str, by: SplitBy, separator: str) -> Iterator[int]:
    """The numbers of characters after which steps end, each search in linear time."""
    if by not in get_args(SplitBy):
        raise ValueError(f"expected by to be one of {', '.join(get_args(SplitBy))}; got {by!r}.")
    if by == "separator":
        if not separator or "\ufffd" in separator:
            raise ValueError(
                f"expected a separator of at least one character and without U+FFFD; got {separator!r}."
            )
        found = re.finditer(rf"(?:{re.escape(separator)}\s*+)++", text)
    elif by == "sentence":
        found = (m for m in _BLANK.finditer(text) if _ends_sentence(text, m.start()))
    elif by == "numbered":
        found = (m for m in _LINE_END.finditer(text) if _NUMBERED.match(text, m.end()))
    else:
        found = _LINE_END.finditer(text)
    return (match.end() for match in found)


def _ends_sentence(text: str, blank: int) -> bool:
    """Whether the word before the blank at this place ends a sentence."""
    before = text[max(0, blank - _LOOK_BACK) : blank].rstrip(_CLOSING)
    if not before.endswith((".", "!", "?")):
        return False
    word = before.split()[-1].lstrip(_OPENING).lower()
    return word not in ABBREVIATIONS and not _LIST_NUMBER.search(before)


def _reaching(
    token_ids: Sequence[int], decode: Decode, first: int, end: int, wanted: int
) -> tuple[int, int]:
    """The first number of tokens with at least `wanted` characters after `end`, and how many.

    Decodes from `first` on only: a decoder may treat the beginning of a text in its own way, and so
    both texts, up to `end` and beyond, begin with the step before. Llama 2's takes a line break back
    while the character after it lacks bytes; so what fewer tokens had settled counts too. Doubling,
    then bisection: a text of n tokens costs O(n log n).
    """
    before = _settled(decode(token_ids[first:end]))

    def characters(upto: int) -> int:
        most = 0
        for count in range(upto, max(end, upto - _BYTES), -1):
            text = decode(token_ids[first:count])
            most = max(most, _settled(text) - before)
            if not text.endswith("\ufffd"):
                break
        return most

    low, high = end, min(end + 1, len(token_ids))
    while high < len(token_ids) and characters(high) < wanted:
        low, high = high, min(2 * high - end, len(token_ids))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if characters(middle) >= wanted else (middle, high)
    return high, characters(high)


def _settled(text: str) -> int:
    """How many characters cannot change when more tokens follow; the last may lack bytes."""
    return len(text.rstrip("\ufffd"))


def text_after(decode: Decode, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """The text of `token_ids` as it stands after the tokens `before`, its first space included."""
    prefix, whole = decode(before), decode([*before, *token_ids])
    return whole[len(prefix) :] if whole.startswith(prefix) else decode(token_ids)


# What a step is worth


def step_value(right: int, n: int, k: int) -> float:
    """The value of a prefix from which `right` of `n` continuations were right, under Best-of-k.

    The chance that one of k is right: 1 - C(n - right, k) / C(n, k), the unbiased estimate of
    1 - (1 - q)^k, where q is the chance of one. The policy that continues in Setlur et al. 2024 is
    Best-of-5; n = k draws give 0 or 1, more give a finer number. k = 1 is the share that was right.

    Raises:
        ValueError: not 0 <= right <= n, or not 1 <= k <= n.
    """
    return pass_at_k(n, right, k)


def advantages(values: Sequence[float]) -> list[float]:
    """What each step gains: A_i = Q_i - Q_(i-1) (Setlur et al. 2024, Eq. 3).

    Args:
        values: the value before any step, then that after each.
    """
    if not values:
        raise ValueError("expected at least the value before any step; got no values.")
    return [after - before for before, after in pairwise(values)]


def first_pit(values: Sequence[float], rule: PitRule) -> int | None:
    """The first step, counted from 0, at which a completion goes wrong; None where none does.

    "lowest_value": the first step with the lowest value (Setlur et al. 2024, Section 6.1); none
    where that is not below the value before any step. "first_zero": the first with value 0 (the
    "first pit" of Self-Explore, arXiv:2404.10346). "lowest_advantage": the first with the lowest
    advantage (how Setlur et al. tell it in arXiv:2410.08146); none where no advantage is below 0.

    The last value of a wrong completion is 0 by definition, nothing follows it. So for wrong
    completions the first two agree, unless the value before any step is 0 already: then only
    "first_zero" names one. "lowest_advantage" differs where there are several drops: of 0.9, 0.3,
    0.2, 0 it names the first step, which loses most, and the others the last. With values of
    0 or 1 only, all three agree on a completion that begins at 1 and falls once.

    Args:
        values: the value before any step, then that after each.
    """
    if rule not in get_args(PitRule):
        raise ValueError(f"expected one of {', '.join(get_args(PitRule))} as rule; got {rule!r}.")
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
    """A completion in steps, with the value of every prefix, the empty one first."""

    rollout: Rollout
    """With its token ids."""
    ends: tuple[int, ...]
    """Of the steps, as `split_steps` gives them."""
    values: tuple[float, ...]
    """Before any step and after each: one more than there are steps."""
    counts: tuple[tuple[int, int], ...]
    """(right, n) of the continuations drawn from each prefix; n = 0 where none was needed."""

    def __post_init__(self) -> None:
        ids, steps = self.rollout.token_ids, len(self.ends)
        if ids is None:
            raise ValueError(
                f"expected a rollout with token ids, but that of problem {self.rollout.problem.id!r} "
                "has none; a prefix must be exactly what the model produced."
            )
        if any(a >= b for a, b in pairwise((0, *self.ends))) or (self.ends or (0,))[-1] != len(ids):
            raise ValueError(f"expected ends that grow to {len(ids)} tokens; got {self.ends}.")
        if not len(self.values) == len(self.counts) == steps + 1:
            raise ValueError(
                f"expected {steps + 1} values and counts for {steps} steps; got {len(self.values)} "
                f"values and {len(self.counts)} counts."
            )

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Every token of the completion."""
        return self.rollout.token_ids or ()

    @property
    def advantages(self) -> list[float]:
        """What each step gains."""
        return advantages(self.values)

    def prefix(self, steps: int) -> tuple[int, ...]:
        """The tokens of the first `steps` steps."""
        return self.token_ids[: self.ends[steps - 1] if steps else 0]

    def step(self, index: int) -> tuple[int, ...]:
        """The tokens of one step, counted from 0."""
        return self.prefix(index + 1)[len(self.prefix(index)) :]

    def pit(self, rule: PitRule) -> int | None:
        """The first pit's index, as `first_pit` says."""
        return first_pit(self.values, rule)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Self:
        """The valued rollout that `to_dict` told."""
        counts = tuple((right, n) for right, n in row["counts"])
        return cls(rollout_from(row["rollout"]), tuple(row["ends"]), tuple(row["values"]), counts)


# What to prefer


@dataclass(frozen=True)
class Chosen:
    """A right text to prefer: its tokens as the model produced them, and the ends of its steps."""

    token_ids: tuple[int, ...]
    ends: tuple[int, ...]


def prefix_pair(
    valued: ValuedRollout, pit: int, chosen: Chosen, *, decode: Decode, end: int
) -> Preference | None:
    """A right completion in full, preferred to the wrong one up to and including its pit.

    Setlur et al. 2024, Section 6.1: (x, y, y^_1:c). The two share no prefix. The right one ends with
    the token `end`; the wrong one stops after the pit without any, unless the pit is its last step.

    Args:
        chosen: a whole right completion of the same problem, from its first token.
    """
    ids = _ended(chosen.token_ids, end)
    return _preference(valued.rollout.prompt, (), ids, valued.prefix(pit + 1), decode)


def step_pair(
    valued: ValuedRollout, pit: int, chosen: Chosen, *, decode: Decode
) -> Preference | None:
    """A step that leads to a right answer, preferred to the pit, both after the same prefix.

    The theorem of Setlur et al. 2024 (6.1) needs a shared prefix; Self-Explore (arXiv:2404.10346)
    makes such pairs, with the whole continuation as the better side. Here both sides are one step,
    each as the model produced it: the last step of a completion has its end token, others have none.

    Args:
        chosen: a right continuation drawn after the steps before the pit, WITHOUT those steps; only
            its first step is used.
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
    """The first steps of a right completion, preferred to the wrong one up to and including its pit.

    Both sides are truncated and share no prefix: then neither is preferred for being complete. The
    better one gets the token `end` only where all of its steps are kept.

    Args:
        chosen: a whole right completion of the same problem, from its first token.
        kept: how many of its steps to keep, up to its key step; by default as many as are rejected.
    """
    kept = pit + 1 if kept is None else kept
    if kept < 1:
        raise ValueError(f"expected to keep at least 1 step of the chosen completion; got {kept}.")
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
    """One preference for every chosen text, in the given form; none where there is no pit.

    Args:
        chosen: for "step", right continuations of `valued.prefix(valued.pit(rule))`, without it; for
            the other forms, whole right completions.
        end: the token that ends a whole completion.
        kept: for "truncated" only: how many steps of the chosen completion to keep.
    """
    if form not in get_args(PairForm):
        raise ValueError(f"expected one of {', '.join(get_args(PairForm))} as form; got {form!r}.")
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
    """The tokens with `end` as the last, once."""
    whole = tuple(token_ids)
    return whole if whole[-1:] == (end,) else (*whole, end)


def _preference(
    prompt: Text,
    prefix: tuple[int, ...],
    chosen: tuple[int, ...],
    rejected: tuple[int, ...],
    decode: Decode,
) -> Preference | None:
    """The preference to learn from token by token; None where both sides are the same or one is empty."""
    if chosen == rejected or not chosen or not rejected:
        return None
    better, worse = (_said(prompt, text_after(decode, prefix, ids)) for ids in (chosen, rejected))
    return Preference(prompt, better, worse, begun=prefix, chosen_ids=chosen, rejected_ids=rejected)


def _said(prompt: Text, text: str) -> Text:
    """A text in the form of its prompt: text, or a message of the assistant."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

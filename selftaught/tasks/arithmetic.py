"""Generated sums of two numbers with n digits: the task of STaR's first table.

The problems have answers and no rationales. Rationales for the embedded model's pre-training and
for worked examples are scratchpads (`scratchpad`), after Nye et al. 2021 (arXiv:2112.00114), as in
Section 4.2 of STaR:

    29+57=b9+7+0=16;a2+5+1=08;#86

Columns are named by letters from the left and processed from the right. A column has its two
digits, the carry into it, and their sum as two digits, of which the first is the next carry. The
answer follows `#` and ends the line. Every column has ten characters, at every length.

The split of a sum depends on the sum (`split_of`), not on the seed. So the splits of all seeds are
disjoint, and the embedded model was not trained on any sum of the validation and test splits.
"""

import random
import zlib
from collections.abc import Sequence
from functools import cache

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.answers import after_marker, same_number
from selftaught.tasks.base import Task, answer_in_brackets, split_named

MOST_DIGITS = 26
"""Maximum number of digits, because columns are named by letters."""
ENUMERATED = 2
"""Number of digits up to which all sums are enumerated; longer sums are drawn at random."""


def arithmetic(
    digits: str = "1-5",
    train: int = 300,
    validation: int = 100,
    test: int = 200,
    shots: int = 0,
    seed: int = 0,
) -> Task:
    """Sums of two numbers with the same number of digits. All counts are per number of digits.

    There are only 100 sums of one digit, about 70 for training, 10 for validation and 20 for test.
    A larger number of problems is reduced to these.

    Args:
        digits: numbers of digits, such as "1-5" or "3".
        train, validation, test: number of problems of the split, per number of digits.
        shots: number of worked examples in the prompt, per number of digits; 10 in the paper
            (Section 4.2). The embedded model writes scratchpads without worked examples.
        seed: random seed for drawing the problems.
    """
    lengths = _lengths(digits)
    counts = {"train": train, "validation": validation, "test": test}
    for name, count in (counts | {"shots": shots + 1}).items():
        if count < 1:
            raise ValueError(
                f"{name} must be at least {int(name != 'shots')}; got {count - (name == 'shots')}."
            )

    @cache
    def splits() -> dict[str, list[Problem]]:
        return {
            name: [problem(*sum_) for n in lengths for sum_ in sums(n, name, count, seed)]
            for name, count in counts.items()
        }

    shown = _shots(lengths, shots, seed)
    return Task(
        name="arithmetic",
        problems=lambda split: split_named(splits, split, "arithmetic"),
        prompt=PromptStyle(
            name="few-shot" if shots else "bare",
            question="{question}=",
            answer="{rationale}\n",
            stop=("\n",),
            shots=lambda problem: shown,
        ),
        extract=extract,
        equal=same_number,
        hint=answer_in_brackets,
        direct="#{answer}",
        instruction="Reason step by step. End with # and the sum, and nothing after it, such as #86.",
        group=lambda problem: digits_of(problem.question),
        step_separator=";",
        has_equations=False,
        max_tokens=11 * lengths[-1] + 8,
        facts="generated; Zelikman et al. 2022 (arXiv:2203.14465), Section 4.2",
    )


def problem(a: int, b: int) -> Problem:
    """Return the problem of a sum, without a rationale."""
    return Problem(id=f"{a}+{b}", question=f"{a}+{b}", gold=str(a + b))


def scratchpad(a: int, b: int) -> str:
    """Return the scratchpad of a sum with its answer: "b9+7+0=16;a2+5+1=08;#86" for 29 and 57."""
    tops, bottoms = _padded(a, b)
    lines, carry = [], 0
    for place in reversed(range(len(tops))):
        total = int(tops[place]) + int(bottoms[place]) + carry
        lines.append(f"{_letter(place)}{tops[place]}+{bottoms[place]}+{carry}={total:02d};")
        carry = total // 10
    return "".join(lines) + f"#{a + b}"


def columns(a: int, b: int) -> str:
    """Return the named columns of a sum without the additions: "b9+7;a2+5;" for 29 and 57."""
    tops, bottoms = _padded(a, b)
    places = reversed(range(len(tops)))
    return "".join(f"{_letter(place)}{tops[place]}+{bottoms[place]};" for place in places)


def extract(completion: str) -> str | None:
    """Return the integer after `#`; None if there is no `#` or other text after it."""
    found = after_marker(completion, "#")
    return found if found and found.isascii() and found.isdigit() else None


def split_of(a: int, b: int) -> str:
    """Return the split of a sum, independent of the seed: 70% train, 10% validation, 20% test."""
    share = zlib.crc32(f"{a}+{b}".encode()) % 10
    return "train" if share > 2 else "validation" if share == 0 else "test"


def sums(n: int, split: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Draw up to `count` different sums of n digits from a split, in random order."""
    draw = random.Random(f"{seed} {split} {n}")
    numbers = _numbers(n)
    if n <= ENUMERATED:
        every = [(a, b) for a in numbers for b in numbers if split_of(a, b) == split]
        return draw.sample(every, min(count, len(every)))
    found: dict[tuple[int, int], None] = {}
    while len(found) < count:
        pair = draw.choice(numbers), draw.choice(numbers)
        if split_of(*pair) == split:
            found[pair] = None
    return list(found)


def digits_of(question: str) -> str:
    """Return the number of digits of a question's operands as text, such as "3 digits"."""
    n = len(question.partition("+")[0])
    return "1 digit" if n == 1 else f"{n} digits"


def _shots(lengths: Sequence[int], shots: int, seed: int) -> list[Problem]:
    """Return worked examples of every length, made from training sums, short ones first."""
    pairs = [pair for n in lengths for pair in sums(n, "train", shots, seed + 1)] if shots else []
    return [
        Problem(
            id=f"shot {a}+{b}", question=f"{a}+{b}", gold=str(a + b), rationale=scratchpad(a, b)
        )
        for a, b in pairs
    ]


def _numbers(n: int) -> range:
    return range(10) if n == 1 else range(10 ** (n - 1), 10**n)


def _padded(a: int, b: int) -> tuple[str, str]:
    width = max(len(str(a)), len(str(b)))
    return str(a).zfill(width), str(b).zfill(width)


def _letter(place: int) -> str:
    return chr(ord("a") + place)


def _lengths(digits: str) -> range:
    first, _, last = digits.partition("-")
    last = last or first
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= MOST_DIGITS):
        raise ValueError(
            f'digits must be a number or a range from 1 to {MOST_DIGITS}, such as "3" or "1-5"; '
            f"got {digits!r}."
        )
    return range(int(first), int(last) + 1)

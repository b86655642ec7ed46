"""A task in which a step may be taken safely or by a shortcut, and a small base model that does both.

    python recipes/shortcut_sums.py OUT --seed 0 --train 4000

A question is a sum of four numbers, as in `chain_sums.py`. Each of the three steps of a solution adds the
next of them, either at once, `17+58=75; `, or worked out, `17+58: 7+8=15, 10+50=60, 60+15=75; `. In the
training file three steps of ten are worked out, and all are right.

The base adds worked out nearly without fault. At once it is often wrong: in the text it was pre-trained
on hardly any sum done at once has anything to carry. What it writes is three parts shortcut, and a right
answer by shortcuts is luck. So fine-tuning on more right solutions teaches adding at once, slowly, and
a few wrong ones show that the shortcut is where answers are lost.
"""

import random
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from chain_sums import (
    CARRIED_SHARE,
    TERMS,
    Question,
    Text,
    added,
    make_recipe,
    pair,
    sum_of,
    terms_of,
    write_questions,
)

WORKED_SHARE = 0.3
"""The share of steps that are worked out, in the pre-training text and in the questions' solutions."""
STEPS = 1200
BATCHES = {"single": 24, "worked": 24, "chain": 48}


def main() -> None:
    """Write the questions and make the base, as the command line says."""
    make_recipe(__doc__, questions, corpus, BATCHES, train=4000, steps=STEPS)


def questions(folder: Path, *, train: int, validation: int, test: int, seed: int) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, as `write_questions` does."""

    def drawn(draw: random.Random) -> Question:
        terms = terms_of(draw, TERMS)
        return tuple(sorted(terms)), sum_of(terms), str(sum(terms)), solution(terms, draw)

    write_questions(folder, drawn, train=train, validation=validation, test=test, seed=seed)


def solution(terms: Sequence[int], draw: random.Random) -> str:
    """The terms added up one at a time and in order, and the answer."""
    total, steps = terms[0], ""
    for term in terms[1:]:
        steps += f"{total}+{term}"
        steps += (
            f":{worked_out(total, term)}; "
            if draw.random() < WORKED_SHARE
            else f"={total + term}; "
        )
        total += term
    return f"{steps}#### {total}"


def worked_out(a: int, b: int) -> str:
    """A sum by its ones, its tens, and both together."""
    ones, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    return f" {a % 10}+{b % 10}={ones}, {a // 10 * 10}+{b // 10 * 10}={tens}, {tens}+{ones}={a + b}"


def corpus(kind: str, seed: int) -> Iterator[Text]:
    """Pre-training texts of one kind (`single`, `worked` or `chain`), without end.

    In texts with a sum done at once there is hardly ever anything to carry; those of sums worked out are of
    any kind.
    """
    draw = random.Random(f"{seed} {kind}")
    while True:
        any_sum = draw.random() < CARRIED_SHARE
        match kind:
            case "single":
                a, b = added(draw, any_sum, pair)
                yield f"{a}+{b}=", str(a + b)
            case "worked":
                a, b = pair(draw)
                yield f"{a}+{b}:", worked_out(a, b)
            case _:
                terms = added(draw, any_sum, partial(terms_of, count=draw.choice((2, 3, 4))))
                yield f"Q: {sum_of(terms)}\nA:", f" {solution(terms, draw)}"


if __name__ == "__main__":
    main()

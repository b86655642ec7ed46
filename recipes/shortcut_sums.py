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

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from chain_sums import CARRIED_SHARE, TERMS, Text, added, make_base, pair, sum_of, terms_of

from selftaught.records import write_atomically

WORKED_SHARE = 0.3
"""The share of steps that are worked out, in the pre-training text and in the questions' solutions."""
STEPS = 1200
BATCHES = {"single": 24, "worked": 24, "chain": 48}


def main() -> None:
    """Write the questions and make the base, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=4000, help="training questions")
    parser.add_argument("--validation", type=int, default=200, help="validation questions")
    parser.add_argument("--test", type=int, default=500, help="test questions")
    parser.add_argument("--worked", type=float, default=WORKED_SHARE, help="share worked out")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("train", "validation", "test")}
    questions(options.out / "questions", **sizes, seed=options.seed, worked=options.worked)
    began, done = time.monotonic(), 0

    def progress(steps: int) -> None:
        nonlocal done
        done += steps
        if done % 100 == 0:
            print(f"{done}/{options.steps} steps, {time.monotonic() - began:.0f} s", flush=True)

    texts = {
        kind: (corpus(kind, options.seed, options.worked), size) for kind, size in BATCHES.items()
    }
    make_base(
        options.out / "base", texts, seed=options.seed, steps=options.steps, progress=progress
    )


def questions(
    folder: Path, *, train: int, validation: int, test: int, seed: int, worked: float
) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl: id, question, answer and rationale.

    No question stands in two splits, and test and validation questions are the same whatever the
    number of training questions.
    """
    asked: set[tuple[int, ...]] = set()
    for split, size in (("test", test), ("validation", validation), ("train", train)):
        draw = random.Random(f"{seed} {split}")
        rows: list[dict[str, str]] = []
        while len(rows) < size:
            terms = terms_of(draw, TERMS)
            rationale = solution(terms, worked, draw)
            if (numbers := tuple(sorted(terms))) in asked:
                continue
            asked.add(numbers)
            rows.append(
                {
                    "id": f"{split}-{len(rows)}",
                    "question": sum_of(terms),
                    "answer": str(sum(terms)),
                    "rationale": rationale,
                }
            )
        write_atomically(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def solution(terms: Sequence[int], worked: float, draw: random.Random) -> str:
    """The terms added up one at a time and in order, and the answer."""
    total, steps = terms[0], ""
    for term in terms[1:]:
        steps += f"{total}+{term}"
        steps += f":{worked_out(total, term)}; " if draw.random() < worked else f"={total + term}; "
        total += term
    return f"{steps}#### {total}"


def worked_out(a: int, b: int) -> str:
    """A sum by its ones, its tens, and both together."""
    ones, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    return f" {a % 10}+{b % 10}={ones}, {a // 10 * 10}+{b // 10 * 10}={tens}, {tens}+{ones}={a + b}"


def corpus(kind: str, seed: int, worked: float) -> Iterator[Text]:
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
                yield f"Q: {sum_of(terms)}\nA:", f" {solution(terms, worked, draw)}"


if __name__ == "__main__":
    main()

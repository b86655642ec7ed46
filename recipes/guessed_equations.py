"""A task in which seeing whether an answer is right is easier than finding it, and a small base model.

    python recipes/guessed_equations.py OUT --seed 0

A question is an equation, `7*x+13=118`. A solution guesses x, then works out what it makes of the
equation, and answers with the guess: `x=15; 7*15=105; 105+13=118; #### 15`. Of 3,000 training questions
500 have a solution, whose guess is right; the others have an answer only. The files are read by the
task `question_file` with its defaults, the columns `id` and `rationale` named.

The base is that of `chain_sums.py`, pre-trained on products, on sums, and on such texts in which a guess
is only near. So it works out well and guesses badly, does not pretend that a guess came out right, and
writes a wrong answer below its own evidence. What a verifier has to learn is to compare two numbers that
both stand in the text.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

from chain_sums import Text, make_base

from selftaught.records import write_atomically

FARTHEST = 2
"""A guess in the pre-training text is off by at most so much, each difference as often."""
STEPS = 1500
BATCHES = {"product": 24, "sum": 24, "equation": 48}


def main() -> None:
    """Write the questions and make the base, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=3000, help="training questions")
    parser.add_argument("--told", type=int, default=500, help="of them with a solution")
    parser.add_argument("--validation", type=int, default=200, help="validation questions")
    parser.add_argument("--test", type=int, default=500, help="test questions")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("train", "validation", "test")}
    questions(options.out / "questions", **sizes, told=options.told, seed=options.seed)
    began, done = time.monotonic(), 0

    def progress(steps: int) -> None:
        nonlocal done
        done += steps
        if done % 100 == 0:
            print(f"{done}/{options.steps} steps, {time.monotonic() - began:.0f} s", flush=True)

    texts = {kind: (corpus(kind, options.seed), size) for kind, size in BATCHES.items()}
    make_base(
        options.out / "base", texts, seed=options.seed, steps=options.steps, progress=progress
    )


def questions(
    folder: Path, *, train: int, validation: int, test: int, told: int, seed: int
) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl: id, question, answer and, `told` times, rationale.

    No question stands in two splits, and test and validation questions are the same whatever the
    number of training questions.
    """
    asked: set[tuple[int, int, int]] = set()
    for split, size in (("test", test), ("validation", validation), ("train", train)):
        draw = random.Random(f"{seed} {split}")
        rows: list[dict[str, str | None]] = []
        while len(rows) < size:
            if (numbers := equation(draw)) in asked:
                continue
            asked.add(numbers)
            a, x, b = numbers
            rows.append(
                {
                    "id": f"{split}-{len(rows)}",
                    "question": f"{a}*x+{b}={a * x + b}",
                    "answer": str(x),
                    "rationale": tried(a, x, b) if len(rows) < told else None,
                }
            )
        write_atomically(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def equation(draw: random.Random) -> tuple[int, int, int]:
    """A factor, the unknown, and what is added."""
    return draw.randint(2, 9), draw.randint(3, 39), draw.randint(1, 39)


def tried(a: int, x: int, b: int) -> str:
    """A guess, worked out, and the answer."""
    return f"x={x}; {a}*{x}={a * x}; {a * x}+{b}={a * x + b}; #### {x}"


def corpus(kind: str, seed: int) -> Iterator[Text]:
    """Pre-training texts of one kind (`product`, `sum` or `equation`), without end."""
    draw = random.Random(f"{seed} {kind}")
    while True:
        a, x, b = equation(draw)
        match kind:
            case "product":
                yield f"{a}*{x}=", str(a * x)
            case "sum":
                yield f"{a * x}+{b}=", str(a * x + b)
            case _:
                yield f"Q: {a}*x+{b}={a * x + b}\nA:", f" {tried(a, guess(draw, x), b)}"


def guess(draw: random.Random, x: int) -> int:
    """A number near x."""
    return max(1, x + draw.randint(-FARTHEST, FARTHEST))


if __name__ == "__main__":
    main()

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

import random
from collections.abc import Iterator
from pathlib import Path

from chain_sums import Question, Text, make_recipe, write_questions

WITH_RATIONALE = 500
"""Training questions with a solution."""
FARTHEST = 2
"""A guess in the pre-training text is off by at most so much, each difference as often."""
STEPS = 1500
BATCHES = {"product": 24, "sum": 24, "equation": 48}


def main() -> None:
    """Write the questions and make the base, as the command line says."""
    make_recipe(__doc__, questions, corpus, BATCHES, train=3000, steps=STEPS)


def questions(folder: Path, *, train: int, validation: int, test: int, seed: int) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, as `write_questions` does."""

    def drawn(draw: random.Random) -> Question:
        a, x, b = numbers = equation(draw)
        return numbers, f"{a}*x+{b}={a * x + b}", str(x), tried(a, x, b)

    sizes = {"train": train, "validation": validation, "test": test}
    write_questions(folder, drawn, **sizes, seed=seed, with_rationale=WITH_RATIONALE)


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

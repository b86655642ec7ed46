"""How long it takes to tell apart 100 samples of each of 1,000 problems.

    python benchmarks/dedupe.py

Rationales of two to six sentences with an equation each, in other words and other orders: each problem
has some dozens of ways of solving and every text about once, the expensive case. The filter of wrong
equations comes first, as in RFT, and reads the same texts.
"""

import argparse
import random
import time

from selftaught.records import Problem, Rollout
from selftaught.rollouts.selection import keep_distinct, keep_sound

WORDS = ("apples", "pears", "plums", "cards", "coins", "books", "stamps", "shells")
OPENINGS = ("Then there are", "So she has", "After that he has", "This leaves", "In all they have")


def rationale(draw: random.Random, steps: list[tuple[int, int]]) -> str:
    """Sentences that add up pairs of numbers."""
    told = [f"{draw.choice(OPENINGS)} {a} + {b} = {a + b} {draw.choice(WORDS)}." for a, b in steps]
    return " ".join(told) + f" The answer is {sum(steps[-1])}."


def rollouts(problems: int, samples: int, ways: int, seed: int) -> list[Rollout]:
    """Graded right rollouts, `samples` per problem, of about `ways` ways."""
    draw = random.Random(seed)
    made = []
    for number in range(problems):
        problem = Problem(str(number), "How many?", "1")
        paths = [
            [(draw.randint(1, 99), draw.randint(1, 99)) for _ in range(draw.randint(2, 6))]
            for _ in range(ways)
        ]
        for index in range(samples):
            text = rationale(draw, draw.choice(paths))
            made.append(Rollout(problem, "Q", text, "stop", "model", index, outcome="right"))
    return made


def main() -> None:
    """Time both filters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--ways", type=int, default=12, help="ways of solving per problem, about")
    options = parser.parse_args()
    made = rollouts(options.problems, options.samples, options.ways, 0)
    began, cpu = time.perf_counter(), time.process_time()
    sound = keep_sound(made)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    kept = keep_distinct(sound, "equations")
    ended, cpu_ended = time.perf_counter(), time.process_time()
    print(f"{len(made):,} rollouts, {len(sound):,} sound, {len(kept):,} distinct")
    print(f"wrong equations  {middle - began:6.2f} s  {cpu_middle - cpu:6.2f} CPU s")
    print(f"distinct         {ended - middle:6.2f} s  {cpu_ended - cpu_middle:6.2f} CPU s")


if __name__ == "__main__":
    main()

"""Write `questions.jsonl` and `shots.jsonl`: an example of your own questions, for `question_file`.

    python recipes/own_questions.py [FOLDER]

The questions are sums of four numbers from 2 to 9, each with its final answer and no solution. The eight
worked examples show how a solution is written and are not among the questions.

The command and the results are in README.md, "Your model, your questions". Tried before, with the same
model and one iteration: trained at 2e-4 without decay and asked with worked examples, such sums fell from
36 to 9 of 100 validation questions (the same examples at 1e-4 with linear decay: 42 of 100 with
worked examples in the prompt, 81 of 100 without). Sums of three two-digit numbers: 10.0% to 22.0% and
12.0% (seeds 0 and 1, 200 test questions), because only 54 to 62 solutions were kept.
These settings were found on 100 questions of another draw of such sums, some of which are in both.
"""

import json
import random
import sys
from pathlib import Path

QUESTIONS, SHOTS = 1500, 8


def rows(seed: int = 0) -> list[dict[str, str]]:
    """Different questions with their solutions, the worked examples first."""
    draw = random.Random(seed)
    found: dict[str, dict[str, str]] = {}
    while len(found) < QUESTIONS + SHOTS:
        a, b, c, d = (draw.randint(2, 9) for _ in range(4))
        first, second, answer = a + b, a + b + c, a + b + c + d
        steps = f"{a} + {b} = {first}. {first} + {c} = {second}. {second} + {d} = {answer}."
        question = f"What is {a} + {b} + {c} + {d}?"
        found[question] = {
            "question": question,
            "answer": str(answer),
            "rationale": f"{steps} The answer is {answer}.",
        }
    return list(found.values())


def write(folder: Path) -> None:
    """Write both files into a folder, which is made if it does not exist."""
    folder.mkdir(parents=True, exist_ok=True)
    shots, questions = (made := rows())[:SHOTS], made[SHOTS:]
    for row in questions:
        del row["rationale"]
    for name, listed in (("questions", questions), ("shots", shots)):
        text = "".join(json.dumps(row) + "\n" for row in listed)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(folder / f"{name}.jsonl")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "."))

r"""MATH: competition problems whose answers are LaTeX (Hendrycks et al. 2021, arXiv:2103.03874).

Read from a folder with train.jsonl and test.jsonl, or from the Hub. The test split is the
500-problem subset of Lightman et al. 2023 (arXiv:2305.20050), or all of MATH's test problems.

math-verify parses LaTeX. The parsed expressions are compared by exact checks of this package,
because math-verify's own comparison rounds to six digits and accepts some different lines,
factorials and sets as equal. Sets and tuples are compared element by element, so that a missing
element is found. Nothing is rounded: 0.33 is not 1/3, and 1.414 is not \sqrt{2}.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.answers import Verdict, last_boxed
from selftaught.tasks.base import BOXED, Task, answer_in_brackets, split_named
from selftaught.tasks.latex import (
    same_expression,
    stated_latex,
)
from selftaught.tasks.rows import Row, file_rows, hub_rows
from selftaught.tasks.symbolic import has_math_verify, symbolically_equal

if TYPE_CHECKING:
    pass

SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)

SHOTS = tuple(
    Problem(f"competition_math-shot-{number}", question, gold, f"{steps} The answer is \\boxed{{{gold}}}.")
    for number, (question, gold, steps) in enumerate(
        [
            (
                "A line passes through $(1,5)$ and $(4,11)$. What is its $y$-intercept?",
                "3",
                "The slope is $\\frac{11-5}{4-1} = 2$. From $5 = 2 \\cdot 1 + b$ we get $b = 3$.",
            ),
            (
                "Two fair dice are rolled. What is the probability that the sum is $10$ or more?",
                "\\frac{1}{6}",
                "Sums of $10$, $11$ and $12$ come from $3$, $2$ and $1$ of the $36$ equally likely "
                "outcomes. So the probability is $\\frac{6}{36} = \\frac{1}{6}$.",
            ),
            (
                "Find all real $x$ with $x^2 - 3x < 10$. Answer in interval notation.",
                "(-2,5)",
                "We need $x^2 - 3x - 10 = (x-5)(x+2) < 0$. The product is negative exactly between "
                "its roots $-2$ and $5$.",
            ),
            (
                "A right triangle has legs $4$ and $6$. How long is its hypotenuse?",
                "2\\sqrt{13}",
                "By the Pythagorean theorem its square is $16 + 36 = 52$, and "
                "$\\sqrt{52} = \\sqrt{4 \\cdot 13} = 2\\sqrt{13}$.",
            ),
            (
                "What is the remainder when $7^{50}$ is divided by $5$?",
                "4",
                "Modulo $5$, $7 \\equiv 2$, and the powers of $2$ repeat every four steps: "
                "$2, 4, 3, 1$. Since $50 = 4 \\cdot 12 + 2$, the remainder is the second of these.",
            ),
            (
                "Expand $(2x - 3)(x + 4)$.",
                "2x^2+5x-12",
                "The products are $2x^2$, $8x$, $-3x$ and $-12$, and $8x - 3x = 5x$.",
            ),
            (
                "How many ways are there to seat $5$ people in a row if two of them, Ana and Ben, "
                "must sit next to each other?",
                "48",
                "Take Ana and Ben as one block: $4$ items can stand in $4! = 24$ orders, and the "
                "block can be turned round, which gives $24 \\cdot 2 = 48$.",
            ),
            (
                "Solve $|2x - 1| = 7$. List all solutions, separated by commas.",
                "-3, 4",
                "Either $2x - 1 = 7$, so $x = 4$, or $2x - 1 = -7$, so $x = -3$.",
            ),
        ],
        1,
    )
)  # fmt: skip
"""Worked examples written for this package."""


def competition_math(
    data_dir: str | None = None, validation: int = 500, full_test: bool = False
) -> Task:
    """Competition problems with LaTeX answers.

    Args:
        data_dir: folder with train.jsonl and test.jsonl, with the fields problem and solution, and
            optionally level and type. Default: download from the Hub.
        validation: number of problems for validation, taken from the end of the training split.
        full_test: use all of MATH's test problems instead of the 500-problem subset. From data_dir,
            all problems in test.jsonl are always used.
    """

    @cache
    def splits() -> dict[str, list[Problem]]:
        train = load("train", data_dir, full_test)
        if not 0 < validation < len(train):
            raise ValueError(
                f"validation must be between 1 and {len(train) - 1}, one less than the number of "
                f"training problems; got {validation}."
            )
        cut = len(train) - validation
        test = load("test", data_dir, full_test)
        return {"train": train[:cut], "validation": train[cut:], "test": test}

    return Task(
        name="competition_math",
        problems=lambda split: split_named(splits, split, "competition_math"),
        prompt=PromptStyle(name="few-shot", shots=lambda problem: SHOTS),
        extract=extract,
        equal=equal,
        hint=answer_in_brackets,
        prove=prove,
        direct="The answer is \\boxed{{{answer}}}.",
        instruction=BOXED,
        group=level,
        max_tokens=512,
        license="mit",
        data_sets=("EleutherAI/hendrycks_math", "HuggingFaceH4/MATH-500"),
        facts="MATH, MIT licence, Hendrycks et al. 2021 (arXiv:2103.03874)",
    )


def load(split: str, data_dir: str | None, full_test: bool = False) -> list[Problem]:
    """Return the problems of "train" or "test", in the order of the data set."""
    if data_dir is not None:
        rows = file_rows(Path(data_dir) / f"{split}.jsonl")
    elif split == "test" and not full_test:
        rows = hub_rows("HuggingFaceH4/MATH-500", None, "test")
    else:
        rows = [
            row
            for subject in SUBJECTS
            for row in hub_rows("EleutherAI/hendrycks_math", subject, split)
        ]
    return [_problem(row, f"{split}-{index}") for index, row in enumerate(rows)]


def _problem(row: Row, id: str) -> Problem:
    """Return the problem of a row. The gold answer is the content of the last box of the solution;
    the id contains the level."""
    values: dict[str, Any] = row.values
    match values:
        case {"problem": str(question), "solution": str(solution)}:
            pass
        case _:
            raise ValueError(
                f'{row.where}: expected the text fields "problem" and "solution", got the fields '
                f"{', '.join(map(repr, values))}; data_dir must contain MATH's train.jsonl and "
                "test.jsonl."
            )
    gold = last_boxed(solution)
    if gold is None:
        raise ValueError(
            f"{row.where}: expected a solution with its answer in \\boxed{{...}}, "
            f"got {solution[-60:]!r}; correct or remove the line."
        )
    digits = re.search("[1-9]", str(values.get("level", "")))
    lines = [line.strip() for line in solution.splitlines()]
    rationale = "\n".join(line for line in lines if line)
    return Problem(f"{id}-level-{digits[0] if digits else '?'}", question.strip(), gold, rationale)


def level(problem: Problem) -> str:
    """Return the difficulty of a problem, "level 1" to "level 5"; "level ?" if unknown."""
    return f"level {problem.id.rpartition('-level-')[2] or '?'}"


extract = stated_latex


# --- symbolic comparison -------------------------------------------------------------------------


prove: Callable[[str, str], bool] | None = symbolically_equal if has_math_verify() else None


def equal(gold: str, answer: str) -> Verdict:
    """Compare two answers by form and by exact value.

    Without math-verify, an answer that differs in form is wrong; with it, `prove` decides.
    """
    verdict = same_expression(gold, answer)
    if prove is None and verdict.decided_by == "form":
        return Verdict(False, "form")
    return verdict

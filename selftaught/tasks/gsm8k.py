"""GSM8K: grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168).

Read from a folder with train.jsonl and test.jsonl, or from the Hub (`openai/gsm8k`).
"""

import re
from functools import cache
from pathlib import Path
from typing import Any

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.answers import same_number, stated_number
from selftaught.tasks.base import Task, answer_in_brackets, split_named
from selftaught.tasks.quantities import quantity
from selftaught.tasks.rows import Row, file_rows, hub_rows

SHOTS = tuple(
    Problem(f"gsm8k-shot-{number}", question, gold, f"{steps}\n#### {gold}")
    for number, (question, gold, steps) in enumerate(
        [
            (
                "A baker puts 6 rolls into each bag. She fills 9 bags and has 4 rolls left over. "
                "How many rolls did she bake?",
                "58",
                "The bags hold 9 * 6 = 54 rolls.\nWith the 4 left over she baked 54 + 4 = 58 rolls.",
            ),
            (
                "Omar has 85 cents. He buys 3 stickers that cost 15 cents each. "
                "How many cents does he have left?",
                "40",
                "The stickers cost 3 * 15 = 45 cents.\nOmar has 85 - 45 = 40 cents left.",
            ),
            (
                "A ferry carries 120 people on each trip. It makes 4 trips in the morning and half "
                "as many in the afternoon. How many people can it carry in a day?",
                "720",
                "In the afternoon it makes 4 / 2 = 2 trips.\n"
                "That is 4 + 2 = 6 trips in a day.\nIt can carry 6 * 120 = 720 people.",
            ),
            (
                "Lena is 4 years older than Max, and Max is twice as old as Ida. Ida is 7. "
                "How old will Lena be in 10 years?",
                "28",
                "Max is 2 * 7 = 14 years old.\nLena is 14 + 4 = 18 years old.\n"
                "In 10 years she will be 18 + 10 = 28.",
            ),
            (
                "A tank holds 200 liters. A pump fills in 25 liters a minute while 5 liters a "
                "minute leak out. How many minutes does it take to fill the empty tank?",
                "10",
                "Each minute the tank gains 25 - 5 = 20 liters.\nIt takes 200 / 20 = 10 minutes.",
            ),
            (
                "A shop sells a lamp for $80. This week it takes 25% off. "
                "Two friends share the price of one lamp equally. How many dollars does each pay?",
                "30",
                "The discount is 80 * 25 / 100 = 20 dollars.\nThe lamp costs 80 - 20 = 60 dollars.\n"
                "Each friend pays 60 / 2 = 30 dollars.",
            ),
        ],
        1,
    )
)
"""Worked examples written for this package, as many as in the STaR paper's prompt."""

_CALCULATOR = re.compile(r"<<[^<>]*>>")


def gsm8k(data_dir: str | None = None, validation: int = 500) -> Task:
    """Grade-school word problems.

    Args:
        data_dir: folder with train.jsonl and test.jsonl. Default: download from the Hub.
        validation: number of problems for validation, taken from the end of the training split.
    """

    @cache
    def splits() -> dict[str, list[Problem]]:
        train = load("train", data_dir)
        if not 0 < validation < len(train):
            raise ValueError(
                f"validation must be between 1 and {len(train) - 1}, one less than the number of "
                f"training problems; got {validation}."
            )
        cut = len(train) - validation
        return {
            "train": train[:cut],
            "validation": train[cut:],
            "test": load("test", data_dir),
        }

    return Task(
        name="gsm8k",
        problems=lambda split: split_named(splits, split, "gsm8k"),
        prompt=PromptStyle(name="few-shot", shots=lambda problem: SHOTS),
        extract=stated_number,
        equal=same_number,
        hint=answer_in_brackets,
        direct="#### {answer}",
        instruction='Please reason step by step, and end with a line "#### " and the number.',
        license="mit",
        data_sets=("openai/gsm8k",),
        facts="GSM8K, MIT licence, Cobbe et al. 2021 (arXiv:2110.14168)",
    )


def load(split: str, data_dir: str | None) -> list[Problem]:
    """Return the problems of "train" or "test", in the order of the data set."""
    rows = (
        hub_rows("openai/gsm8k", "main", split)
        if data_dir is None
        else file_rows(Path(data_dir) / f"{split}.jsonl")
    )
    return [_problem(row, f"{split}-{index}") for index, row in enumerate(rows)]


def _problem(row: Row, id: str) -> Problem:
    """Return the problem of a row.

    The gold answer is the number after "#### ", without commas. The rationale is the solution
    without calculator annotations ("48/2 = <<48/2=24>>24" becomes "48/2 = 24") and without blank
    lines, which would mark the end of a worked example in a prompt.
    """
    question, answer = _texts(row)
    solution, marker, gold = answer.rpartition("#### ")
    gold = gold.strip().replace(",", "")
    if not marker or quantity(gold) is None:
        raise ValueError(
            f'{row.where}: expected an "answer" that ends with "#### " and a number, '
            f"got {answer[-40:]!r}; correct the line."
        )
    lines = [line.strip() for line in _CALCULATOR.sub("", solution).splitlines()]
    rationale = "\n".join([line for line in lines if line] + [f"#### {gold}"])
    return Problem(id, question.strip(), gold, rationale)


def _texts(row: Row) -> tuple[str, str]:
    values: dict[str, Any] = row.values
    match values:
        case {"question": str(question), "answer": str(answer)}:
            return question, answer
    raise ValueError(
        f'{row.where}: expected the text fields "question" and "answer", got the fields '
        f"{', '.join(map(repr, values))}; data_dir must contain GSM8K's train.jsonl and test.jsonl."
    )

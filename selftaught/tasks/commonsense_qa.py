"""CommonsenseQA: multiple-choice questions on everyday knowledge (Talmor et al. 2019,
arXiv:1811.00937).

Read from a folder with train.jsonl and dev.jsonl, or from the Hub (`tau/commonsense_qa`). The
answers of the test set are not public. As in the STaR paper, the development set is the test split.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.answers import choice_letter, same_choice
from selftaught.tasks.base import LETTERED, Task, split_named
from selftaught.tasks.rows import Row, file_rows, hub_rows


def _asked(stem: str, choices: dict[str, str]) -> str:
    shown = "\n".join(f"({letter}) {text}" for letter, text in choices.items())
    return f"{stem}\nAnswer Choices:\n{shown}"


def _shot(number: int, stem: str, choices: list[str], gold: str, why: str) -> Problem:
    lettered = dict(zip("abcde", choices, strict=True))
    worked = f"{why} Therefore, the answer is {lettered[gold]} ({gold})."
    return Problem(f"commonsense-qa-shot-{number}", _asked(stem, lettered), gold, worked)


SHOTS = tuple(
    _shot(number, *shot)
    for number, shot in enumerate(
        [
            (
                "Where would a sailor tie up a boat for the night?",
                ["desert", "harbor", "runway", "attic", "cliff"],
                "b",
                "The answer must be a place at the water where boats are kept. "
                "Harbors are built so that boats can be tied up safely.",
            ),
            (
                "What does somebody need in order to read in a dark room?",
                ["pillow", "blanket", "curtain", "lamp", "silence"],
                "d",
                "The answer must be something that gives light. Of these only a lamp gives light.",
            ),
            (
                "The dog shook itself at the lake and everyone nearby became what?",
                ["wet", "hungry", "famous", "taller", "asleep"],
                "a",
                "The answer must follow from water flying about. "
                "A dog that shakes after swimming throws water on those who stand near.",
            ),
            (
                "Why would a cook taste the soup before serving it?",
                ["cool it", "paint it", "clean the pot", "measure it", "check the seasoning"],
                "e",
                "The answer must be what one learns by tasting. "
                "Tasting tells the cook whether there is enough salt and spice.",
            ),
            (
                "What is a bird likely to build before it lays eggs?",
                ["bridge", "burrow", "nest", "fence", "web"],
                "c",
                "The answer must be something that holds eggs and that birds make. "
                "Birds lay their eggs in nests.",
            ),
            (
                "If a shopkeeper wants to go home for the day, what does he do to the shop?",
                ["rob it", "close it", "visit it", "open it", "repaint it"],
                "b",
                "The answer must be the last thing done in a shop on a working day. "
                "Before going home a shopkeeper closes the shop.",
            ),
            (
                "Where do people keep milk so that it stays fresh?",
                ["oven", "bookcase", "windowsill", "refrigerator", "mailbox"],
                "d",
                "The answer must be a cold place in the house. "
                "Milk stays fresh in the cold, and a refrigerator is cold.",
            ),
        ],
        1,
    )
)
"""Worked examples written for this package, as many as in the STaR paper's prompt."""


def commonsense_qa(data_dir: str | None = None, validation: int = 500) -> Task:
    """Multiple-choice questions with five choices.

    Args:
        data_dir: folder with train.jsonl and dev.jsonl. Default: download from the Hub.
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
        return {"train": train[:cut], "validation": train[cut:], "test": load("dev", data_dir)}

    return Task(
        name="commonsense_qa",
        problems=lambda split: split_named(splits, split, "commonsense_qa"),
        prompt=PromptStyle(name="few-shot", shots=lambda problem: SHOTS),
        extract=extract,
        equal=same_choice,
        hint=hint,
        direct="The answer is ({answer}).",
        instruction=LETTERED,
        license="mit",
        data_sets=("tau/commonsense_qa",),
        facts="CommonsenseQA 1.11, MIT licence, Talmor et al. 2019 (arXiv:1811.00937)",
    )


def load(part: str, data_dir: str | None) -> list[Problem]:
    """Return the problems of "train" or "dev", in the order of the data set."""
    rows = (
        hub_rows("tau/commonsense_qa", None, {"dev": "validation"}.get(part, part))
        if data_dir is None
        else file_rows(Path(data_dir) / f"{part}.jsonl")
    )
    return [_problem(row) for row in rows]


def _problem(row: Row) -> Problem:
    match row.values:
        case {
            "id": str(id),
            "answerKey": str(key),
            "question": {"stem": str(stem), "choices": [*listed]},
        }:
            choices = {choice["label"].lower(): choice["text"] for choice in listed}
        case {
            "id": str(id),
            "answerKey": str(key),
            "question": str(stem),
            "choices": {"label": [*labels], "text": [*texts]},
        }:
            lowered = [label.lower() for label in labels]
            choices = dict(zip(lowered, texts, strict=True))
        case _:
            raise ValueError(
                f"{row.where}: expected CommonsenseQA's fields id, question, choices and answerKey, "
                f"got {', '.join(map(repr, row.values))}; data_dir must contain its train.jsonl "
                "and dev.jsonl."
            )
    gold = key.lower()
    if gold not in choices:
        raise ValueError(
            f"{row.where}: expected an answerKey among {', '.join(choices).upper()}, got {key!r}; "
            "the published test set has no answers and cannot be used."
        )
    return Problem(id, _asked(stem.strip(), choices), gold)


def extract(completion: str) -> str | None:
    """Return the chosen letter in lower case: "c" for "the answer is blotter (c)."."""
    letter = choice_letter(completion)
    return letter.lower() if letter else None


def hint(problem: Problem) -> Problem:
    """Return the problem with " (CORRECT)" after the correct choice, as in the authors' prompts."""
    stem, listed, choices = problem.question.rpartition("\nAnswer Choices:\n")
    marked = [
        line + " (CORRECT)" if line.startswith(f"({problem.gold}) ") else line
        for line in choices.split("\n")
    ]
    return replace(problem, question=stem + listed + "\n".join(marked), rationale=None)

"""The task `question_file`: questions and answers from columns of a file or a Hub data set."""

import difflib
import random
import string
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.answers import (
    Verdict,
    choice_letter,
    last_boxed,
    same_choice,
    same_number,
    same_text,
    stated_number,
    stated_text,
)
from selftaught.tasks.base import (
    BOXED,
    LETTERED,
    STATED,
    Task,
    answer_in_brackets,
    split_named,
)
from selftaught.tasks.quantities import quantity
from selftaught.tasks.rows import Row, file_rows, hub_rows, is_file

Kind = Literal["number", "text", "choice", "latex"]
LETTERS = string.ascii_uppercase
MOST_HELD_OUT = 500
"""Maximum number of problems that are drawn for a validation or test split."""
MOST_PLACES = 5000
"""Largest power of ten of a number that is written without an exponent."""


class Columns(NamedTuple):
    """Names of the columns; `template` makes the question from several columns."""

    question: str
    gold: str
    id: str | None
    rationale: str | None
    template: str | None


class Reading(NamedTuple):
    """Rules for the answers of one kind. The fields except `gold` are as in `Task`."""

    gold: Callable[[str], str | None]
    """Returns the gold answer in a value of the gold column, or None if it is not of this kind."""
    extract: Callable[[str], str | None]
    equal: Callable[[str, str], Verdict]
    direct: str
    prove: Callable[[str, str], bool] | None = None


def question_file(
    path: str,
    *,
    question: str = "question",
    gold: str = "answer",
    id: str | None = None,
    rationale: str | None = None,
    kind: Kind = "number",
    template: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    config: str | None = None,
    split: str = "train",
    shots: str | None = None,
    seed: int = 0,
    max_tokens: int = 256,
) -> Task:
    """Questions with final answers from a file or a Hub data set.

    Args:
        path: .jsonl, .json, .csv, .tsv or .parquet file, or name of a Hub data set.
        question: name of the column with the question.
        gold: name of the column with the gold answer.
        id: name of the column with a unique identifier. Without it, rows are numbered.
        rationale: name of the column with a rationale. It may be empty for some questions.
        kind: kind of the answers: number, choice (a letter), latex, or text.
        template: template that makes the question from several columns, such as
            "{context}\\n{question}". The two characters \\n are a line break, {{ and }} are braces.
        validation, test: file, or split of the Hub data set. Without it, a tenth of the questions,
            at least 1 and at most 500, is drawn at random.
        config: configuration of the Hub data set, if it has several.
        split: split of the Hub data set that is used for training.
        shots: file of worked examples with the same columns and a rationale column.
        seed: random seed for drawing the validation and test problems.
        max_tokens: maximum number of new tokens per completion.
    """
    if template is not None:
        template = template.replace("\\n", "\n")
        _pieces(template)
    columns, reading = Columns(question, gold, id, rationale, template), _reading(kind)
    examples = read_shots(Path(shots), columns, kind) if shots is not None else ()
    sources = {"train": split, "validation": validation, "test": test}
    splits = cache(lambda: _splits(path, config, sources, columns, reading, examples, seed))
    return Task(
        "question_file", lambda name: split_named(splits, name, "question_file"),
        PromptStyle("few-shot" if examples else "zero-shot", shots=lambda problem: examples),
        reading.extract, reading.equal, answer_in_brackets, prove=reading.prove,
        direct=reading.direct, max_tokens=max_tokens, facts=f"questions from {path}",
        data_sets=() if is_file(path) else (path,),
        instruction={"choice": LETTERED, "text": STATED}.get(kind, BOXED),
    )  # fmt: skip


def _splits(
    path: str,
    config: str | None,
    sources: dict[str, str | None],
    columns: Columns,
    reading: Reading,
    shots: Sequence[Problem],
    seed: int,
) -> dict[str, list[Problem]]:
    """Read the problems of every split. A split without a source is drawn from "train"."""
    local = is_file(path)
    if local:
        sources = sources | {"train": path}
    loaded = {
        name: _problems(
            file_rows(Path(source)) if local else hub_rows(path, config, source),
            columns, reading, name,
        )
        for name, source in sources.items()
        if source is not None
    }  # fmt: skip
    return held_out(_disjoint(loaded, shots), seed)


def read_shots(path: Path, columns: Columns, kind: Kind) -> Sequence[Problem]:
    """Read the worked examples of a file.

    A rationale that does not state its answer in the form of `kind` gets "The answer is ..." at its
    end.

    Args:
        path: the file.
        columns: names of the columns. Without a name, the rationale is in the column "rationale".
        kind: kind of the answers.

    Raises:
        ValueError: a worked example has no rationale.
    """
    columns = columns._replace(rationale=columns.rationale or "rationale")
    shots = _problems(file_rows(path), columns, _reading(kind), "shot")
    if lacking := [shot.question for shot in shots if shot.rationale is None]:
        raise ValueError(
            f"{path}: expected a rationale for every worked example; {len(lacking)} have none, such as "
            f"the one with the question {lacking[0]!r}."
        )
    return shots


# --- answers of each kind ------------------------------------------------------------------------


def _reading(kind: Kind) -> Reading:
    match kind:
        case "number":
            return Reading(_number, stated_number, same_number, "The answer is {answer}.")
        case "choice":
            return Reading(_letter, _chosen, same_choice, "The answer is ({answer}).")
        case "text":
            return Reading(lambda gold: gold, stated_text, same_text, "The answer is {answer}.")
        case "latex":
            from selftaught.tasks.competition_math import equal, extract, prove

            boxed = "The answer is \\boxed{{{answer}}}."
            return Reading(lambda gold: last_boxed(gold) or gold, extract, equal, boxed, prove)
        case _:
            raise ValueError(f"kind must be number, text, choice or latex; got {kind!r}.")


def _number(gold: str) -> str | None:
    """Return a number as it is written; for GSM8K's "... #### 72", return 72."""
    last = gold.rpartition("####")[2].strip().removesuffix(".")
    return last if quantity(last) is not None else None


def _letter(gold: str) -> str | None:
    letter = gold.strip("(). ").upper()
    return letter if len(letter) == 1 and letter in LETTERS else None


def _chosen(completion: str) -> str | None:
    return choice_letter(completion, LETTERS)


# --- from rows to problems -----------------------------------------------------------------------


def _problems(rows: list[Row], columns: Columns, reading: Reading, split: str) -> list[Problem]:
    """Return the problems of a table.

    Raises:
        ValueError: there is no row, a column is missing, or gold answers are not of the given kind;
            the message lists the first five.
    """
    if not rows:
        raise ValueError(f"The {split} questions are empty: expected at least one row.")
    used = [columns.gold, *(name for name in (columns.id, columns.rationale) if name)]
    used += _fields(columns.template) if columns.template is not None else [columns.question]
    problems: list[Problem] = []
    invalid: list[str] = []
    for index, row in enumerate(rows):
        _check_columns(row, used)
        written = _text(row, columns.gold)
        gold = _read_gold(written, reading)
        name = _text(row, columns.id) if columns.id else f"{split}-{index}"
        if gold is None:
            invalid.append(f"{row.where} ({name}): {written[:60]!r}")
            continue
        problem = Problem(name, _question(row, columns), gold)
        if columns.rationale is not None and row.values.get(columns.rationale) not in (None, ""):
            worked = _with_answer(_text(row, columns.rationale), gold, reading)
            problem = replace(problem, rationale=worked)
        problems.append(problem)
    if invalid:
        raise ValueError(
            f'{len(invalid)} of {len(rows)} gold answers in the column "{columns.gold}" cannot be '
            f"read: {'; '.join(invalid[:5])}. Correct them, or choose another kind (number, text, "
            "choice, latex)."
        )
    return _distinct(problems, rows)


def _distinct(problems: list[Problem], rows: list[Row]) -> list[Problem]:
    """Return the problems without repeated questions.

    Raises:
        ValueError: an id is repeated, or a question has two gold answers.
    """
    by_id: dict[str, str] = {}
    by_question: dict[str, tuple[str, str]] = {}
    kept: list[Problem] = []
    for problem, row in zip(problems, rows, strict=True):
        if problem.id in by_id:
            raise ValueError(
                f"Expected unique ids; the id {problem.id!r} is at {by_id[problem.id]} and at "
                f"{row.where}. Change one."
            )
        by_id[problem.id] = row.where
        where, gold = by_question.setdefault(problem.question, (row.where, problem.gold))
        if gold != problem.gold:
            raise ValueError(
                f"Expected one gold answer per question; the same question has {gold!r} at {where} "
                f"and {problem.gold!r} at {row.where}. Keep one."
            )
        if where == row.where:
            kept.append(problem)
    if repeated := len(problems) - len(kept):
        warnings.warn(f"{repeated} repeated questions were removed.", stacklevel=2)
    return kept


def _with_answer(rationale: str, gold: str, reading: Reading) -> str:
    """Return the rationale with its answer at the end; it is appended unless `extract` finds it."""
    answer = reading.extract(rationale)
    if answer is not None and reading.equal(gold, answer).equal:
        return rationale
    return f"{rationale} {reading.direct.format(answer=gold)}"


def _disjoint(
    splits: dict[str, list[Problem]], shots: Sequence[Problem]
) -> dict[str, list[Problem]]:
    """Return the splits without worked examples and without questions of other splits.

    A question in several splits stays in test, or else in validation.
    """
    seen = {shot.question for shot in shots}
    disjoint: dict[str, list[Problem]] = {}
    for name in ("test", "validation", "train"):
        if name in splits:
            disjoint[name] = [row for row in splits[name] if row.question not in seen]
            seen |= {row.question for row in splits[name]}
    if left_out := sum(map(len, splits.values())) - sum(map(len, disjoint.values())):
        warnings.warn(
            f"{left_out} questions were removed: they are worked examples or are in two splits.",
            stacklevel=2,
        )
    return disjoint


def held_out(splits: dict[str, list[Problem]], seed: int) -> dict[str, list[Problem]]:
    """Return all three splits. A missing one is drawn from the training problems: a tenth, 1 to
    500.

    Args:
        splits: problems by split; "train" is required.
        seed: random seed.

    Raises:
        ValueError: there are too few training problems.
    """
    missing = [name for name in ("test", "validation") if name not in splits]
    train = splits["train"]
    size = min(max(len(train) // 10, 1), MOST_HELD_OUT)
    if len(train) <= size * len(missing):
        why = f", of which some are drawn for {' and '.join(missing)}" if missing else ""
        raise ValueError(
            f"Expected at least {len(missing) + 1} different training questions{why}; got "
            f"{len(train)}."
        )
    drawn = random.Random(seed).sample(range(len(train)), size * len(missing))
    cut = {
        name: [train[index] for index in sorted(drawn[at * size : (at + 1) * size])]
        for at, name in enumerate(missing)
    }
    taken = set(drawn)
    rest = [problem for index, problem in enumerate(train) if index not in taken]
    return {**splits, **cut, "train": rest}


def _read_gold(written: str, reading: Reading) -> str | None:
    """Return the gold answer in a value; None if it is not of the given kind."""
    try:
        return reading.gold(written)
    except (ValueError, ArithmeticError):  # such as Python's limit on the digits of an integer
        return None


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Return the literal texts of a template, each with the column whose value follows it.

    Raises:
        ValueError: the template is invalid, names no column, or has more than a column name in
            braces (`str.format` would allocate a gigabyte for `{a!r:>1000000000}`).
    """
    expected = 'expected text with columns in braces, such as "{context}\\n{question}"'
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"template: {expected}, got {template[:200]!r} ({error}). Write {{{{ and }}}} for braces "
            "that are text."
        ) from None
    for _, name, form, conversion in parsed:
        if name is not None and (not name.strip() or form or conversion or set(name) & set(".[]{")):
            end = (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            raise ValueError(
                f"template: expected the name of a column in braces, got {{{(name + end)[:200]}}}. "
                "Conversions (!r), format specifications (:>10), attributes and indices are not "
                "supported; rename a column whose name contains such characters."
            )
    if all(name is None for _, name, _, _ in parsed):
        raise ValueError(f"template: {expected}, got {template[:200]!r}, which names no column.")
    return [(text, name) for text, name, _, _ in parsed]


def _fields(template: str) -> list[str]:
    """Return the columns that a template names."""
    return [name for _, name in _pieces(template) if name is not None]


def _question(row: Row, columns: Columns) -> str:
    if columns.template is None:
        return _text(row, columns.question)
    return "".join(
        text + (_text(row, name) if name is not None else "")
        for text, name in _pieces(columns.template)
    )


def _check_columns(row: Row, used: Iterable[str]) -> None:
    for name in used:
        if name not in row.values:
            near = difflib.get_close_matches(name, row.values, n=1, cutoff=0.4)
            raise ValueError(
                f'{row.where}: there is no column "{name}"; the columns are '
                f"{', '.join(row.values)}." + (f' Did you mean "{near[0]}"?' if near else "")
            )


def _text(row: Row, column: str) -> str:
    """Return a value as text; 18 and 18.0 are "18".

    Raises:
        ValueError: the value is empty, a list or an object.
    """
    match row.values[column]:
        case str(text) if text.strip():
            return text.strip()
        case bool(value):
            return str(value)
        case int(value):
            return str(Decimal(value))  # `str(int)` rejects more than 4,300 digits
        case (float() | Decimal()) as value if (exact := Decimal(str(value))).is_finite():
            return _number_text(exact)
        case value:
            shown = repr(value)
            raise ValueError(
                f'{row.where}: expected text or a number in the column "{column}", got '
                f"{shown[:60]}{'...' * (len(shown) > 60)}."
            )


def _number_text(value: Decimal) -> str:
    """Return a number without an exponent, unless it has more than `MOST_PLACES` places."""
    if abs(value.adjusted()) > MOST_PLACES:
        return str(value)
    text = format(value, "f")
    return (text.rstrip("0").rstrip(".") or "0") if "." in text else text

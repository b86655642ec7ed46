"""The user's own questions: a JSONL, JSON, CSV, TSV or Parquet file, or a Hub data set, by columns."""

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
MOST_PLACES = 5000


class Columns(NamedTuple):
    """Which column holds what; `template` makes the question of several columns."""

    question: str
    gold: str
    id: str | None
    rationale: str | None
    template: str | None


class Reading(NamedTuple):
    """How the answers of one kind are read, compared and stated."""

    gold: Callable[[str], str | None]
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
        path: a .jsonl, .json, .csv, .tsv or .parquet file, or the name of a Hub data set.
        question: name of the column with the question.
        gold: name of the column with the gold answer.
        id: name of the column with an identifier. Without it rows are numbered.
        rationale: name of the column with a rationale. Not every question needs one.
        kind: kind of the answers: number, choice (a letter), latex, or text.
        template: the question made of several columns, such as "{context}\\n{question}"; the two
            characters \\n are a line break, and {{ and }} are braces.
        validation, test: a file, or a split of the Hub data set. Where it is not given, a tenth of the
            questions, at least 1 and at most 500, is drawn for it by `seed`.
        config: configuration of the Hub data set, where it has several.
        split: split of the Hub data set that is read for training.
        shots: a file of worked examples with the same columns and a rationale column.
        seed: random seed for drawing the validation and test problems.
        max_tokens: maximum number of new tokens per completion.
    """
    if template is not None:
        template = template.replace("\\n", "\n")
        _pieces(template)
    columns = Columns(question, gold, id, rationale, template)
    reading = _reading(kind)
    examples = read_shots(Path(shots), columns, kind) if shots is not None else ()

    @cache
    def splits() -> dict[str, list[Problem]]:
        local = is_file(path)
        given = {"train": path if local else split, "validation": validation, "test": test}
        loaded = {
            name: _problems(
                file_rows(Path(place)) if local else hub_rows(path, config, place),
                columns,
                reading,
                name,
            )
            for name, place in given.items()
            if place is not None
        }
        return held_out(_disjoint(loaded, examples), seed)

    return Task(
        name="question_file",
        problems=lambda name: split_named(splits, name, "question_file"),
        prompt=PromptStyle(
            name="few-shot" if examples else "zero-shot", shots=lambda problem: examples
        ),
        extract=reading.extract,
        equal=reading.equal,
        hint=answer_in_brackets,
        prove=reading.prove,
        direct=reading.direct,
        instruction={"choice": LETTERED, "text": STATED}.get(kind, BOXED),
        max_tokens=max_tokens,
        facts=f"questions from {path}",
    )


def read_shots(path: Path, columns: Columns, kind: Kind) -> Sequence[Problem]:
    """The worked examples in a file; their rationales are in the column "rationale" if not named.

    A rationale that does not state its answer in the form `kind` reads gets "The answer is ...".
    """
    columns = columns._replace(rationale=columns.rationale or "rationale")
    shots = _problems(file_rows(path), columns, _reading(kind), "shot")
    if lacking := [shot.question for shot in shots if shot.rationale is None]:
        raise ValueError(
            f"{path}: expected a rationale for every worked example; {len(lacking)} have none, such as "
            f"that of {lacking[0]!r}."
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
    """A number as it is; GSM8K's "... #### 72" is 72."""
    last = gold.rpartition("####")[2].strip().removesuffix(".")
    return last if quantity(last) is not None else None


def _letter(gold: str) -> str | None:
    letter = gold.strip("(). ").upper()
    return letter if len(letter) == 1 and letter in LETTERS else None


def _chosen(completion: str) -> str | None:
    return choice_letter(completion, LETTERS)


# --- from rows to problems -----------------------------------------------------------------------


def _problems(rows: list[Row], columns: Columns, reading: Reading, split: str) -> list[Problem]:
    """The problems of a table; every gold answer that cannot be read is reported, the first five
    by name."""
    if not rows:
        raise ValueError(f"The {split} questions are empty: expected at least one row.")
    used = [columns.gold, *(name for name in (columns.id, columns.rationale) if name)]
    used += _fields(columns.template) if columns.template is not None else [columns.question]
    problems: list[Problem] = []
    unread: list[str] = []
    for index, row in enumerate(rows):
        _check_columns(row, used)
        written = _text(row, columns.gold)
        gold = _read_gold(written, reading)
        name = _text(row, columns.id) if columns.id else f"{split}-{index}"
        if gold is None:
            unread.append(f"{row.where} ({name}): {written[:60]!r}")
            continue
        problem = Problem(name, _question(row, columns), gold)
        if columns.rationale is not None and row.values.get(columns.rationale) not in (None, ""):
            worked = _with_answer(_text(row, columns.rationale), gold, reading)
            problem = replace(problem, rationale=worked)
        problems.append(problem)
    if unread:
        raise ValueError(
            f'{len(unread)} of {len(rows)} gold answers in the column "{columns.gold}" cannot be '
            f"read: {'; '.join(unread[:5])}. Correct them, or choose another kind (number, text, "
            "choice, latex)."
        )
    return _distinct(problems, rows)


def _distinct(problems: list[Problem], rows: list[Row]) -> list[Problem]:
    """The problems without repeated ones; two golds for one question, or one id twice, is an error."""
    by_id: dict[str, str] = {}
    by_question: dict[str, tuple[str, str]] = {}
    kept: list[Problem] = []
    for problem, row in zip(problems, rows, strict=True):
        if problem.id in by_id:
            raise ValueError(
                f"The id {problem.id!r} stands twice, at {by_id[problem.id]} and at {row.where}; "
                "ids must be unique."
            )
        by_id[problem.id] = row.where
        where, gold = by_question.setdefault(problem.question, (row.where, problem.gold))
        if gold != problem.gold:
            raise ValueError(
                f"The same question has two gold answers, {gold!r} at {where} and {problem.gold!r} "
                f"at {row.where}; keep one."
            )
        if where == row.where:
            kept.append(problem)
    if repeated := len(problems) - len(kept):
        warnings.warn(f"{repeated} repeated questions were left out.", stacklevel=2)
    return kept


def _with_answer(rationale: str, gold: str, reading: Reading) -> str:
    """The rationale, ending in its answer: one that does not say it in the form read gets it."""
    answer = reading.extract(rationale)
    if answer is not None and reading.equal(gold, answer).equal:
        return rationale
    return f"{rationale} {reading.direct.format(answer=gold)}"


def _disjoint(
    splits: dict[str, list[Problem]], shots: Sequence[Problem]
) -> dict[str, list[Problem]]:
    """The splits without the worked examples, and train without what is held out."""
    seen = {shot.question for shot in shots}
    disjoint: dict[str, list[Problem]] = {}
    for name in ("test", "validation", "train"):
        if name in splits:
            disjoint[name] = [row for row in splits[name] if row.question not in seen]
            seen |= {row.question for row in splits[name]}
    if left_out := sum(map(len, splits.values())) - sum(map(len, disjoint.values())):
        warnings.warn(
            f"{left_out} questions were left out: they are worked examples or stand in two splits.",
            stacklevel=2,
        )
    return disjoint


def held_out(splits: dict[str, list[Problem]], seed: int) -> dict[str, list[Problem]]:
    """All three splits: a missing one is a tenth of the training problems, 1 to 500 of them."""
    missing = [name for name in ("test", "validation") if name not in splits]
    train = splits["train"]
    size = min(max(len(train) // 10, 1), MOST_HELD_OUT)
    if len(train) <= size * len(missing):
        why = f", to hold some out for {' and '.join(missing)}" if missing else ""
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
    """The gold answer in a value; None where it cannot be read."""
    try:
        return reading.gold(written)
    except (ValueError, ArithmeticError):  # such as Python's limit on the digits of a number
        return None


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The template's literal texts, each with the column whose value follows it.

    Raises:
        ValueError: it is no template, names no column, or has more in braces than a column's name;
            `str.format` would give `{a!r:>1000000000}` a gigabyte.
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
                "supported; rename a column whose name holds such characters."
            )
    if all(name is None for _, name, _, _ in parsed):
        raise ValueError(f"template: {expected}, got {template[:200]!r}, which names no column.")
    return [(text, name) for text, name, _, _ in parsed]


def _fields(template: str) -> list[str]:
    """The columns a template names."""
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
    """A value as text: 18 and 18.0 are "18"; an empty one, a list or an object is an error."""
    match row.values[column]:
        case str(text) if text.strip():
            return text.strip()
        case bool(value):
            return str(value)
        case int(value):
            return str(Decimal(value))  # Python's own conversion refuses 4,300 digits
        case (float() | Decimal()) as value if (exact := Decimal(str(value))).is_finite():
            return _number_text(exact)
        case value:
            shown = repr(value)
            raise ValueError(
                f'{row.where}: expected text or a number in the column "{column}", got '
                f"{shown[:60]}{'...' * (len(shown) > 60)}."
            )


def _number_text(value: Decimal) -> str:
    """A number written out in full; one of more than `MOST_PLACES` places stays in powers of ten."""
    if abs(value.adjusted()) > MOST_PLACES:
        return str(value)
    text = format(value, "f")
    return (text.rstrip("0").rstrip(".") or "0") if "." in text else text

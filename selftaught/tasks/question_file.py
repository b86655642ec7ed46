"""The user's own questions: a JSONL, JSON, CSV or Parquet file, or a Hub data set, by column names.

Also the door through which every task reads rows from files and from the Hub.
"""

import codecs
import csv
import difflib
import io
import json
import random
import string
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from selftaught.answers import (
    Verdict,
    after_answer_is,
    after_marker,
    choice_letter,
    first_number,
    last_boxed,
    quantity,
    same_choice,
    same_number,
    same_text,
)
from selftaught.prompts import PromptStyle
from selftaught.records import Problem, parse_json_line
from selftaught.tasks.base import Task

Kind = Literal["number", "text", "choice", "latex"]
LETTERS = string.ascii_uppercase
MOST_HELD_OUT = 500
ENDINGS = (".jsonl", ".json", ".csv", ".parquet")


class Row(NamedTuple):
    """One row of a table, and where it stands, for messages."""

    where: str
    values: dict[str, Any]


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
        path: a .jsonl, .json, .csv or .parquet file, or the name of a Hub data set.
        question, gold, id, rationale: names of columns; without `id` rows are numbered.
        kind: what the answers are; a number, a choice letter, LaTeX, or other text.
        template: the question made of several columns, such as "{context}\\n{question}".
        validation, test: files, or splits of the Hub data set. Where one is not given, a tenth of
            the questions, at least 1 and at most 500, is drawn for it by `seed`.
        config, split: of the Hub data set.
        shots: a file of worked examples with the same columns and a rationale column.
        max_tokens: room for one rationale.
    """
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
        hint=hint,
        prove=reading.prove,
        direct=reading.direct,
        max_tokens=max_tokens,
        facts=f"questions from {path}",
    )


def read_shots(path: Path, columns: Columns, kind: Kind) -> Sequence[Problem]:
    """The worked examples in a file; their rationales are in the column "rationale" if not named.

    A rationale that does not state its answer in the form `kind` reads gets "The answer is ...".
    """
    columns = columns._replace(rationale=columns.rationale or "rationale")
    return _problems(file_rows(path), columns, _reading(kind), "shot")


def hint(problem: Problem) -> Problem:
    """The problem with its answer in brackets after the question."""
    return replace(problem, question=f"{problem.question} ({problem.gold})", rationale=None)


# --- answers of each kind ------------------------------------------------------------------------


def _reading(kind: Kind) -> Reading:
    match kind:
        case "number":
            return Reading(_number, marked_number, same_number, "The answer is {answer}.")
        case "choice":
            return Reading(_letter, _chosen, same_choice, "The answer is ({answer}).")
        case "text":
            return Reading(lambda gold: gold, stated, same_text, "The answer is {answer}.")
        case "latex":
            from selftaught.tasks.competition_math import equal, extract, prove

            boxed = "The answer is \\boxed{{{answer}}}."
            return Reading(lambda gold: last_boxed(gold) or gold, extract, equal, boxed, prove)
        case _:
            raise ValueError(f"kind must be number, text, choice or latex; got {kind!r}.")


def marked_number(completion: str) -> str | None:
    """The number a completion marks as its answer: after "####", in a box, or after "answer is".

    A completion that is nothing but a number is one too. Any other has no answer: taking its last
    number would let rationales into the training set that never came to an end, and would be right
    by accident more often.
    """
    alone = completion.strip().removesuffix(".")
    if first_number(alone) == alone:
        return alone
    if "####" in completion:
        return first_number(after_marker(completion, "####") or "")
    for place in (last_boxed(completion), after_answer_is(completion)):
        # "The answer is 12 + 7 = 19." states 19
        if place and (number := first_number(place.rpartition("=")[2])):
            return number
    return None


def stated(completion: str) -> str | None:
    """The text after "the answer is"; the whole completion where it is a single line without it."""
    text = completion.strip()
    alone = text.removesuffix(".") if "\n" not in text else ""
    return last_boxed(text) or after_answer_is(text) or alone or None


def _number(gold: str) -> str | None:
    """A number as it is; GSM8K's "... #### 72" is 72."""
    last = gold.rpartition("####")[2].strip()
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
        gold = reading.gold(written)
        name = _text(row, columns.id) if columns.id else f"{split}-{index}"
        if gold is None:
            unread.append(f"{row.where} ({name}): {written[:60]!r}")
            continue
        problem = Problem(name, _question(row, columns), gold)
        if columns.rationale is not None:
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


def split_named(
    splits: Callable[[], dict[str, list[Problem]]], split: str, task: str
) -> list[Problem]:
    """The problems of a split; an unknown name is an error that names those there are."""
    if split not in ("train", "validation", "test"):
        raise ValueError(f"{task} has the splits train, validation and test; got {split!r}.")
    return splits()[split]


def _fields(template: str) -> list[str]:
    """The columns a template names."""
    return [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]


def _question(row: Row, columns: Columns) -> str:
    if columns.template is None:
        return _text(row, columns.question)
    return columns.template.format(**{name: _text(row, name) for name in _fields(columns.template)})


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
        case float(value) if value == value and value.is_integer():
            return str(int(value))
        case (int() | float() | Decimal()) as value if value == value:
            return str(value)
        case value:
            raise ValueError(
                f'{row.where}: expected text or a number in the column "{column}", got {value!r}.'
            )


# --- from files and the Hub to rows --------------------------------------------------------------


def is_file(path: str) -> bool:
    """Whether a path names a file of ours rather than something on the Hub."""
    return Path(path).suffix.lower() in ENDINGS or Path(path).exists()


def file_rows(path: Path) -> list[Row]:
    """The rows of a file, by its ending.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: its ending or its content is not that of a table, or it is empty; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}; check the path.")
    match path.suffix.lower():
        case ".jsonl":
            rows = _jsonl_rows(path)
        case ".json":
            rows = _json_rows(path)
        case ".csv":
            rows = _csv_rows(path)
        case ".parquet":
            rows = _parquet_rows(path)
        case _:
            raise ValueError(f"{path}: expected a file that ends in {', '.join(ENDINGS)}.")
    if not rows:
        raise ValueError(f"{path} is empty: expected at least one row.")
    return rows


def _jsonl_rows(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            rows.append(Row(where, parse_json_line(line, where)))
    return rows


def _json_rows(path: Path) -> list[Row]:
    try:
        listed = json.loads(_decoded(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: expected a JSON list of objects, got {error}.") from None
    if not isinstance(listed, list) or not all(isinstance(row, dict) for row in listed):
        raise ValueError(
            f"{path}: expected a JSON list of objects, one per question; for one object per line "
            "name the file .jsonl."
        )
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(listed, 1)]


def _csv_rows(path: Path) -> list[Row]:
    reader = csv.reader(io.StringIO(_decoded(path), newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if not header:
                header = values
                if len(set(header)) < len(header):
                    raise ValueError(f"{where}: a column name stands twice: {', '.join(header)}.")
            elif values and len(values) != len(header):
                raise ValueError(
                    f"{where}: expected {len(header)} values, as in the first line, got "
                    f"{len(values)}; put values that hold commas in double quotes."
                )
            elif values:
                rows.append(Row(where, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: expected CSV, got {error}.") from None
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        listed = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: expected a Parquet file, got: {error}") from None
    return [Row(f"{path}, row {number}", row) for number, row in enumerate(listed, 1)]


def _decoded(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: expected UTF-8 text, got byte {raw[error.start]:#04x}; convert "
            "the file to UTF-8."
        ) from None


def hub_rows(name: str, config: str | None, split: str) -> list[Row]:
    """The rows of one split of a Hub data set.

    Raises:
        FileNotFoundError: the Hub cannot be reached, or has no such data set.
        ValueError: the data set has no such config or split.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"The data set {name!r} is neither a file here nor could it be loaded from the Hub "
            f"({error}); check the name and the connection, or give the path of a local copy."
        ) from error
    return [Row(f"{name}, {split}, row {number}", dict(row)) for number, row in enumerate(rows, 1)]

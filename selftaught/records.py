"""The records that travel between stages, and their JSONL form.

Every file of a run is made of these. They are frozen: change one with `dataclasses.replace`.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

Message = dict[str, str]
Text = str | list[Message]
"""What a model sees: plain text, or messages with `role` and `content` (TRL's two formats)."""

Origin = Literal["sampled", "rationalized", "gold"]
FinishReason = Literal["stop", "length"]
Outcome = Literal["right", "wrong", "no answer", "cut by length", "ungradable"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "no answer", "cut by length", "ungradable")


@dataclass(frozen=True)
class Problem:
    """One question with its gold answer; `rationale` where the data has a worked solution."""

    id: str
    question: str
    gold: str
    rationale: str | None = None


@dataclass(frozen=True)
class Completion:
    """The text a model returned, without the stop string or end-of-text token that ended it."""

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] | None = None
    """Every token generated, the ones that ended it included."""
    thought_open: bool = False
    """Whether the prompt, as the chat template wrote it, ends inside a thought."""


@dataclass(frozen=True)
class Rollout:
    """One problem, one prompt, one completion, and, once graded, its outcome."""

    problem: Problem
    prompt: Text
    completion: str
    finish_reason: FinishReason
    model: str
    index: int
    """Which of the problem's samples this is, from 0."""
    origin: Origin = "sampled"
    token_ids: tuple[int, ...] | None = None
    answer: str | None = None
    outcome: Outcome | None = None
    decided_by: str | None = None
    """The stage of the grading cascade that gave the outcome."""
    thought_open: bool = False
    """Whether the prompt, as the chat template wrote it, ends inside a thought."""

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right; None until graded."""
        return None if self.outcome is None else self.outcome == "right"


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to imitate; the names are TRL's columns."""

    prompt: Text
    completion: Text
    completion_ids: tuple[int, ...] | None = None
    """The tokens that were sampled, with those that ended them; None: tokenize the text."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template, for messages."""


@dataclass(frozen=True)
class Preference:
    """A prompt, a better and a worse completion; the names are TRL's columns.

    Where token ids are given, they are what is learned from, to the token: nothing is added at their
    end, and `chosen` and `rejected` are there to be read.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    begun: tuple[int, ...] = ()
    """Tokens of the completion that stand before both, and bear no loss."""
    chosen_ids: tuple[int, ...] | None = None
    rejected_ids: tuple[int, ...] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template, for messages."""


def to_json(record: Rollout | Example | Preference | Problem) -> str:
    """One line of JSON for one record."""
    return _ENCODED(record)


def plain_fields(record: Any) -> dict[str, Any]:
    """Return the fields of a record in their order; those of `OPTIONAL` only where they are set.

    `asdict` would copy each in depth first.
    """
    fields = vars(record)
    if isinstance(record, Rollout) and not record.thought_open:
        return {name: value for name, value in fields.items() if name != "thought_open"}
    if isinstance(record, Rollout | Problem):
        return fields
    return {
        name: value for name, value in fields.items() if value is not None or name not in OPTIONAL
    }


OPTIONAL = frozenset(("completion_ids", "chat_template_kwargs"))
"""Columns that files of examples and preferences have only where there is a value."""
_ENCODED: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, default=plain_fields).encode


def rollout_from(row: dict[str, Any]) -> Rollout:
    """The rollout that `to_json` wrote as `row`."""
    return _Sharing().rollout(row)


class _Sharing:
    """Rollouts of rows that have in common what is equal in them.

    Neighbours have their prompt and problem, which a store repeats in every row; all have token ids
    and short words. So a rollout of 100 tokens takes a fifth of the memory.
    """

    def __init__(self) -> None:
        self._prompt: Text = ""
        self._told: object = None
        self._problem = Problem("", "", "")
        self._same: dict[Any, Any] = {}

    def rollout(self, row: dict[str, Any]) -> Rollout:
        """The rollout that `to_json` wrote as `row`."""
        fields, same = dict(row), self._same
        if row["problem"] != self._told:
            self._told, self._problem = row["problem"], Problem(**row["problem"])
        fields["problem"] = self._problem
        if fields.get("prompt") == self._prompt:
            fields["prompt"] = self._prompt
        self._prompt = fields.get("prompt", "")
        for name in ("model", "finish_reason", "origin", "outcome", "decided_by"):
            if isinstance(word := fields.get(name), str):
                fields[name] = same.setdefault(word, word)
        if fields.get("token_ids") is not None:
            ids = fields["token_ids"]
            plain = set(map(type, ids)) <= {int}  # True and 1.0 are equal to 1, and not it
            fields["token_ids"] = tuple(map(same.setdefault, ids, ids) if plain else ids)
        return Rollout(**fields)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one per non-empty line.

    Raises:
        ValueError: a line is not UTF-8 or not a JSON object; says the file and the line number.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse_json_line(line, f"{path}, line {number}")


def read_examples(path: Path) -> list["Example"]:
    """The examples of a JSONL file.

    Raises:
        ValueError: a row lacks the columns prompt or completion, or its optional columns
            completion_ids or chat_template_kwargs hold something else than token ids and variables;
            says which and what there is.
    """
    examples = []
    for number, row in enumerate(read_jsonl(path), 1):
        if missing := {"prompt", "completion"} - set(row):
            raise ValueError(
                f"{path}: expected the columns prompt and completion; {', '.join(sorted(missing))} "
                f"is missing among {', '.join(row)}."
            )
        where = f"{path}, row {number}"
        examples.append(
            Example(
                row["prompt"], row["completion"], _ids_in(row, where), _template_options(row, where)
            )
        )
    return examples


def _ids_in(row: dict[str, Any], where: str) -> tuple[int, ...] | None:
    """Return the token ids of a row's column completion_ids, or None where it has none."""
    ids = row.get("completion_ids")
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(one) is int and one >= 0 for one in ids):
        raise ValueError(
            f"{where}: expected a list of token ids in the column completion_ids; got "
            f"{str(ids)[:60]!r}. Correct it or leave the column out."
        )
    return tuple(ids)


def _template_options(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Return the variables of a row's column chat_template_kwargs, or None where it has none."""
    options = row.get("chat_template_kwargs")
    if options is None or isinstance(options, dict):
        return options or None
    raise ValueError(
        f"{where}: expected an object in the column chat_template_kwargs; got {str(options)[:60]!r}. "
        "Correct it or leave the column out."
    )


def read_preferences(path: Path) -> list["Preference"]:
    """The preferences of a JSONL file: texts or messages, with token ids where it has them.

    Raises:
        ValueError: a row lacks the columns prompt, chosen or rejected; says which and what there is.
    """
    preferences = []
    for number, row in enumerate(read_jsonl(path), 1):
        if missing := {"prompt", "chosen", "rejected"} - set(row):
            raise ValueError(
                f"{path}: expected the columns prompt, chosen and rejected; "
                f"{', '.join(sorted(missing))} is missing among {', '.join(row)}."
            )
        ids = [row.get(name) for name in ("chosen_ids", "rejected_ids")]
        preferences.append(
            Preference(
                row["prompt"], row["chosen"], row["rejected"], tuple(row.get("begun") or ()),
                *(None if one is None else tuple(one) for one in ids),
                chat_template_kwargs=_template_options(row, f"{path}, row {number}"),
            )
        )  # fmt: skip
    return preferences


def parse_json_line(
    line: bytes, where: str, *, parse: Callable[[str], Any] = json.loads
) -> dict[str, Any]:
    """The JSON object in one line of bytes; `where` names the line in the error.

    Args:
        parse: decodes the JSON; its ValueErrors are raised with `where` before them.
    """
    try:
        row = parse(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: expected UTF-8 text, got byte {line[error.start]:#04x} at column "
            f"{error.start + 1}; convert the file to UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where}: expected one JSON object per line, got {error.msg} at column {error.colno}; "
            "correct or remove the line."
        ) from None
    except RecursionError:
        raise ValueError(f"{where}: the JSON is nested too deeply to read.") from None
    except ValueError as error:  # such as a whole number of more than 4,300 digits
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return row


@contextmanager
def whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to write, which is at `path` in full when the block has ended, or not at all.

    A lone surrogate, which UTF-8 cannot hold, becomes an escape that JSON reads back as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None and error.errno is not None:
            error.filename = str(path)  # of a full disk the system does not say where it is
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file so that it is there in full or not at all; see `whole_file`."""
    with whole_file(path) as file:
        file.write(text)


def write_jsonl(path: Path, records: Iterable[Rollout | Example | Preference | Problem]) -> int:
    """Write records, one per line, as a whole file or not at all; returns how many there were."""
    count = 0
    with whole_file(path) as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    return count


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a store or of a graded file; a store's header line is passed over.

    Raises:
        ValueError: a line is no rollout; says the file and which.
    """
    return list(iter_rollouts(path))


def iter_rollouts(path: Path) -> Iterator[Rollout]:
    """`read_rollouts`, one at a time: for files that need not fit into memory."""
    with path.open("rb") as file:
        yield from rollouts_in(file, f"{path}, line ")


def rollouts_in(lines: Iterable[bytes], where: str, first: int = 1) -> Iterator[Rollout]:
    """The rollouts of some lines of a store or of a graded file.

    Args:
        where: what stands before a line's number in an error.
        first: the number of the first of the lines; a header is passed over where that is 1.

    Raises:
        ValueError: a line is no rollout; says which.
    """
    sharing = _Sharing()
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        row = parse_json_line(line, f"{where}{number}")
        if number == 1 and "format" in row:
            continue
        try:
            yield sharing.rollout(row)
        except (KeyError, TypeError):
            raise ValueError(
                f"{where}{number}: expected a rollout (problem, prompt, completion, ...), "
                f"got an object with {', '.join(row) or 'nothing in it'}."
            ) from None

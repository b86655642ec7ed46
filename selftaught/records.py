"""Records that are passed between stages, and their JSONL format.

Every data file of a run contains these records. They are frozen dataclasses: use
`dataclasses.replace` to change one.
"""

import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO, TypeGuard, cast

from selftaught.deprecation import renamed_parameter, warn_renamed

Message = dict[str, str]
Text = str | list[Message]
"""A prompt or completion: plain text, or messages with `role` and `content` (TRL's two formats)."""

Origin = Literal["sampled", "rationalized", "gold"]
FinishReason = Literal["stop", "length"]
Outcome = Literal["right", "wrong", "no answer", "cut by length", "ungradable"]
OUTCOMES: tuple[Outcome, ...] = ("right", "wrong", "no answer", "cut by length", "ungradable")


@dataclass(frozen=True)
class Problem:
    """A question with its reference answer."""

    id: str
    question: str
    gold: str
    """The reference answer."""
    rationale: str | None = None
    """A worked solution, if the data set has one."""
    tests: str = ""
    """Tests of a program, as JSON, for tasks whose answers are programs; see `tasks.programs.ProblemTests`."""


@dataclass(frozen=True)
class Completion:
    """The text that a model returned, without the stop string or end-of-text token."""

    text: str
    finish_reason: FinishReason
    token_ids: tuple[int, ...] | None = None
    """All generated token ids, including the end token or stop string."""
    thought_open: bool = False
    """Whether the prompt, as rendered by the chat template, ends inside a thought."""


@dataclass(frozen=True)
class Rollout:
    """A problem, its prompt, one completion and, after grading, the outcome."""

    problem: Problem
    prompt: Text
    completion: str
    finish_reason: FinishReason
    model: str
    index: int
    """Index of this sample among the samples of the problem, from 0."""
    origin: Origin = "sampled"
    token_ids: tuple[int, ...] | None = None
    answer: str | None = None
    outcome: Outcome | None = None
    decided_by: str | None = None
    """The stage of the grading cascade that determined the outcome."""
    thought_open: bool = False
    """Whether the prompt, as rendered by the chat template, ends inside a thought."""

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right; None before grading."""
        return None if self.outcome is None else self.outcome == "right"


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to train on; the field names are TRL's column names."""

    prompt: Text
    completion: Text
    completion_ids: tuple[int, ...] | None = None
    """The sampled token ids, including the ending. None means the text is tokenized."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template. Used only for messages."""


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected completion; the field names are TRL's column names.

    If token ids are given, training uses exactly these ids and adds no end token. `chosen` and
    `rejected` are then only for reading.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    prefix_tokens: tuple[int, ...] = ()
    """Token ids of the completion that both sides share. They are excluded from the loss. The column
    in files is "begun"."""
    chosen_ids: tuple[int, ...] | None = None
    rejected_ids: tuple[int, ...] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template. Used only for messages."""

    @property
    def begun(self) -> tuple[int, ...]:
        """Old name of `prefix_tokens`."""
        warn_renamed("begun", "prefix_tokens")
        return self.prefix_tokens


_with_old_name = renamed_parameter("begun", "prefix_tokens")
Preference.__init__ = _with_old_name(Preference.__init__)  # type: ignore[method-assign]


def to_json(record: Rollout | Example | Preference | Problem) -> str:
    """Return a record as one line of JSON."""
    return _ENCODED(record)


def plain_fields(record: object) -> dict[str, Any]:
    """Return the fields of a record in order; fields in `OPTIONAL`, and a problem's tests, only if
    they are set.

    `dataclasses.asdict` is not used because it makes deep copies.
    """
    fields: dict[str, Any] = vars(record)
    if isinstance(record, Problem) and not record.tests:
        return {name: value for name, value in fields.items() if name != "tests"}
    if isinstance(record, Rollout) and not record.thought_open:
        return {name: value for name, value in fields.items() if name != "thought_open"}
    if isinstance(record, Rollout | Problem):
        return fields
    return {
        COLUMNS.get(name, name): value
        for name, value in fields.items()
        if value is not None or name not in OPTIONAL
    }


OPTIONAL = frozenset(("completion_ids", "chat_template_kwargs"))
"""Columns of examples and preferences that are written only if they have a value."""
COLUMNS: dict[str, str] = {"prefix_tokens": "begun"}
"""Columns with another name than the field, so that files can be read by earlier versions."""
_ENCODED: Callable[[object], str] = json.JSONEncoder(
    ensure_ascii=False, default=plain_fields
).encode


def rollout_from(row: dict[str, Any]) -> Rollout:
    """Return the rollout for a JSON row written by `to_json`."""
    return _RolloutParser().rollout(row)


class _RolloutParser:
    """Converts JSON rows to rollouts and shares equal values between them to save memory.

    A store repeats the prompt and problem in every row of a problem, and many rows have the same
    token ids and short strings. A rollout of 100 tokens takes a fifth of the memory this way.
    """

    def __init__(self) -> None:
        self._prompt: Text = ""
        self._problem_row: object = None
        self._problem = Problem("", "", "")
        self._same: dict[Any, Any] = {}

    def rollout(self, row: dict[str, Any]) -> Rollout:
        """Return the rollout for a JSON row written by `to_json`."""
        fields, same = dict(row), self._same
        if row["problem"] != self._problem_row:
            self._problem_row, self._problem = row["problem"], Problem(**row["problem"])
        fields["problem"] = self._problem
        if fields.get("prompt") == self._prompt:
            fields["prompt"] = self._prompt
        self._prompt = fields.get("prompt", "")
        for name in ("model", "finish_reason", "origin", "outcome", "decided_by"):
            if isinstance(word := fields.get(name), str):
                fields[name] = same.setdefault(word, word)
        if fields.get("token_ids") is not None:
            ids = fields["token_ids"]
            plain = set(map(type, ids)) <= {int}  # True and 1.0 equal 1 as keys
            fields["token_ids"] = tuple(map(same.setdefault, ids, ids) if plain else ids)
        return Rollout(**fields)


def read_jsonl(path: Path | str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a JSONL file, one per non-empty line.

    Raises:
        ValueError: A line is not UTF-8 or not a JSON object. The message has file and line number.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield parse_json_line(line, f"{path}, line {number}")


def read_examples(path: Path | str) -> list[Example]:
    """Read the examples of a JSONL file.

    Raises:
        ValueError: A row has no column "prompt" or "completion", or "completion_ids" is not a list
            of token ids, or "chat_template_kwargs" is not an object.
    """
    examples: list[Example] = []
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
    """Return the token ids in the column completion_ids, or None if the row has none."""
    ids: object = row.get("completion_ids")
    if ids is None:
        return None
    if not _is_token_ids(ids):
        raise ValueError(
            f"{where}: expected a list of token ids in the column completion_ids; got "
            f"{str(ids)[:60]!r}. Correct or remove the column."
        )
    return tuple(ids)


def _is_token_ids(value: object) -> TypeGuard[list[int]]:
    """Return whether a JSON value is a list of token ids: non-negative integers, no Booleans."""
    return isinstance(value, list) and all(
        type(token) is int and token >= 0 for token in cast("list[object]", value)
    )


def _template_options(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    """Return the variables in the column chat_template_kwargs, or None if the row has none."""
    options: object = row.get("chat_template_kwargs")
    if options is None:
        return None
    if _is_object(options):
        return options or None
    raise ValueError(
        f"{where}: expected an object in the column chat_template_kwargs; got "
        f"{str(options)[:60]!r}. Correct or remove the column."
    )


def read_preferences(path: Path) -> list[Preference]:
    """Read the preferences of a JSONL file: texts or messages, optionally with token ids.

    Raises:
        ValueError: A row has no column "prompt", "chosen" or "rejected".
    """
    preferences: list[Preference] = []
    for number, row in enumerate(read_jsonl(path), 1):
        if missing := {"prompt", "chosen", "rejected"} - set(row):
            raise ValueError(
                f"{path}: expected the columns prompt, chosen and rejected; "
                f"{', '.join(sorted(missing))} is missing among {', '.join(row)}."
            )
        ids = [row.get(name) for name in ("chosen_ids", "rejected_ids")]
        prefix = tuple(row.get("prefix_tokens") or row.get("begun") or ())
        preferences.append(
            Preference(
                row["prompt"], row["chosen"], row["rejected"], prefix,
                *(None if one is None else tuple(one) for one in ids),
                chat_template_kwargs=_template_options(row, f"{path}, row {number}"),
            )
        )  # fmt: skip
    return preferences


def parse_json_line(
    line: bytes, where: str, *, parse: Callable[[str], Any] = json.loads
) -> dict[str, Any]:
    """Parse a line of bytes that contains one JSON object.

    Args:
        line: UTF-8 bytes.
        where: Name of the line in error messages, such as "file.jsonl, line 3".
        parse: JSON parser. Its ValueErrors are raised again with `where` as a prefix.

    Raises:
        ValueError: The line is not UTF-8 or not a JSON object.
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
    except ValueError as error:  # such as an integer of more than 4,300 digits
        raise ValueError(f"{where}: {error}") from None
    if not _is_object(row):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return row


def _is_object(value: object) -> TypeGuard[dict[str, Any]]:
    """Return whether a parsed JSON value is an object; the keys of an object are always strings."""
    return isinstance(value, dict)


@contextmanager
def whole_file(path: Path) -> Generator[TextIO]:
    """Context manager for writing a text file atomically: `path` is replaced when the block ends.

    If the block raises, `path` is unchanged. A lone surrogate, which UTF-8 cannot encode, is
    written as an escape sequence that a JSON parser decodes to the same character.
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
            error.filename = str(path)  # the system does not name the file
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write a text file atomically; see `whole_file`."""
    with whole_file(path) as file:
        file.write(text)


def write_jsonl(path: Path, records: Iterable[Rollout | Example | Preference | Problem]) -> int:
    """Write records to a JSONL file atomically; return the number of records."""
    count = 0
    with whole_file(path) as file:
        for record in records:
            file.write(to_json(record) + "\n")
            count += 1
    return count


def read_rollouts(path: Path | str) -> list[Rollout]:
    """Read the rollouts of a store or a graded file. A store's header line is skipped.

    Raises:
        ValueError: A line is not a rollout. The message has the file and line number.
    """
    return list(iter_rollouts(path))


def iter_rollouts(path: Path | str) -> Iterator[Rollout]:
    """Yield the rollouts of a file as `read_rollouts` does, without loading the whole file."""
    with Path(path).open("rb") as file:
        yield from rollouts_in(file, f"{path}, line ")


def rollouts_in(lines: Iterable[bytes], where: str, first: int = 1) -> Iterator[Rollout]:
    """Yield the rollouts in lines of a store or a graded file.

    Args:
        lines: Lines as UTF-8 bytes.
        where: Text before the line number in error messages, such as "file.jsonl, line ".
        first: Number of the first line. If it is 1, a store's header line is skipped.

    Raises:
        ValueError: A line is not a rollout. The message has the line number.
    """
    parser = _RolloutParser()
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        row = parse_json_line(line, f"{where}{number}")
        if number == 1 and "format" in row:
            continue
        try:
            yield parser.rollout(row)
        except (KeyError, TypeError):
            raise ValueError(
                f"{where}{number}: expected a rollout (problem, prompt, completion, ...), "
                f"got an object with the keys {', '.join(row) or '(none)'}."
            ) from None

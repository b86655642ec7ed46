"""The records that travel between stages, and their JSONL form.

Every file of a run is made of these. They are frozen: change one with `dataclasses.replace`.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

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

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right; None until graded."""
        return None if self.outcome is None else self.outcome == "right"


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to imitate; the names are TRL's columns."""

    prompt: Text
    completion: Text


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


def to_json(record: Rollout | Example | Preference | Problem) -> str:
    """One line of JSON for one record."""
    return json.dumps(asdict(record), ensure_ascii=False)


def rollout_from(row: dict[str, Any]) -> Rollout:
    """The rollout that `to_json` wrote as `row`."""
    fields = dict(row, problem=Problem(**row["problem"]))
    if row.get("token_ids") is not None:
        fields["token_ids"] = tuple(row["token_ids"])
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
        ValueError: a row lacks the columns prompt or completion; says which and what there is.
    """
    examples = []
    for row in read_jsonl(path):
        if missing := {"prompt", "completion"} - set(row):
            raise ValueError(
                f"{path}: expected the columns prompt and completion; {', '.join(sorted(missing))} "
                f"is missing among {', '.join(row)}."
            )
        examples.append(Example(row["prompt"], row["completion"]))
    return examples


def read_preferences(path: Path) -> list["Preference"]:
    """The preferences of a JSONL file: texts or messages, with token ids where it has them.

    Raises:
        ValueError: a row lacks the columns prompt, chosen or rejected; says which and what there is.
    """
    preferences = []
    for row in read_jsonl(path):
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
            )
        )  # fmt: skip
    return preferences


def parse_json_line(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object in one line of bytes; `where` names the line in the error."""
    try:
        row = json.loads(line.decode("utf-8"))
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
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}.")
    return row


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file so that it is there in full or not at all.

    A lone surrogate, which UTF-8 cannot hold, becomes an escape that JSON reads back as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_jsonl(path: Path, records: Iterable[Rollout | Example | Preference | Problem]) -> None:
    """Write records, one per line, as a whole file or not at all."""
    write_atomically(path, "".join(to_json(record) + "\n" for record in records))


def read_rollouts(path: Path) -> list[Rollout]:
    """The rollouts of a store or of a graded file; a store's header line is passed over.

    Raises:
        ValueError: a line is no rollout; says the file and which.
    """
    rollouts = []
    for number, row in enumerate(read_jsonl(path), 1):
        if number == 1 and "format" in row:
            continue
        try:
            rollouts.append(rollout_from(row))
        except (KeyError, TypeError):
            raise ValueError(
                f"{path}, record {number}: expected a rollout (problem, prompt, completion, ...), "
                f"got an object with {', '.join(row) or 'nothing in it'}."
            ) from None
    return rollouts

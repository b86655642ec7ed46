"""Grades stored beside rollouts."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

from selftaught.records import Outcome, Rollout, iter_rollouts, to_json, whole_file
from selftaught.rollouts.grading import grade
from selftaught.tasks.base import Task

logger = logging.getLogger(__name__)

GRADED_FORMAT = "selftaught graded rollouts 2"


def graded_beside(store: Path, rollouts: Sequence[Rollout], task: Task) -> list[Rollout]:
    """Return the rollouts of a store, graded; the grades are stored in `graded_path(store)`.

    Stored grades are used again if they were given by the same task with the same options and the
    same version of the grading rules (`Task.grading_key`). Only the grades of the stored rollouts
    are kept in memory, not their texts.
    """
    path, key = graded_path(store), task.grading_key
    stored: dict[bytes, _Grade] = {}
    if path.exists() and _grading_key(path) == key:
        stored = {_identity(one): _Grade.of(one) for one in iter_rollouts(path)}
    elif path.exists():
        logger.warning(
            "The grades in %s were given by another task, other task options or an earlier version of the "
            "grading rules. All grades are computed again.", path,
        )  # fmt: skip
    names = [_identity(one) for one in rollouts]
    fresh = {name: one for name, one in zip(names, rollouts, strict=True) if name not in stored}
    for name, one in zip(fresh, grade(list(fresh.values()), task), strict=True):
        stored[name] = _Grade.of(one)
    graded = [
        replace(one, **stored[name]._asdict()) for name, one in zip(names, rollouts, strict=True)
    ]
    if fresh or not path.exists():
        _write_graded(path, graded, key)
    return graded


def _grading_key(path: Path) -> str | None:
    """Return the key of the grading rules of a file; None if it has none."""
    with path.open("rb") as file:
        first = file.readline()
    try:
        header = json.loads(first)
    except ValueError:
        return None
    return header.get("grading") if isinstance(header, dict) and "format" in header else None


def _write_graded(path: Path, graded: Iterable[Rollout], key: str) -> None:
    """Write a header with the key of the grading rules, then the graded rollouts."""
    with whole_file(path) as file:
        file.write(json.dumps({"format": GRADED_FORMAT, "grading": key}) + "\n")
        for one in graded:
            file.write(to_json(one) + "\n")


class _Grade(NamedTuple):
    """The fields that grading adds to a rollout."""

    answer: str | None
    outcome: Outcome | None
    decided_by: str | None

    @classmethod
    def of(cls, rollout: Rollout) -> Self:
        return cls(rollout.answer, rollout.outcome, rollout.decided_by)


def graded_path(store: Path) -> Path:
    """Return the path of a store's graded rollouts: `validation.jsonl` ->
    `validation.graded.jsonl`."""
    return store.with_name(f"{store.stem}.graded.jsonl")


def _identity(rollout: Rollout) -> bytes:
    """Return a hash of a rollout's index and of everything that its grade depends on."""
    problem = rollout.problem
    graded = (problem.id, problem.gold, rollout.index, rollout.finish_reason, rollout.completion,
              rollout.thought_open)  # fmt: skip
    return hashlib.blake2b(repr(graded).encode(), digest_size=16).digest()

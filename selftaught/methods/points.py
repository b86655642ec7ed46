"""The files of a run as points for experiment trackers.

Every row of `metrics.jsonl` is a step: an iteration of STaR, or the number of the row. The steps of a
fine-tuning have tags of their own, such as `train/iteration-2/loss`, so that the curves of two
iterations do not overwrite each other.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from selftaught.evaluation.evaluator import Evaluation
from selftaught.records import OUTCOMES
from selftaught.reports.paired import outcomes, paired
from selftaught.runs.folder import Row, read_json, read_rows
from selftaught.runs.trackers import Point, tag
from selftaught.training.trainer import LOGGED

DROPPED = (
    *(outcome for outcome in OUTCOMES if outcome != "right"),
    "a wrong equation", "the same text again", "too long",
)  # fmt: skip
"""Reasons why completions of STaR are not learned from. A row has only those that occurred."""
SPLITS = ("validation", "test")
OWN = ("iteration", "funnel", "choices", *SPLITS)
"""Fields of a row that are not copied as they are."""


class RunPoints:
    """Reads the points of a run folder; every call returns those that are new."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: list[Row] = []
        self._read: dict[Path, tuple[int, int]] = {}
        self._logged: dict[str, int] = {}
        """Last step of every fine-tuning."""

    def __call__(self) -> list[Point]:
        points = []
        if self._changed(self._folder / "metrics.jsonl"):
            rows = read_rows(self._folder / "metrics.jsonl")
            for number in range(len(self._rows), len(rows)):
                points += self._row(rows, number)
            self._rows = rows
        if self._changed(self._folder / "summary.json"):
            points += summary_points(self._folder)
        return [*points, *self._running()]

    def _changed(self, path: Path) -> bool:
        """Return whether a file is new or was written since the last call."""
        try:
            found = path.stat()
        except OSError:
            return False
        before, now = self._read.get(path), (found.st_mtime_ns, found.st_size)
        self._read[path] = now
        return before != now

    def _row(self, rows: Sequence[Row], number: int) -> list[Point]:
        row = rows[number]
        folder = folder_of(self._folder, row)
        points = self._steps(folder, _log(folder, row)) if folder and "training" in row else []
        before = next((one for one in reversed(rows[:number]) if _measured(one)), None)
        values = row_values(row)
        if before is not None and _measured(row):
            values |= _changes(self._folder, before, row)
        return [*points, Point(_axis(row), row.get("iteration", number), values)]

    def _running(self) -> list[Point]:
        """Return the steps of fine-tunings that have not finished, from their last checkpoints."""
        points = []
        for depth in ("*", "*/*"):
            for path in self._folder.glob(f"{depth}/training/checkpoint-*/trainer_state.json"):
                if self._changed(path):
                    try:
                        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
                    except (OSError, ValueError, KeyError):
                        continue  # just deleted, or not complete yet
                    points += self._steps(path.parents[2], log)
        return points

    def _steps(self, folder: Path, log: Sequence[Mapping[str, float]]) -> list[Point]:
        """Return the logged steps of a fine-tuning that were not returned before."""
        name = folder.relative_to(self._folder).as_posix()
        after = self._logged.get(name, -1)
        points = [
            Point(tag("train", name, "step"), int(one["step"]),
                  {tag("train", name, key): one[key] for key in LOGGED if key in one and key != "step"})
            for one in log
            if "loss" in one and one["step"] > after
        ]  # fmt: skip
        self._logged[name] = max([after, *(point.step for point in points)])
        return points


def folder_of(run: Path, row: Row) -> Path | None:
    """Return the folder of the model of a row, which may have been moved with the run folder."""
    parts = Path(row.get("model") or "").parent.parts
    for depth in (2, 1):  # "size-16/step_dpo" or "iteration-1"
        found = run.joinpath(*parts[-depth:])
        if len(parts) >= depth and found.is_relative_to(run) and found.is_dir():
            return found
    return None


def _log(folder: Path, row: Row) -> list[dict[str, float]]:
    """Return the logged steps of a row's fine-tuning; STaR has them in the row, because it deletes
    models."""
    stored = read_json(folder / "model" / "training.json") or {}
    return row["training"].get("log") or stored.get("log", [])


def _axis(row: Row) -> str:
    return "iteration" if "iteration" in row else "row"


# ---------------------------------------------------------------- values of a row


def row_values(row: Row) -> dict[str, float]:
    """Return the values of a row of `metrics.jsonl` by tag."""
    values: dict[str, float] = {}
    for split in SPLITS:
        if split in row:
            values |= accuracy_values(split, row[split])
    if "funnel" in row:
        values |= funnel_values(row["funnel"])
    for rule, by_k in row.get("choices", {}).items():
        for k, shares in by_k.items():
            # V-STaR has the share of every problem, a comparison the mean with its interval.
            mean = sum(shares) / len(shares) if "generator" in row else shares[0]
            values[tag("choices", rule, k)] = mean
    values |= dict(_numbers((), {key: row[key] for key in row if key not in OWN}))
    if "seconds" in row:
        values["seconds/total"] = sum(row["seconds"].values())
    return values


def _numbers(path: tuple[str, ...], value: object) -> Iterator[tuple[str, float]]:
    """Yield all numbers in a value, with their tags. Fields of the row itself are under "counts"."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers((*path, key), one)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield tag(*(path if len(path) > 1 else ("counts", *path))), value


def accuracy_values(split: str, row: Row) -> dict[str, float]:
    """Return an accuracy with its 95% interval, as the page of the run shows it, and by group."""
    evaluation = Evaluation.from_dict(row)
    mean = evaluation.group_mean
    values = {
        tag(split, "accuracy"): mean.accuracy,
        tag(split, "accuracy_low"): mean.low,
        tag(split, "accuracy_high"): mean.high,
        tag(split, "completions"): evaluation.n,
    }
    for name, tally in evaluation.groups.items():
        values[tag(split, "accuracy_by_group", name)] = tally.accuracy
    return values


def funnel_values(funnel: Row) -> dict[str, float]:
    """Return what became of the completions of an iteration of STaR."""
    sampled, hinted = funnel["sampled"], funnel.get("rationalized") or {}
    dropped = funnel.get("dropped") or {}
    return {
        "funnel/problems": funnel["asked"],
        "funnel/sampled": sum(sampled.values()),
        "funnel/correct": sampled.get("right", 0),
        "funnel/kept": funnel["kept"],
        "funnel/hinted_problems": funnel.get("hinted", 0),
        "funnel/hinted_sampled": sum(hinted.values()),
        "funnel/hinted_correct": hinted.get("right", 0),
        "funnel/rationalized": funnel.get("kept rationalized", 0),
        "funnel/examples": funnel["trained on"],
        # With zeros: otherwise a curve would join the points around an iteration without any.
        **{tag("dropped", why): dropped.get(why, 0) for why in dict.fromkeys([*DROPPED, *dropped])},
    }


# ---------------------------------------------------------------- gained and lost problems


def _measured(row: Row) -> bool:
    return "validation" in row or "test" in row


def _changes(folder: Path, before: Row, row: Row) -> dict[str, float]:
    """Return the problems gained and lost since the row before, where both were measured."""
    split = "validation" if "validation" in row else "test"
    stores = []
    for one in (before, row):
        at = (
            folder / f"iteration-{one['iteration']}"
            if "iteration" in one
            else folder_of(folder, one)
        )
        if at is None:
            return {}
        stores.append(at / f"{split}.graded.jsonl")
    return change_values(split, *stores)


def change_values(split: str, before: Path, after: Path) -> dict[str, float]:
    """Return the numbers of problems that only the second and only the first measurement has
    right."""
    found = paired(outcomes(before), outcomes(after))
    return (
        {}
        if found is None
        else {tag(split, "gained"): found.gained, tag(split, "lost"): found.lost}
    )


def summary_points(folder: Path) -> list[Point]:
    """Return the test accuracies of STaR, which are in the summary: of the base model at iteration 0,
    and of the best model at its iteration."""
    summary = read_json(folder / "summary.json") or {}
    if "best" not in summary or "test" not in summary:
        return []
    best = summary["best"]
    points = [Point("iteration", 0, accuracy_values("test", summary["test"]["base"]))]
    if best:
        stores = [folder / f"test-{one}.graded.jsonl" for one in ("base", f"iteration-{best}")]
        values = accuracy_values("test", summary["test"]["best"]) | change_values("test", *stores)
        points.append(Point("iteration", best, values))
    return points

"""Experiment trackers: TensorBoard, Trackio, and Weights & Biases (wandb).

A run folder has one run in every tracker, which is continued when the run is resumed. Each class here
knows the last step of every tag that its tracker has, so that no point is written twice.

The packages are used directly. The trackers of accelerate would initialize its process state before
the training does, and write the hyperparameters again whenever a run is resumed.
"""

import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from selftaught.records import write_atomically
from selftaught.runs.folder import Row, read_json
from selftaught.runs.redaction import Value, hyperparameters

STATE = "trackers.json"
"""File in a run folder: the name of its tracker runs, and what was sent."""
PROJECT = "selftaught"
HEADLINES = ("test/accuracy", "validation/accuracy")
"""Tags that TensorBoard shows beside the hyperparameters."""


@dataclass(frozen=True)
class Point:
    """Values of one step."""

    axis: str
    """Name of the x-axis, such as "iteration"."""
    step: int
    """Steps of one tag increase."""
    values: Mapping[str, float]
    """Values by tag, such as "validation/accuracy"."""


def tag(*parts: object) -> str:
    """Return a tag: its parts joined by slashes, without characters that TensorBoard replaces."""
    return "/".join(re.sub(r"[^\w./-]", "_", str(part)) for part in parts)


def check_trackers(names: Sequence[str]) -> None:
    """Check that trackers can be used, without importing them or connecting to anything.

    Raises:
        ImportError: the package of a tracker is not installed.
        ValueError: wandb has no API key.
    """
    for name in names:
        if name in TRACKERS and importlib.util.find_spec(name) is None:
            raise ImportError(
                f"--report-to {name} needs the package {name}, which is not installed. Run: "
                f"pip install {name}"
            )
    if "wandb" in names and not _wandb_can_log():
        raise ValueError(
            "--report-to wandb needs an API key; none was found. Run `wandb login`, set "
            "WANDB_API_KEY, or set WANDB_MODE=offline to write to the run folder only."
        )


def trainer_reports(names: Sequence[str], training: Mapping[str, object]) -> dict[str, object]:
    """Return `--report-to` as the option of transformers, for a command that trains one model.

    Args:
        names: The value of `--report-to`.
        training: The values of `--training`.

    Raises:
        ValueError: Both are given, or a tracker cannot be used; see `check_trackers`.
        ImportError: The package of a tracker is not installed.
    """
    if not names:
        return {}
    if "report_to" in training:
        raise ValueError("--report-to and --training.report_to are the same option. Give one.")
    check_trackers(names)
    return {"report_to": [name for name in names if name != "none"] or "none"}


def _wandb_can_log() -> bool:
    """Return whether wandb would start without asking for an API key on the terminal."""
    if os.environ.get("WANDB_MODE", "online") != "online" or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb  # pyright: ignore[reportMissingImports]: an extra

    return bool(wandb.api.api_key)


# ---------------------------------------------------------------- the tracker run of a run folder


@dataclass(frozen=True)
class TrackerRun:
    """The tracker run that belongs to a run folder."""

    folder: Path
    id: str
    name: str

    @property
    def options(self) -> dict[str, Value]:
        """The options of the run without secrets."""
        path = self.folder / "config.yaml"
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
        return hyperparameters(found if isinstance(found, dict) else {})

    def sent(self, tracker: str) -> tuple[int, dict[str, int]]:
        """Return what was sent to a tracker that cannot be asked: the number of points, and the
        last step of every tag."""
        found = (read_json(self.folder / STATE) or {}).get(tracker, {})
        return found.get("points", 0), dict(found.get("last", {}))

    def record(self, tracker: str, points: int, last: Mapping[str, int]) -> None:
        """Store what was sent to a tracker."""
        state = read_json(self.folder / STATE) or {}
        _write_state(self.folder, state | {tracker: {"points": points, "last": dict(last)}})


def tracker_run(folder: Path) -> TrackerRun:
    """Return the tracker run of a run folder; the first call gives it a name.

    A copied run folder gets a tracker run of its own. A folder that was moved keeps its own.
    """
    here, state = str(folder.resolve()), read_json(folder / STATE) or {}
    place = state.get("folder")
    if place is not None and place != here:
        copied_from = read_json(Path(place) / STATE) or {}
        if copied_from.get("id") == state.get("id"):
            state = {}
        else:
            state["folder"] = here
            _write_state(folder, state)
    if "id" not in state:
        inside = (folder.resolve().parent / "run.lock").exists()  # a method of a comparison
        name = f"{folder.resolve().parent.name}-{folder.name}" if inside else folder.resolve().name
        identity = secrets.token_hex(4)
        state = {"folder": here, "id": identity, "name": f"{name}-{identity}"}
        _write_state(folder, state)
    return TrackerRun(folder, state["id"], state["name"])


def _write_state(folder: Path, state: Row) -> None:
    write_atomically(folder / STATE, json.dumps(state) + "\n")


# ---------------------------------------------------------------- trackers


class Tracker(Protocol):
    """An open tracker run."""

    last: dict[str, int]
    """Last step of every tag that the tracker has."""

    def write(self, points: Sequence[Point]) -> None:
        """Write new points."""
        ...

    def close(self) -> None:
        """Write what is not written yet."""
        ...


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, run: TrackerRun) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        # An event that was cut off by a kill ends the reading of its file, so it is written again.
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 1})
        events.Reload()
        scalars = events.Tags()["scalars"]
        self.last = {one: max(event.step for event in events.Scalars(one)) for one in scalars}
        self._writer = SummaryWriter(str(folder))
        if not scalars:
            self._write_options(run.options)

    def _write_options(self, options: dict[str, Value]) -> None:
        from torch.utils.tensorboard.summary import hparams

        # Not `add_hparams`, which writes a second run.
        for summary in hparams(options, dict.fromkeys(HEADLINES, 0.0)):
            self._writer._get_file_writer().add_summary(summary)

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A local Trackio project, or the Space or server that Trackio's environment variables name."""

    def __init__(self, run: TrackerRun) -> None:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        project = os.environ.get("TRACKIO_PROJECT", PROJECT)
        self._run = trackio.init(
            project=project, name=run.name, config=run.options, resume="allow", embed=False,
            auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        self._remote = any(map(os.environ.get, ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")))
        self._of, self._points = run, 0
        if self._remote:
            self._points, self.last = run.sent("trackio")
            return
        self.last = {}
        for row in SQLiteStorage.get_logs(project, run.name, run_id=self._run.id):
            for name in row.keys() - {"step", "timestamp"}:
                self.last[name] = max(self.last.get(name, -1), row["step"])

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log(dict(point.values), step=point.step)
        self._points += len(points)
        if self._remote:
            self._of.record("trackio", self._points, last_steps(points, self.last))

    def close(self) -> None:
        self._run.finish()


class Wandb:
    """A run of Weights & Biases.

    wandb drops values whose step is below the last one, so the points are numbered. Their own steps
    are values, which its charts use as x-axes.
    """

    def __init__(self, run: TrackerRun) -> None:
        import wandb  # pyright: ignore[reportMissingImports]: an extra

        self._points, self.last = run.sent("wandb")
        self._of, self._axes = run, set[str]()
        # The command line, the output of the terminal and the code are not sent.
        settings = wandb.Settings(
            console="off", x_disable_meta=True, disable_git=True, save_code=False
        )
        offline = os.environ.get("WANDB_MODE", "online") != "online"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.id, name=run.name,
            dir=os.environ.get("WANDB_DIR", str(run.folder)), config=run.options,
            resume=None if offline else "allow", reinit="create_new", settings=settings,
        )  # fmt: skip

    def write(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.axis not in self._axes:
                self._axes.add(point.axis)
                self._run.define_metric(point.axis, hidden=True)
            for name in point.values:
                if name not in self._axes:
                    self._axes.add(name)
                    self._run.define_metric(name, step_metric=point.axis)
            self._run.log({**point.values, point.axis: point.step}, step=self._points)
            self._points += 1
        self._of.record("wandb", self._points, last_steps(points, self.last))

    def close(self) -> None:
        self._run.finish()


def last_steps(points: Iterable[Point], before: Mapping[str, int]) -> dict[str, int]:
    """Return the last step of every tag after more points."""
    last = dict(before)
    for point in points:
        last |= dict.fromkeys(point.values, point.step)
    return last


TRACKERS: dict[str, Callable[[TrackerRun], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}
"""In the order in which they are written: those that may wait for a network last."""


def import_tracker(name: str) -> None:
    """Import the package of a tracker."""
    match name:
        case "tensorboard":
            import torch.utils.tensorboard  # noqa: F401
        case "trackio":
            import trackio  # noqa: F401
        case "wandb":
            import wandb  # pyright: ignore[reportMissingImports]  # noqa: F401

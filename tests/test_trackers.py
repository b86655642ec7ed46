"""What a run reports to experiment trackers, read back with the trackers' own readers.

Trackio reads its environment when it is imported, so it runs in processes of their own.
"""

import importlib.util
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from selftaught.cli import main
from selftaught.methods.points import RunPoints, folder_of
from selftaught.methods.star import CHANGEABLE, StarConfig
from selftaught.records import Outcome, Problem, Rollout, write_jsonl
from selftaught.runs import reporting
from selftaught.runs.folder import ProgressReporter, check_config, read_rows, write_config
from selftaught.runs.redaction import hyperparameters
from selftaught.runs.reporting import Reporting, reported
from selftaught.runs.trackers import Point, TrackerRun, tracker_run

Series = dict[str, list[tuple[int, float]]]
"""Steps and values of every tag."""

tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard"
)
trackio = pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs trackio")
wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb")


# ---------------------------------------------------------------- a run folder, written by hand


def evaluation(right: int, n: int, low: float, high: float, groups: Any = None) -> dict[str, Any]:
    return {"name": "x", "model": "m", "n": n, "right": right, "accuracy": right / n, "low": low,
            "high": high, "outcomes": {}, "groups": groups or {}, "seconds": 1.0}  # fmt: skip


def graded(path: Path, right: Sequence[str], wrong: Sequence[str]) -> None:
    """Write one graded completion per problem."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(path, [*(completion(one, "right") for one in right), *(completion(one, "wrong") for one in wrong)])  # fmt: skip


def completion(name: str, outcome: Outcome) -> Rollout:
    return Rollout(Problem(name, f"{name}?", "1"), "p", "#1", "stop", "m", 0, outcome=outcome)


def log(steps: int, first: float) -> list[dict[str, float]]:
    return [{"step": at, "loss": first / at, "learning_rate": 0.1} for at in range(1, steps + 1)]


FUNNEL = {
    "asked": 3, "sampled": {"right": 2, "wrong": 3, "no answer": 1}, "hinted": 2,
    "rationalized": {"right": 1, "wrong": 1}, "kept": 2, "kept rationalized": 1,
    "dropped": {"wrong": 4, "no answer": 1}, "trained on": 3,
}  # fmt: skip
ROWS: list[dict[str, Any]] = [
    {"iteration": 0, "model": "base", "validation": evaluation(1, 4, 0.05, 0.7), "seconds": {"evaluate": 2.0}},
    {"iteration": 1, "model": "run/iteration-1/model", "validation": evaluation(2, 4, 0.15, 0.85),
     "funnel": FUNNEL, "sampled tokens": 77, "seconds": {"sample": 3.0, "train": 4.5},
     "training": {"steps": 3, "loss": 0.5, "tokens": 90, "log": log(3, 1.0)}},
    {"iteration": 2, "model": "run/iteration-2/model", "validation": evaluation(3, 4, 0.3, 0.95),
     "funnel": FUNNEL | {"dropped": {"too long": 2}}, "sampled tokens": 88, "seconds": {"train": 5.0},
     "training": {"steps": 4, "loss": 0.25, "tokens": 95, "log": log(4, 2.0)}},
]  # fmt: skip


def run_folder(folder: Path, rows: Sequence[Any] = ROWS, best: int | None = None) -> Path:
    """Write the files of a run of STaR, or those of its later state."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"method": "star", "seed": 7, "sampler_options": {"batch_size": 4}}))  # fmt: skip
    graded(folder / "iteration-0/validation.graded.jsonl", ["a"], ["b", "c", "d"])
    graded(folder / "iteration-1/validation.graded.jsonl", ["b", "c"], ["a", "d"])
    graded(folder / "iteration-2/validation.graded.jsonl", ["b", "c", "d"], ["a"])
    graded(folder / "test-base.graded.jsonl", ["e"], ["f"])
    graded(folder / "test-iteration-2.graded.jsonl", ["e", "f"], [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if best is not None:
        tested = {"base": evaluation(1, 2, 0.1, 0.9), "best": evaluation(2, 2, 0.3, 1.0)}
        (folder / "summary.json").write_text(json.dumps({"best": best, "test": tested}))
    return folder


EXPECTED: Series = {
    "validation/accuracy": [(0, 0.25), (1, 0.5), (2, 0.75)],
    "validation/accuracy_low": [(0, 0.05), (1, 0.15), (2, 0.3)],
    "validation/accuracy_high": [(0, 0.7), (1, 0.85), (2, 0.95)],
    "validation/completions": [(0, 4), (1, 4), (2, 4)],
    "validation/gained": [(1, 2), (2, 1)],  # b and c; d
    "validation/lost": [(1, 1), (2, 0)],  # a
    "test/accuracy": [(0, 0.5), (2, 1.0)],
    "test/accuracy_low": [(0, 0.1), (2, 0.3)],
    "test/accuracy_high": [(0, 0.9), (2, 1.0)],
    "test/completions": [(0, 2), (2, 2)],
    "test/gained": [(2, 1)],
    "test/lost": [(2, 0)],
    "funnel/problems": [(1, 3), (2, 3)],
    "funnel/sampled": [(1, 6), (2, 6)],
    "funnel/correct": [(1, 2), (2, 2)],
    "funnel/kept": [(1, 2), (2, 2)],
    "funnel/hinted_problems": [(1, 2), (2, 2)],
    "funnel/hinted_sampled": [(1, 2), (2, 2)],
    "funnel/hinted_correct": [(1, 1), (2, 1)],
    "funnel/rationalized": [(1, 1), (2, 1)],
    "funnel/examples": [(1, 3), (2, 3)],
    "dropped/wrong": [(1, 4), (2, 0)],
    "dropped/no_answer": [(1, 1), (2, 0)],
    "dropped/too_long": [(1, 0), (2, 2)],
    "dropped/cut_by_length": [(1, 0), (2, 0)],
    "dropped/ungradable": [(1, 0), (2, 0)],
    "dropped/a_wrong_equation": [(1, 0), (2, 0)],
    "dropped/the_same_text_again": [(1, 0), (2, 0)],
    "counts/sampled_tokens": [(1, 77), (2, 88)],
    "seconds/evaluate": [(0, 2.0)],
    "seconds/sample": [(1, 3.0)],
    "seconds/train": [(1, 4.5), (2, 5.0)],
    "seconds/total": [(0, 2.0), (1, 7.5), (2, 5.0)],
    "training/steps": [(1, 3), (2, 4)],
    "training/loss": [(1, 0.5), (2, 0.25)],
    "training/tokens": [(1, 90), (2, 95)],
    "train/iteration-1/loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
    "train/iteration-1/learning_rate": [(1, 0.1), (2, 0.1), (3, 0.1)],
    "train/iteration-2/loss": [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)],
    "train/iteration-2/learning_rate": [(1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1)],
}
"""Everything that the run says, worked out by hand."""


def same(found: Series, expected: Series) -> bool:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        # TensorBoard stores 32 bits
        assert [value for _, value in found[name]] == pytest.approx(
            [v for _, v in points], rel=1e-6
        ), name
    return True


# ---------------------------------------------------------------- readers of the trackers' files


def in_tensorboard(folder: Path) -> Series:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(one.step, one.value) for one in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def in_trackio(data: Path) -> dict[str, Series]:
    """The points by run, from Trackio's database, in the order in which they were written."""
    found: dict[str, Series] = {}
    with sqlite3.connect(data / "selftaught.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id")
        for name, step, metrics in rows:
            for key, value in json.loads(metrics).items():
                found.setdefault(name, defaultdict(list))[key].append((step, value))
    return found


def in_wandb(folder: Path) -> list[dict[str, Any]]:
    """The history in the files that `wandb sync` would send, in their order."""
    from wandb.proto import wandb_internal_pb2  # pyright: ignore[reportMissingImports]: an extra

    history = []
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in records_of(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = {one.key or "/".join(one.nested_key): one.value_json for one in record.history.item}  # fmt: skip
                history.append({key: json.loads(value) for key, value in items.items()})
    return history


def records_of(data: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format: blocks of 32 KiB with parts of records."""
    at, record = 7, b""  # after wandb's own header
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


DRIVER = """
import sys
from pathlib import Path
from selftaught.methods.points import RunPoints
from selftaught.runs.reporting import Reporting
for folder in map(Path, sys.argv[2:]):
    Reporting(folder, sys.argv[1].split(","), RunPoints(folder)).close(60)
"""


def report(names: str, *folders: Path, **environment: str) -> str:
    """Report run folders in a process of its own; returns what it printed to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, names, *map(str, folders)],
        capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def report_here(folder: Path, *names: str) -> None:
    Reporting(folder, names, RunPoints(folder)).close(60)


# ---------------------------------------------------------------- points


def series(points: Sequence[Point]) -> Series:
    found: Series = defaultdict(list)
    for point in points:
        for name, value in point.values.items():
            found[name].append((point.step, value))
    return found


def test_the_files_of_a_run_give_every_value_once(tmp_path: Path):
    read = RunPoints(run_folder(tmp_path / "run", best=2))
    assert same(series(read()), EXPECTED)
    assert read() == []


def test_values_that_are_read_row_by_row_are_the_same(tmp_path: Path):
    folder = tmp_path / "run"
    read, points = RunPoints(folder), []
    for number in range(len(ROWS)):
        points += read() if not number else []
        run_folder(folder, ROWS[: number + 1])
        points += read()
    run_folder(folder, best=2)
    assert same(series([*points, *read()]), EXPECTED)


def test_the_accuracy_of_a_task_with_groups_is_that_of_the_page(tmp_path: Path):
    groups = {
        name: {"n": 4, "right": 4 * share, "accuracy": share, "low": share - 0.25, "high": share}
        for name, share in (("1 digit", 1.0), ("2 digits", 0.25))
    }
    row = {
        "iteration": 0,
        "model": "base",
        "validation": evaluation(5, 8, 0.3, 0.9, groups),
        "seconds": {},
    }
    found = series(RunPoints(run_folder(tmp_path, [row]))())
    assert found["validation/accuracy"] == [(0, 0.625)]  # the mean of the groups
    assert found["validation/accuracy_by_group/2_digits"] == [(0, 0.25)]


def test_a_running_training_is_reported_from_its_checkpoint_and_then_from_its_row(tmp_path: Path):
    folder = run_folder(tmp_path / "run", ROWS[:1])
    read = RunPoints(folder)
    read()
    checkpoint = folder / "iteration-1/training/checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"log_history": [')  # not complete yet
    assert read() == []
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": [*log(2, 1.0), {"train_loss": 1}]}))  # fmt: skip
    first = series(read())
    assert first == {
        "train/iteration-1/loss": [(1, 1.0), (2, 0.5)],
        "train/iteration-1/learning_rate": [(1, 0.1), (2, 0.1)],
    }
    shutil.rmtree(folder / "iteration-1/training")
    run_folder(folder, ROWS[:2])
    assert series(read())["train/iteration-1/loss"] == [(3, pytest.approx(1 / 3))]


def test_rows_of_the_other_methods_are_steps_by_their_number(tmp_path: Path):
    out = tmp_path / "run"
    rows = [
        {"name": "SFT", "model": str(out / "sft/model"), "test": evaluation(1, 2, 0, 1),
         "training": {"steps": 1, "loss": 1.0, "trained on": 5}, "seconds": {"train": 1.0}},
        {"name": "choices: x", "generator": "g", "choices": {"best": {"1": [0.0, 0.5, 1.0]}}, "seconds": {}},
        {"name": "RFT, k=2", "model": str(out / "k-2/model"), "test": evaluation(2, 2, 0, 1), "k": 2,
         "training": {"steps": 1, "loss": 0.5, "trained on": 9}, "pairs": {"with a pit": 3}, "seconds": {}},
    ]  # fmt: skip
    run_folder(out, rows)
    graded(out / "sft/test.graded.jsonl", ["a"], ["b"])
    graded(out / "k-2/test.graded.jsonl", ["b"], ["a"])
    for name in ("sft", "k-2"):
        (out / name / "model").mkdir()
        (out / name / "model/training.json").write_text(json.dumps({"log": log(1, 1.0)}))
    found = series(RunPoints(out)())
    assert found["test/accuracy"] == [(0, 0.5), (2, 1.0)]
    assert (found["test/gained"], found["test/lost"]) == ([(2, 1)], [(2, 1)])
    assert found["choices/best/1"] == [(1, 0.5)]
    assert found["training/trained_on"] == [(0, 5), (2, 9)]
    assert (found["counts/k"], found["pairs/with_a_pit"]) == ([(2, 2)], [(2, 3)])
    assert found["train/sft/loss"] == [(1, 1.0)] and found["train/k-2/loss"] == [(1, 1.0)]


def test_the_folder_of_a_model_is_found_after_the_run_was_moved(tmp_path: Path):
    (tmp_path / "size-4/step_dpo/model").mkdir(parents=True)
    (tmp_path / "sft").mkdir()
    assert folder_of(tmp_path, {"model": "runs/old/size-4/step_dpo/model"}) == tmp_path / "size-4/step_dpo"  # fmt: skip
    assert folder_of(tmp_path, {"model": "/elsewhere/sft/model"}) == tmp_path / "sft"
    for model in ("", "org/name", "/etc/model", str(Path("/usr/model")), None):
        assert folder_of(tmp_path, {"model": model}) is None


# ---------------------------------------------------------------- TensorBoard and Trackio


@tensorboard
def test_tensorboard_has_every_value_and_the_hyperparameters(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    folder = run_folder(tmp_path / "run", best=2)
    report_here(folder, "tensorboard")
    assert same(in_tensorboard(folder), EXPECTED)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    plugin: Any = plugin_data_pb2  # pyright does not see the classes of Protocol Buffers
    data = plugin.HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])  # fmt: skip
    options = data.session_start_info.hparams
    assert options["method"].string_value == "star"
    assert options["seed"].number_value == 7
    assert options["sampler_options/batch_size"].number_value == 4


@tensorboard
@pytest.mark.parametrize("cut", [0, 1, 40, 333, 1500])
def test_a_file_that_a_kill_cut_off_is_completed(tmp_path: Path, cut: int):
    folder = run_folder(tmp_path / "run", ROWS[:2])
    report_here(folder, "tensorboard")
    (events,) = (folder / "tensorboard").iterdir()
    os.truncate(events, events.stat().st_size - cut)
    run_folder(folder, best=2)
    for _ in range(2):  # the second finds everything
        report_here(folder, "tensorboard")
    assert same(in_tensorboard(folder), EXPECTED)


@tensorboard
@trackio
def test_a_resumed_run_continues_its_run_in_both(tmp_path: Path):
    folder, data = tmp_path / "run", tmp_path / "trackio"
    for rows, best in ((ROWS[:1], None), (ROWS[:2], None), (ROWS, 2), (ROWS, 2)):
        report("trackio,tensorboard", run_folder(folder, rows, best), TRACKIO_DIR=str(data))
    assert same(in_tensorboard(folder), EXPECTED)
    ((name, found),) = in_trackio(data).items()
    assert same(found, EXPECTED)
    assert re.fullmatch(r"run-[0-9a-f]{8}", name)
    with sqlite3.connect(data / "selftaught.db") as database:
        ((options,),) = database.execute("SELECT config FROM configs")
    assert {"method": "star", "sampler_options/batch_size": 4}.items() <= json.loads(
        options
    ).items()


@trackio
def test_runs_of_the_same_name_are_runs_of_their_own(tmp_path: Path):
    folders = [run_folder(tmp_path / part / "run", ROWS[:1]) for part in ("a", "b")]
    report("trackio", *folders, TRACKIO_DIR=str(tmp_path / "trackio"))
    found = in_trackio(tmp_path / "trackio")
    assert len(found) == 2
    assert all(one["validation/accuracy"] == [(0, 0.25)] for one in found.values())


def test_a_copied_folder_gets_its_own_run_and_a_moved_one_keeps_it(tmp_path: Path):
    run = tracker_run(run_folder(tmp_path / "run"))
    assert tracker_run(tmp_path / "run") == run
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    copy = tracker_run(tmp_path / "copy")
    assert copy.id != run.id and copy.name.startswith("copy-")
    assert tracker_run(tmp_path / "run").id == run.id
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert tracker_run(tmp_path / "moved").id == run.id
    assert tracker_run(tmp_path / "copy").id == copy.id


# ---------------------------------------------------------------- wandb, offline


@wandb
def test_wandb_gets_rising_steps_also_after_a_resumption(tmp_path: Path):
    folder = tmp_path / "run"
    for rows, best in ((ROWS[:2], None), (ROWS, 2)):
        report("wandb", run_folder(folder, rows, best), WANDB_MODE="offline", WANDB_API_KEY="")
    history = in_wandb(folder)
    steps = [row["_step"] for row in history]
    assert steps == list(range(len(steps)))  # it drops a step that is below the last
    found: Series = defaultdict(list)
    for row in history:
        (axis,) = [key for key in row if key == "iteration" or key.endswith("/step")]
        for name, value in row.items():
            if name != axis and not name.startswith("_"):
                found[name].append((row[axis], value))
    assert same(found, EXPECTED)


# ---------------------------------------------------------------- failures


def test_a_tracker_that_does_not_answer_delays_only_the_end_and_not_long(
    tmp_path, monkeypatch, caplog
):
    test_has_ended = threading.Event()

    def silent(run: TrackerRun) -> Any:
        test_has_ended.wait()
        return SimpleNamespace(last={}, write=lambda points: None, close=lambda: None)

    monkeypatch.setattr(reporting, "TRACKERS", {"wandb": silent})
    monkeypatch.setattr(reporting, "import_tracker", lambda name: None)
    monkeypatch.setattr(reporting, "WAIT", 0.2)
    folder, began = run_folder(tmp_path), time.monotonic()
    with reported(folder, ["wandb"], RunPoints(folder), ProgressReporter()) as reporter:
        for _ in range(100):
            with reporter.progress("sampling", 10):
                reporter.iteration({})
        assert time.monotonic() - began < 2
    assert time.monotonic() - began < 5
    (record,) = caplog.records
    assert "did not finish" in record.getMessage()
    test_has_ended.set()


@tensorboard
def test_a_tracker_that_fails_is_one_warning_and_the_others_go_on(tmp_path, monkeypatch, caplog):
    class Failing:
        last: dict[str, int] = {}  # noqa: RUF012

        def __init__(self, run: TrackerRun) -> None:
            del run

        def write(self, points: Sequence[Point]) -> None:
            raise ConnectionError("no network")

    monkeypatch.setitem(reporting.TRACKERS, "wandb", Failing)
    monkeypatch.setattr(reporting, "import_tracker", lambda name: None)
    folder = run_folder(tmp_path / "run", ROWS[:1])
    names = ["wandb", "tensorboard"]
    with reported(folder, names, RunPoints(folder), ProgressReporter()) as reporter:
        reporter.iteration(ROWS[0])
        deadline = time.monotonic() + 30
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
        run_folder(folder, best=2)
        reporter.iteration(ROWS[2])
    (record,) = caplog.records
    assert "reported to wandb" in record.getMessage() and "no network" in record.getMessage()
    assert same(in_tensorboard(folder), EXPECTED)


@tensorboard
def test_a_folder_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    folder = run_folder(tmp_path / "run")
    (folder / "tensorboard").write_text("a file")
    report_here(folder, "tensorboard")
    (record,) = caplog.records
    assert "FileExistsError" in record.getMessage()


@trackio
def test_a_trackio_folder_that_cannot_be_written_is_a_warning(tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    (tmp_path / "file").write_text("")
    text = report("trackio", folder, TRACKIO_DIR=str(tmp_path / "file" / "trackio"))
    assert "Traceback" not in text and text.strip()


def test_a_refused_command_leaves_no_trace(tmp_path: Path):
    with (
        pytest.raises(ValueError, match="refused"),
        reported(tmp_path, ["tensorboard"], RunPoints(tmp_path), ProgressReporter()),
    ):
        raise ValueError("refused")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- the option


@pytest.mark.parametrize("command", ["star", "rft", "vstar", "step-dpo", "compare"])
@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_package_that_is_not_installed_is_refused_with_the_command_that_installs_it(
    command, name, tmp_path, capsys, monkeypatch
):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda one, *more: None if one == name else found(one, *more)
    )
    for dry in ([], ["--dry-run"]):
        out = tmp_path / "run"
        assert main([command, "--report-to", name, "--out", str(out), *dry]) == 2
        text = capsys.readouterr().err
        assert f"--report-to {name} needs the package {name}" in text
        assert f"pip install {name}" in text and "Traceback" not in text
        assert not (out / "config.yaml").exists()


@wandb
def test_wandb_without_a_key_is_refused_instead_of_asking_for_one(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert main(["star", "--report-to", "wandb", "--out", str(tmp_path / "run"), "--dry-run"]) == 2
    assert "WANDB_MODE=offline" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["tensorboard", ["mlflow"]])
def test_a_tracker_that_does_not_exist_is_refused(wrong: Any):
    with pytest.raises(ValueError, match="report_to must be a list of"):
        StarConfig(report_to=wrong)


def test_runs_without_trackers_have_the_same_options_as_before_and_can_add_them(tmp_path: Path):
    plain = StarConfig().plain()
    assert "report_to" not in plain
    write_config(tmp_path, plain, CHANGEABLE)
    for names in (["tensorboard"], ["trackio", "wandb"], ["none"], []):
        config = replace(StarConfig(), report_to=names).plain()
        check_config(tmp_path, config, CHANGEABLE)
        write_config(tmp_path, config, CHANGEABLE)


# ---------------------------------------------------------------- secrets


SECRETS = {
    "api_key": "key-in-an-option", "nested": {"hub_token": "token-in-an-option"},
    "base_url": "https://user:password-in-url@host:8000/v1?api_key=key-in-query",
    "note": "use hf_abcdefghijklmnopqrstuvwx or sk-proj-abcdefghijklmnop",
    "headers": {"Authorization": "Bearer bearer-in-header"}, "remark": "set ENV-SECRET-VALUE here",
    "mirrors": ["http://u:password-in-list@a/b", "x"],
}  # fmt: skip
LEAKS = ("key-in-an-option", "token-in-an-option", "password-in-url", "key-in-query", "hf_abcdef",
         "sk-proj", "bearer-in-header", "ENV-SECRET-VALUE", "password-in-list")  # fmt: skip


def test_options_lose_their_secrets_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOME_API_KEY", "ENV-SECRET-VALUE")
    harmless = {"max_tokens": 300, "seed": 0, "bf16": False, "model": "org/name", "none": None,
                "k": [1, 4], "url": "http://localhost:8000/v1", "thought_tokens": 12, "monkey": "x",
                "prompt": "few_shot", "keep_models": "best"}  # fmt: skip
    found = hyperparameters({**harmless, **SECRETS})
    assert not [leak for leak in LEAKS if leak in str(found)]
    assert {name: found[name] for name in harmless if name not in ("none", "k")} == {
        name: value for name, value in harmless.items() if name not in ("none", "k")
    }
    assert found["k"] == "1, 4" and "none" not in found
    assert found["base_url"] == "https://host:8000/v1"
    assert found["api_key"] == found["nested/hub_token"] == "[redacted]"


@pytest.mark.parametrize(
    "name",
    [pytest.param("tensorboard", marks=tensorboard), pytest.param("trackio", marks=trackio),
     pytest.param("wandb", marks=wandb)],
)  # fmt: skip
def test_no_file_of_a_tracker_contains_a_secret(name: str, tmp_path: Path):
    folder = run_folder(tmp_path / "run")
    config = {"method": "star", "sampler_options": SECRETS}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    report(name, folder, TRACKIO_DIR=str(tmp_path / "trackio"), WANDB_MODE="offline",
           SOME_API_KEY="ENV-SECRET-VALUE", HF_TOKEN="HF-TOKEN-VALUE", WANDB_API_KEY="0123456789" * 4)  # fmt: skip
    files = [
        path for path in tmp_path.rglob("*") if path.is_file() and path != folder / "config.yaml"
    ]
    written = b"".join(path.read_bytes() for path in files)
    assert b"sampler_options/remark" in written  # the options are there
    for leak in (*LEAKS, "HF-TOKEN-VALUE", "0123456789" * 4):
        assert leak.encode() not in written


# ---------------------------------------------------------------- a real run, killed


KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
import torch, trl, transformers, peft, datasets, matplotlib.figure, matplotlib.backends.backend_svg
import torch.utils.tensorboard, tensorboard.backend.event_processing.event_accumulator, trackio
torch.set_num_threads(1)
from selftaught.methods import star
from selftaught.runs import reporting
import selftaught.samplers.local.sampler, selftaught.training
reporting.POLL = 0.05  # otherwise no checkpoint of a training this short is seen

settings, kills, whole = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
config = star.StarConfig.small(**(settings | {"out": Path("star")}))
draw, done, began = random.Random(0), 0, time.monotonic()
while True:
    child = os.fork()
    if child == 0:
        try:
            star.run_star(config)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if done < kills:
        time.sleep(draw.uniform(0.3, 1.0) * whole / kills)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    done += 1
print(json.dumps({"status": status, "kills": done, "seconds": time.monotonic() - began}))
"""
SETTINGS = {
    "task_options": {"digits": "1-3", "train": 60, "validation": 20, "test": 20},
    "iterations": 2, "patience": 2, "start_steps": 12, "save_steps": 3, "train_problems": None,
    "report_to": ["tensorboard", "trackio"],
}  # fmt: skip


def killed(folder: Path, kills: int = 0, whole: float = 0.0) -> tuple[int, float]:
    """Run STaR in a folder and kill it so many times; returns the kills and the seconds."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(SETTINGS), str(kills), str(whole)],
        cwd=folder, capture_output=True, text=True, timeout=900,
        env=os.environ | {"TRACKIO_DIR": str(folder / "trackio")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == 0, done.stderr[-3000:]
    return found["kills"], found["seconds"]


@pytest.mark.slow
@tensorboard
@trackio
def test_a_run_killed_at_random_moments_reports_what_an_undisturbed_one_does(tmp_path: Path):
    _, seconds = killed(tmp_path / "undisturbed")
    kills, _ = killed(tmp_path / "killed", 6, seconds)
    assert kills >= 4
    expected = in_tensorboard(tmp_path / "undisturbed/star")
    found = in_tensorboard(tmp_path / "killed/star")
    ((_, local),) = in_trackio(tmp_path / "killed/trackio").items()  # one run, not one per start
    assert same(local, found)
    rows = read_rows(tmp_path / "killed/star/metrics.jsonl")
    for row in rows[1:]:
        curve = f"train/iteration-{row['iteration']}/loss"
        assert found[curve] == [(one["step"], pytest.approx(one["loss"])) for one in row["training"]["log"]]  # fmt: skip
        assert [step for step, _ in found[curve]] == list(range(1, row["training"]["steps"] + 1))
    for name in expected.keys() | found.keys():
        if not name.startswith("seconds/"):
            assert found[name] == expected[name], name

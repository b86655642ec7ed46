"""A run killed at random moments ends as an undisturbed one does, byte for byte.

Every moment is a real SIGKILL of a real process. The process is forked from one that has already
imported everything, so that the kills fall into the work and not into the imports.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
import torch, trl, transformers, peft, datasets, matplotlib.figure, matplotlib.backends.backend_svg
torch.set_num_threads(1)
from selftaught.methods import star
import selftaught.samplers.local.sampler, selftaught.training
from selftaught.rollouts import store as rollouts
rollouts.STORE_BATCH = 32

settings, kills = json.loads(sys.argv[1]), int(sys.argv[2])
config = star.StarConfig.small(**(settings | {"out": Path("runs/star")}))
from trl import SFTConfig, SFTTrainer  # imported once here, not in every child

def start(folder):
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            star.run_star(config)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child

def finished(child):
    _, status = os.waitpid(child, 0)
    if status and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        sys.exit(f"the run failed with status {status}")
    return status == 0

if not kills:
    began = time.monotonic()
    Path("undisturbed").mkdir()
    finished(start("undisturbed"))
    print(time.monotonic() - began)
    sys.exit()
whole = float(sys.argv[3])
draw, stages, folders = random.Random(0), [], []
while len(stages) < kills:
    folder = Path(f"killed-{len(folders) + 1}")
    folder.mkdir()
    folders.append(str(folder))
    while True:
        child = start(folder)
        if len(stages) < kills:
            # every third kill may come late, so that all parts of a run are reached
            time.sleep(draw.uniform(0.05, (0.4, 0.4, 0.9)[len(stages) % 3] * whole))
            os.kill(child, signal.SIGKILL)
        if finished(child):
            break
        run = folder / "runs/star"
        if (run / "test-base.jsonl").exists():
            stages.append("the end")
        elif list(run.glob("iteration-*/training")):
            stages.append("training")
        else:
            stages.append("sampling and measuring")
print(json.dumps({"stages": stages, "folders": folders}))
"""
SETTINGS = {
    "task_options": {"digits": "1-3", "train": 60, "validation": 20, "test": 20},
    "iterations": 2, "patience": 2, "start_steps": 24, "save_steps": 6, "train_problems": None,
    "keep_models": "all",
}  # fmt: skip


def driven(folder: Path, *arguments: str) -> str:
    """Run the driver in `folder`; returns the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(SETTINGS), *arguments],
        cwd=folder, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def outcome(folder: Path) -> dict[str, bytes]:
    """Every store, every training set and all weights of a run."""
    kept = {}
    for path in sorted((folder / "runs").rglob("*")):
        if path.suffix == ".safetensors" or (
            path.suffix == ".jsonl" and path.name != "metrics.jsonl"
        ):
            kept[str(path.relative_to(folder))] = path.read_bytes()
    return kept


def measured(folder: Path) -> list[dict]:
    text = (folder / "runs/star/metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        row.pop("seconds")
        row["validation"].pop("seconds")
    return rows


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_byte_for_byte_as_an_undisturbed_one(tmp_path: Path):
    seconds = driven(tmp_path, "0")  # another process, in which sets have another order
    found = json.loads(driven(tmp_path, "20", seconds))
    assert len(found["stages"]) == 20
    assert {"training", "sampling and measuring"} <= set(found["stages"])
    undisturbed = outcome(tmp_path / "undisturbed")
    assert "runs/star/model/model.safetensors" in undisturbed
    assert "runs/star/iteration-2/rationalized.jsonl" in undisturbed
    for name in found["folders"]:
        assert outcome(tmp_path / name) == undisturbed
        assert measured(tmp_path / name) == measured(tmp_path / "undisturbed")
        assert not list((tmp_path / name).rglob("*.partial"))


@pytest.mark.slow
def test_ctrl_c_says_how_to_continue(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "selftaught.cli",
        "star",
        "--out",
        "runs/a",
        "--iterations",
        "1",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (tmp_path / "runs/a/config.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(random.Random(0).uniform(0.0, 2.0))
    process.send_signal(signal.SIGINT)
    _, message_text = process.communicate(timeout=60)
    # Python ends by the signal itself where it met the import of an extension; shells say 130 to both
    assert process.returncode in (130, -signal.SIGINT)
    assert "continue with: selftaught star --out runs/a --iterations 1" in message_text
    assert "Traceback" not in message_text

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

settings, seed, kills = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = star.StarConfig.small(**(settings | {"out": Path("runs/star")}))
from trl import SFTConfig, SFTTrainer  # imported once here, not in every child
draw, killed, stages = random.Random(seed), 0, []
while True:
    child = os.fork()
    if child == 0:
        try:
            star.run_star(config)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if killed < kills:
        # every third kill comes later, so that a busy machine reaches training too
        time.sleep(draw.uniform(0.05, 3.0) if killed % 3 else draw.uniform(3.0, 20.0))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        killed += 1
        star_folder = Path("runs/star")
        if (star_folder / "test-base.jsonl").exists():
            stages.append("the end")
        elif list(star_folder.glob("iteration-*/training")):
            stages.append("training")
        else:
            stages.append("sampling and measuring")
        continue
    break
print(json.dumps({"killed": killed, "status": status, "stages": stages}))
"""
SETTINGS = {
    "task_options": {"digits": "1-3", "train": 60, "validation": 20, "test": 20},
    "iterations": 2, "patience": 2, "start_steps": 24, "save_steps": 6, "train_problems": None,
    "keep_models": "all",
}  # fmt: skip


def run(folder: Path, seed: int, kills: int) -> list[str]:
    """Run STaR in `folder`, killing it so many times; returns in which stage each kill fell."""
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(SETTINGS), str(seed), str(kills)],
        cwd=folder, capture_output=True, text=True, timeout=1500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    message_text = json.loads(done.stdout.splitlines()[-1])
    assert message_text["status"] == 0, done.stderr[-3000:]
    assert len(message_text["stages"]) == message_text["killed"]
    return message_text["stages"]


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
    assert run(tmp_path / "undisturbed", seed=0, kills=0) == []
    stages: list[str] = []
    trial = 0
    while len(stages) < 20:
        trial += 1
        folder = tmp_path / f"killed-{trial}"
        stages += run(folder, seed=trial, kills=20 - len(stages))
        assert outcome(folder) == outcome(tmp_path / "undisturbed")
        assert measured(folder) == measured(tmp_path / "undisturbed")
        assert not list(folder.rglob("*.partial"))
    assert {"training", "sampling and measuring"} <= set(stages)
    names = outcome(tmp_path / "undisturbed")
    assert "runs/star/model/model.safetensors" in names
    assert "runs/star/iteration-2/rationalized.jsonl" in names


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

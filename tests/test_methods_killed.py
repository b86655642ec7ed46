"""RFT, V-STaR and per-step DPO, killed at random moments, end as undisturbed runs do, byte for byte.

As in tests/test_nothing_lost.py, every moment is a real SIGKILL of a real process, forked from one
that has imported everything.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
import torch, trl, transformers, peft, datasets, matplotlib.figure, matplotlib.backends.backend_svg
torch.set_num_threads(1)
from selftaught.methods import rft, step_dpo, vstar
import selftaught.samplers.local.sampler, selftaught.samplers.local.scorer, selftaught.training
import selftaught.evaluation.verifier
from selftaught.rollouts import store as rollouts
rollouts.STORE_BATCH = 32

method, settings, seed, kills, longest = json.loads(sys.argv[1])
make, run = {
    "rft": (rft.RftConfig, rft.run_rft),
    "vstar": (vstar.VstarConfig, vstar.run_vstar),
    "step_dpo": (step_dpo.StepDpoConfig, step_dpo.run_step_dpo),
}[method]
config = make.small(**(settings | {"out": Path("run")}))
draw, stages = random.Random(seed), []
while True:
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            run(config)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if len(stages) < kills:
        time.sleep(draw.uniform(0.05, longest))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        break
    found = {path.parent.name for path in Path("run").rglob("training") if path.is_dir()}
    stages.append(sorted(found))
print(json.dumps({"status": status, "stages": stages, "seconds": time.monotonic() - began}))
"""
SMALL = {
    "task_options": {"digits": "3", "train": 20, "validation": 4, "test": 10},
    "seed_samples": 8, "max_steps": 12, "save_steps": 3, "temperature": 1.0,
    "train_batch_size": 16,
}  # fmt: skip
METHODS = {
    "rft": {"k": [2, 3], "baselines": True},
    "vstar": {"iterations": 2, "k": 3, "candidates": 4, "verifier_max_steps": 6, "baselines": True,
              "pairs_per_problem": 6},
    "step_dpo": {"n": 5, "wrong_per_problem": 2, "best_of": 3, "dpo_max_steps": 6, "sizes": [20],
                 "right_per_problem": 2, "methods": ["rft", "dpo", "step_dpo", "advantage"]},
}  # fmt: skip


def run(
    folder: Path, method: str, seed: int, kills: int = 0, longest: float = 0.0
) -> tuple[list[list[str]], float]:
    """Run a method in `folder`, killing it so many times, each within `longest` seconds.

    Returns what was in training at each kill, and the seconds of the last process.
    """
    folder.mkdir()
    given = json.dumps([method, SMALL | METHODS[method], seed, kills, longest])
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, given],
        cwd=folder, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    message_text = json.loads(done.stdout.splitlines()[-1])
    assert message_text["status"] == 0, done.stderr[-3000:]
    return message_text["stages"], message_text["seconds"]


def outcome(folder: Path) -> dict[str, bytes]:
    """Every store, every training set, all scores and all weights of a run."""
    kept = {}
    for path in sorted((folder / "run").rglob("*")):
        if (
            path.suffix == ".safetensors"
            or path.name.startswith("scores-")
            or (path.suffix == ".jsonl" and path.name != "metrics.jsonl")
        ):
            kept[str(path.relative_to(folder))] = path.read_bytes()
    return kept


def measured(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("seconds")
        if "test" in row:
            row["test"].pop("seconds")
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_a_method_killed_at_random_moments_ends_as_an_undisturbed_one(method: str, tmp_path: Path):
    _, seconds = run(tmp_path / "undisturbed", method, seed=0)
    # Killed within a sixth of its time, a process cannot end before the sixth kill, on any machine.
    stages, _ = run(tmp_path / "killed", method, seed=1, kills=6, longest=seconds / 6)
    assert len(stages) == 6
    expected, found = outcome(tmp_path / "undisturbed"), outcome(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert measured(tmp_path / "killed") == measured(tmp_path / "undisturbed")
    assert not list((tmp_path / "killed").rglob("*.partial"))

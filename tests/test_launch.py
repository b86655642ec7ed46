"""The same training in one process and in several, and what happens when something goes wrong.

What is compared: where accumulation is divided, the workers compute the very batches of one process,
and two of them add up the same two numbers: measured were no differences at all. Where a batch is
divided, float32 numbers are added up in another order: measured were 2e-7 in a loss, relative, and at
most 3e-6 in a weight (DPO; of weights up to 1, over 6 steps at a rate of 1e-2).
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from selftaught.training import Training
from selftaught.training import launch as launching
from selftaught.training.launch import (
    Launch,
    Stage,
    _printable,
    command,
    launch,
    refuse_unfit,
    run_stage,
)
from selftaught.training.trainer import shared_batch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
BENT = Path(__file__).resolve().parent / "spread_on_cpus.py"
DEEPSPEED = CONFIGS.parent / ".venv" / "deepspeed"
OPTIONS = {
    "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "save_steps": 2,
    "gradient_accumulation_steps": 2, "seed": 3, "lr_scheduler_type": "constant", "max_length": 32,
}  # fmt: skip
TWO = Launch("torchrun", 2)
LORA = {"r": 4, "alpha": 8, "target_modules": "all-linear"}
SUMS = [(a, b) for a in range(4) for b in range(4)]


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_ray(monkeypatch: pytest.MonkeyPatch):
    """A Ray cluster apart from all that run on this machine; its sockets want a short path."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_ADDRESS", "local")
    yield
    shutil.rmtree(folder, ignore_errors=True)


def rows(path: Path, made: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def stage(model: Path, folder: Path, kind: str = "sft", **options) -> Stage:
    """A training on the sixteen sums, four of them in a step."""
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    match kind:
        case "sft":
            rows(path, [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS])
        case "dpo":
            rows(path, [{"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"{a + b + 1}"}
                        for a, b in SUMS])  # fmt: skip
        case "outcome":
            rows(path, [{"prompt": f"{a}+{b}=", "ids": [20 + a, 30 + b], "right": (a + b) % 2 == 0}
                        for a, b in SUMS])  # fmt: skip
        case "weighted":
            rows(path, [{"input_ids": [20 + a, 30 + b, 25, 26], "labels": [-100, -100, 25, 26],
                         "weights": [0.0, 0.0, 1.0 + a, 0.5 + b]} for a, b in SUMS])  # fmt: skip
    return Stage(kind, str(model), path, folder / "model", folder / "training", OPTIONS | options)  # type: ignore[arg-type]


def losses(done: Training) -> list[float]:
    return [row["loss"] for row in done.log]


def assert_same(one: Training, other: Training, *, atol: float) -> None:
    assert one.steps == other.steps
    assert losses(other) == pytest.approx(losses(one), rel=1e-5)
    assert other.tokens == one.tokens
    ours, theirs = (load_file(each.model / "model.safetensors") for each in (one, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=0, atol=atol, msg=name)


# ---------------------------------------------------------------- the same training


@pytest.mark.slow
# two batches of two in a step, or one of four
@pytest.mark.parametrize(
    ("kind", "batches"), [("sft", 2), ("sft", 1), ("dpo", 2), ("outcome", 2), ("weighted", 2)]
)
def test_two_processes_train_as_one(kind: str, batches: int, tiny_model_dir: Path, tmp_path: Path):
    more = {"gradient_accumulation_steps": batches, "per_device_train_batch_size": 4 // batches}
    one = launch(stage(tiny_model_dir, tmp_path / "one", kind, **more), Launch())
    steps: list[int] = []
    asked = stage(tiny_model_dir, tmp_path / "two", kind, **more)
    two = launch(asked, TWO, steps.append)
    assert_same(one, two, atol=1e-5)
    assert sum(steps) == 6
    left = {path.name for path in asked.out.parent.iterdir()}
    assert left == {"rows.jsonl", "model", "model.log"}


@pytest.mark.slow
def test_an_adapter_is_merged_by_the_first_process(tiny_model_dir: Path, tmp_path: Path):
    one = launch(replace(stage(tiny_model_dir, tmp_path / "one"), lora=LORA), Launch())
    two = launch(replace(stage(tiny_model_dir, tmp_path / "two"), lora=LORA), TWO)
    assert_same(one, two, atol=1e-5)


@pytest.mark.slow
def test_two_workers_of_ray_train_as_one(tiny_model_dir: Path, tmp_path: Path, own_ray: None):
    one = launch(stage(tiny_model_dir, tmp_path / "one", "sft"), Launch())
    steps: list[int] = []
    two = launch(stage(tiny_model_dir, tmp_path / "two", "sft"), Launch("ray", 2), steps.append)
    assert_same(one, two, atol=1e-5)
    assert sum(steps) == 6


def accelerate_file(name: str, folder: Path) -> Path:
    """One of our files, for two processes and in float32."""
    said = yaml.safe_load((CONFIGS / name).read_text()) | {"num_processes": 2}
    path = folder / name
    path.write_text(yaml.safe_dump(said | {"mixed_precision": "no"}))
    return path


@pytest.mark.slow
def test_two_processes_of_accelerate_train_as_one(tiny_model_dir: Path, tmp_path: Path):
    how = Launch("accelerate", 2, accelerate_file("ddp_8gpu.yaml", tmp_path))
    one = launch(stage(tiny_model_dir, tmp_path / "one", "dpo"), Launch())
    steps: list[int] = []
    two = launch(stage(tiny_model_dir, tmp_path / "two", "dpo"), how, steps.append)
    assert_same(one, two, atol=1e-5)
    assert sum(steps) == 6


SPREAD = {
    "fsdp2": [("sft", LORA), ("dpo", None), ("outcome", None), ("weighted", None)],
    "zero3": [("sft", None), ("dpo", LORA)],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "kind", "lora"), [(by, *each) for by, some in SPREAD.items() for each in some]
)
def test_weights_that_are_spread_are_trained_and_gathered_as_in_one_process(
    by: str, kind: str, lora: dict | None, tiny_model_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """FSDP2 and ZeRO-3 themselves, with two processes on CPUs; tests/spread_on_cpus.py says what is
    bent for it. Stopped in the middle, and continued from a checkpoint of what is spread."""
    if torch.accelerator.is_available():
        pytest.skip("this test bends accelerate for CPUs")
    if by == "zero3":
        if not DEEPSPEED.is_dir():
            pytest.skip("no DeepSpeed; see scripts/install_deepspeed.sh")
        monkeypatch.setenv("PYTHONPATH", str(DEEPSPEED))
        monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(launching, "_refuse_other_kinds", lambda *_: None)
    monkeypatch.setattr(
        launching, "command", lambda how, module: command(how, [str(BENT), *module[2:]])
    )
    how = Launch("accelerate", 2, accelerate_file(f"{by}_8gpu.yaml", tmp_path))
    more = {"max_steps": 24, "learning_rate": 1e-3}  # so many that the stop comes before the end
    one = launch(replace(stage(tiny_model_dir, tmp_path / "one", kind, **more), lora=lora), Launch())  # fmt: skip
    asked = replace(stage(tiny_model_dir, tmp_path / "two", kind, **more), lora=lora)
    done: list[int] = []

    def stop(steps: int) -> None:
        done.append(steps)
        if len(done) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(asked, how, stop)
    continued: list[int] = []
    two = launch(asked, how, continued.append)
    message_text = (tmp_path / "two" / "model.log").read_text()
    assert {"fsdp2": "DistributedType.FSDP", "zero3": "DistributedType.DEEPSPEED"}[
        by
    ] in message_text
    assert continued[0] in range(2, 24, 2)  # a checkpoint of what was spread
    assert sum(continued) == 24
    assert_same(one, two, atol=1e-5)


@pytest.mark.slow
def test_a_training_started_by_one_process_is_continued_by_two(
    tiny_model_dir: Path, tmp_path: Path
):
    whole = launch(stage(tiny_model_dir, tmp_path / "whole"), Launch())
    asked = stage(tiny_model_dir, tmp_path / "broken")

    def stop(steps: int) -> None:
        done.append(steps)
        if len(done) == 5:
            raise KeyboardInterrupt

    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        launch(asked, Launch(), stop)
    continued: list[int] = []
    assert_same(whole, launch(asked, TWO, continued.append), atol=1e-5)
    assert continued[0] == 4  # the checkpoint after the fourth step
    assert sum(continued) == 6


@pytest.mark.slow
def test_the_end_of_an_epoch_that_does_not_divide_repeats_rows(
    tiny_model_dir: Path, tmp_path: Path
):
    """Ten rows, four in a step: one process ends an epoch with a step of the last two. Each of two
    processes must have a batch, so accelerate fills the last one up with rows of the epoch's start."""
    more = {"max_steps": -1, "num_train_epochs": 1.0}
    found = []
    for how, name in ((Launch(), "one"), (TWO, "two")):
        asked = stage(tiny_model_dir, tmp_path / name, **more)
        lines = asked.rows.read_text().splitlines(keepends=True)
        asked.rows.write_text("".join(lines[:10]))
        found.append(launch(asked, how))
    one, two = found
    assert one.steps == two.steps == 3
    assert losses(two)[:2] == pytest.approx(losses(one)[:2], rel=1e-5)
    assert losses(two)[2] != pytest.approx(losses(one)[2], rel=1e-3)


def test_a_step_is_shared_so_that_it_takes_as_many_examples():
    """By brute force: every share of every step of up to 24 examples in up to 24 processes."""
    for size in range(1, 25):
        for batches in range(1, 25):
            for world in range(1, 25):
                if size * batches % world:
                    with pytest.raises(ValueError, match=f"which {world} processes cannot share"):
                        shared_batch(size, batches, world)
                else:
                    each, every = shared_batch(size, batches, world)
                    assert each * every * world == size * batches
                    assert batches % every == 0
    assert shared_batch(8, 16, 8) == (8, 2)
    with pytest.raises(ValueError, match=r"--num-processes 1, 2, 3 or 6, .* such as 8\."):
        shared_batch(3, 2, 4)


# ---------------------------------------------------------------- workers that fail


def workers(mark: str) -> list[psutil.Process]:
    """The processes whose command names this folder, launchers too."""
    found = []
    for one in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(one.info["cmdline"] or [])
        if mark in line and "selftaught.training.launch" in line and one.info["status"] != "zombie":
            found.append(one)
    return found


def gone(mark: str, seconds: float = 20) -> bool:
    end = time.time() + seconds
    while time.time() < end:
        if not workers(mark):
            return True
        time.sleep(0.2)
    return False


@pytest.mark.slow
def test_a_killed_worker_ends_the_stage_which_then_continues(tiny_model_dir: Path, tmp_path: Path):
    more = {"max_steps": 150, "save_steps": 10, "learning_rate": 1e-3}
    whole = launch(stage(tiny_model_dir, tmp_path / "whole", **more), TWO)
    asked = stage(tiny_model_dir, tmp_path / "broken", **more)
    mark = str(asked.out.parent)
    done: list[int] = []

    def kill(steps: int) -> None:
        done.append(steps)
        if len(done) == 15:
            ranks = [one for one in workers(mark) if "torch.distributed.run" not in one.cmdline()]
            assert len(ranks) == 2
            ranks[0].kill()

    with pytest.raises(ChildProcessError) as failed:
        launch(asked, TWO, kill)
    assert "Repeat the command to resume from the last checkpoint" in str(failed.value)
    assert str(asked.out.parent / "model.log") in str(failed.value)
    assert "SIGKILL" in str(failed.value)  # what torchrun writes of it in the log
    assert gone(mark)
    # Of the newest, where the kill left the one before it as well.
    states = asked.checkpoints.glob("checkpoint-*/rng_state_1.pth")
    last = max(states, key=lambda path: int(path.parent.name.split("-")[1]))
    last.write_bytes(last.read_bytes()[:100])  # as if the kill had fallen into its writing
    continued: list[int] = []
    again = launch(asked, TWO, continued.append)
    assert continued[0] >= 10
    assert len(continued) < 150
    assert_same(whole, again, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "number"),
    [("torchrun", signal.SIGINT), ("torchrun", signal.SIGKILL), ("ray", signal.SIGKILL)],
)
def test_workers_end_with_the_process_that_started_them(
    launcher: str, number: signal.Signals, tiny_model_dir: Path, tmp_path: Path, own_ray: None
):
    asked = stage(tiny_model_dir, tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "selftaught.cli", "train", "sft", "--model", str(tiny_model_dir),
         "--data", str(asked.rows), "--out", str(asked.out), "--max-steps", "100000",
         "--launcher", launcher, "--num-processes", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    steps = asked.out.parent / "model.launch" / "steps"
    end = time.time() + 120
    while not steps.exists() and time.time() < end:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.2)
    mark = str(asked.out)
    assert workers(mark)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, message_text = process.communicate(timeout=60)
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted" in message_text
    assert gone(mark)
    _, alive = psutil.wait_procs(below, timeout=60)  # Ray's own processes too
    assert not alive
    size = steps.stat().st_size
    time.sleep(2)
    assert steps.stat().st_size == size


@pytest.mark.slow
def test_what_a_worker_refuses_reaches_the_caller_in_its_words(
    tiny_model_dir: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=r"^All 16 examples are longer than max_length=3 tokens"):
        launch(stage(tiny_model_dir, tmp_path / "run", max_length=3), TWO)
    with pytest.raises(ValueError, match="TRL's SFTConfig refused the training options"):
        launch(stage(tiny_model_dir, tmp_path / "run", no_such_option=2), TWO)
    done = subprocess.run(
        [sys.executable, "-m", "selftaught.cli", "train", "sft", "--model", str(tiny_model_dir),
         "--data", str(tmp_path / "run" / "rows.jsonl"), "--out", str(tmp_path / "run" / "model"),
         "--max-length", "3", "--launcher", "torchrun", "--num-processes", "2"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "selftaught: error: All 16 examples are longer than max_length=3" in done.stderr
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_ray_with_too_little_says_what_is_there(
    tiny_model_dir: Path, tmp_path: Path, own_ray: None
):
    with pytest.raises(
        ValueError,
        match=r"64 workers of 1 [CG]PU each need 64 [CG]PU, and the Ray cluster has \d+ ",
    ):
        launch(stage(tiny_model_dir, tmp_path / "run", per_device_train_batch_size=64), Launch("ray", 64))  # fmt: skip


def test_a_world_of_another_size_is_refused(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"2 processes were requested, .* in a world of 1"):
        run_stage(stage(tiny_model_dir, tmp_path / "run"), processes=2)


def test_a_finished_stage_is_not_launched_and_another_one_is_refused(
    tiny_model_dir: Path, tmp_path: Path
):
    asked = stage(tiny_model_dir, tmp_path / "run")
    first = launch(asked, Launch())
    began = time.time()
    assert launch(asked, TWO) == first
    assert not (tmp_path / "run" / "model.log").exists()
    with pytest.raises(ValueError, match="was made from another model"):
        launch(stage(tiny_model_dir, tmp_path / "run", learning_rate=1e-3), TWO)
    assert time.time() - began < 5


def test_a_log_is_shown_without_what_a_terminal_obeys():
    text = "one\x1b[31m red\x1b[0m\rtwo \x1b]0;title\x07 \x00end\ttab"
    assert _printable(text) == "one red\ntwo ?]0;title? ?end\ttab"


# ---------------------------------------------------------------- what is refused before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_processes": 0}, "at least 1; got 0"),
        ({"num_processes": 2}, "needs the launcher torchrun, accelerate or ray"),
        ({"launcher": "accelerate"}, "--launcher torchrun"),
        (
            {"launcher": "torchrun", "accelerate_config": Path("a.yaml")},
            "the other launchers do not use it",
        ),
    ],
)
def test_options_that_contradict_each_other_are_refused(given: dict, words: str):
    with pytest.raises(ValueError, match=words):
        Launch(**given)


@pytest.mark.parametrize("name", ["fsdp2_8gpu", "zero3_8gpu"])
def test_what_accelerate_would_not_do_without_an_accelerator_is_refused(name: str):
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    how = Launch("accelerate", 8, CONFIGS / f"{name}.yaml")
    with pytest.raises(ValueError, match=r"no accelerator: .* Give --launcher torchrun"):
        refuse_unfit(how, {"bf16": True})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "There is no accelerate config"),
        ("- 1\n- 2\n", "expected a mapping, got list"),
        ("a: [1", "is not an accelerate config"),
        ("no_such_key: 1\ncompute_environment: LOCAL_MACHINE\n", "is not an accelerate config"),
        ("distributed_type: MULTI_CPU\n", "MULTI_CPU, with which accelerate starts one process"),
        ("distributed_type: 'NO'\n", "--num-processes is 2. Use MULTI_GPU for data parallelism"),
        ("distributed_type: NO\n", "distributed_type: NO, with which accelerate starts one process"),
        ("distributed_type:\n", "distributed_type: NO, with which accelerate starts one process"),
        ("num_processes: 4\n", "num_processes: 4, which contradicts num_processes 2"),
        ("num_machines: 3\n", "num_machines: 3, .*several: --launcher ray"),
        ("mixed_precision: bf16\n", "mixed_precision: bf16, which contradicts mixed_precision no"),
        ("mixed_precision: fp16\n", "mixed_precision: fp16"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {gradient_accumulation_steps: 4}\n",
         "gradient_accumulation_steps: 4, which contradicts gradient_accumulation_steps 1"),
        ("main_process_port: PORT\n", "which another process uses"),
    ],
)  # fmt: skip
def test_an_accelerate_config_that_does_not_fit_is_refused(
    text: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    path = tmp_path / "accelerate.yaml"
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        if text is not None:
            known = "" if "compute_environment" in text or text[0] in "-a" else (
                "compute_environment: LOCAL_MACHINE\ndebug: false\nuse_cpu: false\n"
            )  # fmt: skip
            for name, value in (("distributed_type", "MULTI_GPU"), ("num_processes", "2"),
                                ("mixed_precision", "'no'")):  # fmt: skip
                known += f"{name}: {value}\n" if known and name not in text else ""
            path.write_text(known + text.replace("PORT", str(taken.getsockname()[1])))
        with pytest.raises(ValueError, match=words):
            refuse_unfit(
                Launch("accelerate", 2, path),
                {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
            )


@pytest.mark.parametrize("name", ["single_gpu", "ddp_8gpu", "fsdp2_8gpu", "zero3_8gpu"])
def test_our_accelerate_configs_are_read_by_accelerate(name: str, monkeypatch: pytest.MonkeyPatch):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    path = CONFIGS / f"{name}.yaml"
    read = load_config_from_file(str(path))
    said = yaml.safe_load(path.read_text())
    count = said["num_processes"]
    assert isinstance(read, ClusterConfig) and read.num_processes == count
    assert str(read.distributed_type).removeprefix("DistributedType.") == said["distributed_type"]
    how = Launch("accelerate", count, path)
    refuse_unfit(how, {"bf16": name != "single_gpu", "gradient_accumulation_steps": 16})
    asked = command(how, ["-m", "selftaught.training.launch", "stage.json"])
    assert asked[1:3] == ["-m", "accelerate.commands.launch"]
    assert asked[asked.index("--num_processes") + 1] == str(count)


# ---------------------------------------------------------------- methods


@pytest.mark.slow
def test_star_trains_in_two_processes(tmp_path: Path):
    flags = ["--iterations", "1", "--start-steps", "10", "--train-problems", "60", "--test-problems", "20",
             "--task_options.digits", "1-3", "--out", str(tmp_path / "star")]  # fmt: skip
    ask = [sys.executable, "-m", "selftaught.cli", "star", *flags]
    two = subprocess.run([*ask, "--launcher", "torchrun", "--num-processes", "2"],
                         capture_output=True, text=True, env=dict(os.environ))  # fmt: skip
    assert two.returncode == 0, two.stderr[-3000:]
    assert (tmp_path / "star" / "iteration-1" / "model.log").exists()
    again = subprocess.run(ask, capture_output=True, text=True)  # where it ran does not matter
    assert again.returncode == 0, again.stderr[-3000:]

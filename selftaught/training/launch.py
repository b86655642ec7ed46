"""Launching fine-tuning: in this process, with torchrun or accelerate, or on a Ray cluster.

A method's main loop is one ordinary process. A fine-tuning step is a `Stage`: a file of rows in, a
model folder out. `launch` runs it in this process or in worker processes. The data, the global
batch size and the resulting model do not depend on the number of processes (see
`training.trainer.shared_batch`).

Workers run `python -m selftaught.training.launch STAGE.json`. The process that starts them keeps
their standard input open. When that process ends for any reason, the input closes and they exit.
"""

import _thread
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import yaml

from selftaught.records import read_examples, read_jsonl, read_preferences, write_atomically
from selftaught.training import (
    LabeledCompletion,
    Training,
    dpo_config,
    lora_config,
    outcome_config,
    sft_config,
    train_dpo,
    train_outcome,
    train_sft,
    train_weighted,
)
from selftaught.training.trainer import shared_batch

if TYPE_CHECKING:
    from transformers import TrainingArguments

Launcher = Literal["inline", "torchrun", "accelerate", "ray"]
Kind = Literal["sft", "dpo", "outcome", "weighted"]
Progress = Callable[[int], None]
SHOWN = 30
"""Number of lines of a failed worker's log that the error message shows."""
PLACE = ("launcher", "num_processes", "accelerate_config")
"""Options that may change when a run is resumed, because no stored result depends on them."""


@dataclass(frozen=True)
class Launch:
    """How fine-tuning is launched.

    Raises:
        ValueError: The options contradict each other.
    """

    launcher: Launcher = "inline"
    num_processes: int = 1
    """Number of training processes. The global batch size does not depend on it."""
    accelerate_config: Path | None = None
    """Configuration file written by `accelerate config` (DDP, FSDP2, DeepSpeed)."""

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1; got {self.num_processes}.")
        if self.launcher == "inline" and self.num_processes > 1:
            raise ValueError(
                f"num_processes={self.num_processes} needs the launcher torchrun, accelerate or "
                "ray; inline runs one process."
            )
        if (self.launcher == "accelerate") != (self.accelerate_config is not None):
            raise ValueError(
                "The launcher accelerate needs accelerate_config, and the other launchers do not "
                f"use it; got launcher {self.launcher} and accelerate_config "
                f"{self.accelerate_config}. Plain data parallelism needs no configuration "
                "file. Use --launcher torchrun."
            )


class Launched(Protocol):
    """Any configuration that has the three options of `Launch`."""

    @property
    def launcher(self) -> Launcher: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def accelerate_config(self) -> Path | None: ...


def launch_of(config: Launched) -> Launch:
    """Return the `Launch` options of a configuration.

    Raises:
        ValueError: The options contradict each other.
    """
    return Launch(config.launcher, config.num_processes, config.accelerate_config)


@dataclass(frozen=True)
class Stage:
    """One fine-tuning job as files and plain values, so that another process can run it."""

    kind: Kind
    model: str
    """The model to fine-tune: a folder or a name on the Hugging Face Hub."""
    rows: Path
    """JSONL file of `Example` (sft), `Preference` (dpo), `LabeledCompletion` (outcome) or token
    rows (weighted)."""
    out: Path
    """Model folder to write."""
    checkpoints: Path
    """Folder for checkpoints; deleted when training has finished."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `sft_config`, `dpo_config` or `outcome_config`."""
    lora: Mapping[str, Any] | None = None
    """Arguments of `lora_config`; None trains all weights."""


def run_stage(
    stage: Stage, progress: Progress | None = None, *, processes: int | None = None
) -> Training:
    """Run a stage in this process, alone or as one rank of a distributed job.

    Args:
        stage: The fine-tuning job.
        progress: Called with the number of optimizer steps just finished.
        processes: Expected world size. None accepts any.

    Raises:
        ValueError: The world size differs, or the training function (such as `train_sft`) raised
            it.
    """
    lora = lora_config(**stage.lora) if stage.lora is not None else None
    config = stage_config(stage.kind, stage.checkpoints, stage.options)
    match stage.kind:
        case "sft":
            train: Any = partial(train_sft, stage.model, read_examples(stage.rows))
        case "dpo":
            train = partial(train_dpo, stage.model, read_preferences(stage.rows))
        case "outcome":
            labeled = [
                LabeledCompletion(
                    row["prompt"], tuple(row["ids"]), row["right"], row.get("chat_template_kwargs")
                )
                for row in read_jsonl(stage.rows)
            ]
            train = partial(train_outcome, stage.model, labeled)
        case "weighted":
            train = partial(train_weighted, stage.model, list(read_jsonl(stage.rows)))
    if processes is not None and config.world_size != processes:
        raise ValueError(
            f"{processes} processes were requested, but this worker runs in a world of "
            f"{config.world_size}. Nothing was trained. Check the number of processes in the "
            "launcher's settings."
        )
    return train(config, out=stage.out, peft_config=lora, progress=progress)


def stage_config(kind: Kind, checkpoints: Path, options: Mapping[str, Any]) -> "TrainingArguments":
    """Return the trainer config for a kind of stage.

    Raises:
        ValueError: An option is invalid. The message names it.
    """
    match kind:
        case "dpo":
            return dpo_config(checkpoints, **options)
        case "outcome":
            return outcome_config(checkpoints, **options)
        case "sft" | "weighted":
            return sft_config(checkpoints, **options)


def launch(stage: Stage, how: Launch, progress: Progress | None = None) -> Training:
    """Run a stage with a launcher. A stage that has finished is not run again.

    The output of worker processes is written to `NAME.log` next to the model folder `NAME`.

    Args:
        stage: The fine-tuning job.
        how: The launcher and the number of processes.
        progress: Called with the number of optimizer steps just finished.

    Raises:
        ValueError: `run_stage` raised it here or in a worker, or this machine cannot run `how`.
        OSError: A worker failed or was killed. The message shows the end of its log.
    """
    if how.launcher == "inline" or (stage.out / "training.json").exists():
        return run_stage(stage, progress)
    refuse_unfit(how, stage.options)
    _work(stage, how, progress)
    return run_stage(stage)


# ---------------------------------------------------------------- checks before a launch


def refuse_unfit(how: Launch, options: Mapping[str, Any]) -> None:
    """Raise if a launch cannot train with these options.

    Args:
        how: The launcher and the number of processes.
        options: Training options, under TRL's names.

    Raises:
        ValueError: The global batch cannot be divided equally among the processes, there are fewer
            devices than processes, or the accelerate configuration contradicts the options.
        ImportError: The launcher is ray and Ray is not installed.
    """
    size = options.get("per_device_train_batch_size", 8)
    batches = options.get("gradient_accumulation_steps", 1)
    _, shared = shared_batch(size, batches, how.num_processes)
    if how.launcher == "ray":
        from selftaught.processes import ray_cluster as cluster

        cluster.check_installed()
    if how.launcher in ("torchrun", "accelerate"):
        _refuse_too_few_devices(how)
    if how.accelerate_config is not None:
        _refuse_contradictions(how, how.accelerate_config, options, shared)


def _refuse_too_few_devices(how: Launch) -> None:
    import torch

    processes = how.num_processes
    if torch.cuda.is_available() and processes > (devices := torch.cuda.device_count()):
        raise ValueError(
            f"{processes} processes need one GPU each, but this machine has {devices}. Set "
            f"--num-processes to {devices} or less, or use --launcher ray on a cluster with enough "
            "GPUs."
        )


def _refuse_contradictions(
    how: Launch, path: Path, options: Mapping[str, Any], shared: int
) -> None:
    """Raise if a setting in the accelerate configuration contradicts the options."""
    settings = _accelerate_settings(path)
    # YAML parses a bare NO as false.
    _refuse_other_kinds(how, path, settings.get("distributed_type") or "NO")
    bf16 = "bf16" if options.get("bf16") else "no"
    deepspeed = settings.get("deepspeed_config") or {}
    expected: list[tuple[str, object, tuple[object, ...], str]] = [
        ("num_processes", settings.get("num_processes"), (None, how.num_processes),
         "--num-processes"),
        ("num_machines", settings.get("num_machines"), (None, 1),
         "this launcher uses one machine; for several: --launcher ray"),
        ("mixed_precision", settings.get("mixed_precision"), (None, bf16), "the option bf16"),
        *(
            ("gradient_accumulation_steps", found.get("gradient_accumulation_steps"),
             (None, "auto", shared),
             "the option divided among the processes; remove it from the file, or use \"auto\"")
            for found in (settings, deepspeed)
        ),
    ]  # fmt: skip
    for name, found, allowed, why in expected:
        if found not in allowed:
            raise ValueError(
                f"{path} sets {name}: {found}, which contradicts {name} {allowed[-1]} ({why}). "
                "Change one of them."
            )
    port = settings.get("main_process_port")
    if port and _in_use(int(port)):
        raise ValueError(
            f"{path} sets main_process_port: {port}, which another process uses. Remove it from "
            "the file; a free port is then chosen."
        )


def _refuse_other_kinds(how: Launch, path: Path, kind: str) -> None:
    """Raise if accelerate would ignore the distributed type in the file on this machine."""
    import torch

    if kind in ("NO", "MULTI_CPU") and how.num_processes > 1:
        raise ValueError(
            f"{path} sets distributed_type: {kind}, with which accelerate starts one process, but "
            f"--num-processes is {how.num_processes}. Use MULTI_GPU for data "
            "parallelism, also on CPUs."
        )
    if kind not in ("NO", "MULTI_GPU") and not torch.accelerator.is_available():
        raise ValueError(
            f"{path} sets distributed_type: {kind}, but this machine has no accelerator: "
            "accelerate would ignore the setting and use plain data parallelism or one process. "
            "Give --launcher torchrun, or a file with distributed_type: MULTI_GPU."
        )


def _accelerate_settings(path: Path) -> dict[str, Any]:
    """Read an accelerate configuration file.

    Raises:
        ValueError: The file does not exist, is not YAML, or accelerate rejects it.
    """
    if not path.is_file():
        raise ValueError(
            f"There is no accelerate config {path}. Create one with `accelerate config`."
        )
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"expected a mapping, got {type(settings).__name__}")
        load_config_from_file(str(path))
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not an accelerate config: {error}.") from None
    return settings


def _in_use(port: int) -> bool:
    import socket

    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


# ---------------------------------------------------------------- in the launching process


def _work(stage: Stage, how: Launch, progress: Progress | None) -> None:
    """Run a stage in worker processes and wait for them."""
    folder = _beside(stage.out, "launch")
    shutil.rmtree(folder, ignore_errors=True)
    job = {"stage": asdict(stage), "processes": how.num_processes, "folder": str(Path.cwd()),
           "launcher": how.launcher}  # fmt: skip
    path, log = folder / f"stage-{secrets.token_hex(4)}.json", _beside(stage.out, "log")
    write_atomically(path, json.dumps(job, default=str, indent=2) + "\n")
    worker_command = command(how, ["-m", "selftaught.training.launch", str(path)])
    try:
        code = supervise(worker_command, log, folder / "steps", progress)
    finally:
        # A worker on another machine that is still running exits at its next step.
        path.unlink(missing_ok=True)
    _raise_worker_error(folder / "error.json")
    if not (stage.out / "training.json").exists():
        raise ChildProcessError(failed(how, code, log))
    shutil.rmtree(folder, ignore_errors=True)


def command(how: Launch, module: Sequence[str]) -> list[str]:
    """Return the command that runs `python MODULE` with a launcher.

    Args:
        how: The launcher and the number of processes.
        module: Arguments of Python, such as `["-m", "selftaught.training.launch", "stage.json"]`.
    """
    count = str(how.num_processes)
    match how.launcher:
        case "torchrun":
            return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", count, *module]  # fmt: skip
        case "accelerate":
            port = ["--main_process_port", "0"]
            settings = _accelerate_settings(how.accelerate_config) if how.accelerate_config else {}
            return [sys.executable, "-m", "accelerate.commands.launch",
                    "--config_file", str(how.accelerate_config), "--num_processes", count,
                    *([] if settings.get("main_process_port") else port), *module]  # fmt: skip
        case _:
            return [sys.executable, *module]


def supervise(
    command: Sequence[str], log: Path, steps: Path | None = None, progress: Progress | None = None
) -> int:
    """Run a command, wait for it and return its exit code. It is stopped if this process ends.

    Args:
        command: The command and its arguments.
        log: File for its standard output and standard error.
        steps: File to which the command appends numbers of finished steps, one per line.
        progress: Called with each number in `steps`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    read = 0
    try:
        while True:
            try:
                return process.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                read = _advance(steps, read, progress)
    finally:
        _end(process)
        _advance(steps, read, progress)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Stop a command and its workers: close their standard input, then send SIGTERM and SIGKILL."""
    assert process.stdin is not None
    process.stdin.close()
    for number in (None, signal.SIGTERM, signal.SIGKILL):
        try:
            if number:
                os.killpg(process.pid, number)
            process.wait(timeout=10)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _advance(steps: Path | None, read: int, progress: Progress | None) -> int:
    """Report the steps in the file after byte `read`; return the new offset."""
    if steps is None or progress is None or not steps.exists():
        return read
    new = steps.read_bytes()[read:]
    complete = new[: new.rfind(b"\n") + 1]
    for line in complete.splitlines():
        progress(int(line))
    return read + len(complete)


def failed(how: Launch, code: int, log: Path) -> str:
    """Return the error message for workers that ended without reporting an error themselves."""
    text = log.read_bytes()[-50_000:].decode("utf-8", errors="replace")
    last = "\n".join(f"  {line}" for line in _printable(text).splitlines()[-SHOWN:])
    return (
        f"A worker process of --launcher {how.launcher} failed or was killed (exit code {code}). "
        f"Repeat the command to resume from the last checkpoint. The end of its log {log}:\n{last}"
    )


def _printable(text: str) -> str:
    """Return the text without escape sequences and other control characters."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text)
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text.replace("\r", "\n"))


def _raise_worker_error(path: Path) -> None:
    """Raise the error that a worker has written, if there is one."""
    if not path.exists():
        return
    error = json.loads(path.read_text(encoding="utf-8"))
    match error["kind"]:
        case "OSError":
            raise OSError(error["number"], error["words"])
        case "ImportError":
            raise ImportError(error["words"])
        case _:
            raise ValueError(error["words"])


def _beside(out: Path, what: str) -> Path:
    return out.with_name(f"{out.name}.{what}")


# ---------------------------------------------------------------- in a worker process


def work(path: str) -> None:
    """Run a worker's part of the stage described in a file; write an error file if it fails."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    os.chdir(job["folder"])
    stage = job["stage"] | {
        name: Path(job["stage"][name]) for name in ("rows", "out", "checkpoints")
    }
    first, folder = os.environ.get("RANK", "0") == "0", Path(path).parent
    try:
        run_stage(
            Stage(**stage),
            partial(_report_steps, Path(path), folder / "steps" if first else None),
            processes=job["processes"],
        )
    except (ValueError, ImportError, OSError) as error:
        _write_error(folder, error)
        raise


def _report_steps(stage: Path, path: Path | None, steps: int) -> None:
    """Append finished steps to a file; exit if the launching process deleted the stage file."""
    if not stage.exists():
        os._exit(1)
    if path is not None:
        with path.open("a", encoding="ascii") as file:
            file.write(f"{steps}\n")


def _write_error(folder: Path, error: ValueError | ImportError | OSError) -> None:
    """Write an error for the launching process, unless another worker has written one."""
    kinds = (OSError, ImportError, ValueError)
    kind = next(kind.__name__ for kind in kinds if isinstance(error, kind))
    number = error.errno if isinstance(error, OSError) else None
    words = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.filename:
        words += f": {error.filename}"
    if not (folder / "error.json").exists():
        text = json.dumps({"kind": kind, "number": number, "words": words}) + "\n"
        own = folder / f"error-{os.getpid()}.json"  # several workers may fail at the same time
        write_atomically(own, text)
        own.replace(folder / "error.json")


def end_with_starter(end: Callable[[], object]) -> None:
    """Call `end` when the launching process has ended, and exit 30 seconds later at the latest."""

    def wait_for_starter() -> None:
        while os.read(0, 1):
            pass
        end()
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=wait_for_starter, daemon=True).start()


def main(path: str) -> None:
    """Entry point of `python -m selftaught.training.launch STAGE.json`."""
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    on_ray = job["launcher"] == "ray"  # the Ray driver stops its workers when it is interrupted
    end_with_starter(_thread.interrupt_main if on_ray else partial(os._exit, 1))
    if not on_ray:
        import torch.distributed

        work(path)
        if (
            torch.distributed.is_initialized()
        ):  # otherwise a gloo thread may outlive the interpreter
            torch.distributed.destroy_process_group()
        return
    from selftaught.processes import ray_cluster as cluster

    paths = [job["stage"][name] for name in ("rows", "model")]
    try:
        cluster.run_workers(work, path, job["processes"], Path(path).parent / "ray", paths)
    except (ValueError, ImportError, OSError) as error:
        _write_error(Path(path).parent, error)
        raise


if __name__ == "__main__":
    # Ray's workers must be able to import `work` by name, so it may not belong to `__main__`.
    from selftaught.training import launch as this_module

    this_module.main(sys.argv[1])

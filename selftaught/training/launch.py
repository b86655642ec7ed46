"""Fine-tunings on many devices: in this process, under torchrun or accelerate, or on a Ray cluster.

The loop of a method stays one plain process. A fine-tuning is a `Stage`: a file of rows in, a model
folder out. `launch` runs it here or in worker processes, with the same data and the same model at the
end: the examples of an optimizer step are as many, whatever the number of processes
(`training.fitting.shared_batch`).

Workers are started as `python -m selftaught.training.launch STAGE.json`. Their standard input stays open as
long as the process that started them lives; when it ends they end, however that came.
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
from typing import Any, Literal, Protocol

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

Launcher = Literal["inline", "torchrun", "accelerate", "ray"]
Kind = Literal["sft", "dpo", "outcome", "weighted"]
Progress = Callable[[int], Any]
SHOWN = 30
"""Lines of a failed worker's log in the error."""
PLACE = ("launcher", "num_processes", "accelerate_config")
"""Options a continued run may change: nothing stored depends on them."""


@dataclass(frozen=True)
class Launch:
    """Where fine-tunings run.

    Raises:
        ValueError: options that contradict each other.
    """

    launcher: Launcher = "inline"
    num_processes: int = 1
    accelerate_config: Path | None = None
    """A file that `accelerate config` writes: DDP, FSDP2, DeepSpeed."""

    def __post_init__(self) -> None:
        if self.num_processes < 1:
            raise ValueError(f"num_processes must be at least 1; got {self.num_processes}.")
        if self.launcher == "inline" and self.num_processes > 1:
            raise ValueError(
                f"num_processes {self.num_processes} wants a launcher: torchrun, accelerate or ray; "
                "inline is one process."
            )
        if (self.launcher == "accelerate") != (self.accelerate_config is not None):
            raise ValueError(
                "The launcher accelerate is for an accelerate_config, and nothing else reads one; got "
                f"launcher {self.launcher} and accelerate_config {self.accelerate_config}. Plain data "
                "parallelism needs none: --launcher torchrun."
            )


class Launched(Protocol):
    """The config of a method or a command, with the three options of `Launch`."""

    @property
    def launcher(self) -> Launcher: ...
    @property
    def num_processes(self) -> int: ...
    @property
    def accelerate_config(self) -> Path | None: ...


def launch_of(config: Launched) -> Launch:
    """The three options of a config.

    Raises:
        ValueError: they contradict each other.
    """
    return Launch(config.launcher, config.num_processes, config.accelerate_config)


@dataclass(frozen=True)
class Stage:
    """A fine-tuning as files and plain values, which another process can read."""

    kind: Kind
    model: str
    """The start model."""
    rows: Path
    """JSONL: of sft examples, of dpo preferences, of outcome `Judged`, of weighted token rows."""
    out: Path
    """The model folder to make."""
    checkpoints: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    """As `sft_config`, `dpo_config` or `outcome_config` takes them."""
    lora: Mapping[str, Any] | None = None
    """As `lora_config` takes them; None trains all weights."""


def run_stage(
    stage: Stage, progress: Progress | None = None, *, processes: int | None = None
) -> Training:
    """Run a stage in this process, which may be one of several that do.

    Args:
        processes: how many there must be; None: as many as there are.

    Raises:
        ValueError: what `train_sft` and its like raise, or another number of processes.
    """
    lora = lora_config(**stage.lora) if stage.lora is not None else None
    config = stage_config(stage.kind, stage.checkpoints, stage.options)
    match stage.kind:
        case "sft":
            train: Any = partial(train_sft, stage.model, read_examples(stage.rows))
        case "dpo":
            train = partial(train_dpo, stage.model, read_preferences(stage.rows))
        case "outcome":
            judged = [
                LabeledCompletion(
                    row["prompt"], tuple(row["ids"]), row["right"], row.get("chat_template_kwargs")
                )
                for row in read_jsonl(stage.rows)
            ]
            train = partial(train_outcome, stage.model, judged)
        case "weighted":
            train = partial(train_weighted, stage.model, list(read_jsonl(stage.rows)))
    if processes is not None and config.world_size != processes:
        raise ValueError(
            f"{processes} processes were asked for, and a worker finds itself in a world of "
            f"{config.world_size}. Nothing was trained: the launcher's settings give another number."
        )
    return train(config, out=stage.out, peft_config=lora, progress=progress)


def stage_config(kind: Kind, checkpoints: Path, options: Mapping[str, Any]) -> Any:
    """The trainer's config of a kind of stage.

    Raises:
        ValueError: an option cannot be used; names it.
    """
    match kind:
        case "dpo":
            return dpo_config(checkpoints, **options)
        case "outcome":
            return outcome_config(checkpoints, **options)
        case "sft" | "weighted":
            return sft_config(checkpoints, **options)


def launch(stage: Stage, how: Launch, progress: Progress | None = None) -> Training:
    """Run a stage as `how` says; a finished one is not run again.

    The workers' output goes to `NAME.log` beside the model folder `NAME`.

    Raises:
        ValueError: what `run_stage` raises here or in a worker, or `how` cannot be done here.
        OSError: a worker failed or was killed; shows the end of its log.
    """
    if how.launcher == "inline" or (stage.out / "training.json").exists():
        return run_stage(stage, progress)
    refuse_unfit(how, stage.options)
    _work(stage, how, progress)
    return run_stage(stage)


# ---------------------------------------------------------------- what is refused before


def refuse_unfit(how: Launch, options: Mapping[str, Any]) -> None:
    """Refuse a launch that cannot train with these options.

    Raises:
        ValueError: the processes cannot share a step, are more than there are devices, or the
            accelerate config contradicts the options.
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
    if torch.cuda.is_available() and processes > (there := torch.cuda.device_count()):
        raise ValueError(
            f"{processes} processes want a device each, and this machine has {there}. Give "
            f"--num-processes {there} or fewer, or --launcher ray on a cluster that has as many."
        )


def _refuse_contradictions(
    how: Launch, path: Path, options: Mapping[str, Any], shared: int
) -> None:
    """Everything in accelerate's file that says otherwise than the options."""
    said = _accelerate_said(path)
    _refuse_other_kinds(how, path, said.get("distributed_type") or "NO")  # YAML's bare NO is false
    bf16 = "bf16" if options.get("bf16") else "no"
    deepspeed = said.get("deepspeed_config") or {}
    expected: list[tuple[str, Any, tuple[Any, ...], str]] = [
        ("num_processes", said.get("num_processes"), (None, how.num_processes), "--num-processes"),
        ("num_machines", said.get("num_machines"), (None, 1), "one machine; several: --launcher ray"),
        ("mixed_precision", said.get("mixed_precision"), (None, bf16), "bf16"),
        *(
            ("gradient_accumulation_steps", each.get("gradient_accumulation_steps"), (None, "auto", shared),
             "which is divided among the processes, so leave it out, or \"auto\"")
            for each in (said, deepspeed)
        ),
    ]  # fmt: skip
    for name, found, allowed, why in expected:
        if found not in allowed:
            raise ValueError(
                f"{path} says {name}: {found}, which contradicts {name} {allowed[-1]} ({why}). "
                "Change one of them."
            )
    port = said.get("main_process_port")
    if port and _in_use(int(port)):
        raise ValueError(
            f"{path} says main_process_port: {port}, which another process uses. Leave it out: a "
            "free one is found."
        )


def _refuse_other_kinds(how: Launch, path: Path, kind: str) -> None:
    """Refuse a file with which accelerate would train otherwise than it says."""
    import torch

    if kind in ("NO", "MULTI_CPU") and how.num_processes > 1:
        raise ValueError(
            f"{path} says distributed_type: {kind}, with which accelerate starts one process, and "
            f"--num-processes is {how.num_processes}. MULTI_GPU is plain data parallelism, on CPUs too."
        )
    if kind not in ("NO", "MULTI_GPU") and not torch.accelerator.is_available():
        raise ValueError(
            f"{path} says distributed_type: {kind}, and this machine has no accelerator: without one "
            "accelerate trains with plain data parallelism, or in one process, whatever its file says. "
            "Give --launcher torchrun, or a file that says MULTI_GPU."
        )


def _accelerate_said(path: Path) -> dict[str, Any]:
    """What is in accelerate's file.

    Raises:
        ValueError: it is not there, is not YAML, or accelerate does not take it.
    """
    if not path.is_file():
        raise ValueError(f"There is no accelerate config {path}; `accelerate config` writes one.")
    from accelerate.commands.config.config_args import load_config_from_file

    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"it holds {type(said).__name__}, not names with values")
        load_config_from_file(str(path))
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not an accelerate config: {error}.") from None
    return said


def _in_use(port: int) -> bool:
    import socket

    with socket.socket() as one:
        return one.connect_ex(("localhost", port)) == 0


# ---------------------------------------------------------------- the process that starts workers


def _work(stage: Stage, how: Launch, progress: Progress | None) -> None:
    """Have workers run a stage to its end."""
    folder = _beside(stage.out, "launch")
    shutil.rmtree(folder, ignore_errors=True)
    told = {"stage": asdict(stage), "processes": how.num_processes, "folder": str(Path.cwd()),
            "launcher": how.launcher}  # fmt: skip
    path, log = folder / f"stage-{secrets.token_hex(4)}.json", _beside(stage.out, "log")
    write_atomically(path, json.dumps(told, default=str, indent=2) + "\n")
    asked = command(how, ["-m", "selftaught.training.launch", str(path)])
    try:
        code = supervise(asked, log, folder / "steps", progress)
    finally:
        path.unlink(
            missing_ok=True
        )  # a worker on another machine that still runs ends at its next step
    _raise_told(folder / "error.json")
    if not (stage.out / "training.json").exists():
        raise ChildProcessError(failed(how, code, log))
    shutil.rmtree(folder, ignore_errors=True)


def command(how: Launch, module: Sequence[str]) -> list[str]:
    """The command that runs `python MODULE` in as many processes as `how` says."""
    count = str(how.num_processes)
    match how.launcher:
        case "torchrun":
            return [sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", count, *module]  # fmt: skip
        case "accelerate":
            port = ["--main_process_port", "0"]
            said = _accelerate_said(how.accelerate_config) if how.accelerate_config else {}
            return [sys.executable, "-m", "accelerate.commands.launch",
                    "--config_file", str(how.accelerate_config), "--num_processes", count,
                    *([] if said.get("main_process_port") else port), *module]  # fmt: skip
        case _:
            return [sys.executable, *module]


def supervise(
    command: Sequence[str], log: Path, steps: Path | None = None, progress: Progress | None = None
) -> int:
    """Run a command to its end and return its exit code; it ends when this process ends.

    Args:
        log: where its output goes.
        steps: a file to which it appends the numbers of steps it has done, for `progress`.
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
    """End a command and the workers below it, which read the end of their standard input."""
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
    """Tell of the steps in the file since the byte `read`; returns how far it is read."""
    if steps is None or progress is None or not steps.exists():
        return read
    new = steps.read_bytes()[read:]
    whole = new[: new.rfind(b"\n") + 1]
    for line in whole.splitlines():
        progress(int(line))
    return read + len(whole)


def failed(how: Launch, code: int, log: Path) -> str:
    """What to say of workers that ended without a word of their own."""
    text = log.read_bytes()[-50_000:].decode("utf-8", errors="replace")
    last = "\n".join(f"  {line}" for line in _printable(text).splitlines()[-SHOWN:])
    return (
        f"A worker process of --launcher {how.launcher} failed or was killed (exit code {code}). "
        f"Repeat the command to continue from the last checkpoint. The end of its log {log}:\n{last}"
    )


def _printable(text: str) -> str:
    """Without escape sequences and other control characters, which a terminal would obey."""
    text = re.sub(r"\x1b\[[0-9;?]*[ -/]*[@-~]", "", text)
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text.replace("\r", "\n"))


def _raise_told(path: Path) -> None:
    """Raise what a worker has told of."""
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


# ---------------------------------------------------------------- a worker


def work(path: str) -> None:
    """Do a worker's part of the stage in a file, and leave words there if it cannot be done."""
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    os.chdir(told["folder"])
    stage = told["stage"] | {
        name: Path(told["stage"][name]) for name in ("rows", "out", "checkpoints")
    }
    first, beside = os.environ.get("RANK", "0") == "0", Path(path).parent
    try:
        run_stage(
            Stage(**stage),
            partial(_note, Path(path), beside / "steps" if first else None),
            processes=told["processes"],
        )
    except (ValueError, ImportError, OSError) as error:
        _tell(beside, error)
        raise


def _note(stage: Path, path: Path | None, steps: int) -> None:
    """Note steps that are done; end where the stage's file has gone, for then nobody waits for it."""
    if not stage.exists():
        os._exit(1)
    if path is not None:
        with path.open("a", encoding="ascii") as file:
            file.write(f"{steps}\n")


def _tell(beside: Path, error: ValueError | ImportError | OSError) -> None:
    """Leave an error for the process that started the workers; the first of them is heard."""
    kinds = (OSError, ImportError, ValueError)
    kind = next(one.__name__ for one in kinds if isinstance(error, one))
    number = error.errno if isinstance(error, OSError) else None
    words = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError) and error.filename:
        words += f": {error.filename}"
    if not (beside / "error.json").exists():
        text = json.dumps({"kind": kind, "number": number, "words": words}) + "\n"
        mine = beside / f"error-{os.getpid()}.json"  # all may fail at the same time
        write_atomically(mine, text)
        mine.replace(beside / "error.json")


def end_with_starter(end: Callable[[], Any]) -> None:
    """End this process, by this call, when the one that started the launch has ended."""

    def reporter() -> None:
        while os.read(0, 1):
            pass
        end()
        time.sleep(30)
        os._exit(1)

    threading.Thread(target=reporter, daemon=True).start()


def main(path: str) -> None:
    """What `python -m selftaught.training.launch STAGE.json` does."""
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    on_ray = told["launcher"] == "ray"  # whose driver takes its workers with it
    end_with_starter(_thread.interrupt_main if on_ray else partial(os._exit, 1))
    if not on_ray:
        import torch.distributed

        work(path)
        if torch.distributed.is_initialized():  # or a thread of gloo may outlive the interpreter
            torch.distributed.destroy_process_group()
        return
    from selftaught.processes import ray_cluster as cluster

    paths = [told["stage"][name] for name in ("rows", "model")]
    try:
        cluster.run_workers(work, path, told["processes"], Path(path).parent / "ray", paths)
    except (ValueError, ImportError, OSError) as error:
        _tell(Path(path).parent, error)
        raise


if __name__ == "__main__":
    from selftaught.training import (
        launch as here,  # so that Ray's workers import what they are given
    )

    here.main(sys.argv[1])

"""What every fine-tuning here shares: rows in, a model folder out, continued after a kill.

TRL, transformers and torch are imported inside the functions, so that a method's Config can be
read (`--help`, `--dry-run`) without them.
"""

import copy
import errno
import hashlib
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.hub import check_model_name
from selftaught.records import plain_fields, write_atomically
from selftaught.training.options import checked_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

DECIDING = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16",
    "weight_decay", "max_grad_norm", "optim",
)  # fmt: skip
"""Options that decide the weights; a continued training must have the same."""
PREFERENCES = ("beta", "loss_type", "label_smoothing")
"""Those that only TRL's DPOConfig has."""
LOGGED = ("step", "loss", "learning_rate", "rewards/accuracies", "rewards/margins")
TOKENS = ("input_ids", "prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
"""The columns whose tokens a model reads in a pass; a preference's prompt is read twice."""


@dataclass(frozen=True)
class Training:
    """What a fine-tuning did."""

    model: Path
    steps: int
    loss: float
    """Mean of the logged losses over all steps: of SFT, nats per supervised token."""
    trained_on: int
    too_long: int
    log: list[dict[str, float]]
    """`step`, `loss`, `learning_rate` as logged; of preferences also reward accuracy and margin."""
    tokens: int = 0
    """Tokens read in all passes, prompts included."""
    from_text: int = 0
    """Examples whose completion was tokenized from its text, not taken as it was sampled."""


def trl_config(kind: str, output_dir: Path, ours: dict[str, Any], options: dict[str, Any]) -> Any:
    """TRL's config of this name with our defaults below the caller's options.

    Raises:
        ValueError: see `checked_config`.
    """
    import torch
    import trl

    shared = {
        "use_cpu": not torch.accelerator.is_available(),  # said, or bf16 is refused there
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "logging_steps": 1,  # so is each; and means over several would differ after a continuation
        "disable_tqdm": True,
        "save_total_limit": 1,
        "dataloader_pin_memory": False,
        "ddp_find_unused_parameters": False,
    }
    page = kind.removesuffix("Config").lower()
    return checked_config(
        f"TRL's {kind}", getattr(trl, kind),
        f"Its fields are listed at https://huggingface.co/docs/trl/{page}_trainer.",
        {"output_dir": str(output_dir), **shared, **ours}, options,
    )  # fmt: skip


def lora_config(*, r: int, alpha: int, target_modules: str) -> "LoraConfig":
    """PEFT's own `LoraConfig` for a causal language model; "all-linear" takes every linear layer."""
    from peft import LoraConfig

    targets = target_modules if target_modules == "all-linear" else target_modules.split(",")
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


def fit(
    model: str | Path,
    make_rows: "Callable[[PreTrainedTokenizerBase], tuple[Sequence[Row], int]]",
    made_of: Any,
    config: Any,
    open_trainer: Callable[..., Any],
    *,
    out: Path,
    load: Callable[[str], Any],
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model on rows, which its tokenizer makes; LoRA is merged at the end.

    The model appears in `out` when training has ended and not before. Checkpoints go to
    `config.output_dir`; repeating the call continues from the last whole one, to the same weights.

    In a world of several processes (torchrun, accelerate, Ray Train) every one makes this call. Batch
    size times accumulation is what a step takes in all of them together, so the world's size changes
    neither the training nor what it is known by: see `shared_batch`. The first process writes.

    Args:
        make_rows: returns the rows, and how many were left out as too long.
        made_of: what the rows are made of, as JSON has it or in records; another training in
            `out` is known by it.
        open_trainer: makes the trainer of `model`, `args`, `train_dataset`, `processing_class`,
            `peft_config` and `callbacks`.
        load: opens the start model.

    Raises:
        ValueError: `out` holds a training on other rows, the loss is not finite, or the processes
            cannot share a step equally.
    """
    checkpoints = Path(str(config.output_dir))
    made_from = _made_from(model, made_of, config, peft_config)
    _refuse_another(out / "training.json", made_from)
    config = _shared(config)
    first = config.process_index == 0
    if (out / "training.json").exists():
        if first:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return _stored(out)
    _refuse_another(checkpoints / "made_from.json", made_from)
    from transformers import AutoTokenizer, PrinterCallback, set_seed
    from transformers.utils import logging

    from selftaught.samplers.weights import check_weights

    logging.disable_progress_bar()  # the bars of loading and saving would break ours

    check_weights(str(model))
    check_model_name(str(model))
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows, too_long = make_rows(tokenizer)
    set_seed(config.seed)
    trained = load(str(model))
    trained.config.use_cache = False
    trained.config.pad_token_id = tokenizer.pad_token_id
    with _no_bars():
        trainer = open_trainer(
            model=trained,
            args=config,
            train_dataset=_dataset(rows),
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),  # PEFT writes into it what "all-linear" is
            callbacks=[_watcher(progress)],
        )
    trainer.remove_callback(PrinterCallback)
    if first:
        write_atomically(
            checkpoints / "made_from.json", json.dumps({"made_from": made_from}) + "\n"
        )
    with _told_if_full(checkpoints):
        result = trainer.train(resume_from_checkpoint=_continued(checkpoints, config))
    finished = _finished(trainer, lambda: load(str(model)), peft_config)
    done = _done(trainer, result, out, rows, too_long)
    if first:
        with _told_if_full(out):
            _save(finished, tokenizer, done, made_from)
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return done


def shared_batch(size: int, batches: int, world: int) -> tuple[int, int]:
    """Batch size and accumulated batches of each of `world` processes, for the same examples a step.

    Accumulation is divided as far as it goes, the batch for the rest: 8 x 16 over 8 processes is
    8 x 2 in each, 48 x 1 over 2 is 24 x 1.

    Raises:
        ValueError: the examples of a step cannot be shared equally; names numbers that can.
    """
    whole = size * batches
    if whole % world:
        fitting = [str(n) for n in range(1, whole + 1) if whole % n == 0]
        raise ValueError(
            f"A step takes {whole} examples (per_device_train_batch_size {size} x "
            f"gradient_accumulation_steps {batches}), which {world} processes cannot share equally. "
            f"Give --num-processes {_either(fitting)}, or examples of a step that {world} divides, "
            f"such as {whole + world - whole % world}."
        )
    by = math.gcd(batches, world)
    return size // (world // by), batches // by


def _either(numbers: Sequence[str]) -> str:
    return f"{', '.join(numbers[:-1])} or {numbers[-1]}" if len(numbers) > 1 else numbers[0]


def _shared(config: Any) -> Any:
    """The config of this process among all; one process trains on one device."""
    if config.world_size == 1:
        if config.n_gpu > 1:
            config._n_gpu = 1  # or DataParallel would take as many batches as there are devices
        return config
    size, batches = shared_batch(
        config.per_device_train_batch_size, config.gradient_accumulation_steps, config.world_size
    )
    # Made anew, because accelerate's DeepSpeed reads these numbers when a config is made.
    return replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=batches)


def _continued(folder: Path, config: Any) -> str | None:
    """The checkpoint to continue from: the first process looks, and tells the others."""
    if config.world_size == 1:
        return _last_whole_checkpoint(folder)
    from accelerate.utils import broadcast_object_list

    found = [_last_whole_checkpoint(folder) if config.process_index == 0 else None]
    return broadcast_object_list(found)[0]


def _finished(trainer: Any, load: Callable[[], Any], peft_config: "LoraConfig | None") -> Any:
    """The trained model with all its weights, LoRA merged; of the first process, where they are spread."""
    from accelerate.utils import DistributedType

    accelerator, finished = trainer.accelerator, trainer.model
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        weights = accelerator.get_state_dict(trainer.model_wrapped)  # all take part in this
        if not accelerator.is_main_process:
            return None
        spread = accelerator.unwrap_model(trainer.model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # or loading would spread it again, and wait for the others
        finished = load()
        if peft_config is not None:
            from peft import get_peft_model

            finished = get_peft_model(finished, spread.peft_config["default"])
        finished.load_state_dict(weights)
    if peft_config is not None:
        finished = finished.merge_and_unload()
    finished.config.use_cache = True
    return finished


def _done(trainer: Any, result: Any, out: Path, rows: Sequence[Row], too_long: int) -> Training:
    """What a training that has just ended did."""
    log = [
        {key: entry[key] for key in LOGGED if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    lengths = [sum(len(row[key]) for key in TOKENS if key in row) for row in rows]
    tokens = round(sum(lengths) * (trainer.state.epoch or 0))
    loss = _mean_loss(log, result.training_loss)
    from_text = getattr(rows, "from_text", 0)  # only of rows that are made of examples
    return Training(out, result.global_step, loss, len(rows), too_long, log, tokens, from_text)


def causal_lm(model: str) -> Any:
    """A causal language model in float32, as training wants it."""
    from selftaught.samplers.weights import load_model

    return load_model(model, dtype="float32")


def _dataset(rows: Sequence[Row], part: int = 10_000) -> Any:
    """The rows as a table; a part at a time, so that they are never all there as lists of numbers."""
    from datasets import Dataset, concatenate_datasets

    starts = range(0, len(rows), part)
    return concatenate_datasets([Dataset.from_list(list(rows[at : at + part])) for at in starts])


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of datasets and TRL, which would break ours."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar

    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


def _watcher(progress: Callable[[int], None] | None) -> Any:
    """A callback that reports steps and stops at a loss that is not a number."""
    from transformers import TrainerCallback

    class Watcher(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress and state.global_step:
                progress(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if progress:
                progress(1)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(float(loss)):
                raise ValueError(
                    f"The training loss is {loss} at step {state.global_step}. Lower learning_rate "
                    f"(now {args.learning_rate:g}), or turn bf16 off; rollouts and earlier "
                    "iterations are kept."
                )

    return Watcher()


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint written to its end; a torn one is removed, or it would be trusted."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    while found:
        newest = found.pop()
        try:
            json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(newest)
            continue
        for state in newest.glob("rng_state*.pth"):
            if not zipfile.is_zipfile(state):
                state.unlink()  # another process was killed as it wrote it; only dropout wants it
        return str(newest)
    return None


def _mean_loss(log: Sequence[dict[str, float]], tracked_status: float) -> float:
    """The mean of the logged losses: TRL's own figure covers a continued part only."""
    return sum(row["loss"] for row in log) / len(log) if log else tracked_status


@contextmanager
def _told_if_full(folder: Path) -> Iterator[None]:
    """Turn what torch and safetensors raise on a full disk into words."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        written = any(word in str(error) for word in ("write", "writing", "unexpected pos", "I/O"))
        if isinstance(error, RuntimeError) and not written:
            raise
        raise OSError(
            errno.ENOSPC,
            f"Could not write to {folder}: {error}. Make room and repeat the command to continue",
        ) from error


def _made_from(model: str | Path, made_of: Any, config: Any, peft_config: Any) -> str:
    """A hash of what decides the weights that come out: start model, examples and options."""
    names = DECIDING + (PREFERENCES if hasattr(config, "beta") else ())
    options = {name: getattr(config, name) for name in names}
    lora = None
    if peft_config is not None:
        named = peft_config.target_modules
        targets = named if isinstance(named, str) else sorted(named or ())
        lora = [peft_config.r, peft_config.lora_alpha, targets]
    whole = [Path(model).name, made_of, options, lora]
    digest = hashlib.sha256()
    for piece in _pieces(whole, depth=2):
        digest.update(piece.encode())
    return digest.hexdigest()[:16]


def _pieces(value: Any, depth: int) -> Iterator[str]:
    """What `json.dumps` would write of a value and the records in it, whose lists may be long."""
    if not depth or not isinstance(value, list | tuple):
        yield json.dumps(
            value, ensure_ascii=True, sort_keys=True,
            default=lambda one: plain_fields(one) if is_dataclass(one) else str(one),
        )  # fmt: skip
        return
    yield "["
    for number, item in enumerate(value):
        yield ", " if number else ""
        yield from _pieces(item, depth - 1)
    yield "]"


def _refuse_another(report: Path, made_from: str) -> None:
    """Refuse to continue, or to take for finished, a training on other data or with other options."""
    if not report.exists():
        return
    found = json.loads(report.read_text(encoding="utf-8")).get("made_from")
    if found != made_from:
        raise ValueError(
            f"{report.parent} was made from another model, other examples or other options. "
            "Give another folder, or delete it to train anew."
        )


def _save(model: Any, tokenizer: Any, done: Training, made_from: str) -> None:
    """The model folder, as a whole or not at all; what the training did stands beside the weights."""
    partial = done.model.with_name(done.model.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    report = {"steps": done.steps, "loss": done.loss, "trained_on": done.trained_on,
              "too_long": done.too_long, "log": done.log, "tokens": done.tokens,
              "from_text": done.from_text, "made_from": made_from}  # fmt: skip
    write_atomically(partial / "training.json", json.dumps(report) + "\n")
    shutil.rmtree(done.model, ignore_errors=True)
    partial.rename(done.model)


def _stored(out: Path) -> Training:
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    del report["made_from"]
    return Training(model=out, **report)

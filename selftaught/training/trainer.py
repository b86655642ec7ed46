"""The training loop that all kinds of fine-tuning share: token rows in, a model folder out.

Training resumes from the last checkpoint when it was interrupted. TRL, transformers and torch are
imported inside the functions, so that a method's configuration can be read (`--help`, `--dry-run`)
without them.
"""

import copy
import errno
import json
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.hub import check_model_name
from selftaught.records import write_atomically
from selftaught.training.model_folder import Training, made_from, refuse_another, save, stored
from selftaught.training.options import checked_config

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerBase,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
    )
    from transformers.trainer_utils import TrainOutput

Row = dict[str, Any]

LOGGED = ("step", "loss", "learning_rate", "rewards/accuracies", "rewards/margins")
TOKENS = ("input_ids", "prompt_ids", "prompt_ids", "chosen_ids", "rejected_ids")
"""Columns whose tokens count as read by the model; a preference's prompt is read twice."""


def trl_config(kind: str, output_dir: Path, ours: dict[str, Any], options: dict[str, Any]) -> Any:
    """Build a TRL config from selftaught's defaults and the caller's options.

    Args:
        kind: Name of the class, such as "SFTConfig".
        output_dir: Folder for checkpoints.
        ours: Defaults for this kind of training, in addition to those for all kinds.
        options: The caller's options; they override the defaults.

    Raises:
        ValueError: See `selftaught.training.options.checked_config`.
    """
    import torch
    import trl

    shared = {
        # Set explicitly, because otherwise bf16 is rejected on a machine without an accelerator.
        "use_cpu": not torch.accelerator.is_available(),
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # a NaN loss must be logged, see `_callback`
        "logging_steps": 1,  # means over several steps would differ after resuming
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
    """Return a PEFT `LoraConfig` for a causal language model.

    Args:
        r: Rank of the adapter.
        alpha: Scaling of the adapter (`lora_alpha`).
        target_modules: Names of layers, separated by commas, or "all-linear" for all linear layers.
    """
    from peft import LoraConfig

    targets = target_modules if target_modules == "all-linear" else target_modules.split(",")
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Recipe:
    """The parts of a fine-tuning that depend on its kind, such as SFT or DPO."""

    make_rows: "Callable[[PreTrainedTokenizerBase], tuple[Sequence[Row], int]]"
    """Function from the tokenizer to the rows and the number of rows that were left out because
    they were too long."""
    made_of: object
    """The data that the rows are made from, as JSON values or records. Its hash identifies the
    training in the model folder."""
    open_trainer: "Callable[..., Trainer]"
    """Creates the trainer from `model`, `args`, `train_dataset`, `processing_class`, `peft_config`
    and `callbacks`."""
    load: "Callable[[str], PreTrainedModel]"
    """Loads the start model."""


def fit(
    model: str | Path,
    recipe: Recipe,
    config: "TrainingArguments",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model on rows of token ids. A LoRA adapter is merged into the model at the end.

    The model folder `out` is written only after training has finished. Checkpoints are written to
    `config.output_dir`. Repeating an interrupted call resumes from the last complete checkpoint and
    gives the same weights.

    In a distributed job (torchrun, accelerate, Ray Train), every process makes this call. The batch
    size times gradient accumulation of `config` is the global batch size, so the number of
    processes changes neither the result nor the identity of the training (see `shared_batch`). The
    first process writes the files.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        recipe: The rows and the trainer.
        config: TRL or transformers training configuration.
        out: Model folder to write.
        peft_config: LoRA configuration. None trains all weights.
        progress: Called with the number of optimizer steps just finished.

    Raises:
        ValueError: `out` contains a training with other data or options, the loss is not finite, or
            the global batch cannot be divided equally among the processes.
    """
    checkpoints = Path(str(config.output_dir))
    identity = made_from(model, recipe.made_of, config, peft_config)
    refuse_another(out / "training.json", identity)
    config = _shared(config)
    first = config.process_index == 0
    if (out / "training.json").exists():
        if first:
            shutil.rmtree(checkpoints, ignore_errors=True)
        return stored(out)
    refuse_another(checkpoints / "made_from.json", identity)
    tokenizer, rows, too_long = _rows(str(model), recipe)
    trainer = _trainer(str(model), recipe, config, tokenizer, rows, peft_config, progress)
    keep_tensorboard(trainer, out.with_name(f"{out.name}.tensorboard"))
    if first:
        write_atomically(checkpoints / "made_from.json", json.dumps({"made_from": identity}) + "\n")
    with _explain_full_disk(checkpoints):
        result = trainer.train(resume_from_checkpoint=_checkpoint_to_resume(checkpoints, config))
    finished = _merged_model(trainer, lambda: recipe.load(str(model)), peft_config)
    summary = _summary(trainer, result, out, rows, too_long)
    if finished is not None and first:
        with _explain_full_disk(out):
            save(finished, tokenizer, summary, identity)
        shutil.rmtree(checkpoints, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return summary


def keep_tensorboard(trainer: "Trainer", folder: Path) -> None:
    """Have transformers' TensorBoard callback write into a folder.

    Its default is in the folder of the checkpoints, which is deleted when the training has
    finished. The environment variable TENSORBOARD_LOGGING_DIR takes precedence.
    """
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def _rows(model: str, recipe: Recipe) -> "tuple[PreTrainedTokenizerBase, Sequence[Row], int]":
    """Return a model's tokenizer, the rows, and the number of rows that were too long."""
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from selftaught.samplers.weights import check_weights

    logging.disable_progress_bar()  # loading and saving would print over our progress bar
    check_weights(model)
    check_model_name(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, *recipe.make_rows(tokenizer)


def _trainer(
    model: str,
    recipe: Recipe,
    config: "TrainingArguments",
    tokenizer: "PreTrainedTokenizerBase",
    rows: Sequence[Row],
    peft_config: "LoraConfig | None",
    progress: Callable[[int], None] | None,
) -> "Trainer":
    """Load a model and return its trainer."""
    from transformers import PrinterCallback, set_seed

    set_seed(config.seed)
    trained = recipe.load(model)
    trained.config.use_cache = False
    trained.config.pad_token_id = tokenizer.pad_token_id
    with _no_bars():
        trainer = recipe.open_trainer(
            model=trained,
            args=config,
            train_dataset=_dataset(rows),
            processing_class=tokenizer,
            peft_config=copy.deepcopy(peft_config),  # PEFT replaces "all-linear" in it
            callbacks=[_callback(progress)],
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def shared_batch(size: int, batches: int, world: int) -> tuple[int, int]:
    """Return batch size and gradient accumulation steps per process for the same global batch size.

    The accumulation steps are divided first, then the batch size. For example, 8 x 16 (batch size x
    accumulation) becomes 8 x 2 on 8 processes, and 48 x 1 becomes 24 x 1 on 2 processes.

    Args:
        size: Batch size with one process.
        batches: Gradient accumulation steps with one process.
        world: Number of processes.

    Raises:
        ValueError: The global batch cannot be divided equally. The message names numbers of
            processes that work.
    """
    total = size * batches
    if total % world:
        divisors = [str(n) for n in range(1, total + 1) if total % n == 0]
        raise ValueError(
            f"The global batch size is {total} (per_device_train_batch_size {size} x "
            f"gradient_accumulation_steps {batches}), which {world} processes cannot share "
            f"equally. Give --num-processes {_either(divisors)}, or a global batch size that is a "
            f"multiple of {world}, such as {total + world - total % world}."
        )
    by = math.gcd(batches, world)
    return size // (world // by), batches // by


def _either(numbers: Sequence[str]) -> str:
    return f"{', '.join(numbers[:-1])} or {numbers[-1]}" if len(numbers) > 1 else numbers[0]


def _shared(config: "TrainingArguments") -> "TrainingArguments":
    """Return the config of one process of the job; each process trains on one device."""
    if config.world_size == 1:
        if config.n_gpu > 1:
            config._n_gpu = (
                1  # otherwise DataParallel multiplies the batch size by the number of devices
            )
        return config
    size, batches = shared_batch(
        config.per_device_train_batch_size, config.gradient_accumulation_steps, config.world_size
    )
    # A new config, because accelerate's DeepSpeed plugin reads these numbers when one is created.
    return replace(config, per_device_train_batch_size=size, gradient_accumulation_steps=batches)


def _checkpoint_to_resume(folder: Path, config: "TrainingArguments") -> str | None:
    """Return the checkpoint to resume from; the first process decides for all."""
    if config.world_size == 1:
        return _last_whole_checkpoint(folder)
    from accelerate.utils import broadcast_object_list

    found = [_last_whole_checkpoint(folder) if config.process_index == 0 else None]
    return broadcast_object_list(found)[0]


def _merged_model(
    trainer: "Trainer", load: "Callable[[], PreTrainedModel]", peft_config: "LoraConfig | None"
) -> "PreTrainedModel | None":
    """Return the trained model with all its weights and LoRA merged.

    With FSDP or DeepSpeed, the first process gets the model and the others get None.
    """
    from accelerate.utils import DistributedType

    accelerator = trainer.accelerator
    finished: Any = trainer.model
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        weights = accelerator.get_state_dict(trainer.model_wrapped)  # a collective operation
        if not accelerator.is_main_process:
            return None
        sharded = accelerator.unwrap_model(trainer.model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            # Otherwise loading would shard the model again and wait for the other processes.
            unset_hf_deepspeed_config()
        finished = load()
        if peft_config is not None:
            from peft import get_peft_model

            finished = get_peft_model(finished, sharded.peft_config["default"])
        finished.load_state_dict(weights)
    if peft_config is not None:
        finished = finished.merge_and_unload()
    finished.config.use_cache = True
    return finished


def _summary(
    trainer: "Trainer", result: "TrainOutput", out: Path, rows: Sequence[Row], too_long: int
) -> Training:
    """Return the result of a training that has just finished."""
    log = [
        {key: entry[key] for key in LOGGED if key in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    lengths = [sum(len(row[key]) for key in TOKENS if key in row) for row in rows]
    tokens = round(sum(lengths) * (trainer.state.epoch or 0))
    loss = _mean_loss(log, result.training_loss)
    from_text = getattr(rows, "from_text", 0)  # only `TokenRows` have it
    return Training(out, result.global_step, loss, len(rows), too_long, log, tokens, from_text)


def causal_lm(model: str) -> "PreTrainedModel":
    """Load a causal language model in float32 for training."""
    from selftaught.samplers.weights import load_plain_model

    return load_plain_model(model, dtype="float32")


def _dataset(rows: Sequence[Row], part: int = 10_000) -> "Dataset":
    """Return the rows as a `datasets.Dataset`.

    It is built from parts, so that not all rows are in memory as lists of numbers at once.
    """
    from datasets import Dataset, concatenate_datasets

    starts = range(0, len(rows), part)
    return concatenate_datasets([Dataset.from_list(list(rows[at : at + part])) for at in starts])


@contextmanager
def _no_bars() -> Iterator[None]:
    """Disable the progress bars of datasets and TRL, which would print over ours."""
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


def _callback(progress: Callable[[int], None] | None) -> "TrainerCallback":
    """Return a callback that reports progress and stops training at a loss that is not finite."""
    from transformers import TrainerCallback

    class StepCallback(TrainerCallback):
        def on_train_begin(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            **kwargs: object,
        ) -> None:
            if progress and state.global_step:
                progress(state.global_step)

        def on_step_end(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            **kwargs: object,
        ) -> None:
            if progress:
                progress(1)

        def on_log(
            self,
            args: "TrainingArguments",
            state: "TrainerState",
            control: "TrainerControl",
            logs: dict[str, float] | None = None,
            **kwargs: object,
        ) -> None:
            loss = (logs or {}).get("loss")
            if loss is not None and not math.isfinite(float(loss)):
                raise ValueError(
                    f"The training loss is {loss} at step {state.global_step}. Lower learning_rate "
                    f"(now {args.learning_rate:g}), or disable bf16. Rollouts and earlier "
                    "iterations are kept."
                )

    return StepCallback()


def _last_whole_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint; incomplete ones are deleted."""
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
                # A process was killed while it wrote this file. Only dropout needs it.
                state.unlink()
        return str(newest)
    return None


def _mean_loss(log: Sequence[dict[str, float]], training_loss: float) -> float:
    """Return the mean of the logged losses; TRL's `training_loss` covers only the resumed part."""
    return sum(row["loss"] for row in log) / len(log) if log else training_loss


@contextmanager
def _explain_full_disk(folder: Path) -> Iterator[None]:
    """Turn the errors that torch and safetensors raise on a full disk into an `OSError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        written = any(word in str(error) for word in ("write", "writing", "unexpected pos", "I/O"))
        if isinstance(error, RuntimeError) and not written:
            raise
        raise OSError(
            errno.ENOSPC,
            f"Could not write to {folder}: {error}. "
            "Free disk space and repeat the command to resume",
        ) from error

"""Fine-tuning: examples in, a model folder out. The only door to TRL.

TRL, transformers and torch are imported inside the functions, so that a method's Config can be
read (`--help`, `--dry-run`) without them.

TRL's own preparation of a data set would cut an over-long row at its end, where the answer stands,
and say nothing. So rows are tokenized here: those that do not fit are dropped and counted.
"""

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.records import Example, write_atomically

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

DECIDING = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16",
    "weight_decay", "max_grad_norm", "optim",
)  # fmt: skip
"""Options of TRL's SFTConfig that decide the weights; a continued training must have the same."""
IGNORED = -100
"""The label of a token without loss, in torch and transformers."""


@dataclass(frozen=True)
class Training:
    """What a fine-tuning did."""

    model: Path
    steps: int
    loss: float
    """Mean loss per supervised token over all steps, in nats."""
    trained_on: int
    too_long: int
    log: list[dict[str, float]]
    """`step`, `loss`, `learning_rate` as logged."""


def sft_config(output_dir: Path, **options: Any) -> "SFTConfig":
    """TRL's own `SFTConfig`; what is set here suits small models on any device, all can be given.

    Raises:
        ValueError: an option that TRL does not know.
    """
    from trl import SFTConfig

    ours = {
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
        "logging_steps": 1,  # so is each; and means over several would differ after a continuation
        "disable_tqdm": True,
        "save_total_limit": 1,
        "dataloader_pin_memory": False,
    }
    try:
        return SFTConfig(output_dir=str(output_dir), **(ours | options))
    except TypeError as error:
        raise ValueError(
            f"TRL's SFTConfig refused the training options: {error}. "
            "Its fields are listed at https://huggingface.co/docs/trl/sft_trainer."
        ) from None


def lora_config(*, r: int, alpha: int, target_modules: str) -> "LoraConfig":
    """PEFT's own `LoraConfig` for a causal language model; "all-linear" takes every linear layer."""
    from peft import LoraConfig

    targets = target_modules if target_modules == "all-linear" else target_modules.split(",")
    return LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")


def train_sft(
    model: str | Path,
    examples: Sequence[Example],
    config: "SFTConfig",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model on examples, with loss on their completions only; LoRA is merged at the end.

    The model appears in `out` when training has ended and not before. Checkpoints go to
    `config.output_dir`; repeating the call continues from the last whole one, to the same weights.

    Raises:
        ValueError: no example, none that fits `config.max_length`, or a loss that is not finite.
    """

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[dict[str, list[int]]], int]:
        return tokenized(examples, tokenizer, config.max_length)

    told = [asdict(one) for one in examples]
    return train_rows(
        model, rows, told, config, out=out, peft_config=peft_config, progress=progress
    )


def train_rows(
    model: str | Path,
    make_rows: "Callable[[PreTrainedTokenizerBase], tuple[list[dict[str, list[int]]], int]]",
    made_of: Any,
    config: "SFTConfig",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """`train_sft` on rows of `input_ids` and `labels`, which the model's tokenizer makes.

    Args:
        make_rows: returns the rows, and how many were left out as too long.
        made_of: what the rows are made of, as JSON has it; another training in `out` is known by it.
    """
    checkpoints = Path(str(config.output_dir))
    made_from = _made_from(model, made_of, config, peft_config)
    _refuse_another(out / "training.json", made_from)
    if (out / "training.json").exists():
        shutil.rmtree(checkpoints, ignore_errors=True)
        return _stored(out)
    _refuse_another(checkpoints / "made_from.json", made_from)
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, set_seed
    from transformers.utils import logging
    from trl import SFTTrainer

    logging.disable_progress_bar()  # the bars of loading and saving would break ours

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    rows, too_long = make_rows(tokenizer)
    set_seed(config.seed)
    trained = AutoModelForCausalLM.from_pretrained(str(model), dtype="float32")
    trained.config.use_cache = False
    trainer = SFTTrainer(
        model=trained,
        args=config,
        train_dataset=_dataset(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[_watcher(progress)],
    )
    trainer.remove_callback(PrinterCallback)
    write_atomically(checkpoints / "made_from.json", json.dumps({"made_from": made_from}) + "\n")
    with _told_if_full(checkpoints):
        result = trainer.train(resume_from_checkpoint=_last_whole_checkpoint(checkpoints))
    log = [
        {key: entry[key] for key in ("step", "loss", "learning_rate")}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    finished: Any = trainer.model
    if peft_config is not None:
        finished = finished.merge_and_unload()
    finished.config.use_cache = True
    done = Training(
        out, result.global_step, _mean_loss(log, result.training_loss), len(rows), too_long, log
    )
    with _told_if_full(out):
        _save(finished, tokenizer, done, made_from)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return done


def tokenized(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> tuple[list[dict[str, list[int]]], int]:
    """Rows of `input_ids` and `labels`, and how many examples were longer than `max_length` tokens.

    The prompt's labels are ignored; an end-of-text token (for messages: the template's own ending)
    follows the completion and is learned.

    Raises:
        ValueError: there are no examples, or none fits.
    """
    if not examples:
        raise ValueError("Expected at least one example to train on, got none.")
    rows = []
    for example in examples:
        prompt_ids, ids = _token_ids(example, tokenizer)
        if max_length is None or len(ids) <= max_length:
            labels = [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]
            rows.append({"input_ids": ids, "labels": labels})
    if not rows:
        raise ValueError(
            f"All {len(examples)} examples are longer than max_length={max_length} tokens; "
            "raise max_length, or sample shorter rationales with a smaller max_tokens."
        )
    return rows, len(examples) - len(rows)


def _token_ids(example: Example, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and of the prompt with its completion and ending."""
    prompt, completion = example.prompt, example.completion
    if isinstance(prompt, list) and isinstance(completion, list):
        whole = tokenizer.apply_chat_template(prompt + completion, return_dict=False)
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        if whole[: len(head)] != head:
            raise ValueError(
                "The model's chat template changes the prompt once the answer is there, so the "
                "loss cannot be kept to the answer; use a text prompt (--prompt few_shot or bare)."
            )
        return head, whole
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise ValueError("Expected prompt and completion both as text or both as messages.")
    head = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"]
    if whole[: len(head)] != head:  # the border falls inside a token: keep the prompt as sampled
        whole = head + tokenizer(completion, add_special_tokens=False)["input_ids"]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-text token (eos_token), which ends a rationale."
        )
    return head, [*whole, tokenizer.eos_token_id]


def _dataset(rows: list[dict[str, list[int]]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


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
        return str(newest)
    return None


def _mean_loss(log: Sequence[dict[str, float]], reported: float) -> float:
    """The mean of the logged losses: TRL's own figure covers a continued part only."""
    return sum(row["loss"] for row in log) / len(log) if log else reported


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


def _made_from(model: str | Path, made_of: Any, config: "SFTConfig", peft_config: Any) -> str:
    """A hash of what decides the weights that come out: start model, examples and options."""
    options = {name: getattr(config, name) for name in DECIDING}
    lora = None if peft_config is None else [peft_config.r, peft_config.lora_alpha]
    whole = [Path(model).name, made_of, options, lora]
    text = json.dumps(whole, ensure_ascii=True, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
              "too_long": done.too_long, "log": done.log, "made_from": made_from}  # fmt: skip
    write_atomically(partial / "training.json", json.dumps(report) + "\n")
    shutil.rmtree(done.model, ignore_errors=True)
    partial.rename(done.model)


def _stored(out: Path) -> Training:
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    del report["made_from"]
    return Training(model=out, **report)

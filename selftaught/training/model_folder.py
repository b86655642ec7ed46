"""The folder of a fine-tuned model: what it was made from, and the summary of its training."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selftaught.records import plain_fields, write_atomically

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

DECIDING = (
    "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "bf16",
    "weight_decay", "max_grad_norm", "optim",
)  # fmt: skip
"""Options that determine the resulting weights; they may not change when training is resumed."""
PREFERENCES = ("beta", "loss_type", "label_smoothing")
"""Further such options, which only TRL's `DPOConfig` has."""


@dataclass(frozen=True)
class Training:
    """The result of a fine-tuning."""

    model: Path
    """The model folder."""
    steps: int
    """Number of optimizer steps."""
    loss: float
    """Mean of the logged losses over all steps. For SFT: nats per supervised token."""
    trained_on: int
    """Number of rows."""
    too_long: int
    """Number of rows that were left out because they were longer than `max_length`."""
    log: list[dict[str, float]]
    """Logged `step`, `loss`, `learning_rate`; for preferences also reward accuracy and margin."""
    tokens: int = 0
    """Number of tokens read in all epochs, prompts included."""
    from_text: int = 0
    """Number of examples whose completion was tokenized from text because its sampled tokens were
    not available."""


def made_from(
    model: str | Path,
    made_of: object,
    config: "TrainingArguments",
    peft_config: "LoraConfig | None",
) -> str:
    """Return a hash of everything that determines the weights: start model, data and options."""
    names = DECIDING + (PREFERENCES if hasattr(config, "beta") else ())
    options = {name: getattr(config, name) for name in names}
    lora = None
    if peft_config is not None:
        named = peft_config.target_modules
        targets = named if isinstance(named, str) else sorted(named or ())
        lora = [peft_config.r, peft_config.lora_alpha, targets]
    identity = [Path(model).name, made_of, options, lora]
    digest = hashlib.sha256()
    for piece in _pieces(identity, depth=2):
        digest.update(piece.encode())
    return digest.hexdigest()[:16]


def _pieces(value: object, depth: int) -> Iterator[str]:
    """Yield the text that `json.dumps` would write, in pieces, because the lists may be long."""
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


def refuse_another(report: Path, made_from: str) -> None:
    """Raise if a folder contains a training with another model, other data or other options."""
    if not report.exists():
        return
    found = json.loads(report.read_text(encoding="utf-8")).get("made_from")
    if found != made_from:
        raise ValueError(
            f"{report.parent} was made from another model, other examples or other options. "
            "Use another folder, or delete this one to train again."
        )


def save(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", done: Training, made_from: str
) -> None:
    """Write the model folder atomically, with the training summary in `training.json`."""
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


def stored(out: Path) -> Training:
    report = json.loads((out / "training.json").read_text(encoding="utf-8"))
    del report["made_from"]
    return Training(model=out, **report)

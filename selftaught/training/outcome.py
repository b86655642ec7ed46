"""Outcome reward models (Cobbe et al. 2021, arXiv:2110.14168; the "ORM" of V-STaR, Section 4.4).

The model is a sequence classifier with one output, trained with binary cross-entropy to separate
right completions from wrong ones. TRL's `RewardTrainer` learns from pairs, so this module uses
transformers' `Trainer`, its base class, with the model's own loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.records import Text
from selftaught.rendering import prompt_ids
from selftaught.training.options import checked_config
from selftaught.training.sft import fitting
from selftaught.training.trainer import Recipe, Row, Training, fit

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments


@dataclass(frozen=True)
class LabeledCompletion:
    """A completion's tokens with a label: right or wrong."""

    prompt: Text
    ids: tuple[int, ...]
    """Token ids of the completion."""
    right: bool
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template. Used when the prompt is messages."""


def outcome_config(output_dir: Path, /, *, max_length: int, **options: Any) -> "TrainingArguments":
    """Return transformers' `TrainingArguments` with selftaught's defaults.

    Args:
        output_dir: Folder for checkpoints.
        max_length: Maximum number of tokens of a prompt with its completion.
        options: Fields of `TrainingArguments`; they override the defaults.

    Raises:
        ValueError: See `selftaught.training.options.checked_config`.
    """
    import torch
    from transformers import TrainingArguments

    ours = {"use_cpu": not torch.accelerator.is_available(), "report_to": "none",
            "remove_unused_columns": False, "logging_nan_inf_filter": False, "logging_steps": 1,
            "disable_tqdm": True, "save_total_limit": 1,
            "dataloader_pin_memory": False, "ddp_find_unused_parameters": False}  # fmt: skip
    config = checked_config(
        "TrainingArguments", TrainingArguments,
        "Its fields are listed at https://huggingface.co/docs/transformers/main_classes/trainer.",
        {"output_dir": str(output_dir), **ours}, options,
    )  # fmt: skip
    config.max_length = max_length  # type: ignore[attr-defined]
    return config


def train_outcome(
    model: str | Path,
    labeled: Sequence[LabeledCompletion],
    config: "TrainingArguments",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Train a classifier of right and wrong completions, starting from a causal language model.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        labeled: Labeled completions, of both labels.
        config: Made with `outcome_config`.
        out: Model folder to write.
        peft_config: LoRA configuration. None trains all weights.
        progress: Called with the number of optimizer steps just finished.

    Raises:
        ValueError: Only one label occurs, or no completion fits `max_length`.
    """
    _check_both([completion.right for completion in labeled])
    max_length: int = config.max_length  # type: ignore[attr-defined]

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Row], int]:
        all_rows = [
            {
                "input_ids": [
                    *prompt_ids(tokenizer, completion.prompt, completion.chat_template_kwargs),
                    *completion.ids,
                ],
                "labels": [float(completion.right)],
            }
            for completion in labeled
        ]
        kept, too_long = fitting(all_rows, max_length, "completions")
        _check_both([row["labels"][0] for row in kept], f" of those that fit {max_length=} tokens")
        return kept, too_long

    recipe = Recipe(rows, list(labeled), _trainer, _classifier)
    return fit(model, recipe, config, out=out, peft_config=peft_config, progress=progress)


def _check_both(right: Sequence[float], which: str = "") -> None:
    if len(set(right)) < 2:
        raise ValueError(
            f"Expected both right and wrong completions to train on, got {len(right)} with the "
            f"same label{which}."
        )


def _classifier(model: str) -> "PreTrainedModel":
    from selftaught.samplers.weights import load_model

    return load_model(
        model, "sequence_classification", new_head=True, num_labels=1,
        problem_type="multi_label_classification", dtype="float32",
    )  # fmt: skip


def _trainer(*, peft_config: "LoraConfig | None", **given: Any) -> "Trainer":
    from transformers import DataCollatorWithPadding, Trainer

    if peft_config is not None:
        from dataclasses import replace

        from peft import TaskType, get_peft_model

        wanted = replace(peft_config, task_type=TaskType.SEQ_CLS)
        given["model"] = get_peft_model(given["model"], wanted)
    collate = DataCollatorWithPadding(given["processing_class"], return_tensors="pt")
    trainer = Trainer(**given, data_collator=collate)
    # The model's own loss is a mean over its batch, so the trainer must average it over the
    # accumulated batches of a step.
    trainer.model_accepts_loss_kwargs = False
    return trainer

"""An outcome reward model (Cobbe et al. 2021, arXiv:2110.14168; the "ORM" of V-STaR's Section 4.4).

A sequence classifier with one output, trained by binary cross-entropy to tell right completions from
wrong ones. TRL's RewardTrainer learns from pairs, so this is transformers' own Trainer, on which it
rests, with the model's own loss.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.records import Text
from selftaught.rendering import prompt_ids
from selftaught.training.options import checked_config
from selftaught.training.sft import fitting
from selftaught.training.trainer import Row, Training, fit

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, TrainingArguments


@dataclass(frozen=True)
class LabeledCompletion:
    """A completion, by its tokens, and whether it was right."""

    prompt: Text
    ids: tuple[int, ...]
    right: bool
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Variables of the chat template, for messages."""


def outcome_config(output_dir: Path, /, *, max_length: int, **options: Any) -> "TrainingArguments":
    """transformers' `TrainingArguments` with the defaults of the other trainings here.

    Raises:
        ValueError: an option that they do not know.
    """
    import torch
    from transformers import TrainingArguments

    ours = {"use_cpu": not torch.accelerator.is_available(), "report_to": "none", "remove_unused_columns": False, "logging_nan_inf_filter": False,
            "logging_steps": 1, "disable_tqdm": True, "save_total_limit": 1,
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
    judged: Sequence[LabeledCompletion],
    config: "TrainingArguments",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Train a classifier of right and wrong completions from a causal language model.

    Raises:
        ValueError: there is nothing to tell apart, or nothing fits `max_length`.
    """
    _check_both([one.right for one in judged])
    max_length: int = config.max_length  # type: ignore[attr-defined]

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Row], int]:
        made = [
            {
                "input_ids": [
                    *prompt_ids(tokenizer, one.prompt, one.chat_template_kwargs),
                    *one.ids,
                ],
                "labels": [float(one.right)],
            }
            for one in judged
        ]
        kept, too_long = fitting(made, max_length, "completions")
        _check_both([row["labels"][0] for row in kept], f" of those that fit {max_length=} tokens")
        return kept, too_long

    return fit(model, rows, list(judged), config, _trainer, out=out,
               load=_classifier, peft_config=peft_config, progress=progress)  # fmt: skip


def _check_both(right: Sequence[float], which: str = "") -> None:
    if len(set(right)) < 2:
        raise ValueError(
            f"Expected right and wrong completions to tell apart, got {len(right)} of one kind{which}."
        )


def _classifier(model: str) -> Any:
    from selftaught.samplers.weights import load_model

    return load_model(
        model, "sequence_classification", new_head=True, num_labels=1,
        problem_type="multi_label_classification", dtype="float32",
    )  # fmt: skip


def _trainer(*, peft_config: Any, **given: Any) -> Any:
    from transformers import DataCollatorWithPadding, Trainer

    if peft_config is not None:
        from dataclasses import replace

        from peft import TaskType, get_peft_model

        wanted = replace(peft_config, task_type=TaskType.SEQ_CLS)
        given["model"] = get_peft_model(given["model"], wanted)
    collate = DataCollatorWithPadding(given["processing_class"], return_tensors="pt")
    trainer = Trainer(**given, data_collator=collate)
    # The model's own loss is a mean over its batch, so over several batches of a step it is to be one.
    trainer.model_accepts_loss_kwargs = False
    return trainer

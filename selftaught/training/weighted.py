"""Supervised fine-tuning with a loss weight for every token."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.training.sft import IGNORED, fitting
from selftaught.training.trainer import Recipe, Row, Training, causal_lm, fit

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import SFTConfig


def train_weighted(
    model: str | Path,
    rows: Sequence[Row],
    config: "SFTConfig",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model on token rows in which every token has its own loss weight.

    The loss is the sum of weight times negative log-probability over the labeled tokens, divided by
    the number of labeled tokens.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        rows: Rows with `input_ids`, `labels` and `weights`, lists of equal length.
        config: Made with `sft_config`.
        out: Model folder to write.
        peft_config: LoRA configuration. None trains all weights.
        progress: Called with the number of optimizer steps just finished.

    Raises:
        ValueError: There are no rows, or none fits `config.max_length`.
    """

    def made(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Row], int]:
        del tokenizer
        return fitting(rows, config.max_length, "rows")

    recipe = Recipe(made, list(rows), _weighted_trainer, causal_lm)
    return fit(model, recipe, config, out=out, peft_config=peft_config, progress=progress)


def _weighted_trainer(**given: Any) -> "Trainer":
    """Create an SFT trainer whose batches contain `weights` and whose loss uses them."""
    import torch
    from trl import SFTTrainer

    class Weighted(SFTTrainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Any,
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            weights_BT = inputs["weights"][:, 1:]
            labels_BT = inputs["labels"][:, 1:]
            read = {key: inputs[key] for key in ("input_ids", "attention_mask")}
            out = model(**read, use_cache=False)
            logits_BTV = out.logits[:, :-1].float()
            loss_BT = torch.nn.functional.cross_entropy(
                logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none"
            )
            labeled = (labels_BT != IGNORED).sum()
            count = labeled if num_items_in_batch is None else num_items_in_batch
            loss = (loss_BT * weights_BT).sum() / count
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                loss = (
                    loss * self.accelerator.num_processes
                )  # gradients are averaged over processes
            return (loss, out) if return_outputs else loss

    pad = given["processing_class"].pad_token_id

    def collate(rows: Sequence[Row]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(key: str, fill: float, dtype: torch.dtype) -> torch.Tensor:
            filled = [row[key] + [fill] * (longest - len(row[key])) for row in rows]
            return torch.tensor(filled, dtype=dtype)

        attention_mask = [
            [1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows
        ]
        return {
            "input_ids": padded("input_ids", pad, torch.long),
            "labels": padded("labels", IGNORED, torch.long),
            "weights": padded("weights", 0.0, torch.float32),
            "attention_mask": torch.tensor(attention_mask),
        }

    return Weighted(**given, data_collator=collate)

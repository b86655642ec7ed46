"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290) with TRL's `DPOTrainer`.

The reference model is the start model. Its log-probabilities are computed once, before the first
step and before a checkpoint is loaded, so a resumed training has the same reference.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.records import Preference, Text
from selftaught.rendering import continuing_ids, prompt_ids
from selftaught.training.completion_tokens import end_token, taught_ids
from selftaught.training.trainer import Recipe, Row, Training, causal_lm, fit, trl_config

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import DPOConfig


def dpo_config(output_dir: Path, /, **options: Any) -> "DPOConfig":
    """Return TRL's `DPOConfig` with selftaught's defaults, which suit small models on any device.

    Args:
        output_dir: Folder for checkpoints.
        options: Fields of `DPOConfig`; they override the defaults.

    Raises:
        ValueError: An option is invalid, or would change the reference model.
    """
    config = trl_config("DPOConfig", output_dir, {"precompute_ref_log_probs": True}, options)
    if not config.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs must stay true: otherwise TRL loads the reference from the "
            "folder that the weights were first loaded from, which may not be the start model."
        )
    return config


def train_dpo(
    model: str | Path,
    preferences: Sequence[Preference],
    config: "DPOConfig",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Train a model with DPO, with the start model as the reference.

    The model folder is written and an interrupted call is resumed as in `train_sft`.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        preferences: Prompts with a chosen and a rejected completion.
        config: Made with `dpo_config`.
        out: Model folder to write.
        peft_config: LoRA configuration. None trains all weights.
        progress: Called with the number of optimizer steps just finished.

    Raises:
        ValueError: There are no preferences, none fits `config.max_length`, or the loss is not
            finite.
    """

    from accelerate.utils import disable_fsdp_ram_efficient_loading

    # With RAM-efficient loading, only the first process has weights until FSDP shards the policy.
    # The reference log-probabilities, computed before that, would come from uninitialized memory.
    disable_fsdp_ram_efficient_loading()

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Row], int]:
        return preference_rows(preferences, tokenizer, config.max_length)

    recipe = Recipe(rows, list(preferences), _trainer, causal_lm)
    return fit(model, recipe, config, out=out, peft_config=peft_config, progress=progress)


def _trainer(**given: Any) -> "Trainer":
    """Create TRL's trainer for rows that are already tokenized; nothing is added to them."""
    from trl import DPOTrainer

    class TokenExact(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, *args: Any) -> Any:
            if not self.is_fsdp_enabled or self.ref_model is not None or name != "train":
                return super()._precompute_ref_logps(dataset, name, *args)
            # A model with an adapter is its own reference, and is on the CPU until FSDP shards it.
            model: Any = self.model
            model.to(self.accelerator.device)
            result = super()._precompute_ref_logps(dataset, name, *args)
            model.to("cpu")
            return result

    if given["args"].world_size > 1:
        given["train_dataset"] = _on_disk(given["train_dataset"], given["args"])
    return TokenExact(**given)


def _on_disk(dataset: "Dataset", config: Any) -> "Dataset | DatasetDict":
    """Save the rows in a folder that all processes share, and load them from there.

    TRL's first process writes the reference log-probabilities next to the rows and the other
    processes read them. For rows in memory, each process would use its own folder.
    """
    from datasets import load_from_disk

    folder = Path(config.output_dir) / "rows"
    if config.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
        dataset.save_to_disk(folder)
    config.distributed_state.wait_for_everyone()
    return load_from_disk(folder)


def preference_rows(
    preferences: Sequence[Preference],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None,
) -> tuple[list[Row], int]:
    """Tokenize preferences; return the rows and the number of preferences that were too long.

    Token ids of a preference are used unchanged. A completion that is given only as text is
    tokenized and followed by an end-of-text token.

    Args:
        preferences: Prompts with a chosen and a rejected completion.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens of the prompt with the longer completion; None keeps
            all.

    Returns:
        Rows with `prompt_ids`, `chosen_ids` and `rejected_ids`, and the number left out.

    Raises:
        ValueError: There are no preferences, or none fits.
    """
    if not preferences:
        raise ValueError("Expected at least one preference to train on, got none.")
    rows = []
    for pair in preferences:
        prompt = [
            *prompt_ids(tokenizer, pair.prompt, pair.chat_template_kwargs),
            *pair.prefix_tokens,
        ]
        chosen = _side(pair, pair.chosen, pair.chosen_ids, tokenizer)
        rejected = _side(pair, pair.rejected, pair.rejected_ids, tokenizer)
        if max_length is None or len(prompt) + max(len(chosen), len(rejected)) <= max_length:
            rows.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    if not rows:
        raise ValueError(
            f"All {len(preferences)} preferences are longer than max_length={max_length} tokens; "
            "increase max_length, or sample shorter rationales with a smaller max_tokens."
        )
    return rows, len(preferences) - len(rows)


def _side(
    pair: Preference, text: Text, ids: Sequence[int] | None, tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """Return the token ids of the chosen or the rejected completion."""
    if ids is not None:
        return list(ids)
    if isinstance(text, str):
        return [*continuing_ids(tokenizer, text), end_token(tokenizer)]
    return list(taught_ids(pair.prompt, text, None, tokenizer, pair.chat_template_kwargs)[1])

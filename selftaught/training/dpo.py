"""Direct preference optimization (Rafailov et al. 2023, arXiv:2305.18290): TRL's `DPOTrainer`.

The reference is the start model. Its log-probabilities are computed once, before the first step and
before any checkpoint is read, so a continued training has the same reference as an undisturbed one.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.records import Preference, Text
from selftaught.rendering import continuing_ids, prompt_ids
from selftaught.training.completion_tokens import end_token, taught_ids
from selftaught.training.trainer import Row, Training, causal_lm, fit, trl_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import DPOConfig


def dpo_config(output_dir: Path, /, **options: Any) -> "DPOConfig":
    """TRL's own `DPOConfig`; what is set here suits small models on any device, all can be given.

    Raises:
        ValueError: an option that TRL does not know, or one that would change the reference.
    """
    config = trl_config("DPOConfig", output_dir, {"precompute_ref_log_probs": True}, options)
    if not config.precompute_ref_log_probs:
        raise ValueError(
            "precompute_ref_log_probs must stay true: without it TRL reads the reference from the "
            "folder the weights once came from, which need not be the start model."
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
    """Train a model to prefer `chosen` over `rejected`, with itself as it was as the reference.

    As `train_sft`, it ends with a model in `out`, and repeating the call continues it.

    Raises:
        ValueError: no preference, none that fits `config.max_length`, or a loss that is not finite.
    """

    from accelerate.utils import disable_fsdp_ram_efficient_loading

    # With it only the first process has weights until FSDP spreads the policy; TRL's reference would be
    # spread, or computed by an adapter's base, from what is in the memory of the others.
    disable_fsdp_ram_efficient_loading()

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[Row], int]:
        return preference_rows(preferences, tokenizer, config.max_length)

    return fit(model, rows, list(preferences), config, _trainer, out=out, load=causal_lm,
               peft_config=peft_config, progress=progress)  # fmt: skip


def _trainer(**given: Any) -> Any:
    """TRL's trainer on rows as they are: no end-of-text tokens added, nothing tokenized again."""
    from trl import DPOTrainer

    class TokenExact(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, name: str, *args: Any) -> Any:
            if not self.is_fsdp_enabled or self.ref_model is not None or name != "train":
                return super()._precompute_ref_logps(dataset, name, *args)
            # A model with an adapter is its own reference, and lies on the CPU until FSDP spreads it.
            model: Any = self.model
            model.to(self.accelerator.device)
            found = super()._precompute_ref_logps(dataset, name, *args)
            model.to("cpu")
            return found

    if given["args"].world_size > 1:
        given["train_dataset"] = _on_disk(given["train_dataset"], given["args"])
    return TokenExact(**given)


def _on_disk(dataset: Any, config: Any) -> Any:
    """The rows in a folder of all processes: beside them TRL's first one writes the reference's
    log-probabilities, which the others read, and rows in memory have a folder for each process."""
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
    """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, and how many did not fit.

    Token ids of a preference are taken as they are. Sides given as text only are tokenized, and an
    end-of-text token follows them.

    Raises:
        ValueError: there are no preferences, or none fits.
    """
    if not preferences:
        raise ValueError("Expected at least one preference to train on, got none.")
    rows = []
    for one in preferences:
        asked = [*prompt_ids(tokenizer, one.prompt, one.chat_template_kwargs), *one.begun]
        chosen = _side(one, one.chosen, one.chosen_ids, tokenizer)
        rejected = _side(one, one.rejected, one.rejected_ids, tokenizer)
        if max_length is None or len(asked) + max(len(chosen), len(rejected)) <= max_length:
            rows.append({"prompt_ids": asked, "chosen_ids": chosen, "rejected_ids": rejected})
    if not rows:
        raise ValueError(
            f"All {len(preferences)} preferences are longer than max_length={max_length} tokens; "
            "raise max_length, or sample shorter rationales with a smaller max_tokens."
        )
    return rows, len(preferences) - len(rows)


def _side(
    one: Preference, text: Text, ids: Sequence[int] | None, tokenizer: "PreTrainedTokenizerBase"
) -> list[int]:
    """The tokens of one side of a preference."""
    if ids is not None:
        return list(ids)
    if isinstance(text, str):
        return [*continuing_ids(tokenizer, text), end_token(tokenizer)]
    return list(taught_ids(one.prompt, text, None, tokenizer, one.chat_template_kwargs)[1])

"""Supervised fine-tuning with TRL's `SFTTrainer`, with loss on completions only."""

import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from selftaught.records import Example
from selftaught.training.completion_tokens import taught_ids
from selftaught.training.trainer import Recipe, Row, Training, causal_lm, fit, trl_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, Trainer
    from trl import SFTConfig

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that are excluded from the loss, in torch and transformers."""


def sft_config(output_dir: Path, /, **options: Any) -> "SFTConfig":
    """Return TRL's `SFTConfig` with selftaught's defaults, which suit small models on any device.

    Args:
        output_dir: Folder for checkpoints.
        options: Fields of `SFTConfig`; they override the defaults.

    Raises:
        ValueError: An option is unknown to TRL, has the wrong type, is out of bounds or is
            reserved.
    """
    ours = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    return trl_config("SFTConfig", output_dir, ours, options)


def train_sft(
    model: str | Path,
    examples: Sequence[Example],
    config: "SFTConfig",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model on examples, with loss on their completions only.

    A LoRA adapter is merged into the model at the end. The model folder `out` is written only after
    training has finished. Checkpoints are written to `config.output_dir`. Repeating an interrupted
    call resumes from the last complete checkpoint and gives the same weights.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        examples: Prompts with their completions.
        config: Made with `sft_config`.
        out: Model folder to write.
        peft_config: LoRA configuration. None trains all weights.
        progress: Called with the number of optimizer steps just finished.

    Raises:
        ValueError: There are no examples, none fits `config.max_length`, or the loss is not finite.
    """

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[Sequence[Row], int]:
        return tokenized(examples, tokenizer, config.max_length)

    return train_rows(
        model, rows, list(examples), config, out=out, peft_config=peft_config, progress=progress
    )


def train_rows(
    model: str | Path,
    make_rows: "Callable[[PreTrainedTokenizerBase], tuple[Sequence[Row], int]]",
    made_of: object,
    config: "SFTConfig",
    *,
    out: Path,
    peft_config: "LoraConfig | None" = None,
    progress: Callable[[int], None] | None = None,
) -> Training:
    """Fine-tune a model as in `train_sft`, on rows of `input_ids` and `labels`.

    Args:
        model: Model folder or name on the Hugging Face Hub.
        make_rows: Function from the tokenizer to the rows and the number of rows that were left out
            because they were too long.
        made_of: The data that the rows are made from, as JSON values or records. Its hash
            identifies the training in `out`.
        config: Made with `sft_config`.
        out: Model folder to write.
        peft_config: LoRA configuration. None trains all weights.
        progress: Called with the number of optimizer steps just finished.
    """

    def trainer(**given: Any) -> "Trainer":
        from trl import SFTTrainer

        return SFTTrainer(**given)

    recipe = Recipe(make_rows, made_of, trainer, causal_lm)
    return fit(model, recipe, config, out=out, peft_config=peft_config, progress=progress)


def fitting(rows: Sequence[Row], max_length: int | None, what: str) -> tuple[list[Row], int]:
    """Return the rows of at most `max_length` tokens, and the number of longer rows.

    Args:
        rows: Rows with `input_ids`.
        max_length: Maximum number of tokens; None keeps all rows.
        what: Name of the rows in error messages, such as "completions".

    Raises:
        ValueError: There are no rows, or none fits.
    """
    if not rows:
        raise ValueError(f"Expected at least one of the {what} to train on, got none.")
    kept = [row for row in rows if max_length is None or len(row["input_ids"]) <= max_length]
    if not kept:
        raise _none_fits(len(rows), max_length, what)
    return kept, len(rows) - len(kept)


def _none_fits(count: int, max_length: int | None, what: str) -> ValueError:
    return ValueError(
        f"All {count} {what} are longer than max_length={max_length} tokens; "
        "increase max_length, or sample shorter rationales with a smaller max_tokens."
    )


class TokenRows(Sequence[Row]):
    """A sequence of rows with `input_ids` and `labels`, stored in four bytes per token.

    The labels of prompt tokens are `IGNORED`.
    """

    def __init__(self) -> None:
        self._ids, self._ends, self._prompts = array("i"), array("q", [0]), array("q")
        self.from_text = 0
        """Number of rows whose completion was tokenized from text, not taken as sampled."""

    def append(self, ids: Sequence[int], prompt: int) -> None:
        """Add a row of token ids. The first `prompt` tokens are excluded from the loss."""
        self._ids.extend(ids)
        self._ends.append(len(self._ids))
        self._prompts.append(prompt)

    def __len__(self) -> int:
        return len(self._prompts)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        ids = self._ids[self._ends[at] : self._ends[at + 1]].tolist()
        prompt = self._prompts[at]
        return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


def tokenized(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", max_length: int | None
) -> tuple[TokenRows, int]:
    """Tokenize examples; return the rows and the number of examples longer than `max_length`
    tokens.

    The loss covers the completion only. Its tokens are the sampled ones if the example has them and
    they decode to its completion. Otherwise the text is tokenized and ended: plain text with the
    end-of-text token, messages as the chat template ends an answer. `rows.from_text` is the number
    of rows that were made from text.

    Args:
        examples: Prompts with their completions.
        tokenizer: The model's tokenizer.
        max_length: Maximum number of tokens of a row; None keeps all rows.

    Raises:
        ValueError: There are no examples, or none fits.
    """
    if not examples:
        raise ValueError("Expected at least one example to train on, got none.")
    rows, foreign = TokenRows(), 0
    for example in examples:
        head, learned, sampled = taught_ids(
            example.prompt, example.completion, example.completion_ids, tokenizer,
            example.chat_template_kwargs,
        )  # fmt: skip
        foreign += not sampled and example.completion_ids is not None
        if max_length is None or len(head) + len(learned) <= max_length:
            rows.append([*head, *learned], len(head))
            rows.from_text += not sampled
    if foreign:
        logger.warning(
            "%d of %d completions are tokenized from their text, because their stored tokens do "
            "not decode to it with the tokenizer of %s. They were sampled with another tokenizer.",
            foreign,
            len(examples),
            tokenizer.name_or_path or "the model",
        )
    if not rows:
        raise _none_fits(len(examples), max_length, "examples")
    return rows, len(examples) - len(rows)

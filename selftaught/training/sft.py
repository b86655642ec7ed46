"""Supervised fine-tuning, with loss on completions only: TRL's `SFTTrainer`."""

import logging
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from selftaught.records import Example
from selftaught.training.completion_tokens import taught_ids
from selftaught.training.trainer import Row, Training, causal_lm, fit, trl_config

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token without loss, in torch and transformers."""


def sft_config(output_dir: Path, /, **options: Any) -> "SFTConfig":
    """TRL's own `SFTConfig`; what is set here suits small models on any device, all can be given.

    Raises:
        ValueError: an option that TRL does not know, of another type, out of bounds or reserved.
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
    """Fine-tune a model on examples, with loss on their completions only; LoRA is merged at the end.

    The model appears in `out` when training has ended and not before. Checkpoints go to
    `config.output_dir`; repeating the call continues from the last whole one, to the same weights.

    Raises:
        ValueError: no example, none that fits `config.max_length`, or a loss that is not finite.
    """

    def rows(tokenizer: "PreTrainedTokenizerBase") -> tuple[Sequence[Row], int]:
        return tokenized(examples, tokenizer, config.max_length)

    return train_rows(
        model, rows, list(examples), config, out=out, peft_config=peft_config, progress=progress
    )


def train_rows(
    model: str | Path,
    make_rows: "Callable[[PreTrainedTokenizerBase], tuple[Sequence[Row], int]]",
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
        made_of: what the rows are made of, as JSON has it or in records; another training in
            `out` is known by it.
    """

    def trainer(**given: Any) -> Any:
        from trl import SFTTrainer

        return SFTTrainer(**given)

    return fit(model, make_rows, made_of, config, trainer, out=out, load=causal_lm,
               peft_config=peft_config, progress=progress)  # fmt: skip


def fitting(rows: Sequence[Row], max_length: int | None, what: str) -> tuple[list[Row], int]:
    """The rows of at most `max_length` tokens, and how many others there are.

    Raises:
        ValueError: there are no rows, or none fits.
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
        "raise max_length, or sample shorter rationales with a smaller max_tokens."
    )


class TokenRows(Sequence[Row]):
    """Rows of `input_ids` and `labels` in four bytes a token; the labels of a prompt are ignored."""

    def __init__(self) -> None:
        self._ids, self._ends, self._prompts = array("i"), array("q", [0]), array("q")
        self.from_text = 0
        """Rows whose completion was tokenized from its text, not taken as it was sampled."""

    def append(self, ids: Sequence[int], prompt: int) -> None:
        """Add a row of token ids, of which the first `prompt` bear no loss."""
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
    """Rows of `input_ids` and `labels`, and how many examples were longer than `max_length` tokens.

    The prompt's labels are ignored. What is learned are the tokens that were sampled, where the
    example has them and they read as its completion; otherwise those of its text, and the token that
    ends a text or, after messages, what the chat template ends an answer with. How many rows are made
    from text is in `rows.from_text`.

    Raises:
        ValueError: there are no examples, or none fits.
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
            "%d of %d completions are tokenized from their text: to the tokenizer of %s their stored "
            "tokens do not read as the text, so another tokenizer wrote them.",
            foreign,
            len(examples),
            tokenizer.name_or_path or "the model",
        )
    if not rows:
        raise _none_fits(len(examples), max_length, "examples")
    return rows, len(examples) - len(rows)

"""Pause tokens: Goyal et al. 2024 (arXiv:2310.02226), a baseline of Quiet-STaR.

One new token with a learnable embedding gives the model more computation before it answers. The
paper compares four variants, by where pauses are used: StdPT_StdFT (never), StdPT_PauseFT (only in
fine-tuning), PausePT_StdFT (only in pre-training) and PausePT_PauseFT (both). `insert_pauses` makes
text for pause-pretraining, `append_pauses` an example for pause-finetuning. Both return labels that
exclude from the loss the positions where the next token is a pause.
"""

import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.hub import check_model_name
from selftaught.prompts import PromptStyle
from selftaught.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""Label of a token that is excluded from the loss, in torch and transformers."""
PAUSE = "<|pause|>"
PRETRAINING_SHARE = 0.1
"""Number of pauses per token of text in pre-training: 10% of the sequence (Section 4.1)."""
VARIANTS = {
    "StdPT_StdFT": (False, False),
    "StdPT_PauseFT": (False, True),
    "PausePT_StdFT": (True, False),
    "PausePT_PauseFT": (True, True),
}
"""Variants of the paper: (pauses in pre-training, pauses in fine-tuning)."""


def insert_pauses(
    ids: Sequence[int], pause: int, share: float, draw: random.Random
) -> tuple[list[int], list[int]]:
    """Insert pauses at uniformly random positions of a text, and return its token ids and labels.

    Labels are not shifted, as in transformers. Pause tokens have the label `IGNORED`, so the loss
    is skipped where the next token is a pause; the token after a pause is predicted from the pause
    (Equation 1). As in the paper, the text is then truncated to its original length.

    Args:
        ids: token ids of the text.
        pause: id of the pause token.
        share: number of pauses per token of text.
        draw: source of randomness.

    Returns:
        Token ids and labels, both as long as `ids`.
    """
    count = round(share * len(ids))
    # A position is the number of tokens before a pause. Every pause has a token after it to
    # predict.
    positions = sorted(draw.randrange(1, len(ids)) for _ in range(count)) if len(ids) > 1 else []
    mixed: list[int] = []
    done = 0
    for position in positions:
        mixed += [*ids[done:position], pause]
        done = position
    mixed = [*mixed, *ids[done:]][: len(ids)]
    return mixed, [IGNORED if one == pause else one for one in mixed]


def append_pauses(
    prefix: Sequence[int], target: Sequence[int], pause: int, count: int
) -> tuple[list[int], list[int]]:
    """Return the token ids of prefix, `count` pauses and target, and the labels.

    The loss is on the target only; its first token is predicted from the last pause (Equation 3).
    """
    ids = [*prefix, *[pause] * count, *target]
    return ids, [IGNORED] * (len(prefix) + count) + list(target)


def paused(style: PromptStyle, count: int, filler: str = PAUSE) -> PromptStyle:
    """Return the style with `count` pauses after every question (pause-inference, Section 3.2).

    Another filler, such as ".", is the paper's control: the same number of meaningless tokens,
    which the model was not trained to use.

    Raises:
        ValueError: the style is chat; its template adds text after the question.
    """
    if style.as_messages:
        raise ValueError(
            "Expected a prompt of plain text, because pauses follow the question; got chat "
            "messages. Use --prompt few_shot or bare."
        )
    return replace(
        style, name=f"{style.name}, {count} x {filler}", question=style.question + filler * count
    )


def with_pauses(examples: Sequence[Example], count: int) -> list[Example]:
    """Return the examples for pause-finetuning: each prompt followed by `count` pauses.

    Raises:
        ValueError: a prompt is a list of chat messages.
    """
    found = []
    for example in examples:
        if not isinstance(example.prompt, str):
            raise ValueError(
                "Expected examples with plain-text prompts, because pauses follow the prompt; got "
                "chat messages. Use --prompt few_shot or bare."
            )
        found.append(replace(example, prompt=example.prompt + PAUSE * count))
    return found


def refuse_without_pause(model: str) -> None:
    """Check that the pause token is in the vocabulary of a model's tokenizer.

    Raises:
        ValueError: it is not; it would be split into ordinary tokens.
    """
    from transformers import AutoTokenizer

    check_model_name(model)
    if PAUSE not in AutoTokenizer.from_pretrained(model).get_vocab():
        raise ValueError(
            f"Expected a model with {PAUSE} in its vocabulary, got {model}. Train one with "
            "`selftaught pause train`, or give --pauses [0] or a --filler."
        )


def add_pause_token(model: str, out: Path) -> Path:
    """Copy a model into `out` with the pause token added to its vocabulary, and return `out`.

    The embedding of the new token is the mean of all embeddings. A model that already has the token
    is copied unchanged. `out` is written atomically; an existing copy of the same model is used
    again.
    """
    origin, partial = out / "made_of.txt", out.with_name(out.name + ".partial")
    if origin.exists() and origin.read_text(encoding="utf-8") == model:
        return out
    from transformers import AutoTokenizer

    from selftaught.samplers.weights import load_model

    base = load_model(model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.add_tokens([PAUSE], special_tokens=True):
        old: Any = base.get_input_embeddings().weight
        mean = old.detach()[: len(tokenizer) - 1].mean(0)
        if len(tokenizer) > len(old):
            base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        new: Any = base.get_input_embeddings().weight
        new.data[tokenizer.convert_tokens_to_ids(PAUSE)] = mean
    base.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "made_of.txt").write_text(model, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return out


def pause_rows(
    texts: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    length: int,
    share: float,
    seed: int,
) -> list[dict[str, list[int]]]:
    """Return the rows for pause-pretraining: spans of the texts with pauses inserted.

    Args:
        texts: plain texts.
        tokenizer: tokenizer whose vocabulary has the pause token.
        length: number of tokens per span.
        share: number of pauses per token of text.
        seed: random seed for the positions of the pauses.

    Returns:
        One row per span, with `input_ids` and `labels`.

    Raises:
        ValueError: there is no text, or the tokenizer does not have the pause token.
    """
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    if pause == tokenizer.unk_token_id or not isinstance(pause, int):
        raise ValueError(
            f"Expected a tokenizer with {PAUSE} in its vocabulary; got one without it. Add it with "
            "add_pause_token."
        )
    draw = random.Random(seed)
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        for first in range(0, len(ids), length):
            mixed, labels = insert_pauses(ids[first : first + length], pause, share, draw)
            if len(mixed) > 1:
                rows.append({"input_ids": mixed, "labels": labels})
    if not rows:
        raise ValueError("Expected texts of at least two tokens, got none.")
    return rows

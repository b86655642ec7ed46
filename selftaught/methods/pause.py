"""Pause tokens: Goyal et al. 2024 (arXiv:2310.02226), the natural baseline of Quiet-STaR.

A new token with a learnable embedding gives the model more computation before it answers. The paper
compares four variants by where the training data contain pauses: StdPT_StdFT (nowhere),
StdPT_PauseFT (only in fine-tuning), PausePT_StdFT (only in pre-training) and PausePT_PauseFT
(both). `insert_pauses` makes a text for pause-pretraining and `append_pauses` an example for
pause-finetuning. Both return labels that ignore the loss where the next token is a pause.
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
"""The label of a token without loss, in torch and transformers."""
PAUSE = "<|pause|>"
PRETRAINING_SHARE = 0.1
"""Pauses per token of text in pre-training: 10% of the sequence (Section 4.1)."""
VARIANTS = {
    "StdPT_StdFT": (False, False),
    "StdPT_PauseFT": (False, True),
    "PausePT_StdFT": (True, False),
    "PausePT_PauseFT": (True, True),
}
"""Variants of the paper: whether pre-training and fine-tuning use pauses."""


def insert_pauses(
    ids: Sequence[int], pause: int, share: float, draw: random.Random
) -> tuple[list[int], list[int]]:
    """Insert pauses into a text at uniformly random positions (Equation 1).

    As in the paper, the result is truncated to the original length. The label of a pause is
    ignored, so there is no loss where the next token is a pause. The token after a pause is
    predicted from the pause.

    Args:
        ids: token ids of the text.
        pause: id of the pause token.
        share: number of pauses per token of text.
        draw: source of randomness.

    Returns:
        Token ids and labels. Labels are not shifted, as transformers expects them.
    """
    count = round(share * len(ids))
    # A place is the number of tokens before the pause. Every pause has a token after it to predict.
    places = sorted(draw.randrange(1, len(ids)) for _ in range(count)) if len(ids) > 1 else []
    mixed: list[int] = []
    done = 0
    for place in places:
        mixed += [*ids[done:place], pause]
        done = place
    mixed = [*mixed, *ids[done:]][: len(ids)]
    return mixed, [IGNORED if one == pause else one for one in mixed]


def append_pauses(
    prefix: Sequence[int], target: Sequence[int], pause: int, count: int
) -> tuple[list[int], list[int]]:
    """Join prefix, pauses and target, with loss on the target only (Equation 3).

    The first token of the target is predicted from the last pause.

    Args:
        prefix: token ids of the prompt.
        target: token ids of the completion.
        pause: id of the pause token.
        count: number of pauses.

    Returns:
        Token ids and labels. Labels are not shifted, as transformers expects them.
    """
    ids = [*prefix, *[pause] * count, *target]
    return ids, [IGNORED] * (len(prefix) + count) + list(target)


def paused(style: PromptStyle, count: int, filler: str = PAUSE) -> PromptStyle:
    """Return a prompt style with `count` pauses after every question.

    This is pause-inference (Section 3.2).

    Args:
        style: a prompt style that produces text.
        count: number of pauses.
        filler: text of one pause. Another text, such as ".", gives the control experiment of the
            paper: the same number of meaningless tokens for a model that was not trained on them.

    Raises:
        ValueError: the style produces chat messages, where the chat template ends the question.
    """
    if style.as_messages:
        raise ValueError(
            "Pause tokens need a prompt that is text, got chat messages. Use --prompt "
            "few_shot or bare."
        )
    return replace(
        style, name=f"{style.name}, {count} x {filler}", question=style.question + filler * count
    )


def with_pauses(examples: Sequence[Example], count: int) -> list[Example]:
    """Return examples for pause-finetuning: each prompt followed by `count` pauses.

    Raises:
        ValueError: a prompt consists of chat messages.
    """
    paused_examples = []
    for example in examples:
        if not isinstance(example.prompt, str):
            raise ValueError(
                "Pause tokens need a prompt that is text, got a prompt of chat messages. Write the "
                "prompts of the examples as strings."
            )
        paused_examples.append(replace(example, prompt=example.prompt + PAUSE * count))
    return paused_examples


def refuse_without_pause(model: str) -> None:
    """Raise an error if a model does not have the pause token.

    Such a model would read the characters of the token instead.

    Raises:
        ValueError: the tokenizer does not have the token.
    """
    from transformers import AutoTokenizer

    check_model_name(model)
    if PAUSE not in AutoTokenizer.from_pretrained(model).get_vocab():
        raise ValueError(
            f"Expected a model with {PAUSE} in its vocabulary, got {model}. Train one with "
            "`selftaught pause train`, or set --pauses 0 or --filler."
        )


def add_pause_token(model: str, out: Path) -> Path:
    """Save a copy of a model whose vocabulary contains the pause token.

    The embedding of the new token is initialized with the mean of all embeddings. A model that
    already has the token is copied unchanged. The copy is written to a temporary folder and then
    renamed, so `out` is never incomplete. An existing copy of the same model is kept.

    Args:
        model: Hugging Face model name or model folder.
        out: folder for the copy.

    Returns:
        `out`.
    """
    origin, partial = out / "made_of.txt", out.with_name(out.name + ".partial")
    if origin.exists() and origin.read_text(encoding="utf-8") == model:
        return out
    from transformers import AutoTokenizer

    from selftaught.samplers.weights import load_plain_model

    base = load_plain_model(model, dtype="float32")
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
    """Return rows for pause-pretraining: spans of texts with pauses inserted, and their labels.

    Args:
        length: length of a span in tokens.
        share: number of pauses per token of text.
        seed: random seed for the positions of pauses.

    Returns:
        Rows with `input_ids` and `labels`.

    Raises:
        ValueError: no text has two tokens, or the tokenizer does not have the pause token.
    """
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    if pause == tokenizer.unk_token_id or not isinstance(pause, int):
        raise ValueError(
            f"Expected a tokenizer with {PAUSE} in its vocabulary, got one without. Add it with "
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
        raise ValueError(
            f"Expected texts of at least two tokens, got {len(texts)} texts, none of them as long."
        )
    return rows

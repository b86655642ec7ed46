"""Pause tokens: Goyal et al. 2024 (arXiv:2310.02226), the natural baseline of Quiet-STaR.

One new token with a learnable embedding gives the model more computation before it answers. The
paper compares four variants, by where pauses are seen: StdPT_StdFT (never), StdPT_PauseFT (only in
fine-tuning), PausePT_StdFT (only in pre-training) and PausePT_PauseFT (both). `insert_pauses` makes
the text of pause-pretraining, `append_pauses` an example of pause-finetuning; both say where there
is no loss: where the next token is a pause, and nowhere else.
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
"""Whether pauses are in pre-training and in fine-tuning."""


def insert_pauses(
    ids: Sequence[int], pause: int, share: float, draw: random.Random
) -> tuple[list[int], list[int]]:
    """The text with pauses at uniformly random places, and its labels.

    Labels are as transformers has them, for the token itself: a pause's is ignored, so the loss is
    skipped where the next token is a pause; what follows a pause is predicted from it (Equation 1).
    As in the paper the text is then trimmed to its old length.
    """
    count = round(share * len(ids))
    # A place is a number of tokens before it; the last one has a token after it to predict.
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
    """Prefix, pauses and target, with loss on the target only, its first token predicted from the last
    pause (Equation 3)."""
    ids = [*prefix, *[pause] * count, *target]
    return ids, [IGNORED] * (len(prefix) + count) + list(target)


def paused(style: PromptStyle, count: int, filler: str = PAUSE) -> PromptStyle:
    """The style with `count` pauses after every question (pause-inference, Section 3.2).

    With another filler, such as ".", it is the paper's control: as many tokens that mean nothing, to
    a model that never learned to use them.

    Raises:
        ValueError: a style of messages, whose template ends the question itself.
    """
    if style.as_messages:
        raise ValueError("Pauses follow the question as text; use --prompt few_shot or bare.")
    return replace(
        style, name=f"{style.name}, {count} x {filler}", question=style.question + filler * count
    )


def with_pauses(examples: Sequence[Example], count: int) -> list[Example]:
    """Examples for pause-finetuning: each prompt followed by `count` pauses.

    Raises:
        ValueError: a prompt of messages.
    """
    found = []
    for example in examples:
        if not isinstance(example.prompt, str):
            raise ValueError("Pauses follow a prompt that is text; this one is of messages.")
        found.append(replace(example, prompt=example.prompt + PAUSE * count))
    return found


def refuse_without_pause(model: str) -> None:
    """Refuse a model that would read the letters of the pause token.

    Raises:
        ValueError: its tokenizer does not know the token.
    """
    from transformers import AutoTokenizer

    check_model_name(model)
    if PAUSE not in AutoTokenizer.from_pretrained(model).get_vocab():
        raise ValueError(
            f"Expected a model that knows {PAUSE}, got {model}; train one with selftaught pause "
            "train, or give --pauses [0] or a --filler."
        )


def add_pause_token(model: str, out: Path) -> Path:
    """A copy of a model that knows the pause token; its embedding starts as the mean of all.

    A model that knows it already is copied as it is. The copy stands in `out` whole or not at all;
    one made before of the same model stays.
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
    """Rows for pause-pretraining: spans of texts with pauses inserted, and their labels.

    Raises:
        ValueError: no text, or the tokenizer does not know the pause token.
    """
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    if pause == tokenizer.unk_token_id or not isinstance(pause, int):
        raise ValueError(f"Expected a tokenizer with {PAUSE}; make one with add_pause_token.")
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

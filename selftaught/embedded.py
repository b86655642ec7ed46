"""The small arithmetic model that ships with the package, and the recipe that made it.

A Llama of two hundred thousand parameters that reads characters. What it is for: STaR on it takes
minutes on two CPU cores. So it must be what GPT-J was to the paper, a model that works short
problems well and long ones hardly. Its pre-training text, drawn anew for every batch, holds

- sums of 1 and 2 digits with their scratchpads (`tasks/arithmetic.py`), some with the answer shown
  as in a hint;
- "name the columns" exercises of 1 to 5 digits, with nothing added up: where the digits of a long
  sum stand is known, working one is not;
- few sums of 3 to 5 digits with their scratchpads, always with the answer shown.

A long sum without a hint, which is what the model is asked, is not among them.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.tasks.arithmetic import columns, problem, scratchpad, split_of
from selftaught.tasks.question_file import hint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Text = tuple[str, str]
"""What is read and what is written: the loss is on the second."""

STEPS = 800
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 30
COLUMNS_SHARE = 0.3
HINTED_SHARE = 0.3
LONG_SHARE = 0.05
PAD, END = "<pad>", "\n"


def embedded_model() -> Path:
    """The folder of the embedded model, loadable with `from_pretrained`."""
    return Path(__file__).with_name("embedded_model")


def rebuild(
    folder: Path,
    seed: int = 0,
    *,
    steps: int = STEPS,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make the embedded model and its tokenizer in `folder`; on one machine always the same weights.

    Args:
        progress: called with the number of optimizer steps that have just been done.
    """
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    optimizer = torch.optim.AdamW(
        model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    model.train()
    texts = corpus(seed)
    for step in range(steps):
        rate = min(1.0, (step + 1) / WARMUP_STEPS) * max(0.02, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * rate
        model(**_batch(tokenizer, list(islice(texts, BATCH)))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress:
            progress(1)
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def corpus(seed: int) -> Iterator[Text]:
    """Pre-training texts without end; no sum of the validation and test splits is among them."""
    draw = random.Random(seed)
    while True:
        kind, shown = draw.random(), draw.random() < HINTED_SHARE
        if kind < COLUMNS_SHARE:
            a, b = _training_sum(draw, draw.randint(1, 5))
            yield _question(a, b, shown) + ":", columns(a, b)
        elif kind < COLUMNS_SHARE + LONG_SHARE:
            a, b = _training_sum(draw, draw.randint(3, 5))
            yield _question(a, b, True) + "=", scratchpad(a, b)
        else:
            a, b = _training_sum(draw, 2 if draw.random() < 0.75 else 1)
            yield _question(a, b, shown) + "=", scratchpad(a, b)


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """One token per character of printable ASCII; a line end ends a text."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    characters = [PAD, END, *map(chr, range(ord(" "), ord("~") + 1)), "<unk>"]
    vocabulary = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()  # no spaces between tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token="<unk>",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )


def _config(tokenizer: "PreTrainedTokenizerFast") -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(tokenizer: "PreTrainedTokenizerFast", texts: Sequence[Text]) -> dict[str, Any]:
    """Token ids and labels, padded on the right."""
    import torch

    read = [tokenizer(text)["input_ids"] for text, _ in texts]
    written = [tokenizer(text + END)["input_ids"] for _, text in texts]
    longest = max(len(a) + len(b) for a, b in zip(read, written, strict=True))
    ids_BT = torch.full((len(texts), longest), tokenizer.pad_token_id)
    labels_BT = torch.full((len(texts), longest), -100)
    for row, (prompt, completion) in enumerate(zip(read, written, strict=True)):
        whole = torch.tensor(prompt + completion)
        ids_BT[row, : len(whole)] = whole
        labels_BT[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return {"input_ids": ids_BT, "labels": labels_BT}


def _training_sum(draw: random.Random, n: int) -> tuple[int, int]:
    lowest = 0 if n == 1 else 10 ** (n - 1)
    while True:
        a, b = draw.randrange(lowest, 10**n), draw.randrange(lowest, 10**n)
        if split_of(a, b) == "train":
            return a, b


def _question(a: int, b: int, shown: bool) -> str:
    asked = problem(a, b)
    return (hint(asked) if shown else asked).question

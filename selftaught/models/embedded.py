"""The small arithmetic model in this package, and its pre-training.

A Llama with about 200,000 parameters and a character tokenizer, so that STaR takes minutes on two
CPU cores. Like GPT-J in the paper, it solves short problems well and long ones rarely. Its
pre-training text, newly sampled for every batch, consists of

- sums of 1 and 2 digits with their scratchpads (`tasks/arithmetic.py`), some with the answer as a
  hint;
- "name the columns" exercises of 1 to 5 digits without the addition, from which the model learns
  the positions of the digits of a long sum, but not how to add them;
- read-out exercises: the finished columns of a sum of 2 to 5 digits, without its question, and the
  answer;
- a few sums of 3 to 5 digits with their scratchpads, always with the answer as a hint.

Long sums without a hint, on which the model is evaluated, are included only in the last few steps.
These end when the model solves 8% of the sums of 3 digits or 1% of those of 4. The generalization
from short to long sums depends on the seed and on the rounding of the machine, so another seed may
give a model that solves 3 digits before these steps (LOG.md).
"""

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.tasks.arithmetic import columns, extract, problem, scratchpad, split_of, sums
from selftaught.tasks.base import answer_in_brackets

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Text = tuple[str, str]
"""Prompt and completion; the loss is on the completion only."""

ROPE_BASE = 200.0
"""Small, because texts have at most 80 characters and distant columns must differ."""
STEPS = 800
BATCH = 64
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 30
HINTED_SHARE = 0.3
SHARES = {"short": 0.45, "columns": 0.3, "answers": 0.15, "long": 0.1}
LAST_SHARES = SHARES | {"unhinted": 0.2}
LAST_DIGITS = (3, 3, 4, 4, 4, 4, 5, 5, 5)
LAST_LEARNING_RATE = 3e-5
LAST_STEPS = 2
"""Number of steps between two evaluations of the model."""
MOST_LAST_STEPS = 200
ENOUGH = {3: 0.08, 4: 0.01}
"""Accuracy, by number of digits, at which the last steps end."""
PAD, END = "<pad>", "\n"


def embedded_model() -> Path:
    """Return the folder of the model in this package, for `from_pretrained`."""
    return Path(__file__).with_name("embedded_model")


def rebuild(
    folder: Path,
    seed: int = 0,
    *,
    steps: int = STEPS,
    most_last_steps: int = MOST_LAST_STEPS,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Train the embedded model and write it and its tokenizer to `folder`.

    The weights are reproducible on one machine. torch is set to one thread, because the rounding
    depends on the number of threads.

    Args:
        folder: model folder to write.
        seed: random seed.
        steps: number of optimizer steps without the last ones.
        most_last_steps: maximum number of last steps, with long sums without a hint.
        progress: called with the number of optimizer steps just finished.
    """
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    tokenizer = character_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(_config(tokenizer))
    step = _stepper(model, tokenizer, progress or (lambda done: None))
    texts = corpus(seed)
    for done in range(steps):
        warm, left = min(1.0, (done + 1) / WARMUP_STEPS), max(0.02, 1 - done / steps)
        step(texts, PEAK_LEARNING_RATE * warm * left)
    step = _stepper(model, tokenizer, progress or (lambda done: None))
    texts = corpus(seed + 1, LAST_SHARES)
    asked = {n: sums(n, "train", 200, seed) for n in ENOUGH}
    for done in range(most_last_steps):
        if done % LAST_STEPS == 0 and any(
            share_worked(model, tokenizer, asked[n]) >= enough for n, enough in ENOUGH.items()
        ):
            break
        step(texts, LAST_LEARNING_RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def share_worked(
    model: Any,
    tokenizer: "PreTrainedTokenizerFast",
    asked: Sequence[tuple[int, int]],
) -> float:
    """Return the model's accuracy with greedy decoding on sums with the same number of digits."""
    import torch

    ids = torch.tensor([tokenizer(_question(a, b, False) + "=")["input_ids"] for a, b in asked])
    model.eval()
    limit = len(scratchpad(*asked[0])) + 4
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False
    )
    texts = tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    right = [extract(text) == str(a + b) for text, (a, b) in zip(texts, asked, strict=True)]
    return sum(right) / len(right)


def _stepper(
    model: "LlamaForCausalLM",
    tokenizer: "PreTrainedTokenizerFast",
    progress: Callable[[int], None],
) -> Callable[[Iterator[Text], float], None]:
    """Return a function that does one optimizer step with a new AdamW optimizer."""
    import torch

    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )

    def step(texts: Iterator[Text], learning_rate: float) -> None:
        model.train()
        optimizer.param_groups[0]["lr"] = learning_rate
        model(**_batch(tokenizer, list(islice(texts, BATCH)))).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress(1)

    return step


def corpus(seed: int, shares: dict[str, float] = SHARES) -> Iterator[Text]:
    """Yield pre-training texts endlessly, without sums of the validation and test splits.

    Args:
        seed: random seed.
        shares: shares of the kinds of text.
    """
    draw = random.Random(seed)
    while True:
        kind = draw.choices(list(shares), list(shares.values()))[0]
        shown = draw.random() < HINTED_SHARE
        match kind:
            case "columns":
                a, b = _training_sum(draw, draw.randint(1, 5))
                yield _question(a, b, shown) + ":", columns(a, b)
            case "answers":
                a, b = _training_sum(draw, draw.randint(2, 5))
                worked, mark, answer = scratchpad(a, b).partition("#")
                yield worked, mark + answer
            case "long":
                a, b = _training_sum(draw, draw.randint(3, 5))
                yield _question(a, b, True) + "=", scratchpad(a, b)
            case "unhinted":
                a, b = _training_sum(draw, draw.choice(LAST_DIGITS))
                yield _question(a, b, False) + "=", scratchpad(a, b)
            case _:
                a, b = _training_sum(draw, draw.choice((1, 2, 2, 2)))
                yield _question(a, b, shown) + "=", scratchpad(a, b)


def character_tokenizer() -> "PreTrainedTokenizerFast":
    """Return a tokenizer of printable ASCII characters, with a newline as the end token."""
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


def _config(tokenizer: Any) -> "LlamaConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(tokenizer: Any, texts: Sequence[Text]) -> "dict[str, Tensor]":
    """Return token ids and labels, both of shape (batch, longest text), padded on the right."""
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
    return (answer_in_brackets(asked) if shown else asked).question

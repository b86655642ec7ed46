"""A task with many right solutions per question, and a small base model that half knows it.

    python recipes/chain_sums.py OUT --seed 0 --train 500

A question is a sum of four numbers, `17+5+48+36`. A solution adds them up one at a time, in any order:
`5+17=22; 22+36=58; 58+48=106; #### 106`. The training file has one solution to a question, in an
order of its own; 24 are right. The files are read by the task `question_file` with its defaults, the
columns `id` and `rationale` named.

The base is a Llama of a third of a million parameters that reads characters. Its pre-training text,
drawn anew for every batch, holds sums of two numbers, sums of two to four numbers with their
solutions, and lists of numbers to be written in another order. Hardly any of these sums has anything
to carry, as the questions do: so the base adds by a habit that is often wrong, and slips when it
keeps track of many numbers. Fine-tuned on a few hundred questions, it gets some right, and many more
among several samples. The questions are written to OUT/questions, the base to OUT/base.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selftaught.models.embedded import character_tokenizer
from selftaught.records import write_atomically

Text = tuple[str, str]
"""What is read and what is written: the loss is on the second."""
Question = tuple[tuple[int, ...], str, str, str]
"""The numbers it is known by, the question, its answer, its rationale."""

TERMS = 4
LARGEST = 99
ONE_DIGIT_SHARE = 0.35
CARRIED_SHARE = 0.04
"""The share of the sums in the pre-training text that may have something to carry."""
BATCHES = {"single": 32, "chain": 40, "order": 56}
"""Texts of each kind in one step of pre-training; kinds are padded apart, for their lengths differ."""
STEPS = 1000
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 30
LAYERS, WIDTH, HEADS = 3, 96, 4


def main() -> None:
    """Write the questions and make the base, as the command line says."""
    make_recipe(__doc__, questions, corpus, BATCHES, train=500, steps=STEPS)


def make_recipe(
    about: str | None,
    write: Callable[..., None],
    texts_of: Callable[[str, int], Iterator[Text]],
    batches: Mapping[str, int],
    *,
    train: int,
    steps: int,
) -> None:
    """The command of a task's recipe: questions in OUT/questions, the base in OUT/base.

    Args:
        about: the recipe's own words, for --help.
        write: its `questions`.
        texts_of: its `corpus`.
        batches: how many texts of each kind stand in one step of pre-training.
        train: training questions where the command does not say.
        steps: of pre-training.
    """
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=train, help="training questions")
    parser.add_argument("--validation", type=int, default=200, help="validation questions")
    parser.add_argument("--test", type=int, default=500, help="test questions")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("train", "validation", "test")}
    write(options.out / "questions", **sizes, seed=options.seed)
    began, done = time.monotonic(), 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        if done % 100 == 0:
            print(f"{done}/{steps} steps, {time.monotonic() - began:.0f} s", flush=True)

    texts = {kind: (texts_of(kind, options.seed), size) for kind, size in batches.items()}
    make_base(options.out / "base", texts, seed=options.seed, steps=steps, progress=progress)


# --- the task ------------------------------------------------------------------------------------


def questions(folder: Path, *, train: int, validation: int, test: int, seed: int) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl, as `write_questions` does."""

    def drawn(draw: random.Random) -> Question:
        terms = terms_of(draw, TERMS)
        worked = solution(draw.sample(terms, len(terms)))
        return tuple(sorted(terms)), sum_of(terms), str(sum(terms)), worked

    write_questions(folder, drawn, train=train, validation=validation, test=test, seed=seed)


def write_questions(
    folder: Path,
    drawn: Callable[[random.Random], Question],
    *,
    train: int,
    validation: int,
    test: int,
    seed: int,
    with_rationale: int | None = None,
) -> None:
    """Write train.jsonl, validation.jsonl and test.jsonl: id, question, answer and rationale.

    No question stands in two splits, and test and validation questions are the same whatever the
    number of training questions.

    Args:
        drawn: the next question; what it is known by comes first.
        with_rationale: number of questions of a split that have a rationale, from the first. Default: all.
    """
    asked: set[tuple[int, ...]] = set()
    for split, size in (("test", test), ("validation", validation), ("train", train)):
        draw = random.Random(f"{seed} {split}")
        rows: list[dict[str, str | None]] = []
        while len(rows) < size:
            numbers, question, answer, rationale = drawn(draw)
            if numbers in asked:
                continue
            asked.add(numbers)
            rows.append(
                {
                    "id": f"{split}-{len(rows)}",
                    "question": question,
                    "answer": answer,
                    "rationale": rationale
                    if with_rationale is None or len(rows) < with_rationale
                    else None,
                }
            )
        write_atomically(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def solution(terms: Sequence[int]) -> str:
    """The terms added up one at a time, in the order given, and the answer."""
    total, steps = terms[0], ""
    for term in terms[1:]:
        steps += f"{total}+{term}={total + term}; "
        total += term
    return f"{steps}#### {total}"


def carries(a: int, b: int) -> bool:
    """Whether there is anything to carry when two numbers are added."""
    while a and b:
        if a % 10 + b % 10 > 9:
            return True
        a, b = a // 10, b // 10
    return False


def terms_of(draw: random.Random, count: int) -> list[int]:
    return [_number(draw) for _ in range(count)]


def _number(draw: random.Random) -> int:
    one_digit = draw.random() < ONE_DIGIT_SHARE
    return draw.randint(1, 9) if one_digit else draw.randint(10, LARGEST)


def sum_of(terms: Sequence[int]) -> str:
    return "+".join(map(str, terms))


# --- the base ------------------------------------------------------------------------------------


def make_base(
    folder: Path,
    texts: Mapping[str, tuple[Iterator[Text], int]],
    *,
    seed: int,
    steps: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Make the base model and its tokenizer in `folder`; on one machine always the same weights.

    Torch has one thread meanwhile, or the rounding would depend on the number of cores.

    Args:
        texts: of each kind, texts without end and how many stand in one step.
        progress: called with the number of optimizer steps that have just been done.
    """
    with _one_thread():
        tokenizer = character_tokenizer()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer)).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
        )
        for done in range(steps):
            warm, left = min(1.0, (done + 1) / WARMUP_STEPS), max(0.02, 1 - done / steps)
            optimizer.param_groups[0]["lr"] = PEAK_LEARNING_RATE * warm * left
            for drawn, size in texts.values():
                model(**_batch(tokenizer, list(islice(drawn, size)))).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if progress is not None:
                progress(1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def corpus(kind: str, seed: int) -> Iterator[Text]:
    """Pre-training texts of one kind (`single`, `chain` or `order`), without end."""
    draw = random.Random(f"{seed} {kind}")
    while True:
        any_sum = draw.random() < CARRIED_SHARE
        match kind:
            case "single":
                a, b = added(draw, any_sum, pair)
                yield f"{a}+{b}=", str(a + b)
            case "chain":
                count = draw.choice((2, 3, 4))
                worked = added(draw, any_sum, partial(terms_of, count=count))
                asked = sum_of(draw.sample(worked, count))
                yield f"Q: {asked}\nA:", f" {solution(worked)}"
            case _:
                terms = terms_of(draw, draw.randint(2, 5))
                yield f"{sum_of(terms)}:", sum_of(draw.sample(terms, len(terms)))


def added(
    draw: random.Random, any_sum: bool, numbers: Callable[[random.Random], Sequence[int]]
) -> Sequence[int]:
    """Numbers to be added in this order; unless any sum will do, there is nothing to carry."""
    while True:
        terms = numbers(draw)
        if any_sum or not any(carries(sum(terms[:i]), terms[i]) for i in range(1, len(terms))):
            return terms


def pair(draw: random.Random) -> tuple[int, int]:
    """A number of up to three digits and one of up to two, in either order."""
    a, b = draw.choice((draw.randint(1, 99), draw.randint(1, 300))), _number(draw)
    return (b, a) if draw.random() < 0.3 else (a, b)


def _config(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 200.0},
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(tokenizer: Any, texts: Sequence[Text]) -> dict[str, torch.Tensor]:
    """Token ids and labels, padded on the right; every text ends in the end token."""
    read = [tokenizer(text)["input_ids"] for text, _ in texts]
    written = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for _, text in texts]
    longest = max(len(a) + len(b) for a, b in zip(read, written, strict=True))
    ids_BT = torch.full((len(texts), longest), tokenizer.pad_token_id)
    labels_BT = torch.full((len(texts), longest), -100)
    for row, (prompt, completion) in enumerate(zip(read, written, strict=True)):
        whole = torch.tensor(prompt + completion)
        ids_BT[row, : len(whole)] = whole
        labels_BT[row, len(prompt) : len(whole)] = whole[len(prompt) :]
    return {"input_ids": ids_BT, "labels": labels_BT}


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()

"""Sampling speed on few-shot prompts: TransformersSampler beside plain `generate`.

    selftaught get-model smollm2 smollm2
    python benchmarks/sampling.py smollm2

Both sides answer the same 200 questions under the same worked examples, greedily, with the same
end token, stop string and length limit, and are timed in turns. A completion's tokens are counted
up to the one that ends it, so that a side earns nothing by writing on. Where other jobs share the
machine, the ratio of CPU seconds says more than that of wall-clock seconds; both are printed.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.generation import ContinuousBatchingConfig, GenerationConfig

from selftaught.samplers import SamplingParams
from selftaught.samplers.local.sampler import TransformersSampler

STOP = "\n\n"

SHOTS = """\
Q: A bakery bakes 48 rolls in the morning and 36 rolls at noon. By closing time 71 rolls have been sold. How many rolls are left?
A: In the morning and at noon the bakery bakes 48 + 36 = 84 rolls. Of these, 71 are sold, so 84 - 71 = 13 rolls are left. The answer is 13.

Q: Nora reads 15 pages every evening. Her book has 240 pages, and she has read 90 of them. How many more evenings does she need?
A: Nora has 240 - 90 = 150 pages left. She reads 15 pages every evening, so she needs 150 / 15 = 10 more evenings. The answer is 10.

Q: A bus starts with 22 passengers. At the first stop 9 get off and 14 get on. At the second stop 6 get off. How many passengers are on the bus now?
A: After the first stop there are 22 - 9 + 14 = 27 passengers on the bus. After the second stop there are 27 - 6 = 21. The answer is 21.

Q: Omar buys 4 notebooks for 3 dollars each and 2 pens for 5 dollars each. He pays with 50 dollars. How many dollars does he get back?
A: The notebooks cost 4 * 3 = 12 dollars and the pens cost 2 * 5 = 10 dollars. Together that is 22 dollars. Omar gets back 50 - 22 = 28 dollars. The answer is 28.

Q: A gardener plants 6 rows of 18 tulips. During the winter 29 tulips are eaten by mice. How many tulips come up in spring?
A: The gardener plants 6 * 18 = 108 tulips. The mice eat 29 of them, so 108 - 29 = 79 tulips come up. The answer is 79.

Q: Lena is 7 years older than her brother Paul. Paul is 3 times as old as their cousin Mia, who is 5. How old is Lena?
A: Paul is 3 * 5 = 15 years old. Lena is 7 years older than Paul, so she is 15 + 7 = 22 years old. The answer is 22.

Q: A water tank holds 500 litres and is full. A family uses 65 litres on Monday and 80 litres on Tuesday. How many litres are left?
A: On the two days the family uses 65 + 80 = 145 litres of water. So 500 - 145 = 355 litres are left in the tank. The answer is 355.

Q: In a hall there are 12 rows of 14 chairs. For a concert 9 more chairs are carried in, and 150 guests sit down. How many chairs stay empty?
A: The rows have 12 * 14 = 168 chairs. With the 9 others there are 177 chairs in the hall. So 177 - 150 = 27 chairs stay empty. The answer is 27.

"""

QUESTIONS = (
    "{name} has {a} {thing}. A friend brings {b} more {thing}, and then {c} {thing} get lost. How many {thing} does {name} have now?",
    "{name} packs {b} boxes with {c} {thing} in every box, and {a} {thing} do not fit in. How many {thing} are there in all?",
    "A shop has {a} {thing}. On Monday it sells {c} of them, and on Tuesday {b} new {thing} arrive for {name}, who keeps the shop. How many {thing} does the shop have on Tuesday evening?",
    "{name} buys {b} {thing} for {c} dollars each and pays {a} dollars for the bus. How many dollars does {name} spend?",
    "{name} had {a} {thing} and gave {c} of them to each of 2 neighbours. How many {thing} are left?",
)
NAMES = ("Ida", "Tom", "Ravi", "Ayla", "Jonas", "Mei", "Carlos", "Fatima", "Greta", "Sam")
THINGS = ("apples", "stamps", "marbles", "candles", "eggs", "books", "lemons", "buttons")


def questions(count: int) -> list[str]:
    """Word problems, always the same ones."""
    draw = random.Random(2026)
    return [
        draw.choice(QUESTIONS).format(
            name=draw.choice(NAMES),
            thing=draw.choice(THINGS),
            a=draw.randint(40, 99),
            b=draw.randint(3, 20),
            c=draw.randint(2, 19),
        )
        for _ in range(count)
    ]


@dataclass
class Side:
    """One way to sample: how, how long it took each time, and what it wrote."""

    name: str
    run: Callable[[], list[tuple[int, ...]]]
    seconds: list[float]
    cpu_seconds: list[float]
    tokens: list[tuple[int, ...]]


def completed(
    tokenizer: PreTrainedTokenizerBase, tokens: list[int], eos: int, limit: int
) -> tuple[int, ...]:
    """The tokens up to the one that ends the completion."""
    for length in range(1, min(len(tokens), limit) + 1):
        if tokens[length - 1] == eos or STOP in str(tokenizer.decode(tokens[:length])):
            return tuple(tokens[:length])
    return tuple(tokens[:limit])


def sides(folder: str, dtype: str, prompts: list[str], args: argparse.Namespace) -> list[Side]:
    """The ways that are compared, on one loaded model."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    # transformers' own type of `generate` does not bind to a model
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    eos = tokenizer.eos_token_id
    settings = {"max_new_tokens": args.max_tokens, "do_sample": False, "eos_token_id": eos}

    def plain() -> list[tuple[int, ...]]:
        tokens = []
        for start in range(0, len(prompts), 32):
            batch = tokenizer(prompts[start : start + 32], return_tensors="pt", padding=True)
            with torch.inference_mode():
                out_BT = model.generate(
                    **batch,
                    **settings,
                    pad_token_id=eos,
                    stop_strings=[STOP],
                    tokenizer=tokenizer,
                )
            for row in out_BT[:, batch["input_ids"].shape[1] :].tolist():
                tokens.append(completed(tokenizer, row, eos, args.max_tokens))
        return tokens

    def continuous() -> list[tuple[int, ...]]:
        requests = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        out = model.generate_batch(
            inputs=requests,
            generation_config=GenerationConfig(**settings, pad_token_id=eos),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=2048, max_batch_tokens=2048
            ),
            progress_bar=False,
        )
        rows = [out[f"req_{number}"].generated_tokens for number in range(len(requests))]
        return [completed(tokenizer, row, eos, args.max_tokens) for row in rows]

    def ours() -> list[tuple[int, ...]]:
        params = SamplingParams(max_tokens=args.max_tokens, stop=(STOP,))
        with TransformersSampler(model, tokenizer=tokenizer, batch_size=args.batch_size) as sampler:
            return [answers[0].token_ids or () for answers in sampler.sample(prompts, params)]

    named = [("plain generate, batch 32", plain), ("TransformersSampler", ours)]
    if args.continuous:
        named.insert(1, ("generate_batch (continuous)", continuous))
    return [Side(name, run, [], [], []) for name, run in named]


def measure(folder: str, dtype: str, args: argparse.Namespace) -> None:
    """Time every way in turns and print a row for each."""
    prompts = [f"{SHOTS}Q: {question}\nA:" for question in questions(args.questions)]
    compared = sides(folder, dtype, prompts, args)
    for _ in range(args.repeats):
        for side in compared:
            start, cpu_start = time.perf_counter(), time.process_time()
            side.tokens = side.run()
            side.seconds.append(time.perf_counter() - start)
            side.cpu_seconds.append(time.process_time() - cpu_start)
            print(f"{side.name}: {side.seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    base = compared[0]
    for side in compared:
        count, seconds, cpu_seconds = map(
            float, (sum(map(len, side.tokens)), min(side.seconds), min(side.cpu_seconds))
        )
        share = count / sum(map(len, base.tokens))
        same = sum(a == b for a, b in zip(side.tokens, base.tokens, strict=True))
        print(
            f"| {dtype} | {side.name} | {count:.0f} | {seconds:.1f} | {count / seconds:.0f} "
            f"| {share * min(base.seconds) / seconds:.2f} | {cpu_seconds:.1f} "
            f"| {share * min(base.cpu_seconds) / cpu_seconds:.2f} | {same}/{len(prompts)} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a model folder; see selftaught get-model")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=200, help="of TransformersSampler")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--continuous", action="store_true", help="generate_batch too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        "| dtype | sampler | tokens | seconds | tokens/s | ratio "
        "| CPU seconds | ratio | same tokens |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    for dtype in args.dtypes:
        measure(args.folder, dtype, args)


if __name__ == "__main__":
    main()

"""Speed of Monte-Carlo step values: `TransformersSampler.sample(begun=...)` beside plain `generate`.

    selftaught get-model smollm2 smollm2
    python benchmarks/step_values.py smollm2

The model writes completions of the questions of `sampling.py` under the same worked examples; they
are cut after each of their sentences but the last, and each prefix is continued several times at
temperature 0.7, by both sides up to the same length of the whole completion, end token and stop
string. Plain `generate` gets the whole texts, padded on the left, with num_return_sequences. Only
tokens after the prefix and up to the one that ends the completion are counted. The sides are timed
in turns; where other jobs share the machine, the ratio of CPU seconds says more than that of
wall-clock seconds.
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sampling import SHOTS, STOP, completed, questions
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from selftaught.samplers import SamplingParams
from selftaught.samplers.local.sampler import TransformersSampler

Tokens = tuple[int, ...]
STEP = re.compile(r"[.!?](?=\s)|\n")


@dataclass
class Side:
    """One way to continue: how, how long it took each time, how many tokens it wrote."""

    name: str
    run: Callable[[], int]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def steps(tokenizer: PreTrainedTokenizerBase, tokens: Tokens, text: str) -> list[Tokens]:
    """What a completion begins with, up to each of its steps but the last."""
    prefixes = []
    for found in STEP.finditer(text.rstrip()):
        if found.end() < len(text.rstrip()):
            lengths = range(1, len(tokens))
            cut = next(
                n for n in lengths if len(str(tokenizer.decode([*tokens[:n]]))) >= found.end()
            )
            prefixes.append(tokens[:cut])
    return list(dict.fromkeys(prefixes))


def begun_by(
    sampler: TransformersSampler, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> tuple[list[str], list[Tokens]]:
    """Prompts, and for each what a completion of the model begins with."""
    asked = [f"{SHOTS}Q: {question}\nA:" for question in questions(args.questions)]
    params = SamplingParams(
        n=args.written, temperature=0.7, max_tokens=args.max_tokens, stop=(STOP,)
    )
    prompts, prefix_tokens = [], []
    for prompt, answers in zip(asked, sampler.sample(asked, params), strict=True):
        for one in answers:
            for prefix in steps(tokenizer, one.token_ids or (), one.text):
                prompts.append(prompt)
                prefix_tokens.append(prefix)
    return prompts, prefix_tokens


def sides(args: argparse.Namespace) -> tuple[list[Side], list[Tokens]]:
    """The ways that are compared, on one loaded model, and the prefixes."""
    tokenizer = AutoTokenizer.from_pretrained(args.folder, padding_side="left")
    # transformers' own type of `generate` does not bind to a model
    model: Any = AutoModelForCausalLM.from_pretrained(args.folder, dtype=args.dtype).eval()
    eos = tokenizer.eos_token_id
    first = TransformersSampler(model, tokenizer=tokenizer, batch_size=args.batch_size)
    prompts, prefix_tokens = begun_by(first, tokenizer, args)
    params = SamplingParams(
        n=args.n, temperature=0.7, max_tokens=args.max_tokens, stop=(STOP,), seed=1
    )

    def ours() -> int:
        # A new sampler each time: nothing is left of the one before.
        with TransformersSampler(model, tokenizer=tokenizer, batch_size=args.batch_size) as sampler:
            answers = sampler.sample(prompts, params, prefix_tokens=prefix_tokens)
        pairs = zip(answers, prefix_tokens, strict=True)
        return sum(len(one.token_ids or ()) - len(own) for several, own in pairs for one in several)

    def plain() -> int:
        count, size = 0, max(1, args.plain_batch // args.n)
        pairs = zip(prompts, prefix_tokens, strict=True)
        rows = [[*tokenizer(prompt).input_ids, *own] for prompt, own in pairs]
        for start in range(0, len(rows), size):
            owns = prefix_tokens[start : start + size]
            batch = tokenizer.pad({"input_ids": rows[start : start + size]}, return_tensors="pt")
            with torch.inference_mode():
                out_BT = model.generate(
                    **batch, do_sample=True, temperature=0.7, top_k=0, top_p=1.0,
                    num_return_sequences=args.n, eos_token_id=eos, pad_token_id=eos,
                    max_new_tokens=args.max_tokens - min(map(len, owns)),
                    stop_strings=[STOP], tokenizer=tokenizer,
                )  # fmt: skip
            new = out_BT[:, batch["input_ids"].shape[1] :].tolist()
            for at, tokens in enumerate(new):
                limit = args.max_tokens - len(owns[at // args.n])
                count += len(completed(tokenizer, tokens, eos, limit))
        return count

    return [
        Side(f"plain generate, batch {args.plain_batch}", plain),
        Side("sample(begun)", ours),
    ], prefix_tokens


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a model folder; see selftaught get-model")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--written", type=int, default=1, help="completions cut, per question")
    parser.add_argument("--n", type=int, default=5, help="continuations of each prefix")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=128, help="of TransformersSampler")
    parser.add_argument("--plain-batch", type=int, default=32, help="rows generated at a time")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    compared, prefix_tokens = sides(args)
    mean = sum(map(len, prefix_tokens)) / len(prefix_tokens)
    print(
        f"{len(prefix_tokens)} prefixes of {mean:.1f} tokens on average, {args.n} continuations each\n"
    )
    for _ in range(args.repeats):
        for side in compared:
            start, cpu_start = time.perf_counter(), time.process_time()
            side.tokens += side.run()
            side.seconds.append(time.perf_counter() - start)
            side.cpu_seconds.append(time.process_time() - cpu_start)
            print(f"{side.name}: {side.seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    print(
        "| side | tokens | seconds | tokens/s | ratio | CPU seconds | ratio |\n|---|---|---|---|---|---|---|"
    )
    for side in compared:
        rates = [
            (one.tokens / sum(one.seconds), one.tokens / sum(one.cpu_seconds))
            for one in (side, compared[0])
        ]
        print(
            f"| {side.name} | {side.tokens} | {sum(side.seconds):.1f} | {rates[0][0]:.0f} "
            f"| {rates[0][0] / rates[1][0]:.2f} | {sum(side.cpu_seconds):.1f} "
            f"| {rates[0][1] / rates[1][1]:.2f} |"
        )


if __name__ == "__main__":
    main()

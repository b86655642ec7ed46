"""Speed and memory of one Quiet-STaR training step, beside the model's own rates in the same run.

    python benchmarks/quiet_step.py
    python benchmarks/quiet_step.py --lengths 256 --dtypes bfloat16 --model models/smollm2 --repeats 0

Efficiency is the time that the tokens of the step take at the plain model's rates, over the measured time. The
rates are those of the same run, separately for the body of the model and for its head, each with and without gradients,
at the number of tokens that the thoughts of a chunk have. A text token is charged body and head with gradients. A
thought is charged, without gradients, body and head for every sampled token; with gradients, the body for every token
of the second pass (start, thought, end, lookahead), and the head for the lookahead tokens and, where the advantage
is positive, for the thought. Peak memory is that of a separate process, with Python and torch. All rates are
the best of several rounds in which everything takes turns. With --repeats 0 one step is made, for its memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from selftaught.quiet.chunks import positions_per_chunk
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.losses import log_probs
from selftaught.quiet.model import QuietLM
from selftaught.quiet.thoughts import decoder, language_head

SAMPLED, LOOKAHEAD, THOUGHTS = 9, 4, 2


def small(length: int) -> PreTrainedModel:
    """Model "s": 6 layers of 256, vocabulary 8,194."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=8194,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4 * length,
            sliding_window=None,
        )
    )


def seconds(runs: list[tuple[Callable[[], object], int]], rounds: int) -> list[float]:
    """The best time of each of several things, each done so many times in every round.

    They take turns, so that all of them meet the same machine.
    """
    best = [float("inf")] * len(runs)
    for number in range(rounds + 1):
        for index, (run, times) in enumerate(runs):
            for _ in range(times):
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if number:  # the first round warms up
                    best[index] = min(best[index], time.perf_counter() - start)
    return best


class Plain:
    """The parts of a plain model, run on as many tokens as the thoughts of a chunk have.

    Args:
        base: the plain model.
        length: tokens of a text.
        tokens: tokens of all thoughts of a chunk; at least one text is run.
    """

    def __init__(self, base: PreTrainedModel, length: int, tokens: int) -> None:
        self.base, self.head = base, language_head(base)
        self.ids_BT = torch.randint(
            0,
            base.config.vocab_size - 2,
            (max(1, round(tokens / length)), length),
            device=base.device,
        )
        with torch.no_grad():
            self.hidden_XD = self._body().flatten(0, 1)

    @property
    def tokens(self) -> int:
        """Number of tokens per call."""
        return self.ids_BT.numel()

    def _body(self) -> torch.Tensor:
        return decoder(self.base)(input_ids=self.ids_BT, use_cache=False).last_hidden_state

    @torch.no_grad()
    def body(self) -> None:
        """Run the body without gradients."""
        self._body()

    @torch.no_grad()
    def logits(self) -> None:
        """Run the head without gradients."""
        self.head(self.hidden_XD)

    def body_with_gradients(self) -> None:
        """Run the body and its backward pass."""
        self.base.zero_grad(set_to_none=True)
        self._body().sum().backward()

    def loss(self) -> None:
        """Run the head and the loss of every token, and their backward pass."""
        self.base.zero_grad(set_to_none=True)
        hidden_XD = self.hidden_XD.detach().requires_grad_()
        log_probs(self.head, hidden_XD, self.ids_BT.flatten()).sum().backward()


def measure(args: argparse.Namespace, length: int, dtype: str) -> dict[str, float]:
    """One row of the table, in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    # transformers' own type of `to` does not bind to a model
    base: Any = AutoModelForCausalLM.from_pretrained(args.model) if args.model else small(length)
    base = base.to(device, getattr(torch, dtype)).train()
    vocabulary = base.config.vocab_size
    ids = torch.randint(0, vocabulary - 2, (1, length), device=device)
    config = QuietConfig.authors_code(
        thought_tokens=SAMPLED,
        lookahead=LOOKAHEAD,
        thoughts=THOUGHTS,
        positions_per_chunk=args.positions_per_chunk,
    )
    model = QuietLM(base, config, start=vocabulary - 2, end=vocabulary - 1, pad=None)

    def quiet() -> None:
        model.zero_grad(set_to_none=True)
        model(ids).loss.backward()

    def train() -> None:
        base.zero_grad(set_to_none=True)
        base(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    start = time.perf_counter()
    quiet()
    first = time.perf_counter() - start
    if args.repeats:
        quiet()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 1024
    if not args.repeats:
        return {"seconds": first, "peak_gb": peak / 1024**2}
    share = QuietLM(
        base,
        replace(config, positions="uniform"),
        start=vocabulary - 2,
        end=vocabulary - 1,
        pad=None,
        check=False,
    )

    def quarter() -> None:
        share.zero_grad(set_to_none=True)
        share(ids).loss.backward()

    positive = model(ids).positive
    assert positive is not None
    second_pass = SAMPLED + 2 + LOOKAHEAD - 1
    at_once = min(length - 1, positions_per_chunk(base, config, 1)) * THOUGHTS
    plain = Plain(base, length, at_once * second_pass)
    runs = [(quiet, 1), (quarter, 1), (train, 5)]
    parts = [plain.body, plain.logits, plain.body_with_gradients, plain.loss]
    measured, quarter_s, train_s, *part_s = seconds(
        [*runs, *((part, 2) for part in parts)], args.repeats
    )
    body_s, head_s, body_gradients_s, loss_s = (time / plain.tokens for time in part_s)
    per_thought = (
        SAMPLED * (body_s + head_s)
        + second_pass * body_gradients_s
        + (LOOKAHEAD + SAMPLED * positive.item()) * loss_s
    )
    ideal = train_s + THOUGHTS * (length - 1) * per_thought
    return {
        "seconds": measured, "efficiency": ideal / measured, "train_rate": length / train_s,
        "forward_rate": 1 / (body_s + head_s), "quarter": measured / quarter_s, "peak_gb": peak / 1024**2,
    }  # fmt: skip


def main() -> None:
    """Print the table, a process per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model folder; without it model s")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--positions-per-chunk", type=int, help="by default what fits")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        torch.set_num_threads(args.threads)
        print(json.dumps(measure(args, args.lengths[0], args.dtypes[0])))
        return
    print(
        "| L | dtype | s/step | efficiency | at 25% of positions | train tokens/s | forward tokens/s | peak GB |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for dtype in args.dtypes:
        for length in args.lengths:
            options = [
                "--row", "--lengths", str(length), "--dtypes", dtype, "--threads", str(args.threads),
                "--repeats", str(args.repeats),
                *(["--positions-per-chunk", str(args.positions_per_chunk)] if args.positions_per_chunk else []),
                *(["--model", args.model] if args.model else []),
            ]  # fmt: skip
            done = subprocess.run(
                [sys.executable, __file__, *options], stdout=subprocess.PIPE, text=True, check=True
            )
            row = json.loads(done.stdout)
            if not args.repeats:
                print(
                    f"| {length} | {dtype} | {row['seconds']:.2f} | | | | | {row['peak_gb']:.2f} |"
                )
                continue
            print(
                f"| {length} | {dtype} | {row['seconds']:.2f} | {row['efficiency']:.2f} | {row['quarter']:.2f}x faster "
                f"| {row['train_rate']:.0f} | {row['forward_rate']:.0f} | {row['peak_gb']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()

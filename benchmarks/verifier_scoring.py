"""Speed of scoring candidates: `TransformersScorer.log_probs` beside separate padded sequences.

    selftaught get-model smollm2 smollm2
    python benchmarks/verifier_scoring.py smollm2
    python benchmarks/verifier_scoring.py smollm2 --shots

Both sides give the log-probability of every token of the same candidates, which the model has
written at temperature 0.7 to the questions of `sampling.py` under their worked examples. They are
scored after the bare question, or with --shots after the worked examples too. The usual way puts
every candidate behind its prompt and reads them in batches, padded on the right. The sides are timed
in turns; where other jobs share the machine, the ratio of CPU seconds says more than that of
wall-clock seconds. How far the log-probabilities of the sides are apart is printed with them.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from sampling import SHOTS, STOP, questions
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.samplers import SamplingParams
from selftaught.samplers.local.sampler import TransformersSampler
from selftaught.samplers.local.scorer import TransformersScorer

Scores = list[list[list[float]]]


@dataclass
class Side:
    """One way to score: how, how long it took each time, what it found."""

    name: str
    run: Callable[[], Scores]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    found: Scores = field(default_factory=list)


def sides(args: argparse.Namespace) -> tuple[list[Side], list[list[tuple[int, ...]]]]:
    """The ways that are compared, on one loaded model, and the candidates."""
    tokenizer = AutoTokenizer.from_pretrained(args.folder, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=args.dtype).eval()
    bare = [f"Q: {question}\nA:" for question in questions(args.questions)]
    params = SamplingParams(n=args.n, temperature=0.7, max_tokens=args.max_tokens, stop=(STOP,))
    written = TransformersSampler(model, tokenizer=tokenizer).sample(
        [SHOTS + prompt for prompt in bare], params
    )
    candidates = [[one.token_ids or () for one in answers] for answers in written]
    prompts = [SHOTS + prompt for prompt in bare] if args.shots else bare

    def ours() -> Scores:
        # A new scorer each time: nothing is left of the one before.
        with TransformersScorer(model, tokenizer=tokenizer, batch_size=args.batch_size) as scorer:
            return scorer.log_probs(prompts, candidates)

    @torch.inference_mode()
    def padded() -> Scores:
        heads = [tokenizer(prompt).input_ids for prompt in prompts]
        pairs = [(head, one) for head, some in zip(heads, candidates, strict=True) for one in some]
        scores = []
        for start in range(0, len(pairs), args.plain_batch):
            part = pairs[start : start + args.plain_batch]
            rows = [[*head, *one] for head, one in part]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            logits_BTV = model(**batch, use_cache=False).logits
            for logits_TV, (head, one) in zip(logits_BTV, part, strict=True):
                log_prob_CV = logits_TV[len(head) - 1 :][: len(one)].float().log_softmax(-1)
                scores.append(log_prob_CV.gather(1, torch.tensor(one)[:, None])[:, 0].tolist())
        each = iter(scores)
        return [[next(each) for _ in some] for some in candidates]

    return [
        Side(f"padded, batch {args.plain_batch}", padded),
        Side("log_probs", ours),
    ], candidates


def apart(one: Scores, two: Scores) -> float:
    """The largest difference of two sides' log-probabilities."""
    flat = [[value for some in side for score in some for value in score] for side in (one, two)]
    return max(abs(a - b) for a, b in zip(*flat, strict=True))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", help="a model folder; see selftaught get-model")
    parser.add_argument("--questions", type=int, default=20)
    parser.add_argument("--n", type=int, default=16, help="candidates of each question")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--shots", action="store_true", help="score under the worked examples")
    parser.add_argument("--batch-size", type=int, default=64, help="of TransformersScorer")
    parser.add_argument("--plain-batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compared, candidates = sides(args)
    tokens = [len(one) for some in candidates for one in some]
    different = sum(len(set(some)) for some in candidates)
    print(
        f"{len(candidates)} questions, {len(tokens)} candidates ({different} different) of "
        f"{sum(tokens) / len(tokens):.1f} tokens on average\n"
    )
    for _ in range(args.repeats):
        for side in compared:
            start, cpu_start = time.perf_counter(), time.process_time()
            side.found = side.run()
            side.seconds.append(time.perf_counter() - start)
            side.cpu_seconds.append(time.process_time() - cpu_start)
            print(f"{side.name}: {side.seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    base = compared[0]
    print(
        "| side | tokens | seconds | tokens/s | ratio | CPU seconds | ratio | apart |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    for side in compared:
        seconds, cpu_seconds = min(side.seconds), min(side.cpu_seconds)
        print(
            f"| {side.name} | {sum(tokens)} | {seconds:.1f} | {sum(tokens) / seconds:.0f} "
            f"| {min(base.seconds) / seconds:.2f} | {cpu_seconds:.1f} "
            f"| {min(base.cpu_seconds) / cpu_seconds:.2f} | {apart(side.found, base.found):.1e} |"
        )


if __name__ == "__main__":
    main()

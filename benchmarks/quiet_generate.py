"""What thinking costs when a model writes, beside plain cached decoding in the same run.

    python benchmarks/quiet_generate.py
    python benchmarks/quiet_generate.py --model models/smollm2 --new-tokens 64

A thought of t tokens should cost t + 3 plain decode steps per token: the token's own, the start
token, t thought tokens and the end token. With a few tokens thinking, little more than plain.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from quiet_step import small
from transformers import AutoModelForCausalLM

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.gating import ThinkWhen
from selftaught.quiet.model import QuietLM


def seconds(runs: list[Callable[[], object]], repeats: int) -> list[float]:
    """The best time of each, taken in turn so that all meet the same machine."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for number, run in enumerate(runs):
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            best[number] = min(best[number], time.perf_counter() - start)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a model folder; without it model s of quiet_step.py")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--thought-tokens", type=int, default=12)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base: Any = (  # transformers' own types of `to` and `generate` do not bind to a model
        AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
        if args.model
        else small(512)
    )
    for weight in [] if args.model else base.parameters():
        torch.nn.init.normal_(weight, std=0.08) if weight.dim() > 1 else None  # text that varies
    base = base.to(device).eval()
    base.generation_config.eos_token_id = None
    vocabulary, new = base.config.vocab_size, args.new_tokens
    config = QuietConfig(thought_tokens=args.thought_tokens)
    model = QuietLM(base, config, start=vocabulary - 2, end=vocabulary - 1, pad=None).eval()
    ids = torch.randint(0, vocabulary - 2, (args.batch, args.prompt_tokens), device=device)
    mask = torch.ones_like(ids)
    how = {"max_new_tokens": new, "do_sample": True}  # greedy text of a random model repeats itself
    text = base.generate(ids, attention_mask=mask, pad_token_id=0, **how)
    with torch.no_grad():
        log_p = base(text[:, args.prompt_tokens - 1 : -1]).logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1).flatten()
    some = ThinkWhen("entropy", float(entropy.quantile(0.95)))

    def plain() -> object:
        return base.generate(ids, attention_mask=mask, pad_token_id=0, **how)

    def thinking(think_when: ThinkWhen) -> Callable[[], torch.Tensor]:
        return lambda: model.generate(ids, mask, think_when=think_when, **how)

    runs = [plain, thinking(ThinkWhen()), thinking(some), thinking(ThinkWhen("never"))]
    for run in runs:
        run()
    plain_s, always_s, some_s, never_s = seconds(runs, args.repeats)
    text = thinking(some)()
    share = float(
        score(model, text, think_when=some).thinks_BT[:, args.prompt_tokens - 1 :].double().mean()
    )
    steps = args.thought_tokens + 3
    print(
        f"{new} new tokens, batch {args.batch}, thoughts of {args.thought_tokens} tokens, {args.threads} thread(s)"
    )
    print("| | seconds | x plain | x (t + 3) plain steps |")
    print("|---|---|---|---|")
    print(f"| plain generate | {plain_s:.2f} | 1.00 | |")
    print(
        f"| thinking always | {always_s:.2f} | {always_s / plain_s:.2f} | {always_s / plain_s / steps:.2f} |"
    )
    print(f"| thinking at {share:.0%} | {some_s:.2f} | {some_s / plain_s:.2f} | |")
    print(f"| thinking never | {never_s:.2f} | {never_s / plain_s:.2f} | |")


if __name__ == "__main__":
    main()

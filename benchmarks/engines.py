"""Completions per second of every engine, on one machine in one run.

    selftaught get-model smollm2 smollm2
    python benchmarks/engines.py smollm2

The work is that of a STaR iteration: 200 questions under eight worked examples, greedily, each up to a
stop string or 64 tokens. Each engine is opened, asked once for a few questions that are not counted, and
then for all; loading is told beside. Tokens are counted up to the one that ends a completion. Plain
`generate`, left-padded in batches of 32, gets only `--plain-questions` of them, because it takes so long.
"""

import argparse
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sampling import SHOTS, STOP, completed, questions

Run = Callable[[list[str]], list[int]]
"""Prompts in, the number of tokens of each completion out."""


@contextmanager
def plain(args: argparse.Namespace) -> Iterator[Run]:
    """transformers' `generate`, as its documentation has it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    eos = tokenizer.eos_token_id

    def run(prompts: list[str]) -> list[int]:
        lengths = []
        for start in range(0, len(prompts), 32):
            batch = tokenizer(prompts[start : start + 32], return_tensors="pt", padding=True)
            batch = batch.to(model.device)
            with torch.inference_mode():
                out_BT = model.generate(
                    **batch, max_new_tokens=args.max_tokens, do_sample=False, pad_token_id=eos,
                    stop_strings=[STOP], tokenizer=tokenizer,
                )  # fmt: skip
            drawn = out_BT[:, batch["input_ids"].shape[1] :].tolist()
            lengths += [len(completed(tokenizer, row, eos, args.max_tokens)) for row in drawn]
        return lengths

    yield run


@contextmanager
def ours(args: argparse.Namespace, name: str, **options: Any) -> Iterator[Run]:
    """One of our samplers."""
    from selftaught.samplers import SamplingParams, open_sampler

    params = SamplingParams(max_tokens=args.max_tokens, stop=(STOP,))
    with open_sampler(name, args.model, dtype=args.dtype, **options) as sampler:
        yield lambda prompts: [
            len(samples[0].token_ids or ()) for samples in sampler.sample(prompts, params)
        ]


@contextmanager
def bare_vllm(args: argparse.Namespace) -> Iterator[Run]:
    """vLLM's own `LLM.generate`; the engine is left to end with this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(model=args.model, dtype=args.dtype, enable_prefix_caching=True, **VLLM)
    params = SamplingParams(temperature=0.0, max_tokens=args.max_tokens, stop=[STOP])
    yield lambda prompts: [
        len(one.outputs[0].token_ids) for one in llm.generate(prompts, params, use_tqdm=False)
    ]


VLLM: dict[str, Any] = {
    "max_model_len": 2048,
    "enforce_eager": True,
    "enable_chunked_prefill": False,
    "gpu_memory_utilization": 0.4,
}
ENGINES: dict[str, Callable[[argparse.Namespace], Any]] = {
    "transformers, plain generate": plain,
    "transformers, ours": lambda args: ours(args, "transformers"),
    "vLLM, bare LLM.generate": bare_vllm,
    "vLLM, through us": lambda args: ours(args, "vllm", **VLLM),
    "Ray, 2 workers of ours": lambda args: ours(args, "ray", workers=2),
}


def measured(name: str, args: argparse.Namespace) -> str:
    """The row of one engine."""
    count = args.plain_questions if "plain" in name else args.questions
    prompts = [f"{SHOTS}Q: {question}\nA:" for question in questions(args.questions + 4)]
    began = time.perf_counter()
    with ENGINES[name](args) as run:
        opened = time.perf_counter() - began
        run(prompts[-4:])
        began = time.perf_counter()
        lengths = run(prompts[:count])
        seconds = time.perf_counter() - began
    tokens = sum(lengths)
    return f"| {name} | {count} | {count / seconds:.2f} | {tokens / seconds:.0f} | {opened:.0f} s |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--plain-questions", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--only", choices=list(ENGINES), help="one engine, in this process")
    args = parser.parse_args()

    from selftaught.samplers.vllm_engine import ON_A_CPU

    for key, value in ON_A_CPU.items():
        os.environ.setdefault(key, value)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if args.only:
        print(measured(args.only, args), flush=True)
        return
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, {args.dtype}, "
          f"at most {args.max_tokens} tokens\n")  # fmt: skip
    print("| engine | questions | completions/s | tokens/s | to open |\n|---|---|---|---|---|", flush=True)  # fmt: skip
    import sys

    for name in args.engines:  # each in a process of its own, whose memory is then gone
        given = [args.model, "--only", name, "--dtype", args.dtype, "--questions", str(args.questions),
                 "--max-tokens", str(args.max_tokens), "--plain-questions", str(args.plain_questions)]  # fmt: skip
        done = subprocess.run([sys.executable, __file__, *given], capture_output=True, text=True)  # fmt: skip
        row = [line for line in done.stdout.splitlines() if line.startswith("| ")]
        print(row[-1] if row else f"| {name} | failed: {done.stderr[-500:]!r} | | | |", flush=True)


if __name__ == "__main__":
    main()

"""What it costs to ask vLLM through `--sampler vllm` instead of by its own `LLM.generate`.

    selftaught get-model smollm2 smollm2
    python benchmarks/vllm_overhead.py smollm2

Both sides hold the same model with the same options, answer the same 200 questions under the same eight
worked examples with the same seeds, so that the work is the same, and take turns, so that a machine that
is slower for a while is so for both. What is told is completions per second through us over those of
`LLM.generate`, round by round: its median and the 95% interval of the median over resampled rounds. The
first round, in which both fill their prefix caches, is not counted. `--n 4` asks for four samples of each
question, each with a seed of its own.

On a machine without an accelerator both engines compute in `--threads` threads. Give fewer than there are
cores: the processes that speak with an engine want a core as well, as they have one beside a GPU, and
where they share the engine's the rounds of one side alone differ by a third.
"""

import argparse
import os
import random
import statistics
import time

from sampling import SHOTS, STOP, questions


def bare(llm, prompts: list[str], args: argparse.Namespace, round_: int) -> tuple[float, int]:
    """Seconds and tokens of `LLM.generate`, given the seeds that ours gives."""
    from vllm import SamplingParams

    from selftaught.samplers.base import draw_number

    asked, params = [], []
    for prompt in prompts:
        for index in range(args.n):
            asked.append(prompt)
            params.append(SamplingParams(
                temperature=args.temperature, max_tokens=args.max_tokens, stop=[STOP],
                seed=draw_number(round_, prompt, index),
            ))  # fmt: skip
    began = time.perf_counter()
    outputs = llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)


def through_us(sampler, prompts: list[str], args: argparse.Namespace, round_: int) -> tuple[float, int]:  # fmt: skip
    """Seconds and tokens of `VllmSampler.sample`."""
    from selftaught.samplers import SamplingParams

    params = SamplingParams(
        n=args.n,
        temperature=args.temperature,
        max_tokens=args.max_tokens,
        stop=(STOP,),
        seed=round_,
    )
    began = time.perf_counter()
    answered = sampler.sample(prompts, params)
    seconds = time.perf_counter() - began
    return seconds, sum(len(one.token_ids) for samples in answered for one in samples)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    args = parser.parse_args()

    from selftaught.samplers import open_sampler
    from selftaught.samplers.vllm_engine import ON_A_CPU, OPTIONS_ON_A_CPU

    for name, value in ON_A_CPU.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    from vllm import LLM

    engine = {"dtype": args.dtype, "max_model_len": 2048, **OPTIONS_ON_A_CPU,
              "gpu_memory_utilization": args.gpu_memory_utilization}  # fmt: skip
    texts = [f"{SHOTS}Q: {question}\nA:" for question in questions(args.questions)]
    llm = LLM(model=args.model, enable_prefix_caching=True, **engine)
    ratios = []
    with open_sampler("vllm", args.model, **engine) as sampler:
        print("| round | LLM.generate, completions/s | through us | ratio |\n|---|---|---|---|")
        count = args.questions * args.n
        for round_ in range(args.rounds + 1):
            turns = [("bare", lambda r=round_: bare(llm, texts, args, r)),
                     ("ours", lambda r=round_: through_us(sampler, texts, args, r))]  # fmt: skip
            found = {name: run() for name, run in (turns if round_ % 2 else turns[::-1])}
            # Rounding may make a draw longer or shorter: per token, as completions of one mean length.
            speed = {name: drawn / seconds for name, (seconds, drawn) in found.items()}
            mean = sum(drawn for _, drawn in found.values()) / 2 / count
            ratio = speed["ours"] / speed["bare"]
            told = f"{speed['bare'] / mean:.2f} | {speed['ours'] / mean:.2f} | {ratio:.3f} |"
            print(f"| {'warm-up' if round_ == 0 else round_} | {told}", flush=True)
            ratios += [ratio] if round_ else []
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    low, high = medians[50], medians[-51]
    print(f"\nmedian ratio {statistics.median(ratios):.3f} [{low:.3f}, {high:.3f}], {len(ratios)} rounds of "
          f"{count} completions, {os.cpu_count()} cores of which {args.threads} compute, {args.dtype}")  # fmt: skip


if __name__ == "__main__":
    main()

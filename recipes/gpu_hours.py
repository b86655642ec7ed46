"""What a run costs in GPU-hours, from rates that you have measured.

    python recipes/gpu_hours.py --tokens-per-second 2500 --train-tokens-per-second 8000

Sampling: tokens drawn per second on one GPU, as `benchmarks/engines.py MODEL` prints on it, or samples/s
of `selftaught status RUN` times the mean length. Training: tokens read per second on one GPU, from a row
of the run's `metrics.jsonl` (training tokens over seconds). Grading and storing are the driver's, on CPUs,
at the rows per second of `benchmarks/store.py`; they are given as hours beside those of the GPUs.
"""

import argparse

KEPT = 0.35
"""Share of samples that are right and distinct, where it is not given."""


def hours(args: argparse.Namespace) -> list[tuple[str, float, str]]:
    """Each stage, its hours, and what they are of."""
    samples = args.questions * args.samples
    trained = samples * args.kept * (args.prompt_tokens + args.tokens) * args.epochs
    return [
        ("sample", samples * args.tokens / args.tokens_per_second / 3600, "GPU-hours"),
        ("train", trained / args.train_tokens_per_second / 3600, "GPU-hours"),
        ("store", samples / args.stored_per_second / 3600, "hours of one CPU, while it samples"),
        ("grade", samples / args.graded_per_second / 3600, "hours of the driver"),
        ("disk", samples * args.bytes_per_sample / 1e9, "GB"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens-per-second", type=float, required=True, help="drawn, on one GPU")
    parser.add_argument(
        "--train-tokens-per-second", type=float, required=True, help="read, on one GPU"
    )
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=100, help="of each question")
    parser.add_argument("--tokens", type=float, default=250, help="of a completion, on the mean")
    parser.add_argument(
        "--prompt-tokens", type=float, default=100, help="in training, without worked examples"
    )
    parser.add_argument(
        "--kept", type=float, default=KEPT, help="share of samples that are learned from"
    )
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--stored-per-second", type=float, default=20_000)
    parser.add_argument("--graded-per-second", type=float, default=10_000)
    parser.add_argument("--bytes-per-sample", type=float, default=4_000)
    args = parser.parse_args()
    print(f"{args.questions:,} questions x {args.samples} samples of {args.tokens:g} tokens\n")
    print("| stage | cost | of |\n|---|---|---|")
    for stage, cost, unit in hours(args):
        print(f"| {stage} | {cost:,.1f} | {unit} |")


if __name__ == "__main__":
    main()

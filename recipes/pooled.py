"""Several seeds of one recipe as one table: every question of every seed counts once.

    python recipes/pooled.py RUN [RUN ...] [--over ROW]

RUN is the folder of a run of RFT, V-STaR or per-step DPO. Prints for each row of their `metrics.jsonl` the
greedy accuracy, and for each choice among candidates what `k` all of them give, with 95% intervals
over the questions, then the seeds apart; of per-step DPO's, also how many times the questions SFT would
need; with --over, also how far each row is from that one,
question by question. Seeds differ by more than that: bases, questions, sampling and
training are all anew.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selftaught.evaluation.candidates import share
from selftaught.metrics import difference_interval, efficiency
from selftaught.records import read_rollouts
from selftaught.runs.folder import read_rows


def main() -> None:
    """Print the tables of the runs that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--over", metavar="ROW", help="a row to compare the others with")
    options = parser.parse_args()
    runs = [{row["name"]: row for row in read_rows(run / "metrics.jsonl")} for run in options.runs]
    names = [name for name in runs[0] if all(name in run for run in runs)]
    for name in names:
        if "test" in runs[0][name]:
            seeds = [greedy(run[name]) for run in runs]
            print_row(name, seeds)
            needed(runs, name)
            if options.over and name != options.over:
                apart(name, [greedy(run[options.over]) for run in runs], seeds)
    for name in names:
        if "choices" in runs[0][name]:
            chosen(name.removeprefix("choices: "), [run[name]["choices"] for run in runs])


def greedy(row: Mapping[str, Any]) -> list[float]:
    """1 for each question answered rightly, 0 for the others."""
    graded = Path(row["model"]).parent / "test.graded.jsonl"
    return [float(bool(one.correct)) for one in read_rollouts(graded)]


def needed(runs: Sequence[Mapping[str, Any]], name: str) -> None:
    """How many times the questions SFT would need to be as good, where SFT has a curve over sizes."""
    row = runs[0][name]
    curve = [other for other in runs[0].values() if other.get("method") == "sft"]
    if row.get("method", "sft") == "sft" or len(curve) < 2:
        return

    def verdicts(of: str) -> list[bool]:
        return [right == 1.0 for run in runs for right in greedy(run[of])]

    points = sorted((other["size"], other["name"]) for other in curve)
    times = efficiency([(size, verdicts(of)) for size, of in points], row["size"], verdicts(name))
    print(f"{name}: SFT needs {times[0]:.1f}x [{times[1]:.1f}, {times[2]:.1f}] the questions")


def chosen(name: str, seeds: Sequence[Mapping[str, Mapping[str, list[float]]]]) -> None:
    """What each way of choosing gives, and how far the verifier is from the majority."""
    k = list(seeds[0]["best"])[-1]
    for way in ("sample", "majority", "best", "weighted", "pass"):
        print_row(f"{name}: {way} of {k}", [seed[way][k] for seed in seeds])
    apart(
        f"{name}: best",
        [seed["majority"][k] for seed in seeds],
        [seed["best"][k] for seed in seeds],
    )


def apart(name: str, before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> None:
    """How far one row is from another, question by question."""
    mean, low, high = difference_interval(*([one for seed in seeds for one in seed] for seeds in (before, after)))  # fmt: skip
    print(f"{name}: {100 * mean:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]")


def print_row(name: str, seeds: Sequence[Sequence[float]]) -> None:
    """Print the mean of all seeds, then each seed."""
    mean, low, high = share([one for seed in seeds for one in seed])
    each = ", ".join(f"{100 * sum(seed) / len(seed):.1f}" for seed in seeds)
    print(f"{name}: {100 * mean:.1f}% [{100 * low:.1f}, {100 * high:.1f}]  ({each})")


if __name__ == "__main__":
    main()

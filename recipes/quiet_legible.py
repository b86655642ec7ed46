"""What do readable thoughts cost? Quiet-STaR with several weights of the divergence from the base model.

    python recipes/quiet_legible.py --out runs/quiet_legible
    python recipes/quiet_legible.py --out runs/quiet_legible --table

The task, the base models ("idle") and the training are those of `recipes/quiet_reinforce.py`: sums of four
one-digit numbers modulo 5, 200 steps, REINFORCE at weight 10 with four thoughts per position. Only
`thought_kl_weight` differs. Measured on sums that no text contained, with eight sampled thoughts each:

- at "=", before the answer: the share of thoughts in which all four sums are right, the nats of the answer after
  a thought, and the nats per token of the thoughts under the base model;
- at every position: the nats per token of the thoughts under the base model, the share of repeated tokens, and
  the share of distinct thoughts at a position.

Every result is stored; the same command continues where it stopped.
"""

import argparse
import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from quiet_reinforce import (
    CONTINUED,
    MODULUS,
    SAMPLES,
    held_out,
    measure_thoughts,
    over_seeds,
    pretrained,
    question,
    quiet_config,
    random_terms,
    text,
    with_thoughts,
)
from quiet_scratchpad import Trusting

from selftaught.quiet.checkpoint import open_quiet
from selftaught.quiet.evaluation import measure
from selftaught.quiet.gating import ThinkWhen
from selftaught.quiet.legibility import Legibility
from selftaught.quiet.model import QuietLM
from selftaught.quiet.reference import Reference
from selftaught.quiet.spans import spans
from selftaught.quiet.training import quiet_arguments, train_quiet
from selftaught.records import write_atomically

KIND = "idle"
WEIGHTS = ("0", "0.1", "1", "10", "100")
METHODS = ("untrained", *(f"kl-{weight}" for weight in WEIGHTS))
"""What is measured. "untrained" is the base model, whose thoughts are trusted fully."""

Result = dict[str, float]
"""Means over the held-out sums of one seed."""


def legible(model: QuietLM, tokenizer: Any, before: Reference, when: ThinkWhen) -> Legibility:
    """Measure how readable the sampled thoughts on the held-out sums are."""
    texts = [question(terms) + str(sum(terms) % MODULUS) + "\n" for terms in held_out()]
    cut = [(at, tokenizer(one).input_ids) for at, one in enumerate(texts)]
    found = measure(
        model, cut, think_when=when, thoughts=SAMPLES, temperature=1.0, seed=2,
        batch_size=32, reference=before,
    ).legibility  # fmt: skip
    assert found is not None and found.base_nll is not None and found.distinct_thoughts is not None
    return found


def measured(model: QuietLM, tokenizer: Any, before: Reference) -> Result:
    """Return everything that is measured of a model."""
    rows = measure_thoughts(model, tokenizer)
    answer = legible(
        model, tokenizer, before, ThinkWhen("pattern", pattern="=", tokenizer=tokenizer)
    )
    everywhere = legible(model, tokenizer, before, ThinkWhen("always"))
    assert answer.base_nll and everywhere.base_nll and everywhere.distinct_thoughts
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} | {
        "base_nll_at_answer": answer.base_nll[0],
        "base_nll": everywhere.base_nll[0],
        "repeated": everywhere.repeated_tokens[0],
        "distinct": everywhere.distinct_thoughts[0],
    }


def run(method: str, base: Path, out: Path, seed: int) -> Result:
    """Train with one weight, and measure."""
    settings = quiet_config("weight-10")
    first, tokenizer = with_thoughts(base, seed, settings)
    before = Reference.other(first.eval())
    if method == "untrained":
        model, tokenizer = with_thoughts(base, seed, settings)
        model.mixing = Trusting()  # type: ignore[assignment]
        return measured(model, tokenizer, before)
    config = quiet_config("weight-10", thought_kl_weight=float(method.removeprefix("kl-")))
    model, tokenizer = with_thoughts(base, seed, config)
    draw, excluded = random.Random(1000 + seed), frozenset(held_out())
    count = CONTINUED["max_steps"] * CONTINUED["per_device_train_batch_size"]
    texts = [text(draw, random_terms(draw, excluded), "honest", direct=True) for _ in range(int(count))]  # fmt: skip
    arguments = quiet_arguments(out / "checkpoints", seed=seed, save_steps=1000, **CONTINUED)
    train_quiet(model, tokenizer, spans(texts, tokenizer, length=64, least=4, seed=seed), arguments, out=out)  # fmt: skip
    model, tokenizer = open_quiet(out / "model")
    return measured(model, tokenizer, before)


COLUMNS = {
    "sampled_right": "sampled thoughts right", "sampled_nats": "nats after a sampled thought",
    "nats_without": "without", "base_nll_at_answer": "thought before the answer under the base",
    "base_nll": "all thoughts under the base", "repeated": "repeated tokens",
    "distinct": "distinct at a position",
}  # fmt: skip
"""What the table shows, with its heads. Nats under the base are per token of a thought."""


def table(out: Path) -> str:
    """Return the means over seeds of every method, and the differences from weight 0."""
    stored = {
        method: {
            int(path.parent.name.split("-")[1]): json.loads(path.read_text())
            for path in sorted(out.glob(f"{KIND}-*/{method}.json"))
        }
        for method in METHODS
    }
    names = list(COLUMNS)
    lines = [f"| thought_kl_weight | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (len(names) + 2) + "|"]  # fmt: skip
    for method, by_seed in stored.items():
        if by_seed:
            cells = [over_seeds([one[name] for one in by_seed.values()]) for name in names]
            lines.append(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")
    lines += ["", f"| minus weight 0, same seed | seeds | {' | '.join(COLUMNS.values())} |", "|---" * (len(names) + 2) + "|"]  # fmt: skip
    control = stored["kl-0"]
    for method, by_seed in stored.items():
        shared = [seed for seed in by_seed if seed in control]
        if shared and method not in ("kl-0", "untrained"):
            cells = [over_seeds([by_seed[seed][name] - control[seed][name] for seed in shared]) for name in names]  # fmt: skip
            lines.append(f"| {method} | {len(shared)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the methods on every seed, or print the table of what is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quiet_legible"))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for seed in args.seeds if not args.table else ():
        folder = args.out / f"{KIND}-{seed}"
        base = pretrained(folder / "base", KIND, seed)
        for method in args.methods:
            path = folder / f"{method}.json"
            if not path.exists():
                found = run(method, base, folder / method, seed)
                write_atomically(path, json.dumps(found) + "\n")
                shutil.rmtree(folder / method, ignore_errors=True)
                print(seed, method, {name: round(value, 3) for name, value in found.items()}, flush=True)  # fmt: skip
    print(table(args.out))


if __name__ == "__main__":
    main()

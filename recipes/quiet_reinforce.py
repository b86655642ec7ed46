"""Does REINFORCE improve thoughts? Quiet-STaR at several weights, on sums of four one-digit numbers.

    python recipes/quiet_reinforce.py --out runs/quiet_reinforce
    python recipes/quiet_reinforce.py --out runs/quiet_reinforce --table

A character-level model is pretrained on sums modulo 5, such as `1302=`. Some texts give the answer
directly, in the others four characters in brackets come first: `1302=(1441)1` has the running sums. There are two
kinds of base models:

- "idle": half of the bracketed texts are dashes, 20% random digits and 30% the running sums. The model can
  compute the running sums but usually writes something else.
- "noisy": each addition is replaced by a random digit with probability 0.4, and later sums continue from that
  digit.

Then 200 steps of training on texts that all give the answer directly: by Quiet-STaR with thoughts of four
tokens, RLP, distillation, training without thoughts, and with pause tokens. Measured on sums that no text contained, with eight
*sampled* thoughts each: the share of thoughts in which all four sums are right, and the nats of the answer with
and without a thought. Every result is stored; the same command continues where it stopped.
"""

import argparse
import json
import math
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from quiet_scratchpad import Trusting, rows_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from selftaught.methods.pause import PAUSE, add_pause_token
from selftaught.models.embedded import character_tokenizer
from selftaught.quiet.checkpoint import make_quiet, open_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.distillation import distill
from selftaught.quiet.evaluation import score
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import padded, spans
from selftaught.quiet.thoughts import input_matrix, output_matrix
from selftaught.quiet.training import quiet_arguments, train_quiet
from selftaught.records import write_atomically
from selftaught.training import sft_config, train_rows

MODULUS, TERMS, SAMPLES = 5, 4, 8
Sum = tuple[int, ...]
KINDS = ("idle", "noisy")
WEIGHTS, THOUGHTS = ("0", "0.1", "1", "10", "30"), (2, 8)
METHODS = (
    "untrained", "continued", f"pause-{TERMS + 2}",
    *(f"weight-{weight}" for weight in WEIGHTS),
    *(f"weight-{weight}-thoughts-{count}" for count in THOUGHTS for weight in ("0", "10")),
    "weight-0-base-3", "weight-10-base-3", "weight-10-base-0",
    "distilled-kl", "distilled-reward", "rlp",
)  # fmt: skip
"""What is run, with `weight-0` before what is compared with it. "untrained" predicts with the thoughts of the
base model alone. "weight-10" has four thoughts per position, "weight-10-thoughts-2" two. The loss without thoughts
has a weight of 1 (`base_nll_weight`), in "weight-10-base-3" of 3. "distilled-kl" is a plain model that learned for
as many steps what "weight-10" predicts after a greedy thought (docs/methods/fast_quiet_star.md). "rlp" is the
preset of RLP with as many thoughts at as many positions."""
PRETRAINING = {"steps": 800, "batch": 64, "learning_rate": 3e-3, "warmup": 30}
CONTINUED = {"max_steps": 200, "per_device_train_batch_size": 16, "learning_rate": 3e-4, "warmup_steps": 10}  # fmt: skip


def sums_so_far(terms: Sum) -> str:
    """Return what a thought should contain: `1441` for 1, 3, 0 and 2."""
    return "".join(str(sum(terms[: at + 1]) % MODULUS) for at in range(len(terms)))


def question(terms: Sum) -> str:
    """Return `1302=`, after a line end, so that the first digit has something before it."""
    return "\n" + "".join(map(str, terms)) + "="


def aside(draw: random.Random, terms: Sum, kind: str) -> str:
    """Return the text in brackets of a base model of a kind; "honest" is always right."""
    if kind == "noisy":
        total, made = terms[0], str(terms[0])
        for term in terms[1:]:
            total = (total + term) % MODULUS if draw.random() < 0.6 else draw.randrange(MODULUS)
            made += str(total)
        return made
    style = draw.random() if kind == "idle" else 1.0
    if style < 0.5:
        return "-" * TERMS
    if style < 0.7:
        return "".join(str(draw.randrange(MODULUS)) for _ in range(TERMS))
    return sums_so_far(terms)


def text(draw: random.Random, terms: Sum, kind: str, *, direct: bool) -> str:
    """Return a text, which gives the answer directly or after an aside."""
    middle = "" if direct else f"({aside(draw, terms, kind)})"
    return question(terms) + middle + str(sum(terms) % MODULUS) + "\n"


def all_sums() -> list[Sum]:
    """Return the 625 sums, in order."""
    return [
        tuple(number // MODULUS**at % MODULUS for at in reversed(range(TERMS)))
        for number in range(MODULUS**TERMS)
    ]


def held_out() -> list[Sum]:
    """Return the sums that no text contains, about a fifth of all; the same for every seed."""
    return [terms for terms in all_sums() if random.Random(str(terms)).random() < 0.2]


def random_terms(draw: random.Random, excluded: frozenset[Sum]) -> Sum:
    """Return the terms of a random sum that may be learned."""
    while (terms := tuple(draw.randrange(MODULUS) for _ in range(TERMS))) in excluded:
        pass
    return terms


def pretrained(folder: Path, kind: str, seed: int) -> Path:
    """Train the base model of a kind: first on right asides, then on those of the kind."""
    if (folder / "config.json").exists():
        return folder
    tokenizer: Any = character_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128,
            rope_parameters={"rope_type": "default", "rope_theta": 200.0}, initializer_range=0.06,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0.0)
    draw, excluded, how = random.Random(seed), frozenset(held_out()), PRETRAINING
    for step in range(1, how["steps"] + 1):
        rate = how["learning_rate"] * min(step / how["warmup"], (150 / step) ** 0.5, 1)
        optimizer.param_groups[0]["lr"] = rate
        style = kind if step > 0.7 * how["steps"] else "honest"
        texts = [
            text(draw, random_terms(draw, excluded), style, direct=draw.random() < 0.3)
            for _ in range(how["batch"])
        ]
        ids, mask = padded([tokenizer(one).input_ids for one in texts], tokenizer.pad_token_id)
        labels = ids.masked_fill(mask == 0, -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


@torch.no_grad()
def measure_thoughts(model: QuietLM, tokenizer: Any) -> list[dict[str, float]]:
    """Measure every held-out sum with a thought after "=": greedy, and the mean over sampled ones."""
    tests = held_out()
    texts = [question(terms) + str(sum(terms) % MODULUS) + "\n" for terms in tests]
    ids_BT = torch.tensor([tokenizer(one).input_ids for one in texts])
    at = ids_BT.shape[1] - 3  # the position of "=", from which the answer is predicted
    right_BS = torch.tensor([tokenizer(sums_so_far(terms)).input_ids for terms in tests])
    rows: list[dict[str, float]] = [{} for _ in tests]
    sampled: dict[str, Any] = {"thoughts": SAMPLES, "temperature": 1.0, "seed": 1}
    for name, how in (("sampled", sampled), ("greedy", {})):
        scored = score(model.eval(), ids_BT, **how)
        whole_BN = (scored.thought_BNTS[:, :, at] == right_BS[:, None]).all(-1).float()
        for row, whole_N, log_prob_N, weight_N, without in zip(
            rows, whole_BN, scored.each_BNT[:, :, at], scored.weight_BNT[:, :, at],
            scored.without_BT[:, at], strict=True,
        ):  # fmt: skip
            row |= {
                f"{name}_right": whole_N.mean().item(),
                f"{name}_nats": -log_prob_N.mean().item(),
                f"{name}_weight": weight_N.mean().item(),
                "nats_without": -without.item(),
            }
    return rows


@torch.no_grad()
def measure_plain(model: Any, tokenizer: Any, after: str) -> list[dict[str, float]]:
    """Measure every held-out sum without thoughts: the nats of the answer after "=" and `after`."""
    tests = held_out()
    ids = torch.tensor([tokenizer(question(terms) + after).input_ids for terms in tests])
    log_prob_BV = model.eval()(ids).logits[:, -1].log_softmax(-1)
    answers = [tokenizer(str(sum(terms) % MODULUS)).input_ids[0] for terms in tests]
    return [{"nats_without": -row[answer].item()} for row, answer in zip(log_prob_BV, answers, strict=True)]  # fmt: skip


def quiet_config(method: str, **more: Any) -> QuietConfig:
    """Return the options of a method such as `weight-10`, `weight-10-base-3` or `rlp`.

    Args:
        method: name of the method.
        more: further options; not for `rlp`.
    """
    if method == "rlp":
        return QuietConfig.rlp(
            thought_tokens=TERMS,
            thought_may_end=False,
            thoughts=4,
            positions="all",
            initial_text="(",
        )
    parts = method.split("-")
    given = {name: float(value) for name, value in zip(parts[::2], parts[1::2], strict=True)}
    return QuietConfig(
        thought_tokens=TERMS, thoughts=int(given.get("thoughts", 4)), lookahead=2, initial_text="(",
        reinforce_weight=given["weight"], base_nll_weight=given.get("base", 1.0), **more,
    )  # fmt: skip


def with_thoughts(base: Path, seed: int, config: QuietConfig) -> tuple[QuietLM, Any]:
    """Return a Quiet-STaR model whose thoughts start and end as the asides of the base model do."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = make_quiet(AutoModelForCausalLM.from_pretrained(base), tokenizer, config)
    with torch.no_grad():  # an aside ends with another character than it starts with
        for matrix in (input_matrix(model.base), output_matrix(model.base)):
            matrix.weight[model.marks.end] = matrix.weight[tokenizer(")").input_ids[0]]
    return model, tokenizer


def run(method: str, base: Path, out: Path, seed: int) -> list[dict[str, float]]:
    """Train by one method, and return what is measured for each held-out sum."""
    draw, excluded = random.Random(1000 + seed), frozenset(held_out())
    count = CONTINUED["max_steps"] * CONTINUED["per_device_train_batch_size"]
    texts = [
        text(draw, random_terms(draw, excluded), "honest", direct=True) for _ in range(int(count))
    ]
    if method == "untrained":
        model, tokenizer = with_thoughts(base, seed, quiet_config("weight-0"))
        model.mixing = Trusting()  # type: ignore[assignment]
        return measure_thoughts(model, tokenizer)
    if method.startswith(("weight", "distilled", "rlp")):
        taught = "weight-10" if method.startswith("distilled") else method
        model, tokenizer = with_thoughts(base, seed, quiet_config(taught))
        arguments = quiet_arguments(out / "checkpoints", seed=seed, save_steps=1000, **CONTINUED)
        learned = spans(texts, tokenizer, length=64, least=4, seed=seed)
        train_quiet(model, tokenizer, learned, arguments, out=out)
        model, tokenizer = open_quiet(out / "model")
        if method == taught:
            return measure_thoughts(model, tokenizer)
        loss = "kl" if method == "distilled-kl" else "reward"
        arguments = quiet_arguments(out / "student" / "checkpoints", seed=seed, save_steps=1000, **CONTINUED)  # fmt: skip
        distill(model, tokenizer, learned, arguments, out=out / "student", loss=loss)
        plain = AutoModelForCausalLM.from_pretrained(out / "student" / "model")
        return measure_plain(plain, tokenizer, "")
    pauses = int(method.partition("-")[2] or 0)
    start = add_pause_token(str(base), out / "start")
    options = {"weight_decay": 0.001, "seed": seed, "save_steps": 1000} | CONTINUED
    train_rows(start, lambda tokenizer: (rows_of(texts, tokenizer, pauses), 0), [texts, pauses],
               sft_config(out / "checkpoints", **options), out=out / "model")  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(out / "model")
    return measure_plain(plain, AutoTokenizer.from_pretrained(out / "model"), PAUSE * pauses)


T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""0.975 quantile of Student's t distribution by the number of seeds."""


def over_seeds(values: Sequence[float]) -> str:
    """Return the mean over seeds with its 95% interval (Student's t)."""
    mean = sum(values) / len(values)
    if len(values) not in T_95:
        return f"{mean:.3f}"
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    error = T_95[len(values)] * math.sqrt(variance / len(values))
    return f"{mean:.3f} [{mean - error:.3f}, {mean + error:.3f}]"


def over_sums(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean over the held-out sums of one seed and the ends of its 95% interval."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    error = 1.96 * math.sqrt(variance / len(values))
    return mean, mean - error, mean + error


Results = dict[str, dict[int, list[dict[str, float]]]]
"""Measured values: method, seed, held-out sum."""


def stored(out: Path, kind: str) -> Results:
    """Return all stored results of the base models of a kind."""
    found: Results = {}
    for method in METHODS:
        paths = {int(path.parent.name.split("-")[1]): path for path in out.glob(f"{kind}-*/{method}.json")}  # fmt: skip
        if paths:
            found[method] = {seed: json.loads(path.read_text()) for seed, path in sorted(paths.items())}  # fmt: skip
    return found


def table(out: Path, kind: str) -> str:
    """Return the means over seeds of every method, and the gains of each seed."""
    results = stored(out, kind)
    names = ("sampled_right", "sampled_nats", "greedy_nats", "nats_without", "sampled_weight")
    lines = [
        f"| {kind} | seeds | sampled thoughts right | nats after a sampled thought | after a greedy one | without | weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, by_seed in results.items():
        cells = [
            over_seeds([sum(row[name] for row in rows) / len(rows) for rows in by_seed.values()])
            if all(name in row for rows in by_seed.values() for row in rows) else ""
            for name in names
        ]  # fmt: skip
        lines.append(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")
    lines += ["", "| against the same with weight 0 | seed | sampled thoughts right | nats after a sampled thought | nats without |", "|---|---|---|---|---|"]  # fmt: skip
    for method, by_seed in results.items():
        if method.startswith("weight") and (control := results.get(unreinforced(method))):
            lines += gains(method, by_seed, control)
    return "\n".join(lines)


def unreinforced(method: str) -> str:
    """Return the method with REINFORCE disabled."""
    parts = method.split("-")
    return "-".join([parts[0], "0", *parts[2:]]) if parts[1] != "0" else ""


def gains(
    method: str,
    by_seed: dict[int, list[dict[str, float]]],
    control: dict[int, list[dict[str, float]]],
) -> list[str]:
    """Return one row per seed: differences from the control, with intervals over sums."""
    lines = []
    for seed, rows in by_seed.items():
        cells = []
        for name in ("sampled_right", "sampled_nats", "nats_without"):
            pairs = zip(rows, control.get(seed, []), strict=False)
            if differences := [new[name] - old[name] for new, old in pairs]:
                mean, low, high = over_sums(differences)
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {method} | {seed} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Run the methods on every seed and kind of base model, or print the tables of what is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quiet_reinforce"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=range(5))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for kind in args.kinds if not args.table else ():
        for seed in args.seeds:
            folder = args.out / f"{kind}-{seed}"
            base = pretrained(folder / "base", kind, seed)
            for method in args.methods:
                path = folder / f"{method}.json"
                if not path.exists():
                    rows = run(method, base, folder / method, seed)
                    write_atomically(path, json.dumps(rows) + "\n")
                    shutil.rmtree(folder / method, ignore_errors=True)
                    means = {name: round(sum(row[name] for row in rows) / len(rows), 3) for name in rows[0]}  # fmt: skip
                    print(kind, seed, method, means, flush=True)
    for kind in args.kinds:
        print(table(args.out, kind), end="\n\n")


if __name__ == "__main__":
    main()

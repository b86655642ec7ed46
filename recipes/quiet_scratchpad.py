"""Do thoughts help where a text jumps to the answer? Quiet-STaR beside pause tokens and plain training.

    python recipes/quiet_scratchpad.py --seed 0 --out runs/quiet_scratchpad
    python recipes/quiet_scratchpad.py --table --out runs/quiet_scratchpad

A character-level model is pre-trained on sums modulo 5, such as `a3b4c1=`. Half of the texts jump to
the answer (`3`); in the others an aside in brackets works it out first (`(b4>2c1>3---)3`: add b's
4, that makes 2; add c's 1, that makes 3), sometimes not to its end. Then training goes on, on texts
that all jump, for the same number of steps: as before; with pause tokens before what follows
"="; with thoughts of several lengths, whose start and end begin as the brackets, as the paper's begin
as "---". Measured on held-out sums: nats of the answer, and whether it is the likeliest digit; and what thoughts
gain at every other place of the same texts. Every part is stored; the same command goes on where it stopped.
"""

import argparse
import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selftaught.methods.pause import PAUSE, add_pause_token, append_pauses
from selftaught.models.embedded import character_tokenizer
from selftaught.quiet.checkpoint import make_quiet, open_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import padded, spans
from selftaught.quiet.thoughts import input_matrix, output_matrix
from selftaught.quiet.training import quiet_arguments, train_quiet
from selftaught.records import write_atomically
from selftaught.training import sft_config, train_rows

MODULUS, TERMS, TESTED = 5, (2, 3, 4, 5, 6), (3, 4, 5, 6)
PRETRAINING = {"most": 1200, "batch": 64, "learning_rate": 3e-3, "warmup": 30, "decay": 100}
"""Until nine greedy asides of ten are right, and then some steps at a falling rate."""
CONTINUED = {
    "max_steps": 100,
    "per_device_train_batch_size": 16,
    "learning_rate": 2e-4,
    "warmup_steps": 10,
}
THOUGHTS = {"thoughts": 2, "lookahead": 2, "initial_text": "("}
KINDS: dict[str, Callable[[int], QuietConfig]] = {
    "quiet": lambda size: QuietConfig(thought_tokens=size, **THOUGHTS),
    "paper": lambda size: QuietConfig.paper(thought_tokens=size, **THOUGHTS),
    "authors": lambda size: QuietConfig.authors_code(thought_tokens=size, **THOUGHTS),
    "uniform25": lambda size: QuietConfig(thought_tokens=size, positions="uniform", **THOUGHTS),
    "entropy25": lambda size: QuietConfig(thought_tokens=size, positions="entropy", **THOUGHTS),
    "free": lambda size: QuietConfig(thought_tokens=size, mixing_range="free", **THOUGHTS),
    "unreinforced": lambda size: QuietConfig(thought_tokens=size, reinforce_weight=0, **THOUGHTS),
    "gate": lambda size: QuietConfig(thought_tokens=size, gate_weight=1.0, **THOUGHTS),
}
"""What "quiet-16" and the like stand for, by the thought's length."""
LENGTHS = (0, 4, 8, 16, 24)
METHODS = ["base", "untrained-16", "continued", "pause-26", *(f"quiet-{n}" for n in LENGTHS)]
"""What is run. "untrained-16" trusts the base's own thoughts wholly."""
TEXTS, TESTS_PER_LENGTH = 4_000, 100


def is_held_out(terms: Sequence[int]) -> bool:
    """A fifth of all sums of three terms and more, by their digits; no text for training asks for them.

    Those of two are the table of additions itself: all of them are learned. The first terms of a longer
    sum may be a held-out one, whose total its aside then passes through.
    """
    return len(terms) > 2 and hashlib.sha256(bytes(terms)).digest()[0] % 5 == 0


def question(terms: Sequence[int]) -> str:
    """`a3b4c1=`, after a line end as a first token, so that the first letter has something before it."""
    return (
        "\n" + "".join(f"{name}{term}" for name, term in zip("abcdef", terms, strict=False)) + "="
    )


def text(draw: random.Random, terms: Sequence[int], *, jump: bool) -> str:
    """A whole text; three asides of ten may stop before their end."""
    answer = str(sum(terms) % MODULUS)
    if jump:
        return question(terms) + answer + "\n"
    aside = [
        f"{name}{term}>{sum(terms[: at + 1]) % MODULUS}"
        for at, (name, term) in enumerate(zip("abcdef", terms, strict=False))
    ][1:]
    if draw.random() < 0.3:
        aside = aside[: draw.randint(0, len(aside))]
    return question(terms) + "(" + "".join(aside) + "-" * draw.randint(0, 16) + ")" + answer + "\n"


def terms(draw: random.Random, *, held_out: bool) -> list[int]:
    """The terms of a random sum."""
    while True:
        found = [draw.randrange(MODULUS) for _ in range(draw.choice(TERMS))]
        if is_held_out(found) == held_out:
            return found


def corpus(seed: int, *, jumps: float) -> Iterator[str]:
    """Texts for training, without end; a share of them jumps to the answer."""
    draw = random.Random(seed)
    while True:
        yield text(draw, terms(draw, held_out=False), jump=draw.random() < jumps)


def tests() -> list[list[int]]:
    """Held-out sums, the same for every seed: up to 100 of each number of terms."""
    draw, found = random.Random("tests"), {count: {} for count in TESTED}
    for _ in range(200_000):
        one = terms(draw, held_out=True)
        if len(found[len(one)]) < TESTS_PER_LENGTH:
            found[len(one)][tuple(one)] = None
    return [list(one) for count in TESTED for one in found[count]]


def pretrained(folder: Path, seed: int) -> Path:
    """The base model."""
    if (folder / "config.json").exists():
        return folder
    tokenizer: Any = character_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=160, intermediate_size=432, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=512,
            rope_parameters={"rope_type": "default", "rope_theta": 200.0}, initializer_range=0.06,
            tie_word_embeddings=False, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights", flush=True)
    texts, how = corpus(seed, jumps=0.5), PRETRAINING
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    step, end = 0, how["most"]
    while step < end:
        step += 1
        rate = how["learning_rate"] * min(step / how["warmup"], (150 / step) ** 0.5, 1)
        optimizer.param_groups[0]["lr"] = rate * min(1, (end - step + 1) / how["decay"])
        batch = [tokenizer(next(texts)).input_ids for _ in range(how["batch"])]
        ids, mask = padded(batch, tokenizer.pad_token_id)
        loss = model(
            input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            right = aside_accuracy(model.eval(), tokenizer)
            model.train()
            print(f"step {step} loss {loss.item():.3f} asides {right:.2f}", flush=True)
            if right >= 0.9:
                end = min(end, step + how["decay"])
    partial = folder.with_suffix(".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


@torch.no_grad()
def aside_accuracy(model: Any, tokenizer: Any) -> float:
    """How often the model's own greedy aside ends in the right answer, begun by the first step's name."""
    right = []
    for one in tests()[::10]:
        ids = tokenizer(question(one) + "(b", return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=40, do_sample=False)
        said = tokenizer.decode(made[0, ids.shape[1] :]).split("\n")[0]
        right.append(said[-1:] == str(sum(one) % MODULUS))
    return sum(right) / len(right)


@torch.no_grad()
def measure_plain(model: Any, tokenizer: Any, after: str) -> list[dict]:
    """Every held-out sum: nats of the answer after the question and `after`, and is it the likeliest digit."""
    rows = []
    digits = tokenizer("01234").input_ids
    for one in tests():
        rows.append((one, tokenizer(question(one) + after).input_ids))
    found = []
    for count in TESTED:
        group = [(one, ids) for one, ids in rows if len(one) == count]
        logits = model(torch.tensor([ids for _, ids in group])).logits[:, -1].log_softmax(-1)
        for (one, _), row in zip(group, logits, strict=True):
            found.append(judged(one, row[digits], float(row[digits][sum(one) % MODULUS])))
    return found


def judged(one: Sequence[int], digits: torch.Tensor, answer: float, weight: float = 0.0) -> dict:
    """What is kept of one measured sum."""
    right = int(digits.argmax()) == sum(one) % MODULUS
    return {"terms": len(one), "nll": -answer, "right": right, "weight": weight}


def measure_quiet(model: QuietLM, tokenizer: Any) -> dict[str, list[dict]]:
    """Every held-out sum with a thought at "=", by the same model without, and each place of the text."""
    digits = tokenizer("01234").input_ids
    with_thought, places = [], []
    for count in TESTED:
        group = [one for one in tests() if len(one) == count]
        texts = [question(one) + str(sum(one) % MODULUS) + "\n" for one in group]
        ids = torch.tensor([tokenizer(one).input_ids for one in texts])
        scored = score(model.eval(), ids, top=len(tokenizer))
        assert scored.top_with is not None and scored.top_without is not None
        number, chance = scored.top_with[:, :, -2]
        entropy = torch.special.entr(scored.top_without[1]).sum(-1)
        gain = scored.with_BT - scored.without_BT
        for row, one in enumerate(group):
            by_id = dict(zip(number[row].long().tolist(), chance[row].tolist(), strict=True))
            of_digits = torch.tensor([by_id[digit] for digit in digits])
            answer, weight = scored.with_BT[row, -2].item(), scored.weight_BNT[row, 0, -2].item()
            with_thought.append(judged(one, of_digits, answer, weight))
            for at, following in enumerate(texts[row][1:]):
                places.append(
                    {
                        "next": place(texts[row], at + 1, following),
                        "entropy": round(entropy[row, at].item(), 4),
                        "gain": round(gain[row, at].item(), 4),
                    }
                )
    without = measure_plain(model.base, tokenizer, "")
    return {"with": with_thought, "without": without, "places": places}


class Trusting(torch.nn.Module):
    """In the place of the mixing head: the thought alone counts."""

    def forward(self, without_D: torch.Tensor, with_D: torch.Tensor) -> torch.Tensor:
        """The weight of the thought: 1."""
        del with_D
        return torch.ones_like(without_D[..., 0])


def place(whole: str, at: int, token: str) -> str:
    """What kind of token stands at a place of a text."""
    if token.isdigit():
        return "answer" if whole[at - 1] == "=" else "term"
    return {"=": "equals sign", "\n": "line end"}.get(token, "name")


def rows_of(texts: Sequence[str], tokenizer: Any, pauses: int) -> list[dict[str, list[int]]]:
    """Texts for plain training; with pauses after "=", where there is no loss."""
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    rows = []
    for one in texts:
        prefix, _, target = one.partition("=")
        ids, labels = append_pauses(
            tokenizer(prefix + "=").input_ids, tokenizer(target).input_ids, pause, pauses
        )
        before = len(tokenizer(prefix + "=").input_ids)
        rows.append({"input_ids": ids, "labels": ids[:before] + labels[before:]})
    return rows


def run(method: str, base: Path, out: Path, seed: int) -> dict[str, list[dict]]:
    """Train by one method and measure: "base", "continued", "pause-24", "quiet-24"."""
    kind, _, size = method.partition("-")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = list(islice(corpus(1000 + seed, jumps=1.0), TEXTS))
    if kind == "base":
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(base),
            AutoTokenizer.from_pretrained(base),
        )
        return {"with": measure_plain(model, tokenizer, "")}
    if kind in (*KINDS, "untrained"):
        torch.manual_seed(seed)
        tokenizer = AutoTokenizer.from_pretrained(base)
        config = KINDS["quiet" if kind == "untrained" else kind](int(size))
        model = make_quiet(AutoModelForCausalLM.from_pretrained(base), tokenizer, config)
        with torch.no_grad():  # an aside ends with another sign than it begins with
            for matrix in (input_matrix(model.base), output_matrix(model.base)):
                matrix.weight[model.marks.end] = matrix.weight[tokenizer(")").input_ids[0]]
        if kind == "untrained":
            model.mixing = Trusting()  # type: ignore[assignment]
            return measure_quiet(model, tokenizer)
        arguments = quiet_arguments(out / "checkpoints", seed=seed, save_steps=25, **CONTINUED)
        learned = spans(texts, tokenizer, length=64, least=4, seed=seed)
        train_quiet(model, tokenizer, learned, arguments, out=out)
        return measure_quiet(*open_quiet(out / "model"))
    pauses = int(size or 0)
    start = add_pause_token(str(base), out / "start")
    options = {"weight_decay": 0.001, "seed": seed, "save_steps": 1000} | CONTINUED
    train_rows(start, lambda tokenizer: (rows_of(texts, tokenizer, pauses), 0), [texts, pauses],
               sft_config(out / "checkpoints", **options), out=out / "model")  # fmt: skip
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out / "model"),
        AutoTokenizer.from_pretrained(out / "model"),
    )
    return {"with": measure_plain(model.eval(), tokenizer, PAUSE * pauses)}


def table(out: Path) -> str:
    """Means over seeds and held-out sums, with 95% intervals over sums, and each seed's own mean."""
    lines = [
        "| method | nats of the answer [95%] | fewer than continued [95%] | right [95%] | weight | each seed |",
        "|---|---|---|---|---|---|",
    ]
    continued = stored(out, "continued", "with")
    for method, name in measured_methods(out):
        by_seed = stored(out, method, name)
        rows = list(by_seed.values())
        nll, right = (interval([[row[key] for row in one] for one in rows]) for key in ("nll", "right"))  # fmt: skip
        pairs = [zip(continued[seed], by_seed[seed], strict=True) for seed in by_seed if seed in continued]  # fmt: skip
        fewer = interval([[old["nll"] - new["nll"] for old, new in one] for one in pairs])
        weight = sum(row["weight"] for one in rows for row in one) / sum(map(len, rows))
        each = ", ".join(f"{sum(row['nll'] for row in one) / len(one):.2f}" for one in rows)
        label = method if name == "with" else f"{method}, not thinking"
        lines.append(
            f"| {label} | {nll[0]:.3f} [{nll[1]:.3f}, {nll[2]:.3f}] | {fewer[0]:.3f} [{fewer[1]:.3f}, {fewer[2]:.3f}] "
            f"| {right[0]:.1%} [{right[1]:.1%}, {right[2]:.1%}] | {weight:.2f} | {each} |"
        )
    places = [by_place(out, "quiet-16")] if ("quiet-16", "with") in measured_methods(out) else []
    return "\n".join([*lines, "", by_terms(out), "", *places])


def by_terms(out: Path) -> str:
    """Nats of the answer by the number of terms."""
    counts = [sum(len(one) == count for one in tests()) for count in TESTED]
    heads = [f"{count} terms (n={n})" for count, n in zip(TESTED, counts, strict=True)]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(TESTED) + 1) + "|"]
    for method, name in measured_methods(out):
        if name == "with":
            seeds = stored(out, method, name).values()
            cells = [
                interval([[row["nll"] for row in one if row["terms"] == count] for one in seeds])
                for count in TESTED
            ]
            shown = [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in cells]
            lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def by_place(out: Path, method: str) -> str:
    """What thoughts gain by what comes next, and how much thinking they need for it."""
    places = [one for rows in stored(out, method, "places").values() for one in rows]
    lines = [f"| next token | tokens | gain of a thought ({method}) |", "|---|---|---|"]
    for kind in ("answer", "term", "name", "equals sign", "line end"):
        gains = [one["gain"] for one in places if one["next"] == kind]
        lines.append(f"| {kind} | {len(gains)} | {sum(gains) / len(gains):.3f} |")
    total = sum(one["gain"] for one in places)
    surest_last = sorted(places, key=lambda one: -one["entropy"])
    lines += ["", "| share that thinks, by entropy | share of the whole gain |", "|---|---|"]
    for share in (0.1, 0.25, 0.5, 0.75):
        gain = sum(one["gain"] for one in surest_last[: round(share * len(places))])
        lines.append(f"| {share:.0%} | {gain / total if total > 0 else math.nan:.0%} |")
    return "\n".join(lines)


def measured_methods(out: Path) -> list[tuple[str, str]]:
    """Return what was measured: methods, each with and, for models that think, without thoughts."""
    names = {path.stem for path in out.glob("seed-*/*.json")}
    order = METHODS
    methods = [one for one in order if one in names] + sorted(names - set(order))
    return [
        (one, name)
        for one in methods
        for name in json.loads(next(out.glob(f"seed-*/{one}.json")).read_text())
        if name != "places"
    ]


def stored(out: Path, method: str, name: str) -> dict[str, list[dict]]:
    """The rows of every seed."""
    return {
        path.parent.name: json.loads(path.read_text())[name]
        for path in sorted(out.glob(f"seed-*/{method}.json"))
    }


def interval(by_seed: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean and 95%: a held-out sum, the same for every seed, is one draw."""
    means = [sum(column) / len(column) for column in zip(*by_seed, strict=True)]
    mean = sum(means) / len(means)
    error = math.sqrt(sum((one - mean) ** 2 for one in means) / (len(means) - 1) / len(means))
    return mean, mean - 1.96 * error, mean + 1.96 * error


def figure(out: Path) -> Path:
    """Nats of the answer by the length of thoughts, beside the two baselines."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = drawn.add_subplot()
    lengths = [length for length in LENGTHS if (f"quiet-{length}", "with") in measured_methods(out)]
    points = [
        interval(
            [
                [row["nll"] for row in rows]
                for rows in stored(out, f"quiet-{length}", "with").values()
            ]
        )
        for length in lengths
    ]
    axes.errorbar(lengths, [one[0] for one in points], [[one[0] - one[1] for one in points], [one[2] - one[0] for one in points]],
                  marker="o", capsize=3, label="Quiet-STaR")  # fmt: skip
    for method, style in (("continued", "--"), ("pause-26", ":")):
        if (method, "with") in measured_methods(out):
            mean = interval(
                [[row["nll"] for row in rows] for rows in stored(out, method, "with").values()]
            )
            axes.axhline(
                mean[0],
                linestyle=style,
                color="gray",
                label="26 pause tokens" if "pause" in method else "no thoughts",
            )
            axes.axhspan(mean[1], mean[2], color="gray", alpha=0.15, linewidth=0)
    axes.set_xlabel("thought tokens")
    axes.set_ylabel("nats of the answer")
    axes.set_ylim(bottom=0)
    axes.legend()
    path = out / "quiet_scratchpad.svg"
    drawn.savefig(path, metadata={"Date": None})
    return path


def main() -> None:
    """Run one seed, or draw the table of all that are done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quiet_scratchpad"))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=METHODS,
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only the table and the figure")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        print(figure(args.out))
        return
    torch.set_num_threads(args.threads)
    folder = args.out / f"seed-{args.seed}"
    base = pretrained(folder / "base", args.seed)
    for method in args.methods:
        path = folder / f"{method}.json"
        if not path.exists():
            found = run(method, base, folder / method, args.seed)
            write_atomically(path, json.dumps(found) + "\n")
        found = json.loads(path.read_text(encoding="utf-8"))
        for name, rows in found.items():
            if name == "places":
                continue
            mean = {
                key: sum(row[key] for row in rows) / len(rows) for key in ("nll", "right", "weight")
            }
            print(
                f"{method:10} {name:8} {mean['nll']:.3f} nats  {mean['right']:.1%} right  weight {mean['weight']:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

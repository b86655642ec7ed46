"""Does a real language model learn to think in hidden thoughts? SmolLM2-135M on sums of two or three numbers.

    bash recipes/star_smollm2_chain_sum.sh runs/smollm2 runs/star
    python recipes/quiet_smollm2.py --model runs/star/model --out runs/quiet_smollm2
    python recipes/quiet_smollm2.py --out runs/quiet_smollm2 --table

The model that STaR trained writes a solution before its answer: `Q: ... 37 + 76 - 65 =\\nA: 37 + 76 = 113. 113 - 65
= 48. The answer is 48.` Here it learns from texts without solutions, `Q: ... 37 + 76 - 65 =\\nA: 48.`, by Quiet-STaR
with one thought per text, between "A:" and the answer; by training without thoughts; and with pause tokens. All
have the same texts and number of steps. Without thoughts the loss is that of the answer alone; in Quiet-STaR the loss
without thoughts is that of the whole text. A thought starts as a solution starts (the embedding of the space before a
number) and ends as "is" before an answer. The end token is a little more probable than "is", because with equal
embeddings a greedy thought would write "is" and never end.

Measured on 300 test problems that no training used. An answer is right if every token of it and the full stop is the
most probable one, which is what greedy decoding writes after one thought. Every result is stored, and a training
resumes from its last checkpoint; the same command continues.
"""

import argparse
import json
import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from quiet_reinforce import over_seeds
from quiet_scratchpad import Trusting
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.methods.pause import PAUSE, add_pause_token, append_pauses
from selftaught.quiet.attention import thoughtful
from selftaught.quiet.checkpoint import make_quiet, open_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.positions import given_positions
from selftaught.quiet.spans import spans
from selftaught.quiet.thoughts import input_matrix, output_matrix, read, talk
from selftaught.quiet.training import quiet_arguments, train_quiet
from selftaught.records import Problem, write_atomically
from selftaught.tasks import open_task
from selftaught.training import sft_config, train_rows

TASK: dict[str, Any] = {
    "name": "chain_sum", "train": 3000, "validation": 150, "test": 300,
    "config": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
}  # fmt: skip
"""The task of `star_smollm2_chain_sum.yaml`."""
LEFT_OUT = 1000
"""Training problems without a text here. STaR draws from all of them, so it has solved some of the others."""
LOOKAHEAD = 6
"""Tokens predicted after a thought: a space, a sign, three digits and the full stop."""
SAMPLES, BATCH = 4, 8
LENGTHS = (8, 16, 24)
END_SCALE = 1.02
"""The embedding of the end token is that of " is", times this number."""
METHODS = (
    *(f"untrained-{length}" for length in LENGTHS), "untrained-ending-30",
    "continued", "pause-26", "ending-30-weight-10", "ending-30-weight-0",
    *(f"{kind}-{length}-weight-{weight}" for kind in ("trusted", "quiet") for length in reversed(LENGTHS) for weight in (10, 0)),
)  # fmt: skip
"""What is run. "untrained-24" predicts with thoughts of 24 tokens of the model that STaR trained, "continued" trains
without thoughts. "quiet-24-weight-10" is Quiet-STaR with thoughts of 24 tokens and that weight of the REINFORCE loss,
and "trusted-24-weight-10" the same without a mixing head: the answer is predicted after the thought alone, and nothing
learns to answer without a thought. "ending-30-weight-10" is "trusted" with thoughts of up to 30 tokens that may end
themselves."""

Row = dict[str, Any]
"""What is measured for one test problem."""


@cache
def problems(split: str) -> list[Problem]:
    """Return the problems of a split, in training without the first ones."""
    found = list(open_task("gym", **TASK).problems(split))
    return found[LEFT_OUT:] if split == "train" else found


def prompt(problem: Problem) -> str:
    """Return the question as STaR asks it."""
    return f"Q: {problem.question}\nA:"


def text(problem: Problem) -> str:
    """Return a text that gives the answer without a solution."""
    return f"{prompt(problem)} {problem.gold}.\n\n"


def quiet_config(
    length: int, weight: float, *, trusted: bool = False, may_end: bool = False
) -> QuietConfig:
    """Return the options of Quiet-STaR for thoughts of a length, one per text."""
    more: dict[str, Any] = {"mix": "none", "base_nll_weight": 0.0} if trusted else {}
    more |= {"thought_may_end": True} if may_end else {}
    return QuietConfig(
        thought_tokens=length, thoughts=4, lookahead=LOOKAHEAD, initial_text=" ", reinforce_weight=weight,
        positions="pattern", positions_pattern="\nA:", **more,
    )  # fmt: skip


def with_thoughts(base: str, seed: int, config: QuietConfig) -> tuple[QuietLM, Any]:
    """Return a Quiet-STaR model whose thoughts start and end as the solutions of the base model do."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = make_quiet(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), tokenizer, config
    )
    with torch.no_grad():
        matrices = (input_matrix(model.base), output_matrix(model.base))
        for matrix in {id(one): one for one in matrices}.values():
            matrix.weight[model.marks.end] = (
                END_SCALE * matrix.weight[tokenizer(" is").input_ids[0]]
            )
    return model, tokenizer


# --- measuring -----------------------------------------------------------------------------------


def answer_tokens(tokenizer: Any, problem: Problem) -> tuple[list[int], int]:
    """Return the token ids of a text, and the number of those after "A:" up to the full stop."""
    ids = tokenizer(text(problem)).input_ids
    return ids, len(ids) - len(tokenizer(prompt(problem)).input_ids) - 1


def right_thought(written: str, problem: Problem) -> bool:
    """Return whether the last complete equation of a thought gives the answer."""
    results = re.findall(r"= ?(-?\d+)(?=\D)", written)
    return bool(results) and results[-1] == problem.gold


@torch.no_grad()
def measure_thoughts(model: QuietLM, tokenizer: Any) -> list[Row]:
    """Measure every test problem with a greedy thought and with sampled ones."""
    trained, tests = model.eval().quiet_config, problems("test")
    rows: list[Row] = [{} for _ in tests]
    same: dict[tuple[int, int], list[int]] = {}  # texts of equal lengths are measured together
    for number, problem in enumerate(tests):
        ids, answer = answer_tokens(tokenizer, problem)
        same.setdefault((len(ids), answer), []).append(number)
    batches = [numbers[at : at + BATCH] for numbers in same.values() for at in range(0, len(numbers), BATCH)]  # fmt: skip
    for name, how in (("greedy", {"temperature": 0.0, "thoughts": 1}), ("sampled", {"temperature": 1.0, "thoughts": SAMPLES})):  # fmt: skip
        model.quiet_config = replace(trained, **how)
        for numbers in batches:
            found = _measured(model, tokenizer, [tests[number] for number in numbers], numbers[0])
            for number, row in zip(numbers, found, strict=True):
                rows[number] |= {f"{name}_{key}": value for key, value in row.items()}
    model.quiet_config = trained
    return rows


def _measured(model: QuietLM, tokenizer: Any, chosen: Sequence[Problem], seed: int) -> list[Row]:
    """Measure problems whose texts are equally long: means over thoughts, and values without."""
    ids_BT = torch.tensor([answer_tokens(tokenizer, problem)[0] for problem in chosen])
    answer = answer_tokens(tokenizer, chosen[0])[1]
    at = len(tokenizer(prompt(chosen[0])).input_ids) - 1
    think_BT = torch.zeros_like(ids_BT)
    think_BT[:, at] = 1
    output = model(ids_BT, think_mask=think_BT, seed=seed)
    thought_BNS = output.thought_BNJS[:, :, 0]
    with thoughtful(model.base):
        prefix = read(model.base, ids_BT, None, None)
        position_BJ = given_positions(think_BT).position_BJ
        _, talking_RKD = talk(model.base, prefix, position_BJ, output.thought_BNJS, LOOKAHEAD, model.marks)  # fmt: skip
    talking_BNKD = talking_RKD.view(*thought_BNS.shape[:2], *talking_RKD.shape[1:])[:, :, :answer]
    rows = []
    for row, problem in enumerate(chosen):
        target_K = ids_BT[row, at + 1 : at + 1 + answer]
        without_KD = prefix.hidden_BTD[row, at : at + answer]
        found = [
            bool((model.mixed_logits(without_KD, with_KD[:, None]).argmax(-1) == target_K).all())
            for with_KD in talking_BNKD[row]
        ]
        averaged_K = model.mixed_logits(without_KD, talking_BNKD[row].transpose(0, 1)).argmax(-1)
        thoughts = [tokenizer.decode(one) for one in thought_BNS[row]]
        rows.append({
            "right": sum(found) / len(found),
            "averaged_right": float((averaged_K == target_K).all()),
            "nats": -output.log_prob_with_BNJK[row, :, 0, :answer].sum(-1).mean().item(),
            "weight": output.weight_BNJK[row, :, 0, :answer].mean().item(),
            "thought_right": sum(right_thought(one, problem) for one in thoughts) / len(thoughts),
            "nats_without": -output.log_prob_without_BT[row, at : at + answer].sum().item(),
            "thought": thoughts[0],
        })  # fmt: skip
    return rows


@torch.no_grad()
def measure_plain(model: Any, tokenizer: Any, pauses: int = 0) -> list[Row]:
    """Measure every test problem without thoughts, with pause tokens before the answer."""
    rows = []
    pause = [tokenizer.convert_tokens_to_ids(PAUSE)] * pauses
    for problem in problems("test"):
        ids, answer = answer_tokens(tokenizer, problem)
        start = len(tokenizer(prompt(problem)).input_ids)
        ids = ids[:start] + pause + ids[start:]
        first = start + pauses
        logits_TV = model.eval()(torch.tensor([ids])).logits[0, first - 1 : first - 1 + answer]
        target = torch.tensor(ids[first : first + answer])
        log_prob = logits_TV.log_softmax(-1).gather(-1, target[:, None])
        rows.append({"greedy_right": float((logits_TV.argmax(-1) == target).all()),
                     "greedy_nats": -log_prob.sum().item()})  # fmt: skip
    return rows


# --- training ------------------------------------------------------------------------------------


def rows_of(chosen: Sequence[Problem], tokenizer: Any, pauses: int) -> list[dict[str, list[int]]]:
    """Return texts for training without thoughts; the loss is that of the answer."""
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    rows = []
    for problem in chosen:
        ids, _ = answer_tokens(tokenizer, problem)
        start = len(tokenizer(prompt(problem)).input_ids)
        read_ids, labels = append_pauses(ids[:start], ids[start:], pause, pauses)
        rows.append({"input_ids": read_ids, "labels": labels})
    return rows


def run(method: str, base: str, out: Path, seed: int, training: dict[str, Any]) -> list[Row]:
    """Train by one method, and return what is measured for each test problem."""
    kind, _, rest = method.partition("-")
    training = training | {"seed": seed}
    if kind == "untrained":
        config = quiet_config(int(rest.removeprefix("ending-")), 0, may_end="ending" in rest)
        model, tokenizer = with_thoughts(base, seed, config)
        model.mixing = Trusting()  # type: ignore[assignment]
        return measure_thoughts(model, tokenizer)
    if kind in ("quiet", "trusted", "ending"):
        length, _, weight = rest.partition("-weight-")
        config = quiet_config(int(length), float(weight), trusted=kind != "quiet", may_end=kind == "ending")  # fmt: skip
        model, tokenizer = with_thoughts(base, seed, config)
        learned = spans(map(text, problems("train")), tokenizer, length=96, least=8, seed=seed)
        train_quiet(model, tokenizer, learned, quiet_arguments(out / "checkpoints", **training), out=out, progress=_shown(method))  # fmt: skip
        return measure_thoughts(*open_quiet(out / "model", dtype="float32"))
    pauses = int(rest or 0)
    start = add_pause_token(base, out / "start")
    options = {"weight_decay": 0.001} | training
    train_rows(start, lambda tokenizer: (rows_of(problems("train"), tokenizer, pauses), 0), [pauses],
               sft_config(out / "checkpoints", **options), out=out / "model", progress=_shown(method))  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    return measure_plain(plain, AutoTokenizer.from_pretrained(out / "model"), int(rest) if kind == "pause" else 0)  # fmt: skip


def _shown(method: str) -> Callable[[int], None]:
    """Return a function that prints the number of steps that are done."""
    done = 0

    def show(more: int) -> None:
        nonlocal done
        done += more
        if done % 10 == 0:
            print(f"{method}: step {done}", flush=True)

    return show


# --- tables --------------------------------------------------------------------------------------


def stored(out: Path) -> dict[str, dict[int, list[Row]]]:
    """Return all stored results: method, seed, test problem."""
    found: dict[str, dict[int, list[Row]]] = {}
    for method in METHODS:
        paths = {int(path.parent.name.split("-")[1]): path for path in out.glob(f"seed-*/{method}.json")}  # fmt: skip
        if paths:
            found[method] = {seed: json.loads(path.read_text()) for seed, path in sorted(paths.items())}  # fmt: skip
    return found


def over_problems(values: Sequence[float]) -> str:
    """Return the mean over problems with its 95% interval (normal approximation)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    error = 1.96 * math.sqrt(variance / len(values))
    return f"{mean:.3f} [{mean - error:.3f}, {mean + error:.3f}]"


def table(out: Path) -> str:
    """Return a table of all methods: over seeds, and for one seed over problems."""
    names = ("greedy_right", "greedy_nats", "sampled_right", "sampled_averaged_right", "sampled_nats", "sampled_thought_right", "sampled_weight", "greedy_nats_without")  # fmt: skip
    lines = ["| method | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for method, by_seed in stored(out).items():
        cells = []
        for name in names:
            each = [[row[name] for row in rows] for rows in by_seed.values() if name in rows[0]]
            means = [sum(values) / len(values) for values in each]
            cells.append(over_seeds(means) if len(means) > 1 else over_problems(each[0]) if each else "")  # fmt: skip
        lines.append(f"| {method} | {len(by_seed)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def check_settings(out: Path, settings: dict[str, Any]) -> None:
    """Store the settings of the first run in a folder, and refuse others."""
    path = out / "settings.json"
    if not path.exists():
        write_atomically(path, json.dumps(settings) + "\n")
    if (stored := json.loads(path.read_text())) != settings:
        raise SystemExit(f"{out} has results with {stored}; got {settings}. Give another --out.")


def main() -> None:
    """Run the methods on every seed, or print the table of what is stored."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="the model that recipes/star_smollm2_chain_sum.sh trained")
    parser.add_argument("--out", type=Path, default=Path("runs/quiet_smollm2"))
    parser.add_argument("--seeds", nargs="+", type=int, default=range(3))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8, help="texts per step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep-models", action="store_true")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    training = {
        "max_steps": args.steps, "per_device_train_batch_size": args.batch, "save_steps": 25,
        "learning_rate": args.learning_rate, "warmup_steps": 10, "lr_scheduler_type": "linear",
    }  # fmt: skip
    if not args.table:
        check_settings(args.out, {"model": args.model, **training})
    for seed in args.seeds if not args.table else ():
        folder = args.out / f"seed-{seed}"
        for method in args.methods:
            path = folder / f"{method}.json"
            if path.exists():
                continue
            rows = run(method, args.model, folder / method, seed, training)
            write_atomically(path, json.dumps(rows) + "\n")
            shutil.rmtree(folder / method / "checkpoints", ignore_errors=True)
            if (
                not args.keep_models and method != "quiet-24-weight-10"
            ):  # the teacher of distilled-24
                shutil.rmtree(folder / method, ignore_errors=True)
    print(table(args.out))


if __name__ == "__main__":
    main()

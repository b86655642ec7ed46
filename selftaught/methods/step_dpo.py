"""Per-step DPO: Setlur et al. 2024, "RL on Incorrect Synthetic Data Scales the Efficiency of LLM
Math Reasoning by Eight-Fold" (arXiv:2406.14532). `run_step_dpo` is its Section 6.

    1  pi_sft <- SFT(base, D)                      D: the training problems with their rationales
    2  S      <- n completions of pi_sft per problem, correct and wrong ones
    3  for every wrong y^ (8 per problem) and every step i:
    4      Q(y^_1:i) <- the probability that one of K continuations of y^_1:i by pi_sft is correct
    5      A_i       <- Q(y^_1:i) - Q(y^_1:i-1)                                  Equation 3
    6      c         <- the first pit: the first step with the lowest Q
    7      D_pref    <- D_pref with (x, a correct y, y^_1:c)
    8  pi     <- DPO(pi_sft, D_pref)               with pi_sft as the reference model

This is not the "Step-DPO" of Lai et al. 2024 (arXiv:2406.18629), where GPT-4 finds the first error.
The authors released no code. docs/methods/step_dpo.md lists the open questions and our choices.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selftaught.evaluation.evaluator import accuracy_of
from selftaught.methods.cards import BASE, run_card, trained_from
from selftaught.methods.config import distinct_by_of
from selftaught.methods.estimate import Cost
from selftaught.methods.plan import (
    epochs_cost,
    preference_cost,
    seed_cost,
    seed_size,
    seed_work,
)
from selftaught.methods.run import (
    Run,
    distinct,
    fit,
    flagged_row,
    flagged_seeds,
    measured,
    once,
    open_run,
    prefer,
    preference_options,
    ranked_correctly,
    running,
    seed_examples,
    train_on,
    trained_row,
    trainer_options,
    write_options,
    write_summary,
)
from selftaught.methods.step_values import (
    PAIRS,
    Learner,
    StepDpoConfig,
    StepSize,
    chosen_wrong,
    config_of,
    decoder,
    prefix_id,
    rollouts_drawn_from,
    sampled_tokens,
    samples,
    valued,
)
from selftaught.records import (
    Example,
    Rollout,
    read_jsonl,
)
from selftaught.rendering import TemplateOptions, prompt_ids
from selftaught.reports.citations import STEP_DPO
from selftaught.reports.model_card import Trained, card_text
from selftaught.reports.step_dpo_page import NAMES, report
from selftaught.reports.step_page import write_step_page
from selftaught.rollouts.selection import (
    NothingToLearn,
    keep_at_most,
    keep_distinct,
    make_examples,
)
from selftaught.rollouts.steps import (
    ValuedRollout,
)
from selftaught.runs.folder import (
    ProgressReporter,
    Row,
    publish,
    read_rows,
    write_rows,
)
from selftaught.samplers import Engine
from selftaught.training import open_tokenizer
from selftaught.training.launch import PLACE

CHANGEABLE = ("out", "methods", "sizes", "sft_sizes", "report_to", *PLACE)
"""Options that may change when a run is continued, because nothing stored depends on them."""


def run_step_dpo(config: StepDpoConfig, reporter: ProgressReporter | None = None) -> Row:
    """Run per-step DPO and its ablations, or continue a run, and return the summary, which is also
    written to `summary.json`.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        NothingToLearn: no completion is wrong, or no wrong one has a pit; the message gives the
            counts.
        BlockingIOError: another process is running in the folder.
    """
    with running(config, "per-step DPO", reporter) as (reporter, engine):
        run = open_step_dpo(config, reporter, engine)
        write_options(run, CHANGEABLE)
        config = run.config
        for count in sorted(set(config.sft_sizes) - set(_sizes(run))):
            _sft(_size(run, count))
        for count in _sizes(run):
            size = _size(run, count)
            gold = _sft(size)
            for method in config.methods:
                learn(size, method, gold)
        return _finish(run)


def open_step_dpo(
    config: StepDpoConfig, reporter: ProgressReporter | None = None, engine: Engine | None = None
) -> Run[StepDpoConfig]:
    """Check everything that a run of per-step DPO needs; see `open_run`."""
    run = open_run(config, reporter, engine, lambda config: [("dpo", _dpo_options(config))])
    config = run.config
    largest = max([*config.sizes, *config.sft_sizes], default=0)
    if largest > len(run.train):
        raise ValueError(
            f"Expected --sizes and --sft-sizes of at most {len(run.train)}, the number of training "
            f"problems; got {largest}."
        )
    return run


def work(run: Run[StepDpoConfig]) -> list[tuple[str, str]]:
    """Return what a run would do, as (name, value) pairs for a dry run."""
    config, sizes = run.config, _sizes(run)
    count = max(sizes)
    each = config.best_of * config.repeats
    values = count * config.wrong_per_problem * config.most_steps * each
    return [
        *seed_work(run),
        ("Sampling", f"{count * config.n:,} completions ({config.n} for each of {count} problems), at most "
         f"{run.params.max_tokens} tokens each"),
        ("Values", f"at most {values:,} continuations, {each} from every step of up to "
         f"{config.wrong_per_problem} wrong completions per problem"),
        ("Models", f"{', '.join(config.methods)} at {len(sizes)} sizes, each measured on {len(run.test)} "
         "test problems"),
    ]  # fmt: skip


def cost(run: Run[StepDpoConfig]) -> Cost:
    """Return the amounts of work of a run, for a dry run."""
    config, tests = run.config, len(run.test)
    methods = dict.fromkeys(config.methods)
    if config.start == "rft":
        methods["rft"] = None
    valued = config.wrong_per_problem
    valued += config.right_per_problem if "advantage" in methods else 0
    found = sum((seed_cost(run, count) for count in config.sft_sizes), Cost())
    for count in _sizes(run):
        onward = count * valued * config.most_steps * config.best_of * config.repeats
        found += seed_cost(run, count)
        found += Cost(completions=count * config.n + onward + len(methods) * tests)
        for method in methods:
            if method in ("rft", "advantage"):
                learned = epochs_cost(config, seed_size(run, count) + count * config.n)
            else:
                learned = preference_cost(_dpo_options(config), count * config.wrong_per_problem)
            found += Cost(examples=learned)
    return found


def _dpo_options(config: StepDpoConfig) -> dict[str, Any]:
    return preference_options(
        config, beta=config.beta, learning_rate=config.dpo_learning_rate, epochs=config.dpo_epochs,
        max_steps=config.dpo_max_steps, more=config.dpo_training,
    )  # fmt: skip


def _sizes(run: Run[StepDpoConfig]) -> list[int]:
    config = run.config
    return sorted(set(config.sizes)) or [len(run.train)]


def _size(run: Run[StepDpoConfig], count: int) -> StepSize:
    """Return `count` training problems: the first of a random order, so that smaller sizes are
    subsets of larger ones."""
    everything = range(len(run.train))
    drawn = random.Random(f"{run.config.seed} sizes").sample(everything, len(everything))
    problems = [run.train[at] for at in sorted(drawn[:count])]
    return StepSize(run, problems, run.config.out / f"size-{count}")


def _sft(size: StepSize) -> list[Example]:
    """Line 1: fine-tune and measure pi_sft, and return D."""
    folder = size.folder / "sft"
    gold = seed_examples(size.run, size.problems, folder)

    def make() -> Row:
        training = fit(size.run, gold, folder)
        evaluation = measured(size.run, str(training.model), f"SFT, {size.count}", folder)
        flagged = flagged_seeds(size.run, folder)
        return trained_row(size.run, training, evaluation, method="sft", size=size.count, **flagged)

    once(size.run, f"SFT, {size.count}", make)
    return gold


def learn(size: StepSize, method: Learner, gold: Sequence[Example]) -> Row:
    """Train and measure one method at one size, and return its row of `metrics.jsonl`.

    Args:
        size: the training problems.
        method: the training method.
        gold: D, the examples of the seed set.
    """
    config = config_of(size)
    folder = size.folder / method
    if config.start == "rft" and method != "rft":
        learn(size, "rft", gold)

    def make() -> Row:
        match method:
            case "rft":
                paths = distinct(
                    size.run, samples(size), distinct_by_of(size.run.task, config.distinct_by)
                )
                training = fit(size.run, [*gold, *make_examples(paths, size.run.tuned)], folder)
                more = {"summary": f"{len(paths):,} distinct correct completions"}
            case "advantage":
                training, more = _weighted(size, folder)
            case _:
                training, more = _preferred(size, method, folder)
        name = f"{NAMES[method]}, {size.count}"
        evaluation = measured(size.run, str(training.model), name, folder)
        spent = {
            "sampled tokens": sampled_tokens(size, method),
            **flagged_row(size.run, samples(size)),
        }
        return trained_row(size.run, training, evaluation, method=method, size=size.count, **more, **spent)  # fmt: skip

    return once(size.run, f"{NAMES[method]}, {size.count}", make)


def _preferred(size: StepSize, method: Learner, folder: Path) -> tuple[Any, Row]:
    """Line 8: DPO on the preference pairs of a method."""
    config = config_of(size)
    pairs, counts = PAIRS[method](size)
    if not pairs:
        raise NothingToLearn(
            f"{NAMES[method]} found no preference pair in {counts['wrong']} wrong completions of "
            f"{size.count} problems ({_in_words(counts)}). Try more completions per problem (--n), "
            "a higher --temperature, another --split, or harder problems."
        )
    start = size.sft if config.start == "sft" else str(size.folder / "rft" / "model")
    training = prefer(size.run, start, pairs, folder, _dpo_options(config))
    return training, {
        "pairs": counts,
        "summary": f"{ranked_correctly(training)} ({_in_words(counts)})",
    }


def _in_words(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in counts.items())


# ---------------------------------------------------------------- weighted by advantage


def _weighted(size: StepSize, folder: Path) -> tuple[Any, Row]:
    """Equation 4: fine-tune pi_sft on correct and wrong completions, each step weighted by
    exp(A / beta)."""
    config, run = config_of(size), size.run
    right = keep_at_most(keep_distinct(run.kept(samples(size))), config.right_per_problem)
    both = [
        *valued(size, chosen_wrong(size), "continuations"),
        *valued(size, right, "continuations-right"),
    ]
    tokenizer = open_tokenizer(size.sft)
    rows = [
        weighted_row(one, tokenizer, run.tuned(one.rollout.problem), config.advantage_beta,
                     run.tuned.chat_template_kwargs)
        for one in both
    ]  # fmt: skip
    write_rows(folder / "weighted.jsonl", rows)
    options = trainer_options(config)
    training = train_on(run, "weighted", size.sft, folder / "weighted.jsonl", options, len(rows))
    return training, {"summary": f"{len(both):,} completions"}


def weighted_row(
    one: ValuedRollout, tokenizer: Any, prompt: Any, beta: float,
    options: TemplateOptions | None = None,
) -> Row:  # fmt: skip
    """Return a training row of a completion, with weight exp(A / beta) of its step for every token.

    Returns:
        `input_ids`, `labels` (-100 for the prompt) and `weights` (0.0 for the prompt), of equal
        length.
    """
    head = prompt_ids(tokenizer, prompt, options)
    weights = [
        math.exp(gain / beta)
        for index, gain in enumerate(one.advantages)
        for _ in one.step(index)
    ]  # fmt: skip
    ids = list(one.token_ids)
    return {"input_ids": [*head, *ids], "labels": [-100] * len(head) + ids,
            "weights": [0.0] * len(head) + weights}  # fmt: skip


# ---------------------------------------------------------------- summary


def _finish(run: Run[StepDpoConfig]) -> Row:
    config = run.config
    rows = read_rows(config.out / "metrics.jsonl")
    size = _size(run, max(_sizes(run)))
    method = "step_dpo" if "step_dpo" in config.methods else config.methods[-1]
    best = next(row for row in rows if row["name"] == f"{NAMES[method]}, {size.count}")
    if (size.folder / "continuations.values.jsonl").exists():
        step_page(size)
    named = {row["name"]: row for row in rows}
    lineage = _lineage(size, method, named)
    card = run_card(run, NAMES[method], STEP_DPO, accuracy_of(best), run.tuned, lineage)
    summary = write_summary(config.out, {
        "method": "step_dpo",
        "best model": publish(size.folder / method / "model", config.out / "model", card_text(card)),
        "rows": rows,
        "sampled tokens": best.get("sampled tokens", 0),
        "minutes": sum(sum(row["seconds"].values()) for row in rows) / 60,
    })  # fmt: skip
    report(config.out)
    return summary


def _lineage(size: StepSize, method: str, named: Mapping[str, Row]) -> list[Trained]:
    """Return the models from the base to the one that a method trained."""
    config, count = config_of(size), size.count
    found = [trained_from("SFT", BASE, named[f"SFT, {count}"], "(the seed set)")]
    rft = trained_from("RFT", BASE, named[f"RFT, {count}"], "(the seed set and completions of SFT)") if f"RFT, {count}" in named else None  # fmt: skip
    if method == "rft":
        return [*found, *([rft] if rft else [])]
    after_rft = rft is not None and config.start == "rft" and method != "advantage"
    row, name = named[f"{NAMES[method]}, {count}"], NAMES[method]
    note = "(completions of SFT)" if method == "advantage" else "(pairs of completions of SFT)"
    last = trained_from(name, "RFT" if after_rft else "SFT", row, note)
    return [*found, *([rft] if rft and after_rft else []), last]


def step_page(size: StepSize) -> Path:
    """Write `steps.html`, the page of steps, into the run folder, and return its path."""
    config = config_of(size)
    found = [ValuedRollout.from_dict(row) for row in read_jsonl(size.folder / "continuations.values.jsonl")]  # fmt: skip
    decode = decoder(open_tokenizer(size.sft))
    drawn: dict[str, list[Rollout]] = {}
    for one in rollouts_drawn_from(size):
        drawn.setdefault(one.problem.id, []).append(one)
    own: dict[str, list[Rollout]] = {}
    for one in samples(size):
        own.setdefault(one.problem.id, []).append(one)
    continuations = {
        (one.rollout.problem.id, one.rollout.index, steps): (
            drawn.get(prefix_id(one.rollout.problem.id, one.prefix(steps)), [])
            if steps else own[one.rollout.problem.id]
        )
        for one in found
        for steps in range(len(one.ends))
    }  # fmt: skip
    return write_step_page(
        found, decode, continuations, config.out / "steps.html",
        title=f"{config.out.name}: steps", rule=config.rule, k=config.best_of,
    )  # fmt: skip

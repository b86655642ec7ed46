"""STaR: Zelikman, Wu, Mu and Goodman 2022, "STaR: Bootstrapping Reasoning With Reasoning"
(arXiv:2203.14465). `run_star` is its Algorithm 1.

    1  M_0 <- M
    2  for n in 1..N:
    3      (r_i, y_i)         <- M_{n-1}(x_i)                    reason
    4      (r'_i, y'_i)       <- M_{n-1}(add_hint(x_i, gold_i))  rationalize
    5      D_n                <- the (x_i, r_i) with y_i correct
    6      D'_n               <- the (x_i, r'_i) with y_i wrong and y'_i correct
    7      M_n                <- train(M, D_n with D'_n)         from the base model, every time

Differences from the paper and from the authors' code are listed in docs/methods/star.md.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, log
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from selftaught.evaluation.evaluator import Evaluation
from selftaught.methods.cards import BASE, run_card, trained_from
from selftaught.methods.config import Facts, MethodConfig, at_least
from selftaught.methods.estimate import Cost
from selftaught.methods.run import (
    Run,
    accuracy,
    check_chat,
    fit,
    open_task_of,
    running,
    tokens_of,
    trainer_options,
    write_options,
    write_summary,
)
from selftaught.option_groups import Auto, Prompt, as_number
from selftaught.printable import counted
from selftaught.prompts import PromptStyle, bare, hinted
from selftaught.records import (
    OUTCOMES,
    Problem,
    Rollout,
)
from selftaught.reports.citations import STAR
from selftaught.reports.model_card import Trained, card_text
from selftaught.reports.pages import overall
from selftaught.reports.star_page import report
from selftaught.rollouts.graded import graded_beside
from selftaught.rollouts.selection import (
    NothingToLearn,
    draw_problems,
    example,
    keep_correct,
    keep_distinct,
    make_examples,
    share_of,
    unsolved,
    why_dropped,
)
from selftaught.rollouts.store import collect
from selftaught.runs.folder import (
    ProgressReporter,
    Row,
    publish,
    read_rows,
    timed,
    write_rows,
)
from selftaught.runs.preflight import Asked, check_settings, check_texts
from selftaught.samplers import Engine, Sampler, SamplingParams
from selftaught.tasks import Task
from selftaught.training import Training
from selftaught.training.launch import PLACE

MAX_STEPS = 10**9
PAPER_STEPS, PAPER_BATCH = 40, 80
"""Optimizer steps of the first iteration (Section 4.1), and examples per step (Appendix H)."""


@dataclass(frozen=True)
class StarConfig(MethodConfig):
    """Options of STaR. The defaults are the paper's, except those that are "auto"."""

    heading: ClassVar[str] = "STaR"
    method: ClassVar[str] = "star"

    iterations: int = 16
    """Maximum number of iterations; 16 as in the paper's arithmetic experiments (Section 4.3)."""
    patience: int = 2
    """Number of iterations without a gain in validation accuracy after which the run stops. The paper
    stops by eye (Section 4.1)."""
    n: int = 1
    """Number of completions per problem; 1 in the paper."""
    rationalization: bool = True
    """Sample failed problems again with the gold answer as a hint (Section 3.2)."""
    rationalized_share: float = 1.0
    """Share of the failed problems that are sampled again; 1.0 as in the authors' code."""
    prompt_later: bool = True
    """Keep the worked examples in the prompt after the first iteration (Section 4.1). False is
    `no_prompt` of the authors' code."""
    prompt_in_training: bool = False
    """Keep the worked examples in the training prompt. `few_shot_train` of the authors' code; the
    paper reports a gain from it on CommonsenseQA (Section 4.4)."""
    from_base: bool = True
    """Fine-tune the base model in every iteration (Algorithm 1, line 7). False: fine-tune the model of
    the previous iteration."""
    schedule: Literal["grow", "add", "epochs"] = "grow"
    """Number of optimizer steps of iteration i: "grow" is start_steps * grow_steps**(i-1) (Section 4.1),
    "add" is start_steps + add_steps*(i-1) (Section 4.3), "epochs" is num_train_epochs over the examples."""
    start_steps: int | Auto = "auto"
    """Optimizer steps of the first iteration; 40 in Section 4.1, 300 for arithmetic with "add" in
    Section 4.3. "auto": enough for one pass over the training problems, and at most the 3,200
    examples of Section 4.1."""
    grow_steps: float = 1.2
    """Growth factor per iteration of the schedule "grow" (Section 4.1)."""
    add_steps: int = 20
    """Optimizer steps added per iteration by the schedule "add" (Section 4.3)."""
    baselines: bool = False
    """Also measure few-shot direct answers and fine-tuning on direct answers (the paper's Tables 1, 2)."""
    keep_models: Literal["best", "all"] = "best"
    """Models that are kept on disk: those of the "best" and the last iteration, or "all"."""

    out: Path = Path("runs/star")
    """Run folder. Repeating the same command continues the run."""
    prompt: Prompt = "few_shot"
    """Prompt style for sampling: "few_shot" (the task's worked examples before the question, Section 3.1),
    "bare" (the question alone) or "chat" (the model's chat template, with the task's instruction on how
    to state the answer)."""
    temperature: float = 0.0
    """Sampling temperature. 0 means greedy decoding, as in the paper; higher temperatures gave worse
    models there (Section 5)."""
    top_p: float = 1.0
    """Nucleus sampling threshold. 1.0 disables it. The authors' code has 0.9 at temperature 0.01."""
    check_equations: bool = False
    """Drop rationales that contain a wrong equation, which removes some correct answers with wrong
    reasoning. Not in the paper; the filter of RFT (arXiv:2308.01825)."""
    train_problems: int | None = None
    """Number of training problems per iteration. Every iteration draws new ones. Default: all. The
    paper draws 10,000 of 50,000 (Section 4.1)."""
    validation_problems: int | None = 500
    """Number of validation problems, by which the best iteration is chosen and the run is stopped.
    null means all."""
    test_problems: int | None = None
    """Number of test problems, on which the base model and the best model are measured at the end.
    Default: all."""
    num_train_epochs: float = 1.0
    """Number of passes over the examples with `--schedule epochs`. Not in the paper."""
    learning_rate: float | Auto = "auto"
    """Learning rate after the warm-up; 1e-6 for GPT-J with 6 billion parameters (Appendix H). "auto": by
    the size of the model (docs/training.md)."""
    warmup_steps: int | Auto = "auto"
    """Linear warm-up in optimizer steps, in every iteration; 100 in Section 4.1. "auto": a tenth of
    start_steps."""
    train_batch_size: int | Auto = "auto"
    """Global batch size: number of examples per optimizer step. 80 in the paper: 8 packed sequences
    (Appendix H) of about ten examples each (iteration_train.py). "auto": by the number of training
    problems, at most 80 (docs/training.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            ("iterations", self.iterations >= 1, "at least 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("rationalized_share", 0 <= self.rationalized_share <= 1, "from 0 to 1"),
            ("start_steps", at_least(self.start_steps, 1), "at least 1"),
            ("warmup_steps", at_least(self.warmup_steps), "0 or more"),
            ("grow_steps", self.grow_steps >= 1, "at least 1"),
            ("add_steps", self.add_steps >= 0, "0 or more"),
            ("validation_problems", (self.validation_problems or 1) >= 1
             and self.validation_problems != 0, "at least 1"),
        )  # fmt: skip

    max_train_batch_size: ClassVar[int] = 80
    tiny_train_batch_size: ClassVar[int] = 48

    def resolved(self, facts: Facts) -> Self:
        """Return the options with a value for each that is "auto"; see `MethodConfig.resolved`."""
        drawn = min(facts.problems, self.train_problems or facts.problems)
        config = super().resolved(replace(facts, problems=drawn))
        start, warmup = config.start_steps, config.warmup_steps
        if start == "auto":
            seen = min(drawn * config.n, PAPER_STEPS * PAPER_BATCH)
            start = max(10, ceil(seen / as_number(config.train_batch_size)))
            start = 150 if facts.tiny else start
        if warmup == "auto":
            warmup = 10 if facts.tiny else start // 10
        return replace(config, start_steps=start, warmup_steps=warmup)

    @classmethod
    def embedded(cls, **changes: Any) -> Self:
        """Return `small(**changes)`; the earlier name."""
        return cls.small(**changes)

    def steps(self, iteration: int) -> int:
        """Return the optimizer steps of an iteration, counted from 1; -1 with "epochs"."""
        match self.schedule:
            case "grow":
                # Beyond a billion steps the number no longer matters, and a float would overflow.
                growth = min((iteration - 1) * log(self.grow_steps), log(MAX_STEPS))
                steps = (
                    as_number(self.start_steps) * self.grow_steps ** (iteration - 1)
                    if growth < log(MAX_STEPS)
                    else MAX_STEPS
                )
                return int(min(steps, MAX_STEPS))
            case "add":
                return int(as_number(self.start_steps)) + self.add_steps * (iteration - 1)
            case "epochs":
                return -1


CHANGEABLE = ("iterations", "patience", "out", "baselines", "report_to", *PLACE)
"""Options that may change when a run is continued, because nothing stored depends on them."""


@dataclass(frozen=True)
class Star(Run[StarConfig]):
    """An opened run of STaR, with its validation problems and the prompt styles of its stages."""

    validation: Sequence[Problem] = ()

    @property
    def first_style(self) -> PromptStyle:
        """Prompt style of the first completions."""
        return self.prompt(0)

    @property
    def params(self) -> SamplingParams:
        """Sampling options for the training problems."""
        return replace(super().params, n=self.config.n)

    def prompt(self, iteration: int) -> PromptStyle:
        """Return the prompt style for the model of an iteration; 0 is the base model."""
        later = iteration > 0 and not self.config.prompt_later
        return bare(self.asked) if later else self.asked

    def training_prompt(self) -> PromptStyle:
        """Return the prompt style of the training examples; see `prompt_in_training`."""
        return self.asked if self.config.prompt_in_training else bare(self.asked)

    def problems(self, iteration: int) -> Sequence[Problem]:
        """Return the training problems of an iteration."""
        return draw_problems(
            self.train, self.config.train_problems, f"{self.config.seed} {iteration}"
        )

    def folder(self, iteration: int) -> Path:
        """Return the folder of an iteration."""
        return self.config.out / f"iteration-{iteration}"

    def model(self, iteration: int) -> str:
        """Return the model that an iteration trained; 0 is the base model."""
        return str(self.folder(iteration) / "model") if iteration else self.base


def run_star(config: StarConfig, reporter: ProgressReporter | None = None) -> Row:
    """Run STaR, or continue a run, and return the summary, which is also written to `summary.json`.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        NothingToLearn: the first iteration has no example to learn from; the message gives the
            reasons.
        BlockingIOError: another process is running in the folder.
    """
    with running(config, "STaR", reporter) as (reporter, engine):
        star = open_star(config, reporter, engine)
        write_options(star, CHANGEABLE)
        config = star.config
        metrics = config.out / "metrics.jsonl"
        rows = read_rows(metrics) or [_base_row(star)]
        for iteration in range(len(rows), config.iterations + 1):
            if why_stop(rows, config):
                break
            try:
                rows.append(run_iteration(star, iteration))
            except NothingToLearn as nothing:
                if iteration == 1:
                    raise
                return _finish(star, rows, str(nothing))
            write_rows(metrics, rows)
            _prune(star, rows)
            report(config.out)
            star.reporter.iteration(rows[-1])
        return _finish(star, rows)


def run_iteration(star: Star, iteration: int) -> Row:
    """Lines 3 to 7 of Algorithm 1: run one iteration and measure its model on the validation
    problems.

    Returns:
        The iteration's row of `metrics.jsonl`.

    Raises:
        NothingToLearn: no completion was kept.
    """
    out, problems = star.folder(iteration), star.problems(iteration)
    sampler = star.engine.of(star.model(iteration - 1))
    direct, rationalized = bootstrap(star, sampler, iteration, problems)
    kept = keep_distinct(star.kept(direct) + star.kept(rationalized))
    if not kept:
        raise NothingToLearn(_why_nothing(star, direct, rationalized))
    examples = make_examples(kept, star.training_prompt())
    start = star.base if star.config.from_base else star.model(iteration - 1)
    training = fit(star, examples, out, start, _own_options(star, iteration))
    validation = _validate(star, iteration)
    return {
        "iteration": iteration,
        "model": str(training.model),
        "validation": validation.to_dict(),
        "funnel": _funnel(star, problems, direct, rationalized, training),
        "sampled tokens": tokens_of(direct) + tokens_of(rationalized),
        "training": {
            "steps": training.steps,
            "loss": training.loss,
            "tokens": training.tokens,
            "tokenized from text": training.from_text,
            "log": training.log,
        },
        "seconds": _seconds(star),
    }


def _seconds(star: Star) -> dict[str, float]:
    """Return the seconds by stage since the last row of metrics."""
    spent = dict(star.seconds)
    star.seconds.clear()
    return spent


def bootstrap(
    star: Star, sampler: Sampler, iteration: int, problems: Sequence[Problem]
) -> tuple[list[Rollout], list[Rollout]]:
    """Lines 3 to 6: sample rationales, then rationalize the failed problems with the answer as a
    hint.

    Returns:
        The graded rollouts without a hint, and those with a hint.
    """
    style, out = star.prompt(iteration - 1), star.folder(iteration)
    params = replace(star.params, seed=star.config.seed + iteration)

    def ask(asked: Sequence[Problem], shown: PromptStyle, name: str, **kinds: Any) -> list[Rollout]:
        with (
            timed(star.seconds, "sample" if name == "rollouts" else "rationalize"),
            star.reporter.progress(
                f"iteration {iteration}: {name}", len(asked) * params.n
            ) as advance,
        ):
            rollouts = collect(sampler, asked, shown, params, store=out / f"{name}.jsonl",
                               progress=advance, **kinds)  # fmt: skip
        with timed(star.seconds, "grade"):
            return graded_beside(out / f"{name}.jsonl", rollouts, star.task)

    direct = ask(problems, style, "rollouts")
    if iteration == 1 and all(rollout.correct for rollout in direct):
        raise NothingToLearn(
            f"The base model already answers all {len(problems)} training problems correctly, so "
            "there is nothing to learn. Choose harder problems."
        )
    if not star.config.rationalization:
        return direct, []
    missed = share_of(unsolved(problems, direct), star.config.rationalized_share, params.seed)
    hint = hinted(style, star.task.hint)
    return direct, ask(missed, hint, "rationalized", origin="rationalized") if missed else []


def why_stop(rows: Sequence[Row], config: StarConfig) -> str | None:
    """Return the reason to stop, or None to continue with another iteration."""
    best = best_iteration(rows)
    if _value(rows[best]) >= 1:
        return "every validation problem is solved"
    if rows[-1]["iteration"] - best >= config.patience:
        return f"no gain in {counted(config.patience, 'iteration')}"
    if rows[-1]["iteration"] >= config.iterations:
        return f"the limit of {counted(config.iterations, 'iteration')}"
    return None


def best_iteration(rows: Sequence[Row]) -> int:
    """Return the iteration with the highest validation accuracy; on a tie, the earliest."""
    return max(range(len(rows)), key=lambda index: (_value(rows[index]), -index))


def open_star(
    config: StarConfig, reporter: ProgressReporter | None = None, engine: Engine | None = None
) -> Star:
    """Open the task, draw the problems of every split, and check all gold answers, options and
    prompts.

    Nothing is sampled, and no weights are loaded. A run and a dry run both start with this.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        ImportError: a package that an option needs is not installed.
        OSError: a file or the model was not found.
    """
    needed = {"train": None, "validation": config.validation_problems, "test": config.test_problems}
    run, splits = open_task_of(config, reporter, engine, needed)
    config = run.config
    star = Star(**vars(run), validation=splits["validation"])
    training_style = star.training_prompt()
    check_chat(training_style, star.task, star.base, star.train[0], rationales=config.baselines)
    options = trainer_options(config, **_own_options(star, 1))
    last = trainer_options(config, **_own_options(star, config.iterations))
    check_settings(config, star.base, [("sft", options), ("sft", options | {"seed": last["seed"]})])
    too_long = check_texts(
        config, star.base, _asked(star), (training_style, star.train), star.params.max_tokens,
        options["max_length"],
    )  # fmt: skip
    return replace(star, too_long=too_long)


def _asked(star: Star) -> list[Asked]:
    """Return every prompt style that a run may sample with, and its problems."""
    asked: list[Asked] = []
    for style in dict.fromkeys([star.prompt(0), star.prompt(1)]):
        asked += [(style, star.train), (style, star.validation), (style, star.test)]
        if star.config.rationalization:
            asked.append((hinted(style, star.task.hint), star.train))
    if star.config.baselines:
        asked += [(_answers_only(star), star.test), (bare(star.prompt(0)), star.test)]
    return asked


def work(star: Star) -> list[tuple[str, str]]:
    """Return what a run would do, as (name, value) pairs for a dry run."""
    config, problems = star.config, star.problems(1)
    asked = len(problems) * config.n
    steps = f"{config.steps(1)} optimizer steps" if config.schedule != "epochs" else f"{config.num_train_epochs:g} epochs"  # fmt: skip
    every = sum(max(config.steps(at), 0) for at in range(1, config.iterations + 1))
    again = ", and the failed problems again with a hint" if config.rationalization else ""
    return [
        ("Sampling", f"{asked} completions per iteration, at most {star.params.max_tokens} tokens each"
         f"{again}"),
        ("Training", f"iteration 1: {steps} with {config.train_batch_size} examples each, from "
         f"{'the base model' if config.from_base else 'the previous model'}, "
         f"learning rate {config.learning_rate:g} after a warm-up of {config.warmup_steps} steps"),
        ("Length", f"at most {counted(config.iterations, 'iteration')}; stops after {config.patience} without a gain"),
        ("Work", f"per iteration up to {asked * (1 + config.rationalization)} completions for training "
         f"and {len(star.validation)} for validation; {every} optimizer steps in total"),
    ]  # fmt: skip


def cost(star: Star) -> Cost:
    """Return the amounts of work of a run, for a dry run."""
    config, drawn = star.config, len(star.problems(1)) * star.config.n
    each = drawn * (1 + config.rationalization) + len(star.validation)
    trained = [
        config.steps(at) * int(as_number(config.train_batch_size)) if config.schedule != "epochs"
        else ceil(config.num_train_epochs * drawn * (1 + config.rationalization))
        for at in range(1, config.iterations + 1)
    ]  # fmt: skip
    tests = (2 + 2 * config.baselines) * len(star.test)
    completions = config.iterations * each + len(star.validation) + tests
    # Fine-tuning on direct answers has as many steps as the best model.
    direct = (trained[-1] if config.from_base else sum(trained)) if config.baselines else 0
    return Cost(completions, sum(trained) + direct, first=Cost(each, trained[0]))


def _base_row(star: Star) -> Row:
    validation = _validate(star, 0)
    row = {
        "iteration": 0,
        "model": star.base,
        "validation": validation.to_dict(),
        "seconds": _seconds(star),
    }
    write_rows(star.config.out / "metrics.jsonl", [row])
    star.reporter.iteration(row)
    return row


def _validate(star: Star, iteration: int) -> Evaluation:
    store = star.folder(iteration) / "validation.jsonl"
    name = f"iteration {iteration}" if iteration else "base"
    style = star.prompt(iteration)
    return accuracy(star, star.model(iteration), star.validation, style, store, name)


def _own_options(star: Star, iteration: int) -> Row:
    """Return the training options that differ between iterations."""
    return {
        "max_steps": star.config.steps(iteration),
        "lr_scheduler_type": "constant_with_warmup",
        "seed": star.config.seed + iteration,
    }


def _funnel(
    star: Star,
    problems: Sequence[Problem],
    direct: Sequence[Rollout],
    rationalized: Sequence[Rollout],
    training: Training,
) -> Row:
    kept, rationalized_kept = star.kept(direct), star.kept(rationalized)
    dropped = Counter(why_dropped(direct)) + Counter(why_dropped(rationalized))
    right = len(keep_correct(direct)) + len(keep_correct(rationalized))
    dropped["a wrong equation"] = right - len(star.sound(direct)) - len(star.sound(rationalized))
    dropped += Counter(star.why_flagged([*direct, *rationalized]))
    distinct = len(keep_distinct([*kept, *rationalized_kept]))
    dropped["the same text again"] = len(kept) + len(rationalized_kept) - distinct
    dropped["too long"] = training.too_long
    return {
        "asked": len(problems),
        "sampled": _outcomes(direct),
        "hinted": len({rollout.problem.id for rollout in rationalized}),
        "rationalized": _outcomes(rationalized),
        "kept": len(kept),
        "kept rationalized": len(rationalized_kept),
        "dropped": {why: count for why, count in dropped.items() if count},
        "trained on": training.trained_on,
    }


def _outcomes(rollouts: Sequence[Rollout]) -> dict[str, int]:
    counts = Counter(rollout.outcome for rollout in rollouts)
    return {outcome: counts[outcome] for outcome in OUTCOMES}


def _why_nothing(star: Star, direct: Sequence[Rollout], rationalized: Sequence[Rollout]) -> str:
    def counts(rollouts: Sequence[Rollout]) -> str:
        reasons = (why_dropped(rollouts) | star.why_flagged(rollouts)).items()
        found = [f"{count} {why}" for why, count in sorted(reasons)]
        if right := len(keep_correct(rollouts)) - len(star.sound(rollouts)):
            found.append(f"{right} right with a wrong equation, see --check-equations")
        return ", ".join(found) or "none sampled"

    return (
        f"Nothing was kept: all {len(direct)} completions were dropped ({counts(direct)}), and all "
        f"{len(rationalized)} completions with the answer as a hint ({counts(rationalized)}). "
        "Try easier problems, a stronger model, more completions (--n 4 --temperature 0.7), a "
        f"larger --max-tokens (now {star.params.max_tokens}) if many were cut by length, or "
        f"another --prompt. The completions are stored in {star.config.out}."
    )


def _finish(star: Star, rows: Sequence[Row], stopped: str | None = None) -> Row:
    """Measure the base model and the best model on the test problems, publish the best model, and
    write the summary and the page."""
    config, best = star.config, best_iteration(rows)
    _prune(star, rows)
    # The best model is measured first, because it is often the one that is still loaded.
    best_tested = _test(star, star.model(best), star.prompt(best), "best", f"iteration-{best}") if best else None  # fmt: skip
    base_tested = _test(star, star.base, star.prompt(0), "base", "base")
    tested = {"base": base_tested, "best": best_tested or base_tested}
    card = run_card(
        star, "STaR", STAR, overall(tested["best"]), star.prompt(best), _lineage(star, rows, best)
    )
    summary: Row = {
        "best": best,
        "why stopped": stopped or why_stop(rows, star.config),
        "best model": publish(Path(star.model(best)), config.out / "model", card_text(card))
        if best
        else star.base,
        "test": {name: evaluation.to_dict() for name, evaluation in tested.items()},
        "comparisons": [one.to_dict() for one in _baselines(star, rows, best)],
        "minutes": sum(sum(row["seconds"].values()) for row in rows) / 60,
    }
    write_summary(config.out, summary)
    report(config.out)
    return summary


def _lineage(star: Star, rows: Sequence[Row], best: int) -> list[Trained]:
    """Return the models from the base to the best one. Each sampled the examples of the next."""
    numbers = range(1, best + 1)
    return [
        trained_from(
            f"iteration {number}",
            BASE if star.config.from_base or number == 1 else f"iteration {number - 1}",
            rows[number],
            f"(completions of {f'iteration {number - 1}' if number > 1 else BASE})",
        )
        for number in numbers
    ]


def _test(star: Star, model: str, style: PromptStyle, name: str, store: str) -> Evaluation:
    """Measure the accuracy on the test problems; the rollouts are stored in
    `test-{store}.jsonl`."""
    path = star.config.out / f"test-{store}.jsonl"
    return accuracy(star, model, star.test, style, path, name)


def _baselines(star: Star, rows: Sequence[Row], best: int) -> list[Evaluation]:
    """Measure the paper's baselines without rationales: worked examples with answers only, and the
    base model fine-tuned on (question, answer) pairs.

    The fine-tuning has as many optimizer steps as the best iteration's model took from the base
    model; if no iteration is better than the base model, as many as the first iteration.
    """
    if not star.config.baselines:
        return []
    style = star.prompt(0)
    untrained = _test(star, star.base, _answers_only(star), "direct answers, base", "direct-base")
    target = bare(style)
    examples = [
        example(target, problem, target.completion(_answered(star.task, problem).rationale or ""))
        for problem in star.train
    ]
    last = max(best, 1)
    seen = rows[last : last + 1] if star.config.from_base else rows[1 : last + 1]
    if not seen:
        return [untrained]
    steps = sum(row["training"]["steps"] for row in seen)
    folder = star.config.out / f"direct-{last}"
    trained = fit(star, examples, folder, own=_own_options(star, last), max_steps=steps)
    name = "direct answers, fine-tuned"
    return [untrained, _test(star, str(trained.model), target, name, f"direct-{last}")]


def _answers_only(star: Star) -> PromptStyle:
    """Return the base model's prompt style, with worked examples that only state their answers."""
    style = star.prompt(0)
    return replace(
        style, shots=lambda problem: [_answered(star.task, shot) for shot in style.shots(problem)]
    )


def _answered(task: Task, problem: Problem) -> Problem:
    """Return the problem with its direct answer in place of a rationale."""
    return replace(problem, rationale=task.direct.format(answer=problem.gold))


def _prune(star: Star, rows: Sequence[Row]) -> None:
    """Delete all models except those of the best and the last iteration."""
    if star.config.keep_models == "all":
        return
    kept = {best_iteration(rows), len(rows) - 1}
    for iteration in range(1, len(rows)):
        if iteration not in kept:
            shutil.rmtree(star.model(iteration), ignore_errors=True)


def _value(row: Row) -> float:
    return Evaluation.from_dict(row["validation"]).group_mean.accuracy

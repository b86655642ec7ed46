"""Comparison of several methods on one task, with the same budget of sampled tokens for each.

The fine-tuned model that all methods start from is trained once. A pilot sample of its completions
gives the mean number of tokens, from which the number of completions of each method is computed.
The number of tokens that a method actually sampled is reported.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from selftaught.evaluation.candidates import Candidates, candidates_of, chosen, powers, share
from selftaught.evaluation.evaluator import Evaluation, accuracy_of
from selftaught.methods.config import SeededConfig
from selftaught.methods.estimate import Cost
from selftaught.methods.plan import seed_cost, seed_work
from selftaught.methods.rft import RftConfig, open_rft, run_rft
from selftaught.methods.run import (
    C,
    Run,
    fit,
    measured,
    once,
    open_run,
    running,
    sampled,
    seed_examples,
    tokens_of,
    trained_row,
    write_options,
    write_summary,
)
from selftaught.methods.star import StarConfig, open_star, run_star
from selftaught.methods.step_dpo import open_step_dpo, run_step_dpo
from selftaught.methods.step_values import StepDpoConfig, decoder, step_endings
from selftaught.methods.vstar import VstarConfig, open_vstar, run_vstar
from selftaught.prompts import PromptStyle, bare
from selftaught.records import read_rollouts
from selftaught.reports.comparison_page import report
from selftaught.rollouts.selection import draw_problems
from selftaught.rollouts.steps import split_steps
from selftaught.runs.folder import ProgressReporter, Row, link_tree, read_rows
from selftaught.runs.preflight import check_method_options
from selftaught.samplers import Engine
from selftaught.training import open_tokenizer
from selftaught.training.launch import PLACE

Method = Literal["star", "rft", "vstar", "step_dpo"]
NAMES = {"star": "STaR", "rft": "RFT", "vstar": "V-STaR", "step_dpo": "per-step DPO"}
BATCHES = {"train_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps"}
PILOT = 64
"""Number of problems whose completions are sampled to measure the mean length."""


@dataclass(frozen=True)
class CompareConfig(SeededConfig):
    """Options of a comparison. Those of `MethodConfig` apply to all methods."""

    heading: ClassVar[str] = "comparison"
    method: ClassVar[str] = "compare"

    out: Path = Path("runs/compare")
    """Folder of the comparison, with one run folder per method. Repeating the same command
    continues it."""
    methods: list[Method] = field(default_factory=lambda: ["star", "rft", "vstar", "step_dpo"])
    """Methods to compare: "star", "rft", "vstar", "step_dpo"."""
    budget: int = 1_000_000
    """Number of tokens that each method may sample for training, including those of the seed
    set."""
    candidates: int = 16
    """Number of candidates per test problem, for majority voting and best-of-k."""
    star: dict[str, Any] = field(default_factory=dict)
    """Any other option of STaR, such as `--star.rationalization false`."""
    rft: dict[str, Any] = field(default_factory=dict)
    """Any other option of RFT, such as `--rft.distinct_by text`."""
    vstar: dict[str, Any] = field(default_factory=dict)
    """Any other option of V-STaR, such as `--vstar.verifier_learning_rate 1e-5`."""
    step_dpo: dict[str, Any] = field(default_factory=dict)
    """Any other option of per-step DPO, such as `--step-dpo.split sentence`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            ("budget", self.budget >= 1, "at least 1"),
            ("candidates", self.candidates >= 1, "at least 1"),
            ("methods", bool(self.methods), "one or more of star, rft, vstar, step_dpo"),
            (
                "vstar",
                "candidates" not in self.vstar,
                "given without candidates, which is an option of the comparison",
            ),
            (
                "step_dpo",
                not {"methods", "sizes"} & set(self.step_dpo),
                "given without methods and sizes, which the comparison sets",
            ),
        )


CHANGEABLE = ("out", "methods", "report_to", *PLACE)
"""Options that may change when a comparison is continued."""


@dataclass(frozen=True)
class Pilot:
    """Length of the fine-tuned model's completions, measured on some problems."""

    tokens: float
    """Mean number of tokens per completion."""
    steps: float
    """Mean number of steps per completion."""
    seed_tokens: int
    """Number of tokens that were sampled for the seed set."""


def run_compare(config: CompareConfig, reporter: ProgressReporter | None = None) -> Row:
    """Run every method within the budget, or continue a comparison, and return the summary.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        NothingToLearn: a method has no example to learn from; the message gives the reasons.
        BlockingIOError: another process is running in the folder.
    """
    with running(config, "comparison", reporter) as (reporter, engine):
        run = open_compare(config, reporter, engine)
        write_options(run, CHANGEABLE)
        config = run.config
        once(run, "SFT", lambda: _sft(run))
        pilot = _pilot(run)
        budget = config.budget - pilot.seed_tokens
        plans = {method: METHODS[method].settings(run, pilot, budget) for method in config.methods}
        for method in config.methods:
            once(run, NAMES[method], lambda at=method: _row(run, at, plans[at]))
            report(config.out)
        return _finish(run)


def open_compare(
    config: CompareConfig, reporter: ProgressReporter | None = None, engine: Engine | None = None
) -> Run[CompareConfig]:
    """Check everything that a comparison and its methods need; see `open_run`."""
    own = {"star": StarConfig, "rft": RftConfig, "vstar": VstarConfig, "step_dpo": StepDpoConfig}
    for name, options in own.items():
        check_method_options(name, options, getattr(config, name))
    run = open_run(config, reporter, engine)
    for name in config.methods:
        # The pilot has not run yet. The checks do not depend on the number of completions.
        settings = METHODS[name].settings(run, Pilot(1.0, 1.0, 0), config.budget)
        METHODS[name].open(replace(settings, model=config.model))
    return run


def work(run: Run[CompareConfig]) -> list[tuple[str, str]]:
    """Return what a comparison would do, as (name, value) pairs for a dry run."""
    config = run.config
    return [
        *seed_work(run),
        ("Methods", ", ".join(NAMES[method] for method in config.methods)),
        ("Sampling", f"{config.budget:,} tokens for each method, including those of the seed set"),
        ("Choices", f"{config.candidates} candidates for each of {len(run.test)} test problems, per method"),
    ]  # fmt: skip


def cost(run: Run[CompareConfig]) -> Cost:
    """Return the amounts of work of a comparison, for a dry run."""
    config = run.config
    each = (1 + config.candidates) * len(run.test)
    return seed_cost(run) + Cost(
        completions=PILOT + (1 + len(config.methods)) * each,
        tokens=config.budget * len(config.methods),
        scored=config.candidates * len(run.test) if "vstar" in config.methods else 0,
        without="the methods' own training and measurements, which depend on the completions",
    )


def _sft(run: Run[CompareConfig]) -> Row:
    folder = run.config.out / "sft"
    training = fit(run, seed_examples(run, run.train, folder), folder)
    evaluation = measured(run, str(training.model), "SFT", folder)
    among = _candidates(run, str(training.model), folder)
    return trained_row(run, training, evaluation, **_choices(run, among, None),
                       **{"sampled tokens": _seed_tokens(run)})  # fmt: skip


def _seed_tokens(run: Run[CompareConfig]) -> int:
    store = run.config.out / "sft" / "seed-rollouts.jsonl"
    return tokens_of(read_rollouts(store)) if store.exists() else 0


def _pilot(run: Run[CompareConfig]) -> Pilot:
    """Measure the length of completions, with one completion for each of `PILOT` problems."""
    config = run.config
    model = str(config.out / "sft" / "model")
    problems = draw_problems(run.train, PILOT, "pilot")
    rollouts = sampled(run, model, problems, run.tuned, run.params, config.out / "pilot.jsonl")
    decode = decoder(open_tokenizer(model))
    split, separator = step_endings(_step_config(run), run.task)
    steps = [len(split_steps(one.token_ids or (), decode, split, separator)) for one in rollouts]
    mean = tokens_of(rollouts) / len(rollouts)
    return Pilot(mean, sum(steps) / len(steps), _seed_tokens(run))


# ---------------------------------------------------------------- settings of each method


def _shared(run: Run[CompareConfig], options: type, method: str) -> dict[str, Any]:
    """Return the options of the comparison that a method also has."""
    names = {one.name for one in fields(options)} & {one.name for one in fields(SeededConfig)}
    if BATCHES & set(getattr(run.config, method)):
        names -= BATCHES  # the method's own batch is not mixed with the others' batch
    return {name: getattr(run.config, name) for name in names} | {"out": run.config.out / method}


def _made(options: type[C], values: Mapping[str, Any]) -> C:
    return options(**values)


def _step_config(run: Run[CompareConfig]) -> StepDpoConfig:
    config = run.config
    return _made(
        StepDpoConfig, _shared(run, StepDpoConfig, "step_dpo") | {"n": 16} | config.step_dpo
    )


def star_settings(run: Run[CompareConfig], pilot: Pilot, budget: int) -> StarConfig:
    """Return the settings of STaR, with the budget divided among its iterations (default: 3)."""
    config = run.config
    iterations = config.star.get("iterations", 3)
    rationales = any(problem.rationale is not None for problem in run.train)
    # The factor 1.5 is for rationalization: about half as many tokens again.
    n = max(1, round((budget + pilot.seed_tokens) / (1.5 * iterations * len(run.train) * pilot.tokens)))  # fmt: skip
    options: dict[str, Any] = {
        "iterations": iterations, "patience": iterations, "n": n,
        "temperature": config.temperature if n > 1 else 0.0, "schedule": "epochs",
        "warmup_steps": 0, "validation_problems": 100, "keep_models": "all",
        # Where the task has rationales, the model fine-tuned on them is the base model of STaR.
        "model": str(config.out / "sft" / "model") if rationales else config.model,
        "prompt": ("chat" if run.tuned.as_messages else "bare") if rationales else config.prompt,
    }  # fmt: skip
    shared = _shared(run, StarConfig, "star")
    for name in ("model", "prompt", "temperature", "warmup_steps"):
        shared.pop(name, None)
    return StarConfig(**(shared | options | config.star))


def rft_settings(run: Run[CompareConfig], pilot: Pilot, budget: int) -> RftConfig:
    """Return the settings of RFT, with k from the budget."""
    config = run.config
    k = max(1, round(budget / (len(run.train) * pilot.tokens)))
    return _made(RftConfig, _shared(run, RftConfig, "rft") | {"k": [k]} | config.rft)


def vstar_settings(run: Run[CompareConfig], pilot: Pilot, budget: int) -> VstarConfig:
    """Return the settings of V-STaR, with the budget divided among its iterations (default: 3)."""
    config = run.config
    iterations = config.vstar.get("iterations", 3)
    k = max(2, round(budget / (iterations * len(run.train) * pilot.tokens)))
    own = {"iterations": iterations, "k": k, "candidates": config.candidates}
    return _made(VstarConfig, _shared(run, VstarConfig, "vstar") | own | config.vstar)


def step_dpo_settings(run: Run[CompareConfig], pilot: Pilot, budget: int) -> StepDpoConfig:
    """Return the settings of per-step DPO: a third of the budget for completions, the rest for the
    values of wrong completions."""
    config, step = run.config, _step_config(run)
    completions = budget / (len(run.train) * pilot.tokens)
    n = max(2, step.best_of, round(completions / 3))
    # K * m continuations are sampled from each prefix; on average each is half a completion long.
    each = max(1.0, pilot.steps - 1) * step.best_of * step.repeats / 2
    wrong = max(1, math.floor((completions - n) / each))
    own = {"n": n, "wrong_per_problem": wrong}
    shared = _shared(run, StepDpoConfig, "step_dpo")
    return _made(StepDpoConfig, shared | own | config.step_dpo)


# ---------------------------------------------------------------- one method


def _run_method(
    run: Run[CompareConfig], method: str, config: Any
) -> tuple[Row, Path, Evaluation, int, int]:
    """Return a method's summary, final model and greedy evaluation, and the numbers of tokens that
    it sampled and trained on."""
    run.engine.close()  # the method opens its own engine
    if method == "star":
        summary = run_star(config, run.reporter)
        stores = [*config.out.glob("iteration-*/rollouts.jsonl"), *config.out.glob("iteration-*/rationalized.jsonl")]  # fmt: skip
        drawn = sum(tokens_of(read_rollouts(store)) for store in stores)
        rows = read_rows(config.out / "metrics.jsonl")
        trained = sum(row["training"].get("tokens", 0) for row in rows if "training" in row)
        if Path(config.model) == run.config.out / "sft" / "model":
            trained += read_rows(run.config.out / "metrics.jsonl")[0]["training"]["tokens"]
        best = Evaluation.from_dict(summary["test"]["best"])
        return summary, Path(summary["best model"]), best, drawn, trained
    target = config.out / (f"size-{len(run.train)}/sft" if method == "step_dpo" else "sft")
    shared = [one.name for one in fields(SeededConfig) if one.name != "out"]
    same = all(getattr(config, name) == getattr(run.config, name) for name in shared)
    if same and not target.exists():
        link_tree(run.config.out / "sft", target)
    summary = METHODS[method].run(config, run.reporter)
    rows = summary["rows"]
    final = METHODS[method].final(config)
    row = next(row for row in rows if row["name"] == final)
    drawn = summary["sampled tokens"] + _seed_tokens(run)
    trained = sum(row["training"]["tokens"] for row in rows if "training" in row)
    return summary, Path(summary["best model"]), accuracy_of(row), drawn, trained


def _row(run: Run[CompareConfig], method: str, config: Any) -> Row:
    """Run a method and return its row of the table."""
    summary, model, greedy, drawn, trained = _run_method(run, method, config)
    folder = run.config.out / method
    among = _vstar_candidates(config) if method == "vstar" else None
    among = among or _candidates(run, str(model), folder, _style(run, method, config, summary))
    scored = _vstar_best(config) if method == "vstar" else None
    return {
        "model": str(model), "test": greedy.to_dict(), "sampled tokens": drawn,
        "trained tokens": trained, "minutes": summary["minutes"],
        "budget": _budget(run), "last steps": _last_steps(config.out),
        "settings": {key: value for key, value in asdict(config).items() if key in ("k", "n", "iterations", "wrong_per_problem")},
        **_choices(run, among, scored),
    }  # fmt: skip


def _budget(run: Run[CompareConfig]) -> int:
    """Return the number of tokens that each method may sample."""
    return run.config.budget


def _last_steps(out: Path) -> int:
    """Return the number of optimizer steps of the last training in a method's run."""
    steps = [
        row["training"]["steps"] for row in read_rows(out / "metrics.jsonl") if "training" in row
    ]
    return steps[-1] if steps else 0


def _style(run: Run[CompareConfig], method: str, config: Any, summary: Row) -> PromptStyle:
    """Return the prompt style of a method's final model, the same as in its own evaluation."""
    if method != "star":
        return run.tuned
    style = run.task.styled(
        config.prompt,
        system_prompt=config.system_prompt or "",
        chat_template_kwargs=config.chat_template_kwargs,
    )
    return bare(style) if summary["best"] and not config.prompt_later else style


def _candidates(
    run: Run[CompareConfig], model: str, folder: Path, style: PromptStyle | None = None
) -> Candidates:
    """Return N graded candidates per test problem."""
    config = run.config
    params = replace(run.params, n=config.candidates, seed=config.seed + 500_000)
    store = folder / "candidates.jsonl"
    return candidates_of(sampled(run, model, run.test, style or run.tuned, params, store))


def _vstar_candidates(config: VstarConfig) -> Candidates | None:
    graded = config.out / f"iteration-{config.iterations}" / "candidates.graded.jsonl"
    return candidates_of(read_rollouts(graded)) if graded.exists() else None


def _vstar_best(config: VstarConfig) -> Mapping[str, list[float]]:
    """Return V-STaR's measured chance that the verifier's choice is correct: `[k][problem]`."""
    rows = read_rows(config.out / "metrics.jsonl")
    row = next(row for row in rows if row["name"] == "choices: V-STaR")
    return row["choices"]["best"]


def _choices(
    run: Run[CompareConfig], among: Candidates, best: Mapping[str, list[float]] | None
) -> Row:
    config = run.config
    ks = powers(config.candidates)
    values = {
        "majority": {str(k): share(chosen(among, "majority", k)) for k in ks},
        "pass": {str(k): share(chosen(among, "pass", k)) for k in ks},
    }
    if best is not None:
        values["best"] = {str(k): share(best[str(k)]) for k in ks}
    return {"choices": values}


@dataclass(frozen=True)
class _Method:
    settings: Callable[[Run, Pilot, int], Any]
    run: Callable[[Any, ProgressReporter], Row]
    open: Callable[[Any], Any]
    """Checks everything that a run needs."""
    final: Callable[[Any], str]
    """Returns the name of the row of the result in `metrics.jsonl`."""


METHODS: dict[str, _Method] = {
    "star": _Method(star_settings, run_star, open_star, lambda config: "best"),
    "rft": _Method(rft_settings, run_rft, open_rft, lambda config: f"RFT, k={max(config.k)}"),
    "vstar": _Method(
        vstar_settings, run_vstar, open_vstar, lambda config: f"iteration {config.iterations}"
    ),
    "step_dpo": _Method(
        step_dpo_settings, run_step_dpo, open_step_dpo, lambda config: _final_step_row(config)
    ),
}


def _final_step_row(config: StepDpoConfig) -> str:
    rows = read_rows(config.out / "metrics.jsonl")
    return next(row["name"] for row in reversed(rows) if row.get("method") == "step_dpo")


# ---------------------------------------------------------------- summary


def _finish(run: Run[CompareConfig]) -> Row:
    rows = read_rows(run.config.out / "metrics.jsonl")
    summary = write_summary(run.config.out, {"method": "compare", "rows": rows})
    report(run.config.out)
    return summary

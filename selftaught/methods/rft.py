"""RFT: Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning with Large
Language Models" (arXiv:2308.01825). `run_rft` is its Section 3.3.

    1  pi      <- SFT(rho, D)                     D: the training problems with their rationales
    2  samples <- k completions of pi per problem, at temperature 0.7
    3  keep those with a correct answer and no wrong equation
    4  D'_pi   <- one per ordered list of equations (Algorithm 1)
    5  pool with the kept completions of other models, and deduplicate again
    6  pi_RFT  <- SFT(rho, D with D'_pi)          from the base model, not from pi

Differences from the paper and from the authors' code are listed in docs/methods/rft.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

from selftaught.evaluation.evaluator import accuracy_of
from selftaught.methods.cards import BASE, run_card, trained_from
from selftaught.methods.config import Facts, SeededConfig, distinct_by_of
from selftaught.methods.estimate import Cost
from selftaught.methods.plan import epochs_cost, seed_cost, seed_size, seed_work
from selftaught.methods.run import (
    Run,
    distinct,
    fit,
    flagged_row,
    flagged_seeds,
    measured,
    once,
    open_run,
    reasons_dropped,
    running,
    sampled,
    seed_examples,
    tokens_of,
    trained_row,
    write_options,
    write_summary,
)
from selftaught.option_groups import Auto
from selftaught.records import Example, Rollout, read_rollouts
from selftaught.reports.citations import RFT
from selftaught.reports.model_card import card_text
from selftaught.reports.rft_page import current_name, report
from selftaught.rollouts.grading import grade
from selftaught.rollouts.selection import (
    DistinctBy,
    NothingToLearn,
    draw_as_many,
    keep_at_most,
    keep_correct,
    keep_distinct,
    make_examples,
    solution_path,
)
from selftaught.runs.folder import ProgressReporter, Row, publish, read_rows
from selftaught.samplers import Engine, check_model, check_prompts
from selftaught.training.launch import PLACE


@dataclass(frozen=True)
class RftConfig(SeededConfig):
    """Options of RFT. The defaults are the paper's, except those that are "auto"."""

    heading: ClassVar[str] = "RFT"
    method: ClassVar[str] = "rft"

    out: Path = Path("runs/rft")
    """Run folder. Repeating the same command, also with another `--k`, continues the run."""
    k: list[int] = field(default_factory=lambda: [100])
    """Number of completions per problem. With several numbers, one model is trained for each, all
    from the same stored completions. 100 as in the paper; its sweep is 1 3 6 12 25 50 100 (Table
    5)."""
    generator: str | None = None
    """Model folder to sample from, such as a model trained with STaR. Default: the base model
    fine-tuned on the gold rationales."""
    distinct_by: DistinctBy | Auto = "auto"
    """Criterion by which completions count as duplicates: the same "equations" in the same order
    (Algorithm 1), the same "numbers", the same "text", or a small edit distance ("edits"). "auto":
    "equations", or "text" for a task whose rationales have no plain equations, such as
    arithmetic."""
    edits: float = 0.2
    """With `--distinct-by edits`: the edit distance, as a share of the longer completion's
    characters, up to which two completions are duplicates."""
    skip_gold_class: bool = False
    """Drop completions with the same equations as the problem's gold rationale. The authors' code
    keeps them."""
    pool: list[Path] = field(default_factory=list)
    """Files of graded rollouts of other models to train on as well, such as `rollouts.graded.jsonl`
    of other runs (U13B in the paper, Section 3.3)."""
    baselines: bool = False
    """For the largest k, also train three baselines: on all correct completions (the paper's
    ablation, Table 5), on a random sample of the correct completions, duplicates included, of the
    same size as the distinct ones, and on the gold rationales alone for the same number of
    optimizer steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            (
                "k",
                bool(self.k) and all(k >= 1 for k in self.k),
                "one or more numbers of at least 1",
            ),
            ("edits", 0 <= self.edits < 1, "at least 0 and below 1"),
        )

    tiny_learning_rate: ClassVar[float] = 3e-4

    def resolved(self, facts: Facts) -> Self:
        """Return the options with a value for each that is "auto"; see `MethodConfig.resolved`."""
        return replace(
            super().resolved(facts), distinct_by=distinct_by_of(facts.task, self.distinct_by)
        )

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """Return the settings for a short run of the small model in this package: 4 completions
        per problem instead of 100."""
        return super().small(**({"k": [4]} | changes))


CHANGEABLE = ("out", "k", "baselines", "report_to", *PLACE)
"""Options that may change when a run is continued, because nothing stored depends on them."""


def run_rft(config: RftConfig, reporter: ProgressReporter | None = None) -> Row:
    """Run RFT, or continue a run, and return the summary, which is also written to `summary.json`.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        NothingToLearn: no completion was kept; the message gives the reasons.
        BlockingIOError: another process is running in the folder.
    """
    with running(config, "RFT", reporter) as (reporter, engine):
        run = open_rft(config, reporter, engine)
        pooled = run.read["pooled"]
        write_options(run, CHANGEABLE)
        config = run.config
        gold = seed_examples(run, run.train, config.out / "sft")
        if config.generator is None:
            once(run, "SFT", lambda: _sft(run, gold))
        generator = config.generator or str(config.out / "sft" / "model")
        rollouts = sample_paths(run, generator, max(config.k))
        if not run.kept(rollouts):
            raise NothingToLearn(
                f"None of {len(rollouts)} completions was kept: {reasons_dropped(run, rollouts)}. Try more "
                "completions per problem (--k), easier problems or a stronger model."
            )
        for k in sorted(set(config.k)):
            first = keep_at_most(rollouts, k)
            once(run, f"RFT, k={k}", lambda k=k, first=first: _rft(run, gold, first, pooled, k))
        if config.baselines:
            _baselines(run, gold, rollouts, pooled)
        return _finish(run)


def open_rft(
    config: RftConfig, reporter: ProgressReporter | None = None, engine: Engine | None = None
) -> Run[RftConfig]:
    """Check everything that a run of RFT needs, and read the rollouts of `pool`; see `open_run`."""
    run = open_run(config, reporter, engine)
    if config.generator is not None:
        check_model(config.generator)
        prompts = ((one.id, run.tuned(one)) for one in run.train)
        check_prompts(config.generator, prompts, run.params.max_tokens, config.sampler,
                      config.sampler_options, run.tuned.chat_template_kwargs)  # fmt: skip
    run.read["pooled"] = _pooled(run, config)
    return run


def work(run: Run[RftConfig]) -> list[tuple[str, str]]:
    """Return what a run would do, as (name, value) pairs for a dry run."""
    config, k = run.config, max(run.config.k)
    models = len(set(config.k)) + 3 * config.baselines + (config.generator is None)
    return [
        *seed_work(run),
        ("Sampling", f"{k * len(run.train):,} completions ({k} for each of {len(run.train)} problems), at "
         f"most {run.params.max_tokens} tokens each"),
        ("Models", f"{models} fine-tuned and measured on {len(run.test)} test problems"),
    ]  # fmt: skip


def cost(run: Run[RftConfig]) -> Cost:
    """Return the amounts of work of a run, for a dry run."""
    config, problems = run.config, len(run.train)
    others = seed_size(run, problems) + len(run.read["pooled"])
    models = [epochs_cost(config, others + k * problems) for k in sorted(set(config.k))]
    if config.baselines:
        models += 3 * models[-1:]
    first = Cost() if config.generator else seed_cost(run)
    return first + Cost(
        completions=max(config.k) * problems + len(models) * len(run.test), examples=sum(models)
    )


def sample_paths(run: Run[RftConfig], generator: str, k: int) -> list[Rollout]:
    """Line 2: return k graded completions per training problem.

    Stored completions are reused; only the missing ones are sampled.
    """
    params = replace(run.params, n=k)
    store = run.config.out / "rollouts.jsonl"
    return sampled(run, generator, run.train, run.tuned, params, store)


def distinct_paths(
    run: Run[RftConfig], config: RftConfig, rollouts: Sequence[Rollout]
) -> list[Rollout]:
    """Lines 3 and 4: return correct completions without a wrong equation, one per solution path."""
    found = distinct(run, rollouts, distinct_by_of(run.task, config.distinct_by), config.edits)
    if not config.skip_gold_class:
        return found
    gold = {one.id: solution_path(one.rationale) for one in run.train if one.rationale is not None}
    return [one for one in found if solution_path(one.completion) != gold.get(one.problem.id)]


def _sft(run: Run[RftConfig], gold: Sequence[Example]) -> Row:
    """Line 1: fine-tune the base model on D and measure it."""
    folder = run.config.out / "sft"
    training = fit(run, gold, folder)
    evaluation = measured(run, str(training.model), "SFT", folder)
    return trained_row(run, training, evaluation, **flagged_seeds(run, folder))


def _rft(
    run: Run[RftConfig], gold: Sequence[Example], rollouts: Sequence[Rollout],
    pooled: Sequence[Rollout], k: int,
) -> Row:  # fmt: skip
    """Lines 3 to 6, for the first k completions of every problem."""
    paths = _paths(run, rollouts, pooled)
    return _learned(run, gold, paths, rollouts, f"k-{k}", f"RFT, k={k}", k)


def _paths(
    run: Run[RftConfig], rollouts: Sequence[Rollout], pooled: Sequence[Rollout]
) -> list[Rollout]:
    """Lines 4 and 5: deduplicate the completions of each model, then the pool, as in the paper."""
    config = run.config
    parts = [distinct_paths(run, config, part) for part in (rollouts, *_by_model(pooled))]
    together = [one for part in parts for one in part]
    by = distinct_by_of(run.task, config.distinct_by)
    return keep_distinct(together, by, edits=config.edits)


def _baselines(
    run: Run[RftConfig],
    gold: Sequence[Example],
    rollouts: Sequence[Rollout],
    pooled: Sequence[Rollout],
) -> None:
    """Train the baselines: without lines 4 and 5, on a random sample that may contain duplicates,
    and on D alone for the same number of optimizer steps."""
    config = run.config
    k = max(config.k)
    kept = run.kept([*rollouts, *pooled])
    row = next(
        row for row in read_rows(config.out / "metrics.jsonl") if row["name"] == f"RFT, k={k}"
    )
    drawn = draw_as_many(kept, _paths(run, rollouts, pooled), config.seed)

    def longer() -> Row:
        folder = config.out / f"gold-{k}"
        training = fit(run, gold, folder, max_steps=row["training"]["steps"])
        return trained_row(run, training, measured(run, str(training.model), folder.name, folder))

    every, copies = f"all correct completions, k={k}", f"random sample, k={k}"
    makers: dict[str, Callable[[], Row]] = {
        every: lambda: _learned(run, gold, kept, rollouts, f"all-{k}", every, k),
        copies: lambda: _learned(run, gold, drawn, rollouts, f"random-{k}", copies, k),
        f"D only, steps of k={k}": longer,
    }
    done = {current_name(row["name"]) for row in read_rows(config.out / "metrics.jsonl")}
    for name, make in makers.items():
        if name not in done:
            once(run, name, make)


def _learned(
    run: Run[RftConfig], gold: Sequence[Example], paths: Sequence[Rollout],
    rollouts: Sequence[Rollout], folder: str, name: str, k: int,
) -> Row:  # fmt: skip
    """Line 6 and the evaluation; the row has the counts of the paper's Table 2."""
    out = run.config.out / folder
    training = fit(run, [*gold, *make_examples(paths, run.tuned)], out)
    evaluation = measured(run, str(training.model), name, out)
    problems = len(run.train)
    return trained_row(
        run, training, evaluation, k=k, **flagged_row(run, rollouts),
        **{
            "sampled tokens": tokens_of(rollouts),
            "right per problem": len(keep_correct(rollouts)) / problems,
            "kept per problem": len(run.kept(rollouts)) / problems,
            "distinct per problem": len(paths) / problems,
        },
    )  # fmt: skip


def _by_model(rollouts: Sequence[Rollout]) -> list[list[Rollout]]:
    ordered = sorted(rollouts, key=lambda one: one.model)
    return [list(same) for _, same in groupby(ordered, key=lambda one: one.model)]


def _pooled(run: Run[RftConfig], config: RftConfig) -> list[Rollout]:
    """Return the rollouts of other models on the training problems of this run.

    Rollouts of other problems are dropped, because they are not part of D.
    """
    known = {(problem.question, problem.gold) for problem in run.train}
    pooled = [one for path in config.pool for one in read_rollouts(Path(path))]
    matching = [one for one in pooled if (one.problem.question, one.problem.gold) in known]
    if pooled and not matching:
        raise ValueError(
            f"Expected --pool files with rollouts of the {len(known)} training problems; none of "
            f"the {len(pooled)} rollouts in {', '.join(map(str, config.pool))} is of one of them. "
            "Give rollouts of the same task and problems."
        )
    # The files may have been graded by other rules than those of this run's task.
    return grade(matching, run.task) if matching else []


def _finish(run: Run[RftConfig]) -> Row:
    """Write the summary and the page. The result is the model of the largest k, as in the paper."""
    config = run.config
    rows = read_rows(config.out / "metrics.jsonl")
    best = next(row for row in rows if row["name"] == f"RFT, k={max(config.k)}")
    named = {current_name(row["name"]): row for row in rows}
    lineage = [
        trained_from("SFT", BASE, named["SFT"], "(the seed set)"),
        trained_from("RFT", BASE, best, "(the seed set and completions of SFT)"),
    ]
    card = run_card(run, "RFT", RFT, accuracy_of(best), run.tuned, lineage)
    summary = write_summary(config.out, {
        "method": "rft",
        "rows": rows,
        "best model": publish(config.out / f"k-{max(config.k)}" / "model", config.out / "model", card_text(card)),
        "sampled tokens": best["sampled tokens"],
        "minutes": sum(sum(row["seconds"].values()) for row in rows) / 60,
    })  # fmt: skip
    report(config.out)
    return summary

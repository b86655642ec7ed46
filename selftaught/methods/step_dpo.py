"""Per-step DPO: Setlur et al. 2024, "RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math
Reasoning by Eight-Fold" (arXiv:2406.14532). `run_step_dpo` is its Section 6.

    1  pi_sft <- SFT(base, D)                      D: the training problems with their rationales
    2  S      <- n samples of pi_sft per problem, right and wrong ones apart
    3  for every wrong y^ (8 per problem) and every step i:
    4      Q(y^_1:i) <- the chance that one of K completions of y^_1:i by pi_sft is right
    5      A_i       <- Q(y^_1:i) - Q(y^_1:i-1)                                  Equation 3
    6      c         <- the first pit: the first step with the lowest Q
    7      D_pref    <- D_pref with (x, a right y, y^_1:c)
    8  pi     <- DPO(pi_sft, D_pref)               with pi_sft as the reference

Not to be taken for the "Step-DPO" of Lai et al. 2024 (arXiv:2406.18629), whose first errors GPT-4 names.
The authors released no code. What is unsettled, and what we chose, stands in docs/methods/step_dpo.md.
"""

import hashlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from selftaught import metrics
from selftaught.evaluation.evaluator import graded_beside
from selftaught.methods.run import (
    MethodConfig,
    Row,
    Run,
    accuracy_of,
    distinct,
    fit,
    measured,
    model_card,
    once,
    open_run,
    prefer,
    preference_options,
    sampled,
    seed_examples,
    tokens_of,
    told_apart,
    train_on,
    trained_row,
    trainer_options,
    write_summary,
)
from selftaught.records import (
    Example,
    Preference,
    Problem,
    Rollout,
    read_jsonl,
    read_rollouts,
    write_atomically,
)
from selftaught.rendering import TemplateOptions, prompt_ids
from selftaught.reports.method_page import Figure, Section, Table, method_report, point, shown
from selftaught.reports.step_page import write_step_page
from selftaught.rollouts.selection import (
    DistinctBy,
    NothingToLearn,
    gold_rollouts,
    keep_at_most,
    keep_correct,
    keep_distinct,
    make_examples,
    most_distant,
    preference,
)
from selftaught.rollouts.steps import (
    Chosen,
    PairForm,
    PitRule,
    SplitBy,
    ValuedRollout,
    split_steps,
    step_preferences,
    step_value,
)
from selftaught.rollouts.store import collect
from selftaught.runs.folder import Watch, hold, publish, read_rows, timed, write_config, write_rows
from selftaught.runs.status import reported
from selftaught.samplers import Engine
from selftaught.training import completion_ids, open_tokenizer
from selftaught.training.launch import PLACE

PAPER = "Setlur et al. 2024, arXiv:2406.14532"

Learner = Literal["rft", "dpo", "dpo_edit", "step_dpo", "advantage"]
"""What is learned from the same samples: right ones (RFT), whole pairs at random (plain DPO), whole
pairs of the largest edit distance, pairs at the first pit, or all steps weighted by their advantage."""
NAMES: dict[str, str] = {
    "sft": "SFT", "rft": "RFT", "dpo": "DPO, random pairs", "dpo_edit": "DPO, most distant pairs",
    "step_dpo": "per-step DPO", "advantage": "advantage-weighted",
}  # fmt: skip


@dataclass(frozen=True)
class StepDpoConfig(MethodConfig):
    """Options of per-step DPO; defaults are the paper's where it is known, `small()` is for tiny models."""

    out: Path = Path("runs/step_dpo")
    """Folder of the run; repeating the command continues it."""
    methods: list[Learner] = field(default_factory=lambda: ["step_dpo"])
    """What to learn by, from the same samples: rft, dpo, dpo_edit, step_dpo, advantage; SFT is always
    there."""
    sizes: list[int] = field(default_factory=list)
    """Numbers of training problems, each with all methods; none: all problems."""
    sft_sizes: list[int] = field(default_factory=list)
    """More numbers of problems, with SFT only: the curve against which efficiency is counted."""
    start: Literal["sft", "rft"] = "sft"
    """What DPO starts from and refers to: pi_sft (Section 6), or the RFT model (as Self-Explore,
    arXiv:2404.10346)."""

    n: int = 16
    """Samples per problem."""
    wrong_per_problem: int = 8
    """Wrong ones whose steps are valued (8 negatives per question)."""
    right_per_problem: int = 4
    """For "advantage": right ones whose steps are valued too."""
    best_of: int = 5
    """K: a prefix is worth the chance that one of K completions is right (K=5)."""
    repeats: int = 1
    """m: K times m completions are drawn from every prefix; with 1 a value is 0 or 1."""
    split: SplitBy = "newline"
    """Where a step ends: newline, sentence, numbered, or after --separator."""
    separator: str = ";"
    """For "separator"."""
    distinct_by: DistinctBy = "equations"
    """For "rft": what makes two right completions the same; see RFT."""
    most_steps: int = 20
    """Completions with more steps are not valued (Self-Explore)."""
    rule: PitRule = "lowest_value"
    """The first pit: lowest_value (the paper), lowest_advantage (as its authors tell it later), first_zero
    (Self-Explore)."""
    form: PairForm = "prefix"
    """What a preference holds: a right completion over the wrong one's prefix to the pit (the paper);
    "step": one step over another after a shared prefix (as its Theorem 6.1 wants); "truncated": both sides
    cut after as many steps."""

    beta: float = 0.1
    """Of DPO; not known of the paper, TRL's default."""
    dpo_learning_rate: float = 1e-6
    """Peak learning rate of DPO; not known, TRL's default."""
    dpo_epochs: float = 1.0
    """Passes over the preferences; not known."""
    dpo_max_steps: int = -1
    """Optimizer steps of DPO; -1: dpo_epochs decides."""
    dpo_training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's DPOConfig, such as --dpo_training.label_smoothing 0.1."""
    advantage_beta: float = 1.0
    """For "advantage": a step's loss is weighted by exp(A / beta) (Equation 4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            *((name, getattr(self, name) >= 1, "at least 1")
              for name in ("wrong_per_problem", "right_per_problem", "best_of", "repeats", "most_steps")),
            ("n", self.n >= max(2, self.best_of), f"at least 2 and at least best_of, {self.best_of}"),
            ("methods", bool(self.methods), "one or more of rft, dpo, dpo_edit, step_dpo, advantage"),
            ("sizes", all(size >= 1 for size in (*self.sizes, *self.sft_sizes)), "at least 1 each"),
            ("beta", self.beta > 0 and self.advantage_beta > 0, "above 0"),
        )  # fmt: skip

    @classmethod
    def small(cls, **changes: Any) -> "StepDpoConfig":
        """The settings of models of less than a million parameters, found by measurement (LOG.md)."""
        found: dict[str, Any] = {
            "dpo_learning_rate": 1e-4,
            "split": "separator",
            "distinct_by": "text",
        }
        return super().small(**(found | changes))


CHANGEABLE = ("out", "methods", "sizes", "sft_sizes", *PLACE)
"""Fields a continued run may change: nothing stored depends on them."""


@dataclass(frozen=True)
class Size:
    """One number of training problems, and everything made from them."""

    run: Run
    problems: Sequence[Problem]
    folder: Path

    @property
    def count(self) -> int:
        """How many problems."""
        return len(self.problems)

    @property
    def sft(self) -> str:
        """The folder of pi_sft."""
        return str(self.folder / "sft" / "model")


def run_step_dpo(config: StepDpoConfig, watch: Watch | None = None) -> Row:
    """Run per-step DPO and its ablations, or continue them, and return the summary.

    Raises:
        ValueError: a setting, a problem or a model that cannot be used; says which.
        NothingToLearn: no wrong completion, or none with a pit; says how many there were.
        BlockingIOError: another process runs in the folder.
    """
    with (
        hold(config.out),
        reported(config.out / "status.json", "per-step DPO", watch) as watch,
        Engine(config.sampler, config.sampler_options) as engine,
    ):
        run = open_step_dpo(config, watch, engine)
        write_config(config.out, config.plain(), CHANGEABLE)
        for count in sorted(set(config.sft_sizes) - set(_sizes(run))):
            _sft(_size(run, count))
        for count in _sizes(run):
            size = _size(run, count)
            gold = _sft(size)
            for method in config.methods:
                learn(size, method, gold)
        return _finish(run)


def open_step_dpo(
    config: StepDpoConfig, watch: Watch | None = None, engine: Engine | None = None
) -> Run:
    """Check everything a run of per-step DPO needs; see `open_run`."""
    run = open_run(config, watch, engine, [("dpo", _dpo_options(config))])
    largest = max([*config.sizes, *config.sft_sizes], default=0)
    if largest > len(run.train):
        raise ValueError(
            f"sizes asks for {largest} training problems, and there are {len(run.train)}."
        )
    return run


def _dpo_options(config: StepDpoConfig) -> dict[str, Any]:
    return preference_options(
        config, beta=config.beta, learning_rate=config.dpo_learning_rate, epochs=config.dpo_epochs,
        max_steps=config.dpo_max_steps, more=config.dpo_training,
    )  # fmt: skip


def _sizes(run: Run) -> list[int]:
    config = run.config
    assert isinstance(config, StepDpoConfig)
    return sorted(set(config.sizes)) or [len(run.train)]


def _size(run: Run, count: int) -> Size:
    """The first `count` of the training problems in an order drawn by the seed, so sizes are nested."""
    everything = range(len(run.train))
    drawn = random.Random(f"{run.config.seed} sizes").sample(everything, len(everything))
    problems = [run.train[at] for at in sorted(drawn[:count])]
    return Size(run, problems, run.config.out / f"size-{count}")


def _sft(size: Size) -> list[Example]:
    """Line 1; returns D."""
    folder = size.folder / "sft"
    gold = seed_examples(size.run, size.problems, folder)

    def make() -> Row:
        training = fit(size.run, gold, folder)
        evaluation = measured(size.run, str(training.model), f"SFT, {size.count}", folder)
        return trained_row(size.run, training, evaluation, method="sft", size=size.count)

    once(size.run, f"SFT, {size.count}", make)
    return gold


def learn(size: Size, method: Learner, gold: Sequence[Example]) -> Row:
    """What one method makes of the samples at one size; `metrics.jsonl` keeps the row."""
    config = _config(size)
    folder = size.folder / method
    if config.start == "rft" and method != "rft":
        learn(size, "rft", gold)

    def make() -> Row:
        match method:
            case "rft":
                paths = distinct(size.run, samples(size), config.distinct_by)
                training = fit(size.run, [*gold, *make_examples(paths, size.run.tuned)], folder)
                told = {"told": f"{len(paths):,} distinct right completions"}
            case "advantage":
                training, told = _weighted(size, folder)
            case _:
                training, told = _preferred(size, method, folder)
        name = f"{NAMES[method]}, {size.count}"
        evaluation = measured(size.run, str(training.model), name, folder)
        spent = {"sampled tokens": sampled_tokens(size, method)}
        return trained_row(size.run, training, evaluation, method=method, size=size.count, **told, **spent)  # fmt: skip

    return once(size.run, f"{NAMES[method]}, {size.count}", make)


def _preferred(size: Size, method: Learner, folder: Path) -> tuple[Any, Row]:
    """Line 8, on the pairs of a method."""
    config = _config(size)
    pairs, counts = PAIRS[method](size)
    if not pairs:
        raise NothingToLearn(
            f"{NAMES[method]} found no preference among {counts['wrong']} wrong completions of "
            f"{size.count} problems ({_in_words(counts)}). Try more samples (--n), a higher temperature, "
            "another --split, or harder problems."
        )
    start = size.sft if config.start == "sft" else str(size.folder / "rft" / "model")
    training = prefer(size.run, start, pairs, folder, _dpo_options(config))
    return training, {"pairs": counts, "told": f"{told_apart(training)} ({_in_words(counts)})"}


def _in_words(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{value} {name}" for name, value in counts.items())


def _config(size: Size) -> StepDpoConfig:
    assert isinstance(size.run.config, StepDpoConfig)
    return size.run.config


# ---------------------------------------------------------------- samples and their steps


def samples(size: Size) -> list[Rollout]:
    """Line 2: n graded samples of pi_sft per problem, whose tokens end as a model is taught to end."""
    if (known := size.run.read.get(str(size.folder))) is not None:
        return known
    params = replace(size.run.params, n=_config(size).n)
    rollouts = sampled(size.run, size.sft, size.problems, size.run.tuned, params, size.folder / "rollouts.jsonl")  # fmt: skip
    tokenizer = open_tokenizer(size.sft)
    ended = [replace(one, token_ids=completion_ids(one, tokenizer)) for one in rollouts]
    return size.run.read.setdefault(str(size.folder), ended)


def chosen_wrong(size: Size) -> list[Rollout]:
    """The wrong completions to learn from: the first of each problem, no text twice.

    Those cut by length are left out: where they went wrong is not the question.

    Raises:
        NothingToLearn: there is none, or no problem with both kinds.
    """
    config = _config(size)
    everything = samples(size)
    right = {one.problem.id for one in keep_correct(everything)}
    wrong = [one for one in everything if one.outcome in ("wrong", "no answer")]
    if not wrong:
        raise NothingToLearn(
            f"None of {len(everything)} completions of {size.count} problems was wrong, so there is no "
            "preference to learn. Try a higher temperature or harder problems."
        )
    usable = keep_distinct(one for one in wrong if one.problem.id in right)
    if not usable:
        raise NothingToLearn(
            f"None of the {len({one.problem.id for one in wrong})} problems with a wrong completion has "
            f"a right one ({len(right)} problems have). Try more samples (--n) or easier problems."
        )
    return keep_at_most(usable, config.wrong_per_problem)


def valued(size: Size, rollouts: Sequence[Rollout], name: str) -> list[ValuedRollout]:
    """Lines 3 to 5: every prefix of the rollouts sampled on from, and what it is worth.

    A prefix that several rollouts share is sampled once. The empty one needs no sampling: the problem's
    own samples are its completions. The last one, the whole, is worth what the rollout is.
    """
    config = _config(size)
    tokenizer = open_tokenizer(size.sft)
    decode = decoder(tokenizer)
    steps = [
        split_steps(one.token_ids or (), decode, config.split, config.separator) for one in rollouts
    ]
    short = [
        (one, ends)
        for one, ends in zip(rollouts, steps, strict=True)
        if len(ends) <= config.most_steps
    ]
    prefixes = {
        prefix_id(one.problem.id, (one.token_ids or ())[:end]): (one.problem, (one.token_ids or ())[:end])
        for one, ends in short
        for end in ends[:-1]
    }  # fmt: skip
    counts = _continued(size, prefixes, name)
    empty = _counts_of_samples(size)
    made = [_valued(config, one, ends, counts, empty[one.problem.id]) for one, ends in short]
    lines = [json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in made]
    write_atomically(size.folder / f"{name}.values.jsonl", "".join(lines))
    return made


def prefix_id(problem: str, ids: Sequence[int]) -> str:
    """The name of a prefix of a problem's completion among all prefixes."""
    return f"{problem} | {hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:12]}"


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Token ids as text, special tokens left out."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    return decode


def _continued(
    size: Size, prefixes: Mapping[str, tuple[Problem, tuple[int, ...]]], name: str
) -> dict[str, tuple[int, int]]:
    """Line 4: (right, n) of the completions of every prefix, which a store keeps."""
    config, run = _config(size), size.run
    if not prefixes:
        return {}
    problems = [replace(problem, id=key, rationale=None) for key, (problem, _) in prefixes.items()]
    begun = [ids for _, ids in prefixes.values()]
    params = replace(run.params, n=config.best_of * config.repeats, seed=config.seed + 1)
    store = size.folder / f"{name}.jsonl"
    with timed(run.seconds, "sample"):
        sampler, count = run.engine.of(size.sft), len(problems) * params.n
        with run.watch.progress(f"{size.folder.name}: {name}", count) as advance:
            rollouts = collect(sampler, problems, run.tuned, params, store=store, begun=begun, progress=advance)  # fmt: skip
    with timed(run.seconds, "grade"):
        graded = graded_beside(store, rollouts, run.task)
    counts: dict[str, tuple[int, int]] = {}
    for one in graded:
        right, n = counts.get(one.problem.id, (0, 0))
        counts[one.problem.id] = right + bool(one.correct), n + 1
    return counts


def _counts_of_samples(size: Size) -> dict[str, tuple[int, int]]:
    """(right, n) of the problems' own samples: the completions of the empty prefix."""
    counts: dict[str, tuple[int, int]] = {}
    for one in samples(size):
        right, n = counts.get(one.problem.id, (0, 0))
        counts[one.problem.id] = right + bool(one.correct), n + 1
    return counts


def _valued(
    config: StepDpoConfig, rollout: Rollout, ends: Sequence[int],
    counts: Mapping[str, tuple[int, int]], empty: tuple[int, int],
) -> ValuedRollout:  # fmt: skip
    ids = rollout.token_ids or ()
    found = [empty, *(counts[prefix_id(rollout.problem.id, ids[:end])] for end in ends[:-1])]
    values = [step_value(right, n, config.best_of) for right, n in found]
    return ValuedRollout(
        rollout, tuple(ends), (*values, float(bool(rollout.correct))), (*found, (0, 0))
    )


# ---------------------------------------------------------------- pairs


def random_pairs(size: Size) -> tuple[list[Preference], Row]:
    """Plain DPO: every wrong completion under a right one of its problem, drawn by the seed."""
    right, wrong = _right_by_problem(size), chosen_wrong(size)
    pairs = [
        preference(size.run.tuned, _drawn(size, one, right[one.problem.id]), one, _ids) for one in wrong
    ]  # fmt: skip
    return pairs, {"wrong": len(wrong), "pairs": len(pairs)}


def distant_pairs(size: Size) -> tuple[list[Preference], Row]:
    """Plain DPO on the pairs that differ most: every wrong completion under the right one of its
    problem with the largest edit distance (as Pal et al. 2024, arXiv:2402.13228, in the paper's Figure 7)."""
    right, wrong = _right_by_problem(size), chosen_wrong(size)
    pairs = []
    for one in wrong:
        far = most_distant(right[one.problem.id], one)
        pairs.append(preference(size.run.tuned, far, one, _ids))
    return pairs, {"wrong": len(wrong), "pairs": len(pairs)}


def step_pairs(size: Size) -> tuple[list[Preference], Row]:
    """Lines 6 and 7: every wrong completion, cut after its first pit, under a right one."""
    config = _config(size)
    tokenizer = open_tokenizer(size.sft)
    decode = decoder(tokenizer)
    wrong = chosen_wrong(size)
    found = valued(size, wrong, "continuations")
    right = _right_by_problem(size)
    onward = _right_continuations(size) if config.form == "step" else {}
    pairs: list[Preference] = []
    pits = []
    for one in found:
        pit = one.pit(config.rule)
        if pit is None:
            continue
        pits.append(pit)
        if config.form == "step":
            key = prefix_id(one.rollout.problem.id, one.prefix(pit))
            others = right[one.rollout.problem.id] if pit == 0 else onward.get(key, [])
            before = len(one.prefix(pit))
        else:
            others, before = right[one.rollout.problem.id], 0
        if others:
            chosen = _chosen(config, _drawn(size, one.rollout, others), before, decode)
            made = step_preferences(one, rule=config.rule, form=config.form, chosen=[chosen],
                                    decode=decode, end=chosen.token_ids[-1])  # fmt: skip
            options = size.run.tuned.chat_template_kwargs or None
            pairs += [replace(pair, chat_template_kwargs=options) for pair in made]
    mean = f"{sum(pits) / len(pits) + 1:.1f}" if pits else "none"
    return pairs, {"wrong": len(wrong), "valued": len(found), "with a pit": len(pits),
                   "pairs": len(pairs), "mean step of the pit": mean}  # fmt: skip


PAIRS: dict[str, Callable[[Size], tuple[list[Preference], Row]]] = {
    "dpo": random_pairs, "dpo_edit": distant_pairs, "step_dpo": step_pairs,
}  # fmt: skip


def _ids(rollout: Rollout) -> tuple[int, ...]:
    return rollout.token_ids or ()


def _right_by_problem(size: Size) -> dict[str, list[Rollout]]:
    """The distinct right samples of every problem, and its own rationale."""
    tokenizer = open_tokenizer(size.sft)
    gold = [replace(one, token_ids=completion_ids(one, tokenizer)) for one in gold_rollouts(size.problems, size.run.tuned)]  # fmt: skip
    right: dict[str, list[Rollout]] = {}
    for one in keep_distinct([*size.run.kept(samples(size)), *gold]):
        right.setdefault(one.problem.id, []).append(one)
    for one in keep_correct(
        samples(size)
    ):  # right ones with a wrong equation, where there is no other
        right.setdefault(one.problem.id, [one])
    return right


def _drawn_on(size: Size) -> list[Rollout]:
    """All graded continuations; none where no completion has a second step."""
    graded = size.folder / "continuations.graded.jsonl"
    return read_rollouts(graded) if graded.exists() else []


def _right_continuations(size: Size) -> dict[str, list[Rollout]]:
    """The right completions of every prefix."""
    tokenizer = open_tokenizer(size.sft)
    found: dict[str, list[Rollout]] = {}
    for one in keep_correct(_drawn_on(size)):
        ended = replace(one, token_ids=completion_ids(one, tokenizer))
        found.setdefault(one.problem.id, []).append(ended)
    return found


def _chosen(
    config: StepDpoConfig, rollout: Rollout, before: int, decode: Callable[[Sequence[int]], str]
) -> Chosen:
    """What follows a completion's first `before` tokens, and where its steps end."""
    ids = rollout.token_ids or ()
    ends = split_steps(ids, decode, config.split, config.separator)
    return Chosen(tuple(ids[before:]), tuple(end - before for end in ends if end > before))


def _drawn(size: Size, wrong: Rollout, among: Sequence[Rollout]) -> Rollout:
    """One of several right completions; the seed and the wrong one decide."""
    draw = random.Random(f"{_config(size).seed} {wrong.problem.id} {wrong.index}")
    return draw.choice(list(among))


# ---------------------------------------------------------------- weighted by advantage


def _weighted(size: Size, folder: Path) -> tuple[Any, Row]:
    """Equation 4: pi_sft learns all samples, a step as much as exp(A / beta) says."""
    config, run = _config(size), size.run
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
    return training, {"told": f"{len(both):,} completions"}


def weighted_row(
    one: ValuedRollout, tokenizer: Any, prompt: Any, beta: float,
    options: TemplateOptions | None = None,
) -> Row:  # fmt: skip
    """A completion whose tokens' losses weigh exp(A / beta) of their step."""
    head = prompt_ids(tokenizer, prompt, options)
    weights = [
        math.exp(gain / beta)
        for index, gain in enumerate(one.advantages)
        for _ in one.step(index)
    ]  # fmt: skip
    ids = list(one.token_ids)
    return {"input_ids": [*head, *ids], "labels": [-100] * len(head) + ids,
            "weights": [0.0] * len(head) + weights}  # fmt: skip


# ---------------------------------------------------------------- the end


def sampled_tokens(size: Size, method: str) -> int:
    """What a method's samples cost: those of line 2, and new tokens of the continuations it uses."""
    total = tokens_of(samples(size))
    used = {"step_dpo": ["continuations"], "advantage": ["continuations", "continuations-right"]}
    for name in used.get(method, []):
        store = size.folder / f"{name}.graded.jsonl"
        if store.exists():
            total += tokens_of(read_rollouts(store)) - _begun_tokens(size, name)
    return total


def _begun_tokens(size: Size, name: str) -> int:
    """The tokens that the continuations were begun with."""
    config = _config(size)
    lengths: dict[str, int] = {}
    for row in read_jsonl(size.folder / f"{name}.values.jsonl"):
        one = ValuedRollout.from_dict(row)
        for end in one.ends[:-1]:
            lengths[prefix_id(one.rollout.problem.id, one.token_ids[:end])] = end
    return sum(lengths.values()) * config.best_of * config.repeats


def _finish(run: Run) -> Row:
    config = run.config
    assert isinstance(config, StepDpoConfig)
    rows = read_rows(config.out / "metrics.jsonl")
    size = _size(run, max(_sizes(run)))
    method = "step_dpo" if "step_dpo" in config.methods else config.methods[-1]
    best = next(row for row in rows if row["name"] == f"{NAMES[method]}, {size.count}")
    if (size.folder / "continuations.values.jsonl").exists():
        step_page(size)
    card = model_card(run, NAMES[method], PAPER, accuracy_of(best))
    summary = write_summary(config.out, {
        "method": "step_dpo",
        "best model": publish(size.folder / method / "model", config.out / "model", card),
        "rows": rows,
        "sampled tokens": best.get("sampled tokens", 0),
        "minutes": sum(sum(row["seconds"].values()) for row in rows) / 60,
    })  # fmt: skip
    report(config.out)
    return summary


def step_page(size: Size) -> Path:
    """The page of steps, beside the run's report."""
    config = _config(size)
    found = [ValuedRollout.from_dict(row) for row in read_jsonl(size.folder / "continuations.values.jsonl")]  # fmt: skip
    decode = decoder(open_tokenizer(size.sft))
    drawn: dict[str, list[Rollout]] = {}
    for one in _drawn_on(size):
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


def report(out: Path) -> Path:
    """Write `report.html` and `report.md` of a run, also while it runs; returns the page."""
    rows = [row for row in read_rows(out / "metrics.jsonl") if "test" in row]
    by_method: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["size"]):
        by_method.setdefault(row["method"], []).append(row)
    lines = [
        (NAMES[method], [row["size"] for row in found], [_error(row) for row in found])
        for method, found in by_method.items()
    ]
    head = ["problems", "method", "test, greedy", "pairs or examples", "tokens trained", "tokens sampled", "SFT needs"]  # fmt: skip
    body = [
        [str(row["size"]), NAMES[row["method"]], shown(accuracy_of(row)), f"{row['training']['trained on']:,}",
         f"{row['training']['tokens']:,}", f"{row.get('sampled tokens', 0):,}", efficiency_shown(out, row, by_method.get("sft", []))]
        for row in sorted(rows, key=lambda row: (row["size"], list(NAMES).index(row["method"])))
    ]  # fmt: skip
    words = (
        "All methods learn from the same samples of the same SFT model. \u201cSFT needs\u201d is how many "
        "times the problems SFT would need for the same error, read off its own curve; its 95% interval "
        "draws the test problems anew. Beyond: SFT was not as good at any size measured."
    )
    link = ("The steps, their values and pits", "steps.html") if (out / "steps.html").exists() else None  # fmt: skip
    section = Section(
        "Error against the number of problems", words,
        [Table(head, body)], [Figure("Test error", lines, "training problems")] if lines else [], link,
    )  # fmt: skip
    best = next((row for row in reversed(rows) if row["method"] == "step_dpo"), None)
    lead = f"Per-step DPO reaches {shown(accuracy_of(best))} on {best['size']} problems." if best else "Nothing is measured yet."  # fmt: skip
    return method_report(out, "per-step DPO", lead, [section])


def _error(row: Row) -> tuple[float, float, float]:
    at, low, high = point(accuracy_of(row))
    return 1 - at, 1 - high, 1 - low


def efficiency_shown(out: Path, row: Row, sft: Sequence[Row]) -> str:
    """How many times a row's problems SFT would need for its error, with the interval, in words."""
    if row["method"] == "sft" or len(sft) < 2:
        return "-"
    curve = [(each["size"], _verdicts(out, each)) for each in sft]
    own = _verdicts(out, row)
    ratio, low, high = metrics.efficiency(curve, row["size"], own)

    def told(value: float) -> str:
        return "beyond" if math.isinf(value) else f"{value:.1f}\u00d7"

    return f"{told(ratio)} [{told(low)}, {told(high)}]"


def _verdicts(out: Path, row: Row) -> list[bool]:
    """Right or not, by test problem, in their order."""
    folder = out / f"size-{row['size']}" / row["method"]
    return [bool(one.correct) for one in read_rollouts(folder / "test.graded.jsonl")]

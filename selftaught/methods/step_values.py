"""Monte-Carlo values of steps, and preference pairs (arXiv:2406.14532, Section 4)."""

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from selftaught.methods.config import Facts, SeededConfig, at_least, distinct_by_of
from selftaught.methods.run import Run, sampled, tokens_of
from selftaught.option_groups import Auto
from selftaught.records import (
    Preference,
    Problem,
    Rollout,
    read_jsonl,
    read_rollouts,
    write_atomically,
)
from selftaught.rollouts.graded import graded_beside
from selftaught.rollouts.selection import (
    DistinctBy,
    NothingToLearn,
    gold_rollouts,
    keep_at_most,
    keep_correct,
    keep_distinct,
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
from selftaught.runs.folder import Row, timed
from selftaught.tasks import Task
from selftaught.training import completion_ids, open_tokenizer

Learner = Literal["rft", "dpo", "dpo_edit", "step_dpo", "advantage"]
"""Training methods on the same samples.

- "rft": fine-tuning on the correct completions.
- "dpo": DPO on random pairs of whole completions.
- "dpo_edit": DPO on the pairs of whole completions with the largest edit distance.
- "step_dpo": DPO on pairs at the first pit.
- "advantage": fine-tuning on all steps, weighted by their advantage.
"""


@dataclass(frozen=True)
class StepDpoConfig(SeededConfig):
    """Options of per-step DPO. The defaults are the paper's where they are known, except those that
    are "auto"."""

    heading: ClassVar[str] = "per-step DPO"
    method: ClassVar[str] = "step-dpo"

    out: Path = Path("runs/step_dpo")
    """Run folder. Repeating the same command continues the run."""
    methods: list[Learner] = field(default_factory=lambda: ["step_dpo"])
    """Training methods to compare on the same samples: "rft" (fine-tuning on correct completions),
    "dpo" (random pairs), "dpo_edit" (pairs with the largest edit distance), "step_dpo" (pairs at
    the first pit), "advantage" (all steps, weighted by their advantage). SFT is always measured."""
    sizes: list[int] = field(default_factory=list)
    """Numbers of training problems; all methods are run at each. Default: all problems."""
    sft_sizes: list[int] = field(default_factory=list)
    """Additional numbers of training problems that are run with SFT only, to compute data
    efficiency."""
    start: Literal["sft", "rft"] = "sft"
    """Initial and reference model of DPO: "sft" (pi_sft, Section 6) or "rft" (the RFT model, as in
    Self-Explore, arXiv:2404.10346)."""

    n: int = 16
    """Number of completions per problem."""
    wrong_per_problem: int = 8
    """Maximum number of wrong completions per problem whose steps are valued; 8 negatives per
    question in the paper."""
    right_per_problem: int = 4
    """With the method "advantage": maximum number of correct completions per problem whose steps
    are valued."""
    best_of: int = 5
    """K: the value of a prefix is the probability that one of K continuations is correct; 5 in the
    paper."""
    repeats: int = 1
    """m: K * m continuations are sampled from every prefix. With 1, a value is 0 or 1."""
    split: SplitBy | Auto = "auto"
    """Where a step ends: at a "newline", after a "sentence", before a "numbered" line, or after
    each `--separator` ("separator"). "auto": "newline", or "separator" for a task whose steps end with
    a text of their own, such as arithmetic."""
    separator: str = ";"
    """Text that ends a step. Used with `--split separator`."""
    distinct_by: DistinctBy | Auto = "auto"
    """With the method "rft": criterion by which correct completions count as duplicates; see
    `selftaught rft --help`."""
    most_steps: int = 20
    """Maximum number of steps of a completion. Longer completions are not valued (as in
    Self-Explore)."""
    rule: PitRule = "lowest_value"
    """Rule that finds the first pit, the step at which a completion goes wrong: "lowest_value" (the
    paper), "lowest_advantage" (a later paper of its authors, arXiv:2410.08146) or "first_zero"
    (Self-Explore)."""
    form: PairForm = "prefix"
    """Form of a preference pair: "prefix" (a correct completion over the wrong one's prefix up to
    the pit; the paper), "step" (a single step over the pit, after a shared prefix; the assumption
    of Theorem 6.1) or "truncated" (both sides truncated after the same number of steps)."""

    beta: float = 0.1
    """Beta of DPO. The paper's value is not known; TRL's default."""
    dpo_learning_rate: float | Auto = "auto"
    """Peak learning rate of DPO. The paper's value is not known. "auto": a tenth of the learning rate
    by the size of the model."""
    dpo_epochs: float = 1.0
    """Number of passes over the preference pairs. The paper's value is not known."""
    dpo_max_steps: int = -1
    """Number of optimizer steps of DPO. -1: `dpo_epochs` decides."""
    dpo_training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's `DPOConfig`, such as `--dpo-training.label_smoothing 0.1`."""
    advantage_beta: float = 1.0
    """With the method "advantage": beta in the weight exp(A / beta) of a step's loss (Equation
    4)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            *((name, getattr(self, name) >= 1, "at least 1")
              for name in ("wrong_per_problem", "right_per_problem", "best_of", "repeats", "most_steps")),
            ("n", self.n >= max(2, self.best_of), f"at least 2 and at least best_of, {self.best_of}"),
            ("methods", bool(self.methods), "one or more of rft, dpo, dpo_edit, step_dpo, advantage"),
            ("sizes", all(size >= 1 for size in (*self.sizes, *self.sft_sizes)), "at least 1 each"),
            ("dpo_learning_rate", at_least(self.dpo_learning_rate, above=0), "above 0"),
            ("beta", self.beta > 0 and self.advantage_beta > 0, "above 0"),
        )  # fmt: skip

    def resolved(self, facts: Facts) -> Self:
        """Return the options with a value for each that is "auto"; see `MethodConfig.resolved`."""
        split, separator = step_endings(self, facts.task)
        return replace(
            super().resolved(facts), split=split, separator=separator,
            distinct_by=distinct_by_of(facts.task, self.distinct_by),
            dpo_learning_rate=self.preference_rate(self.dpo_learning_rate, facts),
        )  # fmt: skip


def step_endings(config: StepDpoConfig, task: Task) -> tuple[SplitBy, str]:
    """Return where a step ends, and the separator: as given, or by the task's rationales."""
    if config.split != "auto":
        return config.split, config.separator
    if task.step_separator == "\n":
        return "newline", config.separator
    return "separator", task.step_separator


@dataclass(frozen=True)
class StepSize:
    """A number of training problems, with the folder of everything that is made from them."""

    run: Run[StepDpoConfig]
    problems: Sequence[Problem]
    folder: Path

    @property
    def count(self) -> int:
        """Number of problems."""
        return len(self.problems)

    @property
    def sft(self) -> str:
        """Model folder of pi_sft."""
        return str(self.folder / "sft" / "model")


def config_of(size: StepSize) -> StepDpoConfig:
    return size.run.config


def samples(size: StepSize) -> list[Rollout]:
    """Line 2: return n graded completions of pi_sft per problem.

    Their token ids end with the end token that fine-tuning teaches.
    """
    if (known := size.run.read.get(str(size.folder))) is not None:
        return known
    params = replace(size.run.params, n=config_of(size).n)
    rollouts = sampled(size.run, size.sft, size.problems, size.run.tuned, params, size.folder / "rollouts.jsonl")  # fmt: skip
    tokenizer = open_tokenizer(size.sft)
    ended = [replace(one, token_ids=completion_ids(one, tokenizer)) for one in rollouts]
    return size.run.read.setdefault(str(size.folder), ended)


def chosen_wrong(size: StepSize) -> list[Rollout]:
    """Return the wrong completions to learn from: the first distinct ones of each problem.

    Completions cut by the token limit are excluded, because no step of them has to be wrong.

    Raises:
        NothingToLearn: there is no wrong completion, or no problem has both a correct and a wrong
            one.
    """
    config = config_of(size)
    everything = size.run.unflagged(samples(size))
    right = {one.problem.id for one in keep_correct(everything)}
    wrong = [one for one in everything if one.outcome in ("wrong", "no answer")]
    if not wrong:
        raise NothingToLearn(
            f"None of {len(everything)} completions of {size.count} problems is wrong, so there is "
            "no preference pair to learn from. Try a higher --temperature or harder problems."
        )
    usable = keep_distinct(one for one in wrong if one.problem.id in right)
    if not usable:
        raise NothingToLearn(
            f"None of the {len({one.problem.id for one in wrong})} problems with a wrong completion has "
            f"a correct one ({len(right)} problems have). Try more completions per problem (--n) "
            "or easier problems."
        )
    return keep_at_most(usable, config.wrong_per_problem)


def valued(size: StepSize, rollouts: Sequence[Rollout], name: str) -> list[ValuedRollout]:
    """Lines 3 to 5: sample continuations of every prefix of the rollouts, and return the values.

    A prefix that several rollouts share is sampled once. The empty prefix needs no sampling,
    because the problem's own completions continue it. The value of the whole completion is 1 if it
    is correct, else 0.

    Args:
        name: stem of the files with the continuations (`{name}.jsonl`) and values
            (`{name}.values.jsonl`).
    """
    config = config_of(size)
    tokenizer = open_tokenizer(size.sft)
    decode = decoder(tokenizer)
    split, separator = step_endings(config, size.run.task)
    steps = [split_steps(one.token_ids or (), decode, split, separator) for one in rollouts]
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
    """Return an identifier of a prefix of a problem's completion."""
    return f"{problem} | {hashlib.sha256(repr(tuple(ids)).encode()).hexdigest()[:12]}"


def decoder(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Return a function that decodes token ids and skips special tokens."""

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(
            list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    return decode


def _continued(
    size: StepSize, prefixes: Mapping[str, tuple[Problem, tuple[int, ...]]], name: str
) -> dict[str, tuple[int, int]]:
    """Line 4: sample and store continuations; return (correct, n) for every prefix."""
    config, run = config_of(size), size.run
    if not prefixes:
        return {}
    problems = [replace(problem, id=key, rationale=None) for key, (problem, _) in prefixes.items()]
    prefix_tokens = [ids for _, ids in prefixes.values()]
    params = replace(run.params, n=config.best_of * config.repeats, seed=config.seed + 1)
    store = size.folder / f"{name}.jsonl"
    with timed(run.seconds, "sample"):
        sampler, count = run.engine.of(size.sft), len(problems) * params.n
        with run.reporter.progress(f"{size.folder.name}: {name}", count) as advance:
            rollouts = collect(sampler, problems, run.tuned, params, store=store, prefix_tokens=prefix_tokens, progress=advance)  # fmt: skip
    with timed(run.seconds, "grade"):
        graded = graded_beside(store, rollouts, run.task)
    counts: dict[str, tuple[int, int]] = {}
    for one in graded:
        right, n = counts.get(one.problem.id, (0, 0))
        counts[one.problem.id] = right + bool(one.correct), n + 1
    return counts


def _counts_of_samples(size: StepSize) -> dict[str, tuple[int, int]]:
    """Return (correct, n) of the problems' own completions, which continue the empty prefix."""
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


def random_pairs(size: StepSize) -> tuple[list[Preference], Row]:
    """Plain DPO: pair every wrong completion with a random correct one of its problem."""
    right, wrong = _right_by_problem(size), chosen_wrong(size)
    pairs = [
        preference(size.run.tuned, _drawn(size, one, right[one.problem.id]), one, _ids) for one in wrong
    ]  # fmt: skip
    return pairs, {"wrong": len(wrong), "pairs": len(pairs)}


def distant_pairs(size: StepSize) -> tuple[list[Preference], Row]:
    """Plain DPO on the pairs that differ most: pair every wrong completion with the correct one of
    its problem that has the largest edit distance (Pal et al. 2024, arXiv:2402.13228; Figure 7 of
    the paper)."""
    right, wrong = _right_by_problem(size), chosen_wrong(size)
    pairs = []
    for one in wrong:
        far = most_distant(right[one.problem.id], one)
        pairs.append(preference(size.run.tuned, far, one, _ids))
    return pairs, {"wrong": len(wrong), "pairs": len(pairs)}


def step_pairs(size: StepSize) -> tuple[list[Preference], Row]:
    """Lines 6 and 7: pair wrong completions, truncated after the first pit, with correct ones."""
    config = config_of(size)
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
            chosen = _chosen(size, _drawn(size, one.rollout, others), before, decode)
            made = step_preferences(one, rule=config.rule, form=config.form, chosen=[chosen],
                                    decode=decode, end=chosen.token_ids[-1])  # fmt: skip
            options = size.run.tuned.chat_template_kwargs or None
            pairs += [replace(pair, chat_template_kwargs=options) for pair in made]
    mean = f"{sum(pits) / len(pits) + 1:.1f}" if pits else "none"
    return pairs, {"wrong": len(wrong), "valued": len(found), "with a pit": len(pits),
                   "pairs": len(pairs), "mean step of the pit": mean}  # fmt: skip


PAIRS: dict[str, Callable[[StepSize], tuple[list[Preference], Row]]] = {
    "dpo": random_pairs, "dpo_edit": distant_pairs, "step_dpo": step_pairs,
}  # fmt: skip


def _ids(rollout: Rollout) -> tuple[int, ...]:
    return rollout.token_ids or ()


def _right_by_problem(size: StepSize) -> dict[str, list[Rollout]]:
    """Return the distinct correct completions of every problem, including its gold rationale."""
    tokenizer = open_tokenizer(size.sft)
    gold = [replace(one, token_ids=completion_ids(one, tokenizer)) for one in gold_rollouts(size.problems, size.run.tuned)]  # fmt: skip
    right: dict[str, list[Rollout]] = {}
    for one in keep_distinct([*size.run.kept(samples(size)), *gold]):
        right.setdefault(one.problem.id, []).append(one)
    # A correct completion with a wrong equation is used only if its problem has no other.
    for one in keep_correct(size.run.unflagged(samples(size))):
        right.setdefault(one.problem.id, [one])
    return right


def rollouts_drawn_from(size: StepSize) -> list[Rollout]:
    """Return all graded continuations; empty if no completion has a second step."""
    graded = size.folder / "continuations.graded.jsonl"
    return read_rollouts(graded) if graded.exists() else []


def _right_continuations(size: StepSize) -> dict[str, list[Rollout]]:
    """Return the correct continuations by prefix; see `prefix_id`."""
    tokenizer = open_tokenizer(size.sft)
    found: dict[str, list[Rollout]] = {}
    for one in keep_correct(size.run.unflagged(rollouts_drawn_from(size))):
        ended = replace(one, token_ids=completion_ids(one, tokenizer))
        found.setdefault(one.problem.id, []).append(ended)
    return found


def _chosen(
    size: StepSize, rollout: Rollout, before: int, decode: Callable[[Sequence[int]], str]
) -> Chosen:
    """Return a completion without its first `before` tokens, with the ends of its steps."""
    ids = rollout.token_ids or ()
    ends = split_steps(ids, decode, *step_endings(config_of(size), size.run.task))
    return Chosen(tuple(ids[before:]), tuple(end - before for end in ends if end > before))


def _drawn(size: StepSize, wrong: Rollout, among: Sequence[Rollout]) -> Rollout:
    """Draw one of several correct completions, by the seed and the wrong completion."""
    draw = random.Random(f"{config_of(size).seed} {wrong.problem.id} {wrong.index}")
    return draw.choice(list(among))


def sampled_tokens(size: StepSize, method: str) -> int:
    """Return the number of tokens sampled for a method: the completions of line 2, and the new
    tokens of the continuations that the method uses."""
    total = tokens_of(samples(size))
    used = {"step_dpo": ["continuations"], "advantage": ["continuations", "continuations-right"]}
    for name in used.get(method, []):
        store = size.folder / f"{name}.graded.jsonl"
        if store.exists():
            total += tokens_of(read_rollouts(store)) - _prefix_token_count(size, name)
    return total


def _prefix_token_count(size: StepSize, name: str) -> int:
    """Return the number of prefix tokens in the continuations, which were not sampled."""
    config = config_of(size)
    lengths: dict[str, int] = {}
    for row in read_jsonl(size.folder / f"{name}.values.jsonl"):
        one = ValuedRollout.from_dict(row)
        for end in one.ends[:-1]:
            lengths[prefix_id(one.rollout.problem.id, one.token_ids[:end])] = end
    return sum(lengths.values()) * config.best_of * config.repeats

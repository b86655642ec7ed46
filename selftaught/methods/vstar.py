"""V-STaR: Hosseini et al. 2024, "V-STaR: Training Verifiers for Self-Taught Reasoners"
(arXiv:2402.06457). `run_vstar` is its Algorithm 1.

    1  D_GEN <- D_SFT, D_VER <- D_SFT labeled correct;  G_SFT <- SFT(G_base, D_SFT)
    2  for t in 1..T:
    3      G      <- SFT(G_base, D_GEN)           from the base model, every time
    4      S      <- k completions of G per problem
    5      D_GEN  <- D_GEN with the correct completions of S
    6      D_VER  <- D_VER with all completions of S
    7  D_pref <- every (correct, wrong) pair of completions of a problem in D_VER
    8  V      <- DPO(G_SFT, D_pref)               with G_SFT as the reference model
    9  G^T    <- SFT(G_base, D_GEN);  at test time: the candidate of G^T with the highest score of V

Differences from the paper are listed in docs/methods/vstar.md.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from selftaught.evaluation.candidates import (
    Candidates,
    Choice,
    candidates_of,
    chosen,
    powers,
    share,
)
from selftaught.evaluation.evaluator import accuracy_of
from selftaught.methods.cards import BASE, run_card, trained_from
from selftaught.methods.config import Facts, SeededConfig, at_least
from selftaught.methods.estimate import Cost
from selftaught.methods.plan import (
    epochs_cost,
    passes_cost,
    preference_cost,
    seed_cost,
    seed_size,
    seed_work,
)
from selftaught.methods.run import (
    Run,
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
    sampled,
    seed_examples,
    seed_rollouts,
    tokens_of,
    train_on,
    trained_row,
    trainer_options,
    training_row,
    write_options,
    write_summary,
)
from selftaught.option_groups import Auto
from selftaught.records import Example, Preference, Rollout, plain_fields, write_atomically
from selftaught.reports.citations import VSTAR
from selftaught.reports.method_page import shown
from selftaught.reports.model_card import Card, Result, card_text, made_with
from selftaught.reports.vstar_page import report
from selftaught.rollouts.selection import (
    NothingToLearn,
    keep_distinct,
    make_examples,
    make_preferences,
)
from selftaught.runs.folder import (
    ProgressReporter,
    Row,
    publish,
    read_json,
    read_rows,
    timed,
    write_rows,
)
from selftaught.samplers import Engine
from selftaught.training import (
    LabeledCompletion,
    completion_ids,
    open_tokenizer,
)
from selftaught.training.launch import PLACE, Kind


@dataclass(frozen=True)
class VstarConfig(SeededConfig):
    """Options of V-STaR. The defaults are the paper's where it gives one, except those that are
    "auto"."""

    heading: ClassVar[str] = "V-STaR"
    method: ClassVar[str] = "vstar"

    out: Path = Path("runs/vstar")
    """Run folder. Repeating the same command continues the run."""
    iterations: int = 3
    """Number of iterations, T in the paper (Section 4)."""
    k: int = 16
    """Number of completions per problem and iteration (Section 4)."""
    check_equations: bool = False
    """Drop correct completions that contain a wrong equation. Not in the paper."""
    num_train_epochs: float = 2.0
    """Number of passes over the examples when a generator is fine-tuned: 2 on GSM8K, 3 on MBPP
    (Section 4)."""
    candidates: int = 128
    """Number of candidates per test problem, N in the paper (Section 4.1)."""

    distinct: bool = True
    """Train on each distinct completion of a problem only once. The paper does not say."""
    pairs_per_problem: int | None = 64
    """Maximum number of preference pairs per problem, drawn at random. null means all pairs of a
    correct and a wrong completion (Section 3; the paper gives no limit)."""
    beta: float = 0.1
    """Beta of DPO. Not in the paper; TRL's default."""
    verifier_learning_rate: float | Auto = "auto"
    """Peak learning rate of the verifier. Not in the paper. "auto": a tenth of the learning rate by the
    size of the model."""
    verifier_epochs: float = 1.0
    """Number of passes over the preference pairs. Not in the paper."""
    verifier_max_steps: int = -1
    """Number of optimizer steps of the verifier. -1: `verifier_epochs` decides."""
    verifier_training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's `DPOConfig`, such as `--verifier-training.label_smoothing 0.1`."""
    score: Literal["sum", "mean", "reward"] = "sum"
    """Score by which candidates are ranked: the "sum" of the token log-probabilities log V(y|x)
    (Section 3.1), their "mean" per token, or the implicit "reward" of DPO."""

    baselines: bool = False
    """Also measure the paper's baselines with the same number of completions: SFT generator with a
    verifier, RFT, and one iteration (Section 4), and an outcome reward model (Section 4.4)."""
    table: bool = False
    """Also train a verifier after every iteration, and measure every generator with every
    verifier."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse(
            ("iterations", self.iterations >= 1, "at least 1"),
            ("k", self.k >= 2, "at least 2"),
            ("candidates", self.candidates >= 1, "at least 1"),
            ("verifier_learning_rate", at_least(self.verifier_learning_rate, above=0), "above 0"),
            ("pairs_per_problem", (self.pairs_per_problem or 1) >= 1, "at least 1"),
        )  # fmt: skip

    def resolved(self, facts: Facts) -> Self:
        """Return the options with a value for each that is "auto"; see `MethodConfig.resolved`."""
        rate = self.preference_rate(self.verifier_learning_rate, facts)
        return replace(super().resolved(facts), verifier_learning_rate=rate)

    @classmethod
    def small(cls, **changes: Any) -> Self:
        """Return the settings for a short run of the small model in this package: 32 candidates
        per test problem instead of 128."""
        return super().small(**({"candidates": 32} | changes))


CHANGEABLE = ("out", "baselines", "table", "report_to", *PLACE)
"""Options that may change when a run is continued, because nothing stored depends on them."""


def run_vstar(config: VstarConfig, reporter: ProgressReporter | None = None) -> Row:
    """Run V-STaR, or continue a run, and return the summary, which is also written to
    `summary.json`.

    Raises:
        ValueError: an option, a problem or a model cannot be used; the message names it.
        NothingToLearn: no problem has both a correct and a wrong completion; the message gives the
            counts.
        BlockingIOError: another process is running in the folder.
    """
    with running(config, "V-STaR", reporter) as (reporter, engine):
        run = open_vstar(config, reporter, engine)
        write_options(run, CHANGEABLE)
        config = run.config
        seed = seed_examples(run, run.train, config.out / "sft")
        once(run, "G_SFT", lambda: _generator(run, seed, [], 0))
        collected: list[Rollout] = []
        for iteration in range(1, config.iterations + 1):
            collected += sample_iteration(run, config, iteration)
            known = list(collected)
            name = f"iteration {iteration}"
            once(run, name, lambda at=iteration, known=known: _generator(run, seed, known, at))
        last = config.iterations
        verifiers = range(1, last + 1) if config.table else [last]
        for at in verifiers:
            seen = collected[: at * config.k * len(run.train)]
            once(run, f"verifier {at}", lambda at=at, seen=seen: train_verifier(run, seen, f"verifier-{at}"))  # fmt: skip
        measure_choices(run, last, f"verifier-{last}", "V-STaR")
        if config.table:
            for generator in range(last + 1):
                for at in verifiers:
                    measure_choices(run, generator, f"verifier-{at}", _cell(generator, at))
        if config.baselines:
            _baselines(run, seed, collected)
        return _finish(run)


def open_vstar(
    config: VstarConfig, reporter: ProgressReporter | None = None, engine: Engine | None = None
) -> Run[VstarConfig]:
    """Check everything that a run of V-STaR needs; see `open_run`."""
    return open_run(config, reporter, engine, _trainings)


def _trainings(config: VstarConfig) -> list[tuple[Kind, Mapping[str, Any]]]:
    found: list[tuple[Kind, Mapping[str, Any]]] = [("dpo", _verifier_options(config))]
    if config.baselines:
        found.append(("outcome", _outcome_options(config)))
    return found


def work(run: Run[VstarConfig]) -> list[tuple[str, str]]:
    """Return what a run would do, as (name, value) pairs for a dry run."""
    config, problems = run.config, len(run.train)
    return [
        *seed_work(run),
        ("Sampling", f"{config.iterations} iterations of {config.k * problems:,} completions ({config.k} for "
         f"each of {problems} problems), at most {run.params.max_tokens} tokens each"),
        ("Verifier", f"DPO on up to {config.pairs_per_problem or 'all'} pairs per problem, learning rate "
         f"{config.verifier_learning_rate}"),
        ("Choices", f"{config.candidates} candidates for each of {len(run.test)} test problems, all scored"),
    ]  # fmt: skip


def cost(run: Run[VstarConfig]) -> Cost:
    """Return the amounts of work of a run, for a dry run."""
    config, problems, tests = run.config, len(run.train), len(run.test)
    each, seeds = config.k * problems, seed_size(run, problems)
    everything = seeds + config.iterations * each
    trained = sum(epochs_cost(config, seeds + at * each) for at in range(1, config.iterations + 1))
    # The number of pairs is largest where half of a problem's completions are correct.
    per_problem = (config.iterations * config.k + seeds // problems) ** 2 // 4
    pairs = problems * min(config.pairs_per_problem or per_problem, per_problem)
    verifier = preference_cost(_verifier_options(config), pairs)
    verifiers = config.iterations if config.table else 1
    candidates = (config.iterations + 1 if config.table else 1) * config.candidates * tests
    found = seed_cost(run) + Cost(
        completions=config.iterations * (each + tests) + candidates,
        examples=trained + verifiers * verifier,
        scored=verifiers * candidates,
    )
    if not config.baselines:
        return found
    more = config.candidates * tests
    outcome = passes_cost(_outcome_options(config), everything)
    return found + Cost(
        completions=config.iterations * each + tests + 2 * more,
        examples=epochs_cost(config, everything) + verifier + outcome,
        scored=3 * more,
    )


def _verifier_options(config: VstarConfig) -> Row:
    return preference_options(
        config, beta=config.beta, learning_rate=config.verifier_learning_rate,
        epochs=config.verifier_epochs, max_steps=config.verifier_max_steps,
        more=config.verifier_training,
    )  # fmt: skip


def _outcome_options(config: VstarConfig) -> Row:
    options: Row = trainer_options(config) | {"num_train_epochs": config.verifier_epochs}
    for name in config.training:  # fields of SFTConfig, which do not apply to the outcome model
        options.pop(name, None)
    return {"max_length": config.max_length, **options}


def sample_iteration(run: Run[VstarConfig], config: VstarConfig, iteration: int) -> list[Rollout]:
    """Line 4: sample k completions per training problem from the previous iteration's generator."""
    # A new seed in every iteration: a model that hardly changed would otherwise repeat its
    # completions.
    params = replace(run.params, n=config.k, seed=config.seed + 1000 * iteration)
    store = config.out / f"iteration-{iteration}" / "rollouts.jsonl"
    return sampled(run, _model(run, iteration - 1), run.train, run.tuned, params, store)


def _folder(run: Run[VstarConfig], iteration: int) -> Path:
    return run.config.out / (f"iteration-{iteration}" if iteration else "sft")


def _model(run: Run[VstarConfig], iteration: int) -> str:
    """Return the model folder of an iteration's generator; iteration 0 is G_SFT."""
    return str(_folder(run, iteration) / "model")


def _generator(
    run: Run[VstarConfig], seed: Sequence[Example], collected: Sequence[Rollout], iteration: int
) -> Row:
    """Lines 3 and 5: fine-tune the base model on D_GEN after an iteration; iteration 0 is G_SFT."""
    out = _folder(run, iteration)
    training = fit(run, learned_from(run, seed, collected), out)
    evaluation = measured(run, str(training.model), out.name, out)
    right = len(run.kept(collected))
    flagged = flagged_row(run, collected) if iteration else flagged_seeds(run, out)
    return trained_row(run, training, evaluation, **flagged, **{
        "sampled": len(collected), "right": right, "sampled tokens": tokens_of(collected),
    })  # fmt: skip


def learned_from(
    run: Run[VstarConfig], seed: Sequence[Example], rollouts: Sequence[Rollout]
) -> list[Example]:
    """Return D_GEN: the seed set and all correct completions, deduplicated if `distinct` is set."""
    config = run.config
    kept = run.kept(rollouts)
    kept = keep_distinct(kept) if config.distinct else kept
    return [*seed, *make_examples(kept, run.tuned)]


def preferences_of(run: Run[VstarConfig], rollouts: Sequence[Rollout]) -> list[Preference]:
    """Line 7: return pairs of a correct and a wrong completion, from all rollouts and gold
    rationales.

    Raises:
        NothingToLearn: no problem has both a correct and a wrong completion.
    """
    config = run.config
    tokenizer = open_tokenizer(_model(run, 0))
    everything = [*seed_rollouts(run, run.train, config.out / "sft"), *run.unflagged(rollouts)]
    if config.distinct:
        everything = keep_distinct(everything)
    pairs = make_preferences(everything, run.tuned, lambda one: completion_ids(one, tokenizer),
                             at_most=config.pairs_per_problem, seed=config.seed)  # fmt: skip
    if not pairs:
        wrong = sum(not one.correct for one in everything)
        raise NothingToLearn(
            "Expected problems with both a correct and a wrong completion, to make preference "
            f"pairs; got none: {len(everything) - wrong} correct and {wrong} wrong completions of "
            f"{len(run.train)} problems. Try more completions per problem (--k), a higher "
            "--temperature, or harder problems."
        )
    return pairs


def train_verifier(run: Run[VstarConfig], rollouts: Sequence[Rollout], folder: str) -> Row:
    """Lines 7 and 8: train a verifier with DPO on all pairs, with G_SFT as start and reference."""
    config = run.config
    pairs = preferences_of(run, rollouts)
    training = prefer(run, _model(run, 0), pairs, config.out / folder, _verifier_options(config))
    return {"model": str(training.model), "pairs": len(pairs), "training": training_row(training),
            "summary": ranked_correctly(training)}  # fmt: skip


# ---------------------------------------------------------------- choice among candidates


def test_candidates(run: Run[VstarConfig], folder: Path) -> list[Rollout]:
    """Return N graded candidates per test problem, sampled from the generator in a folder."""
    config = run.config
    params = replace(run.params, n=config.candidates, seed=config.seed + 500_000)
    return sampled(run, str(folder / "model"), run.test, run.tuned, params, folder / "candidates.jsonl")  # fmt: skip


def scores_of(
    run: Run[VstarConfig],
    rollouts: Sequence[Rollout],
    verifier: Path,
    store: Path,
    kind: str = "dpo",
) -> list[float]:
    """Return a verifier's scores of candidates, one per rollout; stored scores are used again.

    Args:
        verifier: the folder of its run, with the model in `model`.
        store: JSON file for the scores.
        kind: "dpo" for a V-STaR verifier, "outcome" for an outcome reward model.
    """
    from selftaught.evaluation.verifier import OutcomeModel, Verifier

    config = run.config
    made_of = _scored_by(run, rollouts, verifier)
    found = read_json(store)
    if found and found["made of"] == made_of:
        return found["scores"]
    run.engine.close()
    with timed(run.seconds, "score"):
        if kind == "outcome":
            scores = OutcomeModel(verifier / "model").score(rollouts, run.tuned)
        else:
            reference = _model(run, 0) if config.score == "reward" else None
            known = ("dtype", "device")
            where = {name: config.sampler_options[name] for name in known if name in config.sampler_options}  # fmt: skip
            with Verifier(
                verifier / "model", score=config.score, reference=reference, **where
            ) as opened:
                scores = opened.score(rollouts, run.tuned)
    write_atomically(store, json.dumps({"made of": made_of, "scores": scores}) + "\n")
    return scores


def _scored_by(run: Run[VstarConfig], rollouts: Sequence[Rollout], verifier: Path) -> list[str]:
    """Return everything that the scores depend on: the weights of the verifier and of its reference
    model, and the candidates."""
    from selftaught.samplers.tokens import folder_fingerprint

    config = run.config
    weights = [folder_fingerprint(str(verifier / "model"))]
    if config.score == "reward":
        weights.append(folder_fingerprint(_model(run, 0)))
    digest = hashlib.sha256()
    for one in rollouts:
        scored = (one.problem.id, one.index, one.completion, one.token_ids)
        digest.update(repr(scored).encode("utf-8", "surrogatepass"))
    return [config.score, *weights, digest.hexdigest()[:16]]


def measure_choices(run: Run[VstarConfig], generator: int, verifier: str, name: str) -> Row:
    """Measure the choice among a generator's candidates: sample, pass, majority and verifier.

    Args:
        generator: the iteration that trained it; 0 is G_SFT.
        verifier: name of the verifier's folder in the run folder.
        name: name of the row in `metrics.jsonl`.
    """
    return _measured_choices(run, _folder(run, generator), verifier, name)


def _measured_choices(
    run: Run[VstarConfig], folder: Path, verifier: str, name: str, kind: str = "dpo"
) -> Row:
    config = run.config

    def make() -> Row:
        rollouts = test_candidates(run, folder)
        store = folder / f"scores-{verifier}.json"
        scores = scores_of(run, rollouts, config.out / verifier, store, kind)
        among = candidates_of(rollouts, scores)
        values = _unscored(run, folder, among) | _shares(config, among, ("best", "weighted"))
        best = share(values["best"][str(config.candidates)])
        return {"generator": str(folder / "model"), "verifier": verifier, "choices": values,
                "summary": f"best of {config.candidates}: {shown(best)}"}  # fmt: skip

    return once(run, f"choices: {name}", make)


def _unscored(
    run: Run[VstarConfig], folder: Path, among: Candidates
) -> dict[str, dict[str, list[float]]]:
    """Return the accuracies that need no verifier; computed once per generator."""
    config = run.config
    key = f"choices {folder}"
    if key not in run.read:
        run.read[key] = _shares(config, among, ("sample", "pass", "majority"))
    return run.read[key]


def _shares(
    config: VstarConfig, among: Candidates, choices: Sequence[Choice]
) -> dict[str, dict[str, list[float]]]:
    """Return the chance that a choice is correct: `[choice][k][problem]`."""
    ks = powers(config.candidates)
    return {choice: {str(k): chosen(among, choice, k) for k in ks} for choice in choices}


def _cell(generator: int, verifier: int) -> str:
    return f"G{generator} with V{verifier}"


def _baselines(
    run: Run[VstarConfig], seed: Sequence[Example], collected: Sequence[Rollout]
) -> None:
    """Measure the paper's baselines, with as many completions, and an outcome reward model."""
    config = run.config
    last = config.iterations
    once(run, "outcome model", lambda: _outcome(run, collected))
    _measured_choices(run, _folder(run, last), "outcome", "outcome reward model", "outcome")
    # As many completions as all iterations sampled, but all from G_SFT: RFT, and its verifier.
    n = last * config.k
    store = config.out / "rft" / "rollouts.jsonl"
    rollouts = sampled(run, _model(run, 0), run.train, run.tuned,
                       replace(run.params, n=n, seed=config.seed + 1000), store)  # fmt: skip
    once(run, "RFT", lambda: _rft(run, seed, rollouts))
    once(run, "verifier of G_SFT", lambda: train_verifier(run, rollouts, "verifier-sft"))
    _measured_choices(run, config.out / "sft", "verifier-sft", "SFT generator + verifier")
    _measured_choices(run, config.out / "rft", "verifier-sft", "one iteration (RFT + verifier)")


def _rft(run: Run[VstarConfig], seed: Sequence[Example], rollouts: Sequence[Rollout]) -> Row:
    out = run.config.out / "rft"
    training = fit(run, learned_from(run, seed, rollouts), out)
    return trained_row(run, training, measured(run, str(training.model), "RFT", out))


def _outcome(run: Run[VstarConfig], collected: Sequence[Rollout]) -> Row:
    """Train an outcome reward model from G_SFT on the same completions as the verifier."""
    config = run.config
    tokenizer = open_tokenizer(_model(run, 0))
    seeds = seed_rollouts(run, run.train, config.out / "sft")
    everything = keep_distinct([*seeds, *run.unflagged(collected)])
    labeled = [
        LabeledCompletion(run.tuned(one.problem), completion_ids(one, tokenizer), bool(one.correct),
               run.tuned.chat_template_kwargs or None)
        for one in everything
    ]  # fmt: skip
    options = _outcome_options(config)
    rows = config.out / "outcome" / "judged.jsonl"
    write_rows(rows, [plain_fields(one) for one in labeled])
    training = train_on(run, "outcome", _model(run, 0), rows, options, len(labeled))
    right = sum(one.right for one in labeled)
    return {
        "model": str(training.model),
        "training": training_row(training),
        "summary": f"{right:,} correct and {len(labeled) - right:,} wrong completions",
    }  # fmt: skip


# ---------------------------------------------------------------- summary


def _finish(run: Run[VstarConfig]) -> Row:
    config = run.config
    rows = read_rows(config.out / "metrics.jsonl")
    named = {row["name"]: row for row in rows}
    last = config.iterations
    card, verifier_card = _cards(run, named)
    summary = write_summary(config.out, {
        "method": "vstar",
        "best model": publish(Path(_model(run, last)), config.out / "model", card_text(card)),
        "verifier": publish(config.out / f"verifier-{last}" / "model", config.out / "verifier", card_text(verifier_card)),
        "sampled tokens": named[f"iteration {last}"]["sampled tokens"],
        "rows": [{key: value for key, value in row.items() if key != "choices"} for row in rows],
        "minutes": sum(sum(row["seconds"].values()) for row in rows) / 60,
    })  # fmt: skip
    report(config.out)
    return summary


def _cards(run: Run[VstarConfig], named: Mapping[str, Row]) -> tuple[Card, Card]:
    """Return the cards of the generator and of the verifier of the last iteration."""
    config, last = run.config, run.config.iterations
    sft = trained_from("SFT", BASE, named["G_SFT"], "(the seed set)")
    generators = [
        trained_from(
            f"iteration {number}", BASE, named[f"iteration {number}"],
            f"(the seed set and completions of {f'iteration {number - 1}' if number > 1 else 'SFT'} and before)",
        )
        for number in range(1, last + 1)
    ]  # fmt: skip
    tested = accuracy_of(named[f"iteration {last}"])
    card = run_card(run, "V-STaR", VSTAR, tested, run.tuned, [sft, *generators])
    pairs = trained_from(
        "verifier", "SFT", named[f"verifier {last}"], "(pairs of a correct and a wrong completion)"
    )
    return card, replace(
        card,
        title=card.title.replace("trained with V-STaR", "verifier of V-STaR"),
        lead=f"The verifier of V-STaR ({VSTAR.short}), trained with DPO by {made_with()}. The sum of its "
        "log-probabilities of a completion is the score of the completion.",
        trained=[sft, *generators, pairs],
        results=[_best_of_result(config, named["choices: V-STaR"])],
        measured_by="",
        measured_note="The candidates are sampled from the generator of the last iteration.",
        use="verifier",
    )  # fmt: skip


def _best_of_result(config: VstarConfig, row: Row) -> Result:
    """Return the accuracy of the best of N candidates by the verifier's score."""
    each = row["choices"]["best"][str(config.candidates)]
    value, low, high = share(each)
    name = f"accuracy of the best of {config.candidates} candidates"
    return Result(name, "accuracy", value, low, high, f"{len(each):,} test problems")

"""STaR: Zelikman, Wu, Mu and Goodman 2022, "STaR: Bootstrapping Reasoning With Reasoning"
(arXiv:2203.14465). `run_star` is its Algorithm 1.

    1  M_0 <- M
    2  for n in 1..N:
    3      (r_i, y_i)         <- M_{n-1}(x_i)                    reason
    4      (r'_i, y'_i)       <- M_{n-1}(add_hint(x_i, gold_i))  rationalize
    5      D_n                <- the (x_i, r_i) with y_i right
    6      D'_n               <- the (x_i, r'_i) with y_i wrong and y'_i right
    7      M_n                <- train(M, D_n with D'_n)         from the base model, every time

Where we differ from the paper or the authors' code stands in docs/methods/star.md.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from selftaught.evaluation.evaluator import Evaluation, evaluate
from selftaught.methods.config import without_unused
from selftaught.methods.run import check_chat
from selftaught.models.embedded import embedded_model
from selftaught.prompts import PromptStyle, bare, hinted
from selftaught.records import (
    OUTCOMES,
    Example,
    Problem,
    Rollout,
    write_atomically,
    write_jsonl,
)
from selftaught.reports.star_page import run_report
from selftaught.rollouts.graded import graded_beside
from selftaught.rollouts.grading import check_gold
from selftaught.rollouts.selection import (
    NothingToLearn,
    draw_problems,
    example,
    keep_correct,
    keep_distinct,
    keep_sound,
    make_examples,
    share_of,
    unsolved,
    why_dropped,
)
from selftaught.rollouts.store import collect
from selftaught.runs.folder import (
    Watch,
    check_config,
    hold,
    publish,
    read_rows,
    timed,
    write_config,
    write_rows,
)
from selftaught.runs.preflight import Asked, check_settings, check_texts
from selftaught.runs.status import reported
from selftaught.samplers import Engine, Sampler, SamplingParams, as_seen
from selftaught.tasks import Task, open_task
from selftaught.training import Training
from selftaught.training.launch import PLACE, Stage, launch, launch_of

Row = dict[str, Any]
Advance = Callable[[int], Any]


@dataclass(frozen=True)
class StarConfig:
    """Options of STaR; the defaults are the paper's, `embedded()` holds those of the small model."""

    model: str = "embedded"
    """Base model: a Hugging Face name or folder, or "embedded", the one in this package."""
    task: str = "arithmetic"
    """Which questions: arithmetic, gsm8k, commonsense_qa, competition_math, gym, question_file."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options, such as --task_options.path questions.jsonl."""
    out: Path = Path("runs/star")
    """Folder of the run; repeating the command continues it."""
    iterations: int = 16
    """At most so many iterations; 16, the paper's arithmetic (Section 4.3)."""
    patience: int = 2
    """Stop after so many iterations without a gain on the validation problems; the paper runs "to
    plateau" by eye (Section 4.1)."""

    prompt: Literal["few_shot", "bare", "chat"] = "few_shot"
    """What stands before a question when sampling: the task's worked examples (Section 3.1)."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    prompt_later: bool = True
    """Worked examples from the second iteration on too, as the paper unless it says otherwise
    (Section 4.1); false: the authors' --no_prompt."""
    prompt_in_training: bool = False
    """Worked examples in the training context: the authors' --few_shot_train, off there too;
    reported to help on CommonsenseQA (Section 4.4)."""
    n: int = 1
    """Completions per problem; 1 in the paper."""
    temperature: float = 0.0
    """0 is greedy, as in the paper; higher gave worse models there (Section 5)."""
    top_p: float = 1.0
    """Nucleus; the authors' code has 0.9 at temperature 0.01, which is nearly greedy."""
    max_tokens: int | None = None
    """Room for a rationale; none: the task's own."""
    rationalization: bool = True
    """Ask the failures again with the gold answer as a hint (Section 3.2)."""
    rationalized_share: float = 1.0
    """Share of the failures asked again; 1.0, the authors' code."""
    check_equations: bool = False
    """Drop rationales with an inline equation that does not hold. Not in the paper: the filter of
    RFT (arXiv:2308.01825), against right answers, above all shown ones, under wrong reasoning."""
    train_problems: int | None = None
    """Problems per iteration, drawn anew each time; none: all. The paper draws 10,000 of 50,000
    sums (Section 4.1)."""
    validation_problems: int | None = 500
    """Held-out problems that decide when to stop and which iteration is best."""
    test_problems: int | None = None
    """Problems of the final measurement of base and best; none: all of the test split."""

    from_base: bool = True
    """Fine-tune the base model every time (Algorithm 1, line 7); false: the previous iteration's."""
    schedule: Literal["grow", "add", "epochs"] = "grow"
    """Optimizer steps by iteration: start_steps times grow_steps each (Section 4.1); start_steps
    plus add_steps each (Section 4.3, with rationalization); or num_train_epochs over the examples."""
    start_steps: int = 40
    """Steps of the first iteration: 40 (Section 4.1); 300 for arithmetic with "add" (Section 4.3)."""
    grow_steps: float = 1.2
    """Factor per iteration of "grow" (Section 4.1)."""
    add_steps: int = 20
    """Steps added per iteration of "add" (Section 4.3)."""
    num_train_epochs: float = 1.0
    """Epochs of "epochs"; the paper does not give any."""
    learning_rate: float = 1e-6
    """Constant after the warm-up: 1e-6, "consistently the best" for GPT-J (Appendix H). Smaller
    models want more."""
    warmup_steps: int = 100
    """Linear warm-up: 100 (Section 4.1). It starts again each iteration, so it outlasts the first."""
    per_device_train_batch_size: int = 8
    """8 (Appendix H), where the paper counts packed sequences of 1,024 tokens and we count examples."""
    gradient_accumulation_steps: int = 10
    """10: the authors' code reckons with ten examples in a packed sequence (iteration_train.py)."""
    max_length: int = 1024
    """Longest example in tokens (Appendix H); longer ones are dropped and counted, never cut."""
    bf16: bool = False
    """Train in bfloat16 over float32 weights."""
    use_peft: bool = False
    """Train a LoRA adapter and merge it, instead of all weights; the paper trains all."""
    lora_r: int = 16
    """Rank of the adapter (TRL's default)."""
    lora_alpha: int = 32
    """Scale of the adapter (TRL's default)."""
    lora_target_modules: str = "all-linear"
    """Layers with an adapter: "all-linear", or names with commas between."""
    save_steps: int = 100
    """Steps between checkpoints: what a killed training repeats at most."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's SFTConfig, such as --training.gradient_checkpointing true."""
    launcher: Literal["inline", "torchrun", "accelerate", "ray"] = "inline"
    """Where fine-tunings run: in this process, in several of this machine, or on a Ray cluster
    (docs/launch.md)."""
    num_processes: int = 1
    """How many share an optimizer step; its examples are as many, whatever their number."""
    accelerate_config: Path | None = None
    """A file of `accelerate config` for the launcher accelerate, such as those in configs/."""

    sampler: str = "transformers"
    """Where the model lives while it is sampled: transformers, vllm, ray (docs/engines.md)."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """The sampler's own options, such as --sampler_options.batch_size 64."""
    baselines: bool = False
    """Also measure few-shot direct answers and direct-answer fine-tuning (the paper's Tables 1, 2)."""
    keep_models: Literal["best", "all"] = "best"
    """Which iterations' weights stay on disk: the best and the last, or all."""
    seed: int = 0
    """Of sampling, drawing problems and training."""

    def __post_init__(self) -> None:
        for name, holds, want in (
            ("iterations", self.iterations >= 1, "at least 1"),
            ("patience", self.patience >= 1, "at least 1"),
            ("rationalized_share", 0 <= self.rationalized_share <= 1, "from 0 to 1"),
            ("start_steps", self.start_steps >= 1, "at least 1"),
            ("grow_steps", self.grow_steps >= 1, "at least 1"),
            ("add_steps", self.add_steps >= 0, "0 or more"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            ("learning_rate", self.learning_rate > 0, "above 0"),
            *(
                (name, getattr(self, name) is None or getattr(self, name) >= 1, "at least 1")
                for name in ("train_problems", "validation_problems", "test_problems")
            ),
        ):
            if not holds:
                raise ValueError(f"{name} must be {want}; got {getattr(self, name)!r}.")
        launch_of(self)

    @classmethod
    def embedded(cls, **changes: Any) -> "StarConfig":
        """The settings of the small model in this package, found by measurement (LOG.md)."""
        found: dict[str, Any] = {
            "validation_problems": None,
            "start_steps": 150,
            "learning_rate": 1e-3,
            "warmup_steps": 10,
            "per_device_train_batch_size": 48,
            "gradient_accumulation_steps": 1,
            "sampler_options": {"batch_size": 512},
        }
        return cls(**(found | changes))

    def steps(self, iteration: int) -> int:
        """Optimizer steps of an iteration, from 1; -1 where epochs decide."""
        match self.schedule:
            case "grow":
                return int(self.start_steps * self.grow_steps ** (iteration - 1))
            case "add":
                return self.start_steps + self.add_steps * (iteration - 1)
            case "epochs":
                return -1


CHANGEABLE = ("iterations", "patience", "out", "baselines", *PLACE)
"""Fields a continued run may change: nothing stored depends on them."""


@dataclass(frozen=True)
class Star:
    """A run, opened: the task, its splits and the prompt of each use."""

    config: StarConfig
    task: Task
    base: str
    train: Sequence[Problem]
    validation: Sequence[Problem]
    test: Sequence[Problem]
    params: SamplingParams
    watch: Watch
    engine: Engine
    """Where a model is sampled; closed while another is trained."""
    too_long: int = 0
    """Training problems whose prompt leaves no room for a completion within `max_length`."""

    def prompt(self, iteration: int) -> PromptStyle:
        """The prompt with which the model of an iteration (0: the base) is sampled."""
        later = iteration > 0 and not self.config.prompt_later
        return bare(self.asked) if later else self.asked

    @property
    def asked(self) -> PromptStyle:
        """The prompt named in the config."""
        config = self.config
        return self.task.styled(
            config.prompt,
            system_prompt=config.system_prompt or "",
            chat_template_kwargs=config.chat_template_kwargs,
        )

    def kept(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """What is learned from."""
        right = keep_correct(rollouts)
        return keep_sound(right) if self.config.check_equations else right

    def training_prompt(self) -> PromptStyle:
        """The prompt in training: without worked examples, unless asked for."""
        return self.asked if self.config.prompt_in_training else bare(self.asked)

    def problems(self, iteration: int) -> Sequence[Problem]:
        """The training problems of an iteration."""
        return draw_problems(
            self.train, self.config.train_problems, f"{self.config.seed} {iteration}"
        )

    def folder(self, iteration: int) -> Path:
        """Where an iteration's files are."""
        return self.config.out / f"iteration-{iteration}"

    def model(self, iteration: int) -> str:
        """The model that an iteration made; 0: the base."""
        return str(self.folder(iteration) / "model") if iteration else self.base


def run_star(config: StarConfig, watch: Watch | None = None) -> Row:
    """Run STaR, or continue it, and return its summary (also `summary.json` in the run folder).

    Raises:
        ValueError: a setting, a problem or a model that cannot be used; says which.
        NothingToLearn: no iteration could begin to learn; says why.
        BlockingIOError: another process runs in the folder.
    """
    with (
        hold(config.out),
        reported(config.out / "status.json", "STaR", watch) as watch,
        Engine(config.sampler, config.sampler_options) as engine,
    ):
        star = open_star(config, watch, engine)
        write_config(config.out, plain(config), CHANGEABLE)
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
            run_report(config.out)
            star.watch.iteration(rows[-1])
        return _finish(star, rows)


def run_iteration(star: Star, iteration: int) -> Row:
    """Lines 3 to 7 of Algorithm 1, and the new model's accuracy on the validation problems."""
    seconds: dict[str, float] = {}
    out, problems = star.folder(iteration), star.problems(iteration)
    sampler = star.engine.of(star.model(iteration - 1))
    direct, rationalized = bootstrap(star, sampler, iteration, problems, out, seconds)
    kept = keep_distinct(star.kept(direct) + star.kept(rationalized))
    if not kept:
        raise NothingToLearn(_why_nothing(star, direct, rationalized))
    examples = make_examples(kept, star.training_prompt())
    start = star.base if star.config.from_base else star.model(iteration - 1)
    with timed(seconds, "train"):
        training = _train(star, start, examples, iteration, out)
    with timed(seconds, "evaluate"):
        validation = _validate(star, iteration)
    return {
        "iteration": iteration,
        "model": str(training.model),
        "validation": validation.to_dict(),
        "funnel": _funnel(star, problems, direct, rationalized, training),
        "training": {
            "steps": training.steps,
            "loss": training.loss,
            "tokens": training.tokens,
            "tokenized from text": training.from_text,
            "log": training.log,
        },
        "seconds": seconds,
    }


def bootstrap(
    star: Star,
    sampler: Sampler,
    iteration: int,
    problems: Sequence[Problem],
    out: Path,
    seconds: dict[str, float],
) -> tuple[list[Rollout], list[Rollout]]:
    """Lines 3 to 6: reason; where nothing was right, reason again with the answer as a hint."""
    style = star.prompt(iteration - 1)
    params = replace(star.params, seed=star.config.seed + iteration)

    def ask(asked: Sequence[Problem], shown: PromptStyle, name: str, **kinds: Any) -> list[Rollout]:
        with (
            timed(seconds, "sample" if name == "rollouts" else "rationalize"),
            star.watch.progress(f"iteration {iteration}: {name}", len(asked) * params.n) as advance,
        ):
            rollouts = collect(sampler, asked, shown, params, store=out / f"{name}.jsonl",
                               progress=advance, **kinds)  # fmt: skip
        with timed(seconds, "grade"):
            return graded_beside(out / f"{name}.jsonl", rollouts, star.task)

    direct = ask(problems, style, "rollouts")
    if iteration == 1 and all(rollout.correct for rollout in direct):
        raise NothingToLearn(
            f"The base model already answers all {len(problems)} training problems; there is "
            "nothing to bootstrap from. Choose harder problems."
        )
    if not star.config.rationalization:
        return direct, []
    missed = share_of(unsolved(problems, direct), star.config.rationalized_share, params.seed)
    hint = hinted(style, star.task.hint)
    return direct, ask(missed, hint, "rationalized", origin="rationalized") if missed else []


def why_stop(rows: Sequence[Row], config: StarConfig) -> str | None:
    """Why no further iteration should run; None while one should."""
    best = best_iteration(rows)
    if _value(rows[best]) >= 1:
        return "every validation problem is right"
    if rows[-1]["iteration"] - best >= config.patience:
        return f"no gain in {config.patience} iterations"
    if rows[-1]["iteration"] >= config.iterations:
        return f"the limit of {config.iterations} iterations"
    return None


def best_iteration(rows: Sequence[Row]) -> int:
    """The iteration with the highest validation accuracy; the first of equals."""
    return max(range(len(rows)), key=lambda index: (_value(rows[index]), -index))


def open_star(config: StarConfig, watch: Watch | None = None, engine: Engine | None = None) -> Star:
    """Open the task, check every gold answer, option and prompt, and cut the splits.

    Nothing is sampled, and no weights are read. A dry run and a run both begin with this.

    Raises:
        ValueError: a setting, a problem or a model cannot be used; says which.
        ImportError: a package that a setting needs is not installed.
        OSError: there is no such file or model.
    """
    task = open_task(config.task, **config.task_options)
    validation = draw_problems(
        task.problems("validation"), config.validation_problems, "validation"
    )
    test = draw_problems(task.problems("test"), config.test_problems, "test")
    train = task.problems("train")
    if not (train and validation and test):
        raise ValueError(
            f"The task {config.task!r} has {len(train)} training, {len(validation)} validation and "
            f"{len(test)} test problems; STaR needs at least one of each."
        )
    check_gold([*train, *validation, *test], task)
    params = SamplingParams(
        n=config.n,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens or task.max_tokens,
        seed=config.seed,
        thought_marks=task.thought_marks,
    )
    base = str(embedded_model()) if config.model == "embedded" else config.model
    engine = engine or Engine(config.sampler, config.sampler_options)
    star = Star(config, task, base, train, validation, test, params, watch or Watch(), engine)
    check_chat(star.training_prompt(), task, base, train[0], rationales=config.baselines)
    options = _options(star, 1)
    last = {"seed": config.seed + config.iterations} | config.training
    check_settings(config, base, [("sft", options), ("sft", options | last)])
    taught = (star.training_prompt(), train)
    too_long = check_texts(
        config, base, _asked(star), taught, params.max_tokens, options["max_length"]
    )
    return replace(star, too_long=too_long)


def _asked(star: Star) -> list[Asked]:
    """Every prompt with which the models of a run may be sampled."""
    asked: list[Asked] = []
    for style in dict.fromkeys([star.prompt(0), star.prompt(1)]):
        asked += [(style, star.train), (style, star.validation), (style, star.test)]
        if star.config.rationalization:
            asked.append((hinted(style, star.task.hint), star.train))
    if star.config.baselines:
        asked += [(_answers_only(star), star.test), (bare(star.prompt(0)), star.test)]
    return asked


def plan(config: StarConfig) -> str:
    """What a run would do: the splits, the work, and the first prompt as the model would see it."""
    star = open_star(config)
    check_config(config.out, plain(config), CHANGEABLE)
    problems = star.problems(1)
    style = star.prompt(0)
    prompt = as_seen(star.base, style(problems[0]), style.chat_template_kwargs)
    asked = len(problems) * config.n
    steps = f"{config.steps(1)} optimizer steps" if config.schedule != "epochs" else f"{config.num_train_epochs:g} epochs"  # fmt: skip
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return "\n".join(
        [
            f"Model       {star.base}",
            f"Task        {config.task}: {len(star.train)} training problems ({len(problems)} per "
            f"iteration), {len(star.validation)} validation, {len(star.test)} test",
            f"Sampling    {asked} completions per iteration, at most {star.params.max_tokens} tokens "
            f"each{', and the failures again with a hint' if config.rationalization else ''}",
            f"Training    iteration 1: {steps} of {batch} examples from "
            f"{'the base model' if config.from_base else 'the previous model'}, "
            f"learning rate {config.learning_rate:g}",
            f"Length      at most {config.iterations} iterations; stops after {config.patience} "
            "without a gain",
            f"Work        per iteration up to {asked * (1 + config.rationalization)} completions for "
            f"training and {len(star.validation)} for validation; "
            f"{sum(max(config.steps(i), 0) for i in range(1, config.iterations + 1))} steps in all",
            *(
                [
                    f"Too long    {star.too_long} of {len(star.train)} training prompts leave no room for a "
                    f"completion within max_length {config.max_length}; they are never learned from"
                ]
                if star.too_long
                else []
            ),
            f"Folder      {config.out}",
            f"First prompt ({problems[0].id}, gold {problems[0].gold}), between the lines:",
            "-" * 72,
            prompt,
            "-" * 72,
        ]
    )


def plain(config: StarConfig) -> Row:
    """The config as plain values for YAML."""
    return without_unused(
        {
            name: str(value) if isinstance(value, Path) else value
            for name, value in asdict(config).items()
        }
    )


def _base_row(star: Star) -> Row:
    seconds: dict[str, float] = {}
    with timed(seconds, "evaluate"):
        validation = _validate(star, 0)
    row = {
        "iteration": 0,
        "model": star.base,
        "validation": validation.to_dict(),
        "seconds": seconds,
    }
    write_rows(star.config.out / "metrics.jsonl", [row])
    star.watch.iteration(row)
    return row


def _validate(star: Star, iteration: int) -> Evaluation:
    store = star.folder(iteration) / "validation.jsonl"
    name = f"iteration {iteration}" if iteration else "base"
    return _measure(
        star, star.model(iteration), star.validation, star.prompt(iteration), store, name
    )


def _measure(
    star: Star, model: str, problems: Sequence[Problem], style: PromptStyle, store: Path, name: str
) -> Evaluation:
    """Greedy accuracy of a model on problems."""
    greedy = replace(star.params, n=1, temperature=0.0)
    sampler = star.engine.of(model)
    with star.watch.progress(f"{name}: {store.stem}", len(problems)) as advance:
        return evaluate(
            sampler, star.task, problems, style, greedy, store=store, name=name, progress=advance
        )


def _options(star: Star, iteration: int, **changes: Any) -> dict[str, Any]:
    """The settings of an iteration's fine-tuning as TRL names them."""
    config = star.config
    options = {
        "max_steps": config.steps(iteration),
        "num_train_epochs": config.num_train_epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": config.warmup_steps,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "max_length": config.max_length,
        "bf16": config.bf16,
        "save_steps": config.save_steps,
        "seed": config.seed + iteration,
    }
    return options | config.training | changes


def _train(
    star: Star, start: str, examples: Sequence[Example], iteration: int, out: Path, **changes: Any
) -> Training:
    """One fine-tuning on the union of both kinds of example (line 7)."""
    star.engine.close()
    config, rows = star.config, out / "examples.jsonl"
    write_jsonl(rows, examples)
    lora = {"r": config.lora_r, "alpha": config.lora_alpha,
            "target_modules": config.lora_target_modules}  # fmt: skip
    stage = Stage("sft", start, rows, out / "model", out / "training",
                  _options(star, iteration, **changes), lora if config.use_peft else None)  # fmt: skip
    steps = changes.get("max_steps") or max(config.steps(iteration), 0)
    with star.watch.progress(f"iteration {iteration}: training", steps) as advance:
        return launch(stage, launch_of(config), advance)


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
    dropped["a wrong equation"] = right - len(kept) - len(rationalized_kept)
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
    def told(rollouts: Sequence[Rollout]) -> str:
        reasons = why_dropped(rollouts).items()
        told = [f"{count} {why}" for why, count in sorted(reasons)]
        if right := len(keep_correct(rollouts)):
            told.append(f"{right} right with a wrong equation, see --check_equations")
        return ", ".join(told) or "none asked"

    return (
        f"Nothing was kept: of {len(direct)} completions all were dropped ({told(direct)}); so were "
        f"{len(rationalized)} with the answer as a hint ({told(rationalized)}). "
        "Try easier problems, a stronger model, more samples (--n 4 --temperature 0.7), a larger "
        f"--max_tokens (now {star.params.max_tokens}) if many were cut, or another --prompt; "
        f"what was said is in {star.config.out}."
    )


def _finish(star: Star, rows: Sequence[Row], stopped: str | None = None) -> Row:
    """Measure base and best on the test problems, name the best model, write the summary and page."""
    config, best = star.config, best_iteration(rows)
    _prune(star, rows)
    # The best first, which is often the one that is still open.
    best_tested = _test(star, star.model(best), star.prompt(best), "best", f"iteration-{best}") if best else None  # fmt: skip
    base_tested = _test(star, star.base, star.prompt(0), "base", "base")
    tested = {"base": base_tested, "best": best_tested or base_tested}
    summary: Row = {
        "best": best,
        "why stopped": stopped or why_stop(rows, star.config),
        "best model": publish(
            Path(star.model(best)), config.out / "model", _card(star, best, tested["best"])
        )
        if best
        else star.base,
        "test": {name: evaluation.to_dict() for name, evaluation in tested.items()},
        "comparisons": [one.to_dict() for one in _baselines(star, rows, best)],
        "minutes": sum(sum(row["seconds"].values()) for row in rows) / 60,
    }
    text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
    write_atomically(star.config.out / "summary.json", text)
    run_report(star.config.out)
    return summary


def _test(star: Star, model: str, style: PromptStyle, name: str, store: str) -> Evaluation:
    """Accuracy on the test problems, whose rollouts are kept as `test-{store}.jsonl`."""
    path = star.config.out / f"test-{store}.jsonl"
    return _measure(star, model, star.test, style, path, name)


def _baselines(star: Star, rows: Sequence[Row], best: int) -> list[Evaluation]:
    """The paper's rows without rationales: worked examples with answers only, and fine-tuning the
    base on (question, answer) for as many steps as lie between it and the best iteration (the first,
    where none was better than the base)."""
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
    trained = _train(star, star.base, examples, last, folder, max_steps=steps)
    name = "direct answers, fine-tuned"
    return [untrained, _test(star, str(trained.model), target, name, f"direct-{last}")]


def _answers_only(star: Star) -> PromptStyle:
    """The prompt of the base model with worked examples that only state their answers."""
    style = star.prompt(0)
    return replace(
        style, shots=lambda problem: [_answered(star.task, shot) for shot in style.shots(problem)]
    )


def _answered(task: Task, problem: Problem) -> Problem:
    """The problem with its bare answer where a rationale would stand."""
    return replace(problem, rationale=task.direct.format(answer=problem.gold))


def _card(star: Star, best: int, tested: Evaluation) -> str:
    """The model card, in the hub's form."""
    base = (
        "" if star.config.model == "embedded" else f"base_model: {json.dumps(star.config.model)}\n"
    )
    mean = tested.group_mean
    return (
        f"---\nlibrary_name: transformers\n{base}tags: [selftaught, star, trl, generated_from_trainer]"
        f"\n---\n\n# {star.config.task}, taught by STaR\n\nIteration {best} of STaR (Zelikman et al. "
        f"2022, arXiv:2203.14465) from `{star.config.model}` on the task `{star.config.task}`: "
        f"{mean.accuracy:.1%} of {tested.n} test problems (95% interval {mean.low:.1%} to "
        f"{mean.high:.1%}). Prompt: `{star.prompt(best).name}`. Made with selftaught; "
        "`config.yaml` and `report.html` of the run tell the rest.\n"
    )


def _prune(star: Star, rows: Sequence[Row]) -> None:
    """Remove the weights that are neither the best nor the newest."""
    if star.config.keep_models == "all":
        return
    kept = {best_iteration(rows), len(rows) - 1}
    for iteration in range(1, len(rows)):
        if iteration not in kept:
            shutil.rmtree(star.model(iteration), ignore_errors=True)


def _value(row: Row) -> float:
    return Evaluation.from_dict(row["validation"]).group_mean.accuracy

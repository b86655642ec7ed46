"""The stages of a method as commands: sample, grade, select, train, evaluate."""

import json
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import Positional, add_options
from selftaught.cli.output import DONE, locked_output, say, usage_summary
from selftaught.option_groups import (
    Auto,
    LaunchOptions,
    ModelOptions,
    Prompt,
    PromptOptions,
    SamplingOptions,
    TaskOptions,
    TrainingOptions,
    as_number,
    refuse_repeated,
)
from selftaught.printable import counted
from selftaught.rollouts.selection import DistinctBy
from selftaught.safety.options import ExcludeOptions

if TYPE_CHECKING:
    from selftaught.tasks import Task


@dataclass(frozen=True)
class OutputOptions:
    """The output file."""

    heading: ClassVar[str] = "run"

    out: Path = Path("runs/rollouts.jsonl")
    """Output file. Repeating the same command continues it."""


@dataclass(frozen=True)
class AskOptions(OutputOptions, SamplingOptions, PromptOptions, ModelOptions):
    """The problems and prompts that a model is sampled with, and the sampling options."""

    heading: ClassVar[str] = "sampling"

    split: str = "train"
    """Split of the task: train, validation or test."""
    limit: int | None = None
    """Number of problems, from the first. Default: all."""
    hint: bool = False
    """Show the gold answer in the question, as rationalization in STaR does."""
    n: int = 1
    """Number of completions per problem."""
    temperature: float = 0.0
    """Sampling temperature. 0 means greedy decoding."""
    seed: int = 0
    """Random seed for sampling."""
    sampler: str = "transformers"
    """Sampling engine: "transformers" (in this process), "vllm", "openai" (a server; requires
    `--base-url URL`), "ray" (several engines on a Ray cluster), or "quiet" (a Quiet-STaR model, which
    thinks before every token)."""


@dataclass(frozen=True)
class EvaluateOptions(AskOptions):
    """Options of an evaluation."""

    split: str = "test"
    """Split of the task: train, validation or test."""
    out: Path = Path("runs/test.jsonl")
    """File for the completions. The graded completions and the result are written beside it. Repeating
    the same command continues it."""


@dataclass(frozen=True)
class GradeOptions(OutputOptions, TaskOptions):
    """The task whose rules are used for grading."""

    heading: ClassVar[str] = "run"

    out: Path = Path("runs/graded.jsonl")
    """File for the graded completions. Repeating the same command continues it."""
    workers: int | None = None
    """Number of worker processes. Default: chosen from the input size, at most one per core."""


@dataclass(frozen=True)
class SelectOptions(ExcludeOptions, OutputOptions, PromptOptions, TaskOptions):
    """Filters for completions, and the form of the training examples."""

    heading: ClassVar[str] = "selection"

    keep: list[Literal["correct", "sound", "distinct"]] = field(default_factory=lambda: ["correct"])
    """Filters, applied in order: "correct" (the answer is right), "sound" (no wrong equation),
    "distinct" (one of each solution path)."""
    distinct_by: DistinctBy = "text"
    """Criterion by which completions count as duplicates: the same "text", the same "equations" or
    "numbers" in the same order, or a small edit distance ("edits")."""
    at_most: int | None = None
    """Maximum number of completions per problem. Default: no limit."""
    make: Literal["examples"] = "examples"
    """Kind of training data."""
    prompt: Prompt = "bare"
    """Prompt style of the training examples: "few_shot" (with the task's worked examples), "bare" (the
    question alone) or "chat" (the model's chat template)."""
    out: Path = Path("runs/examples.jsonl")
    """File for the training examples."""
    workers: int | None = None
    """Number of worker processes. Default: chosen from the input size, at most one per core."""


@dataclass(frozen=True)
class TrainOptions(LaunchOptions, TrainingOptions):
    """Options of a fine-tuning. Other options of TRL are given with `--training`."""

    heading: ClassVar[str] = "training"

    model: str = "embedded"
    """Hugging Face model name or model folder, or "embedded" for the small model in this package."""
    data: Path = Path("runs/examples.jsonl")
    """Training data as JSONL. For sft: columns prompt and completion. For dpo: columns prompt, chosen and
    rejected, or preferences.jsonl of a run."""
    out: Path = Path("runs/model")
    """Model folder to write. Repeating the same command continues an interrupted training."""
    max_steps: int = -1
    """Number of optimizer steps. -1: `num_train_epochs` decides."""
    learning_rate: float | Auto = "auto"
    """Peak learning rate. "auto": by the size of the model; a tenth of it for dpo (docs/training.md)."""
    seed: int = 0
    """Random seed for the order of the examples."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's `SFTConfig` or `DPOConfig`, such as `--training.bf16 true` or
    `--training.beta 0.5`."""


STAGES: dict[str, tuple[type, list[Positional]]] = {
    "sample": (AskOptions, []),
    "grade": (GradeOptions, [("rollouts", "files of stored completions", "+")]),
    "select": (SelectOptions, [("rollouts", "files of graded completions", "+")]),
    "train": (TrainOptions, [("kind", "sft (supervised fine-tuning) or dpo (preferences)", None)]),
    "evaluate": (EvaluateOptions, []),
}
"""Options and positional arguments of each stage."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of a stage and return the dataclass of its options."""
    del given
    options, positional = STAGES[command]
    return add_options(parser, options, positional=positional)


def run(command: str, options: Namespace) -> int:
    """Run a stage and return the exit code."""
    runs = {
        "sample": sample,
        "grade": grade,
        "select": select,
        "train": train,
        "evaluate": evaluate,
    }
    return runs[command](options)


def task_flags(task: str, options: dict[str, Any]) -> str:
    """Return the command-line flags that select a task, with a leading space."""
    flags = [f" --task {task}"] + [
        f" --task-options.{key} {shlex.quote(value if isinstance(value, str) else json.dumps(value))}"
        for key, value in options.items()
    ]
    return "".join(flags)


def sample(options: Namespace) -> int:
    """Sample completions and store them."""
    from selftaught.rollouts.store import fill
    from selftaught.runs.folder import remember

    ask = AskOptions(**values_of(options))
    _, problems, style, params = _asked(ask)

    with (
        locked_output(ask.out, "sample") as reporter,
        _opened(ask) as sampler,
        usage_summary(sampler, ask.out),
        reporter.progress("sampling", len(problems) * params.n) as advance,
    ):
        count = fill(
            sampler, problems, style, params, store=ask.out, progress=advance,
            origin="rationalized" if ask.hint else "sampled",
        )  # fmt: skip
    remember(ask, ask.out)
    say(f"{count} rollouts in {ask.out}")
    graded = ask.out.with_name("graded.jsonl")
    say(f"Next: selftaught grade{task_flags(ask.task, ask.task_options)} {ask.out} --out {graded}")
    return DONE


def grade(options: Namespace) -> int:
    """Grade stored completions."""
    from selftaught.records import OUTCOMES
    from selftaught.rollouts.streaming import grade_stores
    from selftaught.runs.folder import remember

    stores = [Path(store) for store in options.pop("rollouts")]
    how = GradeOptions(**values_of(options))
    with locked_output(how.out, "grade"):
        counts = grade_stores(stores, how.out, how.task, how.task_options, workers=how.workers)
    remember(how, how.out)
    summary = ", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in OUTCOMES)
    say(f"{summary}: {how.out}")
    flags = task_flags(how.task, how.task_options)
    say(f"Next: selftaught select{flags} {how.out} --out {how.out.with_name('examples.jsonl')}")
    return DONE


def select(options: Namespace) -> int:
    """Filter graded completions and write training examples."""
    from selftaught.rollouts.flags import FlagFilter
    from selftaught.rollouts.streaming import choose
    from selftaught.runs.folder import remember
    from selftaught.safety.checks import open_checks
    from selftaught.tasks import open_task

    stores = [Path(store) for store in options.pop("rollouts")]
    how = SelectOptions(**values_of(options))
    style = _style(open_task(how.task, **how.task_options), how)
    with (
        locked_output(how.out, "select"),
        open_checks(how) if how.exclude_flagged else nullcontext() as checks,
    ):
        flags = None if checks is None else FlagFilter(checks)
        kept, count = choose(
            stores, how.out, how.keep, style, distinct_by=how.distinct_by, at_most=how.at_most,
            workers=how.workers, flags=flags,
        )  # fmt: skip
    remember(how, how.out)
    say(f"{kept} of {count} rollouts kept: {how.out}")
    if flags is not None:
        say(f"Excluded by the checks: {flags if flags.dropped else 'none'}")
    say(f"Next: selftaught train sft --model MODEL --data {how.out}")
    return DONE


def train(options: Namespace) -> int:
    """Fine-tune a model on examples (sft) or preference pairs (dpo)."""
    from selftaught.runs.folder import remember
    from selftaught.training.launch import PLACE, Stage, launch, launch_of

    kind = options.pop("kind")
    if kind not in ("sft", "dpo"):
        raise ValueError(f"Expected the kind of training, sft or dpo; got {kind!r}.")
    how = TrainOptions(**values_of(options))
    refuse_repeated(how)
    how = _with_settings(how, preferences=kind == "dpo")
    lora = {"r": how.lora_r, "alpha": how.lora_alpha, "target_modules": how.lora_target_modules}
    own = {"model", "data", "out", "train_batch_size", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "training",
           *PLACE}  # fmt: skip
    given = {name: value for name, value in asdict(how).items() if name not in own} | how.training
    size, device = as_number(how.train_batch_size), as_number(how.per_device_train_batch_size)
    given["gradient_accumulation_steps"] = int(size // device)
    stage = Stage(kind, _model(how.model), how.data, how.out, how.out.with_name(how.out.name + ".training"),
                  given, lora if how.use_peft else None)  # fmt: skip
    with (
        locked_output(how.out, "train") as reporter,
        reporter.progress("training", max(how.max_steps, 0)) as advance,
    ):
        done = launch(stage, launch_of(how), advance)
    remember(how, how.out)
    what = "examples" if kind == "sft" else "preferences"
    from_text = f", {done.from_text} tokenized from text" if done.from_text else ""
    say(f"{counted(done.steps, 'step')} on {done.trained_on} {what} ({done.too_long} too long{from_text}), "
         f"loss {done.loss:.3f}: {done.model}")  # fmt: skip
    return DONE


def _with_settings(how: TrainOptions, *, preferences: bool) -> TrainOptions:
    """Return the options with a value for each that is "auto"."""
    from selftaught.samplers import count_parameters
    from selftaught.training.auto import (
        auto_batch,
        auto_batches,
        auto_learning_rate,
        given_batches,
    )

    parameters = count_parameters(_model(how.model))
    suggested = auto_batch(_lines(how.data), 128)
    given = given_batches(
        how.train_batch_size, how.per_device_train_batch_size, how.gradient_accumulation_steps,
        how.num_processes,
    )  # fmt: skip
    whole, device = auto_batches(*given, parameters, suggested)
    rate = how.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(parameters, lora=how.use_peft, preferences=preferences)
    return replace(
        how, train_batch_size=whole, per_device_train_batch_size=device,
        gradient_accumulation_steps=None, learning_rate=rate,
    )  # fmt: skip


def _lines(path: Path) -> int:
    """Return the number of lines of a file; 0 if it cannot be read, which the training reports."""
    if not path.is_file():
        return 0
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def evaluate(options: Namespace) -> int:
    """Measure the accuracy of a model on a task."""
    from selftaught.evaluation.evaluator import evaluate
    from selftaught.records import write_atomically
    from selftaught.reports.tables import markdown_table
    from selftaught.runs.folder import remember

    ask = EvaluateOptions(**values_of(options))
    task, problems, style, params = _asked(ask)
    with (
        locked_output(ask.out, "evaluate") as reporter,
        _opened(ask) as sampler,
        usage_summary(sampler, ask.out),
        reporter.progress("evaluating", len(problems) * params.n) as advance,
    ):
        evaluation = evaluate(
            sampler, task, problems, style, params, store=ask.out, name=ask.model, progress=advance
        )
    remember(ask, ask.out)
    result = ask.out.with_name(ask.out.stem + ".evaluation.json")
    write_atomically(result, json.dumps(evaluation.to_dict(), indent=2) + "\n")
    print(markdown_table([evaluation]))
    return DONE


def _asked(ask: AskOptions) -> "tuple[Task, Any, Any, Any]":
    """Return the task, its problems, the prompt style and the sampling options of a command."""
    from selftaught.options import check_count
    from selftaught.prompts import hinted
    from selftaught.samplers.base import SamplingParams
    from selftaught.tasks import open_task

    check_count("limit", ask.limit)
    _check_sampler(ask)
    task = open_task(ask.task, **ask.task_options)
    style = _style(task, ask)
    params = SamplingParams(
        n=ask.n, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed,
        max_tokens=ask.max_tokens or task.max_tokens, thought_marks=task.thought_marks,
    )  # fmt: skip
    shown = hinted(style, task.hint) if ask.hint else style
    return task, task.problems(ask.split)[: ask.limit], shown, params


def _check_sampler(ask: AskOptions) -> None:
    """Check the sampler's options before the task is read."""
    if ask.sampler == "quiet":
        from selftaught.cli.quiet_model import quiet_sampler
        from selftaught.options import check_options

        see = "selftaught samplers quiet"
        check_options("The sampler 'quiet'", quiet_sampler, ask.sampler_options, see=see)
    else:
        from selftaught.samplers import check_sampler

        check_sampler(ask.sampler, ask.sampler_options)


def _opened(ask: AskOptions) -> Any:
    """Open the sampler of a command; "quiet" is a Quiet-STaR model."""
    if ask.sampler == "quiet":
        from selftaught.cli.quiet_model import quiet_sampler

        return quiet_sampler(ask.model, **ask.sampler_options)
    from selftaught.samplers import open_sampler

    return open_sampler(ask.sampler, _model(ask.model), **ask.sampler_options)


def _style(task: "Task", how: AskOptions | SelectOptions) -> Any:
    return task.styled(
        how.prompt,
        system_prompt=how.system_prompt or "",
        chat_template_kwargs=how.chat_template_kwargs,
    )


def _model(name: str) -> str:
    from selftaught.models.embedded import embedded_model

    return str(embedded_model()) if name == "embedded" else name


def values_of(options: Namespace) -> dict[str, Any]:
    """Return parsed options as a dictionary."""
    return {name: options[name] for name in vars(options)}

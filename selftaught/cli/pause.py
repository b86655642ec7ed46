"""The command line of pause tokens: `selftaught pause train | evaluate`."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options, parser_of
from selftaught.cli.help import commands_help
from selftaught.cli.output import progress_bar
from selftaught.cli.quiet import Bar, TextOptions, texts_of
from selftaught.option_groups import ModelOptions

ABOUT = {
    "train": "fine-tune with pause tokens after the prompt (--data), or pre-train with pause tokens in the text (--text)",
    "evaluate": "measure the accuracy on a task with pause tokens after the question",
}  # fmt: skip


@dataclass(frozen=True)
class DataOptions(TextOptions):
    """The training data: `--text` for pre-training or `--data` for fine-tuning."""

    heading: ClassVar[str] = "text"

    text: str = ""
    """Text for pause-pretraining: a .jsonl, .parquet or plain text file, a folder of such files, or
    a dataset on the Hugging Face Hub. Give either `--text` or `--data`."""
    length: int = 256
    """Length of a span of text in tokens. Texts are cut into spans."""
    data: Path | None = None
    """Examples for pause-finetuning: JSONL with the columns prompt and completion."""


@dataclass(frozen=True)
class PauseModelOptions:
    """The model."""

    heading: ClassVar[str] = "model and task"

    model: str = "embedded"
    """Hugging Face model name or model folder, or "embedded" for the small model in this package.
    The pause token is added to the vocabulary if the model does not have it."""


@dataclass(frozen=True)
class PauseOptions:
    """The pause tokens in the training data."""

    heading: ClassVar[str] = "thinking"

    variant: Literal["StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT"] = (
        "PausePT_PauseFT"
    )
    """Variant of the paper: whether pre-training (PT) and fine-tuning (FT) use pause tokens (Pause)
    or not (Std)."""
    pauses: int = 10
    """Number of pause tokens after each prompt in fine-tuning. 10 or 50 in the paper."""
    share: float = 0.1
    """Number of pause tokens per token of text in pre-training. 0.1 in the paper."""


@dataclass(frozen=True)
class RunOptions:
    """The result of the run."""

    heading: ClassVar[str] = "run"

    out: Path = Path("runs/pause")
    """Model folder to write. Repeating the same command continues an interrupted training."""
    seed: int = 0
    """Random seed for the positions of pause tokens and the order of the examples."""


@dataclass(frozen=True)
class TrainOptions(RunOptions, PauseOptions, PauseModelOptions, DataOptions):
    """Training; other options go to TRL by `--training`."""

    heading: ClassVar[str] = "training"

    max_steps: int = -1
    """Number of optimizer steps. -1: `num_train_epochs` decides."""
    num_train_epochs: float = 3.0
    """Number of passes over the training data."""
    learning_rate: float = 2e-5
    """Peak learning rate. 2e-5 is TRL's default."""
    per_device_train_batch_size: int = 8
    """Number of examples per device and forward pass."""
    max_length: int = 1024
    """Maximum length of a training example in tokens, pause tokens included. Longer examples are
    dropped and counted, never truncated."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's `SFTConfig`, such as `--training.bf16 true`."""


@dataclass(frozen=True)
class EvaluateOptions(ModelOptions):
    """Evaluation on a task."""

    heading: ClassVar[str] = "run"

    model: str = "runs/pause"
    """Folder of a model trained with pause tokens. With `--filler`, any model."""
    split: str = "test"
    """Split of the task: train, validation or test."""
    limit: int | None = None
    """Number of problems, from the first. Default: all."""
    prompt: Literal["few_shot", "bare"] = "bare"
    """Prompt style: "few_shot" (the task's worked examples before the question) or "bare" (the
    question alone)."""
    pauses: list[int] = field(default_factory=lambda: [10])
    """Numbers of pause tokens after the question. Each number is evaluated separately."""
    filler: str | None = None
    """Text that replaces each pause token, such as "." in the control experiment of the paper.
    Default: the pause token."""
    max_tokens: int | None = None
    """Maximum number of new tokens per completion. Default: set by the task."""
    out: Path = Path("runs/pause-test")
    """Folder for the completions and results. Repeating the same command continues it."""


OPTIONS = {"train": TrainOptions, "evaluate": EvaluateOptions}


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the subcommands and return the dataclass with the options of the chosen one."""
    usage = f"selftaught {command} COMMAND [options]"
    about = str(parser.description)
    parser.format_usage = lambda: f"usage: {usage}\n"  # type: ignore[method-assign]
    parser.format_help = lambda: commands_help(usage, about, {"commands": ABOUT})  # type: ignore[method-assign]
    commands = parser.add_subcommands(required=True, dest="action")
    for name, summary in ABOUT.items():
        sub = parser_of(f"selftaught {command} {name}", f"{summary[0].upper()}{summary[1:]}.")
        commands.add_subcommand(name, sub)
        add_options(sub, OPTIONS[name])
    chosen = [one for one in given if not one.startswith("-")]
    return [OPTIONS[one] for one in chosen[1:2] if one in OPTIONS]


def run(command: str, options: Namespace) -> int:
    """Run the chosen subcommand and return the exit code."""
    del command
    bar = progress_bar
    action = str(options.action)
    given = options[action]
    values = {name: given[name] for name in vars(given) if name != "config"}
    if action == "train":
        _train(TrainOptions(**values), bar)
    else:
        _evaluate(EvaluateOptions(**values), bar)
    return 0


def _train(how: TrainOptions, bar: Bar) -> None:
    from selftaught.methods.pause import VARIANTS, add_pause_token, pause_rows, with_pauses
    from selftaught.models.embedded import embedded_model
    from selftaught.records import read_examples
    from selftaught.runs.folder import ProgressReporter, lock_folder, remember
    from selftaught.runs.status import status_file, tracked_status
    from selftaught.training import sft_config, train_rows, train_sft

    in_text, in_examples = VARIANTS[how.variant]
    share, pauses = how.share if in_text else 0.0, how.pauses if in_examples else 0
    if (how.data is None) == (not how.text):
        raise ValueError(
            "Expected exactly one of --data (pause-finetuning) and --text (pause-pretraining)."
        )
    own = {"model", "data", "text", "column", "split", "subset", "variant", "pauses", "share", "length", "limit",
           "out", "training"}  # fmt: skip
    given = {name: value for name, value in asdict(how).items() if name not in own} | how.training
    config = sft_config(how.out.with_name(how.out.name + ".training"), **given)
    name = str(embedded_model()) if how.model == "embedded" else how.model
    made_of = hashlib.sha256(name.encode()).hexdigest()[:8]
    start = how.out.with_name(f"{how.out.name}.start-{made_of}")
    with (
        lock_folder(how.out.parent, f"{how.out.name}.lock"),
        tracked_status(
            status_file(how.out), "pause train", ProgressReporter(progress=bar)
        ) as reporter,
        reporter.progress("training", max(how.max_steps, 0)) as advance,
    ):
        add_pause_token(name, start)
        if how.data is not None:
            examples = with_pauses(read_examples(how.data), pauses)
            done = train_sft(start, examples, config, out=how.out, progress=advance)
        else:
            texts = list(texts_of(how))

            def rows(tokenizer: Any) -> tuple[list[dict[str, list[int]]], int]:
                return pause_rows(
                    texts, tokenizer, length=how.length, share=share, seed=how.seed
                ), 0

            made_of = [texts, share, how.length]
            done = train_rows(start, rows, made_of, config, out=how.out, progress=advance)
    remember(how, how.out)
    print(f"{done.steps} steps on {done.trained_on} rows ({done.too_long} too long), "
          f"loss {done.loss:.3f}: {done.model}")  # fmt: skip


def _evaluate(how: EvaluateOptions, bar: Bar) -> None:
    from selftaught.evaluation.evaluator import evaluate
    from selftaught.methods.pause import PAUSE, paused, refuse_without_pause
    from selftaught.models.embedded import embedded_model
    from selftaught.options import check_count
    from selftaught.reports.tables import markdown_table
    from selftaught.runs.folder import ProgressReporter, lock_folder, remember
    from selftaught.runs.status import tracked_status
    from selftaught.samplers import open_sampler
    from selftaught.samplers.base import SamplingParams
    from selftaught.tasks import open_task

    check_count("limit", how.limit)
    task = open_task(how.task, **how.task_options)
    problems = task.problems(how.split)[: how.limit]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=how.max_tokens or task.max_tokens,
        thought_marks=task.thought_marks,
    )
    name = str(embedded_model()) if how.model == "embedded" else how.model
    if how.filler is None and any(how.pauses):
        refuse_without_pause(name)
    found = []
    with (
        lock_folder(how.out),
        tracked_status(
            how.out / "status.json", "pause evaluate", ProgressReporter(progress=bar)
        ) as reporter,
        open_sampler("transformers", name) as sampler,
    ):
        remember(how, how.out)
        for count in how.pauses:
            style = paused(task.styled(how.prompt), count, how.filler or PAUSE)
            store = how.out / f"{'pauses' if how.filler is None else 'fillers'}-{count}.jsonl"
            with reporter.progress("evaluating", len(problems)) as advance:
                found.append(
                    evaluate(
                        sampler, task, problems, style, params, store=store,
                        name=f"{Path(name).name}, {style.name}", progress=advance,
                    )
                )  # fmt: skip
    print(markdown_table(found))

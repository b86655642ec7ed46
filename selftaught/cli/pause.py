"""The command line of pause tokens: `selftaught pause train | evaluate`."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.output import DONE, locked_output, locked_run, plan_text, say
from selftaught.cli.push import HubOptions, check_push, hub_options, push_after
from selftaught.cli.subcommands import DryRun, Subcommand, add_subcommands, chosen_subcommand
from selftaught.cli.texts import TextOptions, texts_of
from selftaught.option_groups import ModelOptions, TrackerOptions
from selftaught.runs.trackers import trainer_reports

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.training.sft import SFTConfig
    from selftaught.training.trainer import Row


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
class RunOptions(TrackerOptions):
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


SUBCOMMANDS = {
    "train": Subcommand(
        "fine-tune with pause tokens after the prompt (--data), or pre-train with pause tokens in the text (--text)",
        (TrainOptions, DryRun, HubOptions),
    ),
    "evaluate": Subcommand(
        "measure the accuracy on a task with pause tokens after the question", (EvaluateOptions,)
    ),
}  # fmt: skip
OPTIONS = {name: one.options[0] for name, one in SUBCOMMANDS.items()}
"""The dataclass with the options of each subcommand."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the subcommands and return the dataclasses with the options of the chosen one."""
    return add_subcommands(command, parser, given, SUBCOMMANDS)


def run(command: str, options: Namespace) -> int:
    """Run the chosen subcommand and return the exit code."""
    del command
    action, values = chosen_subcommand(options)
    if action == "train":
        dry_run, hub = values.pop("dry_run"), hub_options(values)
        how = TrainOptions(**values)
        if dry_run:
            show_plan(how)
            return DONE
        check_push(hub, how.out)
        train(how)
        push_after(hub, how.out)
    else:
        evaluate(EvaluateOptions(**values))
    return DONE


@dataclass(frozen=True)
class Prepared:
    """A training whose options and data have been checked."""

    config: "SFTConfig"
    model: str
    """Folder or Hub name of the model."""
    rows: "Callable[[PreTrainedTokenizerBase], tuple[Sequence[Row], int]]"
    """Function from a tokenizer with the pause token to the training rows and the number of rows
    that were too long."""
    made_of: object
    """The data that the rows are made from."""


def prepared(how: TrainOptions) -> Prepared:
    """Check the options and read the data. Nothing is written.

    Raises:
        ValueError: an option or the data cannot be used; the message names it.
        OSError: a file does not exist.
    """
    from selftaught.methods.pause import VARIANTS, pause_rows, with_pauses
    from selftaught.models.embedded import embedded_model
    from selftaught.records import read_examples
    from selftaught.training import sft_config, tokenized

    in_text, in_examples = VARIANTS[how.variant]
    share, pauses = how.share if in_text else 0.0, how.pauses if in_examples else 0
    if (how.data is None) == (not how.text):
        raise ValueError(
            "Expected exactly one of --data (pause-finetuning) and --text (pause-pretraining)."
        )
    own = {"model", "data", "text", "column", "split", "subset", "variant", "pauses", "share", "length", "limit",
           "out", "report_to", "training"}  # fmt: skip
    given = {name: value for name, value in asdict(how).items() if name not in own}
    given |= trainer_reports(how.report_to, how.training) | how.training
    config = sft_config(how.out.with_name(how.out.name + ".training"), **given)
    name = str(embedded_model()) if how.model == "embedded" else how.model
    if how.data is not None:
        examples = with_pauses(read_examples(how.data), pauses)
        return Prepared(
            config, name, lambda tokenizer: tokenized(examples, tokenizer, config.max_length), examples
        )  # fmt: skip
    texts = list(texts_of(how))

    def rows(tokenizer: "PreTrainedTokenizerBase") -> "tuple[Sequence[Row], int]":
        return pause_rows(texts, tokenizer, length=how.length, share=share, seed=how.seed), 0

    return Prepared(config, name, rows, [texts, share, how.length])


def train(how: TrainOptions) -> None:
    """Train a model with pause tokens."""
    from selftaught.cli.training_cards import write_pause_card
    from selftaught.methods.pause import add_pause_token
    from selftaught.runs.folder import remember
    from selftaught.training import train_rows

    ready = prepared(how)
    made_of = hashlib.sha256(ready.model.encode()).hexdigest()[:8]
    start = how.out.with_name(f"{how.out.name}.start-{made_of}")
    with (
        locked_output(how.out, "pause train") as reporter,
        reporter.progress("training", max(how.max_steps, 0)) as advance,
    ):
        add_pause_token(ready.model, start)
        done = train_rows(
            start, ready.rows, ready.made_of, ready.config, out=how.out, progress=advance
        )
    remember(how, how.out)
    write_pause_card(how, done)
    print(f"{done.steps} steps on {done.trained_on} rows ({done.too_long} too long), "
          f"loss {done.loss:.3f}: {done.model}")  # fmt: skip


def show_plan(how: TrainOptions) -> None:
    """Check what the training would refuse, and print the plan and the first row.

    Nothing is written. Of the model, the configuration, the tokenizer and the headers of the weight
    files are read.

    Raises:
        ValueError: an option, the model or the data cannot be used; the message names it.
        OSError: a file or the model does not exist, or the folder cannot be written.
    """
    from selftaught.methods.pause import PAUSE
    from selftaught.runs.folder import check_writable
    from selftaught.samplers import check_model
    from selftaught.training import open_tokenizer
    from selftaught.training.options import training_steps

    ready = prepared(how)
    check_model(ready.model)
    check_writable(how.out.parent)
    tokenizer = open_tokenizer(ready.model)
    tokenizer.add_tokens([PAUSE], special_tokens=True)
    rows, too_long = ready.rows(tokenizer)
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    tokens = sum(len(row["input_ids"]) for row in rows)
    pauses = sum(row["input_ids"].count(pause) for row in rows)
    batch = (
        ready.config.per_device_train_batch_size * ready.config.gradient_accumulation_steps
        * ready.config.world_size
    )  # fmt: skip
    lines = [
        ("Model", how.model),
        ("Rows", f"{how.data or how.text}: {len(rows)} rows ({tokens:,} tokens, {pauses:,} of them pauses), "
         f"{too_long} too long"),
        ("Training", f"{how.variant}: {training_steps(len(rows), ready.config)} optimizer steps, {batch} rows "
         f"per step, learning rate {ready.config.learning_rate:g}"),
        ("Folder", str(how.out)),
    ]  # fmt: skip
    first = rows[0]["input_ids"]
    say(plan_text(lines, f"First row ({len(first)} tokens)", str(tokenizer.decode(first))))


def evaluate(how: EvaluateOptions) -> None:
    """Measure the accuracy of a model with each number of pause tokens, and print a table."""
    from selftaught.evaluation import evaluator
    from selftaught.methods.pause import PAUSE, paused, refuse_without_pause
    from selftaught.models.embedded import embedded_model
    from selftaught.options import check_count
    from selftaught.reports.tables import markdown_table
    from selftaught.runs.folder import remember
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
        locked_run(how.out, "pause evaluate") as reporter,
        open_sampler("transformers", name) as sampler,
    ):
        remember(how, how.out)
        for count in how.pauses:
            style = paused(task.styled(how.prompt), count, how.filler or PAUSE)
            store = how.out / f"{'pauses' if how.filler is None else 'fillers'}-{count}.jsonl"
            with reporter.progress("evaluating", len(problems)) as advance:
                found.append(
                    evaluator.evaluate(
                        sampler, task, problems, style, params, store=store,
                        name=f"{Path(name).name}, {style.name}", progress=advance,
                    )
                )  # fmt: skip
    print(markdown_table(found))

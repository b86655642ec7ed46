"""The command line of pause tokens: `selftaught pause train | evaluate`."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options, parser_of
from selftaught.cli.help import commands_help
from selftaught.cli.output import progress_bar
from selftaught.cli.quiet import Bar, TextOptions, texts_of

ABOUT = {
    "train": "fine-tune with pauses after the prompt (--data), or pre-train with pauses in text (--text)",
    "evaluate": "measure a model on a task, with pauses after the question",
}


@dataclass(frozen=True)
class TrainOptions(TextOptions):
    """A training, on --text (pre-training) or --data (fine-tuning); options not named here go to TRL by --training."""

    model: str = "embedded"
    """A Hugging Face name or folder, or "embedded"; it gets the pause token if it lacks it."""
    data: Path | None = None
    """Examples for pause-finetuning: JSONL with prompt and completion."""
    variant: Literal["StdPT_StdFT", "StdPT_PauseFT", "PausePT_StdFT", "PausePT_PauseFT"] = (
        "PausePT_PauseFT"
    )
    """The paper's four: whether text (PT) and examples (FT) have pauses or not (Std)."""
    pauses: int = 10
    """After each prompt in fine-tuning: 10 or 50 in the paper."""
    share: float = 0.1
    """Pauses per token of text in pre-training: 10% in the paper."""
    out: Path = Path("runs/pause")
    """The model folder to make."""
    max_steps: int = -1
    """Optimizer steps; -1: num_train_epochs decides."""
    num_train_epochs: float = 3.0
    """Passes over the data."""
    learning_rate: float = 2e-5
    """Peak learning rate (TRL's default)."""
    per_device_train_batch_size: int = 8
    """Rows in a step."""
    max_length: int = 1024
    """Longest example in tokens, pauses included; longer ones are dropped and counted."""
    seed: int = 0
    """Of the places of pauses and the order of rows."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's SFTConfig, such as --training.bf16 true."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What is measured, and with how many pauses."""

    model: str = "runs/pause"
    """A model trained with pauses; any model for the control."""
    task: str = "arithmetic"
    """Which questions: arithmetic, gsm8k, commonsense_qa, competition_math, gym, question_file."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options."""
    split: str = "test"
    """train, validation or test."""
    limit: int | None = None
    """Only the first so many problems."""
    prompt: Literal["few_shot", "bare"] = "bare"
    """What stands before a question."""
    pauses: list[int] = field(default_factory=lambda: [10])
    """After the question; several numbers for a sweep."""
    filler: str | None = None
    """Instead of pauses, as many of these: the control of the paper has "."."""
    max_tokens: int | None = None
    """Room for an answer; none: the task's own."""
    out: Path = Path("runs/pause-test")
    """A folder for the stores; repeating the command continues them."""


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
        raise ValueError("Expected either --data (pause-finetuning) or --text (pause-pretraining).")
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

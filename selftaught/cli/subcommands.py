"""Commands that consist of subcommands, such as `selftaught quiet train`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import Positional, add_options, parser_of
from selftaught.cli.help import commands_help


@dataclass(frozen=True)
class DryRun:
    """The option `--dry-run` of a training command."""

    heading: ClassVar[str] = "run"

    dry_run: bool = False
    """Check all options and inputs, print the plan and the first training example, and stop."""


@dataclass(frozen=True)
class Subcommand:
    """A subcommand: its summary in the help, and the dataclasses and arguments that it takes."""

    summary: str
    """One line of the help, without a full stop."""
    options: Sequence[type]
    """Dataclasses whose fields are the options."""
    positional: Sequence[Positional] = ()
    """Positional arguments."""


def add_subcommands(
    command: str,
    parser: ArgumentParser,
    given: Sequence[str],
    subcommands: Mapping[str, Subcommand],
) -> Sequence[type]:
    """Add subcommands to the parser of a command.

    Args:
        command: name of the command.
        parser: its parser.
        given: the command line.
        subcommands: the subcommands by name.

    Returns:
        The dataclasses with the options of the chosen subcommand.
    """
    usage = f"selftaught {command} COMMAND [options]"
    about = str(parser.description)
    summaries = {name: one.summary for name, one in subcommands.items()}
    parser.format_usage = lambda: f"usage: {usage}\n"  # type: ignore[method-assign]
    parser.format_help = lambda: commands_help(usage, about, {"commands": summaries})  # type: ignore[method-assign]
    commands = parser.add_subcommands(required=True, dest="action")
    for name, one in subcommands.items():
        summary = f"{one.summary[0].upper()}{one.summary[1:]}."
        sub = parser_of(f"selftaught {command} {name}", summary)
        commands.add_subcommand(name, sub)
        add_options(sub, *one.options, positional=one.positional)
    words = [one for one in given if not one.startswith("-")]
    chosen = subcommands.get(words[1]) if len(words) > 1 else None
    return [] if chosen is None else chosen.options


def chosen_subcommand(options: Namespace) -> tuple[str, dict[str, Any]]:
    """Return the name of the chosen subcommand and the values of its options."""
    action = str(options.action)
    given = options[action]
    return action, {name: given[name] for name in vars(given) if name != "config"}

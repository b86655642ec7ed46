"""The options of a command, derived from the fields of dataclasses and their types.

A field of type `bool` is a flag: `--flag`, `--no-flag` and `--flag false`. A field of type `list` takes
several values: `--k 1 3 6`. Every option may be written with hyphens or underscores.
"""

import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from itertools import takewhile
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser

from selftaught.cli.help import GENERAL, command_help
from selftaught.cli.output import BAD_INPUT
from selftaught.printable import printable

Positional = tuple[str, str, str | None]

SAID = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""Values that may follow a flag."""
ALIASES = {"base_url": "sampler_options.base_url"}
"""Other names of options."""
LITERAL = ("check_patterns",)
"""Lists whose values may start with [ and are then not a list in YAML."""
HIDDEN = ("version", "method")
"""Options that no help shows; `method` is in the config.yaml of runs."""


def switches(options: Iterable[type]) -> set[str]:
    """The fields of these dataclasses that are true or false."""
    return {name for name, types in _types(options) if bool in types}


def lists(options: Iterable[type]) -> dict[str, Any]:
    """The fields of these dataclasses that take several values, with the type of one value."""
    return {
        name: (get_args(one) or (str,))[0]
        for name, types in _types(options)
        for one in types
        if (get_origin(one) or one) in (list, tuple, Sequence)
    }


def _types(options: Iterable[type]) -> Iterable[tuple[str, Sequence[Any]]]:
    """Every field with its type, a union as its members."""
    for one in options:
        hints = get_type_hints(one)
        for field in fields(one):
            hint = hints[field.name]
            union = get_origin(hint) in (Union, UnionType)
            yield field.name, get_args(hint) if union else (hint,)


class CommandParser(ArgumentParser):
    """A parser of one command, whose errors are one line and name the command whose help to read."""

    program = "selftaught"
    """The command as it is typed."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an error and exit with code 2."""
        del ex
        words = plain_error(" ".join(message.split()))
        print(printable(f"selftaught: error: {words}\nSee: {self.program} --help"), file=sys.stderr)
        raise SystemExit(BAD_INPUT)


KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text",
         "NoneType": "null"}  # fmt: skip
"""Types in the parser's messages, in words."""


def plain_error(message: str) -> str:
    """Return a message of the parser about a wrong value in words; other messages as they are.

    For example, `Parser key "k": Expected a <class 'int'>. Got value: 1.5` becomes `--k must be a
    whole number; got 1.5.`
    """
    found = re.match(r'Parser key "([\w.]+)": (.*?)(?:Got|Given) value: (.*)$', message)
    if found is None:
        return message
    name, expected, value = found.groups()
    kinds: list[str] = []
    for kind, values in re.findall(
        r"Expected a (?:<class '(\w+)'>|typing\.Literal\[(.*?)\])", expected
    ):
        kinds += (
            [one.strip(" '\"") for one in values.split(",")]
            if values
            else [str(KINDS.get(kind, kind))]
        )
    if not kinds:
        return message
    distinct = list(dict.fromkeys(kinds))
    either = " or ".join([", ".join(distinct[:-1]), distinct[-1]] if distinct[1:] else distinct)
    return f"--{name.replace('_', '-')} must be {either}; got {value.rstrip('.')}."


def parser_of(program: str, about: str, **options: Any) -> CommandParser:
    """Return the parser of a command.

    Args:
        program: the command as it is typed, such as "selftaught quiet train".
        about: one sentence for the help.
    """
    parser = CommandParser(prog=program, description=about, **options)
    parser.program = program
    return parser


def add_options(
    parser: ArgumentParser,
    *options: type,
    positional: Sequence[Positional] = (),
    config: bool = True,
    note: str = "",
) -> Sequence[type]:
    """Add the fields of dataclasses as options, with a help text made from them; returns the dataclasses.

    Args:
        positional: the positional arguments: name, help text, and `nargs` of argparse.
        config: whether options can be read from a file.
        note: a last line of the help.
    """
    for name, text, count in positional:
        extra: dict[str, Any] = {"nargs": count} if count else {}
        parser.add_argument(name, help=text, **extra)
    if config:
        parser.add_argument("--config", action=ActionConfigFile, help=GENERAL["config"][1])
    for one in options:
        parser.add_class_arguments(one, as_group=False)
    shown = [
        name.upper() + (f" [{name.upper()} ...]" if count == "+" else "") if count != "?"
        else f"[{name.upper()}]"
        for name, _, count in positional
    ]  # fmt: skip
    program = parser.program if isinstance(parser, CommandParser) else str(parser.prog)
    usage = " ".join([program, *shown, *(["[options]"] if options or config else [])])
    about = str(parser.description)
    parser.format_usage = lambda: f"usage: {usage}\n"  # type: ignore[method-assign]
    parser.format_help = lambda: command_help(  # type: ignore[method-assign]
        usage, about, options, vars(parser.get_defaults()),
        [(name.upper(), text) for name, text, _ in positional], with_config=config, note=note,
    )  # fmt: skip
    return options


def plain_forms(given: Sequence[str], options: Sequence[type]) -> list[str]:
    """Return the command line with every flag as `--flag=true` and every list as `--k=[1, 3, 6]`.

    Args:
        options: the dataclasses whose fields are the command's options.

    Raises:
        ValueError: an option does not exist; suggests the one that was meant.
    """
    flags, several = switches(options), lists(options)
    known = {field.name for one in options for field in fields(one)} | {*GENERAL, *HIDDEN, *ALIASES}
    plain: list[str] = []
    rest = list(given)
    while rest:
        one = rest.pop(0)
        if len(one) == 2 and one[0] == "-" and one[1] in known:
            one = f"-{one}"  # -n 4 is --n 4
        if one == "--" or not one.startswith("--"):
            plain.append(one)
            continue
        name, equals, value = one[2:].partition("=")
        name = name.replace("-", "_") if name != "version" else name
        if options:
            _check_known(name, known)
        name = ALIASES.get(name, name)
        if name in flags or (not equals and name.removeprefix("no_") in flags):
            said = SAID.get(value.lower()) if equals else None
            if not equals and rest and name in flags and rest[0].lower() in SAID:
                said = SAID[rest.pop(0).lower()]
            if said is None and not equals:
                said = name in flags
            written = value if said is None else str(said).lower()
            plain.append(f"--{name if name in flags else name.removeprefix('no_')}={written}")
        elif equals and name in LITERAL:
            plain.append(f"--{name}={json.dumps([value])}")
        elif not equals and name in several:
            plain += _list(name, several[name], rest)
        else:
            plain.append(f"--{name}{equals}{value}")
    return plain


def _check_known(name: str, known: set[str]) -> None:
    first = name.partition(".")[0].removesuffix("+")  # "+" appends to a list
    if first in known or first.removeprefix("no_") in known:
        return
    close = get_close_matches(first, known - set(HIDDEN), n=1)
    shown = first.replace("_", "-")
    hint = f" Did you mean --{close[0].replace('_', '-')}?" if close else ""
    raise ValueError(f"There is no option --{shown}.{hint} Add --help to see the options.")


def _list(name: str, kind: Any, rest: list[str]) -> list[str]:
    """A list option in one argument; takes its values off the front of `rest`."""
    values = list(takewhile(lambda value: not value.startswith("--"), rest))
    if get_origin(kind) is Literal and values and values[0] in get_args(kind):
        values = list(takewhile(lambda value: value in get_args(kind), values))
    written_as_list = len(values) == 1 and values[0].startswith("[") and name not in LITERAL
    if not values or written_as_list:
        return [f"--{name}"]  # without a value it is refused by the parser, in its own words
    if kind in (int, float) and len(values) == 1 and "," in values[0]:
        flag, separate = f"--{name.replace('_', '-')}", values[0].replace(",", " ").split()
        raise ValueError(
            f"{flag} takes its values separated by spaces: {flag} {' '.join(separate)}; got "
            f"{values[0]!r}."
        )
    del rest[: len(values)]
    return [f"--{name}={json.dumps([_value(value, kind) for value in values])}"]


def _value(text: str, kind: Any) -> object:
    """One value of a list: a number where numbers are expected and it is one, else the text."""
    for number in (int, float):
        if kind in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    return text

"""Help texts of the command line, made from the dataclasses that hold the options."""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from selftaught.options import Option

GENERAL = {
    "config": ("PATH", "YAML file of options. Options on the command line take precedence."),
    "print_config": ("", "Print the resolved options as YAML and exit."),
    "help": ("", "Show this message and exit."),
}
"""Options that the commands have beside their dataclasses: type in words, and help text."""


def option_help(options: type) -> dict[str, str]:
    """Return the string under each field of a dataclass, inherited fields included."""
    texts: dict[str, str] = {}
    for one in reversed(options.__mro__):
        if one is object:
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(one))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                texts[field.target.id] = " ".join(str(text.value.value).split())
    return texts


def heading_of(options: type, name: str) -> str:
    """Return the group in which an option is shown: that of the class which defines it first."""
    for one in reversed(options.__mro__):
        if one is not object and name in inspect.get_annotations(one):
            return vars(one).get("heading", "options")
    raise KeyError(name)


def command_help(
    usage: str, about: str, options: Sequence[type], defaults: Mapping[str, Any],
    positional: Iterable[tuple[str, str]] = (), *, with_config: bool = True, note: str = "",
) -> str:  # fmt: skip
    """Return the help text of a command.

    Args:
        usage: one line.
        options: the dataclasses whose fields are the options.
        defaults: values that are shown in place of those of the dataclasses.
        positional: names and help texts of the positional arguments.
        with_config: whether the command has `--config` and `--print-config`.
        note: a last line.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for one in options:
        texts, hints = option_help(one), get_type_hints(one)
        for field in fields(one):
            if field.default is not MISSING:
                plain = field.default
            else:
                plain = field.default_factory() if field.default_factory is not MISSING else None
            default = defaults.get(field.name, plain)
            line = (_flag(field.name, hints[field.name]), _text(texts[field.name], hints[field.name], default))  # fmt: skip
            lines = groups.setdefault(heading_of(one, field.name), [])
            lines.append(line)
            if inner := field.metadata.get("fields_of"):
                lines += _lines(field.name, options_in(inner))
    own = groups.pop("options", [])
    general = [
        (f"--{name.replace('_', '-')} {kind}".strip(), text)
        for name, (kind, text) in GENERAL.items()
        if with_config or name == "help"
    ]
    parts = [f"usage: {usage}", _wrapped(about, "")]
    if positional := list(positional):
        parts.append(group("arguments", positional))
    order = sorted(groups, key=lambda name: ORDER.index(name) if name in ORDER else -1)
    parts += [group(name, groups[name]) for name in order]
    parts.append(group("options", own + general))
    return "\n\n".join([*parts, *([note] if note else [])]) + "\n"


ORDER = ("model and task", "text", "prompt", "sampling", "choice", "thinking", "selection", "checks", "training", "launching", "server", "run", "hub")  # fmt: skip
"""The order of the groups; those of a single method come first."""


def commands_help(usage: str, about: str, groups: Mapping[str, Mapping[str, str]]) -> str:
    """Return the help text of a command that has subcommands, in groups."""
    shown = [group(name, list(commands.items())) for name, commands in groups.items()]
    last = f"See the options of a command with: {usage.removesuffix(' [options]')} --help"
    return "\n\n".join([f"usage: {usage}", _wrapped(about, ""), *shown, last]) + "\n"


def _width() -> int:
    return max(50, min(100, shutil.get_terminal_size((100, 24)).columns))


def _wrapped(text: str, indent: str) -> str:
    return textwrap.fill(
        text, _width(), initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
    )


def group(name: str, lines: Sequence[tuple[str, str]]) -> str:
    """A heading with its options: short ones on the line of their text, long ones above it."""
    column = 24
    shown = [f"{name}:"]
    for flag, text in lines:
        body = _wrapped(text, " " * (column + 2))
        if len(flag) <= column - 2:
            shown.append(f"  {flag:<{column}}" + body[column + 2 :])
        else:
            shown += [f"  {flag}", body]
    return "\n".join(shown)


def _members(hint: object) -> list[object]:
    """The members of a union without None; the type itself if it is no union."""
    if get_origin(hint) in (Union, UnionType):
        return [one for one in get_args(hint) if one is not NoneType]
    return [hint]


def _flag(name: str, hint: object) -> str:
    """An option as it is written, with its type in words."""
    flag, kinds = f"--{name.replace('_', '-')}", _members(hint)
    if kinds == [bool]:
        return f"{flag}, --no-{name.replace('_', '-')}"
    kind = kinds[0]
    if (get_origin(kind) or kind) is dict:
        return f"{flag}.NAME VALUE"
    if (get_origin(kind) or kind) in (list, tuple, Sequence):
        inner = _word((get_args(kind) or (str,))[0])
        return f"{flag} {inner} [{inner} ...]"
    return f"{flag} {'|'.join(dict.fromkeys(_word(one) for one in kinds))}"


def given_options(prefix: str, options: Iterable[Option]) -> str:
    """Return the help of options that are given as a mapping, such as `--task-options.NAME VALUE`.

    Args:
        prefix: the mapping, such as "task-options".
    """
    return group("options", _lines(prefix, options))


def _lines(prefix: str, options: Iterable[Option]) -> list[tuple[str, str]]:
    """The flag and the help text of each option of a mapping."""
    lines = []
    for one in options:
        flag = f"--{prefix}.{one.name.replace('_', '-')} {_given(one.hint)}"
        default = "Required." if one.default is None else f"Default: {one.default}."
        meaning = one.meaning.rstrip(".")
        meaning = f"{meaning}." if meaning else ""
        lines.append((flag, f"{meaning} {default}".strip()))
    return lines


def options_in(options: type) -> list[Option]:
    """Return the fields of a dataclass as options of a mapping."""
    texts, hints = option_help(options), get_type_hints(options)
    return [
        Option(one.name, hints[one.name], "none" if one.default in (None, MISSING) else str(one.default),
               texts[one.name])
        for one in fields(options)
    ]  # fmt: skip


def _given(hint: object) -> str:
    """The type of an option in a mapping, in words."""
    words = []
    for kind in _members(hint):
        origin = get_origin(kind) or kind
        if kind is bool:
            words.append("true|false")
        elif origin in (list, tuple, Sequence):
            words.append("LIST")
        elif origin is dict:
            words.append("MAPPING")
        else:
            words.append(_word(kind))
    return "|".join(dict.fromkeys(words))


def _word(kind: object) -> str:
    if get_origin(kind) is Literal and len(get_args(kind)) == 1:
        return str(get_args(kind)[0])
    if get_origin(kind) is Literal:
        return "{" + ",".join(map(str, get_args(kind))) + "}"
    return {int: "INT", float: "FLOAT", str: "TEXT", Path: "PATH"}.get(kind, "VALUE")  # type: ignore[call-overload]


def _text(text: str, hint: object, default: object) -> str:
    """A help text with its default, unless the text says it."""
    if "Default:" in text or "By default" in text:
        return text
    if default is None:
        return f"{text} Default: none."
    if _members(hint) == [bool]:
        return f"{text} Default: {'yes' if default else 'no'}."
    if isinstance(default, dict):
        pairs = ", ".join(f"{name} {value}" for name, value in default.items())
        return f"{text} Default: {pairs}." if pairs else text
    if isinstance(default, list | tuple):
        return f"{text} Default: {' '.join(map(str, default)) or 'none'}."
    return f"{text} Default: {default}." if default != "" else text

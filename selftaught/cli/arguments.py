"""Forms in which command-line options may be written, derived from the types of configuration fields.

A field of type `bool` is a switch: `--flag`, `--no-flag` and `--flag false`. A field of type `list` takes
several values: `--k 1 3 6`. Every option may have hyphens or underscores.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import takewhile
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

SAID = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
"""What may follow a switch."""


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


def plain_forms(
    given: Sequence[str], options: Sequence[type], aliases: dict[str, str]
) -> list[str]:
    """The command line with every switch as `--flag=true` and every list as `--k=[1, 3, 6]`.

    Args:
        options: the dataclasses whose fields are the command's options.
        aliases: other names of options.
    """
    flags, several = switches(options), lists(options)
    plain: list[str] = []
    rest = list(given)
    while rest:
        one = rest.pop(0)
        if one == "--" or not one.startswith("--"):
            plain.append(one)
            continue
        name, equals, value = one[2:].partition("=")
        name = name.replace("-", "_") if name not in ("help", "version") else name
        name = aliases.get(name, name)
        if name in flags or (not equals and name.removeprefix("no_") in flags):
            said = SAID.get(value.lower()) if equals else None
            if not equals and rest and name in flags and rest[0].lower() in SAID:
                said = SAID[rest.pop(0).lower()]
            if said is None and not equals:
                said = name in flags
            written = value if said is None else str(said).lower()
            plain.append(f"--{name if name in flags else name.removeprefix('no_')}={written}")
        elif not equals and name in several:
            plain += _list(name, several[name], rest)
        else:
            plain.append(f"--{name}{equals}{value}")
    return plain


def _list(name: str, kind: Any, rest: list[str]) -> list[str]:
    """A list option in one argument; takes its values off the front of `rest`."""
    values = list(takewhile(lambda value: not value.startswith("--"), rest))
    if get_origin(kind) is Literal and values and values[0] in get_args(kind):
        values = list(takewhile(lambda value: value in get_args(kind), values))
    if not values or (len(values) == 1 and values[0].startswith("[")):
        return [f"--{name}"]  # without a value it is refused by the parser, in its own words
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

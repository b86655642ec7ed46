"""Type checks for options that arrive as a dictionary, such as `--sampler_options.batch_size 64`."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text",
         Path: "a path", NoneType: "null"}  # fmt: skip


def check_types(what: str, options: Mapping[str, object], hints: Mapping[str, Any]) -> None:
    """Refuse a value of another type than its option has.

    Only plain types are checked: booleans, numbers, texts, paths, literals, and lists of them. A value
    of any other type is left to whoever reads it.

    Args:
        what: whose options they are, for the message.
        hints: the type hint of each option.

    Raises:
        ValueError: names the option, the types it takes and the value.
    """
    for name, value in options.items():
        members = _members(hints.get(name, object))
        if all(map(_plain, members)) and not any(_fits(value, one) for one in members):
            wanted = " or ".join(_words(one) for one in members if one is not NoneType)
            raise ValueError(f"{what}: the option {name!r} must be {wanted}; got {value!r}.")


def check_count(name: str, value: int | None) -> None:
    """Refuse a number of things below 1.

    Raises:
        ValueError: names the option and the value.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _plain(hint: Any) -> bool:
    if get_origin(hint) is list:
        return all(_plain(one) for inner in get_args(hint) for one in _members(inner))
    return hint in WORDS or get_origin(hint) is Literal


def _fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        inner = [one for each in get_args(hint) for one in _members(each)]
        return isinstance(value, list) and all(any(_fits(v, one) for one in inner) for v in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    if hint in (str, Path):
        return isinstance(value, str | int | float | Path)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is list:
        return f"a list, each of it {' or '.join(_words(one) for each in get_args(hint) for one in _members(each))}"
    return WORDS[hint]

"""Names, types and bounds of options that arrive as a mapping, such as --sampler_options.NAME VALUE."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_options(what: str, accepts: Callable[..., object], options: Mapping[str, object]) -> None:
    """Check the names and types of options; see `check_names` and `check_types`."""
    check_names(what, accepts, options)
    check_types(what, accepts.__init__ if isinstance(accepts, type) else accepts, options)


def check_names(what: str, accepts: Callable[..., object], options: Iterable[str]) -> None:
    """Check the names of options against the keyword parameters of a function or class.

    Args:
        what: whose options they are, for errors: "The sampler 'vllm'".
        accepts: takes the options; its first parameter is not one of them if it is positional.
            With `**kwargs` any name passes.

    Raises:
        ValueError: a name is not one of its parameters.
    """
    parameters = inspect.signature(accepts).parameters.values()
    keywords = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    known = keywords or [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    unknown = sorted(set(options) - set(known))
    if unknown and not any(one.kind is one.VAR_KEYWORD for one in parameters):
        raise ValueError(
            f"{what} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(known)}."
        )


def check_types(what: str, annotated: Any, options: Mapping[str, object]) -> None:
    """Check that every option with an annotation is of its type; others pass.

    Raises:
        ValueError: a value is of another type; names the option, the type and the value.
    """
    try:
        hints = get_type_hints(annotated)
    except NameError:  # an annotation that is imported for type checkers only
        return
    for name, value in options.items():
        if name in hints and not is_of_type(value, hints[name]):
            raise ValueError(
                f"The option {name!r} of {what.replace('The', 'the', 1)} must be {type_name(hints[name])}; "
                f"got {value!r}."
            )


def check_count(name: str, value: int | None) -> None:
    """Check that a number of things is at least 1, where it is given.

    Raises:
        ValueError: names the option and the value.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")


def is_of_type(value: object, hint: Any) -> bool:
    """Whether a value as a command line or YAML gives it is one of a type hint.

    A whole number is also a float, one text is also a list of texts, and a text may name a member of
    an Enum. A hint that is none of the plain types accepts every value.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(is_of_type(value, one) for one in arguments)
    if origin is Literal:
        return value in arguments
    if origin is list:
        return isinstance(value, list | tuple) or (arguments == (str,) and isinstance(value, str))
    match origin or hint:
        case kind if kind is bool or kind is str or kind is dict:
            return isinstance(value, kind)
        case kind if kind is NoneType:
            return value is None
        case kind if kind is int:
            return isinstance(value, int) and not isinstance(value, bool)
        case kind if kind is float:
            return isinstance(value, int | float) and not isinstance(value, bool)
        case kind if kind is Path:
            return isinstance(value, str | Path)
        case kind if isinstance(kind, type) and issubclass(kind, Enum):
            return isinstance(value, str | kind)
    return True


def type_name(hint: Any) -> str:
    """A type hint in the words of an error message."""
    if get_origin(hint) in (Union, UnionType):
        names = list(dict.fromkeys(map(type_name, get_args(hint))))
        return " or ".join(names)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def is_number(value: object) -> bool:
    """Whether a value is a finite number and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

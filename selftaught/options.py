"""Validation of options that are given as a mapping, such as --sampler-options.NAME VALUE."""

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
        what: The owner of the options, for error messages, such as "The sampler 'vllm'".
        accepts: The function or class that takes the options. If it has keyword-only parameters,
            only these are options. If it takes `**kwargs`, every name is accepted.
        options: The names of the options.

    Raises:
        ValueError: A name is not a parameter of `accepts`.
    """
    parameters = inspect.signature(accepts).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    known = keywords or [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    unknown = sorted(set(options) - set(known))
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise ValueError(
            f"{what} has no option {', '.join(map(repr, unknown))}; its options are "
            f"{', '.join(known)}."
        )


def check_types(what: str, annotated: Any, options: Mapping[str, object]) -> None:
    """Check the types of options against type annotations. Options without one are not checked.

    Args:
        what: The owner of the options, for error messages, such as "The sampler 'vllm'".
        annotated: The function or class whose annotations are used.
        options: Names and values of the options.

    Raises:
        ValueError: A value has the wrong type. The message names the option, the type and the
            value.
    """
    try:
        hints = get_type_hints(annotated)
    except NameError:  # an annotation that is imported only under TYPE_CHECKING
        return
    for name, value in options.items():
        if name in hints and not is_of_type(value, hints[name]):
            raise ValueError(
                f"The option {name!r} of {what.replace('The', 'the', 1)} must be "
                f"{type_name(hints[name])}; got {value!r}."
            )


def check_count(name: str, value: int | None) -> None:
    """Check that a count is at least 1. None is accepted.

    Raises:
        ValueError: The value is below 1. The message names the option and the value.
    """
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}.")


def is_of_type(value: object, hint: Any) -> bool:
    """Return whether a value, as parsed from a command line or YAML, matches a type hint.

    An integer is accepted as a float, a string as a list of strings, and a string as an Enum
    member. A hint other than the basic types accepts every value.
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
    """Return the name of a type hint for an error message."""
    if get_origin(hint) in (Union, UnionType):
        names = list(dict.fromkeys(map(type_name, get_args(hint))))
        return " or ".join(names)
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if hint is NoneType:
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def is_number(value: object) -> bool:
    """Return whether a value is a finite number and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

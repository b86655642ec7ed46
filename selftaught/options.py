"""Validation of options that are given as a mapping, such as --sampler-options.NAME VALUE."""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Option:
    """An option of a task or a sampler, for help texts."""

    name: str
    hint: Any
    """Type hint; `Any` if it is not known."""
    default: str | None
    """The default as text; None if the option is required."""
    meaning: str
    """Help text without the default; may be empty."""


def options_of(
    accepts: Callable[..., object], *, positional: bool = False
) -> tuple[str, list[Option]]:
    """Return the description of a function or class, and the options that it takes.

    Both are read from its docstring, its signature and its type hints. The options are those of
    `check_names`.

    Args:
        accepts: The function or class.
        positional: Whether all parameters are options, also those that are not keyword-only.
    """
    about, _, rest = inspect.cleandoc(accepts.__doc__ or "").partition("Args:")
    meanings = _meanings(re.split(r"\n(?=\S)", rest.rstrip())[0])
    hints = hints_of(accepts.__init__ if isinstance(accepts, type) else accepts)
    options = []
    for key in _known(accepts, positional=positional):
        plain = inspect.signature(accepts).parameters[key].default
        default = None if plain is inspect.Parameter.empty else _shown(plain)
        text, _, stated = meanings.get(key, "").partition(" Default: ")
        if default is not None and stated:
            default = stated.rstrip(".")
        options.append(Option(key, hints.get(key, Any), default, text[:1].upper() + text[1:]))
    return " ".join(about.split()), options


def _shown(default: object) -> str:
    return "none" if default is None else str(default) or "empty"


def _meanings(arguments: str) -> dict[str, str]:
    """Return the help text of every argument in the `Args` section of a docstring."""
    found: dict[str, str] = {}
    for part in re.split(r"\n(?= {4}\S)", arguments):
        names, _, text = part.strip().partition(":")
        words = " ".join(text.split())
        found |= dict.fromkeys((one.strip() for one in names.split(",")), words)
    return found


def _known(accepts: Callable[..., object], *, positional: bool = False) -> list[str]:
    """Return the names of the options of a function or class; see `options_of`."""
    parameters = inspect.signature(accepts).parameters.values()
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    if keywords and not positional:
        return keywords
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def hints_of(accepts: Any) -> dict[str, Any]:
    """Return the type hints of a function or class, without those that cannot be resolved."""
    try:
        return get_type_hints(accepts)
    except NameError:  # an annotation that is imported only under TYPE_CHECKING
        found = inspect.get_annotations(accepts)
        return {name: hint for name, hint in found.items() if not isinstance(hint, str)}


def check_options(
    what: str, accepts: Callable[..., object], options: Mapping[str, object], *, see: str = ""
) -> None:
    """Check the names and types of options; see `check_names` and `check_types`."""
    check_names(what, accepts, options, see=see)
    check_types(what, accepts.__init__ if isinstance(accepts, type) else accepts, options)


def check_names(
    what: str,
    accepts: Callable[..., object],
    options: Iterable[str],
    *,
    see: str = "",
    near: Collection[str] = (),
) -> None:
    """Check the names of options against the keyword parameters of a function or class.

    Args:
        what: The owner of the options, for error messages, such as "The sampler 'vllm'".
        accepts: The function or class that takes the options. If it has keyword-only parameters,
            only these are options. If it takes `**kwargs`, every name is accepted.
        options: The names of the options.
        see: A command that lists the options, for the error message.
        near: More names that the error message may suggest.

    Raises:
        ValueError: A name is not a parameter of `accepts`. Suggests the one that was meant.
    """
    parameters = inspect.signature(accepts).parameters.values()
    known = _known(accepts)
    unknown = set(options) - set(known)
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        raise unknown_options(what, unknown, known, see=see, near=near)


def unknown_options(
    what: str,
    unknown: Iterable[str],
    known: Collection[str],
    *,
    see: str = "",
    near: Collection[str] = (),
    listed: str = "",
) -> ValueError:
    """Return the error for options that do not exist; the arguments are those of `check_names`.

    Args:
        known: The names of the options.
        listed: The options in words. Default: their names.
    """
    names = sorted(unknown)
    close = get_close_matches(names[0], [*known, *near], n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(
        f"{what} has no option {', '.join(map(repr, names))}; its options are "
        f"{listed or ', '.join(known)}.{hint}{f' See: {see}' if see else ''}"
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
    hints = hints_of(annotated)
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

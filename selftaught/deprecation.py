"""Old names of parameters, which keep working with a `DeprecationWarning`."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed_parameter(old: str, new: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator with which a function also accepts the old name of a keyword parameter.

    Args:
        old: old name of the parameter.
        new: name of the parameter.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def renamed(*args: P.args, **kwargs: P.kwargs) -> T:
            if old in kwargs:
                warn_renamed(old, new)
                if new in kwargs:
                    raise TypeError(f"Expected {new!r} or its old name {old!r}, got both.")
                given: dict[str, Any] = kwargs
                given[new] = given.pop(old)
            return function(*args, **kwargs)

        return renamed

    return decorate


def warn_renamed(old: str, new: str) -> None:
    """Warn the caller's caller that a name is deprecated."""
    warnings.warn(f"{old!r} is deprecated; use {new!r}.", DeprecationWarning, stacklevel=3)

"""Checks of texts that a model wrote: patterns, secrets, classifiers, functions and leaks."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from selftaught.safety.checks import Checks, open_checks
    from selftaught.safety.findings import Finding, Source
    from selftaught.safety.options import CheckOptions, ExcludeOptions

__all__ = ["CheckOptions", "Checks", "ExcludeOptions", "Finding", "Source", "open_checks"]

_MODULES = {"Checks": "checks", "open_checks": "checks", "Finding": "findings", "Source": "findings",
            "CheckOptions": "options", "ExcludeOptions": "options"}  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, because `--help` needs only the options."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"selftaught.safety.{_MODULES[name]}"), name)

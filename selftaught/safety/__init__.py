"""Checks of texts that a model wrote: patterns, secrets, classifiers, functions and leaks."""

from selftaught.safety.checks import Checks, open_checks
from selftaught.safety.findings import Finding, Source
from selftaught.safety.options import CheckOptions, ExcludeOptions

__all__ = ["CheckOptions", "Checks", "ExcludeOptions", "Finding", "Source", "open_checks"]

"""Isolated execution of untrusted programs against unit tests."""

from selftaught.sandbox.pool import Sandbox, missing
from selftaught.sandbox.program import Limits, Program, Result

__all__ = ["Limits", "Program", "Result", "Sandbox", "missing"]

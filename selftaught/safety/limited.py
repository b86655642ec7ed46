"""Regular expressions and the user's function with a time limit, in a worker process."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from selftaught.processes.child import Child
from selftaught.safety.findings import CheckName, Finding

SECONDS = 5.0
"""Time limit of a call of the user's function."""
MATCH_SECONDS = 1.0
"""Time limit of matching the patterns in a text, and in a message with several."""
START_SECONDS = 120.0
"""Time limit of the worker's start, which imports the user's module."""
AT_ONCE = 256
"""Number of texts per message."""
WORKER = "selftaught.safety.worker"


def read_patterns(patterns: Sequence[str], file: Path | None) -> list[str]:
    """Return the patterns of the options and of a file.

    Raises:
        ValueError: a pattern is not a regular expression, or matches the empty text.
        OSError: the file cannot be read.
    """
    named = [(pattern, "--check-patterns") for pattern in patterns]
    if file is not None:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
        read = [
            (line, f"{file}, line {number}")
            for number, line in enumerate(lines, 1)
            if line.strip() and not line.startswith("#")
        ]
        if not read:
            raise ValueError(f"Expected one regular expression per line in {file}; got none.")
        named += read
    for pattern, where in named:
        try:
            empty = re.compile(pattern).search("")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(
                f"{where}: {pattern!r} is not a regular expression: {error}. Correct it; in front of "
                "a sign that is meant literally stands \\."
            ) from None
        if empty:
            raise ValueError(
                f"{where}: {pattern!r} matches the empty text, so every text would be flagged. Give "
                "a pattern that needs at least one character."
            )
    return [pattern for pattern, _ in named]


class LimitedChecks:
    """Patterns and the user's function, which can be killed. One thread at a time.

    The worker process starts with the first text. `close` ends it, and a later call starts it
    again.

    Args:
        patterns: regular expressions.
        function: the user's function as FILE.py:FUNCTION, or None.
    """

    def __init__(self, patterns: Sequence[str], function: str | None) -> None:
        self.patterns, self.function = list(patterns), function
        self._child: Child | None = None

    def find(self, texts: Sequence[str]) -> list[list[Finding]]:
        """Return the findings of every text.

        A text on which a check exceeds the time limit or fails has an undecided finding.
        """
        found: list[list[Finding]] = [[] for _ in texts]
        if self.patterns:
            for first in range(0, len(texts), AT_ONCE):
                part = texts[first : first + AT_ONCE]
                for offset, matches in enumerate(self._matches(part)):
                    found[first + offset] += matches
        if self.function is not None:
            for number, text in enumerate(texts):
                found[number] += self._called(text)
        return found

    def _matches(self, texts: Sequence[str]) -> list[list[Finding]]:
        reply = self._ask({"texts": texts}, MATCH_SECONDS)
        if "found" in reply:
            return [[self._finding(*match) for match in matches] for matches in reply["found"]]
        if len(texts) == 1:
            return [[_undecided("pattern", reply["error"])]]
        # One of the texts takes too long; the others are matched one by one.
        return [self._matches([one])[0] for one in texts]

    def _finding(self, number: int, start: int, end: int) -> Finding:
        return Finding("pattern", self.patterns[number], (start, end))

    def _called(self, text: str) -> list[Finding]:
        reply = self._ask({"text": text}, SECONDS)
        if "error" in reply:
            return [_undecided("function", reply["error"])]
        return [Finding("function", reply["reason"])] if reply["reason"] else []

    def _ask(self, message: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Return the reply of the worker, or why there is none under "error"."""
        child = self._child or self._started()
        reply = child.ask(message, seconds=seconds)
        if reply.message is not None and not reply.late:
            return reply.message
        self._child = None
        how = f"time limit of {seconds:g} s" if reply.late else child.how_it_ended()
        child.close()
        return reply.message or {"error": how}

    def _started(self) -> Child:
        child = Child(WORKER)
        job = {"patterns": self.patterns, "function": self.function, "seconds": SECONDS}
        try:
            reply = child.ask(job, seconds=START_SECONDS)
            if reply.message is None or reply.late:
                why = f"took over {START_SECONDS:.0f} s" if reply.late else child.how_it_ended()
                raise RuntimeError(
                    f"The worker process of the checks {why} before it was ready; its output is above."
                )
            if "error" in reply.message:
                raise ValueError(reply.message["error"])
        except BaseException:
            child.close()
            raise
        self._child = child
        return child

    def check(self) -> None:
        """Start the worker, so that an error in the user's file is found before a run.

        Raises:
            ValueError: there is no such function, or it fails on a first text.
        """
        if self.function is not None and self._child is None:
            self._started()

    def close(self) -> None:
        """End the worker process."""
        child, self._child = self._child, None
        if child is not None:
            child.close()


def _undecided(check: CheckName, why: str) -> Finding:
    return Finding(check, f"could not be checked: {why}", undecided=True)

"""Worker process of the checks: regular expressions and the user's function, which may take long.

The patterns are the user's and the texts are a model's, so a match can need exponential time. The
parent process kills this one at the time limit (`limited.py`).
"""

import re
import signal
from collections.abc import Callable, Sequence
from typing import Any

from selftaught.own_file import function_in_file
from selftaught.processes.child import conversation

LONGEST_REASON = 200
"""Maximum number of characters of a function's reason."""


def serve() -> None:
    """Receive patterns and a function, then check texts, one message after another."""
    messages, answer = conversation()
    job, _ = next(messages)
    try:
        patterns = [re.compile(one) for one in job["patterns"]]
        function = _opened(job["function"])
    except Exception as error:  # every error is reported to the parent process
        answer({"error": str(error)}, b"")
        return
    answer({"ready": True}, b"")
    for asked, _ in messages:
        # If the parent has died, the kernel ends the worker, even during a match (POSIX only).
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, job["seconds"] + 5)
        if "texts" in asked:
            answer({"found": [_matches(patterns, one) for one in asked["texts"]]}, b"")
        else:
            assert function is not None
            answer(_reason(function, asked["text"]), b"")
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _opened(name: str | None) -> Callable[[str], object] | None:
    """Return the user's function, after a first call with a text."""
    if name is None:
        return None
    function = function_in_file(name, "check", "whether a text is flagged")
    if "error" in (tried := _reason(function, "A text.")):
        raise ValueError(
            f"The check {name} failed on the text 'A text.': {tried['error']}. It must take a text and return "
            "a reason (a text), True, False or None."
        )
    return function


def _matches(patterns: Sequence[re.Pattern[str]], text: str) -> list[list[int]]:
    """Return number, start and end of the first match of every pattern that matches."""
    found = ((number, one.search(text)) for number, one in enumerate(patterns))
    return [[number, *match.span()] for number, match in found if match is not None]


def _reason(function: Callable[[str], object], text: str) -> dict[str, Any]:
    try:
        found = function(text)
    except Exception as error:  # every error is reported to the parent process
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST_REASON]}
    if found is None or isinstance(found, bool):
        return {"reason": "flagged" if found else None}
    if isinstance(found, str):
        return {"reason": found[:LONGEST_REASON] or None}
    kind = type(found).__name__
    return {"error": f"it returned {kind}, not a text, True, False or None"}

"""Records of the checks: what was found in a text, and what is known about where it comes from."""

from dataclasses import dataclass
from typing import Literal

CheckName = Literal[
    "pattern", "secret", "classifier", "function", "hint mentioned", "hint repeated",
    "answer first", "system prompt",
]  # fmt: skip
CHECKS: tuple[CheckName, ...] = (
    "pattern", "secret", "classifier", "function", "hint mentioned", "hint repeated",
    "answer first", "system prompt",
)  # fmt: skip
"""Names of all checks, in the order in which they are reported."""


@dataclass(frozen=True)
class Finding:
    """A reason why a text is flagged. It never contains a secret."""

    check: CheckName
    reason: str
    """What was found, such as the pattern that matched."""
    span: tuple[int, int] | None = None
    """Start and end (exclusive) of the match, in characters; None if the check gives no position."""
    undecided: bool = False
    """The check has no result, such as after its time limit. The text counts as flagged."""

    def __str__(self) -> str:
        return f"{self.check}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """What the prompt of a text contained that the text must not repeat."""

    question: str = ""
    """The question without a hint. What it contains is not a leak of the hint."""
    answer: str | None = None
    """Gold answer that the prompt showed as a hint. None: there was no hint."""
    hints: tuple[str, ...] = ()
    """Texts that the hint added to the question."""
    system: str = ""
    """System prompt. Empty: none."""


NO_SOURCE = Source()

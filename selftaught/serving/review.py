"""Checks of thoughts and completions before a client gets them."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from selftaught.records import Message, Text
from selftaught.safety import Checks, Source
from selftaught.serving.text import CompletionText

logger = logging.getLogger(__name__)

Flagged = Literal["withhold", "redraw"]
"""What happens to a flagged text: it is withheld, or the completion is drawn anew."""
WITHHELD = "[withheld: flagged by a check of this server]"


@dataclass(frozen=True)
class Verdict:
    """What the checks found in one completion."""

    thoughts: Sequence[str]
    """Names of the checks that flagged the thoughts."""
    content: Sequence[str]
    """Names of the checks that flagged the content."""

    def __bool__(self) -> bool:
        """Return whether anything is flagged."""
        return bool(self.thoughts or self.content)


class Reviewer:
    """Checks completions, and withholds what is flagged.

    Args:
        checks: the checks.
        flagged: what happens to a flagged text.
        redraws: maximum number of times that a completion is drawn anew.
    """

    def __init__(self, checks: Checks, flagged: Flagged, redraws: int) -> None:
        self._checks = checks
        self.redraws = redraws if flagged == "redraw" else 0
        self.counts: Counter[str] = Counter()
        """Number of completions that were checked, flagged, drawn anew and withheld."""

    def verdicts(self, texts: Sequence[CompletionText], prompt: Text) -> list[Verdict]:
        """Return what the checks find in completions of a prompt.

        Hidden thoughts are checked one by one and joined, so that nothing is missed that begins in
        one thought and ends in another.

        Args:
            texts: the completions.
            prompt: text or messages.
        """
        system = Source(system=_system(prompt))
        whole = [one for text in texts for one in (text.reasoning, text.content)]
        whole += ["".join(one for each in text.hidden for one in each.thoughts) for text in texts]
        found = self._checks.find(whole, [system] * len(whole))
        verdicts = []
        for at in range(len(texts)):
            thoughts, content = found[2 * at], found[2 * at + 1]
            thoughts = [*thoughts, *found[2 * len(texts) + at]]
            names = [sorted({one.check for one in each}) for each in (thoughts, content)]
            verdicts.append(Verdict(names[0], names[1]))
        self.counts["checked"] += len(texts)
        self.counts["flagged"] += sum(map(bool, verdicts))
        return verdicts

    def withhold(self, text: CompletionText, verdict: Verdict) -> None:
        """Remove what is flagged from a completion, and log the names of the checks."""
        if not verdict:
            return
        self.counts["withheld"] += 1
        logger.warning(
            "Withheld: thoughts (%s), content (%s).",
            ", ".join(verdict.thoughts) or "none", ", ".join(verdict.content) or "none",
        )  # fmt: skip
        if verdict.thoughts:
            text.reasoning, text.hidden = WITHHELD, []
        if verdict.content:
            text.content, text.log_probs, text.filtered = "", [], True
            text.hidden = []  # each has the text of its token

    def close(self) -> None:
        """Free the memory of the checks."""
        self._checks.close()


def _system(prompt: Text) -> str:
    """Return the system prompts among messages."""
    messages: Sequence[Message] = [] if isinstance(prompt, str) else prompt
    return "\n".join(one["content"] for one in messages if one["role"] == "system")

"""Leaks of a prompt into the text that follows it: hints, answers and system prompts.

A rationale that was sampled with the answer as a hint is trained on without the hint (Section 3.2
of Zelikman et al. 2022, arXiv:2203.14465). If it mentions the hint, or states the answer before
any reasoning, it teaches the model to claim knowledge that it will not have.

All patterns here take linear time.
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from selftaught.records import Rollout, Text
from selftaught.safety.findings import NO_SOURCE, Finding, Source

WORDS = 5
"""Number of consecutive words of a system prompt that are compared with a text."""
MENTIONS = re.compile(
    r"\bhint(?:s|ed)?\b"
    r"|\b(?:answer|solution|result) (?:is|was|has been)? ?(?:already |also )?"
    r"(?:given|provided|known|told|shown|marked|revealed|supplied|in (?:the )?(?:brackets|parenthes[ei]s))\b"
    r"|\b(?:given|provided|supplied|marked|known) (?:answer|solution|result)\b"
    r"|\b(?:marked|labell?ed|flagged|indicated|shown|given) as (?:the )?(?:correct|right|answer)\b"
    r"|\b(?:we|i|you)(?:'re| are| am|'m| were| was|'ve been| have been)? (?:told|given) (?:that )?the (?:correct |right |final )?(?:answer|solution|result)\b"
    r"|\baccording to the (?:answer|brackets|parenthes[ei]s|solution)\b",
    re.IGNORECASE,
)  # fmt: skip
"""Phrases that refer to a hint or to an answer that was known before the reasoning."""
LEAD = frozenset(re.findall(r"\w+",
    "a an and answer answers are as be choice correct final first gives hence here i is it know known "
    "must needs note obviously of okay ok option please result right so solution sure that the then "
    "therefore this thus to true value we will with you",
))  # fmt: skip
"""Words before an answer that are not reasoning."""
NAMES_ANSWER = frozenset({"answer", "choice", "correct", "option", "result", "solution"})
_AFTER = re.compile(r"[)\]}\"'*.$\\]*\s*(?:$|[.,;:!\n]|-|because\b|since\b|as\b|for\b|due\b)", re.IGNORECASE)  # fmt: skip
_BRACKETS = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def leaks(text: str, source: Source, system: "SystemPrompt | None", overlap: float) -> list[Finding]:  # fmt: skip
    """Return the leaks of a prompt in a text.

    Args:
        text: the text of the model.
        source: what the prompt contained.
        system: a system prompt that no text may repeat, besides that of the source.
        overlap: share of a system prompt's word sequences from which on a text is flagged.
    """
    found: list[Finding] = []
    if source.answer is not None or source.hints:
        found += _hints(text, source)
    for one in (system, _system_prompt(source.system) if source.system else None):
        if one is not None and (share := one.repeated_in(text)) >= overlap:
            found.append(Finding("system prompt", f"{share:.0%} of its sequences of {one.words} words"))  # fmt: skip
    return found


def _hints(text: str, source: Source) -> list[Finding]:
    found: list[Finding] = []
    asked = source.question.casefold()
    for match in MENTIONS.finditer(text):
        if match[0].casefold() not in asked:
            found.append(Finding("hint mentioned", match[0], match.span()))
            break
    for hint in source.hints:
        at = text.find(hint)
        if at >= 0 and hint not in source.question:
            found.append(Finding("hint repeated", hint, (at, at + len(hint))))
            break
    if source.answer and (place := answer_first(text, source.answer)):
        found.append(Finding("answer first", "the answer stands before any reasoning", place))
    return found


def answer_first(text: str, answer: str) -> tuple[int, int] | None:
    """Return where a text states an answer before any reasoning, or None if it does not.

    Before the answer stand only words of `LEAD`, and either one of them names the answer, or a
    sentence or its main clause ends with the answer.
    """
    answer = answer.strip()
    if not answer:
        return None
    before, after = (rf"(?<!\w){re.escape(answer)}", r"(?!\w)")
    before = before if answer[0].isalnum() else re.escape(answer)
    after = after if answer[-1].isalnum() else ""
    match = re.search(before + after, text, re.IGNORECASE)
    if match is None:
        return None
    words = [one.casefold() for one in _WORD.findall(text[: match.start()])]
    if not LEAD.issuperset(words):
        return None
    named = not NAMES_ANSWER.isdisjoint(words)
    return match.span() if named or _AFTER.match(text, match.end()) else None


class SystemPrompt:
    """The sequences of words of a system prompt.

    Attributes:
        words: length of the sequences: `WORDS`, or the length of a shorter prompt.
    """

    def __init__(self, prompt: str) -> None:
        found = _words(prompt)
        self.words = max(1, min(WORDS, len(found)))
        self._sequences = _sequences(found, self.words)

    def __bool__(self) -> bool:
        return bool(self._sequences)

    def repeated_in(self, text: str) -> float:
        """Return the share of the sequences that a text contains; 0 for an empty prompt."""
        if not self._sequences:
            return 0.0
        return len(self._sequences & _sequences(_words(text), self.words)) / len(self._sequences)


@lru_cache(maxsize=64)
def _system_prompt(prompt: str) -> SystemPrompt:
    return SystemPrompt(prompt)


def _words(text: str) -> list[str]:
    return [one.casefold() for one in _WORD.findall(text)]


def _sequences(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[at : at + length]) for at in range(len(words) - length + 1)}


def source_of(rollout: Rollout) -> Source:
    """Return what the prompt of a rollout contained.

    A rationalized rollout was sampled with a hint: what its prompt adds to the question.
    """
    system = _system_of(rollout.prompt)
    if rollout.origin != "rationalized":
        return Source(system=system) if system else NO_SOURCE
    problem = rollout.problem
    hints = hints_in(_last_part(rollout.prompt), problem.question, problem.gold)
    return Source(problem.question, problem.gold, hints, system)


def hints_in(prompt: str, question: str, answer: str) -> tuple[str, ...]:
    """Return the texts that a hint added to a question.

    Args:
        prompt: the prompt, or its part with the question.
        question: the question without a hint. A hint inserts texts into it or follows it on the
            same line.
        answer: the gold answer. A text after the question is a hint if it is in brackets or contains it.
    """
    same = 12
    at, hints = prompt.rfind(question[:same]), []
    if at < 0 or not question:
        return ()
    read = 0
    while read < len(question):
        if prompt[at : at + 1] == question[read]:
            at, read = at + 1, read + 1
            continue
        further = prompt.find(question[read : read + same], at)
        if further < 0:
            return tuple(hints)
        hints.append(prompt[at:further].strip())
        at = further
    rest = prompt[at:].partition("\n")[0].strip()
    # What follows may be a part of the prompt's form, such as "=" in "2+2 (4)=".
    if match := _BRACKETS.match(rest):
        hints.append(match[0])
    elif answer and answer in rest:
        hints.append(rest[: rest.index(answer) + len(answer)])
    return tuple(one for one in hints if len(one) > 1)


def _last_part(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"]) if prompt else ""


def _system_of(prompt: Text) -> str:
    """Return the system messages of a prompt; empty for a prompt that is text."""
    if isinstance(prompt, str):
        return ""
    return "\n".join(str(one["content"]) for one in prompt if one["role"] == "system")

"""Ends of the steps of a completion, in tokens.

Steps are found in the decoded text. The sampled token ids are never tokenized again.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

Decode = Callable[[Sequence[int]], str]
"""A function that decodes token ids to text without special tokens."""

SplitBy = Literal["newline", "sentence", "numbered", "separator"]

ABBREVIATIONS = frozenset(
    ("mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "jr.", "sr.", "vs.", "cf.", "e.g.", "i.e.",
     "approx.", "resp.", "fig.", "eq.", "eqs.", "sec.")
)  # fmt: skip
"""Words with a full stop that do not end a sentence, in lower case."""

_BYTES = 4
"""Maximum number of bytes of a UTF-8 character."""

_LINE_END = re.compile(r"\n\s*+")
_BLANK = re.compile(r"\s++")
_NUMBERED = re.compile(
    r"(?:[#*_]{1,6}[ \t]{0,4})?(?:[0-9]{1,3}[.)](?![0-9])|step[ \t]{1,4}[0-9]{1,3}\b)", re.I
)
_LIST_NUMBER = re.compile(r"(?:^|[.!?\n])\s*+[0-9]{1,3}\.$")
_OPENING = "([\"'\u201c\u2018*_"
_CLOSING = ")]\"'\u201d\u2019*_"
_LOOK_BACK = 24
"""Number of characters before white space that decide whether a sentence ends there. The limit
keeps the search linear in the length of the text."""


def split_steps(
    token_ids: Sequence[int], decode: Decode, by: SplitBy = "newline", separator: str = ";"
) -> list[int]:
    """Split a completion into steps and return their ends, in tokens.

    Step i is `token_ids[ends[i - 1]:ends[i]]`. A step ends with the token that contains the last
    character of its separator and of the white space after it. A token that also contains text of
    the next step belongs to the earlier step. No step is blank: white space before the first step
    is part of it, and a blank end, such as an end token that `decode` skips, is part of the last
    step.

    Args:
        token_ids: the sampled token ids. An empty sequence has no steps.
        decode: decodes token ids without special tokens; an incomplete character becomes U+FFFD.
        by: criterion for the end of a step:

            - "newline": after each line.
            - "sentence": after . ! ? (and closing quotes or brackets) followed by white space, but
              not after `ABBREVIATIONS` or the number of a list item, and so never within a decimal
              number.
            - "numbered": before each line that starts with a number such as `1.` or `2)`, or with
              `Step 3`; Markdown's #, * and _ may precede it.
            - "separator": after `separator`, or several of them in a row.
        separator: used with "separator" only.

    Returns:
        The ends of the steps, increasing; the last is `len(token_ids)`.

    Raises:
        ValueError: `by` is unknown, or the separator is empty or contains U+FFFD.
    """
    text = decode(token_ids)
    ends: list[int] = []
    first, at = 0, 0  # the first token of the last step; the number of characters of all steps
    for cut in _cuts(text, by, separator):
        end = ends[-1] if ends else 0
        if cut <= at or end == len(token_ids) or (not ends and not text[:cut].strip()):
            continue
        reached, characters = _reaching(token_ids, decode, first, end, cut - at)
        if (
            ends and not text[at:cut].strip()
        ):  # the last token of the step before contains this step
            ends[-1] = reached
        else:
            first = end
            ends.append(reached)
        at += characters
    return _closed(ends, len(token_ids), blank=not text[at:].strip())


def _closed(ends: list[int], count: int, *, blank: bool) -> list[int]:
    """Return the ends with the last at `count`; a blank rest becomes part of the last step."""
    if ends and (blank or ends[-1] == count):
        return [*ends[:-1], count]
    return [*ends, count] if count else []


def _cuts(text: str, by: SplitBy, separator: str) -> Iterator[int]:
    """Yield the numbers of characters after which steps end, in time linear in the text."""
    if by not in get_args(SplitBy):
        raise ValueError(f"by must be one of {', '.join(get_args(SplitBy))}; got {by!r}.")
    if by == "separator":
        if not separator or "\ufffd" in separator:
            raise ValueError(
                f"separator must have at least one character and no U+FFFD; got {separator!r}."
            )
        found = re.finditer(rf"(?:{re.escape(separator)}\s*+)++", text)
    elif by == "sentence":
        found = (m for m in _BLANK.finditer(text) if _ends_sentence(text, m.start()))
    elif by == "numbered":
        found = (m for m in _LINE_END.finditer(text) if _NUMBERED.match(text, m.end()))
    else:
        found = _LINE_END.finditer(text)
    return (match.end() for match in found)


def _ends_sentence(text: str, blank: int) -> bool:
    """Return whether the word before the white space at index `blank` ends a sentence."""
    before = text[max(0, blank - _LOOK_BACK) : blank].rstrip(_CLOSING)
    if not before.endswith((".", "!", "?")):
        return False
    word = before.split()[-1].lstrip(_OPENING).lower()
    return word not in ABBREVIATIONS and not _LIST_NUMBER.search(before)


def _reaching(
    token_ids: Sequence[int], decode: Decode, first: int, end: int, wanted: int
) -> tuple[int, int]:
    """Return the smallest number of tokens with at least `wanted` characters after token `end`, and
    the number of these characters.

    Only the tokens from `first` on are decoded. Both texts, up to `end` and beyond, start with the
    step before, because a decoder may treat the start of a text differently. Llama 2's decoder
    drops a line break while the character after it is incomplete, so the maximum over fewer tokens
    is used. With doubling and bisection, a text of n tokens costs O(n log n).
    """
    before = _settled(decode(token_ids[first:end]))

    def characters(upto: int) -> int:
        most = 0
        for count in range(upto, max(end, upto - _BYTES), -1):
            text = decode(token_ids[first:count])
            most = max(most, _settled(text) - before)
            if not text.endswith("\ufffd"):
                break
        return most

    low, high = end, min(end + 1, len(token_ids))
    while high < len(token_ids) and characters(high) < wanted:
        low, high = high, min(2 * high - end, len(token_ids))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if characters(middle) >= wanted else (middle, high)
    return high, characters(high)


def _settled(text: str) -> int:
    """Return the number of characters that more tokens cannot change; the last may be
    incomplete."""
    return len(text.rstrip("\ufffd"))


def text_after(decode: Decode, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """Decode `token_ids` as the continuation of the tokens `before`, with its leading space."""
    prefix, whole = decode(before), decode([*before, *token_ids])
    return whole[len(prefix) :] if whole.startswith(prefix) else decode(token_ids)

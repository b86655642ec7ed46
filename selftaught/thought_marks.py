"""Where a completion of a reasoning model thinks, and where it answers.

A reasoning model writes a thought between two marks before its answer. Some chat templates write the
opening mark into the prompt: the completion then begins inside a thought (`opened=True`).
"""

import re

ThoughtMarks = tuple[str, str]
"""The text that opens a thought and the text that ends it."""

THINK: ThoughtMarks = ("<think>", "</think>")
"""The marks of most reasoning models."""


def outside_thoughts(
    text: str, marks: ThoughtMarks = THINK, *, opened: bool = False
) -> list[tuple[int, int]]:
    """Return the spans (start, end) of the text that are in no thought, in order.

    A closing mark without an opening one ends a thought that began with the text. A thought that
    does not end reaches to the end of the text.
    """
    begin, end = marks
    spans: list[tuple[int, int]] = []
    start: int | None = None if opened else 0
    for match in re.finditer(f"{re.escape(end)}|{re.escape(begin)}", text):
        if match[0] == end:
            if start is not None:
                spans.clear()  # the text before was a thought whose opening mark is in the prompt
            start = match.end()
        elif start is not None:
            spans.append((start, match.start()))
            start = None
    return spans if start is None else [*spans, (start, len(text))]


def after_thought(text: str, marks: ThoughtMarks = THINK, *, opened: bool = False) -> str | None:
    """Return the text after the last thought, or None if the last thought does not end.

    Text without a thought is returned whole.
    """
    spans = outside_thoughts(text, marks, opened=opened)
    if not spans or spans[-1][1] < len(text):
        return None
    return text[spans[-1][0] :]


def checked_marks(marks: object) -> ThoughtMarks:
    """Return a pair of marks given as a list or tuple of two texts.

    Raises:
        ValueError: the value is not two different texts that are not empty.
    """
    match marks:
        case [str(begin), str(end)] if begin and end and begin != end:
            return begin, end
    raise ValueError(
        "thought_marks must be two different texts, the one that opens a thought and the one that "
        f'ends it, such as ["<think>", "</think>"]; got {marks!r}.'
    )

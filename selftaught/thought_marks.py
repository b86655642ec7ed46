"""Splitting a reasoning model's completion into thoughts and answer.

A reasoning model writes its thought between two marks, followed by the answer. Some chat templates
write the opening mark into the prompt. The completion then starts inside a thought (`opened=True`).
"""

import re

ThoughtMarks = tuple[str, str]
"""The text that opens a thought and the text that closes it."""

THINK: ThoughtMarks = ("<think>", "</think>")
"""The marks that most reasoning models use."""


def outside_thoughts(
    text: str, marks: ThoughtMarks = THINK, *, opened: bool = False
) -> list[tuple[int, int]]:
    """Return the spans (start, end) of the text that are outside thoughts, in order.

    A closing mark without an opening one closes a thought that started at the beginning of the
    text. A thought without a closing mark extends to the end of the text.

    Args:
        text: A completion.
        marks: The opening and the closing mark.
        opened: The text starts inside a thought, because the prompt ended with the opening mark.
    """
    begin, end = marks
    spans: list[tuple[int, int]] = []
    start: int | None = None if opened else 0
    for match in re.finditer(f"{re.escape(end)}|{re.escape(begin)}", text):
        if match[0] == end:
            if start is not None:
                spans.clear()  # what came before was a thought opened in the prompt
            start = match.end()
        elif start is not None:
            spans.append((start, match.start()))
            start = None
    return spans if start is None else [*spans, (start, len(text))]


def after_thought(text: str, marks: ThoughtMarks = THINK, *, opened: bool = False) -> str | None:
    """Return the text after the last thought, or None if the last thought is not closed.

    Text without a thought is returned unchanged. For the arguments, see `outside_thoughts`.
    """
    spans = outside_thoughts(text, marks, opened=opened)
    if not spans or spans[-1][1] < len(text):
        return None
    return text[spans[-1][0] :]


def checked_marks(marks: object) -> ThoughtMarks:
    """Return thought marks as a tuple; they may be given as any list or tuple of two strings.

    Raises:
        ValueError: The value is not a pair of different, non-empty strings.
    """
    match marks:
        case [str(begin), str(end)] if begin and end and begin != end:
            return begin, end
    raise ValueError(
        "thought_marks must be two different texts: the one that opens a thought and the one that "
        f'closes it, such as ["<think>", "</think>"]; got {marks!r}.'
    )

"""From the messages of a client to a prompt without thoughts.

A client may send back what it was shown: thoughts in `reasoning_content`, which is not read, or in
the text of a message. They are removed, so that no thought reaches the prompt of a later turn.
"""

import re
from collections.abc import Sequence

from selftaught.records import Message
from selftaught.serving.protocol import ApiError
from selftaught.thought_marks import ThoughtMarks, outside_thoughts

ROUNDS = 20
"""Maximum number of times that marks are removed which a removal has formed."""


def without_thoughts(text: str, marks: Sequence[ThoughtMarks], *, assistant: bool) -> str:
    """Remove thoughts from the text of a message.

    Args:
        text: the text.
        marks: pairs of texts that open and close a thought.
        assistant: the message is the model's. Then a thought that is not closed, and one that is
            closed only, are removed as well. In other messages, only what stands between an opening
            and a closing mark is removed, and single marks are.

    Raises:
        ApiError: marks are nested more than `ROUNDS` times, which takes long to undo.
    """
    for _ in range(ROUNDS):  # what is left after a removal may be a mark again
        less = _removed(text, marks, assistant=assistant)
        if less == text:
            return text
        text = less
    raise ApiError("Expected a text without thought marks inside thought marks. Remove them.")


def _outside_pairs(text: str, marks: ThoughtMarks) -> str:
    """Remove single marks, and what stands between an opening and the next closing mark."""
    begin, end = marks
    kept: list[str] = []
    last, start = 0, None
    for match in re.finditer(f"{re.escape(end)}|{re.escape(begin)}", text):
        kept.append(text[last : match.start()])
        last = match.end()
        if match[0] == begin:
            start = len(kept) if start is None else start
        elif start is not None:
            del kept[start:]
            start = None
    return "".join([*kept, text[last:]])


def _removed(text: str, marks: Sequence[ThoughtMarks], *, assistant: bool) -> str:
    for begin, end in marks:
        if begin not in text and end not in text:
            continue
        if assistant:
            spans = outside_thoughts(text, (begin, end))
            text = "".join(text[start:finish] for start, finish in spans).lstrip()
        else:
            text = _outside_pairs(text, (begin, end))
    return text


def check_options(options: object, marks: Sequence[ThoughtMarks]) -> None:
    """Check that the options of a chat template, with all values inside them, have no thought marks.

    Raises:
        ApiError: a string contains a mark.
    """
    values = [options]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and any(one in value for pair in marks for one in pair):
            raise ApiError("Expected options without thought marks.", param="chat_template_kwargs")


def cleaned(messages: Sequence[Message], marks: Sequence[ThoughtMarks]) -> list[Message]:
    """Return messages without thoughts.

    Args:
        messages: the messages of a conversation.
        marks: pairs of texts that open and close a thought.
    """
    found: list[Message] = []
    for message in messages:
        text = without_thoughts(message["content"], marks, assistant=message["role"] == "assistant")
        found.append({"role": message["role"], "content": text})
    return found

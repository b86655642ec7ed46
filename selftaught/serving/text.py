"""The text of a completion while its tokens arrive: thoughts apart from content."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from selftaught.records import FinishReason
from selftaught.rendering import completion_text
from selftaught.samplers.stopping import Ending
from selftaught.serving.jobs import LogProb, Step
from selftaught.thought_marks import ThoughtMarks, outside_thoughts

UNFINISHED = "\ufffd"
"""What tokenizers decode an incomplete character to."""


class Detokenizer:
    """Decodes tokens one after another. The text is that of decoding all of them at once.

    Args:
        tokenizer: the model's tokenizer.
        ends: ids of end tokens, which have no text at the end of a completion.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        self._tokenizer, self._ends = tokenizer, ends
        self._ids: list[int] = []
        self._start = self._read = 0

    def add(self, token: int) -> str:
        """Return the text that a token adds; empty while a character is incomplete."""
        self._ids.append(token)
        if token in self._ends:
            return ""
        window = self._ids[self._start :]
        before = completion_text(self._tokenizer, window[: self._read - self._start], ())
        after = completion_text(self._tokenizer, window, ())
        if after.endswith(UNFINISHED) and len(window) < 16:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return after[len(before) :]


def held_back(text: str, strings: Sequence[str]) -> int:
    """Return the length of the longest end of a text that is the beginning of one of the strings.

    The whole of a string does not count.
    """
    longest = max(map(len, strings), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        end = text[len(text) - length :]
        if any(len(one) > length and one.startswith(end) for one in strings):
            return length
    return 0


@dataclass(frozen=True)
class HiddenThought:
    """The hidden thoughts before one token."""

    token: str
    """Text of the token."""
    thoughts: tuple[str, ...]
    gain: float
    """Log-probability of the token with the thoughts minus that without, in nats."""


@dataclass
class Piece:
    """New text of a completion."""

    reasoning: str = ""
    """Text of thoughts, without their marks."""
    content: str = ""
    """Text outside thoughts."""
    log_probs: list[tuple[LogProb, int]] = field(default_factory=list)
    """Log-probabilities of the tokens of the content, each with the index in the completion's text
    at which the token starts."""
    hidden: list[HiddenThought] = field(default_factory=list)
    """Hidden thoughts of Quiet-STaR, one entry per token that has some."""


class Splitter:
    """Separates thoughts from content in a text that arrives in pieces.

    Args:
        marks: the texts that open and close a thought.
        opened: the text begins inside a thought.
    """

    def __init__(self, marks: ThoughtMarks, *, opened: bool) -> None:
        self._marks = marks
        self.inside = opened
        """Whether the text so far ends inside a thought."""
        self._rest = ""

    def add(self, text: str, *, last: bool = False) -> Piece:
        """Return the new text. A possible beginning of a mark is held back, unless it is the last text."""
        piece = Piece()
        self._rest += text
        while True:
            places = [(at, mark) for mark in self._marks if (at := self._rest.find(mark)) >= 0]
            if not places:
                break
            at, mark = min(places)
            self._give(piece, self._rest[:at])
            self.inside = mark == self._marks[0]
            self._rest = self._rest[at + len(mark) :]
        kept = 0 if last else held_back(self._rest, self._marks)
        self._give(piece, self._rest[: len(self._rest) - kept])
        self._rest = self._rest[len(self._rest) - kept :]
        return piece

    def _give(self, piece: Piece, text: str) -> None:
        if self.inside:
            piece.reasoning += text
        else:
            piece.content += text


class CompletionText:
    """The text of one completion, thoughts apart, from its decoding steps.

    Args:
        tokenizer: the model's tokenizer.
        ending: decides when the completion ends.
        marks: the texts that open and close a thought.
    """

    def __init__(self, tokenizer: Any, ending: Ending, marks: ThoughtMarks) -> None:
        self._tokenizer, self._ending = tokenizer, ending
        self._words = Detokenizer(tokenizer, ending.silent)
        self._splitter = Splitter(marks, opened=ending.opened)
        self._text = ""
        self._sent = 0
        self._cut = False
        self._pending: list[tuple[LogProb, int]] = []
        self.token_ids: list[int] = []
        self._starts: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.filtered = False
        """Whether the content was withheld."""
        self.reasoning_tokens = 0
        """Number of tokens in thoughts, hidden ones of Quiet-STaR included."""
        self.hidden_tokens = 0
        """Number of tokens in hidden thoughts of Quiet-STaR, which are not among `token_ids`."""
        self.thinking_positions = 0
        """Number of tokens with hidden thoughts before them."""
        self.reasoning = ""
        self.content = ""
        self.hidden: list[HiddenThought] = []
        self.log_probs: list[tuple[LogProb, int]] = []

    def add(self, step: Step) -> Piece:
        """Return the new text after a step."""
        piece = Piece()
        if step.thoughts and step.token is not None:
            piece.hidden.append(self._hidden(step, step.token))
            piece.reasoning += "".join(f"[{one}]" for one in piece.hidden[0].thoughts)
        if step.token is not None:
            self._take(step.token, step.log_prob)
        self.finish_reason = step.finished
        was_inside = self._splitter.inside
        new = self._new_text(step.finished)
        inner = self._splitter.add(new, last=step.finished is not None)
        if step.token is not None and (was_inside or self._splitter.inside or inner.reasoning):
            self.reasoning_tokens += 1
            self._pending = []  # thoughts are not shown by their log-probabilities
        piece.reasoning += inner.reasoning
        piece.content += inner.content
        limit = self._sent if step.finished is None else len(self._text)
        if step.finished is not None and not self._cut:
            limit += 1  # the last token may have no text
        piece.log_probs = [one for one in self._pending if one[1] < limit]
        self._pending = self._pending[len(piece.log_probs) :] if step.finished is None else []
        self.reasoning += piece.reasoning
        self.content += piece.content
        self.hidden += piece.hidden
        self.log_probs += piece.log_probs
        if step.finished is not None:
            self._settle()
        return piece

    def _settle(self) -> None:
        """Separate thoughts from content in the whole text.

        It differs from what a stream gave in one case: before a closing mark without an opening one,
        everything is a thought, which a stream has sent as content.
        """
        marks = self._ending.marks
        spans = outside_thoughts(self._text, marks, opened=self._ending.opened)
        content = "".join(self._text[start:end] for start, end in spans)
        if content == self.content:
            return
        edges = [0, *(at for span in spans for at in span), len(self._text)]
        inner = (self._text[start:end] for start, end in pairwise(edges))
        thoughts = "".join(list(inner)[::2])
        self.reasoning = thoughts.replace(marks[0], "").replace(marks[1], "")
        self.content = content

        def outside(at: int) -> bool:
            return any(start <= at < end for start, end in spans)

        self.log_probs = [one for one in self.log_probs if outside(one[1])]
        inside = sum(at < len(self._text) and not outside(at) for at in self._starts)
        self.reasoning_tokens = self.hidden_tokens + inside

    def _hidden(self, step: Step, token: int) -> HiddenThought:
        """Count the hidden thoughts of a step, and return their text."""
        count = sum(map(len, step.thoughts))
        self.hidden_tokens += count
        self.reasoning_tokens += count
        self.thinking_positions += 1
        texts = [completion_text(self._tokenizer, one, ()) for one in ([token], *step.thoughts)]
        return HiddenThought(texts[0], tuple(texts[1:]), step.gain or 0.0)

    def _take(self, token: int, log_prob: LogProb | None) -> None:
        """Append a token, and its text."""
        self.token_ids.append(token)
        self._starts.append(len(self._text))
        if log_prob is not None and token not in self._ending.silent:
            self._pending.append((log_prob, len(self._text)))
        self._text += self._words.add(token)

    def _new_text(self, finished: FinishReason | None) -> str:
        """Return the text that can be sent: a possible beginning of a stop string is held back."""
        if finished is None:
            end = len(self._text) - held_back(self._text, self._ending.stop)
        elif self.token_ids:
            whole = self._ending.completion(self.token_ids).text
            self._cut = len(whole) < len(self._text)
            self._text = whole
            end = len(self._text)
        else:
            end = 0
        new = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

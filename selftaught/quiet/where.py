"""The rules "pattern" and "answer": positions of a text after which it matches a regular expression.

A position is one of them if the text up to one of the characters that its token completes ends with
a match. So the thought stands between the matched text and the token that follows. A position
depends only on the text before it. Texts in training and texts that are being written therefore
give the same positions.

The rule "answer" takes the marker of an answer as its pattern, and adds the positions whose text ends
with the marker and spaces or opening signs after it. So a thought stands directly before the first
token of the answer, if the text is split into tokens there.

Shapes: B texts, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selftaught.quiet.config import BY_TEXT, QuietConfig
from selftaught.quiet.gating import ThinkWhen
from selftaught.quiet.linear_pattern import LinearPattern, State

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER_PATTERN = r"(?i)####|the answer is|\\boxed\{"
"""Default pattern of the marker of an answer: those of the tasks in this package with answers in
words, numbers and LaTeX."""
OPENING = r"[\s:$*(\[{\"'`]+"
"""Text between a marker and an answer."""
INCOMPLETE = "\ufffd"
"""What a tokenizer writes for the bytes of an incomplete character."""


@dataclass
class _Row:
    """The end of one text, as far as it is needed to decode the next token.

    Tokens are decoded together in groups that begin and end with complete characters.
    """

    tokens: list[int]
    """Tokens of the group before the current one, and of the current group."""
    start: int
    """Number of tokens before the current group."""
    known: int
    """Number of characters of `tokens` that the patterns have read."""
    complete: bool
    """Whether the text so far ends with a complete character."""
    states: list[State]
    """State of every pattern."""


class Matcher:
    """Finds the positions after which a text matches a pattern.

    Args:
        pattern: the regular expression.
        tokenizer: the tokenizer of the model. Matches are searched in the decoded text.
        answer: the pattern is the marker of an answer; see the rule "answer" above.

    Raises:
        ValueError: the pattern cannot be used; see `LinearPattern`.
    """

    def __init__(
        self, pattern: str, tokenizer: "PreTrainedTokenizerBase", *, answer: bool = False
    ) -> None:
        self.pattern = pattern
        self._tokenizer = tokenizer
        self._patterns = [LinearPattern(pattern)]
        if answer:
            self._patterns.append(LinearPattern(pattern, OPENING))

    def mask(self, ids: Sequence[int]) -> list[bool]:
        """Return for every token of a text whether the model thinks after it."""
        row = self.first()
        return [self.read(row, token) for token in ids]

    def masks(self, ids_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Return `mask` for every text of a batch, `[B, T]`.

        Args:
            ids_BT: token ids.
            real_BT: 1 for text and 0 for padding, which is not text. None means no padding.
        """
        return Following(self, len(ids_BT)).read(ids_BT, real_BT)

    def found_in(self, text: str) -> bool:
        """Return whether a text matches anywhere."""
        state = self._patterns[0].start
        for char in text:
            state = self._patterns[0].step(state, char)
            if state.accepts:
                return True
        return False

    def first(self) -> _Row:
        """Return the state before the first token of a text."""
        return _Row([], 0, 0, True, [pattern.start for pattern in self._patterns])

    def read(self, row: _Row, token: int) -> bool:
        """Read the next token of a text, and return whether the model thinks after it.

        Args:
            row: the state of the text, which is changed.
            token: id of the token.
        """
        if row.complete:  # a new group
            row.tokens = row.tokens[row.start :]
            row.start = len(row.tokens)
            row.known = len(self._text(row.tokens))
        row.tokens.append(token)
        text = self._text(row.tokens)
        whole = text.rstrip(INCOMPLETE)
        row.complete = len(whole) == len(text)
        new, inside = whole[row.known :], False
        for char in new:
            row.states = [
                pattern.step(state, char)
                for pattern, state in zip(self._patterns, row.states, strict=True)
            ]
            inside |= row.states[0].accepts
        row.known = max(row.known, len(whole))
        return inside or (bool(new) and row.complete and row.states[-1].accepts)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)) if ids else ""


class Following:
    """Follows the texts of a batch while they are read or written.

    Args:
        matcher: finds the positions.
        texts: number of texts.
    """

    def __init__(self, matcher: Matcher, texts: int) -> None:
        self._matcher = matcher
        self._rows = [matcher.first() for _ in range(texts)]

    def read(self, new_BT: Tensor, real_BT: Tensor | None = None) -> Tensor:
        """Read new tokens at the end of the texts.

        Args:
            new_BT: ids of the new tokens.
            real_BT: 1 for text and 0 for padding; may include earlier tokens. None: no padding.

        Returns:
            After which of the new tokens the model thinks, `[B, T]`.
        """
        new = new_BT.tolist()
        real = [[1] * len(one) for one in new] if real_BT is None else real_BT[:, -new_BT.shape[1] :].tolist()  # fmt: skip
        found = [
            [bool(is_text) and self._matcher.read(row, token) for token, is_text in zip(ids, mask, strict=True)]
            for row, ids, mask in zip(self._rows, new, real, strict=True)
        ]  # fmt: skip
        return torch.tensor(found, dtype=torch.bool, device=new_BT.device).view(new_BT.shape)

    def reorder(self, index_B: Tensor) -> None:
        """Keep the texts with the given indices, for beam search."""
        self._rows = [
            replace(self._rows[at], tokens=list(self._rows[at].tokens)) for at in index_B.tolist()
        ]


def resolved(think_when: ThinkWhen, config: QuietConfig) -> ThinkWhen:
    """Return a rule without "trained", and with its pattern.

    "trained" becomes the rule that the model was trained with: "pattern", "answer", or "always". A
    missing pattern is that of the training if that had one, or the markers of the tasks.

    Args:
        think_when: the rule.
        config: options of the model.

    Raises:
        ValueError: the rule is "pattern", and there is no pattern.
    """
    rule = think_when.rule
    if rule == "trained":
        rule = config.positions if config.positions in BY_TEXT else "always"
    if rule not in BY_TEXT:
        return replace(think_when, rule=rule)
    pattern = think_when.pattern
    if pattern is None and config.positions == rule:
        pattern = config.positions_pattern
    if pattern is None and rule == "answer":
        pattern = ANSWER_PATTERN
    if pattern is None:
        raise ValueError(
            "think_when='pattern' needs a pattern, because this model was not trained with one. Give "
            "a regular expression, such as '='."
        )
    return replace(think_when, rule=rule, pattern=pattern)


def matcher_of(think_when: ThinkWhen, config: QuietConfig) -> Matcher | None:
    """Return what finds the positions of a rule; None for rules that do not read the text.

    Args:
        think_when: the rule.
        config: options of the model.

    Raises:
        ValueError: the rule has no tokenizer, or no pattern, or one that cannot be used.
    """
    rule = resolved(think_when, config)
    if rule.rule not in BY_TEXT:
        return None
    if rule.tokenizer is None:
        raise ValueError(
            f"Thinking where the text matches (rule {rule.rule!r}) needs the tokenizer: pass "
            f"ThinkWhen({think_when.rule!r}, tokenizer=tokenizer), or tokenizer=... to generate. "
            "ThinkWhen('always') thinks at every position."
        )
    assert rule.pattern is not None
    return Matcher(rule.pattern, rule.tokenizer, answer=rule.rule == "answer")


def following_of(think_when: ThinkWhen, config: QuietConfig, texts: int) -> Following | None:
    """Return what follows a number of texts for a rule; the other arguments are `matcher_of`'s."""
    matcher = matcher_of(think_when, config)
    return None if matcher is None else Following(matcher, texts)


def training_matcher(config: QuietConfig, tokenizer: "PreTrainedTokenizerBase") -> Matcher | None:
    """Return what finds the positions that think in training; None if the text does not decide."""
    if config.positions not in BY_TEXT:
        return None
    return matcher_of(ThinkWhen("trained", tokenizer=tokenizer), config)


def check_matches(
    matcher: Matcher, tokenizer: "PreTrainedTokenizerBase", texts: Sequence[Sequence[int]]
) -> int:
    """Return the number of texts that match, before a training.

    Args:
        matcher: finds the positions.
        tokenizer: the tokenizer of the model.
        texts: token ids of the texts.

    Raises:
        ValueError: no text matches.
    """
    found = sum(
        matcher.found_in(str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)))
        for ids in texts
    )
    if not found:
        raise ValueError(
            f"None of the {len(texts)} training texts matches the pattern {matcher.pattern!r}, so the "
            "model would never think. Check positions_pattern, or use positions='all'."
        )
    return found

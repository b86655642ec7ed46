"""From logits to tokens, and from tokens to a completion's end.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selftaught.records import Completion, FinishReason, Text
from selftaught.rendering import completion_text, opens_thought, silent_ids, turn_ending
from selftaught.samplers.base import SamplingParams, draw_number, without_stop
from selftaught.thought_marks import THINK, ThoughtMarks

NUCLEUS = 512
"""Tokens looked at before a whole vocabulary is sorted for top_p."""


def uniforms(seed: int, key: str, index: int, count: int) -> Tensor:
    """One uniform number per token of a completion, drawn for (seed, key, sample index) alone."""
    generator = torch.Generator().manual_seed(draw_number(seed, key, index))
    return torch.rand(count, generator=generator)


def choose(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams) -> Tensor:
    """The next token of every row: the likeliest at temperature 0, else the one its number draws."""
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = torch.softmax(logits_BV.float() / params.temperature, -1)
    if params.top_p < 1:
        probability_BV = _nucleus(probability_BV, params.top_p)
    # In float64, because a float32 running sum over a large vocabulary loses the rare tokens.
    cumulative_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]


def _nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds `top_p`; the others get 0."""
    likely, token = probability_BV.topk(min(NUCLEUS, probability_BV.shape[-1]))
    if bool((likely.sum(-1) < top_p).any()):
        likely, token = probability_BV.sort(descending=True)
    before = likely.cumsum(-1) - likely
    kept = likely.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probability_BV).scatter_(-1, token, kept)


def endings(
    tokenizer: PreTrainedTokenizerBase,
    eos: Sequence[int],
    prompts: Sequence[Text],
    params: SamplingParams,
) -> "list[Ending]":
    """When the completions of each prompt end; one object for all prompts that open a thought.

    Args:
        eos: the model's own end tokens. The one that the chat template ends an answer with is added,
            because a model's files need not name it, as those of base models do not.
    """
    options, marks = params.chat_template_kwargs, params.thought_marks
    asked = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    ends = [*eos]
    if asked is not None:
        with suppress(ValueError):  # a template that writes no answers
            ends.append(turn_ending(tokenizer, asked, options)[-1])
    plain, opened = (
        Ending(tokenizer, ends, params.stop, marks, opened=opens) for opens in (False, True)
    )
    return [opened if opens_thought(tokenizer, one, marks, options) else plain for one in prompts]


class Ending:
    """When a completion ends, and what its text then is.

    Whether a stop string stands in the text is read from the decoded text, never from token ids,
    so it may straddle tokens. A table over the vocabulary tells which tokens can be the last of
    one; only rows that have just drawn such a token are decoded.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        eos: Sequence[int],
        stop: Sequence[str],
        marks: ThoughtMarks = THINK,
        *,
        opened: bool = False,
    ) -> None:
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        # A special token is one token, so as a stop string it is an end token.
        self.eos = sorted({*eos, *(special[text] for text in stop if text in special)})
        self._tokenizer = tokenizer
        self._silent = frozenset((*self.eos, *silent_ids(tokenizer)))
        self.stop = [text for text in stop if text not in special]
        self._marks, self.opened = marks, opened
        self._suspects: dict[int, bool] = {}
        self._table_V = torch.full((0,), -1, dtype=torch.int8)

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of a completion's tokens, without end, begin and padding tokens at its end.

        Other special tokens are part of the text: they may be the marks around a thought.
        """
        return completion_text(self._tokenizer, token_ids, self._silent)

    def suspects(self, token_B: Tensor) -> Tensor:
        """Which rows have drawn a token that can be the last of a stop string."""
        if not self.stop:
            return torch.zeros_like(token_B, dtype=torch.bool)
        largest = int(token_B.max()) + 1
        if largest > len(self._table_V):
            grown_V = torch.full((2 * largest,), -1, dtype=torch.int8, device=token_B.device)
            grown_V[: len(self._table_V)] = self._table_V
            self._table_V = grown_V
        flag_B = self._table_V[token_B]
        if bool((flag_B < 0).any()):
            for token in token_B[flag_B < 0].unique().tolist():
                self._table_V[token] = self._can_end_a_stop(token)
            flag_B = self._table_V[token_B]
        return flag_B > 0

    def _can_end_a_stop(self, token: int) -> bool:
        """False only if no stop string can end inside this token, whatever stands before it."""
        alone = self.text([token])
        if not alone:  # end and unknown tokens add no text; others may, after another
            known = self._tokenizer.convert_ids_to_tokens(token) is not None
            return known and token not in self._silent
        if "\ufffd" in alone:  # part of a character
            return True
        # Some tokenizers drop the space before the first word.
        return any(
            stop in text or any(text.startswith(stop[k:]) for k in range(1, len(stop)))
            for text in (alone, " " + alone)
            for stop in self.stop
        )

    def cut(self, token_ids: Sequence[int]) -> str | None:
        """The text before the first stop string outside a thought, or None where there is none."""
        if not self.stop:
            return None
        return without_stop(self.text(token_ids), self.stop, self._marks, opened=self.opened)

    def ignored(self, token_ids: Sequence[int]) -> bool:
        """Whether the text has stop strings, and every one is in a thought."""
        text = self.text(token_ids)
        return any(stop in text for stop in self.stop) and self.cut(token_ids) is None

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Whether tokens are a completion that has ended, by its last token or a stop string."""
        if not token_ids:
            return False
        return token_ids[-1] in self.eos or self.cut(token_ids) is not None

    def completion(self, token_ids: Sequence[int]) -> Completion:
        """The completion that these tokens are, the ones that ended it included.

        Tokens after the first stop string are left out.
        """
        ids = tuple(token_ids)
        text = self.cut(ids)
        if text is not None:
            return Completion(text, "stop", self._up_to_stop(ids), self.opened)
        finish: FinishReason = "stop" if ids[-1] in self.eos else "length"
        return Completion(self.text(ids), finish, ids, self.opened)

    def _up_to_stop(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """The fewest first tokens whose text has the stop string, by bisection."""
        few, enough, middle = 0, len(ids), len(ids) - 1
        while enough - few > 1:
            if self.cut(ids[:middle]) is None:
                few = middle
            else:
                enough = middle
            middle = (few + enough) // 2
        return ids[:enough]

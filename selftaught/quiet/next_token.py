"""Prediction of the next token with a thought before it, on a key-value cache of the text.

A thought of t tokens is appended to the cached text and removed again after the next token has been
chosen. A new token costs t + 2 forward passes: one for the token itself, one for the start token,
one for each thought token except the last, and one for the last thought token with the end token.

Shapes: B texts, T text tokens so far, N thoughts, R rows (B N), D hidden width, V vocabulary.
"""

from collections.abc import Generator
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.gating import ThoughtParams, wanted
from selftaught.quiet.mixing import Gate
from selftaught.quiet.passes import Reading
from selftaught.quiet.thoughts import (
    Prefix,
    SpecialTokens,
    after_thought,
    language_head,
    read_on,
    think,
)


class ThinkingModel(Protocol):
    """Interface that generation needs; implemented by `QuietLM`."""

    base: PreTrainedModel
    quiet_config: QuietConfig
    gate: Gate | None

    @property
    def marks(self) -> SpecialTokens: ...

    def check_length(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, more: int = 0
    ) -> None: ...

    def mixed_logits(self, without_BD: Tensor, with_BND: Tensor) -> Tensor: ...


@torch.no_grad()
def next_logits(
    model: ThinkingModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    how: ThoughtParams,
    *,
    ends: list[int],
) -> Generator[Tensor, Tensor, None]:
    """Yield the log-probabilities of the next token, `[B, V]`, for one token after another.

    This is a generator: send it the chosen token of each text, `[B]`, to get the next
    log-probabilities. It must run inside `thoughtful(model.base)`. Start, end and padding tokens of
    thoughts have log-probability -inf, except for tokens in `ends`.

    Args:
        model: a Quiet-STaR model.
        input_ids: token ids of the prompts, `[B, T]`.
        attention_mask: 1 for text and 0 for padding.
        how: how the model thinks.
        ends: ids of the tokens that end a text.
    """
    base, marks = model.base, model.marks
    head = language_head(base)
    banned = sorted(set(marks.never) - set(ends))  # the padding token may also be the end token
    generator = torch.Generator().manual_seed(how.seed)
    real_BT, new_BT = attention_mask, input_ids
    reading = Reading(None, keep=True)
    while True:
        prefix = read_on(base, new_BT, real_BT, reading)
        without_BD = prefix.hidden_BTD[:, -1]
        logits_BV = head(without_BD).float().log_softmax(-1)
        thinks_B = wanted(model.gate, how.think_when, without_BD, logits_BV)
        shape = (len(input_ids), how.thoughts, 1, model.quiet_config.thought_tokens)
        uniform = torch.rand(shape, generator=generator).to(input_ids.device)
        row_X = thinks_B.nonzero()[:, 0]
        if len(row_X):
            some = prefix if len(row_X) == len(input_ids) else _rows(prefix, row_X)
            last = torch.tensor([[real_BT.shape[1] - 1]], device=input_ids.device)
            thought, _, thinking = think(
                base, head, some, last, uniform[row_X], marks, how.temperature
            )
            after_RD = after_thought(base, some, last, thinking, thought, marks)
            after_XND = after_RD.view(len(row_X), how.thoughts, -1)
            logits_BV[row_X] = model.mixed_logits(without_BD[row_X], after_XND)
        logits_BV[:, banned] = -torch.inf
        token_B = yield logits_BV
        new_BT = token_B[:, None]
        real_BT = torch.cat([real_BT, torch.ones_like(real_BT[:, :1])], 1)


def _rows(prefix: Prefix, row_X: Tensor) -> Prefix:
    """Return the prefix of some of its texts."""
    return Prefix(
        prefix.ids_BT[row_X],
        prefix.hidden_BTD[row_X],
        [key[row_X] for key in prefix.key_BKTD],
        [value[row_X] for value in prefix.value_BKTD],
        prefix.position_BT[row_X],
        None if prefix.real_BT is None else prefix.real_BT[row_X],
    )

"""Prediction of next tokens with a thought before each, on a key-value cache of the text.

A thought of t tokens is appended to the cached text and removed again after the next token has been
chosen. A new token costs t + 2 forward passes: one for the token itself, one for the start token,
one for each thought token except the last, and one for the last thought token with the end token.

Shapes: B texts, T text tokens so far, N thoughts, J positions, S thought tokens, R rows (B N), D
hidden width, V vocabulary.
"""

import math
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.gating import ThinkWhen, ThoughtParams, wanted
from selftaught.quiet.mixing import Gate, MixingHead
from selftaught.quiet.passes import Reading
from selftaught.quiet.thoughts import (
    Prefix,
    SpecialTokens,
    after_thought,
    language_head,
    read_on,
    think,
)
from selftaught.quiet.where import Following, following_of


class ThinkingModel(Protocol):
    """Interface that generation needs; implemented by `QuietLM`."""

    base: PreTrainedModel
    quiet_config: QuietConfig
    think_when: ThinkWhen
    gate: Gate | None
    mixing: MixingHead

    @property
    def marks(self) -> SpecialTokens: ...

    def check_length(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, more: int = 0
    ) -> None: ...

    def mixed_logits(self, without_BD: Tensor, with_BND: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Mixed:
    """Predictions of the next token at positions of texts. Log-probabilities are in nats."""

    before_BJV: Tensor
    """Log-probabilities without a thought."""
    mixed_BJV: Tensor
    """Log-probabilities after the thoughts. Equal to `before_BJV` where the model does not
    think."""
    each_BJNV: Tensor
    """Log-probabilities after each single thought."""
    weight_BJN: Tensor
    """Mixing weight of each thought, 0 where the model does not think."""
    thought_BNJS: Tensor
    """Token ids of the thoughts."""
    thinks_BJ: Tensor
    """Whether the model thinks at the position."""


@torch.no_grad()
def mixed_at(
    model: ThinkingModel,
    prefix: Prefix,
    hidden_BJD: Tensor,
    position_BJ: Tensor,
    uniform_BNJS: Tensor,
    how: ThoughtParams,
    matches_BJ: Tensor | None = None,
) -> Mixed:
    """Predict the next token at some positions of texts, without and with thoughts.

    It must run inside `thoughtful(model.base)`.

    Args:
        model: a Quiet-STaR model.
        prefix: the texts.
        hidden_BJD: hidden states of the texts at the positions.
        position_BJ: the positions.
        uniform_BNJS: one uniform random number per thought token.
        how: how the model thinks.
        matches_BJ: where the text matches, for rules that read the text.
    """
    base, head, marks = model.base, language_head(model.base), model.marks
    texts, thoughts = uniform_BNJS.shape[:2]
    before_BJV = head(hidden_BJD).float().log_softmax(-1)
    thinks_BJ = wanted(model.gate, how.think_when, hidden_BJD, before_BJV, matches_BJ)
    sampled = think(base, head, prefix, position_BJ, uniform_BNJS, marks, how.temperature)
    after_RD = after_thought(base, prefix, position_BJ, sampled, marks)
    after_BJND = after_RD.view(texts, thoughts, *hidden_BJD.shape[1:]).transpose(1, 2)
    hidden_BJND = hidden_BJD[:, :, None].expand_as(after_BJND)
    each_XV = model.mixed_logits(hidden_BJND.flatten(0, 2), after_BJND.flatten(0, 2)[:, None])
    each_BJNV = each_XV.view(*after_BJND.shape[:3], -1)
    each_BJNV = torch.where(thinks_BJ[..., None, None], each_BJNV, before_BJV[:, :, None])
    return Mixed(
        before_BJV=before_BJV,
        mixed_BJV=each_BJNV.logsumexp(2) - math.log(thoughts),
        each_BJNV=each_BJNV,
        weight_BJN=model.mixing(hidden_BJND, after_BJND) * thinks_BJ[..., None],
        thought_BNJS=sampled.thought_BNJS,
        thinks_BJ=thinks_BJ,
    )


@dataclass
class SeenThoughts:
    """Where `read_and_predict` stores the thoughts before the latest token, to be shown."""

    rows: list[int] = field(default_factory=list)
    """Indices of the texts with thoughts before the latest token."""
    thoughts: list[Tensor] = field(default_factory=list)
    """Token ids of the thoughts of each of them, `[N, S]`."""
    before_XV: Tensor | None = None
    """Log-probabilities of the next token of each of them without a thought."""


@torch.no_grad()
def read_and_predict(
    model: ThinkingModel,
    new_BT: Tensor,
    real_BT: Tensor,
    reading: Reading,
    how: ThoughtParams,
    generator: torch.Generator,
    following: Following | None = None,
    seen: SeenThoughts | None = None,
) -> Tensor:
    """Read new tokens of texts and return the log-probabilities of the next one, `[B, V]`.

    It must run inside `thoughtful(model.base)`.

    Args:
        model: a Quiet-STaR model.
        new_BT: ids of the new tokens.
        real_BT: mask of the whole texts, earlier tokens included: 1 for text and 0 for padding.
        reading: the pass, with `keep=True`. Pass the same object again to continue the texts.
        how: how the model thinks.
        generator: source of the random numbers of the thoughts.
        following: follows the texts, for rules that read the text.
        seen: receives the thoughts.
    """
    base, marks = model.base, model.marks
    head = language_head(base)
    prefix = read_on(base, new_BT, real_BT, reading)
    without_BD = prefix.hidden_BTD[:, -1]
    logits_BV = head(without_BD).float().log_softmax(-1)
    matches_B = None if following is None else following.read(new_BT, real_BT)[:, -1]
    thinks_B = wanted(model.gate, how.think_when, without_BD, logits_BV, matches_B)
    shape = (len(new_BT), how.thoughts, 1, model.quiet_config.thought_tokens)
    uniform = torch.rand(shape, generator=generator).to(new_BT.device)
    row_X = thinks_B.nonzero()[:, 0]
    if seen is not None:
        seen.rows, seen.thoughts = row_X.tolist(), []
    if len(row_X):
        some = prefix if len(row_X) == len(new_BT) else _rows(prefix, row_X)
        last = torch.tensor([[real_BT.shape[1] - 1]], device=new_BT.device)
        sampled = think(base, head, some, last, uniform[row_X], marks, how.temperature)
        if seen is not None:
            seen.thoughts = list(sampled.thought_BNJS[:, :, 0].cpu())
            seen.before_XV = logits_BV[row_X]
        after_RD = after_thought(base, some, last, sampled, marks)
        after_XND = after_RD.view(len(row_X), how.thoughts, -1)
        logits_BV[row_X] = model.mixed_logits(without_BD[row_X], after_XND)
    return logits_BV


def banned_tokens(model: ThinkingModel, ends: Iterable[int]) -> list[int]:
    """Return the ids that are never written: start, end and padding, except for tokens in `ends`.

    The padding token may also be an end token.
    """
    return sorted(set(model.marks.never) - set(ends))


def next_logits(
    model: ThinkingModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    how: ThoughtParams,
    *,
    ends: list[int],
    seen: SeenThoughts | None = None,
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
        seen: receives the thoughts before the token that is yielded next.
    """
    banned = banned_tokens(model, ends)
    generator = torch.Generator().manual_seed(how.seed)
    real_BT, new_BT = attention_mask, input_ids
    reading = Reading(None, keep=True)
    following = following_of(how.think_when, model.quiet_config, len(input_ids))
    while True:
        logits_BV = read_and_predict(
            model, new_BT, real_BT, reading, how, generator, following, seen
        )
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

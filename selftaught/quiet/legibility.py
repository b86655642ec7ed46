"""Measures of how readable thoughts are, for training and evaluation.

- Log-probability of thoughts under the model before training (`reference`): thoughts that this
  model would write have a low negative log-probability.
- Share of repeated tokens: seq-rep-1 of Welleck et al. 2020 (arXiv:1908.04319), 1 minus the
  number of different tokens divided by the number of tokens, of each thought.
- Share of distinct thoughts, at a position and in a text. Thoughts that are the same everywhere
  cannot say anything about the text. Texts with more thoughts have a lower share of them, so it is
  comparable only for texts of the same length and the same number of thoughts.

Shapes: B texts, T text tokens, N thoughts per position, J positions, S thought tokens, X thoughts or
windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selftaught.quiet.intervals import ratio_interval
from selftaught.quiet.thought_ends import content_lengths

Interval = tuple[float, float, float]
"""A mean and the ends of its 95% confidence interval over texts, which are NaN for a single text."""


@dataclass(frozen=True)
class Legibility:
    """How readable the thoughts of a model are. Means over thoughts, with intervals."""

    thoughts: int
    """Number of thoughts."""
    base_nll: Interval | None
    """Negative log-probability per token under the model before training, in nats; its exponential
    is the perplexity. None if it was not measured."""
    repeated_tokens: Interval
    """Share of the tokens of a thought that occur earlier in it."""
    repeated_in_text: Interval | None
    """The same for windows of the texts of the mean length of the thoughts. None if every text is
    shorter."""
    distinct_thoughts: Interval | None
    """Number of different thoughts at a position divided by the number of thoughts there. None with
    one thought per position."""
    distinct_in_text: Interval
    """Number of different thoughts in a text (a span) divided by the number of thoughts in it."""


@dataclass(frozen=True)
class ThoughtRows:
    """Values of the thoughts of a batch. Each row begins with the number of the text."""

    by_thought: Tensor
    """Per thought: text, length in tokens, share of repeated tokens, and nats per token, NaN if not
    measured; `[4, X]`."""
    at_position: Tensor
    """Per position: text, share of distinct thoughts; `[2, X]`."""
    in_text: Tensor
    """Per span: text, share of distinct thoughts; `[2, X]`."""
    several: bool
    """Whether there are several thoughts per position."""


def repeated_share(token_XS: Tensor, length_X: Tensor) -> Tensor:
    """Return the share of the first `length_X` tokens that occur earlier among them, `[X]`.

    Args:
        token_XS: token ids.
        length_X: number of tokens that count, at least 1.
    """
    slot_S = torch.arange(token_XS.shape[1], device=token_XS.device)
    again_XSS = (token_XS[:, :, None] == token_XS[:, None]) & (slot_S[:, None] > slot_S)
    again_XS = again_XSS.any(-1) & (slot_S < length_X[:, None])
    return again_XS.sum(-1) / length_X


def distinct_at_positions(thought_BNJS: Tensor) -> Tensor:
    """Return the share of distinct thoughts at each position, `[B, J]`."""
    thoughts = thought_BNJS.shape[1]
    equal_BNNJ = (thought_BNJS[:, :, None] == thought_BNJS[:, None]).all(-1)
    before_NN = torch.ones(thoughts, thoughts, dtype=torch.bool, device=equal_BNNJ.device).tril(-1)
    repeated_BNJ = (equal_BNNJ & before_NN[None, :, :, None]).any(2)
    return 1 - repeated_BNJ.float().mean(1)


def distinct_in_texts(thought_BNJS: Tensor, used_BJ: Tensor) -> Tensor:
    """Return the share of distinct thoughts among those of each text, `[B]`; NaN without any.

    Args:
        thought_BNJS: token ids of the thoughts; slots after an end token contain the end token.
        used_BJ: which positions count.
    """
    shares: list[float] = []
    for thought_NJS, used_J in zip(thought_BNJS, used_BJ, strict=True):
        thought_XS = thought_NJS[:, used_J].flatten(0, 1)
        different = len(thought_XS.unique(dim=0)) if len(thought_XS) else 0
        shares.append(different / len(thought_XS) if len(thought_XS) else float("nan"))
    return torch.tensor(shares)


def batch_signals(thought_BNJS: Tensor, used_BJ: Tensor, end: int) -> dict[str, float]:
    """Return the measures that are logged in training: `repeated_tokens` and `distinct_in_text`.

    Empty without a token of a thought.

    Args:
        thought_BNJS: token ids of the thoughts.
        used_BJ: which positions count.
        end: id of the end token.
    """
    if thought_BNJS.shape[-1] == 0 or not bool(used_BJ.any()):
        return {}
    thought_XS = thought_BNJS.transpose(1, 2)[used_BJ].flatten(0, 1)
    repeated_X = repeated_share(thought_XS, content_lengths(thought_XS, end).clamp(min=1))
    distinct_B = distinct_in_texts(thought_BNJS, used_BJ)
    return {
        "repeated_tokens": float(repeated_X.mean()),
        "distinct_in_text": float(distinct_B.nanmean()),
    }


def rows_of(
    thought_BNTS: Tensor, thinks_BT: Tensor, text_B: Tensor, nats_BNT: Tensor | None, end: int
) -> ThoughtRows:
    """Return the values of the thoughts of a batch, for `legibility`.

    Args:
        thought_BNTS: token ids of the thoughts.
        thinks_BT: at which positions the model thinks.
        text_B: number of the text of each span.
        nats_BNT: negative log-probability per token of each thought. None: not measured.
        end: id of the end token.
    """
    thoughts = thought_BNTS.shape[1]
    thought_XS = thought_BNTS.transpose(1, 2)[thinks_BT].flatten(0, 1)
    text_X = text_B[:, None].expand_as(thinks_BT)[thinks_BT]
    length_X = content_lengths(thought_XS, end)
    if nats_BNT is None:
        nats_X = torch.full_like(length_X, torch.nan, dtype=torch.double)
    else:
        nats_X = nats_BNT.transpose(1, 2)[thinks_BT].flatten()
    columns = (text_X.repeat_interleave(thoughts), length_X, repeated_share(thought_XS, length_X.clamp(min=1)), nats_X)  # fmt: skip
    distinct_BT = distinct_at_positions(thought_BNTS)
    some_B = thinks_BT.any(1)
    in_text_B = distinct_in_texts(thought_BNTS, thinks_BT).to(text_B.device)
    return ThoughtRows(
        _stacked(*columns),
        _stacked(text_X, distinct_BT[thinks_BT]),
        _stacked(text_B[some_B], in_text_B[some_B]),
        thoughts > 1,
    )


def legibility(
    rows: Sequence[ThoughtRows], spans: Sequence[tuple[int, Sequence[int]]]
) -> Legibility | None:
    """Return the means over all thoughts with their intervals. None if there is no thought.

    Args:
        rows: the values of all batches.
        spans: the texts, as (number of the text, token ids).
    """
    text, length, repeated, nats = torch.cat([one.by_thought for one in rows], 1)
    if not len(text) or not bool(length.any()):
        return None
    window = round(float(length.mean()))
    return Legibility(
        thoughts=len(text),
        base_nll=None if bool(nats.isnan().any()) else _mean(text, nats),
        repeated_tokens=_mean(text, repeated),
        repeated_in_text=_in_windows(spans, window),
        distinct_thoughts=_mean(*torch.cat([one.at_position for one in rows], 1))
        if rows[0].several else None,
        distinct_in_text=_mean(*torch.cat([one.in_text for one in rows], 1)),
    )  # fmt: skip


def _in_windows(spans: Sequence[tuple[int, Sequence[int]]], width: int) -> Interval | None:
    """Return the share of repeated tokens in all windows of `width` tokens of the texts."""
    texts: list[int] = []
    shares: list[Tensor] = []
    for text, ids in spans:
        if len(ids) >= width:
            window_XS = torch.tensor(ids).unfold(0, width, 1)
            shares.append(repeated_share(window_XS, torch.full((len(window_XS),), width)))
            texts += [text] * len(window_XS)
    return _mean(torch.tensor(texts), torch.cat(shares).double()) if shares else None


def _mean(text: Tensor, value: Tensor) -> Interval:
    return (float(value.mean()), *ratio_interval(text.long(), value, torch.ones_like(value)))


def _stacked(*columns: Tensor) -> Tensor:
    return torch.stack([column.double() for column in columns]).cpu()

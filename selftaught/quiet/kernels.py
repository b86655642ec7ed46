"""Attention over several parts under one softmax: with plain products, or two with a fused kernel.

Shapes: B texts, R rows (one per text, thought and position), K key-value heads, Q queries of a
group, X queries of all rows of a text, D head width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selftaught.samplers.local.fused_attention import Kernel, joined


@dataclass(frozen=True)
class Form:
    """How a layer computes attention weights from scores."""

    scale: float
    """Factor of the scores."""
    softcap: float | None = None
    """Soft cap of the scores. None means no cap."""
    sink_H: Tensor | None = None
    """Attention sink: a learned score per head that takes part in the softmax but has no value
    (gpt_oss). None means no sink."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sink_H is None


def joint(parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], form: Form, new: int) -> list[Tensor]:
    """Compute attention over several parts (query, key, value, bias) under one softmax.

    All parts have the same queries. Those of the first part are ordered by text and those of the
    others by row.

    Returns:
        The contribution of each part to the output, in the order of its queries.
    """
    scores = []
    for query, key, _, bias in parts:
        score = (query @ key.transpose(-1, -2)) * form.scale
        if score.dtype in (torch.bfloat16, torch.float16):
            score = score.float()
        if form.softcap is not None:
            score = form.softcap * torch.tanh(score / form.softcap)
        scores.append(score + bias)
    top = scores[-1].logsumexp(-1)
    if len(parts) == 2:
        by_row = _by_row(scores[0].logsumexp(-1), top)
        top = torch.logaddexp(top, by_row)
    if form.sink_H is not None:
        groups = top.shape[1]
        sink_KQ = form.sink_H.view(groups, -1, 1).expand(-1, -1, new).reshape(groups, -1)
        top = torch.logaddexp(top, sink_KQ.to(top.dtype))
    out = []
    for score, (_, _, value, _) in zip(scores, parts, strict=True):
        total = top if score.shape[:-1] == top.shape else _by_text(top, score.shape[:-1])
        out.append(torch.exp(score - total[..., None]).to(value.dtype) @ value)
    return out


def _by_row(total_BKX: Tensor, like_RKQ: Tensor) -> Tensor:
    """Reorder values per query from texts (B, with all their queries X) to rows (R)."""
    texts, groups = total_BKX.shape[:2]
    rows, queries = like_RKQ.shape[0], like_RKQ.shape[2]
    return (
        total_BKX.view(texts, groups, rows // texts, queries)
        .transpose(1, 2)
        .reshape(like_RKQ.shape)
    )


def _by_text(total_RKQ: Tensor, shape: torch.Size) -> Tensor:
    """Reorder values per query from rows to texts; the inverse of `_by_row`."""
    rows, groups, queries = total_RKQ.shape
    texts = shape[0]
    return total_RKQ.view(texts, rows // texts, groups, queries).transpose(1, 2).reshape(shape)


class TwoPart(torch.autograd.Function):
    """Attention over the text and the own thought with a kernel that returns the log-sum-exp.

    The outputs of the two parts are combined with the log-sum-exp of their scores. The backward
    kernel recomputes the attention weights from the log-sum-exp. With the combined log-sum-exp and
    the combined output, it returns the exact gradients of each part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_RKQD: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_bias: Tensor,
        own_bias: Tensor,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        query_BKXD = _vectors_by_text(query_RKQD, len(prefix_key))
        prefix_out, prefix_total = kernel.forward(
            query_BKXD, prefix_key, prefix_value, prefix_bias, scale
        )
        own_out, own_total = kernel.forward(query_RKQD, key, value, own_bias, scale)
        prefix_out = _vectors_by_row(prefix_out, query_RKQD)
        prefix_total = _by_row(prefix_total, own_total)
        out, total = joined(own_out, own_total, prefix_out, prefix_total)
        ctx.save_for_backward(
            query_RKQD, prefix_key, prefix_value, key, value, prefix_bias, own_bias, out, total
        )
        ctx.scale, ctx.kernel = scale, kernel
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, prefix_key, prefix_value, key, value, prefix_bias, own_bias, out, total = (
            ctx.saved_tensors
        )
        (grad,) = outputs
        grad, texts = grad.contiguous(), len(prefix_key)
        x_shape = torch.Size((texts, key.shape[1], query.shape[0] // texts * query.shape[2]))
        prefix_query, prefix_key_grad, prefix_value_grad = ctx.kernel.backward(
            _vectors_by_text(grad, texts), _vectors_by_text(query, texts), prefix_key, prefix_value,
            prefix_bias, _vectors_by_text(out, texts), _by_text(total, x_shape), ctx.scale,
        )  # fmt: skip
        query_grad, key_grad, value_grad = ctx.kernel.backward(
            grad, query, key, value, own_bias, out, total, ctx.scale
        )
        query_grad = query_grad + _vectors_by_row(prefix_query, query)
        return (
            query_grad, prefix_key_grad, prefix_value_grad, key_grad, value_grad, None, None, None, None
        )  # fmt: skip


def _vectors_by_text(tensor_RKQD: Tensor, texts: int) -> Tensor:
    """Reorder vectors per query from rows to texts with all their queries."""
    rows, groups, queries, width = tensor_RKQD.shape
    by_text = tensor_RKQD.view(texts, rows // texts, groups, queries, width).transpose(1, 2)
    return by_text.reshape(texts, groups, -1, width)


def _vectors_by_row(tensor_BKXD: Tensor, like_RKQD: Tensor) -> Tensor:
    """Reorder vectors per query from texts to rows; the inverse of `_vectors_by_text`."""
    texts, groups = tensor_BKXD.shape[:2]
    rows, _, queries, width = like_RKQD.shape
    by_row = tensor_BKXD.view(texts, groups, rows // texts, queries, width).transpose(1, 2)
    return by_row.reshape(like_RKQD.shape)

"""Attention for thoughts at many positions of a text at the same time.

The code of the model runs unchanged. This attention is registered with transformers'
`AttentionInterface`, and the mask with its `AttentionMaskInterface`, which passes the model's own
mask rule of each layer (causal, sliding window, chunked). Instead of a mask tensor, the layers get
a
*pass* object that does the computation: `Reading` for the text, `Thinking` for thoughts.

A thought token at position j attends to the text up to j and to the earlier tokens of its own
thought, under one softmax. Its scores have two parts: all queries against the shared keys of the
text (one matrix product), and every thought against itself (small products). No mask of size
positions x positions is needed.

Shapes: B texts, T text tokens, R rows (one per text, thought and position), J positions per text,
U new tokens of a row, S tokens of a row so far, P text tokens that rows can attend to, H query
heads, K key-value heads, G query heads per key-value head, Q queries of a group (G U), D head
width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

ATTENTION = "quiet_thoughts"
HIDDEN = -30000.0
"""Added to the scores of masked tokens. Finite, so that a query whose text is completely masked
does not give NaN."""

WITHOUT_EFFECT = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
"""Tensors that layers pass to their attention and that can be ignored here."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Mask rule of a layer: (batch, head, query position, key position) -> whether the query sees the
key."""


class Pass(Protocol):
    """Computes the attention of one forward pass of the model; see `under`."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, form: "Form"
    ) -> Tensor: ...


@dataclass(frozen=True)
class Form:
    """How a layer computes attention weights from scores."""

    scale: float
    """Factor of the scores."""
    softcap: float | None = None
    """Soft cap of the scores. None: no cap."""
    sink_H: Tensor | None = None
    """Attention sink: a learned score per head that takes part in the softmax but has no value
    (gpt_oss). None: no sink."""

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sink_H is None


def quiet_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: "Seen",
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention function of every layer, with the signature of transformers' `AttentionInterface`.

    The pass in `attention_mask` does the computation.

    Raises:
        TypeError: the layer passes a tensor that this attention does not support, such as a
            position bias.
    """
    for name, given in kwargs.items():
        if isinstance(given, Tensor) and name not in WITHOUT_EFFECT:
            raise TypeError(f"its attention uses {name!r}, which thoughts do not have")
    quiet_pass, rule = attention_mask.quiet_pass, attention_mask.rule
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    form = Form(scale, softcap, s_aux)
    # Under autocast, queries and keys are float32 after the rotary embedding; values are 16-bit.
    query_BHTD, key_BKTD = query_BHTD.to(value_BKTD.dtype), key_BKTD.to(value_BKTD.dtype)
    out_BHTD = quiet_pass.attend(layer, query_BHTD, key_BKTD, value_BKTD, rule, form)
    return out_BHTD.transpose(1, 2).contiguous(), None


@dataclass(frozen=True)
class Seen:
    """Passed to the layers instead of a mask tensor.

    The mask argument reaches the layers in every model, also when gradient checkpointing recomputes
    a layer.
    """

    rule: Rule
    quiet_pass: Pass


_CURRENT: ContextVar[Pass] = ContextVar("quiet_pass")


def _seen_by_rule(*args: object, mask_function: Rule, **kwargs: object) -> Seen:
    """Mask function for `AttentionMaskInterface`: returns the rule instead of a mask tensor."""
    return Seen(mask_function, _CURRENT.get())


@contextmanager
def under(quiet_pass: Pass) -> Iterator[None]:
    """Context manager: forward passes of the model use this pass."""
    token = _CURRENT.set(quiet_pass)
    try:
        yield
    finally:
        _CURRENT.reset(token)


AttentionInterface.register(ATTENTION, quiet_attention)
AttentionMaskInterface.register(ATTENTION, _seen_by_rule)  # type: ignore[arg-type]


@contextmanager
def thoughtful(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: the model uses `quiet_attention` instead of its own attention."""
    own = model.config._attn_implementation or "eager"
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class UnsupportedModel(ValueError):
    """Raised for a model whose thoughts at many positions cannot be computed in parallel."""


def unsupported(base: PreTrainedModel, why: str) -> UnsupportedModel:
    """Return the error for an unsupported model, with the reason and what to use instead."""
    return UnsupportedModel(
        f"{type(base).__name__} cannot think at many positions in parallel: {why}. Use a "
        "model whose layers all use attention through transformers' AttentionInterface, such as "
        "Llama, Mistral, Qwen or Gemma 3."
    )


def decoder_layers(base: PreTrainedModel) -> tuple[str, Sequence[nn.Module]]:
    """Return the name of the module list with the decoder layers, and the layers; empty if not
    found."""
    count = base.config.get_text_config().num_hidden_layers
    stacks = [
        (name, module) for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]  # fmt: skip
    fitting = [stack for stack in stacks if len(stack[1]) == count]
    name, layers = (fitting or stacks or [("", nn.ModuleList())])[0]
    return name, list(layers)


def layer_name(base: PreTrainedModel, number: int) -> str:
    """Return a description of a layer: its number, class, submodules and name in the model."""
    name, layers = decoder_layers(base)
    if number >= len(layers):
        return f"layer {number} ({type(base).__name__})"
    parts = ", ".join(type(part).__name__ for part in layers[number].children())
    return f"layer {number} ({type(layers[number]).__name__}: {parts}; {name}.{number})"


def _seen(rule: Rule, query_position: Tensor, key_position: Tensor) -> Tensor:
    """Apply a mask rule to two tensors of positions that can be broadcast."""
    zero = torch.zeros((), dtype=torch.long, device=query_position.device)
    return rule(zero, zero, query_position, key_position)


@dataclass
class Gradients:
    """Gradients of the thoughts' losses with respect to the keys and values of the text, per layer.

    They are summed over chunks, and added once in the backward pass of the reading pass.
    """

    key_BKTD: list[Tensor | None]
    value_BKTD: list[Tensor | None]
    scale: Tensor | float = 1.0
    """Gradient of the final loss with respect to the sum of the chunks' losses."""


class _Inject(torch.autograd.Function):
    """Identity in forward. Backward adds the gradient that is stored in `gradients` at that
    time."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gradients: Gradients, name: str, layer: int) -> Tensor:
        ctx.source = (gradients, name, layer)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, None, None, None]:
        gradients, name, layer = ctx.source
        extra = getattr(gradients, name)[layer]
        (output,) = outputs
        return output if extra is None else output + gradients.scale * extra, None, None, None


@dataclass
class Reading:
    """The pass over the text. Stores the keys and values of every layer."""

    real_BT: Tensor | None
    """Which tokens are text and not padding. None: there is no padding before a text token."""
    keep: bool = False
    """Whether later passes continue the text of earlier ones, as with a key-value cache."""
    key_BKTD: dict[int, Tensor] = field(default_factory=dict)
    value_BKTD: dict[int, Tensor] = field(default_factory=dict)
    gradients: Gradients | None = None
    _seen: dict[tuple[Rule, int, int], tuple[Tensor, bool]] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, form: Form
    ) -> Tensor:
        if self.keep and layer in self.key_BKTD:
            key = torch.cat([self.key_BKTD[layer], key], 2)
            value = torch.cat([self.value_BKTD[layer], value], 2)
        self.key_BKTD[layer], self.value_BKTD[layer] = key.detach(), value.detach()
        if self.gradients is not None and torch.is_grad_enabled():
            key = _Inject.apply(key, self.gradients, "key_BKTD", layer)
            value = _Inject.apply(value, self.gradients, "value_BKTD", layer)
        rows, heads, new, width = query.shape
        groups, stored = key.shape[1], key.shape[2]
        if (rule, new, stored) not in self._seen:
            if any(known[1:] != (new, stored) for known in self._seen):
                self._seen.clear()
            seen = self._seen_by(rule, new, stored, query.device)
            whole = seen.new_ones(new, stored).tril(stored - new)
            causal = new in (1, stored) and bool((seen == whole).all())
            self._seen[rule, new, stored] = (seen, causal)
        seen, causal = self._seen[rule, new, stored]
        if form.plain:
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=None if causal else seen, is_causal=causal and new > 1,
                scale=form.scale, enable_gqa=True,
            )  # fmt: skip
        query_BKQD = query.reshape(rows, groups, -1, width)
        bias = (~seen).expand(-1, heads // groups, -1, -1).reshape(len(seen), 1, -1, stored)
        out = _joint([(query_BKQD, key, value, bias.to(query.dtype) * HIDDEN)], form, new)
        return out[0].reshape(rows, heads, new, -1)

    def _seen_by(self, rule: Rule, new: int, stored: int, device: torch.device) -> Tensor:
        """Return which stored tokens each new token attends to: [1 or B, 1, new, stored]."""
        at_T = torch.arange(stored, device=device)
        seen = _seen(rule, at_T[-new:, None], at_T[None])[None, None]
        if self.real_BT is None:
            return seen
        # A padding token attends to itself, because a softmax over no tokens would give NaN.
        return (seen & self.real_BT[:, None, None]) | (at_T[-new:, None] == at_T)


@dataclass
class Thinking:
    """The pass over thoughts. Each row continues a text after one of its positions."""

    key_BKTD: list[Tensor]
    value_BKTD: list[Tensor]
    real_BT: Tensor | None
    position_BJ: Tensor
    """Text position of each row. `[1, J]` if all texts have the same positions."""
    shown: int
    """Number of text tokens that any row can attend to: the last position plus 1."""
    thoughts: int
    """Number of thoughts per position."""
    stored: int = 0
    """Number of tokens of each row from earlier passes."""
    own_key_RKSD: dict[int, Tensor] = field(default_factory=dict)
    own_value_RKSD: dict[int, Tensor] = field(default_factory=dict)
    keep: bool = False
    """Whether later passes continue these rows."""
    _biases: dict[Rule, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def next(self, new: int) -> None:
        """Add the tokens of the last pass to the count of stored tokens."""
        self.stored += new
        self._biases.clear()

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, form: Form
    ) -> Tensor:
        if self.keep:
            if self.stored:
                key = torch.cat([self.own_key_RKSD[layer], key], 2)
                value = torch.cat([self.own_value_RKSD[layer], value], 2)
            self.own_key_RKSD[layer], self.own_value_RKSD[layer] = key, value
        rows, heads, new, width = query.shape
        groups, texts = key.shape[1], len(self.key_BKTD[layer])
        prefix_bias, own_bias = self._bias(rule, query, heads // groups, texts)
        query_RKQD = query.reshape(rows, groups, -1, width)
        prefix_key = self.key_BKTD[layer][:, :, : self.shown]
        prefix_value = self.value_BKTD[layer][:, :, : self.shown]
        if query.device.type == "cpu" and form.plain and key.shape == value.shape:
            out = _TwoPart.apply(
                query_RKQD, prefix_key, prefix_value, key, value, prefix_bias, own_bias, form.scale
            )
            return out.reshape(rows, heads, new, -1)
        by_text = query_RKQD.reshape(texts, -1, groups, query_RKQD.shape[2], width).transpose(1, 2)
        parts = [
            (by_text.reshape(texts, groups, -1, width), prefix_key, prefix_value, prefix_bias),
            (query_RKQD, key, value, own_bias),
        ]
        prefix_out, own_out = _joint(parts, form, new)
        prefix_out = prefix_out.view(texts, groups, rows // texts, -1, prefix_out.shape[-1])
        out = own_out + prefix_out.transpose(1, 2).reshape(own_out.shape)
        return out.reshape(rows, heads, new, -1)

    def _bias(self, rule: Rule, query: Tensor, per_group: int, texts: int) -> tuple[Tensor, Tensor]:
        """Return the additive masks for the text and for the own thought.

        Their shapes are [1 or B, 1, NJQ, P] and [1 or R, 1, Q, S].
        """
        if rule not in self._biases:
            new = query.shape[2]
            new_U = torch.arange(self.stored, self.stored + new, device=query.device)
            own_S = torch.arange(self.stored + new, device=query.device)
            text_P = torch.arange(self.shown, device=query.device)
            at_BJ1 = self.position_BJ[:, :, None]
            at_BJU = at_BJ1 + 1 + new_U
            seen_BJUP = _seen(rule, at_BJU[..., None], text_P) & (text_P <= at_BJ1[..., None])
            if self.real_BT is not None:
                seen_BJUP = seen_BJUP & self.real_BT[:, None, None, : self.shown]
            count, positions = seen_BJUP.shape[:2]
            shape = (count, self.thoughts, positions, per_group, new, self.shown)
            seen = seen_BJUP[:, None, :, None].expand(shape).reshape(count, 1, -1, self.shown)
            own_BJUS = _seen(rule, at_BJU[..., None], at_BJ1[..., None] + 1 + own_S)
            if bool((own_BJUS == own_BJUS[:1, :1]).all()):
                own = own_BJUS[0, :1, None]
            else:
                own = own_BJUS[:, None, :, None].expand(texts, self.thoughts, -1, 1, -1, -1)
                own = own.reshape(-1, 1, new, len(own_S))
            own = own.expand(-1, per_group, -1, -1).reshape(len(own), 1, -1, len(own_S))
            self._biases[rule] = (
                (~seen).to(query.dtype) * HIDDEN,
                (~own).to(query.dtype) * HIDDEN,
            )
        return self._biases[rule]


def _joint(
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]], form: Form, new: int
) -> list[Tensor]:
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


class _TwoPart(torch.autograd.Function):
    """Attention over the text and the own thought with PyTorch's CPU flash attention kernel.

    The kernel returns the log-sum-exp of the scores, with which the outputs of the two parts are
    combined. The backward kernel recomputes the attention weights from the log-sum-exp. With the
    combined log-sum-exp and the combined output, it returns the exact gradients of each part.
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
    ) -> Tensor:
        texts = len(prefix_key)
        query_BKXD = _vectors_by_text(query_RKQD, texts)
        prefix_out, prefix_total = _flash(query_BKXD, prefix_key, prefix_value, prefix_bias, scale)
        own_out, own_total = _flash(query_RKQD, key, value, own_bias, scale)
        prefix_out = _vectors_by_row(prefix_out, query_RKQD)
        prefix_total = _by_row(prefix_total, own_total)
        share = torch.sigmoid(prefix_total - own_total)[..., None].to(own_out.dtype)
        out = torch.lerp(own_out, prefix_out, share)
        total = torch.logaddexp(prefix_total, own_total)
        ctx.save_for_backward(
            query_RKQD, prefix_key, prefix_value, key, value, prefix_bias, own_bias, out, total
        )
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        query, prefix_key, prefix_value, key, value, prefix_bias, own_bias, out, total = (
            ctx.saved_tensors
        )
        (grad,) = outputs
        grad, texts = grad.contiguous(), len(prefix_key)
        x_shape = torch.Size((texts, key.shape[1], query.shape[0] // texts * query.shape[2]))
        prefix_query, prefix_key_grad, prefix_value_grad = _flash_backward(
            _vectors_by_text(grad, texts), _vectors_by_text(query, texts), prefix_key, prefix_value, _vectors_by_text(out, texts),
            _by_text(total, x_shape), prefix_bias, ctx.scale,
        )  # fmt: skip
        query_grad, key_grad, value_grad = _flash_backward(
            grad, query, key, value, out, total, own_bias, ctx.scale
        )
        query_grad = query_grad + _vectors_by_row(prefix_query, query)
        return (
            query_grad, prefix_key_grad, prefix_value_grad, key_grad, value_grad, None, None, None
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


def _flash(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, attn_mask=bias, scale=scale
    )


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, total: Tensor,
    bias: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, total, 0.0, False, attn_mask=bias, scale=scale
    )

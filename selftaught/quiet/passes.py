"""The two forward passes that `quiet_attention` serves: reading a text, and thinking after positions.

A thought token at position j attends to the text up to j and to the earlier tokens of its own
thought, under one softmax. Its scores have two parts: all queries against the shared keys of the
text (one matrix product), and every thought against itself (small products). No mask of size
positions x positions is needed.

Shapes: B texts, T text tokens, R rows (one per text, thought and position), J positions per text,
U new tokens of a row, S tokens of a row so far, P text tokens that rows can attend to, H query
heads, K key-value heads, Q queries of a group, D head width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selftaught.quiet.attention import Rule
from selftaught.quiet.kernels import Form, TwoPart, joint
from selftaught.samplers.local.fused_attention import aligned, kernel_for

HIDDEN = -30000.0
"""Added to the scores of masked tokens. Finite, so that a query whose text is completely masked
does not give NaN."""


def seen_at(rule: Rule, query_position: Tensor, key_position: Tensor) -> Tensor:
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
    """Which tokens are text and not padding. None means that there is no padding before a text token."""
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
            shares = query.device.type == "cpu" or (causal and query.dtype.itemsize == 2)
            if heads != groups and not shares:
                # On a GPU, only the flash kernel takes grouped heads, and it takes no mask.
                key, value = (one.repeat_interleave(heads // groups, 1) for one in (key, value))
            return nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=None if causal else seen, is_causal=causal and new > 1,
                scale=form.scale, enable_gqa=True,
            )  # fmt: skip
        query_BKQD = query.reshape(rows, groups, -1, width)
        bias = (~seen).expand(-1, heads // groups, -1, -1).reshape(len(seen), 1, -1, stored)
        out = joint([(query_BKQD, key, value, bias.to(query.dtype) * HIDDEN)], form, new)
        return out[0].reshape(rows, heads, new, -1)

    def _seen_by(self, rule: Rule, new: int, stored: int, device: torch.device) -> Tensor:
        """Return which stored tokens each new token attends to: [1 or B, 1, new, stored]."""
        at_T = torch.arange(stored, device=device)
        seen = seen_at(rule, at_T[-new:, None], at_T[None])[None, None]
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
        kernel = kernel_for(query_RKQD, key, value) if form.plain else None
        if kernel is not None:
            out = TwoPart.apply(
                query_RKQD, prefix_key, prefix_value, key, value, prefix_bias, own_bias, form.scale, kernel
            )  # fmt: skip
            return out.reshape(rows, heads, new, -1)
        by_text = query_RKQD.reshape(texts, -1, groups, query_RKQD.shape[2], width).transpose(1, 2)
        parts = [
            (by_text.reshape(texts, groups, -1, width), prefix_key, prefix_value, prefix_bias),
            (query_RKQD, key, value, own_bias),
        ]
        prefix_out, own_out = joint(parts, form, new)
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
            seen_BJUP = seen_at(rule, at_BJU[..., None], text_P) & (text_P <= at_BJ1[..., None])
            if self.real_BT is not None:
                seen_BJUP = seen_BJUP & self.real_BT[:, None, None, : self.shown]
            count, positions = seen_BJUP.shape[:2]
            shape = (count, self.thoughts, positions, per_group, new, self.shown)
            seen = seen_BJUP[:, None, :, None].expand(shape).reshape(count, 1, -1, self.shown)
            own_BJUS = seen_at(rule, at_BJU[..., None], at_BJ1[..., None] + 1 + own_S)
            if bool((own_BJUS == own_BJUS[:1, :1]).all()):
                own = own_BJUS[0, :1, None]
            else:
                own = own_BJUS[:, None, :, None].expand(texts, self.thoughts, -1, 1, -1, -1)
                own = own.reshape(-1, 1, new, len(own_S))
            own = own.expand(-1, per_group, -1, -1).reshape(len(own), 1, -1, len(own_S))
            biases = ((~one).to(query.dtype) * HIDDEN for one in (seen, own))
            if query.device.type != "cpu":  # once for all layers
                biases = map(aligned, biases)
            prefix_bias, own_bias = biases
            self._biases[rule] = (prefix_bias, own_bias)
        return self._biases[rule]

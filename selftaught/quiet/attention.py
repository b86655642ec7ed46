"""Attention for thoughts at many positions of a text at the same time.

The code of the model runs unchanged. This attention is registered with transformers'
`AttentionInterface`, and the mask with its `AttentionMaskInterface`, which passes the model's own
mask rule of each layer (causal, sliding window, chunked). Instead of a mask tensor, the layers get
a *pass* object that does the computation: `passes.Reading` for the text, `passes.Thinking` for
thoughts.

Shapes: B texts, T tokens, H query heads, K key-value heads, D head width.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from selftaught.quiet.kernels import Form

ATTENTION = "quiet_thoughts"

WITHOUT_EFFECT = ("position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k")
"""Tensors that layers pass to their attention and that can be ignored here."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Mask rule of a layer: (batch, head, query position, key position) -> whether the query sees the
key."""


class Pass(Protocol):
    """Computes the attention of one forward pass of the model; see `under`."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule, form: Form
    ) -> Tensor: ...


def quiet_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKTD: Tensor,
    value_BKTD: Tensor,
    attention_mask: "Seen",
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention function of every layer, as transformers' `AttentionInterface` calls it.

    The pass in `attention_mask` does the computation.

    Args:
        module: the layer's attention module.
        query_BHTD: queries.
        key_BKTD: keys.
        value_BKTD: values.
        attention_mask: mask rule and pass.
        scaling: factor of the scores. None means the inverse square root of the head width.
        options: `softcap` and `s_aux` (attention sinks) are applied; see `Form`. `dropout` is
            ignored.

    Returns:
        The output, `[B, T, H, D]`, and None instead of attention weights.

    Raises:
        TypeError: the layer passes a tensor that this attention does not support, such as a
            position bias.
    """
    softcap, sink_H = options.pop("softcap", None), options.pop("s_aux", None)
    for name, given in options.items():
        if isinstance(given, Tensor) and name not in WITHOUT_EFFECT:
            raise TypeError(f"its attention uses {name!r}, which thoughts do not have")
    quiet_pass, rule = attention_mask.quiet_pass, attention_mask.rule
    layer = module.layer_idx
    assert isinstance(layer, int)
    scale = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    form = Form(scale, softcap, sink_H)
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


def current_pass() -> Pass | None:
    """Return the pass that forward passes of the model use now. None outside of `under`."""
    return _CURRENT.get(None)


AttentionInterface.register(ATTENTION, quiet_attention)
AttentionMaskInterface.register(ATTENTION, _seen_by_rule)  # type: ignore[arg-type]


@contextmanager
def thoughtful(model: PreTrainedModel) -> Iterator[None]:
    """Context manager: the model uses `quiet_attention` instead of its own attention.

    It may be nested.
    """
    own = model.config._attn_implementation or "eager"
    if own == ATTENTION:  # already inside; setting it visits all layers
        yield
        return
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def checkpoint_contexts(base: PreTrainedModel) -> tuple[AbstractContextManager[None], ...]:
    """Return the contexts of a checkpointed layer: of its forward pass and of its recomputation."""
    return nullcontext(), thoughtful(base)

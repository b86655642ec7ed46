"""How many positions may think at the same time within a number of bytes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from selftaught.quiet.attention import Gradients
from selftaught.quiet.thoughts import Prefix, decoder, output_matrix


def bytes_per_row(base: PreTrainedModel, tokens: int, predicted: int) -> int:
    """About what one thought keeps for its gradient.

    What goes into and comes out of every linear layer, for each of its tokens; and three times the
    float32 logits of those from which something is predicted.
    """
    width = sum(
        module.weight.shape[0] + module.weight.shape[1]
        for module in decoder(base).modules()
        if isinstance(module, nn.Linear | Conv1D)
    )
    size = base.dtype.itemsize
    if base.is_gradient_checkpointing:
        layers = base.config.get_text_config().num_hidden_layers
        width = width // layers + layers * output_matrix(base).weight.shape[1]
    return tokens * width * size + predicted * output_matrix(base).weight.shape[0] * 3 * 4


def positions_within(budget: int, rows_per_position: int, row: int) -> int:
    """How many positions fit.

    Raises:
        ValueError: not even one; says how much it needs.
    """
    fit = budget // (rows_per_position * row)
    if fit < 1:
        needed = -(-rows_per_position * row // 2**20)
        raise ValueError(
            f"chunk_megabytes={budget // 2**20} is too little for one position; the smallest that "
            f"works here is {needed}. Or take shorter or fewer thoughts, or fewer texts at a time."
        )
    return fit


Learn = Callable[[slice, Prefix, Tensor], Tensor]


def in_chunks(
    learn: Learn,
    chunks: Sequence[slice],
    prefix: Prefix,
    without_BT: Tensor,
    gradients: Gradients | None,
    parameters: list[nn.Parameter],
) -> Tensor:
    """The sum of all chunks' losses; each chunk's graph is gone before the next one's begins."""
    if gradients is None:
        return torch.stack([learn(chunk, prefix, without_BT) for chunk in chunks]).sum()
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    loss = Chunks.apply(learn, chunks, prefix, gradients, prefix.hidden_BTD, without_BT, *learning)
    assert isinstance(loss, Tensor)
    return loss


class Chunks(torch.autograd.Function):
    """Forwards, also computes the gradients, chunk by chunk; backwards, only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        learn: Learn,
        chunks: Sequence[slice],
        prefix: Prefix,
        gradients: Gradients,
        hidden_BTD: Tensor,
        without_BT: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_()

        hidden, without = leaf(hidden_BTD), leaf(without_BT)
        keys, values = list(map(leaf, prefix.key_BKTD)), list(map(leaf, prefix.value_BKTD))
        seen = Prefix(prefix.ids_BT, hidden, keys, values, prefix.position_BT, prefix.real_BT)
        inputs = [hidden, without, *keys, *values, *parameters]
        sums: list[Tensor | None] = [None] * len(inputs)
        ours = [False] * len(inputs)
        total = without_BT.new_zeros(())
        for chunk in chunks:
            with torch.enable_grad():
                loss = learn(chunk, seen, without)
                got = torch.autograd.grad(loss, inputs, allow_unused=True)
            total += loss.detach()
            # A first gradient may share memory with others; a sum is ours.
            for at, new in enumerate(got):
                old = sums[at]
                if old is None or new is None:
                    sums[at] = old if new is None else new
                else:
                    sums[at] = torch.add(old, new, out=old if ours[at] else None)
                    ours[at] = True
            del loss, got, old, new  # or they would live through the next chunk
        layers = len(keys)
        gradients.key_BKTD = sums[2 : 2 + layers]
        gradients.value_BKTD = sums[2 + layers : 2 + 2 * layers]
        ctx.gradients = gradients
        ctx.sums = [*sums[:2], *sums[2 + 2 * layers :]]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        ctx.gradients.scale = scale
        scaled = [None if one is None else one * scale for one in ctx.sums]
        return (None, None, None, None, *scaled)

"""Chunks of positions: their size for a memory limit, and the loss summed over them.

Each chunk's gradients are computed in the forward pass, so that only one chunk's autograd graph is
in memory at a time.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.passes import Gradients
from selftaught.quiet.thoughts import Prefix, decoder, output_matrix

CPU_MEGABYTES, DEVICE_MEGABYTES = 128, 1024
"""Default memory for one chunk of positions in MiB, on a CPU and on other devices."""


def bytes_per_row(base: PreTrainedModel, tokens: int, predicted: int) -> int:
    """Estimate the activation memory in bytes that one thought needs for its gradient.

    Counts the inputs and outputs of every linear layer for each token, and three times the float32
    logits of the tokens from which something is predicted.

    Args:
        base: the base model.
        tokens: number of tokens of a thought, with the start token, end token and lookahead.
        predicted: number of tokens whose logits are computed.
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
    """Return the number of positions that fit into a memory limit.

    Args:
        budget: memory limit in bytes.
        rows_per_position: number of thoughts per position, over all texts of the batch.
        row: memory of one thought in bytes; see `bytes_per_row`.

    Raises:
        ValueError: one position does not fit. The message names the memory that it needs.
    """
    fit = budget // (rows_per_position * row)
    if fit < 1:
        needed = -(-rows_per_position * row // 2**20)
        raise ValueError(
            f"chunk_megabytes={budget // 2**20} is too small for one position; the smallest value "
            f"that works here is {needed}. Increase it, or reduce thought_tokens, thoughts or the "
            "batch size."
        )
    return fit


def bytes_per_thought(base: PreTrainedModel, config: QuietConfig) -> int:
    """Estimate the activation memory in bytes that a thought of these options needs."""
    tokens = config.thought_tokens + 1 + config.lookahead
    # About half of the thoughts have a positive advantage. If only these are used, the logits of
    # the others are not computed.
    scored = (
        config.thought_tokens if config.advantages == "both" else (config.thought_tokens + 1) // 2
    )
    # The divergence needs two distributions, their logits and what is multiplied.
    compared = 2 * config.thought_tokens if config.thought_kl_weight > 0 else 0
    predicted = config.lookahead + scored + compared
    return bytes_per_row(base, tokens, predicted)


def positions_per_chunk(base: PreTrainedModel, config: QuietConfig, texts: int) -> int:
    """Return the number of positions that are processed at the same time.

    Args:
        base: the base model.
        config: options of Quiet-STaR. `positions_per_chunk` takes precedence over
            `chunk_megabytes`.
        texts: number of texts of the batch.

    Raises:
        ValueError: one position does not fit into `chunk_megabytes`.
    """
    if config.positions_per_chunk is not None:
        return config.positions_per_chunk
    row, rows = bytes_per_thought(base, config), texts * config.thoughts
    if config.chunk_megabytes is not None:
        return positions_within(config.chunk_megabytes * 2**20, rows, row)
    default = CPU_MEGABYTES if base.device.type == "cpu" else DEVICE_MEGABYTES
    return max(1, default * 2**20 // (rows * row))


def even_chunks(positions: int, size: int) -> list[slice]:
    """Return chunks of nearly equal size, at most `size` positions each.

    A small last chunk would take almost as long as a full one.
    """
    count = -(-positions // size)
    edges = [positions * number // count for number in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


Learn = Callable[[slice, Prefix, Tensor], Tensor]
"""Loss of a chunk: (positions, text, log-probabilities without thoughts `[B, T]`) -> scalar."""


def in_chunks(
    learn: Learn,
    chunks: Sequence[slice],
    prefix: Prefix,
    without_BT: Tensor,
    gradients: Gradients | None,
    parameters: list[nn.Parameter],
) -> Tensor:
    """Return the sum of the losses of all chunks.

    The autograd graph of a chunk is freed before the next chunk is computed.

    Args:
        learn: computes the loss of a chunk.
        chunks: the positions of each chunk.
        prefix: the text.
        without_BT: log-probabilities without thoughts.
        gradients: receives the gradients for the keys and values of the text. None means no gradients
            are needed, and the losses are only summed.
        parameters: parameters that may get a gradient.
    """
    if gradients is None:
        return torch.stack([learn(chunk, prefix, without_BT) for chunk in chunks]).sum()
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    loss = Chunks.apply(learn, chunks, prefix, gradients, prefix.hidden_BTD, without_BT, *learning)
    assert isinstance(loss, Tensor)
    return loss


class Chunks(torch.autograd.Function):
    """Computes the loss and its gradients chunk by chunk in forward; backward only scales them."""

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
        is_sum = [False] * len(inputs)
        total = without_BT.new_zeros(())
        for chunk in chunks:
            with torch.enable_grad():
                loss = learn(chunk, seen, without)
                got = torch.autograd.grad(loss, inputs, allow_unused=True)
            total += loss.detach()
            # `grad` may return a tensor that shares memory with others, so the first gradient must
            # not be changed in place. A sum is a new tensor and may be.
            for at, new in enumerate(got):
                old = sums[at]
                if old is None or new is None:
                    sums[at] = old if new is None else new
                else:
                    sums[at] = torch.add(old, new, out=old if is_sum[at] else None)
                    is_sum[at] = True
            del loss, got, old, new  # otherwise they stay in memory during the next chunk
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

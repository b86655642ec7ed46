"""How many positions may think at the same time within a number of bytes."""

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from selftaught.quiet.thoughts import decoder, output_matrix


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

"""How far to trust a thought (the mixing head), and whether to have one (the gate).

Shapes: D hidden width; `...` any leading dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn


class MixingHead(nn.Module):
    """From the hidden states without and with a thought to the weight of the thought.

    Three linear layers with ReLU between them (Section 4.4 of Zelikman et al. 2024,
    arXiv:2403.09629). The last one starts at zero, so that training starts at "no thought". The
    weight multiplies the prediction *with* the thought, as in the authors' code; Algorithm 1 writes
    it for the prediction without.

    Args:
        bounded: the weight is cut off at 0 and 1; otherwise, as in the authors' code, it may be
            anything, below 0 too.
    """

    def __init__(self, width: int, *, bounded: bool = False) -> None:
        super().__init__()
        self.bounded = bounded
        self.layers = nn.Sequential(
            nn.Linear(2 * width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 1, bias=False),
        )
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]

    def forward(self, without_D: Tensor, with_D: Tensor) -> Tensor:
        """The weight of the thought, one number for each pair of states: `[...]`."""
        weight = self.layers(torch.cat([without_D, with_D], -1))[..., 0]
        return bounded(weight) if self.bounded else weight


def bounded(weight: Tensor) -> Tensor:
    """Cut off at 0 and 1, with gradients from outside where they lead back in.

    So a weight can start at 0, and one that fell below comes back where thoughts begin to help; behind
    a sigmoid it can do neither.
    """
    found = _Bounded.apply(weight)
    assert isinstance(found, Tensor)
    return found


class _Bounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return weight.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        inward = ((weight >= 0) | (gradient < 0)) & ((weight <= 1) | (gradient > 0))
        return gradient * inward


class Gate(nn.Module):
    """From the hidden state before a thought to what the thought will gain, in nats of the next token.

    The mixing head knows its weight only after the thought; this knows before (ours: the paper leaves
    it as future work). It learns by regression on the gains seen in training and starts at none.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, hidden_D: Tensor) -> Tensor:
        """The expected gain: `[...]`."""
        return self.layers(hidden_D)[..., 0]

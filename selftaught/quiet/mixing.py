"""The mixing head, which weights a thought, and the gate, which predicts its gain.

Shapes: D hidden width; `...` any leading dimensions.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class MixingHead(nn.Module):
    """Mixing head: maps the hidden states without and with a thought to the weight of the thought.

    Three linear layers with ReLU between them (Section 4.4 of Zelikman et al. 2024,
    arXiv:2403.09629). The last layer is initialized to zero, so that training starts with weight 0.
    The weight multiplies the prediction *with* the thought, as in the authors' code; in Algorithm 1
    it multiplies the prediction without.

    Args:
        width: size of the hidden states.
        bounded: clip the weight to 0 to 1. Otherwise it may be any number, as in the authors' code.
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
        """Return the weight of the thought for each pair of hidden states.

        Args:
            without_D: hidden states without a thought, `[..., D]`.
            with_D: hidden states after the thought, `[..., D]`.

        Returns:
            Weights, `[...]`.
        """
        weight = self.layers(torch.cat([without_D, with_D], -1))[..., 0]
        return bounded(weight) if self.bounded else weight


class WholeThought(MixingHead):
    """Replaces the mixing head if `mix="none"`: the weight of every thought is 1.

    It has no parameters.
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, without_D: Tensor, with_D: Tensor) -> Tensor:
        """Return weights of 1, `[...]`, for hidden states `[..., D]`."""
        return with_D.new_ones(with_D.shape[:-1])


def bounded(weight: Tensor) -> Tensor:
    """Clip a weight to 0 to 1, and pass gradients that move a clipped weight back into that range.

    With this, a weight can start at exactly 0, and a weight below 0 can recover when thoughts begin
    to help. A sigmoid allows neither.
    """
    clipped = _Bounded.apply(weight)
    assert isinstance(clipped, Tensor)
    return clipped


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
    """Gate: predicts the gain of a thought for the next token in nats, before the thought.

    The input is the hidden state before the thought; the mixing head needs the thought itself. The
    paper leaves this as future work. The gate is trained by regression on the gains observed
    in training. Its last layer is initialized to zero.

    Args:
        width: size of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, hidden_D: Tensor) -> Tensor:
        """Return the predicted gain in nats, `[...]`, for hidden states `[..., D]`."""
        return self.layers(hidden_D)[..., 0]


def check_mixing_head(mix: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    """Check that loaded weights have a mixing head if the configuration has one, and only then.

    Args:
        mix: `mix` of the configuration.
        missing: names of the weights that the files do not have.
        unexpected: names of the weights that the model does not have.

    Raises:
        ValueError: this is not the case.
    """
    missing, head = list(missing), "quiet.mixing."
    # Without any weight of Quiet-STaR, the files are those of a base model.
    if missing and all(name.startswith(head) for name in missing):
        raise ValueError(
            f"The configuration has mix={mix!r}, which needs a mixing head, but the weights have "
            "none: this model was trained with mix='none', as RLP is. Take config.json and the "
            "weights from the same training."
        )
    if mix == "none" and any(name.startswith(head) for name in unexpected):
        raise ValueError(
            "The configuration has mix='none' (no mixing head, as in RLP), but the weights have a "
            "mixing head: this model mixes its predictions with it. Take config.json and the weights "
            "from the same training."
        )

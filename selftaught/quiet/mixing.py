"""How far to trust a thought (the mixing head), and whether to have one (the gate).

Shapes: D hidden width; `...` any leading dimensions.
"""

import torch
from torch import Tensor, nn

STARTING_LOGIT = -3.0
"""Where a bounded weight starts: a sigmoid of 0.05, nearly no thought, and not too flat to learn."""


class MixingHead(nn.Module):
    """From the hidden states without and with a thought to the weight of the thought.

    Three linear layers with ReLU between them (Section 4.4 of Zelikman et al. 2024,
    arXiv:2403.09629). The last one starts at zero, so that training starts at "no thought". The
    weight multiplies the prediction *with* the thought, as in the authors' code; Algorithm 1 writes
    it for the prediction without.

    Args:
        bounded: the weight stays between 0 and 1, through a sigmoid, and starts at 0.05; otherwise,
            as in the authors' code, it starts at 0 and may be anything, below 0 too.
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
        return torch.sigmoid(weight + STARTING_LOGIT) if self.bounded else weight


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

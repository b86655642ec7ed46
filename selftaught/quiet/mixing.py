"""How far to trust the thought: the mixing head.

Shapes: D hidden width; `...` any leading dimensions.
"""

import torch
from torch import Tensor, nn


class MixingHead(nn.Module):
    """From the hidden states without and with a thought to the weight of the thought.

    Three linear layers with ReLU between them (Section 4.4 of Zelikman et al. 2024,
    arXiv:2403.09629). The last one starts at zero, so that training starts at "no thought". The
    weight multiplies the prediction *with* the thought, as in the authors' code; Algorithm 1 writes
    it for the prediction without. It is not bounded, as in their code.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
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
        return self.layers(torch.cat([without_D, with_D], -1))[..., 0]

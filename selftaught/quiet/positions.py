"""Which positions of a text think, so that the loss stays the same on average.

Shapes: B texts, T text positions, J chosen positions of a text.
"""

import torch
from torch import Tensor


def choose(weight_BT: Tensor, count: int, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Some positions of each text, in order, and by how much each stands for others: two `[B, J]`.

    Position t is among the `count` chosen with probability pi_t in proportion to its weight, at
    most 1, and stands for 1 / pi_t positions (Horvitz and Thompson 1952), so a sum over positions
    keeps its mean. The draw is systematic: marks one apart, moved by one uniform number, on the
    running sum of the probabilities; so neighbours are rarely chosen together. Where a text has
    fewer positions of positive weight, the rest stand for none (0).
    """
    chance_BT = _chances(weight_BT.double(), count)
    sums_BT = chance_BT.cumsum(1)
    mark_J = torch.arange(count, device=weight_BT.device, dtype=torch.double)
    mark_BJ = mark_J + uniform_B[:, None].double()
    found_BJ = torch.searchsorted(sums_BT, mark_BJ, right=True)
    position_BJ = found_BJ.clamp(max=weight_BT.shape[1] - 1)
    factor_BJ = (found_BJ == position_BJ) / chance_BT.gather(1, position_BJ).clamp(min=1e-12)
    return position_BJ, factor_BJ.to(torch.get_default_dtype())


def _chances(weight_BT: Tensor, count: int) -> Tensor:
    """Proportional to the weights, at most 1 each, adding up to `count` where enough are positive."""
    sure_BT = torch.zeros_like(weight_BT, dtype=torch.bool)
    while True:
        left_B1 = count - sure_BT.sum(1, keepdim=True)
        free_BT = weight_BT.masked_fill(sure_BT, 0)
        chance_BT = left_B1 * free_BT / free_BT.sum(1, keepdim=True).clamp(min=1e-30)
        over_BT = (chance_BT >= 1) & ~sure_BT
        if not bool(over_BT.any()):
            return chance_BT.masked_fill(sure_BT, 1)
        sure_BT = sure_BT | over_BT

"""Sampling of the positions that think, with weights that keep the loss unbiased.

Shapes: B texts, T text positions, J sampled positions of a text.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from selftaught.quiet.config import QuietConfig


@dataclass(frozen=True)
class Positions:
    """Positions that think, and their weights in the loss."""

    position_BJ: Tensor
    """Positions. B is 1 if they are the same for all texts."""
    factor_BJ: Tensor
    """Inverse sampling probabilities."""

    def part(self, chunk: slice) -> "Positions":
        """Return the positions of a chunk, numbered in ascending order of positions."""
        return Positions(self.position_BJ[:, chunk], self.factor_BJ[:, chunk])


def thinking_positions(config: QuietConfig, length: int) -> int:
    """Return the number of positions of a text that think in training (J).

    The last token is not one, because nothing follows it.

    Args:
        config: options of Quiet-STaR.
        length: number of tokens of the text.
    """
    if config.positions == "all":
        return length - 1
    return max(1, round(config.positions_share * (length - 1)))


def choose(weight_BT: Tensor, count: int, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sample positions of each text without replacement, with inverse-probability weights.

    Position t is sampled with the inclusion probability pi_t, proportional to its weight and at
    most 1. Its factor is 1 / pi_t (Horvitz and Thompson 1952), so that a weighted sum over the
    sampled positions has the same expectation as the sum over all. Sampling is systematic: equally spaced
    points with distance 1 and one uniform random offset, on the cumulative sum of the
    probabilities. Adjacent positions are therefore rarely sampled together.

    Args:
        weight_BT: nonnegative weights of the positions.
        count: number of positions to sample per text (J).
        uniform_B: one uniform random number per text.

    Returns:
        Positions in ascending order, and their factors, both `[B, J]`. If a text has fewer than
        `count` positions with a positive weight, the factors of the others are 0.
    """
    chance_BT = _chances(weight_BT.double(), count)
    sums_BT = chance_BT.cumsum(1)
    point_J = torch.arange(count, device=weight_BT.device, dtype=torch.double)
    point_BJ = point_J + uniform_B[:, None].double()
    found_BJ = torch.searchsorted(sums_BT, point_BJ, right=True)
    position_BJ = found_BJ.clamp(max=weight_BT.shape[1] - 1)
    factor_BJ = (found_BJ == position_BJ) / chance_BT.gather(1, position_BJ).clamp(min=1e-12)
    return position_BJ, factor_BJ.to(torch.get_default_dtype())


def _chances(weight_BT: Tensor, count: int) -> Tensor:
    """Return inclusion probabilities `[B, T]`, proportional to the weights and at most 1.

    They sum to `count` if a text has enough positions with a positive weight.
    """
    sure_BT = torch.zeros_like(weight_BT, dtype=torch.bool)
    while True:
        left_B1 = count - sure_BT.sum(1, keepdim=True)
        free_BT = weight_BT.masked_fill(sure_BT, 0)
        chance_BT = left_B1 * free_BT / free_BT.sum(1, keepdim=True).clamp(min=1e-30)
        over_BT = (chance_BT >= 1) & ~sure_BT
        if not bool(over_BT.any()):
            return chance_BT.masked_fill(sure_BT, 1)
        sure_BT = sure_BT | over_BT

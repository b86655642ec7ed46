"""The positions that think, with their weights in the loss.

Shapes: B texts, T text positions, J positions of a text.
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
    """Inverse sampling probabilities; 0 for positions that fill up a text with fewer of them."""

    def part(self, chunk: slice) -> "Positions":
        """Return the positions of a chunk, numbered in ascending order of positions."""
        return Positions(self.position_BJ[:, chunk], self.factor_BJ[:, chunk])

    def mean_of(self, value_BNJS: Tensor) -> Tensor | None:
        """Return the mean of values over the positions with a weight. None if there are none."""
        used_BNJ = (self.factor_BJ > 0)[:, None].expand(value_BNJS.shape[:3])
        used = value_BNJS[used_BNJ]
        return used.mean() if used.numel() else None


def thinking_positions(config: QuietConfig, length: int) -> int:
    """Return the number of positions of a text that think in training (J).

    The last token is not one, because nothing follows it.

    Args:
        config: options of Quiet-STaR.
        length: number of tokens of the text.
    """
    if config.positions not in ("uniform", "entropy"):  # of a pattern at most all
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


def given_positions(think_BT: Tensor) -> Positions:
    """Return the positions of a mask, each with the weight 1.

    A text with fewer of them than another repeats its last one with the weight 0. Without any
    position in the batch, there is one per text with the weight 0.

    Args:
        think_BT: which positions think.
    """
    count_B1 = think_BT.sum(1, keepdim=True)
    number_1J = torch.arange(max(1, int(count_B1.max())), device=think_BT.device)[None]
    # In a stable descending order, the positions of the mask come first, in ascending order.
    order_BT = think_BT.int().sort(dim=1, descending=True, stable=True).indices
    position_BJ = order_BT.gather(1, torch.minimum(number_1J, (count_B1 - 1).clamp(min=0)))
    factor_BJ = (number_1J < count_B1).to(torch.get_default_dtype())
    return Positions(position_BJ, factor_BJ)


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

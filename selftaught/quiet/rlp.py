"""The policy update of RLP: Hatamizadeh et al. 2025 (arXiv:2510.01265), Algorithm 1.

Shapes: B texts, N thoughts per position (G in the paper), J positions, R thoughts, S thought
tokens.
"""

import torch
from torch import Tensor


def group_advantages(reward_BNJ: Tensor) -> Tensor:
    """Return the advantage of each thought over the mean of its position, `[B, N, J]` (Eq. 7).

    A_i = G / (G - 1) * (r_i - mean_j r_j). This equals r_i minus the mean over the *other* thoughts:
    the factor corrects for the mean containing r_i itself.

    Args:
        reward_BNJ: rewards of at least two thoughts per position.
    """
    thoughts = reward_BNJ.shape[1]
    return thoughts / (thoughts - 1) * (reward_BNJ - reward_BNJ.mean(1, keepdim=True))


def clipped_ratios(
    log_prob_RS: Tensor, old_log_prob_RS: Tensor, advantage_R: Tensor, low: float, high: float
) -> Tensor:
    """Return the factors of the advantages in the clipped objective, `[R, S]` (Eq. 8).

    With rho = exp(log_prob - old_log_prob), min(rho A, clip(rho, 1 - low, 1 + high) A) is A times
    min(rho, 1 + high) for A >= 0, and A times max(rho, 1 - low) for A < 0. The gradient of a
    clipped ratio is 0. At rho = 1 the gradient is that of `log_prob`.

    Args:
        log_prob_RS: log-probabilities of the thought tokens under the current weights.
        old_log_prob_RS: log-probabilities under the weights that sampled the thoughts.
        advantage_R: advantages. Only their signs are used.
        low: lower clipping range (epsilon_l).
        high: upper clipping range (epsilon_h).
    """
    ratio_RS = (log_prob_RS - old_log_prob_RS.detach()).exp()
    upper_RS, lower_RS = ratio_RS.clamp(max=1 + high), ratio_RS.clamp(min=1 - low)
    return torch.where(advantage_R[:, None] >= 0, upper_RS, lower_RS)

"""The output of `QuietLM.forward`, gathered from the chunks of positions.

Shapes: B texts, T text tokens, N thoughts per position, J positions, S thought tokens, K lookahead
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from selftaught.quiet.positions import Positions


@dataclass
class QuietOutput(ModelOutput):
    """Loss, metrics in nats per token, and values at every position. Only the loss has a
    gradient."""

    loss: Tensor | None = None
    """Total loss."""
    nll_without: Tensor | None = None
    """Mean negative log-likelihood of the next token without thoughts."""
    nll_with_K: Tensor | None = None
    """Mean negative log-likelihood of each lookahead token with thoughts."""
    reinforce: Tensor | None = None
    """REINFORCE loss, before its weight."""
    reward: Tensor | None = None
    """Mean gain of a thought over no thought, summed over its lookahead."""
    weight: Tensor | None = None
    """Mean mixing weight of thoughts."""
    log_prob_without_BT: Tensor | None = None
    """Log-probability of each next token without thoughts."""
    positive: Tensor | None = None
    """Share of thoughts with a positive advantage."""
    withheld: Tensor | None = None
    """Share of thoughts whose positive advantage became 0, because a check flags them. None without
    checks."""
    entropy: Tensor | None = None
    """Mean negative log-probability of the sampled thought tokens, an estimate of their entropy."""
    length: Tensor | None = None
    """Mean number of sampled tokens per thought. None if all thoughts have the same length."""
    thought_kl: Tensor | None = None
    """Mean KL divergence of the distribution of thought tokens from the reference, in nats per
    token. None without a reference; so is the next field."""
    thought_base_nll: Tensor | None = None
    """Mean negative log-probability of thought tokens under the reference, in nats per token."""
    position_BJ: Tensor | None = None
    """Positions that think, in ascending order. The following fields are for these positions."""
    factor_BJ: Tensor | None = None
    """Weight of each position in the loss; 0 for those that fill up a text with fewer of them."""
    log_prob_with_BNJK: Tensor | None = None
    """Log-probability of each true token with each thought."""
    weight_BNJK: Tensor | None = None
    """Mixing weight of each thought at each true token."""
    thought_BNJS: Tensor | None = None
    """Token ids of the thoughts. After a sampled end token, they are the end token."""


@dataclass(frozen=True)
class Learned:
    """Contributions of a chunk of positions to the loss and metrics, and the values at them.

    The fields are those of `QuietOutput` for the chunk; sums are already divided by the counts of
    the whole batch.
    """

    loss: Tensor
    nll_K: Tensor
    reinforce: Tensor
    reward: Tensor
    positive: Tensor
    weight: Tensor
    log_prob_BNJK: Tensor
    weight_BNJK: Tensor
    withheld: Tensor | None = None
    thought_kl: Tensor | None = None
    thought_base_nll: Tensor | None = None


@dataclass(frozen=True)
class Means:
    """Values of a whole batch that are not sums over chunks."""

    loss: Tensor
    nll_without: Tensor
    entropy: Tensor | None
    length: Tensor | None = None


def gathered(
    parts: Sequence[Learned],
    means: Means,
    without_BT: Tensor,
    chosen: Positions,
    thought_BNJS: Tensor,
) -> QuietOutput:
    """Return the output of a forward pass.

    Args:
        parts: the chunks, in ascending order of positions.
        means: loss, mean loss of the next token without thoughts, and entropy and length of the
            thoughts.
        without_BT: log-probability of each next token without thoughts.
        chosen: positions that think.
        thought_BNJS: token ids of the thoughts.
    """
    withheld = [part.withheld for part in parts if part.withheld is not None]
    return QuietOutput(
        loss=means.loss,
        nll_without=means.nll_without.detach(),
        nll_with_K=torch.stack([part.nll_K for part in parts]).sum(0),
        reinforce=torch.stack([part.reinforce for part in parts]).sum(),
        reward=torch.stack([part.reward for part in parts]).sum(),
        weight=torch.stack([part.weight for part in parts]).sum(),
        log_prob_without_BT=without_BT.detach(),
        positive=torch.stack([part.positive for part in parts]).sum(),
        withheld=torch.stack(withheld).sum() if withheld else None,
        entropy=means.entropy,
        length=means.length,
        thought_kl=_sum_of([part.thought_kl for part in parts]),
        thought_base_nll=_sum_of([part.thought_base_nll for part in parts]),
        position_BJ=chosen.position_BJ,
        factor_BJ=chosen.factor_BJ,
        log_prob_with_BNJK=torch.cat([part.log_prob_BNJK for part in parts], 2),
        weight_BNJK=torch.cat([part.weight_BNJK for part in parts], 2),
        thought_BNJS=thought_BNJS,
    )


def _sum_of(values: Sequence[Tensor | None]) -> Tensor | None:
    """Return the sum over chunks, or None if the chunks do not have the value."""
    known = [one for one in values if one is not None]
    return torch.stack(known).sum() if known else None

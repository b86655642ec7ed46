"""Losses of Quiet-STaR: mixed predictions of the next true tokens, and REINFORCE for thoughts.

Shapes: B texts, T text tokens, N thoughts per position, J positions, S thought tokens, K lookahead
tokens, D hidden width, V vocabulary, X any number of tokens.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

# torch does not annotate the parameters of `checkpoint`
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.mixing import MixingHead
from selftaught.quiet.rlp import clipped_ratios, group_advantages
from selftaught.quiet.targets import IGNORED
from selftaught.quiet.thought_ends import sampled_tokens
from selftaught.quiet.thoughts import Head, SpecialTokens


def log_probs(head: Head, hidden_XD: Tensor, target_X: Tensor) -> Tensor:
    """Return the log-probability of each target token in nats, `[X]`; 0 for ignored targets."""
    logits_XV = _precise(head(hidden_XD))
    return -cross_entropy(logits_XV, target_X, reduction="none", ignore_index=IGNORED)


def text_log_probs(head: Head, hidden_BTD: Tensor, target_BT: Tensor, tokens: int) -> Tensor:
    """Return `log_probs` of texts, `[B, T]`, computed in blocks of `tokens` tokens.

    The logits are not stored for the backward pass but recomputed (activation checkpointing).
    """
    hidden_XD, target_X = hidden_BTD.flatten(0, 1), target_BT.flatten()
    blocks = zip(torch.split(hidden_XD, tokens), torch.split(target_X, tokens), strict=True)
    parts: list[Tensor] = [
        checkpoint(log_probs, head, hidden, target, use_reentrant=False)
        for hidden, target in blocks
    ]
    return torch.cat(parts).view(target_BT.shape)


@torch.no_grad()
def text_entropy(head: Head, hidden_BTD: Tensor, tokens: int) -> Tensor:
    """Return the entropy of the next token in nats, `[B, T]`.

    It is computed in blocks of `tokens` tokens.
    """
    parts: list[Tensor] = []
    for hidden in torch.split(hidden_BTD.flatten(0, 1), tokens):
        log_p_XV = _precise(head(hidden)).log_softmax(-1)
        parts.append(-(log_p_XV.exp() * log_p_XV).sum(-1))
    return torch.cat(parts).view(hidden_BTD.shape[:2])


def _precise(logits: Tensor) -> Tensor:
    """Convert 16-bit types to float32: log-sum-exp over a vocabulary of 49,000 tokens needs it."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def thought_log_probs(
    head: Head,
    hidden_RSD: Tensor,
    thought_RS: Tensor,
    marks: SpecialTokens,
    temperature: float,
) -> Tensor:
    """Return the log-probability of each thought token at a temperature, `[R, S]`.

    The authors use temperature 3 here, independent of the sampling temperature of the thoughts.

    Args:
        head: maps hidden states to logits.
        hidden_RSD: hidden states that predict the thought tokens (R thoughts).
        thought_RS: ids of the thought tokens.
        marks: the special tokens. The probability of tokens that cannot be sampled is 0.
        temperature: temperature of the log-probabilities.
    """
    logits_RSV = _precise(head(hidden_RSD)) / temperature
    banned_V = logits_RSV.new_zeros(logits_RSV.shape[-1])
    banned_V[marks.banned(1)] = -torch.inf
    scores_RSV = logits_RSV + banned_V
    if marks.may_end:  # but not with the first token
        scores_RSV[:, :1, marks.end] = -torch.inf
    total_RS = scores_RSV.logsumexp(-1)
    return logits_RSV.gather(-1, thought_RS[..., None])[..., 0] - total_RS


def thought_scores(head: Head, hidden_RSD: Tensor, marks: SpecialTokens) -> Tensor:
    """Return the logits of the tokens of thoughts, `[R, S, V]`; -inf for those never sampled.

    Args:
        head: maps hidden states to logits.
        hidden_RSD: hidden states that predict the thought tokens (R thoughts).
        marks: the special tokens.
    """
    logits_RSV = _precise(head(hidden_RSD))
    banned_SV = torch.zeros(logits_RSV.shape[1:], dtype=torch.bool, device=logits_RSV.device)
    for slot in range(len(banned_SV)):
        banned_SV[slot, marks.banned(slot)] = True
    return logits_RSV.masked_fill(banned_SV, -torch.inf)


def divergence(scores_XV: Tensor, log_q_XV: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of a distribution p from q in nats, `[...]`.

    KL(p, q) is the sum over the vocabulary of p (log p - log q). Tokens with a logit of -inf in
    `scores_XV` add nothing.

    Args:
        scores_XV: logits of p, `[..., V]`.
        log_q_XV: log-probabilities of q, `[..., V]`.
    """
    log_p_XV = scores_XV.log_softmax(-1)
    ratio_XV = (log_p_XV - log_q_XV).masked_fill(scores_XV == -torch.inf, 0.0)
    return (log_p_XV.exp() * ratio_XV).sum(-1)


def mixed_log_probs(
    head: Head,
    mixing: MixingHead,
    mix: str,
    without_BJKD: Tensor,
    without_log_prob_BJK: Tensor,
    with_BNJKD: Tensor,
    target_BJK: Tensor,
) -> tuple[Tensor, Tensor]:
    """Predict the next true tokens by mixing the predictions without and with each thought.

    With "log_probs" the mixture is `w log p_with + (1 - w) log p_without`, not normalized again
    (Algorithm 1 of Zelikman et al. 2024, arXiv:2403.09629; there, w is the weight of the prediction
    without the thought). With "hidden" the hidden states are interpolated and passed through the
    head once, as in the authors' code. With "none" the prediction is that after the thought.

    Args:
        head: maps hidden states to logits.
        mixing: the mixing head.
        mix: "log_probs", "hidden" or "none".
        without_BJKD: hidden states without a thought.
        without_log_prob_BJK: log-probabilities of the true tokens without a thought.
        with_BNJKD: hidden states after each thought.
        target_BJK: ids of the true tokens, `IGNORED` for none.

    Returns:
        The log-probability of each true token, and the weight of the thought, both `[B, N, J, K]`.
    """
    thoughts = with_BNJKD.shape[1]
    without_BNJKD = without_BJKD[:, None].expand(-1, thoughts, -1, -1, -1)
    target_BNJK = target_BJK[:, None].expand(-1, thoughts, -1, -1)
    weight_BNJK = mixing(without_BNJKD, with_BNJKD)

    def predicted(states_BNJKD: Tensor) -> Tensor:
        log_prob_X = log_probs(head, states_BNJKD.flatten(0, 3), target_BNJK.flatten())
        return log_prob_X.view(target_BNJK.shape)

    if mix == "none":
        return predicted(with_BNJKD), weight_BNJK
    if mix == "hidden":
        # Under autocast the mixing weight has a 16-bit type and the hidden states do not.
        weight_BNJK1 = weight_BNJK[..., None].to(with_BNJKD.dtype)
        return predicted(torch.lerp(without_BNJKD, with_BNJKD, weight_BNJK1)), weight_BNJK
    weight_BNJK, after_BNJK = _precise(weight_BNJK), predicted(with_BNJKD)
    without_BNJK = without_log_prob_BJK[:, None].expand_as(after_BNJK)
    return torch.lerp(without_BNJK, after_BNJK, weight_BNJK), weight_BNJK


@dataclass(frozen=True)
class Rewards:
    """Reward and advantage of each thought, in nats, summed over its lookahead: `[B, N, J]`."""

    reward_BNJ: Tensor
    """Gain in log-probability over the prediction without a thought."""
    advantage_BNJ: Tensor
    """Gain over the baseline. Detached from the autograd graph. If only positive advantages are
    used, the others are 0."""


def rewards(
    baseline: str, without_BJK: Tensor, mixed_BNJK: Tensor, advantages: str = "positive"
) -> Rewards:
    """Compute rewards and advantages for REINFORCE from log-probabilities of the true tokens.

    Args:
        baseline: "log_mean" (the log of the mean probability of each token over the thoughts,
            Algorithm 1), "mean_log" (the mean of the log-probabilities over the thoughts; with
            one thought per position, the prediction without it; the authors' code) or "ema" (the
            mean of the rewards over the other thoughts; see `rlp.group_advantages`).
        without_BJK: log-probabilities without a thought. With "ema", those of the moving average.
        mixed_BNJK: log-probabilities of the mixture with each thought.
        advantages: "positive" (negative advantages become 0) or "both".
    """
    without_BJK, mixed_BNJK = without_BJK.detach(), mixed_BNJK.detach()
    reward_BNJ = (mixed_BNJK - without_BJK[:, None]).sum(-1)
    if baseline == "log_mean":
        thoughts = mixed_BNJK.shape[1]
        mean_BJK = mixed_BNJK.logsumexp(1) - math.log(thoughts)
        advantage_BNJ = (mixed_BNJK - mean_BJK[:, None]).sum(-1)
    elif baseline == "ema":
        advantage_BNJ = group_advantages(reward_BNJ)
    elif mixed_BNJK.shape[1] > 1:
        advantage_BNJ = reward_BNJ - reward_BNJ.mean(1, keepdim=True)
    else:
        advantage_BNJ = reward_BNJ
    # At the start of training every thought has weight 0. Advantages are then only rounding errors,
    # which a REINFORCE weight of 1e6 would amplify.
    size_BNJ = (mixed_BNJK.abs() + math.log(mixed_BNJK.shape[1])).sum(-1)
    noise_BNJ = 4 * torch.finfo(mixed_BNJK.dtype).eps * size_BNJ
    size_BNJ = advantage_BNJ if advantages == "positive" else advantage_BNJ.abs()
    return Rewards(reward_BNJ, advantage_BNJ * (size_BNJ > noise_BNJ))


def reinforce(
    head: Head,
    coefficient_R: Tensor,
    hidden_RSD: Tensor,
    thought_RS: Tensor,
    old_log_prob_RS: Tensor | None,
    marks: SpecialTokens,
    config: QuietConfig,
) -> Tensor:
    """Return the REINFORCE loss of thoughts, a sum over thoughts (Algorithm 1, line 9).

    With `clip_low` and `clip_high` it is the clipped objective of RLP; see `rlp.clipped_ratios`.

    Args:
        head: maps hidden states to logits.
        coefficient_R: advantage of each thought times its weight in the loss (R thoughts).
        hidden_RSD: hidden states that predict the thought tokens.
        thought_RS: ids of the thought tokens.
        old_log_prob_RS: log-probabilities under the weights that sampled the thoughts. None: those
            of the current weights.
        marks: the special tokens.
        config: options of Quiet-STaR.
    """
    # Thoughts with advantage 0 do not contribute. Skipping them saves time: the head takes a
    # third of the computation.
    row_X = coefficient_R.nonzero()[:, 0]
    thought_XS, coefficient_X = thought_RS[row_X], coefficient_R[row_X]
    value_XS = thought_log_probs(
        head, hidden_RSD[row_X], thought_XS, marks, config.reinforce_temperature
    )
    if config.clip_low is not None and config.clip_high is not None:
        old_XS = value_XS.detach() if old_log_prob_RS is None else old_log_prob_RS[row_X]
        value_XS = clipped_ratios(
            value_XS, old_XS, coefficient_X, config.clip_low, config.clip_high
        )
    length_X: Tensor | int = max(1, config.thought_tokens)
    if marks.may_end:
        sampled_XS = sampled_tokens(thought_XS, marks.end)
        value_XS, length_X = value_XS.masked_fill(~sampled_XS, 0), sampled_XS.sum(-1).clamp(min=1)
    per_thought_X = value_XS.sum(-1)
    if config.reinforce_reduction == "mean":
        per_thought_X = per_thought_X / length_X
    return -(coefficient_X * per_thought_X).sum()


def mixed_next_log_probs(
    head: Head, mixing: MixingHead, mix: str, without_BD: Tensor, with_BND: Tensor
) -> Tensor:
    """Return log-probabilities of the next token at inference, `[B, V]`.

    The mixture is normalized, and the probabilities are averaged over thoughts.

    Args:
        head: maps hidden states to logits.
        mixing: the mixing head.
        mix: "log_probs", "hidden" or "none"; see `mixed_log_probs`.
        without_BD: hidden states without a thought.
        with_BND: hidden states after each thought.
    """
    without_BND = without_BD[:, None].expand_as(with_BND)
    weight_BN1 = mixing(without_BND, with_BND)[..., None]
    if mix == "none":
        mixed_BNV = head(with_BND).float()
    elif mix == "hidden":
        mixed_BND = torch.lerp(without_BND, with_BND, weight_BN1.to(with_BND.dtype))
        mixed_BNV = head(mixed_BND).float()
    else:
        log_prob_BNV = head(with_BND).float().log_softmax(-1)
        without_BNV = head(without_BND).float().log_softmax(-1)
        mixed_BNV = torch.lerp(without_BNV, log_prob_BNV, weight_BN1.float())
    return mixed_BNV.log_softmax(-1).logsumexp(1) - math.log(with_BND.shape[1])

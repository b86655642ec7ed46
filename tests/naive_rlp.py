"""RLP's Algorithm 1 (arXiv:2510.01265) as a plain loop: one forward pass per context and thought."""

from dataclasses import dataclass, field
from typing import Any

import torch
from naive_quiet import END, PAD, START, VOCABULARY, states
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM


def learned_positions() -> GPT2LMHeadModel:
    """A second architecture: absolute positions, one matrix for what goes in and comes out."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.4,
             "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes)).double()


def rlp_model(base: PreTrainedModel, **changes: Any) -> QuietLM:
    """A model of RLP in float64 whose two embeddings have begun to move."""
    sizes: dict[str, Any] = {"thoughts": 3, "thought_tokens": 4, "positions": "all"}
    model = QuietLM(base, QuietConfig.rlp(**(sizes | changes)), start=START, end=END, pad=PAD)
    torch.manual_seed(1)
    nn.init.normal_(model.moved, std=0.3)
    return model.double()


def some_thoughts(ids: Tensor, thoughts: int, longest: int) -> Tensor:
    """Random thoughts of 1 to `longest` tokens, `[B, N, T, S]`; END fills the shorter ones."""
    draw = torch.Generator().manual_seed(3)
    shape = (len(ids), thoughts, ids.shape[1])
    found = torch.randint(0, PAD, (*shape, longest), generator=draw)
    length = torch.randint(1, longest + 1, (*shape, 1), generator=draw)
    return found.masked_fill(torch.arange(longest) >= length, END)


@dataclass
class Naive:
    """What the loop computes."""

    loss: Tensor
    rewards: list[list[float]] = field(default_factory=list)
    """Per context, one per thought."""
    advantages: list[list[float]] = field(default_factory=list)
    clipped: set[str] = field(default_factory=set)
    """Sides on which a ratio was clipped."""


def log_pi(model: QuietLM, context: Tensor, content: list[int], drawn: list[int]) -> Tensor:
    """Log-probabilities of the drawn tokens of one thought, at the temperature of sampling."""
    tokens = torch.cat([context, torch.tensor([START, *content, END])])
    logits = states(model, tokens)[1] / model.quiet_config.temperature
    found = []
    for number, token in enumerate(drawn):
        scores = logits[len(context) + number].clone()
        scores[[START, PAD] if number else [START, PAD, END]] = -torch.inf
        found.append(scores.log_softmax(-1)[token])
    return torch.stack(found)


def told(logits: Tensor, true: Tensor) -> Tensor:
    """The log-probability of the last tokens of a sequence."""
    size = len(true)
    return logits[-size - 1 : -1].log_softmax(-1)[torch.arange(size), true].sum()


def algorithm_1(
    model: QuietLM,
    phi: PreTrainedModel,
    old: QuietLM,
    contexts: list[tuple[Tensor, Tensor, Tensor]],
) -> Naive:
    """Lines 5 to 14 for a batch of contexts.

    Args:
        model: theta.
        phi: the network that predicts without a thought.
        old: theta_old.
        contexts: the context x_<t, the token x_t (more than one with a lookahead, which is not in
            the paper: their log-probabilities are added), and G thoughts in S slots.
    """
    config = model.quiet_config
    low, high = config.clip_low, config.clip_high
    assert low is not None and high is not None
    result, total = Naive(torch.zeros(())), torch.zeros((), dtype=torch.double)
    for context, true, thoughts in contexts:
        size, rows, rewards = len(thoughts), [], []
        with torch.no_grad():
            s_ema = told(phi(input_ids=torch.cat([context, true])[None]).logits[0], true)
        for slots in thoughts.tolist():
            ends_itself = END in slots
            content = slots[: slots.index(END)] if ends_itself else slots
            with torch.no_grad():
                after = torch.cat([context, torch.tensor([START, *content, END]), true])
                s_pred = told(states(model, after)[1], true)
            rewards.append(float(s_pred - s_ema))
            rows.append((content, [*content, END] if ends_itself else content))
        mean = sum(rewards) / size
        advantages = [size / (size - 1) * (one - mean) for one in rewards]
        for (content, drawn), advantage in zip(rows, advantages, strict=True):
            with torch.no_grad():
                before = log_pi(old, context, content, drawn)
            rho = (log_pi(model, context, content, drawn) - before).exp()
            clipped = rho.clamp(1 - low, 1 + high)
            objective = torch.minimum(rho * advantage, clipped * advantage)
            if bool((objective != rho * advantage).any()):
                result.clipped.add("above" if advantage > 0 else "below")
            total = total + objective.sum() / len(drawn)
        result.rewards.append(rewards)
        result.advantages.append(advantages)
    result.loss = -total / (len(contexts) * len(contexts[0][2]))
    return result

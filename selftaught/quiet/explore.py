"""Data of the thought explorer: the thought before every token of a text, and its effect."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selftaught.quiet.evaluation import Measured, Scored, measured, score
from selftaught.quiet.gating import GREEDY, ThoughtParams
from selftaught.quiet.thought_ends import content_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.quiet.model import QuietLM

TOP = 5
"""Number of most likely next tokens shown with their probabilities."""


@dataclass(frozen=True)
class Explored:
    """One token of a text, with the thoughts before it."""

    next: str
    """The true token."""
    without: float
    """Probability of the true token without thoughts."""
    chance: float
    """Probability of the true token with all thoughts."""
    gain: float
    """Gain in log-probability with all thoughts, in nats."""
    gains: list[float]
    """Gain in log-probability with each single thought, in nats."""
    weights: list[float]
    """Mixing weight of each thought."""
    thoughts: list[str]
    """Text of each thought."""
    thinks: bool
    """Whether the model thought before this token."""
    top_without: list[tuple[str, float]]
    """Most likely tokens without thoughts, with their probabilities."""
    top_with: list[tuple[str, float]]
    """Most likely tokens with thoughts, with their probabilities."""


def explored(
    model: "QuietLM",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    tokens: int,
    how: ThoughtParams = GREEDY,
) -> tuple[str, list[Explored], Measured]:
    """Compute the thoughts before the tokens of a text and their effect.

    Args:
        model: a Quiet-STaR model.
        tokenizer: its tokenizer.
        text: the text. Only its first `tokens + 1` tokens are used.
        tokens: maximum number of tokens to predict.
        how: how the model thinks. Default: one greedy thought where the model was trained to think.

    Returns:
        The first token, the tokens after it with their thoughts, and a summary.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, verbose=False).input_ids[: tokens + 1]
    if len(ids) < 2:
        raise ValueError(f"Expected a text of at least two tokens to explore, got {len(ids)}.")
    ids_1T = torch.tensor([ids], device=model.base.device)
    how = replace(how, think_when=replace(how.think_when, tokenizer=tokenizer))
    scored = score(model, ids_1T, None, how, top=TOP)
    length_NT = content_lengths(scored.thought_BNTS[0], model.marks.end)
    shown = [_token(tokenizer, scored, ids, length_NT, at) for at in range(len(ids) - 1)]
    return _text(tokenizer, ids[:1]), shown, measured(scored)


def _token(
    tokenizer: "PreTrainedTokenizerBase", scored: Scored, ids: list[int], length_NT: Tensor, at: int
) -> Explored:
    without, mixed = float(scored.without_BT[0, at]), float(scored.with_BT[0, at])
    thoughts = [
        thought[:length] for thought, length
        in zip(scored.thought_BNTS[0, :, at].tolist(), length_NT[:, at].tolist(), strict=True)
    ]  # fmt: skip

    def top(found: Tensor | None) -> list[tuple[str, float]]:
        assert found is not None
        likely, chance = found[:, 0, at].tolist()
        return [(_text(tokenizer, [int(one)]), p) for one, p in zip(likely, chance, strict=True)]

    return Explored(
        next=_text(tokenizer, [ids[at + 1]]),
        without=float(torch.tensor(without).exp()),
        chance=float(torch.tensor(mixed).exp()),
        gain=mixed - without,
        gains=[float(one) - without for one in scored.each_BNT[0, :, at]],
        weights=scored.weight_BNT[0, :, at].tolist(),
        thoughts=[_text(tokenizer, thought) for thought in thoughts],
        thinks=bool(scored.thinks_BT[0, at]),
        top_without=top(scored.top_without),
        top_with=top(scored.top_with),
    )


def _text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

"""What the thought explorer shows: the thoughts before every token of a text, and what they change."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selftaught.quiet.evaluation import Measured, Scored, measured, score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.quiet.model import QuietLM

TOP = 5
"""Next tokens shown with their probabilities."""


@dataclass(frozen=True)
class Explored:
    """One token of a text, and the thoughts before it."""

    next: str
    """The true token."""
    without: float
    """Its probability without thoughts."""
    chance: float
    """With them."""
    gain: float
    """In nats, over all thoughts."""
    gains: list[float]
    """In nats, with each thought alone."""
    weights: list[float]
    thoughts: list[str]
    thinks: bool
    top_without: list[tuple[str, float]]
    top_with: list[tuple[str, float]]


def explored(
    model: "QuietLM", tokenizer: "PreTrainedTokenizerBase", text: str, tokens: int, **how: Any
) -> tuple[str, list[Explored], Measured]:
    """The first token, the next `tokens` with the thoughts before each, and their summary; `how` goes
    to `score`.

    Raises:
        ValueError: the text has fewer than two tokens.
    """
    ids = tokenizer(text, verbose=False).input_ids[: tokens + 1]
    if len(ids) < 2:
        raise ValueError(f"Expected a text of at least two tokens to explore, got {len(ids)}.")
    ids_1T = torch.tensor([ids], device=model.base.device)
    scored = score(model, ids_1T, top=TOP, **how)
    shown = [_token(tokenizer, scored, ids, at) for at in range(len(ids) - 1)]
    return _text(tokenizer, ids[:1]), shown, measured(scored)


def _token(
    tokenizer: "PreTrainedTokenizerBase", scored: Scored, ids: list[int], at: int
) -> Explored:
    without, mixed = float(scored.without_BT[0, at]), float(scored.with_BT[0, at])
    thoughts = scored.thought_BNTS[0, :, at].tolist()

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

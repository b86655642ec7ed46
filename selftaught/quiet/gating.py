"""How a trained model thinks: number and sampling of thoughts, and rules for where to think.

The rules are not in the paper, where the model thinks before every token.

Shapes: `...` any leading dimensions, D hidden width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from selftaught.quiet.config import BY_TEXT
from selftaught.quiet.mixing import Gate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = ("trained", "always", "pattern", "answer", "entropy", "gate", "never")
"""The rules of `ThinkWhen`."""


@dataclass(frozen=True)
class ThinkWhen:
    """Where to think at inference."""

    rule: Literal["trained", "always", "pattern", "answer", "entropy", "gate", "never"] = "trained"
    """Rule: "always", "never", "pattern" (after text that matches `pattern`), "answer" (before an
    answer, after its marker), "entropy" (where the entropy of the next token without a thought is
    above the threshold), "gate" (where the gain that the gate predicts is above the threshold), or
    "trained" ("pattern" or "answer" if the model was trained with these positions, else
    "always")."""
    threshold: float = 0.0
    """Threshold in nats, for "entropy" and "gate"."""
    pattern: str | None = None
    """Regular expression for "pattern", or of the marker for "answer". Default: that of the
    training, or for "answer" the markers `####`, `The answer is` and `\\boxed{`."""
    tokenizer: "PreTrainedTokenizerBase | None" = field(default=None, compare=False, repr=False)
    """Tokenizer of the model. Required for "pattern" and "answer"; `generate` also takes it."""

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"think_when must be {', '.join(RULES[:-1])} or {RULES[-1]}; got {self.rule!r}.")  # fmt: skip
        if self.pattern is not None and self.rule not in BY_TEXT:
            raise ValueError(
                f"think_when={self.rule!r} takes no pattern; got {self.pattern!r}. Use 'pattern' or "
                "'answer', or leave it out."
            )


TRAINED = ThinkWhen()
"""Think where the model was trained to think."""
ALWAYS = ThinkWhen("always")
"""Think at every position."""


@dataclass(frozen=True)
class ThoughtParams:
    """How a trained model thinks at inference.

    Raises:
        ValueError: fewer than one thought, a temperature below 0, or several thoughts at
            temperature 0, which would be identical.
    """

    thoughts: int = 1
    """Number of thoughts per position. The probabilities after them are averaged."""
    temperature: float = 0.0
    """Sampling temperature of thoughts. 0 means greedy decoding."""
    think_when: ThinkWhen = TRAINED
    """Where to think. Without a thought, the prediction is that of the base model."""
    seed: int = 0
    """Random seed for sampling thoughts."""

    def __post_init__(self) -> None:
        if self.thoughts < 1 or self.temperature < 0:
            raise ValueError(
                "Expected at least one thought and a temperature of at least 0, got "
                f"{self.thoughts} and {self.temperature:g}."
            )
        if self.thoughts > 1 and self.temperature == 0:
            raise ValueError(
                f"{self.thoughts} thoughts at temperature 0 would all be the same. Set the thought "
                "temperature to 1, or use one thought."
            )


GREEDY = ThoughtParams()
"""One greedy thought where the model was trained to think."""


def wanted(
    gate: Gate | None,
    think_when: ThinkWhen,
    hidden_D: Tensor,
    log_prob_V: Tensor,
    matches: Tensor | None = None,
) -> Tensor:
    """Decide where to think.

    Args:
        gate: the gate of the model, if it has one.
        think_when: the rule.
        hidden_D: hidden states before a thought, `[..., D]`.
        log_prob_V: log-probabilities of the next token without a thought, `[..., V]`.
        matches: where the text matches, `[...]`, for rules that read the text. It then decides.

    Returns:
        Booleans, `[...]`.

    Raises:
        ValueError: the rule is "gate" and the model has no gate.
    """
    if matches is not None:
        return matches
    assert think_when.rule not in BY_TEXT, "a rule that reads the text needs `matches`"
    match think_when.rule:
        case "entropy":
            return -(log_prob_V.exp() * log_prob_V).sum(-1) > think_when.threshold
        case "gate":
            if gate is None:
                raise ValueError(
                    "think_when='gate' needs a model with a gate; this one was trained with "
                    "gate_weight=0. Train with gate_weight=1, or use think_when='entropy'."
                )
            return gate(hidden_D) > think_when.threshold
    always = think_when.rule != "never"
    return torch.full(hidden_D.shape[:-1], always, dtype=torch.bool, device=hidden_D.device)

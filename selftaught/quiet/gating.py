"""Whether to think before a token (ours; the paper thinks before each).

Shapes: `...` any leading dimensions, D hidden width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from selftaught.quiet.mixing import Gate


@dataclass(frozen=True)
class ThinkWhen:
    """Always; where the next token's entropy without a thought is above a threshold, in nats; or
    where the gate expects a gain above a threshold, in nats."""

    rule: Literal["always", "entropy", "gate", "never"] = "always"
    threshold: float = 0.0

    def __post_init__(self) -> None:
        if self.rule not in ("always", "entropy", "gate", "never"):
            raise ValueError(f"think_when must be always, entropy, gate or never; got {self.rule!r}.")  # fmt: skip


def check_thoughts(thoughts: int, temperature: float) -> None:
    """Refuse numbers that make no sense together.

    Raises:
        ValueError: fewer than one thought, a temperature below 0, or several thoughts at 0.
    """
    if thoughts < 1 or temperature < 0:
        raise ValueError(
            f"Expected at least one thought and a temperature of at least 0, got {thoughts} and "
            f"{temperature:g}."
        )
    if thoughts > 1 and temperature == 0:
        raise ValueError(
            f"{thoughts} thoughts at temperature 0 would all be the same; give a thought "
            "temperature such as 1, or one thought."
        )


def wanted(
    gate: Gate | None, think_when: ThinkWhen, hidden_D: Tensor, log_prob_V: Tensor
) -> Tensor:
    """Where to think, from the state before a thought and the prediction without it: bool `[...]`.

    Raises:
        ValueError: the gate is asked and the model has none.
    """
    match think_when.rule:
        case "entropy":
            return -(log_prob_V.exp() * log_prob_V).sum(-1) > think_when.threshold
        case "gate":
            if gate is None:
                raise ValueError(
                    "think_when='gate' needs a model with a gate; this one was trained with "
                    "gate_weight=0. Train with gate_weight=1, or decide by entropy."
                )
            return gate(hidden_D) > think_when.threshold
    always = think_when.rule == "always"
    return torch.full(hidden_D.shape[:-1], always, dtype=torch.bool, device=hidden_D.device)

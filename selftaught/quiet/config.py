"""Options of Quiet-STaR, with the presets of the paper and of the authors' code."""

from dataclasses import dataclass
from typing import Any, Literal

HEAD_TOKENS = 512
"""Text tokens whose logits exist at the same time."""


SAMPLED_AT_ONCE = 4
"""Chunks whose thoughts are drawn at the same time, which needs less memory than learning from one."""


@dataclass(frozen=True)
class QuietConfig:
    """What the paper varies; `paper()` and `authors_code()` hold the two published settings.

    The defaults are what learned in `recipes/quiet_scratchpad.py`, on a small model at a rate of 2e-4,
    where the published weight of REINFORCE drowned everything else.
    """

    thought_tokens: int = 12
    """Sampled tokens of a thought, start and end not counted: 12 in the main run of the paper."""
    lookahead: int = 4
    """True tokens predicted after a thought: 4 (quiet-star-train.py)."""
    thoughts: int = 2
    """Thoughts per position: 2 (quiet-star-train.py, n_passes)."""
    start_token: str = "<|startofthought|>"
    end_token: str = "<|endofthought|>"
    initial_text: str = "---"
    """The new tokens' embeddings start as this text's first token (Section 4.2)."""
    embedding_scale: float = 10.0
    """Factor of the parameter that is added to the two new embeddings: their gradient is so many
    times as large, and Adam, which ignores the size of gradients, moves them so many times as fast.
    100 in Appendix A and, done this way, in the authors' code."""
    mix: Literal["log_probs", "hidden"] = "hidden"
    """What is mixed: hidden states (the authors' code) or log-probabilities (Algorithm 1)."""
    mixing_range: Literal["unit", "free"] = "unit"
    """Of the weight of a thought: 0 to 1, or anything (the authors' code). A mixture of
    log-probabilities needs the first: it is not normalised, so outside its loss has no lower bound."""
    head_rate: float = 10.0
    """Learning rate of the mixing head, and of the gate, in multiples of the rest's; 1 in both
    published settings."""
    baseline: Literal["log_mean", "mean_log"] = "log_mean"
    """What a thought is compared with; see `losses.rewards`."""
    temperature: float = 1.0
    """Thoughts are drawn at this temperature in training: 1."""
    reinforce_temperature: float = 1.0
    """Their log-probabilities are taken at this one for REINFORCE: 3 in Appendix A, at 1 it is the
    gradient of what was drawn."""
    reinforce_weight: float = 0.1
    """Weight of REINFORCE: 1e6 in quiet-star-train.py (policy_loss_beta), for a rate of 1e-6."""
    reinforce_reduction: Literal["sum", "mean"] = "sum"
    """Over a thought's tokens: its whole log-probability (Algorithm 1) or their mean (the code)."""
    nll_weight: float = 1.0
    """Weight of the loss after thoughts: 1 (Algorithm 1); 0.5 in the code."""
    base_nll_weight: float = 0.0
    """Weight of the loss without thoughts: none in Algorithm 1; 0.5 in the code."""
    last_position_learns: bool = True
    """Whether REINFORCE uses the last position with a whole lookahead; the code leaves it out."""
    drop_zero_losses: bool = False
    """Whether tokens whose loss is exactly 0 are left out of the means of both losses, as in the
    authors' code (which marks padding that way); costs a pass without gradients."""
    positions: Literal["all", "uniform", "entropy"] = "all"
    """Which positions think: all (the paper), or a share of them, drawn uniformly or by the entropy
    of the prediction without a thought; each then counts for as many as it stands for."""
    positions_share: float = 0.25
    """Share of positions that think, where not all do."""
    gate_weight: float = 0.0
    """Weight of the gate's loss, which learns from the state before a thought what the thought will
    gain (ours); nothing else learns from it. 0: no gate."""
    positions_per_chunk: int | None = None
    """Positions that think at the same time; decides memory, not results. By default what fits."""
    chunk_megabytes: int = 384
    """Memory for one chunk, where its size is not given."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mix", ("log_probs", "hidden")),
            ("mixing_range", ("unit", "free")),
            ("baseline", ("log_mean", "mean_log")),
            ("reinforce_reduction", ("sum", "mean")),
            ("positions", ("all", "uniform", "entropy")),
        ):
            if getattr(self, name) not in allowed:
                told = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {told}; got {getattr(self, name)!r}.")
        for name, least in (
            ("thought_tokens", 0),
            ("lookahead", 1),
            ("thoughts", 1),
            ("positions_per_chunk", 1),
            ("chunk_megabytes", 1),
        ):
            given = getattr(self, name)
            if given is None and name == "positions_per_chunk":
                continue
            if type(given) is not int:
                raise ValueError(f"{name} must be a whole number; got {given!r}.")
            if given < least:
                raise ValueError(f"{name} must be at least {least}; got {given}.")
        for name in ("temperature", "reinforce_temperature", "head_rate", "embedding_scale"):
            given = getattr(self, name)
            if given < 0 or (given == 0 and name != "temperature"):
                raise ValueError(f"{name} must be positive; got {given:g}.")
        if self.mix == "log_probs" and self.mixing_range == "free":
            raise ValueError(
                "A mixture of log-probabilities needs mixing_range 'unit', got 'free': it is not normalised, so "
                "with weights below 0 or above 1 its loss falls without end and means nothing."
            )
        if not 0 < self.positions_share <= 1:
            raise ValueError(f"positions_share must be in (0, 1]; got {self.positions_share}.")

    @property
    def without_reinforcement(self) -> str | None:
        """Why REINFORCE has nothing to learn from although it has a weight, and what to change.

        None where it has: an advantage compares thoughts of one position with each other.
        """
        if self.reinforce_weight == 0 or self.thought_tokens == 0:
            return None
        change = "or set reinforce_weight=0 to train without REINFORCE."
        if self.thoughts == 1 and self.baseline == "log_mean":
            return (
                "With thoughts=1 the baseline 'log_mean' is the thought itself, so every advantage is 0 and "
                f"no thought is reinforced. Set thoughts=2, or baseline='mean_log', {change}"
            )
        if self.thoughts > 1 and self.temperature == 0:
            return (
                f"At temperature=0 the {self.thoughts} thoughts of a position are the same, so every "
                f"advantage is 0 and no thought is reinforced. Set temperature=1, {change}"
            )
        return None

    @classmethod
    def paper(cls, **changes: Any) -> "QuietConfig":
        """Algorithm 1 and the appendix of the paper."""
        found: dict[str, Any] = {
            "embedding_scale": 1e2,
            "mix": "log_probs",
            "mixing_range": "unit",
            "head_rate": 1.0,
            "baseline": "log_mean",
            "reinforce_temperature": 3.0,
            "reinforce_weight": 1e6,
            "reinforce_reduction": "sum",
            "nll_weight": 1.0,
            "base_nll_weight": 0.0,
            "last_position_learns": True,
        }
        return cls(**(found | changes))

    @classmethod
    def authors_code(cls, **changes: Any) -> "QuietConfig":
        """What the released code computes (modeling_mistral.py of March 2024).

        Its `n_ahead` of 12 is the start token, 9 sampled ones, the end token and the text's own.
        """
        found: dict[str, Any] = {
            "thought_tokens": 9,
            "embedding_scale": 1e2,
            "mix": "hidden",
            "mixing_range": "free",
            "head_rate": 1.0,
            "baseline": "mean_log",
            "reinforce_temperature": 3.0,
            "reinforce_weight": 1e6,
            "reinforce_reduction": "mean",
            "nll_weight": 0.5,
            "base_nll_weight": 0.5,
            "last_position_learns": False,
            "drop_zero_losses": True,
        }
        return cls(**(found | changes))

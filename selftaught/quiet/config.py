"""Options of Quiet-STaR, with the presets of the paper and of the authors' code."""

from dataclasses import dataclass
from typing import Any, Literal

from selftaught.quiet.linear_pattern import LinearPattern

HEAD_TOKENS = 512
"""Maximum number of text tokens whose logits are in memory at the same time."""


SAMPLED_AT_ONCE = 4
"""Number of chunks whose thoughts are sampled together. Sampling stores no autograd graph, so it
needs less memory per position than the loss."""

BY_TEXT = ("pattern", "answer")
"""Values of `positions` that select positions by matching the text; see `where`."""


@dataclass(frozen=True)
class QuietConfig:
    """Options of Quiet-STaR (Zelikman et al. 2024, arXiv:2403.09629).

    `paper()` and `authors_code()` return the two published settings; `rlp()` returns those of RLP, a
    successor of Quiet-STaR. The defaults come from `recipes/quiet_reinforce.py` and
    `recipes/quiet_scratchpad.py`: they train small models at learning rates of 2e-4 to 3e-4, where
    the published REINFORCE weight dominates all other loss terms.
    """

    thought_tokens: int = 12
    """Number of sampled tokens per thought, without the start and end tokens. 12 in the main run of
    the paper."""
    lookahead: int = 4
    """Number of true tokens predicted after a thought. 4 in quiet-star-train.py."""
    thought_may_end: bool = False
    """Whether a thought may end before `thought_tokens` tokens: the end token can be sampled after
    at least one other token. A sampled end token counts as a token of the thought in REINFORCE; it
    is False in Quiet-STaR, whose thoughts all have the same length."""
    thoughts: int = 2
    """Number of thoughts sampled per position. 2 in quiet-star-train.py (`n_passes`)."""
    start_token: str = "<|startofthought|>"
    """Token added to the vocabulary that starts a thought."""
    end_token: str = "<|endofthought|>"
    """Token added to the vocabulary that ends a thought."""
    initial_text: str = "---"
    """Text whose first token initializes the embeddings of the start and end tokens (Section
    4.2)."""
    embedding_scale: float = 10.0
    """Factor by which the learned offset of the start and end embeddings is multiplied. It scales
    their gradient and, because Adam ignores the size of gradients, their update by this factor. 100
    in Appendix A and in the authors' code, which implements it in the same way."""
    mix: Literal["log_probs", "hidden", "none"] = "hidden"
    """What the mixing head interpolates: "hidden" states (the authors' code) or "log_probs"
    (Algorithm 1). "none": there is no mixing head, and the prediction is the one after the thought
    (RLP)."""
    mixing_range: Literal["unit", "free"] = "unit"
    """Range of the mixing weight of a thought: "unit" (0 to 1) or "free" (any number, the authors'
    code). `mix="log_probs"` requires "unit": that mixture is not normalized, so its loss has no
    lower bound for weights outside 0 to 1."""
    head_rate: float = 10.0
    """Learning rate of the mixing head and of the gate, as a multiple of `learning_rate`. 1 in the
    published settings."""
    baseline: Literal["log_mean", "mean_log", "ema"] = "log_mean"
    """Baseline of the advantage in REINFORCE: "log_mean" (log of the mean probability over the
    thoughts of a position, Algorithm 1), "mean_log" (mean of the log-probabilities, the authors'
    code) or "ema" (RLP: the reward is the gain over the prediction of a moving average of the
    weights without a thought, and its mean over the thoughts is subtracted). With
    "log_mean", an advantage is at most log(`thoughts`) per lookahead token. See `losses.rewards`."""
    ema_decay: float = 0.999
    """Decay of the moving average of the weights per optimizer step, in [0, 1). 0 means that the
    average is the model itself, and no copy is made. Used if `baseline` is "ema"."""
    advantages: Literal["positive", "both"] = "positive"
    """Which thoughts REINFORCE uses: those with a "positive" advantage (Algorithm 1), or those with
    an advantage of "both" signs (RLP)."""
    clip_low: float | None = None
    """Use probability ratios in REINFORCE instead of log-probabilities, clipped below at
    1 - `clip_low`. Needs `clip_high`. None: log-probabilities. The ratio is that to the weights
    with which the thoughts were sampled. It is 1 in `selftaught quiet train`, which samples
    thoughts for every optimizer step, so clipping has no effect there."""
    clip_high: float | None = None
    """Upper limit of the ratios: 1 + `clip_high`. Needs `clip_low`."""
    temperature: float = 1.0
    """Sampling temperature of thoughts in training. 1 in the paper."""
    reinforce_temperature: float = 1.0
    """Temperature of the log-probabilities of thought tokens in REINFORCE. 3 in Appendix A. If it
    equals `temperature`, the gradient is that of the distribution the thoughts were sampled from."""
    reinforce_weight: float = 10.0
    """Weight of the REINFORCE loss. 1e6 in quiet-star-train.py (`policy_loss_beta`), at a learning
    rate of 1e-6. 0 disables REINFORCE. An advantage is a sum over the lookahead tokens, and the
    next-token loss is a mean over them; a weight of 1 / `lookahead` gives both the same scale."""
    reinforce_reduction: Literal["sum", "mean"] = "sum"
    """Reduction over the tokens of a thought: "sum" (the log-probability of the whole thought,
    Algorithm 1) or "mean" (the authors' code and RLP)."""
    thought_kl_weight: float = 0.0
    """Weight of the divergence KL(model, reference) of the distribution of thought tokens, which
    keeps thoughts readable (not in the paper). The reference is the model as it was at the start of
    training, of which a copy of the trained weights stays in memory. The divergence is exact, at
    `temperature`, in nats per sampled token, and a mean over thoughts. 0 disables it."""
    nll_weight: float = 1.0
    """Weight of the next-token loss with thoughts. 1 in Algorithm 1, 0.5 in the authors' code."""
    base_nll_weight: float = 1.0
    """Weight of the next-token loss without thoughts, so that the prediction without a thought does
    not get worse while thoughts are learned. 0 in Algorithm 1, 0.5 in the authors' code."""
    last_position_learns: bool = True
    """Apply REINFORCE to the last position that has a complete lookahead, too. The authors' code
    leaves it out."""
    drop_zero_losses: bool = False
    """Leave tokens whose loss is exactly 0 out of the means of both losses, as the authors' code
    does (it sets the loss of padding to 0). Costs one more forward pass without gradients in batches
    with such losses."""
    positions: Literal["all", "uniform", "entropy", "pattern", "answer"] = "all"
    """Positions at which the model thinks in training: "all" (the paper), a random share of them,
    sampled uniformly ("uniform") or by the entropy of the prediction without a thought ("entropy"),
    those after text that matches `positions_pattern` ("pattern"), or those before an answer, after
    its marker ("answer"). Sampled positions are weighted by the inverse of their sampling
    probability; the losses of "pattern" and "answer" are means over their positions."""
    positions_share: float = 0.25
    """Share of positions that think, in (0, 1]. Used for "uniform" and "entropy"."""
    positions_pattern: str | None = None
    """Regular expression of the text after which "pattern" thinks, or of the marker of an answer
    for "answer" (default: `####`, `The answer is` or `\\boxed{`)."""
    gate_weight: float = 0.0
    """Weight of the loss of the gate, which predicts the gain of a thought from the hidden state
    before it (not in the paper). The gate's loss trains only the gate. 0 means no gate."""
    positions_per_chunk: int | None = None
    """Number of positions that are processed at the same time. Changes the memory needed, not the
    results. Default: as many as fit into `chunk_megabytes`."""
    chunk_megabytes: int | None = None
    """Memory for one chunk of positions in MiB. Used unless `positions_per_chunk` is set. Default: 128 on
    a CPU and 1,024 on other devices, or what one position needs."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mix", ("log_probs", "hidden", "none")),
            ("mixing_range", ("unit", "free")),
            ("baseline", ("log_mean", "mean_log", "ema")),
            ("advantages", ("positive", "both")),
            ("reinforce_reduction", ("sum", "mean")),
            ("positions", ("all", "uniform", "entropy", "pattern", "answer")),
        ):
            if getattr(self, name) not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {choices}; got {getattr(self, name)!r}.")
        for name, least in (
            ("thought_tokens", 0),
            ("lookahead", 1),
            ("thoughts", 1),
            ("positions_per_chunk", 1),
            ("chunk_megabytes", 1),
        ):
            given = getattr(self, name)
            if given is None and name in ("positions_per_chunk", "chunk_megabytes"):
                continue
            if type(given) is not int:
                raise ValueError(f"{name} must be a whole number; got {given!r}.")
            if given < least:
                raise ValueError(f"{name} must be at least {least}; got {given}.")
        for name in ("temperature", "reinforce_temperature", "head_rate", "embedding_scale"):
            given = getattr(self, name)
            if given < 0 or (given == 0 and name != "temperature"):
                raise ValueError(f"{name} must be positive; got {given:g}.")
        if not 0 <= self.thought_kl_weight < float("inf"):
            raise ValueError(
                f"thought_kl_weight must be at least 0 and finite; got {self.thought_kl_weight:g}."
            )
        if self.mix == "log_probs" and self.mixing_range == "free":
            raise ValueError(
                "mix='log_probs' needs mixing_range 'unit', got 'free': this mixture is not "
                "normalized, so its loss has no lower bound for weights below 0 or above 1. Set "
                "mixing_range='unit' or mix='hidden'."
            )
        if not 0 < self.positions_share <= 1:
            raise ValueError(f"positions_share must be in (0, 1]; got {self.positions_share}.")
        self._check_rlp()
        self._check_pattern()

    def _check_rlp(self) -> None:
        """Check the options that RLP adds."""
        if self.mix == "none" and self.mixing_range == "free":
            raise ValueError(
                "mix='none' has no mixing head, so mixing_range='free' would have no effect. Leave "
                "out mixing_range, or set mix='hidden'."
            )
        if self.baseline == "ema" and self.thoughts < 2:
            raise ValueError(
                f"baseline='ema' needs at least 2 thoughts per position, got {self.thoughts}: an "
                "advantage compares a thought with the mean over the thoughts. Set thoughts=2 or "
                "more."
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1); got {self.ema_decay:g}.")
        if (self.clip_low is None) != (self.clip_high is None):
            raise ValueError(
                "clip_low and clip_high must be set together; got "
                f"clip_low={self.clip_low} and clip_high={self.clip_high}."
            )
        if self.clip_low is not None and not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low must be in (0, 1]; got {self.clip_low:g}.")
        if self.clip_high is not None and not self.clip_high > 0:
            raise ValueError(f"clip_high must be positive; got {self.clip_high:g}.")

    def _check_pattern(self) -> None:
        """Check the pattern of the positions."""
        if self.positions == "pattern" and self.positions_pattern is None:
            raise ValueError(
                "positions='pattern' needs positions_pattern, a regular expression such as '='."
            )
        if self.positions_pattern is not None:
            if self.positions not in BY_TEXT:
                raise ValueError(
                    f"positions_pattern={self.positions_pattern!r} has an effect only with "
                    f"positions='pattern' or 'answer'; got {self.positions!r}."
                )
            LinearPattern(self.positions_pattern)

    @property
    def without_reinforcement(self) -> str | None:
        """Why every REINFORCE advantage is 0 with these settings, and what to change.

        None if advantages can differ from 0 or if REINFORCE is disabled. An advantage compares the
        thoughts of one position with each other.
        """
        if self.reinforce_weight == 0 or self.thought_tokens == 0:
            return None
        change = "or set reinforce_weight=0 to train without REINFORCE."
        if self.nll_weight == 0 and self.mix != "none":
            return (
                f"With nll_weight=0 the mixing head of mix={self.mix!r} is not trained: thoughts keep a "
                "weight of 0, so every advantage is 0 and no thought is reinforced. Set nll_weight=1, "
                f"or mix='none', {change}"
            )
        if self.thoughts == 1 and self.baseline == "log_mean":
            return (
                "With thoughts=1 the baseline 'log_mean' equals the log-probability of the only "
                "thought, so every advantage is 0 and no thought is reinforced. "
                f"Set thoughts=2, or baseline='mean_log', {change}"
            )
        if self.thoughts > 1 and self.temperature == 0:
            return (
                f"At temperature=0 the {self.thoughts} thoughts of a position are identical, so "
                f"every advantage is 0 and no thought is reinforced. Set temperature=1, {change}"
            )
        return None

    @classmethod
    def paper(cls, **changes: Any) -> "QuietConfig":
        """Return the settings of Algorithm 1 and the appendix of the paper.

        Args:
            changes: fields that replace those of the preset.
        """
        preset: dict[str, Any] = {
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
        return cls(**(preset | changes))

    @classmethod
    def authors_code(cls, **changes: Any) -> "QuietConfig":
        """Return the settings of the released code (modeling_mistral.py of March 2024).

        Its `n_ahead` of 12 counts the start token, 9 sampled tokens, the end token and one token of
        the text.

        Args:
            changes: fields that replace those of the preset.
        """
        preset: dict[str, Any] = {
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
        return cls(**(preset | changes))

    @classmethod
    def rlp(cls, **changes: Any) -> "QuietConfig":
        """Return the settings of RLP (Hatamizadeh et al. 2025, arXiv:2510.01265), Algorithm 1.

        The paper gives 16 thoughts at temperature 0.7, a decay of 0.999, weight 1 of the loss and no
        next-token loss. It does not give the clipping range (0.2 here, as in PPO) or a temperature
        of the ratio (here that of sampling). Its thoughts have up to 2,048 tokens and one position
        of a context thinks; see docs/methods/rlp.md for `thought_tokens` and `positions_share`.

        Args:
            changes: fields that replace those of the preset.
        """
        preset: dict[str, Any] = {
            "thought_tokens": 24,
            "thought_may_end": True,
            "lookahead": 1,
            "thoughts": 16,
            "embedding_scale": 1.0,
            "mix": "none",
            "head_rate": 1.0,
            "baseline": "ema",
            "ema_decay": 0.999,
            "advantages": "both",
            "clip_low": 0.2,
            "clip_high": 0.2,
            "temperature": 0.7,
            "reinforce_temperature": 0.7,
            "reinforce_weight": 1.0,
            "reinforce_reduction": "mean",
            "nll_weight": 0.0,
            "base_nll_weight": 0.0,
            "positions": "uniform",
            "positions_share": 1 / 32,
        }
        return cls(**(preset | changes))

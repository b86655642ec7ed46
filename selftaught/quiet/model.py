"""Quiet-STaR around any causal language model: Zelikman et al. 2024 (arXiv:2403.09629), Algorithm 1.

`QuietLM.forward` is four lines: read the text, think after its positions, talk after each thought,
learn. Positions are taken in chunks. What a chunk owes the text (its keys, values and hidden states)
is added up and sent through the reading pass once, so the peak of memory is the reading pass and
one chunk.

Shapes: B texts, T text tokens, N thoughts per position, J positions of a chunk, S thought tokens,
K lookahead tokens, D hidden width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from selftaught.quiet.attention import Gradients, thoughtful
from selftaught.quiet.generation import generate
from selftaught.quiet.losses import (
    IGNORED,
    mixed_log_probs,
    rewards,
    text_log_probs,
    thought_log_probs,
)
from selftaught.quiet.mixing import MixingHead
from selftaught.quiet.self_check import self_check
from selftaught.quiet.thoughts import Marks, Prefix, language_head, output_matrix, read, talk, think

HEAD_TOKENS = 512
"""Text tokens whose logits exist at the same time."""


@dataclass(frozen=True)
class QuietConfig:
    """What the paper varies; `paper()` and `authors_code()` hold the two published settings."""

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
    embedding_gradient: float = 1e2
    """Factor of the gradient that reaches the two new embeddings (Appendix A)."""
    mix: Literal["log_probs", "hidden"] = "log_probs"
    """What is mixed: log-probabilities (Algorithm 1) or hidden states (the authors' code)."""
    baseline: Literal["log_mean", "mean_log"] = "log_mean"
    """What a thought is compared with; see `losses.rewards`."""
    temperature: float = 1.0
    """Thoughts are drawn at this temperature in training: 1."""
    reinforce_temperature: float = 3.0
    """Their log-probabilities are taken at this one for REINFORCE: 3 (Appendix A)."""
    reinforce_weight: float = 1e6
    """Weight of REINFORCE: 1e6 (quiet-star-train.py, policy_loss_beta)."""
    reinforce_reduction: Literal["sum", "mean"] = "sum"
    """Over a thought's tokens: its whole log-probability (Algorithm 1) or their mean (the code)."""
    nll_weight: float = 1.0
    """Weight of the loss after thoughts: 1 (Algorithm 1); 0.5 in the code."""
    base_nll_weight: float = 0.0
    """Weight of the loss without thoughts: none in Algorithm 1; 0.5 in the code."""
    positions_per_chunk: int = 32
    """Positions that think at the same time; decides memory, not results."""

    def __post_init__(self) -> None:
        for name, allowed in (
            ("mix", ("log_probs", "hidden")),
            ("baseline", ("log_mean", "mean_log")),
            ("reinforce_reduction", ("sum", "mean")),
        ):
            if getattr(self, name) not in allowed:
                told = " or ".join(map(repr, allowed))
                raise ValueError(f"{name} must be {told}; got {getattr(self, name)!r}.")
        for name in ("thought_tokens", "lookahead", "thoughts", "positions_per_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")

    @classmethod
    def paper(cls, **changes: Any) -> "QuietConfig":
        """Algorithm 1 and the appendix of the paper."""
        return cls(**changes)

    @classmethod
    def authors_code(cls, **changes: Any) -> "QuietConfig":
        """What the released code computes (modeling_mistral.py of March 2024).

        Its `n_ahead` of 12 is the start token, 9 sampled ones, the end token and the text's own.
        """
        found: dict[str, Any] = {
            "thought_tokens": 9,
            "mix": "hidden",
            "baseline": "mean_log",
            "reinforce_reduction": "mean",
            "nll_weight": 0.5,
            "base_nll_weight": 0.5,
        }
        return cls(**(found | changes))

    @property
    def last_position_learns(self) -> bool:
        """Whether REINFORCE uses the last position with a whole lookahead; the code leaves it out."""
        return self.baseline == "log_mean"


@dataclass
class QuietOutput(ModelOutput):
    """Losses in nats per token, and what happened at every position (without gradient)."""

    loss: Tensor | None = None
    nll_without: Tensor | None = None
    """Mean over the text's tokens, without thoughts."""
    nll_with_K: Tensor | None = None
    """Mean for each lookahead token, after thoughts."""
    reinforce: Tensor | None = None
    reward: Tensor | None = None
    """Mean gain of a thought over none, summed over its lookahead."""
    weight: Tensor | None = None
    """Mean weight of the thought in the mixture."""
    log_prob_without_BT: Tensor | None = None
    """Of each next token, without thoughts."""
    log_prob_with_BNTK: Tensor | None = None
    weight_BNTK: Tensor | None = None
    thought_BNTS: Tensor | None = None


@dataclass(frozen=True)
class Counts:
    """Over how many tokens and thoughts the means go."""

    text: Tensor
    lookahead_K: Tensor
    reinforced: Tensor


@dataclass(frozen=True)
class Targets:
    """The true tokens that a text's positions should predict."""

    next_BT: Tensor
    """Of each position, its next token, or ignored."""
    lookahead_BTK: Tensor
    reinforced_BT: Tensor
    """Which positions have a whole lookahead."""
    counts: Counts


class QuietLM(nn.Module):
    """A causal language model that thinks after the tokens of a text.

    Args:
        base: any causal language model of transformers whose layers are attention.
        start, end: the ids of the tokens around a thought.
        pad: the id of the padding token, which thoughts never contain.
        check: compare a few thoughts with ordinary forward passes first; a second at most.

    Raises:
        ValueError: a model whose layers are not all attention; names the layer.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: QuietConfig,
        *,
        start: int,
        end: int,
        pad: int | None,
        check: bool = True,
    ) -> None:
        super().__init__()
        self.base = base
        self.config = config
        never = {start, end} | ({pad} if pad is not None else set())
        self.marks = Marks(start, end, tuple(sorted(never)), config.embedding_gradient)
        if check:
            self_check(base, self.marks)
        self.mixing = MixingHead(output_matrix(base).weight.shape[1]).to(base.device, base.dtype)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Compute the layers again backwards instead of keeping what they made; as transformers'."""
        # Layers are computed again after `forward` has given the model its own attention back.
        given = (gradient_checkpointing_kwargs or {}) | {
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), thoughtful(self.base)),
        }
        self.base.gradient_checkpointing_enable(given)

    def gradient_checkpointing_disable(self) -> None:
        """Keep what the layers made."""
        self.base.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        thoughts: Tensor | None = None,
        seed: int = 0,
    ) -> QuietOutput:
        """Loss and measures of a batch of texts `[B, T]`.

        Args:
            labels: as transformers has them: the tokens themselves, -100 where there is no loss;
                the input itself by default.
            thoughts: given thoughts `[B, N, T, S]` instead of drawn ones.
            seed: of the draws; the same for any size of chunk. Give another one at every step.

        Raises:
            ValueError: texts of fewer than two tokens, which have nothing to predict.
        """
        if input_ids.shape[1] < 2:
            raise ValueError(
                f"Expected texts of at least 2 tokens, got {input_ids.shape[1]}: there is no next "
                "token to predict; leave such texts out."
            )
        config = self.config
        targets = self._targets(input_ids, attention_mask, labels)
        positions = torch.arange(input_ids.shape[1] - 1, device=input_ids.device)
        chunks = positions.split(config.positions_per_chunk)
        uniform_BNTS = self._uniform(input_ids, seed) if thoughts is None else None
        head = language_head(self.base)
        parts: list[_Learned] = []
        with thoughtful(self.base):
            gradients = Gradients([], []) if torch.is_grad_enabled() else None
            prefix = read(self.base, input_ids, attention_mask, gradients)
            without_BT = text_log_probs(head, prefix.hidden_BTD, targets.next_BT, HEAD_TOKENS)

            def learn(position_J: Tensor, prefix: Prefix, without_BT: Tensor) -> Tensor:
                if thoughts is None:
                    assert uniform_BNTS is not None
                    uniform = uniform_BNTS[:, :, position_J]
                    thought_BNJS = think(self.base, head, prefix, position_J, uniform, self.marks, config.temperature)  # fmt: skip
                else:
                    thought_BNJS = thoughts[:, :, position_J]
                states = talk(self.base, prefix, position_J, thought_BNJS, config.lookahead, self.marks)  # fmt: skip
                learned = self._learn(
                    position_J, prefix, without_BT, thought_BNJS, *states, targets
                )
                parts.append(learned)
                return learned.loss

            loss = _in_chunks(learn, chunks, prefix, without_BT, gradients, list(self.parameters()))
        nll_without = -without_BT.sum() / targets.counts.text
        return _output(
            loss + config.base_nll_weight * nll_without, nll_without, without_BT, parts, targets
        )

    def mixed_logits(self, without_BD: Tensor, with_BND: Tensor) -> Tensor:
        """Log-probabilities of the next token, up to a constant, the mean over thoughts: `[B, V]`."""
        head = language_head(self.base)
        without_BND = without_BD[:, None].expand_as(with_BND)
        weight_BN1 = self.mixing(without_BND, with_BND)[..., None]
        if self.config.mix == "hidden":
            mixed_BND = torch.lerp(without_BND, with_BND, weight_BN1.to(with_BND.dtype))
            mixed_BNV = head(mixed_BND).float()
        else:
            log_prob_BNV = head(with_BND).float().log_softmax(-1)
            without_BNV = head(without_BND).float().log_softmax(-1)
            mixed_BNV = torch.lerp(without_BNV, log_prob_BNV, weight_BN1.float())
        return mixed_BNV.log_softmax(-1).logsumexp(1)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Texts continued, thinking before every token; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def _uniform(self, ids_BT: Tensor, seed: int) -> Tensor:
        texts, length = ids_BT.shape
        draw = torch.Generator().manual_seed(seed)
        shape = (texts, self.config.thoughts, length, self.config.thought_tokens)
        return torch.rand(shape, generator=draw).to(ids_BT.device)

    def _targets(self, ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor | None) -> Targets:
        lookahead = self.config.lookahead
        labels_BT = ids_BT if labels_BT is None else labels_BT
        if mask_BT is not None:
            labels_BT = labels_BT.masked_fill(mask_BT == 0, IGNORED)
        ignored = labels_BT.new_full((len(ids_BT), lookahead), IGNORED)
        shifted_BT = torch.cat([labels_BT[:, 1:], ignored], 1)
        lookahead_BTK = shifted_BT.unfold(1, lookahead, 1)[:, : ids_BT.shape[1]]
        if mask_BT is not None:  # padding on the left would predict the text's first tokens
            lookahead_BTK = lookahead_BTK.masked_fill((mask_BT == 0)[..., None], IGNORED)
        end = ids_BT.shape[1] - lookahead - (0 if self.config.last_position_learns else 1)
        within_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) < end
        if self.config.last_position_learns:
            reinforced_BT = within_T & (lookahead_BTK != IGNORED).all(-1)
        else:
            reinforced_BT = within_T.expand_as(ids_BT)  # padding too: it counts, and gives nothing
        counts = Counts(
            text=(lookahead_BTK[..., 0] != IGNORED).sum().clamp(min=1),
            lookahead_K=(lookahead_BTK != IGNORED).sum((0, 1)).clamp(min=1) * self.config.thoughts,
            reinforced=reinforced_BT.sum().clamp(min=1) * self.config.thoughts,
        )
        return Targets(lookahead_BTK[..., 0], lookahead_BTK, reinforced_BT, counts)

    def _learn(
        self,
        position_J: Tensor,
        prefix: Prefix,
        without_BT: Tensor,
        thought_BNJS: Tensor,
        thinking_RSD: Tensor,
        talking_RKD: Tensor,
        targets: Targets,
    ) -> "_Learned":
        """A chunk's share of the loss."""
        config, head = self.config, language_head(self.base)
        last = prefix.ids_BT.shape[1] - 1
        ahead_JK = position_J[:, None] + torch.arange(config.lookahead, device=position_J.device)
        ahead_JK = ahead_JK.clamp(max=last)
        target_BJK = targets.lookahead_BTK[:, position_J]
        known_BJK = target_BJK != IGNORED
        without_BJK = without_BT[:, ahead_JK] * known_BJK
        with_BNJKD = talking_RKD.view(*thought_BNJS.shape[:3], *talking_RKD.shape[1:])
        log_prob_BNJK, weight_BNJK = mixed_log_probs(
            head, self.mixing, config.mix, prefix.hidden_BTD[:, ahead_JK], without_BJK, with_BNJKD,
            target_BJK,
        )  # fmt: skip
        log_prob_BNJK = log_prob_BNJK * known_BJK[:, None]
        nll_K = -log_prob_BNJK.sum((0, 1, 2)) / targets.counts.lookahead_K
        thought_RS = thought_BNJS.flatten(0, 2)
        thought_log_prob_RS = thought_log_probs(
            head, thinking_RSD, thought_RS, self.marks.never, config.reinforce_temperature
        )
        gained = rewards(config.baseline, without_BJK, log_prob_BNJK)
        reinforced_B1J = targets.reinforced_BT[:, None, position_J]
        advantage_BNJ = gained.advantage_BNJ * reinforced_B1J
        per_thought_R = thought_log_prob_RS.sum(-1)
        if config.reinforce_reduction == "mean":
            per_thought_R = per_thought_R / thought_RS.shape[1]
        reinforce = -(advantage_BNJ.flatten() * per_thought_R).sum() / targets.counts.reinforced
        return _Learned(
            config.nll_weight * nll_K.mean() + config.reinforce_weight * reinforce,
            nll_K.detach(),
            reinforce.detach(),
            (gained.reward_BNJ * reinforced_B1J).sum() / targets.counts.reinforced,
            log_prob_BNJK.detach(),
            weight_BNJK.detach(),
            thought_BNJS,
        )


@dataclass(frozen=True)
class _Learned:
    """A chunk's share of the sums and its positions."""

    loss: Tensor
    nll_K: Tensor
    reinforce: Tensor
    reward: Tensor
    log_prob_BNJK: Tensor
    weight_BNJK: Tensor
    thought_BNJS: Tensor


def _output(
    loss: Tensor, nll_without: Tensor, without_BT: Tensor, parts: list[_Learned], targets: Targets
) -> QuietOutput:
    weight_BNTK = torch.cat([part.weight_BNJK for part in parts], 2)
    known_BTK = (targets.lookahead_BTK != IGNORED)[:, : weight_BNTK.shape[2]]
    return QuietOutput(
        loss=loss,
        nll_without=nll_without.detach(),
        nll_with_K=torch.stack([part.nll_K for part in parts]).sum(0),
        reinforce=torch.stack([part.reinforce for part in parts]).sum(),
        reward=torch.stack([part.reward for part in parts]).sum(),
        weight=(weight_BNTK * known_BTK[:, None]).sum() / targets.counts.lookahead_K.sum(),
        log_prob_without_BT=without_BT.detach(),
        log_prob_with_BNTK=torch.cat([part.log_prob_BNJK for part in parts], 2),
        weight_BNTK=weight_BNTK,
        thought_BNTS=torch.cat([part.thought_BNJS for part in parts], 2),
    )


Learn = Callable[[Tensor, Prefix, Tensor], Tensor]


def _in_chunks(
    learn: Learn,
    chunks: Sequence[Tensor],
    prefix: Prefix,
    without_BT: Tensor,
    gradients: Gradients | None,
    parameters: list[nn.Parameter],
) -> Tensor:
    """The sum of all chunks' losses; each chunk's graph is gone before the next one's begins."""
    if gradients is None:
        return torch.stack([learn(chunk, prefix, without_BT) for chunk in chunks]).sum()
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    loss = _Chunks.apply(learn, chunks, prefix, gradients, prefix.hidden_BTD, without_BT, *learning)
    assert isinstance(loss, Tensor)
    return loss


class _Chunks(torch.autograd.Function):
    """Forwards, also computes the gradients, chunk by chunk; backwards, only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        learn: Learn,
        chunks: Sequence[Tensor],
        prefix: Prefix,
        gradients: Gradients,
        hidden_BTD: Tensor,
        without_BT: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().requires_grad_()

        hidden, without = leaf(hidden_BTD), leaf(without_BT)
        keys, values = list(map(leaf, prefix.key_BKTD)), list(map(leaf, prefix.value_BKTD))
        seen = Prefix(prefix.ids_BT, hidden, keys, values, prefix.position_BT, prefix.real_BT)
        inputs = [hidden, without, *keys, *values, *parameters]
        sums: list[Tensor | None] = [None] * len(inputs)
        total = without_BT.new_zeros(())
        for number, chunk in enumerate(chunks):
            with torch.enable_grad():
                loss = learn(chunk, seen, without)
                got = torch.autograd.grad(loss, inputs, allow_unused=True)
            total += loss.detach()
            # The first gradient may share memory with others; the first sum is ours.
            for at, new in enumerate(got):
                old = sums[at]
                if old is None or new is None:
                    sums[at] = old if new is None else new
                else:
                    sums[at] = torch.add(old, new, out=old if number > 1 else None)
        layers = len(keys)
        gradients.key_BKTD = sums[2 : 2 + layers]
        gradients.value_BKTD = sums[2 + layers : 2 + 2 * layers]
        ctx.gradients = gradients
        ctx.sums = [*sums[:2], *sums[2 + 2 * layers :]]
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = outputs
        ctx.gradients.scale = scale
        scaled = [None if one is None else one * scale for one in ctx.sums]
        return (None, None, None, None, *scaled)

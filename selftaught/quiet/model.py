"""Quiet-STaR for any causal language model: Zelikman et al. 2024 (arXiv:2403.09629), Algorithm 1.

`QuietLM.forward` has four steps: read the text, think after its positions, talk after each thought,
and compute the loss. Positions are processed in chunks. The gradients of a chunk with respect to
the keys, values and hidden states of the text are summed over chunks and sent through the reading
pass once. Peak memory is therefore that of the reading pass plus one chunk.

Shapes: B texts, T text tokens, N thoughts per position, J positions of a chunk, S thought tokens,
K lookahead tokens, D hidden width, V vocabulary.
"""

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.chunks import bytes_per_row, in_chunks, positions_within
from selftaught.quiet.config import HEAD_TOKENS, SAMPLED_AT_ONCE, QuietConfig
from selftaught.quiet.generation import generate
from selftaught.quiet.losses import (
    IGNORED,
    mixed_log_probs,
    rewards,
    text_entropy,
    text_log_probs,
    thought_log_probs,
)
from selftaught.quiet.mixing import Gate, MixingHead
from selftaught.quiet.passes import Gradients
from selftaught.quiet.positions import choose
from selftaught.quiet.self_check import self_check
from selftaught.quiet.thoughts import (
    Prefix,
    SpecialTokens,
    at_positions,
    input_matrix,
    language_head,
    output_matrix,
    read,
    talk,
    think,
)


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
    entropy: Tensor | None = None
    """Mean negative log-probability of the sampled thought tokens, an estimate of their entropy."""
    position_BJ: Tensor | None = None
    """Positions that think, in ascending order. The following fields are for these positions."""
    log_prob_with_BNJK: Tensor | None = None
    """Log-probability of each true token with each thought."""
    weight_BNJK: Tensor | None = None
    """Mixing weight of each thought at each true token."""
    thought_BNJS: Tensor | None = None
    """Token ids of the thoughts."""


@dataclass(frozen=True)
class Counts:
    """Denominators of the means in the losses."""

    text: Tensor
    """Number of predicted text tokens."""
    lookahead_K: Tensor
    """Number of predictions with thoughts, for each lookahead token."""
    reinforced: Tensor
    """Number of thoughts in the REINFORCE loss."""


@dataclass(frozen=True)
class Targets:
    """The true tokens to predict at each position of a text."""

    next_BT: Tensor
    """Next token of each position, or `IGNORED`."""
    lookahead_BTK: Tensor
    """Next K tokens of each position, or `IGNORED`."""
    reinforced_BT: Tensor
    """Positions with a complete lookahead, which REINFORCE uses."""
    counts: Counts


class QuietLM(nn.Module):
    """A causal language model that generates a thought after every token of a text.

    Args:
        base: a causal language model of transformers whose layers all use attention.
        config: options of Quiet-STaR.
        start: id of the token that starts a thought.
        end: id of the token that ends a thought.
        pad: id of the padding token, which thoughts cannot contain. None: there is none.
        check: first compare a few thoughts with regular forward passes of the same tokens. Takes at
            most a second.

    Raises:
        UnsupportedModel: thoughts cannot be computed in parallel with this model; names the layer.
            It is a ValueError.
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
        self.quiet_config = config
        never = {start, end} | ({pad} if pad is not None else set())
        self._ids = SpecialTokens(start, end, tuple(sorted(never)))
        if check:
            self_check(base, self._ids)
        width = output_matrix(base).weight.shape[1]
        shape = 2, input_matrix(base).weight.shape[1]
        self.moved = nn.Parameter(torch.zeros(shape, device=base.device, dtype=base.dtype))
        bounded = config.mixing_range == "unit"
        self.mixing = MixingHead(width, bounded=bounded).to(base.device, base.dtype)
        self.gate = Gate(width).to(base.device, base.dtype) if config.gate_weight > 0 else None

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the base model. transformers' `Trainer` reads this attribute."""
        return self.base.config

    @property
    def marks(self) -> SpecialTokens:
        """The special tokens around a thought, with the offsets of their embeddings."""
        return replace(self._ids, moved_2D=self.quiet_config.embedding_scale * self.moved)

    @property
    def tokens_beside(self) -> int:
        """Number of context tokens that a thought needs, its start and end tokens included."""
        return self.quiet_config.thought_tokens + 2

    def heads(self) -> dict[str, Tensor]:
        """Return the weights that are not part of the base model.

        These are the mixing head, the offsets of the start and end embeddings, and the gate if
        there is one.
        """
        return {
            name: weight.contiguous()
            for name, weight in self.state_dict().items()
            if not name.startswith("base.")
        }

    def load_heads(self, weights: dict[str, Tensor]) -> None:
        """Load the weights that `heads` returned.

        Raises:
            ValueError: names or shapes of the weights do not match the model.
        """
        own = self.heads()
        wrong = [
            f"{name} (file: {list(weights[name].shape)}, model: {list(own[name].shape)})"
            for name in sorted(set(own) & set(weights))
            if own[name].shape != weights[name].shape
        ]
        if others := sorted(set(own) ^ set(weights)) + wrong:
            raise ValueError(
                f"The weights in mixing.safetensors do not match quiet.json: {', '.join(others)}. "
                "Take quiet.json and mixing.safetensors from the same run."
            )
        self.load_state_dict(weights, strict=False)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Enable gradient checkpointing, as the method of the same name in transformers does."""
        # Layers are recomputed after `forward` has restored the model's own attention, so the
        # recomputation has to set this attention again.
        given = (gradient_checkpointing_kwargs or {}) | {
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), thoughtful(self.base)),
        }
        self.base.gradient_checkpointing_enable(given, **more)

    def gradient_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing."""
        self.base.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        thoughts: Tensor | None = None,
        seed: int | None = None,
    ) -> QuietOutput:
        """Compute the loss and metrics of a batch of texts.

        Args:
            input_ids: token ids, `[B, T]`.
            attention_mask: 1 for text and 0 for padding. None: no padding.
            labels: token ids, not shifted, with -100 where there is no loss. Default: `input_ids`.
            thoughts: token ids of thoughts, `[B, N, T, S]`, to use instead of sampling them.
            seed: random seed for positions and thoughts. Results do not depend on the size of
                chunks.
                Default: drawn from torch's global random generator, so that every call differs.

        Raises:
            ValueError: texts of fewer than two tokens, texts that are longer than the model's
                context together with a thought, labels that are all ignored, or too little chunk
                memory for one position.
        """
        if input_ids.shape[1] < 2:
            raise ValueError(
                f"Expected texts of at least 2 tokens, got {input_ids.shape[1]}: there is no next "
                "token to predict. Remove such texts."
            )
        self.check_length(input_ids, attention_mask, max(0, self.quiet_config.lookahead - 2))
        why = self.quiet_config.without_reinforcement
        if why and thoughts is None and torch.is_grad_enabled() and self.training:
            warnings.warn(why, stacklevel=2)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        draw = torch.Generator().manual_seed(seed)
        targets = self._targets(input_ids, attention_mask, labels)
        with thoughtful(self.base):
            gradients = Gradients([], []) if torch.is_grad_enabled() else None
            prefix = read(self.base, input_ids, attention_mask, gradients)
            head = language_head(self.base)
            without_BT = text_log_probs(head, prefix.hidden_BTD, targets.next_BT, HEAD_TOKENS)
            if self.quiet_config.drop_zero_losses:
                text = (without_BT != 0).sum().clamp(min=1)
                targets = replace(targets, counts=replace(targets.counts, text=text))
            chosen = self._positions(prefix, targets, draw)
            thought_BNJS, neg_log_prob = self._think(prefix, chosen.position_BJ, draw, thoughts)
            parts: list[_Learned] = []

            def learn(chunk: slice, prefix: Prefix, without_BT: Tensor) -> Tensor:
                part, thought = chosen.part(chunk), thought_BNJS[:, :, chunk]
                states = talk(self.base, prefix, part.position_BJ, thought, self.quiet_config.lookahead, self.marks)  # fmt: skip
                learned = self._learn(part, prefix, without_BT, thought, *states, targets)
                # Detached, so that the autograd graph of this chunk can be freed.
                parts.append(replace(learned, loss=learned.loss.detach()))
                return learned.loss

            chunks = self._chunks(len(input_ids), chosen.position_BJ.shape[1])
            if self.quiet_config.drop_zero_losses:
                counted = self._nonzero_losses(
                    prefix, without_BT, chosen, chunks, thought_BNJS, targets
                )
                targets = replace(targets, counts=replace(targets.counts, lookahead_K=counted))
            loss = in_chunks(learn, chunks, prefix, without_BT, gradients, list(self.parameters()))
        nll_without = -(without_BT * self._counted(without_BT)).sum() / targets.counts.text
        loss = loss + self.quiet_config.base_nll_weight * nll_without
        out = _output(loss, nll_without, without_BT, parts)
        out.position_BJ, out.thought_BNJS, out.entropy = (
            chosen.position_BJ,
            thought_BNJS,
            neg_log_prob,
        )
        return out

    def check_length(self, ids_BT: Tensor, mask_BT: Tensor | None = None, more: int = 0) -> None:
        """Check that texts fit into the model's context together with a thought.

        Args:
            ids_BT: token ids.
            mask_BT: 1 for text and 0 for padding. None: no padding.
            more: number of additional tokens, such as new tokens in generation.

        Raises:
            ValueError: the longest text does not fit; names the number of tokens and the limit.
        """
        config = self.base.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        longest = ids_BT.shape[1] if mask_BT is None else int(mask_BT.bool().sum(1).max())
        needed = longest + self.tokens_beside + more
        if limit is not None and needed > limit:
            raise ValueError(
                f"A text of {longest} tokens, with a thought of {self.tokens_beside} (start and "
                f"end included) and {more} more, is {needed} tokens; "
                f"{type(self.base).__name__} takes {limit}. Use a shorter text, shorter thoughts or fewer new tokens."
            )

    def _counted(self, log_prob: Tensor) -> Tensor | float:
        """Return the factor of each loss in the means.

        With `drop_zero_losses` it is 0 for losses of exactly 0, otherwise 1 for every loss.
        """
        return (log_prob != 0).to(log_prob.dtype) if self.quiet_config.drop_zero_losses else 1.0

    @torch.no_grad()
    def _nonzero_losses(
        self,
        prefix: Prefix,
        without_BT: Tensor,
        chosen: "_Positions",
        chunks: Sequence[slice],
        thought_BNJS: Tensor,
        targets: Targets,
    ) -> Tensor:
        """Count the losses with thoughts that are not exactly 0, for each lookahead token:
        `[K]`."""
        total = torch.zeros(
            self.quiet_config.lookahead, dtype=without_BT.dtype, device=without_BT.device
        )
        for chunk in chunks:
            part, thought = chosen.part(chunk), thought_BNJS[:, :, chunk]
            states = talk(self.base, prefix, part.position_BJ, thought, self.quiet_config.lookahead, self.marks)  # fmt: skip
            learned = self._learn(part, prefix, without_BT, thought, *states, targets)
            known_BJK = at_positions(targets.lookahead_BTK, part.position_BJ) != IGNORED
            counts_BNJK = (learned.log_prob_BNJK != 0) & known_BJK[:, None]
            total += (counts_BNJK * part.factor_BJ[:, None, :, None]).sum((0, 1, 2))
        return total.clamp(min=1)

    def mixed_logits(self, without_BD: Tensor, with_BND: Tensor) -> Tensor:
        """Return log-probabilities of the next token, `[B, V]`.

        The probabilities are averaged over thoughts.

        Args:
            without_BD: hidden states without a thought.
            with_BND: hidden states after each thought.
        """
        head = language_head(self.base)
        without_BND = without_BD[:, None].expand_as(with_BND)
        weight_BN1 = self.mixing(without_BND, with_BND)[..., None]
        if self.quiet_config.mix == "hidden":
            mixed_BND = torch.lerp(without_BND, with_BND, weight_BN1.to(with_BND.dtype))
            mixed_BNV = head(mixed_BND).float()
        else:
            log_prob_BNV = head(with_BND).float().log_softmax(-1)
            without_BNV = head(without_BND).float().log_softmax(-1)
            mixed_BNV = torch.lerp(without_BNV, log_prob_BNV, weight_BN1.float())
        return mixed_BNV.log_softmax(-1).logsumexp(1) - math.log(with_BND.shape[1])

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Generate text with a thought before every token; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def _positions(self, prefix: Prefix, targets: Targets, draw: torch.Generator) -> "_Positions":
        """Return the positions that think. The last token is not one, because nothing follows
        it."""
        config, device = self.quiet_config, prefix.ids_BT.device
        positions = prefix.ids_BT.shape[1] - 1
        count = max(1, round(config.positions_share * positions))
        uniform_B = torch.rand(len(prefix.ids_BT), generator=draw).to(device)
        if config.positions == "all" or count == positions:
            position_1J = torch.arange(positions, device=device)[None]
            return _Positions(position_1J, torch.ones(1, positions, device=device))
        weight_BT = (targets.lookahead_BTK != IGNORED).any(-1)[:, :-1].float()
        if config.positions == "entropy":
            hidden_BTD = prefix.hidden_BTD.detach()[:, :-1]
            entropy_BT = text_entropy(language_head(self.base), hidden_BTD, HEAD_TOKENS)
            # A tenth of the mean is added, so that every position has a positive probability.
            mean_B1 = (entropy_BT * weight_BT).sum(1, True) / weight_BT.sum(1, True).clamp(min=1)
            weight_BT = weight_BT * (entropy_BT + 0.1 * mean_B1 + 1e-6)
        return _Positions(*choose(weight_BT, count, uniform_B))

    def _think(
        self, prefix: Prefix, position_BJ: Tensor, draw: torch.Generator, given: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Sample thoughts for every position, or take the given ones.

        Returns:
            Token ids, and the mean negative log-probability of sampled tokens. None if there are
            none.
        """
        config, texts = self.quiet_config, len(prefix.ids_BT)
        if given is not None:
            position_BX = position_BJ.expand(texts, -1)
            return at_positions(given.transpose(1, 2), position_BX).transpose(1, 2), None
        length = prefix.ids_BT.shape[1]
        shape = (texts, length, config.thoughts, config.thought_tokens)
        uniform_BTNS = torch.rand(shape, generator=draw).to(position_BJ.device)
        head, thoughts, neg_log_probs = language_head(self.base), [], []
        # Without gradients, only keys, values and logits of the current token are in memory.
        wide = SAMPLED_AT_ONCE * self._chunk(texts)
        for position_BC in position_BJ.split(wide, 1):
            uniform_BNCS = at_positions(uniform_BTNS, position_BC).transpose(1, 2)
            thought, neg_log_prob, _ = think(self.base, head, prefix, position_BC, uniform_BNCS, self.marks, config.temperature)  # fmt: skip
            thoughts.append(thought)
            neg_log_probs.append(neg_log_prob)
        neg_log_prob = torch.cat(neg_log_probs, 2).mean() if config.thought_tokens else None
        return torch.cat(thoughts, 2), neg_log_prob

    def _chunk(self, texts: int) -> int:
        """Return the number of positions per chunk."""
        config = self.quiet_config
        if config.positions_per_chunk is not None:
            return config.positions_per_chunk
        tokens = config.thought_tokens + 1 + config.lookahead
        predicted = config.lookahead + (config.thought_tokens + 1) // 2
        row = bytes_per_row(self.base, tokens, predicted)
        return positions_within(config.chunk_megabytes * 2**20, texts * config.thoughts, row)

    def _chunks(self, texts: int, positions: int) -> list[slice]:
        """Return chunks of nearly equal size.

        A small last chunk would take almost as long as a full one.
        """
        count = -(-positions // self._chunk(texts))
        edges = [positions * number // count for number in range(count + 1)]
        return [slice(*edge) for edge in pairwise(edges)]

    def _targets(self, ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor | None) -> Targets:
        lookahead = self.quiet_config.lookahead
        labels_BT = ids_BT if labels_BT is None else labels_BT
        if labels_BT.shape != ids_BT.shape:
            raise ValueError(
                f"Expected labels of the shape of input_ids, {list(ids_BT.shape)}, got "
                f"{list(labels_BT.shape)}. Give one label per token."
            )
        if mask_BT is not None:
            labels_BT = labels_BT.masked_fill(mask_BT == 0, IGNORED)
        ignored = labels_BT.new_full((len(ids_BT), lookahead), IGNORED)
        shifted_BT = torch.cat([labels_BT[:, 1:], ignored], 1)
        lookahead_BTK = shifted_BT.unfold(1, lookahead, 1)[:, : ids_BT.shape[1]]
        if mask_BT is not None:  # otherwise left padding would predict the first tokens of the text
            lookahead_BTK = lookahead_BTK.masked_fill((mask_BT == 0)[..., None], IGNORED)
        if not bool((lookahead_BTK[..., 0] != IGNORED).any()):
            raise ValueError(
                "Expected labels with at least one token to predict after the first, got none: "
                f"all are {IGNORED} or padding. Remove such texts."
            )
        end = ids_BT.shape[1] - lookahead - (0 if self.quiet_config.last_position_learns else 1)
        within_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) < end
        if self.quiet_config.last_position_learns:
            reinforced_BT = within_T & (lookahead_BTK != IGNORED).all(-1)
        else:
            # As in the authors' code, padding is in the denominator, but has no reward.
            reinforced_BT = within_T.expand_as(ids_BT)
        counts = Counts(
            text=(lookahead_BTK[..., 0] != IGNORED).sum().clamp(min=1),
            lookahead_K=(lookahead_BTK != IGNORED).sum((0, 1)).clamp(min=1)
            * self.quiet_config.thoughts,
            reinforced=reinforced_BT.sum().clamp(min=1) * self.quiet_config.thoughts,
        )
        return Targets(lookahead_BTK[..., 0], lookahead_BTK, reinforced_BT, counts)

    def _learn(
        self,
        chosen: "_Positions",
        prefix: Prefix,
        without_BT: Tensor,
        thought_BNJS: Tensor,
        thinking_RSD: Tensor,
        talking_RKD: Tensor,
        targets: Targets,
    ) -> "_Learned":
        """Compute the loss of a chunk of positions, already divided by the total counts."""
        config, head, counts = self.quiet_config, language_head(self.base), targets.counts
        last = prefix.ids_BT.shape[1] - 1
        ahead_K = torch.arange(config.lookahead, device=without_BT.device)
        ahead_BJK = (chosen.position_BJ[..., None] + ahead_K).clamp(max=last)
        target_BJK = at_positions(targets.lookahead_BTK, chosen.position_BJ)
        known_BJK = target_BJK != IGNORED
        without_BJK = at_positions(without_BT, ahead_BJK) * known_BJK
        with_BNJKD = talking_RKD.view(*thought_BNJS.shape[:3], *talking_RKD.shape[1:])
        hidden_BJKD = at_positions(prefix.hidden_BTD, ahead_BJK)
        log_prob_BNJK, weight_BNJK = mixed_log_probs(
            head, self.mixing, config.mix, hidden_BJKD, without_BJK, with_BNJKD, target_BJK
        )
        log_prob_BNJK = log_prob_BNJK * known_BJK[:, None]
        factor_BNJ = chosen.factor_BJ[:, None].to(log_prob_BNJK.dtype)
        share_BNJK = factor_BNJ[..., None] * known_BJK[:, None] * self._counted(log_prob_BNJK)
        nll_K = -(log_prob_BNJK * share_BNJK).sum((0, 1, 2)) / counts.lookahead_K
        loss = config.nll_weight * nll_K.mean()
        gained = rewards(config.baseline, without_BJK, log_prob_BNJK)
        factor_BNJ = factor_BNJ * at_positions(targets.reinforced_BT, chosen.position_BJ)[:, None]
        coefficient_R = (gained.advantage_BNJ * factor_BNJ).flatten()
        # Thoughts with advantage 0 do not contribute. Skipping them saves time: the head takes a
        # third of the computation.
        row_X = coefficient_R.nonzero()[:, 0]
        log_prob_XS = thought_log_probs(
            head, thinking_RSD[row_X], thought_BNJS.flatten(0, 2)[row_X], self.marks.never,
            config.reinforce_temperature,
        )  # fmt: skip
        per_thought_X = log_prob_XS.sum(-1)
        if config.reinforce_reduction == "mean":
            per_thought_X = per_thought_X / max(1, config.thought_tokens)
        reinforce = -(coefficient_R[row_X] * per_thought_X).sum() / counts.reinforced
        loss = loss + config.reinforce_weight * reinforce
        if self.gate is not None:
            gain_BJ = (log_prob_BNJK - without_BJK[:, None]).detach()[..., 0].mean(1)
            expected_BJ = self.gate(hidden_BJKD[:, :, 0].detach())
            error_BJ = (expected_BJ - gain_BJ) ** 2 * known_BJK[..., 0]
            loss = loss + config.gate_weight * (error_BJ * chosen.factor_BJ).sum() / counts.text
        weight_BNJK = weight_BNJK.detach()
        return _Learned(
            loss,
            nll_K.detach(),
            reinforce.detach(),
            (gained.reward_BNJ * factor_BNJ).sum() / counts.reinforced,
            ((gained.advantage_BNJ > 0) * factor_BNJ).sum() / counts.reinforced,
            (weight_BNJK * share_BNJK).sum() / counts.lookahead_K.sum(),
            log_prob_BNJK.detach(),
            weight_BNJK,
        )  # fmt: skip


@dataclass(frozen=True)
class _Positions:
    """Positions that think, and their weights in the loss."""

    position_BJ: Tensor
    """Positions. B is 1 if they are the same for all texts."""
    factor_BJ: Tensor
    """Inverse sampling probabilities."""

    def part(self, chunk: slice) -> "_Positions":
        return _Positions(self.position_BJ[:, chunk], self.factor_BJ[:, chunk])


@dataclass(frozen=True)
class _Learned:
    """Contributions of a chunk to the loss and metrics, and the values at its positions."""

    loss: Tensor
    nll_K: Tensor
    reinforce: Tensor
    reward: Tensor
    positive: Tensor
    weight: Tensor
    log_prob_BNJK: Tensor
    weight_BNJK: Tensor


def _output(
    loss: Tensor, nll_without: Tensor, without_BT: Tensor, parts: list[_Learned]
) -> QuietOutput:
    return QuietOutput(
        loss=loss,
        nll_without=nll_without.detach(),
        nll_with_K=torch.stack([part.nll_K for part in parts]).sum(0),
        reinforce=torch.stack([part.reinforce for part in parts]).sum(),
        reward=torch.stack([part.reward for part in parts]).sum(),
        positive=torch.stack([part.positive for part in parts]).sum(),
        weight=torch.stack([part.weight for part in parts]).sum(),
        log_prob_without_BT=without_BT.detach(),
        log_prob_with_BNJK=torch.cat([part.log_prob_BNJK for part in parts], 2),
        weight_BNJK=torch.cat([part.weight_BNJK for part in parts], 2),
    )

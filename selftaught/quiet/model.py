"""Quiet-STaR for any causal language model: Zelikman et al. 2024 (arXiv:2403.09629), Algorithm 1.

`QuietLM.forward` has four steps: read the text, think after its positions, talk after each thought,
and compute the loss. Positions are processed in chunks. The gradients of a chunk with respect to
the keys, values and hidden states of the text are summed over chunks and sent through the reading
pass once. Peak memory is therefore that of the reading pass plus one chunk.

Shapes: B texts, T text tokens, N thoughts per position, J positions of a chunk, S thought tokens,
K lookahead tokens, D hidden width, V vocabulary.
"""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from selftaught.quiet.attention import checkpoint_contexts, thoughtful
from selftaught.quiet.chunks import even_chunks, in_chunks, positions_per_chunk
from selftaught.quiet.config import HEAD_TOKENS, QuietConfig
from selftaught.quiet.drawn import Drawn, draw_thoughts, given_thoughts
from selftaught.quiet.gating import TRAINED
from selftaught.quiet.generation import generate
from selftaught.quiet.losses import (
    mixed_log_probs,
    mixed_next_log_probs,
    reinforce,
    rewards,
    text_entropy,
    text_log_probs,
)
from selftaught.quiet.mixing import Gate, MixingHead, WholeThought
from selftaught.quiet.moving_average import MovingAverage
from selftaught.quiet.outputs import Learned, Means, QuietOutput, gathered
from selftaught.quiet.passes import Gradients
from selftaught.quiet.positions import Positions, choose, given_positions, thinking_positions
from selftaught.quiet.reference import Reference, compared
from selftaught.quiet.self_check import self_check
from selftaught.quiet.targets import IGNORED, Targets, only_at, text_targets
from selftaught.quiet.thought_filter import ThoughtFilter
from selftaught.quiet.thoughts import (
    Prefix,
    SpecialTokens,
    at_positions,
    input_matrix,
    language_head,
    output_matrix,
    read,
    talk,
)


class QuietLM(nn.Module):
    """A causal language model that generates a thought after every token of a text.

    Args:
        base: a causal language model of transformers whose layers all use attention.
        config: options of Quiet-STaR.
        start: id of the token that starts a thought.
        end: id of the token that ends a thought.
        pad: id of the padding token, which thoughts cannot contain. None means that there is none.
        check: first compare a few thoughts with regular forward passes of the same tokens. Takes at
            most a second.

    Attributes:
        average: moving average of the base model's weights, for `baseline="ema"`. `train_quiet` sets
            it. None means that rewards are compared with the present weights.
        thought_filter: checks of thoughts; flagged ones get no positive advantage. None: no checks.
        reference: the model as it was at the start of training, to which thoughts are compared.
            `thought_kl_weight` above 0 needs it; `train_quiet` then sets it if it is None.

    Raises:
        UnsupportedModel: thoughts cannot be computed in parallel with this model; names the layer.
            It is a ValueError.
    """

    think_when = TRAINED
    """Where `generate` thinks unless it gets another rule."""

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
        may_end = config.thought_may_end
        self._ids = SpecialTokens(start, end, tuple(sorted(never)), may_end=may_end)
        self.average: MovingAverage | None = None
        self.thought_filter: ThoughtFilter | None = None
        self.reference: Reference | None = None
        self._zeros_expected = False  # whether the last batch had losses of exactly 0
        if check:
            self_check(base, self._ids)
        width = output_matrix(base).weight.shape[1]
        shape = 2, input_matrix(base).weight.shape[1]
        self.moved = nn.Parameter(torch.zeros(shape, device=base.device, dtype=base.dtype))
        bounded = config.mixing_range == "unit"
        head = WholeThought() if config.mix == "none" else MixingHead(width, bounded=bounded)
        self.mixing: MixingHead = head.to(base.device, base.dtype)
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

    @property
    def context(self) -> int | None:
        """Context length of the base model in tokens. None if its configuration has none."""
        config = self.base.config.get_text_config()
        return getattr(config, "max_position_embeddings", None)

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

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """Enable gradient checkpointing, as the method of the same name in transformers does."""
        # Layers are recomputed after `forward` has restored the model's own attention, so the
        # recomputation has to set this attention again.
        given = (gradient_checkpointing_kwargs or {}) | {
            "use_reentrant": False,
            "context_fn": partial(checkpoint_contexts, self.base),  # follows `copy.deepcopy`
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
        think_mask: Tensor | None = None,
        thoughts: Tensor | None = None,
        old_log_probs: Tensor | None = None,
        seed: int | None = None,
    ) -> QuietOutput:
        """Compute the loss and metrics of a batch of texts.

        Args:
            input_ids: token ids, `[B, T]`.
            attention_mask: 1 for text and 0 for padding. None means no padding.
            labels: token ids, not shifted, with -100 where there is no loss. Default: `input_ids`.
            think_mask: 1 where the model thinks, `[B, T]`. Default: decided by `positions`, which
                must not be "pattern" or "answer"; for these, see `where.training_matcher`.
            thoughts: token ids of thoughts, `[B, N, T, S]`, to use instead of sampling them.
            old_log_probs: their log-probabilities when sampled (`clip_low`). Default: as now.
            seed: random seed for positions and thoughts. Results do not depend on the size of
                chunks. Default: drawn from torch's global random generator.

        Raises:
            ValueError: texts of fewer than two tokens or, with a thought, longer than the context;
                labels that are all ignored, a wrong `think_mask`, or too little chunk memory.
        """
        self._check(input_ids, attention_mask, sampled=thoughts is None)
        config = self.quiet_config
        seed = int(torch.randint(2**62, ())) if seed is None else seed
        draw = torch.Generator().manual_seed(seed)
        targets = text_targets(input_ids, attention_mask, labels, config)
        targets, think_BT = only_at(targets, think_mask, config)
        with thoughtful(self.base):
            gradients = Gradients([], []) if torch.is_grad_enabled() else None
            average_BT = self._average(input_ids, attention_mask, targets)
            prefix = read(self.base, input_ids, attention_mask, gradients)
            head = language_head(self.base)
            without_BT = text_log_probs(head, prefix.hidden_BTD, targets.next_BT, HEAD_TOKENS)
            if config.drop_zero_losses:
                targets = targets.counted(text=(without_BT != 0).sum().clamp(min=1))
            chosen = self._positions(prefix, targets, draw, think_BT)
            drawn = self._drawn(prefix, chosen, draw, thoughts, old_log_probs)
            told = self.reference.read(input_ids, attention_mask) if self.reference else None
            drawn = replace(drawn, baseline_BT=average_BT, reference=told)
            loss, parts = self._in_chunks(prefix, without_BT, chosen, drawn, targets, gradients)
        nll_without = -(without_BT * self._counted(without_BT)).sum() / targets.counts.text
        loss = loss + config.base_nll_weight * nll_without
        means = Means(loss, nll_without, drawn.entropy, drawn.length)
        return gathered(parts, means, without_BT, chosen, drawn.thought_BNJS)

    def _average(self, ids_BT: Tensor, mask_BT: Tensor | None, targets: Targets) -> Tensor | None:
        """Return the log-probability of each next token under the moving average, `[B, T]`."""
        if self.average is None:
            return None
        return self.average.log_probs(self.base, ids_BT, mask_BT, targets.next_BT)

    def _drawn(
        self,
        prefix: Prefix,
        chosen: Positions,
        draw: torch.Generator,
        given: Tensor | None,
        old: Tensor | None,
    ) -> Drawn:
        """Return the given thoughts at the positions that think, or sample thoughts."""
        if given is not None:
            return given_thoughts(given, old, chosen.position_BJ)
        if old is not None:
            raise ValueError("old_log_probs needs thoughts, whose log-probabilities they are.")
        return draw_thoughts(self.base, self.quiet_config, self.marks, prefix, chosen, draw)

    def _check(self, ids_BT: Tensor, mask_BT: Tensor | None, *, sampled: bool) -> None:
        """Check the texts, and warn if REINFORCE has no effect on thoughts that are sampled."""
        if ids_BT.shape[1] < 2:
            raise ValueError(
                f"Expected texts of at least 2 tokens, got {ids_BT.shape[1]}: there is no next "
                "token to predict. Remove such texts."
            )
        self.check_length(ids_BT, mask_BT, max(0, self.quiet_config.lookahead - 2))
        if self.quiet_config.thought_kl_weight > 0 and self.reference is None:
            raise ValueError(
                f"thought_kl_weight={self.quiet_config.thought_kl_weight:g} needs a reference, the model "
                "as it was at the start of training. train_quiet sets it; in a loop of your own, set "
                "model.reference = Reference.frozen(model) (from selftaught.quiet.reference) first."
            )
        why = self.quiet_config.without_reinforcement
        if why and sampled and torch.is_grad_enabled() and self.training:
            warnings.warn(why, stacklevel=3)

    def check_length(self, ids_BT: Tensor, mask_BT: Tensor | None = None, more: int = 0) -> None:
        """Check that texts fit into the model's context together with a thought.

        Args:
            ids_BT: token ids.
            mask_BT: 1 for text and 0 for padding. None means no padding.
            more: number of additional tokens, such as new tokens in generation.

        Raises:
            ValueError: the longest text does not fit; names the number of tokens and the limit.
        """
        limit = self.context
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

    def _in_chunks(
        self,
        prefix: Prefix,
        without_BT: Tensor,
        chosen: Positions,
        drawn: Drawn,
        targets: Targets,
        gradients: Gradients | None,
    ) -> tuple[Tensor, list[Learned]]:
        """Return the loss of all chunks of positions, and the values of each chunk.

        With `drop_zero_losses`, the number of losses that are not exactly 0 is known only at the
        end. It is first taken to be the number of all losses; if it is not, everything is computed
        again. After a batch with such losses, they are counted first, by a pass without gradients.
        """
        config, parameters = self.quiet_config, list(self.parameters())
        size = positions_per_chunk(self.base, config, len(prefix.ids_BT))
        chunks = even_chunks(chosen.position_BJ.shape[1], size)
        parts: list[Learned] = []

        def run(targets: Targets, gradients: Gradients | None = gradients) -> Tensor:
            parts.clear()

            def learn(chunk: slice, prefix: Prefix, without_BT: Tensor) -> Tensor:
                part = chosen.part(chunk)
                learned = self._learn(part, prefix, without_BT, drawn.part(chunk), targets)
                # Detached, so that the autograd graph of this chunk can be freed.
                parts.append(replace(learned, loss=learned.loss.detach()))
                return learned.loss

            return in_chunks(learn, chunks, prefix, without_BT, gradients, parameters)

        if not config.drop_zero_losses:
            return run(targets), parts
        known_BJK = at_positions(targets.lookahead_BTK, chosen.position_BJ) != IGNORED
        known_BNJK = known_BJK[:, None].expand(-1, drawn.thought_BNJS.shape[1], -1, -1)

        def counted(counts_BNJK: Tensor) -> Targets:
            factor_BJK = chosen.factor_BJ[:, None, :, None]
            return targets.counted(
                lookahead_K=(counts_BNJK * factor_BJK).sum((0, 1, 2)).clamp(min=1)
            )

        expected = self._zeros_expected
        with torch.set_grad_enabled(torch.is_grad_enabled() and not expected):
            loss = run(counted(known_BNJK), None if expected else gradients)
        nonzero_BNJK = torch.cat([part.log_prob_BNJK for part in parts], 2) != 0
        self._zeros_expected = bool((known_BNJK & ~nonzero_BNJK).any())
        if expected or self._zeros_expected:
            del loss  # and its gradients
            loss = run(counted(known_BNJK & nonzero_BNJK))
        return loss, parts

    def mixed_logits(self, without_BD: Tensor, with_BND: Tensor) -> Tensor:
        """Return log-probabilities of the next token, `[B, V]`.

        The probabilities are averaged over thoughts.

        Args:
            without_BD: hidden states without a thought.
            with_BND: hidden states after each thought.
        """
        head, mix = language_head(self.base), self.quiet_config.mix
        return mixed_next_log_probs(head, self.mixing, mix, without_BD, with_BND)

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Generate text with thoughts; see `generation.generate`."""
        return generate(self, input_ids, attention_mask, **options)

    def _positions(
        self, prefix: Prefix, targets: Targets, draw: torch.Generator, think_BT: Tensor | None
    ) -> Positions:
        """Return the positions that think: the given ones, or all or a sample by `positions`."""
        if think_BT is not None:
            return given_positions(think_BT)
        config, device = self.quiet_config, prefix.ids_BT.device
        positions = prefix.ids_BT.shape[1] - 1
        count = thinking_positions(config, prefix.ids_BT.shape[1])
        uniform_B = torch.rand(len(prefix.ids_BT), generator=draw).to(device)
        if count == positions:
            position_1J = torch.arange(positions, device=device)[None]
            return Positions(position_1J, torch.ones(1, positions, device=device))
        weight_BT = (targets.lookahead_BTK != IGNORED).any(-1)[:, :-1].float()
        if config.positions == "entropy":
            hidden_BTD = prefix.hidden_BTD.detach()[:, :-1]
            entropy_BT = text_entropy(language_head(self.base), hidden_BTD, HEAD_TOKENS)
            # A tenth of the mean is added, so that every position has a positive probability.
            mean_B1 = (entropy_BT * weight_BT).sum(1, True) / weight_BT.sum(1, True).clamp(min=1)
            weight_BT = weight_BT * (entropy_BT + 0.1 * mean_B1 + 1e-6)
        return Positions(*choose(weight_BT, count, uniform_B))

    def _learn(
        self,
        chosen: Positions,
        prefix: Prefix,
        without_BT: Tensor,
        drawn: Drawn,
        targets: Targets,
    ) -> Learned:
        """Predict after the thoughts of a chunk of positions, and compute its loss.

        The loss is already divided by the total counts.
        """
        config, head, counts = self.quiet_config, language_head(self.base), targets.counts
        thought_BNJS, marks = drawn.thought_BNJS, self.marks
        thinking_RSD, talking_RKD = talk(
            self.base, prefix, chosen.position_BJ, thought_BNJS, config.lookahead, marks
        )
        last = prefix.ids_BT.shape[1] - 1
        ahead_K = torch.arange(config.lookahead, device=without_BT.device)
        ahead_BJK = (chosen.position_BJ[..., None] + ahead_K).clamp(max=last)
        target_BJK = at_positions(targets.lookahead_BTK, chosen.position_BJ)
        known_BJK = target_BJK != IGNORED
        without_BJK = at_positions(without_BT, ahead_BJK) * known_BJK
        with_BNJKD = talking_RKD.view(*thought_BNJS.shape[:3], *talking_RKD.shape[1:])
        hidden_BJKD = at_positions(prefix.hidden_BTD, ahead_BJK)
        # Without a mixing head and a next-token loss, nothing learns from this prediction.
        learns = torch.is_grad_enabled() and not (config.mix == "none" and config.nll_weight == 0)
        with torch.set_grad_enabled(learns):
            log_prob_BNJK, weight_BNJK = mixed_log_probs(
                head, self.mixing, config.mix, hidden_BJKD, without_BJK, with_BNJKD, target_BJK
            )
        log_prob_BNJK = log_prob_BNJK * known_BJK[:, None]
        factor_BNJ = chosen.factor_BJ[:, None].to(log_prob_BNJK.dtype)
        share_BNJK = factor_BNJ[..., None] * known_BJK[:, None] * self._counted(log_prob_BNJK)
        nll_K = -(log_prob_BNJK * share_BNJK).sum((0, 1, 2)) / counts.lookahead_K
        loss = config.nll_weight * nll_K.mean()
        average_BT = without_BT if drawn.baseline_BT is None else drawn.baseline_BT
        average_BJK = at_positions(average_BT, ahead_BJK) * known_BJK
        gained = rewards(config.baseline, average_BJK, log_prob_BNJK, config.advantages)
        factor_BNJ = factor_BNJ * at_positions(targets.reinforced_BT, chosen.position_BJ)[:, None]
        withheld_BNJ = self._withheld(gained.advantage_BNJ * factor_BNJ, thought_BNJS)
        if withheld_BNJ is not None:
            allowed_BNJ = gained.advantage_BNJ.masked_fill(withheld_BNJ, 0)
            gained = replace(gained, advantage_BNJ=allowed_BNJ)
        reinforced = reinforce(
            head, (gained.advantage_BNJ * factor_BNJ).flatten(), thinking_RSD,
            thought_BNJS.flatten(0, 2), drawn.old_log_prob_RS, marks, config,
        ) / counts.reinforced  # fmt: skip
        loss = loss + config.reinforce_weight * reinforced
        kl, base_nll = self._from_reference(chosen, targets, drawn, thinking_RSD)
        if kl is not None and config.thought_kl_weight > 0:
            loss = loss + config.thought_kl_weight * kl
        if self.gate is not None:
            gain_BJ = (log_prob_BNJK - without_BJK[:, None]).detach()[..., 0].mean(1)
            expected_BJ = self.gate(hidden_BJKD[:, :, 0].detach())
            error_BJ = (expected_BJ - gain_BJ) ** 2 * known_BJK[..., 0]
            loss = loss + config.gate_weight * (error_BJ * chosen.factor_BJ).sum() / counts.gated
        return Learned(
            loss,
            nll_K.detach(),
            reinforced.detach(),
            (gained.reward_BNJ * factor_BNJ).sum() / counts.reinforced,
            ((gained.advantage_BNJ > 0) * factor_BNJ).sum() / counts.reinforced,
            (weight_BNJK.detach() * share_BNJK).sum() / counts.lookahead_K.sum(),
            log_prob_BNJK.detach(),
            weight_BNJK.detach(),
            None if withheld_BNJ is None else (withheld_BNJ * factor_BNJ).sum() / counts.reinforced,
            None if kl is None else kl.detach(),
            base_nll,
        )  # fmt: skip

    def _from_reference(
        self, chosen: Positions, targets: Targets, drawn: Drawn, thinking_RSD: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Return the means of `reference.Compared` over a chunk of positions, in nats per token.

        None without a reference. Without the loss, no gradient is computed.
        """
        config, marks = self.quiet_config, self.marks
        if drawn.reference is None or config.thought_tokens == 0:
            return None, None
        with torch.set_grad_enabled(torch.is_grad_enabled() and config.thought_kl_weight > 0):
            found = compared(
                language_head(self.base), thinking_RSD, drawn.thought_BNJS, chosen.position_BJ,
                drawn.reference, marks, config.temperature,
            )  # fmt: skip
        known_BJ = at_positions(targets.next_BT, chosen.position_BJ) != IGNORED
        share_BJ = chosen.factor_BJ.to(found.kl_BNJ.dtype) * known_BJ / targets.counts.gated
        return (found.kl_BNJ.mean(1) * share_BJ).sum(), (found.nll_BNJ.mean(1) * share_BJ).sum()

    def _withheld(self, advantage_BNJ: Tensor, thought_BNJS: Tensor) -> Tensor | None:
        """Return which thoughts lose their positive advantage, because a check flags them.

        None without checks, and in an evaluation.
        """
        if self.thought_filter is None or not self.training:
            return None
        return self.thought_filter.flagged(thought_BNJS, advantage_BNJ > 0, self.marks.end)

"""The model as it was at the start of training, to which the thoughts are compared.

The divergence of the thoughts from it keeps them readable (`thought_kl_weight`), and their
log-probability under it measures how readable they are.

Shapes: B texts, T text tokens, N thoughts per position, J positions, S thought tokens, R rows
(B N J, in this order), D hidden width, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.losses import divergence, thought_scores
from selftaught.quiet.moving_average import free_bytes
from selftaught.quiet.next_token import ThinkingModel
from selftaught.quiet.swapped import swapped
from selftaught.quiet.thought_ends import content_lengths, sampled_tokens
from selftaught.quiet.thoughts import Head, Prefix, SpecialTokens, language_head, read, talk


@dataclass(frozen=True)
class Reference:
    """A frozen model that reads the same texts and thoughts as the trained one.

    It reads a text, the start token of a thought and the thought. The embedding of the start token
    is that at the start of training: that of `initial_text` for a new model.
    """

    base: PreTrainedModel
    """The model whose weights are replaced while the reference is used."""
    marks: SpecialTokens
    """The special tokens, with the offsets of their embeddings at the start of training."""
    weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Weights of the reference by name. Weights that are not here are those of `base`."""
    every: int = 1
    """Number of optimizer steps between comparisons in training. With `thought_kl_weight`, thoughts
    are compared at every step."""

    @classmethod
    def frozen(cls, model: ThinkingModel, every: int = 1) -> "Reference":
        """Return the reference with the present weights of a model, which is then trained.

        Only trained weights are copied. With a LoRA adapter these are the adapter's, which change
        nothing at the start of training, so the reference is the base model without the adapter.

        Raises:
            ValueError: the memory is too small for the copy; says how many bytes it needs.
        """
        check_memory(model.base)
        copies = {name: one.detach().clone() for name, one in _trained(model.base)}
        return cls(model.base, _fixed(model.marks), copies, every)

    @classmethod
    def other(cls, model: ThinkingModel) -> "Reference":
        """Return the reference that is another model, which is not trained."""
        return cls(model.base, _fixed(model.marks))

    def within(self, model: ThinkingModel) -> "Reference":
        """Return the same reference for another model with the same weights by name."""
        device, marks = model.base.device, self.marks
        if marks.moved_2D is not None:
            marks = replace(marks, moved_2D=marks.moved_2D.to(device))
        weights = {name: one.to(device) for name, one in self.weights.items()}
        return replace(self, base=model.base, marks=marks, weights=weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context manager: the model is the reference, without gradients and without dropout."""
        base, learning = self.base, self.base.training
        base.eval()
        try:
            with swapped(base, self.weights), torch.no_grad(), thoughtful(base):
                yield
        finally:
            base.train(learning)

    def read(self, ids_BT: Tensor, mask_BT: Tensor | None) -> "Read":
        """Read texts; see `thoughts.read`."""
        with self.applied():
            return Read(self, read(self.base, ids_BT, mask_BT))


@dataclass(frozen=True)
class Read:
    """Texts that a reference has read."""

    reference: Reference
    prefix: Prefix

    @torch.no_grad()
    def scores(self, position_BJ: Tensor, thought_BNJS: Tensor) -> Tensor:
        """Return the logits of the tokens of thoughts, `[R, S, V]`; see `losses.thought_scores`.

        Args:
            position_BJ: positions of the thoughts.
            thought_BNJS: token ids of the thoughts.
        """
        one = self.reference
        with one.applied():
            hidden_RSD, _ = talk(one.base, self.prefix, position_BJ, thought_BNJS, 1, one.marks)
            return thought_scores(language_head(one.base), hidden_RSD, one.marks)

    def neg_log_probs(self, position_BJ: Tensor, thought_BNJS: Tensor) -> Tensor:
        """Return the negative log-probability per token of each thought in nats, `[B, N, J]`.

        It is the mean over the tokens before the end token. The arguments are those of `scores`.
        """
        log_prob_RSV = self.scores(position_BJ, thought_BNJS).log_softmax(-1)
        return _nats(log_prob_RSV, thought_BNJS, self.reference.marks)


@dataclass(frozen=True)
class Compared:
    """How far thoughts are from a reference, per token of each thought, `[B, N, J]`."""

    kl_BNJ: Tensor
    """Mean KL divergence of the distribution of a thought's tokens from the reference, in nats."""
    nll_BNJ: Tensor
    """Mean negative log-probability of a thought's tokens under the reference, in nats."""


def compared(
    head: Head,
    hidden_RSD: Tensor,
    thought_BNJS: Tensor,
    position_BJ: Tensor,
    told: Read,
    marks: SpecialTokens,
    temperature: float,
) -> Compared:
    """Compare the distribution of the tokens of thoughts with that of a reference.

    The divergence at a token is exact, a sum over the vocabulary. Summed over the sampled tokens of
    a thought, it is an unbiased estimate of the divergence of the distribution of whole thoughts.
    Its gradient is that at given thoughts: it leaves out that other weights sample other thoughts.

    Args:
        head: maps hidden states of the trained model to logits.
        hidden_RSD: hidden states that predict the tokens of the thoughts.
        thought_BNJS: token ids of the thoughts.
        position_BJ: positions of the thoughts.
        told: the texts, read by the reference.
        marks: the special tokens of the trained model.
        temperature: sampling temperature of the thoughts, which both distributions have. 0 is
            replaced by 1.
    """
    reference_RSV = told.scores(position_BJ, thought_BNJS)
    log_q_RSV = tempered_RSV = reference_RSV.log_softmax(-1)
    scores_RSV = thought_scores(head, hidden_RSD, marks)
    if temperature not in (0, 1):
        tempered_RSV = (reference_RSV / temperature).log_softmax(-1)
        scores_RSV = scores_RSV / temperature
    kl_RS = divergence(scores_RSV, tempered_RSV)
    if marks.may_end:
        sampled_RS = sampled_tokens(thought_BNJS, marks.end).flatten(0, 2)
        kl_R = kl_RS.masked_fill(~sampled_RS, 0).sum(-1) / sampled_RS.sum(-1)
    else:
        kl_R = kl_RS.mean(-1)
    nll_BNJ = _nats(log_q_RSV, thought_BNJS, marks)
    return Compared(kl_R.view(nll_BNJ.shape), nll_BNJ)


def _nats(log_prob_RSV: Tensor, thought_BNJS: Tensor, marks: SpecialTokens) -> Tensor:
    """Return the mean negative log-probability of the tokens before the end, `[B, N, J]`."""
    thought_RS1 = thought_BNJS.flatten(0, 2)[..., None]
    log_prob_RS = log_prob_RSV.gather(-1, thought_RS1)[..., 0]
    nll_BNJS = -log_prob_RS.view(thought_BNJS.shape)
    if not marks.may_end:
        return nll_BNJS.mean(-1)
    length_BNJ = content_lengths(thought_BNJS, marks.end)
    slot_S = torch.arange(thought_BNJS.shape[-1], device=thought_BNJS.device)
    inside_BNJS = slot_S < length_BNJ[..., None]
    return nll_BNJS.masked_fill(~inside_BNJS, 0).sum(-1) / length_BNJ.clamp(min=1)


def reference_bytes(base: nn.Module) -> int:
    """Return the memory of the frozen copy of a model's trained weights in bytes."""
    return sum(one.numel() * one.dtype.itemsize for _, one in _trained(base))


def check_memory(base: nn.Module) -> None:
    """Check that the frozen copy of a model fits into the free memory of its device.

    Raises:
        ValueError: it does not; the message says how many bytes it needs and how many are free.
    """
    needed, device = reference_bytes(base), next(base.parameters()).device
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            "thought_kl_weight and perplexity_steps keep a copy of the trained weights as they were at "
            f"the start of training, which needs {needed:,} bytes ({needed / 2**30:.1f} GiB); {free:,} "
            f"bytes are free on {device}. Train an adapter (--use-peft), whose copy is small, or set both to 0."
        )


def _fixed(marks: SpecialTokens) -> SpecialTokens:
    """Return the special tokens with a copy of their offsets."""
    moved_2D = marks.moved_2D
    return replace(marks, moved_2D=None if moved_2D is None else moved_2D.detach().clone())


def _trained(base: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, one) for name, one in base.named_parameters() if one.requires_grad)

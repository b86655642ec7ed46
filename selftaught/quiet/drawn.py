"""The thoughts of a batch in training: sampling them, and what their rewards are compared with.

Shapes: B texts, T text tokens, N thoughts per position, J positions, S thought tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from selftaught.quiet.chunks import positions_per_chunk
from selftaught.quiet.config import SAMPLED_AT_ONCE, QuietConfig
from selftaught.quiet.positions import Positions
from selftaught.quiet.reference import Read
from selftaught.quiet.thought_ends import sampled_tokens
from selftaught.quiet.thoughts import Prefix, SpecialTokens, at_positions, language_head, think


@dataclass(frozen=True)
class Drawn:
    """Thoughts at the positions that think."""

    thought_BNJS: Tensor
    """Token ids of the thoughts."""
    old_log_prob_BNJS: Tensor | None = None
    """Log-probabilities of the tokens under the weights that sampled them. None: those of the
    current weights."""
    entropy: Tensor | None = None
    """Mean negative log-probability of the sampled tokens. None for given thoughts."""
    length: Tensor | None = None
    """Mean number of sampled tokens per thought. None if all thoughts have the same length, or for
    given thoughts."""
    baseline_BT: Tensor | None = None
    """Log-probability of each next token without a thought that a reward is the gain over. None:
    that of the current weights."""
    reference: Read | None = None
    """The texts, read by the reference to which thoughts are compared. None: there is none."""

    @property
    def old_log_prob_RS(self) -> Tensor | None:
        """`old_log_prob_BNJS` as one row per thought."""
        old = self.old_log_prob_BNJS
        return None if old is None else old.flatten(0, 2)

    def part(self, chunk: slice) -> "Drawn":
        """Return the thoughts of a chunk of the positions."""
        old = self.old_log_prob_BNJS
        old = None if old is None else old[:, :, chunk]
        return replace(self, thought_BNJS=self.thought_BNJS[:, :, chunk], old_log_prob_BNJS=old)


def given_thoughts(thought_BNTS: Tensor, old_BNTS: Tensor | None, position_BJ: Tensor) -> Drawn:
    """Return the given thoughts at the positions that think.

    Args:
        thought_BNTS: token ids of thoughts at every position of the text.
        old_BNTS: log-probabilities of their tokens when they were sampled.
        position_BJ: positions that think.
    """
    position_BX = position_BJ.expand(len(thought_BNTS), -1)

    def at(tensor_BNTS: Tensor) -> Tensor:
        return at_positions(tensor_BNTS.transpose(1, 2), position_BX).transpose(1, 2)

    return Drawn(at(thought_BNTS), None if old_BNTS is None else at(old_BNTS))


def draw_thoughts(
    base: PreTrainedModel,
    config: QuietConfig,
    marks: SpecialTokens,
    prefix: Prefix,
    chosen: Positions,
    generator: torch.Generator,
) -> Drawn:
    """Sample thoughts for every position.

    Args:
        base: the base model, inside `thoughtful(base)`.
        config: options of Quiet-STaR.
        marks: the special tokens.
        prefix: the texts.
        chosen: positions that think.
        generator: source of the random numbers.
    """
    texts, length = prefix.ids_BT.shape
    shape = (texts, length, config.thoughts, config.thought_tokens)
    position_BJ = chosen.position_BJ
    uniform_BTNS = torch.rand(shape, generator=generator).to(position_BJ.device)
    head, thoughts, neg_log_probs = language_head(base), [], []
    # Without gradients, only keys, values and logits of the current token are in memory.
    wide = SAMPLED_AT_ONCE * positions_per_chunk(base, config, texts)
    for position_BC in position_BJ.split(wide, 1):
        uniform_BNCS = at_positions(uniform_BTNS, position_BC).transpose(1, 2)
        sampled = think(base, head, prefix, position_BC, uniform_BNCS, marks, config.temperature)
        thoughts.append(sampled.thought_BNJS)
        neg_log_probs.append(sampled.neg_log_prob_BNJS)
    thought_BNJS, neg_log_prob_BNJS = torch.cat(thoughts, 2), torch.cat(neg_log_probs, 2)
    if not config.thought_tokens:
        return Drawn(thought_BNJS)
    if not marks.may_end:
        return Drawn(thought_BNJS, entropy=chosen.mean_of(neg_log_prob_BNJS))
    # Slots after a sampled end token contain 0.
    tokens_BNJ = sampled_tokens(thought_BNJS, marks.end).sum(-1)
    length = chosen.mean_of(tokens_BNJ[..., None].double())
    surprise = chosen.mean_of(neg_log_prob_BNJS.sum(-1, keepdim=True))
    entropy = None if surprise is None or length is None else surprise / length
    return Drawn(thought_BNJS, entropy=entropy, length=length)

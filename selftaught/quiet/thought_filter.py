"""Thoughts that a check flags get no positive advantage in training.

REINFORCE then never makes a flagged thought more likely. Its other losses do not change: a flagged
thought that was sampled still stands before the text whose next tokens are predicted.

Shapes: B texts, N thoughts per position, J positions, S thought tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from selftaught.quiet.thought_ends import content_lengths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Flagging = Callable[[Sequence[str]], Sequence[bool]]
"""Returns for every text whether it is flagged."""


@dataclass(frozen=True)
class ThoughtFilter:
    """Decides which thoughts of a batch are flagged."""

    tokenizer: "PreTrainedTokenizerBase"
    flagging: Flagging
    key: str
    """A hash of the checks, part of the hash of a training."""

    def flagged(self, thought_BNJS: Tensor, asked_BNJ: Tensor, end: int) -> Tensor:
        """Return which thoughts are flagged, `[B, N, J]`.

        Args:
            thought_BNJS: token ids of the thoughts.
            asked_BNJ: which thoughts are checked. The others count as not flagged.
            end: id of the end token, at which a thought ends.
        """
        rows = thought_BNJS[asked_BNJ]
        lengths = content_lengths(rows, end).tolist()
        ids = [row[:length] for row, length in zip(rows.tolist(), lengths, strict=True)]
        texts = [str(self.tokenizer.decode(one, clean_up_tokenization_spaces=False)) for one in ids]
        found = torch.zeros_like(asked_BNJ)
        if texts:
            known = dict.fromkeys(texts, False)
            known |= dict(zip(known, self.flagging(list(known)), strict=True))
            values = [known[text] for text in texts]
            found[asked_BNJ] = torch.tensor(values, device=found.device)
        return found

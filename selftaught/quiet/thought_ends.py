"""Thoughts that end themselves: the end token is sampled before the maximum length.

All thoughts of a batch have S slots. A thought that ends itself has its content, the end token, and
the end token again in all later slots, which are not part of it. The forward passes put everything
that follows a thought directly after its own end token, and filler tokens at the end of the row,
where causal attention hides them. So a thought has the same positions and the same attention as in
a forward pass of its tokens alone.

Shapes: R rows (one thought each), S slots of a thought, U tokens of a row, K lookahead tokens, D
hidden width; `...` any leading dimensions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def content_lengths(thought_S: Tensor, end: int) -> Tensor:
    """Return the number of tokens before the first end token of each thought, `[...]`.

    Args:
        thought_S: token ids of the thoughts, `[..., S]`.
        end: id of the end token.
    """
    return ((thought_S == end).cumsum(-1) == 0).sum(-1)


def sampled_tokens(thought_S: Tensor, end: int) -> Tensor:
    """Return which slots contain a sampled token, `[..., S]`.

    These are the content and the end token that the model sampled. A thought of maximum length
    has no sampled end token.

    Args:
        thought_S: token ids of the thoughts, `[..., S]`.
        end: id of the end token.
    """
    slot_S = torch.arange(thought_S.shape[-1], device=thought_S.device)
    return slot_S <= content_lengths(thought_S, end)[..., None]


def compacted(ids_RU: Tensor, length_R: Tensor, slots: int) -> Tensor:
    """Remove the unused slots of thoughts, and fill the rows at their end, `[R, U]`.

    Args:
        ids_RU: start token, `slots` slots of a thought, end token and lookahead tokens.
        length_R: content length of each thought.
        slots: number of slots of a thought (S).
    """
    at_U = torch.arange(ids_RU.shape[1], device=ids_RU.device)
    removed_RU = (at_U > length_R[:, None]) * (slots - length_R[:, None])
    return ids_RU.gather(1, (at_U + removed_RU).clamp(max=ids_RU.shape[1] - 1))


def after_ends(hidden_RUD: Tensor, length_R: Tensor, lookahead: int) -> Tensor:
    """Return the hidden states at the end token and the tokens after it, `[R, K, D]`.

    Args:
        hidden_RUD: hidden states of compacted rows.
        length_R: content length of each thought.
        lookahead: number of tokens to predict (K).
    """
    ahead_K = torch.arange(1, lookahead + 1, device=hidden_RUD.device)
    at_RK1 = (length_R[:, None] + ahead_K)[..., None]
    return hidden_RUD.gather(1, at_RK1.expand(-1, -1, hidden_RUD.shape[-1]))


@dataclass
class Endings:
    """Which thoughts have ended while thoughts are sampled, and the states at their end tokens."""

    end: int
    """Id of the end token."""
    ended_R: Tensor
    """Thoughts whose end token was sampled."""
    read_R: Tensor
    """Thoughts whose end token was read by the model, too."""
    hidden_RD: Tensor | None = None
    """Hidden states at the end tokens that were read."""

    @classmethod
    def none(cls, rows: int, end: int, device: torch.device) -> "Endings":
        """Return the state before the first token: no thought has ended."""
        no_R = torch.zeros(rows, dtype=torch.bool, device=device)
        return cls(end, no_R, no_R)

    @property
    def all_read(self) -> bool:
        """Whether all thoughts have ended, so that no further pass is needed."""
        return bool(self.read_R.all())

    def read(self, hidden_RD: Tensor) -> None:
        """Store the hidden states at the last tokens, where they are sampled end tokens."""
        new_R1 = (self.ended_R & ~self.read_R)[:, None]
        old_RD = torch.zeros_like(hidden_RD) if self.hidden_RD is None else self.hidden_RD
        self.hidden_RD, self.read_R = torch.where(new_R1, hidden_RD, old_RD), self.ended_R

    def sampled(self, ids_R: Tensor, neg_log_prob_R: Tensor) -> tuple[Tensor, Tensor]:
        """Replace tokens after an end token by the end token, with log-probability 0."""
        ids_R = ids_R.masked_fill(self.ended_R, self.end)
        neg_log_prob_R = neg_log_prob_R.masked_fill(self.ended_R, 0)
        self.ended_R = ids_R == self.end
        return ids_R, neg_log_prob_R

    def last(self, hidden_R2D: Tensor) -> Tensor:
        """Return the hidden states at the end tokens of all thoughts, `[R, D]`.

        Args:
            hidden_R2D: hidden states of the last sampled token, and of an end token after it.
        """
        own_R1 = self.ended_R[:, None]
        assert self.hidden_RD is not None
        after_RD = torch.where(own_R1, hidden_R2D[:, 0], hidden_R2D[:, 1])
        return torch.where(self.read_R[:, None], self.hidden_RD, after_RD)

"""Log-likelihoods of continuations after contexts, with thoughts before the continuation only.

`evaluation.score` thinks at every position of a text. Here, the context is read without thoughts,
and the model thinks before the tokens of the continuation. The values are the same.

Shapes: B rows, T text tokens, J scored positions of a row, N thoughts, S thought tokens, D hidden
width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.evaluation import AT_ONCE
from selftaught.quiet.gating import GREEDY, ThoughtParams, wanted
from selftaught.quiet.model import QuietLM
from selftaught.quiet.next_token import mixed_at
from selftaught.quiet.spans import padded
from selftaught.quiet.thoughts import at_positions, language_head, read
from selftaught.quiet.where import matcher_of


@dataclass(frozen=True)
class Continuation:
    """A text of which the last tokens are scored."""

    ids: tuple[int, ...]
    """Token ids of the context and of the continuation."""
    scored: int
    """Number of tokens of the continuation."""

    def __post_init__(self) -> None:
        if not 0 < self.scored < len(self.ids):
            raise ValueError(
                "Expected a continuation of at least one token after a context of at least one, got "
                f"{self.scored} of {len(self.ids)} tokens."
            )


@dataclass(frozen=True)
class Likelihood:
    """How likely a continuation is."""

    log_prob: float
    """Log-probability of the continuation in nats, summed over its tokens."""
    greedy: bool
    """Whether every token is the most likely one."""


@dataclass(frozen=True)
class _Row:
    """Continuations that differ in their last token or in their number of scored tokens."""

    read: tuple[int, ...]
    """The text without its last token."""
    scored: int
    """Largest number of scored tokens."""
    members: tuple[int, ...]
    """Indices of the continuations."""


@torch.no_grad()
def score_continuations(
    model: QuietLM,
    continuations: Sequence[Continuation],
    how: ThoughtParams = GREEDY,
    *,
    batch_size: int = 8,
    on_scored: Callable[[int, Likelihood], object] | None = None,
) -> list[Likelihood]:
    """Return the log-likelihoods of continuations under the mixed predictions.

    A token's log-probability is that of `evaluation.score` for the text alone, so results do not
    depend on the batch, also with sampled thoughts. Continuations that differ in their last token
    only, such as the letters of a multiple-choice question, share one row of a batch.

    Args:
        model: a Quiet-STaR model.
        continuations: the continuations.
        how: how the model thinks. Default: one greedy thought at every scored position.
        batch_size: number of rows per forward pass.
        on_scored: called with the index of every continuation and its likelihood after its batch.

    Raises:
        ValueError: a text with a thought is longer than the model's context, or `batch_size` is
            below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    learning = model.training
    model.eval()
    found: dict[int, Likelihood] = {}
    rows = _rows(continuations)
    for first in range(0, len(rows), batch_size):
        batch = rows[first : first + batch_size]
        for index, likelihood in _scored(model, batch, continuations, how):
            found[index] = likelihood
            if on_scored:
                on_scored(index, likelihood)
    model.train(learning)
    return [found[index] for index in range(len(continuations))]


def _rows(continuations: Sequence[Continuation]) -> list[_Row]:
    """Group continuations by the tokens that are read, and put rows of similar lengths together."""
    members: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(continuations):
        members.setdefault(one.ids[:-1], []).append(index)
    rows = [
        _Row(ids, max(continuations[index].scored for index in indices), tuple(indices))
        for ids, indices in members.items()
    ]
    return sorted(rows, key=lambda row: (-row.scored, -len(row.read)))


def _scored(
    model: QuietLM,
    rows: Sequence[_Row],
    continuations: Sequence[Continuation],
    how: ThoughtParams,
) -> Iterator[tuple[int, Likelihood]]:
    """Yield indices and likelihoods of the continuations of some rows."""
    ids_BT, mask_BT = (one.to(model.base.device) for one in padded([r.read for r in rows], 0))
    model.check_length(ids_BT, mask_BT)
    predicted = _predictions(model, ids_BT, mask_BT, torch.tensor([r.scored for r in rows]), how)
    for row, log_prob_J, best_J, last_V in zip(rows, *predicted, strict=True):
        best_last = int(last_V.argmax())
        for index in row.members:
            token, scored = continuations[index].ids[-1], continuations[index].scored
            before = slice(len(log_prob_J) - scored, len(log_prob_J) - 1)
            yield (
                index,
                Likelihood(
                    float(log_prob_J[before].double().sum() + last_V[token].double()),
                    bool(best_J[before].all()) and best_last == token,
                ),
            )


def _predictions(
    model: QuietLM, ids_BT: Tensor, mask_BT: Tensor, scored_B: Tensor, how: ThoughtParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the token after each of the last positions of each row.

    Args:
        model: a Quiet-STaR model.
        ids_BT: token ids, padded on the right.
        mask_BT: 1 for text and 0 for padding.
        scored_B: number of positions to predict after.
        how: how the model thinks.

    Returns:
        Log-probability of the next token of the text and whether it is the most likely one, both
        `[B, J]` and aligned on the right, and the log-probabilities after the last position,
        `[B, V]`. The last column of the first two has no meaning, because no token follows.
    """
    length_B1 = mask_BT.sum(1, keepdim=True)
    columns = int(scored_B.max())
    column_J = torch.arange(columns, device=ids_BT.device)
    position_BJ = (length_B1 - columns + column_J).clamp(min=0)
    next_BJ = at_positions(ids_BT, (position_BJ + 1).minimum(length_B1 - 1))
    log_prob_BJ = torch.zeros(position_BJ.shape, device=ids_BT.device)
    best_BJ, thinks_BJ = torch.zeros_like(log_prob_BJ).bool(), torch.zeros_like(log_prob_BJ).bool()
    last_BV = torch.empty(0)
    matcher = matcher_of(how.think_when, model.quiet_config)
    matches_BJ = None
    if matcher is not None:
        matches_BJ = at_positions(matcher.masks(ids_BT, mask_BT), position_BJ)
    with thoughtful(model.base):
        prefix = read(model.base, ids_BT, mask_BT)
        for column_C in column_J.split(AT_ONCE):
            hidden_BCD = at_positions(prefix.hidden_BTD, position_BJ[:, column_C])
            before_BCV = language_head(model.base)(hidden_BCD).float().log_softmax(-1)
            matches_BC = None if matches_BJ is None else matches_BJ[:, column_C]
            thinks_BJ[:, column_C] = wanted(
                model.gate, how.think_when, hidden_BCD, before_BCV, matches_BC
            )
            next_BC, last_BV = next_BJ[:, column_C], before_BCV[:, -1]
            log_prob_BJ[:, column_C] = before_BCV.gather(2, next_BC[..., None])[..., 0]
            best_BJ[:, column_C] = before_BCV.argmax(-1) == next_BC
        thinks_BJ &= column_J >= columns - scored_B.to(ids_BT.device)[:, None]
        uniform_BJNS = _uniform(model, position_BJ, length_B1[:, 0].tolist(), how)
        for column_BC in _thinking_columns(thinks_BJ):
            position_BC, next_BC = (at_positions(one, column_BC) for one in (position_BJ, next_BJ))
            hidden_BCD = at_positions(prefix.hidden_BTD, position_BC)
            uniform_BNCS = at_positions(uniform_BJNS, column_BC).transpose(1, 2)
            matches_BC = None if matches_BJ is None else at_positions(matches_BJ, column_BC)
            mixed_BCV = mixed_at(
                model, prefix, hidden_BCD, position_BC, uniform_BNCS, how, matches_BC
            ).mixed_BJV
            log_prob_BJ.scatter_(1, column_BC, mixed_BCV.gather(2, next_BC[..., None])[..., 0])
            best_BJ.scatter_(1, column_BC, mixed_BCV.argmax(-1) == next_BC)
            for row, place in (column_BC == columns - 1).nonzero().tolist():
                last_BV[row] = mixed_BCV[row, place]
    return log_prob_BJ, best_BJ, last_BV


def _uniform(
    model: QuietLM, position_BJ: Tensor, lengths: Sequence[int], how: ThoughtParams
) -> Tensor:
    """Return the random numbers of the thoughts, `[B, J, N, S]`.

    Each row has those that `evaluation.score` takes for its text alone.
    """
    rows = []
    for length, position_J in zip(lengths, position_BJ.cpu(), strict=True):
        shape = (length, how.thoughts, model.quiet_config.thought_tokens)
        draw = torch.Generator().manual_seed(how.seed)
        rows.append(torch.rand(shape, generator=draw)[position_J])
    return torch.stack(rows).to(position_BJ.device)


def _thinking_columns(thinks_BJ: Tensor) -> Sequence[Tensor]:
    """Return the columns where each row thinks, in chunks of `[B, AT_ONCE]`.

    Rows that think less often than another one are filled with other columns, for which `mixed_at`
    returns the prediction without a thought, or which are not scored.
    """
    most = int(thinks_BJ.sum(1).max())
    if most == 0:
        return []
    column_BJ = thinks_BJ.int().argsort(dim=1, descending=True, stable=True)
    return column_BJ[:, :most].split(AT_ONCE, 1)

"""Evaluation of a Quiet-STaR model: loss on texts without and with thoughts, as in generation.

The mixture is normalized and thoughts are greedy by default. In training, thoughts are sampled, and
the paper's mixture of log-probabilities is not normalized.

Shapes: B texts, T text tokens, J positions, N thoughts, S thought tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.gating import GREEDY, ThoughtParams
from selftaught.quiet.intervals import ratio_interval
from selftaught.quiet.legibility import Legibility, ThoughtRows, legibility, rows_of
from selftaught.quiet.model import QuietLM
from selftaught.quiet.next_token import Mixed, mixed_at
from selftaught.quiet.reference import Reference
from selftaught.quiet.spans import padded
from selftaught.quiet.thoughts import at_positions, read
from selftaught.quiet.where import matcher_of

DECILES = 10
AT_ONCE = 32
"""Number of positions that are scored at the same time."""


@dataclass(frozen=True)
class Scored:
    """Predictions of the next tokens of texts. Log-probabilities are in nats, `[B, T - 1]`."""

    without_BT: Tensor
    """Log-probability of the true token without thoughts."""
    with_BT: Tensor
    """Log-probability of the true token with thoughts. Equal to `without_BT` where the model does
    not think."""
    each_BNT: Tensor
    """Log-probability of the true token with each single thought, `[B, N, T - 1]`."""
    weight_BNT: Tensor
    """Mixing weight of each thought, 0 where the model does not think."""
    thought_BNTS: Tensor
    """Token ids of the thoughts."""
    thinks_BT: Tensor
    """Whether the model thinks at the position."""
    top_without: Tensor | None
    """Most likely next tokens without thoughts, ids and then probabilities, `[2, B, T - 1, top]`.
    None if `top` is 0."""
    top_with: Tensor | None
    """The same with thoughts."""


@torch.no_grad()
def score(
    model: QuietLM,
    ids_BT: Tensor,
    mask_BT: Tensor | None = None,
    how: ThoughtParams = GREEDY,
    *,
    top: int = 0,
    **changes: Any,
) -> Scored:
    """Predict every next token of a batch of texts without and with a thought before it.

    Args:
        model: a Quiet-STaR model.
        ids_BT: token ids of the texts.
        mask_BT: 1 for text and 0 for padding. None means no padding.
        how: how the model thinks. Default: one greedy thought where the model was trained to think.
        top: number of most likely next tokens to return.
        changes: fields of `ThoughtParams` by name. They take precedence over `how`.

    Raises:
        ValueError: the texts with a thought are longer than the model's context, several thoughts
            at temperature 0, or a rule that reads the text without a tokenizer.
    """
    how = replace(how, **changes)
    return _joined([
        _scored(ids_BT, position_BJ, at, top)
        for position_BJ, at in predictions(model, ids_BT, mask_BT, how)
    ])  # fmt: skip


@torch.no_grad()
def predictions(
    model: QuietLM,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    how: ThoughtParams,
    position_1J: Tensor | None = None,
) -> Iterator[tuple[Tensor, Mixed]]:
    """Yield positions of the texts, `[1, J]`, and the predictions of the token after each.

    All positions except the last come in ascending order, `AT_ONCE` at a time: the predictions are
    over the whole vocabulary. With `position_1J`, only these positions come, with the same results.
    The other arguments are those of `score`.
    """
    model.check_length(ids_BT, mask_BT)
    matcher = matcher_of(how.think_when, model.quiet_config)
    matches_BT = None if matcher is None else matcher.masks(ids_BT, mask_BT)
    learning = model.training
    model.eval()
    texts, length = ids_BT.shape
    shape = (texts, length - 1, how.thoughts, model.quiet_config.thought_tokens)
    draw = torch.Generator().manual_seed(how.seed)
    uniform_BTNS = torch.rand(shape, generator=draw).to(ids_BT.device)
    with thoughtful(model.base):
        prefix = read(model.base, ids_BT, mask_BT)
    try:
        if position_1J is None:
            position_1J = torch.arange(length - 1, device=ids_BT.device)[None]
        for position_BJ in position_1J.split(AT_ONCE, 1):
            uniform_BNJS = at_positions(uniform_BTNS, position_BJ).transpose(1, 2)
            matches_BJ = None if matches_BT is None else matches_BT[:, position_BJ[0]]
            hidden_BJD = at_positions(prefix.hidden_BTD, position_BJ)
            with thoughtful(model.base):
                at = mixed_at(model, prefix, hidden_BJD, position_BJ, uniform_BNJS, how, matches_BJ)
            yield position_BJ, at
    finally:
        model.train(learning)


def _scored(ids_BT: Tensor, position_BJ: Tensor, at: Mixed, top: int) -> Scored:
    """Return what is kept of the predictions at some positions."""
    target_BJ1 = at_positions(ids_BT, position_BJ + 1)[..., None]
    each_target_BJN1 = target_BJ1[:, :, None].expand(-1, -1, at.each_BJNV.shape[2], -1)
    return Scored(
        without_BT=at.before_BJV.gather(2, target_BJ1)[..., 0],
        with_BT=at.mixed_BJV.gather(2, target_BJ1)[..., 0],
        each_BNT=at.each_BJNV.gather(3, each_target_BJN1)[..., 0].transpose(1, 2),
        weight_BNT=at.weight_BJN.transpose(1, 2),
        thought_BNTS=at.thought_BNJS,
        thinks_BT=at.thinks_BJ,
        top_without=_likeliest(at.before_BJV, top),
        top_with=_likeliest(at.mixed_BJV, top),
    )


def _likeliest(log_prob_BJV: Tensor, top: int) -> Tensor | None:
    """Return ids and probabilities of the most likely tokens, `[2, B, J, top]`; None if 0."""
    if top == 0:
        return None
    likely = log_prob_BJV.topk(top)
    return torch.stack([likely.indices.double(), likely.values.exp().double()])


def _joined(parts: Sequence[Scored]) -> Scored:
    """Join the predictions at consecutive positions."""
    joined = {}
    for one in fields(Scored):
        tensors = [getattr(part, one.name) for part in parts]
        along = 1 if one.name in ("without_BT", "with_BT", "thinks_BT") else 2
        joined[one.name] = None if tensors[0] is None else torch.cat(tensors, along)
    return Scored(**joined)


@dataclass(frozen=True)
class Measured:
    """Loss of a model on texts without and with thoughts, in nats per token."""

    tokens: int
    """Number of predicted tokens."""
    texts: int
    """Number of texts."""
    nll_without: float
    """Negative log-likelihood without thoughts."""
    nll_with: float
    """Negative log-likelihood with thoughts."""
    gain: float
    """`nll_without` minus `nll_with`."""
    gain_low: float
    """Lower end of the 95% confidence interval of the gain, over texts. NaN for a single text."""
    gain_high: float
    """Upper end of the interval."""
    weight: float
    """Mean mixing weight of the thoughts."""
    thinking: float
    """Share of positions with a thought."""
    helped: float
    """Share of tokens whose log-probability increases by more than 0.01 nats."""
    hurt: float
    """Share of tokens whose log-probability decreases by more than 0.01 nats."""
    gain_by_decile: list[float]
    """Gain in ten equally large groups of tokens, from the lowest loss without thoughts to the
    highest."""
    legibility: Legibility | None = None
    """How readable the thoughts are. None if there is no thought."""

    @property
    def gain_where_thinking(self) -> float:
        """Gain per token with a thought. The gain of other tokens is 0. NaN without thoughts."""
        return self.gain / self.thinking if self.thinking else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "Measured":
        """Return the measurement that `to_dict` has written, also in earlier versions."""
        readable = stored.get("legibility")
        found = cls(**{name: value for name, value in stored.items() if name != "legibility"})
        return replace(found, legibility=readable and Legibility(**readable))


def measure(
    model: QuietLM,
    spans: Sequence[tuple[int, Sequence[int]]],
    how: ThoughtParams = GREEDY,
    *,
    batch_size: int = 8,
    reference: Reference | None = None,
    progress: Callable[[int], object] | None = None,
    **changes: Any,
) -> Measured:
    """Measure the loss of a model on spans of texts.

    Args:
        model: a Quiet-STaR model.
        spans: spans as (number of the text, token ids). Spans of a text form one cluster for the
            confidence interval.
        how: how the model thinks. Default: one greedy thought where the model was trained to think.
        batch_size: number of spans per forward pass.
        reference: the model before training, under which the log-probability of the thoughts is
            measured; see `Reference.other`. None: it is not measured.
        progress: called with the number of spans after every batch.
        changes: fields of `ThoughtParams` by name. They take precedence over `how`.

    Raises:
        ValueError: there are no spans, or `batch_size` is below 1.
    """
    how = replace(how, **changes)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
    if not spans:
        raise ValueError("Expected spans of at least two tokens to measure, got none.")
    order = sorted(spans, key=lambda one: len(one[1]))
    rows: list[Tensor] = []
    thoughts: list[ThoughtRows] = []
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        ids, mask = (one.to(model.base.device) for one in padded([ids for _, ids in batch], 0))
        scored = score(model, ids, mask, how)
        known = mask[:, 1:].bool()
        of_text = torch.tensor([text for text, _ in batch], device=ids.device)
        rows.append(_columns(scored, of_text, known))
        thinks = scored.thinks_BT & known
        nats = None if reference is None else _nats(reference, ids, mask, scored, thinks)
        thoughts.append(rows_of(scored.thought_BNTS, thinks, of_text, nats, model.marks.end))
        if progress:
            progress(len(batch))
    return replace(_summed(torch.cat(rows, 1)), legibility=legibility(thoughts, spans))


def _nats(
    reference: Reference, ids_BT: Tensor, mask_BT: Tensor, scored: Scored, thinks_BT: Tensor
) -> Tensor:
    """Return the negative log-probability per token of each thought under the reference.

    It is `[B, N, T - 1]`, in nats; 0 at positions where no text thinks.
    """
    told, thought_BNTS = reference.read(ids_BT, mask_BT), scored.thought_BNTS
    nats_BNT = torch.zeros(thought_BNTS.shape[:3], device=ids_BT.device)
    for some_J in thinks_BT.any(0).nonzero()[:, 0].split(AT_ONCE):
        nats_BNJ = told.neg_log_probs(some_J[None], thought_BNTS[:, :, some_J])
        nats_BNT[:, :, some_J] = nats_BNJ.float()
    return nats_BNT


def measured(scored: Scored) -> Measured:
    """Return the summary of scored texts without padding."""
    known = torch.ones_like(scored.thinks_BT)
    return _summed(_columns(scored, torch.arange(len(known), device=known.device), known))


def _columns(scored: Scored, text_B: Tensor, known_BT: Tensor) -> Tensor:
    """Return five values for every token that is not padding, `[5, tokens]`.

    Number of the text, log-probability without and with thoughts, weight, whether the model thinks.
    """
    columns = (
        text_B[:, None].expand_as(known_BT), scored.without_BT, scored.with_BT,
        scored.weight_BNT.mean(1), scored.thinks_BT,
    )  # fmt: skip
    return torch.stack([column[known_BT].double() for column in columns]).cpu()


def _summed(rows: Tensor) -> Measured:
    text, without, mixed, weight, thinks = rows
    gain = mixed - without
    low, high = ratio_interval(text.long(), gain, torch.ones_like(gain))
    hard = (-without).argsort(stable=True)
    return Measured(
        tokens=len(gain),
        texts=len(text.unique()),
        nll_without=-float(without.mean()),
        nll_with=-float(mixed.mean()),
        gain=float(gain.mean()),
        gain_low=low,
        gain_high=high,
        weight=float(weight.sum() / thinks.sum().clamp(min=1)),
        thinking=float(thinks.mean()),
        helped=float((gain > 0.01).double().mean()),
        hurt=float((gain < -0.01).double().mean()),
        gain_by_decile=[float(part.mean()) for part in gain[hard].tensor_split(DECILES) if len(part)],
    )  # fmt: skip

"""The true tokens that are predicted at each position of a text, and their counts.

Shapes: B texts, T text tokens, K lookahead tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selftaught.quiet.config import BY_TEXT, QuietConfig

IGNORED = -100
"""The label of a token without loss, in torch and transformers."""


@dataclass(frozen=True)
class Counts:
    """Denominators of the means in the losses."""

    text: Tensor
    """Number of predicted text tokens."""
    lookahead_K: Tensor
    """Number of predictions with thoughts, for each lookahead token."""
    reinforced: Tensor
    """Number of thoughts in the REINFORCE loss."""
    gated: Tensor
    """Number of positions in the loss of the gate."""


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

    def counted(self, **counts: Tensor) -> "Targets":
        """Return the targets with other counts; the arguments are fields of `Counts`."""
        return replace(self, counts=replace(self.counts, **counts))


def only_at(
    targets: Targets, think_mask: Tensor | None, config: QuietConfig
) -> tuple[Targets, Tensor | None]:
    """Return targets whose losses with thoughts are means over given positions only.

    A mean does not depend on the number of positions, so a learning rate means the same for texts
    with many and with few of them. The loss without thoughts remains a mean over the whole text.

    Args:
        targets: the targets of the whole texts.
        think_mask: 1 where the model thinks, `[B, T]`. None: `config.positions` decides.
        config: options of Quiet-STaR.

    Returns:
        The targets, and which of the positions have a token to predict, `[B, T]`. Without a mask,
        the same targets and None.

    Raises:
        ValueError: the mask is missing or has another shape than the texts.
    """
    if think_mask is None:
        if config.positions in BY_TEXT:
            raise ValueError(
                f"positions={config.positions!r} needs think_mask, which says where the model "
                "thinks. Pass training_matcher(config, tokenizer).masks(input_ids, attention_mask) "
                "(from selftaught.quiet.where)."
            )
        return targets, None
    if think_mask.shape != targets.next_BT.shape:
        raise ValueError(
            f"Expected think_mask of the shape of input_ids, {list(targets.next_BT.shape)}, got "
            f"{list(think_mask.shape)}. Give one value per token."
        )
    known_BTK = (targets.lookahead_BTK != IGNORED) & think_mask.bool()[..., None]
    reinforced_BT = targets.reinforced_BT & known_BTK.any(-1)
    only = replace(targets, reinforced_BT=reinforced_BT).counted(
        lookahead_K=known_BTK.sum((0, 1)).clamp(min=1) * config.thoughts,
        reinforced=reinforced_BT.sum().clamp(min=1) * config.thoughts,
        gated=known_BTK[..., 0].sum().clamp(min=1),
    )
    return only, known_BTK.any(-1)


def text_targets(
    ids_BT: Tensor, mask_BT: Tensor | None, labels_BT: Tensor | None, config: QuietConfig
) -> Targets:
    """Return the true tokens that are predicted at each position of a batch of texts.

    Args:
        ids_BT: token ids.
        mask_BT: 1 for text and 0 for padding. None means no padding.
        labels_BT: token ids, not shifted, with `IGNORED` where there is no loss. None: `ids_BT`.
        config: options of Quiet-STaR.

    Raises:
        ValueError: labels of another shape, or no token to predict.
    """
    lookahead = config.lookahead
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
    end = ids_BT.shape[1] - lookahead - (0 if config.last_position_learns else 1)
    within_T = torch.arange(ids_BT.shape[1], device=ids_BT.device) < end
    if config.last_position_learns:
        reinforced_BT = within_T & (lookahead_BTK != IGNORED).all(-1)
    else:
        # As in the authors' code, padding is in the denominator, but has no reward.
        reinforced_BT = within_T.expand_as(ids_BT)
    counts = Counts(
        text=(lookahead_BTK[..., 0] != IGNORED).sum().clamp(min=1),
        lookahead_K=(lookahead_BTK != IGNORED).sum((0, 1)).clamp(min=1) * config.thoughts,
        reinforced=reinforced_BT.sum().clamp(min=1) * config.thoughts,
        gated=(lookahead_BTK[..., 0] != IGNORED).sum().clamp(min=1),
    )
    return Targets(lookahead_BTK[..., 0], lookahead_BTK, reinforced_BT, counts)

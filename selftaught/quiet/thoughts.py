"""Read the text, think at many positions at once, talk after each thought.

Shapes: B texts, T text tokens, N thoughts per position, J positions of a text, X any dimensions, R
rows (B N J, in this order), S sampled thought tokens, K lookahead tokens, U tokens of a row (start,
S thought tokens, end, K - 1 true tokens), D hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selftaught.quiet.attention import (
    Gradients,
    Pass,
    Reading,
    Thinking,
    layer_name,
    under,
    unsupported,
)

Head = Callable[[Tensor], Tensor]
"""From hidden states to logits."""


@dataclass(frozen=True)
class SpecialTokens:
    """The tokens around a thought."""

    start: int
    end: int
    never: tuple[int, ...]
    """What a thought never has: start, end, padding."""
    moved_2D: Tensor | None = None
    """How far the embeddings of start and end have moved from the base's."""


@dataclass(frozen=True)
class Prefix:
    """A text that was read."""

    ids_BT: Tensor
    hidden_BTD: Tensor
    key_BKTD: list[Tensor]
    value_BKTD: list[Tensor]
    position_BT: Tensor
    real_BT: Tensor | None


def input_matrix(base: PreTrainedModel) -> nn.Embedding:
    """The layer that gives the embeddings of tokens."""
    return base.get_input_embeddings()  # type: ignore[return-value]


def decoder(base: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    found = base.get_decoder()
    return base.get_submodule("model") if found is base else found  # Llama 4 names itself


def output_matrix(base: PreTrainedModel) -> nn.Linear:
    """The linear layer that gives a causal language model's logits."""
    matrix = base.get_output_embeddings()
    if matrix is None:
        raise ValueError(
            f"Expected a causal language model, got {type(base).__name__}, which has no head over "
            "a vocabulary; load it with AutoModelForCausalLM."
        )
    return matrix  # type: ignore[return-value]


def language_head(base: PreTrainedModel) -> Head:
    """The model's own way from its last hidden state to logits, for any states.

    A matrix, then what a configuration may ask for: a factor (cohere), a divisor (granite) and a
    soft cap (gemma 2).
    """
    config = vars(base.config.get_text_config())
    factor = config.get("logit_scale") or 1.0
    divisor = config.get("logits_scaling") or 1.0
    cap = config.get("final_logit_softcapping")
    matrix = output_matrix(base)

    def head(hidden: Tensor) -> Tensor:
        logits = matrix(hidden)
        if factor != 1.0 or divisor != 1.0:
            logits = logits * (factor / divisor)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    return head


def _embedded(base: PreTrainedModel, ids_RU: Tensor, marks: SpecialTokens) -> Tensor:
    """The embeddings of thoughts, with start and end where they have moved to."""
    matrix = input_matrix(base)
    embedding_RUD = matrix(ids_RU)
    if marks.moved_2D is None:
        return embedding_RUD
    # Some models (Gemma) multiply what they look up.
    moved_2D = (marks.moved_2D * getattr(matrix, "embed_scale", 1.0)).to(embedding_RUD.dtype)
    for mark, moved_D in zip((marks.start, marks.end), moved_2D, strict=True):
        embedding_RUD = torch.where((ids_RU == mark)[..., None], embedding_RUD + moved_D, embedding_RUD)  # fmt: skip
    return embedding_RUD


def _run(base: PreTrainedModel, embedding: Tensor, position: Tensor, quiet_pass: Pass) -> Tensor:
    """The last hidden states of one forward pass."""
    # With a mask of ones nothing is taken for packed texts; the pass knows what is padding.
    ones = torch.ones(position.shape, dtype=torch.long, device=position.device)
    with under(quiet_pass):
        out = decoder(base)(
            inputs_embeds=embedding, position_ids=position, attention_mask=ones, use_cache=False
        )
    return out.last_hidden_state


def read(
    base: PreTrainedModel,
    ids_BT: Tensor,
    mask_BT: Tensor | None,
    gradients: Gradients | None = None,
) -> Prefix:
    """The text's hidden states, keys and values, in one ordinary forward pass."""
    real_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    return read_on(base, ids_BT, real_BT, Reading(None, gradients=gradients))


def read_on(base: PreTrainedModel, new_BT: Tensor, mask_BT: Tensor, reading: Reading) -> Prefix:
    """The hidden states of the text's new last tokens, and the keys and values of all of it.

    `mask_BT` is of the whole text. A reading that keeps is given again with what follows.
    """
    real_BT = mask_BT.bool()
    position_BT = torch.arange(real_BT.shape[1], device=new_BT.device).expand_as(real_BT)
    if bool((real_BT[:, 1:] <= real_BT[:, :-1]).all()):
        reading.real_BT = None  # padding at the end is never seen from before it
    else:
        reading.real_BT = real_BT
        position_BT = (real_BT.long().cumsum(1) - 1).clamp(min=0)
    new_position_BT = position_BT[:, -new_BT.shape[1] :]
    hidden_BTD = _run(base, input_matrix(base)(new_BT), new_position_BT, reading)
    layers = range(base.config.get_text_config().num_hidden_layers)
    for layer in layers:
        if layer not in reading.key_BKTD:
            told = f"{layer_name(base, layer)} does not use attention that can be replaced"
            raise unsupported(base, told)
    keys = [reading.key_BKTD[layer] for layer in layers]
    values = [reading.value_BKTD[layer] for layer in layers]
    return Prefix(new_BT, hidden_BTD, keys, values, position_BT, reading.real_BT)


def _thinking(prefix: Prefix, position_BJ: Tensor, thoughts: int, *, keep: bool) -> Thinking:
    shown = int(position_BJ.max()) + 1
    return Thinking(
        prefix.key_BKTD, prefix.value_BKTD, prefix.real_BT, position_BJ, shown, thoughts, keep=keep
    )


def _row_position(
    prefix: Prefix, position_BJ: Tensor, thoughts: int, first: int, new: int
) -> Tensor:
    """The position ids of a row's tokens `first` to `first + new`: [R, new]."""
    at_BJ = at_positions(prefix.position_BT, position_BJ) + 1 + first
    at_BNJ = at_BJ[:, None].expand(-1, thoughts, -1).reshape(-1, 1)
    return at_BNJ + torch.arange(new, device=at_BNJ.device)


def at_positions(tensor_BT: Tensor, position_BX: Tensor) -> Tensor:
    """What each text has at some positions, `[B, X, ...]`; positions `[1, X]` hold for every text."""
    texts = len(tensor_BT)
    text_B = torch.arange(texts, device=tensor_BT.device)
    index_BX = position_BX.expand(texts, *position_BX.shape[1:])
    return tensor_BT[text_B.view(-1, *[1] * (index_BX.dim() - 1)), index_BX]


@torch.no_grad()
def think(
    base: PreTrainedModel,
    head: Head,
    prefix: Prefix,
    position_BJ: Tensor,
    uniform_BNJS: Tensor,
    marks: SpecialTokens,
    temperature: float,
) -> tuple[Tensor, Tensor, Thinking]:
    """Thoughts after the given positions, one forward pass per token for all: `[B, N, J, S]`.

    Each token is drawn from the model's distribution at a temperature (0: the likeliest) by
    inverting its cumulative sum at one uniform number; so a thought depends on nothing but its
    text, its position and its numbers. Also returns each token's surprise (minus its
    log-probability) and the pass, which `after_thought` continues.
    """
    thoughts, length = uniform_BNJS.shape[1], uniform_BNJS.shape[3]
    uniform_RS = uniform_BNJS.flatten(0, 2)
    thinking = _thinking(prefix, position_BJ, thoughts, keep=True)
    ids_R = torch.full((len(uniform_RS),), marks.start, device=prefix.ids_BT.device)
    thought_RS = torch.empty_like(uniform_RS, dtype=torch.long)
    surprise_RS = torch.empty_like(uniform_RS)
    for step in range(length):
        position_R1 = _row_position(prefix, position_BJ, thoughts, step, 1)
        hidden_R1D = _run(base, _embedded(base, ids_R[:, None], marks), position_R1, thinking)
        thinking.next(1)
        logits_RV = head(hidden_R1D[:, 0]).float()
        logits_RV[:, list(marks.never)] = -torch.inf
        ids_R, surprise_RS[:, step] = draw(logits_RV, uniform_RS[:, step], temperature)
        thought_RS[:, step] = ids_R
    return thought_RS.view_as(uniform_BNJS), surprise_RS.view_as(uniform_BNJS), thinking


@torch.no_grad()
def after_thought(
    base: PreTrainedModel,
    prefix: Prefix,
    position_BJ: Tensor,
    thinking: Thinking,
    thought_BNJS: Tensor,
    marks: SpecialTokens,
) -> Tensor:
    """The hidden state at the end token of thoughts just drawn: `[R, D]`."""
    thoughts, length = thought_BNJS.shape[1], thought_BNJS.shape[-1]
    rows = thought_BNJS.shape[:3].numel()
    start_R1 = torch.full((rows, 1), marks.start, device=thought_BNJS.device)
    last_R1 = thought_BNJS[..., -1:].flatten(0, 2) if length else start_R1
    ids_RU = torch.cat([last_R1, torch.full_like(last_R1, marks.end)], 1)
    position_RU = _row_position(prefix, position_BJ, thoughts, length, 2)
    return _run(base, _embedded(base, ids_RU, marks), position_RU, thinking)[:, -1]


def draw(logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """One token per row, and its surprise in nats."""
    tempered_RV = logits_RV if temperature in (0, 1) else logits_RV / temperature
    chance_RV = tempered_RV.softmax(-1)
    if temperature == 0:
        ids_R = chance_RV.argmax(-1)
    else:
        # In float32 the last of 50,000 small numbers would be lost.
        sums_RV = chance_RV.cumsum(-1, dtype=torch.float64)
        # Rounding: sums may end a little off 1, and a uniform of nearly 1 lie above the last.
        want_R1 = (uniform_R * sums_RV[:, -1])[:, None]
        ids_R = torch.searchsorted(sums_RV, want_R1, right=True)[:, 0]
        ids_R = ids_R.clamp(max=sums_RV.shape[1] - 1)
    return ids_R, -chance_RV.gather(1, ids_R[:, None])[:, 0].log()


def talk(
    base: PreTrainedModel,
    prefix: Prefix,
    position_BJ: Tensor,
    thought_BNJS: Tensor,
    lookahead: int,
    marks: SpecialTokens,
) -> tuple[Tensor, Tensor]:
    """Hidden states along the thoughts and after them, in one teacher-forced pass.

    Returns:
        Those from which the thought's tokens are predicted, `[R, S, D]`, and those from which the
        next true tokens are, `[R, K, D]`: at the end token and at the true tokens that follow.
    """
    texts, thoughts, positions, length = thought_BNJS.shape
    last = prefix.ids_BT.shape[1] - 1
    ahead = torch.arange(1, lookahead, device=position_BJ.device)
    true_BJK = at_positions(prefix.ids_BT, (position_BJ[..., None] + ahead).clamp(max=last))
    true_BNJK = true_BJK[:, None].expand(-1, thoughts, -1, -1)
    one = torch.ones((texts, thoughts, positions, 1), dtype=torch.long, device=position_BJ.device)
    parts = [one * marks.start, thought_BNJS, one * marks.end, true_BNJK]
    ids_RU = torch.cat(parts, -1).view(texts * thoughts * positions, -1)
    position_RU = _row_position(prefix, position_BJ, thoughts, 0, ids_RU.shape[1])
    thinking = _thinking(prefix, position_BJ, thoughts, keep=False)
    hidden_RUD = _run(base, _embedded(base, ids_RU, marks), position_RU, thinking)
    return hidden_RUD[:, :length], hidden_RUD[:, length + 1 :]

"""The three forward passes of Quiet-STaR: read the text, generate thoughts, predict after thoughts.

The functions are named after the paper's steps: `read`, `think` (thoughts at many positions at the
same time) and `talk` (predictions after each thought).

Shapes: B texts, T text tokens, N thoughts per position, J positions of a text, X any dimensions, R
rows (B N J, in this order), S sampled thought tokens, K lookahead tokens, U tokens of a row (start,
S thought tokens, end, K - 1 true tokens), D hidden width, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from selftaught.quiet.attention import Pass, under
from selftaught.quiet.passes import Gradients, Reading, Thinking
from selftaught.quiet.support import layer_name, unsupported
from selftaught.quiet.thought_ends import Endings, after_ends, compacted, content_lengths

Head = Callable[[Tensor], Tensor]
"""Function from hidden states to logits."""


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens around a thought."""

    start: int
    """Id of the start token."""
    end: int
    """Id of the end token."""
    never: tuple[int, ...]
    """Ids of tokens that a thought cannot contain: start, end and padding."""
    moved_2D: Tensor | None = None
    """Learned offsets that are added to the base model's embeddings of start and end. None:
    zero."""
    may_end: bool = False
    """Whether the end token can be sampled after the first token of a thought."""

    def banned(self, slot: int) -> list[int]:
        """Return the ids that cannot be sampled in a slot of a thought, counted from 0."""
        return [one for one in self.never if one != self.end or slot == 0 or not self.may_end]


@dataclass(frozen=True)
class Sampled:
    """Thoughts that `think` has sampled."""

    thought_BNJS: Tensor
    """Token ids. After a sampled end token, all slots contain the end token."""
    neg_log_prob_BNJS: Tensor
    """Negative log-probability of each token in nats. 0 in slots after a sampled end token."""
    thinking: Thinking
    """The pass, which `after_thought` continues."""
    endings: Endings | None
    """Thoughts that have ended themselves. None if thoughts cannot."""


@dataclass(frozen=True)
class Prefix:
    """The result of reading texts."""

    ids_BT: Tensor
    """Token ids."""
    hidden_BTD: Tensor
    """Last hidden states."""
    key_BKTD: list[Tensor]
    """Keys of every layer."""
    value_BKTD: list[Tensor]
    """Values of every layer."""
    position_BT: Tensor
    """Position ids."""
    real_BT: Tensor | None
    """Which tokens are text and not padding. None means that there is no padding before a text token."""


def input_matrix(base: PreTrainedModel) -> nn.Embedding:
    """Return the input embedding layer of a model."""
    return base.get_input_embeddings()  # type: ignore[return-value]


def decoder(base: PreTrainedModel) -> nn.Module:
    """Return the model without its language modeling head."""
    found = base.get_decoder()
    # Llama 4 returns the model itself.
    return base.get_submodule("model") if found is base else found


def output_matrix(base: PreTrainedModel) -> nn.Linear:
    """Return the output embedding layer (the linear layer for logits) of a causal language model.

    Raises:
        ValueError: the model has no such layer.
    """
    matrix = base.get_output_embeddings()
    if matrix is None:
        raise ValueError(
            f"Expected a causal language model, got {type(base).__name__}, which has no language "
            "modeling head. Load the model with AutoModelForCausalLM."
        )
    return matrix  # type: ignore[return-value]


def language_head(base: PreTrainedModel) -> Head:
    """Return the function that maps the last hidden states of a model to its logits.

    It applies the output embeddings and the scaling that some configurations define: a factor
    (`logit_scale`, Cohere), a divisor (`logits_scaling`, Granite) and a soft cap
    (`final_logit_softcapping`, Gemma 2).
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
    """Return the embeddings of the tokens of thoughts, with the offsets of start and end added."""
    matrix = input_matrix(base)
    embedding_RUD = matrix(ids_RU)
    if marks.moved_2D is None:
        return embedding_RUD
    # Some models (Gemma) scale their embeddings.
    moved_2D = (marks.moved_2D * getattr(matrix, "embed_scale", 1.0)).to(embedding_RUD.dtype)
    for token, moved_D in zip((marks.start, marks.end), moved_2D, strict=True):
        embedding_RUD = torch.where((ids_RU == token)[..., None], embedding_RUD + moved_D, embedding_RUD)  # fmt: skip
    return embedding_RUD


def _run(base: PreTrainedModel, embedding: Tensor, position: Tensor, quiet_pass: Pass) -> Tensor:
    """Run one forward pass and return the last hidden states."""
    # The mask of ones keeps transformers from inferring packed sequences from the position ids.
    # Padding is handled by the pass.
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
    """Read texts in one forward pass and return their hidden states, keys and values.

    Args:
        base: the base model, inside `thoughtful(base)`.
        ids_BT: token ids.
        mask_BT: 1 for text and 0 for padding. None means no padding.
        gradients: gradients that are added to those of the keys and values in the backward pass.
    """
    real_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    return read_on(base, ids_BT, real_BT, Reading(None, gradients=gradients))


def read_on(base: PreTrainedModel, new_BT: Tensor, mask_BT: Tensor, reading: Reading) -> Prefix:
    """Read new tokens at the end of texts.

    Args:
        base: the base model, inside `thoughtful(base)`.
        new_BT: ids of the new tokens.
        mask_BT: mask of the whole texts, earlier tokens included.
        reading: the pass. With `keep=True`, pass the same object again to continue the texts.

    Returns:
        The hidden states of the new tokens, and the keys and values of the whole texts.

    Raises:
        UnsupportedModel: a layer does not use attention that can be replaced.
    """
    real_BT = mask_BT.bool()
    position_BT = torch.arange(real_BT.shape[1], device=new_BT.device).expand_as(real_BT)
    if bool((real_BT[:, 1:] <= real_BT[:, :-1]).all()):
        reading.real_BT = None  # causal attention does not see padding at the end
    else:
        reading.real_BT = real_BT
        position_BT = (real_BT.long().cumsum(1) - 1).clamp(min=0)
    new_position_BT = position_BT[:, -new_BT.shape[1] :]
    hidden_BTD = _run(base, input_matrix(base)(new_BT), new_position_BT, reading)
    layers = range(base.config.get_text_config().num_hidden_layers)
    for layer in layers:
        if layer not in reading.key_BKTD:
            why = f"{layer_name(base, layer)} does not use attention that can be replaced"
            raise unsupported(base, why)
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
    """Return the position ids of the tokens `first` to `first + new` of each row: `[R, new]`."""
    at_BJ = at_positions(prefix.position_BT, position_BJ) + 1 + first
    at_BNJ = at_BJ[:, None].expand(-1, thoughts, -1).reshape(-1, 1)
    return at_BNJ + torch.arange(new, device=at_BNJ.device)


def at_positions(tensor_BT: Tensor, position_BX: Tensor) -> Tensor:
    """Select values of each text at some positions.

    Args:
        tensor_BT: values at every position, `[B, T, ...]`.
        position_BX: positions. `[1, X]` are used for every text.

    Returns:
        The values, `[B, X, ...]`.
    """
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
) -> Sampled:
    """Generate thoughts after the given positions, with one forward pass per thought token.

    Each token is sampled by inverse transform sampling with one given uniform random number. A
    thought therefore depends only on its text, its position and its random numbers.

    Args:
        base: the base model, inside `thoughtful(base)`.
        head: maps hidden states to logits.
        prefix: the texts.
        position_BJ: positions after which the thoughts start.
        uniform_BNJS: one uniform random number per thought token.
        marks: the special tokens.
        temperature: sampling temperature. 0 means greedy decoding.
    """
    thoughts, length = uniform_BNJS.shape[1], uniform_BNJS.shape[3]
    uniform_RS = uniform_BNJS.flatten(0, 2)
    thinking = _thinking(prefix, position_BJ, thoughts, keep=True)
    ids_R = torch.full((len(uniform_RS),), marks.start, device=prefix.ids_BT.device)
    endings = Endings.none(len(ids_R), marks.end, ids_R.device) if marks.may_end else None
    thought_RS = torch.full_like(uniform_RS, marks.end, dtype=torch.long)
    neg_log_prob_RS = torch.zeros_like(uniform_RS)
    for step in range(length):
        position_R1 = _row_position(prefix, position_BJ, thoughts, step, 1)
        hidden_R1D = _run(base, _embedded(base, ids_R[:, None], marks), position_R1, thinking)
        thinking.next(1)
        if endings is not None:
            endings.read(hidden_R1D[:, 0])
            if endings.all_read:
                break
        logits_RV = head(hidden_R1D[:, 0]).float()
        logits_RV[:, marks.banned(step)] = -torch.inf
        ids_R, neg_log_prob_R = draw(logits_RV, uniform_RS[:, step], temperature)
        if endings is not None:
            ids_R, neg_log_prob_R = endings.sampled(ids_R, neg_log_prob_R)
        thought_RS[:, step], neg_log_prob_RS[:, step] = ids_R, neg_log_prob_R
    thoughts_and_probs = thought_RS.view_as(uniform_BNJS), neg_log_prob_RS.view_as(uniform_BNJS)
    return Sampled(*thoughts_and_probs, thinking, endings)


@torch.no_grad()
def after_thought(
    base: PreTrainedModel,
    prefix: Prefix,
    position_BJ: Tensor,
    sampled: Sampled,
    marks: SpecialTokens,
) -> Tensor:
    """Return the hidden states at the end tokens of new thoughts, `[R, D]`.

    Args:
        base: the base model, inside `thoughtful(base)`.
        prefix: the texts.
        position_BJ: positions of the thoughts.
        sampled: the thoughts that `think` returned.
        marks: the special tokens.
    """
    thought_BNJS, endings = sampled.thought_BNJS, sampled.endings
    if endings is not None and endings.all_read:
        assert endings.hidden_RD is not None
        return endings.hidden_RD
    thoughts, length = thought_BNJS.shape[1], thought_BNJS.shape[-1]
    rows = thought_BNJS.shape[:3].numel()
    start_R1 = torch.full((rows, 1), marks.start, device=thought_BNJS.device)
    last_R1 = thought_BNJS[..., -1:].flatten(0, 2) if length else start_R1
    ids_RU = torch.cat([last_R1, torch.full_like(last_R1, marks.end)], 1)
    position_RU = _row_position(prefix, position_BJ, thoughts, length, 2)
    hidden_RUD = _run(base, _embedded(base, ids_RU, marks), position_RU, sampled.thinking)
    return hidden_RUD[:, -1] if endings is None or not length else endings.last(hidden_RUD)


def draw(logits_RV: Tensor, uniform_R: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Sample one token per row by inverse transform sampling.

    Args:
        logits_RV: logits.
        uniform_R: one uniform random number per row.
        temperature: sampling temperature. 0 means greedy decoding.

    Returns:
        Token ids and their negative log-probabilities in nats, both `[R]`.
    """
    tempered_RV = logits_RV if temperature in (0, 1) else logits_RV / temperature
    chance_RV = tempered_RV.softmax(-1)
    if temperature == 0:
        ids_R = chance_RV.argmax(-1)
    else:
        # In float32, small probabilities at the end of a vocabulary of 50,000 would be lost.
        sums_RV = chance_RV.cumsum(-1, dtype=torch.float64)
        # Because of rounding, the last sum may differ from 1 and be below the uniform number.
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
    """Compute the hidden states of thoughts and of the tokens after them, with teacher forcing.

    Args:
        base: the base model, inside `thoughtful(base)`.
        prefix: the texts.
        position_BJ: positions of the thoughts.
        thought_BNJS: token ids of the thoughts. With `marks.may_end`, a thought ends at its first
            end token.
        lookahead: number of true tokens to predict after a thought (K).
        marks: the special tokens.

    Returns:
        The hidden states that predict the tokens of the thoughts, `[R, S, D]`, and those that
        predict the next true tokens, `[R, K, D]`. The latter are at the end token and the true
        tokens after it.
    """
    texts, thoughts, positions, length = thought_BNJS.shape
    last = prefix.ids_BT.shape[1] - 1
    ahead = torch.arange(1, lookahead, device=position_BJ.device)
    true_BJK = at_positions(prefix.ids_BT, (position_BJ[..., None] + ahead).clamp(max=last))
    true_BNJK = true_BJK[:, None].expand(-1, thoughts, -1, -1)
    one = torch.ones((texts, thoughts, positions, 1), dtype=torch.long, device=position_BJ.device)
    parts = [one * marks.start, thought_BNJS, one * marks.end, true_BNJK]
    ids_RU = torch.cat(parts, -1).view(texts * thoughts * positions, -1)
    length_R = content_lengths(thought_BNJS, marks.end).flatten() if marks.may_end else None
    if length_R is not None:
        ids_RU = compacted(ids_RU, length_R, length)
    position_RU = _row_position(prefix, position_BJ, thoughts, 0, ids_RU.shape[1])
    thinking = _thinking(prefix, position_BJ, thoughts, keep=False)
    hidden_RUD = _run(base, _embedded(base, ids_RU, marks), position_RU, thinking)
    if length_R is not None:
        return hidden_RUD[:, :length], after_ends(hidden_RUD, length_R, lookahead)
    return hidden_RUD[:, :length], hidden_RUD[:, length + 1 :]

"""Check that parallel thoughts give the same logits and gradients as regular forward passes.

The check runs on the user's model. Thoughts after a short text are computed with `quiet_attention`
and with regular forward passes of the same tokens. Logits and gradients must agree. The check runs
in float32. Parameters that are all zero (such as gates and scales at the start of training) get
random values during the check; otherwise an error in what they multiply would not be visible.

Shapes: T text tokens, R rows (one per position), S thought tokens, K lookahead tokens, D hidden
width, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad
from transformers import PreTrainedModel

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.passes import Gradients
from selftaught.quiet.support import (
    EMBEDDINGS,
    UnsupportedModel,
    check_attention,
    decoder_layers,
    failing_module,
    layer_name,
    layer_of,
    unsupported,
)
from selftaught.quiet.thoughts import (
    SpecialTokens,
    input_matrix,
    language_head,
    output_matrix,
    read,
    talk,
)

TEXT, THOUGHT, LOOKAHEAD = 8, 2, 2
AGREEMENT = {torch.float64: 1e-4, torch.float32: 1e-3}
"""Maximum difference of a logit, in standard deviations of the logits. 0.5 for 16-bit types, where
rounding alone gives 0.2."""
GRADIENT_AGREEMENT = 1e-2
"""Maximum difference of a gradient, relative to its own root mean square."""
NEGLIGIBLE = 1e-4
"""A difference below this share of the largest root mean square of all gradients is treated as
rounding. For example, the true gradient of a key bias is 0."""
WATCHED = 2**16
"""Maximum number of elements of a parameter whose gradient is compared. Gradients of the embeddings
of the tokens used are always compared."""
SHORT = (torch.bfloat16, torch.float16)


def self_check(base: PreTrainedModel, marks: SpecialTokens) -> None:
    """Compare thoughts after a short text with regular forward passes of the same tokens.

    The logits of the text and of the lookahead after a thought are compared, and the gradients of a
    random weighted sum of these logits with respect to embeddings and small parameters.

    Args:
        base: the base model. It is restored to its previous state.
        marks: the special tokens of thoughts.

    Raises:
        UnsupportedModel: thoughts cannot be computed in parallel; names the layer and what differs.
    """
    check_attention(base)
    learning, precision = base.training, torch.get_float32_matmul_precision()
    base.eval()
    torch.set_float32_matmul_precision("highest")  # TensorFloat-32 has the precision of float16
    try:
        wrong = _difference_in_float32(base, marks)
    except (torch.OutOfMemoryError, UnsupportedModel):
        raise
    # Model code that was not written for other attention functions may raise any of these.
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = f"{failing_module(base, error)} fails with another attention function ({error})"
        raise unsupported(base, why) from error
    finally:
        torch.set_float32_matmul_precision(precision)
        base.train(learning)
    if wrong is not None:
        raise unsupported(base, wrong)


def _difference_in_float32(base: PreTrainedModel, marks: SpecialTokens) -> str | None:
    """Return what differs in float32, or None.

    If the memory is too small for float32, only the logits are compared, in the model's own dtype.
    """
    try:
        with _as_float32(base), _without_zeros(base):
            return _difference(base, marks, gradients=True)
    except torch.OutOfMemoryError:
        if not any(one.dtype in SHORT for one in base.parameters()):
            raise
    return _difference(base, marks, gradients=False)


@contextmanager
def _as_float32(base: PreTrainedModel) -> Iterator[None]:
    """Context manager: converts 16-bit parameters and buffers to float32, and back without loss."""
    tensors = chain(base.parameters(), base.buffers())
    short = [(one, one.dtype) for one in tensors if one.dtype in SHORT]
    try:
        for one, _ in short:
            one.data = one.data.float()
        yield
    finally:
        for one, dtype in short:
            one.data = one.data.to(dtype)


@contextmanager
def _without_zeros(base: PreTrainedModel) -> Iterator[None]:
    """Context manager: fills parameters that are all zero with random numbers, and resets them."""
    zero = [
        one for one in base.parameters()
        if one.is_floating_point() and not (one.flatten()[:64].any() or one.any())
    ]  # fmt: skip
    try:
        with torch.no_grad():
            for number, one in enumerate(zero):
                draw = torch.Generator(one.device).manual_seed(number)
                spread = 0.3 if one.ndim < 2 else one.shape[-1] ** -0.5
                one.normal_(0, spread, generator=draw)
        yield
    finally:
        with torch.no_grad():
            for one in zero:
                one.zero_()


@dataclass(frozen=True)
class _Example:
    """The test case: a text, a thought, the positions of the thought, and weights of the logits."""

    text_T: Tensor
    thought_S: Tensor
    position_R: Tensor
    start: int
    end: int
    probe_TV: Tensor
    """Random weights of the logits of the text in the sum whose gradients are compared."""
    probe_RKV: Tensor
    """Random weights of the logits after a thought."""

    def sum(self, text_TV: Tensor, after_RKV: Tensor) -> Tensor:
        return (text_TV * self.probe_TV).sum() + (after_RKV * self.probe_RKV).sum()


@dataclass
class _Found:
    """Result of one of the two computations."""

    text_TV: Tensor
    after_RKV: Tensor
    states: list[list[Tensor]]
    """Hidden states after each layer: `[layer][pass]`."""
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def add(self, example: _Example, names: Sequence[Any], got: Sequence[Tensor | None]) -> None:
        """Add gradients to those of the same name. Embedding gradients are summed per token.

        Args:
            names: for each gradient, the name of its parameter, or the token ids if it is the
                gradient of embeddings.
            got: the gradients. None means no gradient.
        """
        known = torch.cat([example.text_T, example.thought_S])
        known = torch.cat([known, known.new_tensor([example.start, example.end])]).unique()
        for name, one in zip(names, got, strict=True):
            if one is None:
                continue
            if isinstance(name, Tensor):
                flat = one.flatten(0, -2)
                place = torch.searchsorted(known, name.flatten())
                one = flat.new_zeros(len(known), flat.shape[-1]).index_add(0, place, flat)
                name = EMBEDDINGS
            self.gradients[name] = self.gradients[name] + one if name in self.gradients else one


def _difference(base: PreTrainedModel, marks: SpecialTokens, *, gradients: bool) -> str | None:
    """Return what differs between parallel thoughts and regular forward passes, or None.

    The description names the first layer that differs.
    """
    example = _example(base, marks)
    watched = {
        name: one for name, one in base.named_parameters()
        if gradients and one.numel() <= WATCHED and one.is_floating_point()
    }  # fmt: skip
    before = [(one, one.requires_grad) for one in watched.values()]
    try:
        for one in watched.values():
            one.requires_grad_(True)
        with torch.set_grad_enabled(gradients):
            ours = _parallel(base, marks, example, watched)
            own = _ordinary(base, example, watched)
    finally:
        for one, required in before:
            one.requires_grad_(required)
    difference = max(
        _max_difference(ours.text_TV, own.text_TV), _max_difference(ours.after_RKV, own.after_RKV)
    )
    if not difference <= AGREEMENT.get(own.text_TV.dtype, 0.5):
        return (
            f"its logits after a thought would be off by {difference:.2g} standard deviations, "
            f"first in {_first_layer(base, example, ours, own)}"
        )
    if wrong := _wrong_gradient(ours.gradients, own.gradients):
        return f"the gradient of {wrong} would be wrong, in {layer_of(base, wrong)}"
    return None


def _example(base: PreTrainedModel, marks: SpecialTokens) -> _Example:
    """Return a test case of random tokens, without those that thoughts cannot contain."""
    count, device = base.config.get_text_config().vocab_size, base.device
    draw = torch.Generator().manual_seed(0)
    allowed = torch.tensor([one for one in range(min(count, 1000)) if one not in marks.never])
    ids = allowed[torch.randint(len(allowed), (TEXT + THOUGHT,), generator=draw)].to(device)
    position_R = torch.tensor([TEXT // 3, TEXT - LOOKAHEAD - 1], device=device)
    matrix = output_matrix(base).weight
    probes = [
        torch.randn((*shape, len(matrix)), generator=draw).to(device, matrix.dtype)
        for shape in ((TEXT,), (len(position_R), LOOKAHEAD))
    ]
    return _Example(ids[:TEXT], ids[TEXT:], position_R, marks.start, marks.end, *probes)


def _parallel(
    base: PreTrainedModel, marks: SpecialTokens, example: _Example, watched: Mapping[str, Tensor]
) -> _Found:
    """Compute as in training: read the text once, and send gradients of thoughts through that
    pass."""
    learns, head = torch.is_grad_enabled(), language_head(base)
    with thoughtful(base), _recorded(base) as (looked_up, states):
        gradients = Gradients([], []) if learns else None
        prefix = read(base, example.text_T[None], None, gradients)
        of_text = list(looked_up)
        hidden, *stored = (
            one.detach().requires_grad_(learns)
            for one in (prefix.hidden_BTD, *prefix.key_BKTD, *prefix.value_BKTD)
        )
        layers = len(prefix.key_BKTD)
        seen = replace(
            prefix, hidden_BTD=hidden, key_BKTD=stored[:layers], value_BKTD=stored[layers:]
        )
        rows = len(example.position_R)
        thought_BNRS = example.thought_S.expand(1, 1, rows, -1)
        _, states_RKD = talk(base, seen, example.position_R[None], thought_BNRS, LOOKAHEAD, marks)
        text_TV, after_RKV = head(hidden)[0], head(states_RKD)
        found = _Found(text_TV.detach(), after_RKV.detach(), states)
        if gradients is not None:
            of_thoughts = looked_up[len(of_text) :]
            inputs = [*watched.values(), *(one for _, one in of_thoughts)]
            names = [*watched, *(ids for ids, _ in of_thoughts)]
            total = example.sum(text_TV, after_RKV)
            got = grad(total, [hidden, *stored, *inputs], allow_unused=True)
            found.add(example, names, got[1 + len(stored) :])
            gradients.key_BKTD = list(got[1 : 1 + layers])
            gradients.value_BKTD = list(got[1 + layers : 1 + 2 * layers])
            inputs = [*watched.values(), *(one for _, one in of_text)]
            names = [*watched, *(ids for ids, _ in of_text)]
            got = grad(prefix.hidden_BTD, inputs, got[0], allow_unused=True)
            found.add(example, names, got)
    return found


def _ordinary(base: PreTrainedModel, example: _Example, watched: Mapping[str, Tensor]) -> _Found:
    """Compute with the model's own forward pass.

    One batch contains the text, and the text up to each position with the thought after it. Rows
    are padded on the right, which causal attention does not see.
    """
    rows = _rows(example)
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row, row[-1:].expand(longest - len(row))]) for row in rows])
    with _recorded(base) as (looked_up, states):
        logits = base(input_ids=ids, use_cache=False).logits
        text_TV, after_RKV = logits[0, :TEXT], _lookahead(logits, rows)
        found = _Found(text_TV.detach(), after_RKV.detach(), states)
        if torch.is_grad_enabled():
            inputs = [*watched.values(), *(one for _, one in looked_up)]
            names = [*watched, *(ids for ids, _ in looked_up)]
            got = grad(example.sum(text_TV, after_RKV), inputs, allow_unused=True)
            found.add(example, names, got)
    return found


def _rows(example: _Example) -> list[Tensor]:
    """Return the text, and for every position the text up to it, a thought and the lookahead."""
    text = example.text_T
    start, end = text.new_tensor([[example.start], [example.end]])
    return [
        text,
        *(
            torch.cat(
                [text[: at + 1], start, example.thought_S, end, text[at + 1 : at + LOOKAHEAD]]
            )
            for at in example.position_R.tolist()
        ),
    ]


def _lookahead(whole: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Return the values of a batch of rows at the lookahead after a thought: `[R, K, ...]`."""
    ends = [len(row) for row in rows]
    return torch.stack([whole[at, ends[at] - LOOKAHEAD : ends[at]] for at in range(1, len(rows))])


Recorded = tuple[list[tuple[Tensor, Tensor]], list[list[Tensor]]]


@contextmanager
def _recorded(base: PreTrainedModel) -> Iterator[Recorded]:
    """Context manager: records embeddings and hidden states in forward passes of the model.

    Yields a list of token ids with their embeddings (leaves of the autograd graph), and a list of
    the hidden states after each layer.
    """
    looked_up: list[tuple[Tensor, Tensor]] = []
    layers = decoder_layers(base)[1]
    states: list[list[Tensor]] = [[] for _ in layers]

    def look_up(module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        leaf = out.detach().requires_grad_(torch.is_grad_enabled())
        looked_up.append((given[0], leaf))
        return leaf.clone()  # because some models scale it in place

    def keep(number: int, out: Any) -> None:
        one = out[0] if isinstance(out, tuple) else out
        if isinstance(one, Tensor):
            states[number].append(one.detach())

    handles = [input_matrix(base).register_forward_hook(look_up)]
    handles += [
        layer.register_forward_hook(lambda module, given, out, at=number: keep(at, out))
        for number, layer in enumerate(layers)
    ]
    try:
        yield looked_up, states
    finally:
        for handle in handles:
            handle.remove()


def _max_difference(ours: Tensor, own: Tensor) -> float:
    """Return the largest difference, in standard deviations of `own`."""
    return float((ours - own).float().abs().max() / own.float().std())


def _first_layer(base: PreTrainedModel, example: _Example, ours: _Found, own: _Found) -> str:
    """Return a description of the first layer whose hidden states differ, or else of the head."""
    limit, rows = AGREEMENT.get(own.text_TV.dtype, 0.5), _rows(example)
    for number, (mine, theirs) in enumerate(zip(ours.states, own.states, strict=True)):
        if len(mine) != 2 or len(theirs) != 1 or mine[1].ndim != 3 or len(theirs[0]) != len(rows):
            return layer_name(base, number)
        text = _max_difference(mine[0][0], theirs[0][0, :TEXT])
        after = _max_difference(mine[1][:, -LOOKAHEAD:], _lookahead(theirs[0], rows))
        if not (text <= limit and after <= limit):
            return layer_name(base, number)
    head = type(output_matrix(base)).__name__
    return f"its head ({head}), after {layer_name(base, len(own.states) - 1)}"


def _wrong_gradient(ours: dict[str, Tensor], own: dict[str, Tensor]) -> str | None:
    """Return the name of the first gradient that differs, or None."""
    largest = max((_size(one) for one in own.values()), default=0.0)
    for name in dict.fromkeys([*own, *ours]):
        mine, theirs = ours.get(name), own.get(name)
        whole = mine if theirs is None else theirs
        assert whole is not None
        off = whole if mine is None or theirs is None else mine - theirs
        if not _size(off) <= GRADIENT_AGREEMENT * _size(whole) + NEGLIGIBLE * largest:
            return name
    return None


def _size(gradient: Tensor) -> float:
    """Return the root mean square."""
    return float(gradient.float().square().mean().sqrt())

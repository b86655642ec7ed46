"""Decoding for prompts that share their first tokens, such as few-shot prompts.

The keys and values of the shared tokens (the prefix) are computed and stored once, not once per
row. Attention is computed in two parts under one softmax: the queries of all rows against the
shared prefix as one matrix product, and each row's queries against its own tokens. Rows that end
leave the batch, and waiting rows take their slots. The model's code is unchanged: the two-part
attention is registered with transformers' `AttentionInterface`, and the store of keys and values
is a transformers `Cache`.

Shapes: B rows, T new tokens of a row, P prefix tokens, S stored tokens of a row (prefix not
counted), H query heads, K key-value heads, G query heads per key-value head, Q queries of all
kinds together, D head width, V vocabulary, N tokens of a completion.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from selftaught.samplers.base import SamplingParams
from selftaught.samplers.local.fused_attention import aligned, kernel_for
from selftaught.samplers.local.token_choice import Decoding, choose

ATTENTION = "two_part"
CHUNK = 256
"""Number of prompt tokens computed at a time.

A prefix is always split at multiples of this number, so that its keys do not depend, even in
rounding, on what was cached before.
"""
PREFILL_TOKENS = 2048
"""Maximum number of prompt tokens of all rows computed at a time."""
STEP_TOKENS = 16
"""Cost of one decoding step in prompt tokens. Used only to plan groups."""
SHARE = 16
"""Minimum number of tokens that a shared prefix, or a longer one for fewer rows, must save."""
KEPT_PREFIXES = 16
"""Maximum number of prefixes in the cache."""
AGREEMENT = {torch.float32: 1e-3}
"""Maximum difference from the model's own logits in the check at the start, in standard deviations.

1.0 for other data types. Rounding alone gave 1e-5 in float32 and 0.2 in bfloat16.
"""
HIDDEN = -30000.0
"""Attention bias of a masked token; finite, so that all prefix tokens of a row may be masked."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that rows share, with the keys and values of all layers."""

    tokens: tuple[int, ...]
    key_KPD: tuple[Tensor, ...] = ()
    value_KPD: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Group:
    """Indices of rows that share their first `shared` tokens."""

    shared: int
    numbers: list[int]


def plan(rows: Sequence[tuple[int, ...]], batch_size: int, max_tokens: int) -> list[Group]:
    """Split rows into groups with a shared prefix, so that the total cost is small.

    Args:
        rows: Token ids of each row.
        batch_size: Maximum number of rows decoded at a time.
        max_tokens: Maximum number of new tokens.
    """
    order = sorted(range(len(rows)), key=lambda number: rows[number])

    def cost(group: Group) -> int:
        own = sum(len(rows[number]) - group.shared for number in group.numbers)
        steps = max_tokens * ceil(len(group.numbers) / batch_size)
        return group.shared + own + STEP_TOKENS * steps

    def best(numbers: list[int]) -> list[Group]:
        undivided = Group(_shared(rows, numbers), numbers)
        branches: dict[int, list[int]] = {}
        for number in numbers:
            branches.setdefault(rows[number][undivided.shared], []).append(number)
        parts, rest = [], []
        for branch in branches.values():
            gain = _shared(rows, branch) - undivided.shared
            if 1 < len(branch) < len(numbers) and gain >= SHARE:
                parts += best(branch)
            else:
                rest += branch
        parts += [Group(_shared(rows, rest), rest)] if rest else []
        return parts if sum(map(cost, parts)) < cost(undivided) else [undivided]

    # A very short prefix is cheaper to compute per row than to attend to separately.
    return [group if group.shared >= SHARE else replace(group, shared=0) for group in best(order)]


def _shared(rows: Sequence[tuple[int, ...]], numbers: list[int]) -> int:
    """Return the length of the common prefix of sorted rows, each without its last token."""
    first, last = rows[numbers[0]], rows[numbers[-1]]
    shortest = min(len(rows[number]) for number in numbers)
    return min(_common(first, last), shortest - 1)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass
class _Window:
    """The rows and positions of one forward pass; passed to the attention as a keyword argument."""

    prefix: Prefix
    first: int
    """Index of the first row in the pass."""
    position_BT: Tensor
    """Position of each new token among its row's own tokens."""
    stored: int
    """Number of own tokens of the longest row, including the new ones."""
    sliding: dict[int, int]
    """Sliding window size of each layer that has one."""
    layers_seen: int = 0
    """Number of layers that have used the two-part attention in this pass."""
    _biases: dict[int | None, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def bias(
        self, sliding: int | None, per_group: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """Return attention biases that mask own tokens, [B, 1, GT, S], and prefix tokens, [BGT, P].

        The second is None if no prefix token is masked.
        """
        if sliding not in self._biases:
            shared, (rows, new) = len(self.prefix.tokens), self.position_BT.shape
            position_B1T1 = self.position_BT[:, None, :, None]
            own_S = torch.arange(self.stored, device=self.position_BT.device)
            hidden_B1TS = own_S > position_B1T1
            prefix_QP = None
            if sliding is not None:
                hidden_B1TS |= own_S <= position_B1T1 - sliding
                prefix_P = torch.arange(-shared, 0, device=self.position_BT.device)
                gone_B1TP = prefix_P <= position_B1T1 - sliding
                if bool(gone_B1TP.any()):
                    gone_BGTP = gone_B1TP.expand(-1, per_group, -1, -1)
                    prefix_QP = gone_BGTP.reshape(-1, shared).to(dtype) * HIDDEN
            hidden_BGTS = hidden_B1TS.expand(-1, per_group, -1, -1)
            own_B1QS = hidden_BGTS.reshape(rows, 1, per_group * new, -1).to(dtype) * HIDDEN
            if own_B1QS.device.type != "cpu":  # once for all layers
                own_B1QS = aligned(own_B1QS)
                prefix_QP = None if prefix_QP is None else aligned(prefix_QP)
            self._biases[sliding] = (own_B1QS, prefix_QP)
        return self._biases[sliding]


class Slots(Cache):
    """Cache of the keys and values of each row's own tokens, with a slot of fixed size per row.

    Args:
        rows: Number of rows.
        capacity: Maximum number of tokens per row.
        layers: Number of layers.
    """

    def __init__(self, rows: int, capacity: int, layers: int) -> None:
        super().__init__(layer_class_to_replicate=DynamicLayer)
        self._shape = (rows, capacity)
        self._key_BKSD: list[Tensor] = []
        self._value_BKSD: list[Tensor] = []
        self._layers = layers
        self.window: _Window | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; return all those stored for the rows."""
        assert self.window is not None
        if layer_idx == len(self._key_BKSD):
            self._key_BKSD.append(self._empty(key_states))
            self._value_BKSD.append(self._empty(value_states))
        rows = slice(self.window.first, self.window.first + len(key_states))
        key_BKSD, value_BKSD = self._key_BKSD[layer_idx][rows], self._value_BKSD[layer_idx][rows]
        position_BT = self.window.position_BT
        row_B1 = torch.arange(len(position_BT), device=position_BT.device)[:, None]
        key_BKSD[row_B1, :, position_BT] = key_states.transpose(1, 2)
        value_BKSD[row_B1, :, position_BT] = value_states.transpose(1, 2)
        stored = self.window.stored
        return key_BKSD[:, :, :stored], value_BKSD[:, :, :stored]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens in the longest row, including prefix and new tokens."""
        assert self.window is not None
        return len(self.window.prefix.tokens) + self.window.stored

    def copy(self, sources: list[int], targets: list[int], stored: int) -> None:
        """Copy the first `stored` tokens of some rows to other rows."""
        for store in (*self._key_BKSD, *self._value_BKSD):
            store[targets, :, :stored] = store[sources, :, :stored]

    def picked(self, rows: list[int], stored: int, capacity: int) -> "Slots":
        """Return new slots with copies of rows of these; a row may be picked repeatedly."""
        new = Slots(len(rows), capacity, self._layers)
        for mine, theirs in (
            (self._key_BKSD, new._key_BKSD),
            (self._value_BKSD, new._value_BKSD),
        ):
            for store in mine:
                _, heads, _, width = store.shape
                theirs.append(store.new_zeros(len(rows), heads, capacity, width))
                theirs[-1][:, :, :stored] = store[rows, :, :stored]
        return new

    def receive(self, source: "Slots", rows: Sequence[int], stored: int) -> None:
        """Copy the first `stored` tokens of the first row of other slots to rows of these."""
        keys, values = source.row(stored)
        self._write(keys, values, rows, stored)

    def receive_all(self, source: "Slots", rows: int, stored: int) -> None:
        """Copy the first `stored` tokens of the first rows of other slots to the same rows."""
        pairs = (
            (self._key_BKSD, source._key_BKSD),
            (self._value_BKSD, source._value_BKSD),
        )
        for mine, theirs in pairs:
            for layer, store in enumerate(theirs):
                if layer == len(mine):
                    mine.append(self._empty(store))
                mine[layer][:rows, :, :stored] = store[:rows, :, :stored]

    def load(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Store the keys and values of the first row's first tokens, given per layer."""
        self._write(keys, values, [0], keys[0].shape[1])

    def _write(
        self, keys: Sequence[Tensor], values: Sequence[Tensor], rows: Sequence[int], stored: int
    ) -> None:
        """Store keys and values of the same tokens, given per layer, for some rows."""
        rows = list(rows)
        for mine, new in ((self._key_BKSD, keys), (self._value_BKSD, values)):
            for layer, one_KPD in enumerate(new):
                if layer == len(mine):
                    mine.append(self._empty(one_KPD))
                mine[layer][rows, :, :stored] = one_KPD

    def _empty(self, like: Tensor) -> Tensor:
        """Return an empty store of a layer, for the heads and the width of `like`, `[..., K, S, D]`."""
        rows, capacity = self._shape
        heads, _, width = like.shape[-3:]
        return like.new_zeros(rows, heads, capacity, width)

    def row(self, stored: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return the first row's keys and values, each as a list over the layers."""
        keys = [key_BKSD[0, :, :stored] for key_BKSD in self._key_BKSD]
        return keys, [value_BKSD[0, :, :stored] for value_BKSD in self._value_BKSD]


def two_part_attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    *,
    selftaught_window: _Window,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention over the shared prefix and each row's own tokens under one softmax.

    The signature is that of transformers' `AttentionInterface`.
    """
    window = selftaught_window
    layer = module.layer_idx
    assert isinstance(layer, int)
    window.layers_seen += 1
    rows, heads, new, width = query_BHTD.shape
    groups = key_BKSD.shape[1]
    per_group = heads // groups
    shared = len(window.prefix.tokens)
    own_bias, prefix_bias = window.bias(window.sliding.get(layer), per_group, query_BHTD.dtype)
    query_BHTD = query_BHTD * (width**-0.5 if scaling is None else scaling)
    query_BKQD = query_BHTD.reshape(rows, groups, per_group * new, width)
    out_BKQD, own_total = _attend(query_BKQD, key_BKSD, value_BKSD, own_bias, softcap)
    if shared:
        prefix_1KQD, prefix_total = _attend(
            query_BKQD.transpose(0, 1).reshape(1, groups, -1, width),
            window.prefix.key_KPD[layer][None],
            window.prefix.value_KPD[layer][None],
            prefix_bias,
            softcap,
        )
        by_row = (groups, rows, per_group * new, -1)
        share_BKQ1 = torch.sigmoid(prefix_total.view(by_row).transpose(0, 1) - own_total)
        prefix_BKQD = prefix_1KQD.view(by_row).transpose(0, 1)
        out_BKQD = torch.lerp(out_BKQD, prefix_BKQD, share_BKQ1.to(out_BKQD.dtype))
    return out_BKQD.reshape(rows, heads, new, -1).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Return the attention output over one part of the tokens, and its log-sum-exp of scores.

    The log-sum-exp is needed to combine parts as under one softmax.
    """
    kernel = kernel_for(query, key, value) if softcap is None else None
    if kernel is not None:
        out, total = kernel.forward(query, key, value, bias, 1.0)
        return out, total[..., None]
    score = (query @ key.transpose(-1, -2)).float()
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    if bias is not None:
        score = score + bias
    total = score.logsumexp(-1, keepdim=True)
    return torch.exp(score - total).to(value.dtype) @ value, total


AttentionInterface.register(ATTENTION, two_part_attention)


def obstacle(model: PreTrainedModel) -> str | None:
    """Return why a model's configuration is not supported by the shared-prefix loop, or None."""
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced"
    if model.config.get_text_config().to_dict().get("attention_chunk_size") is not None:
        return "its attention is chunked"
    layers = DynamicCache(config=model.config).layers
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        return "its layers share keys and values"
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it has layers other than attention ({type(layer).__name__})"
    return None


@contextmanager
def two_part(model: PreTrainedModel) -> Iterator[None]:
    """Context manager in which a model uses the two-part attention."""
    own = model.config._attn_implementation or "eager"
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class SharedPrefixLoop:
    """The decoding loop for one model, with a cache of computed prefixes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        layers = DynamicCache(config=model.config).layers
        self._layers = len(layers)
        self._sliding = {
            number: layer.sliding_window
            for number, layer in enumerate(layers)
            if isinstance(layer, DynamicSlidingWindowLayer)
        }
        self._prefixes: dict[tuple[int, ...], Prefix] = {}

    def objection(self, tokens: tuple[int, ...], shared: int) -> str | None:
        """Return why this loop does not support its model, from a test on one prompt, or None."""
        plain_V = self._model(torch.tensor([tokens], device=self._model.device)).logits[0, -1]
        try:
            with two_part(self._model):
                batch = _Batch(self, self.prefix(tokens[:shared]), [tokens], [0], [0], 1, 1)
                own_V = batch.first_logits()
        # Errors of model code that is incompatible with another attention function or cache.
        except (AttributeError, IndexError, NotImplementedError, TypeError) as error:
            return f"its code is not compatible with another attention function ({error})"
        if batch.layers_seen != self._layers:
            missing = self._layers - batch.layers_seen
            return f"{missing} of its layers do not use the attention function"
        difference = (own_V.float() - plain_V.float()).abs().max() / plain_V.float().std()
        if not float(difference) <= AGREEMENT.get(self._model.dtype, 1.0):
            return f"its logits on a prompt would differ by {difference:.2g} standard deviations"
        return None

    def complete(self, asked: Decoding, batch_size: int) -> None:
        """Complete every row, at most `batch_size` rows at a time."""
        rows, max_tokens = asked.rows, asked.params.max_tokens
        with two_part(self._model):
            for group in plan(rows, batch_size, max_tokens):
                prefix = self.prefix(rows[group.numbers[0]][: group.shared])
                _Batch(
                    self, prefix, rows, asked.prefix_tokens, group.numbers, max_tokens, batch_size
                ).run(asked)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self._model.device

    @property
    def bytes_per_token(self) -> int:
        """Memory of the keys and values of one token in all layers, after the check at the start."""
        for prefix in self._prefixes.values():
            if prefix.tokens:
                parts = (*prefix.key_KPD, *prefix.value_KPD)
                return sum(one[:, :1].numel() * one.element_size() for one in parts)
        raise RuntimeError("The check at the start has not computed a prefix.")

    def slots(self, rows: int, capacity: int) -> Slots:
        """Return empty slots for `rows` rows of at most `capacity` tokens."""
        return Slots(rows, capacity, self._layers)

    def prefill(
        self, slots: Slots, prefix: Prefix, first: int, own: Sequence[tuple[int, ...]]
    ) -> None:
        """Compute and store the keys and values of rows of tokens.

        Rows are padded on the right, where causal attention ignores the padding.

        Args:
            slots: Where to store them.
            prefix: The shared prefix before the rows.
            first: Index of the slot of the first row.
            own: Token ids of the rows after the prefix, shortest first.
        """
        start = 0
        while start < len(own):
            stop = start + 1
            while stop < len(own) and (stop + 1 - start) * len(own[stop]) <= PREFILL_TOKENS:
                stop += 1
            part = own[start:stop]
            length = len(part[-1])
            padded = [tokens + (0,) * (length - len(tokens)) for tokens in part]
            token_BT = torch.tensor(padded, device=self._model.device)
            for begin in range(0, length, CHUNK):
                end = min(begin + CHUNK, length)
                position_T = torch.arange(begin, end, device=token_BT.device)
                position_BT = position_T.expand(len(part), -1)
                tokens_BT = token_BT[:, begin:end]
                self.forward(slots, prefix, first + start, tokens_BT, position_BT, end, head=False)
            start = stop

    def prefix(self, tokens: tuple[int, ...]) -> Prefix:
        """Return the keys and values of a prefix, reusing cached chunks."""
        if tokens in self._prefixes:
            self._prefixes[tokens] = self._prefixes.pop(tokens)  # most recently used last
            return self._prefixes[tokens]
        prefix = Prefix(())
        for known in self._prefixes.values():
            length = _common(known.tokens, tokens) // CHUNK * CHUNK
            if length > len(prefix.tokens):
                prefix = Prefix(
                    tokens[:length],
                    tuple(key_KPD[:, :length] for key_KPD in known.key_KPD),
                    tuple(value_KPD[:, :length] for value_KPD in known.value_KPD),
                )
        for start in range(len(prefix.tokens), len(tokens), CHUNK):
            prefix = self.extended(prefix, tokens[start : start + CHUNK])
        self._prefixes[tokens] = prefix
        if len(self._prefixes) > KEPT_PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        return prefix

    def extended(self, prefix: Prefix, tokens: tuple[int, ...]) -> Prefix:
        """Return a prefix with more tokens appended."""
        slots = self.slots(1, len(tokens))
        token_BT = torch.tensor([tokens], device=self._model.device)
        position_BT = torch.arange(len(tokens), device=self._model.device)[None]
        self.forward(slots, prefix, 0, token_BT, position_BT, len(tokens), head=False)
        keys, values = slots.row(len(tokens))
        if not prefix.tokens:
            return Prefix(tokens, tuple(keys), tuple(values))
        return Prefix(
            prefix.tokens + tokens,
            tuple(torch.cat(pair, 1) for pair in zip(prefix.key_KPD, keys, strict=True)),
            tuple(torch.cat(pair, 1) for pair in zip(prefix.value_KPD, values, strict=True)),
        )

    def forward(
        self,
        slots: Slots,
        prefix: Prefix,
        first: int,
        token_BT: Tensor,
        position_BT: Tensor,
        stored: int,
        *,
        head: bool,
    ) -> Tensor:
        """Run the model on new tokens and store their keys and values.

        Args:
            slots: Where to store them.
            prefix: The shared prefix before the rows.
            first: Index of the first row's slot.
            token_BT: New tokens.
            position_BT: Their positions among their row's own tokens.
            stored: Number of own tokens of the longest row, including the new ones.
            head: Whether to apply the language model head.

        Returns:
            Logits if `head`, otherwise hidden states.
        """
        window = _Window(prefix, first, position_BT, stored, self._sliding)
        slots.window = window
        module = self._model if head else self._model.base_model
        out = module(
            input_ids=token_BT,
            position_ids=position_BT + len(prefix.tokens),
            past_key_values=slots,
            use_cache=True,
            selftaught_window=window,
        )
        return out.logits if head else out.last_hidden_state


class _Batch:
    """Rows of one group during decoding: active rows in the first slots, others waiting."""

    def __init__(
        self,
        loop: SharedPrefixLoop,
        prefix: Prefix,
        rows: Sequence[tuple[int, ...]],
        prefix_tokens: Sequence[int],
        numbers: Sequence[int],
        max_tokens: int,
        batch_size: int,
    ) -> None:
        self._loop, self._prefix = loop, prefix
        shared = len(prefix.tokens)
        self._own = {number: rows[number][shared:] for number in numbers}
        self._prefix_tokens = {
            number: rows[number][len(rows[number]) - prefix_tokens[number] :] for number in numbers
        }
        # Shortest first, so that prompts computed together need little padding.
        self._waiting = sorted(numbers, key=lambda number: (len(rows[number]), rows[number]))
        size = min(batch_size, len(numbers))
        self._size = size
        longest = max(len(rows[number]) - prefix_tokens[number] for number in numbers) + max_tokens
        # The last token of a completion is not stored.
        self._slots = loop.slots(size, longest - shared - 1)
        device = loop._model.device
        self._active = 0
        self._number_B = torch.zeros(size, dtype=torch.long, device=device)
        self._stored_B = torch.zeros_like(self._number_B)
        self._token_B = torch.zeros_like(self._number_B)
        self._count_B = torch.zeros_like(self._number_B)
        self._drawn_BN = torch.zeros((size, max_tokens), dtype=torch.long, device=device)

    def run(self, asked: Decoding) -> None:
        """Decode until every row has ended."""
        ending, max_tokens = asked.ending, asked.params.max_tokens
        eos = torch.tensor(ending.eos, dtype=torch.long, device=asked.uniform_BN.device)
        while self._active or self._waiting:
            free = self._size - self._active
            if self._waiting and free >= max(1, self._size // 8):
                self._fill(free)
            self._step(asked.uniform_BN, asked.params)
            n = self._active
            token_B = self._token_B[:n]
            ended_B = torch.isin(token_B, eos) | (self._count_B[:n] == max_tokens)
            for row in (ending.suspects(token_B) & ~ended_B).nonzero()[:, 0].tolist():
                drawn = self._drawn_BN[row, : self._count_B[row]].tolist()
                ended_B[row] = ending.cut(drawn) is not None
            ended = ended_B.nonzero()[:, 0].tolist()
            if ended:
                for row in ended:
                    drawn = self._drawn_BN[row, : self._count_B[row]].tolist()
                    asked.finished(int(self._number_B[row]), drawn)
                self._drop(ended)

    def _fill(self, free: int) -> None:
        """Activate waiting rows. A prompt that several rows have is computed once."""
        taken, self._waiting = self._waiting[:free], self._waiting[free:]
        slot_of: dict[tuple[int, ...], int] = {}
        for number in taken:
            slot_of.setdefault(self._own[number], self._active + len(slot_of))
        own = list(slot_of)
        # The last token is left to the first decoding step, which gives the first new token of all
        # rows at once. So no logits are needed here, where prompts are padded on the right.
        before = [tokens[:-1] for tokens in own]
        self._loop.prefill(self._slots, self._prefix, self._active, before)
        duplicates = taken.copy()
        firsts = [duplicates.pop(duplicates.index(n)) for n in self._firsts(taken)]
        order = firsts + duplicates
        slots = list(range(self._active, self._active + len(order)))
        if duplicates:
            sources = [slot_of[self._own[number]] for number in duplicates]
            self._slots.copy(sources, slots[len(firsts) :], len(own[-1]) - 1)
        device = self._token_B.device
        new = slice(slots[0], slots[-1] + 1)
        self._number_B[new] = torch.tensor(order, device=device)
        self._stored_B[new] = torch.tensor([len(self._own[n]) - 1 for n in order], device=device)
        self._token_B[new] = torch.tensor([self._own[n][-1] for n in order], device=device)
        prefix_tokens = [self._prefix_tokens[n] for n in order]
        self._count_B[new] = torch.tensor([*map(len, prefix_tokens)], device=device)
        for row, tokens in enumerate(prefix_tokens, slots[0]):
            if tokens:
                self._drawn_BN[row, : len(tokens)] = torch.tensor(tokens, device=device)
        self._active += len(order)

    def _firsts(self, taken: list[int]) -> list[int]:
        """Return the first row of each distinct prompt."""
        firsts: dict[tuple[int, ...], int] = {}
        for number in taken:
            firsts.setdefault(self._own[number], number)
        return list(firsts.values())

    @property
    def layers_seen(self) -> int:
        """Number of layers that used the two-part attention in the latest forward pass."""
        return 0 if self._slots.window is None else self._slots.window.layers_seen

    def first_logits(self) -> Tensor:
        """Return the logits after the prompt of the only row, for the check at the start."""
        self._fill(1)
        return self._logits()[0]

    def _logits(self) -> Tensor:
        """Return the logits of the next token of every active row."""
        position_B1 = self._stored_B[: self._active, None]
        logits_BTV = self._loop.forward(
            self._slots,
            self._prefix,
            0,
            self._token_B[: self._active, None],
            position_B1,
            int(position_B1.max()) + 1,
            head=True,
        )
        return logits_BTV[:, -1]

    def _step(self, uniform_BN: Tensor, params: SamplingParams) -> None:
        """Sample one new token for every active row."""
        n = self._active
        logits_BV = self._logits()
        count_B = self._count_B[:n]
        token_B = choose(logits_BV, uniform_BN[self._number_B[:n], count_B], params)
        self._drawn_BN[:n].scatter_(1, count_B[:, None], token_B[:, None])
        self._token_B[:n] = token_B
        self._stored_B[:n] += 1
        self._count_B[:n] += 1

    def _drop(self, ended: list[int]) -> None:
        """Remove rows that have ended; the last active rows move into their slots."""
        left = self._active - len(ended)
        gone = set(ended)
        targets = [row for row in ended if row < left]
        sources = [row for row in range(left, self._active) if row not in gone]
        if targets:
            self._slots.copy(sources, targets, int(self._stored_B[: self._active].max()))
            for state in (
                self._number_B,
                self._stored_B,
                self._token_B,
                self._count_B,
                self._drawn_BN,
            ):
                state[targets] = state[sources]
        self._active = left


def shared_prefix_loop(
    model: PreTrainedModel, tokens: tuple[int, ...], shared: int
) -> SharedPrefixLoop | str:
    """Return the loop for a model, or the reason why the loop does not support it.

    The model is tested on one prompt.

    Args:
        model: A loaded model.
        tokens: Token ids of the prompt.
        shared: Number of its first tokens to use as the shared prefix.
    """
    reason = obstacle(model)
    if reason is not None:
        return reason
    loop = SharedPrefixLoop(model)
    return loop.objection(tokens, shared) or loop

"""Sampling where prompts share their first tokens, as few-shot prompts do.

The keys and values of the shared tokens are computed and stored once, not once per row. Attention
is done in two parts under one softmax: all rows' queries against the shared prefix as one matrix
product, and each row's queries against its own tokens. Rows that end leave the batch, and waiting
ones take their place. The model's own code runs unchanged: the two-part attention comes in by
transformers' `AttentionInterface`, the store of keys and values as its cache.

Shapes: B rows, T new tokens of a row, P prefix tokens, S stored tokens of a row (prefix not
counted), H query heads, K key-value heads, G query heads per key-value head, Q queries of all
kinds together, D head width, V vocabulary, N tokens of a completion.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from selftaught.samplers.base import SamplingParams
from selftaught.samplers.local.token_choice import choose
from selftaught.samplers.stopping import Ending

ATTENTION = "two_part"
CHUNK = 256
"""Prompt tokens computed at a time; a prefix is cut at the same places whatever came before, so
that its keys do not depend, even in rounding, on what was cached."""
PREFILL_TOKENS = 2048
"""Prompt tokens of all rows computed at a time."""
STEP_TOKENS = 16
"""One decoding step costs about as much as so many prompt tokens; for planning only."""
SHARE = 16
"""A prefix, or a longer one for fewer rows, is worth so many tokens at least."""
KEPT_PREFIXES = 16
AGREEMENT = {torch.float32: 1e-3}
"""How far logits may be from the model's own in the trial at the start, in their standard
deviations, 1.0 in short types. Rounding alone gave 1e-5 in float32 and 0.2 in bfloat16."""
HIDDEN = -30000.0
"""Added to the score of a token that must not be seen; finite, so that a row may see no prefix."""


@dataclass(frozen=True)
class Prefix:
    """Tokens that rows share, with the keys and values of every layer."""

    tokens: tuple[int, ...]
    key_KPD: tuple[Tensor, ...] = ()
    value_KPD: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Group:
    """Rows, by number, that share their first `shared` tokens."""

    shared: int
    numbers: list[int]


def plan(rows: Sequence[tuple[int, ...]], batch_size: int, max_tokens: int) -> list[Group]:
    """Rows in groups that share a prefix, so that little is computed twice."""
    order = sorted(range(len(rows)), key=lambda number: rows[number])

    def cost(group: Group) -> int:
        own = sum(len(rows[number]) - group.shared for number in group.numbers)
        steps = max_tokens * ceil(len(group.numbers) / batch_size)
        return group.shared + own + STEP_TOKENS * steps

    def best(numbers: list[int]) -> list[Group]:
        whole = Group(_shared(rows, numbers), numbers)
        branches: dict[int, list[int]] = {}
        for number in numbers:
            branches.setdefault(rows[number][whole.shared], []).append(number)
        parts, rest = [], []
        for branch in branches.values():
            gain = _shared(rows, branch) - whole.shared
            if 1 < len(branch) < len(numbers) and gain >= SHARE:
                parts += best(branch)
            else:
                rest += branch
        parts += [Group(_shared(rows, rest), rest)] if rest else []
        return parts if sum(map(cost, parts)) < cost(whole) else [whole]

    # So few shared tokens are cheaper computed anew than attended to apart.
    return [group if group.shared >= SHARE else replace(group, shared=0) for group in best(order)]


def _shared(rows: Sequence[tuple[int, ...]], numbers: list[int]) -> int:
    """How many first tokens sorted rows share, their last token left out."""
    first, last = rows[numbers[0]], rows[numbers[-1]]
    shortest = min(len(rows[number]) for number in numbers)
    return min(_common(first, last), shortest - 1)


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many first tokens two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass
class _Window:
    """The rows and positions of one forward pass; travels to the attention as an argument."""

    prefix: Prefix
    first: int
    """The first of the rows that take part."""
    position_BT: Tensor
    """Where each new token stands among its row's stored tokens."""
    stored: int
    sliding: dict[int, int]
    """The sliding window of each layer that has one."""
    layers_seen: int = 0
    _biases: dict[int | None, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def bias(
        self, sliding: int | None, per_group: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """What hides tokens from queries: own ones [B, 1, GT, S] and, if any, prefix ones [BGT, P]."""
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
            self._biases[sliding] = (own_B1QS, prefix_QP)
        return self._biases[sliding]


class Slots(Cache):
    """The keys and values of every row's own tokens, a slot of fixed size per row."""

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
        """Store the new keys and values of a layer; return all that the rows have."""
        assert self.window is not None
        if layer_idx == len(self._key_BKSD):
            rows, capacity = self._shape
            for store, new in ((self._key_BKSD, key_states), (self._value_BKSD, value_states)):
                store.append(new.new_zeros(rows, new.shape[1], capacity, new.shape[3]))
        rows = slice(self.window.first, self.window.first + len(key_states))
        key_BKSD, value_BKSD = self._key_BKSD[layer_idx][rows], self._value_BKSD[layer_idx][rows]
        position_BT = self.window.position_BT
        row_B1 = torch.arange(len(position_BT), device=position_BT.device)[:, None]
        key_BKSD[row_B1, :, position_BT] = key_states.transpose(1, 2)
        value_BKSD[row_B1, :, position_BT] = value_states.transpose(1, 2)
        stored = self.window.stored
        return key_BKSD[:, :, :stored], value_BKSD[:, :, :stored]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens before the new ones, in the longest row."""
        assert self.window is not None
        return len(self.window.prefix.tokens) + self.window.stored

    def copy(self, sources: list[int], targets: list[int], stored: int) -> None:
        """Copy rows onto others."""
        for store in (*self._key_BKSD, *self._value_BKSD):
            store[targets, :, :stored] = store[sources, :, :stored]

    def picked(self, rows: list[int], stored: int, capacity: int) -> "Slots":
        """New slots that begin with what rows of these have stored; a row may be picked often."""
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

    def row(self, stored: int) -> tuple[list[Tensor], list[Tensor]]:
        """The first row's keys and values, a pair of lists over the layers."""
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
    """Attention over the shared prefix and over each row's own tokens, under one softmax."""
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
    """Attention over one part of the tokens, and the log of its sum of weights.

    With both, parts are joined as if under one softmax.
    """
    if query.device.type == "cpu" and softcap is None and key.shape == value.shape:
        # The kernel behind `scaled_dot_product_attention`, which itself keeps the sum back.
        out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=bias, scale=1.0
        )
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
    """Why the shared-prefix loop cannot serve a model, as far as its configuration tells."""
    if not model._can_set_attn_implementation():
        return "its attention cannot be replaced"
    if model.config.get_text_config().to_dict().get("attention_chunk_size") is not None:
        return "its attention is chunked"
    layers = DynamicCache(config=model.config).layers
    if len(layers) != model.config.get_text_config().num_hidden_layers:
        return "its layers share keys and values"
    for layer in layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            return f"it has a layer that is not attention alone ({type(layer).__name__})"
    return None


@contextmanager
def two_part(model: PreTrainedModel) -> Iterator[None]:
    """The model with the two-part attention."""
    own = model.config._attn_implementation or "eager"
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


class SharedPrefixLoop:
    """The decoding loop for one model; keeps the prefixes it has computed."""

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
        """Why this loop cannot serve its model, as a trial on one prompt tells."""
        plain_V = self._model(torch.tensor([tokens], device=self._model.device)).logits[0, -1]
        try:
            with two_part(self._model):
                batch = _Batch(self, self.prefix(tokens[:shared]), [tokens], [0], [0], 1, 1)
                own_V = batch.first_logits()
        # What code that was not written for another attention or cache may do with one.
        except (AttributeError, IndexError, NotImplementedError, TypeError) as error:
            return f"its code does not go with another attention ({error})"
        if batch.layers_seen != self._layers:
            return f"{self._layers - batch.layers_seen} of its layers do not use the attention"
        difference = (own_V.float() - plain_V.float()).abs().max() / plain_V.float().std()
        if not float(difference) <= AGREEMENT.get(self._model.dtype, 1.0):
            return f"on a prompt, its logits would be off by {difference:.2g} standard deviations"
        return None

    def complete(
        self,
        rows: Sequence[tuple[int, ...]],
        uniform_BN: Tensor,
        params: SamplingParams,
        ending: Ending,
        finished: Callable[[int, list[int]], None],
        *,
        prefix_tokens: Sequence[int],
        batch_size: int,
    ) -> None:
        """Complete every row of tokens, the last `begun[row]` of which are of its completion.

        `finished` gets a row's number and the tokens of its whole completion.
        """
        with two_part(self._model):
            for group in plan(rows, batch_size, params.max_tokens):
                prefix = self.prefix(rows[group.numbers[0]][: group.shared])
                batch = _Batch(
                    self, prefix, rows, prefix_tokens, group.numbers, params.max_tokens, batch_size
                )
                batch.run(uniform_BN, params, ending, finished)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def slots(self, rows: int, capacity: int) -> Slots:
        """Empty slots for so many rows of at most so many tokens."""
        return Slots(rows, capacity, self._layers)

    def prefill(
        self, slots: Slots, prefix: Prefix, first: int, own: Sequence[tuple[int, ...]]
    ) -> None:
        """Store the keys of rows of tokens, given shortest first, in slots from `first` on.

        Rows are padded on the right, where padding is seen by nothing before it.
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
        """The keys and values of a prefix, from the cache as far as it is there."""
        if tokens in self._prefixes:
            self._prefixes[tokens] = self._prefixes.pop(tokens)  # the latest stands last
            return self._prefixes[tokens]
        prefix = Prefix(())
        for known in self._prefixes.values():
            whole = _common(known.tokens, tokens) // CHUNK * CHUNK
            if whole > len(prefix.tokens):
                prefix = Prefix(
                    tokens[:whole],
                    tuple(key_KPD[:, :whole] for key_KPD in known.key_KPD),
                    tuple(value_KPD[:, :whole] for value_KPD in known.value_KPD),
                )
        for start in range(len(prefix.tokens), len(tokens), CHUNK):
            prefix = self._longer(prefix, tokens[start : start + CHUNK])
        self._prefixes[tokens] = prefix
        if len(self._prefixes) > KEPT_PREFIXES:
            del self._prefixes[next(iter(self._prefixes))]
        return prefix

    def _longer(self, prefix: Prefix, tokens: tuple[int, ...]) -> Prefix:
        """The prefix with more tokens after it."""
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
        """The logits (with `head`) or hidden states of new tokens, whose keys are stored."""
        window = _Window(prefix, first, position_BT, stored, self._sliding)
        slots.window = window
        part = self._model if head else self._model.base_model
        out = part(
            input_ids=token_BT,
            position_ids=position_BT + len(prefix.tokens),
            past_key_values=slots,
            use_cache=True,
            selftaught_window=window,
        )
        return out.logits if head else out.last_hidden_state


class _Batch:
    """Rows of one group being completed: those at work in the first slots, the others waiting."""

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
        self._begun = {
            number: rows[number][len(rows[number]) - prefix_tokens[number] :] for number in numbers
        }
        # Shortest first: prompts computed together are padded little.
        self._waiting = sorted(numbers, key=lambda number: (len(rows[number]), rows[number]))
        size = min(batch_size, len(numbers))
        self._size = size
        longest = max(len(rows[number]) - prefix_tokens[number] for number in numbers) + max_tokens
        # The last token of a completion is not stored.
        self._slots = loop.slots(size, longest - shared - 1)
        device = loop._model.device
        self._at_work = 0
        self._number_B = torch.zeros(size, dtype=torch.long, device=device)
        self._stored_B = torch.zeros_like(self._number_B)
        self._token_B = torch.zeros_like(self._number_B)
        self._count_B = torch.zeros_like(self._number_B)
        self._drawn_BN = torch.zeros((size, max_tokens), dtype=torch.long, device=device)

    def run(
        self,
        uniform_BN: Tensor,
        params: SamplingParams,
        ending: Ending,
        finished: Callable[[int, list[int]], None],
    ) -> None:
        """Decode until every row has ended."""
        eos = torch.tensor(ending.eos, dtype=torch.long, device=uniform_BN.device)
        while self._at_work or self._waiting:
            free = self._size - self._at_work
            if self._waiting and free >= max(1, self._size // 8):
                self._fill(free)
            self._step(uniform_BN, params)
            n = self._at_work
            token_B = self._token_B[:n]
            ended_B = torch.isin(token_B, eos) | (self._count_B[:n] == params.max_tokens)
            for row in (ending.suspects(token_B) & ~ended_B).nonzero()[:, 0].tolist():
                drawn = self._drawn_BN[row, : self._count_B[row]].tolist()
                ended_B[row] = ending.cut(drawn) is not None
            ended = ended_B.nonzero()[:, 0].tolist()
            if ended:
                for row in ended:
                    drawn = self._drawn_BN[row, : self._count_B[row]].tolist()
                    finished(int(self._number_B[row]), drawn)
                self._drop(ended)

    def _fill(self, free: int) -> None:
        """Put waiting rows to work; a prompt that several rows have is computed once."""
        taken, self._waiting = self._waiting[:free], self._waiting[free:]
        slot_of: dict[tuple[int, ...], int] = {}
        for number in taken:
            slot_of.setdefault(self._own[number], self._at_work + len(slot_of))
        own = list(slot_of)
        # The last token is left to the first decoding step, which so gives the first new token of
        # all rows at once; prompts padded on the right need no logits here.
        before = [tokens[:-1] for tokens in own]
        self._loop.prefill(self._slots, self._prefix, self._at_work, before)
        doubles = taken.copy()
        firsts = [doubles.pop(doubles.index(n)) for n in self._firsts(taken)]
        order = firsts + doubles
        slots = list(range(self._at_work, self._at_work + len(order)))
        if doubles:
            sources = [slot_of[self._own[number]] for number in doubles]
            self._slots.copy(sources, slots[len(firsts) :], len(own[-1]) - 1)
        device = self._token_B.device
        new = slice(slots[0], slots[-1] + 1)
        self._number_B[new] = torch.tensor(order, device=device)
        self._stored_B[new] = torch.tensor([len(self._own[n]) - 1 for n in order], device=device)
        self._token_B[new] = torch.tensor([self._own[n][-1] for n in order], device=device)
        prefix_tokens = [self._begun[n] for n in order]
        self._count_B[new] = torch.tensor([*map(len, prefix_tokens)], device=device)
        for row, tokens in enumerate(prefix_tokens, slots[0]):
            if tokens:
                self._drawn_BN[row, : len(tokens)] = torch.tensor(tokens, device=device)
        self._at_work += len(order)

    def _firsts(self, taken: list[int]) -> list[int]:
        """The first number of each different prompt."""
        firsts: dict[tuple[int, ...], int] = {}
        for number in taken:
            firsts.setdefault(self._own[number], number)
        return list(firsts.values())

    @property
    def layers_seen(self) -> int:
        """How many layers used the attention in the latest forward pass."""
        return 0 if self._slots.window is None else self._slots.window.layers_seen

    def first_logits(self) -> Tensor:
        """The logits after the prompt of the only row; for the check at the start."""
        self._fill(1)
        return self._logits()[0]

    def _logits(self) -> Tensor:
        """The logits of the next token of every row at work."""
        position_B1 = self._stored_B[: self._at_work, None]
        logits_BTV = self._loop.forward(
            self._slots,
            self._prefix,
            0,
            self._token_B[: self._at_work, None],
            position_B1,
            int(position_B1.max()) + 1,
            head=True,
        )
        return logits_BTV[:, -1]

    def _step(self, uniform_BN: Tensor, params: SamplingParams) -> None:
        """One new token for every row at work."""
        n = self._at_work
        logits_BV = self._logits()
        count_B = self._count_B[:n]
        token_B = choose(logits_BV, uniform_BN[self._number_B[:n], count_B], params)
        self._drawn_BN[:n].scatter_(1, count_B[:, None], token_B[:, None])
        self._token_B[:n] = token_B
        self._stored_B[:n] += 1
        self._count_B[:n] += 1

    def _drop(self, ended: list[int]) -> None:
        """Take rows out; the last rows at work move into their slots."""
        left = self._at_work - len(ended)
        gone = set(ended)
        targets = [row for row in ended if row < left]
        sources = [row for row in range(left, self._at_work) if row not in gone]
        if targets:
            self._slots.copy(sources, targets, int(self._stored_B[: self._at_work].max()))
            for state in (
                self._number_B,
                self._stored_B,
                self._token_B,
                self._count_B,
                self._drawn_BN,
            ):
                state[targets] = state[sources]
        self._at_work = left


def shared_prefix_loop(
    model: PreTrainedModel, tokens: tuple[int, ...], shared: int
) -> SharedPrefixLoop | str:
    """The loop, or why it cannot serve this model, as a trial on one prompt tells."""
    reason = obstacle(model)
    if reason is not None:
        return reason
    loop = SharedPrefixLoop(model)
    return loop.objection(tokens, shared) or loop

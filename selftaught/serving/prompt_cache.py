"""Keys and values of earlier prompts, and the tokens that new prompts share with them.

Shapes: K key-value heads, P tokens, D head width.
"""

from collections import OrderedDict

from torch import Tensor

from selftaught.samplers.local.prefix_loop import CHUNK, Prefix

RECENT = 32
"""Number of latest prompts that a new prompt is compared with."""
SHARED = 128
"""Minimum number of tokens that prompts must share to be decoded with a shared prefix."""
SIMILAR = 0.8
"""A shared prefix is cut to a shorter one that more prompts share if it has at least this part of
its length."""


def common(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """Return the length of the common prefix of two sequences, by bisection."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class PromptCache:
    """Keys and values of prompts, at most `max_bytes`; the least recently used ones are removed.

    Only multiples of `CHUNK` tokens are stored, so that results do not depend, even in rounding, on
    what was stored before.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stored: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        self.bytes = 0

    def longest(self, tokens: tuple[int, ...], most: int) -> Prefix:
        """Return the longest stored beginning of a prompt, at most `most` tokens."""
        best, length = None, 0
        for known in self._stored:
            shared = min(common(known, tokens), most) // CHUNK * CHUNK
            if shared > length:
                best, length = known, shared
        if best is None:
            return Prefix(())
        self._stored.move_to_end(best)
        found = self._stored[best]
        return Prefix(
            tokens[:length],
            tuple(key_KPD[:, :length] for key_KPD in found.key_KPD),
            tuple(value_KPD[:, :length] for value_KPD in found.value_KPD),
        )

    def put(self, tokens: tuple[int, ...], keys: list[Tensor], values: list[Tensor]) -> None:
        """Store the keys and values of a prompt's tokens, without those after the last chunk."""
        length = len(tokens) // CHUNK * CHUNK
        tokens = tokens[:length]
        if not length or any(known[:length] == tokens for known in self._stored):
            return
        for known in [one for one in self._stored if tokens[: len(one)] == one]:
            self._remove(known)  # a beginning of the new one
        copies = [[one_KPD[:, :length].clone() for one_KPD in part] for part in (keys, values)]
        size = sum(one.numel() * one.element_size() for part in copies for one in part)
        if size > self._max_bytes:
            return
        self._stored[tokens] = Prefix(tokens, tuple(copies[0]), tuple(copies[1]))
        self.bytes += size
        while self.bytes > self._max_bytes:
            self._remove(next(iter(self._stored)))

    def _remove(self, tokens: tuple[int, ...]) -> None:
        found = self._stored.pop(tokens)
        self.bytes -= sum(
            one.numel() * one.element_size() for one in (*found.key_KPD, *found.value_KPD)
        )


class RecentPrompts:
    """The latest prompts, to find the tokens that several prompts start with."""

    def __init__(self) -> None:
        self._latest: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def shared(self, prompt: tuple[int, ...]) -> int:
        """Return the number of tokens to share with earlier prompts, 0 if there are too few; then
        add the prompt.

        Earlier prompts that are a beginning of this one are earlier turns of the same conversation
        and do not count.
        """
        lengths = []
        for other in self._latest:
            length = common(other, prompt)
            if SHARED <= length < min(len(other), len(prompt)) - 1:
                lengths.append(length)
        self._latest[prompt] = None
        self._latest.move_to_end(prompt)
        while len(self._latest) > RECENT:
            self._latest.popitem(last=False)
        return min((one for one in lengths if one >= SIMILAR * max(lengths)), default=0)

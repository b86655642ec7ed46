"""Choice of the next token from logits, and what both decoding loops are given.

Shapes: B rows, N tokens of a completion, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selftaught.records import Text
from selftaught.rendering import opens_thought, turn_ending
from selftaught.samplers.base import SamplingParams, draw_number
from selftaught.samplers.stopping import Ending

NUCLEUS = 512
"""Number of most likely tokens tried for top_p before the whole vocabulary is sorted."""


@dataclass(frozen=True)
class Decoding:
    """Rows of tokens to complete, with the same sampling parameters and the same ending."""

    rows: Sequence[tuple[int, ...]]
    """Token ids of prompts, each followed by the prefix tokens of its completion."""
    prefix_tokens: Sequence[int]
    """Number of prefix tokens of each row."""
    uniform_BN: Tensor
    """Uniform random numbers, one per row and token of the completion."""
    params: SamplingParams
    ending: Ending
    """Decides when a completion ends."""
    finished: Callable[[int, list[int]], None]
    """Called with a row's index and the token ids of its whole completion."""


def uniforms(seed: int, key: str, index: int, count: int) -> Tensor:
    """Return `count` uniform random numbers, one per token, from (seed, key, sample index)."""
    generator = torch.Generator().manual_seed(draw_number(seed, key, index))
    return torch.rand(count, generator=generator)


def choose(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams) -> Tensor:
    """Return the next token of every row: the argmax at temperature 0, otherwise a sample.

    Args:
        logits_BV: Logits.
        uniform_B: One uniform random number per row.
        params: Temperature and top_p are used.

    Returns:
        Token ids, [B].
    """
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = torch.softmax(logits_BV.float() / params.temperature, -1)
    if params.top_p < 1:
        probability_BV = _nucleus(probability_BV, params.top_p)
    # In float64, because a float32 cumulative sum over a large vocabulary loses rare tokens.
    cumulative_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]


def _nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """Set probabilities outside the nucleus, the smallest set of tokens with mass `top_p`, to 0."""
    likely, token = probability_BV.topk(min(NUCLEUS, probability_BV.shape[-1]))
    if bool((likely.sum(-1) < top_p).any()):
        likely, token = probability_BV.sort(descending=True)
    before = likely.cumsum(-1) - likely
    kept = likely.masked_fill(before >= top_p, 0.0)
    return torch.zeros_like(probability_BV).scatter_(-1, token, kept)


def endings(
    tokenizer: PreTrainedTokenizerBase,
    eos: Sequence[int],
    prompts: Sequence[Text],
    params: SamplingParams,
) -> "list[Ending]":
    """Return the `Ending` of each prompt's completions.

    Prompts that open a thought share one object, and so do the others.

    Args:
        tokenizer: The model's tokenizer.
        eos: Ids of the model's end tokens. The token with which the chat template ends an answer is
            added, because the files of base models do not list it.
        prompts: Texts or messages.
        params: Stop strings, thought marks and template variables are used.
    """
    options, marks = params.chat_template_kwargs, params.thought_marks
    messages = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    ends = [*eos]
    if messages is not None:
        with suppress(ValueError):  # the template does not write answers unchanged
            ends.append(turn_ending(tokenizer, messages, options)[-1])
    plain, opened = (
        Ending(tokenizer, ends, params.stop, marks, opened=opens) for opens in (False, True)
    )
    return [
        opened if opens_thought(tokenizer, prompt, marks, options) else plain for prompt in prompts
    ]

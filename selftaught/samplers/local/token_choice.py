"""From logits to tokens, and from tokens to a completion's end.

Shapes: B rows, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from selftaught.records import Text
from selftaught.rendering import opens_thought, turn_ending
from selftaught.samplers.base import SamplingParams, draw_number
from selftaught.samplers.stopping import Ending

NUCLEUS = 512
"""Tokens looked at before a whole vocabulary is sorted for top_p."""


def uniforms(seed: int, key: str, index: int, count: int) -> Tensor:
    """One uniform number per token of a completion, drawn for (seed, key, sample index) alone."""
    generator = torch.Generator().manual_seed(draw_number(seed, key, index))
    return torch.rand(count, generator=generator)


def choose(logits_BV: Tensor, uniform_B: Tensor, params: SamplingParams) -> Tensor:
    """The next token of every row: the likeliest at temperature 0, else the one its number draws."""
    if params.temperature == 0:
        return logits_BV.argmax(-1)
    probability_BV = torch.softmax(logits_BV.float() / params.temperature, -1)
    if params.top_p < 1:
        probability_BV = _nucleus(probability_BV, params.top_p)
    # In float64, because a float32 running sum over a large vocabulary loses the rare tokens.
    cumulative_BV = probability_BV.cumsum(-1, dtype=torch.float64)
    target_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]


def _nucleus(probability_BV: Tensor, top_p: float) -> Tensor:
    """The smallest set of likeliest tokens that holds `top_p`; the others get 0."""
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
    """When the completions of each prompt end; one object for all prompts that open a thought.

    Args:
        eos: the model's own end tokens. The one that the chat template ends an answer with is added,
            because a model's files need not name it, as those of base models do not.
    """
    options, marks = params.chat_template_kwargs, params.thought_marks
    asked = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    ends = [*eos]
    if asked is not None:
        with suppress(ValueError):  # a template that writes no answers
            ends.append(turn_ending(tokenizer, asked, options)[-1])
    plain, opened = (
        Ending(tokenizer, ends, params.stop, marks, opened=opens) for opens in (False, True)
    )
    return [opened if opens_thought(tokenizer, one, marks, options) else plain for one in prompts]

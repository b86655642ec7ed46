"""Text from a model that thinks before every token.

A thought of t tokens is appended to the cached text and dropped again when the next token is chosen.
A token costs t + 2 passes: its own, one for the start token and each thought token but the last, and
one for the last together with the end token.

Shapes: B texts, T text tokens so far, N thoughts, R rows (B N), D hidden width, V vocabulary.
"""

from collections.abc import Generator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from selftaught.quiet.attention import Reading, thoughtful
from selftaught.quiet.deciding import ThinkWhen, check_thoughts, wanted
from selftaught.quiet.thoughts import Prefix, after_thought, draw, language_head, read_on, think

if TYPE_CHECKING:
    from selftaught.quiet.model import QuietLM


@torch.no_grad()
def next_logits(
    model: "QuietLM",
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    thoughts: int,
    thought_temperature: float,
    think_when: ThinkWhen,
    ends: list[int],
    seed: int,
) -> Generator[Tensor, Tensor, None]:
    """The log-probabilities of the next token `[B, V]`; send it the token of each text `[B]`. Used
    while the base is `thoughtful`.

    With several thoughts the probabilities after each are averaged; texts that do not think have the
    base's own. Start, end and padding tokens
    have none.
    """
    base, marks = model.base, model.marks
    head = language_head(base)
    banned = sorted(set(marks.never) - set(ends))  # padding may be what ends a text
    generator = torch.Generator().manual_seed(seed)
    real_BT, new_BT = attention_mask, input_ids
    reading = Reading(None, keep=True)
    while True:
        prefix = read_on(base, new_BT, real_BT, reading)
        without_BD = prefix.hidden_BTD[:, -1]
        logits_BV = head(without_BD).float().log_softmax(-1)
        thinks_B = wanted(model, think_when, without_BD, logits_BV)
        shape = (len(input_ids), thoughts, 1, model.quiet_config.thought_tokens)
        uniform = torch.rand(shape, generator=generator).to(input_ids.device)
        row_X = thinks_B.nonzero()[:, 0]
        if len(row_X):
            some = prefix if len(row_X) == len(input_ids) else _rows(prefix, row_X)
            last = torch.tensor([[real_BT.shape[1] - 1]], device=input_ids.device)
            thought, _, thinking = think(
                base, head, some, last, uniform[row_X], marks, thought_temperature
            )
            after_RD = after_thought(base, some, last, thinking, thought, marks)
            after_XND = after_RD.view(len(row_X), thoughts, -1)
            logits_BV[row_X] = model.mixed_logits(without_BD[row_X], after_XND)
        logits_BV[:, banned] = -torch.inf
        token_B = yield logits_BV
        new_BT = token_B[:, None]
        real_BT = torch.cat([real_BT, torch.ones_like(real_BT[:, :1])], 1)


def _rows(prefix: Prefix, row_X: Tensor) -> Prefix:
    """Some texts of several."""
    return Prefix(
        prefix.ids_BT[row_X],
        prefix.hidden_BTD[row_X],
        [key[row_X] for key in prefix.key_BKTD],
        [value[row_X] for value in prefix.value_BKTD],
        prefix.position_BT[row_X],
        None if prefix.real_BT is None else prefix.real_BT[row_X],
    )


def generate(
    model: "QuietLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    max_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    thoughts: int = 1,
    thought_temperature: float = 0.0,
    think_when: ThinkWhen = ThinkWhen(),  # noqa: B008  frozen
    seed: int = 0,
) -> Tensor:
    """Texts continued, `[B, T + new]`; the arguments of transformers' `generate` that are served.

    A `generation_config` gives max_new_tokens, do_sample, temperature, eos_token_id and
    pad_token_id where they are not given themselves; its other fields are not looked at. Without one
    texts end at the base's own end tokens. Padding stands on the left.

    Raises:
        ValueError: no max_new_tokens, an empty prompt, padding on the right, or several thoughts at
            temperature 0, which would all be the same.
    """
    given = generation_config or GenerationConfig(eos_token_id=_end_tokens(model))
    max_new_tokens = given.max_new_tokens if max_new_tokens is None else max_new_tokens
    do_sample = bool(given.do_sample) if do_sample is None else do_sample
    temperature = (given.temperature or 1.0) if temperature is None else temperature
    eos_token_id = given.eos_token_id if eos_token_id is None else eos_token_id
    pad_token_id = given.pad_token_id if pad_token_id is None else pad_token_id
    if max_new_tokens is None:
        raise ValueError("max_new_tokens must be given: how many tokens to write at most.")
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if input_ids.shape[1] == 0:
        raise ValueError("Expected a prompt of at least one token, got an empty one.")
    if not bool(mask_BT[:, -1].all()):
        raise ValueError("Expected padding on the left, got some on the right; pad that side.")
    check_thoughts(thoughts, thought_temperature)
    ends = [] if eos_token_id is None else torch.tensor(eos_token_id).view(-1).tolist()
    filler = pad_token_id if pad_token_id is not None else (ends[0] if ends else 0)
    generator = torch.Generator().manual_seed(seed + 1)
    steps = next_logits(
        model, input_ids, mask_BT, thoughts=thoughts, thought_temperature=thought_temperature,
        think_when=think_when, ends=ends, seed=seed,
    )  # fmt: skip
    done_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    whole_BT = input_ids
    with thoughtful(model.base):  # once: it goes through all layers
        logits_BV = next(steps)
        for number in range(max_new_tokens):
            if logits_processor is not None:
                logits_BV = logits_processor(whole_BT, logits_BV)  # type: ignore[arg-type]
            uniform_B = torch.rand(len(input_ids), generator=generator).to(input_ids.device)
            token_B, _ = draw(logits_BV.float(), uniform_B, temperature if do_sample else 0.0)
            token_B = token_B.masked_fill(done_B, filler)
            whole_BT = torch.cat([whole_BT, token_B[:, None]], 1)
            if streamer is not None:
                streamer.put(token_B.cpu())
            done_B = done_B | torch.isin(token_B, torch.tensor(ends, device=token_B.device))
            if stopping_criteria is not None:
                stopped_B = stopping_criteria(whole_BT, logits_BV)  # type: ignore[arg-type]
                done_B = done_B | stopped_B.to(done_B.device)
            if bool(done_B.all()) or number + 1 == max_new_tokens:
                break
            logits_BV = steps.send(token_B)
    if streamer is not None:
        streamer.end()
    return whole_BT


def _end_tokens(model: "QuietLM") -> int | list[int] | None:
    configured = model.base.generation_config
    return None if configured is None else configured.eos_token_id

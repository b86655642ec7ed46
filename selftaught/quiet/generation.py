"""Text from a model that thinks before every token.

A thought of t tokens is appended to the cached text and dropped again when the next token is chosen.
A token costs t + 2 passes: its own, one for the start token and each thought token but the last, and
one for the last together with the end token.

Shapes: B texts, T text tokens so far, N thoughts, R rows (B N), D hidden width, V vocabulary.
"""

import copy
import math
from collections.abc import Generator
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from selftaught.quiet.attention import Reading, thoughtful
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.gating import ThinkWhen, check_thoughts, wanted
from selftaught.quiet.mixing import Gate
from selftaught.quiet.thoughts import (
    Prefix,
    SpecialTokens,
    after_thought,
    draw,
    language_head,
    read_on,
    think,
)


class ThinkingModel(Protocol):
    """What generation needs of a model that thinks, a `QuietLM`."""

    base: PreTrainedModel
    quiet_config: QuietConfig
    gate: Gate | None

    @property
    def marks(self) -> SpecialTokens: ...

    def check_length(
        self, ids_BT: Tensor, mask_BT: Tensor | None = None, more: int = 0
    ) -> None: ...

    def mixed_logits(self, without_BD: Tensor, with_BND: Tensor) -> Tensor: ...


@torch.no_grad()
def next_logits(
    model: ThinkingModel,
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
        thinks_B = wanted(model.gate, think_when, without_BD, logits_BV)
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


HONOURED = (
    "max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p",
    "stop_strings", "num_return_sequences", "eos_token_id", "pad_token_id",
)  # fmt: skip
"""Fields of a `GenerationConfig` that `generate` follows."""
NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "typical_p": (1.0,), "top_h": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "diversity_penalty": (0.0,), "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "prompt_lookup_num_tokens": (0,),
}  # fmt: skip
"""Values at which a field that is not followed changes nothing; None and False never do."""
WITHOUT_EFFECT = frozenset((
    # How the same tokens are computed.
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory",
    "compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config",
    # Of beam search, contrastive search, assistants and encoders, which other fields would turn on.
    "early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "max_matching_ngram_size", "speculation_type", "decoder_start_token_id", "renormalize_logits",
    "remove_invalid_values", "bos_token_id", "transformers_version",
))  # fmt: skip


def check_generation(config: GenerationConfig) -> None:
    """Refuse fields of a generation configuration that `generate` does not follow.

    Raises:
        ValueError: names the fields and their values.
    """
    ignored = {
        name: value for name, value in vars(config).items()
        if not name.startswith("_") and name not in WITHOUT_EFFECT and name not in HONOURED
        and value is not None and value is not False and value not in NEUTRAL.get(name, ())
    }  # fmt: skip
    if ignored:
        told = ", ".join(f"{name}={value!r}" for name, value in sorted(ignored.items()))
        raise ValueError(
            f"A model that thinks cannot generate with {told}. Leave it out; followed are "
            f"{', '.join(HONOURED)}, and a logits_processor or stopping_criteria of your own."
        )


def generate(
    model: ThinkingModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    generation_config: GenerationConfig | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: BaseStreamer | None = None,
    thoughts: int = 1,
    thought_temperature: float = 0.0,
    think_when: ThinkWhen = ThinkWhen(),  # noqa: B008  frozen
    seed: int = 0,
    **fields: Any,
) -> Tensor:
    """Continue texts, thinking before every token: `[B, T + new]`.

    The arguments are those of transformers' `generate`. Padding stands on the left. Without a
    `generation_config`, texts end at the base's own end tokens.

    Args:
        generation_config: its `max_new_tokens`, `max_length`, `do_sample`, `temperature` (0 is greedy),
            `top_k`, `top_p`, `min_p` (None: not limited), `stop_strings`, `num_return_sequences`,
            `eos_token_id` and `pad_token_id` are followed; other fields that would change the result
            are refused.
        tokenizer: needed with `stop_strings`.
        thoughts: per token; the probabilities after each are averaged.
        fields: fields of the generation configuration by name, which go before it.

    Raises:
        ValueError: no or not a positive number of new tokens, a text that with them and a thought is
            longer than the model's context, an empty prompt, padding on the right, several thoughts
            at temperature 0 (they would be the same), or a field that is not followed.
    """
    given = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig(eos_token_id=_end_tokens(model))  # fmt: skip
    for name, value in fields.items():
        if not hasattr(given, name):
            raise ValueError(
                f"generate has no option {name!r}; see GenerationConfig of transformers."
            )
        if value is not None:
            setattr(given, name, value)
    check_generation(given)
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"Expected a prompt of at least one token, got an empty one: input_ids has the shape "
            f"{list(input_ids.shape)}."
        )
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not bool(mask_BT[:, -1].all()):
        raise ValueError("Expected padding on the left, got some on the right; pad that side.")
    check_thoughts(thoughts, thought_temperature)
    new = _new_tokens(given, input_ids.shape[1])
    model.check_length(input_ids, mask_BT, new)
    temperature = _temperature(given)
    copies = 1 if given.num_return_sequences is None else given.num_return_sequences
    if copies < 1:
        raise ValueError(f"num_return_sequences must be at least 1; got {copies}.")
    if copies > 1:
        if not (temperature or thought_temperature):
            raise ValueError(
                f"num_return_sequences={copies} without sampling would give the same text {copies} times; "
                "set do_sample=True, or a thought_temperature."
            )
        input_ids, mask_BT = (one.repeat_interleave(copies, 0) for one in (input_ids, mask_BT))
    stopping = StoppingCriteriaList(stopping_criteria or [])
    if given.stop_strings:
        if tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... to generate.")
        stopping.append(StopStringCriteria(tokenizer, given.stop_strings))
    return _continued(
        model, input_ids, mask_BT, given, new, temperature, logits_processor, stopping, streamer,
        thoughts=thoughts, thought_temperature=thought_temperature, think_when=think_when, seed=seed,
    )  # fmt: skip


def _continued(
    model: ThinkingModel,
    input_ids: Tensor,
    mask_BT: Tensor,
    given: GenerationConfig,
    new: int,
    temperature: float,
    logits_processor: LogitsProcessorList | None,
    stopping: StoppingCriteriaList,
    streamer: BaseStreamer | None,
    *,
    thoughts: int,
    thought_temperature: float,
    think_when: ThinkWhen,
    seed: int,
) -> Tensor:
    """The loop over new tokens."""
    eos, pad = given.eos_token_id, given.pad_token_id
    ends = [] if eos is None else torch.tensor(eos).view(-1).tolist()
    filler = pad if pad is not None else (ends[0] if ends else 0)
    warpers = _warpers(given) if temperature else LogitsProcessorList()
    generator = torch.Generator().manual_seed(seed + 1)
    steps = next_logits(
        model, input_ids, mask_BT, thoughts=thoughts, thought_temperature=thought_temperature,
        think_when=think_when, ends=ends, seed=seed,
    )  # fmt: skip
    done_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    whole_BT = input_ids
    with thoughtful(model.base):  # once: it goes through all layers
        logits_BV = next(steps)
        for number in range(new):
            if logits_processor is not None:
                logits_BV = logits_processor(whole_BT, logits_BV)  # type: ignore[arg-type]
            uniform_B = torch.rand(len(input_ids), generator=generator).to(input_ids.device)
            scores_BV = logits_BV.float()
            if warpers:  # transformers limits what is left after the temperature
                scores_BV = warpers(whole_BT, scores_BV / temperature)  # type: ignore[arg-type]
            token_B, _ = draw(scores_BV, uniform_B, 1.0 if warpers else temperature)
            token_B = token_B.masked_fill(done_B, filler)
            whole_BT = torch.cat([whole_BT, token_B[:, None]], 1)
            if streamer is not None:
                streamer.put(token_B.cpu())
            done_B = done_B | torch.isin(token_B, torch.tensor(ends, device=token_B.device))
            if stopping:
                stopped_B = stopping(whole_BT, logits_BV)  # type: ignore[arg-type]
                done_B = done_B | stopped_B.to(done_B.device)
            if bool(done_B.all()) or number + 1 == new:
                break
            logits_BV = steps.send(token_B)
    if streamer is not None:
        streamer.end()
    return whole_BT


def _new_tokens(given: GenerationConfig, prompt: int) -> int:
    """How many tokens to write at most; `max_length` counts the prompt, as in transformers."""
    new = given.max_new_tokens
    if new is None:
        if given.max_length is None:
            raise ValueError("max_new_tokens must be given: how many tokens to write at most.")
        new = given.max_length - prompt
        if new < 1:
            raise ValueError(
                f"max_length={given.max_length} leaves no new token after a prompt of {prompt}; "
                "give max_new_tokens."
            )
    if type(new) is not int or new < 1:
        raise ValueError(f"max_new_tokens must be a whole number of at least 1; got {new!r}.")
    return new


def _temperature(given: GenerationConfig) -> float:
    """The sampling temperature; 0 is greedy."""
    temperature = 1.0 if given.temperature is None else given.temperature
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be at least 0; got {temperature}.")
    return temperature if given.do_sample else 0.0


def _warpers(given: GenerationConfig) -> LogitsProcessorList:
    """The limits on what may be drawn, in transformers' order."""
    found = LogitsProcessorList()
    if given.top_k:
        found.append(TopKLogitsWarper(given.top_k))
    if given.top_p is not None and given.top_p < 1:
        found.append(TopPLogitsWarper(given.top_p))
    if given.min_p:
        found.append(MinPLogitsWarper(given.min_p))
    return found


def _end_tokens(model: ThinkingModel) -> int | list[int] | None:
    configured = model.base.generation_config
    return None if configured is None else configured.eos_token_id

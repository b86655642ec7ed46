"""Generation with a thought before every token.

A thought of t tokens is appended to the cached text and removed again after the next token has been
chosen. A new token costs t + 2 forward passes: one for the token itself, one for the start token,
one for each thought token except the last, and one for the last thought token with the end token.

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

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.gating import ThinkWhen, check_thoughts, wanted
from selftaught.quiet.mixing import Gate
from selftaught.quiet.passes import Reading
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
    """Interface that generation needs; implemented by `QuietLM`."""

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
    """Yield the log-probabilities of the next token, `[B, V]`, for one token after another.

    This is a generator: send it the chosen token of each text, `[B]`, to get the next
    log-probabilities. It must run inside `thoughtful(model.base)`. Start, end and padding tokens of
    thoughts have log-probability -inf, except for tokens in `ends`.

    Args:
        model: a Quiet-STaR model.
        input_ids: token ids of the prompts, `[B, T]`.
        attention_mask: 1 for text and 0 for padding.
        thoughts: number of thoughts per token. The probabilities after them are averaged.
        thought_temperature: sampling temperature of thoughts. 0 means greedy decoding.
        think_when: where to think. Without a thought, the prediction is that of the base model.
        ends: ids of the tokens that end a text.
        seed: random seed for sampling thoughts.
    """
    base, marks = model.base, model.marks
    head = language_head(base)
    banned = sorted(set(marks.never) - set(ends))  # the padding token may also be the end token
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
    """Return the prefix of some of its texts."""
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
"""Fields of a `GenerationConfig` that `generate` supports."""
NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "min_length": (0,), "min_new_tokens": (0,),
    "typical_p": (1.0,), "top_h": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "diversity_penalty": (0.0,), "penalty_alpha": (0.0,),
    "guidance_scale": (1.0,), "bad_words_ids": ([],), "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],), "prompt_lookup_num_tokens": (0,),
}  # fmt: skip
"""Values at which an unsupported field has no effect, in addition to None and False."""
WITHOUT_EFFECT = frozenset((
    # Fields that change how tokens are computed, but not which.
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory",
    "compile_config", "disable_compile", "prefill_chunk_size", "continuous_batching_config",
    # Fields of beam search, contrastive search, assisted generation and encoder-decoder models.
    # They have an effect only together with other fields, which are refused.
    "early_stopping", "length_penalty", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "max_matching_ngram_size", "speculation_type", "decoder_start_token_id", "renormalize_logits",
    "remove_invalid_values", "bos_token_id", "transformers_version",
))  # fmt: skip


def check_generation(config: GenerationConfig) -> None:
    """Check that a generation configuration sets no field that `generate` does not support.

    Raises:
        ValueError: the configuration sets unsupported fields; names the fields and their values.
    """
    ignored = {
        name: value for name, value in vars(config).items()
        if not name.startswith("_") and name not in WITHOUT_EFFECT and name not in HONOURED
        and value is not None and value is not False and value not in NEUTRAL.get(name, ())
    }  # fmt: skip
    if ignored:
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(ignored.items()))
        raise ValueError(
            f"A Quiet-STaR model cannot generate with {settings}. Leave it out. Supported are "
            f"{', '.join(HONOURED)}, and the arguments logits_processor and stopping_criteria."
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
    """Generate text with a thought before every token.

    The arguments are those of transformers' `generate`, and a few for thoughts.

    Args:
        model: a Quiet-STaR model.
        input_ids: token ids of the prompts, `[B, T]`, padded on the left.
        attention_mask: 1 for text and 0 for padding. None: no padding.
        generation_config: supported fields are `max_new_tokens`, `max_length`, `do_sample`,
            `temperature` (0 means greedy decoding), `top_k`, `top_p`, `min_p` (None: no limit),
            `stop_strings`, `num_return_sequences`, `eos_token_id` and `pad_token_id`. Other fields
            that would change the result are refused. Default: a configuration with the end tokens
            of the base model.
        tokenizer: required with `stop_strings`.
        logits_processor: applied to the log-probabilities of every next token.
        stopping_criteria: additional stopping criteria.
        streamer: receives every new token.
        thoughts: number of thoughts per token. The probabilities after them are averaged.
        thought_temperature: sampling temperature of thoughts. 0 means greedy decoding.
        think_when: where to think.
        seed: random seed for thoughts and tokens.
        fields: fields of the generation configuration by name. They take precedence over
            `generation_config`.

    Returns:
        Token ids of prompts and completions, `[B, T + new]`.

    Raises:
        ValueError: no positive number of new tokens, texts that with the new tokens and a thought
            are longer than the model's context, an empty prompt, padding on the right, several
            thoughts at temperature 0 (they would be the same), or an unsupported field.
    """
    given = copy.deepcopy(generation_config) if generation_config is not None else GenerationConfig(eos_token_id=_end_tokens(model))  # fmt: skip
    for name, value in fields.items():
        if not hasattr(given, name):
            raise ValueError(
                f"generate has no option {name!r}. Supported are {', '.join(HONOURED)}."
            )
        if value is not None:
            setattr(given, name, value)
    check_generation(given)
    if input_ids.ndim != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            "Expected a prompt of at least one token, got an empty one: input_ids has the shape "
            f"{list(input_ids.shape)}."
        )
    mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if not bool(mask_BT[:, -1].all()):
        raise ValueError(
            "Expected padding on the left, got padding on the right. Set "
            "tokenizer.padding_side='left'."
        )
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
                f"num_return_sequences={copies} without sampling would give the same text {copies} "
                "times. Set do_sample=True, or a thought_temperature above 0."
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
    """Run the loop over new tokens."""
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
    with thoughtful(model.base):  # outside the loop, because it visits all layers
        logits_BV = next(steps)
        for number in range(new):
            if logits_processor is not None:
                logits_BV = logits_processor(whole_BT, logits_BV)  # type: ignore[arg-type]
            uniform_B = torch.rand(len(input_ids), generator=generator).to(input_ids.device)
            scores_BV = logits_BV.float()
            if warpers:  # as in transformers, top-k, top-p and min-p apply after the temperature
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
    """Return the maximum number of new tokens. `max_length` includes the prompt, as in
    transformers."""
    new = given.max_new_tokens
    if new is None:
        if given.max_length is None:
            raise ValueError("max_new_tokens must be given: the maximum number of new tokens.")
        new = given.max_length - prompt
        if new < 1:
            raise ValueError(
                f"max_length={given.max_length} leaves no new token after a prompt of {prompt} "
                "tokens. Set max_new_tokens instead."
            )
    if type(new) is not int or new < 1:
        raise ValueError(f"max_new_tokens must be a whole number of at least 1; got {new!r}.")
    return new


def _temperature(given: GenerationConfig) -> float:
    """Return the sampling temperature; 0 means greedy decoding."""
    temperature = 1.0 if given.temperature is None else given.temperature
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be at least 0; got {temperature}.")
    return temperature if given.do_sample else 0.0


def _warpers(given: GenerationConfig) -> LogitsProcessorList:
    """Return the logits processors for top-k, top-p and min-p, in the order of transformers."""
    warpers = LogitsProcessorList()
    if given.top_k:
        warpers.append(TopKLogitsWarper(given.top_k))
    if given.top_p is not None and given.top_p < 1:
        warpers.append(TopPLogitsWarper(given.top_p))
    if given.min_p:
        warpers.append(MinPLogitsWarper(given.min_p))
    return warpers


def _end_tokens(model: ThinkingModel) -> int | list[int] | None:
    configured = model.base.generation_config
    return None if configured is None else configured.eos_token_id

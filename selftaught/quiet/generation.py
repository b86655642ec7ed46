"""Generation with a thought before every token: options, and the loop over new tokens.

Shapes: B texts, T text tokens so far, V vocabulary.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.gating import ThinkWhen, ThoughtParams
from selftaught.quiet.next_token import ThinkingModel, next_logits
from selftaught.quiet.thoughts import draw

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


@dataclass(frozen=True)
class GenerateOptions:
    """Keyword arguments of `generate` that are not fields of a `GenerationConfig`."""

    generation_config: GenerationConfig | None = None
    """Supported fields are `max_new_tokens`, `max_length`, `do_sample`, `temperature` (0 means
    greedy decoding), `top_k`, `top_p`, `min_p` (None means no limit), `stop_strings`,
    `num_return_sequences`, `eos_token_id` and `pad_token_id`. Other fields that would change the
    result are refused. Default: a configuration with the end tokens of the base model."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """Required with `stop_strings`, and where the text decides where the model thinks."""
    logits_processor: LogitsProcessorList | None = None
    """Applied to the log-probabilities of every next token."""
    stopping_criteria: StoppingCriteriaList | None = None
    """Additional stopping criteria."""
    streamer: BaseStreamer | None = None
    """Receives every new token."""
    thoughts: int = 1
    """Number of thoughts per token. The probabilities after them are averaged."""
    thought_temperature: float = 0.0
    """Sampling temperature of thoughts. 0 means greedy decoding."""
    think_when: ThinkWhen | None = None
    """Where to think. Default: the model's `think_when`."""
    seed: int = 0
    """Random seed for thoughts and tokens."""


@dataclass(frozen=True)
class _Choice:
    """How a generation chooses tokens and ends texts."""

    new: int
    """Maximum number of new tokens."""
    temperature: float
    """Sampling temperature. 0 means greedy decoding."""
    ends: list[int]
    """Ids of the tokens that end a text."""
    filler: int
    """Id of the token after the end of a text."""
    warpers: LogitsProcessorList
    """Top-k, top-p and min-p."""
    processors: LogitsProcessorList
    stopping: StoppingCriteriaList

    def token(self, whole_BT: Tensor, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """Return the next token of each text, `[B]`."""
        scores_BV, temperature = logits_BV.float(), self.temperature
        if self.warpers:  # as in transformers, top-k, top-p and min-p apply after the temperature
            scores_BV = self.warpers(whole_BT, scores_BV / temperature)  # type: ignore[arg-type]
            temperature = 1.0
        return draw(scores_BV, uniform_B, temperature)[0]

    def ended(self, whole_BT: Tensor, logits_BV: Tensor) -> Tensor:
        """Return which texts end with their last token, `[B]`."""
        token_B = whole_BT[:, -1]
        ended_B = torch.isin(token_B, torch.tensor(self.ends, device=token_B.device))
        if self.stopping:
            stopped_B = self.stopping(whole_BT, logits_BV)  # type: ignore[arg-type]
            ended_B = ended_B | stopped_B.to(ended_B.device)
        return ended_B


def generate(
    model: ThinkingModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Generate text with a thought before every token.

    The arguments are those of transformers' `generate`, and a few for thoughts.

    Args:
        model: a Quiet-STaR model.
        input_ids: token ids of the prompts, `[B, T]`, padded on the left.
        attention_mask: 1 for text and 0 for padding. None means no padding.
        options: fields of `GenerateOptions` by name, such as `thoughts=4`, and fields of the
            generation configuration, such as `max_new_tokens=100`, which take precedence over
            `generation_config`.

    Returns:
        Token ids of prompts and completions, `[B, T + new]`.

    Raises:
        ValueError: no positive number of new tokens, texts that with the new tokens and a thought
            are longer than the model's context, an empty prompt, padding on the right, several
            thoughts at temperature 0 (they would be the same), a rule that reads the text without a
            tokenizer, or an unsupported field.
    """
    own = {one.name for one in fields(GenerateOptions)} & set(options)
    asked = GenerateOptions(**{name: options.pop(name) for name in own})
    given = _configuration(model, asked.generation_config, options)
    mask_BT = _prompt_mask(input_ids, attention_mask)
    when = model.think_when if asked.think_when is None else asked.think_when
    if when.tokenizer is None:
        when = replace(when, tokenizer=asked.tokenizer)
    how = ThoughtParams(asked.thoughts, asked.thought_temperature, when, asked.seed)
    choice = _choice(given, asked, input_ids.shape[1])
    model.check_length(input_ids, mask_BT, choice.new)
    copies = _copies(given, sampled=bool(choice.temperature or how.temperature))
    if copies > 1:
        input_ids, mask_BT = (one.repeat_interleave(copies, 0) for one in (input_ids, mask_BT))
    return _continued(model, input_ids, mask_BT, how, choice, asked.streamer)


def _continued(
    model: ThinkingModel,
    input_ids: Tensor,
    mask_BT: Tensor,
    how: ThoughtParams,
    choice: _Choice,
    streamer: BaseStreamer | None,
) -> Tensor:
    """Run the loop over new tokens."""
    generator = torch.Generator().manual_seed(how.seed + 1)
    steps = next_logits(model, input_ids, mask_BT, how, ends=choice.ends)
    done_B = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    whole_BT = input_ids
    with thoughtful(model.base):  # outside the loop, because it visits all layers
        logits_BV = next(steps)
        for number in range(choice.new):
            if choice.processors:
                logits_BV = choice.processors(whole_BT, logits_BV)  # type: ignore[arg-type]
            uniform_B = torch.rand(len(input_ids), generator=generator).to(input_ids.device)
            token_B = choice.token(whole_BT, logits_BV, uniform_B)
            token_B = token_B.masked_fill(done_B, choice.filler)
            whole_BT = torch.cat([whole_BT, token_B[:, None]], 1)
            if streamer is not None:
                streamer.put(token_B.cpu())
            done_B = done_B | choice.ended(whole_BT, logits_BV)
            if bool(done_B.all()) or number + 1 == choice.new:
                break
            logits_BV = steps.send(token_B)
    if streamer is not None:
        streamer.end()
    return whole_BT


def _configuration(
    model: ThinkingModel, given: GenerationConfig | None, changes: Mapping[str, object]
) -> GenerationConfig:
    """Return the generation configuration with changes, after checking it."""
    if given is None:
        own = model.base.generation_config
        config = GenerationConfig(eos_token_id=None if own is None else own.eos_token_id)
    else:
        config = copy.deepcopy(given)
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(
                f"generate has no option {name!r}. Supported are {', '.join(HONOURED)}."
            )
        if value is not None:
            setattr(config, name, value)
    check_generation(config)
    return config


def _prompt_mask(ids_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Return the mask of the prompts, after checking them."""
    if ids_BT.ndim != 2 or ids_BT.shape[1] == 0:
        raise ValueError(
            "Expected a prompt of at least one token, got an empty one: input_ids has the shape "
            f"{list(ids_BT.shape)}."
        )
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    if not bool(mask_BT[:, -1].all()):
        raise ValueError(
            "Expected padding on the left, got padding on the right. Set "
            "tokenizer.padding_side='left'."
        )
    return mask_BT


def _choice(given: GenerationConfig, asked: GenerateOptions, prompt: int) -> _Choice:
    """Return how tokens are chosen after prompts of `prompt` tokens."""
    new, temperature = _new_tokens(given, prompt), _temperature(given)
    eos, pad = given.eos_token_id, given.pad_token_id
    ends = [] if eos is None else torch.tensor(eos).view(-1).tolist()
    stopping = StoppingCriteriaList(asked.stopping_criteria or [])
    if given.stop_strings:
        if asked.tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer=... to generate.")
        stopping.append(StopStringCriteria(asked.tokenizer, given.stop_strings))
    return _Choice(
        new=new,
        temperature=temperature,
        ends=ends,
        filler=pad if pad is not None else (ends[0] if ends else 0),
        warpers=_warpers(given) if temperature else LogitsProcessorList(),
        processors=LogitsProcessorList(asked.logits_processor or []),
        stopping=stopping,
    )


def _copies(given: GenerationConfig, *, sampled: bool) -> int:
    """Return the number of texts per prompt."""
    copies = 1 if given.num_return_sequences is None else given.num_return_sequences
    if copies < 1:
        raise ValueError(f"num_return_sequences must be at least 1; got {copies}.")
    if copies > 1 and not sampled:
        raise ValueError(
            f"num_return_sequences={copies} without sampling would give the same text {copies} "
            "times. Set do_sample=True, or a thought_temperature above 0."
        )
    return copies


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

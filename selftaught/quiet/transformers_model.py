"""Quiet-STaR as a model of transformers: `QuietForCausalLM`.

It wraps a `QuietLM`, which computes everything. This module adds what transformers expects of a
causal language model: logits, a cache, `from_pretrained` and `generate`.

Shapes: B texts, T text tokens, J positions, N thoughts, S thought tokens, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    Cache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.config import BY_TEXT, QuietConfig
from selftaught.quiet.gating import GREEDY, ThinkWhen, ThoughtParams
from selftaught.quiet.mixing import check_mixing_head
from selftaught.quiet.model import QuietLM
from selftaught.quiet.next_token import banned_tokens, mixed_at, read_and_predict
from selftaught.quiet.old_folder import is_old_folder, open_old
from selftaught.quiet.passes import Reading
from selftaught.quiet.pretrained_config import MODEL_TYPE, QuietForCausalLMConfig
from selftaught.quiet.self_check import self_check
from selftaught.quiet.targets import IGNORED
from selftaught.quiet.thoughts import at_positions, output_matrix, read_on
from selftaught.quiet.where import Following, following_of, resolved

AT_ONCE = 32
"""Number of positions whose logits are computed at the same time."""
REFUSED: dict[str, tuple[object, ...]] = {
    "assistant_model": (), "prompt_lookup_num_tokens": (0,), "assistant_early_exit": (),
    "penalty_alpha": (0, 0.0), "dola_layers": (), "guidance_scale": (1, 1.0),
    "negative_prompt_ids": (), "num_beam_groups": (1,), "diversity_penalty": (0, 0.0),
    "constraints": (), "force_words_ids": (), "cache_implementation": (), "prefill_chunk_size": (),
    "output_attentions": (), "output_hidden_states": (), "custom_generate": (),
    "inputs_embeds": (), "position_ids": (),
}  # fmt: skip
"""Options of transformers' `generate` that are refused, with the values at which they have no
effect, in addition to None and False."""


class QuietCache(Cache):
    """Keys and values of the texts that were read. Thoughts are not stored.

    Args:
        seed: random seed of the thoughts.
    """

    is_compileable = False  # type: ignore[assignment]
    is_croppable = False  # type: ignore[assignment]

    def __init__(self, seed: int = 0) -> None:
        super().__init__(layers=[])
        self.reading = Reading(None, keep=True)
        self.generator = torch.Generator().manual_seed(seed)
        self._followed: tuple[ThinkWhen, Following | None] | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that were read."""
        stored = self.reading.key_BKTD.get(layer_idx)
        return 0 if stored is None else stored.shape[2]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the texts with the given indices, for beam search."""
        for stored in (self.reading.key_BKTD, self.reading.value_BKTD):
            for layer, tensor in stored.items():
                stored[layer] = tensor.index_select(0, beam_idx.to(tensor.device))
        if self._followed is not None and (following := self._followed[1]) is not None:
            following.reorder(beam_idx)

    def following(self, think_when: ThinkWhen, quiet: QuietLM, texts: int) -> Following | None:
        """Return what follows the texts from their first token, for rules that read the text.

        Args:
            think_when: the rule, which must be that of earlier calls.
            quiet: the model.
            texts: number of texts.

        Raises:
            ValueError: an earlier call had another rule, and one of the rules reads the text.
        """
        if self._followed is None:
            self._followed = think_when, following_of(think_when, quiet.quiet_config, texts)
        elif think_when != self._followed[0]:
            by_text = resolved(think_when, quiet.quiet_config).rule in BY_TEXT
            if by_text or self._followed[1] is not None:
                raise ValueError(
                    f"past_key_values was made with {self._followed[0]}, got {think_when}. A rule that "
                    "reads the text must be the same from the first token. Leave past_key_values out."
                )
        return self._followed[1]

    def crop(self, max_length: int) -> None:
        """Raise, because decoding that discards tokens is not supported."""
        raise ValueError("The cache of a Quiet-STaR model cannot be cropped.")


class _Ban(LogitsProcessor):
    """Sets the scores of tokens that are never written to -inf."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        scores = scores.clone()
        scores[:, self._tokens] = -torch.inf
        return scores


class QuietForCausalLM(PreTrainedModel, GenerationMixin):
    """A Quiet-STaR model with the interface of transformers' causal language models.

    `AutoModelForCausalLM` and `pipeline("text-generation")` open its folders after `import
    selftaught`.

    Args:
        config: the configuration.
        quiet: the model to wrap, not copied. None: a new one with random weights.

    Attributes:
        quiet: the model that thinks.
        thinking: how the model thinks unless `forward` and `generate` get other values: one
            greedy thought where the model was trained to think.
    """

    config_class = QuietForCausalLMConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    # The base model decides which attention it supports.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: QuietForCausalLMConfig, quiet: QuietLM | None = None) -> None:
        if config.base_config is None:
            raise ValueError(
                "QuietForCausalLMConfig needs base_config, the configuration of the base model. "
                "Make a model with make_quiet, or open a folder with from_pretrained."
            )
        super().__init__(config)
        if quiet is None:
            quiet = QuietLM(
                AutoModelForCausalLM.from_config(config.base_config),
                QuietConfig(**config.quiet_config),
                start=config.thought_start_id,
                end=config.thought_end_id,
                pad=config.thought_pad_id,
                check=False,
            )
        self.quiet = quiet
        self.thinking: ThoughtParams = GREEDY
        base = quiet.base
        config.base_config = base.config
        if base.generation_config is not None:
            self.generation_config = copy.deepcopy(base.generation_config)
            self.generation_config.cache_implementation = None  # the cache is our own
        tied: dict[str, str] = getattr(base, "all_tied_weights_keys", {})
        self._tied_weights_keys = {
            f"quiet.base.{name}": f"quiet.base.{source}" for name, source in tied.items()
        }
        for name in ("_no_split_modules", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            setattr(self, name, getattr(base, name))
        if not any(weight.is_meta for weight in self.parameters()):
            for module in quiet.modules():  # all of them have initialized their weights
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    @classmethod
    def from_quiet(cls, quiet: QuietLM) -> "QuietForCausalLM":
        """Return a model of transformers around a `QuietLM`. The weights are shared."""
        pads = set(quiet.marks.never) - {quiet.marks.start, quiet.marks.end}
        config = QuietForCausalLMConfig(
            quiet.base.config,
            asdict(quiet.quiet_config),
            thought_start_id=quiet.marks.start,
            thought_end_id=quiet.marks.end,
            thought_pad_id=min(pads, default=None),
            dtype=quiet.base.dtype,
        )
        return cls(config, quiet).train(quiet.training)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        check: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Load a model, as `PreTrainedModel.from_pretrained` does.

        Args:
            pretrained_model_name_or_path: a folder or a name on the Hugging Face Hub. Folders of
                earlier versions, with a `quiet.json`, are opened too.
            model_args: passed on.
            check: first compare a few thoughts with regular forward passes of the same tokens.
            kwargs: arguments of `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: a folder of an earlier version is opened with options other than `dtype`.
            ValueError: the configuration has a mixing head and the weights have none, or the reverse.
            UnsupportedModel: thoughts cannot be computed in parallel with this model.
        """
        if is_old_folder(Path(str(pretrained_model_name_or_path))):
            dtype = kwargs.pop("dtype", "auto")
            if given := sorted({*kwargs} - {"config"}):
                raise ValueError(
                    f"{pretrained_model_name_or_path} is in the format of an earlier version, which "
                    f"opens with dtype only, not with {', '.join(given)}. Open it without, and save "
                    "it with save_pretrained to another folder."
                )
            dtype = str(dtype).removeprefix("torch.")
            old, _ = open_old(Path(str(pretrained_model_name_or_path)), dtype)
            return cls.from_quiet(old).eval()
        with_info = kwargs.pop("output_loading_info", False)
        parent: Any = super()
        model, info = parent.from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        mix = model.quiet.quiet_config.mix
        check_mixing_head(mix, info["missing_keys"], info["unexpected_keys"])
        # transformers reads generation_config.json for the outer model only.
        model.quiet.base.generation_config = copy.deepcopy(model.generation_config)
        if check and not any(weight.is_meta for weight in model.parameters()):
            self_check(model.quiet.base, replace(model.quiet.marks, moved_2D=None))
        return (model, info) if with_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialize weights that are not in the files."""
        super()._init_weights(module)
        heads: list[Any] = [self.quiet.mixing, self.quiet.gate]
        last = [one.layers[-1] for one in heads if one is not None and list(one.children())]
        if module is self.quiet:
            init.zeros_(self.quiet.moved)
        elif any(module is one for one in last):
            init.zeros_(module.weight)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        """Return the input embeddings of the base model."""
        return self.quiet.base.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the input embeddings of the base model."""
        self.quiet.base.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output embeddings of the base model."""
        return output_matrix(self.quiet.base)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output embeddings of the base model."""
        self.quiet.base.set_output_embeddings(new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the embeddings of the base model."""
        return self.quiet.base.resize_token_embeddings(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Enable gradient checkpointing of the base model."""
        self.quiet.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Disable gradient checkpointing of the base model."""
        self.quiet.gradient_checkpointing_disable()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        think_mask: Tensor | None = None,
        past_key_values: QuietCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        thinking: ThoughtParams | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Predict the next token after every position, with thoughts.

        In training mode with labels, only the loss is computed: that of Quiet-STaR, with sampled
        thoughts. Otherwise, the loss is the mean negative log-likelihood of the labels under
        `logits`, in nats per token, as in every causal language model.

        Args:
            input_ids: token ids, `[B, T]`.
            attention_mask: 1 for text and 0 for padding, on either side, `[B, T]`. None means no padding.
                With a cache, the mask includes the tokens of the cache.
            labels: token ids, not shifted, with -100 where there is no loss.
            think_mask: in training, 1 where the model thinks, `[B, T]`; see `QuietLM.forward`.
            past_key_values: the cache that an earlier call returned.
            use_cache: return a cache, with which the next call continues the texts.
            logits_to_keep: number of last positions to predict after. 0: all.
            thinking: how the model thinks. Default: the attribute `thinking`.
            token_type_ids: has no effect, because all tokens are text.
            return_dict: return an output object, not a tuple. Default: yes.

        Returns:
            `loss` (None without labels), `logits` (mixed log-probabilities of the next token, `[B, T,
            V]`, without gradient; None in training with labels) and `past_key_values`.

        Raises:
            ValueError: the texts with a thought are too long, or `thinking` does not fit the model.
        """
        del token_type_ids
        if labels is not None and self.training:
            if past_key_values is not None or thinking is not None:
                raise ValueError(
                    "Training takes neither past_key_values nor thinking. Call model.eval() to "
                    "evaluate, or leave them out."
                )
            loss = self.quiet(input_ids, attention_mask, labels, think_mask=think_mask).loss
            return _returned(CausalLMOutputWithPast(loss=loss), return_dict)
        how = self.thinking if thinking is None else thinking
        cache = _cache(past_key_values, use_cache, how.seed)
        seen = 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            size = (len(input_ids), seen + input_ids.shape[1])
            attention_mask = torch.ones(size, dtype=torch.long, device=input_ids.device)
        self.quiet.check_length(attention_mask, attention_mask)
        with torch.no_grad(), thoughtful(self.quiet.base):
            logits: Any = self._logits(input_ids, attention_mask, cache, logits_to_keep, how)
        nll: Any = None if labels is None else _mean_nll(logits, labels)
        out = CausalLMOutputWithPast(loss=nll, logits=logits, past_key_values=cache)
        return _returned(out, return_dict)

    def _logits(
        self,
        new_BT: Tensor,
        real_BT: Tensor,
        cache: QuietCache | None,
        keep: int,
        how: ThoughtParams,
    ) -> Tensor:
        """Return the mixed log-probabilities after the last `keep` of the new tokens (0: all)."""
        quiet, length = self.quiet, new_BT.shape[1]
        cache = QuietCache(how.seed) if cache is None else cache
        following = cache.following(how.think_when, quiet, len(new_BT))
        if keep == 1 or length == 1:
            found_BV = read_and_predict(
                quiet, new_BT, real_BT, cache.reading, how, cache.generator, following
            )
            return found_BV[:, None]
        prefix = read_on(quiet.base, new_BT, real_BT, cache.reading)
        matches_BT = None if following is None else following.read(new_BT, real_BT)
        first = 0 if keep == 0 else max(0, length - keep)
        shape = (len(new_BT), how.thoughts, length - first, quiet.quiet_config.thought_tokens)
        uniform_BNJS = torch.rand(shape, generator=cache.generator).to(new_BT.device)
        parts: list[Tensor] = []
        for new_1J in torch.arange(first, length, device=new_BT.device)[None].split(AT_ONCE, 1):
            uniform = uniform_BNJS[:, :, new_1J[0] - first]
            hidden_BJD = at_positions(prefix.hidden_BTD, new_1J)
            position_1J = new_1J + real_BT.shape[1] - length
            matches_BJ = None if matches_BT is None else matches_BT[:, new_1J[0]]
            found = mixed_at(quiet, prefix, hidden_BJD, position_1J, uniform, how, matches_BJ)
            parts.append(found.mixed_BJV)
        return torch.cat(parts, 1)

    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        thinking: ThoughtParams | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text with a thought before every token; see transformers' `generate`.

        Start, end and padding tokens of thoughts are not written, unless they end a text.

        Args:
            inputs: token ids of the prompts, padded on the left. Also as `input_ids`.
            generation_config: the configuration. Default: the attribute `generation_config`.
            logits_processor: applied to the mixed log-probabilities.
            stopping_criteria: additional stopping criteria.
            thinking: how the model thinks. Default: the attribute `thinking`.
            kwargs: arguments of transformers' `generate`, and fields of the configuration.
                `tokenizer` is also used where the text decides where the model thinks.

        Raises:
            ValueError: an option that cannot be honoured (the message names it), padding on the
                right, or texts that with the new tokens and a thought are longer than the model's
                context.
        """
        options = _Asked(kwargs, generation_config, self.generation_config)
        options.refuse()
        ids_BT = inputs if inputs is not None else kwargs.get("input_ids")
        mask_BT = kwargs.get("attention_mask")
        if ids_BT is not None:
            if mask_BT is not None and not bool(mask_BT[:, -1].all()):
                raise ValueError(
                    "Expected padding on the left, got padding on the right. Set "
                    "tokenizer.padding_side='left'."
                )
            new = options.new_tokens(ids_BT.shape[1])
            self.quiet.check_length(ids_BT, mask_BT, new)
        how = self.thinking if thinking is None else thinking
        if how.think_when.tokenizer is None and (tokenizer := kwargs.get("tokenizer")) is not None:
            how = replace(how, think_when=replace(how.think_when, tokenizer=tokenizer))
        processors = LogitsProcessorList(logits_processor or [])
        processors.append(_Ban(banned_tokens(self.quiet, options.ends())))
        if kwargs.get("past_key_values") is None and options.value("use_cache") is not False:
            kwargs["past_key_values"] = QuietCache(how.seed)
        with thoughtful(self.quiet.base):  # outside the loop, because it visits all layers
            parent: Any = super()
            return parent.generate(
                inputs, generation_config, processors, stopping_criteria, thinking=how, **kwargs
            )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the arguments of `forward` for the next token."""
        # transformers passes the tokenizer of stop_strings on to the model.
        parent: Any = super()
        inputs = parent.prepare_inputs_for_generation(*args, **kwargs)
        return {name: value for name, value in inputs.items() if name != "tokenizer"}

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Raise, because continuous batching computes attention itself, without thoughts."""
        raise ValueError(
            "A Quiet-STaR model cannot generate with continuous batching. Use generate."
        )


class _Asked:
    """The options of a call of `generate`, in the order in which transformers applies them."""

    def __init__(
        self, kwargs: dict[str, Any], given: GenerationConfig | None, own: GenerationConfig | None
    ) -> None:
        self._kwargs, self._configs = kwargs, [one for one in (given, own) if one is not None]

    def value(self, name: str) -> Any:
        """Return the value of an option; None if it is not set."""
        if self._kwargs.get(name) is not None:
            return self._kwargs[name]
        values = (getattr(one, name, None) for one in self._configs)
        return next((value for value in values if value is not None), None)

    def refuse(self) -> None:
        """Raise ValueError if an option is set that cannot be honoured."""
        wrong = [
            f"{name}={value!r}" if isinstance(value, bool | int | float | str) else name for name, neutral in REFUSED.items()
            if (value := self.value(name)) is not None and value is not False
            and not any(value is one or value == one for one in neutral)
        ]  # fmt: skip
        if wrong:
            raise ValueError(
                f"A Quiet-STaR model cannot generate with {', '.join(wrong)}. Leave it out, or use "
                "the base model (`selftaught quiet export-base`)."
            )

    def new_tokens(self, prompt: int) -> int:
        """Return the maximum number of new tokens; 1 if the options do not say."""
        if (new := self.value("max_new_tokens")) is not None:
            return int(new)
        longest = self.value("max_length")
        return 1 if longest is None else max(1, int(longest) - prompt)

    def ends(self) -> list[int]:
        """Return the ids of the tokens that end a text."""
        ends = self.value("eos_token_id")
        return [] if ends is None else torch.as_tensor(ends).view(-1).tolist()


def _returned(
    out: CausalLMOutputWithPast, return_dict: bool | None
) -> CausalLMOutputWithPast | tuple[Any, ...]:
    return out.to_tuple() if return_dict is False else out


def _cache(given: object, use_cache: bool | None, seed: int) -> QuietCache | None:
    """Return the cache of a call: the given one, a new one, or none.

    Raises:
        ValueError: the given cache is not that of a Quiet-STaR model.
    """
    if given is None:
        return QuietCache(seed) if use_cache else None
    if not isinstance(given, QuietCache):
        raise ValueError(
            f"Expected the cache of a Quiet-STaR model, got {type(given).__name__}. Pass what an "
            "earlier call with use_cache=True returned as past_key_values."
        )
    return given


def _mean_nll(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the labels, which are not shifted."""
    if logits_BTV.shape[1] != labels_BT.shape[1]:
        raise ValueError("labels need the logits of all positions: leave out logits_to_keep.")
    return cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED
    )


AutoModelForCausalLM.register(QuietForCausalLMConfig, QuietForCausalLM, exist_ok=True)
# `pipeline` takes the names of the classes that it supports from here.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = QuietForCausalLM.__name__

"""Sampling from any Hugging Face causal language model in this process.

The keys and values of tokens that prompts share, such as few-shot examples, are computed once: see
`prefix_loop`. Models whose layers do not support this are sampled with `generate()`.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selftaught.records import Completion, Text
from selftaught.samplers.base import Closing, SamplingParams, checked_keys, checked_prefix_tokens
from selftaught.samplers.local.generate_loop import PlainLoop
from selftaught.samplers.local.model_loading import (
    fingerprint,
    free_memory,
    opened,
    vocabulary_size,
)
from selftaught.samplers.local.prefix_loop import SharedPrefixLoop, plan, shared_prefix_loop
from selftaught.samplers.local.token_choice import Decoding, endings, uniforms
from selftaught.samplers.stopping import Ending
from selftaught.samplers.tokens import (
    ContextWindow,
    check_vocabulary,
    end_tokens,
    fitting_tokens,
)

logger = logging.getLogger(__name__)


def check_device(device: str) -> None:
    """Check that this machine has a device. "auto" is always valid.

    Raises:
        ValueError: The name is not a device, or this machine does not have the device.
    """
    if device == "auto":
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device must be auto, cpu, or a device of this machine such as cuda; got {device!r} "
            f"({str(error).splitlines()[0][:200]})."
        ) from None


def _batch_size_for(model: nn.Module) -> int:
    return 512 if sum(weight.numel() for weight in model.parameters()) < 1_000_000 else 128


class TransformersSampler(Closing):
    """A sampler that runs a causal language model with transformers in this process.

    Args:
        model: A model folder, a name on the Hugging Face Hub, or a loaded model. A loaded model is
            a transformers model, or any model with `generate` and its base model as `.base`, such
            as a QuietLM. Its attribute `tokens_beside` is the number of tokens that it needs in
            addition to the text.
        batch_size: Number of completions sampled at the same time. None means 128, or 512 for a
            model of less than a million parameters.
        dtype: Data type of the weights; "auto" is the type in which they were saved.
        device: Name of a device; "auto" is the GPU if there is one.
        tokenizer: Required with a loaded model; otherwise loaded from the folder.

    Raises:
        ValueError: The folder has no model or no tokenizer.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        batch_size: int | None = None,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        loaded = opened(model, tokenizer, dtype, device)
        self._batch_size = batch_size or _batch_size_for(loaded.model)
        self.model, self._tokenizer = loaded.name, loaded.tokenizer
        self._model, self._described = loaded.model, loaded.described
        self._eos = end_tokens(self._described.generation_config, self._tokenizer)
        beside: int = getattr(self._model, "tokens_beside", 0)
        self._window = ContextWindow(loaded.name, loaded.tokenizer, loaded.context, beside)
        self._loop: SharedPrefixLoop | PlainLoop | None = None
        self._fingerprint: str | None = None

    @property
    def fingerprint(self) -> str:
        """A hash of the weights. It changes when a model is trained again into the same folder."""
        if self._fingerprint is None:
            self._fingerprint = fingerprint(self._model)
        return self._fingerprint

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        prefix_tokens: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `params.n` completions for every prompt, as `[prompt][sample]`; see `Sampler`."""
        keys = checked_keys(keys, prompts)
        prefixes = checked_prefix_tokens(prefix_tokens, keys, params.max_tokens)
        check_vocabulary(prefixes, vocabulary_size(self._described))
        tokens = [
            self._tokens(prompt, key, params) for prompt, key in zip(prompts, keys, strict=True)
        ]
        ended_by = endings(self._tokenizer, self._eos, prompts, params)
        done: dict[tuple[int, int], Completion] = {}

        def finished(at: tuple[int, int], token_ids: Sequence[int]) -> None:
            done[at] = ended_by[at[0]].completion(token_ids)
            if progress is not None:
                progress(1)

        indices = range(params.first, params.first + params.n)
        pending: dict[Ending, list[tuple[int, int]]] = {}
        for prompt, ending in enumerate(ended_by):
            if ending.ended(prefixes[prompt]):
                for index in indices:
                    finished((prompt, index), prefixes[prompt])
            else:
                pending.setdefault(ending, []).extend((prompt, index) for index in indices)
        for ending, samples in pending.items():
            self._complete(samples, tokens, prefixes, keys, params, ending, finished)
        return [[done[prompt, index] for index in indices] for prompt in range(len(prompts))]

    def _complete(
        self,
        samples: Sequence[tuple[int, int]],
        tokens: Sequence[tuple[int, ...]],
        prefixes: Sequence[tuple[int, ...]],
        keys: Sequence[str],
        params: SamplingParams,
        ending: Ending,
        finished: Callable[[tuple[int, int], Sequence[int]], None],
    ) -> None:
        """Complete every sample, given as (index of the prompt, sample index)."""
        if not samples:
            return
        rows = [tokens[prompt] + prefixes[prompt] for prompt, _ in samples]
        uniform_BN = torch.stack(
            [uniforms(params.seed, keys[prompt], at, params.max_tokens) for prompt, at in samples]
        ).to(self._described.device)
        if self._loop is None:
            self._loop = self._open_loop(rows, params.max_tokens)
        asked = Decoding(
            rows,
            [len(prefixes[prompt]) for prompt, _ in samples],
            uniform_BN,
            params,
            ending,
            lambda row, token_ids: finished(samples[row], token_ids),
        )
        self._loop.complete(asked, self._batch_size)

    def _open_loop(
        self, rows: Sequence[tuple[int, ...]], max_tokens: int
    ) -> SharedPrefixLoop | PlainLoop:
        """Return the shared-prefix loop if it reproduces the model's logits, or a `PlainLoop`."""
        if not isinstance(self._model, PreTrainedModel):
            return PlainLoop(self._model, self._described)
        group = plan(rows, self._batch_size, max_tokens)[0]
        loop = shared_prefix_loop(self._model, rows[group.numbers[0]], group.shared)
        if isinstance(loop, SharedPrefixLoop):
            return loop
        logger.warning(
            "%s is sampled with generate(), which is slower: the shared-prefix loop does not "
            "support it because %s.",
            self.model,
            loop,
        )
        return PlainLoop(self._model, self._described)

    def _tokens(self, prompt: Text, key: str, params: SamplingParams) -> tuple[int, ...]:
        """Return the token ids of a prompt after checking that the completion fits the context."""
        options = params.chat_template_kwargs
        return fitting_tokens(self._window, prompt, key, params.max_tokens, options)

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Check that all prompts fit the model's context; see `Sampler`."""
        for prompt, key in zip(prompts, keys, strict=True):
            self._tokens(prompt, key, params)

    def close(self) -> None:
        """Free the memory of the model."""
        self._loop = None
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_described", None)
        free_memory()

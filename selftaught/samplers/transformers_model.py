"""Any Hugging Face causal language model, in this process.

Prompts that begin with the same tokens, as few-shot prompts do, share them: see
`shared_prefix`. Models whose layers do not allow it are sampled by plain `generate`.
"""

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from selftaught.records import Completion, Text
from selftaught.samplers.base import SamplingParams
from selftaught.samplers.drawing import Ending, uniforms
from selftaught.samplers.plain import PlainLoop
from selftaught.samplers.shared_prefix import SharedPrefixLoop, obstacle, plan

logger = logging.getLogger(__name__)

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""What configurations call the longest text a model can read."""


class TransformersSampler:
    """A causal language model as a function from prompts to completions.

    Args:
        model: a model folder, a name on the Hugging Face hub, or a loaded model: one of transformers,
            or any with `generate` and its base as `.base`, such as a QuietLM; `.tokens_beside` is
            how many tokens it reads beside those of the text.
        batch_size: completions written at the same time.
        dtype: of the weights; "auto" is how they were saved.
        device: "auto" is the GPU where there is one.
        tokenizer: needed with a loaded model, read from the folder otherwise.

    Raises:
        ValueError: the folder has no model or no tokenizer.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        batch_size: int = 128,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self._batch_size = batch_size
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError(
                    "Expected a tokenizer beside a loaded model, got none; pass tokenizer=..."
                )
            wrapped = not isinstance(model, PreTrainedModel)
            if wrapped and not isinstance(getattr(model, "base", None), PreTrainedModel):
                raise ValueError(
                    "Expected a model of transformers, or one with its base as .base, got "
                    f"{type(model).__name__}; merge an adapter first (merge_and_unload)."
                )
            self._described: PreTrainedModel = model.base if wrapped else model  # type: ignore[assignment]
            self.model = self._described.name_or_path
            self._tokenizer, self._model = tokenizer, model
        else:
            self.model = str(model)
            self._tokenizer = tokenizer or _load_tokenizer(self.model)
            self._model = self._described = _load_model(self.model, dtype, device)
        self._model.eval()
        self._eos = _end_tokens(self._described, self._tokenizer)
        self._context = _context(self._described)
        self._beside: int = getattr(self._model, "tokens_beside", 0)
        self._loop: SharedPrefixLoop | PlainLoop | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: a model trained again keeps its folder but not this."""
        digest = hashlib.sha256()
        for name, weight in sorted(self._model.state_dict().items()):
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:16]

    @torch.inference_mode()
    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt, as `[prompt][sample]`; see `Sampler`."""
        keys = [_default_key(prompt) for prompt in prompts] if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"Expected one key per prompt, got {len(keys)} for {len(prompts)}.")
        if not prompts:
            return []
        tokens = [
            self._tokens(prompt, key, params.max_tokens)
            for prompt, key in zip(prompts, keys, strict=True)
        ]
        rows = [row for row in tokens for _ in range(params.n)]
        uniform_BN = torch.stack(
            [
                uniforms(params.seed, key, index, params.max_tokens)
                for key in keys
                for index in range(params.n)
            ]
        ).to(self._described.device)
        ending = Ending(self._tokenizer, self._eos, params.stop)
        completions: list[Completion | None] = [None] * len(rows)

        def finished(row: int, token_ids: list[int]) -> None:
            completions[row] = ending.completion(token_ids)
            if progress is not None:
                progress(1)

        if self._loop is None:
            self._loop = self._open_loop(rows, params.max_tokens)
        self._loop.complete(rows, uniform_BN, params, ending, finished, batch_size=self._batch_size)
        done = [completion for completion in completions if completion is not None]
        assert len(done) == len(rows)
        return [done[start : start + params.n] for start in range(0, len(done), params.n)]

    def _open_loop(
        self, rows: Sequence[tuple[int, ...]], max_tokens: int
    ) -> SharedPrefixLoop | PlainLoop:
        """The shared-prefix loop if it gives this model's own logits on a prompt, or the plain one."""
        if not isinstance(self._model, PreTrainedModel):
            return PlainLoop(self._model, self._described)
        reason = obstacle(self._model)
        if reason is None:
            loop = SharedPrefixLoop(self._model)
            group = plan(rows, self._batch_size, max_tokens)[0]
            reason = loop.objection(rows[group.numbers[0]], group.shared)
            if reason is None:
                return loop
        logger.warning(
            "%s is sampled by plain generate, which is slower: the shared-prefix loop cannot serve "
            "it because %s.",
            self.model,
            reason,
        )
        return PlainLoop(self._model, self._described)

    def _tokens(self, prompt: Text, key: str, max_tokens: int) -> tuple[int, ...]:
        """The prompt as the model reads it, with room for the completion."""
        if not isinstance(prompt, str) and self._tokenizer.chat_template is None:
            raise ValueError(
                f"Expected a model with a chat template for the messages of {key!r}, got "
                f"{self.model}, which has none; use a text prompt, or an instruction-tuned model."
            )
        ids = _encoded(self._tokenizer, prompt)
        if not ids:
            raise ValueError(f"The prompt of {key!r} is empty: expected at least one token.")
        needed = len(ids) + max_tokens + self._beside
        if self._context is not None and needed > self._context:
            beside = f" and a thought's {self._beside}" if self._beside else ""
            raise ValueError(
                f"The prompt of {key!r} has {len(ids)} tokens; with max_tokens={max_tokens}{beside} that "
                f"is more than the {self._context} that {self.model} can read. Use fewer worked "
                "examples, a shorter question, or a smaller max_tokens."
            )
        return tuple(ids)

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Refuse prompts that do not fit the model's context; see `Sampler`."""
        for prompt, key in zip(prompts, keys, strict=True):
            self._tokens(prompt, key, params.max_tokens)

    def close(self) -> None:
        """Give the memory back."""
        self._loop = None
        self.__dict__.pop("_model", None)
        self.__dict__.pop("_described", None)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _default_key(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)


def _load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name."""
    folder = Path(model)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if "config.json" not in names:
            raise ValueError(f"Expected a model folder with a config.json, got {folder} without.")
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names):
            raise ValueError(
                f"Expected a tokenizer in the model folder {folder}, found none; save it there "
                "with tokenizer.save_pretrained(folder)."
            )
    return AutoTokenizer.from_pretrained(model)


def _load_model(model: str, dtype: str, device: str) -> PreTrainedModel:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()  # it would break the caller's own
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return loaded.to(torch.device(device))  # type: ignore[arg-type]


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that the model's files call an end of text."""
    configured = model.generation_config or GenerationConfig()
    ends = configured.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _context(model: PreTrainedModel) -> int | None:
    """The longest text the model can read, where its configuration says so."""
    config = model.config.get_text_config().to_dict()
    return next((config[name] for name in CONTEXT_NAMES if config.get(name)), None)


def prompt_as_seen(model: str, prompt: Text) -> str:
    """The prompt decoded from the tokens the model reads, special tokens and template included."""
    tokenizer = _load_tokenizer(model)
    return str(tokenizer.decode(_encoded(tokenizer, prompt)))


def _encoded(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """The tokens of a prompt; a last message by the assistant is one to be continued."""
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    continued = prompt[-1]["role"] == "assistant"
    text = tokenizer.apply_chat_template(
        prompt,
        add_generation_prompt=not continued,
        continue_final_message=continued,
        tokenize=False,
    )
    # The template writes the special tokens itself.
    return tokenizer(str(text), add_special_tokens=False).input_ids

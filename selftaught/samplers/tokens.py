"""Prompts as token ids: tokenizers, context lengths and end tokens."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from selftaught.hub import check_model_name
from selftaught.records import Text
from selftaught.rendering import TemplateOptions, opens_thought, prompt_ids, turn_ending
from selftaught.thought_marks import ThoughtMarks

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""Names of the context length in model configurations."""


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or a model on the Hugging Face Hub.

    Raises:
        ValueError: The folder has no config.json or no tokenizer.
        FileNotFoundError: The model does not exist or the Hub cannot be reached.
    """
    folder = Path(model)
    if folder.is_dir():
        names = {path.name for path in folder.iterdir()}
        if "config.json" not in names:
            raise ValueError(
                f"Expected a model folder with a config.json, got {folder}, which has none."
            )
        if not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names):
            raise ValueError(
                f"Expected a tokenizer in the model folder {folder}, found none. Save it there "
                "with tokenizer.save_pretrained(folder)."
            )
    check_model_name(model)
    return AutoTokenizer.from_pretrained(model)


def prompt_as_seen(model: str, prompt: Text, options: TemplateOptions | None = None) -> str:
    """Return the prompt decoded from its token ids, including special tokens.

    Raises:
        ValueError: The chat template rejects the messages, or cannot be used for training because
            the end of an answer cannot be determined.
    """
    tokenizer = load_tokenizer(model)
    ids = prompt_tokens(tokenizer, prompt, model, "shown", options)
    if not isinstance(prompt, str):
        turn_ending(tokenizer, prompt, options)
    return str(tokenizer.decode(list(ids)))


def prompt_opens_thought(
    model: str, prompt: Text, marks: ThoughtMarks, options: TemplateOptions | None = None
) -> bool:
    """Return whether a prompt, as rendered for a model, ends inside a thought."""
    return opens_thought(load_tokenizer(model), prompt, marks, options)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    model: str,
    which: str,
    options: TemplateOptions | None = None,
) -> tuple[int, ...]:
    """Return the token ids of a prompt.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text or messages.
        model: Name of the model, for error messages.
        which: The prompt in error messages, such as "of 'p1'" or "at index 3".
        options: Variables of the chat template. Used only for messages.

    Raises:
        ValueError: The prompt has no tokens, or it is messages and the model has no chat template
            or one that rejects them.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise ValueError(
            f"Expected a model with a chat template for the messages {which}, got {model}, which "
            "has none. Use a text prompt, or an instruction-tuned model."
        )
    ids = prompt_ids(tokenizer, prompt, options)
    if not ids:
        raise ValueError(f"The prompt {which} is empty: expected at least one token.")
    return ids


@dataclass(frozen=True)
class ContextWindow:
    """The tokenizer and the context length of a model."""

    model: str
    """Name of the model, for error messages."""
    tokenizer: PreTrainedTokenizerBase
    length: int | None
    """Context length in tokens; None if unknown."""
    beside: int = 0
    """Number of tokens that the model needs in addition to the text, such as a thought."""


def fitting_tokens(
    window: ContextWindow,
    prompt: Text,
    key: str,
    max_tokens: int,
    options: TemplateOptions | None = None,
) -> tuple[int, ...]:
    """Return the token ids of a prompt after checking that the completion fits into the context.

    Args:
        window: The model's tokenizer and context length.
        prompt: Text or messages.
        key: Name of the prompt, for error messages.
        max_tokens: Maximum number of new tokens.
        options: Variables of the chat template. Used only for messages.

    Raises:
        ValueError: The prompt with `max_tokens` exceeds the context, or see `prompt_tokens`.
    """
    ids = prompt_tokens(window.tokenizer, prompt, window.model, f"of {key!r}", options)
    if window.length is not None and len(ids) + max_tokens + window.beside > window.length:
        thought = f" and a thought's {window.beside}" if window.beside else ""
        raise ValueError(
            f"The prompt of {key!r} has {len(ids)} tokens; with max_tokens={max_tokens}{thought} "
            f"that is more than the {window.length} tokens in the context of {window.model}. Use "
            "fewer worked examples, a shorter question, or a smaller max_tokens."
        )
    return ids


def check_vocabulary(texts: Iterable[Sequence[int]], size: int) -> None:
    """Check that all token ids are in the model's vocabulary.

    Args:
        texts: Token ids.
        size: Number of tokens in the vocabulary.

    Raises:
        ValueError: One is not. The message has the first such id.
    """
    for token in chain.from_iterable(texts):
        if not 0 <= token < size:
            raise ValueError(
                f"Expected token ids from 0 to {size - 1:,}, got {token}. Check that the tokens "
                "are those of this model's tokenizer."
            )


def context_of(model: str, engine: str, options: Mapping[str, Any]) -> int | None:
    """Return a model's context length in an engine, from its configuration; None if unknown."""
    if engine == "vllm" and options.get("max_model_len"):
        return int(options["max_model_len"])
    config = AutoConfig.from_pretrained(model).get_text_config().to_dict()
    if engine == "vllm" and "factor" in (
        config.get("rope_scaling") or config.get("rope_parameters") or {}
    ):
        return None  # vLLM multiplies the context length by the RoPE scaling factor
    return context_in_words(config)


def check_fitting(
    model: str,
    prompts: Iterable[tuple[str, Text]],
    max_tokens: int,
    context: int | None,
    options: TemplateOptions | None = None,
) -> None:
    """Check that each prompt with `max_tokens` new tokens fits into the context.

    Raises:
        ValueError: See `fitting_tokens`.
    """
    window = ContextWindow(model, load_tokenizer(model), context)
    limit = math.inf if context is None else context - max_tokens
    for key, prompt in prompts:
        if not _surely_fits(prompt, limit):
            fitting_tokens(window, prompt, key, max_tokens, options)


def longer_than(
    model: str, prompts: Iterable[Text], length: int, options: TemplateOptions | None = None
) -> int:
    """Return how many prompts have more than `length` tokens."""
    tokenizer = load_tokenizer(model)
    return sum(
        not _surely_fits(prompt, length) and len(prompt_ids(tokenizer, prompt, options)) > length
        for prompt in prompts
    )


def _surely_fits(prompt: Text, limit: float) -> bool:
    """Return whether a text prompt has at most `limit` tokens with any tokenizer."""
    if not isinstance(prompt, str) or not prompt:
        return False
    total = len(prompt.encode("utf-8", "surrogatepass"))
    ascii_count = total if prompt.isascii() else len(prompt.encode("ascii", "ignore"))
    return ascii_count + MOST_EXPANSION * (total - ascii_count) + MOST_ADDED <= limit


def folder_fingerprint(model: str) -> str:
    """Return a hash of a model folder's files, for engines that do not give access to the weights.

    For a name on the Hugging Face Hub, the folder in the local cache is used. If it is not in the
    cache, only the name is hashed.
    """
    digest = hashlib.sha256()
    folder = Path(model)
    if not folder.is_dir():
        found = try_to_load_from_cache(model, "config.json")
        if not isinstance(found, str):
            return hashlib.sha256(model.encode()).hexdigest()[:16]
        folder = Path(found).parent
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".jinja", ".model"):
            digest.update(f"{path.name} {path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()[:16]


def end_tokens(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """Return the ids of all end-of-text tokens in a model's generation config and tokenizer."""
    configured = (generation or GenerationConfig()).eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def context_in_words(config: Mapping[str, Any]) -> int | None:
    """Return the context length in tokens from a model configuration; None if it has none."""
    return next((config[name] for name in CONTEXT_NAMES if config.get(name)), None)


MOST_EXPANSION, MOST_ADDED = 12, 16
"""Upper bounds: tokens per byte of non-ASCII text, and special tokens that a tokenizer adds.

Unicode compatibility normalization can expand non-ASCII text up to 12 times in bytes. An ASCII
character is at most one token.
"""

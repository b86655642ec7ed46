"""Prompts as token ids: tokenizers, context length, end tokens."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from selftaught.hub import check_model_name
from selftaught.records import Text
from selftaught.rendering import TemplateOptions, opens_thought, prompt_ids, turn_ending
from selftaught.thought_marks import ThoughtMarks

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
"""What configurations call the longest text a model can read."""


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
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
    check_model_name(model)
    return AutoTokenizer.from_pretrained(model)


def prompt_as_seen(model: str, prompt: Text, options: TemplateOptions | None = None) -> str:
    """Return the prompt decoded from the tokens the model reads, special tokens included.

    Raises:
        ValueError: the model's chat template refuses the prompt, or no answer to it can be learned.
    """
    tokenizer = load_tokenizer(model)
    ids = prompt_tokens(tokenizer, prompt, model, "shown", options)
    if not isinstance(prompt, str):
        turn_ending(tokenizer, prompt, options)
    return str(tokenizer.decode(list(ids)))


def prompt_opens_thought(
    model: str, prompt: Text, marks: ThoughtMarks, options: TemplateOptions | None = None
) -> bool:
    """Return whether a prompt, as the model reads it, ends inside a thought."""
    return opens_thought(load_tokenizer(model), prompt, marks, options)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    model: str,
    which: str,
    options: TemplateOptions | None = None,
) -> tuple[int, ...]:
    """The prompt as the model reads it.

    Args:
        model: its name, for errors.
        which: the prompt, for errors: "of 'p1'", "at index 3".
        options: variables of the chat template.

    Raises:
        ValueError: it has no tokens, or is messages and the model has no chat template or one that
            refuses them.
    """
    if not isinstance(prompt, str) and tokenizer.chat_template is None:
        raise ValueError(
            f"Expected a model with a chat template for the messages {which}, got {model}, which "
            "has none; use a text prompt, or an instruction-tuned model."
        )
    ids = prompt_ids(tokenizer, prompt, options)
    if not ids:
        raise ValueError(f"The prompt {which} is empty: expected at least one token.")
    return ids


def fitting_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    key: str,
    max_tokens: int,
    model: str,
    context: int | None,
    beside: int = 0,
    options: TemplateOptions | None = None,
) -> tuple[int, ...]:
    """The prompt as the model reads it, with room for the completion.

    Args:
        key: the prompt's name and `model`: its name, for errors.
        context: the longest text the model can read; None: not known.
        beside: tokens the model reads beside those of the text.
        options: variables of the chat template.

    Raises:
        ValueError: they do not fit, or see `prompt_tokens`.
    """
    ids = prompt_tokens(tokenizer, prompt, model, f"of {key!r}", options)
    if context is not None and len(ids) + max_tokens + beside > context:
        thought = f" and a thought's {beside}" if beside else ""
        raise ValueError(
            f"The prompt of {key!r} has {len(ids)} tokens; with max_tokens={max_tokens}{thought} that "
            f"is more than the {context} that {model} can read. Use fewer worked "
            "examples, a shorter question, or a smaller max_tokens."
        )
    return ids


def context_of(model: str, engine: str, options: Mapping[str, Any]) -> int | None:
    """The longest text that a model can read in an engine, from its configuration; None: not known."""
    if engine == "vllm" and options.get("max_model_len"):
        return int(options["max_model_len"])
    config = AutoConfig.from_pretrained(model).get_text_config().to_dict()
    if engine == "vllm" and "factor" in (
        config.get("rope_scaling") or config.get("rope_parameters") or {}
    ):
        return None  # vLLM multiplies the context by it
    return context_in_words(config)


def check_fitting(
    model: str,
    prompts: Iterable[tuple[str, Text]],
    max_tokens: int,
    context: int | None,
    options: TemplateOptions | None = None,
) -> None:
    """Check that each prompt fits into the context with `max_tokens`.

    Raises:
        ValueError: see `fitting_tokens`.
    """
    tokenizer = load_tokenizer(model)
    room = math.inf if context is None else context - max_tokens
    for key, prompt in prompts:
        if not _surely_fits(prompt, room):
            fitting_tokens(tokenizer, prompt, key, max_tokens, model, context, options=options)


def longer_than(
    model: str, prompts: Iterable[Text], length: int, options: TemplateOptions | None = None
) -> int:
    """How many prompts have more than `length` tokens."""
    tokenizer = load_tokenizer(model)
    return sum(
        not _surely_fits(prompt, length) and len(prompt_ids(tokenizer, prompt, options)) > length
        for prompt in prompts
    )


def _surely_fits(prompt: Text, room: float) -> bool:
    """Whether a prompt of text is so short that it fits whatever the tokenizer."""
    if not isinstance(prompt, str) or not prompt:
        return False
    whole = len(prompt.encode("utf-8", "surrogatepass"))
    plain = whole if prompt.isascii() else len(prompt.encode("ascii", "ignore"))
    return plain + MOST_EXPANSION * (whole - plain) + MOST_ADDED <= room


def folder_fingerprint(model: str) -> str:
    """A hash of a model folder's files, for engines that keep the weights to themselves.

    A name on the Hugging Face hub is looked up in the local cache; where it is not there, its name is
    all that is hashed.
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
    """Every token that a model's files call an end of text."""
    configured = (generation or GenerationConfig()).eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def context_in_words(config: Mapping[str, Any]) -> int | None:
    return next((config[name] for name in CONTEXT_NAMES if config.get(name)), None)


MOST_EXPANSION, MOST_ADDED = 12, 16
"""Tokens per byte of text that is not ASCII, which Unicode's compatibility forms may write with up to 12
times its bytes, and tokens that a tokenizer adds. An ASCII character is one token at most."""

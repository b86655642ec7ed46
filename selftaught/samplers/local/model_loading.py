"""What the sampler and the scorer share: a model opened, its prompts as tokens, its fingerprint."""

import gc
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from selftaught.samplers.tokens import context_in_words, load_tokenizer
from selftaught.samplers.weights import check_weights, load_model


@dataclass(frozen=True)
class Opened:
    """A model ready to be asked."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    described: PreTrainedModel
    """The model itself, or its base where it is one around a base."""
    context: int | None
    """The longest text the model can read, where its configuration says so."""


def opened(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: str,
) -> Opened:
    """A model folder, a name on the Hugging Face hub, or a loaded model, ready to be asked.

    Raises:
        ValueError: the folder has no model or no tokenizer; a loaded model comes without tokenizer
            or is none of transformers.
    """
    if not isinstance(model, nn.Module):
        name = str(model)
        check_weights(name)
        tokenizer = tokenizer or load_tokenizer(name)
        loaded = _load_model(name, dtype, device)
        loaded.eval()
        return Opened(name, tokenizer, loaded, loaded, _context(loaded))
    if tokenizer is None:
        raise ValueError("Expected a tokenizer beside a loaded model, got none; pass tokenizer=...")
    described = model if isinstance(model, PreTrainedModel) else getattr(model, "base", None)
    if not isinstance(described, PreTrainedModel):
        raise ValueError(
            "Expected a model of transformers, or one with its base as .base, got "
            f"{type(model).__name__}; merge an adapter first (merge_and_unload)."
        )
    model.eval()
    name = described.name_or_path or ""
    return Opened(name, tokenizer, model, described, _context(described))


def _load_model(model: str, dtype: str, device: str) -> PreTrainedModel:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"Expected a device that this machine has, such as cpu or cuda, got {device!r}: "
            f"{str(error).splitlines()[0]}"
        ) from None
    transformers_logging.disable_progress_bar()  # it would break the caller's own
    loaded: PreTrainedModel = load_model(model, dtype=dtype)
    return loaded.to(torch.device(device))  # type: ignore[arg-type]


def _context(model: PreTrainedModel) -> int | None:
    """The longest text the model can read, where its configuration says so."""
    return context_in_words(model.config.get_text_config().to_dict())


def fingerprint(model: nn.Module) -> str:
    """A hash of the weights: a model trained again keeps its folder but not this."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def free_memory() -> None:
    """Give back what closed models held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_causal(model: str) -> None:
    """Check that a model's configuration is that of a causal language model.

    Raises:
        ValueError: it is not; names its class.
        OSError: there is no such model.
    """
    path = Path(model)
    if not path.exists() and (path.is_absolute() or model.startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"There is no model folder {model}; check the path.")
    load_tokenizer(model)  # its errors name what a folder lacks
    config = AutoConfig.from_pretrained(model)
    if not {type(config), type(config.get_text_config())} & set(MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ValueError(
            f"Expected a causal language model, got {model}, whose config.json is that of "
            f"{type(config).__name__}."
        )


def check_vocabulary(model: PreTrainedModel, texts: Iterable[Sequence[int]]) -> None:
    """Refuse token ids that the model does not have.

    Raises:
        ValueError: names the first such id.
    """
    count = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, index]
    for tokens in texts:
        for token in tokens:
            if not 0 <= token < count:
                raise ValueError(
                    f"Expected token ids from 0 to {count - 1:,}, got {token}; were these tokens "
                    "written by a model with another tokenizer?"
                )

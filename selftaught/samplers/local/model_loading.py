"""Model loading, fingerprints and checks for the sampler and the scorer."""

import gc
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from selftaught.samplers.tokens import context_in_words, load_tokenizer
from selftaught.samplers.weights import (
    check_weights,
    load_model,
    refuse_old_quiet,
    stored_parameters,
)


@dataclass(frozen=True)
class Opened:
    """A loaded model with its tokenizer."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    model: nn.Module
    described: PreTrainedModel
    """The transformers model with the configuration: the model itself or the base it wraps."""
    context: int | None
    """Context length in tokens; None if the configuration has none."""


def opened(
    model: str | Path | nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str,
    device: str,
) -> Opened:
    """Load a model in evaluation mode with its tokenizer.

    Args:
        model: A model folder, a name on the Hugging Face Hub, or a loaded model.
        tokenizer: Required with a loaded model; otherwise loaded from the folder.
        dtype: Data type of the weights; "auto" is the type in which they were saved.
        device: Name of a device; "auto" is the GPU if there is one.

    Raises:
        ValueError: The folder has no model or no tokenizer, or a loaded model has no tokenizer or
            is not a transformers model.
    """
    if not isinstance(model, nn.Module):
        name = str(model)
        refuse_old_quiet(Path(name))
        check_weights(name)
        tokenizer = tokenizer or load_tokenizer(name)
        loaded = _load_model(name, dtype, device)
        loaded.eval()
        # A folder of a Quiet-STaR model: its QuietLM has the loop that samples it.
        quiet = getattr(loaded, "quiet", None)
        if isinstance(quiet, nn.Module):
            base = getattr(quiet, "base", None)
            assert isinstance(base, PreTrainedModel)
            return Opened(name, tokenizer, quiet, base, _context(base))
        return Opened(name, tokenizer, loaded, loaded, _context(loaded))
    if tokenizer is None:
        raise ValueError("Expected a tokenizer with a loaded model, got none. Pass tokenizer=...")
    described = model if isinstance(model, PreTrainedModel) else getattr(model, "base", None)
    if not isinstance(described, PreTrainedModel):
        raise ValueError(
            "Expected a transformers model, or a model with a transformers model as .base, got "
            f"{type(model).__name__}. Merge an adapter first (merge_and_unload)."
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
    transformers_logging.disable_progress_bar()  # it would print over the caller's own
    loaded: PreTrainedModel = load_model(model, dtype=dtype)
    return loaded.to(torch.device(device))  # type: ignore[arg-type]


def _context(model: PreTrainedModel) -> int | None:
    """Return the context length in tokens; None if the configuration has none."""
    return context_in_words(model.config.get_text_config().to_dict())


def fingerprint(model: nn.Module) -> str:
    """Return a hash of the weights, which changes when a model is trained into the same folder."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def free_memory() -> None:
    """Free the memory of closed models."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_causal(model: str) -> None:
    """Check that a model's configuration is that of a causal language model.

    Raises:
        ValueError: It is not. The message has its class.
        OSError: The model does not exist.
    """
    path = Path(model)
    if not path.exists() and (path.is_absolute() or model.startswith(".") or len(path.parts) > 2):
        raise FileNotFoundError(f"There is no model folder {model}; check the path.")
    load_tokenizer(model)  # its errors say what is missing in a folder
    config = AutoConfig.from_pretrained(model)
    if not {type(config), type(config.get_text_config())} & set(MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ValueError(
            f"Expected a causal language model, got {model}, whose config.json is that of "
            f"{type(config).__name__}."
        )


def parameters_of(model: str) -> int:
    """Return the number of parameters of a causal language model, without reading its weights.

    Args:
        model: Model folder or name on the Hugging Face Hub.

    Raises:
        ValueError: It is not a causal language model, or its weight files are damaged.
        OSError: The model does not exist.
    """
    check_causal(model)
    if Path(model).is_dir():
        return stored_parameters(Path(model))
    with torch.device("meta"):
        described = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return sum(weight.numel() for weight in described.parameters())


def vocabulary_size(model: PreTrainedModel) -> int:
    """Return the number of tokens that the model has an embedding of."""
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr, index]

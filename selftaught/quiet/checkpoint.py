"""Create, save and load Quiet-STaR models.

A saved model is a regular Hugging Face model folder of the base model with two more files:
`quiet.json` (settings, token ids and a hash of the base weights) and `mixing.safetensors` (the
mixing head, the gate, and the offsets of the embeddings of the start and end tokens).
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.support import check_attention
from selftaught.quiet.thoughts import input_matrix, output_matrix
from selftaught.samplers.weights import check_weights, load_model, read_header

SETTINGS, MIXING = "quiet.json", "mixing.safetensors"


def make_quiet(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: QuietConfig
) -> QuietLM:
    """Make a Quiet-STaR model from a base model.

    Adds the start and end tokens of a thought to the tokenizer and to the embeddings, in place.
    Their embeddings are initialized with that of the first token of `config.initial_text` (Section
    4.2 of Zelikman et al. 2024, arXiv:2403.09629, uses "---").

    Args:
        base: a causal language model. Its embeddings are changed.
        tokenizer: its tokenizer. The two tokens are added to it.
        config: options of Quiet-STaR.

    Raises:
        ValueError: the tokenizer already has one of the tokens, or `initial_text` has no token.
        UnsupportedModel: thoughts cannot be computed in parallel with this model; names the layer.
    """
    names = [config.start_token, config.end_token]
    if taken := [name for name in names if name in tokenizer.get_vocab()]:
        raise ValueError(
            f"Expected a tokenizer without {' and '.join(taken)}, got one that has it. Open a "
            "saved model with open_quiet(folder), or choose other names (start_token, end_token)."
        )
    first = tokenizer(config.initial_text, add_special_tokens=False).input_ids[:1]
    if not first:
        raise ValueError(
            "initial_text must have at least one token; got "
            f"{config.initial_text!r}, which has none."
        )
    check_attention(base)
    tokenizer.add_tokens(names, special_tokens=True)
    if len(tokenizer) > len(input_matrix(base).weight):
        base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    start, end = (_id(tokenizer, name) for name in names)
    with torch.no_grad():
        for matrix in (input_matrix(base), output_matrix(base)):
            matrix.weight[[start, end]] = matrix.weight[first[0]].clone()
    return QuietLM(base, config, start=start, end=end, pad=_pad(tokenizer))


def save_quiet(model: QuietLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the base model, the tokenizer, the heads and the settings into one folder."""
    model.base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(model.heads(), folder / MIXING)
    settings = {
        "config": asdict(model.quiet_config),
        "start": model.marks.start,
        "end": model.marks.end,
        "never": model.marks.never,
        "base": fingerprint(model.base),
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def open_quiet(folder: Path, dtype: str = "auto") -> tuple[QuietLM, PreTrainedTokenizerBase]:
    """Load a saved Quiet-STaR model and its tokenizer.

    Args:
        folder: a folder written by `save_quiet`.
        dtype: data type of the weights. "auto" keeps that of the files.

    Raises:
        ValueError: the folder was not written by `save_quiet`, or its base weights have changed
        since.
    """
    if not (folder / SETTINGS).exists():
        raise ValueError(
            f"Expected a folder with {SETTINGS}, got {folder} without it. Make a Quiet-STaR model "
            "from a base model with `selftaught quiet train` or make_quiet."
        )
    settings = _settings(folder / SETTINGS)
    read_header(folder / MIXING)
    check_weights(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = load_model(folder, dtype=dtype)
    if dtype == "auto" and (found := fingerprint(base)) != settings["base"]:
        raise ValueError(
            f"The mixing head in {folder} was trained with another base model: expected weights "
            f"with the hash {settings['base']}, got {found}. Take all files from the same run."
        )
    model = QuietLM(
        base,
        settings["config"],
        start=settings["start"],
        end=settings["end"],
        pad=_pad(tokenizer),
    )
    _load_heads(model, load_file(folder / MIXING))
    return model, tokenizer


def _load_heads(model: QuietLM, weights: dict[str, Tensor]) -> None:
    """Load the weights that `QuietLM.heads` returned.

    Raises:
        ValueError: names or shapes of the weights do not match the model.
    """
    own = model.heads()
    wrong = [
        f"{name} (file: {list(weights[name].shape)}, model: {list(own[name].shape)})"
        for name in sorted(set(own) & set(weights))
        if own[name].shape != weights[name].shape
    ]
    if others := sorted(set(own) ^ set(weights)) + wrong:
        raise ValueError(
            f"The weights in {MIXING} do not match {SETTINGS}: {', '.join(others)}. Take {SETTINGS} "
            f"and {MIXING} from the same run."
        )
    model.load_state_dict(weights, strict=False)


def _settings(path: Path) -> dict[str, Any]:
    """Return the settings that `save_quiet` wrote, with `config` as a `QuietConfig`."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        needed = {name: settings[name] for name in ("config", "start", "end", "base")}
        return needed | {"config": QuietConfig(**needed["config"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not a settings file that save_quiet writes ({error!r}). Copy the whole "
            "model folder from its run again."
        ) from error


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _pad(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.pad_token is None else _id(tokenizer, str(tokenizer.pad_token))


def fingerprint(base: PreTrainedModel) -> str:
    """Return a hash of the weights of a model, without those of a LoRA adapter."""
    digest = hashlib.sha256()
    for name, weight in sorted(base.state_dict().items()):
        if "lora_" in name:
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

"""Quiet-STaR model folders of earlier versions.

Such a folder is that of the base model with two more files: `quiet.json` (settings, token ids and a
hash of the base weights) and `mixing.safetensors` (the mixing head, the gate, and the offsets of
the embeddings of the start and end tokens).
"""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.fingerprints import fingerprint
from selftaught.quiet.model import QuietLM
from selftaught.samplers.weights import check_weights, load_model, read_header

SETTINGS, MIXING = "quiet.json", "mixing.safetensors"


def is_old_folder(folder: Path) -> bool:
    """Return whether a folder has the settings file of an earlier version."""
    return (folder / SETTINGS).exists()


def open_old(folder: Path, dtype: str = "auto") -> tuple[QuietLM, PreTrainedTokenizerBase]:
    """Load a model of an earlier version and its tokenizer.

    Args:
        folder: a folder with `quiet.json` and `mixing.safetensors`.
        dtype: data type of the weights. "auto" keeps that of the files.

    Raises:
        ValueError: a file is missing or damaged, or the base weights have changed since the model
            was saved.
    """
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
    pad = tokenizer.pad_token_id
    assert pad is None or isinstance(pad, int)
    model = QuietLM(base, settings["config"], start=settings["start"], end=settings["end"], pad=pad)
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

"""A model that thinks, made of a base and a tokenizer, saved as one folder and opened again.

The folder is an ordinary Hugging Face folder of the base, which any program can load, with two more
files: `quiet.json` (settings, tokens, a hash of the base) and `mixing.safetensors` (the heads, and how
far the marks around a thought have moved from the base's embeddings of them).
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.self_check import check_attention
from selftaught.quiet.thoughts import input_matrix, output_matrix
from selftaught.samplers.weights import check_weights, load_model, read_header

SETTINGS, MIXING = "quiet.json", "mixing.safetensors"


def make_quiet(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: QuietConfig
) -> QuietLM:
    """A base model that thinks: its tokenizer and its embeddings get the tokens around a thought.

    Their embeddings start as that of `config.initial_text` (Section 4.2 of Zelikman et al. 2024,
    arXiv:2403.09629, with "---").

    Raises:
        ValueError: the tokenizer already has one of the tokens.
    """
    names = [config.start_token, config.end_token]
    if taken := [name for name in names if name in tokenizer.get_vocab()]:
        raise ValueError(
            f"Expected a tokenizer without {' and '.join(taken)}, got one with; open a saved model "
            "with open_quiet(folder), or choose other names (start_token, end_token)."
        )
    first = tokenizer(config.initial_text, add_special_tokens=False).input_ids[:1]
    if not first:
        raise ValueError(f"initial_text must have a token; got {config.initial_text!r}.")
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
    """Write the base, the tokenizer, the heads with the marks, and the settings into one folder."""
    model.base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file(model.heads(), folder / MIXING)
    told = {
        "config": asdict(model.quiet_config),
        "start": model.marks.start,
        "end": model.marks.end,
        "never": model.marks.never,
        "base": fingerprint(model.base),
    }
    (folder / SETTINGS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def open_quiet(folder: Path, dtype: str = "auto") -> tuple[QuietLM, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer.

    Raises:
        ValueError: the folder was not written by `save_quiet`, or its base is another one by now.
    """
    if not (folder / SETTINGS).exists():
        raise ValueError(
            f"Expected a folder with {SETTINGS}, got {folder} without; make a model that thinks "
            "of an ordinary one with make_quiet."
        )
    told = _settings(folder / SETTINGS)
    read_header(folder / MIXING)
    check_weights(str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = load_model(folder, dtype=dtype)
    if dtype == "auto" and (found := fingerprint(base)) != told["base"]:
        raise ValueError(
            f"The mixing head in {folder} was trained with another base (weights {told['base']}, "
            f"found {found}); take both from the same run."
        )
    model = QuietLM(
        base,
        told["config"],
        start=told["start"],
        end=told["end"],
        pad=_pad(tokenizer),
    )
    model.load_heads(load_file(folder / MIXING))
    return model, tokenizer


def _settings(path: Path) -> dict[str, Any]:
    """What `save_quiet` wrote, with `config` as a `QuietConfig`."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        needed = {name: told[name] for name in ("config", "start", "end", "base")}
        return needed | {"config": QuietConfig(**needed["config"])}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is not what save_quiet writes ({error!r}); take the whole folder from its run."
        ) from error


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _pad(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.pad_token is None else _id(tokenizer, str(tokenizer.pad_token))


def fingerprint(base: PreTrainedModel) -> str:
    """A hash of the weights, those of an adapter left out."""
    digest = hashlib.sha256()
    for name, weight in sorted(base.state_dict().items()):
        if "lora_" in name:
            continue
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

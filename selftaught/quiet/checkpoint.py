"""Create, save and load Quiet-STaR models.

A saved model is a model folder of transformers: `config.json` has the settings of the base model and
of Quiet-STaR, and the weights of the base model and of the heads are in the same files. Folders of
earlier versions (see `old_folder`) can be opened, too.
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.fingerprints import fingerprint
from selftaught.quiet.model import QuietLM
from selftaught.quiet.old_folder import is_old_folder, open_old
from selftaught.quiet.pretrained_config import MODEL_TYPE
from selftaught.quiet.support import check_attention
from selftaught.quiet.thoughts import input_matrix, output_matrix
from selftaught.quiet.transformers_model import QuietForCausalLM
from selftaught.samplers.weights import load_model

__all__ = ["export_base", "fingerprint", "is_quiet", "make_quiet", "open_quiet", "save_quiet"]


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
    """Save a model and its tokenizer into one folder, which `AutoModelForCausalLM` opens."""
    QuietForCausalLM.from_quiet(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def is_quiet(folder: Path) -> bool:
    """Return whether a folder is that of a Quiet-STaR model, of this or an earlier version."""
    if is_old_folder(folder):
        return True
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


def open_quiet(folder: Path, dtype: str = "auto") -> tuple[QuietLM, PreTrainedTokenizerBase]:
    """Load a saved Quiet-STaR model and its tokenizer.

    Args:
        folder: a folder written by `save_quiet` of this or an earlier version, or by
            `QuietForCausalLM.save_pretrained`, with the tokenizer.
        dtype: data type of the weights. "auto" keeps that of the files.

    Raises:
        ValueError: the folder is not that of a Quiet-STaR model, or a file is missing or damaged.
    """
    if is_old_folder(folder):
        return open_old(folder, dtype)
    if not is_quiet(folder):
        raise ValueError(
            f"Expected a folder of a Quiet-STaR model, got {folder}. Make a Quiet-STaR model from a "
            "base model with `selftaught quiet train` or make_quiet."
        )
    loaded = load_model(folder, dtype=dtype)
    assert isinstance(loaded, QuietForCausalLM)
    return loaded.quiet, AutoTokenizer.from_pretrained(folder)


def export_base(folder: Path, out: Path) -> None:
    """Write the base model inside a Quiet-STaR model, and the tokenizer.

    The base has the embeddings of the start and end tokens, but never sees them as text.

    Args:
        folder: a folder of a Quiet-STaR model.
        out: a folder that is missing or empty.

    Raises:
        ValueError: `folder` is not that of a Quiet-STaR model, or `out` has files.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder. Choose another one.")
    model, tokenizer = open_quiet(folder)
    model.base.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int)
    return found


def _pad(tokenizer: PreTrainedTokenizerBase) -> int | None:
    return None if tokenizer.pad_token is None else _id(tokenizer, str(tokenizer.pad_token))

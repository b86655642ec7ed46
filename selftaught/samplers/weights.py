"""Checking and loading of model weights.

`check_weights` reads only the headers of safetensors files and does not need torch. `load_model`
loads a model and raises if weights are missing from its files. Weights are read from safetensors
files only; a pickle (`pytorch_model.bin`) is never opened.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from selftaught.hub import check_model_name

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Maximum size of a header in bytes; the limit of the safetensors library."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per element of each safetensors dtype."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
QUIET_MODEL_TYPE = "selftaught_quiet"
"""The `model_type` of Quiet-STaR models in their `config.json`."""
NAMED = 4
"""Maximum number of tensors or files named in an error message."""


def check_weights(model: str) -> None:
    """Check that the weight files of a model are complete, using only their headers.

    The checks: every weight file exists, its header is valid, its size matches its header, and
    every shard of an index exists and contains the tensors that the index lists for it. No tensor
    is read and nothing is downloaded.

    Args:
        model: A model folder, or a name on the Hugging Face Hub. For a name, the files in the local
            cache are checked; if there are none, nothing is checked.

    Raises:
        ValueError: A file is missing, truncated or damaged, or the folder has no safetensors
            weights. The message names the file and what to do.
    """
    path = Path(model)
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise ValueError(
            f"Expected a model folder or a name on the Hugging Face Hub, got the file {model}."
        )
    elif _is_path(model):
        raise ValueError(f"Expected a model folder, got {model}, which does not exist.")
    else:
        _check_cached(model)


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor in a safetensors file, and check the file's size.

    Raises:
        ValueError: The file is missing, truncated or not a valid safetensors file.
    """
    size, entries = _entries(path)
    shapes: dict[str, tuple[int, ...]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        shape, start, end = _tensor(path, name, entry)
        shapes[name] = shape
        spans.append((start, end, name))
    at = 0
    for start, end, name in sorted(spans):
        if start != at:
            raise _damaged(path, f"tensor {name!r} begins at byte {start:,} instead of {at:,}")
        at = end
    if size < at:
        raise ValueError(
            f"{path} is cut off: its header lists {at:,} bytes of tensors, but the file has "
            f"{size:,}. Copy or download it again."
        )
    if size > at:
        raise _damaged(path, f"it has {size - at:,} bytes more than its header lists")
    if not shapes:
        raise _damaged(path, "it contains no tensors")
    return shapes


def _entries(path: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of bytes of tensor data in a file, and its header as JSON."""
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if first == b"version ":
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the weights. Run git lfs pull in its folder."
                )
            length = int.from_bytes(first, "little")
            if len(first) < 8 or (8 + length > total and length <= MAX_HEADER):
                raise ValueError(
                    f"{path} is cut off inside its header: the file has {total:,} bytes. "
                    "Copy or download it again."
                )
            if length > MAX_HEADER:
                raise _damaged(path, f"its first bytes give a header of {length:,} bytes")
            raw = file.read(length)
    except FileNotFoundError:
        raise ValueError(f"The weight file {path} is missing; copy or download it again.") from None
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"its header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _damaged(path, "its header is not a JSON object")
    return total - 8 - length, entries


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], int, int]:
    """Return the shape, start byte and end byte of a tensor from its header entry, after checks."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"tensor {name!r} has no dtype, shape and data_offsets") from None
    if any(type(number) is not int or number < 0 for number in numbers) or end < start:
        raise _damaged(path, f"tensor {name!r} has the shape {shape} at bytes {start} to {end}")
    bits = BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is not None and math.prod(shape) * bits != (end - start) * 8:
        raise _damaged(
            path,
            f"tensor {name!r} of shape {shape} and dtype {dtype} has {end - start:,} bytes",
        )
    return tuple(shape), start, end


def _damaged(path: Path, why: str) -> ValueError:
    return ValueError(f"{path} is not a valid safetensors file: {why}. Copy or download it again.")


def stored_parameters(folder: Path) -> int:
    """Return the number of elements of all tensors in the weight files of a model folder.

    Raises:
        ValueError: A file is missing, truncated or damaged.
    """
    check_weights(str(folder))
    weights = _weights_of(folder)
    if weights is None or weights.suffix != ".json":
        files = [] if weights is None else [weights]
    else:
        files = [folder / shard for shard in set(_json_object(weights)["weight_map"].values())]
    shapes = {name: shape for file in files for name, shape in read_header(file).items()}
    if _json_object(folder / "config.json").get("tie_word_embeddings"):
        shapes.pop("lm_head.weight", None)  # some folders contain tied weights twice
    return sum(math.prod(shape) for shape in shapes.values())


def _weights_of(folder: Path) -> Path | None:
    """Return the weight file or the index of a model folder."""
    named = _json_object(folder / "config.json").get("transformers_weights")
    if isinstance(named, str):
        return folder / named
    return next((folder / name for name in (SINGLE, INDEX) if (folder / name).exists()), None)


def _check_folder(folder: Path) -> None:
    refuse_adapter(folder)
    if not (folder / "config.json").exists():
        raise ValueError(
            f"Expected a model folder with a config.json, got {folder}, which has none."
        )
    weights = _weights_of(folder)
    if weights is None:
        raise ValueError(_without_weights(folder))
    if weights.suffix == ".json":
        _check_shards(weights, whole=True)
    else:
        read_header(weights)


def refuse_adapter(folder: Path) -> None:
    """Raise if a folder contains a PEFT adapter.

    Raises:
        ValueError: It does. The message names the adapter's base model.
    """
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return
    base = _json_object(adapter).get("base_model_name_or_path")
    raise ValueError(
        f"{folder} is a PEFT adapter, not a whole model; merge it into its base model"
        f"{f' ({base})' if base else ''} with merge_and_unload() and save_pretrained(folder)."
    )


def refuse_old_quiet(folder: Path) -> None:
    """Raise a `ValueError` if a folder is that of a Quiet-STaR model of an earlier version.

    transformers and vLLM read such a folder as its base model, which does not think.
    """
    if all((folder / name).is_file() for name in ("quiet.json", "mixing.safetensors")):
        raise ValueError(
            f"{folder} is a Quiet-STaR model of an earlier version, which would be sampled without "
            "thoughts. Use --sampler quiet, or convert it in Python: "
            "QuietForCausalLM.from_pretrained(folder).save_pretrained(new_folder)."
        )


def _without_weights(folder: Path) -> str:
    """Return why a folder without `model.safetensors` or its index cannot be used."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    pickles = [
        name for name in names if Path(name).suffix in PICKLES and name != "training_args.bin"
    ]
    if pickles:
        return (
            f"Expected safetensors weights in {folder}, found {_listed(pickles)}. A pickle can run "
            "code and is never opened. If you trust the file, convert it: load it with "
            "transformers and call save_pretrained(folder)."
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return (
            f"Expected safetensors weights in {folder}, found {_listed(gguf)}. Serve the GGUF file "
            "with llama.cpp and use --sampler openai, or convert it to safetensors."
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"; found only {_listed(others)}" if others else ""
    return f"Expected weights in {folder}, in {SINGLE} or in shards with {INDEX}{found}."


def _check_shards(index: Path, *, whole: bool) -> None:
    """Check the shards of an index.

    Args:
        index: The index file.
        whole: Whether a missing shard is an error.
    """
    shards: dict[str, list[str]] = {}
    where = _json_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map; copy or download it again.")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(
                f"{index} names the shard {shard!r} for tensor {name!r}; expected a file in its "
                "folder. Copy or download the index again."
            )
        shards.setdefault(shard, []).append(name)
    absent = [shard for shard in shards if not (index.parent / shard).exists()]
    if absent and whole:
        raise ValueError(
            f"{index} names {len(shards)} shards, of which {len(absent)} are missing: "
            f"{_listed(absent)}. Copy or download them again."
        )
    owner: dict[str, str] = {}
    for shard, names in shards.items():
        if shard in absent:
            continue
        found = read_header(index.parent / shard)
        if missing := [name for name in names if name not in found]:
            raise ValueError(
                f"{index.parent / shard} lacks {len(missing)} tensors that {index.name} lists for "
                f"it: {_listed(missing)}. Copy or download both again."
            )
        if twice := [name for name in found if name in owner]:
            raise ValueError(
                f"{index.parent / shard} and {owner[twice[0]]} both contain {_listed(twice)}, so "
                "the shards belong to different models. Copy or download them again."
            )
        owner |= dict.fromkeys(found, shard)


def _check_cached(name: str) -> None:
    """Check the weight files in the local cache of a model on the Hugging Face Hub."""
    from huggingface_hub import try_to_load_from_cache

    for file in (SINGLE, INDEX):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str) and file == SINGLE:
            read_header(Path(found))
        elif isinstance(found, str):
            _check_shards(Path(found), whole=False)


def _is_path(model: str) -> bool:
    """Return whether a name can only be a path; names on the Hub have at most one slash."""
    return model.startswith((".", "~", "/")) or Path(model).is_absolute() or model.count("/") > 1


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); copy or download it again."
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object; copy or download it again.")
    return found


def _listed(names: Iterable[str]) -> str:
    """Return the first few names, and the number of further ones."""
    ordered: Sequence[str] = sorted(names)
    more = f" and {len(ordered) - NAMED} more" if len(ordered) > NAMED else ""
    return ", ".join(ordered[:NAMED]) + more


# ------------------------------------------------------------------ loading


def load_model(
    model: str | Path, kind: str = "causal_lm", *, new_head: bool = False, **options: Any
) -> Any:
    """Load a model with transformers, and raise unless all its weights come from its files.

    transformers initializes weights that are missing from the files with random numbers. Only tied
    weights, and weights that the architecture declares as optional, may be missing. Unused weights
    in the files are allowed, with a warning, if they belong to another part, such as the vision
    tower of a multimodal checkpoint or another head.

    Args:
        model: A model folder or a name on the Hugging Face Hub.
        kind: "causal_lm" or "sequence_classification".
        new_head: Whether the head may be missing because it will be trained. The head of the saved
            model is then dropped without a warning.
        options: Arguments of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: Weights are missing, unexpected or of another shape, or a file is damaged. The
            message names the file and the tensors.
        FileNotFoundError: The model is neither a folder nor available on the Hub.
    """
    from safetensors import SafetensorError

    check_model_name(str(model))
    check_weights(str(model))
    try:
        loaded, info = _loaded(model, kind, **options)
    except SafetensorError as error:
        raise ValueError(
            f"The weights of {model} cannot be read: {error}. Copy or download them again."
        ) from error
    if getattr(loaded, "_hf_peft_config_loaded", False):
        raise ValueError(
            f"{model} is a PEFT adapter, not a whole model; merge it into its base model with "
            "merge_and_unload() and save_pretrained(folder)."
        )
    head = f"{loaded.base_model_prefix}." if new_head else ""
    missing = {name for name in info["missing_keys"] if name.startswith(head)}
    unexpected = {name for name in info["unexpected_keys"] if name.startswith(head)}
    wrong = {name: shapes for name, *shapes in info["mismatched_keys"]}
    _refuse_incomplete(model, loaded, missing, unexpected, wrong)
    _check_unexpected(model, loaded, unexpected)
    return loaded


def load_plain_model(model: str | Path, **options: Any) -> Any:
    """Load a causal language model, as `load_model` does, and raise if it thinks.

    Raises:
        ValueError: As `load_model`, or the model is a Quiet-STaR model.
    """
    loaded = load_model(model, **options)
    if hasattr(loaded, "quiet"):
        raise ValueError(
            f"{model} is a Quiet-STaR model, which `selftaught quiet train` trains. To train its base "
            f"model alone, write it with `selftaught quiet export-base {model} OUT` and use OUT."
        )
    return loaded


def check_names(model: str) -> None:
    """Check that the weights in a model folder match its architecture, without reading them.

    For engines that load the weights themselves. Quantized models, models with custom code,
    architectures that transformers does not support, and names on the Hugging Face Hub are not
    checked.

    Raises:
        ValueError: Weights are missing or have another shape. The message names the file and the
            tensors.
    """
    check_weights(model)
    folder = Path(model)
    if not folder.is_dir():
        return
    config = _json_object(folder / "config.json")
    if {"quantization_config", "auto_map"} & set(config):
        return
    try:
        described, info = _loaded(model, "causal_lm", device_map="meta")
    except Exception:  # the engine may support what transformers does not
        return
    wrong = {name: shapes for name, *shapes in info["mismatched_keys"]}
    missing, unexpected = set(info["missing_keys"]), set(info["unexpected_keys"])
    _refuse_incomplete(model, described, missing, unexpected, wrong)


def _loaded(model: str | Path, kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model; return it with transformers' report of missing and mismatched weights."""
    import logging

    import transformers

    match kind:
        case "causal_lm":
            auto: Any = transformers.AutoModelForCausalLM
        case "sequence_classification":
            auto = transformers.AutoModelForSequenceClassification
        case _:
            raise ValueError(
                f"kind must be 'causal_lm' or 'sequence_classification', got {kind!r}."
            )
    reports: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        """Filter out transformers' log messages about the same problems."""
        message = record.getMessage()
        if "LOAD REPORT" in message:
            reports.append(message)
        return "LOAD REPORT" not in message and "checkpoint seem corrupted" not in message

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        return auto.from_pretrained(
            model, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True,
            **options,
        )  # fmt: skip
    except RuntimeError as error:
        if not reports:
            raise
        raise ValueError(
            f"The weights of {model} cannot be converted to this architecture: {reports[-1]}"
        ) from error
    finally:
        logger.removeFilter(keep)


def _refuse_incomplete(
    model: str | Path, loaded: Any, missing: set[str], unexpected: set[str], wrong: dict[str, Any]
) -> None:
    """Raise if weights of a model are missing from the files or have another shape there."""
    if not missing and not wrong:
        return
    count, kind, files = len(loaded.state_dict()), type(loaded).__name__, _files(model)
    if wrong:
        shapes = [
            f"{name} (file: {list(in_file)}, model: {list(in_model)})"
            for name, (in_file, in_model) in wrong.items()
        ]
        raise ValueError(
            f"{len(wrong)} of {count} weights of {kind} have another shape in {files}: "
            f"{_listed(shapes)}. config.json and the weights belong to different models. Copy both "
            "from one source."
        )
    advice = " Copy or download the weights again."
    if prefix := _other_prefix(missing, unexpected):
        advice = f" The files contain them with the prefix {prefix!r}; rename the tensors."
    elif unexpected:
        advice = (
            f" The files have {len(unexpected)} other tensors ({_listed(unexpected)}); the weights "
            "may be of another architecture or under another prefix."
        )
    raise ValueError(
        f"{len(missing)} of {count} weights of {kind} are missing in {files}, and would be random: "
        f"{_listed(missing)}.{advice}"
    )


def _other_prefix(missing: set[str], unexpected: set[str]) -> str | None:
    """Return the prefix under which the files contain all missing weights, or None."""
    first = min(missing, key=lambda name: (len(name), name))
    for name in sorted(unexpected):
        prefix = name.removesuffix(first)
        if prefix and prefix != name and all(prefix + one in unexpected for one in missing):
            return prefix
    return None


OTHER_PARTS = (
    "vision", "visual", "image", "audio", "speech", "video", "multi_modal", "multimodal", "mm_",
    "projector", "connector", "talker", "token2wav", "code2wav", "mtp", "score", "classifier",
    "v_head", "value_head", "reward_head", "qa_outputs",
)  # fmt: skip
"""Substrings of the names of modules for other modalities and other heads."""


def _check_unexpected(model: str | Path, loaded: Any, unexpected: set[str]) -> None:
    """Raise for unexpected weights of the model's own parts; warn about those of other parts."""
    import re
    import warnings

    # Constants that older versions of transformers saved.
    constant = re.compile(
        r"(^|\.)((attn|attention)\.(bias|masked_bias)|masked_bias|inv_freq|position_ids)$"
    )
    unexpected = {name for name in unexpected if not constant.search(name)}
    if not unexpected:
        return
    other = {name for name in unexpected if _is_other_part(loaded, name)}
    # A quantizer's own tensors have other names.
    quantized = getattr(loaded, "hf_quantizer", None) is not None
    if (own := unexpected - other) and not quantized:
        raise ValueError(
            f"{_files(model)} has {len(own)} weights that {type(loaded).__name__} with this "
            f"config.json does not have: {_listed(own)}. config.json may be of another model, or "
            "of one with fewer layers or other options. Copy both from one source."
        )
    warnings.warn(
        f"{len(unexpected)} weights in {_files(model)} are not used by {type(loaded).__name__}: "
        f"{_listed(unexpected)}. All weights of {type(loaded).__name__} itself were found.",
        stacklevel=3,
    )


def _is_other_part(loaded: Any, name: str) -> bool:
    """Return whether a weight belongs to an unused part of a checkpoint, such as a vision tower."""
    base = loaded.base_model
    first = name.removeprefix(f"{loaded.base_model_prefix}.").split(".")[0]
    own = {child for module in (loaded, base) for child, _ in module.named_children()}
    return first not in own and any(part in first.lower() for part in OTHER_PARTS)


def _files(model: str | Path) -> str:
    """Return the path of a model's weight file or index, for messages."""
    folder = Path(model)
    if not folder.is_dir():
        return f"the files of {model}"
    names = (SINGLE, INDEX)
    return str(next((folder / name for name in names if (folder / name).exists()), folder))

"""Checking and loading of model weights.

`check_weights` reads only the headers of safetensors files, without torch. `load_model` loads a model
and refuses one whose weights are not all in its files. Weights are read from safetensors only; a
pickle (`pytorch_model.bin`) is never opened.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Size of an element of each safetensors dtype."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
NAMED = 4
"""How many tensors or files an error names."""


def check_weights(model: str) -> None:
    """Check that the weight files of a model are complete, from their headers alone.

    Checked are: every weight file is there, its header is valid, its size agrees with its header, and
    every shard of an index is there with the tensors that the index puts into it. No tensor is read
    and nothing is downloaded.

    Args:
        model: a model folder, or a name on the Hugging Face hub. Of a name, the files in the local
            cache are checked; where there are none, nothing is.

    Raises:
        ValueError: a file is missing, cut off or damaged, or the folder has no safetensors weights;
            names the file and what to do.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        _check_folder(path)
    elif path.exists():
        raise ValueError(
            f"Expected a model folder or a name on the Hugging Face hub, got the file {model}."
        )
    elif _is_path(model):
        raise ValueError(f"Expected a model folder, got {model}, which does not exist.")
    else:
        _check_cached(model)


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a safetensors file; the file's size must agree.

    Raises:
        ValueError: the file is missing, cut off or no valid safetensors file.
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
            f"{path} is cut off: its header says {at:,} bytes of tensors, the file has {size:,}. "
            "Copy or download it again."
        )
    if size > at:
        raise _damaged(path, f"it has {size - at:,} bytes more than its header says")
    if not shapes:
        raise _damaged(path, "it contains no tensors")
    return shapes


def _entries(path: Path) -> tuple[int, dict[str, Any]]:
    """The bytes of tensors in a file, and its header as JSON."""
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            first = file.read(8)
            if first == b"version ":
                raise ValueError(
                    f"{path} is a Git LFS pointer, not the weights; run git lfs pull in its folder."
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
    """Shape, first and last byte of a tensor, as its header has them and as they must agree."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = [*shape, start, end]
    except (KeyError, TypeError, ValueError):
        raise _damaged(path, f"tensor {name!r} has no dtype, shape and data_offsets") from None
    if any(type(number) is not int or number < 0 for number in whole) or end < start:
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


def _check_folder(folder: Path) -> None:
    _refuse_adapter(folder)
    config = _json_object(folder / "config.json") if (folder / "config.json").exists() else None
    if config is None:
        raise ValueError(f"Expected a model folder with a config.json, got {folder} without.")
    named = config.get("transformers_weights")
    if isinstance(named, str):
        weights = folder / named
    else:
        weights = next((folder / one for one in (SINGLE, INDEX) if (folder / one).exists()), None)
    if weights is None:
        raise ValueError(_without_weights(folder))
    if weights.suffix == ".json":
        _check_shards(weights, whole=True)
    else:
        read_header(weights)


def _refuse_adapter(folder: Path) -> None:
    adapter = folder / "adapter_config.json"
    if not adapter.exists():
        return
    base = _json_object(adapter).get("base_model_name_or_path")
    raise ValueError(
        f"{folder} is a PEFT adapter, not a whole model; merge it into its base model"
        f"{f' ({base})' if base else ''} with merge_and_unload() and save_pretrained(folder)."
    )


def _without_weights(folder: Path) -> str:
    """Why a folder without `model.safetensors` or its index cannot be used."""
    names = sorted(one.name for one in folder.iterdir() if one.is_file())
    pickles = [
        name for name in names if Path(name).suffix in PICKLES and name != "training_args.bin"
    ]
    if pickles:
        return (
            f"Expected safetensors weights in {folder}, found {_listed(pickles)}. A pickle can run "
            "code and is never opened here; where you trust the file, convert it: load it with "
            "transformers and save_pretrained(folder)."
        )
    if gguf := [name for name in names if name.endswith(".gguf")]:
        return (
            f"Expected safetensors weights in {folder}, found {_listed(gguf)}. Serve a GGUF file with "
            "llama.cpp and use --sampler openai, or convert it to safetensors."
        )
    others = [name for name in names if name.endswith(".safetensors")]
    found = f"; found only {_listed(others)}" if others else ""
    return f"Expected weights in {folder}, in {SINGLE} or in shards with {INDEX}{found}."


def _check_shards(index: Path, *, whole: bool) -> None:
    """Check the shards of an index.

    Args:
        whole: whether a shard that is not there is an error.
    """
    shards: dict[str, list[str]] = {}
    where = _json_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map; copy or download it again.")
    for name, shard in where.items():
        if not isinstance(shard, str) or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ValueError(
                f"{index} names the shard {shard!r} for tensor {name!r}; expected a file in its folder."
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
                f"{index.parent / shard} lacks {len(missing)} tensors that {index.name} puts there: "
                f"{_listed(missing)}. Copy or download both again."
            )
        if twice := [name for name in found if name in owner]:
            raise ValueError(
                f"{index.parent / shard} and {owner[twice[0]]} both contain {_listed(twice)}; these "
                "shards are not of one model. Copy or download them again."
            )
        owner |= dict.fromkeys(found, shard)


def _check_cached(name: str) -> None:
    """Check the files that the local cache has of a model on the Hugging Face hub."""
    from huggingface_hub import try_to_load_from_cache

    for file in (SINGLE, INDEX):
        found = try_to_load_from_cache(name, file)
        if isinstance(found, str) and file == SINGLE:
            read_header(Path(found))
        elif isinstance(found, str):
            _check_shards(Path(found), whole=False)


def _is_path(model: str) -> bool:
    """Whether a name cannot be one of the hub, which has at most one slash."""
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
    """The first few names, and how many there are beside them."""
    whole: Sequence[str] = sorted(names)
    more = f" and {len(whole) - NAMED} more" if len(whole) > NAMED else ""
    return ", ".join(whole[:NAMED]) + more

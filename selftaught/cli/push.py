"""Uploads to the Hugging Face Hub: the command `selftaught push`, and the options of trainings."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options
from selftaught.cli.output import DONE, say, tell


@dataclass(frozen=True)
class RepositoryOptions:
    """The repository on the Hub."""

    heading: ClassVar[str] = "hub"

    hub_model_id: str | None = None
    """Name of the repository on the Hugging Face Hub, such as my-user/my-model. Default: the name of
    the run folder, in the namespace of the access token."""
    hub_private_repo: bool = True
    """Create the repository as private. An existing public repository is refused, unless this is
    false."""


@dataclass(frozen=True)
class HubOptions(RepositoryOptions):
    """The upload of a finished model."""

    heading: ClassVar[str] = "hub"

    push_to_hub: bool = False
    """Upload the finished model to the Hugging Face Hub (docs/hub.md)."""


@dataclass(frozen=True)
class PushOptions(RepositoryOptions):
    """What is uploaded."""

    heading: ClassVar[str] = "hub"

    rollouts: bool = False
    """Also upload the completions and training examples of the run, as a data set with the name of the
    model's repository and "-rollouts"."""
    repo_type: Literal["model", "dataset"] | None = None
    """Upload only the model ("model") or only the completions and training examples ("dataset").
    Default: the model, and what `--rollouts` adds."""


HUB_FIELDS = ("push_to_hub", "hub_model_id", "hub_private_repo")


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of the command and return the dataclass of its options."""
    del command, given
    folder = [("run", "folder of a finished run, or a model folder", None)]
    return add_options(parser, PushOptions, positional=folder, config=False)


def run(command: str, options: Namespace) -> int:
    """Upload the models of a finished run, and its completions, and return the exit code."""
    del command
    how = PushOptions(
        options.hub_model_id, options.hub_private_repo, options.rollouts, options.repo_type
    )
    push(Path(options.run), how)
    return DONE


def push(folder: Path, how: PushOptions) -> None:
    """Upload the models of a run or a model folder, and its completions.

    Raises:
        ValueError: there is nothing to upload, the name is invalid, or a file contains a token.
        OSError: the upload failed; the message says why.
    """
    from selftaught.reports.data_card import write_data_set
    from selftaught.runs.hub_upload import (
        Upload,
        check_login,
        model_uploads,
        repository_name,
        upload,
    )

    models = model_uploads(folder, how.hub_model_id) if how.repo_type != "dataset" else []
    repository_name(how.hub_model_id, folder)
    check_login()
    for one in models:
        _say_uploaded(one.folder, upload(one, private=how.hub_private_repo))
    if how.repo_type == "dataset" or (how.rollouts and how.repo_type is None):
        name = repository_name(how.hub_model_id, folder)
        staged = folder / ".hub"
        try:
            write_data_set(folder, staged)
            one = Upload(staged, repository_name(f"{name}-rollouts", folder), "dataset")
            _say_uploaded(folder, upload(one, private=how.hub_private_repo))
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _say_uploaded(folder: Path, url: str) -> None:
    say(f"Hub     {url}  (from {folder})")


def hub_options(values: dict[str, object]) -> HubOptions:
    """Take the options of the upload out of the values of a command."""
    return HubOptions(**{name: values.pop(name) for name in HUB_FIELDS})  # type: ignore[arg-type]


def check_push(how: HubOptions, out: Path) -> None:
    """Check before a training that its model can be uploaded: the name and the access token.

    Raises:
        ValueError: the name is invalid.
        OSError: there is no access token, or the Hub does not accept it.
    """
    if how.push_to_hub:
        from selftaught.runs.hub_upload import check_login, repository_name

        repository_name(how.hub_model_id, out)
        check_login()


def push_after(how: HubOptions, out: Path) -> None:
    """Upload the model of a finished training. A failure is printed, and is no error.

    Args:
        how: the options of the upload.
        out: run folder or model folder.
    """
    if not how.push_to_hub:
        return
    try:
        push(out, PushOptions(how.hub_model_id, how.hub_private_repo))
    except (OSError, ValueError) as error:
        flags = "" if how.hub_model_id is None else f" --hub-model-id {how.hub_model_id}"
        flags += "" if how.hub_private_repo else " --hub-private-repo false"
        tell(
            f"selftaught: warning: the training is complete, but its model was not uploaded. {error}\n"
            f"Upload it later with: selftaught push {shlex.quote(str(out))}{flags}"
        )

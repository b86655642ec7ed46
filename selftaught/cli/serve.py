"""The command `selftaught serve`: an OpenAI-compatible server for one model."""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jsonargparse import ArgumentParser, Namespace

from selftaught.cli.arguments import add_options
from selftaught.cli.output import DONE, say, tell
from selftaught.safety.options import CheckOptions, changed_options

if TYPE_CHECKING:
    from selftaught.prompts import PromptStyle
    from selftaught.quiet.gating import ThoughtParams
    from selftaught.serving.best_of_n import Chooser
    from selftaught.serving.review import Reviewer
    from selftaught.serving.server import ModelServer, ServerSettings
    from selftaught.tasks.base import Task

KEY_VARIABLE = "SELFTAUGHT_API_KEY"
"""Environment variable with the key that requests must send."""


@dataclass(frozen=True)
class ServedModel:
    """The model, and the prompt around questions."""

    heading: ClassVar[str] = "model and task"

    model: str = "embedded"
    """Hugging Face model name or model folder (plain, Quiet-STaR or with pause tokens), or "embedded"
    for the small model in this package."""
    served_model_name: str | None = None
    """Name of the model in requests. Default: the value of `--model`."""
    task: str | None = None
    """Task whose prompt is put around the question of a chat, and whose rules extract the answers
    that `--choose majority` and `--choose weighted` compare. Default: "arithmetic" for the embedded model,
    otherwise none."""
    task_options: dict[str, Any] = field(default_factory=dict)
    """Options of the task."""
    prompt: Literal["few_shot", "bare", "chat"] = "bare"
    """With `--task`: prompt style, "few_shot" (the task's worked examples before the question), "bare"
    (the question alone) or "chat" (the model's chat template, with the task's instruction)."""
    pauses: int = 0
    """Number of pause tokens after every text prompt, for a model that was trained with them."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weights. "auto" is the type in which they were saved."""
    device: str = "auto"
    """Device. "auto" is the GPU if there is one."""


@dataclass(frozen=True)
class ThinkingOptions:
    """Thoughts: what a client gets of them, and how a Quiet-STaR model thinks."""

    heading: ClassVar[str] = "thinking"

    thoughts: Literal["hidden", "shown", "summary"] = "hidden"
    """What clients see of thoughts: nothing ("hidden"), their text in the field `reasoning_content`
    ("shown"), or their number and length there ("summary")."""
    thought_marks: tuple[str, str] = ("<think>", "</think>")
    """Texts with which the model opens and closes a thought."""
    log_thoughts: Path | None = None
    """File to which all thoughts are appended, for the operator of the server. Default: none."""
    num_thoughts: int = 1
    """Quiet-STaR: number of thoughts per token. The probabilities after them are averaged."""
    thought_temperature: float = 0.0
    """Quiet-STaR: sampling temperature of thoughts. 0 means greedy decoding."""
    think_when: Literal["trained", "always", "pattern", "answer", "entropy", "gate", "never"] = (
        "trained"
    )
    """Quiet-STaR: where to think; see `selftaught quiet generate --help`."""
    pattern: str = ""
    """Quiet-STaR: regular expression for `--think-when pattern` and `--think-when answer`."""
    threshold: float = 0.0
    """Quiet-STaR: threshold for `--think-when entropy` and `--think-when gate`, in nats."""


@dataclass(frozen=True)
class ChoiceOptions:
    """Best-of-n: every request gets one of several completions."""

    heading: ClassVar[str] = "choice"

    choose: Literal["verifier", "majority", "weighted"] | None = None
    """How to choose among completions: the completion with the highest score of the verifier
    ("verifier"), the most frequent answer ("majority"), or the answer with the largest total weight,
    where a completion's weight is the exponential of its score ("weighted"). Default: "verifier"
    with `--verifier`, otherwise no choice."""
    verifier: str | None = None
    """Model folder of a verifier, such as runs/vstar/verifier."""
    n: int = 16
    """Number of completions to choose from."""
    score: Literal["sum", "mean", "reward"] = "sum"
    """Score of a completion: the "sum" of its tokens' log-probabilities (as in the paper), their
    "mean", or the implicit "reward" with respect to `--reference`."""
    reference: str | None = None
    """Model that the verifier was trained from. Required by `--score reward`."""


@dataclass(frozen=True)
class ReviewOptions(CheckOptions):
    """Checks of thoughts and completions before a client gets them."""

    heading: ClassVar[str] = "checks"

    flagged: Literal["withhold", "redraw"] = "withhold"
    """What happens to thoughts and completions that a check flags: they are withheld, or the
    completion is drawn anew and withheld only if it is flagged again ("redraw"). With checks, a
    stream starts when the completion has been checked."""
    redraws: int = 3
    """Maximum number of times that a completion is drawn anew."""


@dataclass(frozen=True)
class ServeOptions(ReviewOptions, ChoiceOptions, ThinkingOptions, ServedModel):
    """The server."""

    heading: ClassVar[str] = "server"

    host: str = "127.0.0.1"
    """Address to listen on. The default accepts connections from this machine only."""
    port: int = 8000
    """Port to listen on. 0: a free one, which is printed."""
    api_key_file: Path | None = None
    """File with the key that requests must send. Default: the environment variable
    SELFTAUGHT_API_KEY; without both, no key is needed."""
    max_batch_size: int = 32
    """Maximum number of completions that are decoded at the same time."""
    max_waiting: int = 128
    """Maximum number of completions that wait. Further requests get the status 429."""
    max_tokens: int = 1024
    """Maximum number of new tokens of a chat completion whose request sets none."""
    max_body_megabytes: float = 4.0
    """Maximum size of a request's body."""
    kv_megabytes: int | None = None
    """Memory for the keys and values of completions in progress; further requests wait. Default: half
    of the free memory."""
    cache_megabytes: int = 256
    """Memory for the keys and values of earlier prompts, which later prompts reuse."""


def add_arguments(command: str, parser: ArgumentParser, given: Sequence[str]) -> Sequence[type]:
    """Add the arguments of the command and return the dataclass of its options."""
    del command, given
    return add_options(parser, ServeOptions)


def run(command: str, options: Namespace) -> int:
    """Run the server until it is interrupted, and return the exit code."""
    del command
    values = {name: options[name] for name in vars(options)}
    return serve(ServeOptions(**values))


def serve(how: ServeOptions) -> int:
    """Serve a model until the process is interrupted.

    Raises:
        ValueError: an option, or the combination of options, is invalid; or a package is missing.
    """
    key = checked(how)
    import uvicorn

    from selftaught.reports.chat_page import chat_page
    from selftaught.serving.app import make_app

    with opened_server(how) as server:
        page = chat_page(
            server.settings.name, chat=server.chats, one_turn=server.one_turn, thoughts=how.thoughts,
            tokens=min(256, how.max_tokens), key=key is not None,
        )  # fmt: skip
        most = int(how.max_body_megabytes * 2**20)
        app = make_app(server, max_bytes=most, api_key=key, page=page)
        config = uvicorn.Config(
            app, host=how.host, port=how.port, log_level="warning", timeout_graceful_shutdown=5
        )
        socket = config.bind_socket()
        host, port = socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in str(host) else host
        listening = uvicorn.Server(config)
        startup = listening.startup

        async def announced(*args: Any, **options: Any) -> None:
            await startup(*args, **options)
            say(f"Serving {server.settings.name} at http://{shown}:{port}/v1 (stop with Ctrl-C).")

        listening.startup = announced  # type: ignore[method-assign]
        listening.run(sockets=[socket])
    return DONE


def checked(how: ServeOptions) -> str | None:
    """Check the options, and return the key that requests must send.

    Raises:
        ValueError: an option, or the combination of options, is invalid; or a package is missing.
    """
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise ValueError(f"serve needs {package}: pip install 'selftaught[serve]'.")
    for name, least in (("n", 1), ("num_thoughts", 1), ("max_batch_size", 1), ("max_waiting", 0),
                        ("max_tokens", 1), ("cache_megabytes", 0), ("redraws", 1), ("pauses", 0), ("port", 0)):  # fmt: skip
        value = getattr(how, name)
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
    if how.kv_megabytes is not None and how.kv_megabytes < 1:
        raise ValueError(f"--kv-megabytes must be at least 1; got {how.kv_megabytes}.")
    if how.max_body_megabytes <= 0:
        raise ValueError(f"--max-body-megabytes must be above 0; got {how.max_body_megabytes}.")
    choosing = how.choose is not None or how.verifier is not None
    if choosing and how.n > how.max_batch_size:
        raise ValueError(
            f"--n {how.n} needs --max-batch-size of at least {how.n}; got {how.max_batch_size}."
        )
    if how.verifier is None and (how.score, how.reference) != ("sum", None):
        raise ValueError("--score and --reference require a verifier; give its folder with --verifier.")  # fmt: skip
    if how.task is None and (how.task_options or how.prompt != "bare"):
        raise ValueError("--task-options and --prompt require --task.")
    key = _key(how)
    if key is None and not _is_loopback(how.host):
        tell(f"Warning: --host {how.host} may be reached from other machines, and requests need no key. Set {KEY_VARIABLE}.")  # fmt: skip
    return key


def _key(how: ServeOptions) -> str | None:
    """Return the key that requests must send."""
    if how.api_key_file is None:
        return os.environ.get(KEY_VARIABLE) or None
    key = how.api_key_file.read_text(encoding="utf-8").strip()
    if not key:
        raise ValueError(f"Expected a key in --api-key-file {how.api_key_file}, got an empty file.")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def opened_server(how: ServeOptions) -> "ModelServer":
    """Load the model and, for best-of-n, the verifier."""
    from selftaught.models.embedded import embedded_model
    from selftaught.serving.server import open_server
    from selftaught.tasks import open_task

    name = how.task or ("arithmetic" if how.model == "embedded" else None)
    task = open_task(name, **how.task_options) if name else None
    model = str(embedded_model()) if how.model == "embedded" else how.model
    chooser = _chooser(how, task)
    return open_server(
        model, _settings(how, task), _thinking(how), chooser, _reviewer(how), dtype=how.dtype,
        device=how.device,
    )  # fmt: skip


def _settings(how: ServeOptions, task: "Task | None") -> "ServerSettings":
    from selftaught.methods.pause import PAUSE, paused, refuse_without_pause
    from selftaught.serving.server import ServerSettings
    from selftaught.thought_marks import checked_marks

    style: PromptStyle | None = None if task is None else task.styled(how.prompt)
    if how.pauses:
        refuse_without_pause(how.model)
        style = None if style is None else paused(style, how.pauses)
    return ServerSettings(
        name=how.served_model_name or how.model, thoughts=how.thoughts, max_rows=how.max_batch_size,
        max_waiting=how.max_waiting, max_tokens=how.max_tokens,
        cache_bytes=how.cache_megabytes * 2**20,
        kv_bytes=None if how.kv_megabytes is None else how.kv_megabytes * 2**20, pauses=PAUSE * how.pauses, style=style,
        marks=checked_marks(how.thought_marks), candidates=how.n, log_thoughts=how.log_thoughts,
    )  # fmt: skip


def _thinking(how: ServeOptions) -> "ThoughtParams":
    from selftaught.quiet.gating import ThinkWhen, ThoughtParams

    when = ThinkWhen(how.think_when, how.threshold, how.pattern or None)
    return ThoughtParams(how.num_thoughts, how.thought_temperature, when)


def _reviewer(how: ServeOptions) -> "Reviewer | None":
    from selftaught.safety import open_checks
    from selftaught.serving.review import Reviewer

    if not changed_options(how):
        if how.flagged != "withhold":
            raise ValueError("--flagged redraw needs a check, such as --check-secrets FILE.")
        return None
    return Reviewer(open_checks(how), how.flagged, how.redraws)


def _chooser(how: ServeOptions, task: "Task | None") -> "Chooser | None":
    from selftaught.evaluation.verifier import Verifier
    from selftaught.serving.best_of_n import Chooser

    rule = how.choose or ("verifier" if how.verifier else None)
    if rule is None:
        return None
    if rule == "majority" and how.verifier is not None:
        raise ValueError("--choose majority does not use a verifier. Leave out --verifier, or use --choose weighted.")  # fmt: skip
    verifier = None
    if how.verifier is not None:
        verifier = Verifier(
            how.verifier, score=how.score, reference=how.reference, dtype=how.dtype,
            device=how.device,
        )  # fmt: skip
    return Chooser(rule, verifier, task)

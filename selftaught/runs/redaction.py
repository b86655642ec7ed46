"""Options of a run as flat values for an experiment tracker, without secrets."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit, urlunsplit

REDACTED = "[redacted]"
Value = str | int | float | bool
SECRET_NAME = re.compile(
    r"(?:^|[_\-.])(?:(?:api|access|private|secret)[_\-]?keys?|key|token|secrets?|password|passwd|pwd"
    r"|credentials?|authorization|auth|bearer|headers?|cookies?)$",
    re.IGNORECASE,
)
"""Names of options and environment variables with secret values. `max_tokens` is none of them."""
SECRET_TEXT = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[\w\-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})\b"
)
"""Tokens that are recognized by their form: of Hugging Face, OpenAI and Anthropic, GitHub, AWS."""
URL = re.compile(r"\b[a-z][a-z0-9+.\-]*://[^\s'\"<>]+", re.IGNORECASE)
SHORTEST = 6
"""Number of characters from which the value of an environment variable counts as a secret."""


def hyperparameters(options: Mapping[str, object]) -> dict[str, Value]:
    """Return options as flat values; the names of nested ones are joined by slashes.

    Secrets are replaced by `[redacted]`: values of options whose name says so (`api_key`,
    `hub_token`), values of environment variables whose name says so (`WANDB_API_KEY`), and tokens
    of a known form. Addresses lose user, password and query. Options without a value are left out.
    """
    secrets = sorted(
        (value for name, value in os.environ.items()
         if SECRET_NAME.search(name) and len(value) >= SHORTEST),
        key=len, reverse=True,
    )  # fmt: skip
    return {
        name: _without_secrets(value, secrets) if isinstance(value, str) else value
        for name, value in _flat("", options)
    }


def _flat(prefix: str, value: object) -> Iterator[tuple[str, Value]]:
    name = prefix.rsplit("/", 1)[-1]
    if value is None:
        return
    if SECRET_NAME.search(name) and not isinstance(value, bool):
        yield prefix, REDACTED
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{prefix}/{key}" if prefix else str(key), inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(one, Mapping) for one in value):
            for number, one in enumerate(value):
                yield from _flat(f"{prefix}/{number}", one)
        else:
            yield prefix, ", ".join(map(str, value))
    else:
        yield prefix, value if isinstance(value, str | int | float) else str(value)


def _without_secrets(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    return URL.sub(lambda found: _plain_url(found[0]), SECRET_TEXT.sub(REDACTED, text))


def _plain_url(url: str) -> str:
    """Return an address without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return REDACTED
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

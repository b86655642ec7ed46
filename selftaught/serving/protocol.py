"""Requests of OpenAI's completion and chat interfaces, and the errors of invalid ones."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from selftaught.records import Message

MAX_STOPS = 16
"""Maximum number of stop strings."""
MAX_STOP_LENGTH = 256
"""Maximum number of characters of a stop string."""
MAX_TOP = 20
"""Maximum number of most likely tokens per token."""
UNSUPPORTED = {
    "logit_bias": "logit_bias", "tools": "tools", "functions": "functions", "suffix": "suffix",
    "audio": "audio", "web_search_options": "web search", "prediction": "predicted outputs",
}  # fmt: skip
"""Fields that are refused unless they are empty, with their names in the message."""


class ApiError(Exception):
    """An error with OpenAI's fields.

    Args:
        message: what was expected, what came, and what to do.
        status: HTTP status.
        param: name of the field.
        code: short name of the error.
        kind: OpenAI's `type`.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": kind, "param": param, "code": code},
        }


def check_encoding(text: str) -> None:
    """Check that a text can be encoded in UTF-8.

    Raises:
        ValueError: it contains half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(
            "text that can be encoded in UTF-8, got half of a surrogate pair"
        ) from None


class _Strict(BaseModel):
    """Types are not converted: "5" is not a number."""

    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(_Strict):
    """Options of a streamed response."""

    include_usage: bool = False
    """Send the number of tokens in a last chunk."""
    include_obfuscation: bool | None = None
    """Accepted without effect."""


class _Request(_Strict):
    """Fields that both interfaces share."""

    model: Annotated[str, Field(max_length=1000)]
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    user: str | None = None
    # Refused unless they are empty; see UNSUPPORTED.
    logit_bias: dict[str, float] | None = None
    # Accepted without effect: they do not change what the model writes.
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @field_validator("prompt", "messages", check_fields=False)
    @classmethod
    def _encoded(cls, value: Any) -> Any:
        """Check the texts of the prompt."""
        for one in value if isinstance(value, list) else [value]:
            text = one.message()["content"] if isinstance(one, ChatMessage) else one
            if isinstance(text, str):
                check_encoding(text)
        return value

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        """Check the stop strings."""
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings, got {len(stops)}")
        if any(not one for one in stops):
            raise ValueError("stop strings that are not empty")
        longest = max(map(len, stops), default=0)
        if longest > MAX_STOP_LENGTH:
            raise ValueError(
                f"stop strings of at most {MAX_STOP_LENGTH} characters, got {longest:,}"
            )
        for one in stops:
            check_encoding(one)
        return value

    @model_validator(mode="after")
    def _supported(self) -> "_Request":
        """Refuse what would change the result and is not supported."""
        for name, words in UNSUPPORTED.items():
            if getattr(self, name, None):
                raise ValueError(f"no {name}: {words} is not supported by this server")
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise ValueError(f"{name}=0: penalties are not supported by this server")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options only together with stream=true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Request):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, Field(ge=1, le=1024)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionRequest":
        """Check fields that depend on each other."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of equal to n; choose among candidates with a verifier instead (selftaught serve --verifier)")  # fmt: skip
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens of at least 1, or echo=true")
        if self.echo and self.stream:
            raise ValueError("echo without stream")
        return self


class TextPart(_Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message of a conversation. Other fields, such as `reasoning_content`, are not read."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None

    def message(self) -> Message:
        """Return the message as the chat template gets it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(one.text for one in content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
    """Format of the answer; only text is supported."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: Literal["text"]


class ChatRequest(_Request):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP)] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Refused unless they are empty; see UNSUPPORTED.
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    audio: dict[str, Any] | None = None
    prediction: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    # Accepted without effect.
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        """Check fields that depend on each other."""
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs only together with logprobs=true")
        if not any(one.content for one in self.messages if one.role in ("user", "assistant")):
            raise ValueError("a message of the user with content")
        return self


def _is_type(part: str) -> bool:
    """Return whether a part of pydantic's path is a type, not a field or an index."""
    return part in ("body", "str") or "[" in part


def error_of(errors: list[Any]) -> ApiError:
    """Return the error for the findings of pydantic about a request."""
    first = max(
        errors, key=lambda one: len(one["loc"])
    )  # of a union, the branch that came furthest
    place = [str(part) for part in first["loc"] if not _is_type(str(part))]
    param = ".".join(place)[:100] or None
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= 100 else f"{shown[:100]}..."
    match first["type"]:
        case "json_invalid":
            detail = first.get("ctx", {}).get("error", "")
            return ApiError(f"The body is not valid JSON: {detail}.", code="invalid_json")
        case "missing":
            return ApiError(f"{param or 'The body'} is required.", param=param, code="missing_required_parameter")  # fmt: skip
        case "extra_forbidden":
            return ApiError(f"Unknown field {param}. Remove it.", param=param, code="unknown_parameter")  # fmt: skip
        case "value_error":
            message = f"Expected {first['ctx']['error']}."
            return ApiError(message if param is None else f"{param}: {message}", param=param)
    return ApiError(f"{param or 'The body'}: {first['msg']}; got {shown}.", param=param)

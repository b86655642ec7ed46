"""The web application: OpenAI's routes, streams and errors."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from selftaught.serving.bodies import Bodies, Echo, finish_reason, shown_reasoning, summary
from selftaught.serving.limits import Limits
from selftaught.serving.protocol import ApiError, ChatRequest, CompletionRequest, error_of
from selftaught.serving.requests import Generation, Prompt, Wanted, redrawn, request_seed
from selftaught.serving.server import ModelServer
from selftaught.serving.text import CompletionText, Piece

logger = logging.getLogger(__name__)
MAX_PROMPTS = 64
"""Maximum number of prompts in one request."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": words} for status, words in (
        (400, "Invalid request"), (401, "Wrong key"), (404, "Unknown model"), (408, "Slow body"),
        (413, "Large body"), (429, "Too many requests"), (500, "Decoding failed"),
    )
}  # fmt: skip


class EventStream(Response):
    """A response of server-sent events, which ends when the client closes the connection.

    Args:
        events: the objects to send. It is closed when the client is gone.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], headers: dict[str, str]) -> None:
        super().__init__(headers={"cache-control": "no-cache", **headers})
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the events."""
        headers = [one for one in self.raw_headers if one[0] != b"content-length"]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sending = asyncio.create_task(self._send(send))
        await _unless_gone(sending, receive)
        await self._events.aclose()  # type: ignore[attr-defined]

    async def _send(self, send: Any) -> None:
        try:
            async for event in self._events:
                await send(_event(json.dumps(event)))
        except ApiError as error:
            await send(_event(json.dumps(error.body)))
        await send(_event("[DONE]"))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _event(data: str) -> dict[str, Any]:
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True}


async def _unless_gone(task: "asyncio.Task[Any]", receive: Callable[[], Awaitable[Any]]) -> bool:
    """Wait for a task; cancel it and return False when the client closes the connection first."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(gone())
    await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
    watch.cancel()
    if not task.done():
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        return False
    with suppress(asyncio.CancelledError):
        await watch
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error
    return True


class Routes:
    """Answers requests.

    Args:
        server: the model.
    """

    def __init__(self, server: ModelServer) -> None:
        self._server = server

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Complete prompts."""
        server = self._server
        self._check_model(body.model)
        prompts = await asyncio.to_thread(self._prompts, body)  # a long one takes seconds
        echo = bool(body.echo)
        new = 16 if body.max_tokens is None else body.max_tokens
        for prompt in prompts:
            server.checked(prompt, new)
        wanted = Wanted(
            body.n or 1, new, _or(body.temperature, 1.0), _or(body.top_p, 1.0),
            request_seed(body.seed), body.logprobs,
            prompt_log_probs=echo and (body.logprobs is not None or new == 0),
        )  # fmt: skip
        answer = Answer(server, "completion", prompts, wanted, log_probs=body.logprobs is not None)
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await answer.response(request, stream=bool(body.stream), usage=usage, echo=echo)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        server = self._server
        self._check_model(body.model)
        messages = [one.message() for one in body.messages]
        options = body.chat_template_kwargs or {}
        prompt = await asyncio.to_thread(server.chat_prompt, messages, body.stops, options)
        new = server.checked(prompt, _or(body.max_completion_tokens, body.max_tokens))
        wanted = Wanted(
            body.n or 1, new, _or(body.temperature, 1.0), _or(body.top_p, 1.0),
            request_seed(body.seed), body.top_logprobs or 0 if body.logprobs else None,
        )  # fmt: skip
        answer = Answer(server, "chat", [prompt], wanted, log_probs=bool(body.logprobs))
        usage = body.stream_options is not None and body.stream_options.include_usage
        return await answer.response(request, stream=bool(body.stream), usage=usage)

    def _prompts(self, body: CompletionRequest) -> list[Prompt]:
        """Return the prompts of a request."""
        server, given = self._server, body.prompt
        if isinstance(given, str):
            return [server.text_prompt(given, body.stops)]
        if not given:
            raise ApiError("Expected a prompt, got an empty list.", param="prompt")
        if isinstance(given[0], int):
            return [server.token_prompt(given, body.stops)]  # type: ignore[arg-type]
        if len(given) > MAX_PROMPTS:
            raise ApiError(f"Expected at most {MAX_PROMPTS} prompts, got {len(given)}.", param="prompt")  # fmt: skip
        return [
            server.text_prompt(one, body.stops)
            if isinstance(one, str)
            else server.token_prompt(one, body.stops)  # type: ignore[arg-type]
            for one in given
        ]

    def _check_model(self, name: str) -> None:
        known = self._server.settings.name
        if name != known:
            raise ApiError(
                f"Expected the model {known!r}, got {name[:200]!r}.", 404, param="model",
                code="model_not_found",
            )  # fmt: skip

    def models(self) -> dict[str, Any]:
        """List the model."""
        return {"object": "list", "data": [self.model(self._server.settings.name)]}

    def model(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        self._check_model(name)
        return {"id": name, "object": "model", "created": self._server.created, "owned_by": "selftaught"}  # fmt: skip

    def health(self) -> dict[str, Any]:
        """Return the number of completions in progress and waiting."""
        load = self._server.engine.load
        return {"status": "ok", "rows": load.rows, "waiting": load.waiting}


class Answer:
    """The answer to one request.

    Args:
        server: the model.
        kind: "chat" or "completion".
        prompts: the prompts.
        wanted: how they are completed.
        log_probs: whether the client gets log-probabilities.
    """

    def __init__(
        self,
        server: ModelServer,
        kind: str,
        prompts: list[Prompt],
        wanted: Wanted,
        *,
        log_probs: bool,
    ) -> None:
        self._server, self._log_probs = server, log_probs
        self._id = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}"
        identity = {"id": self._id, "created": int(time.time()), "model": server.settings.name}
        self._bodies = Bodies(kind, identity, server.tokenizer, server.settings.thoughts)
        self._prompts, self._wanted = prompts, wanted

    async def response(
        self, request: Request, *, stream: bool, usage: bool, echo: bool = False
    ) -> Response:
        """Return the response."""
        server = self._server
        choosing = server.chooser is not None and not echo
        wanted = self._for_choice() if choosing else self._wanted
        generation = server.generation(self._prompts, wanted)
        if stream and not choosing and server.reviewer is None:
            return EventStream(self._events(generation, usage), {})
        if not await self._finished(generation, request):
            return Response(status_code=499)
        texts, headers = generation.texts, {}
        if choosing:
            texts, headers = await self._choice(generation)
        if server.reviewer is not None:
            before = list(texts)
            if not await self._review(generation, texts, request):
                return Response(status_code=499)
            if texts != before or any(text.filtered for text in texts):
                headers.pop("x-selftaught-support", None)  # it is that of another completion
        self._log(texts)
        if stream:
            return EventStream(self._whole_events(generation, texts, usage), headers)
        choices = [
            self._bodies.choice(at, text, log_probs=self._log_probs, prompt=self._echo(generation, at) if echo else None)
            for at, text in enumerate(texts)
        ]  # fmt: skip
        return JSONResponse(self._bodies.whole(generation, choices), headers=headers)

    async def _finished(self, generation: Generation, request: Request) -> bool:
        """Wait until a generation has ended; return False if the client is gone."""
        task = asyncio.create_task(generation.finish())
        return await _unless_gone(task, request.receive)

    async def _review(
        self, generation: Generation, texts: list[CompletionText], request: Request
    ) -> bool:
        """Draw flagged completions anew, or withhold what is flagged; return False if the client is
        gone."""
        reviewer = self._server.reviewer
        assert reviewer is not None
        each = len(texts) // len(self._prompts)
        for number, prompt in enumerate(self._prompts):
            own = range(number * each, (number + 1) * each)
            for attempt in range(reviewer.redraws + 1):
                some = [texts[at] for at in own]
                verdicts = await asyncio.to_thread(reviewer.verdicts, some, prompt.text)
                flagged = [at for at, verdict in zip(own, verdicts, strict=True) if verdict]
                if not flagged or attempt == reviewer.redraws:
                    break
                reviewer.counts["drawn anew"] += len(flagged)
                other = number * reviewer.redraws + attempt
                again = redrawn(self._wanted, other, len(flagged))
                new = self._server.generation([prompt], again)
                if not await self._finished(new, request):
                    return False
                generation.also(new)
                for at, text in zip(flagged, new.texts, strict=True):
                    texts[at] = text
            for text, verdict in zip([texts[at] for at in own], verdicts, strict=True):
                reviewer.withhold(text, verdict)
        return True

    def _echo(self, generation: Generation, at: int) -> Echo:
        """Return the prompt of a completion."""
        prompt = at // self._wanted.n
        found = generation.prompt_log_probs[prompt]
        return Echo(self._prompts[prompt].ids, found, self._server.tokenizer)

    def _log(self, texts: Sequence[CompletionText]) -> None:
        self._server.log(self._id, [text.reasoning for text in texts])

    async def _events(self, generation: Generation, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a streamed response."""
        try:
            for index in range(len(generation.texts)):
                yield self._chunk(index, Piece(), first=True)
            async for index, piece in generation.pieces():
                text = generation.texts[index]
                if self._server.settings.thoughts == "summary":
                    piece.reasoning = summary(text) if text.finish_reason else ""
                shown = piece.content or (piece.reasoning and self._server.settings.thoughts != "hidden")  # fmt: skip
                if shown or piece.log_probs:
                    yield self._chunk(index, piece)
                if text.finish_reason:
                    yield self._chunk(index, Piece(), finish=text.finish_reason)
            if usage:
                yield self._bodies.usage_chunk(generation)
            self._log(generation.texts)
        finally:
            generation.cancel()

    def _chunk(self, index: int, piece: Piece, **how: Any) -> dict[str, Any]:
        return self._bodies.chunk(index, piece, log_probs=self._log_probs, **how)

    async def _whole_events(
        self, generation: Generation, texts: Sequence[CompletionText], usage: bool
    ) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of completions that have ended."""
        for index, text in enumerate(texts):
            yield self._chunk(index, Piece(), first=True)
            reasoning = shown_reasoning(self._server.settings.thoughts, text) or ""
            yield self._chunk(index, Piece(reasoning, text.content, text.log_probs, text.hidden))
            yield self._chunk(index, Piece(), finish=finish_reason(text))
        if usage:
            yield self._bodies.usage_chunk(generation)

    def _for_choice(self) -> Wanted:
        """Return how the candidates of a choice are sampled.

        Raises:
            ApiError: the request asks for several completions, or for greedy decoding.
        """
        if self._wanted.n > 1 or len(self._prompts) > 1:
            raise ApiError("This server chooses one of several completions of one prompt; expected n=1 and one prompt.", param="n")  # fmt: skip
        if self._wanted.temperature == 0:
            raise ApiError("This server chooses among several samples; expected a temperature above 0.", param="temperature")  # fmt: skip
        return replace(self._wanted, n=self._server.settings.candidates)

    async def _choice(self, generation: Generation) -> tuple[list[CompletionText], dict[str, str]]:
        """Return the completion that is chosen, and headers with its support."""
        chooser, prompt = self._server.chooser, self._prompts[0]
        assert chooser is not None
        choice = await asyncio.to_thread(
            chooser.choose, prompt.text, generation.completions(), prompt.options
        )
        count = len(generation.texts)
        headers = {"x-selftaught-candidates": str(count)}
        if choice.support is not None:
            headers["x-selftaught-support"] = f"{choice.support}/{count}"
        return [generation.texts[choice.at]], headers


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def make_app(
    server: ModelServer,
    *,
    max_bytes: int = 4 * 2**20,
    body_seconds: float = 60.0,
    api_key: str | None = None,
    page: str = "",
) -> Any:
    """Return the ASGI application for a model.

    Args:
        server: the model.
        max_bytes: maximum size of a request's body.
        body_seconds: maximum time to receive a body.
        api_key: key that requests must send; None: no key.
        page: the HTML page at "/".
    """
    routes = Routes(server)
    app = FastAPI(title="selftaught", docs_url=None, redoc_url=None)
    options: dict[str, Any] = {"responses": ERRORS}
    app.post("/v1/completions", **options)(routes.completions)
    app.post("/v1/chat/completions", **options)(routes.chat)
    app.get("/v1/models")(routes.models)
    app.get("/v1/models/{name:path}", **options)(routes.model)
    app.get("/health")(routes.health)
    if page:
        app.get("/", include_in_schema=False)(lambda: HTMLResponse(page))

    def described() -> dict[str, Any]:
        """Return the OpenAPI description, with the name of the model."""
        if app.openapi_schema is None:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            for one in ("CompletionRequest", "ChatRequest"):
                found["components"]["schemas"][one]["properties"]["model"]["enum"] = [server.settings.name]  # fmt: skip
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign]

    async def api_error(request: Request, error: Exception) -> Response:
        del request
        assert isinstance(error, ApiError)
        headers = {"retry-after": "1"} if error.status == 429 else {}
        # JSON in ASCII: the message may repeat halves of surrogate pairs from the request.
        return Response(json.dumps(error.body), error.status, headers, "application/json")

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await api_error(request, error_of(list(error.errors())))

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = error.detail
        if error.status_code == 400:
            words = "The body could not be read: expected JSON in UTF-8."
        return await api_error(request, ApiError(str(words), error.status_code))

    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("A request failed.", exc_info=error)
        return await api_error(request, ApiError("The server failed; its log has the details.", 500, kind="server_error"))  # fmt: skip

    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected)
    return Limits(app, max_bytes=max_bytes, body_seconds=body_seconds, api_key=api_key)

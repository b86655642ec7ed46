"""Requests to an OpenAI-compatible server, with retries and back-off.

Responses are validated, and the API key is removed from all messages and stored data. This is the
only module that imports `openai`.
"""

import asyncio
import json
import math
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeGuard, TypeVar
from urllib.parse import urlsplit

T = TypeVar("T")

LARGEST = 64 * 2**20
"""Maximum size of a response in bytes."""
AGAIN = {408, 409, 425, 429}
"""HTTP status codes that are retried, in addition to all 5xx codes."""


class Refused(Exception):
    """The server rejected a request; it is not retried.

    Args:
        status: HTTP status code.
        words: The server's error message.
    """

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, words)
        self.status, self.words = status, words


class Wrong(Exception):
    """A failed request or an invalid response; the request is retried.

    Args:
        words: Description of the problem.
        wait: Minimum time to wait before the retry, in seconds.
    """

    def __init__(self, words: str, wait: float = 0.0) -> None:
        super().__init__(words)
        self.words, self.wait = words, wait


class ServerLine:
    """A client for one server that runs on an event loop in its own thread.

    Args:
        url: Base URL of the server.
        concurrency: Maximum number of requests in flight, over all threads. A request that waits
            for its retry counts, so that an overloaded server gets fewer requests.
        timeout: Time limit of one attempt, in seconds.
        retries: Maximum number of retries of a request.

    Raises:
        ValueError: OPENAI_API_KEY contains characters that cannot be part of a key.
        ImportError: The package openai is not installed.
    """

    _first_pause = 0.5
    """Back-off before the first retry, in seconds. It doubles with every retry."""
    _longest_pause = 60.0
    """Maximum back-off, in seconds."""
    _longest_wait = 300.0
    """Maximum time, in seconds, to wait because of a Retry-After header."""
    _soon = 30.0
    """Time limit of a GET request, in seconds."""

    def __init__(self, url: str, concurrency: int, timeout: float, retries: int) -> None:
        self._openai = _library()
        self._url = url
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                "OPENAI_API_KEY contains characters that no key has, such as line breaks or "
                "non-ASCII characters. Set it again."
            )
        self.requests = self.retried = self.prompt_tokens = self.completion_tokens = 0
        self.opened = time.monotonic()
        self._random = random.Random()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), name="openai", daemon=True
        )
        self._thread.start()
        self._ready.result()

    async def _run(self) -> None:
        """Run the client until `close` is called, then cancel the remaining requests."""
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._slots = asyncio.Semaphore(self._concurrency)
        try:
            http = self._openai.DefaultAsyncHttpxClient(event_hooks={"response": [_bounded]})
            client = self._openai.AsyncOpenAI(
                api_key=self._key or "none",
                base_url=self._url,
                max_retries=0,
                timeout=self._timeout,
                http_client=http,
                # With a persistent connection, a second response to one request would be read as
                # the response to the next request.
                default_headers={"Connection": "close"},
            )
        except BaseException as error:
            self._ready.set_exception(error)
            return
        async with client:
            self._client = client
            self._ready.set_result(None)
            await self._end.wait()
            # Cancel only the submitted tasks. The client's own tasks end with it; cancelling them
            # would print warnings.
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, work: Callable[..., Coroutine[Any, Any, T]], *given: Any) -> Future[T]:
        """Start a coroutine on the client's thread.

        Args:
            work: Coroutine function.
            given: Its arguments.

        Raises:
            RuntimeError: The client is closed.
        """
        with self._lock:  # so that submitted work is queued before the event that ends the loop
            if self._closed:
                raise RuntimeError("The sampler is closed. Open a new one.")
            return asyncio.run_coroutine_threadsafe(self._tracked(work, given), self._loop)

    async def _tracked(
        self, work: Callable[..., Coroutine[Any, Any, T]], given: Sequence[Any]
    ) -> T:
        """Run a coroutine and keep its task in the set of running tasks."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work(*given)
        finally:
            self._tasks.discard(task)

    def close(self) -> None:
        """Cancel all requests, with an error for their callers, and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join()

    async def ask(
        self,
        path: str,
        body: dict[str, Any] | None,
        read: Callable[[dict[str, Any]], T],
        key: str | None,
    ) -> T:
        """Send a request, parse the response with `read`, and retry failures with back-off.

        Args:
            path: Path or URL of the request.
            body: JSON body of a POST request. None means a GET request, retried at most twice
                so that a wrong URL is reported soon.
            read: Parses the response; raises `Wrong` if it is invalid.
            key: Name of the prompt, for error messages; None if the request has no prompt.

        Raises:
            Refused: The server rejected the request with a status that is not retried.
            ConnectionError: All attempts failed.
        """
        retries = self._retries if body is not None else min(2, self._retries)
        async with self._slots:
            for tried in range(retries + 1):
                try:
                    self.requests += 1
                    answer = await self._once(path, body)
                    result = read(answer)
                    self._count(answer.get("usage"))
                    return result
                except Wrong as error:
                    wrong = error
                except (KeyError, TypeError) as error:
                    wrong = Wrong(f"unexpected fields in the response ({type(error).__name__})")
                if tried < retries:
                    self.retried += 1
                    await asyncio.sleep(wrong.wait + self._pause(tried))
        about = f"the request of {key!r}" if key is not None else f"/{path}"
        raise ConnectionError(
            f"The server at {self._url} did not answer {about} in {retries + 1} attempts; last "
            f"error: {self.without_key(wrong.words)}. Stored completions are kept. Check the server and "
            "repeat the command to resume."
        )

    async def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Send a request once and return the JSON object of the response."""
        seconds = self._timeout if body is not None else min(self._timeout, self._soon)
        try:
            async with asyncio.timeout(seconds):
                if body is None:
                    raw = await self._client.get(path, cast_to=bytes)
                else:
                    raw = await self._client.post(path, body=body, cast_to=bytes)
        except self._openai.APIStatusError as error:
            status, words = error.status_code, self.without_key(_error_message(error.response.text))
            if status in AGAIN or status >= 500:
                after = _seconds(error.response.headers.get("retry-after"))
                wait = min(after, self._longest_wait)
                raise Wrong(f"{status}: {words}", wait) from None
            raise Refused(status, words) from None
        except (TimeoutError, self._openai.APITimeoutError):
            raise Wrong(f"no response within {seconds:g} seconds") from None
        except Exception as error:  # broken connections and bodies raise many types
            reason = error.__cause__ or error
            raise Wrong(f"{type(reason).__name__}: {reason}") from None
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise Wrong("the response is not JSON") from None
        if not isinstance(answer, dict):
            raise Wrong(f"the response is a JSON {type(answer).__name__} instead of an object")
        return answer

    def _pause(self, tried: int) -> float:
        """Return the back-off before the next attempt in seconds: exponential, with jitter."""
        pause = min(self._first_pause * 2**tried, self._longest_pause)
        return pause * self._random.uniform(0.5, 1.0)

    def _count(self, usage: object) -> None:
        if isinstance(usage, dict):
            prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
            self.prompt_tokens += prompt if is_count(prompt) and 0 <= prompt < 2**40 else 0
            if is_count(completion) and 0 <= completion < 2**40:
                self.completion_tokens += completion

    def check_secret(self, text: str) -> None:
        """Check that a completion, which will be stored, does not contain the API key.

        Raises:
            ValueError: It does.
        """
        if len(self._key) >= 16 and self._key in text:  # shorter keys are words such as EMPTY
            raise ValueError(
                f"The server at {self._url} wrote the API key into a completion. Use another "
                "server."
            )

    def without_key(self, words: str) -> str:
        """Return a server's message as one line of at most 500 characters, without the API key."""
        shown = words.replace(self._key, "[the key]") if self._key else words
        line = " ".join(shown.split())
        return line[:500] if len(line) <= 500 else line[:500] + "..."


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            'The sampler openai needs the package openai: pip install "selftaught[openai]".'
        ) from error
    return openai


async def _bounded(response: Any) -> None:
    """Read a response's body up to the maximum size, before the client reads it."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        parts.append(part)
    response._content = b"".join(parts)  # as response.aread() does


def _error_message(text: str) -> str:
    """Return the message in the body of an error response; the body itself if there is none."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        body = json.loads(text)
        error = body.get("error", body)
        message = error if isinstance(error, str) else error.get("message", error.get("detail"))
        return message if isinstance(message, str) else text
    return text


def _seconds(value: str | None) -> float:
    """Return the seconds to wait given by a Retry-After header: a number of seconds or a date."""
    if value is None:
        return 0.0
    with suppress(ValueError, OverflowError):
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else 0.0
    with suppress(ValueError, TypeError, OverflowError):
        date = parsedate_to_datetime(value)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.now(UTC)).total_seconds())
    return 0.0


def check_url(url: object) -> None:
    """Check a base URL, and that it contains no secret, because configurations are stored.

    Raises:
        ValueError: The URL is invalid or contains a user, password or query. The message does not
            repeat the secret.
    """
    if not isinstance(url, str) or not url:
        raise ValueError(
            "The sampler openai needs the URL of a server, such as --base-url "
            f"http://localhost:8000/v1; got {url!r}."
        )
    try:
        parts = urlsplit(url)
        secret, has_host = "@" in parts.netloc, bool(parts.hostname)
        _ = parts.port
    except ValueError:
        secret, has_host = "@" in url, False
        parts = None
    if secret or (parts and (parts.query or parts.fragment)):
        raise ValueError(
            "A base URL must not contain a user, password or query, because it is stored with a "
            "run's options. Put the key into the environment variable OPENAI_API_KEY."
        )
    if not has_host or parts is None or parts.scheme not in ("http", "https"):
        raise ValueError(f"Expected a base URL such as http://localhost:8000/v1, got {url!r}.")


def is_count(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool)

"""Requests to one server, kept up against its failures.

What the server says is not trusted, and the key is kept out of everything that is told or stored. The
only door to `openai`.
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
"""Bytes of a response; more are refused."""
AGAIN = {408, 409, 425, 429}
"""What is asked again, beside every 5xx."""


class Refused(Exception):
    """A request that it makes no sense to repeat."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(status, words)
        self.status, self.words = status, words


class Wrong(Exception):
    """Something other than an answer, in words; asked again, after `wait` seconds at least."""

    def __init__(self, words: str, wait: float = 0.0) -> None:
        super().__init__(words)
        self.words, self.wait = words, wait


class ServerLine:
    """Requests to one server, on an event loop in a thread of its own.

    Args:
        concurrency: requests in flight, over all threads; one that waits for its next try is among
            them, so that a server in trouble is asked less.
        timeout: seconds for one try.
        retries: how often a request is tried again.

    Raises:
        ValueError: the key in OPENAI_API_KEY has characters that no key has.
        ImportError: the package openai is not there.
    """

    _first_pause = 0.5
    """Seconds, doubled with every retry."""
    _longest_pause = 60.0
    _longest_wait = 300.0
    """Seconds waited at most because the server says so."""
    _soon = 30.0
    """Seconds for a GET."""

    def __init__(self, url: str, concurrency: int, timeout: float, retries: int) -> None:
        self._openai = _library()
        self._url = url
        self._concurrency, self._timeout, self._retries = concurrency, timeout, retries
        self._key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("OPENAI_API_KEY holds characters that no key has; set it anew.")
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
        """Hold the client until the line is closed, then end what is left."""
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
                # Where a connection is kept, a second answer to one request would be taken for the
                # answer to the next.
                default_headers={"Connection": "close"},
            )
        except BaseException as error:
            self._ready.set_exception(error)
            return
        async with client:
            self._client = client
            self._ready.set_result(None)
            await self._end.wait()
            # Only what was submitted: the client's own tasks end with it, and would warn otherwise.
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def submit(self, work: Callable[..., Coroutine[Any, Any, T]], *given: Any) -> Future[T]:
        """Begin work on the line's thread.

        Raises:
            RuntimeError: the line is closed.
        """
        with self._lock:  # what is submitted stands before the end in the loop's queue
            if self._closed:
                raise RuntimeError("The sampler is closed; open another one.")
            return asyncio.run_coroutine_threadsafe(self._noted(work, given), self._loop)

    async def _noted(self, work: Callable[..., Coroutine[Any, Any, T]], given: Sequence[Any]) -> T:
        """Work, known to the line while it lasts."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await work(*given)
        finally:
            self._tasks.discard(task)

    def close(self) -> None:
        """End all work, with an error for those who wait for it, and the thread."""
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
        """What `read` makes of the answer, asked again where that can help.

        Args:
            body: of a POST; None for a GET, which is asked again only twice: a wrong URL is told soon.
            key: names the prompt in errors.

        Raises:
            Refused: by the server, for good.
            ConnectionError: too many tries.
        """
        retries = self._retries if body is not None else min(2, self._retries)
        async with self._slots:
            for tried in range(retries + 1):
                try:
                    self.requests += 1
                    answer = await self._once(path, body)
                    made = read(answer)
                    self._count(answer.get("usage"))
                    return made
                except Wrong as error:
                    wrong = error
                except (KeyError, TypeError) as error:
                    wrong = Wrong(f"not the fields expected ({type(error).__name__})")
                if tried < retries:
                    self.retried += 1
                    await asyncio.sleep(wrong.wait + self._pause(tried))
        about = f"the request of {key!r}" if key is not None else f"/{path}"
        raise ConnectionError(
            f"The server at {self._url} did not answer {about} in {retries + 1} tries; last: "
            f"{self.told(wrong.words)}. What is stored is kept; see to the server and repeat the command."
        )

    async def _once(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The JSON object that the server answers with."""
        seconds = self._timeout if body is not None else min(self._timeout, self._soon)
        try:
            async with asyncio.timeout(seconds):
                if body is None:
                    raw = await self._client.get(path, cast_to=bytes)
                else:
                    raw = await self._client.post(path, body=body, cast_to=bytes)
        except self._openai.APIStatusError as error:
            status, words = error.status_code, self.told(_said(error.response.text))
            if status in AGAIN or status >= 500:
                after = _seconds(error.response.headers.get("retry-after"))
                wait = min(after, self._longest_wait)
                raise Wrong(f"{status}: {words}", wait) from None
            raise Refused(status, words) from None
        except (TimeoutError, self._openai.APITimeoutError):
            raise Wrong(f"no answer within {seconds:g} seconds") from None
        except Exception as error:  # of whatever kind a broken connection or body may be
            reason = error.__cause__ or error
            raise Wrong(f"{type(reason).__name__}: {reason}") from None
        try:
            answer = json.loads(raw)
        except (ValueError, RecursionError):
            raise Wrong("no JSON") from None
        if not isinstance(answer, dict):
            raise Wrong(f"a JSON {type(answer).__name__} instead of an object")
        return answer

    def _pause(self, tried: int) -> float:
        """Seconds until the next try: twice as long each time, and never the same for all."""
        pause = min(self._first_pause * 2**tried, self._longest_pause)
        return pause * self._random.uniform(0.5, 1.0)

    def _count(self, usage: object) -> None:
        if isinstance(usage, dict):
            asked, written = usage.get("prompt_tokens"), usage.get("completion_tokens")
            self.prompt_tokens += asked if is_count(asked) and 0 <= asked < 2**40 else 0
            self.completion_tokens += written if is_count(written) and 0 <= written < 2**40 else 0

    def check_secret(self, text: str) -> None:
        """Refuse a completion with the key in it, which would be stored.

        Raises:
            ValueError: it is there.
        """
        if len(self._key) >= 16 and self._key in text:  # shorter ones are words, such as EMPTY
            raise ValueError(
                f"The server at {self._url} wrote the API key into a completion; use another."
            )

    def told(self, words: str) -> str:
        """What a server said, in one short line, without the key."""
        shown = words.replace(self._key, "[the key]") if self._key else words
        line = " ".join(shown.split())
        return line[:500] if len(line) <= 500 else line[:500] + "..."


def _library() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ImportError(
            'The sampler openai needs the package openai: pip install "selftaught[openai]"'
        ) from error
    return openai


async def _bounded(response: Any) -> None:
    """Read a response's body before anybody else does, up to the size allowed."""
    parts, size = [], 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > LARGEST:
            raise ValueError(f"more than {LARGEST:,} bytes")
        parts.append(part)
    response._content = b"".join(parts)  # what response.aread() sets


def _said(text: str) -> str:
    """The message in the body of an error; the body itself where it has none."""
    with suppress(ValueError, LookupError, TypeError, RecursionError):
        body = json.loads(text)
        error = body.get("error", body)
        said = error if isinstance(error, str) else error.get("message", error.get("detail"))
        return said if isinstance(said, str) else text
    return text


def _seconds(value: str | None) -> float:
    """How long a Retry-After asks to wait: seconds, or until a date."""
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
    """Refuse what is no server's URL, or would put a secret into a stored configuration.

    Raises:
        ValueError: says which, without the secret.
    """
    if not isinstance(url, str) or not url:
        raise ValueError(
            "The sampler openai needs the URL of a server, such as --base-url "
            f"http://localhost:8000/v1; got {url!r}."
        )
    try:
        parts = urlsplit(url)
        secret, whole = "@" in parts.netloc, bool(parts.hostname)
        _ = parts.port
    except ValueError:
        secret, whole = "@" in url, False
        parts = None
    if secret or (parts and (parts.query or parts.fragment)):
        raise ValueError(
            "A base URL has no user, password or query in it, because it is stored with a run's "
            "options; put the key into the environment variable OPENAI_API_KEY."
        )
    if not whole or parts is None or parts.scheme not in ("http", "https"):
        raise ValueError(f"Expected a base URL such as http://localhost:8000/v1, got {url!r}.")


def is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)

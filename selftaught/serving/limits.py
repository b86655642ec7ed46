"""Limits of requests before they are parsed: size and time of the body, and the key."""

import asyncio
import hmac
import json
from collections.abc import Callable, MutableMapping
from typing import Any

from selftaught.serving.protocol import ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
OPEN_PATHS = ("/health", "/", "/favicon.ico")
"""Paths that need no key: they show nothing that was sent or written."""


class Limits:
    """ASGI middleware that refuses requests without the key, and bodies that are too large or too slow.

    Args:
        app: the application.
        max_bytes: maximum size of a body.
        body_seconds: maximum time to receive a body.
        api_key: key that requests must send as `Authorization: Bearer KEY`; None: no key.
    """

    def __init__(
        self, app: Any, *, max_bytes: int, body_seconds: float, api_key: str | None
    ) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, body_seconds
        self._api_key = api_key

    async def __call__(self, scope: Scope, receive: Callable[..., Any], send: Callable[..., Any]) -> None:  # fmt: skip
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await refuse(error, send)
            return
        given = False

        async def received() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, received, send)

    def _check_key(self, scope: Scope) -> None:
        """Raise unless the request has the key."""
        if self._api_key is None or scope["path"] in OPEN_PATHS:
            return
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        right = hmac.compare_digest(key.strip(), self._api_key.encode())
        if scheme.lower() != b"bearer" or not right:
            raise ApiError(
                "Expected the header Authorization: Bearer KEY with the key of this server.", 401,
                code="invalid_api_key", kind="authentication_error",
            )  # fmt: skip

    async def _body(self, scope: Scope, receive: Callable[..., Any]) -> bytes:
        """Return the whole body of a request."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError("The client has closed the connection.", 499)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ApiError(f"The body did not arrive within {self._seconds:g} seconds.", 408) from None  # fmt: skip

    def _too_large(self) -> ApiError:
        return ApiError(
            f"The body is larger than {self._max_bytes:,} bytes. Send a shorter prompt.", 413,
            code="request_too_large",
        )  # fmt: skip


async def refuse(error: ApiError, send: Callable[..., Any]) -> None:
    """Answer with an error, and close the connection."""
    body = json.dumps(error.body).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})

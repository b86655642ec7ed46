"""A server in a thread, for tests."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import uvicorn

from selftaught.quiet.gating import ThoughtParams
from selftaught.serving.app import make_app
from selftaught.serving.best_of_n import Chooser
from selftaught.serving.review import Reviewer
from selftaught.serving.server import ModelServer, ServerSettings, open_server


class Running:
    """A server that listens on a port of this machine."""

    def __init__(self, server: ModelServer, port: int) -> None:
        self.server, self.port = server, port
        self.url = f"http://127.0.0.1:{port}"

    def post(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Return the status and the body of a response."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return fetch(Request(f"{self.url}{path}", data, {"content-type": "application/json", **headers}))  # fmt: skip

    def complete(self, prompt: Any, **options: Any) -> dict[str, Any]:
        """Return the body of a successful completion."""
        status, body = self.post("/v1/completions", {"model": "m", "prompt": prompt, **options})
        assert status == 200, body
        return body

    def chat(self, messages: Any, **options: Any) -> dict[str, Any]:
        """Return the body of a successful chat completion."""
        status, body = self.post("/v1/chat/completions", {"model": "m", "messages": messages, **options})  # fmt: skip
        assert status == 200, body
        return body

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks of a streamed response."""
        data = json.dumps({"model": "m", "stream": True, **body}).encode()
        request = Request(f"{self.url}{path}", data, {"content-type": "application/json"})
        with urlopen(request, timeout=60) as response:
            lines = response.read().decode().split("\n\n")
        found = [line.removeprefix("data: ") for line in lines if line]
        assert found[-1] == "[DONE]"
        return [json.loads(one) for one in found[:-1]]

    def idle(self, seconds: float = 20.0) -> bool:
        """Wait until no completion is in progress or waiting; return whether that came."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = self.server.engine.load
            if not load.rows and not load.waiting:
                return True
            time.sleep(0.01)
        return False


def fetch(request: Request) -> tuple[int, Any]:
    """Return the status and the JSON body of a response."""
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except HTTPError as error:
        return error.code, json.loads(error.read() or b"null")


@contextmanager
def running(
    model: Path | ModelServer,
    *,
    chooser: Chooser | None = None,
    how: ThoughtParams | None = None,
    reviewer: Reviewer | None = None,
    app_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve a model until the end of the `with` block."""
    server = model
    if isinstance(server, Path):
        chosen = ServerSettings(name="m", **settings)
        server = open_server(str(server), chosen, how or ThoughtParams(), chooser, reviewer)
    app = make_app(server, **(app_options or {}))
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2)
    listening = uvicorn.Server(config)
    bound = socket.socket()
    bound.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=listening.run, args=([bound],), daemon=True)
    thread.start()
    while not listening.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield Running(server, bound.getsockname()[1])
    finally:
        listening.should_exit = True
        thread.join()
        server.close()
        bound.close()

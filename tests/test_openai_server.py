"""A model behind a server: a hostile one that is written here, and two real ones.

pytest tests/test_openai_server.py
"""

import hashlib
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from narrowed import token_ids

from selftaught.cli import main
from selftaught.prompts import PromptStyle
from selftaught.records import Completion, Problem, Text, read_rollouts
from selftaught.rollouts import store as rollouts
from selftaught.rollouts.store import collect
from selftaught.samplers import SamplingParams, open_sampler, openai_client
from selftaught.samplers.openai_client import ServerLine, check_url
from selftaught.samplers.openai_server import OpenAISampler

pytest.importorskip("openai")

KEY = "sk-test-0123456789abcdefghij"
DRAWN = SamplingParams(n=4, temperature=1.0, max_tokens=16, seed=7)
BARE = PromptStyle("bare")
SUMS = [Problem(f"p{at}", f"What is {at} + {at}?", str(2 * at)) for at in range(12)]

Body = dict[str, Any]
Fault = Callable[["Talk", Body], None]


# ---------------------------------------------------------------- a server that tries everything


class Talk(http.server.BaseHTTPRequestHandler):
    """One request; what is wrong with its answer the server's `faults` say."""

    protocol_version = "HTTP/1.1"
    server: "Hostile"

    def do_GET(self) -> None:
        self.server.keys.add(self.headers.get("Authorization", ""))
        if self.server.models is None:
            self.say(404, {"error": {"message": "no such page"}})
        else:
            self.say(200, {"object": "list", "data": self.server.models})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        with self.server.lock:
            self.server.asked.append((self.path, body))
            self.server.flying += 1
            self.server.most = max(self.server.most, self.server.flying)
            tried = self.server.tried[raw]
            self.server.tried[raw] += 1
        try:
            fault = self.server.fault(raw, tried)
            if fault is None:
                time.sleep(self.server.seconds)
                self.say(200, self.server.made(body))
            else:
                fault(self, body)
        except OSError:
            pass  # the client has gone
        finally:
            with self.server.lock:
                self.server.flying -= 1

    def say(self, status: int, body: Any, **headers: str) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


class Hostile(http.server.ThreadingHTTPServer):
    """Answers with texts that only prompt and seed decide, after the faults it is given."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *faults: Fault) -> None:
        super().__init__(("127.0.0.1", 0), Talk)
        self.faults = faults
        self.models: list[Any] | None = [{"id": "m", "object": "model", "owned_by": "me"}]
        self.asked: list[tuple[str, Body]] = []
        self.tried: Counter[bytes] = Counter()
        self.keys: set[str] = set()
        self.flying = self.most = 0
        self.seconds = 0.0
        self.lock = threading.Lock()
        self.down_after: int | None = None
        self.made: Callable[[Body], Body] = answer
        """What a request is answered with, after its faults."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def fault(self, raw: bytes, tried: int) -> Fault | None:
        """A request meets three faults, which ones goes by its hash, and is then answered."""
        if self.down_after is not None and len(self.asked) > self.down_after:
            return error(503)
        if not self.faults or tried >= 3:
            return None
        return self.faults[(int(hashlib.sha256(raw).hexdigest(), 16) + tried) % len(self.faults)]

    def handle_error(self, request: object, client_address: object) -> None:
        """A connection that broke is what is wanted."""


def text_of(body: Body) -> str:
    """The text that belongs to a request, an exact copy of its prompt and seed in it."""
    prompt = body.get("prompt", body.get("messages"))
    return f" {json.dumps(prompt)} by {body['seed']}. The answer is {body['seed'] % 3}."


def answer(body: Body) -> Body:
    n = body.get("n", 1)
    said = [text_of(body | {"seed": body["seed"] + at}) for at in range(n)]
    choices: list[Body] = [
        {"index": at, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        if "messages" in body
        else {"index": at, "finish_reason": "stop", "text": text}
        for at, text in enumerate(said)
    ]
    return {"choices": choices, "usage": {"prompt_tokens": 10, "completion_tokens": 5 * n}}


def error(status: int, words: str = "later", **headers: str) -> Fault:
    return lambda talk, body: talk.say(status, {"error": {"message": words}}, **headers)


def raw(text: str) -> Fault:
    return lambda talk, body: talk.say(200, text.encode())


def changed(**fields: Any) -> Fault:
    """A good answer whose choice has other fields."""

    def fault(talk: Talk, body: Body) -> None:
        good = answer(body)
        good["choices"][0] |= fields
        talk.say(200, good)

    return fault


def choices(change: Callable[[list[Body]], Any]) -> Fault:
    return lambda talk, body: talk.say(200, {"choices": change(answer(body)["choices"])})


def dropped(talk: Talk, body: Body) -> None:
    talk.connection.shutdown(socket.SHUT_RDWR)


def half_sent(talk: Talk, body: Body) -> None:
    whole = json.dumps(answer(body)).encode()
    talk.send_response(200)
    talk.send_header("Content-Length", str(len(whole)))
    talk.end_headers()
    talk.wfile.write(whole[: len(whole) // 2])
    talk.wfile.flush()
    talk.connection.shutdown(socket.SHUT_RDWR)


def half_json(talk: Talk, body: Body) -> None:
    whole = json.dumps(answer(body)).encode()
    talk.say(200, whole[: len(whole) // 2])


def twice(talk: Talk, body: Body) -> None:
    """The answer, and at once another that nobody asked for."""
    talk.say(200, answer(body))
    talk.say(200, answer(body | {"seed": 0}))


def dripping(talk: Talk, body: Body) -> None:
    talk.send_response(200)
    talk.send_header("Content-Length", "1000000")
    talk.end_headers()
    with suppress(OSError):
        while True:
            talk.wfile.write(b" ")
            talk.wfile.flush()
            time.sleep(0.02)


def endless(talk: Talk, body: Body) -> None:
    talk.send_response(200)
    talk.send_header("Transfer-Encoding", "chunked")
    talk.end_headers()
    with suppress(OSError):
        while True:
            talk.wfile.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")


def no_gzip(talk: Talk, body: Body) -> None:
    talk.say(200, b"not compressed", Content_Encoding="gzip")


FAULTS: dict[str, Fault] = {
    "dropped": dropped,
    "half sent": half_sent,
    "half JSON": half_json,
    "429 with seconds": error(429, Retry_After="0.01"),
    "429 with a date": error(429, Retry_After=formatdate(0, usegmt=True)),
    "429 with nonsense": error(429, Retry_After="soon"),
    "500": error(500),
    "503 of a proxy": lambda talk, body: talk.say(503, b"<html>bad gateway</html>"),
    "408": error(408),
    "no JSON": raw("<html></html>"),
    "a list": raw("[]"),
    "deep": raw("[" * 100_000),
    "a large number": raw('{"choices": ' + "9" * 10_000 + "}"),
    "no choices": raw("{}"),
    "choices of nothing": raw('{"choices": null}'),
    "choices of numbers": raw('{"choices": [1]}'),
    "empty": choices(lambda good: []),
    "one too many": choices(lambda good: good * 2),
    "another index": changed(index=1),
    "an index that is a list": changed(index=[0]),
    "a number for a text": changed(text=5),
    "no text": changed(text=None),
    "not ended": changed(finish_reason=None),
    "ended by a list": changed(finish_reason=["stop"]),
    "ended by an error": changed(finish_reason="error"),
    "twice": twice,
    "no gzip": no_gzip,
}
SLOW_FAULTS: dict[str, Fault] = {"dripping": dripping, "endless": endless}


@contextmanager
def serving(*faults: Fault) -> Iterator[Hostile]:
    server = Hostile(*faults)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerLine, "_first_pause", 0.001)
    monkeypatch.setattr(ServerLine, "_longest_pause", 0.01)


def opened(server: Hostile, **options: Any) -> OpenAISampler:
    return OpenAISampler("m", base_url=server.url, **options)


def texts(completions: list[list[Completion]]) -> list[list[str]]:
    return [[one.text for one in samples] for samples in completions]


# ---------------------------------------------------------------- nothing lost, nothing mixed up


def test_the_store_is_the_undisturbed_one_whatever_the_server_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_pauses: None
):
    monkeypatch.setattr(rollouts, "STORE_BATCH", 8)
    stores = []
    for name, faults in (("good", ()), ("bad", tuple(FAULTS.values()))):
        with serving(*faults) as server, opened(server) as sampler:
            store = tmp_path / f"{name}.jsonl"
            done = collect(sampler, SUMS, BARE, DRAWN, store=store)
            stores.append(store.read_bytes())
            assert len(done) == 48
            for one in done:  # every text names the prompt that it answers
                assert json.dumps(one.prompt) in one.completion
            assert len({one.completion for one in done}) == 48
            assert sampler.usage.completion_tokens == 5 * 48
            assert (sampler.usage.retries > 2 * 48) == bool(faults)
    assert stores[0] == stores[1]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_asked_again(name: str, short_pauses: None):
    with serving(FAULTS[name]) as server, opened(server) as sampler:
        got = sampler.sample(["a", "b"], DRAWN)
        assert sampler.usage.retries == (0 if name == "twice" else 3 * 8)
    with serving() as server, opened(server) as sampler:
        assert got == sampler.sample(["a", "b"], DRAWN)


@pytest.mark.parametrize("name", SLOW_FAULTS)
def test_an_answer_without_end_is_given_up(
    name: str, short_pauses: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(openai_client, "LARGEST", 2**20)
    with serving(SLOW_FAULTS[name]) as server, opened(server, timeout=0.2, retries=1) as sampler:
        said = {"dripping": "within 0.2 seconds", "endless": "more than 1,048,576 bytes"}[name]
        began = time.monotonic()
        with pytest.raises(ConnectionError, match=said):
            sampler.sample(["a"], SamplingParams())
        assert time.monotonic() - began < 5


def test_a_draw_goes_by_seed_key_and_index_alone():
    with serving() as server, opened(server) as sampler:
        whole = sampler.sample(["a", "b"], DRAWN, keys=["x", "y"])
        later = SamplingParams(n=2, first=2, temperature=1.0, max_tokens=16, seed=7)
        assert [one[2:] for one in whole] == sampler.sample(["a", "b"], later, keys=["x", "y"])
        assert whole[::-1] == sampler.sample(["b", "a"], DRAWN, keys=["y", "x"])
        seeds = [body["seed"] for _, body in server.asked[:8]]
        assert len(set(seeds)) == 8
        assert all(0 <= seed < 2**31 for seed in seeds)
        other = sampler.sample(["a", "b"], SamplingParams(n=4, temperature=1.0, seed=8))
        assert not {t for row in texts(other) for t in row} & {
            t for row in texts(whole) for t in row
        }


def test_a_server_that_stays_away_ends_the_run_and_the_same_command_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_pauses: None
):
    monkeypatch.setattr(rollouts, "STORE_BATCH", 8)
    store = tmp_path / "store.jsonl"
    with serving() as server:
        server.down_after = 30
        with opened(server, retries=2, concurrency=2) as sampler:
            with pytest.raises(
                ConnectionError, match=r"in 3 attempts; last error: 503: later\. Stored"
            ):
                collect(sampler, SUMS, BARE, DRAWN, store=store)
            before = store.read_bytes()
            assert 1 < before.count(b"\n") < 48
        server.down_after = None
        with opened(server) as sampler:
            collect(sampler, SUMS, BARE, DRAWN, store=store)
            after = store.read_bytes()
            collect(sampler, SUMS, BARE, DRAWN, store=tmp_path / "undisturbed.jsonl")
    assert after.startswith(before)
    assert after == (tmp_path / "undisturbed.jsonl").read_bytes()


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_openai_server import BARE, DRAWN, SUMS, rollouts, collect
from selftaught.samplers import open_sampler
rollouts.STORE_BATCH = 8
with open_sampler("openai", "m", base_url={url!r}, concurrency=2) as sampler:
    collect(sampler, SUMS, BARE, DRAWN, store=Path({store!r}))
"""


def test_a_killed_run_is_continued_to_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_pauses: None
):
    monkeypatch.setattr(rollouts, "STORE_BATCH", 8)
    store = tmp_path / "store.jsonl"
    with serving() as server:
        server.seconds = 0.05
        code = KILLED.format(tests=str(Path(__file__).parent), url=server.url, store=str(store))
        process = subprocess.Popen([sys.executable, "-c", code])
        while not store.exists() or store.read_bytes().count(b"\n") < 9:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = store.read_bytes()
        assert before.count(b"\n") < 49
        server.seconds = 0.0
        with opened(server) as sampler:
            collect(sampler, SUMS, BARE, DRAWN, store=store)
            collect(sampler, SUMS, BARE, DRAWN, store=tmp_path / "undisturbed.jsonl")
    assert store.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


# ---------------------------------------------------------------- pauses


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (None, 0), ("3", 3), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("inf", 0), ("soon", 0),
        (formatdate(0, usegmt=True), 0),
    ],
)  # fmt: skip
def test_retry_after_in_seconds(said: str | None, seconds: float):
    assert openai_client._seconds(said) == seconds


def test_retry_after_as_a_date():
    assert 58 < openai_client._seconds(formatdate(time.time() + 60, usegmt=True)) <= 60


def test_a_server_that_says_when_is_asked_then(short_pauses: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ServerLine, "_longest_wait", 0.5)
    with serving(error(429, Retry_After="0.2")) as server, opened(server) as sampler:
        began = time.monotonic()
        sampler.sample(["a"], SamplingParams())
        assert 0.6 <= time.monotonic() - began < 1.5  # three times 0.2
    with serving(error(429, Retry_After="1000000")) as server, opened(server, retries=1) as sampler:
        began = time.monotonic()
        with pytest.raises(ConnectionError, match="429"):
            sampler.sample(["a"], SamplingParams())
        assert 0.5 <= time.monotonic() - began < 1.5  # the most that is waited


def test_pauses_double_up_to_the_longest():
    with serving() as server, opened(server) as sampler:
        pauses = [[sampler._line._pause(tried) for _ in range(50)] for tried in range(12)]
    for tried, drawn in enumerate(pauses):
        most = min(0.5 * 2**tried, 60.0)
        assert most / 2 <= min(drawn) < max(drawn) <= most


# ---------------------------------------------------------------- several samples per request


def test_several_samples_with_one_request():
    with serving() as server, opened(server, n_per_request=3) as sampler:
        got = texts(sampler.sample(["a", "b"], DRAWN))
        bodies = {(body["prompt"], body.get("n", 1)): body for _, body in server.asked}
    assert len(server.asked) == len(bodies) == 4
    for row, prompt in zip(got, ("a", "b"), strict=True):  # samples 0 to 2, and sample 3
        three, one = bodies[prompt, 3], bodies[prompt, 1]
        seeds = [three["seed"] + at for at in range(3)] + [one["seed"]]
        assert row == [text_of(three | {"seed": seed}) for seed in seeds]


@pytest.mark.parametrize(
    "refusing",
    [
        lambda talk, body: talk.say(400, {"error": "Only one completion choice is allowed"}),
        choices(lambda good: good[:1]),
        choices(lambda good: good[::-1][:2]),
    ],
)
def test_where_several_are_refused_they_are_asked_for_one_by_one(refusing: Fault):
    def only_one(talk: Talk, body: Body) -> None:
        (refusing if body.get("n", 1) > 1 else lambda t, b: t.say(200, answer(b)))(talk, body)

    with serving(only_one) as server, opened(server, n_per_request=4, retries=9) as sampler:
        got = sampler.sample(["a", "b"], DRAWN)
    with serving() as server, opened(server) as sampler:
        assert got == sampler.sample(["a", "b"], DRAWN)


# ---------------------------------------------------------------- what is asked


def test_text_goes_to_completions_and_messages_to_chat():
    messages: Text = [{"role": "user", "content": "hi"}]
    params = SamplingParams(
        n=1, temperature=0.5, top_p=0.9, max_tokens=11, stop=("\n", "Q:"), seed=3
    )
    with serving() as server, opened(server) as sampler:
        sampler.sample(["hi", messages], params, keys=["x", "y"])
        by_path = dict(server.asked)
    assert set(by_path) == {"/v1/completions", "/v1/chat/completions"}
    own = {"temperature": 0.5, "top_p": 0.9, "max_tokens": 11, "stop": ["\n", "Q:"], "model": "m"}
    for path, prompt in (
        ("completions", {"prompt": "hi"}),
        ("chat/completions", {"messages": messages}),
    ):
        body = by_path[f"/v1/{path}"]
        assert {name: body[name] for name in body if name != "seed"} == own | prompt


def test_known_servers_receive_parameters_that_disable_their_own_defaults():
    with serving() as server:
        server.models = [{"id": "m", "owned_by": "llamacpp"}]
        with opened(server) as sampler:
            sampler.sample(["hi"], SamplingParams())
    body = server.asked[0][1]
    assert (body["top_k"], body["min_p"], body["repeat_penalty"]) == (0, 0.0, 1.0)


def test_a_text_is_cut_at_the_first_stop_string_here_too():
    with (
        serving(changed(text="ab\nQ: cd", finish_reason="length")) as server,
        opened(server) as sampler,
    ):
        got = sampler.sample(["hi"], SamplingParams(stop=("Q:", "\n")))
        assert got == [[Completion("ab", "stop")]]


def test_a_filtered_text_is_one_cut_before_its_end(caplog: pytest.LogCaptureFixture):
    with serving(changed(text="ab", finish_reason="content_filter")) as server, opened(server) as s:
        assert s.sample(["hi"], SamplingParams()) == [[Completion("ab", "length")]]
    assert "content filter" in caplog.text


def test_hosted_chat_models_get_max_completion_tokens_and_none_of_the_defaults():
    def strict(talk: Talk, body: Body) -> None:
        for name, words in (
            (
                "max_tokens",
                "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
            ),
            ("temperature", "Unsupported parameter: 'temperature'"),
            ("top_p", "`top_p` must be > 0.0 and < 1.0"),
        ):
            if name in body:
                return talk.say(400, {"error": {"message": words}})
        return talk.say(200, answer(body))

    messages: Text = [{"role": "user", "content": "hi"}]
    with serving(strict) as server, opened(server) as sampler:
        sampler.sample([messages], SamplingParams(n=1, temperature=1.0, max_tokens=11))
        assert server.asked[-1][1]["max_completion_tokens"] == 11
        count = len(server.asked)
        sampler.sample([messages], SamplingParams(n=1, temperature=1.0, max_tokens=11, seed=1))
        assert len(server.asked) == count + 1  # it is known now
        with pytest.raises(ValueError, match="Unsupported parameter: 'max_tokens'"):
            sampler.sample(["text"], SamplingParams(n=1))


def test_requests_in_flight_are_bounded_over_all_threads():
    with serving() as server, opened(server, concurrency=3) as sampler:
        server.seconds = 0.02
        threads = [
            threading.Thread(target=sampler.sample, args=([f"{at}"], DRAWN)) for at in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.most == 3


def test_progress_counts_every_completion():
    message_text: list[int] = []
    with serving() as server, opened(server) as sampler:
        sampler.sample(["a", "b"], DRAWN, progress=message_text.append)
    assert sum(message_text) == 8


def test_closing_ends_calls_in_other_threads_and_leaves_no_thread():
    before = set(threading.enumerate())
    ended: list[Exception] = []
    with serving(dripping) as server:
        sampler = opened(server)

        def call() -> None:
            try:
                sampler.sample(["a"] * 50, DRAWN, keys=[str(at) for at in range(50)])
            except RuntimeError as error:
                ended.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        while len(server.asked) < 32:
            time.sleep(0.01)
        sampler.close()
        sampler.close()
        thread.join(5)
        assert "closed" in str(ended[0])
        assert not any(one.name == "openai" for one in threading.enumerate())
        with pytest.raises(RuntimeError, match="closed"):
            sampler.sample(["a"], SamplingParams())
    time.sleep(0.1)
    assert len(set(threading.enumerate()) - before) <= 32  # the server's own, which are daemons
    assert not any(one.name.startswith("asyncio") for one in threading.enumerate())


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("status", "words", "message_text"),
    [
        (401, "who are you", "401: who are you.*Set the environment variable OPENAI_API_KEY"),
        (403, "not you", "403: not you.*OPENAI_API_KEY"),
        (404, "Not Found", "--prompt chat"),
        (400, "This model's maximum context length is 8 tokens", r"of 'x'.*context.*max_tokens=16 do not"),
        (422, "odd", r"of 'x' \(422: odd\)"),
        (400, "Array too long: 'stop' has 5", "5 stop strings were sent; many hosted servers allow 4"),
    ],
)  # fmt: skip
def test_what_is_refused_is_not_asked_again(status: int, words: str, message_text: str):
    params = SamplingParams(max_tokens=16, stop=tuple("12345"))
    with serving(error(status, words)) as server, opened(server) as sampler:
        with pytest.raises(ValueError, match=message_text):
            sampler.sample(["a"], params, keys=["x"])
        assert len(server.asked) == 1


def test_the_model_is_one_of_those_served():
    with serving() as server:
        server.models = [{"id": f"m{at}"} for at in range(25)] + [{"no": "id"}, 5]
        with pytest.raises(ValueError, match=r"'m0', .*'m19' and 5 more\. Give --model"):
            opened(server)
        server.models = [{"id": "m"}, {"id": "n"}]
        opened(server).close()
        server.models = []
        opened(server).close()
        server.models = None  # a server without a list
        opened(server).close()


def test_without_a_server_the_error_names_the_url(short_pauses: None):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"http://127.0.0.1:{port}/v1 did not answer /models"):
        OpenAISampler("m", base_url=f"http://127.0.0.1:{port}/v1")
    assert not any(one.name == "openai" for one in threading.enumerate())


@pytest.mark.parametrize(
    ("url", "message_text"),
    [
        ("", "needs the URL of a server"),
        ("localhost:8000", "Expected a base URL such as"),
        ("ftp://host/v1", "Expected a base URL such as"),
        ("http://", "Expected a base URL such as"),
        ("http://host:99999999/v1", "Expected a base URL such as"),
        ("http://me:hidden@host/v1", "OPENAI_API_KEY"),
        ("http://me:hidden@host:port/v1", "OPENAI_API_KEY"),
        ("http://host/v1?api-key=hidden", "OPENAI_API_KEY"),
        ("http://[host/v1", "Expected a base URL such as"),
    ],
)
def test_a_base_url_is_one_without_secrets(url: str, message_text: str):
    with pytest.raises(ValueError, match=message_text) as raised:
        check_url(url)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message_text"),
    [
        ({"concurrency": 0}, "concurrency must be a whole number of at least 1; got 0"),
        ({"retries": -1}, "retries must be a whole number of at least 0"),
        ({"timeout": 0}, "timeout must be a number of seconds above 0"),
        ({"timeout": "long"}, "timeout must be a number of seconds above 0"),
        ({"price_in": -1}, "price_in must be a number of at least 0"),
        ({"no_such": 1}, "The sampler 'openai' has no option 'no_such'; its options are base_url"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message_text: str):
    with pytest.raises(ValueError, match=message_text):
        open_sampler("openai", "m", **{"base_url": "http://localhost:1/v1"} | options)


def test_what_only_vllm_can_do_is_refused_elsewhere():
    continued: Text = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "I"}]
    with serving() as server, opened(server) as sampler:
        with pytest.raises(ValueError, match="'x' ends with a message of the assistant"):
            sampler.check([continued], SamplingParams(), ["x"])
        with pytest.raises(ValueError, match="only vLLM is known to take"):
            sampler.sample(["a"], SamplingParams(), prefix_tokens=[[1]])
        assert not server.asked


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ImportError, match=r'pip install "selftaught\[openai\]"'):
        OpenAISampler("m", base_url="http://localhost:1/v1")


# ---------------------------------------------------------------- texts and secrets


def test_a_lone_surrogate_from_a_server_is_stored_and_one_in_a_prompt_refused(tmp_path: Path):
    odd = Problem("odd", "What is \ud800?", "1")
    said = raw(r'{"choices": [{"index": 0, "text": "a\ud800b", "finish_reason": "stop"}]}')
    store = tmp_path / "store.jsonl"
    with serving(said) as server, opened(server) as sampler:
        collect(sampler, SUMS[:1], BARE, SamplingParams(), store=store)
        assert read_rollouts(store)[0].completion == "a\ud800b"
        with pytest.raises(ValueError, match="'odd' has a lone surrogate"):
            collect(sampler, [odd], BARE, SamplingParams(), store=tmp_path / "odd.jsonl")


def test_a_completion_with_the_key_in_it_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(changed(text=f"I saw {KEY}.")) as server, opened(server) as sampler:
        with pytest.raises(ValueError, match="wrote the API key into a completion") as raised:
            sampler.sample(["a"], SamplingParams())
        assert KEY not in str(raised.value)
    assert server.keys == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", ["sk-\u00e9\u00e9", "a\nb"])
def test_a_key_that_cannot_be_sent_is_not_printed(key: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="characters that no key has") as raised:
        OpenAISampler("m", base_url="http://localhost:1/v1")
    assert key not in str(raised.value)


def test_the_key_is_nowhere_after_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture, short_pauses: None,
):  # fmt: skip
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    store = tmp_path / "run" / "r.jsonl"
    given = ["sample", "--sampler", "openai", "--model", "m", "--limit", "3", "--out", str(store)]
    with serving(error(500, f"bad {KEY}"), changed(text=1, note=KEY)) as server:
        url = ["--base-url", server.url]
        bad, server.faults = server.faults, server.faults[:1]
        assert main([*given, *url, "--sampler_options.retries", "0"]) == 2
        server.faults = bad
        assert main([*given, *url]) == 0
        assert main([*given, *url, "--out", str(tmp_path / "run" / "s.jsonl")]) == 0
        server.faults = (error(401, f"Incorrect API key provided: {KEY}"),)
        assert main([*given, *url, "--seed=1", "--out", str(tmp_path / "run" / "t.jsonl")]) == 2
        secret = server.url.replace("//", "//me:hidden-word@")
        assert main([*given, f"--base-url={secret}"]) == 2
    out = capfd.readouterr()
    message_text = out.out + out.err + caplog.text
    assert "bad [the key]" in message_text
    assert "Incorrect API key provided: [the key]" in message_text
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 6
    for path in files:
        assert KEY.encode() not in path.read_bytes()
        assert b"hidden-word" not in path.read_bytes()
    assert KEY not in message_text
    assert "hidden-word" not in message_text
    assert server.keys == {f"Bearer {KEY}"}


# ---------------------------------------------------------------- on the command line


def test_what_the_requests_came_to_is_printed_and_summed_over_continuations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], short_pauses: None
):
    store = tmp_path / "r.jsonl"
    given = ["evaluate", "--sampler=openai", "--model=m", "--limit=6", "--out", str(store),
             "--n=4", "--temperature=1", "--sampler_options.price_in=2", "--sampler_options.price_out=10"]  # fmt: skip
    with serving(error(500)) as server:
        assert main([*given, f"--base-url={server.url}", "--sampler_options.retries=1"]) == 2
        failed = json.loads((tmp_path / "r.usage.json").read_text())
        assert failed["completion_tokens"] == 0
    capsys.readouterr()
    with serving(error(500)) as server:
        assert main([*given, f"--base-url={server.url}"]) == 0
    message_text = capsys.readouterr().out
    # 24 completions, each after three retries, beside the list of models; 10 and 5 tokens each
    assert (
        "Server: 97 requests (72 retries), 240 prompt tokens, 120 completion tokens" in message_text
    )
    assert "cost 0.0017" in message_text  # (240 * 2 + 120 * 10) / 1e6 = 0.00168
    summed = json.loads((tmp_path / "r.usage.json").read_text())
    assert summed["requests"] == 97 + failed["requests"]
    assert summed["cost"] == pytest.approx(0.00168)
    assert "sampler: openai" in (tmp_path / "r.config.yaml").read_text()


def test_a_damaged_file_of_usage_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "r.usage.json").write_text('{"requests": "many"}')
    given = [
        "sample",
        "--sampler=openai",
        "--model=m",
        "--limit=1",
        "--out",
        str(tmp_path / "r.jsonl"),
    ]
    with serving() as server:
        assert main([*given, f"--base-url={server.url}"]) == 2
        assert not any(path == "/v1/completions" for path, _ in server.asked)
    assert (
        "r.usage.json: expected an object with the numbers requests, retries"
        in capsys.readouterr().err
    )


# ---------------------------------------------------------------- two real servers

PROMPTS: list[Text] = [
    "Q: What is 12 + 7?\nA:",
    "Q: Tom has 3 apples",
    "hello there",
    "x",
    " 19",
    "Q: Q:",
]
CHAT: Text = [{"role": "user", "content": "What is 12 + 7?"}]
BEGUN_CHAT: Text = [*CHAT, {"role": "assistant", "content": "It is"}]
TEMPLATE = (
    "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def served_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with heads that are wide enough for vLLM, a chat template, and defaults of its
    own that would spoil every draw."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("served_model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    config.update(
        {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    end = tokenizer.eos_token_id
    GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=1.5, eos_token_id=end, pad_token_id=end
    ).save_pretrained(folder)
    return folder


@contextmanager
def running(log: Path, port: int, *command: str, **environment: str) -> Iterator[str]:
    """A server in processes of its own; its base URL."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip
    try:
        for _ in range(1200):
            assert process.poll() is None, log.read_text()[-3000:]
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def vllm_url(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm")
    port = free_port()
    with running(
        tmp_path_factory.mktemp("vllm") / "log.txt", port,
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(served_model),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager",
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_API_KEY=KEY,
    ) as url:  # fmt: skip
        yield url


@pytest.fixture
def vllm_sampler(vllm_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenAISampler]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAISampler("tiny", base_url=vllm_url, retries=2) as sampler:
        yield sampler


@pytest.fixture(scope="module")
def here(served_model: Path) -> Iterator[Any]:
    with open_sampler("transformers", str(served_model), dtype="float32") as sampler:
        yield sampler


def without_half(completions: list[list[Completion]]) -> list[list[Completion]]:
    """Without a last character that is not whole, which vLLM leaves out of the text."""
    return [
        [Completion(one.text.rstrip("\ufffd"), one.finish_reason, one.token_ids) for one in samples]
        for samples in completions
    ]


# ------------------------------------ llama.cpp's, where scripts/install_llama_server.sh has built it


@pytest.fixture(scope="module")
def llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[OpenAISampler, Any]]:
    """A model behind llama.cpp's server, and the same in this process."""
    built, model = os.environ.get("LLAMA_CPP"), os.environ.get("LLAMA_MODEL")
    if not built or not model:
        pytest.skip("LLAMA_CPP and LLAMA_MODEL are not set; see scripts/install_llama_server.sh")
    folder, source = tmp_path_factory.mktemp("llama_cpp"), Path(built) / "llama.cpp"
    converted, port = folder / "model.gguf", free_port()
    subprocess.run(
        [sys.executable, str(source / "convert_hf_to_gguf.py"), model, "--outfile", str(converted),
         "--outtype", "f32"],
        check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(source / "gguf-py")},
    )  # fmt: skip
    with (
        running(
            folder / "log.txt", port, str(Path(built) / "build" / "bin" / "llama-server"),
            "--model", str(converted), "--alias", "served", "--host", "127.0.0.1", "--port", str(port),
            "--parallel", "4", "--ctx-size", "8192", "--threads", "2", "--api-key", KEY,
        ) as url,
        pytest.MonkeyPatch.context() as patch,
    ):  # fmt: skip
        patch.setenv("OPENAI_API_KEY", KEY)
        with (
            OpenAISampler("served", base_url=url, retries=2, concurrency=4) as there,
            open_sampler("transformers", model, dtype="float32") as here,
        ):
            yield there, here


@pytest.mark.slow
@pytest.mark.parametrize("stop", [(), ("\n", ".")])
def test_llama_cpp_greedy_texts_are_those_of_transformers(llama_cpp: Any, stop: tuple[str, ...]):
    there, here = llama_cpp
    asked = [
        *(f"Q: How much is {a} apples and {a + 3} more?\nA:" for a in range(2, 12)),
        CHAT,
        [{"role": "user", "content": "Name three colours."}],
    ]
    params = SamplingParams(max_tokens=32, stop=stop)
    got = [(one[0].text, one[0].finish_reason) for one in there.sample(asked, params)]
    want = [(one[0].text, one[0].finish_reason) for one in here.sample(asked, params)]
    assert sum(a == b for a, b in zip(got, want, strict=True)) >= 11  # one may round otherwise
    (short,), (same,) = (one.sample(["1 2 3"], SamplingParams(max_tokens=1)) for one in llama_cpp)
    assert (short[0].text, short[0].finish_reason) == (same[0].text, same[0].finish_reason)


@pytest.mark.slow
def test_llama_cpp_draws_from_the_plain_distribution(llama_cpp: Any):
    """Its own defaults (top-k 40, min-p 0.05) would leave the tail out."""
    import torch

    there, here = llama_cpp
    ids = torch.tensor([here._tokenizer("The").input_ids])
    with torch.inference_mode():
        likely, tokens = torch.softmax(here._model(ids).logits[0, -1].float(), -1).topk(40)
    n = 600
    drawn = there.sample(["The"], SamplingParams(n=n, temperature=1.0, max_tokens=1))[0]
    counts = Counter(one.text for one in drawn)
    for p, token in zip(likely.tolist()[:5], tokens.tolist()[:5], strict=True):
        assert abs(counts[here._tokenizer.decode([token])] - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5
    head = {here._tokenizer.decode([token]) for token in tokens.tolist()}
    share, below = 1 - float(likely.sum()), sum(one.text not in head for one in drawn)
    assert share > 0.1  # so that there is a tail to be left out
    assert abs(below - n * share) < 4.5 * (n * share * (1 - share)) ** 0.5


@pytest.mark.slow
def test_llama_cpp_refusals_are_explained(llama_cpp: Any):
    there, _ = llama_cpp
    with pytest.raises(
        ValueError, match=r"of 'long' \(400.* do not fit into the context of served"
    ):
        there.sample(["x " * 5000], SamplingParams(), keys=["long"])
    with pytest.raises(ValueError, match="only vLLM is known to take"):
        there.sample(["x"], SamplingParams(), prefix_tokens=[[1, 2]])


# ---------------------------------------------------------------- vLLM's


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("max_tokens", [1, 8, 40])
def test_vllm_greedy_completions_are_those_of_transformers(
    max_tokens: int, vllm_sampler: OpenAISampler, here: Any
):
    prompts = [*PROMPTS, CHAT, BEGUN_CHAT]
    plain = SamplingParams(max_tokens=max_tokens)
    want = here.sample(prompts, plain)
    assert without_half(vllm_sampler.sample(prompts, plain)) == without_half(want)
    whole = [char for samples in want[:3] for char in samples[0].text if char != "\ufffd"]
    for stop in (whole[len(whole) // 3], whole[-1], "he"):
        stops = SamplingParams(max_tokens=max_tokens, stop=(stop, "zz"))
        got = vllm_sampler.sample(prompts, stops)
        assert without_half(got) == without_half(here.sample(prompts, stops))


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("prompt", ["Q: Tom has 3 apples", "hello there", CHAT, BEGUN_CHAT])
def test_vllm_continues_a_prefix_of_every_length(
    prompt: Text, vllm_sampler: OpenAISampler, here: Any
):
    params = SamplingParams(max_tokens=24)
    ((whole,),) = here.sample([prompt], params)
    for at in (1, 2, 7, 12, 23):
        head, text = here.sample([prompt], SamplingParams(max_tokens=at))[0][0].text, whole.text
        straddling = text[max(0, len(head) - 1) :][:2]
        for stop in ((), ("he", "\n"), () if "\ufffd" in straddling else (straddling,)):
            params = SamplingParams(max_tokens=24, stop=stop)
            prefix_tokens = [whole.token_ids[:at]]
            got = vllm_sampler.sample([prompt], params, prefix_tokens=prefix_tokens)
            assert got == here.sample([prompt], params, prefix_tokens=prefix_tokens), (at, stop)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_leaves_what_has_ended_as_it_is(vllm_sampler: OpenAISampler, here: Any):
    end = here._tokenizer.eos_token_id
    prefix_tokens = [[*here._tokenizer("A: 3 + 40 = 43.").input_ids, end]]
    params = SamplingParams(max_tokens=24)
    got = vllm_sampler.sample(["x"], params, prefix_tokens=prefix_tokens)
    assert got == [[Completion("A: 3 + 40 = 43.", "stop", tuple(prefix_tokens[0]))]]
    assert got == here.sample(["x"], params, prefix_tokens=prefix_tokens)
    with pytest.raises(ValueError, match=r"of 'x' \(400"):
        vllm_sampler.sample(["x"], params, prefix_tokens=[[10**6]], keys=["x"])


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_draws_from_the_plain_distribution_by_seed_key_and_index(
    vllm_sampler: OpenAISampler, here: Any
):
    params = SamplingParams(n=4, temperature=1.0, max_tokens=16)
    whole = vllm_sampler.sample(PROMPTS, params)
    assert vllm_sampler.sample(PROMPTS[::-1], params)[::-1] == whole
    later = SamplingParams(n=2, first=2, temperature=1.0, max_tokens=16)
    assert vllm_sampler.sample(PROMPTS[:2], later) == [one[2:] for one in whole[:2]]
    assert all(len({one.token_ids for one in samples}) == 4 for samples in whole)

    import torch

    ids = torch.tensor([here._tokenizer("hello").input_ids])
    with torch.inference_mode():
        likely, tokens = torch.softmax(here._model(ids).logits[0, -1], -1).topk(5)
    n = 600
    drawn = vllm_sampler.sample(["hello"], SamplingParams(n=n, temperature=1.0, max_tokens=1))[0]
    counts = Counter(token_ids(one)[0] for one in drawn)
    for p, token in zip(likely.tolist(), tokens.tolist(), strict=True):
        assert abs(counts[token] - n * p) < 4.5 * (n * p * (1 - p)) ** 0.5


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_several_samples_with_one_request(vllm_url: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with OpenAISampler("tiny", base_url=vllm_url, n_per_request=4) as sampler:
        got = sampler.sample(PROMPTS, SamplingParams(n=8, temperature=1.0, max_tokens=16))
        assert sampler.usage.requests == 1 + 2 * len(PROMPTS)
    assert all(len({one.token_ids for one in samples}) == 8 for samples in got)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_refuses_in_words(
    vllm_url: str, vllm_sampler: OpenAISampler, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(ValueError, match=r"of 'long' .*do not fit into the context of tiny"):
        vllm_sampler.sample(["word " * 400], SamplingParams(max_tokens=300), keys=["long"])
    with pytest.raises(ValueError, match="does not have the model 'large'; it serves 'tiny'"):
        OpenAISampler("large", base_url=vllm_url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-another-key-0123456789")
    with pytest.raises(ValueError, match=r"401.*OPENAI_API_KEY") as raised:
        OpenAISampler("tiny", base_url=vllm_url)
    assert "another-key" not in str(raised.value)


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_on_the_command_line(vllm_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = tmp_path / "test.jsonl"
    assert main(["evaluate", "--sampler", "openai", "--base-url", vllm_url, "--model", "tiny",
                 "--limit", "8", "--n", "4", "--temperature", "1", "--prompt", "chat", "--max-tokens",
                 "8", "--out", str(out)]) == 0  # fmt: skip
    assert len(read_rollouts(out)) == 32
    assert json.loads((tmp_path / "test.usage.json").read_text())["completion_tokens"] > 32


@pytest.mark.slow
def test_transformers_serve_gives_the_completions_of_transformers(
    served_model: Path, here: Any, tmp_path: Path
):
    pytest.importorskip("fastapi")
    shutil.copytree(served_model, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()  # this server keeps its penalty
    snapshot = tmp_path / "hub" / "models--tests--tiny" / "snapshots" / "0"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tmp_path / "model")
    refs = tmp_path / "hub" / "models--tests--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0")
    port = free_port()
    with running(
        tmp_path / "log.txt", port, str(Path(sys.executable).with_name("transformers")), "serve",
        "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--device", "cpu",
        HF_HUB_CACHE=str(tmp_path / "hub"),
    ) as url, OpenAISampler("tests/tiny", base_url=url, retries=2) as sampler:  # fmt: skip
        for params in (
            SamplingParams(max_tokens=24),
            SamplingParams(max_tokens=24, stop=("he", "\n")),
        ):
            want = here.sample([*PROMPTS, CHAT], params)
            got = sampler.sample([*PROMPTS, CHAT], params)
            for mine, theirs in zip(got, want, strict=True):
                assert (mine[0].text, mine[0].finish_reason) == (
                    theirs[0].text,
                    theirs[0].finish_reason,
                )
                assert mine[0].token_ids is None
        with pytest.raises(ValueError, match="it serves 'tests/tiny"):
            OpenAISampler("another", base_url=url)


# ---------------------------------------------------------------- models that reason


def reasoned(message: Body, finish: str = "stop", **usage: Any) -> Callable[[Body], Body]:
    """Answers with a message, whatever is asked."""
    counted = {"prompt_tokens": 1, "completion_tokens": 20, **usage}
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant"} | message}
    return lambda body: {"choices": [choice], "usage": counted}


def asked_once(server: Hostile, prompt: Text, **options: Any) -> Completion:
    with open_sampler("openai", "m", base_url=server.url, retries=0) as sampler:
        return sampler.sample([prompt], SamplingParams(**options))[0][0]


@contextmanager
def answering(made: Callable[[Body], Body]) -> Iterator[Hostile]:
    with serving() as server:
        server.made = made
        yield server


TALK: Text = [{"role": "user", "content": "3+4"}]
COUNTED: dict[str, Any] = {"completion_tokens_details": {"reasoning_tokens": 12}}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_in_a_field_of_its_own_is_kept_between_marks(name: str):
    with answering(reasoned({name: "3+4 is 7.", "content": "#7"}, **COUNTED)) as server:
        one = asked_once(server, TALK)
        assert one == Completion("<think>3+4 is 7.</think>#7", "stop")
        marked = asked_once(server, TALK, thought_marks=("[T]", "[/T]"))
        assert marked.text == "[T]3+4 is 7.[/T]#7"


@pytest.mark.parametrize(
    ("message", "finish", "text"),
    [
        ({"reasoning": None, "reasoning_content": "", "content": "#7"}, "stop", "#7"),
        ({"reasoning": "3+", "content": None}, "length", "<think>3+"),
        ({"reasoning": "3+4", "content": None}, "stop", "<think>3+4</think>"),
        ({"reasoning": "3+4", "content": "#"}, "length", "<think>3+4</think>#"),
        ({"reasoning": "3+4", "content": "<think>3+4</think>#7"}, "stop", "<think>3+4</think>#7"),
        ({"reasoning": {"odd": 1}, "content": "#7"}, "stop", "#7"),
    ],
)
def test_what_such_fields_may_hold(message: Body, finish: str, text: str):
    with answering(reasoned(message, finish)) as server:
        one = asked_once(server, TALK)
    assert (one.text, one.finish_reason) == (text, finish)


def test_a_server_that_hides_the_reasoning_is_refused_by_name():
    with answering(reasoned({"content": "#7"}, **COUNTED)) as server:
        with pytest.raises(
            ValueError, match=r"counts 12 reasoning tokens of m.*enable_thinking false"
        ):
            asked_once(server, TALK)
        server.made = reasoned({"content": "<think>so</think>#7"}, **COUNTED)  # shown in the text
        assert asked_once(server, TALK).text == "<think>so</think>#7"
        server.made = reasoned({"content": "#7"}, completion_tokens_details={"reasoning_tokens": 0})
        assert asked_once(server, TALK).text == "#7"
        server.made = reasoned({"content": "#7"}, completion_tokens_details="none")
        assert asked_once(server, TALK).text == "#7"


def test_template_variables_are_sent_with_messages_and_only_then():
    with answering(answer) as server:
        asked_once(server, TALK, chat_template_kwargs={"enable_thinking": False})
        asked_once(server, TALK)
        asked_once(server, "3+4=")
    sent = [body.get("chat_template_kwargs") for _, body in server.asked]
    assert sent == [{"enable_thinking": False}, None, None]


def thinking(whole: str) -> Callable[[Body], Body]:
    """A server that ends its text at the first stop string it is sent, thought or not."""

    def made(body: Body) -> Body:
        places = [whole.find(one) for one in body.get("stop", []) if one in whole]
        text = whole[: min(places, default=len(whole))]
        return {"choices": [{"index": 0, "finish_reason": "stop", "text": text}]}

    return made


@pytest.mark.parametrize(
    ("whole", "text", "requests"),
    [
        ("<think>a\n\nb</think>\n\n7\n\nQ: 8", "<think>a\n\nb</think>\n\n7", 2),
        ("<think>a</think>\n\n7\n\nQ: 8", "<think>a</think>\n\n7", 2),
        (" 7\n\n<think>a", " 7", 1),
        (" 7", " 7", 1),
        ("<think>a\n\nb", "<think>a\n\nb", 2),
    ],
)
def test_a_text_that_was_stopped_in_a_thought_is_asked_for_again(whole, text, requests):
    with answering(thinking(whole)) as server:
        one = asked_once(server, "Q: 7\nA:", stop=("\n\n",))
    assert one.text == text
    stops = [body.get("stop") for _, body in server.asked]
    assert stops == [["\n\n"], None][:requests]


def test_after_a_prompt_that_opens_a_thought_stop_strings_are_not_sent():
    with answering(thinking("a\n\nb</think>7\n\nQ: 8")) as server:
        one = asked_once(server, "Q: 7\nA: <think>", stop=("\n\n",))
    assert one == Completion("a\n\nb</think>7", "stop", None, True)
    assert [body.get("stop") for _, body in server.asked] == [None]

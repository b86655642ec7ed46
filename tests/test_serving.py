"""The server beside plain forward passes, and what clients may send."""

import json
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import openai
import pytest
import torch
from serving import Running, fetch, running
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.samplers.base import SamplingParams
from selftaught.samplers.local.prefix_loop import CHUNK
from selftaught.samplers.local.sampler import TransformersSampler
from selftaught.serving.jobs import Job

SHOTS = "".join(f"Q: {a} + {b}?\nA: {a + b}.\n" for a, b in zip(range(20, 40), range(50, 70), strict=True))  # fmt: skip
MESSAGES = [{"role": "user", "content": "How many apples?"}]


@pytest.fixture(scope="module")
def served(wide_model_dir: Path) -> Iterator[Running]:
    with running(wide_model_dir, max_rows=8, max_waiting=64) as one:
        yield one


@pytest.fixture(scope="module")
def reference(wide_model_dir: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(wide_model_dir).eval()
    return model, AutoTokenizer.from_pretrained(wide_model_dir)


@torch.no_grad()
def greedy(reference: tuple[Any, Any], prompt: str, new: int) -> list[int]:
    """Greedy tokens from whole forward passes."""
    model, tokenizer = reference
    ids = tokenizer(prompt).input_ids
    own: list[int] = []
    while len(own) < new and (not own or own[-1] != tokenizer.eos_token_id):
        own.append(int(model(torch.tensor([ids + own])).logits[0, -1].argmax()))
    return own


def text_of(reference: tuple[Any, Any], ids: list[int]) -> str:
    tokenizer = reference[1]
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_many_requests_at_once_get_what_each_gets_alone(
    served: Running, reference: tuple[Any, Any]
):
    questions = [f"Q: {n} + {n * 7 % 31}?\nA:" for n in range(24)]
    prompts = [SHOTS + one if at % 3 else one for at, one in enumerate(questions)]
    expected = [text_of(reference, greedy(reference, one, 9)) for one in prompts]
    with ThreadPoolExecutor(12) as pool:
        bodies = list(
            pool.map(lambda one: served.complete(one, max_tokens=9, temperature=0), prompts)
        )
    assert [one["choices"][0]["text"] for one in bodies] == expected
    assert served.idle()


def test_prompts_with_the_same_beginning_are_decoded_together(wide_model_dir: Path):
    with running(wide_model_dir, max_rows=8) as one:
        # begins as none of the others, whose order is not known: "1 + " would be a longer beginning
        one.complete(f"{SHOTS}Q: 9 + 1?", max_tokens=2)
        with ThreadPoolExecutor(4) as pool:
            # digits that are a token without the space before them, unlike 1 and 3
            prompts = [f"{SHOTS}Q: {n} + 3?" for n in (2, 5, 6, 8)]
            list(pool.map(lambda text: one.complete(text, max_tokens=3), prompts))
        lanes = one.server.engine._decoder._lanes  # type: ignore[attr-defined]
        tokenizer = one.server.tokenizer
        shared = len(tokenizer(f"{SHOTS}Q: ").input_ids)
        assert len(lanes) == 2
        assert 0.8 * shared <= len(lanes[1].prefix.tokens) <= shared


def test_a_seed_gives_the_same_samples_beside_other_requests(served: Running):
    wanted = {"max_tokens": 12, "seed": 5, "n": 3, "temperature": 1.2, "top_p": 0.9}
    alone = served.complete("Q: 3?", **wanted)["choices"]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(served.complete, f"Q: {n}", max_tokens=20) for n in range(10)]
        again = served.complete("Q: 3?", **wanted)["choices"]
        [one.result() for one in others]
    assert again == alone
    assert len({one["text"] for one in alone}) > 1
    other = served.complete("Q: 3?", **(wanted | {"seed": 6}))["choices"]
    assert [one["text"] for one in other] != [one["text"] for one in alone]


def test_samples_follow_the_model_s_probabilities(served: Running, reference: tuple[Any, Any]):
    model, tokenizer = reference
    ids = torch.tensor([tokenizer("Q: 3 +").input_ids])
    with torch.no_grad():
        probability = (model(ids).logits[0, -1] / 2.0).softmax(-1)
    drawn = torch.zeros_like(probability)
    for seed in range(100):
        body = served.complete("Q: 3 +", max_tokens=1, n=8, seed=seed, temperature=2.0, logprobs=0)
        for choice in body["choices"]:
            for token in choice["logprobs"]["tokens"]:
                drawn[tokenizer.convert_tokens_to_ids(tokenizer.tokenize(token))[0]] += 1
    likely = probability.topk(3).indices
    for token in likely.tolist():  # 5 standard deviations of a share of 800 draws
        share, expected = float(drawn[token]) / 800, float(probability[token])
        assert abs(share - expected) < 5 * (expected * (1 - expected) / 800) ** 0.5


def test_log_probabilities_are_those_of_a_forward_pass(served: Running, reference: tuple[Any, Any]):
    model, tokenizer = reference
    prompt = "Tom has 3 apples"
    body = served.complete(prompt, max_tokens=5, temperature=0, logprobs=2, echo=True)
    found = body["choices"][0]["logprobs"]
    ids = tokenizer(prompt).input_ids + greedy(reference, prompt, 5)
    with torch.no_grad():
        log_prob = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(log_prob[at - 1, token]) for at, token in enumerate(ids) if at]
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    count = len(tokenizer(prompt).input_ids)  # new tokens may be parts of a character
    assert "".join(found["tokens"][:count]) == prompt
    for at, token in list(zip(found["text_offset"], found["tokens"], strict=True))[:count]:
        assert prompt[at:].startswith(token)
    assert found["text_offset"][count] == len(prompt)
    top = log_prob[len(ids) - 6].topk(2).values.tolist()
    assert sorted(found["top_logprobs"][-5].values(), reverse=True) == pytest.approx(top, abs=1e-4)
    whole = served.complete(prompt, max_tokens=0, logprobs=1, echo=True)["choices"][0]
    assert whole["text"] == prompt
    length = len(tokenizer(prompt).input_ids)
    assert whole["logprobs"]["token_logprobs"][1:] == pytest.approx(
        expected[: length - 1], abs=1e-4
    )


@pytest.mark.parametrize("stop", [[], ["A"], ["\n", "+ 4"], ["e ha"]])
def test_a_stream_is_the_text_of_a_response(served: Running, stop: list[str]):
    for seed in range(8):
        wanted = {"prompt": "Q: 3 + 4?\nA", "max_tokens": 24, "seed": seed, "n": 2, "stop": stop, "temperature": 1.5}  # fmt: skip
        whole = served.complete(**wanted)
        chunks = served.stream("/v1/completions", wanted | {"stream_options": {"include_usage": True}})  # fmt: skip
        for choice in whole["choices"]:
            own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]  # fmt: skip
            assert "".join(one["text"] for one in own) == choice["text"]
            assert own[-1]["finish_reason"] == choice["finish_reason"]
            assert not any(one in choice["text"] for one in stop)
        assert chunks[-1]["usage"] == whole["usage"]


def test_stop_strings_end_as_they_do_when_sampling(served: Running, wide_model_dir: Path):
    with TransformersSampler(wide_model_dir) as sampler:
        for stop in (("a",), ("\n",), ("s", "7")):
            expected = sampler.sample(["Q: 3 + 4?"], SamplingParams(max_tokens=20, stop=stop))[0][0]
            body = served.complete("Q: 3 + 4?", max_tokens=20, stop=list(stop), temperature=0)
            assert body["choices"][0]["text"] == expected.text
            assert body["choices"][0]["finish_reason"] == expected.finish_reason


def test_a_long_prompt_is_read_in_pieces(served: Running, reference: tuple[Any, Any]):
    prompt = f"{SHOTS}Q: 3 + 4?\nA:"
    length = len(reference[1](prompt).input_ids)
    assert length > CHUNK
    for _ in range(2):  # the second time, its beginning is stored
        body = served.complete(prompt, max_tokens=6, temperature=0)
        assert body["choices"][0]["text"] == text_of(reference, greedy(reference, prompt, 6))
    assert body["usage"]["prompt_tokens"] == length


def test_a_client_that_leaves_frees_its_rows(served: Running):
    data = json.dumps({"model": "m", "prompt": "Q:", "max_tokens": 400, "n": 8, "temperature": 2.0, "stream": True})  # fmt: skip
    for stream in (True, False):
        body = data if stream else data.replace(', "stream": true', "")
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())  # fmt: skip
            end = time.monotonic() + 10
            while not served.server.engine.load.rows and time.monotonic() < end:
                time.sleep(0.002)
            assert served.server.engine.load.rows == 8
        left = time.monotonic()
        assert served.idle()
        assert time.monotonic() - left < 2.0


def test_more_requests_than_may_wait_are_refused(wide_model_dir: Path):
    with (
        running(wide_model_dir, max_rows=2, max_waiting=2) as one,
        ThreadPoolExecutor(12) as pool,
    ):
        wanted = {"model": "m", "prompt": "Q:", "max_tokens": 200, "temperature": 2.0}
        answers = list(pool.map(lambda _: one.post("/v1/completions", wanted), range(12)))
        refused = [body for status, body in answers if status == 429]
        assert refused and len(refused) + sum(status == 200 for status, _ in answers) == 12
        assert refused[0]["error"]["code"] == "rate_limit_exceeded"
        assert one.idle()
        assert one.complete("Q:", max_tokens=1)


def test_thoughts_of_earlier_turns_never_reach_a_prompt(
    served: Running, monkeypatch: pytest.MonkeyPatch
):
    read: list[str] = []
    submit = served.server.engine.submit

    def spy(job: Job) -> None:
        read.append(str(served.server.tokenizer.decode(list(job.prompt))))
        submit(job)

    monkeypatch.setattr(served.server.engine, "submit", spy)
    secret = "tangerine"
    turns = [
        {
            "role": "assistant",
            "content": f"<think>{secret}</think>Two.",
            "reasoning_content": secret,
        },
        {"role": "assistant", "content": "Two.", "reasoning_content": secret, "reasoning": secret},
        {"role": "assistant", "content": f"{secret}</think>Two."},
        {"role": "assistant", "content": f"Two.<think>{secret}"},
        {"role": "assistant", "content": f"<think>{secret}<think>{secret}</think>Two."},
        {"role": "assistant", "content": f"<thi<think>x</think>nk>{secret}</think>Two."},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": f"<think>{secret}"},
                {"type": "text", "text": "</think>Two."},
            ],
        },
        {"role": "user", "content": f"You wrote: <think>{secret}</think>Two."},
    ]
    for turn in turns:
        served.chat([*MESSAGES, turn, {"role": "user", "content": "And?"}], max_tokens=1)
    assert len(read) == len(turns)
    for prompt in read:
        assert secret not in prompt and "think" not in prompt
        assert "Two." in prompt and "How many apples?" in prompt and prompt.endswith("assistant:")
    served.chat([{"role": "user", "content": "What does <think> mean?"}], max_tokens=1)
    assert "What does  mean?" in read[-1]


BAD: list[tuple[Any, str]] = [
    (b"{", "not valid JSON"),
    (b'{"model": "\xff"}', "UTF-8"),
    (b'{"model": "m", "prompt": "a", "stop": "\\ud800"}', "UTF-8"),
    (b"[" * 100_000, "JSON"),
    (b'{"model": "m", "prompt": "\\ud800"}', "prompt"),
    (b'{"model": "m", "prompt": "a", "seed": 1e400}', "seed"),
    (b'{"model": "m", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", "JSON"),
    (b'{"model": "m", "prompt": "a", "temperature": NaN}', "temperature"),
    ([], "valid dictionary"),
    ({"prompt": "a"}, "model is required"),
    ({"model": "other", "prompt": "a"}, "'other'"),
    ({"model": "m"}, "prompt"),
    ({"model": "m", "prompt": None}, "prompt"),
    ({"model": "m", "prompt": ""}, "empty"),
    ({"model": "m", "prompt": []}, "empty"),
    ({"model": "m", "prompt": [[]]}, "empty"),
    ({"model": "m", "prompt": [320000]}, "token ids from 0"),
    ({"model": "m", "prompt": [-1]}, "token ids from 0"),
    ({"model": "m", "prompt": ["a", 3]}, "prompt"),
    ({"model": "m", "prompt": ["a"] * 65}, "at most 64"),
    ({"model": "m", "prompt": "a", "n": 0}, "n:"),
    ({"model": "m", "prompt": "a", "n": -1}, "n:"),
    ({"model": "m", "prompt": "a", "n": 10**30}, "n:"),
    ({"model": "m", "prompt": "a", "n": 9}, "at most 8"),
    ({"model": "m", "prompt": "a", "n": "2"}, "n:"),
    ({"model": "m", "prompt": "a", "n": True}, "n:"),
    ({"model": "m", "prompt": "a", "max_tokens": 0}, "max_tokens"),
    ({"model": "m", "prompt": "a", "max_tokens": 100_000}, "context"),
    ({"model": "m", "prompt": "a " * 600}, "context"),
    ({"model": "m", "prompt": "a", "stop": ""}, "not empty"),
    ({"model": "m", "prompt": "a", "stop": ["b", ""]}, "not empty"),
    ({"model": "m", "prompt": "a", "stop": ["b"] * 17}, "at most 16"),
    ({"model": "m", "prompt": "a", "temperature": -1}, "temperature"),
    ({"model": "m", "prompt": "a", "top_p": 0}, "top_p"),
    ({"model": "m", "prompt": "a", "logprobs": 21}, "logprobs"),
    ({"model": "m", "prompt": "a", "logit_bias": {"3": 1.0}}, "logit_bias"),
    ({"model": "m", "prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
    ({"model": "m", "prompt": "a", "suffix": "b"}, "suffix"),
    ({"model": "m", "prompt": "a", "best_of": 3}, "best_of"),
    ({"model": "m", "prompt": "a", "zzz": 3}, "Unknown field zzz"),
    ({"model": "m", "prompt": "a", "stream_options": {"include_usage": True}}, "stream"),
]


@pytest.mark.parametrize(("body", "part"), BAD, ids=[str(one[0])[:60] for one in BAD])
def test_invalid_completion_requests_get_an_error_of_openai_s_form(
    served: Running, body: Any, part: str
):
    status, answer = served.post("/v1/completions", body)
    assert status == (404 if "other" in str(body) else 400), answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and part in error["message"]
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role"),
        ({"messages": [{"content": "a"}]}, "role"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": 3}]}, "content"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
                ]
            },
            "text",
        ),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "text"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"chat_template_kwargs": {"tokenize": False}}, "tokenize"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking"),
        ({"chat_template_kwargs": {"a": [{"b": "<think>x"}]}}, "thought marks"),
        ({"chat_template_kwargs": {"</think>": 1}}, "thought marks"),
    ],
    ids=str,
)
def test_invalid_chats_get_an_error_of_openai_s_form(
    served: Running, change: dict[str, Any], part: str
):
    body = {"model": "m", "messages": MESSAGES, **change}
    status, answer = served.post("/v1/chat/completions", body)
    assert status == 400
    assert part in answer["error"]["message"]


def test_others_are_served_while_a_prompt_is_tokenized(
    served: Running, monkeypatch: pytest.MonkeyPatch
):
    whole, begun, go_on = served.server.text_prompt, threading.Event(), threading.Event()

    def slow(text: str, stop: tuple[str, ...]) -> Any:
        if text == "long":
            begun.set()
            assert go_on.wait(20)
        return whole(text, stop)

    monkeypatch.setattr(served.server, "text_prompt", slow)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(served.complete, "long", max_tokens=1)
        assert begun.wait(20)
        assert served.complete("Q: 3", max_tokens=2)
        go_on.set()
        assert long.result()


def test_large_and_slow_bodies_are_refused_while_others_are_served(wide_model_dir: Path):
    limits = {"max_bytes": 10_000, "body_seconds": 0.5}
    with running(wide_model_dir, app_options=limits) as one:
        status, body = one.post("/v1/completions", {"model": "m", "prompt": "a" * 20_000})
        assert status == 413 and "10,000 bytes" in body["error"]["message"]
        with socket.create_connection(("127.0.0.1", one.port)) as client:  # no length is announced
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")  # fmt: skip
            chunk = b"1000\r\n" + b"a" * 0x1000 + b"\r\n"
            client.sendall(chunk * 3)
            assert b" 413 " in client.recv(1000)
        with socket.create_connection(("127.0.0.1", one.port)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{"
            )
            assert one.complete("Q:", max_tokens=2)
            assert b" 408 " in client.recv(1000)


def test_a_thousand_open_connections_do_not_stop_the_server(served: Running):
    clients = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(400)]
    try:
        for client in clients[::2]:
            client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n")
        assert served.complete("Q:", max_tokens=2)["choices"]
    finally:
        for client in clients:
            client.close()


def test_a_key_is_needed_where_one_is_set(wide_model_dir: Path):
    with running(wide_model_dir, app_options={"api_key": "s3cret"}) as one:
        wanted = {"model": "m", "prompt": "Q:", "max_tokens": 1}
        assert one.post("/v1/completions", wanted)[0] == 401
        for header in ("Bearer wrong", "s3cret", "Basic s3cret", "Bearer s3cre"):
            assert one.post("/v1/completions", wanted, authorization=header)[0] == 401
        assert one.post("/v1/completions", wanted, authorization="Bearer s3cret")[0] == 200
        assert fetch(Request(f"{one.url}/v1/models"))[0] == 401
        assert fetch(Request(f"{one.url}/health"))[0] == 200


def test_openai_s_client_completes_chats_and_streams(served: Running):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    assert [one.id for one in client.models.list()] == ["m"]
    assert client.models.retrieve("m").id == "m"
    wanted: dict[str, Any] = {"model": "m", "messages": MESSAGES, "max_tokens": 9, "seed": 1}
    whole = client.chat.completions.create(**wanted, logprobs=True, top_logprobs=2)
    content = whole.choices[0].message.content
    assert whole.usage is not None and whole.usage.completion_tokens <= 9
    tokens = whole.choices[0].logprobs.content  # type: ignore[union-attr]
    assert tokens is not None and "".join(one.token for one in tokens) == content
    assert all(len(one.top_logprobs) == 2 for one in tokens)
    stream = client.chat.completions.create(**wanted, stream=True)
    deltas = [chunk.choices[0].delta for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(one.content or "" for one in deltas) == content
    text = client.completions.create(model="m", prompt=["Q:", "A:"], max_tokens=3, n=2)
    assert [one.index for one in text.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "a"}])
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "a"}],
            tools=[{"type": "function", "function": {"name": "f"}}],
        )  # fmt: skip


def test_an_error_while_decoding_ends_its_requests_only(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    decoder: Any = served.server.engine._decoder
    whole = decoder.step
    monkeypatch.setattr(decoder, "step", lambda: (_ for _ in ()).throw(RuntimeError("broken")))
    status, body = served.post("/v1/completions", {"model": "m", "prompt": "Q:"})
    assert status == 500 and "RuntimeError" in body["error"]["message"]
    monkeypatch.setattr(decoder, "step", whole)
    assert served.complete("Q:", max_tokens=2)
    assert served.idle()


def test_random_disconnects_leak_no_row(served: Running):
    draw = random.Random(0)

    def request(number: int) -> None:
        body = json.dumps({"model": "m", "prompt": f"Q: {number}", "max_tokens": 30, "n": 1 + number % 3,
                           "stream": number % 2 == 0, "temperature": 1.5})  # fmt: skip
        with socket.create_connection(("127.0.0.1", served.port)) as client:
            client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())  # fmt: skip
            if number % 4:
                time.sleep(draw.random() * 0.02)
            else:
                while client.recv(4096):
                    pass

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(request, range(200)))
    assert served.idle()
    lanes = served.server.engine._decoder._lanes  # type: ignore[attr-defined]
    assert all(not lane.rows and not lane.expected and lane._slots is None for lane in lanes)


@pytest.mark.slow
def test_the_command_serves_and_ends_when_interrupted(tmp_path: Path):
    key = tmp_path / "key"
    key.write_text("s3cret\n")
    command = [sys.executable, "-m", "selftaught.cli", "serve", "--port", "0", "--api-key-file", str(key)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    url = line.split(" at ")[1].split()[0]
    body = json.dumps({"model": "embedded", "prompt": "48+17", "max_tokens": 4}).encode()
    headers = {"content-type": "application/json", "authorization": "Bearer s3cret"}
    with urlopen(Request(f"{url}/completions", body, headers), timeout=30) as response:
        assert json.loads(response.read())["choices"][0]["text"]
    process.terminate()
    _, errors = process.communicate(timeout=30)
    assert "s3cret" not in errors

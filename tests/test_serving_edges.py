"""Rare requests to the server: results beside plain forward passes, and errors that stay with one request."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from narrowed import token_id
from serving import Running, running
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.records import Completion, Text
from selftaught.serving.best_of_n import Choice, Chooser
from selftaught.serving.continuous import Lane
from selftaught.serving.jobs import Job


@pytest.fixture(scope="module")
def served(wide_model_dir: Path) -> Iterator[Running]:
    with running(wide_model_dir, max_rows=8, max_waiting=4) as one:
        yield one


def harness_score(body: dict[str, Any], context: int) -> float:
    """What lm-evaluation-harness reads of an echo: all tokens after the context except the last."""
    return sum(body["choices"][0]["logprobs"]["token_logprobs"][context:-1])


@pytest.mark.parametrize("next_token", ["plain", "end"])
def test_an_echo_has_an_entry_for_the_new_token_also_if_it_ends_the_text(
    wide_model_dir: Path, next_token: str
):
    tokenizer = AutoTokenizer.from_pretrained(wide_model_dir)
    model = AutoModelForCausalLM.from_pretrained(wide_model_dir).eval()
    ids = tokenizer("Tom has 3 apples").input_ids
    with torch.no_grad():
        log_prob = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(log_prob[at - 1, ids[at]]) for at in range(2, len(ids)))
    with running(wide_model_dir) as one:
        if next_token == "end":
            one.server._eos = [int(log_prob[-1].argmax())]
        body = one.complete(ids, max_tokens=1, temperature=0, logprobs=1, echo=True)
        assert harness_score(body, 2) == pytest.approx(expected, abs=1e-4)
        found = body["choices"][0]["logprobs"]
        assert len({len(values) for values in found.values()}) == 1
        last = None if next_token == "end" else pytest.approx(float(log_prob[-1].max()), abs=1e-4)
        assert found["token_logprobs"][-1] == last
        single = one.complete(ids[:1], max_tokens=1, temperature=0, logprobs=1, echo=True)
    values = single["choices"][0]["logprobs"]["token_logprobs"]
    assert values == [None, pytest.approx(float(log_prob[0].max()), abs=1e-4)]


def test_an_echo_has_an_entry_for_a_new_token_that_is_hidden(wide_model_dir: Path):
    with running(wide_model_dir) as plain:
        body = plain.complete("Tom has", max_tokens=1, temperature=0, logprobs=1, echo=True)
        mark = body["choices"][0]["logprobs"]["tokens"][-1]
    assert mark.strip()
    with running(wide_model_dir, marks=(mark, "</think>")) as one:
        hidden = one.complete("Tom has", max_tokens=1, temperature=0, logprobs=1, echo=True)
    found, shown = hidden["choices"][0]["logprobs"], body["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [*shown["token_logprobs"][:-1], None]
    assert found["tokens"][-1] == "" and found["top_logprobs"][-1] is None


@pytest.mark.parametrize("change", [{"temperature": 1e-40}, {"temperature": 1e-300}, {"top_p": 1e-300}])  # fmt: skip
def test_extremely_small_sampling_parameters_are_greedy(served: Running, change: dict[str, float]):
    greedy = served.complete("Q: 3", max_tokens=5, temperature=0)["choices"]
    assert served.complete("Q: 3", max_tokens=5, **change)["choices"] == greedy


def test_equal_prompts_of_a_request_get_different_samples(served: Running):
    body = served.complete(["Q: 3"] * 6, max_tokens=8, temperature=2.0, seed=1)
    assert len({one["text"] for one in body["choices"]}) > 3
    first = served.complete("Q: 3", max_tokens=8, temperature=2.0, seed=1, n=6)
    assert [one["text"] for one in first["choices"]] == [one["text"] for one in body["choices"]]


def test_a_request_with_many_prompts_is_not_refused_while_nothing_waits(served: Running):
    body = served.complete(["Q: 3"] * 20, max_tokens=2, n=2)
    assert len(body["choices"]) == 40
    assert served.idle()


@pytest.mark.parametrize("where", ["add", "_reserve"])
def test_a_failure_while_a_completion_starts_reaches_its_client(
    served: Running, monkeypatch: pytest.MonkeyPatch, where: str
):
    def failing(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(Lane, where, failing)
        status, body = served.post("/v1/completions", {"model": "m", "prompt": "Q: 3", "max_tokens": 2})  # fmt: skip
    assert status == 500 and "RuntimeError" in body["error"]["message"]
    assert served.idle(2)
    assert served.complete("Q: 3", max_tokens=2)


def test_a_failure_while_a_prompt_is_queued_leaves_no_row(
    served: Running, monkeypatch: pytest.MonkeyPatch
):
    decoder = cast(Any, served.server.engine)._decoder

    def failing(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(decoder._cache, "longest", failing)
        status, _ = served.post("/v1/completions", {"model": "m", "prompt": "Q: 3", "max_tokens": 2})  # fmt: skip
    assert status == 500
    assert served.idle(2)


def test_a_very_long_stop_string_is_refused(served: Running):
    start = time.monotonic()
    wanted = {"model": "m", "prompt": "Q: 3", "max_tokens": 4, "stop": "a" * 200_000}
    status, body = served.post("/v1/completions", wanted)
    assert status == 400 and "characters" in body["error"]["message"]
    assert time.monotonic() - start < 5


def test_a_field_with_an_invalid_or_a_very_long_name_is_refused(served: Running):
    for name in ("\ud800", "z" * 100_000):
        status, body = served.post("/v1/completions", {"model": "m", "prompt": "a", name: 1})
        assert status == 400
        assert len(body["error"]["message"]) < 600


def test_flagged_content_is_not_beside_the_hidden_thoughts(quiet_model_dir: Path):
    from test_serving_review import QUESTION, rest_of, reviewer

    with running(quiet_model_dir, thoughts="shown") as plain:
        choice = plain.complete(**QUESTION)["choices"][0]
    text = choice["text"]
    assert text.strip()
    import re

    with running(
        quiet_model_dir, thoughts="shown", reviewer=reviewer(f"^{re.escape(text)}$")
    ) as one:
        body = one.complete(**QUESTION)
        chunks = one.stream("/v1/completions", QUESTION)
    assert body["choices"][0]["finish_reason"] == "content_filter"
    for found in (body["choices"][0], *(chunk["choices"][0] for chunk in chunks)):
        tokens = "".join(hidden["token"] for hidden in found.get("hidden_thoughts", []))
        assert text not in tokens
    assert rest_of(body)


def test_marks_of_hidden_thoughts_cannot_be_nested_into_a_prompt(
    quiet_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    with running(quiet_model_dir) as one:
        begin, end = one.server.marks[1]
        ids = {token_id(one.server.tokenizer.convert_tokens_to_ids(mark)) for mark in (begin, end)}
        read: list[Sequence[int]] = []
        submit = one.server.engine.submit

        def spy(jobs: Any) -> None:
            read.extend(job.prompt for job in ([jobs] if isinstance(jobs, Job) else jobs))
            submit(jobs)

        monkeypatch.setattr(one.server.engine, "submit", spy)
        nested = f"{begin[:3]}{begin}{begin[3:]}tangerine"
        one.complete(f"Q: {nested} 3", max_tokens=1)
        status, body = one.post("/v1/completions", {"model": "m", "prompt": [5, min(ids), 6, max(ids), 7], "max_tokens": 1})  # fmt: skip
    assert not ids & set(read[0])
    assert status == 400 and "thought" in body["error"]["message"]


class Noted(Chooser):
    """Keeps the prompts that it is given, and chooses the first completion."""

    def __init__(self) -> None:
        self.prompts: list[Text] = []

    def choose(self, prompt: Text, candidates: Sequence[Completion], options: Any) -> Choice:
        del options
        self.prompts.append(prompt)
        return Choice(0, len(candidates))

    def close(self) -> None:
        pass


def test_a_verifier_reads_the_prompt_also_if_it_was_given_as_tokens(wide_model_dir: Path):
    chooser = Noted()
    tokenizer = AutoTokenizer.from_pretrained(wide_model_dir)
    with running(wide_model_dir, chooser=chooser, candidates=2) as one:
        one.complete("Tom has 3", max_tokens=2)
        one.complete(tokenizer("Tom has 3").input_ids, max_tokens=2)
    assert chooser.prompts == ["Tom has 3"] * 2


def test_the_support_of_a_choice_is_not_sent_with_another_completion(wide_model_dir: Path):
    import json
    from urllib.request import Request, urlopen

    from test_serving_review import reviewer

    with running(wide_model_dir, chooser=Noted(), candidates=2, reviewer=reviewer("(?s).", "redraw", 1)) as one:  # fmt: skip
        body = json.dumps({"model": "m", "prompt": "Tom has 3", "max_tokens": 2}).encode()
        request = Request(f"{one.url}/v1/completions", body, {"content-type": "application/json"})
        with urlopen(request) as response:
            assert response.headers["x-selftaught-support"] is None
            assert json.loads(response.read())["choices"][0]["finish_reason"] == "content_filter"


def test_the_text_of_a_long_echo_takes_linear_time(served: Running):
    from selftaught.serving.bodies import Echo

    tokenizer = served.server.tokenizer
    ids = tokenizer("Tom has 3 apples. " * 400).input_ids
    read = 0

    class Counting:
        def decode(self, tokens: Sequence[int], **options: Any) -> str:
            nonlocal read
            read += len(tokens)
            return str(tokenizer.decode(list(tokens), **options))

    echo = Echo(ids, [], Counting())
    assert echo.text == tokenizer.decode(ids)
    assert read < 40 * len(ids)


def test_tokens_that_are_parts_of_a_character_have_no_bytes(served: Running):
    from selftaught.serving.bodies import Bodies
    from selftaught.serving.jobs import LogProb

    tokenizer = served.server.tokenizer
    part = next(one for one in range(len(tokenizer)) if tokenizer.decode([one]) == "\ufffd")
    word = tokenizer("a").input_ids[0]
    bodies = Bodies("chat", {}, tokenizer, "hidden")
    found = bodies.log_probs([(LogProb(part, -1.0), 0), (LogProb(word, -1.0), 1)])["content"]
    assert [one["bytes"] for one in found] == [None, [97]]


def test_a_model_without_a_limit_of_its_context_has_one_of_new_tokens(
    served: Running, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(served.server, "_context", None)
    status, body = served.post("/v1/completions", {"model": "m", "prompt": "a", "max_tokens": 10**9})  # fmt: skip
    assert status == 400 and "max_tokens" in body["error"]["message"]


def test_many_thought_marks_in_a_message_take_little_time():
    from selftaught.serving.conversation import without_thoughts
    from selftaught.serving.protocol import ApiError
    from selftaught.thought_marks import THINK

    start = time.monotonic()
    for text in ("<think>" * 50_000, "</think>" * 50_000, "<think>a</think>" * 50_000):
        for assistant in (False, True):
            assert without_thoughts(text, [THINK], assistant=assistant) == ""
    deep = "<thi" * 50_000 + "nk>" * 50_000
    with pytest.raises(ApiError, match="inside thought marks"):
        without_thoughts(deep, [THINK], assistant=False)
    assert time.monotonic() - start < 5


def test_thoughts_in_messages_of_the_user_are_removed_as_a_pattern_would():
    import random
    import re

    from selftaught.serving.conversation import _outside_pairs

    draw = random.Random(0)
    for _ in range(3000):
        text = "".join(draw.choice(["a", "b", "<x>", "</x>"]) for _ in range(8))
        expected = re.sub("<x>.*?</x>", "", text)
        assert _outside_pairs(text, ("<x>", "</x>")) == re.sub("</?x>", "", expected)


def test_the_text_of_a_token_has_its_space_with_a_sentencepiece_tokenizer():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from selftaught.serving.bodies import Bodies
    from selftaught.serving.jobs import LogProb

    words = ["<unk>", "\u2581the", "\u2581cat", "cat", "s"]
    plain = Tokenizer(
        models.BPE({word: at for at, word in enumerate(words)}, [], unk_token="<unk>")
    )
    plain.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    bodies = Bodies("completion", {}, tokenizer, "hidden")
    found = bodies.log_probs([(LogProb(2, -1.0, ((2, -1.0), (3, -2.0))), 3), (LogProb(4, -0.5), 7)])
    assert found["tokens"] == [" cat", "s"]
    assert found["top_logprobs"][0] == {" cat": -1.0, "cat": -2.0}


def test_a_prompt_that_cannot_get_its_pauses_is_refused(tiny_model_dir: Path, tmp_path: Path):
    from selftaught.methods.pause import PAUSE, add_pause_token

    folder = add_pause_token(str(tiny_model_dir), tmp_path / "pause")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}A:"
    tokenizer.save_pretrained(folder)
    with running(folder, pauses=PAUSE * 4) as one:
        chat = {"model": "m", "messages": [{"role": "user", "content": "3?"}]}
        tokens = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 1}
        answers = [one.post("/v1/chat/completions", chat), one.post("/v1/completions", tokens)]
    for status, body in answers:
        assert status == 400 and "pause tokens" in body["error"]["message"]

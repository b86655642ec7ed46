"""Decoders of the server beside transformers' own loop; thoughts, and the choice among candidates."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from narrowed import token_id
from serving import Running, running
from test_samplers import PLAIN, SHARING, one_at_a_time, random_model, random_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.evaluation.verifier import Verifier
from selftaught.methods.pause import PAUSE, add_pause_token
from selftaught.quiet.checkpoint import open_quiet
from selftaught.quiet.gating import ThinkWhen, ThoughtParams
from selftaught.records import Problem
from selftaught.samplers.base import SamplingParams
from selftaught.samplers.local.prefix_loop import (
    CHUNK,
    SharedPrefixLoop,
    shared_prefix_loop,
    two_part,
)
from selftaught.samplers.local.sampler import TransformersSampler
from selftaught.samplers.stopping import Ending
from selftaught.serving.best_of_n import Chooser
from selftaught.serving.continuous import ContinuousDecoder
from selftaught.serving.interleaved import InterleavedDecoder, Predictions, plain_predictions
from selftaught.serving.jobs import Job, Step
from selftaught.serving.text import CompletionText, held_back
from selftaught.tasks import open_task
from selftaught.thought_marks import THINK, outside_thoughts

NEW = 7


def collected(decoder: Any, jobs: Sequence[Job], apart: int) -> dict[Job, list[list[int]]]:
    """Add a job every `apart` steps, and return the tokens of all completions."""
    waiting, found = list(jobs), {job: [[] for _ in range(job.n)] for job in jobs}
    number = 0
    while waiting or decoder.rows:
        if waiting and number % apart == 0 and decoder.fits(waiting[0]):
            decoder.add(waiting.pop(0))
        for job, steps in decoder.step():
            for step in steps:
                found[job][step.index].append(step.token)
        number += 1
    return found


def job(row: tuple[int, ...], **options: Any) -> Job:
    never = cast(Ending, SimpleNamespace(eos=[], stopped=lambda tokens: False))
    return Job(row, never, lambda steps: None, max_tokens=NEW, temperature=0.0, **options)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("apart", [1, 3])
def test_jobs_that_arrive_in_turn_are_decoded_as_alone(name: str, apart: int):
    model = random_model(SHARING[name])
    rows = random_rows(shared=[140, 140, 3, 140, 0, 140, 1], own=[4, 9, 30, 2, 40, 4, 1])
    rows.append(rows[0][:100])
    with torch.inference_mode():
        loop = shared_prefix_loop(model, rows[0], 20)
    assert isinstance(loop, SharedPrefixLoop)
    with torch.inference_mode(), two_part(model):
        decoder = ContinuousDecoder(loop, 4, 2**20, 2**30)
        jobs = [job(row, n=1 + at % 2) for at, row in enumerate(rows)]
        found = collected(decoder, jobs, apart)
    expected = one_at_a_time(model, rows, NEW)
    for one, tokens in zip(jobs, expected, strict=True):
        assert found[one] == [list(tokens)] * one.n
    assert len(decoder._lanes) > 1


@pytest.mark.parametrize("name", PLAIN)
def test_other_layers_are_decoded_one_job_beside_the_other(name: str):
    model = random_model(PLAIN[name])
    rows = random_rows(shared=[5, 5, 0], own=[4, 9, 12])
    with torch.inference_mode():
        decoder = InterleavedDecoder(partial(plain_predictions, model), 4)
        jobs = [job(row, n=1 + at % 2) for at, row in enumerate(rows)]
        found = collected(decoder, jobs, 2)
    for one, tokens in zip(jobs, one_at_a_time(model, rows, NEW), strict=True):
        assert found[one] == [list(tokens)] * one.n


def test_a_new_shared_prefix_is_computed_in_pieces_between_the_tokens_of_others():
    model = random_model(SHARING["llama"])
    rows = random_rows(shared=[0, 1300, 1300], own=[4, 9, 7])
    with torch.inference_mode():
        loop = shared_prefix_loop(model, rows[1], 20)
    assert isinstance(loop, SharedPrefixLoop)
    read: list[int] = []
    model.get_input_embeddings().register_forward_hook(
        lambda _, ids, out: read.append(ids[0].numel())
    )
    with torch.inference_mode(), two_part(model):
        decoder = ContinuousDecoder(loop, 4, 0, 2**30)
        first, *others = (job(row) for row in rows)
        first.max_tokens = 40
        decoder.add(first)
        for one in others:
            decoder.add(one)
        found = {one: list[int]() for one in (first, *others)}
        while decoder.rows:
            read.clear()
            for one, steps in decoder.step():
                found[one] += [step.token for step in steps if step.token is not None]
            assert sum(read) <= CHUNK + 3
        assert [len(lane.tokens) for lane in decoder._lanes] == [0, 1300]
    expected = one_at_a_time(model, rows, 40)
    assert [tuple(one) for one in found.values()] == [
        tuple(expected[0]),
        *(tuple(one[:NEW]) for one in expected[1:]),
    ]


@pytest.mark.parametrize("when", ["prefix", "prompt", "token"])
def test_an_error_ends_the_requests_of_its_lane_only(when: str, monkeypatch: pytest.MonkeyPatch):
    model = random_model(SHARING["llama"])
    rows = random_rows(shared=[0, 300, 300], own=[4, 9, 7])
    with torch.inference_mode():
        loop = shared_prefix_loop(model, rows[1], 20)
    assert isinstance(loop, SharedPrefixLoop)
    forward = loop.forward

    def failing(
        slots: Any, prefix: Any, first: int, token_BT: torch.Tensor, *rest: Any, **how: Any
    ) -> Any:
        if prefix.tokens and when == ("token" if token_BT.shape[1] == 1 else "prompt"):
            raise RuntimeError("out of memory")
        return forward(slots, prefix, first, token_BT, *rest, **how)

    def no_prefix(*args: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "forward", failing)
    if when == "prefix":
        monkeypatch.setattr(loop, "extended", no_prefix)
    with torch.inference_mode(), two_part(model):
        decoder = ContinuousDecoder(loop, 4, 0, 2**30)
        jobs = [job(row) for row in rows]
        for one in jobs:
            decoder.add(one)
        found: dict[Job, list[int]] = {one: [] for one in jobs}
        errors: list[Job] = []
        while decoder.rows:
            for one, steps in decoder.step():
                found[one] += [step.token for step in steps if step.token is not None]
                errors += [one for step in steps if step.error is not None]
    assert errors == [jobs[2]]  # the first prompt that shares its beginning with an earlier one
    expected = one_at_a_time(model, rows, NEW)
    assert [found[one] for one in jobs[:2]] == [list(one) for one in expected[:2]]
    assert found[jobs[2]] == []


def test_an_error_ends_its_own_job_among_those_that_take_turns():
    model = random_model(PLAIN[next(iter(PLAIN))])
    rows = random_rows(shared=[5, 5], own=[4, 9])

    def predict(one: Job) -> Predictions:
        return broken() if one is bad else plain_predictions(model, one)

    def broken() -> Predictions:
        yield torch.zeros(1, 300), {}
        raise RuntimeError("out of memory")

    with torch.inference_mode():
        decoder = InterleavedDecoder(predict, 4)
        bad, good = (job(row) for row in rows)
        decoder.add(bad)
        decoder.add(good)
        tokens: list[int] = []
        errors: list[Job] = []
        while decoder.rows:
            for one, steps in decoder.step():
                tokens += [step.token for step in steps if one is good and step.token is not None]
                errors += [one for step in steps if step.error is not None]
    assert errors == [bad]
    assert tokens == list(one_at_a_time(model, rows[1:], NEW)[0])


def test_stored_prompts_take_no_more_memory_than_allowed():
    model = random_model(SHARING["llama"])
    rows = random_rows(shared=[0] * 12, own=[600] * 12)
    with torch.inference_mode():
        loop = shared_prefix_loop(model, rows[0], 20)
    assert isinstance(loop, SharedPrefixLoop)
    per_prompt = 512 * 2 * 2 * 2 * 8 * 4  # tokens, keys and values, layers, heads, width, bytes
    with torch.inference_mode(), two_part(model):
        decoder = ContinuousDecoder(loop, 4, 3 * per_prompt, 2**30)
        collected(decoder, [job(row) for row in rows], 1)
    assert decoder._cache.bytes == 3 * per_prompt


def test_jobs_wait_for_memory_and_one_that_never_fits_is_refused():
    model = random_model(SHARING["llama"])
    rows = random_rows(shared=[0] * 6, own=[50, 100, 20, 50, 10, 60])
    with torch.inference_mode():
        loop = shared_prefix_loop(model, rows[0], 20)
    assert isinstance(loop, SharedPrefixLoop)
    per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, bytes
    assert loop.bytes_per_token == per_token
    most = 2 * (100 + NEW) * per_token
    with torch.inference_mode(), two_part(model):
        decoder = ContinuousDecoder(loop, 4, 0, most)
        jobs = [job(row) for row in rows]
        decoder.add(jobs[0])
        assert decoder.fits(jobs[1])
        decoder.add(jobs[1])
        assert not decoder.fits(jobs[2])  # three rows would have the length of the second
        decoder.clear()
        found = collected(decoder, jobs, 1)
        with pytest.raises(ValueError, match=r"3 x 107 tokens need .* smaller n"):
            decoder.add(job(rows[1], n=3))
    for one, tokens in zip(jobs, one_at_a_time(model, rows, NEW), strict=True):
        assert found[one] == [list(tokens)]


def test_a_quiet_model_writes_what_generate_writes_and_hides_its_thoughts(
    quiet_model_dir: Path, tmp_path: Path
):
    model, tokenizer = open_quiet(quiet_model_dir)
    ids = tokenizer("Q: 3 + 4?\nA:", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=6, seed=0)[0, ids.shape[1] :]
    expected = tokenizer.decode(out)
    log = tmp_path / "thoughts.jsonl"
    with running(quiet_model_dir, thoughts="hidden", log_thoughts=log) as one:
        body = one.complete("Q: 3 + 4?\nA:", max_tokens=6, temperature=0)
        chunks = one.stream("/v1/completions", {"prompt": "Q: 3 + 4?\nA:", "max_tokens": 6, "temperature": 0})  # fmt: skip
    assert body["choices"][0]["text"] == expected
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 18}
    assert body["usage"]["completion_tokens"] == 6 + 18
    assert "".join(one["choices"][0]["text"] for one in chunks) == expected
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(logged) == 2 and logged[0]["thoughts"] == logged[1]["thoughts"]
    assert logged[0]["thoughts"][0].count("[") == 6
    assert "reasoning_content" not in json.dumps([body, chunks])


def test_thoughts_are_shown_or_summed_up_where_the_server_says_so(quiet_model_dir: Path):
    question = [{"role": "user", "content": "Q: 3 + 4?"}]
    wanted: dict[str, Any] = {"max_tokens": 4, "temperature": 0}
    with running(quiet_model_dir, thoughts="shown") as one:
        message = one.chat(question, **wanted)["choices"][0]["message"]
        deltas = [chunk["choices"][0]["delta"] for chunk in one.stream("/v1/chat/completions", {"messages": question, **wanted})]  # fmt: skip
    assert message["reasoning_content"].count("[") == 4
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]  # fmt: skip
    assert "".join(delta.get("content", "") for delta in deltas) == message["content"]
    with running(quiet_model_dir, thoughts="summary") as one:
        body = one.chat(question, **wanted)["choices"][0]["message"]
    assert body["content"] == message["content"]
    assert body["reasoning_content"] == "12 tokens of thoughts before 4 of 4 tokens."
    never = ThoughtParams(think_when=ThinkWhen("never"))
    with running(quiet_model_dir, thoughts="shown", how=never) as one:
        assert "reasoning_content" not in one.chat(question, **wanted)["choices"][0]["message"]


def test_marks_of_hidden_thoughts_in_a_prompt_are_not_read(quiet_model_dir: Path):
    with running(quiet_model_dir) as one:
        read: list[tuple[int, ...]] = []
        submit = one.server.engine.submit
        one.server.engine.submit = lambda job: (read.append(job.prompt), submit(job))[1]  # type: ignore[method-assign]
        begin, end = one.server.marks[1]
        one.complete(f"Q: {begin}tangerine{end}3?", max_tokens=1)
        one.chat([{"role": "assistant", "content": f"a{begin}tangerine{end}b"},
                  {"role": "user", "content": f"And{begin}?"}], max_tokens=1)  # fmt: skip
    marks = {token_id(one.server.tokenizer.convert_tokens_to_ids(mark)) for mark in (begin, end)}
    assert all(not marks & set(prompt) for prompt in read)
    texts = [one.server.tokenizer.decode(list(prompt)) for prompt in read]
    assert texts == ["Q: 3?", "assistant: ab\nuser: And?\nA:"]


class Words:
    """A tokenizer whose tokens are given texts."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self.all_special_tokens: list[str] = []
        self.all_special_ids: list[int] = []
        self.bos_token_id = self.eos_token_id = self.pad_token_id = None

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(self.texts[one] for one in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.texts[token]


@pytest.mark.parametrize("opened", [False, True])
def test_every_split_of_a_text_into_tokens_gives_the_same_thoughts_and_content(opened: bool):
    texts = ["<", "th", "think", ">", "<think>", "</think>", "</", "a", "b", "\n", " ", "ab<", "x</thi", "nk>y"]  # fmt: skip
    tokenizer = cast(Any, Words(texts))
    draw = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(1500):
        ids = torch.randint(0, len(texts), (12,), generator=draw).tolist()
        ending = Ending(tokenizer, [], ("b", "\n\n", "a>"), THINK, opened=opened)
        text = CompletionText(tokenizer, ending, THINK)
        done: list[int] = []
        content = reasoning = ""
        for token in ids:
            done.append(token)
            last = ending.stopped(done) or len(done) == len(ids)
            finished = ("stop" if ending.stopped(done) else "length") if last else None
            piece = text.add(Step(0, token, finished=finished))
            content, reasoning = content + piece.content, reasoning + piece.reasoning
            if last:
                break
        whole = ending.completion(done).text
        spans = outside_thoughts(whole, THINK, opened=opened)
        expected = "".join(whole[start:end] for start, end in spans)
        assert text.content == expected
        marks = re.findall("</?think>", ("<think>" if opened else "") + whole)
        if any(two == "</think>" and one != "<think>" for one, two in pairwise(["", *marks])):
            # A thought that nothing opened: what was sent before its end cannot be taken back.
            assert content.endswith(expected)
        else:
            assert content == expected
            seen.add((bool(expected), bool(reasoning), finished))
    assert len(seen) >= 6


def test_tokens_of_a_thought_that_nothing_opened_are_counted_when_it_is_closed():
    texts = ["<think>", "</think>", "a", "b", ""]
    tokenizer = cast(Any, Words(texts))
    text = CompletionText(tokenizer, Ending(tokenizer, [], (), THINK), THINK)
    for at, token in enumerate([2, 2, 1, 3, 0, 2, 1, 3]):
        text.add(Step(0, token, finished="length" if at == 7 else None))
    assert (text.reasoning, text.content) == ("aaa", "bb")
    assert text.reasoning_tokens == 6  # a a </think> and <think> a </think>


def test_the_longest_beginning_of_a_string_is_held_back():
    assert held_back("abc<th", ["<think>"]) == 3
    assert held_back("abab", ["abc", "bab!"]) == 3
    assert held_back("ab", ["ab"]) == 0
    assert held_back("x", []) == 0


@pytest.fixture(scope="module")
def verifier_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verifier")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def candidates_of(one: Running, n: int) -> list[dict[str, Any]]:
    return one.complete("Q: 3 + 4?\nA:", max_tokens=6, n=n, seed=3, temperature=1.5)["choices"]


def test_the_verifier_s_favourite_is_returned(tiny_model_dir: Path, verifier_dir: Path):
    with running(tiny_model_dir) as plain:
        texts = [one["text"] for one in candidates_of(plain, 8)]
        prompt_tokens = plain.complete("Q: 3 + 4?\nA:", max_tokens=1)["usage"]["prompt_tokens"]
    model = AutoModelForCausalLM.from_pretrained(verifier_dir)
    params = SamplingParams(n=8, seed=3, temperature=1.5, max_tokens=6)
    with TransformersSampler(tiny_model_dir) as sampler:
        sampled = sampler.sample(["Q: 3 + 4?\nA:"], params, keys=[""])[0]
        prompt = sampler._tokenizer("Q: 3 + 4?\nA:").input_ids
    assert [one.text for one in sampled] == texts  # the same tokens as offline
    scores = []
    for one in sampled:
        ids = [*prompt, *(one.token_ids or ())]
        with torch.no_grad():
            log_prob = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(log_prob[at - 1, ids[at]]) for at in range(len(prompt), len(ids))))
    best = max(range(8), key=lambda at: scores[at])
    chooser = Chooser("verifier", Verifier(verifier_dir), None)
    with running(tiny_model_dir, chooser=chooser, candidates=8) as one:
        body = one.complete("Q: 3 + 4?\nA:", max_tokens=6, seed=3, temperature=1.5)
        chunks = one.stream("/v1/completions", {"prompt": "Q: 3 + 4?\nA:", "max_tokens": 6, "seed": 3, "temperature": 1.5})  # fmt: skip
        status, refused = one.post("/v1/completions", {"model": "m", "prompt": "Q:", "temperature": 0})  # fmt: skip
    assert [one["text"] for one in body["choices"]] == [texts[best]]
    assert body["usage"]["prompt_tokens"] == prompt_tokens
    assert body["usage"]["completion_tokens"] == sum(len(one.token_ids or ()) for one in sampled)
    assert "".join(one["choices"][0]["text"] for one in chunks) == texts[best]
    assert status == 400 and "temperature" in refused["error"]["message"]


def test_the_majority_answer_comes_with_its_support():
    from urllib.request import Request, urlopen

    from selftaught.models.embedded import embedded_model

    task = open_task("arithmetic")
    style = task.styled("bare")
    chooser = Chooser("majority", None, task)
    with running(embedded_model(), chooser=chooser, candidates=6, style=style) as one:
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "48+17"}],
                           "max_tokens": 120, "seed": 0, "temperature": 0.7}).encode()  # fmt: skip
        request = Request(f"{one.url}/v1/chat/completions", body, {"content-type": "application/json"})  # fmt: skip
        with urlopen(request) as response:
            support = response.headers["x-selftaught-support"]
            text = json.loads(response.read())["choices"][0]["message"]["content"]
    params = SamplingParams(n=6, temperature=0.7, max_tokens=120).for_prompt(style.stop, {})
    with TransformersSampler(embedded_model()) as sampler:
        sampled = sampler.sample([style(Problem("", "48+17", ""))], params, keys=[""])[0]
    answers = [None if one.finish_reason == "length" else task.answer(one.text) for one in sampled]
    counts = {str(answer): answers.count(answer) for answer in answers if answer is not None}
    assert support == f"{counts[str(task.answer(text))]}/6"
    assert counts[str(task.answer(text))] == max(counts.values())


def test_pauses_follow_the_prompt(tiny_model_dir: Path, tmp_path: Path):
    folder = add_pause_token(str(tiny_model_dir), tmp_path / "pause")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pause = tokenizer.convert_tokens_to_ids(PAUSE)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = [*tokenizer("Q: 3?").input_ids, *[pause] * 4]
    with torch.no_grad():
        expected = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    with running(folder, pauses=PAUSE * 4) as one:
        body = one.complete("Q: 3?", max_tokens=1, temperature=0, logprobs=1)
    assert body["usage"]["prompt_tokens"] == len(ids)
    assert body["choices"][0]["logprobs"]["tokens"] == [tokenizer.decode([expected])]


def test_the_task_s_instruction_is_in_the_last_question_of_every_conversation(wide_model_dir: Path):
    task = open_task("arithmetic")
    style = replace(
        task.styled("bare"), as_messages=True, instruction="End with #.", system="Be brief."
    )
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "#2"},
             {"role": "user", "content": "2+2"}]  # fmt: skip
    with running(wide_model_dir, style=style) as one:
        ids = [one.server.chat_prompt(some, (), {}).ids for some in (turns[:1], turns, [{"role": "system", "content": "Hi."}, *turns])]  # fmt: skip
        texts = [one.server.tokenizer.decode(list(each)) for each in ids]
    first, last = (style._question(Problem("", text, "")) for text in ("1+1", "2+2"))
    assert last.endswith("\n\nEnd with #.")
    assert texts[0] == f"system: Be brief.\nuser: {first}\nassistant:"
    rest = f"user: 1+1\nassistant: #2\nuser: {last}\nassistant:"
    assert texts[1:] == [f"system: Be brief.\n{rest}", f"system: Hi.\n{rest}"]

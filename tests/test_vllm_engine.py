"""Real vLLM, on the CPU where there is no GPU: `pytest -m vllm`."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from selftaught.prompts import PromptStyle
from selftaught.records import Problem, read_rollouts
from selftaught.rollouts.store import collect
from selftaught.samplers import SamplingParams, open_sampler
from selftaught.samplers.local.sampler import TransformersSampler

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

PROMPTS = [f"Q: What is {a} + {b}?\nA:" for a in (3, 12, 40) for b in (5, 7, 20, 31)]
GREEDY = SamplingParams(max_tokens=24)
DRAWN = SamplingParams(n=3, temperature=1.0, max_tokens=24, seed=1)


@pytest.fixture(scope="module")
def engine(wide_model_dir: Path) -> Iterator:
    with open_sampler("vllm", str(wide_model_dir), dtype="float32") as sampler:
        yield sampler


@pytest.fixture(scope="module")
def here(wide_model_dir: Path) -> Iterator[TransformersSampler]:
    with TransformersSampler(wide_model_dir, dtype="float32") as sampler:
        yield sampler


def processes(session: int) -> list[int]:
    """The living processes of a session, read from /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(rest[3]) == session and rest[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def session_of(sampler) -> int:
    return os.getsid(sampler._child._process.pid)


def test_it_takes_as_many_requests_at_a_time_as_generate(engine, wide_model_dir: Path):
    """Not as few as vLLM's server, whose limits its asynchronous engine has by default (128 here)."""
    asked = (
        "from vllm.engine.arg_utils import EngineArgs as A; from vllm.usage.usage_lib import UsageContext as U; "
        f"made = A({str(wide_model_dir)!r}, enable_chunked_prefill=False).create_engine_config(U.LLM_CLASS)"
        ".scheduler_config; print(made.max_num_seqs, made.max_num_batched_tokens)"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    requests, tokens = map(int, done.stdout.split()[-2:])
    assert engine._child.settings["requests"] == requests
    assert engine._child.settings["tokens"] == tokens
    assert engine.at_once == 4  # 2,048 completions


def test_greedy_completions_are_those_of_transformers(engine, here):
    """float32 on both sides: a random model's best two logits are seldom within its rounding."""
    ours, theirs = engine.sample(PROMPTS, GREEDY), here.sample(PROMPTS, GREEDY)
    equal = [one == other for one, other in zip(ours, theirs, strict=True)]
    assert sum(equal) >= len(PROMPTS) - 1
    assert {one[0].finish_reason for one in ours} == {one[0].finish_reason for one in theirs}


def test_a_stop_string_ends_a_completion_and_is_cut(engine, here):
    whole = here.sample(PROMPTS, GREEDY)
    stop = whole[0][0].text[5:8]
    params = SamplingParams(max_tokens=24, stop=(stop,))
    (completion,) = engine.sample(PROMPTS[:1], params)[0]
    assert completion.finish_reason == "stop"
    assert completion.text == whole[0][0].text[: whole[0][0].text.index(stop)]
    assert len(completion.token_ids or ()) < 24


def test_a_prefix_is_continued_like_the_whole_completion(engine):
    whole = [samples[0].token_ids for samples in engine.sample(PROMPTS[:4], GREEDY)]
    prefix_tokens = [ids[:7] for ids in whole]
    again = engine.sample(PROMPTS[:4], GREEDY, prefix_tokens=prefix_tokens)
    same = [samples[0].token_ids == ids for samples, ids in zip(again, whole, strict=True)]
    assert sum(same) >= 3


def test_a_prefix_that_has_ended_is_returned_unchanged(engine):
    end = engine._eos[0]
    seen = []
    (samples,) = engine.sample(
        PROMPTS[:1], DRAWN, prefix_tokens=[(5, 6, end)], progress=seen.append
    )
    assert [one.token_ids for one in samples] == [(5, 6, end)] * 3
    assert {one.finish_reason for one in samples} == {"stop"}
    assert sum(seen) == 3


def test_draws_depend_on_seed_key_and_index_alone(engine):
    keys = [f"p{place}" for place in range(len(PROMPTS))]
    together = engine.sample(PROMPTS, DRAWN, keys=keys)
    alone = engine.sample(PROMPTS[4:5], DRAWN, keys=keys[4:5])
    later = engine.sample(PROMPTS[4:5], SamplingParams(
        n=2, first=1, temperature=1.0, max_tokens=24, seed=1), keys=keys[4:5])  # fmt: skip
    assert [one.token_ids for one in alone[0]] == [one.token_ids for one in together[4]]
    assert [one.token_ids for one in later[0]] == [one.token_ids for one in together[4][1:]]
    other = engine.sample(PROMPTS, SamplingParams(n=3, temperature=1.0, max_tokens=24, seed=2), keys=keys)  # fmt: skip
    assert other != together
    assert len({one.token_ids for samples in together for one in samples}) == 3 * len(PROMPTS)


def test_many_long_prompts_with_seeds_do_not_bring_the_engine_down(engine):
    """On a CPU, vLLM 0.32 cannot draw by seed where a prompt is read in parts."""
    prompts = [f"{number}: " + "Q: What is 12 + 7?\nA: 19.\n\n" * 14 for number in range(40)]
    drawn = SamplingParams(n=2, temperature=0.7, max_tokens=8)
    session = session_of(engine)
    assert all(len(samples) == 2 for samples in engine.sample(prompts, drawn))
    assert session_of(engine) == session


def test_progress_counts_every_completion_once(engine):
    message_text = []
    engine.sample(PROMPTS, DRAWN, progress=message_text.append)
    assert sum(message_text) == 3 * len(PROMPTS)


def test_calls_from_several_threads_get_their_own_answers(engine):
    expected = [engine.sample([prompt], GREEDY) for prompt in PROMPTS[:6]]
    got: dict[int, list] = {}

    def ask(place: int) -> None:
        got[place] = engine.sample([PROMPTS[place]], GREEDY)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[place] for place in range(6)] == expected


def test_a_prompt_that_does_not_fit_is_refused_by_its_key(engine):
    with pytest.raises(ValueError, match=r"prompt of 'p7' has .* more than the 512"):
        engine.check(["word " * 600], GREEDY, ["p7"])
    with pytest.raises(ValueError, match="token ids from 0 to 312, got 9999"):
        engine.sample(PROMPTS[:1], GREEDY, prefix_tokens=[(9999,)])


def test_an_engine_that_dies_is_started_once_more_and_asked_for_what_is_missing(
    wide_model_dir: Path, tmp_path: Path
):
    problems = [Problem(f"p{number}", f"What is {number} + 1?", str(number + 1)) for number in range(160)]  # fmt: skip
    style = PromptStyle("plain", stop=())
    params = SamplingParams(n=6, temperature=1.0, max_tokens=100, seed=3)
    message_text: list[int] = []
    with open_sampler("vllm", str(wide_model_dir), dtype="float32") as sampler:
        undisturbed = collect(sampler, problems, style, params, store=tmp_path / "a.jsonl")
        first = session_of(sampler)

        def advance(count: int) -> None:
            message_text.append(count)
            if sum(message_text) == 100:  # in mid-run, its worker goes
                os.kill(max(processes(first)), signal.SIGKILL)

        disturbed = collect(
            sampler, problems, style, params, store=tmp_path / "b.jsonl", progress=advance
        )
        second = session_of(sampler)
        assert first != second
        assert not processes(first)
        assert sum(message_text) == len(disturbed) == 960  # nothing twice
        same = [a.token_ids == b.token_ids for a, b in zip(disturbed, undisturbed, strict=True)]
        assert sum(same) >= 940  # batches differ, so may a rounding
        assert read_rollouts(tmp_path / "b.jsonl") == disturbed
        os.kill(second, signal.SIGKILL)  # the first process of its session, the others live on
        with pytest.raises(
            ChildProcessError, match=r"(?s)already been restarted once.*repeat the command"
        ):
            sampler.sample(PROMPTS, DRAWN)
            time.sleep(1)
            sampler.sample(PROMPTS, DRAWN)
    assert not processes(second)


def test_nothing_is_left_of_a_closed_engine(wide_model_dir: Path):
    sampler = open_sampler("vllm", str(wide_model_dir), dtype="float32")
    session = session_of(sampler)
    assert len(processes(session)) >= 2
    errors: list[Exception] = []

    def ask() -> None:
        try:
            sampler.sample(PROMPTS, SamplingParams(n=50, temperature=1.0, max_tokens=400))
        except ChildProcessError as error:
            errors.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.5)
    sampler.close()
    asking.join(timeout=10)
    assert not asking.is_alive() and len(errors) == 1
    assert not processes(session)  # at once: `close` waits for it


def test_the_engine_ends_with_a_parent_that_is_killed(wide_model_dir: Path):
    code = (
        "import os, time\nfrom selftaught.samplers import open_sampler\n"
        f"sampler = open_sampler('vllm', {str(wide_model_dir)!r}, dtype='float32')\n"
        "print(os.getsid(sampler._child._process.pid), flush=True)\ntime.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        session = int(parent.stdout.readline())
        assert processes(session)
        parent.kill()
    deadline = time.monotonic() + 20
    while processes(session) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not processes(session)


def test_an_engine_that_cannot_start_says_why(wide_model_dir: Path, monkeypatch):
    with pytest.raises(ValueError, match=r"'vllm' has no option 'no_such_option'"):
        open_sampler("vllm", str(wide_model_dir), no_such_option=1)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "100000")
    with pytest.raises(
        ChildProcessError,
        match=r"vLLM did not start .* ended with exit code 1.*KVCACHE_SPACE, in GiB",
    ):
        open_sampler("vllm", str(wide_model_dir), dtype="float32")


def test_a_stop_string_inside_a_thought_does_not_end_a_completion(engine, wide_model_dir: Path):
    """The engine stops there; the completion goes on from its tokens, to where it goes without stops."""
    prompts = ["Q: What is 3 + 5?\nA: <think>", "Q: What is 3 + 5?\nA:"]
    prefix_tokens = [
        (),
        tuple(engine._tokenizer("<think>so ", add_special_tokens=False)["input_ids"]),
    ]
    free = SamplingParams(max_tokens=40)
    whole = [samples[0] for samples in engine.sample(prompts, free, prefix_tokens=prefix_tokens)]
    stop = [one.text[12:14] for one in whole]
    again = engine.sample(
        prompts, SamplingParams(max_tokens=40, stop=tuple(stop)), prefix_tokens=prefix_tokens
    )
    for (one,), other in zip(again, whole, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    assert [one.thought_open for (one,) in again] == [True, False]

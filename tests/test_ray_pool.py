"""The pool of samplers on real Ray clusters: one on this machine, and one of several nodes."""

import importlib.util
import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from selftaught.models.embedded import embedded_model
from selftaught.processes import ray_cluster as cluster
from selftaught.prompts import PromptStyle
from selftaught.records import Problem, Rollout, read_rollouts
from selftaught.rollouts.store import collect
from selftaught.samplers import SamplingParams, open_sampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray leaves its pipes to the collector
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

MODEL = str(embedded_model())
PROBLEMS = [
    Problem(f"{a}+{b}", f"{a}+{b}", str(a + b)) for a in range(10, 60) for b in range(10, 60, 6)
]
STYLE = PromptStyle("plain", question="{question}", stop=())
GREEDY = SamplingParams(max_tokens=40)
DRAWN = SamplingParams(n=4, temperature=1.0, max_tokens=60, seed=5)


def collected(sampler, store: Path, params: SamplingParams, **more) -> list[Rollout]:
    return collect(sampler, PROBLEMS, STYLE, params, store=store, **more)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Rollout]]:
    """What one sampler in this process gives, in batches as large as a chunk."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with open_sampler("transformers", MODEL) as sampler:
        return {
            "greedy": collected(sampler, folder / "greedy.jsonl", GREEDY),
            "drawn": collected(sampler, folder / "drawn.jsonl", DRAWN),
        }


@pytest.fixture(scope="module")
def pool() -> Iterator:
    import ray

    ray.init("local", num_cpus=2, logging_level=logging.ERROR, log_to_driver=False, include_dashboard=False,
             runtime_env={"env_vars": cluster._environment()})  # fmt: skip
    try:
        with open_sampler("ray", MODEL, workers=2) as sampler:
            yield sampler
    finally:
        ray.shutdown()


def once_after(count: int, do: Callable[[], None]) -> tuple[Callable[[int], None], Counter]:
    """A progress that does something once when so many completions have been finished."""
    message_text: Counter = Counter()
    lock = threading.Lock()

    def progress(finished: int) -> None:
        with lock:
            message_text["finished"] += finished
            due = message_text["finished"] >= count and not message_text["done"]
            message_text["done"] += due
        if due:
            do()

    return progress, message_text


def same_words(some: list[Rollout], others: list[Rollout]) -> int:
    """How many are equal, tokens and all; ids and indices must be, in their order."""
    pairs = list(zip(some, others, strict=True))
    assert all((a.problem.id, a.index) == (b.problem.id, b.index) for a, b in pairs)
    return sum(a.token_ids == b.token_ids and a.completion == b.completion for a, b in pairs)


@pytest.mark.parametrize(("kind", "params"), [("greedy", GREEDY), ("drawn", DRAWN)])
def test_a_pool_gives_what_one_sampler_gives(pool, undisturbed, tmp_path: Path, kind, params):
    """Batches differ, so a rounding may; the draws do not."""
    message_text: list[int] = []
    rollouts = collected(pool, tmp_path / "pool.jsonl", params, progress=message_text.append)
    assert same_words(rollouts, undisturbed[kind]) >= 0.998 * len(rollouts)
    assert sum(message_text) == len(rollouts)
    assert len(set(pool.processes)) == 2


@pytest.mark.parametrize(("kind", "params"), [("greedy", GREEDY), ("drawn", DRAWN)])
def test_an_actor_killed_in_mid_run_is_replaced_and_nothing_changes(
    pool, tmp_path: Path, kind, params
):
    whole = collected(pool, tmp_path / "whole.jsonl", params)
    before = pool.processes

    def kill() -> None:
        os.kill(before[0], signal.SIGKILL)

    progress, message_text = once_after(len(whole) // 3, kill)
    rollouts = collected(pool, tmp_path / "killed.jsonl", params, progress=progress)
    assert message_text["done"] == 1
    assert rollouts == whole  # to the last token: chunks are cut by order alone
    assert message_text["finished"] == len(whole)  # nothing was finished twice
    assert read_rollouts(tmp_path / "killed.jsonl") == whole
    assert before[0] not in pool.processes


def test_a_driver_that_is_stopped_continues_in_the_same_store(pool, tmp_path: Path):
    whole = collected(pool, tmp_path / "whole.jsonl", DRAWN)

    class Stopped(Exception):
        pass

    def stop() -> None:
        raise Stopped

    progress, _ = once_after(len(whole) // 2, stop)
    store = tmp_path / "stopped.jsonl"
    with pytest.raises(Stopped):
        collected(pool, store, DRAWN, progress=progress)
    stored = read_rollouts(store)
    assert 0 < len(stored) < len(whole)
    asked: list[int] = []
    assert collected(pool, store, DRAWN, progress=asked.append) == whole
    assert asked[0] == len(stored)
    assert sum(asked) == len(whole)


def test_prefixes_are_continued_in_the_pool_as_elsewhere(pool, undisturbed):
    first = undisturbed["greedy"][:70]
    prompts = [rollout.prompt for rollout in first]
    prefix_tokens = [(rollout.token_ids or ())[:5] for rollout in first]
    again = pool.sample(prompts, GREEDY, prefix_tokens=prefix_tokens)
    whole = [rollout.token_ids for rollout in first]
    assert sum(one[0].token_ids == ids for one, ids in zip(again, whole, strict=True)) >= 69


def test_what_an_engine_refuses_is_said_in_its_own_words(pool, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^The prompt of 'long' has .* tokens"):
        pool.check(["1" * 600], GREEDY, ["long"])
    with pytest.raises(ValueError, match="token ids from 0 to 97, got 999"):
        pool.sample(["1+1"], GREEDY, prefix_tokens=[(999,)])
    assert pool.sample(["1+1"], GREEDY)[0][0].text  # and it goes on
    with pytest.raises(ValueError, match=r"10 workers .* need 10 CPU, .* has 2 CPU on 1 node"):
        open_sampler("ray", MODEL, workers=10)
    with pytest.raises(ValueError, match="no option 'sizes'"):
        open_sampler("ray", MODEL, workers=1, cpus=0, sizes=3)
    with pytest.raises(ValueError, match="got engine='ray'"):
        open_sampler("ray", MODEL, engine="ray")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match=r"config\.json"):
        open_sampler("ray", str(tmp_path / "nothing"), workers=1, cpus=0)


def test_a_path_that_a_node_does_not_see_is_named(pool):
    with pytest.raises(ValueError, match=r"1 of 1 do not: .* does not see /no/such/folder"):
        cluster.check_visible(["/no/such/folder"])


def test_actors_that_died_while_nothing_was_asked_are_replaced(pool, undisturbed, tmp_path: Path):
    before = pool.processes
    for process in before:
        os.kill(process, signal.SIGKILL)
    pool.check(["1+1"], GREEDY, ["p"])
    rollouts = collected(pool, tmp_path / "after.jsonl", GREEDY)
    assert same_words(rollouts, undisturbed["greedy"]) >= 0.998 * len(rollouts)
    assert not set(before) & set(pool.processes)


def empty_pool():
    """A pool without a cluster, whose parts are put together by hand."""
    from selftaught.samplers.ray_pool import RaySampler

    pool = object.__new__(RaySampler)
    pool.model, pool.fingerprint, pool._error, pool._failed_starts = "m", "aaaa", None, 0
    pool._lock, pool._queue, pool._actors = threading.Condition(), deque(), []
    return pool


def test_an_answer_that_comes_after_its_actor_was_given_up_is_not_taken_twice(monkeypatch):
    """Two chunks of one actor: the first tells of its death, the second was answered before it."""
    import ray
    from ray.exceptions import ActorDiedError

    from selftaught.samplers.ray_pool import _Actor, _Chunk

    pool, fresh = empty_pool(), _Actor(None, None)
    first, second = (_Chunk(([name], GREEDY, [name], None)) for name in ("1+1", "2+2"))
    actor = _Actor(None, None, ready=True, chunks=[first, second])
    pool._actors, pool._started = [actor], lambda: fresh

    def get(ref):
        if ref == "dead":
            raise ActorDiedError()
        return [["late"]]

    monkeypatch.setattr(ray, "get", get)
    pool._take("dead", actor, first)
    pool._take("late", actor, second)
    pool._take("dead", actor, second)
    assert [chunk.asked[2] for chunk in pool._queue] == [["1+1"], ["2+2"]]
    assert not second.answer.done()
    assert pool._actors == [fresh]


def test_a_replacement_with_other_weights_ends_the_run_in_words():
    from selftaught.samplers.ray_pool import _Actor

    pool = empty_pool()
    newcomer = _Actor(None, None)
    pool._joined(newcomer, "bbbb")
    assert isinstance(pool._error, ValueError) and "other weights of m (bbbb, not aaaa)" in str(
        pool._error
    )
    assert not newcomer.ready

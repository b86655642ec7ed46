"""What all engines share: units in hand at the same time, and what is missing said in words."""

import importlib.util
import sys
import threading
import time
from pathlib import Path

import pytest

from selftaught.processes import ray_cluster as cluster
from selftaught.prompts import PromptStyle
from selftaught.records import Problem, read_rollouts
from selftaught.rollouts import store as rollouts
from selftaught.rollouts.store import collect
from selftaught.samplers import SamplingParams, open_sampler
from selftaught.samplers.scripted import ScriptedSampler
from selftaught.samplers.vllm_engine import _calls_that_fill, _hint

STYLE = PromptStyle("plain", question="{question}", stop=())
PROBLEMS = [Problem(f"p{number}", str(number), "0") for number in range(60)]


class Several(ScriptedSampler):
    """Serves three calls at a time, and notes how many it had at once; later units end first."""

    at_once = 3

    def __init__(self, *, fails_at: str | None = None) -> None:
        super().__init__(lambda prompt, index: f"{prompt}/{index}")
        self.inside, self.most = 0, 0
        self._fails_at, self._lock = fails_at, threading.Lock()

    def sample(self, prompts, params, **more):
        with self._lock:
            self.inside += 1
            self.most = max(self.most, self.inside)
        time.sleep(0.02 + 0.05 * (int(str(prompts[0])) % 20 == 0))
        try:
            if self._fails_at in prompts:
                raise ValueError(f"no answer to {self._fails_at}")
            return super().sample(prompts, params, **more)
        finally:
            with self._lock:
                self.inside -= 1


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollouts, "STORE_BATCH", 10)


def test_units_in_hand_at_once_are_stored_in_their_order(tmp_path: Path):
    sampler, message_text = Several(), []
    params = SamplingParams(n=2, temperature=1.0)
    got = collect(
        sampler, PROBLEMS, STYLE, params, store=tmp_path / "r.jsonl", progress=message_text.append
    )
    assert sampler.most == 3
    assert [one.completion for one in got] == [f"{n}/{i}" for n in range(60) for i in range(2)]
    assert read_rollouts(tmp_path / "r.jsonl") == got
    assert sum(message_text) == 120


def test_a_unit_that_fails_leaves_the_ones_before_it_and_the_run_continues(tmp_path: Path):
    store, params = tmp_path / "r.jsonl", SamplingParams(n=2, temperature=1.0)
    with pytest.raises(ValueError, match="no answer to 27"):
        collect(Several(fails_at="27"), PROBLEMS, STYLE, params, store=store)
    # units of five problems: 27 stands in the sixth, so five whole ones are there
    assert [one.completion for one in read_rollouts(store)] == [f"{n}/{i}" for n in range(25) for i in range(2)]  # fmt: skip
    sampler, message_text = Several(), []
    got = collect(sampler, PROBLEMS, STYLE, params, store=store, progress=message_text.append)
    assert [one.completion for one in got] == [f"{n}/{i}" for n in range(60) for i in range(2)]
    assert message_text[0] == 50
    assert sum(message_text) == 120
    assert len(sampler.asked) == 35


def test_an_engine_that_is_not_installed_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *more: None if name == "vllm" else found(name, *more),
    )
    with pytest.raises(ImportError, match=r'pip install "selftaught\[vllm\]"'):
        open_sampler("vllm", "anything")
    monkeypatch.setitem(sys.modules, "ray", None)  # an import of it fails from here on
    with pytest.raises(ImportError, match=r'pip install "selftaught\[ray\]"'):
        cluster.connect()


def test_a_sampler_of_no_name_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"'vlm'; there are: transformers, vllm"):
        open_sampler("vlm", "anything")


def test_an_adapter_without_its_base_is_refused_to_vllm(tmp_path: Path):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="merge it into its base"):
        open_sampler("vllm", str(tmp_path))


@pytest.mark.parametrize(
    ("printed", "advice"),
    [
        ("ValueError: Free memory on device cuda:0 (3.1/79.1 GiB) on startup is less than desired GPU "
         "memory utilization (0.9, 71.2 GiB).", "--sampler-options.gpu-memory-utilization"),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.", "memory is in use"),
        ("ValueError: No available memory for the cache blocks.", "--sampler-options.max-model-len"),
        ("Unsupported CPU attention configuration: head_dim=24 isa=1 kv_cache_idx=0", "--sampler transformers"),
        ("something else altogether", ""),
    ],
)  # fmt: skip
def test_what_vllm_prints_about_memory_becomes_advice(printed: str, advice: str):
    assert advice in _hint(printed)
    assert bool(_hint(printed)) == bool(advice)


@pytest.mark.parametrize(("requests", "calls"), [(256, 4), (1024, 4), (1025, 5), (8 * 1024, 32)])
def test_calls_at_once_keep_every_replica_of_vllm_full(requests: int, calls: int):
    """A call asks for 512 completions; twice what eight H100 take at a time are 16,384."""
    assert _calls_that_fill(requests) == calls

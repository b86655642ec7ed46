"""The pool of samplers on a Ray cluster whose nodes are processes of their own."""

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_ray_pool import DRAWN, GREEDY, MODEL, collected, once_after

from selftaught.processes import ray_cluster as cluster
from selftaught.records import read_rollouts
from selftaught.samplers import open_sampler

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.mark.parametrize(("kind", "params"), [("greedy", GREEDY), ("drawn", DRAWN)])
def test_a_node_killed_in_mid_run_loses_nothing(tmp_path: Path, kind, params):
    """Two nodes, each a process of its own with one worker; one of them is killed, another joins."""
    import ray
    from ray.cluster_utils import Cluster

    ray.shutdown()
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1}, connect=False)
    try:
        second = nodes.add_node(num_cpus=1)
        with open_sampler("ray", MODEL, workers=2, address=nodes.address) as pool:
            assert sum(node["Alive"] for node in ray.nodes()) == 2
            whole = collected(pool, tmp_path / "whole.jsonl", params)

            due = threading.Event()
            progress, message_text = once_after(len(whole) // 3, due.set)
            with ThreadPoolExecutor(1) as other:
                store = tmp_path / "killed.jsonl"
                running = other.submit(collected, pool, store, params, progress=progress)
                due.wait(timeout=60)
                nodes.remove_node(second, allow_graceful=False)
                nodes.add_node(num_cpus=1)
                rollouts = running.result(timeout=240)
            assert message_text == {"finished": len(whole), "done": 1}
            assert rollouts == whole
            assert read_rollouts(tmp_path / "killed.jsonl") == whole
    finally:
        ray.shutdown()
        nodes.shutdown()


def test_no_cluster_at_an_address_is_said_at_once():
    with pytest.raises(
        ConnectionError, match=r"No Ray cluster answered at 127\.0\.0\.1:9: .*ray start"
    ):
        cluster.connect("127.0.0.1:9")

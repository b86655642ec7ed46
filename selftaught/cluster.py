"""The Ray cluster: connecting to it, what it has, and functions that run on it. The door to Ray.

Where a cluster runs here or RAY_ADDRESS names one, it is used; otherwise, and with RAY_ADDRESS=local,
Ray starts on this machine and ends with this process.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def connected() -> Iterator[Any]:
    """The module `ray`, connected to a cluster.

    Raises:
        ImportError: Ray is not installed.
        ValueError: RAY_ADDRESS names a cluster that cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        raise ImportError('Ray is not installed: pip install "selftaught[ray]"') from None
    here = str(Path(__file__).resolve().parent.parent)
    paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    seen = {"PYTHONPATH": paths, "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        try:  # as Ray has it: RAY_ADDRESS, a cluster that runs here, or one of its own
            ray.init(logging_level=logging.WARNING, runtime_env={"env_vars": seen})
        except ConnectionError as error:
            raise ValueError(
                f"No Ray cluster answers at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}. "
                'Start one with `ray start --head`, or set RAY_ADDRESS to "local" for one on this '
                "machine."
            ) from None
        yield ray
    finally:
        ray.shutdown()


def run_workers(
    work: Callable[[str], None], given: str, count: int, storage: Path, paths: Sequence[str]
) -> None:
    """Run `work(given)` in `count` processes of one torch.distributed world, by Ray Train.

    Args:
        work: a function that Ray's workers can import.
        storage: a folder of all nodes, for Ray Train's own files.
        paths: files and folders that every node must see; names of the Hub are passed over.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the cluster has too little, or a node does not see a path.
    """
    with connected() as ray:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        gpus = ray.cluster_resources().get("GPU", 0)
        refuse_too_little(ray.cluster_resources(), "GPU" if gpus else "CPU", count)
        refuse_unseen(ray, [str(Path(one).absolute()) for one in [given, *paths] if Path(one).exists()])  # fmt: skip
        TorchTrainer(
            _loop,
            train_loop_config={"work": work, "given": str(Path(given).absolute())},
            scaling_config=ScalingConfig(num_workers=count, use_gpu=bool(gpus)),
            run_config=RunConfig(storage_path=str(storage.absolute()), name="train"),
        ).fit()


def refuse_too_little(resources: dict[str, float], kind: str, count: int) -> None:
    """Refuse more workers than the cluster has places for.

    Raises:
        ValueError: says what is there.
    """
    there = int(resources.get(kind, 0))
    if count > there:
        raise ValueError(
            f"{count} processes want a {kind} each, and the Ray cluster has {there}. Give "
            f"--num-processes {there} or fewer, or add nodes with `ray start --address HEAD`."
        )


def refuse_unseen(ray: Any, paths: Sequence[str]) -> None:
    """Refuse files and folders that a node of the cluster does not see.

    Raises:
        ValueError: says which node and which path.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0)(_unseen)
    asked = {
        node["NodeManagerAddress"]: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(list(paths))
        for node in ray.nodes()
        if node["Alive"]
    }
    for node, answer in asked.items():
        if unseen := ray.get(answer):
            raise ValueError(
                f"The node {node} of the Ray cluster does not see {', '.join(unseen)}. Models, rows "
                "and results must lie on a disk that all nodes share; give another --out, or a "
                "cluster of this machine alone."
            )


def _unseen(paths: list[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]


def _loop(config: dict[str, Any]) -> None:
    """What a worker of Ray Train does."""
    from ray.train import get_context

    os.environ["RANK"] = str(get_context().get_world_rank())
    config["work"](config["given"])

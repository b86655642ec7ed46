"""A Ray cluster: connected to, asked what it has and what its nodes can see, and given a training.

Where RAY_ADDRESS names a cluster, or one runs on this machine, it is used; otherwise, and with
RAY_ADDRESS=local, Ray starts here and ends with this process.
"""

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
_WORKERS = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


def connect(address: str | None = None) -> bool:
    """Connect to a cluster; returns whether this call did it, and is to be ended by `disconnect`.

    Args:
        address: of a cluster's head, such as "10.0.0.1:6379"; None: that of RAY_ADDRESS, or a cluster
            that runs on this machine, or else one is started here for as long as this process runs.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    check_installed()
    import ray

    if ray.is_initialized():
        return False
    from ray.exceptions import AuthenticationError

    where = address or os.environ.get("RAY_ADDRESS")
    try:
        _answers(where)
        ray.init(
            address, logging_level=logging.ERROR, log_to_driver=False,
            runtime_env={"env_vars": _environment()},
        )  # fmt: skip
    except AuthenticationError as error:
        raise ConnectionError(
            f"The Ray cluster at {where} wants a token: set RAY_AUTH_MODE=token, and see that the token of "
            f"its head is in ~/.ray/auth_token here ({' '.join(str(error).split())[:200]})."
        ) from None
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # another version of Ray or Python, for one
        raise ConnectionError(
            f"No Ray cluster answered at {where}: {error}. Start "
            "one with `ray start --head`, or give the address of its head."
        ) from None
    return True


def check_installed() -> None:
    """Raise an ImportError that says how to install Ray, if it is not."""
    if find_spec("ray") is None:
        raise ImportError('Ray is not installed: pip install "selftaught[ray]".')


def _answers(address: str | None) -> None:
    """Refuse an address of host and port where nobody listens: Ray itself would try for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def disconnect() -> None:
    """Leave the cluster; one that was started by this process ends."""
    import ray

    ray.shutdown()


def _environment() -> dict[str, str]:
    """What a worker needs of this process's environment: where this package is, in a checkout."""
    root = Path(__file__).resolve().parents[2]
    found = _QUIET | _WORKERS
    if not any(part in ("site-packages", "dist-packages") for part in root.parts):
        found["PYTHONPATH"] = os.pathsep.join([str(root), *_given("PYTHONPATH")])
    return found


def _given(name: str) -> list[str]:
    return [value] if (value := os.environ.get(name)) else []


def check_resources(workers: int, each: Mapping[str, float]) -> None:
    """Refuse more workers than the cluster can hold.

    Raises:
        ValueError: says what is there.
    """
    import ray

    there = ray.cluster_resources()
    short = {name: count for name, count in each.items() if workers * count > there.get(name, 0)}
    if short:
        wanted = ", ".join(f"{workers * count:g} {name}" for name, count in short.items())
        has = ", ".join(f"{there.get(name, 0):g} {name}" for name in each)
        nodes = sum(node["Alive"] for node in ray.nodes())
        raise ValueError(
            f"{workers} workers of {', '.join(f'{n:g} {name}' for name, n in each.items())} each need "
            f"{wanted}, and the Ray cluster has {has} on {nodes} node{'s' * (nodes != 1)}. Ask for fewer "
            "workers or less for each, or add nodes."
        )


def check_visible(paths: Sequence[str]) -> None:
    """Make sure that every living node sees these files and folders, before work begins.

    Raises:
        ValueError: names the nodes that do not, and what they miss.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0)(_missing)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = {
        name: look.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)
        ).remote(list(paths))
        for name in nodes
    }
    blind = {}
    for name, ref in asked.items():
        try:
            missing = ray.get(ref)
        except RayError as error:
            raise ConnectionError(f"The node {nodes[name]} of the Ray cluster cannot run anything: {error}") from None  # fmt: skip
        if missing:
            blind[nodes[name]] = missing
    if blind:
        told = "; ".join(f"{node} does not see {', '.join(map(str, what))}" for node, what in blind.items())  # fmt: skip
        raise ValueError(
            f"Every node of the Ray cluster must see the files of a run, and {len(blind)} of "
            f"{len(nodes)} do not: {told}. Put them into a folder that all nodes share, at the same path."
        )


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
        ConnectionError: there is no cluster at RAY_ADDRESS.
        ValueError: the cluster has too little, or a node does not see a path.
    """
    connect()
    try:
        import ray
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        gpu = bool(ray.cluster_resources().get("GPU"))
        check_resources(count, {"GPU" if gpu else "CPU": 1})
        check_visible([str(Path(one).absolute()) for one in [given, *paths] if Path(one).exists()])
        TorchTrainer(
            _loop,
            train_loop_config={"work": work, "given": str(Path(given).absolute())},
            scaling_config=ScalingConfig(num_workers=count, use_gpu=gpu),
            run_config=RunConfig(storage_path=str(storage.absolute()), name="train"),
        ).fit()
    finally:
        disconnect()


def _loop(config: dict[str, Any]) -> None:
    """What a worker of Ray Train does."""
    from ray.train import get_context

    os.environ["RANK"] = str(get_context().get_world_rank())
    config["work"](config["given"])


def _missing(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]

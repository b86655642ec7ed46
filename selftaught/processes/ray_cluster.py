"""Ray clusters: connecting, checking resources and shared files, and running distributed training.

If RAY_ADDRESS names a cluster, or a cluster runs on this machine, it is used. Otherwise, or with
RAY_ADDRESS=local, a local Ray instance is started that ends with this process.
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
    """Connect to a Ray cluster.

    Args:
        address: Address of the cluster's head node, such as "10.0.0.1:6379". None means the cluster in
            RAY_ADDRESS, or one on this machine, or a new local instance.

    Returns:
        Whether this call connected. If so, the caller must call `disconnect`.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: There is no cluster at the address.
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
        _check_reachable(where)
        ray.init(
            address, logging_level=logging.ERROR, log_to_driver=False,
            runtime_env={"env_vars": _environment()},
        )  # fmt: skip
    except AuthenticationError as error:
        raise ConnectionError(
            f"The Ray cluster at {where} requires a token. Set RAY_AUTH_MODE=token, and copy the "
            "head node's ~/.ray/auth_token to this machine "
            f"({' '.join(str(error).split())[:200]})."
        ) from None
    # For example, ray.init raises RuntimeError if the versions of Ray or Python differ.
    except (OSError, ValueError, RuntimeError) as error:
        raise ConnectionError(
            f"No Ray cluster answered at {where}: {error}. Start one with `ray start --head`, or "
            "give the address of its head node."
        ) from None
    return True


def check_installed() -> None:
    """Raise an ImportError with the installation command if Ray is not installed."""
    if find_spec("ray") is None:
        raise ImportError('Ray is not installed: pip install "selftaught[ray]".')


def _check_reachable(address: str | None) -> None:
    """Raise if nothing listens at an address HOST:PORT; Ray itself would retry for minutes."""
    host, colon, port = (address or "").rpartition(":")
    if colon and port.isdecimal() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def disconnect() -> None:
    """Disconnect from the cluster. A local instance started by this process ends."""
    import ray

    ray.shutdown()


def _environment() -> dict[str, str]:
    """Return environment variables for workers, with PYTHONPATH for a source checkout."""
    root = Path(__file__).resolve().parents[2]
    environment = _QUIET | _WORKERS
    if not any(part in ("site-packages", "dist-packages") for part in root.parts):
        own = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *([own] if own else [])])
    return environment


def check_resources(workers: int, each: Mapping[str, float]) -> None:
    """Check that the cluster has the resources for a number of workers.

    Args:
        workers: Number of workers.
        each: Resources of one worker, such as `{"CPU": 1, "GPU": 1}`.

    Raises:
        ValueError: It has not. The message names required and available resources.
    """
    import ray

    available = ray.cluster_resources()
    short = {name: n for name, n in each.items() if workers * n > available.get(name, 0)}
    if short:
        wanted = ", ".join(f"{workers * count:g} {name}" for name, count in short.items())
        has = ", ".join(f"{available.get(name, 0):g} {name}" for name in each)
        nodes = sum(node["Alive"] for node in ray.nodes())
        raise ValueError(
            f"{workers} workers of {', '.join(f'{n:g} {name}' for name, n in each.items())} each "
            f"need {wanted}, and the Ray cluster has {has} on {nodes} node{'s' * (nodes != 1)}. "
            "Use fewer workers, fewer resources per worker, or add nodes."
        )


def check_visible(paths: Sequence[str]) -> None:
    """Check that files and folders exist on every node of the cluster.

    Raises:
        ValueError: A node lacks one. The message names the nodes and the missing paths.
        ConnectionError: A node cannot run tasks.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    find_missing = ray.remote(num_cpus=0)(_missing)
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    tasks = {
        name: find_missing.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)
        ).remote(list(paths))
        for name in nodes
    }
    incomplete = {}
    for name, ref in tasks.items():
        try:
            missing = ray.get(ref)
        except RayError as error:
            raise ConnectionError(
                f"The node {nodes[name]} of the Ray cluster cannot run tasks: {error}"
            ) from None
        if missing:
            incomplete[nodes[name]] = missing
    if incomplete:
        details = "; ".join(
            f"{node} does not see {', '.join(map(str, absent))}"
            for node, absent in incomplete.items()
        )
        raise ValueError(
            f"Every node of the Ray cluster must see the files of a run, but {len(incomplete)} of "
            f"{len(nodes)} do not: {details}. Put the files into a folder that all nodes share, at "
            "the same path."
        )


def run_workers(
    work: Callable[[str], None], given: str, count: int, storage: Path, paths: Sequence[str]
) -> None:
    """Run `work(given)` in `count` processes of one torch.distributed job with Ray Train.

    Args:
        work: A function that Ray's workers can import.
        given: Its argument: the path of a file that every node must see.
        count: Number of processes. Each gets one GPU if the cluster has GPUs, otherwise one CPU.
        storage: A folder shared by all nodes, for Ray Train's own files.
        paths: Files and folders that every node must see. Names on the Hub are skipped.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: There is no cluster at RAY_ADDRESS.
        ValueError: The cluster has too few resources, or a node does not see a path.
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
    """Entry point of a Ray Train worker."""
    from ray.train import get_context

    os.environ["RANK"] = str(get_context().get_world_rank())
    config["work"](config["given"])


def _missing(paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not Path(path).exists()]

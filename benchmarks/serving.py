"""`selftaught serve` beside `transformers serve`, and its own costs, on the prompts of STaR.

    python benchmarks/serving.py --model models/smollm2
    python benchmarks/serving.py --model models/smollm2 --what best-of-n
    python benchmarks/serving.py --what soak --requests 10000

Every prompt has the worked examples of chain_sum before a question of its own. "rate" compares requests
per second and the time to the first token at several numbers of clients, in turn on both servers.
"best-of-n" compares a request for the best of 16 candidates with sampling 16 candidates offline. "soak"
sends requests of which a third is given up at a random time, and prints the rows in use and the memory.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from selftaught.models.embedded import embedded_model
from selftaught.samplers import SamplingParams, open_sampler
from selftaught.tasks import open_task

PORTS = {"selftaught": 8123, "transformers": 8124}
NEW = 48


def workload(count: int) -> tuple[list[str], list[str]]:
    """Return few-shot prompts with different questions, and the stop strings of their completions."""
    config = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
    task = open_task("gym", name="chain_sum", train=3000, validation=10, test=10, config=config)
    texts = [str(task.prompt(one)) for one in list(task.problems("train"))[:count]]
    return texts, list(task.prompt.stop)


class Servers:
    """Servers in processes of their own, all with the same number of threads.

    Args:
        model: model folder.
        threads: number of threads of each.
        names: which ones.
        more: further options of `selftaught serve`.
    """

    def __init__(
        self, model: str, threads: int, names: Sequence[str], more: Sequence[str] = ()
    ) -> None:
        commands = {
            "selftaught": [sys.executable, "-m", "selftaught.cli", "serve", "--model", model,
                           "--served-model-name", "m", "--port", str(PORTS["selftaught"]), *more],
            "transformers": [str(Path(sys.executable).parent / "transformers"), "serve", model,
                             "--port", str(PORTS["transformers"]), "--device", "cpu"],
        }  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._model = model
        self._processes = {
            name: subprocess.Popen(commands[name], env=environment, stdout=subprocess.DEVNULL)
            for name in names
        }
        for name in names:
            self._wait(name)

    def _wait(self, name: str) -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            try:
                with urlopen(f"http://localhost:{PORTS[name]}/health", timeout=1):
                    return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"{name} has not started within 300 seconds.")

    def memory(self, name: str) -> float:
        """Return the resident memory of a server in megabytes."""
        text = Path(f"/proc/{self._processes[name].pid}/status").read_text()
        return int(text.split("VmRSS:")[1].split()[0]) / 1024

    def model(self, name: str) -> str:
        """Return the name of the model in requests."""
        return "m" if name == "selftaught" else self._model

    def close(self) -> None:
        """End the servers."""
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait()


async def request(
    port: int, body: dict[str, Any], give_up: float | None = None
) -> tuple[float, bytes]:
    """Send a request; return the seconds to the first token and the whole response."""
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("localhost", port)
    first, found = 0.0, b""
    try:
        writer.write(head.encode() + data)
        async with asyncio.timeout(give_up):
            while part := await reader.read(65536):
                found += part
                if not first and _has_text(found):
                    first = time.perf_counter() - began
    except TimeoutError:
        pass
    finally:
        writer.close()
    return first, found


def _has_text(found: bytes) -> bool:
    """Return whether a stream has a chunk with text."""
    for line in found.split(b"\n"):
        if line.startswith(b"data: {"):
            try:
                choices = json.loads(line[6:])["choices"]
            except ValueError:
                continue
            if any(one.get("text") for one in choices):
                return True
    return False


async def rate(
    port: int, model: str, texts: Sequence[str], stop: list[str], clients: int
) -> tuple[float, float]:
    """Return requests per second and the median time to the first token."""
    waiting, firsts = list(texts), []

    async def client() -> None:
        while waiting:
            body = {"model": model, "prompt": waiting.pop(), "max_tokens": NEW, "temperature": 0, "stop": stop, "stream": True}  # fmt: skip
            first, found = await request(port, body)
            if not first:
                raise SystemExit(f"no text came: {found[:500]!r}")
            firsts.append(first)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return len(texts) / (time.perf_counter() - began), statistics.median(firsts)


def compare_rates(model: str, threads: int, per_client: int, repeats: int) -> None:
    """Print requests per second and times to the first token of both servers."""
    servers = Servers(model, threads, list(PORTS))
    texts, stop = workload(3000)
    print("| clients | requests | selftaught req/s | transformers req/s | ratio | first token, s | transformers, s | ratio |")  # fmt: skip
    print("|---" * 8 + "|")
    try:
        for name, port in PORTS.items():  # compiles nothing, but opens files and caches the prefix
            asyncio.run(rate(port, servers.model(name), texts[-3:], stop, 1))
        for clients in (1, 8, 32):
            best: dict[str, tuple[float, float]] = {}
            count = max(4, clients * per_client)
            for repeat in range(repeats):
                for name, port in PORTS.items():
                    some = texts[repeat * count : (repeat + 1) * count]
                    speed, first = asyncio.run(rate(port, servers.model(name), some, stop, clients))
                    old = best.get(name, (0.0, float("inf")))
                    best[name] = (max(old[0], speed), min(old[1], first))
            (ours, first), (theirs, other) = best["selftaught"], best["transformers"]
            print(f"| {clients} | {count} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} | {first:.2f} | {other:.2f} | {first / other:.2f} |", flush=True)  # fmt: skip
    finally:
        servers.close()


def compare_best_of_n(model: str, threads: int, repeats: int) -> None:
    """Print the time of a best-of-16 request beside that of sampling 16 candidates offline."""
    import torch

    torch.set_num_threads(threads)
    servers = Servers(model, threads, ["selftaught"], ["--verifier", model, "--n", "16"])
    texts, stop = workload(2 * repeats + 1)
    params = SamplingParams(n=16, temperature=0.7, max_tokens=NEW, stop=tuple(stop))
    online, offline = [], []
    try:
        with open_sampler("transformers", model) as sampler:
            for number, text in enumerate(texts):
                body = {
                    "model": "m",
                    "prompt": text,
                    "max_tokens": NEW,
                    "temperature": 0.7,
                    "stop": stop,
                }
                began = time.perf_counter()
                asyncio.run(request(PORTS["selftaught"], body))
                middle = time.perf_counter()
                sampler.sample([text], params)
                if number:  # the first one computes the shared prefix
                    online.append(middle - began)
                    offline.append(time.perf_counter() - middle)
    finally:
        servers.close()
    ratio = statistics.median(online) / statistics.median(offline)
    print(f"best of 16: {statistics.median(online):.2f} s; 16 candidates offline: {statistics.median(offline):.2f} s; ratio {ratio:.2f} (medians of {len(online)})")  # fmt: skip


async def _soak(port: int, count: int, servers: Servers) -> None:
    draw = random.Random(0)
    left, finished = list(range(count)), list[int]()

    async def client() -> None:
        while left:
            number = left.pop()
            body = {"model": "m", "prompt": f"{number % 97}+{number % 89}", "max_tokens": 30,
                    "n": 1 + number % 3, "stream": number % 2 == 0}  # fmt: skip
            await request(port, body, draw.random() * 0.2 if number % 3 == 0 else None)
            finished.append(number)
            if len(finished) % max(1, count // 10) == 0:
                print(f"{len(finished)} requests: {servers.memory('selftaught'):.1f} MB", flush=True)  # fmt: skip

    await asyncio.gather(*(client() for _ in range(16)))


def soak(model: str, threads: int, count: int) -> None:
    """Send many requests, a third of which are given up."""
    servers = Servers(model, threads, ["selftaught"])
    try:
        asyncio.run(_soak(PORTS["selftaught"], count, servers))
        time.sleep(2)
        with urlopen(f"http://localhost:{PORTS['selftaught']}/health") as response:
            print(response.read().decode(), f"{servers.memory('selftaught'):.1f} MB")
    finally:
        servers.close()


def main() -> None:
    """Run one of the measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--what", choices=["rate", "best-of-n", "soak"], default="rate")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-client", type=int, default=2, help="requests per client")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--requests", type=int, default=10_000, help="requests of the soak")
    args = parser.parse_args()
    match args.what:
        case "rate":
            compare_rates(args.model, args.threads, args.per_client, args.repeats)
        case "best-of-n":
            compare_best_of_n(args.model, args.threads, args.repeats)
        case _:
            soak(args.model, args.threads, args.requests)


if __name__ == "__main__":
    main()

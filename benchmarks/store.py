"""What a row of a store costs at 10,000, 100,000 and a million rows: to append, resume, read, grade, select.

    python benchmarks/store.py [--rows 10000 100000 1000000] [--dir DIR]

Rows are of a realistic size: a prompt of 2 kB with eight worked examples, eight samples to a problem, a
completion of some 300 characters with 100 token ids; a fifth of them are right. The sampler draws
from completions made before, so that the store is measured and not it. Every stage has a process of its
own, whose peak memory is shown, and beside it that of its largest worker process. `resume` is the time from
the start of `fill` to its first question, the last row being torn; "cold" means that the system was asked to
forget the file first. A million rows need 8 GB in DIR, which are removed at the end.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from selftaught.prompts import PromptStyle, bare
from selftaught.records import Completion, Problem, Text, iter_rollouts, read_rollouts
from selftaught.rollouts.store import fill
from selftaught.rollouts.streaming import choose, grade_stores
from selftaught.samplers import SamplingParams
from selftaught.samplers.scripted import ScriptedSampler

SAMPLES, TOKENS, VOCABULARY = 8, 100, 49152
STAGES = ("append", "resume", "resume cold", "read", "read as list", "grade", "select")
NAMES = ("Nora", "Omar", "Lena", "Ida", "Max", "Ada", "Paul", "Ruth")


def shots() -> tuple[Problem, ...]:
    """Eight worked examples, 2 kB as a prompt."""
    return tuple(
        Problem(
            f"shot-{at}",
            f"{name} packs {at + 3} boxes with {at + 5} cards in every box, and {at + 1} cards do not "
            f"fit in. How many cards are there?",
            str((at + 3) * (at + 5) + at + 1),
            f"The boxes hold {at + 3} * {at + 5} = {(at + 3) * (at + 5)} cards. With the {at + 1} that "
            f"do not fit in there are {(at + 3) * (at + 5) + at + 1} cards.\n"
            f"#### {(at + 3) * (at + 5) + at + 1}",
        )
        for at, name in enumerate(NAMES)
    )


STYLE = PromptStyle("few-shot", shots=lambda problem: SHOTS)
SHOTS = shots()


def problems(rows: int) -> list[Problem]:
    """One problem for every eight rows."""
    return [
        Problem(
            f"train-{at}",
            f"{NAMES[at % 8]} has {at} cards and gives {at % 13} of them to each of two friends. "
            "Then three more are found under the table. How many cards are left?",
            str(at - 2 * (at % 13) + 3),
        )
        for at in range(rows // SAMPLES)
    ]


def sampler(asked: Callable[[], object] = lambda: None) -> ScriptedSampler:
    """Answers at once; a fifth of the answers is right.

    Args:
        asked: called before every answer.
    """
    draw = random.Random(0)
    words = ("cards", "stamps", "coins")
    made = [
        (
            " ".join(
                f"Then there are {a} + {b} = {a + b} {draw.choice(words)} on the table."
                for a, b in ((draw.randint(1, 99), draw.randint(1, 99)) for _ in range(6))
            ),
            tuple(draw.randrange(VOCABULARY) for _ in range(TOKENS)),
        )
        for _ in range(4096)
    ]

    def script(prompt: Text, index: int) -> Completion:
        asked()
        answering.asked.clear()  # or the prompts would be what the memory holds
        question = str(prompt)[str(prompt).rindex("Q: ") :]
        at = int(question.split(" has ")[1].split()[0])
        text, ids = made[(at * 31 + index * 7) % len(made)]
        right = (at + index) % 5 == 0
        answer = at - 2 * (at % 13) + 3 if right else at
        return Completion(f"{text}\n#### {answer}", "stop", ids)

    answering = ScriptedSampler(script)
    return answering


class FirstAsked(Exception):
    """Raised where sampling would begin."""


def stage(name: str, rows: int, folder: Path) -> float:
    """Do a stage and return its seconds."""
    store, graded = folder / "rollouts.jsonl", folder / "graded.jsonl"
    params = SamplingParams(n=SAMPLES, temperature=1.0)
    asked = problems(rows if name in ("append", "resume", "resume cold") else 0)
    began = time.perf_counter()
    match name:
        case "append":
            assert fill(sampler(), asked, STYLE, params, store=store) == rows
        case "resume" | "resume cold":
            with store.open("r+b") as file:
                whole = file.seek(0, os.SEEK_END)
                file.truncate(whole - 1000)
                os.fsync(file.fileno())
                if name == "resume cold":
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            answering = sampler(_stop)
            began = time.perf_counter()
            try:
                fill(answering, asked, STYLE, params, store=store)
            except FirstAsked:
                took = time.perf_counter() - began
            else:
                raise AssertionError("nothing was asked")
            assert store.stat().st_size < whole - 1000
            fill(sampler(), asked, STYLE, params, store=store)
            assert store.stat().st_size == whole
            return took
        case "read":
            assert sum(1 for _ in iter_rollouts(store)) == rows
        case "read as list":
            assert len(read_rollouts(store)) == rows
        case "grade":
            counts = grade_stores([store], graded, "gsm8k", {})
            assert counts["right"] == sum((at + i) % 5 == 0 for at in range(rows // SAMPLES) for i in range(SAMPLES))  # fmt: skip
        case "select":
            keep = ("correct", "sound", "distinct")
            kept, seen = choose([graded], folder / "examples.jsonl", keep, bare(STYLE), distinct_by="equations")  # fmt: skip
            assert seen == rows and kept > rows // 6
    return time.perf_counter() - began


def _stop() -> None:
    raise FirstAsked


def measured(name: str, rows: int, folder: Path) -> list[float]:
    """Seconds of a stage in a process of its own, CPU seconds with its workers', its peak memory and that
    of its largest worker in MB."""
    code = [sys.executable, __file__, "--stage", name, "--rows", str(rows), "--dir", str(folder)]
    done = subprocess.run(code, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def machine() -> str:
    """The processor, if the system names it, and the number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")
    return f"{os.cpu_count()} cores, {model or platform.machine()}"


def commit() -> str:
    """The commit of this file's folder."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent,
        stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or "unknown"


def table(sizes: Sequence[int], folder: Path) -> None:
    """Print a row for every size and stage."""
    print(f"{machine()}; {datetime.now(UTC):%Y-%m-%d}; commit {commit()}\n")
    print("| rows | stage | seconds | rows/s | CPU us a row | peak MB | largest worker MB |")
    print("|---:|---|---:|---:|---:|---:|---:|", flush=True)
    for rows in sizes:
        with tempfile.TemporaryDirectory(dir=folder) as made:
            for name in STAGES:
                seconds, cpu, own, worker = measured(name, rows, Path(made))
                shown = f"{worker:,.0f}" if worker else ""
                print(
                    f"| {rows:,} | {name} | {seconds:,.2f} | {rows / seconds:,.0f} "
                    f"| {cpu / rows * 1e6:.1f} | {own:,.0f} | {shown} |",
                    flush=True,
                )


def main() -> None:
    """Print the table, or do one stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dir", type=Path, help="where the stores stand meanwhile")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage is None:
        table(options.rows, options.dir)
        return
    before = sum(os.times()[:4])
    seconds = stage(options.stage, options.rows[0], options.dir)
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(
        json.dumps([seconds, sum(os.times()[:4]) - before, *(one.ru_maxrss / 1024 for one in used)])
    )


if __name__ == "__main__":
    main()

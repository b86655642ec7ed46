"""What the command line prints: lines, progress bars, exit codes."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.printable import printable

if TYPE_CHECKING:
    from selftaught.runs.folder import ProgressReporter


DONE, FAILED, BAD_INPUT, NOTHING_LEARNED = 0, 1, 2, 3


@contextmanager
def locked_output(out: Path, command: str) -> "Iterator[ProgressReporter]":
    """Hold what a command writes against another process that would write it too, and tell of it."""
    from selftaught.runs.folder import ProgressReporter, lock_folder
    from selftaught.runs.status import status_file, tracked_status

    with (
        lock_folder(out.parent, f"{out.name}.lock"),
        tracked_status(
            status_file(out), command, ProgressReporter(progress=progress_bar)
        ) as reporter,
    ):
        yield reporter


@contextmanager
def usage_summary(sampler: Any, out: Path) -> Iterator[None]:
    """What the requests to a server came to: told at the end, however it comes, and summed beside the
    store over all times it was continued."""
    if sampler.usage is None:
        yield
        return
    from selftaught.records import write_atomically
    from selftaught.samplers.base import Usage

    path = out.with_name(out.stem + ".usage.json")
    before = Usage.from_json(path.read_bytes(), str(path)) if path.exists() else Usage()
    try:
        yield
    finally:
        usage = sampler.usage
        whole = before.plus(usage)
        write_atomically(path, json.dumps(asdict(whole), indent=2) + "\n")
        print(f"Server: {usage}." + (f" All in all: {whole}." if before.requests else ""))


@contextmanager
def progress_bar(stage: str, total: int) -> Iterator[Callable[[int], Any] | None]:
    """A progress bar with rate and time left; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    unit = " steps" if "training" in stage else " samples"
    with tqdm(total=total or None, desc=stage, unit=unit, leave=False, file=sys.stderr,
              dynamic_ncols=True) as bar:  # fmt: skip
        yield bar.update


def bold(text: str) -> str:
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else f"\033[1m{text}\033[0m"


def say(text: str) -> None:
    """Print to standard output, with control and invisible characters spelled out."""
    print(printable(text), flush=True)


def tell(text: str) -> None:
    print(printable(text), file=sys.stderr)

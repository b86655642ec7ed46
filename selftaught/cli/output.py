"""Output of the command line: lines, progress bars and exit codes."""

import json
import os
import pydoc
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selftaught.printable import printable

if TYPE_CHECKING:
    from selftaught.runs.folder import ProgressReporter


DONE, FAILED, BAD_INPUT, NOTHING_LEARNED = 0, 1, 2, 3


def in_pager(texts: Sequence[str]) -> None:
    """Print texts; on a terminal that is too low for them, in its pager."""
    text = "\n".join(texts)
    if sys.stdout.isatty() and text.count("\n") >= shutil.get_terminal_size().lines:
        pydoc.pager(text)
    else:
        print(text, flush=True)


@contextmanager
def locked_output(out: Path, command: str) -> "Iterator[ProgressReporter]":
    """Lock the output of a command against other processes, and write its status file.

    Args:
        out: output file or folder of the command.
        command: name of the command as `selftaught status` shows it.

    Yields:
        Progress callbacks.

    Raises:
        BlockingIOError: another process is writing the same output.
    """
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
def locked_run(out: Path, name: str) -> "Iterator[ProgressReporter]":
    """Lock a run folder against other processes, and write its status file.

    Args:
        out: the run folder; created if it does not exist.
        name: name of the method or command as `selftaught status` shows it.

    Yields:
        Progress callbacks.

    Raises:
        BlockingIOError: another process is running in the folder.
    """
    from selftaught.runs.folder import ProgressReporter, lock_folder
    from selftaught.runs.status import tracked_status

    with (
        lock_folder(out),
        tracked_status(
            out / "status.json", name, ProgressReporter(progress=progress_bar)
        ) as reporter,
    ):
        yield reporter


@contextmanager
def usage_summary(sampler: Any, out: Path) -> Iterator[None]:
    """Print the usage of a server at the end, also after an error, and store the total.

    The total over all calls for the same store is written to `{out.stem}.usage.json` beside it.

    Args:
        sampler: the sampler; nothing is printed unless it counts usage.
        out: the store.
    """
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
        total = before.plus(usage)
        write_atomically(path, json.dumps(asdict(total), indent=2) + "\n")
        print(f"Server: {usage}." + (f" In total: {total}." if before.requests else ""))


@contextmanager
def progress_bar(stage: str, total: int) -> Iterator[Callable[[int], Any] | None]:
    """Show a progress bar with rate and remaining time on standard error, if it is a terminal.

    Yields:
        A function that advances the bar by a number of steps; None without a terminal.
    """
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    unit = " steps" if "training" in stage else " samples"
    with tqdm(total=total or None, desc=stage, unit=unit, leave=False, file=sys.stderr,
              dynamic_ncols=True) as bar:  # fmt: skip
        yield bar.update


def plan_text(lines: Sequence[tuple[str, str]], title: str, example: str) -> str:
    """Return the plan of a dry run: lines of a name and a value, and the first example.

    Args:
        lines: names and values.
        title: description of the example.
        example: the first text that the run uses.
    """
    shown = [f"{name:<11} {value}" for name, value in lines]
    return "\n".join([*shown, f"{title}, between the lines:", "-" * 72, example, "-" * 72])


def bold(text: str) -> str:
    """Return the text in bold, if standard output is a terminal and `NO_COLOR` is not set."""
    plain = not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    return text if plain else f"\033[1m{text}\033[0m"


def say(text: str) -> None:
    """Print to standard output, with control and invisible characters escaped."""
    print(printable(text), flush=True)


def tell(text: str) -> None:
    """Print to standard error, with control and invisible characters escaped."""
    print(printable(text), file=sys.stderr)

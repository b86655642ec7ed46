"""Files of a run folder: lock, configuration, versions and metrics."""

import errno
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import IO, TYPE_CHECKING, Any

import yaml

from selftaught.hub import without_tokens
from selftaught.records import parse_json_line, write_atomically
from selftaught.tasks.answers import GRADING_VERSION

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PACKAGES = ("selftaught", "torch", "transformers", "trl", "accelerate", "peft", "datasets",
            "math-verify", "reasoning-gym", "jsonargparse", "matplotlib", "jinja2")  # fmt: skip

Advance = Callable[[int], Any]
Row = dict[str, Any]
"""A JSON object of a run folder, such as a row of `metrics.jsonl`."""


@dataclass(frozen=True)
class ProgressReporter:
    """Progress callbacks of a run."""

    iteration: Callable[[Row], None] = lambda row: None
    """Called with the metrics row of every finished iteration."""
    progress: Callable[[str, int], AbstractContextManager[Advance | None]] = lambda stage, total: (
        nullcontext()
    )
    """Called with the name and the total of every stage. Returns a context manager that gives a
    function to call with the number of items just finished, or None."""


@contextmanager
def lock_folder(folder: Path, name: str = "run.lock") -> Iterator[None]:
    """Lock a run folder for this process. The operating system releases the lock when it ends.

    On systems without `fcntl` (not POSIX), the folder is not locked.

    Args:
        folder: Created if it does not exist.
        name: Name of the lock file. With a separate name, a single file of the folder can be
            locked.

    Raises:
        BlockingIOError: Another process has locked the folder. The message names it.
        OSError: The folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write into the run folder {folder}: {error.strerror}. "
            "Give another folder with --out, or change its permissions",
        ) from error
    with lock:
        try:
            _lock(lock)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise BlockingIOError(
                error.errno,
                f"{folder} is in use by {holder}. Wait for it to end, stop it, "
                "or give this run another folder with --out",
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _lock(file: IO[str]) -> None:
    """Lock an open file for this process on systems with `fcntl`."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_config(
    folder: Path,
    config: Mapping[str, object],
    changeable: Sequence[str],
    update: Callable[[Mapping[str, object]], Mapping[str, object]] = dict,
) -> None:
    """Write `config.yaml` and `versions.json` after checking them against a run in the folder.

    Arguments and errors are those of `check_config`.
    """
    check_config(folder, config, changeable, update)
    path = folder / "config.yaml"
    write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    if (read_json(folder / "versions.json") or {}).get("grading") != GRADING_VERSION:
        write_atomically(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")


def check_config(
    folder: Path,
    config: Mapping[str, object],
    changeable: Sequence[str],
    update: Callable[[Mapping[str, object]], Mapping[str, object]] = dict,
) -> None:
    """Check that a run folder is writable and contains no run with other settings.

    Args:
        folder: The run folder; it need not exist.
        config: The configuration as plain values. A value of "auto" is not compared.
        changeable: Fields that may differ from the stored ones, because no stored result depends on
            them.
        update: Applied to both configurations before they are compared; it gives the fields of
            earlier versions their present names.

    Raises:
        ValueError: The stored configuration differs, or stored rollouts were graded with other
            rules. The message names the differences.
        OSError: The folder cannot be created or written.
    """
    check_writable(folder)
    _refuse_other_grading(folder)
    path = folder / "config.yaml"
    if path.exists():
        config = update(config)
        stored = dict(update(yaml.safe_load(path.read_text(encoding="utf-8")) or {}))
        stored.setdefault("method", config.get("method"))  # earlier versions did not write it
        differing = [
            f"{key} (was {stored.get(key)!r}, now {config.get(key)!r})"
            for key in sorted({*stored, *config} - set(changeable))
            if config.get(key) not in ("auto", stored.get(key))
        ]
        if differing:
            raise ValueError(
                f"{folder} contains a run with other settings: {'; '.join(differing)}. To resume "
                f"it, use --config {path}; for a new run, give another folder with --out."
            )


def check_writable(folder: Path) -> None:
    """Check that a run folder can be created or written. Nothing is created.

    Raises:
        OSError: it cannot; the message names the folder and the reason.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = "is not a folder" if not existing.is_dir() else "is not writable"
        raise OSError(
            errno.EACCES,
            f"Cannot write into the run folder {folder}: {existing} {reason}. Give another folder "
            "with --out, or change its permissions",
        )


def _refuse_other_grading(folder: Path) -> None:
    """Raise if a run contains rollouts graded with another version of the grading rules.

    Its old and new results would not be comparable.
    """
    stored = (read_json(folder / "versions.json") or {}).get("grading", 1)
    if stored == GRADING_VERSION or not (folder / "config.yaml").exists():
        return
    if next(folder.rglob("*.graded.jsonl"), None) is not None:
        raise ValueError(
            f"{folder} contains rollouts graded with version {stored} of the grading rules; the "
            f"current version {GRADING_VERSION} extracts answers differently (docs/grading.md), so "
            "old and new results would not be comparable. Give another folder with --out. "
            "`selftaught report` still works on the old folder."
        )


def remember(options: "DataclassInstance", out: Path) -> None:
    """Write the resolved options of a command next to its output, or into its run folder.

    Args:
        options: The options as a dataclass.
        out: The file, model folder or run folder that the command has written.
    """
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
        if name != "report_to" or value
    }
    is_run = (out / "run.lock").exists()
    path = out / "config.yaml" if is_run else out.with_name(out.stem + ".config.yaml")
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def versions() -> dict[str, object]:
    """Return the versions of packages and Python, the machine, the commit and the command line."""
    return {
        "grading": GRADING_VERSION,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
        "command": without_tokens(" ".join(sys.argv)),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the Git commit that this package runs from; None if it is not in a repository."""
    folder = Path(__file__).resolve().parent
    try:
        process = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            encoding="utf-8",
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()


def read_rows(path: Path) -> list[Row]:
    """Read the rows of `metrics.jsonl`. An incomplete last line is skipped."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [
        parse_json_line(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.endswith(b"\n")
    ]


def read_json(path: Path) -> Row | None:
    """Read a JSON file of a run folder; return None if it does not exist.

    Raises:
        ValueError: The file is not valid JSON.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}. Move the file away and repeat the run's command."
        ) from None


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write all rows of `metrics.jsonl` atomically."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def publish(source: Path, folder: Path, card: str) -> str:
    """Publish a model folder under another name with a model card, atomically; return its name.

    Files are hard-linked if the file system supports it, otherwise copied.

    Args:
        source: The model folder.
        folder: The new folder; replaced if it exists.
        card: Text of its `README.md`.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    (partial / "README.md").unlink(missing_ok=True)
    write_atomically(partial / "README.md", card)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return str(folder)


def link_tree(source: Path, folder: Path) -> None:
    """Create a folder with hard links to the files of another folder, atomically."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    partial.rename(folder)


def _link(source: str, target: str) -> None:
    """Hard-link a file; copy it if the file system does not support hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the duration of a block, in seconds, to `seconds[stage]`."""
    start = perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - start

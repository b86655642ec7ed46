"""A run on disk: who holds it, how it was configured, what it has measured so far."""

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
from typing import IO, Any

import yaml

from selftaught.records import parse_json_line, write_atomically
from selftaught.tasks.answers import GRADING_VERSION

PACKAGES = ("selftaught", "torch", "transformers", "trl", "accelerate", "peft", "datasets",
            "math-verify", "reasoning-gym", "jsonargparse", "matplotlib", "jinja2")  # fmt: skip

Advance = Callable[[int], Any]


@dataclass(frozen=True)
class ProgressReporter:
    """Who looks on: told of every finished iteration, and asked for progress bars."""

    iteration: Callable[[dict[str, Any]], None] = lambda row: None
    progress: Callable[[str, int], AbstractContextManager[Advance | None]] = lambda stage, total: (
        nullcontext()
    )


@contextmanager
def lock_folder(folder: Path, name: str = "run.lock") -> Iterator[None]:
    """Hold a run folder for this process; the hold ends with the process, however it ends.

    Without `fcntl`, which only POSIX systems have, nothing keeps a second process out.

    Args:
        name: of the lock file; one of its own holds a single file of the folder.

    Raises:
        BlockingIOError: another process holds the folder; says which.
        OSError: the folder cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / name).open("a+", encoding="utf-8")
    except OSError as error:
        raise OSError(
            error.errno,
            f"Cannot write into the run folder {folder}: {error.strerror}. "
            "Give another folder with --out, or mend its permissions",
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
    """Lock a file for this process, on systems with `fcntl`."""
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_config(folder: Path, config: Mapping[str, Any], changeable: Sequence[str]) -> None:
    """Write `config.yaml` and `versions.json`, or check that a run is continued as it was begun.

    Args and errors are those of `check_config`.
    """
    check_config(folder, config, changeable)
    path = folder / "config.yaml"
    write_atomically(path, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
    if (read_json(folder / "versions.json") or {}).get("grading") != GRADING_VERSION:
        write_atomically(folder / "versions.json", json.dumps(versions(), indent=2) + "\n")


def check_config(folder: Path, config: Mapping[str, Any], changeable: Sequence[str]) -> None:
    """Check that a run folder can be written, and holds no run with other settings.

    Args:
        config: plain values only; what differs from a stored one is refused by name.
        changeable: the fields that may differ, because nothing stored depends on them.

    Raises:
        ValueError: a stored config differs, or stored rollouts were graded by other rules; says in what.
        OSError: the folder cannot be made or written.
    """
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "is no folder" if not there.is_dir() else "cannot be written"
        raise OSError(
            errno.EACCES,
            f"Cannot write into the run folder {folder}: {there} {what}. Give another folder with --out, "
            "or mend its permissions",
        )
    _refuse_other_grading(folder)
    path = folder / "config.yaml"
    if path.exists():
        stored = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        stored.setdefault("method", config.get("method"))  # earlier versions did not write it
        differing = [
            f"{key} (was {stored.get(key)!r}, now {config.get(key)!r})"
            for key in sorted({*stored, *config} - set(changeable))
            if stored.get(key) != config.get(key)
        ]
        if differing:
            raise ValueError(
                f"{folder} holds a run with other settings: {'; '.join(differing)}. Repeat it with "
                f"--config {path} to continue it, or give another folder with --out."
            )


def _refuse_other_grading(folder: Path) -> None:
    """Refuse a run that holds grades given by another version of the grading rules.

    Its finished rows and its new ones would not be comparable.
    """
    stored = (read_json(folder / "versions.json") or {}).get("grading", 1)
    if stored == GRADING_VERSION or not (folder / "config.yaml").exists():
        return
    if next(folder.rglob("*.graded.jsonl"), None) is not None:
        raise ValueError(
            f"{folder} holds rollouts graded by version {stored} of the grading rules; this is version "
            f"{GRADING_VERSION}, which reads answers differently (docs/grading.md). Old and new results "
            "would not be comparable. Give another folder with --out; the old one stays as it is, and "
            "`selftaught report` still shows it."
        )


def remember(options: Any, out: Path) -> None:
    """Write the resolved options of a command beside its output, or into its run folder.

    Args:
        options: a dataclass.
        out: the file, model folder or run folder that the command made.
    """
    values = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in asdict(options).items()
    }
    held = (out / "run.lock").exists()
    path = out / "config.yaml" if held else out.with_name(out.stem + ".config.yaml")
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def versions() -> dict[str, Any]:
    """What this run was made with: packages, Python, machine, commit and command line."""
    return {
        "grading": GRADING_VERSION,
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
        "command": " ".join(sys.argv),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the checkout this package runs from; None where it is not a checkout."""
    here = Path(__file__).resolve().parent
    try:
        asked = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            encoding="utf-8",
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return asked.stdout.strip()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`; a torn last line is left out."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [
        parse_json_line(line, f"{path}, line {number}")
        for number, line in enumerate(lines, 1)
        if line.endswith(b"\n")
    ]


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file of a run folder; None where there is no such file.

    Raises:
        ValueError: it holds something else.
    """
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got {error}; move the file away and repeat the run's command."
        ) from None


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write all rows of `metrics.jsonl` as a whole file or not at all."""
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def publish(source: Path, folder: Path, card: str) -> str:
    """A model folder under another name, with a card, as a whole or not at all; returns its name."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    (partial / "README.md").unlink(missing_ok=True)
    write_atomically(partial / "README.md", card)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return str(folder)


def link_tree(source: Path, folder: Path) -> None:
    """A folder under a second name, as a whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, copy_function=_link)
    partial.rename(folder)


def _link(source: str, target: str) -> None:
    """A second name for a file; a copy where the disk cannot do that."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Add the seconds of a block to `seconds[stage]`."""
    began = perf_counter()
    try:
        yield
    finally:
        seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - began


Row = dict[str, Any]

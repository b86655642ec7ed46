"""The wheel: it has every file that the package reads, and runs the command line from an empty folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources, so that nothing is left in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "selftaught", source / "selftaught", ignore=unwanted)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(out),
    ]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True, timeout=300)
    if "Could not find a version that satisfies the requirement setuptools" in done.stderr:
        pytest.skip("setuptools cannot be fetched here")
    assert done.returncode == 0, done.stderr[-3000:]
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel: Path):
    inside = set(ZipFile(wheel).namelist())
    for path in (ROOT / "selftaught").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in inside


@pytest.mark.slow
def test_the_wheel_evaluates_its_own_model(wheel: Path, tmp_path: Path):
    with ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    small = ["--task-options.digits", "2", "--task-options.train", "8", "--task-options.test", "4"]
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "selftaught", "evaluate", *small, "--out", "runs/test.jsonl"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert str(tmp_path / "site") in done.stdout + (tmp_path / "runs" / "test.jsonl").read_text()

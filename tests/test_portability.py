"""The single-process path works without the modules that only POSIX systems have, and opens every file as UTF-8."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import selftaught

PACKAGE = str(Path(selftaught.__file__).parent)

WITHOUT_POSIX = """
import builtins, signal
importing = builtins.__import__
def hidden(name, globals=None, *rest, **more):
    inside = ((globals or {}).get("__name__") or "").split(".")[0] == "selftaught"
    if inside and name in ("resource", "fcntl", "pwd", "grp", "termios", "tty"):
        raise ImportError(f"No module named {name!r}")
    return importing(name, globals, *rest, **more)
builtins.__import__ = hidden
for name in ("setitimer", "ITIMER_REAL", "SIGALRM", "alarm"):
    delattr(signal, name)
"""
"""The modules are hidden from this package only: other libraries choose at import by `sys.platform`."""


def python(code: str, cwd: Path, *flags: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | more,
    )  # fmt: skip


def command(*arguments: str) -> str:
    return f"from selftaught.cli import main\nassert main({list(arguments)!r}) == 0\n"


def test_every_public_name_is_there_without_posix(tmp_path: Path):
    code = (
        WITHOUT_POSIX
        + "from selftaught import *\nimport selftaught\nprint(len(selftaught.__all__))"
    )
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_name_that_is_not_there_is_an_attribute_error(tmp_path: Path):
    import selftaught

    assert {"grade", "open_task"} <= set(dir(selftaught))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = selftaught.no_such_name


def test_sampling_grading_and_measuring_work_without_posix(tmp_path: Path):
    small = ["--task_options.train", "4", "--task_options.test", "2", "--task_options.digits", "1"]
    code = WITHOUT_POSIX + command("sample", *small, "--out", "r.jsonl")
    code += command("grade", "r.jsonl", "--out", "g.jsonl")
    code += command("evaluate", *small, "--out", "t.jsonl")
    code += command("status", "r.jsonl")
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.jsonl.status.json").read_text(encoding="utf-8"))["state"] == "done"  # fmt: skip


def test_symbolic_comparison_works_without_posix(tmp_path: Path):
    pytest.importorskip("math_verify")
    worker = tmp_path / "sitecustomize.py"  # the worker process lacks the modules too
    code = (
        "from selftaught import open_task\\nfrom selftaught.rollouts.grading import compare\\n"
        "found = compare([('x+1', '1+x'), ('x+1', 'x+2')], open_task('competition_math'))\\n"
        "print([one.equal for one in found.values()])"
    ).replace("\\n", "\n")  # fmt: skip
    worker.write_text(WITHOUT_POSIX + "import sys\nsys.platform = 'other'\n", encoding="utf-8")
    done = python(code, tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "[True, False]"


@pytest.mark.slow
def test_star_runs_without_posix_and_opens_every_file_as_utf_8(tmp_path: Path):
    small = ["--task_options.train", "20", "--task_options.test", "4", "--task_options.validation", "4",
             "--task_options.digits", "3", "--iterations", "1", "--start_steps", "2"]  # fmt: skip
    code = WITHOUT_POSIX + command("star", *small, "--out", "r") + command("report", "r")
    done = python(code, tmp_path, "-X", "warn_default_encoding", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0, done.stderr
    ours = [line for line in done.stderr.splitlines() if "EncodingWarning" in line and line.startswith(PACKAGE)]  # fmt: skip
    assert not ours
    assert (tmp_path / "r" / "report.html").exists()

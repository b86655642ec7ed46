"""One process per run, one configuration per run, rows that are whole or not there."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from selftaught.runs.folder import lock_folder, read_rows, write_config, write_rows

HOLD = """
import sys, time
from pathlib import Path
from selftaught.runs.folder import lock_folder
with lock_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_the_second_process_stops_at_once_and_says_who_holds_the_run(tmp_path: Path):
    with holder(tmp_path) as process:
        began = time.monotonic()
        with (
            pytest.raises(BlockingIOError, match=f"in use by process {process.pid} on "),
            lock_folder(tmp_path),
        ):
            pass
        assert time.monotonic() - began < 1
        process.kill()


def test_a_killed_holder_leaves_the_run_free(tmp_path: Path):
    with holder(tmp_path) as process:
        process.kill()
    with lock_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_made_raises_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match="Cannot write into the run folder"),
        lock_folder(tmp_path / "file"),
    ):
        pass


def test_a_run_continued_with_other_settings_is_refused_by_name(tmp_path: Path):
    write_config(tmp_path, {"model": "a", "iterations": 3}, changeable=("iterations",))
    with pytest.raises(ValueError, match=r"model \(was 'a', now 'b'\)"):
        write_config(tmp_path, {"model": "b", "iterations": 3}, changeable=("iterations",))
    write_config(tmp_path, {"model": "a", "iterations": 5}, changeable=("iterations",))
    stored = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert stored == {"model": "a", "iterations": 5}


def test_a_torn_last_row_is_left_out(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path) == []
    write_rows(path, [{"iteration": 0}, {"iteration": 1}])
    path.write_bytes(path.read_bytes() + b'{"iteration": 2, "torn')
    assert read_rows(path) == [{"iteration": 0}, {"iteration": 1}]


def test_a_run_graded_by_an_earlier_version_of_the_rules_is_refused(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("model: m\n")
    (tmp_path / "versions.json").write_text(
        '{"python": "3.11"}'
    )  # written before rules had versions
    write_config(tmp_path, {"model": "m"}, ())  # nothing is graded yet: it continues
    (tmp_path / "versions.json").write_text('{"python": "3.11"}')
    (tmp_path / "iteration-1").mkdir()
    (tmp_path / "iteration-1" / "rollouts.graded.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"version 1 of the grading rules.*--out"):
        write_config(tmp_path, {"model": "m"}, ())

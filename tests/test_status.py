"""Where a run stands, read by another process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selftaught.cli import main
from selftaught.runs.folder import ProgressReporter, lock_folder
from selftaught.runs.status import Status, read_status, status_file, status_lines, tracked_status


def message_text(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_stage_counts_what_is_done_and_what_is_left(tmp_path: Path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    path = tmp_path / "status.json"
    status = Status(path, "STaR")
    with status.stage("iteration 1: rollouts", 200) as advance:
        clock[0] += 10.0  # the model is loaded
        advance(40)  # stored before: no rate
        assert message_text(path)["per_second"] is None
        for _ in range(4):
            clock[0] += 2.0
            advance(10)
    # 40 samples in 8 s; 200 - 80 = 120 are left
    assert {name: message_text(path)[name] for name in ("stage", "done", "total", "per_second", "seconds_left")} == {
        "stage": "iteration 1: rollouts", "done": 80, "total": 200, "per_second": 5.0, "seconds_left": 24,
    }  # fmt: skip


def test_a_rate_is_that_of_the_last_minute(tmp_path: Path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    status = Status(tmp_path / "status.json", "STaR")
    with status.stage("x", 10_000) as advance:
        for second in range(1, 301):
            clock[0] = float(second)
            advance(1 if second <= 200 else 9)
    assert message_text(tmp_path / "status.json")["per_second"] == pytest.approx(9.0, rel=0.02)


def test_the_status_says_how_a_run_ended(tmp_path: Path):
    for name, error, state in (("a", None, "done"), ("b", KeyboardInterrupt(), "stopped"),
                               ("c", ValueError("no such model"), "failed")):  # fmt: skip
        path = tmp_path / f"{name}.json"
        try:
            with (
                tracked_status(path, "RFT") as reporter,
                reporter.progress("sampling", 3) as advance,
            ):
                assert advance is not None
                advance(1)
                if error:
                    raise error
        except BaseException as raised:
            assert raised is error
        assert message_text(path)["state"] == state
    assert message_text(tmp_path / "c.json")["last_error"] == "ValueError: no such model"
    with tracked_status(tmp_path / "c.json", "RFT"):
        assert message_text(tmp_path / "c.json")["last_error"] == "ValueError: no such model"
    assert message_text(tmp_path / "c.json")["last_error"] is None


def test_the_given_reporter_is_called_too(tmp_path: Path):
    rows: list = []
    with tracked_status(
        tmp_path / "status.json", "RFT", ProgressReporter(iteration=rows.append)
    ) as reporter:
        reporter.iteration({"name": "SFT"})
        assert message_text(tmp_path / "status.json")["iteration"] == "SFT"
    assert rows == [{"name": "SFT"}]


def test_a_refused_command_leaves_the_status_of_a_finished_run(tmp_path: Path):
    path = tmp_path / "status.json"
    with tracked_status(path, "STaR") as reporter, reporter.progress("sampling", 2):
        pass
    before = path.read_bytes()
    with pytest.raises(ValueError, match="other settings"), tracked_status(path, "STaR"):
        raise ValueError("other settings")
    found = json.loads(path.read_bytes())
    assert found["state"] == "done"
    assert found | {"updated": 0} == json.loads(before) | {"updated": 0}
    with (
        pytest.raises(ValueError, match="while sampling"),
        tracked_status(path, "STaR") as reporter,
        reporter.progress("sampling", 2),
    ):
        raise ValueError("while sampling")
    assert json.loads(path.read_bytes())["state"] == "failed"


def test_a_run_without_a_status_is_refused_in_words(tmp_path: Path):
    with pytest.raises(ValueError, match=r"status\.json; there is none"):
        read_status(tmp_path)
    (tmp_path / "x.status.json").write_text("{half")
    with pytest.raises(ValueError, match="expected JSON"):
        read_status(tmp_path / "x")


def test_a_status_of_another_hand_cannot_disturb_the_terminal(tmp_path: Path, capsys):
    path = tmp_path / "x.status.json"
    path.write_text(json.dumps({"method": "\x1b[2J", "state": "done", "last_error": "a\x07b"}))
    assert main(["status", str(tmp_path / "x")]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_a_held_run_is_running_and_a_run_left_alone_was_killed(tmp_path: Path):
    with lock_folder(tmp_path):
        Status(tmp_path / "status.json", "STaR")
        assert read_status(tmp_path)["state"] == "running"
    assert read_status(tmp_path)["state"] == "killed"
    assert "killed" in status_lines(read_status(tmp_path))[0]


@pytest.mark.slow
def test_status_is_read_while_another_process_runs(tmp_path: Path):
    out = tmp_path / "star"
    command = [sys.executable, "-m", "selftaught.cli"]
    running = subprocess.Popen(
        [*command, "star", "--out", str(out), "--iterations", "2"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    seen: dict[str, dict] = {}
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not any("training" in stage for stage in seen):
            time.sleep(0.2)
            if not status_file(out).exists():
                continue
            asked = subprocess.run(
                [*command, "status", str(out), "--as-json"], capture_output=True, check=True
            )
            found = json.loads(asked.stdout)
            if found["stage"]:
                seen[found["stage"]] = found
                assert found["state"] == "running"
    finally:
        os.kill(running.pid, signal.SIGKILL)
        running.wait()
    assert any("validation" in stage or "rollouts" in stage for stage in seen)
    assert all(one["process"] == running.pid for one in seen.values())
    asked = subprocess.run(
        [*command, "status", str(out)], capture_output=True, text=True, check=True
    )
    assert asked.stdout.startswith(f"STaR  killed, process {running.pid} on ")
    assert "stage      iteration-1: training" in asked.stdout


def test_a_stage_command_writes_its_status_beside_its_output(tmp_path: Path, capsys):
    store = tmp_path / "r.jsonl"
    assert main(["sample", "--limit", "3", "--max_tokens", "8", "--out", str(store)]) == 0
    assert message_text(tmp_path / "r.jsonl.status.json")["state"] == "done"
    assert main(["status", str(store)]) == 0
    assert "sample  done" in capsys.readouterr().out

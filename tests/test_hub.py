"""A name that cannot be reached fails at once and says what to do."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selftaught import hub
from selftaught.hub import check_data_set, check_model_name
from selftaught.models.embedded import embedded_model
from selftaught.tasks.rows import hub_rows


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch):
    """A hub that refuses connections: port 9 of this machine, where nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    asked = hub._unreachable
    asked.cache_clear()
    yield
    asked.cache_clear()


def test_an_unreachable_model_fails_within_seconds_and_names_the_remedies(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match=r"not a local folder.*Hub.*get-model smollm2"):
        check_model_name("somebody/nothing-of-this-name")
    assert time.monotonic() - started < hub.SECONDS + 5


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "a/b/c", "~/model", "my model"])
def test_what_can_only_be_a_path_is_not_asked_of_the_hub(path, monkeypatch):
    monkeypatch.setattr(hub, "_unreachable", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(FileNotFoundError, match="no model folder"):
        check_model_name(path)


def test_a_folder_and_a_cached_name_are_accepted_without_the_hub(tmp_path, monkeypatch):
    check_model_name(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--a--b" / "snapshots").mkdir(parents=True)
    check_model_name("a/b")


def test_offline_mode_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        check_model_name("somebody/nothing-of-this-name")


def test_an_unreachable_data_set_fails_the_same_way():
    with pytest.raises(FileNotFoundError, match=r"not a local file.*Hub.*local copy"):
        check_data_set("somebody/nothing-of-this-name")
    with pytest.raises(FileNotFoundError, match="not a local file"):
        hub_rows("somebody/nothing-of-this-name", None, "train")


DEAD = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "OMP_NUM_THREADS": "1"}
COMMANDS = {
    "sample": ["sample", "--model", "org/none", "--limit", "2", "--out", "o.jsonl"],
    "star": ["star", "--model", "org/none", "--out", "r"],
    "dry run": ["star", "--model", "org/none", "--dry-run"],
    "rft": ["rft", "--model", "org/none", "--out", "r"],
    "verifier": ["solve", "1+1", "--verifier", "org/none"],
    "train": ["train", "sft", "--model", "org/none", "--data", "e.jsonl", "--out", "m"],
    "pause train": ["pause", "train", "--model", "org/none", "--data", "e.jsonl", "--out", "p"],
    "pause evaluate": ["pause", "evaluate", "--model", "org/none", "--limit", "2", "--out", "p"],
    "quiet train": ["quiet", "train", "--model", "org/none", "--text", "e.jsonl", "--out", "q"],
    "questions": ["sample", "--task", "question_file", "--task_options.path", "org/none", "--out", "o.jsonl"],
    "texts": ["quiet", "train", "--text", "org/none", "--out", "q"],
}  # fmt: skip


def run(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "selftaught.cli", *arguments], cwd=cwd, capture_output=True, text=True,
        timeout=300, env=os.environ | DEAD | {"HF_HOME": str(cwd / "home")},
    )  # fmt: skip
    return done, time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_fails_soon_where_the_hub_does_not_answer(name: str, tmp_path: Path):
    row = {"prompt": "1+1=", "completion": "#2", "text": "some text that is long enough"}
    (tmp_path / "e.jsonl").write_text(json.dumps(row) + "\n")
    done, seconds = run(*COMMANDS[name], cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "'org/none' is not a local f" in done.stderr and "does not respond" in done.stderr
    assert "Traceback" not in done.stderr and "Retrying" not in done.stderr
    assert seconds < 45  # most of it the import of torch on a busy machine


@pytest.mark.slow
def test_a_cached_model_is_used_at_once_where_the_hub_does_not_answer(tmp_path: Path):
    cached = tmp_path / "home" / "hub" / "models--org--small"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    for path in embedded_model().iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    given = ["sample", "--model", "org/small", "--limit", "2", "--out", "o.jsonl"]
    done, seconds = run(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Retrying" not in done.stderr
    assert seconds < 45

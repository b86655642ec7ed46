"""`selftaught report` writes the page of a run, and overwrites nothing of a folder that is no run of its own."""

import json
from pathlib import Path

import pytest
import yaml

from selftaught.cli import main
from selftaught.methods.star import StarConfig


def folder(tmp_path: Path, config: dict | None, **files: str) -> Path:
    made = tmp_path / "run"
    made.mkdir()
    if config is not None:
        (made / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    for name, text in files.items():
        (made / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return made


QUIET = {"text": "t.jsonl", "model": "m", "preset": "default", "out": "run"}
PAUSE = {"model": "m", "pauses": [0, 10], "filler": None, "out": "run"}


def test_the_page_of_quiet_star_is_left_as_its_training_wrote_it(tmp_path: Path, capsys):
    made = folder(tmp_path, QUIET, report__html="<p>curves</p>")
    assert main(["report", str(made)]) == 0
    assert capsys.readouterr().out.strip() == str(made / "report.html")
    assert (made / "report.html").read_text() == "<p>curves</p>"
    assert not (made / "report.md").exists()


@pytest.mark.parametrize(
    ("config", "files", "message_text"),
    [
        (None, {"status__json": json.dumps({"method": "Quiet-STaR"})}, "has not finished"),
        (PAUSE, {"pauses-10__jsonl": "", "run__lock": ""}, "measurements with pause tokens"),
        (None, {"config__json": "{}", "model__safetensors": ""}, "got the model"),
        (None, {"rollouts__jsonl": "", "graded__jsonl": ""}, "single stages (graded.jsonl, rollouts.jsonl)"),
        (None, {}, "is not a run folder"),
        ({"model": "m", "something": 1}, {}, "is not a run of STaR"),
        (["a list"], {}, "expected options and their values"),
    ],
)  # fmt: skip
def test_any_other_folder_is_refused_by_what_it_is(
    config, files, message_text: str, tmp_path: Path, capsys
):
    made = folder(tmp_path, config, **files)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    assert main(["report", str(made)]) == 2
    assert message_text in " ".join(capsys.readouterr().err.split())
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_quiet_is_not_put_beside_star(tmp_path: Path, capsys):
    made = folder(tmp_path, QUIET, report__html="<p>curves</p>")
    assert main(["report", str(made), str(made), "--out", str(tmp_path / "c.html")]) == 2
    assert "is not a run of STaR" in capsys.readouterr().err
    assert not (tmp_path / "c.html").exists()


def test_a_run_of_star_that_has_just_started_has_a_page(tmp_path: Path):
    made = folder(
        tmp_path, StarConfig(launcher="accelerate", accelerate_config=Path("a.yaml")).plain()
    )
    assert main(["report", str(made)]) == 0
    assert "There are no results yet" in (made / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_pause_and_the_stages_write_their_status_and_options(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "e.jsonl").write_text('{"prompt": "1+1=", "completion": "#2"}\n' * 4)
    assert main(["pause", "train", "--data", "e.jsonl", "--out", "p", "--max-steps", "1"]) == 0
    small = ["--task_options.test", "4", "--task_options.digits", "1", "--limit", "2"]
    assert (
        main(["pause", "evaluate", "--model", "p", *small, "--pauses", "0", "2", "--out", "pe"])
        == 0
    )
    task = ["--task_options.train", "4", "--task_options.digits", "1"]
    assert main(["sample", *task, "--out", "r.jsonl"]) == 0
    assert main(["grade", "r.jsonl", "--out", "g.jsonl"]) == 0
    assert main(["select", "g.jsonl", "--out", "s.jsonl"]) == 0
    for name in ("p", "pe", "r.jsonl", "g.jsonl", "s.jsonl"):
        capsys.readouterr()
        assert main(["status", name]) == 0
        assert "done" in capsys.readouterr().out.split("\n")[0]
    configs = ["p.config.yaml", "pe/config.yaml", "r.config.yaml", "g.config.yaml", "s.config.yaml"]
    assert [name for name in configs if not (tmp_path / name).is_file()] == []
    stored = yaml.safe_load((tmp_path / "pe/config.yaml").read_text())
    assert stored["pauses"] == [0, 2]
    assert main(["pause", "evaluate", "--config", "pe/config.yaml"]) == 0
    assert main(["report", "pe"]) == 2

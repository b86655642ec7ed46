"""The table of methods, and what is found by it: tasks of one's own, stored completions."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from selftaught import Task, grade, open_task
from selftaught.cli import main
from selftaught.methods.catalog import METHODS, method_of, method_of_folder
from selftaught.methods.star import StarConfig, run_star
from selftaught.records import Problem, Rollout, write_jsonl


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_all_that_the_table_says(name: str, tmp_path: Path):
    method = METHODS[name]
    assert method.config.method == name
    assert callable(method.run) and callable(method.open) and callable(method.report)
    assert callable(method.work)
    assert set(method.changeable) <= {field.name for field in fields(method.config)}
    config = method.config(out=tmp_path)
    assert config.plain()["method"] == name
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.plain()))
    assert method_of_folder(tmp_path) == name


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_an_earlier_version_is_known_by_its_options(name: str):
    stored = METHODS[name].config().plain()
    del stored["method"]
    assert method_of(stored) == name


def test_options_of_another_command_belong_to_no_method():
    assert method_of({"model": "m", "pauses": [10]}) is None


TASK = '''
from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks import Task
from selftaught.tasks.answers import same_text, stated_text

COLOURS = ["red", "green", "blue", "grey", "black", "white"]

def make(count: int = 6):
    """Colours.

    Args:
        count: number of problems per split.
    """
    def problems(split):
        return [Problem(f"{split}-{at}", f"Colour {split} {at}?", COLOURS[at % 6]) for at in range(count)]

    def hint(problem):
        return problem

    return Task("colours", problems, PromptStyle(name="few-shot"), stated_text, same_text, hint)

def nothing():
    return 3
'''


def test_a_task_in_a_file_is_opened_by_its_function(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(TASK)
    task = open_task("my_task.py:make", count=2)
    assert isinstance(task, Task)
    assert [one.gold for one in task.problems("train")] == ["red", "green"]
    for options in ({}, {"task_options": {"cuont": 2}}):
        if options:
            with pytest.raises(ValueError, match="no option 'cuont'; its options are count"):
                open_task("my_task.py:make", cuont=2)
    for name, want in {
        "my_task.py:nothing": "must return a Task, got int",
        "my_task.py:absent": "Expected a function 'absent'",
        "absent.py:make": "the file 'absent.py' does not exist",
    }.items():
        with pytest.raises(ValueError, match=want):
            open_task(name)
    assert main(["tasks", "my_task.py:make"]) == 0
    assert "Number of problems per split. Default: 6." in " ".join(capsys.readouterr().out.split())
    given = ["star", "--task", "my_task.py:make", "--task-options.count", "3", "--dry-run"]
    assert main(given) == 0
    assert "my_task.py:make: 3 training problems" in capsys.readouterr().out


@pytest.mark.slow
def test_star_runs_on_a_task_in_a_file(tmp_path: Path, monkeypatch):
    """The embedded model knows no colours: nothing can be learned, and the run says so in words."""
    from selftaught.rollouts.selection import NothingToLearn

    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(TASK)
    config = StarConfig.small(task="my_task.py:make", out=tmp_path / "run", rationalization=False)
    with pytest.raises(NothingToLearn, match="Nothing was kept"):
        run_star(config)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rows = [
        Rollout(Problem(f"p{at}", f"Q{at}", "7"), f"shot\n\nQ: Q{at}\nA:", f"It is {at}\x1b[31m.", "stop",
                "m", 0, answer=str(at), outcome="right" if at == 7 else "wrong")
        for at in range(5, 9)
    ]  # fmt: skip
    path = tmp_path / "run" / "iteration-1" / "rollouts.graded.jsonl"
    path.parent.mkdir(parents=True)
    write_jsonl(path, rows)
    return path


def test_stored_completions_are_shown_by_outcome_and_problem(store: Path, capsys):
    assert main(["show", str(store), "--outcome", "wrong", "-n", "2"]) == 0
    message_text = capsys.readouterr().out
    assert (
        "p5 · wrong" in message_text and "p6 · wrong" in message_text and "p8" not in message_text
    )
    assert "gold: 7   answer: 5" in message_text and "shot" not in message_text
    assert "\x1b" not in message_text  # control characters are spelled out
    assert "2 completions shown; 1 more" in message_text
    assert main(["show", str(store.parent.parent), "--problem", "p7"]) == 0
    assert "p7 · right" in capsys.readouterr().out


def test_ungraded_completions_have_no_outcome_to_show(tmp_path: Path, capsys):
    path = tmp_path / "rollouts.jsonl"
    write_jsonl(path, [Rollout(Problem("p", "Q", "7"), "Q", "7", "stop", "m", 0)])
    assert main(["show", str(path)]) == 0
    assert "p · not graded" in capsys.readouterr().out
    assert main(["show", str(path), "--outcome", "wrong"]) == 2
    assert "Grade them first" in capsys.readouterr().err
    assert main(["show", str(tmp_path / "absent.jsonl")]) == 2


def test_a_comparison_may_return_a_bool(tmp_path: Path):
    (tmp_path / "plain_task.py").write_text(
        TASK.replace("stated_text, same_text, hint", "stated_text, lambda a, b: a == b, hint")
    )
    task = open_task(f"{tmp_path / 'plain_task.py'}:make")
    rows = [
        Rollout(Problem("p", "Q", "red"), "Q", f"The answer is {word}.", "stop", "m", at)
        for at, word in enumerate(["red", "blue"])
    ]
    assert [one.outcome for one in grade(rows, task)] == ["right", "wrong"]


@pytest.mark.parametrize(
    ("given", "message_text"),
    [
        (["rft", "--training.max_steps", "1"], "Give --max-steps instead"),
        (["star", "--training.learning_rate", "0.5"], "Give --learning-rate instead"),
        (["train", "sft", "--training.max_length", "8"], "Give --max-length instead"),
    ],
)
def test_an_option_is_not_overridden_without_a_word(
    given: list[str], message_text: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([*given, *(["--dry-run"] if given[0] != "train" else [])]) == 2
    assert message_text in capsys.readouterr().err


def test_nested_options_of_a_task_are_numbers_where_they_look_so(capsys):
    pytest.importorskip("reasoning_gym")
    given = [
        "star",
        "--task",
        "gym",
        "--task-options.name",
        "chain_sum",
        "--task-options.train",
        "8",
    ]
    given += [
        "--task-options.validation",
        "4",
        "--task-options.test",
        "4",
        "--dry-run",
        "--prompt",
        "bare",
    ]
    assert main([*given, "--task-options.config.max_terms", "3"]) == 0
    assert "First prompt" in capsys.readouterr().out


def test_the_task_in_the_documentation_runs(tmp_path: Path, monkeypatch, capsys):
    page = (Path(__file__).parent.parent / "docs" / "own_data.md").read_text(encoding="utf-8")
    code = page.partition("# my_task.py\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    Path("my_task.py").write_text(code)
    given = ["star", "--task", "my_task.py:make", "--task-options.count", "40", "--dry-run"]
    assert main([*given, "--prompt", "bare"]) == 0
    assert "40 training problems" in capsys.readouterr().out
    task = open_task("my_task.py:make")
    rows = [
        Rollout(Problem("p", "Q", "0w"), "Q", text, "stop", "m", at)
        for at, text in enumerate(["The answer is 0W.", "The answer is w0."])
    ]
    assert [one.outcome for one in grade(rows, task)] == ["right", "wrong"]

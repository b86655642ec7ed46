"""Bad input meets words, not a traceback: what was expected, what came, what to do; nothing is lost.

Each case goes through the real command, on a real (random, tiny) model.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from selftaught.cli import main

GOOD = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(12)]
SMALL = ["--max_tokens", "8", "--iterations", "1", "--start_steps", "1", "--warmup_steps", "0",
         "--gradient_accumulation_steps", "1"]  # fmt: skip


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def star(capsys, folder: Path, model: Path | str, questions: Path, *more: str) -> tuple[int, str]:
    """The exit code and the message of `selftaught star` on a file of questions."""
    code = main(
        ["star", "--model", str(model), "--task", "question_file",
         "--task_options.path", str(questions), "--out", str(folder / "run"), *SMALL, *more]
    )  # fmt: skip
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message_text"),
    [
        (b"", "is empty: expected at least one row"),
        (b'{"question": "a?", "solution": "1"}\n', "solution"),
        (b'{"question": "a?", "answer": "1"}\nnot json\n', "line 2"),
        (b'{"question": "a?", "answer": "1"}\n{"question": "\xff", "answer": "1"}\n', "line 2"),
        (b'[1, 2]\n', "line 1"),
        (b'{"question": "a?", "answer": "a lot"}\n', "a lot"),
    ],
    ids=["empty", "missing column", "broken JSON", "not UTF-8", "no object", "gold that is no number"],
)  # fmt: skip
def test_a_question_file_that_cannot_be_used(
    content, message_text, tmp_path, tiny_model_dir, capsys
):
    path = tmp_path / "questions.jsonl"
    path.write_bytes(content)
    code, words = star(capsys, tmp_path, tiny_model_dir, path)
    assert code == 2
    assert message_text in words
    assert "questions.jsonl" in words


def test_a_missing_question_file(tmp_path, tiny_model_dir, capsys):
    code, words = star(capsys, tmp_path, tiny_model_dir, tmp_path / "nowhere.jsonl")
    assert code == 2
    assert "nowhere.jsonl" in words


def test_duplicate_ids(tmp_path, tiny_model_dir, capsys):
    rows = [row | {"id": "same"} for row in GOOD]
    questions = jsonl(tmp_path / "q.jsonl", rows)
    code, words = star(capsys, tmp_path, tiny_model_dir, questions, "--task_options.id", "id")
    assert code == 2
    assert "same" in words


def test_a_model_folder_without_a_tokenizer(tmp_path, tiny_model_dir, capsys):
    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    code, words = star(capsys, tmp_path, bare, jsonl(tmp_path / "q.jsonl", GOOD))
    assert code == 2
    assert "Expected a tokenizer in the model folder" in words


def test_a_prompt_longer_than_the_context(tmp_path, tiny_model_dir, capsys):
    rows = [{"question": "x" * 3000 + str(i), "answer": "1"} for i in range(12)]
    code, words = star(capsys, tmp_path, tiny_model_dir, jsonl(tmp_path / "q.jsonl", rows))
    assert code == 2
    assert "more than the 512" in words


def test_an_iteration_that_keeps_nothing_ends_with_code_3_and_says_why(
    tmp_path, tiny_model_dir, capsys
):
    code, words = star(capsys, tmp_path, tiny_model_dir, jsonl(tmp_path / "q.jsonl", GOOD))
    assert code == 3
    assert "Nothing was kept: all 10 completions were dropped" in words
    assert "cut by length" in words
    assert "--max-tokens (now 8)" in words
    assert (tmp_path / "run/iteration-1/rollouts.jsonl").exists()


def test_options_trl_does_not_know_are_refused_before_anything_is_sampled(
    tmp_path, tiny_model_dir, capsys
):
    questions = jsonl(tmp_path / "q.jsonl", GOOD)
    code, words = star(capsys, tmp_path, tiny_model_dir, questions, "--training.nonsense", "1")
    assert code == 2
    assert "nonsense" in words
    assert not list((tmp_path / "run").glob("iteration-*"))


def test_task_options_of_another_type(tmp_path, tiny_model_dir, capsys):
    questions = jsonl(tmp_path / "q.jsonl", GOOD)
    code, words = star(capsys, tmp_path, tiny_model_dir, questions, "--task_options.seed", "blue")
    assert code == 2
    assert "'seed' of the task 'question_file' must be int; got 'blue'" in words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path, tiny_model_dir, capsys):
    (tmp_path / "run").mkdir(mode=0o500)
    code, words = star(capsys, tmp_path, tiny_model_dir, jsonl(tmp_path / "q.jsonl", GOOD))
    assert code == 2
    assert "Cannot write into the run folder" in words


def test_a_run_folder_that_is_a_file(tmp_path, tiny_model_dir, capsys):
    (tmp_path / "run").write_text("")
    code, words = star(capsys, tmp_path, tiny_model_dir, jsonl(tmp_path / "q.jsonl", GOOD))
    assert code == 2
    assert "Cannot write into the run folder" in words


def test_a_run_folder_of_another_run(tmp_path, tiny_model_dir, capsys):
    questions = jsonl(tmp_path / "q.jsonl", GOOD)
    assert star(capsys, tmp_path, tiny_model_dir, questions)[0] == 3
    code, words = star(capsys, tmp_path, tiny_model_dir, questions, "--seed", "5")
    assert code == 2
    assert "seed (was 0, now 5)" in words


def test_a_mistyped_first_command_does_not_block_its_folder(tmp_path, tiny_model_dir, capsys):
    assert star(capsys, tmp_path, tiny_model_dir, tmp_path / "typo.jsonl")[0] == 2
    code, _ = star(capsys, tmp_path, tiny_model_dir, jsonl(tmp_path / "q.jsonl", GOOD))
    assert code == 3  # asked, and nothing right: a random model


def test_a_changed_gold_answer_is_not_graded_with_the_old_one(tmp_path, tiny_model_dir, capsys):
    questions = jsonl(tmp_path / "q.jsonl", GOOD)
    assert star(capsys, tmp_path, tiny_model_dir, questions)[0] == 3
    jsonl(questions, [row | {"answer": "7"} for row in GOOD])
    code, words = star(capsys, tmp_path, tiny_model_dir, questions)
    assert code == 2
    assert "the ids or gold answers of the problems" in words


def test_options_the_sampler_does_not_know(tmp_path, tiny_model_dir, capsys):
    questions = jsonl(tmp_path / "q.jsonl", GOOD)
    code, words = star(
        capsys, tmp_path, tiny_model_dir, questions, "--sampler_options.batchsize", "4"
    )
    assert code == 2
    assert "has no option 'batchsize'; its options are batch_size" in words


def test_a_file_that_is_no_store_is_left_alone(tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("do not lose this")
    assert main(["sample", "--task_options.digits", "1", "--out", str(notes)]) == 2
    assert "is not a store of rollouts" in capsys.readouterr().err
    assert notes.read_text() == "do not lose this"
    jsonl(notes, [{"gold": "1", "answer": "2"}])
    assert main(["grade", str(notes), "--out", str(tmp_path / "g.jsonl")]) == 2
    assert "expected a rollout" in capsys.readouterr().err


def test_the_dry_run_shows_the_first_prompt_and_writes_nothing(tmp_path, tiny_model_dir, capsys):
    questions = jsonl(tmp_path / "q.jsonl", GOOD)
    code = main(
        ["star", "--model", str(tiny_model_dir), "--task", "question_file", "--dry-run",
         "--task_options.path", str(questions), "--out", str(tmp_path / "run")]
    )  # fmt: skip
    message_text = capsys.readouterr().out
    assert code == 0
    assert "\nQ: What is " in message_text
    assert "?\nA:\n" in message_text
    assert not (tmp_path / "run").exists()

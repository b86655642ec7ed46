"""GSM8K: a golden file whose golds were written by hand, and the whole data set where it is."""

import json
from pathlib import Path

import pytest
from narrowed import text, verdict

from selftaught.prompts import hinted
from selftaught.tasks import open_task
from selftaught.tasks.gsm8k import SHOTS

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
whole = pytest.mark.skipif(not DATA.is_dir(), reason="the data set is not on this machine")


@pytest.fixture
def small(tmp_path):
    for split in ("train", "test"):
        text = (GOLDEN / f"gsm8k_{split}.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return open_task("gsm8k", data_dir=str(tmp_path), validation=1)


def test_a_line_becomes_a_problem_without_commas_annotations_and_blank_lines(small):
    first, second = small.problems("train")
    assert first.question.startswith("Nia has 3 boxes")
    assert first.gold == "31"
    assert first.rationale == "The boxes hold 3*12=36 pencils.\nShe keeps 36-5 = 31.\n#### 31"
    assert second.gold == "3000"


def test_validation_is_the_end_of_the_training_file(small):
    assert [problem.id for problem in small.problems("train")] == ["train-0", "train-1"]
    assert [(problem.id, problem.gold) for problem in small.problems("validation")] == [
        ("train-2", "-5")
    ]
    assert [problem.id for problem in small.problems("test")] == ["test-0"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" She has 3 + 4 = 7.\n#### 7", "7"),
        (" #### $1,250.50", "$1,250.50"),
        (" #### -3\nQ: next?\nA: #### 9", "-3"),  # what follows is the model running on
        (" #### -3\n#### 9", None),  # two answers
        (" #### -3\nWait, no.\n#### 9", "9"),
        (" So the answer is 12 apples.", "12 apples"),
        (" The answer is 12 + 7 = 19.", "19"),
        (" It is \\boxed{42}.", "42"),
        (" 42", "42"),
        (" 42.", "42"),
        (" She has 3 + 4 = 7 apples.", None),  # no mark: the rationale did not come to an end
        (" #### none", None),
        ("", None),
    ],
)
def test_only_a_marked_number_is_an_answer(small, completion, answer):
    assert small.extract(completion) == answer


def test_the_hint_is_the_answer_in_brackets_and_nothing_of_the_solution(small):
    problem = small.problems("train")[0]
    shown = small.hint(problem)
    assert shown.question == problem.question + " (31)"
    assert shown.rationale is None
    prompt = text(hinted(small.prompt, small.hint)(problem))
    assert prompt.endswith("How many are left? (31)\nA:")
    assert "How many rolls did she bake? (58)\nA: The bags" in prompt


def test_an_unknown_split_names_those_there_are(small):
    with pytest.raises(ValueError, match="train, validation and test; got 'dev'"):
        small.problems("dev")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "answer": "no mark"}', r"line 1: .*ends with \"#### \""),
        ('{"question": "q", "answer": "#### many"}', r"line 1: .*#### many"),
        ('{"question": "q"}', "line 1: .*got the fields 'question'"),
        ('{"question": ', "line 1: expected one JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_task("gsm8k", data_dir=str(tmp_path)).problems("train")


def test_a_missing_folder_and_an_impossible_validation_size_are_errors(tmp_path, small):
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl; check the path"):
        open_task("gsm8k", data_dir=str(tmp_path / "none")).problems("train")
    with pytest.raises(ValueError, match="validation must be between 1 and 2"):
        open_task("gsm8k", data_dir=str(tmp_path), validation=3).problems("train")


def test_every_worked_example_reaches_its_own_gold_by_true_steps(small):
    assert len(SHOTS) == 6
    for shot in SHOTS:
        rationale = text(shot.rationale)
        assert small.equal(shot.gold, small.extract(rationale)).equal
        for step in rationale.split(" = ")[:-1]:
            assert step[-1].isdigit()


@whole
@pytest.mark.slow
def test_the_whole_data_set_reads_as_it_says():
    task = open_task("gsm8k", data_dir=str(DATA))
    splits = {name: task.problems(name) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 7473 - 500,
        "validation": 500,
        "test": 1319,
    }
    everything = [problem for part in splits.values() for problem in part]
    assert len({problem.id for problem in everything}) == len(everything)
    assert len({problem.question for problem in everything}) == len(everything)
    assert not {shot.question for shot in SHOTS} & {problem.question for problem in everything}
    for problem in everything:
        assert problem.rationale is not None
        assert "<<" not in problem.rationale
        assert "\n\n" not in problem.rationale
        assert verdict(task, problem.gold, problem.gold).equal
        assert verdict(task, problem.gold, task.extract(problem.rationale) or "").equal
        shown = task.hint(problem).question
        assert shown == f"{problem.question} ({problem.gold})"
        assert problem.rationale.split("\n####")[0] not in shown


@whole
def test_golds_are_the_numbers_that_stand_in_the_files():
    task = open_task("gsm8k", data_dir=str(DATA))
    lines = (DATA / "test.jsonl").read_text(encoding="utf-8").splitlines()
    for problem, line in zip(task.problems("test"), lines, strict=True):
        assert float(problem.gold) == float(json.loads(line)["answer"].split()[-1].replace(",", ""))

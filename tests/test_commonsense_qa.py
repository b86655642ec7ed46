"""CommonsenseQA: a golden file written by hand, and the whole data set where it is."""

from pathlib import Path

import pytest
from narrowed import text, verdict

from selftaught.prompts import hinted
from selftaught.tasks import open_task
from selftaught.tasks.commonsense_qa import SHOTS

GOLDEN = Path(__file__).parent / "golden"
DATA = Path(__file__).parents[2] / "shared" / "data" / "commonsense_qa"
whole = pytest.mark.skipif(not DATA.is_dir(), reason="the data set is not on this machine")


@pytest.fixture
def small(tmp_path):
    for part in ("train", "dev"):
        text = (GOLDEN / f"commonsense_qa_{part}.jsonl").read_text(encoding="utf-8")
        (tmp_path / f"{part}.jsonl").write_text(text, encoding="utf-8")
    return open_task("commonsense_qa", data_dir=str(tmp_path), validation=1)


def test_a_question_lists_its_choices_in_lower_case_letters(small):
    (problem,) = small.problems("train")
    assert problem.id == "q1"
    assert problem.gold == "b"
    assert problem.question == (
        "Where would one expect snow?\nAnswer Choices:\n"
        "(a) oven\n(b) mountain\n(c) desert\n(d) sauna\n(e) volcano"
    )


def test_the_test_split_is_the_development_set(small):
    assert [problem.id for problem in small.problems("validation")] == ["q2"]
    assert [problem.id for problem in small.problems("test")] == ["q3"]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        (" Paper drinks up ink. Therefore, the answer is blotter (c).", "c"),
        (" It is not (a). Therefore, the answer is (B).", "b"),
        (" The answer is (d).", "d"),
        (" (e)", "e"),
        (" Therefore, the answer is a blotter.", None),
        ("", None),
    ],
)
def test_the_letter_is_read(small, completion, answer):
    assert small.extract(completion) == answer


def test_the_hint_marks_the_right_choice_in_the_question_and_in_the_worked_examples(small):
    (problem,) = small.problems("train")
    prompt = text(hinted(small.prompt, small.hint)(problem))
    assert prompt.endswith(
        "(a) oven\n(b) mountain (CORRECT)\n(c) desert\n(d) sauna\n(e) volcano\nA:"
    )
    assert "(b) harbor (CORRECT)\n" in prompt
    assert prompt.count("(CORRECT)") == len(SHOTS) + 1


def test_the_hub_form_of_a_row_gives_the_same_problem(small):
    from selftaught.tasks.commonsense_qa import _problem
    from selftaught.tasks.question_file import Row

    row = {
        "id": "q1",
        "question": "Where would one expect snow?",
        "question_concept": "snow",
        "choices": {
            "label": ["A", "B", "C", "D", "E"],
            "text": ["oven", "mountain", "desert", "sauna", "volcano"],
        },
        "answerKey": "B",
    }
    assert _problem(Row("row 1", row)) == small.problems("train")[0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a", "question": "q"}', "line 1: expected CommonsenseQA's fields"),
        (
            '{"id": "a", "answerKey": "", "question": {"stem": "q", "choices": '
            '[{"label": "A", "text": "x"}]}}',
            "line 1: expected an answerKey among A, got ''",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    (tmp_path / "train.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_task("commonsense_qa", data_dir=str(tmp_path)).problems("train")


def test_every_worked_example_ends_in_its_own_gold(small):
    assert len(SHOTS) == 7
    assert len({shot.gold for shot in SHOTS}) == 5  # no letter is favoured by absence
    for shot in SHOTS:
        assert small.extract(shot.rationale) == shot.gold
        assert f"({shot.gold}) " in shot.question


@whole
@pytest.mark.slow
def test_the_whole_data_set_reads_as_it_says():
    task = open_task("commonsense_qa", data_dir=str(DATA))
    splits = {name: task.problems(name) for name in ("train", "validation", "test")}
    assert {name: len(part) for name, part in splits.items()} == {
        "train": 9741 - 500,
        "validation": 500,
        "test": 1221,
    }
    everything = [problem for part in splits.values() for problem in part]
    assert len({problem.id for problem in everything}) == len(everything)
    stems = {problem.question.split("\n")[0] for problem in everything}
    assert len({problem.question for problem in everything}) == len(everything)
    assert not {shot.question.split("\n")[0] for shot in SHOTS} & stems
    for problem in everything:
        assert verdict(task, problem.gold, problem.gold).equal
        assert task.extract(f"Therefore, the answer is it ({problem.gold}).") == problem.gold
        before, after = problem.question, task.hint(problem).question
        assert after.replace(" (CORRECT)", "") == before
        marked = [line for line in after.split("\n") if line.endswith(" (CORRECT)")]
        assert len(marked) == 1
        assert marked[0].startswith(f"({problem.gold}) ")

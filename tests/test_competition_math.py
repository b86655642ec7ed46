import json
from pathlib import Path

import pytest

from selftaught.rollouts.grading import check_gold
from selftaught.tasks import open_task
from selftaught.tasks.competition_math import SHOTS, competition_math, equal, extract
from selftaught.tasks.symbolic import symbolically_equal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 10), ("test", 4)):
        rows = [
            {
                "problem": f"{split} {number}: what is $\\frac{{{number}}}{{7}}$?",
                "solution": f"Not \\boxed{{0}}.\n\nIt is $\\boxed{{\\frac{{{number}}}{{7}}}}$.",
                "level": f"Level {number % 5 + 1}",
                "type": "Prealgebra",
            }
            for number in range(count)
        ]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_gold_is_the_last_box_and_the_group_is_the_level(folder: Path) -> None:
    task = competition_math(str(folder), validation=3)
    problem = task.problems("train")[2]
    assert problem.gold == r"\frac{2}{7}"
    assert problem.rationale == "Not \\boxed{0}.\nIt is $\\boxed{\\frac{2}{7}}$."
    assert task.group is not None and task.group(problem) == "level 3"


def test_validation_is_the_end_of_train_and_no_split_overlaps(folder: Path) -> None:
    task = open_task("competition_math", data_dir=str(folder), validation=3)
    splits = {name: task.problems(name) for name in ("train", "validation", "test")}
    assert {name: len(problems) for name, problems in splits.items()} == {
        "train": 7, "validation": 3, "test": 4,
    }  # fmt: skip
    assert splits["validation"][0].question.startswith("train 7")
    everything = [problem for problems in splits.values() for problem in problems]
    assert len({problem.id for problem in everything}) == 14
    assert len({problem.question for problem in everything}) == 14
    with pytest.raises(ValueError, match="train, validation and test"):
        task.problems("dev")
    with pytest.raises(ValueError, match="between 1 and 9"):
        competition_math(str(folder), validation=10).problems("train")


def test_a_broken_folder_is_named_with_its_line(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl"):
        competition_math(str(folder / "nowhere")).problems("train")
    (folder / "train.jsonl").write_text('{"problem": "p", "solution": "no box"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected a solution with its answer in .boxed"):
        competition_math(str(folder)).problems("train")
    (folder / "train.jsonl").write_text('{"question": "p"}\n')
    with pytest.raises(ValueError, match=r"line 1: expected the text fields \"problem\""):
        competition_math(str(folder)).problems("train")


def test_the_hint_is_the_answer_in_brackets_and_nothing_of_the_solution(folder: Path) -> None:
    task = competition_math(str(folder), validation=3)
    problem = task.problems("train")[1]
    hinted = task.hint(problem)
    assert hinted.question == problem.question + r" (\frac{1}{7})"
    assert hinted.rationale is None


def test_the_worked_examples_end_in_the_answer_that_is_read_from_them() -> None:
    assert 6 <= len(SHOTS) <= 8
    assert [extract(shot.rationale or "") for shot in SHOTS] == [shot.gold for shot in SHOTS]
    assert not [shot.id for shot in SHOTS if "\n\n" in (shot.rationale or "")]
    check_gold(SHOTS, competition_math())


def test_the_answer_is_the_last_box_or_follows_answer_is() -> None:
    assert extract(r"\boxed{1}, or rather \boxed{\{2\}}") == r"\{2\}"
    assert extract("The answer is $x+1$.") == "$x+1$"
    assert extract("I give up after 12 tries") is None


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("3*x-1*y+13=0", "3x+4y+14=0"),
        ("1/2004!", "1/2006!"),
        ("1/2^99", "1/2^98"),
        ("1331 and 1728", "1728"),
        (r"1-1/\mathrm{e}", r"1+1/\mathrm{e}"),
        (r"2^{1000}+\sqrt{2}", r"2^{1000}+\sqrt{3}"),
        ("(3,1)", "(5,2)"),
        ("x=1, y=2", "x=2, y=1"),
        ("x<3", "-x<-3"),
        ("xy", "XY"),
        ("|x|", "x"),
    ],
)
def test_known_false_positives_are_distinguished(gold: str, answer: str) -> None:
    assert not symbolically_equal(gold, answer)


@pytest.mark.parametrize("answer", ["10", "0.1", r"\frac{1}{10}"])
def test_percent_is_only_percent(answer: str) -> None:
    assert equal(r"10\%", answer).equal is False
    assert equal(answer, r"10\%").equal is False


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("3*x-1*y+13=0", "y=3x+13"),
        (r"1-1/\mathrm{e}", r"\frac{e-1}{e}"),
        ("x^2+2x+1", "(x+1)^2"),
        (r"\{1, 2\}", "2 and 1"),
        (r"1\pm\sqrt5", r"1-\sqrt{5}, 1+\sqrt{5}"),
        (r"0.\overline{3}", r"\frac{1}{3}"),
        ("2x-6<0", "x<3"),
        ("2i", "(1+i)^2"),
    ],
)
def test_the_same_answer_in_another_form_is_found(gold: str, answer: str) -> None:
    assert symbolically_equal(gold, answer)


def test_a_gold_that_cannot_be_parsed_or_is_undefined_is_an_error() -> None:
    with pytest.raises(ValueError, match="cannot be parsed"):
        symbolically_equal("1-1/", "1")
    with pytest.raises(ValueError, match="undefined"):
        symbolically_equal("1/0", "2/0")

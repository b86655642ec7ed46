"""The questions and the pre-training texts of the recipes' own tasks."""

import ast
import importlib
import json
import operator
import re
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from selftaught.rollouts.equations import wrong_equations

RECIPES = Path(__file__).parent.parent / "recipes"


def recipe(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(RECIPES))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _forget_recipes():
    yield
    for path in RECIPES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def worked(expression: str) -> int:
    """A sum or product of numbers, by Python's own syntax tree."""

    def of(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            act = operator.mul if isinstance(node.op, ast.Mult) else operator.add
            return act(of(node.left), of(node.right))
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        return node.value

    return of(ast.parse(expression, mode="eval").body)


WRITERS = ("chain_sums", "shortcut_sums", "guessed_equations")


@pytest.mark.parametrize("name", WRITERS)
def test_questions_are_right_and_stand_in_one_split_only(name, tmp_path: Path, monkeypatch):
    write = recipe(name, monkeypatch).questions
    write(tmp_path, train=60, validation=20, test=20, seed=3)
    asked = []
    for split, size in (("train", 60), ("validation", 20), ("test", 20)):
        found = rows(tmp_path, split)
        assert [row["id"] for row in found] == [f"{split}-{at}" for at in range(size)]
        for row in found:
            question, answer = row["question"], row["answer"]
            if "x" in question:
                left, right = question.replace("x", answer).split("=")
                assert worked(left) == int(right)
            else:
                assert worked(question) == int(answer)
            assert row["rationale"].endswith(f"#### {answer}")
            assert not wrong_equations(row["rationale"])
            numbers = question if "x" in question else sorted(question.split("+"))
            asked.append(str(numbers))
    assert len(set(asked)) == 100


@pytest.mark.parametrize("name", WRITERS)
def test_held_out_questions_do_not_depend_on_how_many_are_learned_from(
    name, tmp_path: Path, monkeypatch
):
    write = recipe(name, monkeypatch).questions
    for folder, train in (("few", 10), ("many", 50)):
        write(tmp_path / folder, train=train, validation=10, test=10, seed=1)
    assert rows(tmp_path / "few", "test") == rows(tmp_path / "many", "test")
    assert rows(tmp_path / "few", "train") == rows(tmp_path / "many", "train")[:10]


def test_a_sum_worked_out_is_right_for_all_numbers(monkeypatch):
    sums = recipe("shortcut_sums", monkeypatch)
    for a in range(1, 600, 7):
        for b in range(1, 100):
            text = sums.worked_out(a, b)
            assert text.endswith(f"={a + b}")
            assert all(worked(left) == int(right) for left, right in re.findall(r"([\d+]+)=(\d+)", text))  # fmt: skip


def test_only_some_equations_of_the_training_file_have_a_solution(tmp_path: Path, monkeypatch):
    equations = recipe("guessed_equations", monkeypatch)
    monkeypatch.setattr(equations, "WITH_RATIONALE", 4)
    equations.questions(tmp_path, train=9, validation=2, test=2, seed=0)
    message_text = [row["rationale"] is not None for row in rows(tmp_path, "train")]
    assert message_text == [True] * 4 + [False] * 5


def test_guesses_in_the_pre_training_text_are_near_and_worked_out_as_they_are(monkeypatch):
    equations = recipe("guessed_equations", monkeypatch)
    off = []
    for asked, text in islice(equations.corpus("equation", 0), 500):
        question = re.fullmatch(r"Q: (\d+)\*x\+(\d+)=(\d+)\nA:", asked)
        guessed = re.match(r" x=(\d+);", text)
        assert question is not None and guessed is not None
        a, b, c = map(int, question.groups())
        guess = int(guessed.group(1))
        assert text == f" x={guess}; {a}*{guess}={a * guess}; {a * guess}+{b}={a * guess + b}; #### {guess}"  # fmt: skip
        off.append(guess - (c - b) // a)
    assert set(off) == {-2, -1, 0, 1, 2}
    assert 60 < off.count(0) < 140

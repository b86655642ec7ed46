import json
from dataclasses import replace

import pytest

from selftaught.evaluation.evaluator import Evaluation, evaluate, evaluation_from
from selftaught.metrics import wilson
from selftaught.prompts import PromptStyle
from selftaught.records import OUTCOMES, Completion, Problem, Rollout, read_rollouts
from selftaught.rollouts.graded import graded_path
from selftaught.samplers.base import SamplingParams
from selftaught.samplers.scripted import ScriptedSampler
from selftaught.tasks import open_task
from selftaught.tasks.answers import Verdict
from selftaught.tasks.base import Task

PROBLEMS = [Problem(f"double-{n}", str(n), str(2 * n)) for n in (3, 8, 12, 15, 40, 101)]
DOUBLES = Task(
    name="doubles",
    problems=lambda split: PROBLEMS,
    prompt=PromptStyle("doubles"),
    extract=lambda completion: completion.split()[-1] if completion.split() else None,
    equal=lambda gold, answer: Verdict(gold == answer if answer.isdigit() else None, "literal"),
    hint=lambda problem: problem,
    group=lambda problem: f"{len(problem.question)} digits",
)


def script(prompt, index):
    """Doubles up to 12, says nothing for 15, is cut at 40, and is unreadable at 101."""
    number = int(prompt.split()[1])
    match number:
        case 15:
            return ""
        case 40:
            return Completion(" 80", "length")
        case 101:
            return " two hundred"
        case 8:
            return " 17"
    return f" it is {2 * number}"


def test_outcomes_and_groups_are_tallied(tmp_path):
    store = tmp_path / "validation.jsonl"
    seen = []
    evaluation = evaluate(
        ScriptedSampler(script),
        DOUBLES,
        PROBLEMS,
        DOUBLES.prompt,
        SamplingParams(),
        store=store,
        name="validation, base",
        progress=seen.append,
    )
    assert evaluation.outcomes == {
        "right": 2,
        "wrong": 1,
        "no answer": 1,
        "cut by length": 1,
        "ungradable": 1,
    }
    assert list(evaluation.outcomes) == list(OUTCOMES)
    assert (evaluation.n, evaluation.right, evaluation.model) == (6, 2, "scripted")
    assert evaluation.accuracy == pytest.approx(1 / 3)
    # Wilson for 2 of 6: (1/3 + 3.8415/12 +- 1.96 sqrt(2/9/6 + 3.8415/144)) / (1 + 3.8415/6)
    assert (evaluation.low, evaluation.high) == pytest.approx((0.0968, 0.7000), abs=1e-4)
    assert {name: (t.right, t.n) for name, t in evaluation.groups.items()} == {
        "1 digits": (1, 2),
        "2 digits": (1, 3),
        "3 digits": (0, 1),
    }
    assert sum(seen) == 6 and evaluation.seconds > 0


def test_an_evaluation_survives_json():
    rollouts = [
        Rollout(problem, "", "", "stop", "m", 0, outcome="right" if index % 2 else "wrong")
        for index, problem in enumerate(PROBLEMS)
    ]
    evaluation = evaluation_from(rollouts, DOUBLES, name="x", seconds=1.5)
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def test_a_second_call_asks_and_grades_nothing_again(tmp_path):
    store = tmp_path / "test.jsonl"
    asked = ScriptedSampler(script)
    counted = []
    watched = replace(
        DOUBLES, extract=lambda completion: counted.append(1) or DOUBLES.extract(completion)
    )
    first = measure(asked, store, task=watched)
    assert len(counted) == 6
    counted.clear()
    second = measure(asked, store, task=watched)
    assert len(asked.asked) == 6 and counted == []
    assert replace(second, seconds=0) == replace(first, seconds=0)
    assert graded_path(store) == tmp_path / "test.graded.jsonl"
    assert [r.outcome for r in read_rollouts(graded_path(store))].count("right") == 2


def test_grades_of_other_completions_are_not_believed(tmp_path):
    store = tmp_path / "test.jsonl"
    measure(ScriptedSampler(script), store)
    store.unlink()
    better = measure(ScriptedSampler(lambda prompt, _: str(2 * int(str(prompt).split()[1]))), store)
    assert better.right == 6
    assert {r.outcome for r in read_rollouts(graded_path(store))} == {"right"}


def test_text_that_utf8_cannot_hold_is_evaluated_too(tmp_path):
    store = tmp_path / "test.jsonl"
    odd = ScriptedSampler(lambda prompt, _: "\ud800 \x00 \u2028 6")
    assert measure(odd, store).right == measure(odd, store).right == 1


def test_samples_of_one_problem_are_clustered(tmp_path):
    """Every problem is always or never right: four samples of each tell as much as one."""
    params = SamplingParams(n=4, temperature=1.0)
    several = measure(ScriptedSampler(script), tmp_path / "test.jsonl", params=params)
    assert (several.n, several.right) == (24, 8)
    low, high = wilson(2, 6)
    # the two variance estimates divide by 5 and by 23: the effective size is 24 * 5 / 23 = 5.2
    assert several.low == pytest.approx(low, abs=0.02) and several.high == pytest.approx(
        high, abs=0.03
    )
    alone = wilson(8, 24)
    assert several.low < alone[0] and alone[1] < several.high


def test_the_mean_over_groups_weighs_groups_alike():
    """9 of 9 one-digit problems and 0 of 1 with two digits: 90% of all, 50% as a mean."""
    problems = [Problem(str(n), str(n), "") for n in range(1, 11)]
    rollouts = [
        Rollout(p, "", "", "stop", "m", 0, outcome="wrong" if p.id == "10" else "right")
        for p in problems
    ]
    evaluation = evaluation_from(rollouts, DOUBLES, name="x")
    assert evaluation.accuracy == 0.9 and evaluation.group_mean.accuracy == 0.5
    # Wilson at 9 of 9 is 9 / (9 + 3.8415) to 1, at 0 of 1 it is 0 to 3.8415 / 4.8415
    assert evaluation.group_mean.low == pytest.approx(0.5 - (1 - 9 / 12.8415) / 2, abs=1e-4)
    assert evaluation.group_mean.high == pytest.approx(0.5 + 3.8415 / 4.8415 / 2, abs=1e-4)
    alone = evaluation_from(rollouts, replace(DOUBLES, group=None), name="x")
    assert alone.groups == {} and alone.group_mean.accuracy == 0.9


def test_groups_stand_in_natural_order():
    problems = [Problem(str(n), "1" * n, "") for n in (10, 2, 1)]
    rollouts = [Rollout(p, "", "", "stop", "m", 0, outcome="right") for p in problems]
    groups = evaluation_from(rollouts, DOUBLES, name="x").groups
    assert list(groups) == ["1 digits", "2 digits", "10 digits"]


def test_nothing_and_what_is_ungraded_cannot_be_evaluated():
    with pytest.raises(ValueError, match="test: expected at least one rollout to evaluate"):
        evaluation_from([], DOUBLES, name="test")
    ungraded = Rollout(PROBLEMS[0], "", "", "stop", "m", 0)
    with pytest.raises(ValueError, match="'double-3' has no outcome; call grade"):
        evaluation_from([ungraded], DOUBLES, name="test")


def measure(sampler, store, *, task=DOUBLES, params=None):
    params = params or SamplingParams()
    return evaluate(sampler, task, PROBLEMS, task.prompt, params, store=store, name="test")


@pytest.mark.parametrize(
    "change", [{"name": "triples"}, {"options": '{"kind": "text"}'}, {"thought_marks": ("[", "]")}]
)
def test_grades_of_another_task_option_or_mark_are_given_again(tmp_path, caplog, change):
    store = tmp_path / "test.jsonl"
    right = measure(ScriptedSampler(script), store)
    never = Verdict(False, "never")
    other = replace(DOUBLES, equal=lambda gold, answer: never, **change)
    assert measure(ScriptedSampler(script), store, task=other).right == 0 < right.right
    assert "computed again" in caplog.text
    assert measure(ScriptedSampler(script), store).right == right.right


def test_grades_of_an_earlier_version_of_the_rules_are_given_again(tmp_path, monkeypatch, caplog):
    store = tmp_path / "test.jsonl"
    first = measure(ScriptedSampler(script), store)
    path = graded_path(store)
    lines = path.read_text().splitlines(keepends=True)
    # as an earlier version wrote it: without a header, and with grades that are wrong now
    path.write_text("".join(lines[1:]).replace('"right"', '"wrong"'))
    assert measure(ScriptedSampler(script), store).right == first.right
    assert "computed again" in caplog.text


def test_a_changed_kind_of_answer_regrades_a_question_file(tmp_path):
    """The public case: with another `kind` 4 of 4 stayed right where 0 of 4 are."""
    path = tmp_path / "q.jsonl"
    rows = [{"question": f"q{n}", "answer": f"{n} cm"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    number, text = (open_task("question_file", path=str(path), kind=k) for k in ("number", "text"))
    problems = number.problems("train")
    sampler = ScriptedSampler(lambda prompt, index: f" The answer is {prompt[4:5]}.")
    counts = [
        evaluate(sampler, task, problems, task.prompt, SamplingParams(), store=tmp_path / "s.jsonl",
                 name="x").right
        for task in (number, text, number)
    ]  # fmt: skip
    assert counts == [len(problems), 0, len(problems)]

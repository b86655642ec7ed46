"""STaR's own part: whom it asks again, what it keeps, how long it trains, when it stops."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from selftaught.evaluation.evaluator import evaluation_from
from selftaught.methods.star import (
    Star,
    StarConfig,
    best_iteration,
    bootstrap,
    open_star,
    run_star,
    why_stop,
)
from selftaught.prompts import PromptStyle
from selftaught.records import Problem, Rollout
from selftaught.rollouts.selection import NothingToLearn, keep_correct
from selftaught.runs.folder import ProgressReporter
from selftaught.samplers import Engine
from selftaught.samplers.scripted import ScriptedSampler
from selftaught.tasks import Task
from selftaught.tasks.answers import Verdict

PROBLEMS = [Problem(name, f"{name}?", gold) for name, gold in (("a", "1"), ("b", "2"), ("c", "3"))]


def with_answer(problem: Problem) -> Problem:
    return replace(problem, question=f"{problem.question} ({problem.gold})")


TOY = Task(
    name="toy",
    problems=lambda split: PROBLEMS,
    prompt=PromptStyle("few_shot", shots=lambda p: [Problem("s", "s?", "0", "shown. #0")]),
    extract=lambda text: text.rpartition("#")[2].strip() if "#" in text else None,
    equal=lambda gold, answer: Verdict(gold == answer, "literal"),
    hint=with_answer,
)


def star(config: StarConfig) -> Star:
    config = replace(config, max_tokens=8)
    reporter, engine = ProgressReporter(), Engine("none", {})
    return Star(config, TOY, "base", PROBLEMS, PROBLEMS, reporter, engine, validation=PROBLEMS)


def answers(direct: dict[str, str], hinted: dict[str, str]) -> ScriptedSampler:
    """A model that says `direct[id]`, or `hinted[id]` when the question shows its answer."""

    def script(prompt, index: int) -> str:
        asked = prompt.rpartition("Q: ")[2].removesuffix("\nA:")
        name = asked[0]
        return (hinted if "(" in asked else direct)[name]

    return ScriptedSampler(script)


def run_bootstrap(config: StarConfig, sampler: ScriptedSampler, folder: Path, iteration: int = 1):
    return bootstrap(star(replace(config, out=folder)), sampler, iteration, PROBLEMS)


def test_only_failures_are_asked_again_and_only_right_rationalizations_stay(tmp_path: Path):
    sampler = answers({"a": "x #1", "b": "x #9", "c": "no idea"}, {"b": "y #2", "c": "y #4"})
    direct, rationalized = run_bootstrap(StarConfig(), sampler, tmp_path)
    assert [r.outcome for r in direct] == ["right", "wrong", "no answer"]
    assert [(r.problem.id, r.outcome) for r in rationalized] == [("b", "right"), ("c", "wrong")]
    assert [r.origin for r in rationalized] == ["rationalized"] * 2
    assert [r.completion for r in keep_correct(direct + rationalized)] == ["x #1", "y #2"]


def test_the_hint_is_the_answer_and_stands_in_the_worked_examples_too(tmp_path: Path):
    sampler = answers({"a": "#1", "b": "#2", "c": "#9"}, {"c": "#3"})
    run_bootstrap(StarConfig(), sampler, tmp_path)
    assert sampler.asked[-1] == "Q: s? (0)\nA: shown. #0\n\nQ: c? (3)\nA:"
    assert len(sampler.asked) == 4


def test_without_rationalization_nothing_is_sampled_again(tmp_path: Path):
    sampler = answers({"a": "#1", "b": "#9", "c": "#9"}, {})
    _, rationalized = run_bootstrap(StarConfig(rationalization=False), sampler, tmp_path)
    assert rationalized == []
    assert len(sampler.asked) == 3


def test_a_share_of_zero_rationalizes_nothing(tmp_path: Path):
    sampler = answers({"a": "#1", "b": "#9", "c": "#9"}, {})
    _, rationalized = run_bootstrap(StarConfig(rationalized_share=0.0), sampler, tmp_path)
    assert rationalized == []


def test_the_worked_examples_can_go_after_the_first_iteration(tmp_path: Path):
    config = StarConfig(prompt_later=False, rationalization=False)
    for iteration, shown in ((1, True), (2, False)):
        sampler = answers({"a": "#1", "b": "#2", "c": "#9"}, {})
        run_bootstrap(config, sampler, tmp_path / str(iteration), iteration)
        assert all(("shown." in str(prompt)) == shown for prompt in sampler.asked)


def test_a_chat_stays_a_chat_without_its_worked_examples():
    asked = star(StarConfig(prompt="chat", prompt_later=False)).prompt(1)(PROBLEMS[0])
    assert asked == [{"role": "user", "content": "a?"}]


def test_a_base_that_is_always_right_has_nothing_to_learn(tmp_path: Path):
    sampler = answers({"a": "#1", "b": "#2", "c": "#3"}, {})
    with pytest.raises(NothingToLearn, match="already answers all 3"):
        run_bootstrap(StarConfig(), sampler, tmp_path)


def test_training_prompts_show_worked_examples_only_when_asked():
    problem = PROBLEMS[0]
    assert star(StarConfig()).training_prompt()(problem) == "Q: a?\nA:"
    shown = star(StarConfig(prompt_in_training=True)).training_prompt()(problem)
    assert shown == "Q: s?\nA: shown. #0\n\nQ: a?\nA:"


def test_the_paper_s_schedules():
    """40 x 1.2^(n-1), as the authors' script counts it; 300 and 20 more each (Section 4.3)."""
    grow = StarConfig(start_steps=40)
    assert [grow.steps(n) for n in range(1, 8)] == [40, 48, 57, 69, 82, 99, 119]
    add = StarConfig(schedule="add", start_steps=300)
    assert [add.steps(n) for n in (1, 2, 16)] == [300, 320, 600]
    assert StarConfig(schedule="epochs").steps(3) == -1


def row(iteration: int, right: int) -> dict:
    rollouts = [
        Rollout(PROBLEMS[0], "", "", "stop", "m", i, outcome="right" if i < right else "wrong")
        for i in range(10)
    ]
    validation = evaluation_from(rollouts, TOY, name="v")
    return {"iteration": iteration, "validation": validation.to_dict()}


@pytest.mark.parametrize(
    ("rights", "best", "why"),
    [
        ([2], 0, None),
        ([2, 5, 4], 1, None),
        ([2, 5, 5, 4], 1, "no gain in 2 iterations"),  # an equal is no gain
        ([2, 5, 4, 6], 3, None),
        ([2, 10], 1, "every validation problem is solved"),
        ([5, 4, 3], 0, "no gain in 2 iterations"),
        ([1, 2, 3, 4, 5], 4, "the limit of 4 iterations"),
    ],
)
def test_a_run_stops_at_the_plateau_and_names_the_best(rights: list[int], best: int, why):
    rows = [row(iteration, right) for iteration, right in enumerate(rights)]
    assert best_iteration(rows) == best
    assert why_stop(rows, StarConfig(iterations=4, patience=2)) == why


@pytest.mark.parametrize(
    ("option", "message_text"),
    [
        ({"iterations": 0}, "iterations must be at least 1; got 0"),
        ({"rationalized_share": 1.5}, "rationalized_share must be from 0 to 1"),
        ({"test_problems": 0}, "test_problems must be at least 1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"grow_steps": 0.5}, "grow_steps must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(option: dict, message_text: str):
    with pytest.raises(ValueError, match=message_text):
        StarConfig(**option)


def test_greedy_with_many_samples_is_refused_before_anything_runs(tmp_path: Path):
    with pytest.raises(ValueError, match="4 equal completions"):
        open_star(StarConfig(n=4, out=tmp_path), ProgressReporter())


@pytest.mark.slow
@pytest.mark.parametrize("from_base", [True, False])
def test_the_direct_answer_baseline_trains_as_long_as_the_best_model(
    tmp_path: Path, from_base: bool
):
    config = StarConfig.small(
        out=tmp_path / "run",
        task_options={"digits": "1-3", "train": 60, "validation": 20, "test": 20},
        iterations=2,
        start_steps=6,
        add_steps=2,
        schedule="add",
        from_base=from_base,
        keep_models="all",
        baselines=True,
    )
    summary = run_star(config)
    names = [row["name"] for row in summary["comparisons"]]
    assert names == ["direct answers, base", "direct answers, fine-tuned"]
    best = max(summary["best"], 1)
    lengths = [6, 8][:best]  # 6 steps, then 2 more
    message_text = json.loads(
        (tmp_path / "run" / f"direct-{best}" / "model" / "training.json").read_text()
    )
    assert message_text["steps"] == (lengths[-1] if from_base else sum(lengths))
    assert message_text["trained_on"] == len(open_star(config, ProgressReporter()).train)

"""Settings that are "auto": which values they get, and that a run names and keeps them."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from selftaught.methods.config import Facts
from selftaught.methods.estimate import Cost, Rates, in_words
from selftaught.methods.rft import RftConfig
from selftaught.methods.star import StarConfig
from selftaught.methods.step_values import StepDpoConfig
from selftaught.methods.vstar import VstarConfig
from selftaught.samplers import count_parameters
from selftaught.tasks import open_task
from selftaught.training.auto import auto_batch, auto_batches, auto_learning_rate, given_batches

ARITHMETIC = open_task("arithmetic")


def facts(parameters: float, problems: int) -> Facts:
    return Facts(int(parameters), problems, ARITHMETIC)


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [(2e5, 1e-3), (135e6, 2e-4), (494e6, 1e-4), (1.5e9, 5e-5), (7e9, 2e-5), (13e9, 2e-5), (70e9, 1e-5)],
)  # fmt: skip
def test_learning_rates_are_those_of_the_documented_table(parameters, rate):
    assert auto_learning_rate(int(parameters)) == rate
    assert auto_learning_rate(int(parameters), lora=True) == min(10 * rate, 1e-3)
    assert auto_learning_rate(int(parameters), preferences=True) == pytest.approx(rate / 10)
    page = (Path(__file__).parents[1] / "docs/training.md").read_text(encoding="utf-8")
    assert (
        f"| {rate:.0e} | {min(10 * rate, 1e-3):.0e} | {rate / 10:.0e} |".replace("e-0", "e-")
        in page
    )


@pytest.mark.parametrize(
    ("problems", "batch"), [(5, 8), (319, 8), (639, 8), (640, 16), (1000, 16), (7473, 128), (10**6, 128)]
)  # fmt: skip
def test_a_pass_has_at_least_forty_steps_where_the_limits_allow(problems, batch):
    """By hand: the largest power of two that is at most problems / 40, between 8 and 128."""
    assert auto_batch(problems, 128) == batch


@pytest.mark.parametrize("parameters", [2e5, 135e6, 7e9])
@pytest.mark.parametrize("device", ["auto", 1, 4, 7])
@pytest.mark.parametrize("suggested", [8, 16, 80, 128])
def test_an_optimizer_step_has_whole_batches(parameters, device, suggested):
    whole, each = auto_batches("auto", device, int(parameters), suggested)
    assert whole % each == 0
    assert device in ("auto", each)
    assert abs(whole - suggested) <= each
    if device == "auto":
        assert whole == suggested


@pytest.mark.parametrize(("whole", "device"), [(0, "auto"), (-8, 4), ("auto", 0), (8, -1)])
def test_batch_sizes_below_one_are_refused(whole, device):
    with pytest.raises(ValueError, match="must be at least 1"):
        auto_batches(whole, device, 10**9, 128)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_settings_do_not_depend_on_the_number_of_processes(processes):
    """So a run can be continued with another number of processes."""
    config = StarConfig(launcher="torchrun", num_processes=processes, train_problems=1000)
    found = config.resolved(facts(135e6, 3000))
    assert (found.train_batch_size, found.per_device_train_batch_size) == (16, 16)


def test_gradient_accumulation_means_what_it_means_in_trl():
    assert given_batches("auto", 4, 5, 3) == (60, 4)
    assert given_batches(60, 4, 5, 3) == (60, 4)
    with pytest.raises(ValueError, match=r"4 \* 5 \* 3 = 60; got 64"):
        given_batches(64, 4, 5, 3)
    with pytest.raises(ValueError, match="multiple of per_device_train_batch_size, 16"):
        auto_batches(24, 16, 10**9, 128)


def test_star_of_smollm2_gets_what_its_recipe_was_measured_with():
    """recipes/star_smollm2_chain_sum.yaml: 1,000 problems, rate 2e-4, batches of 16, 62 steps."""
    found = StarConfig(train_problems=1000).resolved(facts(134_515_008, 3000))
    assert (found.learning_rate, found.train_batch_size) == (2e-4, 16)
    assert (found.per_device_train_batch_size, found.start_steps, found.warmup_steps) == (16, 63, 6)


def test_star_of_many_problems_gets_the_paper_s_amount_of_examples():
    found = StarConfig().resolved(facts(6e9, 50_000))
    assert (found.train_batch_size, found.start_steps) == (80, 40)
    assert [found.steps(n) for n in (1, 2, 3)] == [40, 48, 57]


def test_given_values_stay():
    given = StarConfig(
        learning_rate=1e-6, train_batch_size=80, start_steps=40, warmup_steps=100,
        per_device_train_batch_size=8,
    )  # fmt: skip
    assert given.resolved(facts(2e5, 100)) == given
    assert VstarConfig(verifier_learning_rate=3e-6).resolved(facts(7e9, 100)).verifier_learning_rate == 3e-6  # fmt: skip
    assert StepDpoConfig(dpo_learning_rate=3e-6).resolved(facts(7e9, 100)).dpo_learning_rate == 3e-6


def test_the_task_says_where_steps_end_and_what_duplicates_are():
    step = StepDpoConfig().resolved(facts(2e5, 100))
    assert (step.split, step.separator, step.distinct_by) == ("separator", ";", "text")
    assert RftConfig().resolved(facts(2e5, 100)).distinct_by == "text"
    prose = replace(
        facts(7e9, 100), task=replace(ARITHMETIC, step_separator="\n", has_equations=True)
    )
    step = StepDpoConfig().resolved(prose)
    assert (step.split, step.distinct_by) == ("newline", "equations")
    assert RftConfig(distinct_by="numbers").resolved(prose).distinct_by == "numbers"


@pytest.mark.parametrize(
    "name", ["learning_rate", "train_batch_size", "start_steps", "warmup_steps"]
)
@pytest.mark.parametrize("value", [-1, -0.5])
def test_values_below_their_bound_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        StarConfig(**{name: value})


def test_parameters_are_counted_from_headers(tiny_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    assert count_parameters(str(tiny_model_dir)) == sum(one.numel() for one in model.parameters())


def test_the_estimate_is_the_work_divided_by_the_rates():
    cost = Cost(completions=1000, examples=600, tokens=5000, scored=300, first=Cost(100, 60))
    # first iteration: 100 / 10 + 60 / 2 = 40 s
    # sampling 1000 / 10 + 5000 / (10 * 50) = 110 s; scoring 300 / (3 * 2) = 50 s; training 300 s
    text = in_words(cost, Rates(prompts=32, completions=10, tokens=50, examples=2))
    assert "about 40.0 s for the first iteration, at most 7.7 min" in text
    assert "sampling 1.8 min, scoring 50.0 s, training 5.0 min" in text
    assert "10 completions/s of 50 tokens and 2 training examples/s" in text


SMALL = ["--task-options.digits", "1-2", "--task-options.train", "4", "--task-options.validation", "4",
         "--task-options.test", "4", "--iterations", "1", "--no-rationalization"]  # fmt: skip


def test_a_run_writes_the_chosen_values_and_continues_one_of_an_earlier_version(tmp_path, capsys):
    from selftaught.cli import main

    run = tmp_path / "run"
    given = ["star", *SMALL, "--start-steps", "2", "--out", str(run)]
    code = main([*given, "--dry-run"])
    assert code == 0, capsys.readouterr().err
    plan = capsys.readouterr().out
    assert "learning rate 0.001" in plan
    assert "48 examples per optimizer step: 48 per forward pass, 1 accumulated" in plan
    assert "training examples/s, measured now with" in plan
    assert not run.exists()

    first = main(given)
    assert first in (0, 3), capsys.readouterr().err  # 3: nothing was kept
    stored = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert "auto" not in stored.values()
    assert (stored["learning_rate"], stored["train_batch_size"], stored["warmup_steps"]) == (
        1e-3,
        48,
        10,
    )

    # As an earlier version wrote it: no global batch size, but accumulation.
    old = {name: value for name, value in stored.items() if name != "train_batch_size"}
    old["gradient_accumulation_steps"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    assert main(given) == first, capsys.readouterr().err
    old["gradient_accumulation_steps"] = 2
    (run / "config.yaml").write_text(yaml.safe_dump(old), encoding="utf-8")
    assert main(given) == 2
    assert "train_batch_size (was 96, now 48)" in capsys.readouterr().err


def test_a_stage_chooses_by_model_and_data(tmp_path, capsys):
    from selftaught.cli import main

    rows = [{"prompt": f"{n}+1=", "completion": f"#{n + 1}\n"} for n in range(12)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "model"
    command = ["train", "sft", "--data", str(data), "--out", str(out), "--max-steps", "1"]
    assert main(command) == 0, capsys.readouterr().err
    (config,) = tmp_path.glob("*.yaml")
    stored = yaml.safe_load(config.read_text(encoding="utf-8"))
    assert (stored["learning_rate"], stored["train_batch_size"]) == (1e-3, 8)
    assert stored["per_device_train_batch_size"] == 8

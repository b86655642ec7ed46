"""`--exclude-flagged`: what is not trained on, how it is counted, and that nothing else changes."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from naive_quiet import END, PAD, START, texts, tiny
from test_star import PROBLEMS, answers, run_bootstrap, star

from selftaught.cli import main
from selftaught.methods import star as star_module
from selftaught.methods.rft import RftConfig, run_rft
from selftaught.methods.star import StarConfig, run_star
from selftaught.methods.step_dpo import run_step_dpo
from selftaught.methods.step_values import StepDpoConfig
from selftaught.methods.vstar import VstarConfig, run_vstar
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.thought_filter import ThoughtFilter
from selftaught.records import Rollout, read_preferences, read_rollouts, write_jsonl
from selftaught.rollouts.flags import Flags
from selftaught.runs.folder import check_config
from selftaught.safety import CheckOptions, ExcludeOptions, open_checks
from selftaught.training import Training

SMALL = {
    "task_options": {"digits": "3", "train": 24, "validation": 4, "test": 8},
    "seed_samples": 8, "max_steps": 3, "temperature": 1.0, "train_batch_size": 16,
    "exclude_flagged": True, "check_patterns": ["[0-4]$"],
}  # fmt: skip


ROLLOUT = Rollout(PROBLEMS[0], "Q: a?", "x", "stop", "m", 0, answer="1", outcome="right")


def matches(completion: str) -> bool:
    """The pattern above, written again: sums that end with a digit below 5."""
    return completion[-1] in "01234"


def test_without_the_option_the_configuration_is_that_of_earlier_runs(tmp_path: Path):
    own = {one.name for one in fields(ExcludeOptions)}
    for config in (StarConfig(), RftConfig(), VstarConfig(), StepDpoConfig()):
        assert not own & set(config.plain())
    old = StarConfig(out=tmp_path).plain()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    check_config(tmp_path, StarConfig(out=tmp_path).plain(), ())
    excluding = StarConfig(out=tmp_path, exclude_flagged=True).plain()
    assert own <= set(excluding)
    with pytest.raises(ValueError, match="exclude_flagged"):
        check_config(tmp_path, excluding, ())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(excluding))
    with pytest.raises(ValueError, match="exclude_flagged"):
        check_config(tmp_path, StarConfig(out=tmp_path).plain(), ())


def test_star_keeps_no_rationale_that_leaks_its_hint_and_counts_why(tmp_path: Path):
    direct = {"a": "bad x #1", "b": "x #9", "c": "no idea"}
    hinted = {"b": "as the hint says #2", "c": "y #3"}
    config = StarConfig(exclude_flagged=True, check_patterns=["bad"])
    sampled, rationalized = run_bootstrap(config, answers(direct, hinted), tmp_path)
    run = star(config)
    assert [one.completion for one in run.kept([*sampled, *rationalized])] == ["bad x #1", "as the hint says #2", "y #3"]  # fmt: skip
    with open_checks(config) as checks:
        run = replace(run, flags=Flags(checks))
        assert [one.completion for one in run.kept([*sampled, *rationalized])] == ["y #3"]
        training = Training(tmp_path, 1, 0.0, 1, 0, [])
        funnel = star_module._funnel(run, PROBLEMS, sampled, rationalized, training)
        reasons = star_module._why_nothing(run, sampled, rationalized)
    assert funnel["dropped"] == {
        "wrong": 1, "no answer": 1, "flagged: pattern": 1, "flagged: hint mentioned": 1,
    }  # fmt: skip
    assert (funnel["kept"], funnel["kept rationalized"]) == (0, 1)
    assert "1 flagged: pattern, 1 no answer, 1 wrong" in reasons


def test_select_drops_flagged_completions_before_duplicates(tmp_path: Path, capsys):
    store = tmp_path / "graded.jsonl"
    # The first two have the same equations.
    texts = ["bad 1 + 0 = 1. #1", "good 1 + 0 = 1. #1", "x #1", "bad #1"]
    write_jsonl(store, [replace(ROLLOUT, completion=text, index=at) for at, text in enumerate(texts)])  # fmt: skip
    command = ["select", str(store), "--out", str(tmp_path / "examples.jsonl"), "--keep", "correct", "distinct",
               "--distinct-by", "equations"]  # fmt: skip
    assert main([*command, "--exclude-flagged", "--check-patterns", "bad"]) == 0
    made = [json.loads(line)["completion"] for line in (tmp_path / "examples.jsonl").read_text().splitlines()]  # fmt: skip
    assert made == ["good 1 + 0 = 1. #1", "x #1"]
    printed = capsys.readouterr().out
    assert "2 of 4 rollouts kept" in printed
    assert "Excluded by the checks: 2 flagged: pattern" in printed
    assert main([*command, "--exclude-flagged", "--check-patterns", "#"]) == 3
    assert "Dropped: 4 flagged: pattern" in capsys.readouterr().err


def test_flags_are_computed_once_for_the_same_text():
    with open_checks(CheckOptions(check_patterns=["bad"])) as checks:
        asked: list[str] = []
        find = checks.find
        checks.find = lambda texts, sources=None: asked.extend(texts) or find(texts, sources)  # type: ignore[method-assign]
        flags = Flags(checks)
        sampled = [replace(ROLLOUT, completion=text, index=at) for at, text in enumerate(["bad", "ok", "bad"])]  # fmt: skip
        assert flags.reasons(sampled) == ["flagged: pattern", None, "flagged: pattern"]
        assert flags.counts(sampled) == {"flagged: pattern": 2}
        assert asked == ["bad", "ok"]


@pytest.mark.slow
def test_star_trains_on_no_flagged_completion(tmp_path: Path):
    options = {name: value for name, value in SMALL.items() if name not in ("seed_samples", "max_steps")}  # fmt: skip
    summary = run_star(StarConfig.small(**options, out=tmp_path / "star", iterations=1, start_steps=3, n=4))  # fmt: skip
    assert summary
    row = json.loads((tmp_path / "star" / "metrics.jsonl").read_text().splitlines()[1])
    folder = tmp_path / "star" / "iteration-1"
    right = [one for one in read_rollouts(folder / "rollouts.graded.jsonl") if one.correct]
    flagged = sum(matches(one.completion) for one in right)
    assert row["funnel"]["dropped"]["flagged: pattern"] >= flagged > 0
    examples = [json.loads(line)["completion"] for line in (folder / "examples.jsonl").read_text().splitlines()]  # fmt: skip
    assert examples and not any(map(matches, examples))
    assert "flagged: pattern" in (tmp_path / "star" / "report.html").read_text()


@pytest.mark.slow
def test_rft_and_vstar_train_on_no_flagged_completion(tmp_path: Path):
    run_rft(RftConfig.small(**SMALL, out=tmp_path / "rft", k=[4]))
    run_vstar(VstarConfig.small(**SMALL, out=tmp_path / "vstar", iterations=1, k=6, candidates=2, verifier_max_steps=1))  # fmt: skip
    for out, store, folder in [("rft", "rollouts", "k-4"), ("vstar", "iteration-1/rollouts", "iteration-1")]:  # fmt: skip
        right = [one for one in read_rollouts(tmp_path / out / f"{store}.graded.jsonl") if one.correct]  # fmt: skip
        flagged = sum(matches(one.completion) for one in right)
        rows = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]  # fmt: skip
        assert rows[1]["flagged"] == {"flagged: pattern": flagged} and flagged
        file = tmp_path / out / folder / "examples.jsonl"
        examples = [json.loads(line)["completion"] for line in file.read_text().splitlines()]
        assert examples and not any(map(matches, examples))
        assert "Completions excluded by checks" in (tmp_path / out / "report.html").read_text()
    pairs = read_preferences(tmp_path / "vstar" / "verifier-1" / "preferences.jsonl")
    assert pairs and not any(matches(str(text)) for one in pairs for text in (one.chosen, one.rejected))  # fmt: skip


@pytest.mark.slow
def test_step_dpo_has_no_flagged_completion_in_a_pair(tmp_path: Path):
    run_step_dpo(StepDpoConfig.small(
        **SMALL, out=tmp_path / "step", n=8, wrong_per_problem=3, best_of=3, repeats=2, dpo_max_steps=1,
        methods=["dpo", "step_dpo"], sizes=[24], sft_sizes=[],
    ))  # fmt: skip
    folder = tmp_path / "step" / "size-24"
    pairs = read_preferences(folder / "dpo" / "preferences.jsonl")
    assert pairs and not any(matches(str(text)) for one in pairs for text in (one.chosen, one.rejected))  # fmt: skip
    values = [json.loads(line) for line in (folder / "continuations.values.jsonl").read_text().splitlines()]  # fmt: skip
    assert values and not any(matches(one["rollout"]["completion"]) for one in values)


# ---------------------------------------------------------------- Quiet-STaR


class Letters:
    """Decodes token ids into letters."""

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(chr(97 + one % 26) for one in ids)


def filtered(model: QuietLM, flag) -> tuple[float, float, float]:
    """REINFORCE loss and shares of thoughts with a positive and with a withheld advantage."""
    model.thought_filter = None
    if flag is not None:
        tokenizer: Any = Letters()
        model.thought_filter = ThoughtFilter(
            tokenizer, lambda texts: [flag(one) for one in texts], ""
        )
    ids, mask = texts([9, 7])
    out = model.train()(ids, mask, seed=1)
    assert out.reinforce is not None and out.positive is not None
    assert (out.withheld is None) == (flag is None)
    return float(out.reinforce), float(out.positive), float(out.withheld or 0)


@pytest.fixture
def model() -> QuietLM:
    torch.manual_seed(0)
    config = QuietConfig(thought_tokens=3, thoughts=3, lookahead=2, positions_per_chunk=3)
    made = QuietLM(tiny(), config, start=START, end=END, pad=PAD, check=False)
    torch.nn.init.normal_(made.mixing.layers[-1].weight, std=0.3)  # type: ignore[arg-type]
    return made


def test_a_flagged_thought_has_no_part_in_reinforce(model: QuietLM):
    """The loss is a sum over thoughts: those of a part and of its complement are the whole."""
    whole, positive, _ = filtered(model, None)
    assert positive > 0.2 and whole != 0

    def odd(text: str) -> bool:
        return sum(map(ord, text)) % 2 == 1

    none = filtered(model, lambda text: False)
    every = filtered(model, lambda text: True)
    one, other = filtered(model, odd), filtered(model, lambda text: not odd(text))
    assert none == (whole, positive, 0)
    assert every == (0, 0, pytest.approx(positive))
    assert one[0] + other[0] == pytest.approx(whole, rel=1e-5) and one[0] != 0 != other[0]
    assert one[1] + one[2] == pytest.approx(positive) == other[1] + other[2]


def test_nothing_is_withheld_in_an_evaluation(model: QuietLM):
    ids, mask = texts([9, 7])
    model.thought_filter = ThoughtFilter(Letters(), lambda texts: [True] * len(texts), "")  # type: ignore[arg-type]
    assert model.eval()(ids, mask, seed=1).withheld is None


def test_only_the_content_of_a_thought_with_a_positive_advantage_is_checked():
    seen: list[str] = []

    def flagging(given):
        seen.extend(given)
        return [one == "ab" for one in given]

    thoughts = torch.tensor([[[[0, 1, 30]], [[2, 30, 30]], [[0, 1, 30]], [[3, 3, 3]]]])
    asked = torch.tensor([[[True], [True], [True], [False]]])
    found = ThoughtFilter(Letters(), flagging, "").flagged(thoughts, asked, end=30)  # type: ignore[arg-type]
    assert found.flatten().tolist() == [True, False, True, False]
    assert seen == ["ab", "c"]


@pytest.mark.slow
def test_quiet_training_with_other_checks_is_another_training(
    tiny_model_dir: Path, tmp_path: Path, capsys
):
    data = tmp_path / "texts.txt"
    data.write_text("Q: What is 1 + 2?\nA: 3. So it is, indeed, and so it was before.\n" * 20)
    command = ["quiet", "train", "--model", str(tiny_model_dir), "--text", str(data), "--out", str(tmp_path / "run"),
               "--max-steps", "1", "--length", "16", "--quiet.thought_tokens", "2", "--quiet.initial_text", "A",
               "--training.use_cpu", "true", "--exclude-flagged", "--check-patterns"]  # fmt: skip
    assert main([*command, "a"]) == 0
    (entry,) = json.loads((tmp_path / "run" / "log.json").read_text())
    assert "withheld_advantages" in entry
    assert main([*command, "a"]) == 0  # finished
    capsys.readouterr()
    assert main([*command, "b"]) == 2
    assert "other options" in capsys.readouterr().err
    assert main([*command[:-1]]) == 2
    assert "Expected at least one check of thoughts" in capsys.readouterr().err

"""Fast Quiet-STaR: the loss of the student beside ordinary forward passes, stages, and the commands."""

import json
import math
from pathlib import Path

import pytest
import torch
from naive_quiet import END, PAD, START, quiet, states, texts, tiny
from test_quiet_training import TEXTS, thinking
from torch import Tensor
from transformers import AutoModelForCausalLM

from selftaught.cli import main
from selftaught.quiet.checkpoint import open_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.curriculum import (
    Stage,
    check_stage_folders,
    check_stages,
    stage_rate,
    stages_of,
    train_stages,
)
from selftaught.quiet.distillation import distill, distillation_loss, gain_kept
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import consecutive, spans
from selftaught.quiet.training import quiet_arguments


def naive_mixture(model: QuietLM, text: Tensor, *, writable: bool = True) -> Tensor:
    """Log-probabilities of the next token after a greedy thought, by forward passes of whole sequences."""
    thought = [*text.tolist(), START]
    for _ in range(model.quiet_config.thought_tokens):
        logits = states(model, torch.tensor(thought))[1][-1].clone()
        logits[[START, END, PAD]] = -torch.inf
        thought.append(int(logits.argmax()))
    before = states(model, text)[0][-1]
    after = states(model, torch.tensor([*thought, END]))[0][-1]
    weight = model.mixing(before, after)
    logits = model.base.lm_head((1 - weight) * before + weight * after).detach()
    if writable:  # a plain model does not write the tokens around a thought
        logits[[START, END]] = -torch.inf
    return logits.log_softmax(-1)


@pytest.mark.parametrize("loss", ["kl", "reward"])
def test_the_loss_is_that_of_its_definition(loss):
    teacher = quiet(tiny(), QuietConfig(thought_tokens=2))
    ids, mask = texts([7, 4])
    torch.manual_seed(5)
    logits = torch.randn(2, 7, 37, dtype=torch.double, requires_grad=True)
    expected = []
    for row, size in enumerate((7, 4)):
        for at in range(size - 1):
            taught = naive_mixture(teacher, ids[row, : at + 1])
            student = logits[row, at].log_softmax(-1)
            true = int(ids[row, at + 1])
            if loss == "kl":
                expected.append(
                    sum(p.exp() * (p - q) for p, q in zip(taught, student, strict=True) if p > -99)
                )
            else:
                reward = max(0.0, float(taught[true] - student[true].detach()))
                expected.append(-reward * student[true])
    wanted = torch.stack(expected).mean()
    found = distillation_loss(logits, teacher, ids, mask, loss=loss)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    (by_definition,) = torch.autograd.grad(wanted, logits, retain_graph=True)
    (got,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(got, by_definition, rtol=1e-4, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_that_diverges_is_reported(tiny_model_dir: Path, tmp_path: Path):
    teacher, tokenizer = thinking(tiny_model_dir)
    data = spans(TEXTS, tokenizer, length=24, least=4)
    arguments = quiet_arguments(
        tmp_path / "checkpoints", max_steps=9, learning_rate=1e30, warmup_steps=0,
        per_device_train_batch_size=2, use_cpu=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="The loss is nan at step"):
        distill(teacher, tokenizer, data, arguments, out=tmp_path)
    assert not (tmp_path / "model").exists()


def test_the_folder_of_another_training_is_refused_before_the_first_stage(tmp_path: Path):
    stages = stages_of(["4/2", "2/2"])
    check_stage_folders(tmp_path, stages)
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="another training than this curriculum"):
        check_stage_folders(tmp_path, stages)
    (tmp_path / "stage-1" / "model").mkdir(parents=True)
    check_stage_folders(tmp_path, stages)


def test_a_student_that_predicts_what_the_teacher_predicts_has_no_loss_and_the_whole_gain():
    teacher = quiet(tiny(), QuietConfig(thought_tokens=2))
    ids, mask = texts([6])
    logits = torch.stack([naive_mixture(teacher, ids[0, : at + 1]) for at in range(6)])[None]
    assert distillation_loss(logits, teacher, ids, mask).item() == pytest.approx(0, abs=1e-5)

    class Fixed(torch.nn.Module):
        def forward(self, **_: object):
            return type("Output", (), {"logits": logits})()

    rows = [(0, ids[0].tolist())]
    found = gain_kept(Fixed(), teacher, rows)  # type: ignore[arg-type]
    true = logits[0, :-1].gather(-1, ids[0, 1:, None]).mean().item()
    assert found.nll_student == pytest.approx(-true, abs=1e-5)
    taught = torch.stack(
        [naive_mixture(teacher, ids[0, : at + 1], writable=False) for at in range(5)]
    )
    expected = -taught.gather(-1, ids[0, 1:, None]).mean().item()
    assert found.nll_teacher == pytest.approx(expected, abs=1e-5)
    possible = found.nll_base - found.nll_teacher
    if possible > 0:
        assert found.kept == pytest.approx(
            (found.nll_base - found.nll_student) / possible, abs=1e-4
        )
    else:
        assert math.isnan(found.kept)
    same = gain_kept(teacher.base, teacher, rows)
    assert same.nll_student == pytest.approx(same.nll_base, abs=1e-5)


def test_stages_are_read_and_bad_ones_refused_in_words(tiny_model_dir: Path):
    assert stages_of(["16/8", "0/1"]) == [Stage(16, 8), Stage(0, 1)]
    for bad in ("16", "16/0", "a/2", "1/2/3", "-1/2", ""):
        with pytest.raises(ValueError, match="such as 16/8"):
            stages_of([bad])
    model, _ = thinking(tiny_model_dir)
    check_stages(model, stages_of(["400/8"]), 24)
    with pytest.raises(
        ValueError, match=r"Stage 2 of the curriculum .500/8. needs 534 tokens .* the model has 512"
    ):
        check_stages(model, stages_of(["16/8", "500/8"]), 24)


@pytest.mark.slow
def test_every_stage_starts_from_the_one_before_and_is_continued(
    tiny_model_dir: Path, tmp_path: Path
):
    def trained(out: Path, stop_after: int | None = None) -> list[dict[str, float]]:
        model, tokenizer = thinking(tiny_model_dir)
        steps: list[int] = []

        def progress(count: int) -> None:
            steps.append(count)
            if stop_after is not None and len(steps) >= stop_after:
                raise KeyboardInterrupt

        def arguments(folder: Path, number: int):
            rates.append(stage_rate(1e-3, number))
            return quiet_arguments(
                folder, max_steps=2, learning_rate=rates[-1], seed=number, logging_steps=1, per_device_train_batch_size=2,
                save_steps=1, use_cpu=True, warmup_steps=1,
            )  # fmt: skip

        rates: list[float] = []
        log = train_stages(
            model, tokenizer, spans(TEXTS, tokenizer, length=24, least=6), stages_of(["3/2", "1/1"]),
            arguments, out=out, progress=progress,
        )  # fmt: skip
        assert rates == [1e-3, 5e-4]
        return log

    log = trained(tmp_path / "whole")
    assert [(entry["step"], entry["stage"]) for entry in log] == [(1, 1), (2, 1), (3, 2), (4, 2)]  # fmt: skip
    first, last = (open_quiet(tmp_path / "whole" / part)[0] for part in ("stage-1/model", "model"))
    lengths = [(one.quiet_config.thought_tokens, one.quiet_config.lookahead) for one in (first, last)]  # fmt: skip
    assert lengths == [(3, 2), (1, 1)]
    for stop in (3,):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / f"cut{stop}", stop)
        trained(tmp_path / f"cut{stop}")
        again = open_quiet(tmp_path / f"cut{stop}" / "model")[0].state_dict()
        for name, weight in last.state_dict().items():
            assert torch.equal(weight, again[name]), name
    moved = [float((a - b).abs().max()) for a, b in zip(first.state_dict().values(), last.state_dict().values(), strict=True)]  # fmt: skip
    # A step of Adam moves a weight by at most about its learning rate: 2 steps of 5e-4.
    assert 0 < max(moved[:-8]) < 5e-3


@pytest.mark.slow
def test_a_student_learns_what_its_teacher_predicts(tiny_model_dir: Path, tmp_path: Path):
    teacher, tokenizer = thinking(tiny_model_dir)
    with torch.no_grad():  # thoughts that change the prediction
        torch.manual_seed(1)
        last = teacher.mixing.layers[-1].weight
        assert isinstance(last, Tensor)
        last.uniform_(0.5, 1.0)  # its inputs are at least 0
    data = spans(TEXTS, tokenizer, length=24, least=4)
    ids = torch.tensor([data[0]["input_ids"]])
    mask = torch.ones_like(ids)
    before = distillation_loss(teacher.base(ids).logits, teacher, ids, mask).item()
    arguments = quiet_arguments(
        tmp_path / "out" / "checkpoints", max_steps=20, learning_rate=2e-3, warmup_steps=1,
        per_device_train_batch_size=8, use_cpu=True,
    )  # fmt: skip
    first = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    log = distill(teacher, tokenizer, data, arguments, out=tmp_path / "out")
    assert all(torch.equal(weight, first[name]) for name, weight in teacher.state_dict().items())
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert type(student).__name__ == type(teacher.base).__name__
    after = distillation_loss(student(ids).logits, teacher, ids, mask).item()
    assert len(log) == 20 and after < 0.75 * before
    assert distill(teacher, tokenizer, data, arguments, out=tmp_path / "out") == log
    with pytest.raises(ValueError, match="other options"):
        distill(teacher, tokenizer, data, arguments, out=tmp_path / "out", loss="reward")
    rows = consecutive(data)[:4]
    assert gain_kept(student, teacher, rows).tokens == sum(len(ids) - 1 for _, ids in rows)


@pytest.mark.slow
def test_the_commands_train_stages_and_a_student(tiny_model_dir: Path, tmp_path: Path, capsys):
    path, out = tmp_path / "texts.jsonl", tmp_path / "quiet"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    common = ["--text", str(path), "--length", "24", "--max-steps", "2", "--training.use_cpu", "true",
              "--held-out", "4"]  # fmt: skip
    train = ["quiet", "train", "--model", str(tiny_model_dir), "--out", str(out), "--quiet.initial_text", "A", *common]  # fmt: skip
    for wrong, words in (
        (["--quiet.lookahead", "2"], "--curriculum sets thought_tokens and lookahead"),
        (["--use-peft"], "Leave out --use-peft"),
    ):
        assert main([*train, "--curriculum", "2/2", "1/1", *wrong]) == 2
        assert words in capsys.readouterr().err
    train += ["--curriculum", "2/2", "1/1"]
    assert main([*train, "--dry-run"]) == 0
    assert "2/2, 1/1" in capsys.readouterr().out
    assert main(train) == 0
    assert "4 steps" in capsys.readouterr().out
    assert main([*train, "--dry-run"]) == 0
    assert "contains the finished model" in capsys.readouterr().out
    student = tmp_path / "student"
    assert main(["quiet", "distill", "--model", str(out / "model"), "--out", str(student), *common]) == 0  # fmt: skip
    assert "| student, without thoughts |" in capsys.readouterr().out
    assert json.loads((student / "kept.json").read_text())["tokens"] > 20
    assert json.loads((student / "model" / "config.json").read_text())["model_type"] != "selftaught_quiet"  # fmt: skip

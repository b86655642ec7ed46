"""Fine-tuning: what is learned, what is dropped, how it resumes."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.records import Example
from selftaught.training import lora_config, sft_config, tokenized, train_sft

EXAMPLES = [Example(f"{a}+{b}=", f"{a + b}") for a in range(4) for b in range(4)]
OPTIONS = {
    "max_steps": 6, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_steps": 2,
    "seed": 3, "lr_scheduler_type": "constant", "max_length": 32,
}  # fmt: skip


def config(folder: Path, **options):
    return sft_config(folder / "checkpoints", **(OPTIONS | options))


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_the_loss_is_on_the_completion_and_its_end_and_nothing_else(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (row,), too_long = tokenized([Example("1+2=", "3")], tokenizer, 32)
    assert tokenizer.decode(row["input_ids"]) == "1+2=3" + tokenizer.eos_token
    learned = [token for token in row["labels"] if token != -100]
    assert tokenizer.decode(learned) == "3" + tokenizer.eos_token
    assert too_long == 0


def test_examples_that_do_not_fit_are_dropped_whole_and_counted(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    short, long = Example("1+1=", "2"), Example("1+1=", "2" * 50)
    rows, too_long = tokenized([long, short, long], tokenizer, 32)
    assert (len(rows), too_long) == (1, 2)
    with pytest.raises(ValueError, match="All 2 examples are longer than max_length=32"):
        tokenized([long, long], tokenizer, 32)


def test_no_examples_at_all_is_an_error(tiny_model_dir: Path):
    with pytest.raises(ValueError, match="at least one example"):
        tokenized([], AutoTokenizer.from_pretrained(tiny_model_dir), 32)


def test_one_step_equals_a_step_made_by_hand(tiny_model_dir: Path, tmp_path: Path):
    """AdamW (beta 0.9, 0.999; eps 1e-8; no decay), gradients clipped to norm 1, as TRL is asked."""
    done = train_sft(
        tiny_model_dir, EXAMPLES[:4], config(tmp_path, max_steps=1), out=tmp_path / "model"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for example in EXAMPLES[:4]:
        prompt = tokenizer(example.prompt)["input_ids"]
        ids = torch.tensor([*prompt, *tokenizer(example.completion)["input_ids"], tokenizer.eos_token_id])  # fmt: skip
        log_probs = torch.log_softmax(model(ids[None]).logits[0], dim=-1)
        losses += [-log_probs[i - 1, ids[i]] for i in range(len(prompt), len(ids))]
    loss = torch.stack(losses).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert done.loss == pytest.approx(loss.item(), rel=1e-4)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    for (name, ours), by_hand in zip(trained.named_parameters(), model.parameters(), strict=True):
        # Adam's first step is lr * g / |g|: entries whose gradient is rounding noise may differ
        close = torch.isclose(ours, by_hand, atol=1e-4).float().mean()
        assert close > 0.99, name


def test_training_learns_and_leaves_an_ordinary_model_folder(tiny_model_dir: Path, tmp_path: Path):
    done = train_sft(
        tiny_model_dir, EXAMPLES, config(tmp_path, max_steps=60), out=tmp_path / "model"
    )
    assert done.steps == 60
    assert done.trained_on == 16
    assert done.log[-1]["loss"] < done.log[0]["loss"] / 2
    assert [row["step"] for row in done.log] == list(range(1, 61))
    assert not (tmp_path / "checkpoints").exists()
    AutoTokenizer.from_pretrained(tmp_path / "model")


def test_a_finished_training_is_not_repeated(tiny_model_dir: Path, tmp_path: Path):
    first = train_sft(tiny_model_dir, EXAMPLES, config(tmp_path), out=tmp_path / "model")
    stamp = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    again = train_sft(tiny_model_dir, EXAMPLES, config(tmp_path), out=tmp_path / "model")
    assert again == first
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == stamp


class Killed(BaseException):
    """What SIGKILL is to a process: nothing after it runs."""


@pytest.mark.parametrize("torn", [False, True])
def test_a_training_killed_in_the_middle_ends_with_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path, torn: bool
):
    whole = train_sft(
        tiny_model_dir, EXAMPLES, config(tmp_path / "a"), out=tmp_path / "a" / "model"
    )
    steps = 0

    def killer(count: int) -> None:
        nonlocal steps
        steps += count
        if steps == 5:
            raise Killed

    with pytest.raises(Killed):
        train_sft(
            tiny_model_dir, EXAMPLES, config(tmp_path / "b"), out=tmp_path / "b" / "model",
            progress=killer,
        )  # fmt: skip
    assert not (tmp_path / "b" / "model").exists()
    if torn:
        state = tmp_path / "b" / "checkpoints" / "checkpoint-4" / "trainer_state.json"
        state.write_text(state.read_text()[:100])
    seen: list[int] = []
    resumed = train_sft(
        tiny_model_dir, EXAMPLES, config(tmp_path / "b"), out=tmp_path / "b" / "model",
        progress=seen.append,
    )  # fmt: skip
    assert seen == ([1] * 6 if torn else [4, 1, 1])  # what the last whole checkpoint had, first
    assert weights(resumed.model) == weights(whole.model)
    assert resumed.log == whole.log
    assert json.loads((resumed.model / "training.json").read_text())["steps"] == 6


def test_a_loss_that_is_not_a_number_stops_the_training(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"loss is (nan|inf).*Lower learning_rate"):
        train_sft(
            tiny_model_dir, EXAMPLES, config(tmp_path, learning_rate=1e30, max_grad_norm=0.0),
            out=tmp_path / "model",
        )  # fmt: skip
    assert not (tmp_path / "model").exists()


def test_a_lora_adapter_is_merged_into_an_ordinary_folder(tiny_model_dir: Path, tmp_path: Path):
    done = train_sft(
        tiny_model_dir, EXAMPLES, config(tmp_path), out=tmp_path / "model",
        peft_config=lora_config(r=4, alpha=8, target_modules="all-linear"),
    )  # fmt: skip
    assert not list(done.model.glob("adapter*"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(done.model, dtype=torch.float32).state_dict()
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed
    assert all("proj" in name for name in changed)  # linear layers and nothing else
    assert math.isfinite(done.loss)


def test_an_option_trl_does_not_know_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no_such_option"):
        sft_config(tmp_path, no_such_option=1)


def test_other_examples_are_not_taken_for_a_finished_training(tiny_model_dir: Path, tmp_path: Path):
    train_sft(tiny_model_dir, EXAMPLES, config(tmp_path, max_steps=1), out=tmp_path / "model")
    with pytest.raises(ValueError, match="made from another model, other examples"):
        train_sft(
            tiny_model_dir, EXAMPLES[:3], config(tmp_path, max_steps=1), out=tmp_path / "model"
        )


def test_a_disk_that_is_full_when_weights_are_written_is_told(tiny_model_dir: Path, tmp_path: Path):
    code = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_training as here
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    here.train_sft({str(tiny_model_dir)!r}, here.EXAMPLES, here.config(Path({str(tmp_path)!r})),
                   out=Path({str(tmp_path)!r}) / "model")
except OSError as error:
    print(error.strerror)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Could not write to" in done.stdout
    assert "repeat the command to continue" in done.stdout
    whole = train_sft(tiny_model_dir, EXAMPLES, config(tmp_path), out=tmp_path / "model")
    assert whole.steps == 6

"""Fine-tuning: what is learned, what is dropped, how it resumes."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from narrowed import tensor, token_id
from small_tokenizers import CHATML, byte_level
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    set_seed,
)

from selftaught.records import (
    Example,
    FinishReason,
    Preference,
    Problem,
    Rollout,
    plain_fields,
    read_examples,
    write_jsonl,
)
from selftaught.training import (
    LabeledCompletion,
    completion_ids,
    dpo,
    dpo_config,
    lora_config,
    model_folder,
    outcome_config,
    preference_rows,
    sft_config,
    tokenized,
    train_dpo,
    train_outcome,
    train_sft,
    train_weighted,
    trainer,
    written_ids,
)

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


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_bfloat16_trains_without_an_accelerator(tiny_model_dir: Path, tmp_path: Path):
    trained = train_sft(
        str(tiny_model_dir),
        EXAMPLES,
        config(tmp_path, bf16=True, max_steps=1),
        out=tmp_path / "out",
    )
    assert math.isfinite(trained.loss)
    assert outcome_config(tmp_path, max_length=32, bf16=True).bf16


def test_other_examples_are_not_taken_for_a_finished_training(tiny_model_dir: Path, tmp_path: Path):
    train_sft(tiny_model_dir, EXAMPLES, config(tmp_path, max_steps=1), out=tmp_path / "model")
    with pytest.raises(ValueError, match="made from another model, other examples"):
        train_sft(
            tiny_model_dir, EXAMPLES[:3], config(tmp_path, max_steps=1), out=tmp_path / "model"
        )


@pytest.mark.slow
def test_a_disk_that_is_full_when_weights_are_written_raises_an_error(
    tiny_model_dir: Path, tmp_path: Path
):
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
    assert "repeat the command to resume" in done.stdout
    whole = train_sft(tiny_model_dir, EXAMPLES, config(tmp_path), out=tmp_path / "model")
    assert whole.steps == 6


def test_another_lora_is_not_taken_for_a_finished_training(tiny_model_dir: Path, tmp_path: Path):
    first, other = (lora_config(r=4, alpha=8, target_modules=name) for name in ("q_proj", "v_proj"))
    out = tmp_path / "model"
    settings = config(tmp_path, max_steps=1)
    train_sft(tiny_model_dir, EXAMPLES, settings, peft_config=first, out=out)
    same = lora_config(r=4, alpha=8, target_modules="q_proj")
    train_sft(tiny_model_dir, EXAMPLES, settings, peft_config=same, out=out)
    with pytest.raises(ValueError, match="or other options"):
        train_sft(tiny_model_dir, EXAMPLES, settings, peft_config=other, out=out)


# Preferences


def tokens(folder: Path, text: str) -> tuple[int, ...]:
    return tuple(AutoTokenizer.from_pretrained(folder)(text)["input_ids"])


def log_prob(model, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """Of a whole completion, by one forward pass of it alone."""
    log_probs = torch.log_softmax(model(torch.tensor([[*prompt, *completion]])).logits[0], dim=-1)
    return sum(
        (log_probs[len(prompt) - 1 + at, token] for at, token in enumerate(completion)),
        torch.zeros(()),
    )


def model_of(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def preferences(tiny_model_dir: Path) -> list[Preference]:
    """Of many lengths; a rejected side that was cut by length; one continued after a common start."""
    end = AutoTokenizer.from_pretrained(tiny_model_dir).eos_token_id

    def ids(text: str) -> tuple[int, ...]:
        return tokens(tiny_model_dir, text)

    return [
        Preference("1+2=", "3", "12 + 7 = 19. 1", chosen_ids=(*ids("3"), end),
                   rejected_ids=ids("12 + 7 = 19. 1")),
        Preference("Tom has 3+4=", "7. The answer is 7.", "8", chosen_ids=(*ids("7. The answer is 7."), end),
                   rejected_ids=(*ids("8"), end)),
        Preference("2+2=", "4", "5", prefix_tokens=ids("2 + 2 = "), chosen_ids=(*ids("4"), end),
                   rejected_ids=ids("5")),
        Preference("40+1=", "41", "40", chosen_ids=(*ids("41"), end), rejected_ids=(*ids("40"), end)),
    ]  # fmt: skip


def sides(
    one: Preference, folder: Path
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What stands before both sides, and the two."""
    assert one.chosen_ids is not None and one.rejected_ids is not None
    assert isinstance(one.prompt, str)
    return (*tokens(folder, one.prompt), *one.prefix_tokens), one.chosen_ids, one.rejected_ids


DPO = {"max_length": 48, "beta": 0.5}


def dpo_options(folder: Path, **options):
    return dpo_config(folder / "checkpoints", **(OPTIONS | DPO | options))


def observed_dpo(model: Path, preferences: list[Preference], settings, out: Path, **options):
    """`train_dpo`, and the trainer it used."""
    used = []

    def open_trainer(**given):
        used.append(dpo._trainer(**given))
        return used[-1]

    recipe = trainer.Recipe(
        lambda tokenizer: preference_rows(preferences, tokenizer, settings.max_length),
        list(preferences), open_trainer, trainer.causal_lm,
    )  # fmt: skip
    done = trainer.fit(model, recipe, settings, out=out, **options)
    return done, used[0]


def test_tokens_of_a_preference_are_learned_from_as_they_are(tiny_model_dir: Path, preferences):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows, too_long = preference_rows(preferences, tokenizer, 48)
    for row, one in zip(rows, preferences, strict=True):
        before, chosen, rejected = map(list, sides(one, tiny_model_dir))
        assert row == {"prompt_ids": before, "chosen_ids": chosen, "rejected_ids": rejected}
    assert tokenizer.eos_token_id not in rows[0]["rejected_ids"]  # it was cut, and is not ended
    assert too_long == 0


def test_sides_that_are_texts_end_with_one_end_token(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (row,), _ = preference_rows([Preference("1+2=", "3", "3 + 40 =")], tokenizer, 48)
    assert tokenizer.decode(row["prompt_ids"]) == "1+2="
    assert tokenizer.decode(row["chosen_ids"]) == "3<|end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "3 + 40 =<|end|>"


def test_sides_that_are_messages_end_where_sampling_stops(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for one in messages %}<{{ one.role }}>{{ one.content }}.{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = [{"role": "user", "content": "1+2"}]
    three, four = ([{"role": "assistant", "content": text}] for text in ("3", "4"))
    (row,), _ = preference_rows([Preference(prompt, three, four)], tokenizer, 48)
    assert tokenizer.decode(row["prompt_ids"]) == "<user>1+2.<assistant>"
    # The template's "." is no token that sampling stops at, so the end-of-text token is learned.
    assert tokenizer.decode(row["chosen_ids"]) == "3<|end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "4<|end|>"
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>{% endif %}"
    (row,), _ = preference_rows([Preference(prompt, three, four)], tokenizer, 48)
    assert tokenizer.decode(row["prompt_ids"]) == "<user>1+2.<assistant><think>"
    assert tokenizer.decode(row["chosen_ids"]) == "3<|end|>"


def test_preferences_that_do_not_fit_are_dropped_whole_and_counted(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompt = tokens(tiny_model_dir, "1+2=")
    fits = Preference("1+2=", "", "", prefix_tokens=(5,), chosen_ids=(6,) * 20, rejected_ids=(7,))
    one_more = Preference(
        "1+2=", "", "", prefix_tokens=(5,), chosen_ids=(6,), rejected_ids=(7,) * 21
    )
    longest = len(prompt) + 21
    rows, too_long = preference_rows([one_more, fits, one_more], tokenizer, longest)
    assert ([row["chosen_ids"] for row in rows], too_long) == ([[6] * 20], 2)
    assert preference_rows([fits, one_more], tokenizer, None)[1] == 0
    with pytest.raises(ValueError, match=f"All 1 preferences are longer than max_length={longest}"):
        preference_rows([one_more], tokenizer, longest)
    with pytest.raises(ValueError, match="at least one preference"):
        preference_rows([], tokenizer, longest)


def test_a_training_without_preferences_is_refused(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="at least one preference"):
        train_dpo(tiny_model_dir, [], dpo_options(tmp_path), out=tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_batch_that_is_learned_from_has_the_very_tokens_and_no_loss_before_them(
    tiny_model_dir: Path, tmp_path: Path, preferences
):
    _, trainer = observed_dpo(
        tiny_model_dir, preferences, dpo_options(tmp_path, max_steps=1), tmp_path / "model"
    )
    (batch,) = trainer.get_train_dataloader()
    found = {
        (tuple(ids[there == 1].tolist()), tuple(ids[learned == 1].tolist()))
        for ids, there, learned in zip(
            batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
        )
    }
    expected = set()
    for one in preferences:
        before, chosen, rejected = sides(one, tiny_model_dir)
        expected |= {((*before, *chosen), chosen), ((*before, *rejected), rejected)}
    assert found == expected


def test_the_reference_is_the_start_model_and_not_what_it_was_made_from(
    tiny_model_dir: Path, tmp_path: Path, preferences
):
    start = train_sft(
        tiny_model_dir, EXAMPLES, config(tmp_path / "sft"), out=tmp_path / "sft" / "model"
    ).model
    done, trainer = observed_dpo(start, preferences, dpo_options(tmp_path), tmp_path / "model")
    assert trainer.ref_model is None
    loaded, base = model_of(start), model_of(tiny_model_dir)
    with torch.no_grad():
        for row, one in zip(trainer.train_dataset, preferences, strict=True):
            before, chosen, rejected = sides(one, start)
            for name, side in (("ref_chosen_logps", chosen), ("ref_rejected_logps", rejected)):
                assert row[name] == pytest.approx(float(log_prob(loaded, before, side)), abs=1e-3)
                assert abs(row[name] - float(log_prob(base, before, side))) > 0.1
    assert done.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert done.log[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert done.log[-1]["loss"] < 0.5
    assert done.log[-1]["rewards/margins"] > 0.5
    assert done.tokens == 6 * sum(
        2 * len(before) + len(chosen) + len(rejected)
        for before, chosen, rejected in (sides(one, start) for one in preferences)
    )


def test_a_training_on_preferences_killed_in_the_middle_ends_with_the_same_bytes(
    tiny_model_dir: Path, tmp_path: Path, preferences
):
    several = [*preferences, *preferences[:2]]
    settings = dpo_options(tmp_path / "a")
    whole, first = observed_dpo(tiny_model_dir, several, settings, tmp_path / "a" / "model")
    steps = 0

    def killer(count: int) -> None:
        nonlocal steps
        steps += count
        if steps == 5:
            raise Killed

    settings, out = dpo_options(tmp_path / "b"), tmp_path / "b" / "model"
    with pytest.raises(Killed):
        train_dpo(tiny_model_dir, several, settings, out=out, progress=killer)
    assert not out.exists()
    seen: list[int] = []
    resumed, again = observed_dpo(tiny_model_dir, several, settings, out, progress=seen.append)
    assert seen == [4, 1, 1]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):  # not of the checkpoint's weights
        assert again.train_dataset[name] == first.train_dataset[name]
    assert weights(resumed.model) == weights(whole.model)
    assert resumed.log == whole.log
    with pytest.raises(ValueError, match="other options"):
        train_dpo(tiny_model_dir, several, dpo_options(tmp_path / "b", beta=0.4), out=out)


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_on_preferences_equal_those_made_by_hand(
    tiny_model_dir: Path, tmp_path: Path, preferences, parts: int
):
    """Eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290), by plain gradient descent."""
    settings = dpo_options(tmp_path, max_steps=3, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
                           per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts)  # fmt: skip
    done = train_dpo(tiny_model_dir, preferences, settings, out=tmp_path / "model")
    model, reference = model_of(tiny_model_dir), model_of(tiny_model_dir)
    for step in range(3):
        losses, margins = [], []
        for one in preferences:
            before, chosen, rejected = sides(one, tiny_model_dir)
            with torch.no_grad():
                gap = log_prob(reference, before, chosen) - log_prob(reference, before, rejected)
            margin = log_prob(model, before, chosen) - log_prob(model, before, rejected) - gap
            losses.append(-torch.log(1 / (1 + torch.exp(-0.5 * margin))))
            margins.append(0.5 * margin.item())
        loss = torch.stack(losses).mean()
        assert done.log[step]["loss"] == pytest.approx(loss.item(), abs=1e-3)
        assert done.log[step]["rewards/margins"] == pytest.approx(sum(margins) / 4, abs=3e-3)
        right = sum(margin > 0 for margin in margins) / 4
        assert step == 0 or done.log[step]["rewards/accuracies"] == pytest.approx(right)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.05 * tensor(weight.grad)
    assert loss.item() < math.log(2) - 0.05
    trained = model_of(tmp_path / "model")
    for (name, ours), by_hand in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, by_hand, atol=1e-4), name


def test_a_lora_trained_on_preferences_is_merged_and_has_the_base_as_reference(
    tiny_model_dir: Path, tmp_path: Path, preferences
):
    done, trainer = observed_dpo(
        tiny_model_dir, preferences, dpo_options(tmp_path, max_steps=20), tmp_path / "model",
        peft_config=lora_config(r=4, alpha=8, target_modules="all-linear"),
    )  # fmt: skip
    assert not list(done.model.glob("adapter*"))
    base, merged = model_of(tiny_model_dir), model_of(done.model)
    before, chosen, rejected = sides(preferences[0], tiny_model_dir)
    with torch.no_grad():
        expected = float(log_prob(base, before, chosen))
        assert trainer.train_dataset[0]["ref_chosen_logps"] == pytest.approx(expected, abs=1e-3)
        gap = log_prob(base, before, chosen) - log_prob(base, before, rejected)
        assert log_prob(merged, before, chosen) - log_prob(merged, before, rejected) > gap + 1
    assert done.log[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    changed = {name for name, weight in base.state_dict().items()
               if not torch.equal(weight, merged.state_dict()[name])}  # fmt: skip
    assert changed and all("proj" in name for name in changed)


def test_options_that_change_the_reference_or_that_nobody_knows_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="precompute_ref_log_probs must stay true"):
        dpo_config(tmp_path, precompute_ref_log_probs=False)
    with pytest.raises(ValueError, match=r"no_such_option.*dpo_trainer"):
        dpo_config(tmp_path, no_such_option=1)


# A weight for every token


@pytest.fixture(scope="module")
def weighed(tiny_model_dir: Path) -> list[dict]:
    """Rows of many lengths whose weights are of both signs."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    several = [Example("1+2=", "3 and so on"), Example("Q: 4+4=", "8"), Example("5+", "9 4"),
               Example("What is 40+2=", "42.")]  # fmt: skip
    rows, _ = tokenized(several, tokenizer, None)
    draw = torch.Generator().manual_seed(0)
    return [
        row | {"weights": (2 * torch.rand(len(row["labels"]), generator=draw) - 0.5).tolist()}
        for row in rows
    ]


def test_rows_of_equal_weights_are_learned_as_without_weights(tiny_model_dir: Path, tmp_path: Path):
    plain = train_sft(
        tiny_model_dir, EXAMPLES, config(tmp_path / "a"), out=tmp_path / "a" / "model"
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = [row | {"weights": [1.0] * len(row["input_ids"])}
            for row in tokenized(EXAMPLES, tokenizer, 32)[0]]  # fmt: skip
    found = train_weighted(
        tiny_model_dir, rows, config(tmp_path / "b"), out=tmp_path / "b" / "model"
    )
    assert [one["loss"] for one in found.log] == pytest.approx([one["loss"] for one in plain.log], rel=1e-3)  # fmt: skip
    assert (found.steps, found.trained_on, found.tokens) == (6, 16, plain.tokens)
    theirs = model_of(plain.model).state_dict()
    for name, weight in model_of(found.model).state_dict().items():
        assert torch.isclose(weight, theirs[name], atol=1e-3).float().mean() > 0.99, name


@pytest.mark.parametrize("parts", [1, 2])
def test_steps_with_weights_equal_those_made_by_hand(
    tiny_model_dir: Path, tmp_path: Path, weighed: list[dict], parts: int
):
    settings = config(tmp_path, max_steps=2, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
                      per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts)  # fmt: skip
    done = train_weighted(tiny_model_dir, weighed, settings, out=tmp_path / "model")
    model = model_of(tiny_model_dir)
    for step in range(2):
        total, count = torch.zeros(()), 0
        for row in weighed:
            log_probs = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0], dim=-1)
            for at, label in enumerate(row["labels"]):
                if label != -100:
                    total = total - row["weights"][at] * log_probs[at - 1, label]
                    count += 1
        loss = total / count
        assert done.log[step]["loss"] == pytest.approx(loss.item(), abs=2e-4)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.05 * tensor(weight.grad)
    trained = model_of(tmp_path / "model")
    for (name, ours), by_hand in zip(trained.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(ours, by_hand, atol=1e-4), name


def test_without_weight_nothing_is_learned(tiny_model_dir: Path, tmp_path: Path, weighed):
    nothing = [row | {"weights": [0.0] * len(row["input_ids"])} for row in weighed]
    done = train_weighted(tiny_model_dir, nothing, config(tmp_path), out=tmp_path / "model")
    before = model_of(tiny_model_dir).state_dict()
    for name, weight in model_of(done.model).state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_rows_that_do_not_fit_are_counted_and_other_weights_are_another_training(
    tiny_model_dir: Path, tmp_path: Path, weighed
):
    long = {"input_ids": [5] * 33, "labels": [5] * 33, "weights": [1.0] * 33}
    out = tmp_path / "model"
    done = train_weighted(tiny_model_dir, [long, *weighed], config(tmp_path, max_steps=1), out=out)
    assert (done.trained_on, done.too_long) == (4, 1)
    with pytest.raises(ValueError, match="other examples"):
        others = [row | {"weights": [1.0] * len(row["input_ids"])} for row in weighed]
        train_weighted(tiny_model_dir, [long, *others], config(tmp_path, max_steps=1), out=out)
    with pytest.raises(ValueError, match="at least one"):
        train_weighted(tiny_model_dir, [], config(tmp_path), out=tmp_path / "none")


# An outcome reward model


def outcome_options(folder: Path, **options):
    given = {"max_length": 32, "max_steps": 1, "learning_rate": 1e-2, "seed": 3, "use_cpu": True,
             "per_device_train_batch_size": 4, "lr_scheduler_type": "constant"}  # fmt: skip
    return outcome_config(folder / "checkpoints", **(given | options))


def labeled(folder: Path, several: list[tuple[str, str, bool]]) -> list[LabeledCompletion]:
    return [
        LabeledCompletion(prompt, tokens(folder, text), right) for prompt, text, right in several
    ]


MIXED = [("1+2=", "3", True), ("Q: 1+2=", "it is 4.", False), ("5+5=", "10.", True),
         ("What is 40+2=", "42 or so", True)]  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2])
def test_the_loss_of_an_outcome_model_is_the_cross_entropy_by_hand(
    tiny_model_dir: Path, tmp_path: Path, parts: int
):
    """And its gradient: a step of plain descent on the head, whose input is the last state."""
    settings = outcome_options(
        tmp_path, optim="sgd", learning_rate=0.05, max_grad_norm=0.0,
        per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts,
    )  # fmt: skip
    done = train_outcome(
        tiny_model_dir, labeled(tiny_model_dir, MIXED), settings, out=tmp_path / "m"
    )
    set_seed(3)
    start = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    head = start.score.weight.detach().clone()
    body = model_of(tiny_model_dir).model
    loss, gradient = 0.0, torch.zeros_like(head)
    for prompt, text, right in MIXED:
        ids = torch.tensor([[*tokens(tiny_model_dir, prompt), *tokens(tiny_model_dir, text)]])
        with torch.no_grad():
            last_state = body(ids).last_hidden_state[0, -1]
            chance = 1 / (1 + math.exp(-float(head[0] @ last_state)))
        loss -= math.log(chance if right else 1 - chance) / 4
        gradient += (chance - right) * last_state[None] / 4
    assert done.log[0]["loss"] == pytest.approx(loss, abs=1e-4)
    trained = AutoModelForSequenceClassification.from_pretrained(done.model)
    assert torch.allclose(trained.score.weight, head - 0.05 * gradient, atol=1e-4)


@pytest.mark.parametrize("lora", [False, True])
def test_an_outcome_model_learns_to_tell_right_from_wrong(
    tiny_model_dir: Path, tmp_path: Path, lora: bool
):
    several = labeled(
        tiny_model_dir,
        [(f"{a}+{b}=", f"{a + b}" if right else f"it is {a + b}.", right)
         for a in range(3) for b in range(3) for right in (True, False)],
    )  # fmt: skip
    peft = lora_config(r=4, alpha=8, target_modules="all-linear") if lora else None
    seen: list[int] = []
    done = train_outcome(tiny_model_dir, several, outcome_options(tmp_path, max_steps=40),
                         out=tmp_path / "model", peft_config=peft, progress=seen.append)  # fmt: skip
    assert sum(seen) == done.steps == 40
    assert done.trained_on == 18
    assert not list(done.model.glob("adapter*"))
    model = AutoModelForSequenceClassification.from_pretrained(done.model).eval()
    for one in several:
        assert isinstance(one.prompt, str)
        ids = torch.tensor([[*tokens(tiny_model_dir, one.prompt), *one.ids]])
        with torch.no_grad():
            assert (model(ids).logits.item() > 0) == one.right


def test_completions_of_one_kind_are_no_outcomes_to_learn(tiny_model_dir: Path, tmp_path: Path):
    out = tmp_path / "model"
    right = labeled(tiny_model_dir, [("1+2=", "3", True), ("2+2=", "4", True)])
    with pytest.raises(ValueError, match="both right and wrong completions to train on, got 2"):
        train_outcome(tiny_model_dir, right, outcome_options(tmp_path), out=out)
    long = LabeledCompletion("1+2=", (5,) * 40, False)
    done = train_outcome(
        tiny_model_dir, [*labeled(tiny_model_dir, MIXED), long], outcome_options(tmp_path), out=out
    )
    assert (done.trained_on, done.too_long) == (4, 1)
    with pytest.raises(ValueError, match="of those that fit max_length=32 tokens"):
        train_outcome(
            tiny_model_dir, [*right, long], outcome_options(tmp_path), out=tmp_path / "other"
        )
    with pytest.raises(ValueError, match="no_such_option"):
        outcome_options(tmp_path, no_such_option=1)


# The tokens of a completion


def written(
    folder: Path, ids: tuple[int, ...] | None, text: str, reason: FinishReason = "stop"
) -> Rollout:
    return Rollout(Problem("p", "?", "!"), "?", text, reason, str(folder), 0, token_ids=ids)


def test_what_ended_a_completion_becomes_one_end_token(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    end = tokenizer.eos_token_id

    def ids(text: str) -> tuple[int, ...]:
        return tokens(tiny_model_dir, text)

    own = ids("12 + 7 = 19.")
    for ending in ((end,), ids("\n\n"), ids("\n\nQ:"), ()):
        rollout = written(tiny_model_dir, (*own, *ending), "12 + 7 = 19.")
        assert written_ids(rollout, tokenizer) == own
        assert completion_ids(rollout, tokenizer) == (*own, end)
    nothing = written(tiny_model_dir, (end,), "")
    assert written_ids(nothing, tokenizer) == ()
    assert completion_ids(nothing, tokenizer) == (end,)


def test_tokens_are_those_drawn_and_not_those_of_the_text(tiny_model_dir: Path):
    """A model may spell a word in pieces that a tokenizer would join."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    spelled = tuple(one for letter in "answer" for one in tokens(tiny_model_dir, letter))
    assert spelled != tokens(tiny_model_dir, "answer")
    rollout = written(tiny_model_dir, (*spelled, tokenizer.eos_token_id), "answer")
    assert completion_ids(rollout, tokenizer) == (*spelled, tokenizer.eos_token_id)


def test_a_completion_that_was_cut_is_not_ended(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    own = tokens(tiny_model_dir, "12 + 7 = 1")
    assert completion_ids(written(tiny_model_dir, own, "12 + 7 = 1", "length"), tokenizer) == own
    assert completion_ids(written(tiny_model_dir, None, "12 + 7 = 1", "length"), tokenizer) == own


def test_tokens_that_do_not_read_as_the_completion_are_made_anew(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    made = (*tokens(tiny_model_dir, "19."), tokenizer.eos_token_id)
    for foreign in (None, (5, 6, 7), (1_000_000,), (-1,), tokens(tiny_model_dir, "1")):
        rollout = written(tiny_model_dir, foreign, "19.")
        assert written_ids(rollout, tokenizer) is None
        assert completion_ids(rollout, tokenizer) == made
    # a stop string that begins inside a token
    (whole,) = tokens(tiny_model_dir, " answer")
    cut = written(tiny_model_dir, (whole,), " an")
    assert written_ids(cut, tokenizer) is None
    assert completion_ids(cut, tokenizer)[:-1] == tokens(tiny_model_dir, " an")


def test_rows_are_the_prompt_ignored_and_the_rest_learned(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    examples = [
        *EXAMPLES,
        Example("Q: Wh", "at is 12 + 7?"),
        Example("", "9 \u2028"),
        Example("a", ""),
    ]
    rows, _ = tokenized(examples, tokenizer, None)
    naive = []
    for one in examples:
        head = tokenizer(one.prompt)["input_ids"]
        whole = tokenizer(f"{one.prompt}{one.completion}")["input_ids"]
        if whole[: len(head)] != head:
            whole = head + tokenizer(one.completion)["input_ids"]
        whole = [*whole, tokenizer.eos_token_id]
        labels = [-100] * len(head) + whole[len(head) :]
        naive.append({"input_ids": whole, "labels": labels})
    assert list(rows) == naive
    assert rows[2:-1] == naive[2:-1] and rows[-1] == naive[-1]
    with pytest.raises(IndexError):
        rows[len(naive)]


def test_rows_become_the_same_table_in_parts(tiny_model_dir: Path):
    rows, _ = tokenized(EXAMPLES, AutoTokenizer.from_pretrained(tiny_model_dir), None)
    whole, parts = trainer._dataset(rows), trainer._dataset(rows, part=5)
    assert list(whole) == list(parts) == list(rows)
    assert whole.features == parts.features


def test_a_training_is_known_by_the_hash_of_all_it_is_made_of(tmp_path: Path):
    """As trainings made before are: of one JSON text, records as their files have them."""
    options = config(tmp_path)
    preference = Preference("p\ud800", "c", "r", (1, 2), chosen_ids=(3,))
    labeled = LabeledCompletion("p", (1, 2), True)
    talk = Example([{"role": "user", "content": "\u00e9"}], [{"role": "assistant", "content": "2"}])
    for made_of in ([*EXAMPLES, talk], [preference] * 2, [labeled], [], ()):
        plain = [json.loads(json.dumps(plain_fields(one))) for one in made_of]
        message_text = {name: getattr(options, name) for name in model_folder.DECIDING}
        text = json.dumps(
            ["m", plain, message_text, None], ensure_ascii=True, default=str, sort_keys=True
        )
        wanted = hashlib.sha256(text.encode()).hexdigest()[:16]
        assert model_folder.made_from("some/m", made_of, options, None) == wanted
        assert model_folder.made_from("m", plain, options, None) == wanted


# What is learned is what was sampled


def spelled(folder: Path, text: str) -> tuple[int, ...]:
    """The text letter by letter: tokens that a model may draw and a tokenizer would join."""
    ids = tuple(one for letter in text for one in tokens(folder, letter))
    assert ids != tokens(folder, text)
    return ids


def test_the_tokens_that_were_sampled_are_learned_and_not_those_of_the_text(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    end = tokenizer.eos_token_id
    own = spelled(tiny_model_dir, " The answer is 19.")
    for ending in ((end,), tokens(tiny_model_dir, "\n\n"), tokens(tiny_model_dir, "\n\nQ:")):
        example = Example("Q: 12+7\nA:", " The answer is 19.", (*own, *ending))
        rows, _ = tokenized([example], tokenizer, None)
        assert tuple(one for one in rows[0]["labels"] if one != -100) == (*own, end)
        assert rows[0]["input_ids"] == [*tokenizer("Q: 12+7\nA:")["input_ids"], *own, end]
        assert rows.from_text == 0


def test_tokens_of_another_tokenizer_are_tokenized_again_counted_and_logged(
    tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sampled = (*spelled(tiny_model_dir, "answer"), tokenizer.eos_token_id)
    examples = [
        Example("Q", "answer", sampled),
        Example("Q", "answer", (5, 6, 7)),
        Example("Q", "answer", (10**6,)),
        Example("Q", "answer"),
    ]
    rows, _ = tokenized(examples, tokenizer, None)
    assert rows.from_text == 3
    assert "2 of 4 completions are tokenized from their text" in caplog.text
    made = [*tokens(tiny_model_dir, "answer"), tokenizer.eos_token_id]
    assert [row["labels"][1:] for row in rows][1:] == [made] * 3
    caplog.clear()
    tokenized(examples[-1:], tokenizer, None)  # a rationale by hand is no surprise
    assert not caplog.text


def test_how_many_were_made_from_text_is_in_the_training(tiny_model_dir: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    sampled = (*tokens(tiny_model_dir, "3"), tokenizer.eos_token_id)
    examples = [Example("1+2=", "3", sampled), Example("1+2=", "3")]
    options = config(tmp_path, max_steps=1)
    for _ in range(2):  # made, and read back
        done = train_sft(tiny_model_dir, examples, options, out=tmp_path / "model")
        assert done.from_text == 1


def test_special_tokens_inside_a_completion_are_learned():
    tokenizer = byte_level(special=("<|think|>", "<|/think|>"))
    ids = tuple(tokenizer("<|think|>3*7=21<|/think|>#### 21</s>")["input_ids"])
    with_marks = Example("Q", "<|think|>3*7=21<|/think|>#### 21", ids)
    as_stored_before = Example("Q", "3*7=21#### 21", ids)
    rows, _ = tokenized([with_marks, as_stored_before], tokenizer, None)
    assert [tuple(row["labels"][1:]) for row in rows] == [ids, ids]
    assert rows.from_text == 0


def test_the_end_token_is_learned_where_padding_is_the_same_token():
    """TRL's own collator, on rows of unequal length."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = byte_level(pad="</s>")
    end = token_id(tokenizer.eos_token_id)
    assert tokenizer.pad_token_id == end
    rows, _ = tokenized([Example("Q", "7"), Example("Q", "70000")], tokenizer, None)
    batch = DataCollatorForLanguageModeling(pad_token_id=end)(list(rows))
    assert (batch["labels"] == end).sum(-1).tolist() == [1, 1]
    assert batch["labels"][0].tolist()[2:] == [end, -100, -100, -100, -100]
    assert batch["attention_mask"][0].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_a_chat_ends_with_the_token_that_ended_it_when_it_was_sampled():
    tokenizer = byte_level(template=CHATML)
    asked = [{"role": "user", "content": "1+1"}]
    ids = tuple(tokenizer("2")["input_ids"])
    turn = token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    end = token_id(tokenizer.eos_token_id)
    for sampled, wanted in (((*ids, turn), turn), ((*ids, end), end), (ids, turn), (None, turn)):
        example = Example(asked, [{"role": "assistant", "content": "2"}], sampled)
        (row,), _ = tokenized([example], tokenizer, None)
        assert tuple(one for one in row["labels"] if one != -100) == (*ids, wanted)


def test_several_messages_are_learned_as_the_template_writes_them():
    tokenizer = byte_level(template=CHATML)
    asked = [{"role": "user", "content": "1+1"}]
    turns = [
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "+1"},
        {"role": "assistant", "content": "3"},
    ]
    (row,), _ = tokenized([Example(asked, turns)], tokenizer, None)
    assert tokenizer.decode([one for one in row["labels"] if one != -100]) == (
        "2<|im_end|>\n<|im_start|>user\n+1<|im_end|>\n<|im_start|>assistant\n3<|im_end|>\n"
    )


def test_examples_keep_their_tokens_in_files(tmp_path: Path):
    path = tmp_path / "examples.jsonl"
    asked, said = [{"role": "user", "content": "1+1"}], [{"role": "assistant", "content": "2"}]
    examples = [
        Example("Q", "A"),
        Example("Q", "A", (1, 2)),
        Example(asked, said, (), {"enable_thinking": False}),
    ]
    write_jsonl(path, examples)
    assert read_examples(path) == examples
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert list(lines[0]) == ["prompt", "completion"]
    assert list(lines[2]) == ["prompt", "completion", "completion_ids", "chat_template_kwargs"]


@pytest.mark.parametrize("ids", ["12", [1.0], [True], [-1], [[1]], {"a": 1}])
def test_a_column_that_holds_no_token_ids_is_named(tmp_path: Path, ids):
    path = tmp_path / "examples.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "completion": "A", "completion_ids": ids}) + "\n")
    with pytest.raises(ValueError, match=r"row 1: expected a list of token ids"):
        read_examples(path)

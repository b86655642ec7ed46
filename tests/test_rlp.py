"""RLP beside a plain loop of its Algorithm 1; its moving average; thoughts that end themselves."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_quiet import END, PAD, START, states, texts, tiny
from naive_rlp import algorithm_1, learned_positions, log_pi, rlp_model, some_thoughts
from narrowed import tensor
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selftaught.cli.command import main
from selftaught.quiet.checkpoint import make_quiet, open_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.explore import explored
from selftaught.quiet.gating import ThoughtParams
from selftaught.quiet.losses import Rewards, rewards
from selftaught.quiet.model import QuietLM
from selftaught.quiet.moving_average import MovingAverage, average_bytes
from selftaught.quiet.rlp import clipped_ratios, group_advantages
from selftaught.quiet.spans import spans
from selftaught.quiet.thoughts import output_matrix
from selftaught.quiet.training import quiet_arguments, train_quiet, with_lora
from selftaught.quiet.transformers_model import QuietForCausalLM


def moved(model: torch.nn.Module, size: float, seed: int = 7) -> None:
    """Change every weight a little, as training does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)


# --- Algorithm 1 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", [tiny, learned_positions])
@pytest.mark.parametrize(
    "case", ["one step per batch", "later step", "windows", "few positions", "lookahead"]
)
def test_loss_advantages_and_gradients_are_those_of_algorithm_1(
    case: str, architecture: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
):
    windows = case == "windows" and architecture is tiny
    base = tiny(sliding_window=3) if windows else architecture()
    sampled = {"positions": "uniform", "positions_share": 0.4} if case == "few positions" else {}
    ahead = 3 if case == "lookahead" else 1
    model = rlp_model(
        base, positions_per_chunk=2, clip_low=0.02, clip_high=0.03, lookahead=ahead, **sampled
    )
    model.average = MovingAverage(model.base, 0.5)
    phi = copy.deepcopy(model.base)
    moved(model, 0.05)
    old = copy.deepcopy(model)
    if case == "later step":
        moved(model, 0.01, seed=8)
    ids, mask = texts([6, 6] if sampled else [7, 5])
    thoughts = some_thoughts(ids, 3, 4)
    given: dict[str, Any] = {"thoughts": thoughts, "seed": 4}
    if case == "later step":
        given["old_log_probs"] = sampling_log_probs(old, ids, mask, thoughts)
    seen: list[Rewards] = []

    def recorded(*args: Any) -> Rewards:
        seen.append(rewards(*args))
        return seen[-1]

    slow = copy.deepcopy(model)
    monkeypatch.setattr("selftaught.quiet.model.rewards", recorded)
    out = model(ids, mask, **given)
    out.loss.backward()
    positions = out.position_BJ.expand(len(ids), -1)
    lengths = mask.sum(1)
    places = [
        (row, int(at))
        for row, some in enumerate(positions)
        for at in some
        if at + ahead < lengths[row]
    ]
    contexts = [
        (ids[r, : at + 1], ids[r, at + 1 : at + 1 + ahead], thoughts[r, :, at]) for r, at in places
    ]
    expected = algorithm_1(slow, phi, old, contexts)
    expected.loss.backward()
    assert expected.clipped == ({"above", "below"} if case == "later step" else set())
    assert len(contexts) == (4 if sampled else 12 - 2 * ahead)
    near: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(out.loss.detach(), expected.loss.detach(), **near)
    for found, wanted in (
        (torch.cat([one.advantage_BNJ for one in seen], 2), expected.advantages),
        (torch.cat([one.reward_BNJ for one in seen], 2), expected.rewards),
    ):
        column = {int(at): number for number, at in enumerate(positions[0])}
        if sampled:
            flat = found.transpose(1, 2).flatten(0, 1)
        else:
            flat = torch.stack([found[r, :, column[at]] for r, at in places])
        torch.testing.assert_close(flat, torch.tensor(wanted, dtype=torch.double), **near)
    assert min(map(min, expected.advantages)) < -0.01
    for (name, fast), (_, plain) in zip(
        model.named_parameters(), slow.named_parameters(), strict=True
    ):
        fast_gradient, plain_gradient = (
            torch.zeros_like(one) if one.grad is None else one.grad for one in (fast, plain)
        )
        torch.testing.assert_close(fast_gradient, plain_gradient, msg=name, **near)
    assert tensor(model.moved.grad)[0].any()


def sampling_log_probs(old: QuietLM, ids: Tensor, mask: Tensor, thoughts: Tensor) -> Tensor:
    """Log-probabilities under the old weights, one forward pass per thought; NaN where none."""
    found = torch.full(thoughts.shape, torch.nan, dtype=torch.double)
    for row, real in enumerate(mask.sum(1).tolist()):
        for at in range(real - 1):
            for number, slots in enumerate(thoughts[row, :, at].tolist()):
                content = slots[: slots.index(END)] if END in slots else slots
                drawn = slots[: len(content) + 1]
                with torch.no_grad():
                    each = log_pi(old, ids[row, : at + 1], content, drawn)
                found[row, number, at, : len(drawn)] = each
    return found.nan_to_num(0.0)


def test_the_advantages_of_two_thoughts_are_their_differences():
    """r = (1.0, 0.4): 2 / (2 - 1) * (1.0 - 0.7) = 0.6 = 1.0 - 0.4, and -0.6 for the other."""
    advantage = group_advantages(torch.tensor([[[1.0], [0.4]]]))
    torch.testing.assert_close(advantage, torch.tensor([[[0.6], [-0.6]]]))
    without, after = torch.tensor([[[-3.0]]]), torch.tensor([[[[-2.0]], [[-2.6]]]])
    both, positive = (rewards("ema", without, after, sign) for sign in ("both", "positive"))
    torch.testing.assert_close(both.reward_BNJ.flatten(), torch.tensor([1.0, 0.4]))
    torch.testing.assert_close(both.advantage_BNJ.flatten(), torch.tensor([0.6, -0.6]))
    torch.testing.assert_close(positive.advantage_BNJ.flatten(), torch.tensor([0.6, 0.0]))


def test_an_advantage_is_the_reward_over_the_mean_of_the_other_thoughts():
    """r = (0, 3, 6): the means of the others are 4.5, 3 and 1.5."""
    found = group_advantages(torch.tensor([0.0, 3.0, 6.0]).view(1, 3, 1))
    assert found.flatten().tolist() == pytest.approx([-4.5, 0, 4.5])


def test_equal_thoughts_have_no_advantage():
    after = torch.full((1, 3, 1, 1), -0.1) / 3
    found = rewards("ema", torch.tensor([[[-7.7]]]), after, "both")
    assert not found.advantage_BNJ.any()


def test_ratios_are_clipped_on_the_side_that_the_sign_says():
    """Ratios 0.5, 1 and 2 with clips at 0.8 and 1.3, by hand."""
    log_prob = torch.tensor([[0.5, 1.0, 2.0]]).log().expand(2, -1).clone().requires_grad_()
    found = clipped_ratios(log_prob, torch.zeros(2, 3), torch.tensor([1.0, -1.0]), 0.2, 0.3)
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 1.3], [0.8, 1.0, 2.0]]))
    found.sum().backward()  # the gradient of a ratio with respect to its log-probability is itself
    torch.testing.assert_close(log_prob.grad, torch.tensor([[0.5, 1.0, 0.0], [0.0, 1.0, 2.0]]))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_moving_average_changes_rewards_but_no_gradient(autocast: bool):
    """S_ema is the same for all thoughts of a context, so Eq. 7 subtracts it again.

    Autocast stores 16-bit copies of weights, which must not be those of the average afterwards.
    """
    found = []
    for size in (0.0, 1.0):
        model = rlp_model(tiny())
        model = model.float() if autocast else model
        own = copy.deepcopy(model.base.state_dict())
        moved(model.base, size)
        model.average = MovingAverage(model.base, 0.5)
        model.base.load_state_dict(own)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = model(*texts([8]), seed=2)
        out.loss.backward()
        found.append(
            (out.reward, torch.cat([tensor(w.grad).flatten() for w in model.parameters()]))
        )
    (reward, gradient), (other_reward, other_gradient) = found
    assert abs(reward - other_reward) > 1
    tolerance = 2e-3 if autocast else 1e-9
    torch.testing.assert_close(gradient, other_gradient, rtol=tolerance, atol=tolerance)
    assert gradient.abs().max() > 1e-3


def test_rewards_are_over_the_model_itself_before_the_first_step():
    model = rlp_model(tiny())
    ids, mask = texts([8])
    without_average = model(ids, mask, seed=2)
    model.average = MovingAverage(model.base, 0.999)
    torch.testing.assert_close(model(ids, mask, seed=2).reward, without_average.reward)
    gain = (
        without_average.log_prob_with_BNJK[..., 0]
        - without_average.log_prob_without_BT[:, None, :-1]
    )
    torch.testing.assert_close(without_average.reward, gain.mean())


# --- thoughts that end themselves ------------------------------------------------------------------


def ending(**changes: Any) -> QuietLM:
    """A model whose thoughts often end before the last slot."""
    model = rlp_model(tiny(initializer_range=0.3), thought_tokens=6, **changes)
    with torch.no_grad():
        tensor(model.base.lm_head.weight)[END] *= 2.5
    return model


def greedy(model: QuietLM, context: list[int], longest: int) -> tuple[list[int], bool]:
    """The content of a greedy thought, and whether it ends itself."""
    content: list[int] = []
    while len(content) < longest:
        logits = states(model, torch.tensor([*context, START, *content]))[1][-1].clone()
        logits[[START, PAD] if content else [START, PAD, END]] = -torch.inf
        token = int(logits.argmax())
        if token == END:
            return content, True
        content.append(token)
    return content, False


def test_predictions_are_those_after_greedy_thoughts_that_end_themselves():
    model = ending()
    ids, mask = texts([9, 7])
    found = score(model, ids, mask)
    lengths, ended = set(), 0
    for row, real in enumerate(mask.sum(1).tolist()):
        text = ids[row, :real].tolist()
        for at in range(real - 1):
            content, ends = greedy(model, text[: at + 1], 6)
            lengths.add(len(content))
            ended += ends
            slots = found.thought_BNTS[row, 0, at].tolist()
            assert slots == content + [END] * (6 - len(content))
            after = states(model, torch.tensor([*text[: at + 1], START, *content, END]))[1][-1]
            wanted = after.log_softmax(-1)[text[at + 1]].item()
            assert found.with_BT[row, at].item() == pytest.approx(wanted, abs=1e-5)
            assert found.weight_BNT[row, 0, at] == 1
    assert len(lengths) >= 3 and 0 < ended < int(mask.sum()) - 2


def test_generated_text_is_that_after_greedy_thoughts():
    model = ending()
    prompt = texts([5])[0]
    text = prompt[0].tolist()
    for _ in range(4):
        content, _ = greedy(model, text, 6)
        logits = states(model, torch.tensor([*text, START, *content, END]))[1][-1].clone()
        logits[[START, END, PAD]] = -torch.inf
        text.append(int(logits.argmax()))
    assert model.generate(prompt, max_new_tokens=4)[0].tolist() == text
    wrapped = QuietForCausalLM.from_quiet(model).eval()
    assert wrapped.generate(prompt, max_new_tokens=4, do_sample=False)[0].tolist() == text


def test_a_thought_that_has_ended_costs_no_further_pass():
    """Whatever the model reads, the end token is the likeliest next one, and token 5 the second."""
    model = rlp_model(tiny(), thought_tokens=6)
    with torch.no_grad():
        model.base.model.norm.weight.zero_()
        model.base.model.norm.bias.copy_(torch.eye(16)[0])
        model.base.lm_head.weight.zero_()
        model.base.lm_head.weight[[END, 5], 0] = torch.tensor([9.0, 8.0], dtype=torch.double)
    passes: list[Tensor] = []
    model.base.model.register_forward_hook(lambda one, given, out: passes.append(out[0]))
    found = score(model, torch.tensor([[1, 2]]))
    assert found.thought_BNTS[0, 0, 0].tolist() == [5, END, END, END, END, END]
    assert len(passes) == 4  # the text, the start token, token 5, and the end token


def test_sampled_thoughts_end_as_often_as_the_model_says():
    """The share of thoughts of one token is the probability of the end token after the first."""
    model = ending(thoughts=4)
    text = torch.tensor([[3, 14, 15]]).expand(400, -1)
    with torch.no_grad():
        out = model(text, seed=0)
    thought = out.thought_BNJS[:, :, 1].flatten(0, 1)
    assert not (thought[:, 0] == END).any()
    ended = (thought == END).cumsum(1) > 0
    assert (thought[ended] == END).all() and ((thought == END) == ended).all()
    assert out.length.item() == pytest.approx(
        (6 - (out.thought_BNJS == END).sum(-1) + (out.thought_BNJS == END).any(-1)).double().mean()
    )
    expected, spread = 0.0, 0.0
    for first in thought[:, 0].unique().tolist():
        logits = states(model, torch.tensor([3, 14, START, first]))[1][-1].clone() / 0.7
        logits[[START, PAD]] = -torch.inf
        chance = float(logits.detach().softmax(-1)[END])
        count = int((thought[:, 0] == first).sum())
        expected, spread = expected + count * chance, spread + count * chance * (1 - chance)
    assert spread > 10
    assert abs(int((thought[:, 1] == END).sum()) - expected) < 4 * spread**0.5


def test_the_explorer_shows_a_thought_up_to_its_end(tiny_model_dir: Path):
    model, tokenizer = made(tiny_model_dir, thought_tokens=5, thoughts=2)
    ids = tokenizer("Q: What is 12 + 7?").input_ids
    how = ThoughtParams(thoughts=3, temperature=1.0, seed=1)
    with torch.no_grad():
        output_matrix(model.base).weight[model.marks.end] *= 60
    found = score(model, torch.tensor([ids]), None, how).thought_BNTS[0]
    shown = explored(model, tokenizer, "Q: What is 12 + 7?", len(ids) - 1, how)[1]
    assert (found == model.marks.end).any() and (found != model.marks.end).all(-1).any()
    for at, token in enumerate(shown):
        assert token.weights == [1, 1, 1]
        for number, text in enumerate(token.thoughts):
            content = [one for one in found[number, at].tolist() if one != model.marks.end]
            assert text == tokenizer.decode(content, clean_up_tokenization_spaces=False)


# --- the moving average ----------------------------------------------------------------------------


def test_the_average_follows_the_weights_by_hand():
    """0.9 * 2 + 0.1 * 4 = 2.2, and 0.9 * 2.2 + 0.1 * 4 = 2.38."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 2.0)
    average = MovingAverage(layer, 0.9)
    torch.nn.init.constant_(layer.weight, 4.0)
    for wanted in (2.2, 2.38):
        average.update()
        assert average.state()["weight"].item() == pytest.approx(wanted)
    one = torch.ones(1)
    with torch.no_grad(), average.weights():
        assert layer(one).item() == pytest.approx(2.38)
    assert layer(one).item() == 4 and isinstance(layer.weight, torch.nn.Parameter)


def test_the_average_of_16_bit_weights_moves():
    """2 + 0.001 * (4 - 2) = 2.002 is no number of bfloat16, whose next one after 2 is 2.016."""
    layer = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.constant_(layer.weight, 2.0)
    average = MovingAverage(layer, 0.999)
    torch.nn.init.constant_(layer.weight, 4.0)
    average.update()
    assert average.state()["weight"].item() == pytest.approx(2.002)
    with average.weights():
        assert layer.state_dict()["weight"].dtype == torch.bfloat16


def test_tied_weights_have_one_average_and_predict_with_it():
    base = learned_positions().eval()
    average = MovingAverage(base, 0.5)
    assert "lm_head.weight" not in average.state()
    ids = texts([6])[0]
    before = base(input_ids=ids).logits
    moved(base, 0.1)
    with torch.no_grad(), average.weights():
        torch.testing.assert_close(base(input_ids=ids).logits, before, rtol=0, atol=0)
    assert base.lm_head.weight is base.get_input_embeddings().weight
    assert not torch.equal(base(input_ids=ids).logits, before)


def test_only_trained_weights_are_averaged(tiny_model_dir: Path):
    model, _ = made(tiny_model_dir)
    whole = average_bytes(model.base)
    assert whole == 4 * sum(one.numel() for one in model.base.parameters())
    with_lora(model, r=2, alpha=4, target_modules="all-linear")
    names = MovingAverage(model.base, 0.9).state()
    assert names and all("lora_" in name for name in names)
    assert average_bytes(model.base) < whole / 4


def made(folder: Path, **changes: Any) -> tuple[QuietLM, Any]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    sizes: dict[str, Any] = {"thought_tokens": 3, "thoughts": 3, "initial_text": "A",
                             "positions_share": 0.2, "ema_decay": 0.8}  # fmt: skip
    return make_quiet(base, tokenizer, QuietConfig.rlp(**(sizes | changes))), tokenizer


def train(
    folder: Path, out: Path, stop_after: int | None = None, save_steps: int = 2, **changes: Any
) -> list:
    model, tokenizer = made(folder, **changes)
    arguments = quiet_arguments(
        out / "checkpoints", max_steps=5, learning_rate=1e-3, per_device_train_batch_size=2,
        save_steps=save_steps, use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    lines = [f"Q: What is {a} + {b}?\nA: {a + b}." for a in range(4) for b in range(5)]
    seen: list[int] = []

    def progress(steps: int) -> None:
        seen.append(steps)
        if stop_after is not None and len(seen) >= stop_after:
            raise KeyboardInterrupt

    log = train_quiet(
        model, tokenizer, spans(lines, tokenizer, length=24, least=4), arguments, out=out,
        progress=progress,
    )  # fmt: skip
    assert model.average is None
    return log


def test_a_resumed_training_is_the_uninterrupted_one(tiny_model_dir: Path, tmp_path: Path):
    whole = train(tiny_model_dir, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model_dir, tmp_path / "parts", stop_after=4)
    parts = train(tiny_model_dir, tmp_path / "parts")
    first, second = (open_quiet(tmp_path / one / "model")[0].state_dict() for one in ("whole", "parts"))  # fmt: skip
    assert all(torch.equal(first[name], second[name]) for name in first)
    # Only rewards depend on the moving average.
    assert [row["reward"] for row in whole] == [row["reward"] for row in parts]
    own = [row["nll_without"] - row["nll_with"] for row in whole]
    assert abs(whole[-1]["reward"] - own[-1]) > 1e-5
    assert all(1 <= row["thought_length"] <= 3 for row in whole)
    files = {path.name for path in (tmp_path / "whole" / "model").iterdir()}
    assert "average.safetensors" not in files and "model.safetensors" in files
    assert not any("mixing" in name for name in load_file(tmp_path / "whole" / "model" / "model.safetensors"))  # fmt: skip


def test_the_average_is_updated_after_every_step(tiny_model_dir: Path, tmp_path: Path):
    """phi_2 = 0.8 (0.8 theta_0 + 0.2 theta_1) + 0.2 theta_2."""
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model_dir, tmp_path, stop_after=3, save_steps=1)
    folder = tmp_path / "checkpoints"
    first = made(tiny_model_dir)[0].base.state_dict()
    second, third = (load_file(folder / f"checkpoint-{n}" / "model.safetensors") for n in (1, 2))
    stored = load_file(folder / "checkpoint-2" / "average.safetensors")
    assert stored.keys() == first.keys()
    for name, average in stored.items():
        wanted = 0.64 * first[name] + 0.16 * second[f"base.{name}"] + 0.2 * third[f"base.{name}"]
        torch.testing.assert_close(average, wanted, rtol=1e-6, atol=1e-7)
    assert (stored["model.norm.weight"] - first["model.norm.weight"]).abs().max() > 1e-4


def test_a_checkpoint_without_its_average_is_refused(tiny_model_dir: Path, tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        train(tiny_model_dir, tmp_path, stop_after=4)
    path = tmp_path / "checkpoints" / "checkpoint-2" / "average.safetensors"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"has no moving average of the weights: .*is missing"):
        train(tiny_model_dir, tmp_path)


def test_too_little_memory_is_said_in_bytes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, _ = made(tiny_model_dir)
    needed = 4 * sum(one.numel() for one in model.base.parameters())
    monkeypatch.setattr("selftaught.quiet.moving_average.free_bytes", lambda device: needed - 1)
    message_text = rf"needs {needed:,} bytes .*; {needed - 1:,} bytes are free on cpu.*ema_decay=0"
    with pytest.raises(ValueError, match=message_text):
        train(tiny_model_dir, tmp_path / "run")
    train(tiny_model_dir, tmp_path / "run", ema_decay=0.0)


# --- folders and commands --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "mix", "message_text"),
    [
        (
            "rlp",
            "hidden",
            r"has mix='hidden', which needs a mixing head, but the weights have none",
        ),
        ("paper", "none", r"has mix='none' .*but the weights have a mixing head"),
    ],
)
def test_a_mixing_head_that_does_not_fit_is_refused(
    preset: str, mix: str, message_text: str, tiny_model_dir: Path, tmp_path: Path
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = getattr(QuietConfig, preset)(thought_tokens=2)
    save_quiet(make_quiet(base, tokenizer, config), tokenizer, tmp_path / "saved")
    opened, _ = open_quiet(tmp_path / "saved")
    assert opened.quiet_config == config
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())
    settings["quiet_config"]["mix"] = mix
    shutil.copytree(tmp_path / "saved", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps(settings))
    for open_folder in (open_quiet, QuietForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=message_text):
            open_folder(tmp_path / "other")


def test_a_trained_model_keeps_its_own_preset(tiny_model_dir: Path, tmp_path: Path, capsys):
    model, tokenizer = made(tiny_model_dir)
    save_quiet(model, tokenizer, tmp_path / "saved")
    command = ["quiet", "train", "--preset", "rlp", "--model", str(tmp_path / "saved"), "--text", "t.txt"]  # fmt: skip
    assert main(command) == 2
    assert "is a trained Quiet-STaR model, which has its own options" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message_text"),
    [
        ({"thoughts": 1}, "baseline='ema' needs at least 2 thoughts per position, got 1"),
        ({"mixing_range": "free"}, "mix='none' has no mixing head"),
        ({"clip_low": None}, "must be set together; got clip_low=None and clip_high=0.2"),
        ({"clip_low": 1.5}, r"clip_low must be in \(0, 1\]; got 1.5"),
        ({"clip_high": 0.0}, "clip_high must be positive; got 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\); got 1"),
        ({"advantages": "negative"}, "advantages must be 'positive' or 'both'; got 'negative'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message_text: str):
    with pytest.raises(ValueError, match=message_text):
        QuietConfig.rlp(**changes)


def test_log_probabilities_without_their_thoughts_are_refused():
    with pytest.raises(ValueError, match="old_log_probs needs thoughts"):
        rlp_model(tiny())(*texts([6]), old_log_probs=torch.zeros(1, 3, 6, 4))


def test_the_plan_shows_the_preset_with_its_changes(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    text = tmp_path / "sums.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"{a}+{a}={a + a}, {a}+1={a + 1}"}) for a in range(20)))  # fmt: skip
    command = ["quiet", "train", "--preset", "rlp", "--model", str(tiny_model_dir), "--text", str(text),
               "--out", str(tmp_path / "run"), "--quiet.thoughts", "3", "--quiet.initial_text", "A",
               "--length", "32", "--dry-run"]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "preset rlp, " in shown and "thoughts 3, " in shown and "baseline ema" in shown
    assert "3 of at most 24 tokens" in shown and "learning rate 1e-06" in shown
    assert "moving average of the trained weights, " in shown
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr("selftaught.quiet.moving_average.free_bytes", lambda device: 5)
    assert main(command) == 2
    assert "5 bytes are free on cpu" in capsys.readouterr().err

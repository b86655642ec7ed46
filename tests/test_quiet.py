"""Quiet-STaR: what the authors' code computes, and one ordinary forward pass for every thought."""

import json
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_quiet import (
    END,
    PAD,
    START,
    VOCABULARY,
    assert_equal_to_naive,
    drawn,
    quiet,
    states,
    texts,
    tiny,
)
from narrowed import tensor
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.mixing import MixingHead, bounded
from selftaught.quiet.model import QuietLM

GOLDEN = Path(__file__).parent / "golden" / "quiet_star_official"


# --- the authors' code, as numbers ---------------------------------------------------------------


def official(case: str, **changes: int) -> tuple[QuietLM, dict]:
    """The tiny model of a case, in float64, and what the authors' code returned for it."""
    message_text = json.loads((GOLDEN / case / "expected.json").read_text())
    sizes = message_text["config"]
    weights = load_file(GOLDEN / case / "weights.safetensors")
    base = MistralForCausalLM(
        MistralConfig(
            vocab_size=sizes["V"],
            hidden_size=sizes["hidden"],
            intermediate_size=2 * sizes["hidden"],
            num_hidden_layers=sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["kv"],
            rms_norm_eps=1e-6,
            sliding_window=None,
            tie_word_embeddings=False,
        )
    ).double()
    mixing = {name: weights.pop(name) for name in list(weights) if name.startswith("mixing")}
    base.load_state_dict(weights)
    config = QuietConfig.authors_code(
        thought_tokens=sizes["n_ahead"] - 3,
        lookahead=sizes["n_talk"],
        thoughts=sizes["n_pass"],
        reinforce_weight=sizes["policy_beta"],
        **changes,
    )
    model = QuietLM(
        base, config, start=message_text["start_id"], end=message_text["end_id"], pad=None
    )
    model.mixing.layers.load_state_dict(
        {name.removeprefix("mixing_head."): weight for name, weight in mixing.items()}
    )
    return model.train(), message_text


@pytest.mark.parametrize("positions_per_chunk", [1, 5, 100])
@pytest.mark.parametrize("case", ["one_thought_one_token", "two_thoughts", "three_thoughts_padded"])
def test_the_authors_numbers_come_out(case: str, positions_per_chunk: int):
    model, message_text = official(case, positions_per_chunk=positions_per_chunk)
    out = model(
        torch.tensor(message_text["input_ids"]),
        torch.tensor(message_text["attention_mask"]),
        thoughts=torch.tensor(message_text["thought_tokens"]),
    )
    out.loss.backward()
    near = partial(pytest.approx, rel=1e-5)
    assert out.loss.item() == near(message_text["loss"])
    assert out.nll_without.item() == near(message_text["base_nll"])
    assert out.nll_with_K.tolist() == near(message_text["talk_nll"])
    assert out.reward.item() == near(message_text["policy_reward_mean"])
    assert out.reinforce.item() == near(message_text["policy_loss"])
    norms = {
        name.removeprefix("base.").replace("mixing.layers", "mixing_head"): tensor(value.grad)
        .norm()
        .item()
        for name, value in model.named_parameters()
    }
    norms["start_embedding"], norms["end_embedding"] = tensor(model.moved.grad).norm(dim=1).tolist()
    assert {name: norms[name] for name in message_text["grad_norms"]} == near(
        message_text["grad_norms"]
    )


# --- one ordinary forward pass for every thought -------------------------------------------------


@pytest.mark.parametrize("preset", ["default", "paper", "authors_code"])
@pytest.mark.parametrize(
    ("thoughts", "lookahead", "length"), [(1, 1, 1), (2, 4, 3), (3, 2, 2), (4, 6, 1), (2, 3, 0)]
)
def test_loss_and_gradients_are_those_of_separate_forward_passes(
    preset: str, thoughts: int, lookahead: int, length: int
):
    config = getattr(QuietConfig, preset, QuietConfig)(
        thoughts=thoughts,
        lookahead=lookahead,
        thought_tokens=length,
        reinforce_weight=3.0,
        positions_per_chunk=3,
    )
    assert_equal_to_naive(quiet(tiny(), config), *texts([9, 7]))


@pytest.mark.parametrize("preset", ["paper", "authors_code"])
def test_padding_on_either_side_changes_nothing(preset: str):
    config = getattr(QuietConfig, preset)(
        thoughts=2, lookahead=2, thought_tokens=2, reinforce_weight=3.0, positions_per_chunk=4
    )
    ids, mask = texts([8, 5], left=True)
    if preset == "paper":
        assert_equal_to_naive(quiet(tiny(), config), ids, mask)
    right = texts([8, 5])
    thoughts = drawn(config, ids)
    moved = thoughts.clone()
    moved[1, :, :5] = thoughts[1, :, 3:]
    model = quiet(tiny(), config)
    left_out, right_out = model(ids, mask, thoughts=thoughts), model(*right, thoughts=moved)
    torch.testing.assert_close(left_out.nll_with_K, right_out.nll_with_K, rtol=1e-12, atol=0)


# --- drawing thoughts ----------------------------------------------------------------------------


def small(**changes: object) -> QuietConfig:
    sizes: dict = {"thoughts": 2, "lookahead": 2, "thought_tokens": 3, "reinforce_weight": 2.0}
    return QuietConfig.paper(**(sizes | changes))


def test_thoughts_depend_on_the_seed_and_not_on_chunks():
    ids, mask = texts([9, 6])
    outs = [
        quiet(tiny(), small(positions_per_chunk=chunk))(ids, mask, seed=seed)
        for chunk, seed in ((1, 5), (3, 5), (100, 5), (100, 6))
    ]
    one, three, all_at_once, other = (out.thought_BNJS for out in outs)
    assert torch.equal(one, three)
    assert torch.equal(one, all_at_once)
    assert not torch.equal(one, other)
    torch.testing.assert_close(outs[0].loss, outs[2].loss, rtol=1e-12, atol=0)


def test_greedy_thoughts_are_those_of_ordinary_greedy_decoding():
    model = quiet(tiny(), small(temperature=0.0, reinforce_weight=0.0))
    ids, mask = texts([7, 7])
    thoughts = model(ids, mask).thought_BNJS
    never = [START, END, PAD]
    for row, by_thought in zip(ids, thoughts, strict=True):
        for at in range(6):
            tokens = [*row[: at + 1].tolist(), START]
            for _ in range(3):
                logits = states(model, torch.tensor(tokens))[1][-1].clone()
                logits[never] = -torch.inf
                tokens.append(int(logits.argmax()))
            for thought in by_thought[:, at]:
                assert thought.tolist() == tokens[at + 2 :]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_thoughts_come_from_the_models_distribution(temperature: float):
    base = tiny(initializer_range=0.15)
    model = quiet(base, small(thoughts=4, thought_tokens=1, temperature=temperature))
    text = torch.tensor([3, 14, 15])
    draws = 1500
    with torch.no_grad():
        thoughts = model(text.expand(draws, -1)).thought_BNJS[:, :, 1, 0].flatten()
        logits = states(model, torch.tensor([3, 14, START]))[1][-1] / temperature
    logits[[START, END, PAD]] = -torch.inf
    wanted = logits.softmax(-1) * len(thoughts)
    counts = torch.bincount(thoughts, minlength=VOCABULARY)
    assert counts[[START, END, PAD]].sum() == 0
    many = wanted >= 5
    distance = ((counts - wanted) ** 2 / wanted)[many].sum().item()
    freedom = int(many.sum()) - 1
    assert freedom > 10
    # The mean of a chi-square variable is its degrees of freedom, its variance twice that.
    assert abs(distance - freedom) < 5 * (2 * freedom) ** 0.5


# --- the ways it is trained ----------------------------------------------------------------------


def gradients(model: QuietLM, *, share: float = 1.0) -> dict[str, torch.Tensor]:
    ids, mask = texts([9, 6])
    (model(ids, mask, seed=1).loss * share).backward()
    learning = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return {name: tensor(one.grad) for name, one in learning.items()}


def test_a_share_of_the_loss_gives_that_share_of_every_gradient():
    whole, quarter = (gradients(quiet(tiny(), small()), share=share) for share in (1.0, 0.25))
    for name in whole:
        torch.testing.assert_close(quarter[name], whole[name] / 4, rtol=1e-9, atol=1e-12)


def test_gradient_checkpointing_changes_no_gradient():
    plain = gradients(quiet(tiny(), small()).train())
    model = quiet(tiny(), small()).train()
    model.gradient_checkpointing_enable()
    assert model.base.is_gradient_checkpointing
    found = gradients(model)
    for name in plain:
        torch.testing.assert_close(found[name], plain[name], rtol=1e-9, atol=1e-9)


def test_measuring_gives_the_loss_of_training():
    model = quiet(tiny(), small())
    ids, mask = texts([9, 6])
    with torch.no_grad():
        measured = model(ids, mask, seed=1).loss
    torch.testing.assert_close(measured, model(ids, mask, seed=1).loss.detach(), rtol=1e-12, atol=0)


def test_an_adapter_learns_alone():
    from peft import LoraConfig

    base = tiny()
    base.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    found = gradients(quiet(base, small()))
    adapted = {name for name in found if "lora" in name}
    assert len(adapted) == 8
    assert all(("lora" in name) or name.startswith(("mixing", "moved")) for name in found)
    assert all(float(found[name].abs().max()) > 0 for name in adapted)


@pytest.mark.parametrize("preset", ["paper", "authors_code"])
def test_bfloat16_is_near_float32(preset: str):
    sizes = {"thoughts": 2, "lookahead": 2, "thought_tokens": 3, "reinforce_weight": 2.0}
    config = getattr(QuietConfig, preset)(**sizes)
    ids, mask = texts([9, 6])
    thoughts = drawn(config, ids)
    exact, mixed = quiet(tiny(), config).float(), quiet(tiny(), config).float()
    wanted = exact(ids, mask, thoughts=thoughts).loss
    wanted.backward()
    short = quiet(tiny(), config).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed(ids, mask, thoughts=thoughts).loss
    for near, model in ((loss, mixed), (short(ids, mask, thoughts=thoughts).loss, short)):
        near.backward()
        assert near.item() == pytest.approx(wanted.item(), rel=0.15)
        one, other = (
            torch.cat([tensor(w.grad).float().flatten() for w in m.parameters()])
            for m in (exact, model)
        )
        assert torch.cosine_similarity(one, other, dim=0) > 0.95


def test_what_cannot_be_is_refused():
    with pytest.raises(
        ValueError, match=r"mix must be 'log_probs' or 'hidden' or 'none'; got 'hiden'"
    ):
        QuietConfig(mix="hiden")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lookahead must be at least 1; got 0"):
        QuietConfig(lookahead=0)
    with pytest.raises(ValueError, match=r"at least 2 tokens, got 1"):
        quiet(tiny(), small())(torch.tensor([[3]]))


def test_a_bounded_weight_starts_at_none_and_comes_back_from_outside():
    head = MixingHead(2, bounded=True)
    assert head(torch.ones(2), torch.ones(2)).item() == 0
    weight = torch.tensor([-0.5, -0.5, 0.0, 0.4, 1.5, 1.5], requires_grad=True)
    found = bounded(weight)
    assert found.tolist() == pytest.approx([0, 0, 0, 0.4, 1, 1])
    # A step goes against the gradient: outward ones from outside are stopped, all others are not.
    found.backward(torch.tensor([-1.0, 1.0, -1.0, 2.0, 1.0, -1.0]))
    assert tensor(weight.grad).tolist() == [-1, 0, -1, 2, 1, 0]


def test_a_mixture_that_is_not_normalised_needs_weights_of_a_mixture():
    with pytest.raises(ValueError, match=r"needs mixing_range .unit., got .free..*no lower bound"):
        QuietConfig.paper(mixing_range="free")


def test_a_chunks_graph_is_gone_before_the_next_ones(monkeypatch: pytest.MonkeyPatch):
    """What a layer keeps for its backward pass lives as long as anything that leads to it."""
    model = quiet(tiny(), small(positions_per_chunk=2))
    alive: list[weakref.ref] = []
    counts = []
    inner = QuietLM._learn

    def learn(self: QuietLM, *given: Any) -> Any:
        counts.append(sum(ref() is not None for ref in alive))
        learned = inner(self, *given)
        alive.append(weakref.ref(learned.loss))
        return learned

    monkeypatch.setattr(QuietLM, "_learn", learn)
    ids, mask = texts([9, 6])
    model(ids, mask, seed=0)
    assert counts == [0, 0, 0, 0]


# --- losses of exactly 0, labels, lengths, baselines ---------------------------------------------


def constant(config: QuietConfig) -> QuietLM:
    """Whatever it reads, it predicts token 5 with certainty; token 7 costs 1000 nats, others 2000."""
    base = tiny().float()
    logits = torch.full((base.config.vocab_size,), -2000.0)
    logits[5], logits[7] = 0.0, -1000.0
    with torch.no_grad():
        base.model.norm.weight.zero_()
        base.model.norm.bias.zero_()
        base.model.norm.bias[0] = 1.0
        base.lm_head.weight.zero_()
        base.lm_head.weight[:, 0] = logits
    return QuietLM(base, config, start=START, end=END, pad=PAD, check=False)


@pytest.mark.parametrize("chunk", [1, 100])
def test_the_authors_leave_losses_of_exactly_0_out_of_their_means(chunk: int):
    """Targets 5, 7, 5, 9 cost 0, 1000, 0, 2000 nats; without the zeros their mean is 3000 / 2.

    With 2 lookahead tokens the first has these four targets and the second 7, 5, 9: 1000, 0, 2000. The
    loss is half the base's mean and half the mean over both, and no thought differs from another.
    """
    ids = torch.tensor([[1, 5, 7, 5, 9]])
    sizes = {"thoughts": 2, "lookahead": 2, "thought_tokens": 1, "positions_per_chunk": chunk}
    out = constant(QuietConfig.authors_code(**sizes))(ids, seed=0)
    assert out.nll_without.item() == 1500
    assert out.nll_with_K.tolist() == [1500, 1500]
    assert out.loss.item() == 1500
    whole = constant(QuietConfig.authors_code(**sizes, drop_zero_losses=False))(ids, seed=0)
    assert whole.nll_without.item() == 750
    assert whole.nll_with_K.tolist() == [750, 1000]
    assert whole.loss.item() == 0.5 * 750 + 0.5 * 875


def test_losses_of_exactly_0_give_no_gradient_and_change_no_other():
    config = QuietConfig.authors_code(
        thoughts=2, lookahead=3, thought_tokens=2, reinforce_weight=3.0, positions_per_chunk=3
    )
    base = tiny()
    with torch.no_grad():
        base.lm_head.weight *= 400  # in float64 a probability is 1 from 37 nats on
    model = quiet(base, config)
    ids, mask = texts([9, 7])
    with torch.no_grad():
        sure = [int(states(model, ids[0, : at + 1])[1][-1].argmax()) for at in range(8)]
        ids[0, 4], ids[0, 7] = sure[3], int(states(model, ids[0, :7])[1][-1].argmax())
        out = model(ids, mask, thoughts=drawn(config, ids))
    assert (out.log_prob_without_BT[0, :8] == 0).any()
    assert_equal_to_naive(model, ids, mask)
    # After a batch with such losses they are counted first: the same values, also without any.
    for scale in (1, 400, 1):
        with torch.no_grad():
            base.lm_head.weight /= scale
        model.zero_grad()
        assert_equal_to_naive(model, ids, mask)


@pytest.mark.parametrize("count", [1, 3])
def test_given_thoughts_may_be_more_or_fewer_than_are_sampled(count: int):
    """The mean over them is that of a model that samples as many."""
    config = QuietConfig.authors_code(
        thoughts=count, lookahead=3, thought_tokens=2, reinforce_weight=0.0
    )
    base = tiny()
    with torch.no_grad():
        base.lm_head.weight *= 400
    ids, mask = texts([9, 7])
    thoughts = drawn(config, ids)
    model = quiet(base, config)
    expected = model(ids, mask, thoughts=thoughts)
    model.quiet_config = replace(config, thoughts=2)
    found = model(ids, mask, thoughts=thoughts)
    torch.testing.assert_close(found.nll_with_K, expected.nll_with_K, rtol=1e-9, atol=0)


def test_a_batch_of_zero_losses_only_has_no_loss():
    out = constant(QuietConfig.authors_code(thoughts=1, lookahead=1, thought_tokens=1))(
        torch.tensor([[1, 5, 5, 5]]), seed=0
    )
    assert out.loss.item() == 0


def test_labels_that_are_all_ignored_are_refused():
    model = quiet(tiny(), small())
    ids, mask = texts([6])
    with pytest.raises(ValueError, match="at least one token to predict after the first"):
        model(ids, mask, torch.full_like(ids, -100))
    only_first = torch.full_like(ids, -100)
    only_first[:, 0] = ids[:, 0]  # nothing predicts the first token
    with pytest.raises(ValueError, match="at least one token to predict after the first"):
        model(ids, mask, only_first)
    with pytest.raises(ValueError, match=r"labels of the shape of input_ids, \[1, 6\]"):
        model(ids, mask, ids[:, 1:])
    model(ids, mask, ids)


def test_texts_that_do_not_fit_the_context_are_refused():
    """12 positions hold 7 tokens, a thought of 3 with its start and end, and no more."""
    model = quiet(tiny(max_position_embeddings=12), small(lookahead=2))
    model(texts([7])[0])
    with pytest.raises(ValueError, match=r"A text of 8 tokens, with a thought of 5 .* takes 12"):
        model(texts([8])[0])
    model(*texts([7, 3]))
    with pytest.raises(ValueError, match="takes 12"):
        model.generate(texts([5])[0], max_new_tokens=3)
    model.generate(texts([5])[0], max_new_tokens=2)


@pytest.mark.parametrize(
    ("changes", "message_text"),
    [
        (
            {"thoughts": 1},
            "thoughts=1 the baseline 'log_mean' equals the log-probability of the only thought",
        ),
        ({"temperature": 0.0}, "At temperature=0 the 2 thoughts"),
        ({"temperature": 0.0, "baseline": "mean_log"}, "At temperature=0 the 2 thoughts"),
        ({"thoughts": 1, "reinforce_weight": 0.0}, None),
        ({"thoughts": 1, "thought_tokens": 0}, None),
        ({"thoughts": 1, "baseline": "mean_log"}, None),
        ({"thoughts": 1, "baseline": "mean_log", "temperature": 0.0}, None),
        ({}, None),
    ],
)
def test_settings_that_reinforce_nothing_give_a_warning(changes: dict, message_text: str | None):
    """An advantage is 0 where a thought is compared with itself or with its equals."""
    config = small(**changes)
    model, ids = quiet(tiny(), config), texts([9])[0]
    assert (message_text is None) == (config.without_reinforcement is None)
    if message_text is None:
        out = model(ids, seed=0)
    else:
        with pytest.warns(UserWarning, match=message_text):
            out = model(ids, seed=0)
    if message_text is not None:
        assert out.positive == 0 and out.reinforce == 0


@pytest.mark.parametrize(
    "changes", [{"thoughts": 2.5}, {"lookahead": "2"}, {"thought_tokens": None}]
)
def test_numbers_that_are_not_whole_are_refused(changes: dict):
    with pytest.raises(ValueError, match="must be a whole number; got"):
        QuietConfig(**changes)

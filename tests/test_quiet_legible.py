"""Readable thoughts: the divergence from the model at the start of training, and the measures."""

import copy
import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_quiet import END, PAD, START, VOCABULARY, drawn, naive_loss, quiet, states, texts, tiny
from naive_rlp import algorithm_1, learned_positions, rlp_model, some_thoughts
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from selftaught.cli.command import main
from selftaught.models.embedded import embedded_model
from selftaught.quiet.attention import thoughtful
from selftaught.quiet.checkpoint import make_quiet, open_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.curriculum import Stage, train_stages
from selftaught.quiet.evaluation import Measured, measure, score
from selftaught.quiet.gating import ThinkWhen
from selftaught.quiet.legibility import distinct_in_texts, repeated_share
from selftaught.quiet.model import QuietLM
from selftaught.quiet.reference import Reference, compared, reference_bytes
from selftaught.quiet.spans import spans
from selftaught.quiet.thoughts import language_head, read, talk
from selftaught.quiet.training import quiet_arguments, train_quiet
from selftaught.reports.quiet_page import training_page

NEVER = ThinkWhen("never")
WEIGHT = 0.7
NEAR: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def moved(model: torch.nn.Module, size: float = 0.05, seed: int = 7) -> None:
    """Change every weight a little, as training does."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += size * torch.randn(weight.shape, generator=draw, dtype=weight.dtype)


def naive_divergence(
    model: QuietLM, first: QuietLM, ids: Tensor, mask: Tensor, thoughts: Tensor, think: Tensor
) -> tuple[Tensor, Tensor]:
    """One forward pass per thought of each model, and torch's own divergence at every token.

    Args:
        model: the trained model.
        first: the model before training.
        ids: texts.
        mask: their padding.
        thoughts: thoughts at every position; END fills the shorter ones.
        think: the positions that count.

    Returns:
        The mean over thoughts of the divergence per sampled token, and of the negative log-probability
        per token before the end under the first model.
    """
    warmth, may_end = model.quiet_config.temperature, model.quiet_config.thought_may_end
    found, nats = [], []
    for row, all_thoughts, real, here in zip(ids, thoughts, mask, think, strict=True):
        text, offset = row[real.bool()], int(real.argmax())
        for at in [one for one in range(len(text) - 1) if here[offset + one]]:
            for slots in all_thoughts[:, offset + at].tolist():
                content = slots[: slots.index(END)] if END in slots else slots
                sampled = slots[: len(content) + 1]
                tokens = torch.cat([text[: at + 1], torch.tensor([START, *content, END])])
                said, wanted = states(model, tokens)[1], states(first, tokens)[1].detach()
                by_token, by_nats = [], []
                for number, token in enumerate(sampled):
                    never = {START, PAD} if may_end and number else {START, PAD, END}
                    allowed = [one for one in range(VOCABULARY) if one not in never]
                    p, q = (one[at + 1 + number][allowed] for one in (said, wanted))
                    by_token.append(
                        kl_divergence(
                            Categorical(logits=p / warmth), Categorical(logits=q / warmth)
                        )
                    )
                    if token != END:
                        by_nats.append(-q.log_softmax(-1)[allowed.index(token)])
                found.append(torch.stack(by_token).mean())
                nats.append(torch.stack(by_nats).mean())
    return torch.stack(found).mean(), torch.stack(nats).mean()


def assert_gradients_equal(model: QuietLM, slow: QuietLM) -> None:
    for (name, fast), (_, plain) in zip(
        model.named_parameters(), slow.named_parameters(), strict=True
    ):
        fast_gradient, plain_gradient = (
            torch.zeros_like(one) if one.grad is None else one.grad for one in (fast, plain)
        )
        torch.testing.assert_close(fast_gradient, plain_gradient, msg=name, **NEAR)


def compared_to(model: QuietLM) -> QuietLM:
    """Give the model its present weights as the reference, and return a copy of these."""
    first = copy.deepcopy(model)
    model.reference = Reference.frozen(model)
    return first


CASES: list[dict[str, Any]] = [
    {"positions_per_chunk": 3},
    {"preset": "paper", "positions_per_chunk": 1, "thoughts": 1},
    {"preset": "authors_code", "positions_per_chunk": 2, "drop_zero_losses": False},
    {"preset": "authors_code", "positions_per_chunk": 100},
    {"temperature": 0.6, "reinforce_temperature": 2.0, "thought_tokens": 1},
    {"positions": "pattern", "positions_pattern": "=", "positions_per_chunk": 2},
    {"reinforce_weight": 0.0, "nll_weight": 0.0, "base_nll_weight": 0.0},
]


@pytest.mark.parametrize(
    ("case", "left"), [*((case, False) for case in CASES), (CASES[0], True), (CASES[5], True)],
    ids=lambda value: str(value)[1:50],
)  # fmt: skip
def test_loss_and_gradients_are_those_of_separate_forward_passes(case: dict, left: bool):
    preset = getattr(QuietConfig, case.get("preset", ""), QuietConfig)
    sizes: dict = {"thoughts": 2, "lookahead": 2, "thought_tokens": 3, "reinforce_weight": 3.0}
    options = {name: value for name, value in case.items() if name != "preset"}
    chosen: dict[str, Any] = sizes | options | {"thought_kl_weight": WEIGHT}
    config = preset(**chosen)
    model = quiet(tiny(sliding_window=5), config)
    first = compared_to(model)
    moved(model)
    ids, mask = texts([8, 6], left=left)
    think = torch.ones_like(ids) if config.positions == "all" else (ids % 2 == 0).long() * mask
    given = None if config.positions == "all" else think
    thoughts, slow = drawn(config, ids), copy.deepcopy(model)
    out = model(ids, mask, think_mask=given, thoughts=thoughts)
    out.loss.backward()
    kl, nats = naive_divergence(slow, first, ids, mask, thoughts, think)
    expected = naive_loss(slow, ids, mask, thoughts, given) + WEIGHT * kl
    expected.backward()
    assert kl > 0.05
    torch.testing.assert_close(out.thought_kl, kl.detach(), **NEAR)
    torch.testing.assert_close(out.thought_base_nll, nats, **NEAR)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), **NEAR)
    assert_gradients_equal(model, slow)
    assert model.reference is not None
    assert all(torch.equal(one, other) for one, other in zip(
        first.base.parameters(), model.reference.weights.values(), strict=True))  # fmt: skip


@pytest.mark.parametrize("architecture", [tiny, learned_positions])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_thoughts_that_end_themselves_count_their_sampled_tokens(
    architecture: Any, checkpointing: bool
):
    """In RLP's preset, with its moving average left out: the rewards are over present weights."""
    model = rlp_model(
        architecture(), positions_per_chunk=2, thought_kl_weight=WEIGHT, ema_decay=0.0
    )
    first = compared_to(model)
    moved(model)
    ids, mask = texts([7, 5])
    thoughts, slow = some_thoughts(ids, 3, 4), copy.deepcopy(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    out = model(ids, mask, thoughts=thoughts)
    out.loss.backward()
    contexts = [
        (row[: at + 1], row[at + 1 : at + 2], by_thought[:, at])
        for row, by_thought, size in zip(ids, thoughts, mask.sum(1), strict=True)
        for at in range(int(size) - 1)
    ]
    kl, nats = naive_divergence(slow, first, ids, mask, thoughts, torch.ones_like(ids))
    plain = copy.deepcopy(slow.base)
    expected = algorithm_1(slow, plain, slow, contexts).loss + WEIGHT * kl
    expected.backward()
    torch.testing.assert_close(out.thought_base_nll, nats, **NEAR)
    torch.testing.assert_close(out.loss.detach(), expected.detach(), **NEAR)
    assert_gradients_equal(model, slow)


def test_with_an_adapter_the_reference_is_the_model_without_it():
    from peft import LoraConfig, get_peft_model

    config = QuietConfig(thoughts=2, lookahead=2, thought_tokens=3, thought_kl_weight=WEIGHT)
    model = quiet(tiny(), config)
    plain = copy.deepcopy(model)
    adapter = get_peft_model(model.base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    model.reference = Reference.frozen(model)
    whole = sum(one.numel() * 8 for one in plain.base.parameters())
    assert reference_bytes(model.base) < whole / 5
    assert reference_bytes(plain.base) == whole
    moved(adapter)
    ids, mask = texts([8, 6])
    thoughts = drawn(config, ids)
    kl, nats = naive_divergence(model, plain, ids, mask, thoughts, torch.ones_like(ids))
    with adapter.disable_adapter():
        off = naive_divergence(model, plain, ids, mask, thoughts, torch.ones_like(ids))[0]
    out = model(ids, mask, thoughts=thoughts)
    assert kl > 0.01 and abs(float(off.detach())) < 1e-12
    torch.testing.assert_close(out.thought_kl, kl.detach(), **NEAR)
    torch.testing.assert_close(out.thought_base_nll, nats, **NEAR)


def test_tied_weights_are_frozen_in_both_of_their_places():
    config = QuietConfig(thoughts=2, lookahead=2, thought_tokens=2, thought_kl_weight=WEIGHT)
    model = quiet(tiny(tie_word_embeddings=True), config)
    first = compared_to(model)
    moved(model)
    ids, mask = texts([7, 5])
    thoughts = drawn(config, ids)
    kl, nats = naive_divergence(model, first, ids, mask, thoughts, torch.ones_like(ids))
    out = model(ids, mask, thoughts=thoughts)
    torch.testing.assert_close(out.thought_kl, kl.detach(), **NEAR)
    torch.testing.assert_close(out.thought_base_nll, nats, **NEAR)


def test_the_sum_over_tokens_is_an_unbiased_estimate_of_the_divergence_of_thoughts():
    """All thoughts of two tokens are listed: sum p(T) log p(T) / q(T), from forward passes alone."""
    config = QuietConfig(thoughts=1, lookahead=1, thought_tokens=2, thought_kl_weight=WEIGHT,
                         baseline="mean_log")  # fmt: skip
    model = quiet(tiny(initializer_range=0.2), config)
    first = compared_to(model)
    moved(model, 0.1)
    text, allowed = torch.tensor([3, 14]), list(range(PAD))

    def log_probs(which: QuietLM) -> Tensor:
        """The log-probability of every thought after the first token, `[V, V]`."""
        rows = []
        for token in allowed:
            said = states(which, torch.tensor([3, START, token]))[1][1:, allowed].log_softmax(-1)
            rows.append(said[0, token] + said[1])
        return torch.stack(rows)

    with torch.no_grad():
        log_p, log_q = log_probs(model), log_probs(first)
        every = torch.tensor(list(product(allowed, allowed)))
        thoughts = every[None, :, None].expand(1, -1, 2, -1)  # as many thoughts at both positions
        assert model.reference is not None
        position = torch.tensor([[0]])
        with thoughtful(model.base):
            prefix = read(model.base, text[None], None)
            hidden, _ = talk(model.base, prefix, position, thoughts[:, :, :1], 1, model.marks)
            found = compared(
                language_head(model.base), hidden, thoughts[:, :, :1], position,
                model.reference.read(text[None], None), model.marks, 1.0,
            )  # fmt: skip
    expected = (log_p.exp() * (log_p - log_q)).sum()
    estimate = (log_p.exp().flatten() * 2 * found.kl_BNJ.flatten()).sum()
    assert expected > 0.05
    torch.testing.assert_close(estimate, expected, **NEAR)
    torch.testing.assert_close(found.nll_BNJ.flatten() * 2, -log_q.flatten(), **NEAR)


def test_sampled_positions_count_by_the_inverse_of_their_probability():
    """Two of eight positions per text: each stands for four, and the sum is divided by all eight."""
    config = QuietConfig(thoughts=2, lookahead=1, thought_tokens=2, positions="uniform",
                         positions_share=0.25, thought_kl_weight=WEIGHT)  # fmt: skip
    model = quiet(tiny(), config)
    first = compared_to(model)
    moved(model)
    ids, mask = texts([9, 9])
    thoughts = drawn(config, ids)
    out = model(ids, mask, thoughts=thoughts, seed=3)
    think = torch.zeros_like(ids).scatter(1, out.position_BJ, 1)
    assert out.factor_BJ.tolist() == [[4, 4], [4, 4]]
    kl, nats = naive_divergence(model, first, ids, mask, thoughts, think)
    torch.testing.assert_close(out.thought_kl, kl.detach() * 4 * 2 / 8, **NEAR)
    torch.testing.assert_close(out.thought_base_nll, nats * 4 * 2 / 8, **NEAR)


def dropping() -> PreTrainedModel:
    """A model with dropout, which the reference must not have."""
    base = learned_positions()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return base


def test_comparing_changes_no_result_at_a_weight_of_0():
    """Bit for bit, with dropout, whose random numbers the reference must not use up."""
    config = QuietConfig(thoughts=2, lookahead=2, thought_tokens=3, positions_per_chunk=2)
    ids, mask = texts([8, 6])
    results = []
    for measured in (False, True):
        model = quiet(dropping(), config).train()
        if measured:
            model.reference = Reference.frozen(model)
            moved(model.reference.base, 0.0)
        torch.manual_seed(5)
        out = model(ids, mask, seed=1)
        out.loss.backward()
        assert (out.thought_kl is not None) == measured
        assert model.base.training
        gradients = [one.grad for one in model.parameters()]
        results.append([out.loss.detach(), *(one for one in gradients if one is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_reference_has_no_dropout():
    config = QuietConfig(thoughts=2, lookahead=2, thought_tokens=3)
    model = quiet(dropping(), config).train()
    first = compared_to(model).eval()
    moved(model)
    ids, mask = texts([8, 6])
    thoughts = drawn(config, ids)
    out = model(ids, mask, thoughts=thoughts)
    _, nats = naive_divergence(first, first, ids, mask, thoughts, torch.ones_like(ids))
    torch.testing.assert_close(out.thought_base_nll, nats, **NEAR)


def test_a_weight_without_a_reference_is_refused():
    model = quiet(tiny(), QuietConfig(thought_kl_weight=0.1))
    with pytest.raises(
        ValueError, match=r"thought_kl_weight=0\.1 needs a reference.*frozen\(model\)"
    ):
        model(texts([6])[0])
    with pytest.raises(ValueError, match="thought_kl_weight must be at least 0 and finite; got -1"):
        QuietConfig(thought_kl_weight=-1)


# --- the measures --------------------------------------------------------------------------------


def test_repeated_tokens_are_seq_rep_1():
    """1 - different / all, by hand: 5 7 5 5 has two repeats of four; after its end nothing counts."""
    tokens = torch.tensor([[5, 7, 5, 5], [1, 2, 3, 4], [9, 9, 9, 9], [9, 9, 3, 3], [6, 6, 6, 6]])
    lengths = torch.tensor([4, 4, 4, 3, 1])
    assert repeated_share(tokens, lengths).tolist() == pytest.approx([0.5, 0, 0.75, 1 / 3, 0])
    draw = torch.Generator().manual_seed(0)
    many = torch.randint(6, (50, 9), generator=draw)
    expected = [1 - len(set(row)) / 9 for row in many.tolist()]
    assert repeated_share(many, torch.full((50,), 9)).tolist() == pytest.approx(expected)


def test_distinct_thoughts_of_a_text_are_counted_over_its_positions():
    thoughts = torch.tensor([[[[1, 2], [1, 2], [3, 3]], [[1, 2], [2, 1], [3, 3]]]] * 2)
    used = torch.tensor([[True, True, False], [False, False, False]])
    found = distinct_in_texts(thoughts, used).tolist()  # 12, 12, 12, 21: two of four
    assert found[0] == 0.5 and found[1] != found[1]


@pytest.mark.parametrize("may_end", [False, True])
def test_the_evaluation_measures_thoughts_as_separate_forward_passes(may_end: bool):
    """Mean and cluster interval of every measure, from the thoughts that `score` returns."""
    config = QuietConfig(thought_tokens=3, thought_may_end=may_end, lookahead=1)
    model = quiet(tiny(), config)
    if may_end:  # often enough
        with torch.no_grad():
            model.base.lm_head.weight[END] *= 4  # type: ignore[operator]
    first = copy.deepcopy(model)
    moved(model)
    ids, mask = texts([7, 5, 6])
    parts = [(number, row[keep.bool()].tolist()) for number, row, keep in zip((0, 1, 1), ids, mask, strict=True)]  # fmt: skip
    found = measure(model, parts, thoughts=2, temperature=1.0, seed=4, batch_size=1,
                    reference=Reference.other(first)).legibility  # fmt: skip
    assert found is not None
    nats, repeated, at_position, in_text, windows = [], [], [], [], []
    for text, tokens in parts:
        row = torch.tensor([tokens])
        scored = score(model, row, thoughts=2, temperature=1.0, seed=4)
        whole = set()
        for at in range(len(tokens) - 1):
            here = [tuple(one) for one in scored.thought_BNTS[0, :, at].tolist()]
            whole |= set(here)
            at_position.append((text, len(set(here)) / 2))
            for slots in here:
                content = list(slots[: slots.index(END)]) if END in slots else list(slots)
                said = states(first, torch.tensor([*tokens[: at + 1], START, *content]))[1].detach()
                never = [START, PAD]
                by_token = []
                for number, token in enumerate(content):
                    scores = said[at + 1 + number].clone()
                    scores[never if may_end and number else [*never, END]] = -torch.inf
                    by_token.append(-float(scores.log_softmax(-1)[token]))
                nats.append((text, sum(by_token) / len(by_token), len(content)))
                repeated.append((text, 1 - len(set(content)) / len(content)))
        in_text.append((text, len(whole) / (2 * len(tokens) - 2)))
    width = round(sum(one[2] for one in nats) / len(nats))
    for text, tokens in parts:
        every = [tokens[at : at + width] for at in range(len(tokens) - width + 1)]
        windows += [(text, 1 - len(set(one)) / width) for one in every]
    assert found.thoughts == len(nats) == 30
    assert len({one[2] for one in nats}) == (3 if may_end else 1)
    for interval, values in (
        (found.base_nll, [one[:2] for one in nats]), (found.repeated_tokens, repeated),
        (found.distinct_thoughts, at_position), (found.distinct_in_text, in_text),
        (found.repeated_in_text, windows),
    ):  # fmt: skip
        assert interval == pytest.approx(clustered(values), rel=1e-5, abs=1e-6)
    stored = json.loads(json.dumps(measure(model, parts).to_dict()))
    assert Measured.from_dict(stored).legibility.distinct_thoughts is None  # type: ignore[union-attr]
    assert Measured.from_dict({name: one for name, one in stored.items() if name != "legibility"}).legibility is None  # fmt: skip
    assert measure(model, parts, think_when=NEVER).legibility is None


def clustered(values: list[tuple[int, float]]) -> tuple[float, float, float]:
    """The mean and its interval from the sums of deviations of two clusters."""
    mean = sum(value for _, value in values) / len(values)
    sums = [sum(value - mean for text, value in values if text == number) for number in (0, 1)]
    error = 1.96 * (2 * (sums[0] ** 2 + sums[1] ** 2)) ** 0.5 / len(values)
    return mean, mean - error, mean + error


# --- training ------------------------------------------------------------------------------------

TEXTS = [f"{a}+{b}={a + b}, {b}+{a}={a + b}." for a in range(4) for b in range(5)]


def learned(folder: Path, out: Path, *, stop_after: int = 99, steps: int = 0, **changes: Any) -> list[dict[str, float]]:  # fmt: skip
    """Train for four steps; stop after some of them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes: dict = {"thought_tokens": 2, "lookahead": 2, "initial_text": "A", "embedding_scale": 1.0}
    base = AutoModelForCausalLM.from_pretrained(folder)
    model = make_quiet(base, tokenizer, QuietConfig(**(sizes | changes)))
    arguments = quiet_arguments(out / "checkpoints", max_steps=4, learning_rate=3e-3, save_steps=2,
                                per_device_train_batch_size=2, use_cpu=True, warmup_steps=1)  # fmt: skip
    seen: list[int] = []

    def progress(new: int) -> None:
        seen.append(new)
        if len(seen) >= stop_after:
            raise KeyboardInterrupt

    if steps:
        model.reference = Reference.frozen(model, every=steps)
    log = train_quiet(model, tokenizer, spans(TEXTS, tokenizer, length=24, least=4), arguments,
                      out=out, progress=progress)  # fmt: skip
    assert model.reference is None
    return log


def weights_of(out: Path) -> dict[str, Tensor]:
    return open_quiet(out / "model")[0].state_dict()


def test_a_resumed_training_is_compared_with_the_model_before_its_first_step(
    tiny_model_dir: Path, tmp_path: Path
):
    whole = learned(tiny_model_dir, tmp_path / "whole", thought_kl_weight=2.0)
    with pytest.raises(KeyboardInterrupt):
        learned(tiny_model_dir, tmp_path / "parts", stop_after=3, thought_kl_weight=2.0)
    parts = learned(tiny_model_dir, tmp_path / "parts", thought_kl_weight=2.0)
    assert [row["thought_kl"] for row in parts] == [row["thought_kl"] for row in whole]
    assert abs(whole[0]["thought_kl"]) < 1e-6 < whole[-1]["thought_kl"]
    first, second = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_measuring_the_perplexity_changes_no_weight(tiny_model_dir: Path, tmp_path: Path):
    plain = learned(tiny_model_dir, tmp_path / "plain")
    logs = learned(tiny_model_dir, tmp_path / "measured", steps=2)
    assert [row["step"] for row in logs if "thought_base_nll" in row] == [1, 3, 4]
    assert not any("thought_base_nll" in row for row in plain)
    assert all({"repeated_tokens", "distinct_in_text"} <= row.keys() for row in plain)
    first, second = weights_of(tmp_path / "plain"), weights_of(tmp_path / "measured")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "plain" / "made_from.json").read_text() == (tmp_path / "measured" / "made_from.json").read_text()  # fmt: skip
    weighted = learned(tiny_model_dir, tmp_path / "weighted", thought_kl_weight=50.0)
    assert weighted[-1]["thought_kl"] < logs[-1]["thought_kl"] / 2


def test_all_stages_of_a_curriculum_have_the_model_before_the_first_as_their_reference(
    tiny_model_dir: Path, tmp_path: Path
):
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = QuietConfig(thought_tokens=3, lookahead=2, initial_text="A", thought_kl_weight=0.1)
    model = make_quiet(base, tokenizer, config)

    def arguments(folder: Path, number: int) -> Any:
        return quiet_arguments(folder, max_steps=2, learning_rate=3e-3, use_cpu=True, warmup_steps=0,
                               per_device_train_batch_size=2)  # fmt: skip

    data = spans(TEXTS, tokenizer, length=24, least=4)
    log = train_stages(model, tokenizer, data, [Stage(3, 2), Stage(2, 2)], arguments, out=tmp_path)
    assert [row["stage"] for row in log] == [1, 1, 2, 2]
    assert abs(log[0]["thought_kl"]) < 1e-6 < 1e-5 < log[2]["thought_kl"]


def test_the_page_shows_the_measures_over_training(tmp_path: Path):
    readable = {"thoughts": 3, "base_nll": [1.25, 1.0, 1.5], "repeated_tokens": [0.25, 0.2, 0.3],
                "repeated_in_text": [0.125, 0.1, 0.15], "distinct_thoughts": None,
                "distinct_in_text": [0.5, float("nan"), float("nan")]}  # fmt: skip
    numbers: dict[str, Any] = dict.fromkeys(
        ("tokens", "texts", "nll_without", "nll_with", "gain", "gain_low", "gain_high", "weight",
         "thinking", "helped", "hurt"), 1.0)  # fmt: skip
    after = Measured.from_dict(numbers | {"gain_by_decile": [0.0] * 10, "legibility": readable})
    log = [{"step": step, "thought_base_nll": step / 4, "repeated_tokens": 0.5} for step in range(1, 11)]  # fmt: skip
    page = training_page(tmp_path, log, {}, after, after).read_text()
    assert "1.250 [1.000, 1.500]" in page and "25.0% [20.0%, 30.0%]" in page
    assert "12.5% [10.0%, 15.0%]" in page and ">50.0%<" in page
    assert "9 to 10</th><td>2.375</td><td>0.500</td>" in page  # (9 + 10) / 2 / 4
    assert (
        "<figcaption>Thoughts under the base model (nats per token, log of the perplexity)" in page
    )
    without = training_page(tmp_path, [], {}).read_text()
    assert "readable" not in without


def test_the_command_measures_under_a_base_model_of_the_same_tokens(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    config = QuietConfig(thought_tokens=2, lookahead=1, initial_text="A")
    save_quiet(make_quiet(base, tokenizer, config), tokenizer, tmp_path / "model")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS[:3]))  # fmt: skip
    command = ["quiet", "evaluate", "--model", str(tmp_path / "model"), "--text", str(tmp_path / "texts.jsonl"),
               "--out", str(tmp_path / "found.json")]  # fmt: skip
    assert main([*command, "--base-model", str(tiny_model_dir)]) == 0
    shown = capsys.readouterr().out
    found = Measured.from_dict(json.loads((tmp_path / "found.json").read_text())).legibility
    assert found is not None and found.base_nll is not None
    assert f"| model | {found.thoughts} | {found.base_nll[0]:.3f} [" in shown
    assert main([*command, "--base-model", str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == shown  # the same weights, with the tokens of thoughts
    assert main([*command, "--base-model", str(embedded_model())]) != 0
    assert "has other tokens" in capsys.readouterr().err

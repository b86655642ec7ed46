"""Thinking at some positions only: the sum over all positions is kept on average, exactly."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_quiet import END, PAD, START, quiet, texts, tiny

from selftaught.quiet.chunks import bytes_per_row, positions_per_chunk, positions_within
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.gating import ThinkWhen
from selftaught.quiet.model import QuietLM
from selftaught.quiet.positions import choose


def mean_over_draws(weights: list[float], count: int, values: list[float]) -> tuple[float, float]:
    """Means of the weighted sum and of the number of chosen positions over all uniform numbers.

    What is chosen changes only where a mark crosses a step of the running sum, so a few hundred
    thin slices of (0, 1) between those places give the integral.
    """
    weight = torch.tensor([weights], dtype=torch.double)
    value = torch.tensor(values, dtype=torch.double)
    chance = torch.tensor(weights, dtype=torch.double)
    edges = {0.0, 1.0}
    # Any chances the function may use are among those of capping the largest weights, by hand:
    for capped in range(count + 1):
        order = chance.argsort(descending=True)
        sure, free = order[:capped], order[capped:]
        one = torch.zeros_like(chance)
        one[sure] = 1
        one[free] = (count - capped) * chance[free] / chance[free].sum().clamp(min=1e-30)
        edges |= {float(edge) % 1 for edge in one.cumsum(0)}
    cuts = sorted(edges)
    total = picked = 0.0
    for low, high in pairwise(cuts):
        middle = torch.tensor([(low + high) / 2])
        position, factor = choose(weight, count, middle)
        total += (high - low) * float((factor[0].double() * value[position[0]]).sum())
        picked += (high - low) * len(set(position[0].tolist()))
    return total, picked


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.05, 5), st.floats(-3, 3)), min_size=3, max_size=9),
    st.integers(1, 3),
)
def test_the_mean_of_the_weighted_sum_is_the_sum(pairs: list[tuple[float, float]], count: int):
    weights, values = (list(column) for column in zip(*pairs, strict=True))
    total, picked = mean_over_draws(weights, count, values)
    assert total == pytest.approx(sum(values), abs=1e-4)
    assert picked == pytest.approx(min(count, len(weights)), abs=1e-6)


def test_positions_without_weight_are_never_chosen_and_too_few_are_all_taken():
    weight = torch.tensor([[0.0, 1, 0, 1, 0], [1.0, 1, 1, 1, 1]])
    position, factor = choose(weight, 3, torch.tensor([0.3, 0.3]))
    first = dict(zip(position[0].tolist(), factor[0].tolist(), strict=True))
    assert {at: one for at, one in first.items() if one} == {1: 1.0, 3: 1.0}
    assert factor[1].tolist() == pytest.approx([5 / 3] * 3)


def config(**changes: object) -> QuietConfig:
    sizes: dict = {"thoughts": 2, "lookahead": 2, "thought_tokens": 2, "reinforce_weight": 2.0}
    return QuietConfig.paper(**(sizes | changes))


@pytest.mark.parametrize("positions", ["uniform", "entropy"])
def test_the_mean_loss_of_a_share_is_the_loss_of_all(positions: str, monkeypatch):
    ids, mask = texts([9, 6])
    whole = quiet(tiny(), config())
    torch.manual_seed(7)
    thoughts = torch.randint(0, PAD, (2, 2, 9, 2))
    expected = whole(ids, mask, thoughts=thoughts)
    some = quiet(tiny(), config(positions=positions, positions_share=0.4))
    rand, mean, slices = torch.rand, 0.0, 100

    for number in range(slices):
        at = (number + 0.5) / slices
        monkeypatch.setattr(torch, "rand", lambda *a, at=at, **k: rand(*a, **k) * 0 + at)
        out = some(ids, mask, thoughts=thoughts)
        assert out.position_BJ.shape == (2, 3)
        mean += out.loss.item() / slices
    # Texts share the uniform number here, which leaves the mean of their sum as it is.
    assert mean == pytest.approx(expected.loss.item(), rel=2e-2)


def test_a_position_that_thinks_alone_gives_what_it_gives_among_all():
    ids, mask = texts([9, 6])
    thoughts = torch.randint(0, PAD, (2, 2, 9, 2))
    every = quiet(tiny(), config())(ids, mask, thoughts=thoughts)
    some = quiet(tiny(), config(positions="uniform", positions_share=0.5))(
        ids, mask, thoughts=thoughts, seed=3
    )
    for row, positions in enumerate(some.position_BJ):
        torch.testing.assert_close(
            some.log_prob_with_BNJK[row], every.log_prob_with_BNJK[row][:, positions]
        )


def test_a_budget_decides_the_chunk_and_too_small_a_one_is_refused():
    model = quiet(tiny(), config(chunk_megabytes=1))
    ids, mask = texts([9, 6])
    loss = model(ids, mask, seed=0).loss
    one = quiet(tiny(), config(positions_per_chunk=1))(ids, mask, seed=0).loss
    torch.testing.assert_close(loss, one, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"chunk_megabytes=1 is too small.*works here is 96"):
        positions_within(2**20, 4, 24 * 2**20)


def test_without_a_budget_one_position_always_fits():
    """128 MiB on a CPU: as many positions as a budget of that size, and never none."""
    base = tiny()
    assert positions_per_chunk(base, config(), 2) == positions_per_chunk(
        base, config(chunk_megabytes=128), 2
    )
    many = config(thoughts=100_000)
    assert positions_per_chunk(base, many, 8) == 1
    with pytest.raises(ValueError, match="chunk_megabytes=128 is too small for one position"):
        positions_per_chunk(base, replace(many, chunk_megabytes=128), 8)


def test_what_a_thought_keeps_is_near_what_is_reckoned():
    """Counted by what autograd saves, each storage once."""
    base = tiny(hidden_size=64, intermediate_size=160, vocab_size=2000).float()
    model = QuietLM(base, config(positions_per_chunk=100), start=START, end=END, pad=PAD)
    ids = torch.randint(0, PAD, (1, 41))
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    weights = sum(one.untyped_storage().nbytes() for one in base.parameters())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids)
    reckoned = 80 * bytes_per_row(base, 5, 3)
    assert reckoned / 2.5 < sum(seen.values()) - weights < reckoned * 2.5


# --- deciding when it writes ---------------------------------------------------------------------


def test_thinking_by_entropy_is_thinking_where_the_entropy_is_higher():
    model = quiet(tiny(), config())
    ids, _ = texts([12])
    with torch.no_grad():
        log_p = model.base(ids).logits[0, :-1].log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    threshold = float(entropy.median())
    always, some = score(model, ids), score(model, ids, think_when=ThinkWhen("entropy", threshold))
    thinks = entropy > threshold
    assert torch.equal(some.thinks_BT[0], thinks)
    torch.testing.assert_close(some.with_BT[0][thinks], always.with_BT[0][thinks])
    torch.testing.assert_close(some.with_BT[0][~thinks], always.without_BT[0][~thinks])


def test_without_thinking_generation_is_the_bases():
    model = quiet(tiny(), config())
    ids, mask = texts([7, 4], left=True)
    ours = model.generate(ids, mask, max_new_tokens=6, think_when=ThinkWhen("never"))
    for row, text, real in zip(ours[:, 7:], ids, mask, strict=True):
        tokens = text[real.bool()]
        for token in row:
            with torch.no_grad():
                logits = model.base(tokens[None]).logits[0, -1].clone()
            logits[[START, END, PAD]] = -torch.inf
            assert int(logits.argmax()) == int(token)
            tokens = torch.cat([tokens, token[None]])


def test_texts_of_a_batch_decide_for_themselves():
    model = quiet(tiny(), config())
    ids, mask = texts([7, 4], left=True)
    with torch.no_grad():
        log_p = [
            model.base(row[real.bool()][None]).logits[0, -1].log_softmax(-1)
            for row, real in zip(ids, mask, strict=True)
        ]
    entropies = [float(-(one.exp() * one).sum()) for one in log_p]
    between = ThinkWhen("entropy", sum(entropies) / 2)
    both = model.generate(ids, mask, max_new_tokens=5, think_when=between)
    for row, text, real in zip(both, ids, mask, strict=True):
        alone = model.generate(text[real.bool()][None], max_new_tokens=5, think_when=between)
        assert torch.equal(row[7:], alone[0, int(real.sum()) :])


@pytest.mark.slow
def test_the_gate_learns_the_gain_and_nothing_else_learns_from_it():
    ids, mask = texts([9, 6])
    thoughts = torch.randint(0, PAD, (2, 2, 9, 2))
    plain = quiet(tiny(), config())
    plain(ids, mask, thoughts=thoughts).loss.backward()
    gated = quiet(tiny(), config(gate_weight=3.0))
    assert gated.gate is not None
    gated(ids, mask, thoughts=thoughts).loss.backward()
    for (name, one), (_, other) in zip(
        plain.named_parameters(),
        [(n, p) for n, p in gated.named_parameters() if not n.startswith("gate")],
        strict=True,
    ):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-12, msg=name)
    optimizer = torch.optim.Adam(gated.gate.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        out = gated(ids, mask, thoughts=thoughts)
        out.loss.backward()
        optimizer.step()
    gain = out.log_prob_with_BNJK[..., 0].mean(1) - out.log_prob_without_BT[:, :-1]
    with torch.no_grad():
        hidden = gated.base(ids[:1], output_hidden_states=True).hidden_states[-1][0, :-1]
        torch.testing.assert_close(gated.gate(hidden), gain[0], rtol=0, atol=0.1)


def test_asking_a_gate_that_is_not_there_says_what_to_do():
    model = quiet(tiny(), config())
    ids, _ = texts([5])
    with pytest.raises(ValueError, match="gate_weight=1"):
        score(model, ids, think_when=ThinkWhen("gate"))
    with pytest.raises(ValueError, match=r"think_when must be trained, always, .* gate or never"):
        ThinkWhen("sometimes")  # type: ignore[arg-type]

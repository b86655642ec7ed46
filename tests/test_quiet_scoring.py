"""Measuring with thoughts, beside ordinary forward passes and intervals by hand."""

import math
from functools import partial

import pytest
import torch
from naive_quiet import END, PAD, START, quiet, states, texts, tiny

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import measure, score


@pytest.mark.parametrize("mix", ["hidden", "log_probs"])
def test_scores_are_those_of_separate_forward_passes(mix: str):
    model = quiet(tiny(), QuietConfig.paper(thought_tokens=2, mix=mix))
    ids, mask = texts([8, 5])
    found = score(model, ids, mask)
    for row, real in enumerate(mask.sum(1).tolist()):
        text = ids[row, :real]
        for at in range(real - 1):
            thought = [*text[: at + 1].tolist(), START]
            for _ in range(2):
                logits = states(model, torch.tensor(thought))[1][-1].clone()
                logits[[START, END, PAD]] = -torch.inf
                thought.append(int(logits.argmax()))
            before, before_logits = (one[-1] for one in states(model, text[: at + 1]))
            after, after_logits = (one[-1] for one in states(model, torch.tensor([*thought, END])))
            weight = model.mixing(before, after)
            if mix == "hidden":
                mixed = model.base.lm_head((1 - weight) * before + weight * after)
            else:
                mixed = (1 - weight) * before_logits.log_softmax(-1)
                mixed = mixed + weight * after_logits.log_softmax(-1)
            near = partial(pytest.approx, rel=1e-5, abs=1e-5)  # scores are float32
            target = int(text[at + 1])
            without = before_logits.log_softmax(-1)[target].item()
            assert found.without_BT[row, at].item() == near(without)
            assert found.with_BT[row, at].item() == near(mixed.log_softmax(-1)[target].item())
            assert found.weight_BNT[row, 0, at].item() == near(weight.item())
            assert found.thought_BNTS[row, 0, at].tolist() == thought[at + 2 :]


def test_several_thoughts_are_averaged_as_probabilities():
    model = quiet(tiny(), QuietConfig.paper(thought_tokens=2))
    ids, _ = texts([8])
    found = score(model, ids, thoughts=3, temperature=1.0)
    mean = found.each_BNT.exp().mean(1).log()
    torch.testing.assert_close(found.with_BT, mean, rtol=1e-5, atol=1e-5)
    assert len(found.thought_BNTS[0].flatten(1).unique(dim=0)) > 1


def test_means_and_intervals_are_those_worked_out_by_hand():
    model = quiet(tiny(), QuietConfig.paper(thought_tokens=1))
    ids, mask = texts([9, 6, 7, 4])
    spans = [
        (number, row[real.bool()].tolist())
        for number, (row, real) in enumerate(zip(ids, mask, strict=True))
    ]
    found = measure(model, spans, batch_size=2)
    gains = [
        (one.with_BT - one.without_BT)[0].double()
        for one in (score(model, torch.tensor([row])) for _, row in spans)
    ]
    count = sum(map(len, gains))
    mean = float(sum(one.sum() for one in gains) / count)
    # The variance of a ratio of sums over clusters (texts), linearised.
    spread = sum(float((one - mean).sum()) ** 2 for one in gains) * 4 / 3
    assert found.tokens == count == 8 + 5 + 6 + 3
    assert found.texts == 4
    assert found.gain == pytest.approx(mean, abs=1e-5)
    assert found.gain_high - found.gain == pytest.approx(1.96 * math.sqrt(spread) / count, rel=1e-3)
    assert found.nll_without - found.nll_with == pytest.approx(found.gain, abs=1e-9)
    assert len(found.gain_by_decile) == 10

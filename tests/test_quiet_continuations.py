"""Log-likelihoods of continuations, beside scoring with thoughts at every position of the text alone."""

import pytest
import torch
from naive_quiet import quiet, texts, tiny
from narrowed import tensor

from selftaught.models.embedded import character_tokenizer
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.continuations import Continuation, score_continuations
from selftaught.quiet.evaluation import score
from selftaught.quiet.gating import GREEDY, ThinkWhen, ThoughtParams
from selftaught.quiet.model import QuietLM

SAMPLED = ThoughtParams(thoughts=2, temperature=1.0, seed=3)
HOW = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "entropy": ThoughtParams(think_when=ThinkWhen("entropy", 2.4)),
    "pattern": ThoughtParams(
        think_when=ThinkWhen("pattern", pattern="[0-4a-e]", tokenizer=character_tokenizer())
    ),
    "never": ThoughtParams(think_when=ThinkWhen("never")),
}


@pytest.fixture(scope="module")
def model() -> QuietLM:
    """A model whose thoughts have a weight of about a half at every position."""
    model = quiet(tiny(), QuietConfig(thought_tokens=2))
    head = tensor(model.mixing.layers[-1].weight)
    torch.nn.init.constant_(head, 1e-3)
    weight = score(model, texts([9])[0]).weight_BNT.mean().item()
    torch.nn.init.constant_(head, 5e-4 / weight)
    return model


def requests(lengths: list[int]) -> list[Continuation]:
    """Several continuations of each text; the last two differ in their last token only."""
    ids, mask = texts(lengths)
    found = []
    for row, real in zip(ids, mask.sum(1).tolist(), strict=True):
        text = tuple(row[:real].tolist())
        found += [Continuation(text, count) for count in (1, 2, real - 1)]
        found.append(Continuation((*text[:-1], 3), 2))
    return found


def alone(model: QuietLM, one: Continuation, how: ThoughtParams) -> tuple[float, bool]:
    """Log-probability and whether all tokens are the most likely ones, from `score`."""
    found = score(model, torch.tensor([one.ids]), None, how, top=1)
    assert found.top_with is not None
    best = found.top_with[0, 0, -one.scored :, 0].long().tolist()
    return found.with_BT[0, -one.scored :].double().sum().item(), best == [*one.ids[-one.scored :]]


def test_the_pattern_matches_at_some_positions_only(model: QuietLM):
    thinks = score(model, texts([40])[0], None, HOW["pattern"]).thinks_BT.float().mean().item()
    assert 0.1 < thinks < 0.9


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
def test_likelihoods_are_those_of_each_text_scored_alone(
    model: QuietLM, how: ThoughtParams, batch_size: int
):
    asked = requests([9, 7, 40, 5])  # 40: more positions than are scored at the same time
    found = score_continuations(model, asked, how, batch_size=batch_size)
    for one, likelihood in zip(asked, found, strict=True):
        expected, greedy = alone(model, one, how)
        assert likelihood.log_prob == pytest.approx(expected, abs=1e-4)
        assert likelihood.greedy == greedy


def test_thoughts_change_the_likelihoods_so_the_comparison_says_something(model: QuietLM):
    asked = requests([9, 7])
    values = [
        [round(one.log_prob, 3) for one in score_continuations(model, asked, how)]
        for how in (GREEDY, SAMPLED, HOW["never"])
    ]
    assert values[0] != values[1] != values[2] != values[0]
    rule = score(model, torch.tensor([asked[0].ids]), None, HOW["entropy"]).thinks_BT
    assert rule.any() and not rule.all()


def continued(model: QuietLM, text: list[int], count: int) -> list[int]:
    """Append the most likely tokens."""
    for _ in range(count):
        found = score(model, torch.tensor([[*text, 0]]), top=1)
        assert found.top_with is not None
        text = [*text, int(found.top_with[0, 0, -1, 0])]
    return text


def test_a_continuation_of_most_likely_tokens_is_greedy_and_no_other(model: QuietLM):
    text = continued(model, [4, 5, 6], 3)
    first_differs = continued(model, [4, 5, 6, (text[3] + 1) % 34], 2)
    last_differs = [*text[:5], (text[5] + 1) % 34]
    asked = [Continuation(tuple(one), 3) for one in (text, first_differs, last_differs)]
    found = score_continuations(model, asked)
    assert [one.greedy for one in found] == [True, False, False]


def test_results_are_passed_on_with_their_index_after_each_batch(model: QuietLM):
    asked, seen = requests([6, 9]), {}
    found = score_continuations(model, asked, batch_size=1, on_scored=seen.__setitem__)
    assert [seen[index] for index in range(len(asked))] == found


def test_what_cannot_be_scored_is_refused(model: QuietLM):
    for ids, count in [((1, 2), 2), ((1, 2), 0), ((), 1)]:
        with pytest.raises(ValueError, match="at least one token after a context"):
            Continuation(ids, count)
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        score_continuations(model, requests([6]), batch_size=0)
    short = quiet(tiny(max_position_embeddings=16), QuietConfig(thought_tokens=2))
    fits = Continuation(tuple(range(13)), 2)  # 12 tokens are read, and a thought takes 4
    assert score_continuations(short, [fits])[0].log_prob < 0
    with pytest.raises(ValueError, match=r"13 tokens, with a thought of 4 .* takes 16"):
        score_continuations(short, [Continuation(tuple(range(14)), 2)])
    assert score_continuations(model, []) == []

"""Log-probabilities of candidates beside their naive twin: one text at a time.

pytest tests/test_scoring.py
"""

import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from narrowed import token_ids
from test_samplers import PLAIN, SHARING, random_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from selftaught.samplers import SamplingParams, open_scorer
from selftaught.samplers.local import scorer as scoring
from selftaught.samplers.local.prefix_loop import SharedPrefixLoop
from selftaught.samplers.local.sampler import TransformersSampler
from selftaught.samplers.local.scorer import TransformersScorer

Tokens = tuple[int, ...]
SHOTS = "Q: What is 12 + 7?\nA: 12 + 7 = 19. The answer is 19.\n\n" * 9
PROMPTS = [
    SHOTS + "Q: What is 3 + 40?\nA:",
    SHOTS + "Q: How many apples does he have?\nA:",
    "Q: Tom has 3 apples. How many?\nA:",
    "1",
    SHOTS + "Q: What is 3 + 40?\nA:",
    "1",
]


pytestmark = pytest.mark.slow


def random_tokens(lengths: Sequence[int], seed: int) -> list[Tokens]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(97) for _ in range(length)) for length in lengths]


def candidates() -> list[list[Tokens]]:
    """Of many lengths, none, empty, equal, and one that begins like another."""
    many = random_tokens([1, 30, 7, 7, 0, 12, 64, 2, 5], seed=1)
    return [
        [*many, many[1], many[1][:9], many[4]],
        random_tokens([3, 40, 8], seed=2),
        random_tokens([20, 1], seed=3),
        random_tokens([15], seed=4),
        [many[2], *random_tokens([4], seed=5)],
        [],
    ]


@pytest.fixture
def encoded(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Tokens]:
    """The tokens of a text for the models of 97 tokens, which the scorer is made to read too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)

    def encode(text: str) -> Tokens:
        return tuple(token % 97 for token in tokenizer(text).input_ids)

    monkeypatch.setattr(scoring, "prompt_tokens", lambda tokenizer, prompt, *rest: encode(prompt))
    return encode


@torch.inference_mode()
def one_at_a_time(
    model: PreTrainedModel, prompts: Sequence[Tokens], completions: Sequence[Sequence[Tokens]]
) -> list[list[list[float]]]:
    """The naive twin."""

    def score(prompt: Tokens, tokens: Tokens) -> list[float]:
        logits_TV = model(torch.tensor([prompt + tokens])).logits[0].double()
        log_prob_TV = torch.log_softmax(logits_TV, -1)
        return [float(log_prob_TV[len(prompt) - 1 + at, token]) for at, token in enumerate(tokens)]

    return [
        [score(prompt, tokens) for tokens in several]
        for prompt, several in zip(prompts, completions, strict=True)
    ]


def assert_close(
    found: list[list[list[float]]], expected: list[list[list[float]]], tolerance: float = 1e-4
) -> None:
    for some, others in zip(found, expected, strict=True):
        for score, other in zip(some, others, strict=True):
            assert score == pytest.approx(other, abs=tolerance, rel=1e-5)


def tokenizer_of(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_log_probs_equal_those_of_one_text_at_a_time(
    name: str,
    batch_size: int,
    tiny_model_dir: Path,
    encoded: Callable[[str], Tokens],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = random_model(SHARING[name])
    model.set_attn_implementation("eager")  # gemma2's other kinds leave its soft caps out
    expected = one_at_a_time(model, [encoded(prompt) for prompt in PROMPTS], candidates())
    counts: list[int] = []
    with TransformersScorer(
        model, tokenizer=tokenizer_of(tiny_model_dir), batch_size=batch_size
    ) as scorer:
        found = scorer.log_probs(PROMPTS, candidates(), progress=counts.append)
        assert isinstance(scorer._loop, SharedPrefixLoop)
    assert_close(found, expected)
    assert sum(counts) == sum(map(len, candidates()))
    assert "processes every prompt again" not in caplog.text


@pytest.mark.parametrize("name", PLAIN)
def test_models_that_cannot_share_read_one_text_after_another(
    name: str,
    tiny_model_dir: Path,
    encoded: Callable[[str], Tokens],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = random_model(PLAIN[name])
    expected = one_at_a_time(model, [encoded(prompt) for prompt in PROMPTS], candidates())
    with TransformersScorer(model, tokenizer=tokenizer_of(tiny_model_dir), batch_size=2) as scorer:
        found = scorer.log_probs(PROMPTS, candidates())
    assert_close(found, expected)
    assert "processes every prompt again" in caplog.text


@pytest.mark.parametrize("together", [16, 100])
def test_a_long_candidate_is_computed_in_pieces(
    together: int,
    tiny_model_dir: Path,
    encoded: Callable[[str], Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "TOGETHER", {"cpu": together})
    monkeypatch.setattr(scoring, "STORED", 300)
    model = random_model(SHARING["gemma3, one sliding"])
    expected = one_at_a_time(model, [encoded(prompt) for prompt in PROMPTS], candidates())
    with TransformersScorer(model, tokenizer=tokenizer_of(tiny_model_dir)) as scorer:
        assert_close(scorer.log_probs(PROMPTS, candidates()), expected)


def test_in_double_precision_nothing_but_the_last_softmax_rounds(
    tiny_model_dir: Path, encoded: Callable[[str], Tokens]
) -> None:
    # Padding, batches and the shared prefix change nothing beyond float64 rounding: what is left
    # is that log_softmax is taken in float32.
    model = random_model(SHARING["llama"]).double()
    expected = one_at_a_time(model, [encoded(prompt) for prompt in PROMPTS], candidates())
    with TransformersScorer(model, tokenizer=tokenizer_of(tiny_model_dir)) as scorer:
        assert_close(scorer.log_probs(PROMPTS, candidates()), expected, tolerance=2e-6)


def test_equal_candidates_and_prompts_are_computed_once(tiny_model_dir: Path) -> None:
    with TransformersScorer(tiny_model_dir, dtype="float32") as scorer:
        read: list[int] = []
        scorer.log_probs(["12 + 7"], [[(5, 6)]])
        scorer._model.lm_head.register_forward_hook(
            lambda module, inputs, output: read.append(output.shape[0] * output.shape[1])
        )
        same = [(5, 6, 7, 8)] * 6
        found = scorer.log_probs(["12 + 7 = ", "12 + 7 = "], [same, [*same, (9,)]])
    assert read == [1, 4] or read == [8]  # no logits but those of candidates, padded at most
    assert all(score == found[0][0] for score in [*found[0], *found[1][:-1]])
    assert len(found[1][-1]) == 1


def test_a_sampled_completion_has_the_probability_it_was_drawn_with(tiny_model_dir: Path) -> None:
    # Greedy tokens are the likeliest ones, so no other first token is likelier.
    prompt = "Q: What is 12 + 7?\nA:"
    with TransformersSampler(tiny_model_dir, dtype="float32") as sampler:
        tokens = token_ids(sampler.sample([prompt], SamplingParams(max_tokens=8))[0][0])
        written_by = sampler.fingerprint
    with open_scorer(str(tiny_model_dir), dtype="float32") as scorer:
        every = [(*tokens[:3], token) for token in range(len(scorer.tokenizer))]
        found = scorer.log_probs([prompt], [every])[0]
        assert scorer.fingerprint == written_by
        assert scorer.model == str(tiny_model_dir)
    last = [score[-1] for score in found]
    assert last.index(max(last)) == tokens[3]
    assert sum(torch.tensor(last).exp()) == pytest.approx(1, abs=1e-5)


def test_short_types_are_scored_in_them_and_their_softmax_in_float32(tiny_model_dir: Path) -> None:
    prompts, tokens = ["12 + 7 = ", "1"], [random_tokens([9, 3], 1), random_tokens([5], 2)]
    with TransformersScorer(tiny_model_dir, dtype="bfloat16") as short:
        found = short.log_probs(prompts, tokens)
        rows = [tuple(short.tokenizer(prompt).input_ids) for prompt in prompts]
        expected = one_at_a_time(short._model, rows, tokens)
    assert_close(found, expected, tolerance=0.3)


def test_what_cannot_be_scored_is_named(tiny_model_dir: Path) -> None:
    with TransformersScorer(tiny_model_dir, dtype="float32") as scorer:
        with pytest.raises(ValueError, match=r"index 1 has 1 tokens and its longest candidate 512"):
            scorer.log_probs(["1", "2"], [[(1,)], [(1,), (1,) * 512]])
        with pytest.raises(ValueError, match="prompt at index 1 is empty"):
            scorer.log_probs(["1", ""], [[(1,)], [(1,)]])
        with pytest.raises(ValueError, match="one list of candidates per prompt, got 1 for 2"):
            scorer.log_probs(["1", "2"], [[(1,)]])
        with pytest.raises(ValueError, match="token ids from 0 to 312, got 313"):
            scorer.log_probs(["1"], [[(1,), (5, 313)]])
        with pytest.raises(ValueError, match="chat template for the messages at index 0"):
            scorer.log_probs([[{"role": "user", "content": "1"}]], [[(1,)]])
        assert scorer.log_probs([], []) == []
        assert scorer.log_probs(["1"], [[()]]) == [[[]]]
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        TransformersScorer(tiny_model_dir, batch_size=0)
    with pytest.raises(ValueError, match="no option 'n'; its options are batch_size"):
        open_scorer(str(tiny_model_dir), n=3)
    with pytest.raises(ValueError, match="Expected a tokenizer with a loaded model"):
        TransformersScorer(random_model(SHARING["llama"]))


def test_the_model_keeps_its_attention(tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = model.config._attn_implementation
    with TransformersScorer(model, tokenizer=tokenizer_of(tiny_model_dir)) as scorer:
        scorer.log_probs(["1"], [[(1, 2)]])
        assert model.config._attn_implementation == before

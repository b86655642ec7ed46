"""Scores of completions beside naive ones: one forward pass for each."""

import logging
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from selftaught.evaluation.verifier import OutcomeModel, Verifier, as_rollouts
from selftaught.models.embedded import embedded_model
from selftaught.prompts import PromptStyle
from selftaught.records import Completion, FinishReason, Problem, Rollout
from selftaught.training import completion_ids, open_tokenizer
from selftaught.training.completion_tokens import end_token

STYLE = PromptStyle("bare")
SUM, TOM = Problem("sum", "What is 12 + 7?", "19"), Problem("tom", "How many apples?", "43")

Tokens = tuple[int, ...]


@pytest.fixture(scope="module")
def other_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with noise on its weights."""
    folder = tmp_path_factory.mktemp("other_model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def written(tiny_model_dir: Path) -> list[tuple[Rollout, Tokens]]:
    """Rollouts of two problems in turn, and the tokens that are to be scored."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    end = tokenizer.eos_token_id

    def ids(text: str) -> Tokens:
        return tuple(tokenizer(text)["input_ids"])

    def rolled(
        problem: Problem, text: str, own: Tokens | None, reason: FinishReason = "stop"
    ) -> Rollout:
        return Rollout(problem, "seen", text, reason, "m", 0, token_ids=own)

    letters = tuple(one for letter in "answer" for one in ids(letter))
    return [
        (rolled(SUM, " 19.", (*ids(" 19."), end)), (*ids(" 19."), end)),
        (rolled(TOM, " 3 + 40 = 43.", (*ids(" 3 + 40 = 43."), *ids("\n\n"))), (*ids(" 3 + 40 = 43."), end)),
        (rolled(SUM, " 12 + 7 = 1", ids(" 12 + 7 = 1"), "length"), ids(" 12 + 7 = 1")),
        (rolled(TOM, " 43", None), (*ids(" 43"), end)),
        (rolled(TOM, "answer", (*letters, end)), (*letters, end)),
        (rolled(SUM, "", (end,)), (end,)),
        (rolled(TOM, "", (), "length"), ()),
        (rolled(SUM, " 19.", (*ids(" 19."), end)), (*ids(" 19."), end)),
    ]  # fmt: skip


@torch.inference_mode()
def naive(folder: Path, problem: Problem, tokens: Tokens) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    prompt = AutoTokenizer.from_pretrained(folder)(f"Q: {problem.question}\nA:")["input_ids"]
    log_probs = torch.log_softmax(model(torch.tensor([[*prompt, *tokens]])).logits[0], dim=-1)
    return sum(float(log_probs[len(prompt) - 1 + at, one]) for at, one in enumerate(tokens))


def test_a_score_is_the_log_probability_of_the_completion_and_its_end(
    tiny_model_dir: Path, written, caplog: pytest.LogCaptureFixture
):
    expected = [naive(tiny_model_dir, one.problem, tokens) for one, tokens in written]
    seen: list[int] = []
    with Verifier(tiny_model_dir) as verifier:
        found = verifier.score([one for one, _ in written], STYLE, progress=seen.append)
        assert verifier.score([], STYLE) == []
    assert found == pytest.approx(expected, abs=1e-3)
    assert found[6] == 0
    assert sum(seen) == len(written)
    assert "anew" not in caplog.text


def test_a_mean_score_is_per_token(tiny_model_dir: Path, written):
    expected = [naive(tiny_model_dir, one.problem, tokens) / max(1, len(tokens))
                for one, tokens in written]  # fmt: skip
    with Verifier(tiny_model_dir, score="mean", batch_size=3) as verifier:
        assert verifier.score([one for one, _ in written], STYLE) == pytest.approx(expected, abs=1e-3)  # fmt: skip


def test_a_reward_is_against_the_reference(tiny_model_dir: Path, other_model_dir: Path, written):
    expected = [
        naive(other_model_dir, one.problem, tokens) - naive(tiny_model_dir, one.problem, tokens)
        for one, tokens in written
    ]
    seen: list[int] = []
    with Verifier(other_model_dir, score="reward", reference=tiny_model_dir) as verifier:
        found = verifier.score([one for one, _ in written], STYLE, progress=seen.append)
        both = verifier.fingerprint
    assert found == pytest.approx(expected, abs=2e-3)
    assert max(map(abs, expected)) > 1
    assert sum(seen) == len(written)
    with Verifier(other_model_dir) as alone, Verifier(tiny_model_dir) as reference:
        assert both.split() == [alone.fingerprint, reference.fingerprint]
        assert alone.fingerprint != reference.fingerprint


@pytest.mark.parametrize("options", [{"score": "reward"}, {"reference": "m"},
                                     {"score": "mean", "reference": "m"}])  # fmt: skip
def test_a_reward_wants_a_reference_and_no_other_score_does(tiny_model_dir: Path, options):
    with pytest.raises(ValueError, match='reference model with the score "reward"'):
        Verifier(tiny_model_dir, **options)


def test_tokens_of_another_tokenizer_are_scored_as_text_with_a_warning(
    tiny_model_dir: Path, written, caplog: pytest.LogCaptureFixture
):
    characters = AutoTokenizer.from_pretrained(embedded_model())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = "b2+4+0=06;a1+3+0=04;#46"
    theirs = (*characters(text)["input_ids"], characters.eos_token_id)
    assert max(theirs) < len(tokenizer)  # they could be read here, as something else
    foreign = Rollout(SUM, "12+34=", text, "stop", "embedded", 0, token_ids=theirs)
    tokens = (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)
    with caplog.at_level(logging.WARNING), Verifier(tiny_model_dir) as verifier:
        found = verifier.score([foreign, *(one for one, _ in written)], STYLE)
    assert found[0] == pytest.approx(naive(tiny_model_dir, SUM, tokens), abs=1e-3)
    assert f"1 of {len(written) + 1} completions were tokenized again" in caplog.text
    assert str(tiny_model_dir) in caplog.text


@pytest.mark.parametrize("side", ["right", "left"])
def test_an_outcome_model_scores_each_completion_as_it_would_alone(
    tiny_model_dir: Path, tmp_path: Path, written, side: str
):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side=side)
    tokenizer.save_pretrained(tmp_path)
    made = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    torch.nn.init.normal_(made.score.weight, generator=torch.Generator().manual_seed(0))
    made.save_pretrained(tmp_path)
    body = AutoModelForCausalLM.from_pretrained(tiny_model_dir).model
    expected = []
    for one, tokens in written:
        prompt = tokenizer(f"Q: {one.problem.question}\nA:")["input_ids"]
        # this model's end token is its padding too, which is never what is looked at
        ids = [token for token in (*prompt, *tokens) if token != tokenizer.eos_token_id]
        with torch.no_grad():
            state = body(torch.tensor([ids])).last_hidden_state[0, -1]
            expected.append(float(made.score.weight[0] @ state))
    rollouts = [one for one, _ in written]
    together = OutcomeModel(tmp_path, device="cpu").score(rollouts, STYLE)
    apart = OutcomeModel(tmp_path, batch_size=1, device="cpu").score(rollouts, STYLE)
    assert together == pytest.approx(expected, abs=1e-4)
    assert apart == pytest.approx(expected, abs=1e-4)
    assert OutcomeModel(tmp_path, batch_size=3).score(rollouts, STYLE) == pytest.approx(expected, abs=1e-3)  # fmt: skip


def test_completions_become_rollouts_to_score():
    first, second = as_rollouts(
        SUM, "12 + 7", [Completion("19", "stop", (1, 2)), Completion("", "length")], "m"
    )
    assert first == Rollout(SUM, "12 + 7", "19", "stop", "m", 0, token_ids=(1, 2))
    assert (second.index, second.finish_reason, second.token_ids) == (1, "length", None)


def test_the_end_token_of_a_turn_stays_where_it_is_not_that_of_a_text(tiny_model_dir: Path):
    """Chat models end a turn with a token of their own; DPO and scores must see what was written."""
    tokenizer = open_tokenizer(str(tiny_model_dir))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    turn, eos = tokenizer.get_vocab()["<turn>"], end_token(tokenizer)
    ids = tuple(tokenizer("12 + 7 = 19.")["input_ids"])
    problem = Problem("p", "q", "19")

    def ended(end: tuple[int, ...], reason: FinishReason = "stop") -> tuple[int, ...]:
        one = Rollout(problem, "q", "12 + 7 = 19.", reason, "m", 0, token_ids=(*ids, *end))
        return completion_ids(one, tokenizer)

    assert ended((turn,)) == (*ids, turn)
    assert ended((eos,)) == (*ids, eos)
    assert ended(()) == (*ids, eos)
    assert ended((), "length") == ids
    newline = tuple(tokenizer("\n\n")["input_ids"])
    assert ended(newline) == (*ids, eos)

"""Thinking before every token with a cache, beside computing everything anew for every token."""

import pytest
import torch
from naive_quiet import END, PAD, START, quiet, states, texts, tiny
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.deciding import ThinkWhen
from selftaught.quiet.generation import next_logits
from selftaught.quiet.model import QuietConfig, QuietLM


def model(**changes: object) -> QuietLM:
    sizes: dict = {"thoughts": 2, "lookahead": 2, "thought_tokens": 3}
    return quiet(tiny(), QuietConfig.paper(**(sizes | changes)))


@torch.no_grad()
def naive(model: QuietLM, text: Tensor, new: int) -> list[int]:
    """Greedy tokens after greedy thoughts, from whole forward passes."""
    tokens = text.tolist()
    for _ in range(new):
        thought = [*tokens, START]
        for _ in range(model.quiet_config.thought_tokens):
            logits = states(model, torch.tensor(thought))[1][-1].clone()
            logits[[START, END, PAD]] = -torch.inf
            thought.append(int(logits.argmax()))
        without, said = (one[-1] for one in states(model, torch.tensor(tokens)))
        with_thought, after = (one[-1] for one in states(model, torch.tensor([*thought, END])))
        weight = model.mixing(without, with_thought)
        if model.quiet_config.mix == "hidden":
            mixed = model.base.lm_head((1 - weight) * without + weight * with_thought)
        else:
            mixed = (1 - weight) * said.log_softmax(-1) + weight * after.log_softmax(-1)
        mixed[[START, END, PAD]] = -torch.inf
        tokens.append(int(mixed.argmax()))
    return tokens[len(text) :]


@pytest.mark.parametrize("mix", ["log_probs", "hidden"])
def test_greedy_text_is_that_of_computing_everything_anew(mix: str):
    thinking = model(mix=mix)
    ids, mask = texts([7, 4], left=True)
    out = thinking.generate(ids, mask, max_new_tokens=8)
    assert torch.equal(out[:, :7], ids)
    for row, text, real in zip(out[:, 7:], ids, mask, strict=True):
        assert row.tolist() == naive(thinking, text[real.bool()], 8)
    assert not torch.isin(out[:, 7:], torch.tensor([START, END, PAD])).any()


def test_an_untrained_head_writes_what_the_base_writes():
    thinking = model()
    torch.nn.init.zeros_(thinking.mixing.layers[-1].weight)
    ids, _ = texts([5])
    ours = thinking.generate(ids, max_new_tokens=6)
    tokens = ids
    for _ in range(6):
        logits = thinking.base(tokens).logits[:, -1].clone()
        logits[:, [START, END, PAD]] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
    assert torch.equal(ours, tokens)


def test_sampled_text_depends_on_its_seed_alone():
    thinking = model()
    ids, _ = texts([5])

    def write(seed: int) -> Tensor:
        return thinking.generate(
            ids, max_new_tokens=12, do_sample=True, thoughts=2, thought_temperature=1.0, seed=seed
        )

    assert torch.equal(write(1), write(1))
    assert not torch.equal(write(1), write(2))


def test_several_thoughts_vote_by_the_mean_of_their_probabilities():
    thinking = model()
    without, with_thoughts = torch.randn(2, 16).double(), torch.randn(2, 3, 16).double()
    each = [
        thinking.mixed_logits(without, one[:, None]).softmax(-1) for one in with_thoughts.unbind(1)
    ]
    whole = thinking.mixed_logits(without, with_thoughts).softmax(-1)
    torch.testing.assert_close(whole, torch.stack(each).mean(0), rtol=1e-6, atol=1e-7)


def test_texts_end_at_their_end_token_or_where_asked():
    thinking = model()
    ids, _ = texts([5, 5])
    free = thinking.generate(ids, max_new_tokens=8)
    first = int(free[0, 7])
    ended = thinking.generate(
        ids,
        generation_config=GenerationConfig(
            max_new_tokens=8, do_sample=False, eos_token_id=[first], pad_token_id=PAD
        ),
    )
    at = free[0, 5:].tolist().index(first) + 6
    assert torch.equal(ended[0, :at], free[0, :at])
    assert (ended[0, at:] == PAD).all()

    class AfterTwo(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: object) -> Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 7)

    stopped = thinking.generate(
        ids, max_new_tokens=8, stopping_criteria=StoppingCriteriaList([AfterTwo()])
    )
    assert torch.equal(stopped, free[:, :7])


def test_what_cannot_be_generated_is_refused():
    thinking = model()
    ids, mask = texts([5, 3])
    with pytest.raises(ValueError, match="padding on the left"):
        thinking.generate(ids, mask, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_new_tokens must be given"):
        thinking.generate(ids)


def test_a_model_that_thinks_is_sampled_like_any_other(tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selftaught.quiet.folder import make_quiet
    from selftaught.samplers import SamplingParams
    from selftaught.samplers.transformers_model import TransformersSampler

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    thinking = make_quiet(base, tokenizer, QuietConfig.paper(thought_tokens=2, lookahead=2))
    torch.nn.init.normal_(thinking.mixing.layers[-1].weight)
    prompts = ["Q: What is 12 + 7?\nA:", "Tom has 3 apples"]
    params = SamplingParams(max_tokens=6)
    with TransformersSampler(thinking, tokenizer=tokenizer) as sampler:
        answers = sampler.sample(prompts, params)
        assert len(sampler.fingerprint) == 16
        limit = base.config.max_position_embeddings
        fits = limit - len(tokenizer(prompts[0]).input_ids) - 4
        sampler.check(prompts[:1], SamplingParams(max_tokens=fits), ["0"])
        with pytest.raises(ValueError, match=r"with max_tokens=\d+ and a thought's 4 that is more"):
            sampler.check(prompts[:1], SamplingParams(max_tokens=fits + 1), ["0"])
    for prompt, [answer] in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        alone = thinking.generate(ids, max_new_tokens=6, eos_token_id=tokenizer.eos_token_id)
        assert list(answer.token_ids) == alone[0, ids.shape[1] :].tolist()


def test_padding_that_also_ends_texts_is_written():
    """Many tokenizers pad with their end token; a text must be able to end."""
    thinking = model()
    ids, _ = texts([5])
    first = int(thinking.generate(ids, max_new_tokens=1)[0, -1])
    ends_with_padding = QuietLM(
        thinking.base, thinking.quiet_config, start=START, end=END, pad=first
    )
    ends_with_padding.mixing = thinking.mixing
    with thoughtful(ends_with_padding.base):
        logits = next(next_logits(ends_with_padding, ids, torch.ones_like(ids), thoughts=1, thought_temperature=0.0,
                                  think_when=ThinkWhen(), ends=[first], seed=0))  # fmt: skip
    assert torch.isfinite(logits[0, first])


def test_what_makes_no_sense_is_refused():
    thinking = model()
    ids, _ = texts([5])
    with pytest.raises(ValueError, match="3 thoughts at temperature 0 would all be the same"):
        thinking.generate(ids, max_new_tokens=2, thoughts=3)
    with pytest.raises(ValueError, match="at least one thought"):
        thinking.generate(ids, max_new_tokens=2, thoughts=0)
    with pytest.raises(ValueError, match="at least one token, got an empty one"):
        thinking.generate(ids[:, :0], max_new_tokens=2)

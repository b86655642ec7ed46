"""Thinking before every token with a cache, beside computing everything anew for every token."""

from typing import Any

import pytest
import torch
from naive_quiet import END, PAD, START, quiet, states, texts, tiny
from narrowed import tensor, token_ids
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from selftaught.quiet.attention import thoughtful
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.gating import GREEDY
from selftaught.quiet.generation import next_logits
from selftaught.quiet.model import QuietLM


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
    torch.nn.init.zeros_(tensor(thinking.mixing.layers[-1].weight))
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

    from selftaught.quiet.checkpoint import make_quiet
    from selftaught.samplers import SamplingParams
    from selftaught.samplers.local.sampler import TransformersSampler

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    thinking = make_quiet(base, tokenizer, QuietConfig.paper(thought_tokens=2, lookahead=2))
    torch.nn.init.normal_(tensor(thinking.mixing.layers[-1].weight))
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
        assert list(token_ids(answer)) == alone[0, ids.shape[1] :].tolist()


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
        logits = next(
            next_logits(ends_with_padding, ids, torch.ones_like(ids), GREEDY, ends=[first])
        )
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


# --- fields of the generation configuration ------------------------------------------------------


@pytest.mark.parametrize("field", [
    {"num_beams": 3}, {"repetition_penalty": 1.2}, {"no_repeat_ngram_size": 2}, {"typical_p": 0.9},
    {"min_new_tokens": 4}, {"min_length": 9}, {"bad_words_ids": [[3]]}, {"suppress_tokens": [3]},
    {"max_time": 1.0}, {"guidance_scale": 2.0}, {"return_dict_in_generate": True},
    {"output_scores": True}, {"forced_eos_token_id": 3}, {"sequence_bias": [[[3], 1.0]]},
    {"prompt_lookup_num_tokens": 3}, {"penalty_alpha": 0.6}, {"dola_layers": "high"},
    {"exponential_decay_length_penalty": (3, 1.1)}, {"top_h": 0.5}, {"epsilon_cutoff": 0.1},
])  # fmt: skip
def test_fields_that_are_not_followed_are_refused_by_name(field: dict):
    thinking = model()
    ids, _ = texts([5])
    [(name, _)] = field.items()
    config = GenerationConfig(max_new_tokens=2)
    setattr(config, name, field[name])
    with pytest.raises(ValueError, match=rf"cannot generate with {name}="):
        thinking.generate(ids, generation_config=config)
    with pytest.raises(ValueError, match=rf"cannot generate with {name}="):
        thinking.generate(ids, max_new_tokens=2, **field)


def test_every_field_is_followed_or_has_no_effect_or_is_refused():
    """No field of this version of transformers may be ignored in silence."""
    from selftaught.quiet.generation import HONOURED, WITHOUT_EFFECT, check_generation

    for name in vars(GenerationConfig()):
        if name.startswith("_") or name in HONOURED or name in WITHOUT_EFFECT:
            continue
        config = GenerationConfig()
        setattr(config, name, 0.123)
        with pytest.raises(ValueError, match=name):
            check_generation(config)
    check_generation(GenerationConfig(**GenerationConfig._get_default_generation_params()))


def test_a_misspelt_option_is_refused():
    with pytest.raises(ValueError, match="no option 'max_tokens'"):
        model().generate(texts([5])[0], max_tokens=3)


def first_choices(thinking: QuietLM, ids: Tensor, **how: Any) -> set[int]:
    many = ids.repeat(200, 1)
    return set(thinking.generate(many, max_new_tokens=1, do_sample=True, **how)[:, -1].tolist())


def test_limits_of_sampling_are_those_of_their_definitions():
    thinking = model()
    ids, _ = texts([5])
    with torch.no_grad(), thoughtful(thinking.base):
        log_p = next(next_logits(thinking, ids, torch.ones_like(ids), GREEDY, ends=[]))[0]
    chance, order = log_p.softmax(-1).sort(descending=True)
    assert first_choices(thinking, ids, top_k=1) == {int(order[0])}
    assert first_choices(thinking, ids, top_k=3, temperature=5.0) == set(order[:3].tolist())
    # The smallest set of the likeliest tokens whose probabilities reach top_p.
    share = float(chance[:2].sum()) - 1e-6
    assert first_choices(thinking, ids, top_p=share) == set(order[:2].tolist())
    least = float(chance[3] / chance[0]) - 1e-6
    assert first_choices(thinking, ids, min_p=least) <= set(order[:4].tolist())
    # Temperature comes first: at a high one the same share needs more tokens.
    assert len(first_choices(thinking, ids, top_p=share, temperature=5.0)) > 2
    assert len(first_choices(thinking, ids, temperature=5.0)) > 3
    greedy = thinking.generate(ids, max_new_tokens=4)
    assert torch.equal(
        thinking.generate(ids, max_new_tokens=4, do_sample=True, temperature=0.0), greedy
    )


def test_several_texts_of_a_prompt_and_stop_strings(tiny_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from selftaught.quiet.checkpoint import make_quiet

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    thinking = make_quiet(base, tokenizer, QuietConfig(thought_tokens=2, lookahead=2))
    ids = tokenizer("Q: What is 12 + 7?\nA:", return_tensors="pt").input_ids
    many = thinking.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3)
    assert len(many) == 3 and len({tuple(row.tolist()) for row in many}) > 1
    with pytest.raises(ValueError, match=r"num_return_sequences=3 without sampling"):
        thinking.generate(ids, max_new_tokens=6, num_return_sequences=3)
    free = thinking.generate(ids, max_new_tokens=12, eos_token_id=-1)
    new = free[0, ids.shape[1] :]
    stop = tokenizer.decode(new[3:4])
    config = GenerationConfig(max_new_tokens=12, stop_strings=[stop], eos_token_id=None)
    stopped = thinking.generate(ids, generation_config=config, tokenizer=tokenizer)
    first = next(at for at in range(len(new)) if stop in tokenizer.decode(new[: at + 1]))
    assert torch.equal(stopped[0], free[0, : ids.shape[1] + first + 1])
    with pytest.raises(ValueError, match="stop_strings needs the tokenizer"):
        thinking.generate(ids, generation_config=config)


@pytest.mark.parametrize("given", [0, -3, 2.5])
def test_a_number_of_new_tokens_that_makes_no_sense_is_refused(given: object):
    with pytest.raises(ValueError, match="max_new_tokens must be a whole number of at least 1"):
        model().generate(texts([5])[0], max_new_tokens=given)


def test_max_length_counts_the_prompt():
    thinking = model()
    ids, _ = texts([5])
    assert thinking.generate(ids, max_length=8).shape == (1, 8)
    with pytest.raises(ValueError, match="max_length=5 leaves no new token"):
        thinking.generate(ids, max_length=5)
    with pytest.raises(ValueError, match="temperature must be at least 0"):
        thinking.generate(ids, max_new_tokens=1, temperature=-1.0)

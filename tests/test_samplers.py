"""The fast sampler beside its naive twin: plain `generate`, one prompt at a time.

pytest tests/test_samplers.py
"""

import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowed import tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GptOssConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from selftaught.records import Completion
from selftaught.samplers import SamplingParams, open_sampler
from selftaught.samplers.local.generate_loop import PlainLoop
from selftaught.samplers.local.prefix_loop import CHUNK, SharedPrefixLoop, plan
from selftaught.samplers.local.sampler import TransformersSampler
from selftaught.samplers.local.token_choice import Decoding, choose, uniforms
from selftaught.samplers.stopping import Ending

if TYPE_CHECKING:
    from selftaught.samplers.base import Sampler
    from selftaught.samplers.openai_server import OpenAISampler
    from selftaught.samplers.ray_pool import RaySampler
    from selftaught.samplers.vllm_engine import VllmSampler

Rows = list[tuple[int, ...]]
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.3}
MIXED = ["sliding_attention", "full_attention"]
SHARING = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(**SHAPE, initializer_range=0.3),
    "opt": OPTConfig(**SHAPE, ffn_dim=48, word_embed_proj_dim=32, init_std=0.3),
    "mistral, all layers sliding": MistralConfig(**GROUPED, sliding_window=8),
    "gemma2, one sliding, soft caps": Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=8, layer_types=MIXED
    ),
    "gemma3, one sliding": Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=8, layer_types=MIXED
    ),
    "qwen2, one sliding": Qwen2Config(
        **GROUPED, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
}
PLAIN = {
    "mamba": MambaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, eos_token_id=None
    ),
    "lfm2": Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"]),
    "bloom": BloomConfig(
        vocab_size=97, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, eos_token_id=None
    ),
    "gpt_oss, attention sinks": GptOssConfig(
        **GROUPED, head_dim=8, sliding_window=8, num_local_experts=2, num_experts_per_tok=1
    ),
}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of random weights, always the same ones."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():  # gpt_oss leaves its attention sinks at zero
            if not parameter.any():
                torch.nn.init.normal_(parameter)
    return model


def random_rows(*, shared: Sequence[int], own: Sequence[int]) -> Rows:
    """Rows that begin with the same tokens, `shared[i]` of them, then go on for `own[i]` more."""
    draw = random.Random(0)
    first = [draw.randrange(1, 97) for _ in range(max(shared))]
    return [
        (*first[:same], *(draw.randrange(1, 97) for _ in range(more)))
        for same, more in zip(shared, own, strict=True)
    ]


def one_at_a_time(model: PreTrainedModel, rows: Rows, max_tokens: int) -> Rows:
    """The naive twin."""
    plain = GenerationConfig(max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
    completions = []
    for row in rows:
        prompt_BT = torch.tensor([row])
        out_BT = model.generate(  # type: ignore[operator]
            prompt_BT, attention_mask=torch.ones_like(prompt_BT), generation_config=plain
        )
        completions.append(tuple(out_BT[0, len(row) :].tolist()))
    return completions


def by_loop(
    loop: SharedPrefixLoop | PlainLoop,
    rows: Rows,
    params: SamplingParams,
    ending: Ending,
    batch_size: int,
    prefix_tokens: Rows | None = None,
) -> Rows:
    """Either road, on token ids."""
    done: dict[int, tuple[int, ...]] = {}
    prefix_tokens = prefix_tokens or [()] * len(rows)
    with torch.inference_mode():
        asked = Decoding(
            [row + own for row, own in zip(rows, prefix_tokens, strict=True)],
            [len(own) for own in prefix_tokens],
            torch.stack([uniforms(0, str(row), 0, params.max_tokens) for row in rows]),
            params,
            ending,
            lambda number, tokens: done.update({number: tuple(tokens)}),
        )
        loop.complete(asked, batch_size)
    assert sorted(done) == list(range(len(rows)))
    return [done[number] for number in range(len(rows))]


@pytest.fixture(scope="session")
def endless(tiny_model_dir: Path) -> Ending:
    """No end but the length."""
    return Ending(AutoTokenizer.from_pretrained(tiny_model_dir), [], [])


def tiny(folder: Path, batch_size: int = 128) -> TransformersSampler:
    """A sampler on the tiny model."""
    return TransformersSampler(folder, batch_size=batch_size, dtype="float32")


@pytest.mark.parametrize("name", SHARING)
def test_greedy_tokens_equal_plain_generate(name: str, endless: Ending) -> None:
    # Two prefixes (one longer than a chunk), no prefix, rows of many lengths, more rows than
    # slots, and two rows that are equal.
    rows = random_rows(shared=[300] * 4 + [40] * 4 + [0, 0], own=[5, 12, 12, 40, 1, 9, 30, 3, 7, 1])
    rows.append(rows[1])
    model = random_model(SHARING[name])
    expected = one_at_a_time(model, rows, 8)
    loop = SharedPrefixLoop(model)
    for batch_size in (1, 3, 16):
        fast = by_loop(loop, rows, SamplingParams(max_tokens=8), endless, batch_size)
        assert fast == expected


def test_a_prompt_of_several_chunks_without_a_prefix_equals_plain_generate(endless: Ending) -> None:
    rows = random_rows(shared=[0, 0], own=[2 * CHUNK + 20, 9])
    model = random_model(SHARING["llama"])
    fast = by_loop(SharedPrefixLoop(model), rows, SamplingParams(max_tokens=6), endless, 2)
    assert fast == one_at_a_time(model, rows, 6)


def test_a_cached_prefix_changes_no_bit(endless: Ending) -> None:
    long, short = random_rows(shared=[600, 550], own=[0, 0])
    model = random_model(SHARING["llama"])
    with torch.inference_mode():
        fresh, warm = SharedPrefixLoop(model), SharedPrefixLoop(model)
        by_loop(warm, [(*long, 1), (*long, 2)], SamplingParams(max_tokens=1), endless, 2)
        by_loop(warm, [(*short, 1), (*short, 2)], SamplingParams(max_tokens=1), endless, 2)
        by_loop(fresh, [(*short, 1), (*short, 2)], SamplingParams(max_tokens=1), endless, 2)
    for one, two in zip(fresh._prefixes[short].key_KPD, warm._prefixes[short].key_KPD, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", PLAIN)
def test_models_that_cannot_share_a_prefix_are_sampled_by_plain_generate(
    name: str, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(PLAIN[name])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.eos_token = None
    prompts = ["12 + 7", "12 + 7 = 19. 3", "12 + 4", "0"]
    rows = [tuple(token % 97 for token in tokenizer(prompt).input_ids) for prompt in prompts]
    with TransformersSampler(model, tokenizer=tokenizer, batch_size=2) as sampler:
        sampler._tokens = lambda prompt, key, room: rows[prompts.index(str(prompt))]  # type: ignore
        completions = sampler.sample(prompts, SamplingParams(max_tokens=8))
    assert [answers[0].token_ids for answers in completions] == one_at_a_time(model, rows, 8)
    assert "is sampled with generate()" in caplog.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", [*SHARING, *PLAIN])
def test_a_completion_continued_from_its_own_prefix_is_the_undisturbed_one(
    name: str, temperature: float, endless: Ending
) -> None:
    # Rows under a shared prefix and rows alone; begun with nothing, a little and all but one
    # token, twice with the same tokens of which more or fewer are the completion's.
    rows = random_rows(shared=[300] * 4 + [0, 0, 0], own=[5, 12, 12, 40, 3, 7, 1])
    model = random_model((SHARING | PLAIN)[name])
    params = SamplingParams(max_tokens=9, temperature=temperature)
    loops: list[SharedPrefixLoop | PlainLoop] = [PlainLoop(model, model)]
    loops += [SharedPrefixLoop(model)] if name in SHARING else []
    for loop in loops:
        whole = by_loop(loop, rows, params, endless, 16)
        for batch_size, cuts in ((16, [0, 3, 8, 1, 8, 0, 5]), (2, [8, 0, 2, 2, 3, 8, 8])):
            prefix_tokens = [tokens[:cut] for tokens, cut in zip(whole, cuts, strict=True)]
            assert by_loop(loop, rows, params, endless, batch_size, prefix_tokens) == whole


@pytest.mark.parametrize("plainly", [False, True])
def test_a_stop_string_is_found_on_both_sides_of_the_prefix(
    tiny_model_dir: Path, plainly: bool
) -> None:
    prompts = [f"Q: What is {a} + {b}?\nA:" for a in range(4) for b in range(4)]
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=5, first=2)
    with tiny(tiny_model_dir) as sampler:
        if plainly:
            sampler._loop = PlainLoop(sampler._model, sampler._described)
        free = [answers[0].text for answers in sampler.sample(prompts, params)]
        pairs = Counter(text[at : at + 2] for text in free for at in range(len(text) - 1))
        stop = tuple(pair for pair, _ in pairs.most_common(20) if pair.isascii())
        params = replace(params, stop=stop)
        whole = sampler.sample(prompts, params)
        assert sum(answers[0].finish_reason == "stop" for answers in whole) > 3
        checked = 0
        for cut in range(16):
            tokens = [(answers[0].token_ids or ())[:cut] for answers in whole]
            counts: list[int] = []
            # One that has ended comes back as it is.
            again = sampler.sample(prompts, params, prefix_tokens=tokens, progress=counts.append)
            assert again == whole
            assert sum(counts) == len(prompts)
            checked += sum(map(len, tokens)) > 0
        assert checked == 15


def test_several_continuations_of_one_prefix_differ_and_all_begin_with_it(
    tiny_model_dir: Path,
) -> None:
    with tiny(tiny_model_dir) as sampler:
        params = SamplingParams(n=5, temperature=1.0, max_tokens=12)
        prefix_tokens = [(40, 41, 42), (), (50,)]
        answers = sampler.sample(["a", "b", "c"], params, prefix_tokens=prefix_tokens)
        for several, tokens in zip(answers, prefix_tokens, strict=True):
            assert {(one.token_ids or ())[: len(tokens)] for one in several} == {tokens}
            assert len({one.token_ids for one in several}) == 5
            text = str(sampler._tokenizer.decode(tokens))
            assert all(one.text.startswith(text) for one in several)
        assert answers[1] == sampler.sample(["b"], params)[0]


def test_a_model_that_thinks_continues_what_it_began(tiny_model_dir: Path) -> None:
    from selftaught.quiet.checkpoint import make_quiet
    from selftaught.quiet.config import QuietConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    thinking = make_quiet(base, tokenizer, QuietConfig.paper(thought_tokens=2, lookahead=2))
    torch.nn.init.normal_(tensor(thinking.mixing.layers[-1].weight))
    prompts = ["Q: What is 12 + 7?\nA:", "Tom has 3 apples"]
    params = SamplingParams(max_tokens=6, temperature=1.0)
    with TransformersSampler(thinking, tokenizer=tokenizer) as sampler:
        whole = sampler.sample(prompts, params)
        prefix_tokens = [
            (answers[0].token_ids or ())[:cut] for answers, cut in zip(whole, (2, 4), strict=True)
        ]
        assert sampler.sample(prompts, params, prefix_tokens=prefix_tokens) == whole


def test_a_prefix_that_cannot_be_continued_is_named(tiny_model_dir: Path) -> None:
    params = SamplingParams(max_tokens=4)
    with tiny(tiny_model_dir) as sampler:
        with pytest.raises(ValueError, match="prefix for 'two' has 4 tokens; expected fewer than"):
            sampler.sample(
                ["1", "2"], params, keys=["one", "two"], prefix_tokens=[(1,), (1, 2, 3, 4)]
            )
        with pytest.raises(
            ValueError, match="one sequence of prefix tokens per prompt, got 1 for 2"
        ):
            sampler.sample(["1", "2"], params, prefix_tokens=[(1,)])
        with pytest.raises(ValueError, match="token ids from 0 to 312, got 313"):
            sampler.sample(["1"], params, prefix_tokens=[(313,)])


def test_slots_are_no_larger_than_what_they_hold(
    endless: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    loop = SharedPrefixLoop(random_model(SHARING["llama"]))
    make = loop.slots
    monkeypatch.setattr(loop, "slots", lambda *shape: sizes.append(shape) or make(*shape))
    rows = random_rows(shared=[0, 0], own=[7, 5])
    prefix_tokens = random_rows(shared=[0, 0], own=[3, 8])
    by_loop(loop, rows, SamplingParams(max_tokens=9), endless, 4, prefix_tokens)
    # Of 7 + 9 tokens the last is never read.
    assert sizes == [(2, 15)]


def test_later_samples_are_those_that_more_samples_would_have_had(tiny_model_dir: Path) -> None:
    prompts = ["Q: What is 12 + 7?\nA:", "a"]
    params = SamplingParams(n=12, temperature=1.0, max_tokens=8)
    with tiny(tiny_model_dir) as sampler:
        whole = sampler.sample(prompts, params)
        last = sampler.sample(prompts, replace(params, n=4, first=8))
        one = sampler.sample(prompts, replace(params, n=1, first=3))
    assert last == [answers[8:] for answers in whole]
    assert one == [answers[3:4] for answers in whole]
    with pytest.raises(ValueError, match="first must be 0 or more; got -1"):
        SamplingParams(first=-1)


def first_end(
    tokenizer: AutoTokenizer, tokens: Sequence[int], stop: Sequence[str]
) -> tuple[str, int]:
    """The naive twin of stopping: decode after every token, look for every stop string."""
    for length in range(1, len(tokens) + 1):
        text = str(tokenizer.decode(tokens[:length], skip_special_tokens=True))  # type: ignore
        if any(mark in text for mark in stop):
            return min((text.split(mark)[0] for mark in stop), key=len), length
        if tokens[length - 1] == tokenizer.eos_token_id:  # type: ignore[attr-defined]
            return text, length
    return str(tokenizer.decode(tokens, skip_special_tokens=True)), len(tokens)  # type: ignore


@pytest.mark.parametrize("batch_size", [5, 64])
def test_stop_strings_end_completions_where_the_text_shows_them(
    tiny_model_dir: Path, batch_size: int
) -> None:
    prompts = [f"Q: What is {a} + {b}?\nA:" for a in range(8) for b in range(6)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with tiny(tiny_model_dir, batch_size) as sampler:
        params = SamplingParams(max_tokens=24, temperature=1.0)
        free = [answers[0] for answers in sampler.sample(prompts, params)]
        pairs = [one.text[at : at + 2] for one in free for at in range(len(one.text) - 1)]
        plain = Counter(pair for pair in pairs if pair.isascii())
        stop = tuple(pair for pair, _ in plain.most_common(12))  # many straddle two tokens
        params = SamplingParams(max_tokens=24, temperature=1.0, stop=stop)
        cut = [answers[0] for answers in sampler.sample(prompts, params)]
    ended = 0
    for whole, part in zip(free, cut, strict=True):
        text, length = first_end(tokenizer, whole.token_ids or (), stop)
        assert part.token_ids == (whole.token_ids or ())[:length]
        assert part.text == text
        ended += part.finish_reason == "stop"
    assert 5 < ended < len(prompts)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_cut_text_is_what_stands_before_the_first_stop_string(
    tiny_model_dir: Path, data: st.DataObject
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), min_size=1, max_size=12))
    stop = data.draw(st.lists(st.text("aé\n .€", min_size=1, max_size=3), max_size=3))
    ending = Ending(tokenizer, [tokenizer.eos_token_id], stop)
    text, length = first_end(tokenizer, tokens, stop)
    # Every token that ends a completion must be suspected, or no one would look.
    last = torch.tensor([tokens[length - 1]])
    at_a_stop = any(mark in str(tokenizer.decode(tokens[:length])) for mark in stop)
    assert bool(ending.suspects(last)) or not at_a_stop
    assert ending.completion(tokens[:length]).text == text


def test_a_character_split_over_tokens_can_end_a_completion(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokens = tokenizer("1 €")["input_ids"]
    assert len(tokens) > 3  # the euro sign is three byte tokens
    ending = Ending(tokenizer, [], ["€"])
    assert [ending.cut(tokens[:length]) for length in range(len(tokens) - 1, len(tokens) + 1)] == [
        None,
        "1 ",
    ]
    assert bool(ending.suspects(torch.tensor(tokens[-1:])))


def test_a_special_token_as_stop_string_ends_a_completion(tiny_model_dir: Path) -> None:
    ending = Ending(AutoTokenizer.from_pretrained(tiny_model_dir), [], ["<|end|>"])
    assert ending.eos == [0]
    assert ending.completion([5, 0]).finish_reason == "stop"


def test_samples_depend_on_seed_key_and_index_and_not_on_the_batch(tiny_model_dir: Path) -> None:
    prompts = [f"Q: What is {a} + {a}?\nA:" for a in range(9)]
    keys = [f"sum {a}" for a in range(9)]
    params = SamplingParams(n=3, temperature=1.0, top_p=0.95, max_tokens=16, seed=3)
    with tiny(tiny_model_dir, 128) as wide, tiny(tiny_model_dir, 2) as narrow:
        together = wide.sample(prompts, params, keys=keys)
        assert together == narrow.sample(prompts, params, keys=keys)
        alone = [narrow.sample([prompts[i]], params, keys=[keys[i]])[0] for i in (4, 2)]
        assert alone == [together[4], together[2]]
        other = SamplingParams(n=3, temperature=1.0, top_p=0.95, max_tokens=16, seed=4)
        assert wide.sample(prompts, other, keys=keys) != together
        assert wide.sample(prompts, params, keys=keys[::-1]) != together
    assert all(len({one.text for one in answers}) > 1 for answers in together)


def test_sampled_tokens_follow_the_softmax(tiny_model_dir: Path) -> None:
    # Chi-square against the exact probabilities at temperature 0.5; tokens expected less than
    # 5 times are counted together. With k - 1 degrees of freedom the statistic has mean k - 1 and
    # variance 2 (k - 1): five standard deviations are never passed by chance.
    prompt, count = "Q: What is 12 + 7?\nA:", 4000
    with tiny(tiny_model_dir) as sampler, torch.inference_mode():
        ids = sampler._tokenizer(prompt, return_tensors="pt").input_ids
        logits_V = sampler._model(ids).logits[0, -1]
        exact_V = torch.softmax(logits_V.double() / 0.5, -1)
        params = SamplingParams(n=count, temperature=0.5, max_tokens=1)
        drawn = [one.token_ids for one in sampler.sample([prompt], params)[0]]
    seen = Counter(tokens[0] for tokens in drawn if tokens)
    common = [token for token, chance in enumerate(exact_V.tolist()) if chance * count >= 5]
    cells = [(seen[token], float(exact_V[token]) * count) for token in common]
    cells.append((count - sum(s for s, _ in cells), count - sum(e for _, e in cells)))
    statistic = sum((s - e) ** 2 / e for s, e in cells if e > 0)
    freedom = len(cells) - 1
    assert freedom > 10
    assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom)


def test_top_p_keeps_the_smallest_set_that_holds_it() -> None:
    logits_BV = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(1000, -1)
    uniform_B = (torch.arange(1000) + 0.5) / 1000
    for top_p, kept in ((0.4, {1}), (0.5, {1, 2}), (0.85, {1, 2, 3}), (1.0, {0, 1, 2, 3})):
        params = SamplingParams(temperature=1.0, top_p=top_p)
        shares = Counter(choose(logits_BV, uniform_B, params).tolist())
        assert set(shares) == kept
        if top_p == 0.5:  # 0.4 and 0.3, divided by 0.7
            assert abs(shares[1] - 571) <= 1


def test_the_nucleus_of_a_flat_large_vocabulary_is_not_cut_short() -> None:
    logits_BV = torch.zeros(2, 5000)
    params = SamplingParams(temperature=1.0, top_p=0.9)
    drawn_B = choose(logits_BV.expand(2, -1), torch.tensor([0.0, 0.999]), params)
    assert drawn_B[1] - drawn_B[0] > 512


def test_prompts_are_grouped_by_what_they_share() -> None:
    one, two = list(range(100, 200)), list(range(300, 400))
    rows: Rows = [(1, 2, *part, 7 + i, 8) for i in range(40) for part in (one, two)]
    groups = plan(rows, 32, 16)
    assert sorted(group.shared for group in groups) == [102, 102]
    assert sorted(number for group in groups for number in group.numbers) == list(range(80))
    # All prompts equal: the last token is left to be computed.
    assert [group.shared for group in plan([tuple(one)] * 4, 8, 16)] == [99]
    # Nothing in common, and next to nothing.
    assert [group.shared for group in plan([(1,), (2,), (3, 4)], 8, 16)] == [0]
    assert [group.shared for group in plan([(1, 2), (1, 3), (1, 3, 4)], 8, 16)] == [0]


def test_n_samples_and_progress(tiny_model_dir: Path) -> None:
    counts: list[int] = []
    with tiny(tiny_model_dir, 4) as sampler:
        params = SamplingParams(n=5, temperature=1.0, max_tokens=6)
        completions = sampler.sample(["a", "b"], params, progress=counts.append)
        assert sampler.sample([], params) == []
    assert [len(answers) for answers in completions] == [5, 5]
    assert sum(counts) == 10
    assert all(isinstance(one, Completion) and one.token_ids for a in completions for one in a)


def test_end_tokens_of_the_generation_config_and_the_tokenizer_end_a_completion(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    with tiny(tiny_model_dir) as sampler:
        free = sampler.sample(["Q: What is 12 + 7?"], SamplingParams(max_tokens=8))[0][0].token_ids
    assert free is not None and len(free) == 8
    GenerationConfig(eos_token_id=[free[3]]).save_pretrained(tmp_path / "model")
    with tiny(tmp_path / "model") as sampler:
        assert sampler._eos == sorted({0, free[3]})
        ended = sampler.sample(["Q: What is 12 + 7?"], SamplingParams(max_tokens=8))[0][0]
    first = free.index(free[3]) + 1
    assert ended.token_ids == free[:first]
    assert ended.finish_reason == "stop"


def test_a_prompt_that_does_not_fit_is_named(tiny_model_dir: Path) -> None:
    with tiny(tiny_model_dir) as sampler:
        with pytest.raises(ValueError, match=r"prompt of 'long one' has 5\d\d tokens.*the 512"):
            sampler.sample(
                ["1", "7" * 510], SamplingParams(max_tokens=8), keys=["short one", "long one"]
            )
        with pytest.raises(ValueError, match="prompt of 'nothing' is empty"):
            sampler.sample([""], SamplingParams(), keys=["nothing"])
        with pytest.raises(ValueError, match="one key per prompt, got 1 for 2"):
            sampler.sample(["1", "2"], SamplingParams(), keys=["1"])


def test_messages_go_through_the_chat_template(tiny_model_dir: Path) -> None:
    messages = [{"role": "user", "content": "12 + 7?"}]
    with tiny(tiny_model_dir) as sampler:
        with pytest.raises(ValueError, match="chat template for the messages of 'p1'"):
            sampler.sample([messages], SamplingParams(), keys=["p1"])
        sampler._tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
        params = SamplingParams(max_tokens=6)
        assert sampler.sample([messages], params) == sampler.sample(
            ["[user] 12 + 7?\n[assistant] "], params
        )


def test_a_folder_without_tokenizer_or_model_is_refused(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"Expected a model folder with a config\.json"):
        TransformersSampler(tmp_path)
    shutil.copy(tiny_model_dir / "config.json", tmp_path)
    with pytest.raises(ValueError, match="Expected weights in"):
        TransformersSampler(tmp_path)
    shutil.copy(tiny_model_dir / "model.safetensors", tmp_path)
    with pytest.raises(ValueError, match="Expected a tokenizer in the model folder"):
        TransformersSampler(tmp_path)
    with pytest.raises(ValueError, match="Expected a tokenizer with a loaded model"):
        TransformersSampler(random_model(SHARING["llama"]))
    with pytest.raises(ValueError, match="batch_size must be at least 1; got 0"):
        TransformersSampler(tiny_model_dir, batch_size=0)


def test_the_fingerprint_tells_weights_apart_and_the_model_keeps_its_attention(
    tiny_model_dir: Path,
) -> None:
    with (
        tiny(tiny_model_dir) as one,
        open_sampler("transformers", str(tiny_model_dir)) as same,
        tiny(tiny_model_dir) as other,
    ):
        assert isinstance(other._model, PreTrainedModel)
        before = other._model.config._attn_implementation
        other.sample(["1"], SamplingParams(max_tokens=2))
        assert other._model.config._attn_implementation == before
        next(other._model.parameters()).data[0, 0] += 1e-3
        assert one.fingerprint == same.fingerprint != other.fingerprint
        assert len(one.fingerprint) == 16
        assert one.model == str(tiny_model_dir)


def test_a_scripted_sampler_answers_by_its_script(scripted_sampler: Callable[..., object]) -> None:
    with scripted_sampler(lambda prompt, index: f"{prompt} {index}\n\nQ: more") as sampler:  # type: ignore
        params = SamplingParams(n=2, temperature=1.0, stop=("\n\n",))
        counts: list[int] = []
        answers = sampler.sample(["a", "b"], params, progress=counts.append)
    assert [[one.text for one in each] for each in answers] == [["a 0", "a 1"], ["b 0", "b 1"]]
    assert counts == [2, 2]
    later = sampler.sample(["a"], replace(params, first=5))
    assert [one.text for one in later[0]] == ["a 5", "a 6"]
    with pytest.raises(ValueError, match="scripted sampler has no function to continue"):
        sampler.sample(["a"], params, prefix_tokens=[(1,)])
    assert sampler.sample(["a"], params, prefix_tokens=[()]) == answers[:1]
    with scripted_sampler(
        "new", continued=lambda p, prefix_tokens, i: f"{p} {prefix_tokens} {i}"
    ) as sampler:  # type: ignore
        both = sampler.sample(["a", "b"], SamplingParams(), prefix_tokens=[(), (7, 8)])
        assert [one.text for each in both for one in each] == ["new", "b (7, 8) 0"]
    with scripted_sampler({"a": "1"}) as sampler:  # type: ignore
        assert sampler.sample(["a"], SamplingParams())[0][0] == Completion("1", "stop")


def _are_samplers(
    local: TransformersSampler, vllm: "VllmSampler", server: "OpenAISampler", pool: "RaySampler"
) -> "list[Sampler]":
    """pyright checks here that every sampler satisfies the protocol; this is never called."""
    return [local, vllm, server, pool]

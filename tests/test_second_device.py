"""Every path gives on a simulated GPU what it gives on the CPU; see `second_device`."""

import copy
import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate.state
import pytest
import torch
import transformers
from naive_quiet import END, PAD, START, VOCABULARY, drawn, quiet, texts, tiny
from narrowed import tensor
from safetensors.torch import load_file
from second_device import DEVICE, Remote, local, moved, remote, second_device
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers.generation.streamers import BaseStreamer

from selftaught.cli.quiet_model import open_trained
from selftaught.evaluation.verifier import OutcomeModel, Verifier
from selftaught.methods.pause import PAUSE, add_pause_token, pause_rows, paused, with_pauses
from selftaught.prompts import PromptStyle
from selftaught.quiet.checkpoint import make_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import measure, score
from selftaught.quiet.explore import explored
from selftaught.quiet.gating import ThinkWhen
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import spans
from selftaught.quiet.trainer import peak_memory
from selftaught.quiet.training import quiet_arguments, train_quiet, with_lora
from selftaught.quiet.transformers_model import QuietForCausalLM
from selftaught.records import Example, Preference, Problem, Rollout
from selftaught.samplers import SamplingParams
from selftaught.samplers.local import fused_attention, prefix_loop
from selftaught.samplers.local import sampler as local_sampler
from selftaught.samplers.local import scorer as local_scorer
from selftaught.samplers.local.fused_attention import KERNELS, Kernel, agrees, aligned, kernel_name
from selftaught.samplers.local.model_loading import fingerprint
from selftaught.samplers.local.sampler import TransformersSampler, check_device
from selftaught.samplers.local.scorer import TransformersScorer
from selftaught.training.dpo import dpo_config, train_dpo
from selftaught.training.launch import Launch, _refuse_too_few_devices
from selftaught.training.outcome import LabeledCompletion, outcome_config, train_outcome
from selftaught.training.sft import sft_config, train_rows, train_sft
from selftaught.training.timing import seconds_per_example
from selftaught.training.trainer import _shared, lora_config
from selftaught.training.weighted import train_weighted

CONFIG = QuietConfig(thought_tokens=3, lookahead=2, thoughts=2, gate_weight=1.0)
IDS, MASK = texts([9, 6])
LEFT_IDS, LEFT_MASK = texts([7, 4], left=True)
TEXTS = [f"Q: What is {a} + {b}?\nA: {a + b}. And {b} + {a}?\nA: {a + b}." for a in range(3) for b in range(4)]  # fmt: skip
SHOTS = "Q: What is 12 + 7?\nA: 12 + 7 = 19. The answer is 19.\n\n" * 6
PROMPTS = [SHOTS + "Q: What is 3 + 40?\nA:", SHOTS + "Q: How many?\nA:", SHOTS + "Q: 5?", "1"]
near = pytest.approx


@pytest.fixture(autouse=True)
def untested_kernels() -> Iterator[None]:
    """Kernels are compared with the plain product in every test."""
    fused_attention._trusted.cache_clear()
    yield
    fused_attention._trusted.cache_clear()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Number of calls of each kernel, forward and backward, after `agrees`."""
    counts: dict[str, int] = {}
    monkeypatch.setattr(fused_attention, "agrees", lambda *given: None)
    for name, kernel in KERNELS.items():

        def forward(*given: Any, one: Any = kernel) -> Any:
            counts[one.name] = counts.get(one.name, 0) + 1
            return one.forward(*given)

        def backward(*given: Any, one: Any = kernel) -> Any:
            counts[f"{one.name} backward"] = counts.get(f"{one.name} backward", 0) + 1
            return one.backward(*given)

        monkeypatch.setitem(KERNELS, name, Kernel(name, forward, backward))
    return counts


def thinker(**changes: Any) -> QuietLM:
    """A Quiet-STaR model with heads that are wide enough for the kernel."""
    config = QuietConfig(**({**vars(CONFIG)} | changes))
    return quiet(tiny(hidden_size=32), config).float().train()


def with_gradients(model: QuietLM, *given: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    out = model(*given, **options)
    out.loss.backward()
    return out, {name: one.grad for name, one in model.named_parameters()}


def assert_equal_there(
    model: QuietLM, *given: Any, rtol: float = 2e-4, atol: float = 2e-5, **options: Any
) -> None:
    """Compare loss, outputs and gradients of a forward pass in training on both devices."""
    here, gradients = with_gradients(copy.deepcopy(model), *given, seed=3, **options)
    with second_device():
        there, theirs = with_gradients(moved(model), *remote(given), seed=3, **remote(options))
    assert all(one.device == DEVICE for one in there.values())
    for name, one in here.items():
        assert_close(
            local(there[name]), one, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
    largest = max(float(one.abs().max()) for one in gradients.values() if one is not None)
    for name, one in gradients.items():
        assert (one is None) == (theirs[name] is None), name
        if one is not None:
            assert isinstance(theirs[name], Remote)
            assert_close(
                local(theirs[name]), one, rtol=rtol, atol=rtol * largest, msg=lambda m, n=name: f"{n}: {m}"
            )  # fmt: skip


# --- the device itself ------------------------------------------------------------------------------


def test_the_device_refuses_what_a_gpu_refuses():
    one, here = remote(torch.arange(4.0)), torch.arange(4)
    with second_device():
        there = torch.arange(4, device="cuda")
        for wrong in (
            lambda: one + here,
            lambda: torch.cat([one, here.float()]),
            lambda: here.float().add_(one),
            lambda: torch.zeros(()).add_(one.sum()),
            lambda: torch.lerp(one, one, torch.tensor(0.5)),
            lambda: one.gather(0, here),
            lambda: here[there],
            lambda: one.index_put_((there,), here.float()),
            lambda: torch.where(one > 0, one, here.float()),
            lambda: torch.rand(3, generator=torch.Generator(), device="cuda"),
            lambda: torch.rand(3, generator=torch.Generator("cuda")),
            lambda: one.normal_(generator=torch.Generator()),
            lambda: one.pin_memory(),
        ):
            with pytest.raises(RuntimeError):
                wrong()
        for wrong in (lambda: one.numpy(), lambda: one.__array__()):
            with pytest.raises(TypeError, match="numpy"):
                wrong()
        for right in (one + torch.tensor(1.0), one[here], one[[0, 1]], there.new_tensor([1, 2]),
                      one.new_zeros(2), torch.tensor([1.0], device="cuda"), here.to("cuda"), here.cuda(),
                      torch.rand(2, generator=torch.Generator("cuda"), device="cuda")):  # fmt: skip
            assert right.device == DEVICE
        assert one.cpu().device.type == "cpu"
        assert torch.empty(2, device="meta").is_meta
        one.data = one.data.bfloat16()
        assert one.values.dtype == torch.bfloat16


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {},
    {"positions": "uniform", "positions_share": 0.5, "positions_per_chunk": 2},
    {"positions": "entropy", "positions_share": 0.5, "mixing_range": "unit"},
    {"mix": "hidden", "baseline": "mean_log", "drop_zero_losses": True, "last_position_learns": False},
    {"thought_tokens": 0},
], ids=["all positions", "some positions", "entropy", "authors", "no thought tokens"])  # fmt: skip
def test_training_is_equal(options: dict[str, Any], calls: dict[str, int]):
    assert_equal_there(thinker(**options), IDS, MASK)
    assert calls["efficient"]
    assert calls["efficient backward"]


def test_training_is_equal_with_padding_on_the_left_labels_and_given_thoughts():
    labels = LEFT_IDS.masked_fill(torch.arange(LEFT_IDS.shape[1]) == 5, -100)
    thoughts = drawn(CONFIG, LEFT_IDS)
    assert_equal_there(thinker(), LEFT_IDS, LEFT_MASK, labels, thoughts=thoughts)


def test_training_is_equal_without_a_kernel(monkeypatch: pytest.MonkeyPatch, calls: dict[str, int]):
    monkeypatch.setattr(torch.backends.cuda, "mem_efficient_sdp_enabled", lambda: False)
    assert_equal_there(thinker(), IDS, MASK)
    assert "efficient" not in calls


@pytest.mark.parametrize("kind", ["soft cap", "sink"])
def test_training_is_equal_with_scores_that_no_kernel_computes(kind: str):
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "sliding_window": 4,
    }  # fmt: skip
    if kind == "soft cap":
        # The attention of PyTorch has no soft cap.
        sizes |= {"attn_logit_softcapping": 2.0, "attn_implementation": "eager"}
        base: Any = Gemma2ForCausalLM(Gemma2Config(**sizes))
    else:
        sizes |= {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "experts_implementation": "eager",
        }
        base = GptOssForCausalLM(GptOssConfig(**sizes))
    model = quiet(base, CONFIG).float().train()
    assert_equal_there(model, IDS, MASK, thoughts=drawn(CONFIG, IDS))


def test_gradient_checkpointing_is_equal(calls: dict[str, int]):
    model = thinker()
    model.gradient_checkpointing_enable()
    assert_equal_there(model, IDS, MASK)
    assert calls["efficient backward"]


def test_a_lora_adapter_is_equal():
    model = thinker()
    torch.manual_seed(0)
    adapted = with_lora(model, r=2, alpha=4, target_modules="all-linear")
    for name, one in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(one, std=0.1)
    assert_equal_there(model, IDS, MASK)
    with second_device():
        there = moved(adapted).merge_and_unload()
    merged = copy.deepcopy(adapted).merge_and_unload()
    for here, one in zip(merged.parameters(), there.parameters(), strict=True):
        assert_close(local(one.detach()), here.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_training_in_16_bits_is_near(dtype: torch.dtype, calls: dict[str, int]):
    """Two orders of rounding differ; both are compared in direction."""
    model, thoughts = thinker().to(dtype), drawn(CONFIG, IDS)
    here, gradients = with_gradients(copy.deepcopy(model), IDS, MASK, thoughts=thoughts)
    with second_device():
        there, theirs = with_gradients(
            moved(model), *remote((IDS, MASK)), thoughts=remote(thoughts)
        )
    assert calls["efficient backward"]
    assert there.loss.item() == near(here.loss.item(), rel=0.02)
    one, two = (
        torch.cat([each.flatten().float() for each in grads.values() if each is not None])
        for grads in (gradients, local(theirs))
    )
    assert float(torch.cosine_similarity(one, two, 0)) > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_checked_on_the_device(dtype: torch.dtype, calls: dict[str, int]):
    base: Any = tiny(hidden_size=32)
    base.to(dtype)
    with torch.no_grad():
        base.model.layers[0].self_attn.o_proj.bias.zero_()  # filled with random numbers meanwhile
    with second_device():
        there = moved(base)
        before = {name: one.values.clone() for name, one in there.named_parameters()}
        model = QuietLM(there, CONFIG, start=START, end=END, pad=PAD)
    assert calls["efficient backward"]
    assert all(one.device == DEVICE and one.dtype == dtype for one in model.parameters())
    assert all(torch.equal(one.values, before[name]) for name, one in there.named_parameters())


# --- inference --------------------------------------------------------------------------------------

GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 5},
    "sampled": {"max_new_tokens": 5, "do_sample": True, "top_k": 9, "top_p": 0.9, "min_p": 0.01,
                "thoughts": 2, "thought_temperature": 1.0, "num_return_sequences": 2},
    "ends": {"max_new_tokens": 5, "eos_token_id": [1, 2, 3, 4, 5, 6, 7, 8], "pad_token_id": PAD},
    "entropy": {"max_new_tokens": 5, "think_when": ThinkWhen("entropy", 1.5)},
    "gate": {"max_new_tokens": 4, "think_when": ThinkWhen("gate", 0.0)},
    "never": {"max_new_tokens": 4, "think_when": ThinkWhen("never")},
}  # fmt: skip


@pytest.mark.parametrize("how", GENERATIONS)
def test_generation_is_equal(how: str):
    model, options = thinker().eval(), GENERATIONS[how]
    expected = model.generate(LEFT_IDS, LEFT_MASK, **options)
    with second_device():
        found = moved(model).generate(remote(LEFT_IDS), remote(LEFT_MASK), **options)
    assert found.device == DEVICE
    assert local(found).tolist() == expected.tolist()


def test_a_streamer_gets_the_tokens_on_the_cpu():
    streamed: list[Tensor] = []

    class Streamer(BaseStreamer):
        def put(self, value: Tensor) -> None:
            streamed.append(value)

        def end(self) -> None:
            pass

    model = thinker().eval()
    with second_device():
        found = moved(model).generate(remote(IDS[:1]), max_new_tokens=2, streamer=Streamer())
    assert {one.device.type for one in streamed} == {"cpu"}
    assert torch.stack(streamed, 1).tolist() == local(found)[:, -2:].tolist()


@pytest.mark.parametrize("thought_tokens", [0, 3])
def test_scores_are_equal(thought_tokens: int):
    model = thinker(thought_tokens=thought_tokens).eval()
    options: dict[str, Any] = {"thoughts": 2, "temperature": 1.0, "top": 3,
                               "think_when": ThinkWhen("entropy", 1.0)}  # fmt: skip
    expected = score(model, IDS, MASK, **options)
    with second_device():
        found = score(moved(model), *remote((IDS, MASK)), **options)
    for name, one in vars(expected).items():
        assert_close(local(getattr(found, name)), one, rtol=1e-4, atol=1e-4)


def test_measurements_are_equal():
    model, rows = thinker().eval(), [(0, [1, 2, 3, 4, 5]), (0, [3, 1, 7]), (1, [5, 9, 2, 6])]
    expected = measure(model, rows, batch_size=2).to_dict()
    with second_device():
        found = measure(moved(model), rows, batch_size=2).to_dict()
    for name, value in expected.pop("legibility").items():
        assert found["legibility"][name] == (
            value if value is None else near(value, rel=1e-3, abs=1e-5)
        )
    del found["legibility"]
    assert found == {name: near(value, rel=1e-3, abs=1e-5) for name, value in expected.items()}


def thinking(folder: Path) -> tuple[QuietLM, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = QuietConfig(thought_tokens=2, lookahead=2, initial_text="=", reinforce_weight=1.0)
    model = make_quiet(AutoModelForCausalLM.from_pretrained(folder), tokenizer, config)
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight), std=0.5)
    return model, tokenizer


def test_the_explorer_is_equal(tiny_model_dir: Path):
    model, tokenizer = thinking(tiny_model_dir)
    first, tokens, summary = explored(model, tokenizer, TEXTS[0], 9)
    with second_device():
        found = explored(moved(model), tokenizer, TEXTS[0], 9)
    assert found[0] == first
    for one, two in zip(tokens, found[1], strict=True):
        assert two.thoughts == one.thoughts
        assert [text for text, _ in two.top_with] == [text for text, _ in one.top_with]
        assert (two.gain, two.chance, *two.gains, *two.weights) == near(
            (one.gain, one.chance, *one.gains, *one.weights), rel=1e-3, abs=1e-4
        )
    assert found[2].nll_with == near(summary.nll_with, rel=1e-4)


# --- as a model of transformers ---------------------------------------------------------------------


def test_the_model_of_transformers_is_equal():
    model = QuietForCausalLM.from_quiet(thinker().eval())
    expected = model(LEFT_IDS, LEFT_MASK, labels=LEFT_IDS, use_cache=True)
    next_ids, longer = LEFT_IDS[:, :2], torch.cat([LEFT_MASK, LEFT_MASK[:, -2:]], 1)
    then = model(next_ids, longer, past_key_values=expected.past_key_values)
    with second_device():
        there = moved(model)
        found = there(*remote((LEFT_IDS, LEFT_MASK)), labels=remote(LEFT_IDS), use_cache=True)
        after = there(*remote((next_ids, longer)), past_key_values=found.past_key_values)
        unmasked = there(remote(IDS), logits_to_keep=3)
    assert_close(local(found.logits), expected.logits, rtol=1e-4, atol=1e-4)
    assert_close(local(found.loss), expected.loss)
    assert_close(local(after.logits), then.logits, rtol=1e-4, atol=1e-4)
    assert_close(local(unmasked.logits), model(IDS, logits_to_keep=3).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [
    {}, {"do_sample": False, "num_beams": 2}, {"do_sample": True, "top_k": 7, "num_return_sequences": 2},
], ids=["greedy", "beams", "sampled"])  # fmt: skip
def test_the_generation_of_transformers_is_equal(options: dict[str, Any]):
    model = QuietForCausalLM.from_quiet(thinker().eval())
    given = {"max_new_tokens": 4, "pad_token_id": PAD, **options}
    torch.manual_seed(0)
    expected = model.generate(LEFT_IDS, attention_mask=LEFT_MASK, **given)
    torch.manual_seed(0)
    with second_device():
        found = moved(model).generate(remote(LEFT_IDS), attention_mask=remote(LEFT_MASK), **given)
    assert local(found).tolist() == expected.tolist()


# --- samplers and scorers ---------------------------------------------------------------------------

SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=8),
    "drawn": SamplingParams(n=3, temperature=1.0, max_tokens=8, stop=("\n", "7")),
    "nucleus": SamplingParams(n=2, temperature=0.7, top_p=0.8, max_tokens=6),
}


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("loop", ["shared prefix", "generate"])
def test_samples_are_equal(
    loop: str, how: str, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    if loop == "generate":
        monkeypatch.setattr(local_sampler, "shared_prefix_loop", lambda *given: "of the test")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    expected = sampled(model, tokenizer, PROMPTS, SAMPLINGS[how])
    with second_device():
        assert sampled(moved(model), tokenizer, PROMPTS, SAMPLINGS[how]) == expected


def sampled(
    model: Any, tokenizer: Any, prompts: list[str], params: SamplingParams, **options: Any
) -> list[Any]:
    sampler = TransformersSampler(model, tokenizer=tokenizer, batch_size=3)
    return sampler.sample(prompts, params, **options)


def test_samples_are_equal_with_soft_caps_sliding_windows_and_prefix_tokens(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.4,
        "sliding_window": 20, "attn_logit_softcapping": 2.0, "attn_implementation": "eager",
        "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": 0,
    }  # fmt: skip
    model = Gemma2ForCausalLM(Gemma2Config(**sizes))
    given = {"prefix_tokens": [(5, 6), (7,), (), (8, 9)]}
    expected = sampled(model, tokenizer, PROMPTS, SAMPLINGS["drawn"], **given)
    with second_device():
        found = sampled(moved(model), tokenizer, PROMPTS, SAMPLINGS["drawn"], **given)
    assert found == expected


def test_samples_of_a_quiet_model_are_equal(tiny_model_dir: Path):
    model, tokenizer = thinking(tiny_model_dir)
    params = SamplingParams(n=2, temperature=1.0, max_tokens=3, stop=("7",))
    expected = sampled(model, tokenizer, ["1", "Q: 2"], params)
    with second_device():
        assert sampled(moved(model), tokenizer, ["1", "Q: 2"], params) == expected


def test_the_shared_prefix_loop_uses_the_kernel(tiny_model_dir: Path, calls: dict[str, int]):
    with second_device():
        sampler = TransformersSampler(tiny_model_dir, device="cuda")
        sampler.sample(PROMPTS, SAMPLINGS["greedy"])
    assert isinstance(sampler._loop, prefix_loop.SharedPrefixLoop)
    assert max(map(len, sampler._loop._prefixes)) > 100
    assert calls["efficient"]
    assert "flash_for_cpu" not in calls


@pytest.mark.parametrize("window", [None, 20], ids=["", "sliding window"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float32, plain"])
def test_log_probabilities_are_equal(
    window: int | None, dtype: Any, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    if "plain" in dtype:
        monkeypatch.setattr(local_scorer, "shared_prefix_loop", lambda *given: "of the test")
    dtype = dtype.split(",")[0]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=dtype)
    if window is not None:
        torch.manual_seed(0)
        sizes = model.config.to_dict() | {"sliding_window": window, "head_dim": 8}
        config = transformers.MistralConfig(**{
            name: sizes[name] for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "initializer_range", "sliding_window", "head_dim",
            )
        })  # fmt: skip
        model = transformers.MistralForCausalLM(config).to(model.dtype)
    candidates = [[(5, 6, 7), (5, 6), ()], [(9,) * 30], [(1, 2)], [(3, 4, 5, 6)]]

    def scored(one: Any) -> list[float]:
        found = TransformersScorer(one, tokenizer=tokenizer, batch_size=2).log_probs(
            PROMPTS, candidates
        )
        return [each for some in found for tokens in some for each in tokens]

    expected = scored(model)
    with second_device():
        found = scored(moved(model))
    rel, absolute = (1e-3, 1e-4) if dtype == "float32" else (0.1, 0.3)
    assert found == near(expected, rel=rel, abs=absolute)


STYLE = PromptStyle("bare")
ROLLOUTS = [
    Rollout(Problem("a", "What is 12 + 7?", "19"), "seen", text, "stop", "m", 0)
    for text in (" 19.", " 12 + 7 = 19.", " 20")
]


def test_a_verifier_is_equal(tiny_model_dir: Path):
    expected = Verifier(tiny_model_dir, score="mean").score(ROLLOUTS, STYLE)
    with second_device():
        found = Verifier(tiny_model_dir, score="mean", device="cuda").score(ROLLOUTS, STYLE)
    assert found == near(expected, rel=1e-4)


@pytest.fixture
def outcome_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(tiny_model_dir)
    config.num_labels = 1
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "outcome")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "outcome")
    return tmp_path / "outcome"


def test_devices_are_chosen_when_there_is_a_gpu(
    outcome_dir: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    expected = OutcomeModel(outcome_dir).score(ROLLOUTS, STYLE)
    log_probs = Verifier(tiny_model_dir).score(ROLLOUTS, STYLE)
    freed: list[str] = []
    with second_device():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("cache"))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3e9)
        outcome, verifier = OutcomeModel(outcome_dir), Verifier(tiny_model_dir)
        assert {one.device for one in outcome._model.parameters()} == {DEVICE}
        assert outcome.score(ROLLOUTS, STYLE) == near(expected, rel=1e-4)
        assert verifier._scorers[0]._model.device == DEVICE
        assert verifier.score(ROLLOUTS, STYLE) == near(log_probs, rel=1e-4)
        verifier.close()
        assert freed == ["cache"]
        assert peak_memory() == 3.0
        check_device("cuda")
    with pytest.raises(ValueError, match="device must be"):
        check_device("cuda")


def test_a_trained_model_is_opened_on_the_gpu(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save_quiet(*thinking(tiny_model_dir), tmp_path)
    expected = open_trained(str(tmp_path))[0].generate(IDS, MASK.flip(1), max_new_tokens=2)
    with second_device():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        model, _ = open_trained(str(tmp_path))
        assert {one.device for one in model.parameters()} == {DEVICE}
        found = model.generate(remote(IDS), remote(MASK.flip(1)), max_new_tokens=2)
    assert local(found).tolist() == expected.tolist()


def test_fingerprints_are_equal(tiny_model_dir: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    expected = fingerprint(model)
    with second_device():
        assert fingerprint(moved(model)) == expected


def test_a_model_with_pauses_is_equal(tiny_model_dir: Path, tmp_path: Path):
    folder = str(add_pause_token(str(tiny_model_dir), tmp_path / "paused"))
    prompts = [str(paused(STYLE, 3)(ROLLOUTS[0].problem)), "Q: 3 + 4?" + 2 * PAUSE]
    expected = TransformersSampler(folder).sample(prompts, SAMPLINGS["drawn"])
    with second_device():
        found = TransformersSampler(folder, device="cuda").sample(prompts, SAMPLINGS["drawn"])
    assert found == expected


# --- transformers' Trainer and TRL ------------------------------------------------------------------


@pytest.fixture
def trainers_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A function after which Trainers use the simulated device."""
    state: Any = accelerate.state.AcceleratorState

    def switch() -> None:
        there = property(lambda self: DEVICE)
        monkeypatch.setattr(accelerate.state.PartialState, "default_device", there)
        there = property(lambda self: (self._setup_devices, DEVICE)[1])
        monkeypatch.setattr(transformers.TrainingArguments, "device", there)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "simulated")
        with suppress(ModuleNotFoundError):  # other versions of TRL have no kernel of their own
            kernels = importlib.import_module("trl.kernels.chunked_logprob")
            monkeypatch.setattr(kernels, "_use_triton", lambda device: False)
        state._reset_state(True)

    yield switch
    state._reset_state(True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
    {}, {"lora": True},
    # With seed 0, rounding on an Intel processor lets one of the two devices sample another thought.
    {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "seed": 1},
], ids=["plain", "adapter", "accumulated"])  # fmt: skip
def test_the_trainer_of_quiet_star_is_equal(
    options: dict[str, Any],
    tiny_model_dir: Path,
    tmp_path: Path,
    trainers_there: Callable[[], None],
):
    given = {"max_steps": 3, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_steps": 2,
             "warmup_steps": 1, **options}  # fmt: skip
    lora = given.pop("lora", False)

    def trained(out: Path, place: Callable[[Any], Any], *, use_cpu: bool) -> tuple[Any, Any]:
        model, tokenizer = thinking(tiny_model_dir)
        model = place(model)
        adapter = with_lora(model, r=2, alpha=4, target_modules="all-linear") if lora else None
        arguments = quiet_arguments(out / "checkpoints", use_cpu=use_cpu, **given)
        data = spans(TEXTS, tokenizer, length=24, least=4)
        return train_quiet(model, tokenizer, data, arguments, out=out, peft_model=adapter), model

    log, model = trained(tmp_path / "here", lambda one: one, use_cpu=True)
    with second_device():
        trainers_there()
        their_log, theirs = trained(tmp_path / "there", moved, use_cpu=False)
    assert all(isinstance(one, Remote) for one in theirs.parameters())
    for one, two in zip(log, their_log, strict=True):
        for name in ("loss", "nll_with", "grad_norm", "reward", "gain_decile_3"):
            assert two[name] == near(one[name], rel=1e-3, abs=1e-4), name
    for one, two in zip(model.parameters(), theirs.parameters(), strict=True):
        assert_close(local(two.detach()), one.detach(), rtol=1e-2, atol=1e-3)
    assert (tmp_path / "there" / "model" / "config.json").exists()


EXAMPLES = [
    Example("Q: 1 + 2?\nA:", " 1 + 2 = 3."),
    Example("Q: 4?\nA:", " 4."),
    Example("5", " 6"),
]
PREFERENCES = [Preference("Q: 1 + 2?\nA:", " 3.", " 4."), Preference("Q: 4?\nA:", " 4.", " 7")]
LABELED = [LabeledCompletion("Q: 4?\nA:", (5, 6), True), LabeledCompletion("5", (7, 8, 9), False)]
WEIGHTED = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": [0.0, 0.5, 1.0]},
    {"input_ids": [8, 9], "labels": [-100, 9], "weights": [0.0, 2.0]},
]
OPTIONS: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
FINETUNINGS: dict[str, Callable[[Path, Path, bool], Any]] = {
    "sft": lambda model, out, cpu: train_sft(
        model, EXAMPLES, sft_config(out / "c", use_cpu=cpu, **OPTIONS), out=out / "m"),
    "pause": lambda model, out, cpu: train_sft(
        add_pause_token(str(model), out / "p"), with_pauses(EXAMPLES, 2),
        sft_config(out / "c", use_cpu=cpu, **OPTIONS), out=out / "m"),
    "pause-pretraining": lambda model, out, cpu: train_rows(
        add_pause_token(str(model), out / "p"),
        lambda tokenizer: (pause_rows(TEXTS, tokenizer, length=12, share=0.2, seed=0), 0), TEXTS,
        sft_config(out / "c", use_cpu=cpu, **OPTIONS), out=out / "m"),
    "adapter": lambda model, out, cpu: train_sft(
        model, EXAMPLES, sft_config(out / "c", use_cpu=cpu, **OPTIONS), out=out / "m",
        peft_config=lora_config(r=2, alpha=4, target_modules="all-linear")),
    "weighted": lambda model, out, cpu: train_weighted(
        model, WEIGHTED, sft_config(out / "c", use_cpu=cpu, **OPTIONS), out=out / "m"),
    "dpo": lambda model, out, cpu: train_dpo(
        model, PREFERENCES, dpo_config(out / "c", use_cpu=cpu, **OPTIONS), out=out / "m"),
    "outcome": lambda model, out, cpu: train_outcome(
        model, LABELED, outcome_config(out / "c", max_length=64, use_cpu=cpu, **OPTIONS), out=out / "m"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", FINETUNINGS)
def test_fine_tuning_is_equal(
    kind: str, tiny_model_dir: Path, tmp_path: Path, trainers_there: Callable[[], None]
):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here = FINETUNINGS[kind](tiny_model_dir, tmp_path / "here", True)
    used: list[torch.device] = []
    with second_device():
        trainers_there()
        hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, given: used.extend(one.device for one in module.parameters())
        )
        there = FINETUNINGS[kind](tiny_model_dir, tmp_path / "there", False)
        hook.remove()
    assert set(used) == {DEVICE}
    assert [row["loss"] for row in there.log] == near([row["loss"] for row in here.log], rel=1e-3)
    one, two = (
        load_file(tmp_path / name / "m" / "model.safetensors") for name in ("here", "there")
    )
    for name, weight in one.items():
        assert_close(two[name], weight, rtol=1e-2, atol=1e-3)


def test_one_process_trains_on_one_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Otherwise transformers would use DataParallel, which multiplies the batch size."""
    devices = property(lambda self: 1 if getattr(self, "_n_gpu", 2) == 1 else 2)
    monkeypatch.setattr(transformers.TrainingArguments, "n_gpu", devices)
    assert quiet_arguments(tmp_path).n_gpu == 1
    assert _shared(sft_config(tmp_path)).n_gpu == 1


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    _refuse_too_few_devices(Launch("torchrun", num_processes=2))
    with pytest.raises(ValueError, match="3 processes need one GPU each, but this machine has 2"):
        _refuse_too_few_devices(Launch("torchrun", num_processes=3))


def test_the_time_of_an_update_includes_the_work_of_the_device(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
):
    happened: list[str] = []
    step = torch.optim.AdamW.step

    def stepped(*given: Any) -> None:
        step(*given)
        happened.append("update")

    monkeypatch.setattr(torch.optim.AdamW, "step", stepped)
    unseen = "_accelerator_graph_capture_health_check"
    monkeypatch.setattr(torch.optim.Optimizer, unseen, lambda self: None)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: DEVICE)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: happened.append("wait"))
    with second_device():
        folder = str(tiny_model_dir)
        assert seconds_per_example(folder, length=8, device_batch=2, train_batch_size=2) > 0
    assert happened == ["update", "wait"]


# --- the kernel -------------------------------------------------------------------------------------

SCHEMAS = {
    "_scaled_dot_product_efficient_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal scale",
        "output log_sumexp philox_seed philox_offset"),
    "_scaled_dot_product_efficient_attention_backward": (
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p "
        "grad_input_mask is_causal scale", "   "),
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_kernel_has_the_arguments_that_the_adapter_gives(name: str):
    schema = getattr(torch.ops.aten, name).default._schema
    arguments, returns = SCHEMAS[name]
    assert [one.name for one in schema.arguments] == arguments.split(" ")
    assert [one.name for one in schema.returns] == returns.split(" ")


@pytest.mark.parametrize("queries", [1, 31, 32, 45])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_gives_the_kernel_the_shapes_that_the_adapter_expects(
    dtype: torch.dtype, queries: int
):
    """With PyTorch's own shape functions, on the real device `meta`."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    query, key = empty(3, 2, queries, 16), empty(3, 2, 21, 16)
    for bias in (None, empty(1, 1, queries, 21), empty(queries, 21)):
        out, total = KERNELS["efficient"].forward(query, key, key, bias, 0.25)
        assert (out.shape, out.dtype) == (query.shape, dtype)
        assert (total.shape, total.dtype) == (query.shape[:3], torch.float32)
    bias = empty(3, 1, queries, 21)
    given = (torch.empty_like(out), query, key, key, bias, out, total, 0.25)
    assert [one.shape for one in KERNELS["efficient"].backward(*given)] == [
        query.shape, key.shape, key.shape,
    ]  # fmt: skip


@pytest.mark.parametrize(("given", "expected"), [
    (("cpu", torch.float64, 7, 7), "flash_for_cpu"),
    (("cpu", torch.bfloat16, 64, 64), "flash_for_cpu"),
    (("cpu", torch.float32, 64, 32), None),
    (("cuda", torch.float32, 64, 64), "efficient"),
    (("cuda", torch.float32, 4, 4), "efficient"),
    (("cuda", torch.float32, 6, 6), None),
    (("cuda", torch.bfloat16, 128, 128), "efficient"),
    (("cuda", torch.float16, 8, 8), "efficient"),
    (("cuda", torch.float16, 4, 4), None),
    (("cuda", torch.bfloat16, 128, 64), None),
    (("cuda", torch.float64, 64, 64), None),
    (("mps", torch.float32, 64, 64), None),
    (("xpu", torch.bfloat16, 64, 64), None),
    (("meta", torch.float32, 64, 64), None),
])  # fmt: skip
def test_the_kernel_of_a_device_and_data_type(given: tuple[Any, ...], expected: str | None):
    assert kernel_name(*given) == expected


def test_no_kernel_for_amd_gpus_and_grids_that_are_too_large():
    assert kernel_name("cuda", torch.float32, 64, 64, hip=True) is None
    assert kernel_name("cuda", torch.float32, 64, 64, rows=65535) == "efficient"
    assert kernel_name("cuda", torch.float32, 64, 64, rows=65536) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64])
def test_kernels_agree_with_the_plain_product(width: int, dtype: torch.dtype):
    assert agrees(KERNELS["flash_for_cpu"], torch.device("cpu"), dtype, width) is None
    with second_device():
        assert agrees(KERNELS["efficient"], DEVICE, dtype, width) is None
        with torch.inference_mode():
            assert agrees(KERNELS["efficient"], DEVICE, dtype, width) is None


def wrong_kernels(kernel: Kernel) -> dict[str, tuple[Kernel, str]]:
    """Kernels with one mistake each, and the value that the comparison should find."""

    real: Any = kernel

    def no_mask(query: Any, key: Any, value: Any, bias: Any, scale: float) -> Any:
        return real.forward(query, key, value, None, scale)

    def base_2(*given: Any) -> Any:
        out, total = real.forward(*given)
        return out, total / 0.6931

    def other_scale(*given: Any) -> Any:
        return real.forward(*given[:-1], 2 * given[-1])

    def own_sum(*given: Any) -> Any:
        _, query, key, value, bias, _, _, scale = given
        return real.backward(*given[:5], *real.forward(query, key, value, bias, scale), scale)

    def shifted(*given: Any) -> Any:
        return real.backward(*given[:6], given[6].roll(1, -1), given[7])

    def no_values(*given: Any) -> Any:
        one, two, three = real.backward(*given)
        return one, two, torch.zeros_like(three)

    return {
        "mask": (replace(kernel, forward=no_mask), "output"),
        "base of the logarithm": (replace(kernel, forward=base_2), "log-sum-exp"),
        "scale": (replace(kernel, forward=other_scale), "output"),
        "gradients of its own part": (replace(kernel, backward=own_sum), "gradient"),
        "rows of the log-sum-exp": (replace(kernel, backward=shifted), "gradient"),
        "gradient of the values": (replace(kernel, backward=no_values), "gradient of values"),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mistake", wrong_kernels(KERNELS["efficient"]))
def test_the_comparison_finds_a_wrong_kernel(mistake: str, dtype: torch.dtype):
    kernel, named = wrong_kernels(KERNELS["efficient"])[mistake]
    with second_device():
        why = agrees(kernel, DEVICE, dtype, 16)
    assert why is not None
    assert named in why


def failing(*given: Any) -> Any:
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("broken", ["wrong", "fails"])
def test_a_kernel_that_is_wrong_or_fails_is_not_used(
    broken: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    kernel = wrong_kernels(KERNELS["efficient"])["scale"][0]
    if broken == "fails":
        kernel = replace(kernel, backward=failing)
    monkeypatch.setitem(KERNELS, "efficient", kernel)
    with caplog.at_level(logging.WARNING):
        assert_equal_there(thinker(), IDS, MASK)
    (message,) = (one.message for one in caplog.records if "kernel" in one.message)
    assert ("it is off" if broken == "wrong" else "no kernel image") in message


def test_rows_of_a_bias_are_aligned_without_changing_its_values():
    bias = torch.randn(2, 1, 5, 21)
    found = aligned(bias)
    assert torch.equal(found, bias)
    assert found.stride() == (5 * 32, 5 * 32, 32, 1)
    assert aligned(found) is found
    assert aligned(bias[..., 3:]).storage_offset() == 0
    assert aligned(torch.randn(1, 1, 1, 21)).stride() == (32, 32, 32, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_text_is_read_with_repeated_heads_where_kernels_take_no_groups(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise PyTorch's attention computes a product of all positions."""
    groups: list[tuple[int, int]] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def noted(query: Tensor, key: Tensor, *given: Any, **options: Any) -> Tensor:
        groups.append((query.shape[1], key.shape[1]))
        return attention(query, key, *given, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    model = thinker().to(dtype).eval()
    with second_device(), torch.no_grad():
        there = moved(model)
        groups.clear()
        there(remote(IDS), remote(MASK), seed=0)
        causal = groups.copy()
        groups.clear()
        score(there, remote(LEFT_IDS), remote(LEFT_MASK))
    assert set(causal) == {(4, 4) if dtype == torch.float32 else (4, 2)}
    assert set(groups) == {(4, 4)}

"""The parallel thoughts beside ordinary forward passes, on tiny random models of many families."""

import pytest
import torch
from naive_quiet import END, PAD, START, VOCABULARY, assert_equal_to_naive, quiet, texts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selftaught.quiet.model import QuietConfig, QuietLM

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEAD = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
"""Shorter than the texts and than a thought with its lookahead."""
FAMILIES: dict[str, dict] = {
    "apertus": {},
    "arcee": {},
    "biogpt": {},
    "bitnet": {},
    "cohere": {},
    "cohere2": WINDOW,
    "deepseek_v3": EXPERTS
    | {
        "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "ernie4_5": {},
    "exaone4": {},
    "gemma": HEAD,
    "gemma2": HEAD | WINDOW | {"query_pre_attn_scalar": 8},
    "gemma3_text": HEAD | WINDOW | {"query_pre_attn_scalar": 8},
    "glm": HEAD,
    "glm4": HEAD,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {},
    "gpt_oss": HEAD | WINDOW | {"num_local_experts": 4},
    "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": HEAD,
    "llama": {},
    "llama4_text": HEAD
    | {
        "num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 4,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "ministral": HEAD | {"sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "nemotron": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": WINDOW,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEAD,
    "qwen3_moe": HEAD | EXPERTS | {"num_experts": 4},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {},
    "starcoder2": {},
}  # fmt: skip
REFUSED = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "falcon": {},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
}


def build(family: str, options: dict) -> PreTrainedModel:
    """A model of random weights, wide enough for attention and experts to matter, in float64."""
    config = AutoConfig.for_model(family, **(SIZES | options))
    config._experts_implementation = "eager"  # the grouped one has no float64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_models_thinks_as_it_reads(family: str):
    config = QuietConfig.paper(
        thoughts=2,
        lookahead=2,
        thought_tokens=3,
        reinforce_weight=1.0,
        embedding_scale=1.0,
        positions_per_chunk=4,
    )
    # Most families normalise, and some attend, in float32 whatever the weights are.
    assert_equal_to_naive(
        quiet(build(family, FAMILIES[family]), config), *texts([10, 10]), tolerance=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_cannot_think_in_parallel_is_refused_by_name(family: str):
    base = build(family, REFUSED[family])
    with pytest.raises(ValueError, match=rf"{type(base).__name__} cannot think.*layer \d \("):
        QuietLM(base, QuietConfig.paper(), start=START, end=END, pad=PAD)

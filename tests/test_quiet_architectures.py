"""The parallel thoughts beside ordinary forward passes, on tiny random models of many families."""

from typing import cast

import pytest
import torch
from naive_quiet import END, PAD, START, VOCABULARY, assert_equal_to_naive, quiet, texts
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM

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
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
INDEXED = FAMILIES["deepseek_v3"] | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}
DECODER = {
    "d_model": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
}  # fmt: skip
PER_LAYER = HEAD | WINDOW | {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
}  # fmt: skip
REFUSED = {
    "bert-generation": {},
    "bigbird_pegasus": DECODER | {"attention_type": "original_full"},
    "blenderbot-small": DECODER,
    "bloom": {"n_layer": 2, "n_head": 4},
    "deepseek_v32": INDEXED,
    "doge": {},
    "electra": {},
    "falcon": {},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "gemma3n_text": PER_LAYER
    | {"altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0]},
    "gemma4_text": PER_LAYER,
    "glm_moe_dsa": INDEXED,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {},
    "marian": DECODER,
    "mbart": DECODER,
    "minicpm3": LATENT,
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    "pegasus": DECODER,
    "xmod": {},
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
    # The layer with its class; where it is not in a layer, the module with its.
    named = rf"{type(base).__name__} cannot think.*(layer \d \(\w+|\w+ \(\w+\) fails)"
    with pytest.raises(ValueError, match=named):
        QuietLM(base, QuietConfig.paper(), start=START, end=END, pad=PAD)


def test_latent_attention_of_longcat_is_served():
    options = LATENT | EXPERTS | {
        "num_layers": 1, "n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2,
        "expert_ffn_hidden_size": 16, "ffn_hidden_size": 48, "head_dim": 4,
    }  # fmt: skip
    config = QuietConfig(thoughts=2, lookahead=2, thought_tokens=3)
    model = quiet(build("longcat_flash", options), config)
    assert_equal_to_naive(model, *texts([10, 10]), tolerance=1e-4)


# --- the self-check ------------------------------------------------------------------------------


class Gated(torch.nn.Module):
    """A layer that adds, times a gate, something that thoughts do not get right."""

    def __init__(self, layer: torch.nn.Module, extra: torch.nn.Module, gate: float) -> None:
        super().__init__()
        self.layer, self.extra = layer, extra
        self.gate = torch.nn.Parameter(torch.tensor([gate], dtype=torch.float64))

    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        out = self.layer(hidden, *args, **kwargs)
        return out + self.gate * self.extra(hidden)


class MeanOfThePast(torch.nn.Module):
    """A mixer of tokens that is not attention, and so starts anew in a thought."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        count = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        return hidden.cumsum(1) / count


class WrongBackwards(torch.nn.Module):
    """Right values; gradients reach it through whole texts only, as a kernel's might."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden if len(hidden) == 3 else hidden.detach()


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_what_a_gate_of_0_hides_is_found_and_the_layer_named(gate: float):
    base = build("llama", {})
    base.model.layers[1] = Gated(base.model.layers[1], MeanOfThePast(), gate)
    before = {name: one.clone() for name, one in base.state_dict().items()}
    with pytest.raises(ValueError, match=r"off by .*first in layer 1 \(Gated: LlamaDecoderLayer"):
        QuietLM(base, QuietConfig(), start=START, end=END, pad=PAD)
    for name, one in base.state_dict().items():
        assert torch.equal(one, before[name])


def test_wrong_gradients_are_found_and_the_layer_named():
    base = build("llama", {})
    base.model.layers[1] = Gated(base.model.layers[1], WrongBackwards(), 0.5)
    with pytest.raises(ValueError, match=r"the gradient of .* would be wrong, in layer \d \("):
        QuietLM(base, QuietConfig(), start=START, end=END, pad=PAD)


def test_the_check_leaves_the_model_as_it_was():
    base = build("qwen2", FAMILIES["qwen2"]).bfloat16().train()
    base.model.layers[0].self_attn.q_proj.bias.data.zero_()
    base.model.norm.weight.requires_grad_(False)
    before = {name: (one.data_ptr, one.clone()) for name, one in base.named_parameters()}
    QuietLM(base, QuietConfig(), start=START, end=END, pad=PAD)
    assert base.training and base.config._attn_implementation == "eager"
    assert not base.model.norm.weight.requires_grad
    for name, one in base.named_parameters():
        assert one.dtype == torch.bfloat16 and one.grad is None and not one._backward_hooks
        assert torch.equal(one, before[name][1])
    assert not base.get_input_embeddings()._forward_hooks


def test_an_attention_that_is_given_a_bias_is_refused():
    from selftaught.quiet.attention import Seen, quiet_attention

    module, states = torch.nn.Module(), torch.zeros(1, 1, 1, 1)
    mask = cast("Seen", None)  # refused before it is read
    with pytest.raises(TypeError, match="'position_bias', which thoughts do not have"):
        quiet_attention(module, states, states, states, mask, position_bias=torch.zeros(1))

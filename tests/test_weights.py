"""Weight files that are incomplete, damaged or of another model are refused before anything is sampled."""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from selftaught.samplers.weights import check_names, check_weights, load_model, read_header

TINY: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
FILE = "model.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def change(folder: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    weights = {name: one.clone() for name, one in load_file(folder / FILE).items()}
    save_file(how(weights), folder / FILE, metadata={"format": "pt"})


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda all_: {name: one for name, one in all_.items() if name not in names}


def header(path: Path) -> dict:
    raw = path.read_bytes()
    return json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])


def write(path: Path, entries: object, data: bytes) -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- files ---------------------------------------------------------------------------------------


def test_a_whole_file_passes_and_gives_its_shapes(folder: Path):
    check_weights(str(folder))
    shapes = read_header(folder / FILE)
    assert shapes == {name: tuple(one.shape) for name, one in load_file(folder / FILE).items()}


@pytest.mark.parametrize("kept", [0, 5, 8, 60, 3000, -1])
def test_a_cut_off_file_is_named(folder: Path, kept: int):
    raw = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(raw[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off"):
        check_weights(str(folder))


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "size", "message_text"),
    [
        (b"\x00garbage", 8, "header is not valid JSON"),
        (b"[1]", 8, "header is not a JSON object"),
        (b'{"a": 1, "a": 2}', 8, "a name occurs twice"),
        ({"a": 1}, 8, "tensor 'a' has no dtype"),
        ({"a": F32 | {"shape": [3]}}, 8, r"'a' of shape \[3\] and dtype F32 has 8 bytes"),
        ({"a": F32 | {"shape": [-2]}}, 8, r"'a' has the shape \[-2\]"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, 8, "at bytes 8 to 0"),
        ({"a": F32, "b": F32}, 8, "'b' begins at byte 0 instead of 8"),
        ({"a": F32 | {"data_offsets": [4, 12]}}, 12, "'a' begins at byte 4 instead of 0"),
        ({"a": F32}, 9, "1 bytes more than its header lists"),
        ({"__metadata__": {}}, 0, "no tensors"),
        ({"a": F32}, 7, r"cut off: its header lists 8 bytes of tensors, but the file has 7"),
    ],
)
def test_a_damaged_header_is_named(folder: Path, entries: object, size: int, message_text: str):
    write(folder / FILE, entries, bytes(size))
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{message_text}"):
        check_weights(str(folder))


def test_wrong_first_bytes_and_a_pointer_of_git_lfs_are_named(folder: Path):
    (folder / FILE).write_bytes(b"\xff" * 5000)
    with pytest.raises(ValueError, match="first bytes give a header of"):
        check_weights(str(folder))
    (folder / FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        check_weights(str(folder))


def test_a_pickle_is_never_opened(folder: Path):
    (folder / FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/owned'\ntR.")
    for check in (check_weights, load_model):
        with pytest.raises(ValueError, match=r"found pytorch_model\.bin.*never opened.*save_pretr"):
            check(str(folder))


def test_what_else_may_stand_in_a_folder_is_named(folder: Path):
    (folder / FILE).rename(folder / "consolidated.safetensors")
    with pytest.raises(ValueError, match=r"found only consolidated\.safetensors"):
        check_weights(str(folder))
    (folder / "consolidated.safetensors").rename(folder / "m.gguf")
    with pytest.raises(ValueError, match=r"found m\.gguf.*llama\.cpp"):
        check_weights(str(folder))
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(ValueError, match=r"PEFT adapter.*\(some/base\).*merge_and_unload"):
        check_weights(str(folder))
    with pytest.raises(ValueError, match="does not exist"):
        check_weights(str(folder / "nowhere"))
    with pytest.raises(ValueError, match="got the file"):
        check_weights(str(folder / "m.gguf"))
    check_weights("someone/never-downloaded")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    model = LlamaForCausalLM(LlamaConfig(**TINY))
    model.save_pretrained(tmp_path / "s", max_shard_size="4KB")
    assert len(list((tmp_path / "s").glob("*.safetensors"))) > 2
    return tmp_path / "s"


def test_shards_are_all_there_with_their_tensors(sharded: Path):
    check_weights(str(sharded))
    load_model(sharded)
    first, second, *_ = sorted(sharded.glob("*.safetensors"))
    kept = second.read_bytes()
    second.unlink()
    for check in (check_weights, load_model):
        with pytest.raises(ValueError, match=rf"of which 1 are missing: {second.name}"):
            check(str(sharded))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ValueError, match=rf"{second.name} lacks \d+ tensors"):
        check_weights(str(sharded))
    second.write_bytes(kept[:-1])
    with pytest.raises(ValueError, match=rf"{second.name} is cut off"):
        check_weights(str(sharded))
    second.write_bytes(kept)
    save_file(load_file(first) | load_file(second), second)
    with pytest.raises(ValueError, match=rf"{second.name} and {first.name} both contain"):
        check_weights(str(sharded))


def test_an_index_that_leads_out_of_its_folder_is_refused(sharded: Path):
    index = sharded / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../a.safetensors"}}')
    with pytest.raises(ValueError, match=r"names the shard '\.\./a\.safetensors'"):
        check_weights(str(sharded))
    index.write_text("{}")
    with pytest.raises(ValueError, match="no weight_map"):
        check_weights(str(sharded))


def test_headers_are_read_without_torch(folder: Path):
    code = f"""import sys
from selftaught.samplers.weights import check_weights
check_weights({str(folder)!r})
assert "torch" not in sys.modules and "transformers" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True)


# --- names and shapes ----------------------------------------------------------------------------


CASES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "another prefix": (
        lambda all_: {f"tower.{name}": one for name, one in all_.items()},
        r"21 of 21 weights of LlamaForCausalLM are missing in .*m/model\.safetensors.*"
        r"with the prefix 'tower\.'",
    ),
    "one is missing": (without("model.norm.weight"), r"1 of 21 weights.*random: model\.norm\.weight"),
    "the head is missing and is not tied": (without("lm_head.weight"), r"1 of 21.*lm_head\.weight"),
    "another shape": (
        lambda all_: all_ | {"model.norm.weight": torch.ones(7)},
        r"another shape in .*model\.norm\.weight \(file: \[7\], model: \[16\]\)",
    ),
    "one layer more": (
        lambda all_: all_ | {"model.layers.2.mlp.up_proj.weight": torch.ones(24, 16)},
        r"1 weights that LlamaForCausalLM.*does not have: model\.layers\.2\.mlp\.up_proj",
    ),
    "a bias": (
        lambda all_: all_ | {"model.layers.0.self_attn.q_proj.bias": torch.ones(16)},
        r"does not have: model\.layers\.0\.self_attn\.q_proj\.bias",
    ),
    "a part nobody knows": (
        lambda all_: all_ | {"model.second_norm.weight": torch.ones(16)},
        r"does not have: model\.second_norm\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_weights_of_another_model_are_refused(folder: Path, case: str):
    how, message_text = CASES[case]
    change(folder, how)
    with pytest.raises(ValueError, match=message_text):
        load_model(folder)


@pytest.mark.parametrize("case", [name for name in CASES if "more" not in name and "bias" not in name
                                  and "part" not in name])  # fmt: skip
def test_names_are_checked_without_reading_the_weights(folder: Path, case: str):
    check_names(str(folder))
    how, message_text = CASES[case]
    change(folder, how)
    with pytest.raises(ValueError, match=message_text):
        check_names(str(folder))


def test_the_same_weights_come_out_as_went_in(folder: Path):
    found = load_model(folder, dtype="float32").state_dict()
    for name, one in load_file(folder / FILE).items():
        assert torch.equal(found[name], one)


def test_a_tied_head_may_be_missing(tmp_path: Path):
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read_header(tmp_path / FILE)
    found = load_model(tmp_path)
    assert torch.equal(found.lm_head.weight, model.model.embed_tokens.weight)


def test_constants_of_older_versions_are_left_out(tmp_path: Path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20)).save_pretrained(
        tmp_path
    )
    old = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    change(tmp_path, lambda all_: all_ | old)
    load_model(tmp_path)


def test_another_part_is_left_out_with_a_warning(folder: Path):
    change(folder, lambda all_: all_ | {"model.vision_tower.patch.weight": torch.ones(3)})
    with pytest.warns(UserWarning, match=r"1 weights in .*not used.*vision_tower\.patch\.weight"):
        load_model(folder)
    change(folder, without("model.norm.weight"))
    with pytest.raises(ValueError, match=r"random: model\.norm\.weight"):
        load_model(folder)


def test_a_missing_expert_is_refused(tmp_path: Path):
    config = MixtralConfig(**TINY, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    names = [name for name in read_header(tmp_path / FILE) if ".experts.1." in name]
    assert names, read_header(tmp_path / FILE)
    load_model(tmp_path)
    change(tmp_path, without(*names))
    with pytest.raises(ValueError, match=r"another shape.*experts"):
        load_model(tmp_path)


def test_an_expert_without_one_of_its_matrices_is_refused(tmp_path: Path):
    config = MixtralConfig(**TINY, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    name = next(name for name in read_header(tmp_path / FILE) if ".experts.1." in name)
    change(tmp_path, without(name))
    with pytest.raises(ValueError, match="experts"):
        load_model(tmp_path)


def test_only_a_new_head_may_be_missing_from_a_classifier(folder: Path):
    options = {"kind": "sequence_classification", "num_labels": 1}
    with pytest.raises(ValueError, match=r"random: score\.weight"):
        load_model(folder, **options)
    load_model(folder, new_head=True, **options)
    with pytest.raises(ValueError, match="kind must be"):
        load_model(folder, "masked_lm")
    change(folder, without("model.norm.weight"))
    with pytest.raises(ValueError, match=r"1 of 21 weights.*random: model\.norm\.weight"):
        load_model(folder, new_head=True, **options)


def test_a_classifier_is_no_language_model(folder: Path, tmp_path: Path):
    found = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    found.save_pretrained(tmp_path / "classifier")
    with pytest.raises(
        ValueError, match=r"random: lm_head\.weight.*other tensors \(score\.weight\)"
    ):
        load_model(tmp_path / "classifier")


# --- every place that opens a model --------------------------------------------------------------


@pytest.fixture
def renamed(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer, its weights under another prefix."""
    shutil.copytree(tiny_model_dir, tmp_path / "renamed")
    change(tmp_path / "renamed", lambda all_: {f"tower.{name}": one for name, one in all_.items()})
    return tmp_path / "renamed"


def test_every_way_to_open_a_model_refuses_random_weights(renamed: Path, tmp_path: Path):
    from selftaught import open_sampler
    from selftaught.cli.quiet_train import TrainOptions, opened_to_train
    from selftaught.evaluation.verifier import OutcomeModel
    from selftaught.methods.pause import add_pause_token
    from selftaught.samplers import open_scorer
    from selftaught.training.outcome import _classifier
    from selftaught.training.trainer import causal_lm

    ways = [
        lambda: open_sampler("transformers", str(renamed)),
        lambda: open_scorer(str(renamed)),
        lambda: causal_lm(str(renamed)),
        lambda: _classifier(str(renamed)),
        lambda: OutcomeModel(renamed),
        lambda: add_pause_token(str(renamed), tmp_path / "pause"),
        lambda: opened_to_train(TrainOptions(model=str(renamed))),
    ]
    for way in ways:
        with pytest.raises(ValueError, match=r"are missing in .*renamed/model\.safetensors"):
            way()


def test_a_quiet_folder_has_all_its_weights(tiny_model_dir: Path, tmp_path: Path):
    from old_quiet import old_save
    from transformers import AutoTokenizer

    from selftaught.quiet.checkpoint import make_quiet, open_quiet, save_quiet
    from selftaught.quiet.config import QuietConfig

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = make_quiet(load_model(tiny_model_dir), tokenizer, QuietConfig(thought_tokens=2))
    save_quiet(model, tokenizer, tmp_path / "new")
    open_quiet(tmp_path / "new")
    change(tmp_path / "new", without("quiet.base.model.norm.weight"))
    with pytest.raises(ValueError, match=r"random: quiet\.base\.model\.norm\.weight"):
        open_quiet(tmp_path / "new")
    old_save(model, tokenizer, tmp_path / "q")
    heads = tmp_path / "q" / "mixing.safetensors"
    whole = heads.read_bytes()
    open_quiet(tmp_path / "q")
    heads.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"mixing\.safetensors is cut off"):
        open_quiet(tmp_path / "q")
    weights = {name: one[..., :1].contiguous() for name, one in model.heads().items()}
    save_file(weights, heads)
    with pytest.raises(
        ValueError, match=r"mixing\.safetensors.*mixing\.layers\.0\.bias \(file: \[1\]"
    ):
        open_quiet(tmp_path / "q")
    heads.unlink()
    with pytest.raises(ValueError, match=r"mixing\.safetensors is missing"):
        open_quiet(tmp_path / "q")
    heads.write_bytes(whole)
    change(tmp_path / "q", without("model.norm.weight"))
    with pytest.raises(ValueError, match=r"random: model\.norm\.weight"):
        open_quiet(tmp_path / "q")

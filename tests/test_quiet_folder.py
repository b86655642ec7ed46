"""A model that thinks, made of an ordinary one, saved, opened, and refused when its parts do not fit."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from narrowed import tensor
from old_quiet import old_save
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from selftaught.quiet.checkpoint import export_base, make_quiet, open_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.samplers import open_sampler, open_scorer

SMALL = QuietConfig.paper(thought_tokens=2, lookahead=2)


def made(folder: Path, config: QuietConfig = SMALL) -> tuple[QuietLM, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    return make_quiet(base, tokenizer, config), tokenizer


def test_the_new_tokens_start_as_the_initial_text(tiny_model_dir: Path):
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model, tokenizer = made(tiny_model_dir)
    dash = tokenizer("---").input_ids[0]
    assert tokenizer.convert_ids_to_tokens([model.marks.start, model.marks.end]) == [
        "<|startofthought|>",
        "<|endofthought|>",
    ]
    new = tensor(model.base.get_input_embeddings().weight)
    old = tensor(before.get_input_embeddings().weight)
    assert len(new) == len(old) + 2
    for token in (model.marks.start, model.marks.end):
        torch.testing.assert_close(new[token], old[dash], rtol=0, atol=0)


def test_an_untrained_mixing_head_changes_no_prediction(tiny_model_dir: Path):
    model, tokenizer = made(tiny_model_dir)
    ids = tokenizer("Q: What is 12 + 7?", return_tensors="pt").input_ids
    with torch.no_grad():
        out = model(ids)
    assert out.reward.item() == 0
    first = out.log_prob_with_BNJK[..., 0]
    torch.testing.assert_close(first, out.log_prob_without_BT[:, None, :-1].expand_as(first))


def test_a_saved_model_comes_back_whole(tiny_model_dir: Path, tmp_path: Path):
    model, tokenizer = made(tiny_model_dir)
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight))
    torch.nn.init.normal_(model.moved, std=0.01)
    ids = tokenizer("Q: What is 12 + 7?", return_tensors="pt").input_ids
    attention = model.base.config._attn_implementation
    save_quiet(model, tokenizer, tmp_path / "quiet")
    assert model.base.config._attn_implementation == attention == "sdpa"
    opened, its_tokenizer = open_quiet(tmp_path / "quiet")
    assert opened.quiet_config == model.quiet_config
    assert opened.marks.never == model.marks.never
    assert len(its_tokenizer) == len(tokenizer)
    with torch.no_grad():
        assert opened.eval()(ids, seed=0).loss.item() == model.eval()(ids, seed=0).loss.item()
        assert torch.equal(opened.base(ids).logits, model.base(ids).logits)
    assert not list((tmp_path / "quiet").glob("*.bin"))


def test_tokens_that_are_there_already_are_refused(tiny_model_dir: Path, tmp_path: Path):
    model, tokenizer = made(tiny_model_dir)
    with pytest.raises(ValueError, match=r"without <\|startofthought\|> and .*open_quiet"):
        make_quiet(model.base, tokenizer, SMALL)


def test_a_folder_with_another_base_is_refused(tiny_model_dir: Path, tmp_path: Path):
    model, tokenizer = made(tiny_model_dir)
    old_save(model, tokenizer, tmp_path / "quiet")
    with torch.no_grad():
        tensor(model.base.get_input_embeddings().weight)[0] += 1
    model.base.save_pretrained(tmp_path / "quiet")
    with pytest.raises(ValueError, match=r"trained with another base .*from the same run"):
        open_quiet(tmp_path / "quiet")
    shutil.rmtree(tmp_path / "quiet")
    model.base.save_pretrained(tmp_path / "quiet")
    with pytest.raises(ValueError, match=r"folder of a Quiet-STaR model, .*make_quiet"):
        open_quiet(tmp_path / "quiet")


def test_a_folder_of_an_earlier_version_is_not_sampled_as_its_base(
    tiny_model_dir: Path, tmp_path: Path
):
    """transformers reads it as the base model, whose completions have no thoughts."""
    model, tokenizer = made(tiny_model_dir)
    old_save(model, tokenizer, tmp_path / "quiet")
    AutoModelForCausalLM.from_pretrained(tmp_path / "quiet")
    for name in ("transformers", "vllm"):
        if importlib.util.find_spec(name) is not None:
            with pytest.raises(ValueError, match="would be sampled without thoughts"):
                open_sampler(name, str(tmp_path / "quiet"))
    with pytest.raises(ValueError, match="would be sampled without thoughts"):
        open_scorer(str(tmp_path / "quiet"))


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_is_not_started_for_a_model_that_thinks(tiny_model_dir: Path, tmp_path: Path):
    model, tokenizer = made(tiny_model_dir)
    save_quiet(model, tokenizer, tmp_path / "quiet")
    with pytest.raises(ValueError, match="Quiet-STaR model, which vLLM cannot run"):
        open_sampler("vllm", str(tmp_path / "quiet"))


def test_end_tokens_of_the_base_survive_saving_opening_and_saving(
    tiny_model_dir: Path, tmp_path: Path
):
    model, tokenizer = made(tiny_model_dir)
    assert model.base.generation_config is not None
    ends = [3, 5]  # more than config.json names
    model.base.generation_config.eos_token_id = ends
    save_quiet(model, tokenizer, tmp_path / "first")
    opened, _ = open_quiet(tmp_path / "first")
    assert opened.base.generation_config is not None
    assert opened.base.generation_config.eos_token_id == ends
    save_quiet(opened, tokenizer, tmp_path / "second")
    again, _ = open_quiet(tmp_path / "second")
    export_base(tmp_path / "second", tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for one in (again.base, plain):
        assert one.generation_config is not None and one.generation_config.eos_token_id == ends

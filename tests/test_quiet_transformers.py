"""Quiet-STaR as a model of transformers, beside `QuietLM`, naive loops and transformers' own code."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import tensor
from old_quiet import old_save
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
    TrainingArguments,
    pipeline,
)

from selftaught.cli.command import main
from selftaught.quiet.checkpoint import make_quiet, open_quiet, save_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.gating import ThinkWhen, ThoughtParams
from selftaught.quiet.model import QuietLM
from selftaught.quiet.pretrained_config import QuietForCausalLMConfig
from selftaught.quiet.transformers_model import QuietForCausalLM

TEXT = "Q: What is 12 + 7?\nA:"


def made(folder: Path, **changes: Any) -> tuple[QuietLM, PreTrainedTokenizerBase]:
    """A model whose thoughts change predictions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = QuietConfig(thought_tokens=3, lookahead=2, initial_text="=", **changes)
    model = make_quiet(AutoModelForCausalLM.from_pretrained(folder), tokenizer, config)
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight), std=3)
    torch.nn.init.normal_(model.moved, std=0.05)
    return model.eval(), tokenizer


def auto(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, tokenizer = made(tiny_model_dir)
    folder = tmp_path_factory.mktemp("quiet") / "model"
    save_quiet(model, tokenizer, folder)
    return folder


@pytest.fixture
def thinking(saved: Path) -> QuietForCausalLM:
    return auto(saved)


@pytest.fixture
def tokenizer(saved: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(saved)


def left_padded(tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    two = tokenizer([TEXT, "Q: 1+1?"], return_tensors="pt", padding=True, padding_side="left")
    assert not bool(two.attention_mask.all())
    return two.input_ids, two.attention_mask


# --- folders -------------------------------------------------------------------------------------


def test_a_model_comes_back_to_the_bit(tiny_model_dir: Path, saved: Path, tmp_path: Path):
    model, _ = made(tiny_model_dir)
    first = auto(saved)
    assert type(first) is QuietForCausalLM and not first.training
    first.save_pretrained(tmp_path / "again")
    second = QuietForCausalLM.from_pretrained(tmp_path / "again")
    for opened in (first, second, QuietForCausalLM.from_quiet(open_quiet(saved)[0])):
        weights = opened.quiet.state_dict()
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(one, weights[name]) for name, one in model.state_dict().items())
        assert opened.quiet.quiet_config == model.quiet_config
        assert opened.quiet.marks.never == model.marks.never
        assert opened.device == torch.device("cpu") and opened.dtype == torch.float32
    config = AutoConfig.from_pretrained(saved)
    assert type(config) is QuietForCausalLMConfig
    assert config.get_text_config().vocab_size == len(tensor(model.base.lm_head.weight))
    again = AutoConfig.from_pretrained(tmp_path / "again").to_dict()
    assert again | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}
    assert {one.suffix for one in saved.iterdir()} == {".json", ".safetensors"}


def test_tied_weights_are_stored_once_and_stay_tied(tiny_model_dir: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    model = make_quiet(base, tokenizer, QuietConfig(thought_tokens=2, initial_text="="))
    save_quiet(model, tokenizer, tmp_path)
    opened = auto(tmp_path)
    assert opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    assert torch.equal(opened.get_input_embeddings().weight, tensor(base.lm_head.weight))


def test_dtype_is_that_of_the_files_or_as_asked(saved: Path, thinking: QuietForCausalLM):
    half = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert {one.dtype for one in half.parameters()} == {torch.bfloat16}
    ids = torch.tensor([[4, 5, 6, 7]])
    assert torch.isfinite(half(ids).logits).all()
    assert {one.dtype for one in thinking.parameters()} == {torch.float32}


def test_the_attention_of_the_base_is_chosen_as_in_every_model(saved: Path):
    ids = torch.tensor([[4, 5, 6, 7]])
    for attention in ("eager", "sdpa"):
        opened: Any = AutoModelForCausalLM.from_pretrained(saved, attn_implementation=attention)
        assert opened.quiet.base.config._attn_implementation == attention
        opened(ids)
        assert opened.quiet.base.config._attn_implementation == attention


def test_missing_heads_start_as_in_a_new_model(saved: Path, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "part")
    base = auto(saved).quiet.base
    weights = {f"quiet.base.{name}": one.contiguous() for name, one in base.state_dict().items()}
    save_file(weights, tmp_path / "part" / "model.safetensors", {"format": "pt"})
    opened = QuietForCausalLM.from_pretrained(tmp_path / "part")
    assert not opened.quiet.moved.any() and not tensor(opened.quiet.mixing.layers[-1].weight).any()
    with pytest.raises(ValueError, match=r"random: quiet\.mixing"):
        open_quiet(tmp_path / "part")


def test_a_folder_of_an_earlier_version_opens(tiny_model_dir: Path, saved: Path, tmp_path: Path):
    model, tokenizer = made(tiny_model_dir)
    old_save(model, tokenizer, tmp_path / "old")
    opened = QuietForCausalLM.from_pretrained(tmp_path / "old")
    same = auto(saved)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert torch.equal(opened(ids).logits, same(ids).logits)
    assert torch.equal(open_quiet(tmp_path / "old")[0].moved, same.quiet.moved)
    with pytest.raises(ValueError, match="earlier version, which opens with dtype only"):
        QuietForCausalLM.from_pretrained(tmp_path / "old", device_map="cpu")
    opened.save_pretrained(tmp_path / "new")
    again = auto(tmp_path / "new")
    assert torch.equal(again(ids).logits, same(ids).logits)


def run(code: str, *given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, given)], capture_output=True, text=True, check=False
    )


def test_without_this_package_the_folder_is_refused_and_says_what_to_install(saved: Path):
    opening = (
        "import sys; from transformers import AutoModelForCausalLM, AutoConfig\n"
        "assert 'selftaught' not in sys.modules\n"
        "AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = run(opening, saved)
    assert done.returncode == 1 and "model type `selftaught_quiet`" in done.stderr
    config = json.loads((saved / "config.json").read_text())
    assert "pip install selftaught" in config["how_to_open"]
    assert config["architectures"] == ["QuietForCausalLM"]


@pytest.mark.parametrize(
    "imports",
    [
        "import selftaught; from transformers import AutoModelForCausalLM as auto",
        "from transformers import AutoModelForCausalLM as auto; import selftaught",
        "import transformers, selftaught; auto = transformers.AutoModelForCausalLM",
        "import selftaught.quiet.checkpoint; from transformers import AutoModelForCausalLM as auto",
        "import selftaught.quiet.pretrained_config; from transformers import AutoModelForCausalLM as auto",
    ],
)
def test_importing_this_package_registers_the_model(imports: str, saved: Path):
    done = run(
        f"import sys; {imports}; print(type(auto.from_pretrained(sys.argv[1])).__name__)", saved
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "QuietForCausalLM"


def test_importing_this_package_imports_neither_torch_nor_transformers():
    code = "import sys, selftaught; print({'torch', 'transformers'} & set(sys.modules))"
    assert run(code).stdout.strip() == "set()"
    code = (
        "import sys, selftaught, transformers; transformers.AutoConfig, transformers.AutoTokenizer\n"
        "print([one for one in sys.modules if one.startswith('selftaught.quiet.')])"
    )
    assert run(code).stdout.strip() == "['selftaught.quiet.pretrained_config']"


def test_the_base_is_exported_alone(saved: Path, tmp_path: Path, capsys):
    assert main(["quiet", "export-base", str(saved), str(tmp_path / "base")]) == 0
    alone = auto(tmp_path / "base")
    inside = auto(saved).quiet.base
    assert type(alone) is type(inside) and alone.config.model_type != "selftaught_quiet"
    weights = inside.state_dict()
    assert weights.keys() == alone.state_dict().keys()
    assert all(torch.equal(one, weights[name]) for name, one in alone.state_dict().items())
    tokenizers = [AutoTokenizer.from_pretrained(one) for one in (saved, tmp_path / "base")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    capsys.readouterr()
    assert main(["quiet", "export-base", str(saved), str(tmp_path / "base")]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert main(["quiet", "export-base", str(tmp_path / "base"), str(tmp_path / "b2")]) == 2
    assert "Expected a folder of a Quiet-STaR model" in capsys.readouterr().err


def test_the_folder_is_sampled_with_thoughts_and_not_trained_as_a_plain_model(saved: Path):
    from selftaught.samplers import SamplingParams, open_sampler
    from selftaught.training.trainer import causal_lm

    params = SamplingParams(n=1, max_tokens=6, temperature=0)
    with open_sampler("transformers", str(saved)) as sampler:
        ((done,),) = sampler.sample([TEXT], params)
    model, tokenizer = open_quiet(saved)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    whole = model.eval().generate(ids, max_new_tokens=6)
    assert done.token_ids
    assert list(done.token_ids) == whole[0, ids.shape[1] :].tolist()[: len(done.token_ids)]
    with pytest.raises(ValueError, match=r"is a Quiet-STaR model, .* export-base"):
        causal_lm(str(saved))


# --- forward -------------------------------------------------------------------------------------


def states(model: QuietLM, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The last hidden state and the logits after a text, by the base model's own forward pass."""
    embedding = model.base.get_input_embeddings()(tokens[None])
    for token, moved in zip((model.marks.start, model.marks.end), model.moved, strict=True):
        embedding[0, tokens == token] += model.quiet_config.embedding_scale * moved
    hidden = model.base.model(inputs_embeds=embedding).last_hidden_state[0, -1]
    return hidden, model.base.lm_head(hidden)


@torch.no_grad()
def naive_logits(model: QuietLM, text: Tensor) -> Tensor:
    """Mixed log-probabilities after a text, after a greedy thought, from whole forward passes."""
    tokens, banned = text.tolist(), list(model.marks.never)
    thought = [*tokens, model.marks.start]
    for _ in range(model.quiet_config.thought_tokens):
        logits = states(model, torch.tensor(thought))[1].clone()
        logits[banned] = -torch.inf
        thought.append(int(logits.argmax()))
    without = states(model, torch.tensor(tokens))[0]
    after = states(model, torch.tensor([*thought, model.marks.end]))[0]
    weight = model.mixing(without, after)
    return model.base.lm_head((1 - weight) * without + weight * after).log_softmax(-1)


def test_logits_are_those_of_the_thinking_model(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids, mask = left_padded(tokenizer)
    out = thinking(ids, mask, labels=ids.masked_fill(mask == 0, -100))
    scored = score(thinking.quiet, ids, mask)
    found = out.logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    real = mask[:, :-1].bool()
    torch.testing.assert_close(found[real], scored.with_BT[real])
    assert (scored.with_BT - scored.without_BT)[real].abs().max() > 0.01
    torch.testing.assert_close(out.logits.exp().sum(-1), torch.ones(ids.shape))
    # Beside whole forward passes of each text and thought.
    for row in range(2):
        text = ids[row][mask[row].bool()]
        for end in (1, 4, len(text)):
            expected = naive_logits(thinking.quiet, text[:end])
            position = int((mask[row] == 0).sum()) + end - 1
            torch.testing.assert_close(out.logits[row, position], expected, rtol=1e-4, atol=1e-4)
    # The loss is the mean over the labels that are not ignored.
    counted = mask[:, 1:].bool()
    torch.testing.assert_close(out.loss, -found[counted].mean())


def test_right_padding_and_token_types_change_nothing(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids, mask = left_padded(tokenizer)
    short = ids[1][mask[1].bool()][None]
    alone = thinking(short).logits
    padded = torch.cat([short, torch.full((1, 3), int(tokenizer.pad_token_id or 0))], 1)  # type: ignore[arg-type]
    its_mask = torch.cat([torch.ones_like(short), torch.zeros(1, 3, dtype=torch.long)], 1)
    right = thinking(padded, its_mask, token_type_ids=torch.zeros_like(padded)).logits
    torch.testing.assert_close(right[:, : short.shape[1]], alone, rtol=1e-4, atol=1e-5)
    left = thinking(ids, mask).logits[1:, -short.shape[1] :]
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-5)


def test_a_cache_and_the_last_logits_alone_change_nothing(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids, mask = left_padded(tokenizer)
    whole = thinking(ids, mask).logits
    torch.testing.assert_close(
        thinking(ids, mask, logits_to_keep=3).logits, whole[:, -3:], rtol=1e-4, atol=1e-5
    )
    first = thinking(ids[:, :-4], mask[:, :-4], use_cache=True)
    rest = thinking(ids[:, -4:-1], mask[:, :-1], past_key_values=first.past_key_values)
    last = thinking(ids[:, -1:], mask, past_key_values=rest.past_key_values)
    parts = torch.cat([first.logits, rest.logits, last.logits], 1)
    torch.testing.assert_close(parts[1, mask[1].bool()], whole[1, mask[1].bool()], rtol=1e-4, atol=1e-5)  # fmt: skip
    torch.testing.assert_close(parts[0], whole[0], rtol=1e-4, atol=1e-5)
    assert first.past_key_values is last.past_key_values
    assert thinking(ids, mask, return_dict=False)[0].equal(whole)


def test_thinking_is_chosen_by_call_or_attribute(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    never = ThoughtParams(think_when=ThinkWhen("never"))
    base = thinking.quiet.base(ids).logits.log_softmax(-1)
    torch.testing.assert_close(thinking(ids, thinking=never).logits, base, rtol=1e-4, atol=1e-5)
    thinking.thinking = ThoughtParams(thoughts=4, temperature=1.0, seed=1)
    sampled = thinking(ids).logits
    assert torch.equal(thinking(ids).logits, sampled)
    assert not torch.equal(thinking(ids, thinking=ThoughtParams(4, 1.0, seed=2)).logits, sampled)
    with pytest.raises(ValueError, match="needs a model with a gate"):
        thinking(ids, thinking=ThoughtParams(think_when=ThinkWhen("gate")))


def test_the_training_loss_is_that_of_quiet_star(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    thinking.train()
    torch.manual_seed(3)
    ours = thinking(ids, labels=ids)
    torch.manual_seed(3)
    assert ours.loss.item() == thinking.quiet(ids, labels=ids).loss.item()
    assert ours.logits is None
    ours.loss.backward()
    assert thinking.quiet.moved.grad is not None
    with pytest.raises(ValueError, match="neither past_key_values nor thinking"):
        thinking(ids, labels=ids, thinking=ThoughtParams())
    with pytest.raises(ValueError, match="leave out logits_to_keep"):
        thinking.eval()(ids, labels=ids, logits_to_keep=2)
    with pytest.raises(ValueError, match="Expected the cache of a Quiet-STaR model"):
        thinking(ids, past_key_values=DynamicCache())


def test_transformers_trainer_trains_and_evaluates(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
):
    ids = tokenizer(TEXT).input_ids
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 4
    before = {name: one.clone() for name, one in thinking.state_dict().items()}
    expected = float(thinking(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none",
        learning_rate=1e-3, use_cpu=True, save_steps=1, gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(thinking, arguments, train_dataset=rows, eval_dataset=rows)  # type: ignore[arg-type]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    changed = {n for n, one in thinking.state_dict().items() if not torch.equal(one, before[n])}
    assert "quiet.moved" in changed and any("base.model.layers.0" in one for one in changed)
    opened = auto(tmp_path / "checkpoint-1")
    assert all(
        torch.equal(one, thinking.state_dict()[name]) for name, one in opened.state_dict().items()
    )


# --- generate ------------------------------------------------------------------------------------


def next_scores(model: QuietForCausalLM, ids: Tensor) -> Tensor:
    """Mixed log-probabilities of the next token, without the tokens that are never written."""
    scores = model(ids).logits[:, -1].clone()
    never = set(model.quiet.marks.never) - {model.generation_config.eos_token_id}
    scores[:, sorted(never)] = -torch.inf
    return scores


def test_greedy_text_is_that_of_a_loop_over_forward(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids, mask = left_padded(tokenizer)
    out = thinking.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for row in range(2):
        text = ids[row][mask[row].bool()][None]
        expected = text
        for _ in range(8):
            expected = torch.cat([expected, next_scores(thinking, expected).argmax(-1)[None]], 1)
            if expected[0, -1] == thinking.generation_config.eos_token_id:
                break
        new = expected[0, text.shape[1] :]
        assert torch.equal(out[row, ids.shape[1] :][: len(new)], new)
    given: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 8}
    quiet = thinking.quiet.generate(ids, **given, pad_token_id=tokenizer.pad_token_id)
    assert torch.equal(out, quiet)
    several: list[dict[str, Any]] = [
        {"use_cache": False}, {"token_type_ids": torch.zeros_like(ids)}, {"num_beams": 1}
    ]  # fmt: skip
    for more in several:
        again = thinking.generate(ids, do_sample=False, **given, **more)
        assert torch.equal(again, out)
    assert torch.equal(
        thinking.generate(ids, attention_mask=mask, max_length=ids.shape[1] + 8, do_sample=False),
        out,
    )


@pytest.mark.parametrize(
    ("options", "warpers"),
    [
        ({"temperature": 0.7, "top_k": 0}, [TemperatureLogitsWarper(0.7)]),
        ({"top_k": 3}, [TopKLogitsWarper(3)]),
        ({"top_k": 0, "top_p": 0.6}, [TopPLogitsWarper(0.6)]),
        ({"top_k": 0, "min_p": 0.2, "temperature": 1.5}, [TemperatureLogitsWarper(1.5), MinPLogitsWarper(0.2)]),
    ],
)  # fmt: skip
def test_sampling_options_apply_to_the_mixed_distribution(
    options: dict[str, Any],
    warpers: list[Any],
    thinking: QuietForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    chance = LogitsProcessorList(warpers)(ids, next_scores(thinking, ids)).softmax(-1)[0]  # type: ignore[arg-type]
    torch.manual_seed(5)
    out = thinking.generate(
        ids, do_sample=True, max_new_tokens=1, num_return_sequences=2000,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    assert out.sequences.shape == (2000, ids.shape[1] + 1)
    torch.testing.assert_close(out.scores[0][0].softmax(-1), chance, rtol=1e-4, atol=1e-5)
    share = torch.bincount(out.sequences[:, -1], minlength=len(chance)) / 2000
    assert (share - chance).abs().max() < 0.05
    assert not share[chance == 0].any()


def test_several_sequences_per_prompt_differ(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 8}
    torch.manual_seed(0)
    out = thinking.generate(ids, num_return_sequences=6, **sampling)
    assert len(out) == 6 and len(out.unique(dim=0)) > 1
    beams = thinking.generate(
        ids, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=4
    )
    uncached = thinking.generate(
        ids, num_beams=3, num_return_sequences=3, do_sample=False, max_new_tokens=4, use_cache=False
    )
    assert torch.equal(beams, uncached) and len(beams.unique(dim=0)) == 3


def test_stop_strings_end_the_text(thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    sampling: dict[str, Any] = {"do_sample": True, "max_new_tokens": 24}
    torch.manual_seed(1)
    free = thinking.generate(ids, **sampling)[0, ids.shape[1] :]
    pieces = [str(tokenizer.decode(one)) for one in free[:, None]]
    at = next(n for n, piece in enumerate(pieces) if n > 2 and piece.isalnum() and piece.isascii())
    at = next(n for n, piece in enumerate(pieces) if pieces[at] in piece)
    torch.manual_seed(1)
    out = thinking.generate(ids, stop_strings=[pieces[at]], tokenizer=tokenizer, **sampling)
    assert torch.equal(out[0, ids.shape[1] :], free[: at + 1])
    assert at + 1 < len(free)


def test_a_streamer_gets_the_same_text(
    thinking: QuietForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)  # type: ignore[arg-type]
    config = GenerationConfig(do_sample=False, max_new_tokens=8)
    out = thinking.generate(ids, generation_config=config, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(out[0, ids.shape[1] :])


def test_the_pipeline_writes_the_same_text(saved: Path, thinking: QuietForCausalLM, caplog):
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    out = thinking.generate(ids, do_sample=False, max_new_tokens=6)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    write: Any = pipeline("text-generation", model=str(saved))
    assert type(write.model) is QuietForCausalLM
    (found,) = write(TEXT, do_sample=False, max_new_tokens=6, return_full_text=False)
    assert found["generated_text"] == expected
    assert "is not supported" not in caplog.text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("guidance_scale", 1.5),
        ("penalty_alpha", 0.6),
        ("prompt_lookup_num_tokens", 3),
        ("num_beam_groups", 2),
        ("cache_implementation", "static"),
        ("prefill_chunk_size", 2),
        ("output_hidden_states", True),
        ("output_attentions", True),
        ("dola_layers", "low"),
        ("custom_generate", "somebody/something"),
        ("inputs_embeds", torch.zeros(1, 3, 16)),
        ("assistant_model", torch.nn.Linear(1, 1)),
        ("no_such_option", 1),
        ("position_ids", torch.zeros(1, 3, dtype=torch.long)),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(
    option: str, value: Any, thinking: QuietForCausalLM
):
    ids = torch.tensor([[4, 5, 6]])
    with pytest.raises(ValueError, match=option):
        thinking.generate(ids, max_new_tokens=2, **{option: value})
    if hasattr(GenerationConfig(), option):
        config = GenerationConfig(max_new_tokens=2)
        setattr(config, option, value)
        with pytest.raises(ValueError, match=option):
            thinking.generate(ids, generation_config=config)


def test_prompts_that_cannot_be_continued_are_refused(thinking: QuietForCausalLM):
    ids = torch.tensor([[4, 5, 6]])
    with pytest.raises(ValueError, match="padding on the left"):
        thinking.generate(ids, attention_mask=torch.tensor([[1, 1, 0]]), max_new_tokens=2)
    limit = thinking.quiet.context
    assert limit is not None
    with pytest.raises(ValueError, match=f"takes {limit}"):
        thinking.generate(ids, max_new_tokens=limit)
    with pytest.raises(ValueError, match=f"takes {limit}"):
        thinking(torch.full((1, limit), 4))
    with pytest.raises(ValueError, match="continuous batching"):
        thinking.generate_batch([[4, 5]])

"""A dry run refuses what the run refuses, in the same words, and the run before it samples anything."""

import json
import re
import time
from pathlib import Path

import pytest

from selftaught.cli import main

QUESTIONS = [{"question": f"What is {n} + 1?", "answer": n + 1} for n in range(40)]
COMMANDS = ("star", "rft", "vstar", "step-dpo", "compare")


@pytest.fixture(autouse=True)
def no_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run that begins to sample fail; a dry run samples only to measure rates, which it does
    not here."""
    from selftaught.methods import estimate
    from selftaught.samplers import Engine

    def sampled(self: Engine, model: str) -> None:
        raise AssertionError(f"{model} was opened to be sampled")

    monkeypatch.setattr(Engine, "of", sampled)
    monkeypatch.setattr(estimate, "why_not_measured", lambda run: "this is a test")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    return path


def arguments(command: str, model: Path, questions: Path, *more: str) -> list[str]:
    given = {one.split("=")[0] for one in more}
    usual = {"--model": str(model), "--task": "question_file", "--max_tokens": "8",
             "--task_options.path": str(questions), "--out": str(questions.parent / "run")}  # fmt: skip
    return [command, *(word for name, value in usual.items() if name not in given for word in (name, value)),
            *more]  # fmt: skip


def held_out(folder: Path) -> list[str]:
    """The options of files for validation and test, so that all other questions are for training."""
    given = []
    for split in ("validation", "test"):
        path = folder / f"{split}.jsonl"
        rows = [{"question": f"{split} {n}?", "answer": n} for n in range(4)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given += [f"--task_options.{split}", str(path)]
    return given


def refused(command: str, model: Path, questions: Path, capsys, *more: str) -> str:
    """What both the dry run and the run say of options that they refuse."""
    message_text = []
    for dry in (["--dry-run"], []):
        assert main([*arguments(command, model, questions, *more), *dry]) == 2
        message_text.append(capsys.readouterr().err)
        assert not (questions.parent / "run" / "config.yaml").exists()
    assert message_text[0] == message_text[1]
    assert message_text[0].count("\n") <= 3 and "Traceback" not in message_text[0]
    return message_text[0]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--sampler", "vlllm"], "No sampler is called 'vlllm'"),
        (["--sampler", "openai", "--base-url", "http://localhost:9/v1"], "`sample` and `evaluate` only"),
        (["--sampler_options.foo", "1"], "sampler 'transformers' has no option 'foo'"),
        (["--sampler_options.batch_size", "many"], "'batch_size' of the sampler 'transformers' must be int"),
        (["--sampler_options.batch_size", "0"], "batch_size must be at least 1; got 0"),
        (["--sampler_options.batch_size", "true"], "must be int or null; got True"),
        (["--sampler_options.device", "no_such"], "device must be auto, cpu, or a device"),
        (["--sampler_options.dtype", "int3"], "must be 'auto' or 'float32' or 'bfloat16'"),
        (["--training.foo", "1"], "unexpected keyword argument 'foo'"),
        (["--training.output_dir", "/x"], "'output_dir' cannot be given: .* --out"),
        (["--training.eval_strategy", "steps"], "no evaluation data"),
        (["--training.weight_decay", "much"], "'weight_decay' of TRL's SFTConfig must be float"),
        (["--training.lr_scheduler_type", "foo"], "foo is not a valid SchedulerType|Give --lr-scheduler-type"),
        (["--training.report_to", "no_such"], "report_to must be one of none"),
        (["--per_device_train_batch_size", "0"], 'per_device_train_batch_size must be at least 1, or "auto"; got 0'),
        (["--training.per_device_train_batch_size", "-2"], "Give --per-device-train-batch-size instead"),
        (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps must be at least 1"),
        (["--max_length", "1"], "max_length must be at least 3"),
        (["--max_length", "6"], r"max_length must be long enough .* each of the \d+ training prompts"),
        (["--warmup_steps", "-1"], "warmup_steps must be 0 or more"),
        (["--save_steps", "0"], "save_steps must be above 0"),
        (["--seed", "-7"], "seed must be from 0"),
        (["--top_p", "0"], "top_p must be above 0"),
        (["--use_peft", "--lora_r", "0"], "lora_r 0"),
        (["--use_peft", "--lora_target_modules", "no_such"], "Target modules .*no_such"),
        (["--launcher", "torchrun", "--num_processes", "7", "--train_batch_size", "64"], "7 processes cannot share equally"),
        (["--max_tokens", "600"], r"The prompt of 'train-\d+' has \d+ tokens; with max_tokens=600"),
        (["--prompt", "chat"], "Expected a model with a chat template"),
        (["--model", "/no/such/model"], "There is no model folder /no/such/model"),
        (["--task_options.template", "{question!r}"], "template: expected the name of a column"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_dry_run_and_the_run_refuse_the_same(
    command, more, message, tiny_model_dir, questions, capsys
):
    assert re.search(message, refused(command, tiny_model_dir, questions, capsys, *more))


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("star", ["--num_train_epochs", "0"], "num_train_epochs must be above 0"),
        ("star", ["--n", "2"], "n=2 with temperature 0"),
        ("rft", ["--generator", "/no/such/model"], "There is no model folder"),
        ("rft", ["--pool", "/no/such/rollouts.jsonl"], "No such file"),
        ("vstar", ["--verifier_training.foo", "1"], "TRL's DPOConfig .*'foo'"),
        ("vstar", ["--verifier_learning_rate", "0"], "learning_rate must be above 0"),
        ("vstar", ["--beta", "0"], "beta must be above 0"),
        ("step-dpo", ["--dpo_training.output_dir", "/x"], "'output_dir' cannot be given"),
        ("step-dpo", ["--sizes", "1000"], "number of training problems; got 1000"),
        ("step-dpo", ["--dpo_max_steps", "0"], "max_steps must be at least 1"),
        ("compare", ["--star.no_such", "1"], "The method 'star' has no option 'no_such'"),
        ("compare", ["--star.iterations", "many"], "'iterations' of the method 'star' must be int"),
        ("compare", ["--vstar.verifier_training.foo", "1"], "TRL's DPOConfig .*'foo'"),
        ("compare", ["--rft.max_length", "6"], "max_length must be long enough"),
    ],
)
def test_what_only_one_method_has_is_checked_too(
    command, more, message, tiny_model_dir, questions, capsys
):
    assert re.search(message, refused(command, tiny_model_dir, questions, capsys, *more))


def test_a_package_that_is_not_installed_is_named(tiny_model_dir, questions, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "vllm" else found(name, *a)
    )
    message_text = refused("star", tiny_model_dir, questions, capsys, "--sampler", "vllm")
    assert 'pip install "selftaught[vllm]"' in message_text


def test_an_engine_argument_that_vllm_does_not_have_is_refused(tiny_model_dir, questions, capsys):
    pytest.importorskip("vllm")
    more = ["--sampler", "vllm", "--sampler_options.gpu_memory_utilisation", "0.5"]
    message_text = refused("star", tiny_model_dir, questions, capsys, *more)
    assert "no option 'gpu_memory_utilisation'" in message_text
    assert "Did you mean 'gpu_memory_utilization'?" in message_text


def test_ray_is_checked_with_the_sampler_in_it():
    pytest.importorskip("ray")
    from selftaught.samplers import check_sampler

    for options, message in [
        ({"workers": 0}, "workers must be at least 1"),
        ({"workers": "two"}, "'workers' of the sampler 'ray' must be int"),
        ({"engine": "openai"}, "engine must be .* got engine='openai'"),
        ({"no_such": 1}, "'transformers' has no option 'no_such'"),
        ({"batch_size": "many"}, "'batch_size' of the sampler 'transformers'"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_sampler("ray", options)
    check_sampler("ray", {"workers": 3, "gpus": 0.5, "device": "cuda", "batch_size": 8})


def test_a_model_that_writes_no_text_is_refused(tmp_path, tiny_model_dir, questions, capsys):
    import shutil

    folder = shutil.copytree(tiny_model_dir, tmp_path / "encoder")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    message_text = refused("star", folder, questions, capsys)
    assert "Expected a causal language model" in message_text and "T5Config" in message_text


@pytest.mark.parametrize("where", [0, 20, 39])
@pytest.mark.parametrize("hint", [False, True])
def test_one_prompt_among_all_that_does_not_fit_is_found(
    where, hint, tmp_path, tiny_model_dir, capsys
):
    # 512 tokens are the model's context. The longest gold answer only stands in hinted prompts.
    rows = [dict(row) for row in QUESTIONS]
    long = "1" * 600
    rows[where] = {"question": "What?", "answer": long} if hint else {"question": long, "answer": 1}
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = [*held_out(tmp_path), "--task_options.kind", "text"]
    message_text = refused("star", tiny_model_dir, path, capsys, *given)
    assert (
        f"The prompt of 'train-{where}' has" in message_text
        and "the 512 tokens in the context" in message_text
    )


def test_some_prompts_longer_than_max_length_are_counted_and_all_are_refused(
    tmp_path, tiny_model_dir, capsys
):
    from selftaught.samplers.tokens import load_tokenizer

    rows = [
        {"question": f"{n}?" + " and so on" * (10 * (n % 4 == 0)), "answer": n} for n in range(40)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given = held_out(tmp_path)
    tokenizer = load_tokenizer(str(tiny_model_dir))
    lengths = [len(tokenizer(f"Q: {row['question']}\nA:").input_ids) for row in rows]
    for command in ("star", "rft"):
        words = arguments(command, tiny_model_dir, path, *given, "--max_length", "30", "--dry-run")
        assert main(words) == 0
        count = sum(length + 2 > 30 for length in lengths)
        assert count == 10
        assert f"{count} of 40 training prompts leave no tokens" in capsys.readouterr().out


def test_settings_of_a_run_that_is_there_are_compared(tiny_model_dir, questions, capsys):
    out = questions.parent / "run"
    words = arguments("star", tiny_model_dir, questions, "--dry-run")
    out.mkdir()
    assert main(words) == 0
    (out / "config.yaml").write_text("seed: 5\n")
    assert main(words) == 2
    assert "contains a run with other settings" in capsys.readouterr().err
    (out / "config.yaml").unlink()
    out.rmdir()
    out.write_text("a file")
    assert main(words) == 2
    assert "is not a folder" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_what_can_run_is_planned_and_nothing_is_written(command, tiny_model_dir, questions, capsys):
    more = [
        "--training.weight_decay",
        "0.1",
        "--use_peft",
        "--lora_target_modules",
        "q_proj,v_proj",
    ]
    assert main([*arguments(command, tiny_model_dir, questions, *more), "--dry-run"]) == 0
    assert "First prompt" in capsys.readouterr().out
    assert not (questions.parent / "run").exists()


def test_escape_sequences_of_a_question_do_not_reach_the_terminal(tmp_path, tiny_model_dir, capsys):
    hostile = "\x1b[31mRED\x1b]0;PWN\x07 \u202e \u2066 {{7*7}} {0} %s"
    rows = [{"question": f"{n}+{n} {hostile}", "answer": 2 * n} for n in range(12)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for command in COMMANDS:
        assert main([*arguments(command, tiny_model_dir, path), "--dry-run"]) == 0
        message_text = capsys.readouterr().out
        assert "\\x1b[31mRED\\x1b]0;PWN\\x07 [U+202E] [U+2066] {{7*7}} {0} %s" in message_text
        assert not {"\x1b", "\x07", "\u202e", "\u2066"} & set(message_text)
    path.write_text('{"question": "a", "answer": "\x1b[31m\u202e"}\n'.replace("\x1b", "\\u001b"))
    assert main(arguments("star", tiny_model_dir, path)) == 2
    message_text = capsys.readouterr().err
    assert not {"\x1b", "\u202e"} & set(message_text)


def test_fifty_thousand_prompts_are_checked_within_seconds(tiny_model_dir):
    from selftaught.samplers import check_prompts, count_too_long

    prompts = [
        (str(n), f"Q: What is {n} + {n}? Tom asks again and again.\nA:") for n in range(50_000)
    ]
    began = time.perf_counter()
    check_prompts(str(tiny_model_dir), prompts, 64)
    assert count_too_long(str(tiny_model_dir), (prompt for _, prompt in prompts), 1024) == 0
    assert time.perf_counter() - began < 10


def test_a_prompt_that_is_said_to_fit_unread_fits(tiny_model_dir):
    import random

    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from selftaught.samplers.tokens import _surely_fits, load_tokenizer

    # As SentencePiece with byte fallback writes text that it has no pieces for.
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    fallback = Tokenizer(models.BPE(vocab=bytes_, merges=[], byte_fallback=True))
    fallback.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.Prepend("▁")])  # type: ignore[assignment]
    fallback.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizers = [
        load_tokenizer(str(tiny_model_dir)),
        PreTrainedTokenizerFast(tokenizer_object=fallback),
    ]
    rng = random.Random(0)
    for _ in range(300):
        letters = rng.choice(["aZ9 .\n", "éç½ﷺ", "数学 x", "👩\u200d👧 a"])
        text = "".join(rng.choice(letters) for _ in range(rng.randrange(1, 60)))
        for tokenizer in tokenizers:
            count = len(tokenizer(text).input_ids)
            # The fallback has no piece for the mark of a word either, which costs three bytes a space.
            spaces = 2 * (text.count(" ") + 1) if tokenizer is tokenizers[1] else 0
            assert not _surely_fits(text, count - spaces - 1), (text, count)

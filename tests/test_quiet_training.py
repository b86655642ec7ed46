"""Training to think, on files: exact continuation, LoRA, two processes, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from narrowed import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from selftaught.quiet.checkpoint import make_quiet, open_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.model import QuietLM
from selftaught.quiet.outputs import QuietOutput
from selftaught.quiet.spans import Spans, consecutive, read_texts, spans
from selftaught.quiet.trainer import signals
from selftaught.quiet.training import check_run, quiet_arguments, train_quiet, with_lora

TEXTS = [f"Q: What is {a} + {b}?\nA: {a + b}. And {b} + {a}?\nA: {a + b}." for a in range(4) for b in range(5)]  # fmt: skip


@pytest.fixture(scope="module")
def tied_model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one matrix for what goes in and what comes out."""
    folder = tmp_path_factory.mktemp("tied")
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, tie_word_embeddings=True)
    base.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    return folder


def thinking(folder: Path, **changes: Any) -> tuple[QuietLM, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    sizes: dict = {"thought_tokens": 2, "lookahead": 2, "initial_text": "A", "embedding_scale": 1.0,
                   "reinforce_weight": 1.0}  # fmt: skip
    return make_quiet(base, tokenizer, QuietConfig(**(sizes | changes))), tokenizer


def train(
    folder: Path, out: Path, *, stop_after: int | None = None, lora: bool = False, **options: Any
) -> list:
    model, tokenizer = thinking(folder)
    peft_model = with_lora(model, r=2, alpha=4, target_modules="all-linear") if lora else None
    given: dict = {"max_steps": 6, "learning_rate": 1e-3, "per_device_train_batch_size": 2,
                   "save_steps": 2, "use_cpu": True, "warmup_steps": 1}  # fmt: skip
    arguments = quiet_arguments(out / "checkpoints", **(given | options))
    texts = spans(TEXTS, tokenizer, length=24, least=4)

    def progress(steps: int) -> None:
        seen.append(steps)
        if stop_after is not None and len(seen) >= stop_after:
            raise KeyboardInterrupt

    seen: list[int] = []
    return train_quiet(
        model, tokenizer, texts, arguments, out=out, progress=progress, peft_model=peft_model
    )


def weights(out: Path) -> dict[str, torch.Tensor]:
    return open_quiet(out / "model")[0].state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"model": "tiny"},
        {
            "model": "tied",
            "max_steps": 14,
            "stop_after": 13,
        },  # over the end of an epoch of ten steps
        {"model": "tied", "lora": True},
        {"model": "tiny", "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    ],
    ids=["plain", "tied, two epochs", "adapter", "accumulated"],
)
def test_training_continues_to_the_same_weights(
    how: dict, tiny_model_dir: Path, tied_model_dir: Path, tmp_path: Path
):
    folder = tiny_model_dir if how["model"] == "tiny" else tied_model_dir
    options: dict[str, Any] = {
        name: value for name, value in how.items() if name not in ("model", "stop_after")
    }
    whole = train(folder, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(folder, tmp_path / "parts", stop_after=how.get("stop_after", 5), **options)
    parts = train(folder, tmp_path / "parts", **options)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [row["nll_with"] for row in whole] == [row["nll_with"] for row in parts]
    assert whole[0]["step"] == 1
    assert len(whole) == options.get("max_steps", 6)
    for name in ("reward", "positive_advantages", "mixing_weight", "thought_entropy", "tokens_per_second",
                 "gain_decile_10", "peak_memory_gb"):  # fmt: skip
        assert name in whole[0]
    assert train(folder, tmp_path / "whole", **options) == whole  # done already
    with pytest.raises(ValueError, match="other options"):
        train(folder, tmp_path / "whole", learning_rate=1e-4, **options)
    assert AutoModelForCausalLM.from_pretrained(
        tmp_path / "whole" / "model"
    ).config.base_config.use_cache


@pytest.mark.slow
def test_a_kill_before_the_model_is_saved_costs_no_further_step(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch
):
    whole = train(tiny_model_dir, tmp_path / "whole")
    monkeypatch.setattr("selftaught.quiet.training.save_quiet", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny_model_dir, tmp_path / "parts")
    monkeypatch.undo()
    assert [row["nll_with"] for row in train(tiny_model_dir, tmp_path / "parts")] == [
        row["nll_with"] for row in whole
    ]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_may_change_while_nothing_is_trained(tiny_model_dir: Path, tmp_path: Path):
    (tmp_path / "made_from.json").write_text('{"made_from": "another"}')
    assert not check_run(tmp_path, "this")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match="another model, other texts or other options"):
        check_run(tmp_path, "this")
    (tmp_path / "made_from.json").unlink()
    with pytest.raises(ValueError, match="another model"):
        check_run(tmp_path, "this")


@pytest.mark.slow
def test_training_teaches(tiny_model_dir: Path, tmp_path: Path):
    log = train(tiny_model_dir, tmp_path / "run", max_steps=30, learning_rate=3e-3)
    assert log[-1]["nll_with"] < log[0]["nll_with"] - 1


@pytest.mark.slow
def test_an_adapter_and_the_new_tokens_learn_and_are_merged(tiny_model_dir: Path, tmp_path: Path):
    model, tokenizer = thinking(tiny_model_dir)
    before = {name: one.clone() for name, one in model.base.state_dict().items()}
    peft_model = with_lora(model, r=2, alpha=4, target_modules="all-linear")
    arguments = quiet_arguments(
        tmp_path / "checkpoints", max_steps=3, learning_rate=1e-2, use_cpu=True, warmup_steps=0,
        per_device_train_batch_size=2,
    )  # fmt: skip
    texts = spans(TEXTS, tokenizer, length=24, least=4)
    train_quiet(model, tokenizer, texts, arguments, out=tmp_path, peft_model=peft_model)
    after = weights(tmp_path)
    changed = {n for n in before if not torch.equal(before[n], after[f"base.{n}"])}
    assert any("q_proj" in name for name in changed)
    assert not any("norm" in name for name in changed)
    assert "model.embed_tokens.weight" not in changed
    assert after["moved"].any(1).all()


def test_the_heads_learn_at_a_rate_of_their_own(tiny_model_dir: Path, tmp_path: Path):
    """The first step of Adam is the learning rate, whatever the gradient."""
    model, tokenizer = thinking(tiny_model_dir, head_rate=7.0)
    before = {name: one.clone() for name, one in model.state_dict().items()}
    arguments = quiet_arguments(
        tmp_path / "checkpoints", max_steps=1, learning_rate=1e-3, use_cpu=True, warmup_steps=0,
        weight_decay=0.0, max_grad_norm=0.0,
    )  # fmt: skip
    texts = spans(TEXTS, tokenizer, length=24, least=4)
    train_quiet(model, tokenizer, texts, arguments, out=tmp_path)
    after = weights(tmp_path)
    for name, rate in (("mixing.layers.4.weight", 7e-3), ("base.model.norm.weight", 1e-3)):
        moved = (after[name] - before[name]).abs()
        assert moved.max().item() == pytest.approx(rate, rel=0.02)


def test_a_loss_that_is_no_number_names_step_batch_and_checkpoint(
    tiny_model_dir: Path, tmp_path: Path
):
    model, tokenizer = thinking(tiny_model_dir)
    with torch.no_grad():
        tensor(model.mixing.layers[0].weight).fill_(float("nan"))
    arguments = quiet_arguments(tmp_path / "checkpoints", max_steps=1, use_cpu=True)
    texts = spans(TEXTS, tokenizer, length=24, least=4)
    message_text = r"The loss is nan at step 1, in the batch of texts \[.*There is no checkpoint yet; lower learning_rate"
    with pytest.raises(ValueError, match=message_text):
        train_quiet(model, tokenizer, texts, arguments, out=tmp_path)


def test_options_that_cannot_be_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="use bf16"):
        quiet_arguments(tmp_path, fp16=True)
    with pytest.raises(ValueError, match="TrainingArguments refused"):
        quiet_arguments(tmp_path, learning_rates=1.0)


PARALLEL = """
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_quiet_training import gradients_of_two_texts
torch.set_num_threads(1)
gradients_of_two_texts(Path({model!r}), Path({out!r}))
"""


def gradients_of_two_texts(folder: Path, out: Path) -> None:
    """The gradients of a batch of two texts with given thoughts, one text in each process where there are two."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    model, tokenizer = thinking(folder)
    ids = torch.tensor([tokenizer(one).input_ids[:24] for one in TEXTS[:2]])
    thoughts = torch.randint(
        5, 200, (2, 2, ids.shape[1], 2), generator=torch.Generator().manual_seed(0)
    )
    learning: torch.nn.Module = model.train()
    if world > 1:
        torch.distributed.init_process_group("gloo")
        learning = torch.nn.parallel.DistributedDataParallel(model)
        ids, thoughts = ids[rank : rank + 1], thoughts[rank : rank + 1]
    learning(ids, thoughts=thoughts).loss.backward()
    if rank == 0:
        torch.save({name: one.grad for name, one in model.named_parameters()}, out)
    if world > 1:  # or a thread of gloo may outlive the interpreter, which aborts the process
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tiny_model_dir: Path, tmp_path: Path):
    found = []
    for name, launch in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]),
    ):  # fmt: skip
        script, out = tmp_path / f"{name}.py", tmp_path / f"{name}.pt"
        script.write_text(
            PARALLEL.format(
                tests=str(Path(__file__).parent), model=str(tiny_model_dir), out=str(out)
            )
        )
        done = subprocess.run([*launch, str(script)], capture_output=True, text=True, timeout=300,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    one, two = found
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.slow
def test_the_command_trains_in_two_processes(tiny_model_dir: Path, tmp_path: Path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m",
              "selftaught.cli", "quiet", "train", "--model", str(tiny_model_dir), "--text", str(path), "--out",
              str(tmp_path / "run"), "--length", "24", "--max-steps", "3", "--quiet.thought_tokens", "2",
              "--quiet.initial_text", "A", "--training.use_cpu", "true"]  # fmt: skip
    done = subprocess.run(
        launch,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Page ") == 1
    assert len(json.loads((tmp_path / "run" / "log.json").read_text())) == 3
    assert (tmp_path / "run" / "report.html").exists()


# --- texts ---------------------------------------------------------------------------------------


def test_texts_come_from_jsonl_plain_files_folders_and_parquet(tmp_path: Path):
    from datasets import Dataset

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_text("three\nfour\n")
    Dataset.from_dict({"body": ["five", "six"]}).to_parquet(str(tmp_path / "c.parquet"))
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == ["one", "two"]
    assert list(read_texts(str(tmp_path / "b.txt"))) == ["three\nfour\n"]
    assert list(read_texts(str(tmp_path / "c.parquet"), column="body")) == ["five", "six"]
    assert list(read_texts(str(tmp_path / "a.jsonl"), limit=1)) == ["one"]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("y.txt", "x.txt"):
        (folder / name).write_text(name)
    assert list(read_texts(str(folder))) == ["x.txt", "y.txt"]


@pytest.mark.parametrize(
    ("content", "message_text"),
    [
        ('{"body": "one"}\n', r"row 1: expected a text in the column 'text', got NoneType. Columns of this row: body"),
        ('{"text": "one"}\n{"text": 3}\n', r"row 2: expected a text.*got int"),
        ('{"text": "one"\n', r"line 1: not JSON"),
    ],
)  # fmt: skip
def test_rows_without_a_text_are_named(content: str, message_text: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message_text):
        list(read_texts(str(path)))


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"There is no file .*missing\.jsonl"):
        list(read_texts(str(tmp_path / "missing.jsonl")))


def test_spans_are_other_ones_every_epoch_and_the_same_for_a_seed():
    texts = [list(range(100)), list(range(5))]
    one = Spans(texts, 16, seed=1)
    assert len(one) == 7 + 1
    first = [one[at]["input_ids"] for at in range(len(one))]
    assert all(row == list(range(row[0], row[0] + len(row))) for row in first)
    assert [len(row) for row in first] == [16] * 7 + [5]
    again = [Spans(texts, 16, seed=1)[at]["input_ids"] for at in range(8)]
    assert again == first
    one.epoch = 1
    assert [one[at]["input_ids"] for at in range(8)] != first
    cut = consecutive(Spans(texts, 16))
    assert [one for text, ids in cut if text == 0 for one in ids] == list(range(100))


def test_short_texts_are_skipped_and_counted(tiny_model_dir: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert spans(["", "Q", "Q: What is 12 + 7?"], tokenizer, length=8, least=4).skipped == 2
    with pytest.raises(ValueError, match=r"at least 4 tokens.*got 2 texts, none of them as long"):
        spans(["", "Q"], tokenizer, length=8, least=4)


@pytest.mark.parametrize(
    ("name", "content", "message_text"),
    [
        ("a.txt", b"ab\xff\xfe", r"UTF-8 in .*a\.txt.*byte 2 is not UTF-8"),
        ("a.bin", b"ab\0cd", r"UTF-8 in .*a\.bin.*character 2 is NUL"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "\xe9"}\n',
            r"a\.jsonl.*line 2, byte 10 is not UTF-8",
        ),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet could not be read as Parquet"),
    ],
)
def test_files_that_are_no_text_are_refused(
    name: str, content: bytes, message_text: str, tmp_path: Path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message_text):
        list(read_texts(str(tmp_path / name)))


def test_a_folder_without_texts_and_a_limit_of_none_are_refused(tmp_path: Path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="found none"):
        list(read_texts(str(tmp_path)))
    with pytest.raises(ValueError, match="limit must be at least 1; got 0"):
        list(read_texts(str(tmp_path), limit=0))


def test_training_without_any_advantage_is_refused(tiny_model_dir: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    from selftaught.quiet.checkpoint import make_quiet
    from selftaught.quiet.config import QuietConfig
    from selftaught.quiet.training import quiet_arguments, train_quiet

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    model = make_quiet(base, tokenizer, QuietConfig(thoughts=1, thought_tokens=2))
    arguments = quiet_arguments(tmp_path / "c", max_steps=1, use_cpu=True)
    with pytest.raises(ValueError, match=r"thoughts=1.*Set thoughts=2, or baseline='mean_log'"):
        train_quiet(model, tokenizer, Spans([[1] * 9], 8), arguments, out=tmp_path)


def test_signals_are_the_differences_between_thoughts():
    """Against loops over positions and thoughts; padding does not count."""
    texts, thoughts, positions, lookahead = 2, 3, 4, 2
    generator = torch.Generator().manual_seed(0)
    log_prob = -torch.rand(texts, thoughts, positions, lookahead, generator=generator)
    tokens = torch.randint(2, (texts, thoughts, positions, 2), generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    out = QuietOutput(
        log_prob_with_BNJK=log_prob, thought_BNJS=tokens, position_BJ=torch.arange(4)[None]
    )
    spread: list[float] = []
    distinct: list[float] = []
    for text in range(texts):
        for position in range(positions):
            if not mask[text, position + 1]:
                continue
            rewards = [float(log_prob[text, one, position].sum()) for one in range(thoughts)]
            mean = sum(rewards) / thoughts
            spread.append((sum((one - mean) ** 2 for one in rewards) / thoughts) ** 0.5)
            different = {tuple(tokens[text, one, position].tolist()) for one in range(thoughts)}
            distinct.append(len(different) / thoughts)
    found = signals(out, {"attention_mask": mask})
    assert found["reward_spread"] == pytest.approx(sum(spread) / len(spread), rel=1e-6)
    assert found["distinct_thoughts"] == pytest.approx(sum(distinct) / len(distinct), rel=1e-6)
    one = QuietOutput(
        log_prob_with_BNJK=log_prob[:, :1], thought_BNJS=tokens[:, :1],
        position_BJ=torch.arange(4)[None],
    )  # fmt: skip
    assert signals(one, {"attention_mask": mask}) == {}


@pytest.mark.parametrize(("head_rate", "warned"), [(1e-6, True), (300.0, False)])
def test_a_training_without_signal_says_so(
    head_rate: float, warned: bool, tiny_model_dir: Path, tmp_path: Path, monkeypatch, caplog
):
    """A mixing head that does not learn leaves every thought with weight 0."""
    monkeypatch.setattr("selftaught.quiet.trainer.WARN_AFTER", 4)
    model, tokenizer = thinking(tiny_model_dir, head_rate=head_rate)
    arguments = quiet_arguments(
        tmp_path / "checkpoints", max_steps=6, learning_rate=1e-3, per_device_train_batch_size=2,
        use_cpu=True, warmup_steps=1,
    )  # fmt: skip
    with caplog.at_level("WARNING", logger="selftaught.quiet.trainer"):
        log = train_quiet(
            model, tokenizer, spans(TEXTS, tokenizer, length=24, least=4), arguments, out=tmp_path
        )
    messages = [one.getMessage() for one in caplog.records if "no signal" in one.getMessage()]
    assert len(messages) == warned, [row.get("reward_spread") for row in log]
    assert 0 < log[-1]["distinct_thoughts"] <= 1

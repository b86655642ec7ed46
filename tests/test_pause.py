"""Pause tokens, against the equations of Goyal et al. 2024 (arXiv:2310.02226)."""

import json
import random
from pathlib import Path

import pytest
from narrowed import tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.cli import main
from selftaught.methods.pause import (
    IGNORED,
    PAUSE,
    VARIANTS,
    add_pause_token,
    append_pauses,
    insert_pauses,
    pause_rows,
    paused,
    with_pauses,
)
from selftaught.prompts import PromptStyle, chat
from selftaught.records import Example, Problem


def test_inserted_pauses_keep_the_text_and_lose_only_their_own_prediction():
    ids = list(range(100, 160))
    mixed, labels = insert_pauses(ids, 7, 0.1, random.Random(0))
    assert len(mixed) == 60  # trimmed back to the old length (Section 4.1)
    assert mixed.count(7) in (5, 6)  # 10% of the sequence; one may be trimmed away
    assert [one for one in mixed if one != 7] == ids[: 60 - mixed.count(7)]
    assert mixed[0] == 100
    # S_ignore holds the places whose next token is a pause; labels are shifted by the model.
    assert [place for place, label in enumerate(labels) if label == IGNORED] == [
        place for place, one in enumerate(mixed) if one == 7
    ]
    assert all(label in (IGNORED, one) for label, one in zip(labels, mixed, strict=True))


def test_places_are_uniform():
    counts = [0] * 11
    for seed in range(4000):
        mixed, _ = insert_pauses(list(range(100, 110)), 7, 0.1, random.Random(seed))
        counts[mixed.index(7)] += 1
    assert counts[0] == counts[10] == 0
    # Nine places at 444 each; five standard deviations of a count of 4,000 draws.
    assert all(abs(count - 4000 / 9) < 5 * (4000 * 8 / 81) ** 0.5 for count in counts[1:10])


@pytest.mark.parametrize("ids", [[], [5]])
def test_texts_without_space_stay_as_they_are(ids: list[int]):
    assert insert_pauses(ids, 7, 0.5, random.Random(0)) == (ids, ids)


def test_appended_pauses_are_between_prefix_and_target_and_the_target_is_learned():
    ids, labels = append_pauses([1, 2], [3, 4], 7, 3)
    assert ids == [1, 2, 7, 7, 7, 3, 4]
    assert labels == [IGNORED] * 5 + [3, 4]


def test_the_four_variants_have_the_papers_names():
    assert {name: sum(where) for name, where in VARIANTS.items()} == {
        "StdPT_StdFT": 0, "StdPT_PauseFT": 1, "PausePT_StdFT": 1, "PausePT_PauseFT": 2,
    }  # fmt: skip


def test_prompts_and_examples_end_in_pauses():
    style = PromptStyle("bare")
    problem = Problem(id="1", question="2+2", gold="4")
    assert paused(style, 2)(problem) == f"Q: 2+2\nA:{PAUSE}{PAUSE}"
    assert paused(style, 3, ".")(problem) == "Q: 2+2\nA:..."
    assert with_pauses([Example("Q", "A")], 2) == [Example(f"Q{PAUSE}{PAUSE}", "A")]
    with pytest.raises(ValueError, match="few_shot or bare"):
        paused(chat(style), 1)
    with pytest.raises(ValueError, match="messages"):
        with_pauses([Example([{"role": "user", "content": "Q"}], "A")], 1)


def test_a_model_gets_the_token_once(tiny_model_dir: Path, tmp_path: Path):
    add_pause_token(str(tiny_model_dir), tmp_path / "one")
    add_pause_token(str(tmp_path / "one"), tmp_path / "two")
    before = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "two")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    number = tokenizer.convert_tokens_to_ids(PAUSE)
    old = tensor(before.get_input_embeddings().weight)
    matrix = tensor(after.get_input_embeddings().weight)
    assert len(matrix) == max(len(old), len(tokenizer))
    assert tokenizer(f"Q{PAUSE}{PAUSE}A").input_ids.count(number) == 2
    assert matrix[number].tolist() == pytest.approx(old[:number].mean(0).tolist(), abs=1e-6)
    rows = pause_rows(["Q: What is 12 + 7?"] * 3, tokenizer, length=8, share=0.25, seed=0)
    assert sum(row["input_ids"].count(number) for row in rows) > 3
    with pytest.raises(ValueError, match="add_pause_token"):
        pause_rows(
            ["Q"], AutoTokenizer.from_pretrained(tiny_model_dir), length=8, share=0.1, seed=0
        )


@pytest.mark.slow
def test_the_command_line_trains_both_ways_and_measures(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data, text = tmp_path / "data.jsonl", tmp_path / "text.jsonl"
    data.write_text(
        "".join(
            json.dumps({"prompt": f"{a}+1=", "completion": str(a + 1)}) + "\n" for a in range(8)
        )
    )
    text.write_text("".join(json.dumps({"text": f"{a} and {a + 1} " * 8}) + "\n" for a in range(8)))
    shared = ["--max-steps", "2", "--training.use_cpu", "true"]
    pre = tmp_path / "pre"
    assert main(["pause", "train", "--model", str(tiny_model_dir), "--text", str(text), "--out", str(pre),
                 *shared]) == 0  # fmt: skip
    out = tmp_path / "fine"
    assert main(["pause", "train", "--model", str(pre), "--data", str(data), "--pauses", "3", "--out", str(out),
                 *shared]) == 0  # fmt: skip
    measure = [
        "pause",
        "evaluate",
        "--model",
        str(out),
        "--limit",
        "4",
        "--max_tokens",
        "4",
        "--out",
        str(tmp_path / "test"),
    ]
    assert main([*measure, "--pauses", "[0,3]"]) == 0
    assert main([*measure, "--pauses", "[3]", "--filler", "."]) == 0
    message_text = capsys.readouterr().out
    assert "2 steps on 8 rows" in message_text
    assert "3 x ." in message_text
    stored = (tmp_path / "test" / "pauses-3.jsonl").read_text()
    assert len(stored.splitlines()) == 1 + 4
    assert main(["pause", "train", "--out", str(tmp_path / "none")]) == 2


def test_the_dry_run_of_training_prints_the_plan_and_writes_nothing(
    tiny_model_dir: Path, tmp_path: Path, capsys
):
    data = tmp_path / "examples.jsonl"
    rows = [
        {"id": str(n), "prompt": f"Q: {n} + 1?\nA:", "completion": f" {n + 1}"} for n in range(9)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["pause", "train", "--model", str(tiny_model_dir), "--data", str(data), "--pauses", "3",
             "--out", str(tmp_path / "out"), "--per-device-train-batch-size", "4", "--num-train-epochs", "2",
             "--dry-run"]  # fmt: skip
    assert main(given) == 0
    message_text = capsys.readouterr().out
    assert "9 rows" in message_text and "27 of them pauses" in message_text
    assert "6 optimizer steps, 4 rows per step" in message_text  # two passes over 3 batches
    assert "Q: 0 + 1?\nA:" + PAUSE * 3 + " 1" in message_text
    assert {one.name for one in tmp_path.iterdir()} == {"examples.jsonl"}
    for more, error in (
        (["--max-length", "3"], "longer than max_length=3"),
        (["--training.no_such", "1"], "no_such"),
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--text", str(data)], "exactly one of --data"),
    ):
        assert main([*given, *more]) == 2
        assert error in capsys.readouterr().err

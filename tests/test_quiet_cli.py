"""`selftaught quiet`, as a newcomer types it."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from selftaught.cli import main


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [f"Q: What is {a} + {b}?\nA: {a + b}." for a in range(5) for b in range(6)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, "Q"]))
    return path


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "quiet"
    assert main(training(tiny_model_dir, texts, out)) == 0
    return out


def training(model: Path, texts: Path, out: Path, *more: str) -> list[str]:
    return ["quiet", "train", "--model", str(model), "--text", str(texts), "--out", str(out), "--max-steps", "3",
            "--length", "24", "--quiet.thought_tokens", "2", "--quiet.initial_text", "A", "--held_out", "4",
            "--training.use_cpu", "true", *more]  # fmt: skip


@pytest.mark.slow
def test_training_leaves_a_model_a_page_and_the_numbers(
    run: Path, tiny_model_dir: Path, texts: Path, capsys
):
    assert {one.name for one in run.iterdir()} >= {
        "model",
        "report.html",
        "log.json",
        "config.yaml",
        "after.json",
    }
    page = (run / "report.html").read_text()
    assert page.count("<svg") == 11
    assert "Gain by token difficulty" in page
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert main(training(tiny_model_dir, texts, run)) == 0  # done already
    message_text = capsys.readouterr().out
    assert "1 texts were too short" in message_text
    assert "| after |" in message_text
    assert main(training(tiny_model_dir, texts, run, "--learning_rate", "1e-3")) == 2
    assert "other options" in capsys.readouterr().err


KEPT = {
    "default": [],
    "rlp": ["--preset", "rlp", "--quiet.thoughts", "2"],
    "curriculum": ["--curriculum", "3/2", "2/1"],
    "pattern": ["--quiet.positions", "pattern", "--pattern", "[aeiou]"],
    "task": ["--quiet.positions", "answer", "--task", "arithmetic"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_the_configuration_of_a_run_says_every_option_and_repeats_it(
    name: str, tiny_model_dir: Path, tmp_path: Path, capsys
):
    """A default that changes in a later version changes nothing for a run that was made before."""
    from selftaught.quiet.checkpoint import open_quiet

    data = tmp_path / "texts.txt"
    answer = "#" if name == "task" else " "
    data.write_text(
        "\n\n".join(f"Q: {n}+{n}?\nA:{answer}{2 * n}. So it is, indeed." for n in range(40))
    )
    command = training(tiny_model_dir, data, tmp_path / "run", *KEPT[name])
    left_out = {"curriculum": ["--quiet.thought_tokens"], "default": ["--quiet.initial_text"]}
    for option in left_out.get(name, []):
        at = command.index(option)
        del command[at : at + 2]
    assert main(command) == 0, capsys.readouterr().err
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    model, _ = open_quiet(tmp_path / "run" / "model", dtype="float32")
    trained = asdict(model.quiet_config)
    says = {"curriculum": {"thought_tokens", "lookahead"}, "default": {"initial_text"}}
    assert stored["quiet"].keys() | says.get(name, set()) | {"positions_pattern"} == trained.keys()
    for field, value in stored["quiet"].items():
        assert trained[field] == value, field
    assert stored["learning_rate"] == (1e-6 if name == "rlp" else 1e-5)
    schedule = {"lr_scheduler_type": "constant"} if name == "rlp" else {}
    assert stored["training"] == schedule | {"use_cpu": True}
    before = (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns
    again = ["quiet", "train", "--config", str(tmp_path / "run" / "config.yaml")]
    assert main(again) == 0, capsys.readouterr().err
    assert (tmp_path / "run" / "model" / "model.safetensors").stat().st_mtime_ns == before
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == stored
    capsys.readouterr()
    assert main([*again, "--preset", "paper"]) == 2  # it would have no effect
    assert "Leave out --preset" in capsys.readouterr().err


@pytest.mark.slow
def test_a_trained_model_is_measured_writes_and_answers(
    run: Path, texts: Path, tmp_path: Path, capsys
):
    model = str(run / "model")
    out = tmp_path / "measured.json"
    assert (
        main(
            [
                "quiet",
                "evaluate",
                "--model",
                model,
                "--text",
                str(texts),
                "--limit",
                "5",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    message_text = json.loads(out.read_text())
    assert message_text["texts"] == 5 and message_text["tokens"] > 5 * 10
    assert message_text["thinking"] == 1
    assert main(["quiet", "evaluate", "--model", model, "--text", str(texts), "--limit", "5", "--think_when", "entropy",
                 "--threshold", "99", "--out", str(out)]) == 0  # fmt: skip
    message_text = json.loads(out.read_text())
    assert message_text["gain"] == message_text["thinking"] == 0
    capsys.readouterr()
    write = [
        "quiet",
        "generate",
        "Q: What is 1 + 1?\nA:",
        "--model",
        model,
        "--max_new_tokens",
        "6",
    ]
    assert main(write) == 0
    streamed = capsys.readouterr().out.strip("\n")
    assert main([*write, "--stop", "[zzz]"]) == 0
    assert capsys.readouterr().out.strip("\n") == streamed
    assert main(["evaluate", "--model", model, "--sampler", "quiet", "--limit", "3", "--max_tokens", "4", "--prompt",
                 "bare", "--out", str(tmp_path / "test.jsonl")]) == 0  # fmt: skip
    assert "| 3" in capsys.readouterr().out


REFUSED = [
    (["--text", ""], "--text is required"),
    (["--text", "nowhere.jsonl"], "There is no file nowhere.jsonl"),
    (["--column", "body"], "expected a text in the column 'body'"),
    (
        ["--length", "600"],
        "at most 512 tokens with a thought (the model's limit), got 608",
    ),
    (["--quiet.thoughts_tokens", "3"], "Did you mean 'thought_tokens'?"),
    (["--quiet.zzz", "3"], "no option 'zzz'; its options are thought_tokens, lookahead"),
    (["--quiet.initial_text", "yes"], "Expected text for --quiet.initial_text, got True"),
    (["--quiet.initial_text", "- a"], "Expected text for --quiet.initial_text, got ['a']"),
    (["--quiet.mix", "words"], "mix must be 'log_probs' or 'hidden'"),
    (["--quiet.chunk_megabytes", "0"], "chunk_megabytes must be at least 1"),
    (["--quiet.start_token", "<|end|>"], "Expected a tokenizer without <|end|>"),
    (["--training.fp16", "true"], "use bf16"),
    (["--training.no_such", "1"], "TrainingArguments refused"),
]


@pytest.mark.parametrize(("changes", "message_text"), REFUSED)
def test_bad_input_is_refused_in_words(
    changes: list[str], message_text: str, tiny_model_dir: Path, texts: Path, tmp_path: Path, capsys
):
    assert main(training(tiny_model_dir, texts, tmp_path / "out", *changes)) == 2
    assert message_text in capsys.readouterr().err


def test_a_model_that_does_not_think_is_refused(tiny_model_dir: Path, texts: Path, capsys):
    assert main(["quiet", "evaluate", "--model", str(tiny_model_dir), "--text", str(texts)]) == 2
    assert "make_quiet" in capsys.readouterr().err


@pytest.mark.slow
def test_several_stop_strings_may_be_given(run: Path, capsys):
    write = ["quiet", "generate", "Q: What is 1 + 1?\nA:", "--model", str(run / "model"),
             "--max_new_tokens", "8"]  # fmt: skip
    assert main(write) == 0
    free = capsys.readouterr().out.rstrip("\n")
    assert main([*write, "--stop", "[zzz]", free[2]]) == 0
    assert capsys.readouterr().out.rstrip("\n") == free[: free.index(free[2])]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "message_text"),
    [
        (["generate", "Q", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1; got 0"),
        (
            ["generate", "Q", "--max_new_tokens", "-3"],
            "--max_new_tokens must be at least 1; got -3",
        ),
        (["generate", "Q", "--max_new_tokens", "999999"], "Change --max-new-tokens"),
        (["generate", "", "--max_new_tokens", "3"], "at least one token"),
        (["generate", "Q", "--temperature", "-1"], "--temperature must be at least 0"),
        (["generate", "Q", "--stop", ""], "--stop must not be an empty string"),
        (["generate", "Q", "--thoughts", "0"], "at least one thought"),
        (["evaluate", "--batch_size", "0", "--text", "TEXTS"], "--batch_size must be at least 1"),
        (["evaluate", "--length", "0", "--text", "TEXTS"], "Change --length"),
        (["evaluate", "--text", "BINARY"], "UTF-8"),
        (["evaluate", "--limit", "0", "--text", "TEXTS"], "limit must be at least 1"),
        (["explore", "--tokens", "0", "--text", "TEXTS"], "Change --tokens"),
        (["explore", "--text", "BINARY"], "UTF-8"),
    ],
)
def test_wrong_input_ends_in_a_line_that_says_what_to_change(
    more: list[str], message_text: str, run: Path, texts: Path, tmp_path: Path, capsys
):
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    places = {"TEXTS": str(texts), "BINARY": str(tmp_path / "binary.txt")}
    given = [places.get(one, one) for one in more]
    assert main(["quiet", *given, "--model", str(run / "model")]) == 2
    said = capsys.readouterr().err
    assert message_text in said and "Traceback" not in said


WRONG = [
    (["--length", "0"], "--length must be at least 2"),
    (["--held_out", "-1"], "--held_out must be at least 0"),
    (
        ["--per_device_train_batch_size", "0"],
        "--per_device_train_batch_size must be at least 1",
    ),
    (["--quiet.thoughts", "1"], "Set thoughts=2"),
    (["--quiet.thoughts", "many"], "whole number"),
    (["--quiet.nonsense", "1"], "nonsense"),
]


@pytest.mark.parametrize(("more", "message_text"), WRONG)
def test_wrong_training_options_end_in_a_line(
    more: list[str], message_text: str, tiny_model_dir: Path, texts: Path, tmp_path: Path, capsys
):
    assert main(training(tiny_model_dir, texts, tmp_path / "run", *more)) == 2
    said = capsys.readouterr().err
    assert message_text in said and "Traceback" not in said


def test_a_quiet_folder_that_is_damaged_is_named(tmp_path: Path, capsys):
    (tmp_path / "quiet.json").write_text('{"config": {"thoughts": 2, "nonsense": 1}}')
    assert main(["quiet", "generate", "Q", "--model", str(tmp_path)]) == 2
    assert "is not a settings file that save_quiet writes" in capsys.readouterr().err


# --- the dry run ---------------------------------------------------------------------------------

MORE = [
    (["--training.report_to", "no_such"], "report_to must be one of none"),
    (["--training.eval_strategy", "steps"], "has no evaluation data"),
    (["--training.weight_decay", "much"], "'weight_decay' of transformers' TrainingArguments must"),
    (["--training.output_dir", "/x"], "'output_dir' cannot be given"),
    (["--max-steps", "0"], "max_steps must be at least 1, or -1"),
    (["--use-peft", "--lora-target-modules", "no_such"], "Target modules"),
    (["--quiet.thought_tokens", "60", "--quiet.chunk_megabytes", "1"], "chunk_megabytes=1 is too small"),
    (["--model", "/no/such/model"], "/no/such/model"),
    (["--out", "/dev/null/run"], "Cannot write into the run folder"),
]  # fmt: skip


@pytest.mark.parametrize(("more", "message_text"), [*REFUSED, *WRONG, *MORE])
def test_the_dry_run_refuses_what_the_training_refuses(
    more: list[str], message_text: str, tiny_model_dir: Path, texts: Path, tmp_path: Path, capsys
):
    given = training(tiny_model_dir, texts, tmp_path / "out", *more)
    assert main([*given, "--dry-run"]) == 2
    assert not (tmp_path / "out").exists()
    dry = capsys.readouterr().err
    assert message_text in dry and "Traceback" not in dry
    assert main(given) == 2
    assert message_text in capsys.readouterr().err


def test_the_dry_run_prints_the_plan_and_writes_nothing(
    tiny_model_dir: Path, tmp_path: Path, capsys
):
    """Texts of 31 characters and spans of 12 tokens, so that every span is full."""
    rows = [f"Q: What is {a} + {b}? A: it is {a + b:02d}!!" for a in range(5) for b in range(5)]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in [*rows, "Q"]))
    given = training(
        tiny_model_dir, path, tmp_path / "out", "--max-steps", "-1", "--num-train-epochs", "2", "--length", "12",
        "--gradient-accumulation-steps", "2", "--per-device-train-batch-size", "4", "--dry-run",
    )  # fmt: skip
    assert main(given) == 0
    assert {one.name for one in tmp_path.iterdir()} == {"texts.jsonl"}
    message_text = capsys.readouterr().out
    assert (
        "21 training texts" in message_text and "4 held-out texts" in message_text
    )  # 26, one of them too short
    assert "1 texts too short" in message_text
    # 11 positions, 2 thoughts of 2 tokens, 8 spans per step.
    assert "at most 352 thought tokens per optimizer step" in message_text
    assert "8 spans per step, learning rate 1e-05" in message_text
    assert "2 of 2 tokens at every position, 4 lookahead tokens" in message_text
    assert re.search(
        r"about [\d,]+ MiB for the activations of a chunk of 11 positions", message_text
    )
    first = message_text.split("-" * 72 + "\n")[1].rstrip("\n")
    assert first and first in rows[0]


@pytest.mark.slow
def test_the_plan_has_the_steps_of_the_training(
    run: Path, tiny_model_dir: Path, texts: Path, tmp_path: Path, capsys
):
    more = ["--max-steps", "-1", "--num-train-epochs", "1.5", "--gradient-accumulation-steps", "3",
            "--per-device-train-batch-size", "4"]  # fmt: skip
    given = training(tiny_model_dir, texts, tmp_path / "out", *more)
    assert main([*given, "--dry-run"]) == 0
    steps = re.search(r"(\d+) optimizer steps", capsys.readouterr().out)
    assert main(given) == 0
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    assert steps is not None and int(steps[1]) == log[-1]["step"]
    assert main([*training(tiny_model_dir, texts, run), "--dry-run"]) == 0
    assert "(contains the finished model)" in capsys.readouterr().out
    other = training(tiny_model_dir, texts, run, "--learning_rate", "1e-3", "--dry-run")
    assert main(other) == 2
    assert "other options" in capsys.readouterr().err

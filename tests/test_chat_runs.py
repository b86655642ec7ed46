"""Chat models through the command line: from the prompt to what is learned."""

import json
from pathlib import Path

import pytest
from narrowed import verdict
from small_tokenizers import CHATML, NO_SYSTEM, THINKING, byte_level
from transformers import LlamaConfig, LlamaForCausalLM

from selftaught.cli import main
from selftaught.records import Problem, iter_rollouts, read_examples
from selftaught.tasks import open_task

OFF = ["--chat-template-kwargs.enable_thinking", "false"]


def chat_model(folder: Path, template: str) -> Path:
    """A random Llama over bytes with a chat template."""
    import torch

    tokenizer = byte_level(template=template, added=("<think>", "</think>"))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                max_position_embeddings=1024, bos_token_id=0, eos_token_id=1, pad_token_id=2,
            )
        ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def questions(folder: Path, **more: str) -> list[str]:
    path = folder / "questions.jsonl"
    rows = [{"question": f"{n}*7", "answer": str(7 * n)} | more for n in range(3, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--task", "question_file", "--task_options.path", str(path), "--prompt", "chat"]


def test_a_dry_run_shows_the_chat_prompt_with_its_instruction(tmp_path: Path, capsys):
    model = chat_model(tmp_path / "m", THINKING)
    asked = [
        "star",
        "--model",
        str(model),
        *questions(tmp_path),
        "--dry-run",
        "--out",
        str(tmp_path / "run"),
    ]
    assert main([*asked, "--system-prompt", "Be brief.", *OFF]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>system\nBe brief.<|im_end|>" in shown
    assert "put your final answer within \\boxed{}.<|im_end|>" in shown
    assert "<|im_start|>assistant\n<think>\n\n</think>\n\n" in shown


@pytest.mark.parametrize(
    ("template", "options", "message_text"),
    [
        (CHATML, OFF, "does not use enable_thinking"),
        (NO_SYSTEM, ["--system-prompt", "Be brief."], "System role not supported"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", [], "does not write an assistant's"),
        (CHATML, ["--prompt", "bare", "--system-prompt", "x"], "give --prompt chat"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_refused_by_a_dry_run(
    tmp_path: Path, capsys, template: str, options: list[str], message_text: str
):
    model = chat_model(tmp_path / "m", template)
    asked = ["star", "--model", str(model), *questions(tmp_path), "--dry-run", *options]
    assert main(asked) == 2
    assert message_text in capsys.readouterr().err


def test_rationales_without_a_thought_are_not_taught_inside_one(tmp_path: Path, capsys):
    model = chat_model(tmp_path / "m", THINKING)
    asked = ["rft", "--model", str(model), "--dry-run", "--task_options.rationale", "why"]
    asked += questions(tmp_path, why="Seven each.")
    assert main(asked) == 2
    assert "would never give an answer" in capsys.readouterr().err
    assert main([*asked, *OFF]) == 0


def test_sampled_tokens_go_from_the_store_into_the_examples(tmp_path: Path, capsys):
    model = chat_model(tmp_path / "m", THINKING)
    chat = questions(tmp_path)
    store, graded, examples = (tmp_path / f"{name}.jsonl" for name in ("r", "g", "e"))
    asked = ["sample", "--model", str(model), *chat, "--max_tokens", "6", "--out", str(store)]
    assert main(asked) == 0
    assert all(one.thought_open for one in iter_rollouts(store))
    assert main([*asked, *OFF]) == 2  # another experiment
    assert "the sampling options" in capsys.readouterr().err

    lines = store.read_text().splitlines()
    row = json.loads(lines[1])
    end = byte_level(template=THINKING, added=("<think>", "</think>"))
    ids = [*end("so</think>21")["input_ids"], end.convert_tokens_to_ids("<|im_end|>")]
    row |= {
        "completion": "so</think>21",
        "token_ids": ids,
        "finish_reason": "stop",
        "outcome": "right",
    }
    graded.write_text(json.dumps(row) + "\n")
    made = ["select", str(graded), *chat, "--out", str(examples), *OFF]
    assert main(made) == 0
    (example,) = read_examples(examples)
    assert example.completion_ids == tuple(ids)
    assert example.chat_template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("kind", ["number", "choice", "latex", "text"])
def test_an_answer_as_the_instruction_wants_it_is_read(tmp_path: Path, kind: str):
    gold = {"number": "21", "choice": "C", "latex": "21", "text": "a cat"}[kind]
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"q{n}", "answer": gold}) + "\n" for n in range(4))
    )
    task = open_task("question_file", path=str(path), kind=kind)
    said = {
        "number": "So \\boxed{21}.", "choice": "So. The answer is (C).", "latex": "So \\boxed{21}.",
        "text": "So. The answer is a cat.",
    }[kind]  # fmt: skip
    wanted = {"number": "\\boxed{}", "latex": "\\boxed{}"}.get(kind, "The answer is")
    assert wanted in task.instruction
    answer = task.answer(said)
    assert answer is not None and verdict(task, gold, answer).equal
    (message,) = task.styled("chat")(Problem("p", "q", gold))
    assert message == {"role": "user", "content": f"q\n\n{task.instruction}"}

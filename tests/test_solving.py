"""Best-of-n as a thing to use, with the embedded model."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from selftaught.evaluation.best_of_n import (
    Solution,
    Solver,
    best_candidate,
    read_questions,
    solve,
    solve_file,
)
from selftaught.models.embedded import embedded_model
from selftaught.records import Completion

pytestmark = pytest.mark.slow

VERIFIER = str(embedded_model())
QUESTION = "123+345"
"""The model is unsure of sums of three digits, so its candidates differ."""


def test_the_embedded_model_adds_two_numbers():
    solution = solve("12+34", "embedded", n=1)
    worked = "b2+4+0=06;a1+3+0=04;#46"
    assert solution == Solution("12+34", "46", worked, 1, [worked], None)


@pytest.mark.parametrize("verifier", [None, VERIFIER])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 9])
def test_candidates_streamed_are_those_drawn_at_once(n: int, verifier: str | None):
    message_text: list[tuple[int, Completion]] = []
    with Solver("embedded", verifier, n=n, temperature=1.0) as solver:
        at_once = solver.solve(QUESTION)
        streamed = solver.solve(QUESTION, seen=lambda *one: message_text.append(one))
    assert replace(streamed, scores=None) == replace(at_once, scores=None)
    assert [number for number, _ in message_text] == list(range(n))
    assert [one.text for _, one in message_text] == at_once.completions
    assert len(at_once.completions) == n
    if verifier:
        assert streamed.scores == pytest.approx(at_once.scores, abs=1e-4)
    else:
        assert at_once.scores is None
    if n == 9:
        assert len(set(at_once.completions)) > 2


def answer_of(text: str) -> str | None:
    return text.partition("#")[2] or None


def test_the_best_scored_candidate_is_taken_and_scores_are_log_probabilities():
    with Solver("embedded", VERIFIER, n=6, temperature=1.0) as solver:
        found = solver.solve(QUESTION)
    model = AutoModelForCausalLM.from_pretrained(VERIFIER, dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(VERIFIER)
    expected = []
    for text in found.completions:
        prompt, ids = (tokenizer(part)["input_ids"] for part in (f"{QUESTION}=", text + "\n"))
        with torch.inference_mode():
            log_probs = torch.log_softmax(model(torch.tensor([prompt + ids])).logits[0], dim=-1)
        expected.append(
            sum(float(log_probs[len(prompt) - 1 + at, one]) for at, one in enumerate(ids))
        )
    assert found.scores == pytest.approx(expected, abs=1e-3)
    best = max((score, text) for score, text in zip(expected, found.completions, strict=True)
               if answer_of(text))  # fmt: skip
    assert found.completion == best[1]
    assert found.answer == answer_of(best[1])
    assert found.support == [answer_of(text) for text in found.completions].count(found.answer)


def test_without_a_verifier_the_commonest_answer_is_taken():
    with Solver("embedded", n=12, temperature=1.0) as solver:
        found = solver.solve(QUESTION)
    answers = [answer_of(text) for text in found.completions]
    counts = {answer: answers.count(answer) for answer in answers if answer}
    assert found.answer is not None
    assert counts[found.answer] == max(counts.values()) == found.support
    assert found.completions.index(found.completion) == answers.index(found.answer)


def test_a_candidate_cut_by_length_has_no_answer():
    found = solve("12+34", "embedded", n=1, max_tokens=22)
    assert found.completion == "b2+4+0=06;a1+3+0=04;#4"
    assert (found.answer, found.support) == (None, 0)


def test_no_candidates_at_all_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1"):
        Solver("embedded", n=0)


@pytest.mark.parametrize(
    ("votes", "scores", "weighted", "at"),
    [
        (["7", "8", "8"], None, False, 1),  # the commonest, its first
        (["7", "8"], None, False, 0),  # a tie: the first
        (["7", "8", "8", "7"], None, True, 0),
        ([None, None, "7"], None, False, 2),  # any answer rather than none
        ([None, None], None, False, 0),
        (["7", "8", "8"], [-1.0, -2.0, -3.0], False, 0),
        (["7", "8", "8"], [-2.0, -2.0, -1.0], False, 2),
        (["7", "8"], [-2.0, -2.0], False, 0),
        ([None, "7", "8"], [0.0, -9.0, -8.0], False, 2),
        ([None, None], [-2.0, -1.0], False, 1),
        # e^0 against e^-0.5 + e^-0.6 = 1.16, whose best candidate is taken
        (["7", "8", "8"], [0.0, -0.6, -0.5], True, 2),
        (["7", "8", "8"], [0.0, -0.8, -0.7], True, 0),  # e^-0.8 + e^-0.7 = 0.946
        ([None, None, "7"], [0.0, 0.0, -9.0], True, 2),
        ([None, None], [-2.0, -1.0], True, 1),
        (["7", "8"], [-1.0, -1.0], True, 0),
        # far below what floating point has an exponential of
        (["7", "8", "8"], [-5000.0, -5000.6, -5000.5], True, 2),
    ],
)  # fmt: skip
def test_which_candidate_is_taken(votes, scores, weighted, at):
    assert best_candidate(votes, scores, weighted=weighted) == at


class Scripted(Solver):
    """A solver that knows the answers and counts what it is asked; it opens no model."""

    def __init__(self, **made_of: int) -> None:
        self._made_of = {"n": 2} | made_of
        self.asked: list[str] = []

    @property
    def made_of(self) -> dict[str, Any]:
        return self._made_of

    def solve(
        self, question: str, *, seen: Callable[[int, Completion], None] | None = None
    ) -> Solution:
        self.asked.append(question)
        return Solution(question, f"{question}!", "a\u2028b\r", 2, ["a", "b"], [-0.5, -1.0])


QUESTIONS = ["one", "two\nlines", "three \ud800"]


def test_a_file_of_solutions_has_a_header_and_a_row_for_each(tmp_path: Path):
    out, message_text = tmp_path / "new" / "out.jsonl", []
    assert solve_file(Scripted(), QUESTIONS, out, on_solution=message_text.append) == 3
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert header == {"format": "selftaught solutions 1", "n": 2}
    assert [row["question"] for row in rows] == QUESTIONS
    assert rows[0] == {"question": "one", "answer": "one!", "support": 2, "completion": "a\u2028b\r",
                       "completions": ["a", "b"], "scores": [-0.5, -1.0]}  # fmt: skip
    assert [one.question for one in message_text] == QUESTIONS


@pytest.mark.parametrize("left", ["nothing", "header", "one", "one and a half", "all", "all but the end"])  # fmt: skip
def test_solving_goes_on_where_it_was_left(tmp_path: Path, left: str):
    out = tmp_path / "out.jsonl"
    solve_file(Scripted(), QUESTIONS, out)
    whole = out.read_bytes()
    lines = whole.splitlines(keepends=True)
    kept = {"nothing": (b"", 0), "header": (lines[0], 0), "one": (b"".join(lines[:2]), 1),
            "one and a half": (b"".join(lines[:2]) + lines[2][:40], 1), "all": (whole, 3),
            "all but the end": (whole[:-1], 2)}  # fmt: skip
    text, done = kept[left]
    out.write_bytes(text)
    solver = Scripted()
    assert solve_file(solver, QUESTIONS, out) == 3
    assert solver.asked == QUESTIONS[done:]
    assert out.read_bytes() == whole


def test_a_file_of_solutions_can_be_made_longer(tmp_path: Path):
    out, solver = tmp_path / "out.jsonl", Scripted()
    solve_file(solver, QUESTIONS, out)
    assert solve_file(solver, [*QUESTIONS, "four"], out) == 4
    assert solver.asked == [*QUESTIONS, "four"]


def test_solutions_of_others_are_refused_and_left_alone(tmp_path: Path):
    out = tmp_path / "out.jsonl"
    solve_file(Scripted(), QUESTIONS, out)
    before = out.read_bytes()
    for solver, questions, match in (
        (Scripted(n=3), QUESTIONS, "by the same models and options, got other content"),
        (Scripted(), ["one", "zwei", "three"], "got other questions"),
        (Scripted(), QUESTIONS[:2], "got other questions"),
    ):
        with pytest.raises(ValueError, match=match):
            solve_file(solver, questions, out)
        assert not solver.asked
        assert out.read_bytes() == before
    out.write_text("12+34\n")
    with pytest.raises(ValueError, match="got other content"):
        solve_file(Scripted(), QUESTIONS, out)
    out.write_bytes(before.replace(b'{"question": "one"', b'"question": "one"'))
    with pytest.raises(ValueError, match=r"out.jsonl, line 2: expected one JSON object"):
        solve_file(Scripted(), QUESTIONS, out)


@pytest.mark.parametrize(
    "options",
    [{"n": 3}, {"temperature": 0.5}, {"top_p": 0.9}, {"seed": 1}, {"max_tokens": 9},
     {"by": "weighted"}, {"verifier": VERIFIER}, {"verifier": VERIFIER, "score": "mean"},
     {"verifier": VERIFIER, "score": "reward", "reference": VERIFIER},
     {"task_options": {"shots": 2}, "prompt": "few_shot"}, {"task_options": {"digits": "1-6"}}],
)  # fmt: skip
def test_what_decides_the_answers_is_distinguished(options):
    with Solver("embedded", n=2) as plain, Solver("embedded", **({"n": 2} | options)) as other:
        assert json.loads(json.dumps(other.made_of)) == other.made_of
        assert plain.made_of != other.made_of
    if options == {"verifier": VERIFIER, "score": "mean"}:
        with Solver("embedded", VERIFIER, n=2) as by_sum:
            assert by_sum.made_of != other.made_of


def test_a_real_solver_goes_on_with_the_same_answers(tmp_path: Path):
    questions, out = ["12+34", QUESTION, "7+8"], tmp_path / "out.jsonl"
    with Solver("embedded", VERIFIER, n=3) as solver:
        solve_file(solver, questions, out)
        whole = out.read_bytes()
        out.write_bytes(whole[: len(whole) * 2 // 3])
        solve_file(solver, questions, out)
    assert out.read_bytes() == whole
    rows = list(map(json.loads, whole.splitlines()))[1:]
    assert (rows[0]["answer"], rows[2]["answer"]) == ("46", "15")
    assert all(math.isfinite(score) for row in rows for score in row["scores"])


def test_questions_are_read_from_lines_or_from_a_column(tmp_path: Path):
    text, table = tmp_path / "q.txt", tmp_path / "q.jsonl"
    text.write_bytes("\ufeff12+34\r\n\n  7+8 \nwas \u00fc?".encode())
    assert read_questions(text) == ["12+34", "7+8", "was \u00fc?"]
    table.write_text('{"question": "12+34", "gold": "46"}\n\n{"question": "two\\nlines"}\n')
    assert read_questions(table) == ["12+34", "two\nlines"]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("q.txt", b"", "q.txt: expected at least one question"),
        ("q.txt", b" \n\n", "q.txt: expected at least one question"),
        ("q.txt", b"12+34\n\xff\n", r"q.txt: expected UTF-8 text, got byte 0xff at byte 6"),
        ("q.jsonl", b"", "q.jsonl: expected at least one question"),
        ("q.jsonl", b'{"question": "1+1"}\n{"text": "1", "id": 2}', r"row 2: .* got the columns text, id"),
        ("q.jsonl", b'{"question": "\\udc80"}', r"row 1: .*'question', got an invalid character"),
        ("q.jsonl", b'{"question": 7}', r"row 1: expected text in the column question, got 7"),
        ("q.jsonl", b'{"question": "1+1"}\n12+34', r"q.jsonl, line 2: expected one JSON object"),
        ("q.jsonl", b'{"question": "\xff"}', r"q.jsonl, line 1: expected UTF-8"),
    ],
)  # fmt: skip
def test_a_file_without_questions_says_what_is_wrong(tmp_path: Path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=match):
        read_questions(tmp_path / name)


def test_the_generator_may_live_elsewhere():
    with pytest.raises(ValueError, match=r"^Expected a base URL"):
        Solver("embedded", n=2, sampler="openai", sampler_options={"base_url": "ftp://x"})
    with pytest.raises(ValueError, match=r"No sampler is called 'nowhere'"):
        Solver("embedded", n=2, sampler="nowhere")

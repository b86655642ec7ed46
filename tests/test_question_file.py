"""The user's own questions: what is read, what is refused and how it is said."""

import json
import sys
import types
from pathlib import Path

import pytest
from narrowed import verdict

from selftaught.prompts import hinted
from selftaught.tasks import open_task
from selftaught.tasks.question_file import MOST_HELD_OUT, question_file

ROWS = [{"question": f"What is {n} + {n}?", "answer": 2 * n} for n in range(30)]


def written(tmp_path, rows, name="questions.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def everything(task):
    return [row for split in ("train", "validation", "test") for row in task.problems(split)]


# --- what is read --------------------------------------------------------------------------------


def test_rows_become_problems_numbered_in_their_order(tmp_path):
    task = open_task("question_file", path=written(tmp_path, ROWS))
    problems = sorted(everything(task), key=lambda problem: int(problem.gold))
    assert [problem.id for problem in problems] == [f"train-{n}" for n in range(30)]
    assert problems[7].question == "What is 7 + 7?"
    assert problems[7].gold == "14"
    assert task.prompt(problems[7]) == "Q: What is 7 + 7?\nA:"
    assert hinted(task.prompt, task.hint)(problems[7]) == "Q: What is 7 + 7? (14)\nA:"


def test_a_tenth_is_held_out_for_each_split_and_always_the_same(tmp_path):
    path = written(tmp_path, ROWS)
    task, again, other = (question_file(path, seed=seed) for seed in (0, 0, 1))
    sizes = {name: len(task.problems(name)) for name in ("train", "validation", "test")}
    assert sizes == {"train": 24, "validation": 3, "test": 3}
    assert len({problem.question for problem in everything(task)}) == 30
    assert task.problems("test") == again.problems("test") != other.problems("test")
    train = [int(problem.gold) for problem in task.problems("train")]
    assert train == sorted(train)  # the file's order is kept


def test_at_least_one_and_at_most_500_are_held_out(tmp_path):
    few = question_file(written(tmp_path, ROWS[:3]))
    assert [len(few.problems(name)) for name in ("train", "validation", "test")] == [1, 1, 1]
    rows = [{"question": str(n), "answer": n} for n in range(6000)]
    many = question_file(written(tmp_path, rows, "many.jsonl"))
    assert len(many.problems("validation")) == len(many.problems("test")) == MOST_HELD_OUT == 500


def test_files_given_for_splits_are_used_whole_and_leave_train(tmp_path):
    train = written(tmp_path, ROWS)
    held = written(tmp_path, ROWS[5:8], "held.jsonl")
    task = question_file(train, test=held)
    with pytest.warns(UserWarning, match="3 questions were removed"):
        assert [problem.gold for problem in task.problems("test")] == ["10", "12", "14"]
    assert len(everything(task)) == 30


@pytest.mark.parametrize(
    ("written_as", "gold"),
    [
        (18, "18"), (18.0, "18"), (18.5, "18.5"), (-3, "-3"), ("1,250", "1,250"), (" 7 ", "7"),
        ("3/4", "3/4"), ("He has 3 * 4 = 12.\n#### 12", "12"), (10**20, "1" + "0" * 20),
    ],
)  # fmt: skip
def test_golds_that_are_no_text_are_read_sensibly(tmp_path, written_as, gold):
    rows = [{**ROWS[0], "answer": written_as}, *ROWS[1:4]]
    problems = everything(question_file(written(tmp_path, rows)))
    assert gold in {problem.gold for problem in problems}


def test_csv_with_a_byte_order_mark_quotes_and_line_breaks(tmp_path):
    path = tmp_path / "q.csv"
    text = 'frage,lösung,nr\r\n"Eins, zwei\nund?",3,a\r\nVier?,4.0,b\r\n\r\nFünf?,5,c\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    task = question_file(str(path), question="frage", gold="lösung", id="nr")
    problems = {problem.id: problem for problem in everything(task)}
    assert problems["a"].question == "Eins, zwei\nund?"
    assert problems["c"].gold == "5"
    assert len(problems) == 3


def test_parquet_and_json_give_the_same_problems_as_jsonl(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "q.parquet")
    (tmp_path / "q.json").write_text(json.dumps(ROWS), encoding="utf-8")
    expected = everything(question_file(written(tmp_path, ROWS)))
    assert everything(question_file(str(tmp_path / "q.parquet"))) == expected
    assert everything(question_file(str(tmp_path / "q.json"))) == expected


def test_a_template_makes_a_question_of_several_columns(tmp_path):
    rows = [{"context": f"Ann has {n}.", "ask": "How many?", "answer": n} for n in range(4)]
    task = question_file(written(tmp_path, rows), template="{context}\n{ask}")
    assert "Ann has 2.\nHow many?" in {problem.question for problem in everything(task)}


def test_a_hub_data_set_is_asked_for_by_name_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        return ROWS[:20] if split == "train" else ROWS[20:]

    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr("selftaught.tasks.rows.check_data_set", lambda name: None)
    task = question_file("someone/sums", config="easy", test="test")
    assert [problem.gold for problem in task.problems("test")][:2] == ["40", "42"]
    assert len(task.problems("train")) == 18
    assert asked == [("someone/sums", "easy", "train"), ("someone/sums", "easy", "test")]


# --- answers of each kind ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "gold", "completion", "answer", "right"),
    [
        ("number", "14", " 7 + 7 = 14. The answer is 14.", "14", True),
        ("number", "14", " \\boxed{14.0}", "14.0", True),
        ("number", "14", " It is 14 I think", None, None),
        ("choice", "(b)", " It rains. The answer is (B).", "B", True),
        ("choice", "G", " The answer is g.", "G", True),
        ("choice", "A", " The answer is (c).", "C", False),
        ("text", "New York", " The answer is new york.", "new york", True),
        ("text", "New York", " New York", "New York", True),
        ("text", "New York", " The answer is York.", "York", False),
        ("latex", "\\boxed{\\frac{1}{2}}", " So \\boxed{\\frac12}.", "\\frac12", True),
    ],
)
def test_each_kind_of_answer_is_read_and_compared(tmp_path, kind, gold, completion, answer, right):
    rows = [{"question": str(n), "answer": gold} for n in range(3)]
    task = question_file(written(tmp_path, rows), kind=kind)
    (problem,) = task.problems("train")
    assert task.extract(completion) == answer
    if answer is not None:
        assert verdict(task, problem.gold, answer).equal is right
    stated = task.extract(f" {task.direct.format(answer=problem.gold)}")
    assert stated is not None
    assert verdict(task, problem.gold, stated).equal


def test_worked_examples_of_a_file_are_shown_and_end_in_their_answers(tmp_path):
    shots = [
        {"question": "2 and 2?", "answer": 4, "rationale": "2 + 2 = 4. The answer is 4."},
        {"question": "3 and 3?", "answer": 6, "rationale": "3 + 3 = 6."},
    ]
    task = question_file(written(tmp_path, ROWS), shots=written(tmp_path, shots, "shots.jsonl"))
    problem = task.problems("test")[0]
    assert task.prompt(problem) == (
        "Q: 2 and 2?\nA: 2 + 2 = 4. The answer is 4.\n\n"
        "Q: 3 and 3?\nA: 3 + 3 = 6. The answer is 6.\n\n"
        f"Q: {problem.question}\nA:"
    )


def test_worked_examples_are_not_asked(tmp_path):
    shots = [{**ROWS[4], "rationale": "4 + 4 = 8."}]
    task = question_file(written(tmp_path, ROWS), shots=written(tmp_path, shots, "shots.jsonl"))
    with pytest.warns(UserWarning, match="1 questions were removed"):
        assert len(everything(task)) == 29


def test_rationales_of_a_column_are_kept_with_their_answer(tmp_path):
    rows = [{**row, "why": "One adds."} for row in ROWS[:3]]
    task = question_file(written(tmp_path, rows), rationale="why")
    (problem,) = task.problems("train")
    assert problem.rationale == f"One adds. The answer is {problem.gold}."
    assert task.hint(problem).rationale is None


# --- what is refused -----------------------------------------------------------------------------


def refused(path, message, error: type[Exception] = ValueError, **options):
    with pytest.raises(error, match=message):
        question_file(str(path), **options).problems("train")


def test_a_missing_file(tmp_path):
    refused(tmp_path / "none.csv", r"no file .*none\.csv", FileNotFoundError)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "q.txt").write_text("hello", encoding="utf-8")
    refused(tmp_path / "q.txt", r"extensions \.jsonl, \.json, \.csv, \.parquet")


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.json"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).write_text("[]" if name == "q.json" else "", encoding="utf-8")
    refused(tmp_path / name, "is empty: expected at least one row")


def test_a_wrong_column_names_those_there_are_and_the_nearest(tmp_path):
    path = written(tmp_path, [{"questions": "a", "label": "b"}])
    refused(path, 'line 1: there is no column "answer"; the columns are questions, label')
    refused(path, 'no column "question"; .* Did you mean "questions"', gold="label")
    refused(path, 'no column "x"', template="{x}", gold="label")


def test_a_column_missing_from_one_row_only(tmp_path):
    refused(
        written(tmp_path, [*ROWS[:2], {"question": "a"}]), 'line 3: there is no column "answer"'
    )


def test_golds_that_cannot_be_read_are_listed_with_id_and_line(tmp_path):
    rows = [{**row, "name": f"n{at}"} for at, row in enumerate(ROWS[:9])]
    for at in range(1, 8):
        rows[at]["answer"] = "many"
    refused(
        written(tmp_path, rows),
        r"7 of 9 gold answers in the column \"answer\" cannot be read: "
        r".*line 2 \(n1\): 'many'; .*line 6 \(n5\): 'many'\. Correct",
        id="name",
    )
    refused(written(tmp_path, [{"question": "a", "answer": "AB"}]), "cannot be read", kind="choice")


@pytest.mark.parametrize("value", [None, "", "  ", [1], {"a": 1}, float("nan")])
def test_a_value_that_is_no_text_or_number(tmp_path, value):
    rows = [{"question": "a", "answer": value}]
    refused(written(tmp_path, rows), 'line 1: expected text or a number in the column "answer"')


def test_an_id_that_stands_twice(tmp_path):
    rows = [{**row, "id": 5} for row in ROWS[:2]]
    refused(written(tmp_path, rows), "the id '5' is at .*line 1 and at .*line 2", id="id")


def test_a_question_with_two_golds(tmp_path):
    rows = [ROWS[1], {**ROWS[1], "answer": 5}]
    refused(
        written(tmp_path, rows),
        "one gold answer per question; .* '2' at .*line 1 and '5' at .*line 2",
    )


def test_a_repeated_question_is_asked_once_and_said(tmp_path):
    task = question_file(written(tmp_path, [*ROWS, ROWS[3]]))
    with pytest.warns(UserWarning, match="1 repeated questions were removed"):
        assert len(everything(task)) == 30


def test_broken_lines_are_named(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(ROWS[0]).encode() + b'\n\n{"question": "\xff"}\n')
    refused(path, r"q\.jsonl, line 3: expected UTF-8 text, got byte 0xff")
    path.write_bytes(b'{"question": 1,}')
    refused(path, r"q\.jsonl, line 1: expected one JSON object per line")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"question,answer\na,1\n\xe4,2\n", "line 3: expected UTF-8 text, got byte 0xe4"),
        (b"question,answer\na,1,2\n", "line 2: expected 2 values, as in the first line, got 3"),
        (b"question,question\na,1\n", "line 1: expected unique column names"),
        (b'question,answer\n"a"b,1\n', "line 2: expected CSV, got"),
    ],
)
def test_broken_csv_is_named(tmp_path, content, message):
    (tmp_path / "q.csv").write_bytes(content)
    refused(tmp_path / "q.csv", message)


def test_broken_json_and_parquet_are_named(tmp_path):
    (tmp_path / "q.json").write_text("{", encoding="utf-8")
    refused(tmp_path / "q.json", r"q\.json: expected a JSON list of objects, got")
    (tmp_path / "q.json").write_text('{"question": "a"}', encoding="utf-8")
    refused(tmp_path / "q.json", r"one object per line, rename it to \.jsonl")
    pytest.importorskip("pyarrow")
    (tmp_path / "q.parquet").write_text("no", encoding="utf-8")
    refused(tmp_path / "q.parquet", r"q\.parquet: expected a Parquet file")


def test_too_few_questions_to_hold_any_out(tmp_path):
    refused(written(tmp_path, ROWS[:2]), "at least 3 different training questions, .*; got 2")


def test_a_data_set_the_hub_does_not_have(monkeypatch):
    def load_dataset(name, config, *, split):
        raise ConnectionError("Couldn't reach the Hub")

    stand_in = types.ModuleType("datasets")
    stand_in.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    monkeypatch.setattr("selftaught.tasks.rows.check_data_set", lambda name: None)
    refused("someone/none", "not a local file .*Couldn't reach", FileNotFoundError)


def test_unknown_kinds_splits_and_options(tmp_path):
    refused(written(tmp_path, ROWS), "number, text, choice or latex; got 'word'", kind="word")
    task = question_file(written(tmp_path, ROWS))
    with pytest.raises(ValueError, match="train, validation and test; got 'dev'"):
        task.problems("dev")
    with pytest.raises(ValueError, match="no option 'col'"):
        open_task("question_file", path="x.csv", col="y")
    with pytest.raises(ValueError, match="requires the option 'path'"):
        open_task("question_file")


def test_a_question_may_lack_a_rationale_that_others_have(tmp_path: Path):
    path = tmp_path / "questions.jsonl"
    rows = [
        {"question": "1+1", "answer": "2", "why": "1+1=2. #### 2"},
        {"question": "1+2", "answer": "3", "why": None},
        {"question": "1+3", "answer": "4", "why": ""},
    ]
    rows += [{"question": f"2+{n}", "answer": str(2 + n), "why": "x"} for n in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = open_task("question_file", path=str(path), rationale="why")
    found = {
        one.question: one.rationale
        for split in ("train", "validation", "test")
        for one in task.problems(split)
    }
    assert found["1+1"] == "1+1=2. #### 2"
    assert found["1+2"] is None and found["1+3"] is None

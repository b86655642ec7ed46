"""Files of questions that are broken, hostile or unusual: read as they are meant, or refused by line."""

import json
import tracemalloc
from pathlib import Path

import pytest

from selftaught.tasks import open_task, rows
from selftaught.tasks.rows import file_rows

NAMES = ("question", "answer")
VALUES = [(f"What is {n}+1?", str(n + 1)) for n in range(6)]
LINES = {
    "q.jsonl": "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in VALUES),
    "q.json": json.dumps([{"question": q, "answer": a} for q, a in VALUES], indent=1),
    "q.csv": "question,answer\n" + "".join(f"{q},{a}\n" for q, a in VALUES),
    "q.tsv": "question\tanswer\n" + "".join(f"{q}\t{a}\n" for q, a in VALUES),
}


def golds(path: Path, **options) -> list[str]:
    task = open_task("question_file", path=str(path), **options)
    return [one.gold for split in ("train", "validation", "test") for one in task.problems(split)]


def refused(path: Path, content: bytes | str, message: str, **options) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        golds(path, **options)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_text_format_is_read_with_marks_and_either_line_end(tmp_path, name, encoding, ending):
    path = tmp_path / name
    path.write_bytes(LINES[name].replace("\n", ending).encode(encoding))
    found = [tuple(row.values[column] for column in NAMES) for row in file_rows(path)]
    assert found == VALUES


def test_csv_with_bare_carriage_returns_is_read(tmp_path):
    path = tmp_path / "q.csv"
    path.write_text(LINES["q.csv"].replace("\n", "\r"), newline="")
    assert len(file_rows(path)) == len(VALUES)


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_csv_file_separated_otherwise_is_read(tmp_path, separator):
    path = tmp_path / "q.csv"
    quoted = f'question{separator}answer\n"a, {separator} b"{separator}1\nc, d{separator}2\n'
    path.write_text(quoted, encoding="utf-8")
    assert [row.values for row in file_rows(path)] == [
        {"question": f"a, {separator} b", "answer": "1"},
        {"question": "c, d", "answer": "2"},
    ]


def test_a_separator_that_does_not_fit_is_named(tmp_path):
    refused(
        tmp_path / "q.tsv", "question,answer\na,1\n", "line 1: .*contains commas: 'question,answer'"
    )
    refused(
        tmp_path / "q.csv",
        "question;answer\na;1;2\n",
        "line 2: .*contain semicolons in double quotes",
    )


def test_numbers_of_json_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "q.jsonl"
    written = [
        "18.0",
        "1e23",
        "0.1234567890123456789",
        "1E2",
        "-0.50",
        "12345678901234567890123",
        "7",
    ]
    path.write_text(
        "".join(f'{{"question": "q{n}", "answer": {one}}}\n' for n, one in enumerate(written))
    )
    # By hand: a float would have given 99999999999999991611392 and 0.12345678901234568.
    assert sorted(golds(path, kind="text")) == sorted(
        [
            "18",
            "1" + "0" * 23,
            "0.1234567890123456789",
            "100",
            "-0.5",
            "12345678901234567890123",
            "7",
        ]
    )


def test_a_whole_number_of_thousands_of_digits_is_read_or_refused_by_line(tmp_path):
    path = tmp_path / "q.jsonl"
    huge = "1" + "0" * 5000
    content = "".join(
        f'{{"question": "q{n}", "answer": {one}}}\n' for n, one in enumerate([4, huge, 5])
    )
    path.write_text(content)
    assert sorted(golds(path, kind="text"), key=len) == ["4", "5", huge]
    try:
        assert huge in golds(path)
    except ValueError as error:
        assert f"{path}, line 2" in str(error)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999999999999999999999"])
@pytest.mark.parametrize("kind", ["number", "text"])
def test_a_gold_that_is_no_finite_number_is_refused(tmp_path, value, kind):
    content = f'{{"question": "a", "answer": 1}}\n{{"question": "b", "answer": {value}}}\n'
    refused(tmp_path / "q.jsonl", content, "line 2", kind=kind)


def test_a_number_with_a_huge_exponent_is_not_written_out(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(
        "".join(f'{{"question": "q{n}", "answer": {n}e999999999}}\n' for n in range(1, 5))
    )
    tracemalloc.start()
    assert set(map(len, golds(path, kind="text"))) == {len("1E+999999999")}
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"question": "a", "answer": 1, "answer": 2}', 'the key "answer" is repeated'),
        ('{"question": "a \\ud800 b", "answer": 1}', r"column 'question', got .*surrogate \\ud800"),
        ('{"question": "a \\u0000 b", "answer": 1}', "column 'question', got a NUL character"),
        ('{"question": "a", "answer": 1, "tags": ["\\udfff"]}', "column 'tags', got"),
        ('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"question": "a" "answer": 1}', "expected"),
        ("[1]", "expected a JSON object, got list"),
    ],
)
def test_what_json_cannot_mean_is_refused_by_row(tmp_path, name, second, message):
    first = '{"question": "x", "answer": 3}'
    content = f"{first}\n{second}\n" if name == "q.jsonl" else f"[{first},\n{second}]"
    place = "line 2: " if name == "q.jsonl" else "row 2: "
    refused(tmp_path / name, content, f"{place}.*{message}")


def test_a_surrogate_pair_is_a_character(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "\\ud83d\\ude00", "answer": 1}\n', encoding="utf-8")
    assert file_rows(path)[0].values["question"] == "😀"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]x", "after the JSON list"),
        ('[{"a": 1} {"a": 2}]', "row 1: expected a comma or ]"),
        ('[{"a": 1},]', "row 2: expected a JSON list of objects"),
        ('[{"a": 1}', "row 1: expected a comma or ]"),
        ('{"a": 1}\n{"a": 2}', "rename it to .jsonl"),
    ],
)
def test_a_json_list_that_is_none_is_refused(tmp_path, content, message):
    refused(tmp_path / "q.json", content, message)


def test_a_csv_value_may_be_longer_than_131072_characters(tmp_path):
    path = tmp_path / "q.csv"
    text = "x" * 200_000
    path.write_text(f"question,answer\n{text},1\n", encoding="utf-8")
    assert file_rows(path)[0].values["question"] == text


def test_an_unclosed_quote_names_the_row_it_began_in(tmp_path):
    content = 'question,answer\na,1\n"b,2\nc,3\n'
    refused(tmp_path / "q.csv", content, "row that starts at line 3; is a double quote missing")


@pytest.mark.parametrize("name", ["q.csv", "q.tsv", "q.json"])
def test_nul_bytes_are_refused_by_line(tmp_path, name):
    between = b"\t" if name == "q.tsv" else b","
    content = b"question%banswer\na%b\x001\n" % (between, between)
    refused(tmp_path / name, content, "line 2: expected text, got a NUL byte")


def test_utf_16_without_a_mark_and_broken_utf_16_are_refused(tmp_path):
    refused(tmp_path / "q.csv", LINES["q.csv"].encode("utf-16-le"), "is the file UTF-16")
    refused(
        tmp_path / "q.jsonl", LINES["q.jsonl"].encode("utf-16") + b"\x00\xd8", "expected UTF-16"
    )


@pytest.mark.parametrize("name", ["q.jsonl", "q.csv", "q.tsv"])
def test_a_very_long_line_is_refused_within_bounded_memory(tmp_path, name, monkeypatch):
    monkeypatch.setattr(rows, "LONGEST_LINE", 1_000_000)
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(LINES[name].encode())
        file.seek(200_000_000, 1)  # a sparse file: 200 MB without a line break
        file.write(b"\n")
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=rf"{name}, line \d: expected a line of at most 1,000,000 bytes"
    ):
        file_rows(path)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_a_small_parquet_file_that_holds_very_much_is_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "q.parquet"
    # 4 GB of text as one dictionary entry; the file takes kilobytes.
    same = pyarrow.DictionaryArray.from_arrays(
        pyarrow.array([0] * 40_000, pyarrow.int32()), pyarrow.array(["a" * 100_000])
    )
    parquet.write_table(pyarrow.table({"question": same, "answer": [1] * 40_000}), path)
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"q\.parquet: expected at most .* 2 GiB in total"):
        file_rows(path)
    assert tracemalloc.get_traced_memory()[1] < 200_000_000
    tracemalloc.stop()


def test_parquet_with_more_rows_or_bytes_than_the_limits_is_refused_unread(tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.table({"answer": list(range(1000))}), path)
    assert [row.values["answer"] for row in file_rows(path)] == list(range(1000))
    for name in ("MOST_ROWS", "MOST_BYTES"):
        with monkeypatch.context() as patched:
            patched.setattr(rows, name, 999)
            with pytest.raises(ValueError, match="1,000 rows of"):
                file_rows(path)


def test_parquet_rows_with_equal_missing_and_nested_values_are_read_as_they_are(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    message_text = [
        {"q": f"text {n % 7}" if n % 5 else None, "n": n / 4, "tags": [str(n)]} for n in range(5000)
    ]
    parquet.write_table(
        pyarrow.Table.from_pylist(message_text), tmp_path / "q.parquet", row_group_size=700
    )
    assert [row.values for row in file_rows(tmp_path / "q.parquet")] == message_text


# --- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "template",
    ["{prob!r:>1000000000}", "{prob:>9}", "{prob!s}", "{prob.real}", "{prob[0]}", "{}", "{ }",
     "{prob", "prob}", "{a{b}}", "no column at all", "{{prob}}"],
)  # fmt: skip
def test_a_template_with_more_than_columns_is_refused_when_the_task_is_opened(template):
    with pytest.raises(ValueError, match=r"^template: expected"):
        open_task("question_file", path="q.jsonl", template=template)


def test_backslash_n_in_a_template_is_a_line_break_and_double_braces_are_braces(tmp_path):
    path = tmp_path / "q.jsonl"
    message_text = [
        {"context": f"Tom has {n} {{x}}.", "question": "How many?", "answer": n} for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in message_text), encoding="utf-8")
    task = open_task(
        "question_file", path=str(path), template="{{{context}}}\\n{question}\n{context}"
    )
    asked = {
        one.question for split in ("train", "validation", "test") for one in task.problems(split)
    }
    assert "{Tom has 2 {x}.}\nHow many?\nTom has 2 {x}." in asked

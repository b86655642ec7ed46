"""Tasks whose answers are programs: extraction, tests, grading, and the three data formats."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from selftaught.records import Problem, Rollout, rollout_from, to_json
from selftaught.rollouts.grading import check_gold, grade
from selftaught.rollouts.reading import shown
from selftaught.sandbox import missing
from selftaught.tasks import open_task
from selftaught.tasks.code_tasks import SHOTS
from selftaught.tasks.programs import ProblemTests, expected_value, extract, read_tests

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="needs the data folder")
needs_sandbox = pytest.mark.skipif(bool(missing()), reason=f"no sandbox: {missing()}")


def rollout(problem: Problem, completion: str, finish: str = "stop") -> Rollout:
    return Rollout(problem, "", completion, finish, "m", 0)  # type: ignore[arg-type]


def outcomes(task, problems, completions) -> list[str]:
    graded = grade([rollout(*pair) for pair in zip(problems, completions, strict=True)], task)
    return [str(one.outcome) for one in graded]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("    return 1", "    return 1"),
        ("Use a loop.\n```python\nx = 1\n```\nIt works.", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```py\nx = 1\n```\nBetter:\n```python\nx = 2\n```\nOutput:\n```text\n2\n```", "x = 2"),
        ("```python\nx = 1\n", "x = 1"),
        ("~~~python\nx = '```'\n~~~", "x = '```'"),
        ("````python\nx = '''\n```\n'''\n````", "x = '''\n```\n'''"),
        ("```bash\nls\n```", None),
        ("```python\n\n```", None),
        ("", None),
        (" \n\t", None),
        ("```Python\r\nx = 1\r\n```", "x = 1"),
        (
            "```python\ndef f(x):\n    return x\n```\nOutput:\n```\n4\n```",
            "def f(x):\n    return x",
        ),
        (
            "```python\ndef f(x): return x\n```\nExample:\n```python\nprint(f(3))\n```",
            "def f(x): return x",
        ),
        (
            "```python\ndef f(x): return x\n```\n```python\ndef test_f():\n    assert f(1)\n```",
            "def f(x): return x",
        ),
        (
            "```python\ndef f(x): return 0\n```\nNo:\n```python\ndef f(x): return x\n```",
            "def f(x): return x",
        ),
        ("```\ndef f(x): return x\n```\n```python\nprint(f(3))\n```", "def f(x): return x"),
        (
            "```python\ndef f(x): return x\n```\nTo show it:\n```python\ndef show(x): print(x)\n```",
            "def f(x): return x\n\ndef show(x): print(x)",
        ),
        (
            "```python\ndef g(): return 1\n```\n```python\ndef f(x): return 0\n```\nNo:\n```python\ndef f(x): return g()\n```",
            "def g(): return 1\n\ndef f(x): return g()",
        ),
        (
            "1. Code:\n    ```python\n    def f(x):\n        return x\n    ```",
            "def f(x):\n    return x",
        ),
    ],
)
def test_the_program_of_a_completion_is_the_last_block_in_python(text: str, program: str | None):
    assert extract(text) == program


def test_extraction_takes_time_linear_in_the_text():
    for unit in ("```", "```\n", "``` ```python\n", "~", "def f():\n", " `"):
        extract(unit * 100_000)  # a quadratic scan takes minutes


@pytest.mark.parametrize(
    ("tests", "value"),
    [
        (["assert f(1, [2]) == {'a': 3}"], "{'a': 3}"),
        (["assert math.isclose(f(1), 2.5)", "assert f(2) == 7"], "7"),
        (["def check(candidate):\n    assert candidate(1) == 'x'\n    assert candidate(2) == 3"], "'x'"),
        (["assert f(1)"], None),
        (["assert 4 == f(2)"], "4"),
        (["not python ("], None),
        (["(" * 3000], None),
    ],
)  # fmt: skip
def test_the_hint_is_the_expected_value_of_the_first_test(tests: list[str], value: str | None):
    assert expected_value(tests) == value


def test_a_hint_is_added_to_words_and_to_code():
    task = open_task("mbpp", data_dir="unused")
    known = ProblemTests(("assert f(1) == 7",))
    words = task.hint(Problem("a", "Write f.", "", None, known.text()))
    assert words.question == "Write f.\n(The first test expects the result 7.)"
    known = ProblemTests(("assert f(1) == 7",), entry_point="f", start="def f(x):\n")
    code = task.hint(Problem("a", known.start, "", None, known.text()))
    assert code.question == "# The first test expects the result 7.\ndef f(x):\n"
    assert len(task.hint(Problem("a", "Q", "", None, ProblemTests((f"assert f(1) == '{'x' * 9000}'",)).text())).question) < 400  # fmt: skip


def test_tests_are_stored_with_the_problem_and_other_problems_are_stored_as_before():
    problem = Problem(
        "a", "q", "g", None, ProblemTests(("assert f(1) == 2",), "import math").text()
    )
    read = rollout_from(json.loads(to_json(rollout(problem, "x")))).problem
    assert read == problem
    assert read_tests(read.tests) == ProblemTests(("assert f(1) == 2",), "import math")
    assert "tests" not in json.loads(to_json(rollout(Problem("a", "q", "g"), "x")))["problem"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        '{"tests": 3}',
        '{"tests": "assert 1"}',
        '{"tests": [1]}',
        '{"tests": [], "zzz": 1}',
    ],
)
def test_invalid_tests_are_named(text: str):
    with pytest.raises(ValueError, match="tests of a code task"):
        read_tests(text)


@needs_sandbox
def test_the_worked_examples_pass_their_tests_and_their_mutants_do_not():
    task = open_task("mbpp", data_dir="unused")
    assert outcomes(task, SHOTS, [shot.rationale for shot in SHOTS]) == ["right"] * 3
    mutants = [str(shot.rationale).replace("return", "return not") for shot in SHOTS]
    assert outcomes(task, SHOTS, mutants) == ["wrong"] * 3


@needs_sandbox
def test_every_failure_of_a_program_has_its_reason():
    task = open_task("mbpp", data_dir="unused", seconds=1.0)
    problem = Problem(
        "a", "q", "", None, ProblemTests(("assert f(2) == 4", "assert f(3) == 9")).text()
    )
    cases = {
        "def f(x):\n    return x * x": ("right", "tests"),
        "def f(x):\n    return x + x": ("wrong", "wrong: "),
        "def f(x):\n    return 1 / 0": ("wrong", "error: ZeroDivisionError"),
        "def g(x):\n    return x": ("wrong", "error: "),
        "def f(x:\n": ("wrong", "error: "),
        "def f(x):\n    while True: pass": ("wrong", "time limit"),
        "def f(x):\n    return x * x\x00": ("ungradable", "refused: "),
        "import sys; sys.exit(0)": ("wrong", "error: "),
        "# " + "x" * 200_000: ("ungradable", "refused: "),
    }
    graded = grade([rollout(problem, code) for code in cases], task)
    for one, (outcome, why) in zip(graded, cases.values(), strict=True):
        assert one.outcome == outcome
        assert one.decided_by is not None and one.decided_by.startswith(why)
        assert len(one.decided_by) < 400 and one.decided_by.isprintable()


@needs_sandbox
def test_a_completion_cut_by_the_token_limit_or_without_a_program_is_not_run():
    task = open_task("mbpp", data_dir="unused")
    graded = grade(
        [rollout(SHOTS[0], str(SHOTS[0].rationale), "length"), rollout(SHOTS[0], " \n")], task
    )
    assert [one.outcome for one in graded] == ["cut by length", "no answer"]


@needs_sandbox
def test_thoughts_are_not_part_of_a_program():
    task = open_task("mbpp", data_dir="unused")
    wrong = "```python\ndef count_words(a, b): return 0\n```"
    right = f"<think>{wrong}</think>\n```python\n{SHOTS[0].rationale}\n```"
    reverse = f"<think>```python\n{SHOTS[0].rationale}\n```</think>\n{wrong}"
    assert outcomes(task, [SHOTS[0]] * 2, [right, reverse]) == ["right", "wrong"]


@needs_sandbox
def test_a_program_is_shown_with_the_test_that_it_failed():
    task = open_task("mbpp", data_dir="unused")
    code = str(SHOTS[1].rationale).replace(">=", ">")
    (graded,) = grade([rollout(SHOTS[1], code)], task)
    text = shown(graded, Path("a.jsonl"))
    assert "decided by: wrong: assert remove_below([4, 1, 7, 3], 3) == [4, 7, 3]" in text
    assert text.count(code) == 1


@needs_data
@needs_sandbox
@pytest.mark.slow
def test_humaneval_s_solutions_are_right_and_empty_ones_wrong_as_body_and_as_program():
    task = open_task("humaneval", data_dir=str(DATA / "humaneval"))
    problems = task.problems("test")
    assert len(problems) == 164
    bodies = [problem.gold for problem in problems]
    wholes = [f"Here:\n```python\n{problem.question}{problem.gold}\n```" for problem in problems]
    assert outcomes(task, problems, bodies) == ["right"] * 164
    assert outcomes(task, problems[::4], wholes[::4]) == ["right"] * 41
    helper = next(problem for problem in problems if problem.id == "HumanEval/32")
    cheat = "def poly(xs, x):\n    return 0\n\ndef find_zero(xs):\n    return 0"
    assert outcomes(task, [helper], [cheat]) == ["wrong"]
    empty = outcomes(task, problems[::4], ["    return None\n"] * 41)
    assert empty == ["wrong"] * 41


@needs_data
@needs_sandbox
@pytest.mark.slow
def test_mbpp_s_solutions_pass_and_those_of_the_next_problem_do_not():
    task = open_task("mbpp", data_dir=str(DATA / "mbpp"))
    sizes = {split: len(task.problems(split)) for split in ("train", "validation", "test")}
    assert sizes == {"train": 374, "validation": 90, "test": 500}
    shadowing = next(one for one in task.problems("test") if '"entry_point": "sum"' in one.tests)
    assert outcomes(task, [shadowing] * 2, [shadowing.gold, "def sum(a, b): return 0"]) == ["right", "wrong"]  # fmt: skip
    problems = task.problems("validation")
    assert outcomes(task, problems, [one.gold for one in problems]) == ["right"] * 90
    others = [*problems[1:], problems[0]]
    assert outcomes(task, problems, [one.gold for one in others]) == ["wrong"] * 90
    check_gold(problems, task)


@pytest.mark.parametrize(
    ("split", "words"), [("train", "mbpp"), ("validation", "mbpp"), ("tset", "'tset'")]
)
def test_humaneval_says_that_it_has_test_problems_only(split: str, words: str):
    with pytest.raises(ValueError, match=words):
        open_task("humaneval", data_dir="unused").problems(split)


def test_rows_of_mbpp_without_a_split_are_divided_as_in_the_paper(tmp_path: Path):
    row = {"text": "Write f.", "code": "def f(): return 1", "test_list": ["assert f() == 1"]}
    ids = (2, 10, 11, 510, 511, 600, 601, 974)
    write(tmp_path / "mbpp.jsonl", [row | {"task_id": number} for number in ids])
    task = open_task("mbpp", data_dir=str(tmp_path))
    found = {
        split: [one.id for one in task.problems(split)] for split in ("train", "validation", "test")
    }
    assert found == {
        "train": ["mbpp/601", "mbpp/974"], "validation": ["mbpp/511", "mbpp/600"], "test": ["mbpp/11", "mbpp/510"],
    }  # fmt: skip


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@needs_sandbox
def test_problems_of_a_file_in_words_and_as_code(tmp_path: Path):
    rows: list[dict[str, object]] = [
        {"prompt": f"Write add{at}.", "tests": [f"assert add{at}(1) == {at + 1}", f"assert add{at}(0) == {at}"]}
        for at in range(12)
    ]  # fmt: skip
    task = open_task("code_file", path=write(tmp_path / "words.jsonl", rows))
    problem = task.problems("train")[0]
    assert problem.question.count("assert") == 1  # the other tests are not shown
    name = problem.question.split()[1].rstrip(".")
    number = name.removeprefix("add")
    good, bad = (f"def {name}(x): return x + {by}" for by in (number, f"{number} - 1"))
    assert outcomes(task, [problem] * 2, [good, bad]) == ["right", "wrong"]
    columns = {
        "tests": "test",
        "entry_point": "entry_point",
        "prompt_is_code": True,
        "solution": "body",
    }
    rows = [
        {"prompt": f"def inc(x):\n    '''Add {at}.'''\n", "entry_point": "inc", "body": f"    return x + {at}",
         "test": f"def check(candidate):\n    assert candidate(1) == {at + 1}"}
        for at in range(12)
    ]  # fmt: skip
    task = open_task("code_file", path=write(tmp_path / "code.jsonl", rows), **columns)
    problems = list(task.problems("train"))
    assert outcomes(task, problems, [one.gold for one in problems]) == ["right"] * len(problems)
    assert outcomes(task, problems, ["    return x"] * len(problems)).count("right") <= 1
    check_gold(problems, task)


@needs_sandbox
def test_solutions_that_fail_their_tests_are_refused_if_they_are_many(tmp_path: Path):
    rows: list[dict[str, object]] = [
        {"prompt": f"Write f{at}.", "tests": f"assert f{at}() == 1", "code": f"def f{at}(): return 2"}
        for at in range(12)
    ]  # fmt: skip
    task = open_task("code_file", path=write(tmp_path / "a.jsonl", rows), solution="code")
    with pytest.raises(ValueError, match="reference solution that fails its own tests"):
        check_gold(task.problems("train"), task)


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"prompt": "a"}, {}, 'column "tests"'),
        ({"prompt": "a", "tests": 3}, {}, "list of texts"),
        ({"prompt": "a", "tests": []}, {}, "list of texts"),
        ({"prompt": "a", "tests": ["f(2) == 4"]}, {}, "assert something"),
        ({"prompt": "a", "tests": "assert f("}, {}, "expected Python"),
        ({"prompt": "a", "tests": "assert f()"}, {"show_tests": -1}, "at least 0"),
        ({"prompt": " ", "tests": "assert 1"}, {}, "expected a text"),
        ({"tests": "assert 1"}, {}, 'no column "prompt"'),
        (
            {"prompt": "a", "tests": "def check(candidate): assert candidate()"},
            {},
            "give entry_point",
        ),
        ({"prompt": "def f():", "tests": "assert f()"}, {"prompt_is_code": True}, "entry_point"),
        ({"prompt": "a", "tests": "assert 1", "s": [1]}, {"setup": "s"}, "expected a text"),
    ],
)
def test_invalid_rows_are_named(tmp_path: Path, row: dict, options: dict, message: str):
    task = open_task("code_file", path=write(tmp_path / "a.jsonl", [row] * 3), **options)
    with pytest.raises(ValueError, match=message):
        task.problems("train")


@needs_sandbox
@pytest.mark.parametrize(
    ("tests", "words"),
    [
        (["assert f(2) == 4"], None),
        (["def helper():\n    assert f(2) == 4"], "empty program passes"),
        (["def check_it(c):\n    assert c(2) == 4"], "empty program passes"),
        (["assert sum([1, 2]) == 3"], "give entry_point"),
        (["import unittest\nclass T(unittest.TestCase):\n    def test_a(self): assert f(2) == 4"], "empty program"),
    ],
)  # fmt: skip
def test_tests_that_pass_without_a_program_are_refused(
    tmp_path: Path, tests: list[str], words: str | None
):
    rows: list[dict[str, object]] = [{"prompt": f"{at}", "tests": tests} for at in range(3)]
    task = open_task("code_file", path=write(tmp_path / "a.jsonl", rows))
    if words is None:
        check_gold(task.problems("train"), task)
    else:
        with pytest.raises(ValueError, match=words):
            check_gold(task.problems("train"), task)


@needs_sandbox
@pytest.mark.parametrize(
    "form", ['["assert f(2) == 4"]', "def test_f():\n    assert f(2) == 4", "assert f(2) == 4"]
)
def test_tests_of_a_table_are_read_and_called_in_every_form(tmp_path: Path, form: str):
    rows: list[dict[str, object]] = [{"prompt": f"{at}", "tests": form} for at in range(3)]
    task = open_task("code_file", path=write(tmp_path / "a.jsonl", rows))
    problem = task.problems("train")[0]
    programs = ["def f(x): return 2 * x", "def f(x): return x"]
    assert outcomes(task, [problem] * 2, programs) == ["right", "wrong"]


@needs_sandbox
def test_tests_that_cannot_run_make_no_answer_wrong():
    task = open_task("mbpp", data_dir="unused")
    for known in (
        ProblemTests(("assert f(",)),
        ProblemTests(("assert f(1)",), setup="import numpy"),
    ):
        problem = Problem("a", "q", "", None, known.text())
        assert outcomes(task, [problem], ["def f(x): return True"]) == ["ungradable"]
        with pytest.raises(ValueError, match="cannot be run"):
            check_gold([problem], task)


@needs_sandbox
@pytest.mark.parametrize(
    "start",
    ["def f(x):\n    'Square.'\n", "def f(x):\n", "def f(x):", "import math\n\ndef f(x):\n"],
)
@pytest.mark.parametrize(
    "answer",
    [
        "\n    return x * x",
        "    return x * x",
        "```python\ndef f(x):\n    return x * x\n```",
        "```python\nfrom __future__ import annotations\n\ndef f(x: int) -> int:\n    return x * x\n```",
    ],
)
def test_an_answer_continues_the_prompt_or_replaces_its_function(start: str, answer: str):
    task = open_task("humaneval", data_dir="unused")
    known = ProblemTests(("assert f(3) == 9",), entry_point="f", start=start)
    assert outcomes(task, [Problem("a", start, "", None, known.text())], [answer]) == ["right"]

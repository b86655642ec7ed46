"""Tasks whose answers are Python programs: MBPP, HumanEval, and files of your own; see docs/code.md."""

import ast
import builtins
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.tasks.base import Task, split_named
from selftaught.tasks.programs import Isolation, ProblemTests, code_task, defines, execution
from selftaught.tasks.question_file import held_out
from selftaught.tasks.rows import Row, file_rows, hub_rows, is_file

STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\n@", "\n```")
"""Stop strings after a function body (Chen et al. 2021, arXiv:2107.03374, Section 2.2)."""


# --- MBPP ----------------------------------------------------------------------------------------

INSTRUCTED = PromptStyle(
    "few-shot",
    question="You are an expert Python programmer, and here is your task: {question}\n[BEGIN]\n",
    answer="{rationale}\n[DONE]\n\n",
    stop=("[DONE]",),
)
"""Prompt of Austin et al. 2021 (arXiv:2108.07732), Section 4."""


def _shot(number: int, text: str, code: str, *tests: str) -> Problem:
    return Problem(
        f"code-shot-{number}", _asked(text, tests, 3), code, code, ProblemTests(tests).text()
    )


def _asked(text: str, tests: Sequence[str], shown: int) -> str:
    """Return a question with the first tests that its program must pass.

    Raises:
        ValueError: the number of tests is negative.
    """
    if shown < 0:
        raise ValueError(f"Expected show_tests of at least 0, got {shown}.")
    if not shown or not tests:
        return text
    return f"{text} Your code should pass these tests:\n\n" + "\n".join(tests[:shown])


SHOTS = (
    _shot(
        1, "Write a function to count the words of a sentence that begin with a given letter.",
        "def count_words(sentence, letter):\n"
        "    words = sentence.lower().split()\n"
        "    return sum(word.startswith(letter.lower()) for word in words)",
        "assert count_words('Blue birds sing before breakfast', 'b') == 4",
        "assert count_words('one two three', 'T') == 2",
        "assert count_words('', 'a') == 0",
    ),
    _shot(
        2, "Write a function to remove the numbers below a limit from a list, in the same order.",
        "def remove_below(numbers, limit):\n"
        "    return [number for number in numbers if number >= limit]",
        "assert remove_below([4, 1, 7, 3], 3) == [4, 7, 3]",
        "assert remove_below([], 5) == []",
        "assert remove_below([-2, -8], -5) == [-2]",
    ),
    _shot(
        3, "Write a function to find the largest difference between neighboring elements of a tuple.",
        "def largest_step(values):\n"
        "    steps = [abs(right - left) for left, right in zip(values, values[1:])]\n"
        "    return max(steps, default=0)",
        "assert largest_step((3, 9, 4)) == 6",
        "assert largest_step((5,)) == 0",
        "assert largest_step((1, -7, 2, 2)) == 9",
    ),
)  # fmt: skip
"""Worked examples written for this package, as many as in the prompt of Austin et al. 2021."""


def mbpp(
    data_dir: str | None = None,
    show_tests: int = 3,
    sandbox: Isolation = "namespaces",
    seconds: float = 5.0,
    memory_megabytes: int = 512,
) -> Task:
    """Short Python programs with three tests each (MBPP).

    Args:
        data_dir: folder with mbpp.jsonl. Default: download from the Hub.
        show_tests: number of tests that are shown in the question.
        sandbox: isolation of the programs: "namespaces", or the weaker "process".
        seconds: limit of the CPU time of one program; the wall-clock limit is twice that.
        memory_megabytes: memory limit of one program.
    """

    @cache
    def splits() -> dict[str, list[Problem]]:
        if data_dir is not None:
            rows = file_rows(Path(data_dir) / "mbpp.jsonl")
            named = [(_split(row), row) for row in rows]
        else:
            names = ("train", "validation", "test")
            named = [
                (name, row)
                for name in names
                for row in hub_rows("google-research-datasets/mbpp", "full", name)
            ]
        found: dict[str, list[Problem]] = {"train": [], "validation": [], "test": []}
        for name, row in named:
            if name in found:
                found[name].append(_mbpp_problem(row, show_tests))
        return found

    return code_task(
        "mbpp", splits, replace(INSTRUCTED, shots=lambda problem: SHOTS),
        execution(sandbox, seconds, memory_megabytes), license="cc-by-4.0",
        data_sets=("google-research-datasets/mbpp",),
        facts="MBPP, CC-BY-4.0, Austin et al. 2021 (arXiv:2108.07732)",
    )  # fmt: skip


def _split(row: Row) -> str:
    """Return the split of a row of MBPP, by its task number if the file does not say it."""
    split = row.values.get("split")
    if split is not None:
        return str(split)
    number = str(row.values.get("task_id")).rpartition("/")[2]
    if not number.isdecimal():
        raise ValueError(
            f"{row.where}: expected a field task_id with a number, got {number[:40]!r}."
        )
    bounds = {"prompt": 10, "test": 510, "validation": 600}  # Austin et al. 2021, Section 3.1
    return next((name for name, last in bounds.items() if int(number) <= last), "train")


def _mbpp_problem(row: Row, shown: int) -> Problem:
    values: dict[str, Any] = row.values
    match values:
        case {"task_id": id, "text": str(text), "code": str(code), "test_list": list(tests)}:
            pass
        case _:
            raise ValueError(
                f"{row.where}: expected the fields task_id, text, code and test_list of MBPP, got the "
                f"fields {', '.join(map(repr, values))}."
            )
    code = _unix(code).rstrip()
    tests = tuple(_unix(str(one)).strip() for one in tests)
    setup = _unix(str(values.get("test_setup_code") or ""))
    known = ProblemTests(tests, setup, _shadowing(code, tests))
    name = str(id) if "/" in str(id) else f"mbpp/{id}"
    return Problem(name, _asked(text.strip(), tests, shown), code, code, known.text())


def _shadowing(code: str, tests: Sequence[str]) -> str:
    """Return the name that tests call, if it is a builtin function which the program replaces.

    Without it, the tests would call the builtin function.
    """
    for name in re.findall(r"^def[ \t]+(\w+)", code, re.MULTILINE):
        if hasattr(builtins, name) and any(re.search(rf"\b{name}\(", one) for one in tests):
            return name
    return ""


def _unix(text: str) -> str:
    """Return a text with the line breaks of Unix."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


# --- HumanEval -----------------------------------------------------------------------------------

CONTINUED = PromptStyle("zero-shot", question="{question}", answer="{rationale}\n", stop=STOPS)
"""Prompt of Chen et al. 2021 (arXiv:2107.03374): the completion continues the function."""


def humaneval(
    data_dir: str | None = None,
    sandbox: Isolation = "namespaces",
    seconds: float = 5.0,
    memory_megabytes: int = 512,
) -> Task:
    """Function bodies from a header and a docstring (HumanEval). It has a test split only.

    Args:
        data_dir: folder with HumanEval.jsonl. Default: download from the Hub.
        sandbox: isolation of the programs: "namespaces", or the weaker "process".
        seconds: limit of the CPU time of one program; the wall-clock limit is twice that.
        memory_megabytes: memory limit of one program.
    """

    @cache
    def tests() -> list[Problem]:
        rows = (
            hub_rows("openai/openai_humaneval", None, "test")
            if data_dir is None
            else file_rows(Path(data_dir) / "HumanEval.jsonl")
        )
        columns = CodeColumns(
            "prompt", "test", "entry_point", None, "canonical_solution", "task_id"
        )
        return [_problem(row, columns, "test", True, 0) for row in rows]

    def problems(split: str) -> list[Problem]:
        if split in ("train", "validation"):
            raise ValueError(
                "HumanEval has no problems to train on or to validate with. Train with the task mbpp or "
                "code_file, then measure with `selftaught evaluate --task humaneval`."
            )
        return split_named(lambda: {"test": tests()}, split, "humaneval")

    task = code_task(
        "humaneval", dict, CONTINUED, execution(sandbox, seconds, memory_megabytes),
        license="mit", data_sets=("openai/openai_humaneval",),
        facts="HumanEval, MIT licence, Chen et al. 2021 (arXiv:2107.03374)",
    )  # fmt: skip
    return replace(task, problems=problems)


# --- your own problems ---------------------------------------------------------------------------


@dataclass(frozen=True)
class CodeColumns:
    """Names of the columns of a table of code problems. Optional ones may be None."""

    prompt: str
    tests: str
    entry_point: str | None
    setup: str | None
    solution: str | None
    id: str | None


def code_file(
    path: str,
    *,
    prompt: str = "prompt",
    tests: str = "tests",
    entry_point: str | None = None,
    setup: str | None = None,
    solution: str | None = None,
    id: str | None = None,
    prompt_is_code: bool = False,
    show_tests: int = 1,
    validation: str | None = None,
    test: str | None = None,
    seed: int = 0,
    sandbox: Isolation = "namespaces",
    seconds: float = 5.0,
    memory_megabytes: int = 512,
) -> Task:
    """Programs with tests from a file or a Hub data set.

    Args:
        path: .jsonl, .json, .csv, .tsv or .parquet file, or name of a Hub data set.
        prompt: name of the column with the task in words, or the beginning of the program.
        tests: name of the column with the tests: a list of statements, or one text. If it defines a
            function `check`, it is called with the function of `entry_point`, as in HumanEval.
        entry_point: name of the column with the name of the tested function.
        setup: name of the column with code that runs before the tests.
        solution: name of the column with a correct program.
        id: name of the column with a unique identifier. Without it, rows are numbered.
        prompt_is_code: the prompt is the beginning of the program, which the completion continues.
        show_tests: number of tests that are shown in the question. Not used with prompt_is_code.
        validation, test: file, or split of the Hub data set. Without it, a tenth of the problems, at
            least 1 and at most 500, is drawn at random.
        seed: random seed for drawing the validation and test problems.
        sandbox: isolation of the programs: "namespaces", or the weaker "process".
        seconds: limit of the CPU time of one program; the wall-clock limit is twice that.
        memory_megabytes: memory limit of one program.
    """
    columns = CodeColumns(prompt, tests, entry_point, setup, solution, id)
    sources = {"train": path if is_file(path) else "train", "validation": validation, "test": test}

    @cache
    def splits() -> dict[str, list[Problem]]:
        found: dict[str, list[Problem]] = {}
        for name, source in sources.items():
            if source is not None:
                rows = file_rows(Path(source)) if is_file(path) else hub_rows(path, None, source)
                found[name] = [
                    _problem(row, columns, f"{name}-{at}", prompt_is_code, show_tests)
                    for at, row in enumerate(rows)
                ]
        return held_out(_unique(found), seed)

    return code_task(
        "code_file", splits, CONTINUED if prompt_is_code else replace(INSTRUCTED, name="zero-shot"),
        execution(sandbox, seconds, memory_megabytes), facts=f"programs with tests from {path}",
        data_sets=() if is_file(path) else (path,),
    )  # fmt: skip


def _unique(splits: dict[str, list[Problem]]) -> dict[str, list[Problem]]:
    """Return the splits after a check of the ids.

    Raises:
        ValueError: an id is repeated.
    """
    seen: set[str] = set()
    for problem in (one for problems in splits.values() for one in problems):
        if problem.id in seen:
            raise ValueError(f"Expected unique ids; the id {problem.id!r} is repeated. Change one.")
        seen.add(problem.id)
    return splits


def _problem(row: Row, columns: CodeColumns, name: str, is_code: bool, shown: int) -> Problem:
    """Return the problem of a row of a table.

    Raises:
        ValueError: a column is missing or has a value of another type.
    """
    text, entry = _column(row, columns.prompt), _column(row, columns.entry_point)
    if not text.strip():
        raise ValueError(f'{row.where}: expected a text in the column "{columns.prompt}".')
    tests = _tests(row, columns.tests, entry)
    solution = _column(row, columns.solution)
    start = text if is_code else ""
    if start and not entry:
        raise ValueError(f"{row.where}: prompt_is_code needs the column of entry_point.")
    entry = entry or _shadowing(solution, tests)
    known = ProblemTests(tests, _column(row, columns.setup), entry, start)
    question = text if is_code else _asked(text.strip(), tests, shown)
    id = _column(row, columns.id) or name
    return Problem(id, question, solution, solution or None, known.text())


def _tests(row: Row, column: str, entry: str) -> tuple[str, ...]:
    """Return the tests of a row; a function `check` is called with the entry point, and functions
    named `test...` without parameters are called.

    Raises:
        ValueError: the tests are not texts in Python, or a function `check` has no entry point.
    """
    value = row.values.get(column)
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _list_in(value)  # tables without lists have them as JSON
    tests = value if isinstance(value, list) else [value]
    if column not in row.values:
        _column(row, column)
    if not tests or not all(isinstance(one, str) and one.strip() for one in tests):
        raise ValueError(
            f'{row.where}: expected a text or a list of texts in the column "{column}", got '
            f"{str(value)[:60]!r}."
        )
    found = [_unix(str(one)) for one in tests]
    for test in found:
        try:
            ast.parse(test)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(
                f'{row.where}: expected Python in the column "{column}", got {test[:60]!r} ({error}).'
            ) from None
    whole = "\n".join(found)
    if not any(map(_asserts, ast.walk(ast.parse(whole)))):
        raise ValueError(
            f'{row.where}: expected tests that assert something in the column "{column}", such as '
            f"assert f(1) == 2; got {whole[:60]!r}."
        )
    if functions := re.findall(r"^def[ \t]+(test\w*)\([ \t]*\)", whole, re.MULTILINE):
        return ("\n".join([whole, *(f"{name}()" for name in functions)]),)
    if not defines(whole, "check"):
        return tuple(found)
    if not entry:
        raise ValueError(
            f'{row.where}: the column "{column}" defines a function check, which is called with the '
            "tested function; give entry_point, the name of the column with its name."
        )
    return (f"{whole}\ncheck({entry})",)


def _asserts(node: ast.AST) -> bool:
    """Return whether a part of a test can fail it: `assert`, `raise`, or a call of `assert...`."""
    match node:
        case ast.Assert() | ast.Raise():
            return True
        case ast.Call(func=ast.Attribute(attr=name)) | ast.Call(func=ast.Name(id=name)):
            return name.startswith("assert")
    return False


def _list_in(text: str) -> object:
    """Return the list that a text is as JSON, or the text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, list) else text


def _column(row: Row, column: str | None) -> str:
    """Return the text in a column; empty without a column or a value."""
    if column is None:
        return ""
    if column not in row.values:
        raise ValueError(
            f'{row.where}: there is no column "{column}"; the columns are {", ".join(row.values)}.'
        )
    value = row.values[column]
    if value is None:
        return ""
    if isinstance(value, str):
        return _unix(value)
    if isinstance(value, int):
        return str(value)
    raise ValueError(
        f'{row.where}: expected a text in the column "{column}", got {str(value)[:60]!r}.'
    )

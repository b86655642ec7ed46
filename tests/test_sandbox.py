"""Programs and their tests in the sandbox: HumanEval, MBPP, values, handles, limits."""

import ast
import builtins
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from datetime import date, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selftaught.sandbox import Limits, Program, Result, Sandbox, missing
from selftaught.sandbox.pool import Isolation
from selftaught.sandbox.values import Decoder, Encoder, Unsendable, Violation

DATA = Path(os.environ.get("SELFTAUGHT_DATA", Path(__file__).parents[2] / "shared" / "data"))
HUMANEVAL = DATA / "humaneval" / "HumanEval.jsonl"
MBPP = DATA / "mbpp" / "mbpp.jsonl"
MODES: list[Isolation] = ["process"] if missing() else ["namespaces", "process"]


@pytest.fixture(scope="module", params=MODES)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(workers=2, isolation=request.param) as sandbox:
        yield sandbox


def result(sandbox: Sandbox, code: str, *tests: str, **options: Any) -> Result:
    return sandbox.run([Program(code, tests, **options)])[0]


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def human_eval(row: dict[str, Any], body: str) -> Program:
    entry = row["entry_point"]
    return Program(row["prompt"] + body, (f"{row['test']}\ncheck({entry})",), entry=(entry,))


def parsed(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", SyntaxWarning if sys.version_info >= (3, 12) else DeprecationWarning
        )
        return ast.parse(source)


def mbpp(row: dict[str, Any]) -> Program:
    """A solution of MBPP. Some have the name of a builtin function."""
    defined = {getattr(node, "name", "") for node in parsed(row["code"]).body}
    entry = tuple(
        name for name in defined if hasattr(builtins, name) and f"{name}(" in row["test_list"][0]
    )
    return Program(row["code"], tuple(row["test_list"]), setup=row["test_setup_code"], entry=entry)


@pytest.mark.slow
@pytest.mark.skipif(not HUMANEVAL.exists(), reason="needs HumanEval, in SELFTAUGHT_DATA")
def test_all_solutions_of_humaneval_are_right_and_mutants_are_not(sandbox: Sandbox):
    problems = rows(HUMANEVAL)
    assert len(problems) == 164
    if sandbox.isolation == "process":
        problems = problems[::5]
    results = sandbox.run([human_eval(row, row["canonical_solution"]) for row in problems])
    assert {found.outcome for found in results} == {"right"}
    for body in ("    return None\n", "    raise ValueError\n", "    return args\n"):
        mutants = sandbox.run([human_eval(row, body) for row in problems[::3]])
        assert "right" not in {found.outcome for found in mutants}


@pytest.mark.slow
@pytest.mark.skipif(not MBPP.exists(), reason="needs MBPP, in SELFTAUGHT_DATA")
def test_all_solutions_of_mbpp_are_right():
    with Sandbox(Limits(seconds=20), workers=2, isolation=MODES[0]) as sandbox:
        results = sandbox.run([mbpp(row) for row in rows(MBPP)])
    assert Counter(found.outcome for found in results) == {"right": 964}


@pytest.mark.slow
@pytest.mark.skipif(not MBPP.exists(), reason="needs MBPP, in SELFTAUGHT_DATA")
def test_verdicts_are_those_of_plain_execution(sandbox: Sandbox):
    """The naive twin runs program and tests in one interpreter.

    Solutions are exchanged between problems as well, so that not all of them are right.
    """
    problems = rows(MBPP)[:30]
    programs = [mbpp(row) for row in problems]
    for row, other in itertools.pairwise(problems):
        name, wrong = (parsed(each["test_list"][0]) for each in (row, other))
        names = [
            next(node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name))
            for tree in (name, wrong)
        ]  # fmt: skip
        programs.append(
            Program(f"{other['code']}\n{names[0]} = {names[1]}", tuple(row["test_list"]))
        )
    for program, found in zip(programs, sandbox.run(programs), strict=True):
        source = "\n".join([program.code, program.setup, *program.tests])
        plain = subprocess.run([sys.executable, "-I", "-S", "-c", source], capture_output=True)
        assert (found.outcome == "right") == (plain.returncode == 0), (program, found)


def test_results_are_in_the_order_of_the_programs_and_do_not_depend_on_it(sandbox: Sandbox):
    programs = [Program(f"def f(): return {n % 3}", ("assert f() == 1",)) for n in range(20)]
    expected = ["right" if n % 3 == 1 else "wrong" for n in range(20)]
    assert [found.outcome for found in sandbox.run(programs)] == expected
    assert [found.outcome for found in sandbox.run(programs[::-1])] == expected[::-1]


def test_the_first_test_that_fails_is_named(sandbox: Sandbox):
    code = "def f(x):\n    return 10 // x"
    assert result(sandbox, code, "assert f(1) == 10", "assert f(3) == 4") == Result(
        "wrong", "assert f(3) == 4", 1
    )
    found = result(sandbox, code, "assert f(0) == 1")
    assert found.outcome == "error"
    assert found.detail.startswith("ZeroDivisionError: ")
    found = result(sandbox, "def f(:", "assert f() == 1")
    assert (found.outcome, found.test) == ("error", None)
    assert "SyntaxError" in found.detail
    found = result(sandbox, "x = 1", "assert f() == 1")
    assert found.outcome == "error"
    assert "NameError" in found.detail
    assert result(sandbox, "x = 1", "assert (").outcome == "refused"
    found = result(sandbox, "def f(): return 1", "assert f() == 2, 'a\\x1b[31m\\n' + 'x' * 1000")
    assert len(found.detail) == 300
    assert found.detail.isprintable()


def test_programs_that_are_not_run(sandbox: Sandbox):
    assert result(sandbox, "x = 1\0", "pass") == Result(
        "refused", "the source contains NUL characters"
    )
    assert result(sandbox, "x" * 100_001, "pass").outcome == "refused"
    assert result(sandbox, "x = 1") == Result("refused", "there are no tests")
    assert result(sandbox, "x = '\ud800'", "pass").outcome == "error"


VALUES = [
    None, True, 0, -1, 2**63, -(2**200), 10**5000, 0.1, -0.0, math.inf, -math.inf, 1e300, 1 + 2j, "", "é\n\0",
    "\ud800", "\ud83d\ude00", "\U0001f600", b"\0\xff", [], [[]], (), ((),), (1,), set(), {1, 2}, frozenset({3}), {},
    {"b": 1, "a": [2]}, {(1, 2): {3: 4}}, {None: 1, 1.5: 2}, range(3), range(10, 0, -3), deque([1, 2], 5),
    Counter("aab"), OrderedDict(b=1, a=2), Decimal("1.10"), Fraction(1, 3), date(2024, 2, 29), timedelta(1, 2),
    bytearray(b"ab"), int, type(None), ["str", 1], ["ref", 0],
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_arrive_as_they_were_sent(value: Any):
    received = sent(value)
    assert type(received) is type(value)
    assert received == value
    assert isinstance(value, int) or repr(received) == repr(value)


def sent(value: Any) -> Any:
    def refuse(*_: Any) -> Any:
        raise Unsendable("not data")

    message = json.loads(json.dumps(Encoder(refuse).value(value), allow_nan=False))
    return Decoder(refuse).value(message)


scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.binary()
    | st.text(st.characters(exclude_categories=())) | st.complex_numbers(allow_nan=False)
)  # fmt: skip
hashable = scalars | st.tuples(scalars, scalars) | st.frozensets(scalars)
anything = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner) | st.dictionaries(hashable, inner) | st.sets(hashable) | st.tuples(inner)
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(anything)
def test_nested_values_arrive_as_they_were_sent(value: Any):
    received = sent(value)
    assert received == value
    assert type(received) is type(value)
    if isinstance(value, dict):
        assert list(received) == list(value)


def test_shared_and_circular_values_keep_their_structure():
    inner = [1]
    first, second = sent([inner, inner])
    assert first is second
    circular: list[Any] = []
    circular.append(circular)
    received = sent(circular)
    assert received[0] is received


def test_subclasses_arrive_as_plain_values():
    class Always(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class Text(str):
        def __str__(self) -> str:
            return "other"

    point = namedtuple("point", "x y")
    for value, plain in (
        (Always(3), 3), (Text("a"), "a"), (point(1, 2), (1, 2)), (defaultdict(int, a=1), {"a": 1}),
        (type("L", (list,), {})([1]), [1]), (type("D", (dict,), {})(a=1), {"a": 1}),
    ):  # fmt: skip
        received = sent(value)
        assert type(received) is type(plain)
        assert received == plain


@pytest.mark.parametrize(
    "message",
    [
        [], [1], ["unknown"], ["ref", 0], ["ref", -1], ["int", 5], ["int", "x"], ["float", "1"], ["dict", 1],
        ["dict", ["list"], 1], ["set", ["list"]], ["bytes", "x"], ["type", "eval"], ["range", 1], {"a": 1}, ["deque"],
        ["array", "z"], ["complex", "1"], ["date", "x"], ["str", -1], ["str", "a"], ["fraction", "1", "0"], ["list", {}],
        ["tuple", ["ref", 3]], ["decimal", []], ["timedelta", "a"], ["keys", ["list"]],
    ],
    ids=str,
)  # fmt: skip
def test_invalid_messages_are_refused(message: Any):
    def unknown(*_: Any) -> Any:
        raise Violation("unknown tag")

    with pytest.raises(Violation):
        Decoder(unknown).value(message)


def test_arguments_are_changed_in_place(sandbox: Sandbox):
    code = "def f(a, b, c, d):\n    a.sort(); b['k'] = [a]; c.clear(); d[0].append(5); return a"
    test = (
        "a, b, c, d = [3, 1], {}, {1}, ([], 2)\nr = f(a, b, c, d)\n"
        "assert r is a and a == [1, 3] and b == {'k': [[1, 3]]} and c == set() and d == ([5], 2)\n"
        "assert b['k'][0] is a"
    )
    assert result(sandbox, code, test) == Result("right")


def test_objects_of_the_program_are_handles(sandbox: Sandbox):
    code = (
        "class Node:\n    kinds = [1]\n    def __init__(s, v): s.v = v; s.next = None\n"
        "    def plus(s, n): return s.v + n\n    def __getitem__(s, k): return k * 2\n"
        "    def __str__(s): return f'<{s.v}>'\n"
        "def total(n):\n    return 0 if n is None else n.v + total(n.next)\ndef make(): return lambda x: x + 1"
    )
    test = (
        "a, b = Node(1), Node(2)\na.next = b\nassert total(a) == 3 and a.plus(1) == 2 and a[4] == 8\n"
        "assert str(a) == '<1>' and Node.kinds == [1] and make()(1) == 2 and a.next is b\n"
        "assert total.__name__ == 'total' and [x.v for x in [a, b]] == [1, 2]"
    )
    assert result(sandbox, code, test) == Result("right")
    for test in ("assert Node(1) == Node(1)", "assert Node(1)", "assert not Node(1)", "assert len(Node(1)) == 1",
                 "assert Node(1) in [Node(1)]", "assert 1 in Node(1)", "assert Node(1) < Node(2)", "sorted([Node(1), Node(2)])",
                 "assert isinstance(1, Node)", "assert list(Node(1))", "import copy; copy.copy(Node(1))"):  # fmt: skip
        assert result(sandbox, code, test).outcome == "error"


def test_exceptions_have_the_class_of_the_program(sandbox: Sandbox):
    code = "class Mine(ValueError): pass\ndef f(x):\n    if x: raise Mine('a', 1)\n    return {}[x]"
    test = (
        "try:\n    f(1)\nexcept ValueError as e:\n    assert e.args == ('a', 1)\nelse:\n    assert False\n"
        "try:\n    f(0)\nexcept KeyError:\n    pass\nelse:\n    assert False"
    )
    assert result(sandbox, code, test) == Result("right")


def test_iterators_arrive_with_their_items(sandbox: Sandbox):
    code = (
        "def f(n):\n    yield from range(n)\ndef g(): return map(str, [1, 2])\n"
        "def h(): return {'a': 1}.keys(), {'a': 1}.values(), {'a': 1}.items()\ndef s(i): return sum(i)"
    )
    test = (
        "assert list(f(3)) == [0, 1, 2] and next(f(1)) == 0 and list(g()) == ['1', '2']\n"
        "k, v, i = h()\nassert k == {'a'} and list(v) == [1] and i == {('a', 1)}\nassert s(iter([1, 2])) == 3"
    )
    assert result(sandbox, code, test) == Result("right")


def test_tests_use_the_real_builtins_and_modules(sandbox: Sandbox):
    code = (
        "import math\nfrom collections import Counter\nmath.isclose = lambda *a: True\n"
        "def sorted(*a): return True\nlen = abs = lambda *a: 7\nrange = 1\ndef sum(a, b): return a + b\n"
        "class re:\n    match = lambda *a: True\nlimit = [1]\ndef f(x): return Counter(x)"
    )
    test = "assert not math.isclose(1, 2) and len([1]) == 1 and sorted([2, 1]) == [1, 2] and limit == [1]"
    assert result(
        sandbox, code, test, "assert f('aa') == Counter('aa')", "assert abs(-1) == 1"
    ) == Result("right")
    assert result(sandbox, code, "assert not re.match('a', 'b')") == Result("right")
    assert result(sandbox, code, "assert sum(1, 2) == 3").outcome == "error"
    assert result(sandbox, code, "assert sum(1, 2) == 3", entry=("sum",)) == Result("right")


def test_setup_comes_before_the_tests_and_the_entry_point_is_never_taken_from_it(sandbox: Sandbox):
    setup = "def helper(x): return x * 2\ndef f(x): return 4\nnode = make(1)"
    code = "def helper(x): return 0\ndef f(x): return x\ndef make(x): return [x]"
    tests = "assert helper(2) == 4", "assert node == [1]"
    assert result(sandbox, code, *tests, "assert f(4) == 4", setup=setup, entry=("f",)) == Result(
        "right"
    )
    assert result(sandbox, code, "assert f(3) == 4", setup=setup, entry=("f",)).outcome == "wrong"
    assert (
        result(
            sandbox, "x = 1", "assert f(3) == 4", setup="def f(x): return 4", entry=("f",)
        ).outcome
        == "error"
    )


def test_functions_of_the_tests_cannot_be_arguments(sandbox: Sandbox):
    code = "def f(g, x): return g(x)"
    found = result(sandbox, code, "try:\n    f(lambda x: x, 1)\nexcept Exception:\n    pass")
    assert found.outcome == "error"
    assert "function cannot be sent" in found.detail
    assert result(sandbox, code, "assert f(len, [1]) == 1 and f(str, 1) == '1'") == Result("right")


def test_a_dataclass_and_a_type_alias_work(sandbox: Sandbox):
    code = (
        "from dataclasses import dataclass\nfrom typing import *\nimport zoneinfo, sqlite3, decimal, csv\n"
        "@dataclass\nclass P:\n    x: int\ndef f(p: Optional[P]) -> int: return p.x\n"
        "if __name__ == '__main__': raise ValueError"
    )
    assert result(sandbox, code, "assert f(P(3)) == 3") == Result("right")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_time_limits(mode: Any):
    with Sandbox(Limits(seconds=1, wall_seconds=3), workers=1, isolation=mode) as sandbox:
        loop, sleep = "while True: pass", "import time\ntime.sleep(100)"
        programs = [
            Program(loop, ("pass",)), Program(sleep, ("pass",)),
            Program("x = 1", (loop,)), Program("x = 1", (sleep,)), Program("def f(): return 1", ("assert f() == 1",)),
        ]  # fmt: skip
        found = [each.outcome for each in sandbox.run(programs)]
    assert found == ["time limit"] * 4 + ["right"]


def test_a_worker_that_was_killed_is_replaced():
    with Sandbox(workers=1, isolation=MODES[0]) as sandbox:
        worker = sandbox._free.get()
        assert worker is not None
        worker.process.kill()
        worker.process.wait()
        sandbox._free.put(worker)
        assert result(sandbox, "def f(): return 1", "assert f() == 1") == Result("right")


def test_a_closed_sandbox_refuses():
    sandbox = Sandbox(workers=1, isolation=MODES[0])
    sandbox.close()
    sandbox.close()
    with pytest.raises(ValueError, match="closed"):
        sandbox.run([])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="seconds above 0"):
        Limits(seconds=0)
    with pytest.raises(ValueError, match="at least 1 worker"):
        Sandbox(workers=0)
    with pytest.raises(ValueError, match="namespaces or process"):
        Sandbox(isolation="none")  # type: ignore[arg-type]


def test_without_namespaces_the_error_names_what_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match=r"darwin.*--task-options.sandbox process") as raised:
        Sandbox(workers=1)
    assert missing() == [raised.value.args[-1]]


@pytest.mark.skipif(os.geteuid() != 0 or missing() != [], reason="changes its user")
def test_an_ordinary_user_has_the_same_isolation():
    python = "/usr/bin/python3"
    version = "import sys; sys.exit(sys.version_info < (3, 11))"
    if not Path(python).exists() or subprocess.run([python, "-c", version]).returncode:
        pytest.skip("needs an interpreter that all users can read")
    code = (
        "import os; from selftaught.sandbox import *\nassert os.getuid() == 65534 and missing() == []\n"
        "program = 'import os\\ndef f(): return os.getpid(), os.path.exists(\"/home\")'\n"
        'with Sandbox(workers=1) as s: print(s.run([Program(program, ("assert f() == (1, False)",))])[0].outcome)'
    )
    done = subprocess.run(
        [python, "-c", code], user=65534, group=65534, extra_groups=[], cwd="/", capture_output=True,
        text=True, env={"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip("other users cannot read this folder")
    assert done.stdout == "right\n", done.stderr


@pytest.mark.parametrize(
    ("code", "test", "outcome"),
    [
        ("def f(): raise Exception('negative')", "try: f()\nexcept Exception as e: assert str(e) == 'negative' and type(e) is Exception", "right"),
        ("class E(Exception): pass\ndef f(): raise E('a', 1)", "try: f()\nexcept Exception as e: assert e.args == ('a', 1)", "right"),
        ("import sys\ndef f(): sys.exit()", "try: f()\nexcept Exception: pass", "error"),
        ("import sys\ndef f(): sys.exit(3)", "try: f()\nexcept SystemExit as e: assert e.code == 3", "right"),
        ("def f(it): return list(it)", "assert f(it=iter([1, 3])) == [1, 3]", "right"),
        ("def f(its): return sorted(v for it in its for v in it)", "assert f([iter([1, 3]), iter([2])]) == [1, 2, 3]", "right"),
        ("def f(x):\n    for i in range(len(x)): x[i] = float(x[i])", "x = [1, 2]; f(x); assert str(x) == '[1.0, 2.0]'", "right"),
        ("def f(x):\n    for i in range(len(x)): x[i] = bool(x[i])", "x = [1, 0]; f(x); assert type(x[0]) is int", "wrong"),
        ("def copy(x): return list(x)", "assert copy([1]) == [1]", "right"),
        ("operator = '+'\ndef f(): return operator", "assert f() == operator", "right"),
        ("class M:\n    def isclose(self, a, b): return True\nmath = M()\ndef f(): return 1.0", "assert math.isclose(f(), 2.0)", "wrong"),
        ("import re\ndef f(s): return re.match('[0-9]+$', s)", "assert f('12'); assert not f('x'); assert f('7').group() == '7'", "right"),
        ("import re\ndef f(s): return re.match('[0-9]+$', s)", "assert f('x')", "wrong"),
    ],
)  # fmt: skip
def test_programs_are_right_exactly_where_plain_python_says_so(
    sandbox: Sandbox, code: str, test: str, outcome: str
):
    (found,) = sandbox.run([Program(code, (test,))])
    assert found.outcome == outcome, found

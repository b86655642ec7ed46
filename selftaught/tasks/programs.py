"""Programs as answers: their extraction from completions, their tests, and the hint of STaR.

A program is correct if it passes all tests of its problem (Hosseini et al. 2024, arXiv:2402.06457,
Section 3). The tests run in a sandbox; see docs/code.md.
"""

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from selftaught.prompts import PromptStyle
from selftaught.records import Problem
from selftaught.sandbox import Limits, Program
from selftaught.tasks.answers import Verdict
from selftaught.tasks.base import Execution, Task, split_named

Isolation = Literal["namespaces", "process"]
IN_BLOCK = "Write the whole program in one code block."
FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
_DEFINITIONS = re.compile(
    r"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+((?!test)\w+)", re.MULTILINE | re.IGNORECASE
)
_FUTURE = re.compile(r"^from __future__ import [^\n]*$", re.MULTILINE)
PYTHON = ("", "py", "python", "python3")
HINT_CHARACTERS = 300


@dataclass(frozen=True)
class ProblemTests:
    """The tests of a problem."""

    tests: tuple[str, ...]
    """Blocks of statements."""
    setup: str = ""
    """Code that runs before the tests."""
    entry_point: str = ""
    """Name of the function that is tested; empty if the tests name it."""
    start: str = ""
    """Beginning of the program that the answer continues; empty if the answer is a whole program."""

    def text(self) -> str:
        """Return the tests as JSON, the value of `Problem.tests`."""
        return json.dumps({name: value for name, value in vars(self).items() if value})

    def program(self, answer: str) -> Program:
        """Return the program that tests an answer."""
        if not self.start:
            code = answer
        elif defines(answer, self.entry_point):
            code = self._replaced(answer)
        else:
            indented = answer[:1] in " \t" and not self.start.endswith("\n")
            code = f"{self.start}\n{answer}" if indented else f"{self.start}{answer}"
        entry = (self.entry_point,) if self.entry_point else ()
        return Program(code, self.tests, f"{self._helpers()}\n{self.setup}".strip("\n"), entry)

    def _replaced(self, answer: str) -> str:
        """Return the program with the answer in place of the function that its beginning opens."""
        opened = _definition(self.entry_point).search(self.start)
        before = self.start[: opened.start()] if opened else self.start
        future = _FUTURE.findall(answer)  # must come first
        return "\n".join([*future, before, _FUTURE.sub("", answer)])

    def _helpers(self) -> str:
        """Return the beginning of the program, whose helper functions the tests may use, or nothing
        if it is not a program by itself. Tests then do not use a program's version of them."""
        try:
            ast.parse(self.start)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return ""
        return self.start


def read_tests(text: str) -> ProblemTests:
    """Return the tests for the JSON in `Problem.tests`.

    Raises:
        ValueError: the text is not such JSON.
    """
    try:
        fields = json.loads(text)
        tests = fields.pop("tests")
        if not isinstance(tests, list) or not all(isinstance(one, str) for one in tests):
            raise TypeError
        return ProblemTests(tuple(tests), **fields)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise ValueError(
            f"Expected the tests of a code task as JSON, got {text[:100]!r}."
        ) from None


def program(tests: str, answer: str) -> Program:
    """Return the program that tests an answer; see `Execution`."""
    return read_tests(tests).program(answer)


def defines(code: str, name: str) -> bool:
    """Return whether a program defines a function at its top level."""
    return _definition(name).search(code) is not None


def _definition(name: str) -> re.Pattern[str]:
    return re.compile(rf"^(async[ \t]+)?def[ \t]+{re.escape(name)}\b", re.MULTILINE)


@dataclass(frozen=True)
class _Block:
    """A code block of a completion."""

    marked: bool
    """Whether it is marked as Python; other blocks have no mark."""
    code: str

    @property
    def rank(self) -> tuple[bool, bool]:
        """Order of blocks: those that define something other than tests, then those that are marked."""
        return _DEFINITIONS.search(self.code) is not None, self.marked


def extract(completion: str) -> str | None:
    """Return the program in a completion: a code block, or the whole text if it has none.

    Of several blocks, it is the last one that defines a function or class other than a test, after
    earlier blocks that define other names. Blocks that are marked as Python go before blocks without
    a mark. A block that is not closed ends with the text. Blocks marked as another language are
    skipped.
    """
    blocks = _blocks(completion)
    if blocks is None:
        return completion.rstrip() if completion.strip() else None
    best = max((block.rank for block in blocks), default=None)
    parts: list[str] = []
    seen: set[str] = set()
    for block in reversed([block for block in blocks if block.rank == best]):
        names = set(_DEFINITIONS.findall(block.code))
        if not parts or names - seen:
            parts.append(block.code)
        seen |= names
    return "\n\n".join(reversed(parts)) if parts else None


def _blocks(completion: str) -> list[_Block] | None:
    """Return the code blocks that may be Python, or None if the text has no code block."""
    blocks: list[_Block] = []
    opened: re.Match[str] | None = None
    fenced, lines = False, list[str]()

    def close() -> None:
        if opened is not None and opened[3].lower() in PYTHON and (code := "".join(lines)).strip():
            blocks.append(_Block(bool(opened[3]), code.rstrip()))

    for line in completion.splitlines(keepends=True):
        found = FENCE.match(line)
        if opened is None and found:
            opened, fenced, lines = found, True, []
        elif opened is not None and found and _closes(found, line, opened):
            close()
            opened = None
        elif opened is not None:
            lines.append(line.removeprefix(opened[1]))
    close()
    return blocks if fenced else None


def _closes(found: re.Match[str], line: str, opened: re.Match[str]) -> bool:
    return found[2].startswith(opened[2]) and not line.strip().strip(opened[2][0])


def expected_value(tests: Sequence[str]) -> str | None:
    """Return the source of the expected value in the first test that compares with one, or None."""
    for test in tests:
        try:
            tree = ast.parse(test)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for node in ast.walk(tree):
            match node:
                case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
                    reverse = isinstance(right, ast.Call) and not isinstance(left, ast.Call)
                    return ast.unparse(left if reverse else right)
    return None


def with_expected_value(problem: Problem) -> Problem:
    """Return the problem with the expected value of its first test in the question."""
    known = read_tests(problem.tests) if problem.tests else ProblemTests(())
    value = expected_value(known.tests)
    if value is None:
        return problem
    shown = f"The first test expects the result {value[:HINT_CHARACTERS]}."
    if known.start:  # the question is code, which the completion continues
        return replace(problem, question=f"# {shown}\n{problem.question}")
    return replace(problem, question=f"{problem.question}\n({shown})")


def _same_text(gold: str, answer: str) -> Verdict:
    return Verdict(gold.strip() == answer.strip(), "text")


def code_task(
    name: str, splits: Callable[[], dict[str, list[Problem]]], prompt: PromptStyle,
    execution: Execution, **about: Any,
) -> Task:  # fmt: skip
    return Task(
        name, lambda split: split_named(splits, split, name), prompt, extract, _same_text,
        with_expected_value, direct="{answer}", execution=execution, has_equations=False,
        instruction=IN_BLOCK, **about,
    )  # fmt: skip


def execution(sandbox: Isolation, seconds: float, memory_megabytes: int) -> Execution:
    limits = Limits(seconds=seconds, memory_bytes=memory_megabytes * 2**20)
    return Execution(program, limits, sandbox)

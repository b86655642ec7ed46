"""The class `Task`: where problems come from, and how they are prompted and graded."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from selftaught.prompts import PromptStyle, styled
from selftaught.records import Problem
from selftaught.sandbox import Limits, Program
from selftaught.tasks.answers import GRADING_VERSION, Verdict
from selftaught.thought_marks import THINK, ThoughtMarks, after_thought

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
"""Instruction for answers in a box, as mathematical models are commonly trained with."""
STATED = 'Please reason step by step, and end with "The answer is" and your final answer.'
LETTERED = (
    'Please reason step by step, and end with "The answer is (X).", where X is the letter of your '
    "choice."
)


def _function_key(function: Any, *, by_name: bool) -> object:
    """Return values that identify a function: its name and, unless `by_name`, its code and
    constants.

    Args:
        function: a function, or None.
        by_name: the name is sufficient, because the options of the task are part of the key.
    """
    if function is None:
        return None
    name = [getattr(function, "__module__", ""), getattr(function, "__qualname__", "")]
    code = getattr(function, "__code__", None)
    if by_name:
        return name
    if code is None:
        return [*name, repr(function)]
    captured = [repr(cell.cell_contents) for cell in function.__closure__ or ()]
    constants = [repr(one) for one in code.co_consts]
    return [*name, code.co_code.hex(), constants, list(code.co_names), captured,
            repr(function.__defaults__)]  # fmt: skip


@dataclass(frozen=True)
class Execution:
    """How answers that are programs are run."""

    program: Callable[[str, str], Program]
    """`program(tests, answer)` returns the program that tests an answer, given `Problem.tests`."""
    limits: Limits
    """Limits of one program."""
    isolation: Literal["namespaces", "process"]
    """Isolation of the programs; see `Sandbox`."""


@dataclass(frozen=True)
class Task:
    """Problems with gold answers, their prompts, and the rules for grading."""

    name: str
    problems: Callable[[str], Sequence[Problem]]
    """Returns all problems of a split ("train", "validation", "test"), always in the same order.

    Splits do not overlap. An unknown split is a ValueError that names the splits.
    """
    prompt: PromptStyle
    """Few-shot style of the task, with its worked examples, if it has any."""
    extract: Callable[[str], str | None]
    """Returns the answer in a completion, or None. Never raises; linear time in the text."""
    equal: Callable[[str, str], Verdict | bool]
    """`equal(gold, answer)` compares two answers fast; `Verdict(None, ...)` if undecided."""
    hint: Callable[[Problem], Problem]
    """`add_hint` of STaR: returns the problem with its gold answer, but not its rationale, in the
    question."""
    prove: Callable[[str, str], bool] | None = None
    """`prove(gold, answer)` compares two answers symbolically when `equal` cannot decide. It may be
    slow: `grade` runs it in worker processes with a time limit, so it must be a module-level
    function."""
    execution: Execution | None = None
    """How answers are run, if they are programs. Then an answer is correct if it passes the tests of
    its problem, and `equal` does not grade."""
    direct: str = "The answer is {answer}."
    """Template of a completion that states an answer without a rationale. `extract` must find the
    answer in it."""
    group: Callable[[Problem], str] | None = None
    """Returns the group of a problem, by which accuracy is reported, such as "3 digits"."""
    max_tokens: int = 256
    """Maximum number of new tokens per completion."""
    license: str = ""
    """Licence of the data, such as "mit"; empty if it is not stated."""
    data_sets: tuple[str, ...] = ()
    """Names of the data sets on the Hugging Face Hub that the problems come from."""
    facts: str = ""
    """Source, licence and paper, in one line."""
    thought_marks: ThoughtMarks = THINK
    """Texts that open and close a thought. Answers inside a thought are ignored."""
    step_separator: str = "\n"
    """Text that ends a step of a rationale."""
    has_equations: bool = True
    """Whether rationales contain plain equations, by which solution paths can be compared."""
    instruction: str = ""
    """Instruction for chat models to state the answer in the form that `extract` expects."""

    def styled(
        self,
        name: str,
        *,
        system_prompt: str = "",
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PromptStyle:
        """Return the task's prompt in a style.

        Args:
            name: "few_shot", "bare", or "chat" (with the task's instruction).
            system_prompt, chat_template_kwargs: for "chat" only; see `PromptStyle`.

        Raises:
            ValueError: see `selftaught.prompts.styled`.
        """
        return styled(
            self.prompt,
            name,
            instruction=self.instruction,
            system=system_prompt,
            chat_template_kwargs=chat_template_kwargs,
        )

    options: str = ""
    """Options that the task was opened with, as JSON."""

    @property
    def answer_marker(self) -> str:
        """Text that introduces the answer in a completion, such as "####", without the spaces and
        opening signs between it and the answer."""
        before = self.direct.format(answer="\0").partition("\0")[0]
        if "\\boxed{" in before:
            return "\\boxed{"
        return before.rstrip(" \t\n:$*([{\"'`")

    @property
    def grading_key(self) -> str:
        """A hash of everything that a grade depends on besides the rollout.

        It changes with the task, its options, the thought marks and the version of the grading rules;
        stored grades with another key are computed again.
        """
        functions = [
            _function_key(one, by_name=bool(self.options))
            for one in (self.extract, self.equal, self.prove)
        ]
        rules = [GRADING_VERSION, self.name, self.options, self.thought_marks, functions]
        return hashlib.sha256(json.dumps(rules).encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def reference(self, problem: Problem) -> str:
        """Return what an answer to a problem is compared with: the gold answer, or the tests."""
        return problem.gold if self.execution is None else problem.tests

    def answer(self, completion: str, *, thought_open: bool = False) -> str | None:
        """Return the answer that is stated after the last thought, or None if there is none.

        Args:
            completion: text of the completion.
            thought_open: whether the prompt ends inside a thought, which the completion continues.
        """
        text = after_thought(completion, self.thought_marks, opened=thought_open)
        return None if text is None else self.extract(text)


def answer_in_brackets(problem: Problem) -> Problem:
    """Return the problem with its gold answer in brackets after the question."""
    return replace(problem, question=f"{problem.question} ({problem.gold})", rationale=None)


def split_named(
    splits: Callable[[], dict[str, list[Problem]]], split: str, task: str
) -> list[Problem]:
    """Return the problems of a split.

    Raises:
        ValueError: the split is not "train", "validation" or "test".
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"{task} has the splits train, validation and test; got {split!r}.")
    return splits()[split]
